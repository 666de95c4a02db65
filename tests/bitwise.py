"""Equal to the bit, wherever the tensors are."""

import torch


def bits(tensor):
    """On the CPU, as integers, so that -0.0 differs from 0.0; one bit pattern for all NaN."""
    tensor = torch.where(tensor.isnan(), torch.nan, tensor).cpu() if tensor.is_floating_point() else tensor.cpu()
    return tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def assert_bitwise(actual, expected):
    assert actual.dtype == expected.dtype
    assert torch.equal(bits(actual), bits(expected))


def on(device, tensor):
    """The same values and strides on a device; never the tensor itself."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)
