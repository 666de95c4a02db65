"""The shipped torch reference against oracles in numpy: float32 operation by operation for bits, float64 for bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from muon8bit_kernels import CODE_DTYPES, dynamic_map, num_blocks, reference, zero_code
from muon8bit_kernels.codebooks import dynamic_midpoints

BLOCK_SIZES = [64, 128, 256, 512, 1024, 2048, 4096]
CODEBOOKS = ["linear", "dynamic", None]
F32 = np.float32
TINY = np.finfo(F32).tiny


def blocks_of(array, block_size):
    """The blocks of a matrix as (row, block index, slice), in order."""
    rows, cols = array.shape
    for row in range(rows):
        for index, start in enumerate(range(0, cols, block_size)):
            yield row, index, slice(start, min(start + block_size, cols))


def spread_scales(scales, cols, block_size):
    """Scales [rows, blocks] -> one for each element, [rows, cols]."""
    return np.repeat(scales, block_size, axis=1)[:, :cols]


def numpy_decode(codes, scales, codebook):
    """Codes and one fp32 scale for each element -> fp32, an operation at a time."""
    if codebook == "linear":
        return (codes.astype(F32) * scales) / F32(127)
    return dynamic_map().numpy()[codes] * scales


def numpy_encode(values, scales, codebook):
    """fp32 values and one fp32 scale for each element -> codes, an operation at a time."""
    ratio = np.where(scales == 0, F32(0), values / np.where(scales == 0, F32(1), scales))
    if codebook == "linear":
        return np.rint(ratio * F32(127)).astype(np.int8)
    return np.searchsorted(dynamic_midpoints().numpy()[:-1], ratio, side="left").astype(np.uint8)


def numpy_step(state, grad, beta, nesterov, codebook, block_size):
    """One momentum step in float32 -> m, u, and the new state (codes and scales, or m alone)."""
    beta, one_minus_beta, g = F32(beta), F32(1.0 - beta), grad.astype(F32)
    if codebook is None:
        old = state[0]
    else:
        old = numpy_decode(state[0], spread_scales(state[1], grad.shape[1], block_size), codebook)
    m = beta * old + one_minus_beta * g
    u = beta * m + one_minus_beta * g if nesterov else m
    absmax = np.zeros((grad.shape[0], num_blocks(grad.shape[1], block_size)), F32)
    for row, index, cols in blocks_of(m, block_size):
        absmax[row, index] = np.abs(m[row, cols]).max()
    if codebook is None:
        return m, u, (m, None)
    scales = np.where(absmax < TINY, F32(0), absmax)
    return m, u, (numpy_encode(m, spread_scales(scales, m.shape[1], block_size), codebook), scales)


def start_state(rows, cols, codebook, block_size, seed=0):
    """A momentum to start from: codes and scales, or the fp32 buffer and None."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, cols, generator=generator) * torch.randn(rows, 1, generator=generator).exp()
    if codebook is None:
        return values, None
    return reference.quantize(values, codebook=codebook, block_size=block_size)


# --- quantize and dequantize ---


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("tail", [0, 1, 37])
def test_scales_are_the_floored_maximum_of_each_block(hard_matrix, block_size, tail):
    values = hard_matrix(2 * block_size + tail)
    _, scales = reference.quantize(values, codebook="linear", block_size=block_size)
    assert scales.shape == (14, 2 + (tail > 0))
    assert scales.dtype == torch.float32
    for row, index, cols in blocks_of(values.numpy(), block_size):
        largest = np.abs(values.numpy()[row, cols]).max()
        assert scales[row, index] == (largest if largest >= TINY else 0.0)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_linear_codes_match_the_formula_in_float64(hard_matrix, block_size):
    values = hard_matrix(block_size + 37)
    codes, scales = reference.quantize(values, codebook="linear", block_size=block_size)
    scale = spread_scales(scales.numpy(), values.shape[1], block_size).astype(np.float64)
    exact = 127 * values.numpy().astype(np.float64) / np.where(scale == 0, np.inf, scale)
    codes = codes.numpy()
    # m / s and its product with 127 are each rounded to fp32: the quotient is 127 * 2**-23 off at most.
    slack = 127 * 2.0**-23
    assert np.abs(codes - exact).max() <= 0.5 + slack
    clear = np.abs(np.abs(exact - np.floor(exact)) - 0.5) > slack
    assert np.array_equal(codes[clear], np.rint(exact[clear]).astype(np.int8))
    assert clear.mean() > 0.8


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dynamic_codes_match_argmin_oracle(hard_matrix, block_size):
    values = hard_matrix(block_size + 37)
    codes, scales = reference.quantize(values, codebook="dynamic", block_size=block_size)
    scale = spread_scales(scales.numpy(), values.shape[1], block_size).astype(np.float64)
    check_nearest(codes.numpy(), values.numpy() / np.where(scale == 0, np.inf, scale))


