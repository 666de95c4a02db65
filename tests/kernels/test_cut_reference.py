"""Columns of a matrix, cut anywhere, give the codes, scales and Newton-Schulz input of the whole, bit for bit."""

from itertools import pairwise

import pytest
import torch
from helpers.bitwise import assert_bitwise
from muon8bit_kernels import CODE_DTYPES, num_blocks
from muon8bit_kernels.reference import momentum_apply, momentum_apply_cut, momentum_stats, momentum_stats_cut, quantize

BLOCK = 64
OPTIONS = {"beta": 0.9, "block_size": BLOCK}


def matrices(codebook, cols, count=3, rows=5, block_size=BLOCK):
    """Stacks of one, two and more matrices: codes, scales, gradients; a zero block and a tiny one among them."""
    generator = torch.Generator().manual_seed(cols)
    old = torch.randn(count, rows, cols, generator=generator)
    grads = torch.randn(count, rows, cols, generator=generator).bfloat16()
    old[0, 1], grads[0, 1] = 0.0, 0.0
    old[-1, 2], grads[-1, 2] = 1e-40, 0.0
    if codebook is None:
        return old, None, grads
    pairs = [quantize(matrix, codebook=codebook, block_size=block_size) for matrix in old]
    return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs]), grads


@pytest.mark.parametrize("codebook", [*CODE_DTYPES, None])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("cols", "cuts"), [(200, (0, 64, 200)), (200, (0, 1, 63, 65, 130, 200)), (40, (0, 7, 40))])
def test_cut_columns_match_the_whole(codebook, nesterov, cols, cuts):
    options = {**OPTIONS, "nesterov": nesterov, "codebook": codebook}
    codes, scales, grads = matrices(codebook, cols)
    norms = torch.tensor([2.0, 0.5, 3.0])

    def stacks(tensor, span=slice(None)):
        return [tensor[:1, :, span], tensor[1:, :, span]]

    parts = []
    for start, stop in pairwise(cuts):
        span = slice(start, stop)
        own_scales = None if scales is None else stacks(scales.clone())
        parts.append((span, stacks(codes[..., span].clone()), own_scales, stacks(grads[..., span])))
    sums, maxima = torch.zeros(2, 3, 5, num_blocks(cols, BLOCK))
    for span, *tensors in parts:
        of_part = momentum_stats_cut(*tensors, first_col=span.start, **options)
        blocks = slice(span.start // BLOCK, -(-span.stop // BLOCK))
        sums[..., blocks] += of_part[0]
        maxima[..., blocks] = torch.maximum(maxima[..., blocks], of_part[1])

    whole_codes, whole_scales = stacks(codes), None if scales is None else stacks(scales)
    expected = momentum_stats(whole_codes, whole_scales, stacks(grads), **options)
    if all(cut % BLOCK == 0 for cut in cuts[:-1]):
        assert_bitwise(sums, expected)
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=0)

    whole_out = torch.empty(3, 5, cols)
    momentum_apply(whole_codes, whole_scales, stacks(grads), norms, whole_out, **options)
    new_scales = None if scales is None else maxima
    for span, own_codes, own_scales, own_grads in parts:
        out = torch.empty(3, 5, span.stop - span.start)
        momentum_apply_cut(own_codes, own_scales, own_grads, new_scales, norms, out, first_col=span.start, **options)
        assert_bitwise(out, whole_out[..., span])
        for own, whole in zip(own_codes, whole_codes, strict=True):
            assert_bitwise(own, whole[..., span])
        for own, whole in zip(own_scales or [], whole_scales or [], strict=True):
            assert_bitwise(own, whole)


def test_skip_writes_nothing():
    codes, scales, grads = matrices("linear", 100)
    out, before = torch.full((3, 5, 100), 7.0), (codes.clone(), scales.clone())
    options = {**OPTIONS, "nesterov": True, "codebook": "linear", "skip": torch.ones(())}
    momentum_apply_cut([codes], [scales], [grads], scales * 2, torch.ones(3), out, first_col=0, **options)
    assert_bitwise(codes, before[0])
    assert_bitwise(scales, before[1])
    assert (out == 7).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_gradient_shows_in_the_sum_of_its_block(bad):
    codes, scales, grads = matrices("dynamic", 100)
    grads[1, 2, 70] = bad
    options = {**OPTIONS, "nesterov": True, "codebook": "dynamic"}
    sums, _ = momentum_stats_cut([codes], [scales], [grads], first_col=0, **options)
    assert (~sums.isfinite()).nonzero().tolist() == [[1, 2, 1]]


@pytest.mark.parametrize("codebook", ["linear", None])
@pytest.mark.parametrize(
    ("rows", "cols", "num_parts"),
    [
        (1024, 3584, 2),
        (1024, 3584, 4),
        (1024, 3584, 8),
        (300, 14336, 2),
        (300, 14336, 4),
        (300, 14336, 8),
        (600, 5331, 3),
    ],
)
def test_columns_of_large_matrices_match_the_whole(codebook, rows, cols, num_parts):
    """Row-parallel layers as they are: a block is cut, and each part has more elements than one pass works on."""
    options = {"beta": 0.9, "nesterov": True, "codebook": codebook, "block_size": 2048}
    codes, scales, grads = matrices(codebook, cols, count=1, rows=rows, block_size=2048)
    width = cols // num_parts
    spans = [slice(start, start + width) for start in range(0, cols, width)]
    maxima = torch.zeros(1, rows, num_blocks(cols, 2048))
    for span in spans:
        stacks = [codes[..., span]], None if scales is None else [scales], [grads[..., span]]
        _, found = momentum_stats_cut(*stacks, first_col=span.start, **options)
        blocks = slice(span.start // 2048, -(-span.stop // 2048))
        maxima[..., blocks] = torch.maximum(maxima[..., blocks], found)
    parts, outs = [codes[..., span].clone() for span in spans], []
    for part, span in zip(parts, spans, strict=True):
        outs.append(torch.empty(1, rows, width))
        stacks = [part], None if scales is None else [scales.clone()], [grads[..., span]]
        new_scales = None if scales is None else maxima
        momentum_apply_cut(*stacks, new_scales, torch.ones(1), outs[-1], first_col=span.start, **options)
    out = torch.empty(1, rows, cols)
    whole = [codes], None if scales is None else [scales], [grads]
    momentum_apply(*whole, torch.ones(1), out, **options)
    assert_bitwise(torch.cat(parts, -1), codes)
    assert_bitwise(torch.cat(outs, -1), out)
    if scales is not None:
        assert_bitwise(maxima, scales)
