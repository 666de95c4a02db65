"""Equal to the bit, wherever the tensors are."""

import torch


def bits(tensor):
    """Return a copy on the CPU, as integers, so that -0.0 differs from 0.0; one bit pattern for all NaN."""
    tensor = torch.where(tensor.isnan(), torch.nan, tensor).cpu() if tensor.is_floating_point() else tensor.cpu()
    return tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def assert_bitwise(actual, expected):
    assert actual.dtype == expected.dtype
    assert torch.equal(bits(actual), bits(expected))


def on(device, tensor):
    """Return the same values and strides on a device; never the tensor itself."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


def assert_nested_equal(left, right):
    """Check any nesting of dicts and sequences: equal types, keys in one order, tensors to the bit, and values."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_nested_equal(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for ours, theirs in zip(left, right, strict=True):
            assert_nested_equal(ours, theirs)
    else:
        assert left == right