def check_nearest(codes, ratio):
    """Every code names the map entry nearest to float64 `ratio`; within one fp32 unit of a midpoint, or a neighbour."""
    entries = dynamic_map().numpy().astype(np.float64)
    midpoints = (entries[:-1] + entries[1:]) / 2
    for row_codes, row in zip(codes, ratio, strict=True):
        nearest = np.abs(row[:, None] - entries).argmin(1)
        wrong = row_codes != nearest
        between = midpoints[np.minimum(row_codes, nearest)[wrong]]
        assert (np.abs(row_codes[wrong].astype(int) - nearest[wrong]) == 1).all()
        assert (np.abs(row[wrong] - between) <= np.spacing(np.abs(between).astype(F32))).all()


def test_dynamic_codes_count_the_midpoints_below_at_every_midpoint_and_its_neighbours():
    midpoints = dynamic_midpoints().numpy()[:-1]
    around = [midpoints, np.nextafter(midpoints, F32(-2)), np.nextafter(midpoints, F32(2))]
    values = np.stack([np.concatenate([[F32(1)], row]) for row in around])  # +1 first: the scale is 1, m / s exact
    expected = np.concatenate([[255], np.arange(255)]) + np.array([[0], [0], [1]]) * (np.arange(256) > 0)
    codes, scales = reference.quantize(torch.from_numpy(values), codebook="dynamic", block_size=256)
    assert bool((scales == 1).all())
    assert np.array_equal(codes.numpy(), expected)


def test_linear_ties_go_to_the_even_code():
    values = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5, -126.5]]) * 2.0**-7
    codes, scales = reference.quantize(values, codebook="linear", block_size=64)
    assert scales.item() == 127 / 128
    # (m / 127) * 127 in fp32 gives these ties back exactly.
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126]]


@pytest.mark.parametrize("scale", [1.0, 0.3, 1 / 3, 7e5, 2e36, 1e-30, 3.7e-3])
def test_quantize_gives_all_codes_back(scale):
    """Exhaustive. The code of the largest magnitude decodes to the scale itself, so the scale comes back too."""
    for codebook, codes in {
        "linear": torch.arange(-127, 128).to(torch.int8)[None],
        "dynamic": torch.arange(256).to(torch.uint8)[None],
    }.items():
        scales = torch.tensor([[scale]])
        values = reference.dequantize(codes, scales, codebook=codebook, block_size=256)
        if codebook == "linear":
            values[0, -1] = scales.item()  # (127 * s) / 127 may be one unit off
        again, scales_again = reference.quantize(values, codebook=codebook, block_size=256)
        assert torch.equal(again, codes)
        assert torch.equal(scales_again, scales)


@pytest.mark.parametrize("codebook", ["linear", "dynamic"])
@pytest.mark.parametrize("block_size", [64, 4096])
def test_dequantize_error_is_at_most_half_a_step(hard_matrix, codebook, block_size):
    values = hard_matrix(block_size + 37)
    codes, scales = reference.quantize(values, codebook=codebook, block_size=block_size)
    decoded = reference.dequantize(codes, scales, codebook=codebook, block_size=block_size).numpy().astype(np.float64)
    scale = spread_scales(scales.numpy(), values.shape[1], block_size).astype(np.float64)
    # The steps are 1 / 127 of the scale, and the map's, with -1.0 taking its lowest entry.
    half_step = 0.5 / 127 if codebook == "linear" else max(dynamic_map().diff().max().item() / 2, 1 - 0.99296)
    # 2**-15: the roundings to fp32, relative to half a step. Below the floor everything is stored as zero.
    bound = np.where(scale == 0, TINY, half_step * scale * (1 + 2**-15))
    # (code * s) / 127 overflows in its product above this scale; sums of squares have overflowed long before.
    decodable = scale <= np.finfo(F32).max / 127 if codebook == "linear" else scale == scale
    assert (np.abs(decoded - values.numpy()) <= bound)[decodable].all()


