"""Momentum steps by the Triton kernels and by the reference, side by side."""

import torch
from muon8bit_kernels import reference

from helpers.bitwise import assert_bitwise, on
from helpers.layouts import laid_out


def random_stacks(counts, rows, cols, dtype=torch.float32, layout="rows", seed=0):
    """Return one stack [count, rows, cols] a count; rows differ in size, and one of each matrix is zero."""
    generator = torch.Generator().manual_seed(seed)
    stacks = []
    for count in counts:
        size = torch.randn(count, rows, 1, generator=generator).exp()
        size[:, rows // 2] = float(rows == 1)
        stacks.append(laid_out((torch.randn(count, rows, cols, generator=generator) * size).to(dtype), layout))
    return stacks


def state_of(momentum, *, codebook, block_size, layout="rows"):
    """Return stacks of codes and of scales in a layout, of a momentum in stacks; scales None without a codebook."""
    if codebook is None:
        return [laid_out(stack, layout) for stack in momentum], None
    codes, scales = [], []
    for stack in momentum:
        pairs = [reference.quantize(matrix, codebook=codebook, block_size=block_size) for matrix in stack]
        codes.append(laid_out(torch.stack([pair[0] for pair in pairs]), layout))
        scales.append(laid_out(torch.stack([pair[1] for pair in pairs]), layout))
    return codes, scales


def with_surroundings(tensor):
    """Return all of the storage that a tensor is a view of."""
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)


class Both:
    """A state here and a copy of it on the device, stepped alike."""

    def __init__(self, kernels, device, momentum, *, layout="rows", **options):
        self.kernels, self.device, self.options = kernels, device, options
        state = {name: options[name] for name in ("codebook", "block_size")}
        self.codes, self.scales = state_of(momentum, **state, layout=layout)
        whole = [with_surroundings(stack).to(device, copy=True) for stack in [*self.codes, *(self.scales or [])]]
        ours = [
            storage.as_strided(stack.shape, stack.stride(), stack.storage_offset())
            for storage, stack in zip(whole, [*self.codes, *(self.scales or [])], strict=True)
        ]
        self.our_codes = ours[: len(self.codes)]
        self.our_scales = None if self.scales is None else ours[len(self.codes) :]

    def check_stats(self, grads):
        """Compare and return the norms of the reference."""
        sumsq = reference.momentum_stats(self.codes, self.scales, grads, **self.options)
        our_grads = [on(self.device, grad) for grad in grads]
        ours = self.kernels.momentum_stats(self.our_codes, self.our_scales, our_grads, **self.options)
        # Two sums of the same n squares, each within n / 2**24 of the true one.
        tolerance = 2 * min(self.options["block_size"], grads[0].shape[2]) * 2**-24
        torch.testing.assert_close(ours.cpu(), sumsq, rtol=tolerance, atol=0, equal_nan=True)
        return sumsq.sum((1, 2)).sqrt().clamp(1e-7, 1e18)  # so that a sum that overflowed leaves something of u

    def check_apply(self, grads, norms, *, out_dtype=torch.float32, out_layout="rows", skip=None):
        """Step both and compare everything, what lies between the rows and around them too."""
        shape = len(norms), *grads[0].shape[1:]
        out = laid_out(torch.full(shape, 3.0, dtype=out_dtype), out_layout)
        whole = with_surroundings(out).to(self.device, copy=True)
        our_out = whole.as_strided(out.shape, out.stride(), out.storage_offset())
        reference.momentum_apply(self.codes, self.scales, grads, norms, out, **self.options, skip=skip)
        our_grads = [on(self.device, grad) for grad in grads]
        norms, skip = norms.to(self.device), None if skip is None else skip.to(self.device)
        self.kernels.momentum_apply(
            self.our_codes, self.our_scales, our_grads, norms, our_out, **self.options, skip=skip
        )
        assert_bitwise(whole, with_surroundings(out))
        for ours, theirs in zip(self.our_codes, self.codes, strict=True):
            assert_bitwise(with_surroundings(ours), with_surroundings(theirs))
        for ours, theirs in zip(self.our_scales or [], self.scales or [], strict=True):
            assert_bitwise(with_surroundings(ours), with_surroundings(theirs))