@pytest.mark.parametrize("codebook", ["linear", "dynamic"])
def test_zero_and_subnormal_blocks_are_stored_as_exact_zeros(codebook):
    values = torch.zeros(2, 100)
    values[1] = -torch.linspace(1e-45, 1.17e-38, 100)
    codes, scales = reference.quantize(values, codebook=codebook, block_size=64)
    assert bool((codes == zero_code(codebook)).all())
    assert bool((scales == 0).all())
    assert bool((reference.dequantize(codes, scales, codebook=codebook, block_size=64) == 0).all())


def test_quantize_takes_any_float_dtype_stride_and_default_dtype():
    values = torch.randn(24, 150, generator=torch.Generator().manual_seed(0))
    for other in (values.double(), values.t().contiguous().t(), values.repeat_interleave(2, 1)[:, ::2]):
        for codebook in ("linear", "dynamic"):
            torch.set_default_dtype(torch.float64)
            try:
                codes, scales = reference.quantize(other, codebook=codebook, block_size=64)
                decoded = reference.dequantize(codes, scales, codebook=codebook, block_size=64)
            finally:
                torch.set_default_dtype(torch.float32)
            expected = reference.quantize(values, codebook=codebook, block_size=64)
            assert torch.equal(codes, expected[0])
            assert torch.equal(scales, expected[1])
            assert decoded.dtype == scales.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        rounded = values.to(dtype)
        codes, _ = reference.quantize(rounded, codebook="linear", block_size=64)
        assert torch.equal(codes, reference.quantize(rounded.float(), codebook="linear", block_size=64)[0])


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_matrices_without_elements_pass_through(shape):
    codes, scales = reference.quantize(torch.empty(shape), codebook="linear", block_size=64)
    assert codes.shape == shape
    assert scales.shape == (shape[0], min(shape[1], 1))
    assert reference.dequantize(codes, scales, codebook="linear", block_size=64).shape == shape


# --- the two-phase momentum step ---


def stats(codes, scales, grad, **options):
    """Of one matrix: sumsq [rows, blocks]."""
    stacks = [codes[None]], None if scales is None else [scales[None]], [grad[None]]
    return reference.momentum_stats(*stacks, **options)[0]


def apply_(codes, scales, grad, norm, out, **options):
    """To one matrix, all arguments 2-D and `norm` 0-d."""
    stacks = [codes[None]], None if scales is None else [scales[None]], [grad[None]]
    reference.momentum_apply(*stacks, norm.view(1), out[None], **options)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("rows", "cols", "block_size"), [(1, 1, 64), (7, 1, 64), (1, 9, 64), (5, 200, 64), (290, 500, 256)]
)
def test_five_steps_match_float32_oracle_bitwise(codebook, nesterov, rows, cols, block_size):
    codes, scales = start_state(rows, cols, codebook, block_size)
    state = (codes.numpy().copy(), None if scales is None else scales.numpy().copy())
    generator = torch.Generator().manual_seed(1)
    options = {"beta": 0.95, "nesterov": nesterov, "codebook": codebook, "block_size": block_size}
    for _ in range(5):
        grad = torch.randn(rows, cols, generator=generator) * torch.randn(rows, 1, generator=generator).exp()
        _, u, state = numpy_step(state, grad.numpy(), 0.95, nesterov, codebook, block_size)
        sumsq = stats(codes, scales, grad, **options)
        norm = sumsq.sum().sqrt().clamp(min=1e-7)
        out = torch.empty(rows, cols)
        apply_(codes, scales, grad, norm, out, **options)
        assert np.array_equal(out.numpy(), u * (F32(1) / norm.numpy()))
        assert np.array_equal(codes.numpy(), state[0])
        assert codebook is None or np.array_equal(scales.numpy(), state[1])
        for row, index, block in blocks_of(u, block_size):  # a sum of n squares in any order of fp32 additions
            exact = (u[row, block].astype(np.float64) ** 2).sum()
            assert abs(sumsq[row, index].item() - exact) <= block_size * 2.0**-24 * exact


@pytest.mark.parametrize("codebook", ["linear", "dynamic"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_newton_schulz_sees_the_momentum_before_it_is_quantized(codebook, nesterov):
    codes, scales = start_state(6, 150, codebook, 64)
    grad = torch.randn(6, 150, generator=torch.Generator().manual_seed(1))
    options = {"beta": 0.9, "nesterov": nesterov, "codebook": codebook, "block_size": 64}
    old = reference.dequantize(codes, scales, codebook=codebook, block_size=64).double()
    m = 0.9 * old + 0.1 * grad.double()
    u = 0.9 * m + 0.1 * grad.double() if nesterov else m
    sumsq = stats(codes, scales, grad, **options)
    out = torch.empty(6, 150)
    apply_(codes, scales, grad, sumsq.sum().sqrt(), out, **options)
    stored = reference.dequantize(codes, scales, codebook=codebook, block_size=64).double()
    # fp32 rounding alone: a few units of the largest term
    torch.testing.assert_close(out.double(), u / u.norm(), rtol=0, atol=float(8 * 2**-24 * u.abs().max() / u.norm()))
    # and the state keeps m, quantized, never the Nesterov blend
    per_element = scales.double().repeat_interleave(64, 1)[:, :150]
    assert bool(((stored - m).abs() <= 0.01 * per_element).all())
    assert float((stored - m).abs().max()) > 1e-4


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_gradient_shows_in_its_block_alone(codebook, bad):
    codes, scales = start_state(3, 150, codebook, 64)
    options = {"beta": 0.95, "nesterov": True, "codebook": codebook, "block_size": 64}
    for row, col in [(0, 0), (1, 63), (1, 64), (2, 127), (2, 128), (0, 149), (2, 140)]:
        grad = torch.ones(3, 150)
        grad[row, col] = bad
        sumsq = stats(codes, scales, grad, **options)
        expected = torch.ones(3, 3, dtype=torch.bool)
        expected[row, col // 64] = False
        assert torch.equal(sumsq.isfinite(), expected)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradient_dtype_and_strides_do_not_matter(codebook, dtype):
    values = torch.randn(20, 150, generator=torch.Generator().manual_seed(3)).to(dtype)
    layouts = [
        values.t().contiguous().t(),
        values.repeat_interleave(3, 0)[1::3],
        values.repeat_interleave(2, 1)[:, ::2],
    ]
    options = {"beta": 0.95, "nesterov": True, "codebook": codebook, "block_size": 64}
    results = []
    for grad in [values.float(), *layouts]:
        codes, scales = start_state(20, 150, codebook, 64)
        sumsq = stats(codes, scales, grad, **options)
        out = torch.empty(150, 20).t()
        apply_(codes, scales, grad, torch.tensor(3.0), out, **options)
        results.append((codes, scales if scales is not None else codes, sumsq, out))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_a_batch_of_stacks_equals_its_matrices_one_by_one(codebook):
    """Stacks of 1, 3 and 2 matrices, with gaps between them, cut into pieces that straddle matrices."""
    generator = torch.Generator().manual_seed(4)
    state = [start_state(7, 150, codebook, 64, seed=i) for i in range(6)]
    grads = [torch.randn(9, 7, 150, generator=generator)[start:stop] for start, stop in ((0, 1), (3, 6), (7, 9))]
    norms = torch.rand(6, generator=generator) + 0.5
    options = {"beta": 0.95, "nesterov": True, "codebook": codebook, "block_size": 64}

    def stacks(place):
        """Rows 0 to 7 of matrices that have 8 in memory."""
        if codebook is None and place == 1:
            return None
        padded = [torch.nn.functional.pad(matrix[place], (0, 0, 0, 1)) for matrix in state]
        return [torch.stack(padded[start:stop])[:, :7] for start, stop in ((0, 1), (1, 4), (4, 6))]

    codes, scales, out = stacks(0), stacks(1), torch.empty(6, 150, 7).mT
    sumsq = reference.momentum_stats(codes, scales, grads, **options)
    reference.momentum_apply(codes, scales, grads, norms, out, **options)
    for i, (grad, (old_codes, old_scales)) in enumerate(zip(torch.cat(grads), state, strict=True)):
        assert torch.equal(sumsq[i], stats(old_codes, old_scales, grad, **options))
        expected = torch.empty(7, 150)
        apply_(old_codes, old_scales, grad, norms[i], expected, **options)
        assert torch.equal(out[i], expected)
        assert torch.equal(torch.cat(codes)[i], old_codes)
        assert scales is None or torch.equal(torch.cat(scales)[i], old_scales)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("is_known", [True, False])
def test_skip_writes_nothing_where_it_is_not_zero(codebook, is_known, monkeypatch):
    """Also where the host does not wait for the flag, as on CUDA."""
    if not is_known:
        for module in ("momentum", "update", "tiny", "cut"):
            monkeypatch.setattr(f"muon8bit_kernels.reference.{module}.known_flag", lambda skip, _: (False, skip))
    codes, scales = start_state(5, 70, codebook, 64)
    stacks = [codes[None]], None if scales is None else [scales[None]], [torch.ones(1, 5, 70)]
    before = [t.clone() for t in (codes, scales) if t is not None]
    options = {"beta": 0.95, "nesterov": True, "codebook": codebook, "block_size": 64}
    for value, writes in ((1.0, False), (torch.nan, False), (0.0, True)):
        skip, out = torch.tensor(value), torch.full((1, 5, 70), torch.nan)
        cut = [t[:, :2] for t in stacks[0]], stacks[1] and [t[:, :2] for t in stacks[1]], [stacks[2][0][:, :2]]
        new_scales = None if scales is None else torch.ones(1, 2, 2)
        of_cut = torch.full((1, 2, 70), torch.nan)
        if not writes:  # it would write what is compared below
            reference.momentum_apply_cut(*cut, new_scales, torch.ones(1), of_cut, **options, first_col=0, skip=skip)
            assert bool(of_cut.isnan().all())
        reference.momentum_apply(*stacks, torch.ones(1), out, **options, skip=skip)
        after = [t for t in (codes, scales) if t is not None]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)) != writes
        assert bool(out.isfinite().all()) == writes
        param = torch.ones(1, 5, 70)
        reference.update_params([param], torch.ones(1, 5, 70), decay=1.0, scale=0.5, skip=skip)
        assert bool((param == 0.5).all()) == writes


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("is_known", [True, False])
def test_flags_of_matrices_leave_the_others_steps_as_they_are(codebook, is_known, monkeypatch):
    """Each of the others is stepped as by itself; one that is skipped keeps every bit, the output's too."""
    if not is_known:
        for module in ("momentum", "update", "tiny", "cut"):
            monkeypatch.setattr(
                f"muon8bit_kernels.reference.{module}.known_flag",
                lambda skip, rows: (False, None if skip is None else skip.repeat_interleave(rows).unsqueeze(1)),
            )
    generator, options = torch.Generator().manual_seed(0), {"codebook": codebook, "block_size": 64}
    momenta, grads, weights = torch.randn(3, 3, 6, 70, generator=generator)
    options |= {"beta": 0.95, "nesterov": True}
    form = {key: options[key] for key in ("codebook", "block_size")}
    quantized = [(m,) if codebook is None else reference.quantize(m, **form) for m in momenta]
    update = {"decay": 0.9, "scale": 0.5, "keys": [1, 2, 3], "firsts": [0, 5, 9], "cautious": True}
    steps = ((3.0, -4.0, 2.0),) * 2

    def run(numbers, **skip):
        state = [torch.stack(parts) for parts in zip(*(quantized[n] for n in numbers), strict=True)]
        new_scales = None if codebook is None else state[1] + 1
        found = []
        for way in ("apply", "cut", "tiny"):
            codes, scales = [state[0].clone()], None if codebook is None else [state[1].clone()]
            out, norms = torch.full((len(numbers), 6, 70), 7.0), torch.ones(len(numbers))
            params = [weights[numbers].bfloat16()]
            factors = {k: [v[n] for n in numbers] if isinstance(v, list) else v for k, v in update.items()}
            tensors = codes, scales, [grads[numbers]]
            if way == "apply":
                reference.momentum_apply(*tensors, norms, out, **options, **skip)
                reference.update_params(params, grads[numbers], **factors, **skip)
            elif way == "cut":
                reference.momentum_apply_cut(*tensors, new_scales, norms, out, first_col=0, **options, **skip)
            else:
                reference.step_tiny(*tensors, params, norms, steps=steps, **options, **factors, **skip)
            found += [*codes, *(scales or []), out, *params]
        return found

    together, kept = run([0, 1, 2], skip=torch.tensor([0.0, 1.0, 0.0])), run([1], skip=torch.ones(1))
    for number in (0, 1, 2):
        alone = kept if number == 1 else run([number])
        assert all(torch.equal(every[number], one[0]) for every, one in zip(together, alone, strict=True))
    assert torch.equal(kept[0][0], quantized[1][0])
    assert torch.equal(kept[-1][0], weights[1].bfloat16())


def test_a_flag_on_another_device_is_not_waited_for():
    """A tensor without storage cannot be waited for."""
    codes, scales, grads, out = (torch.empty(1, 5, n, device="meta") for n in (70, 2, 70, 70))
    options = {"beta": 0.95, "nesterov": True, "codebook": "linear", "block_size": 64}
    norms = torch.ones(1, device="meta")
    for skip in (torch.zeros((), device="meta"), norms):
        reference.momentum_apply([codes], [scales], [grads], norms, out, **options, skip=skip)
        reference.momentum_apply_cut([codes], [scales], [grads], scales, norms, out, **options, first_col=0, skip=skip)
        reference.update_params([out], grads, decay=1.0, scale=0.5, skip=skip)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_zero_state_and_zero_gradient_stay_zero(codebook):
    codes, scales = torch.zeros(3, 70), None
    if codebook is not None:
        codes, scales = reference.quantize(codes, codebook=codebook, block_size=64)
    before = codes.clone()
    options = {"beta": 0.95, "nesterov": True, "codebook": codebook, "block_size": 64}
    sumsq = stats(codes, scales, torch.zeros(3, 70), **options)
    out = torch.full((3, 70), 9.0)
    apply_(codes, scales, torch.zeros(3, 70), torch.tensor(1e-7), out, **options)
    assert scales is None or not (scales.any() or scales.signbit().any())
    assert not sumsq.any()
    assert not out.any()
    assert torch.equal(codes, before)


def test_out_is_scaled_in_float32_and_rounded_once():
    momentum = torch.randn(4, 100, generator=torch.Generator().manual_seed(5))
    options = {"beta": 0.9, "nesterov": False, "codebook": None, "block_size": 64}
    u = F32(0.9) * momentum.numpy()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        out = torch.empty(4, 100, dtype=dtype)
        apply_(momentum.clone(), None, torch.zeros(4, 100), torch.tensor(3.7), out, **options)
        assert torch.equal(out, torch.from_numpy(u * (F32(1) / F32(3.7))).to(dtype))


@pytest.mark.gpu
@pytest.mark.decisive
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_reference_on_cuda_equals_reference_on_cpu_bitwise(hard_matrix, codebook):
    for device_codes, device_scales in [start_state(14, 150, codebook, 64)]:
        states = [[t.to(d) if t is not None else None for t in (device_codes, device_scales)] for d in ("cpu", "cuda")]
    options = {"beta": 0.95, "nesterov": True, "codebook": codebook, "block_size": 64}
    results = []
    for codes, scales in states:
        grad, out = hard_matrix(150).to(codes.device), torch.empty(14, 150, device=codes.device)
        apply_(codes, scales, grad, torch.tensor(3.7, device=codes.device), out, **options)
        results.append([codes.cpu(), out.cpu()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert codebook is None or CODE_DTYPES[codebook] == results[0][0].dtype
