"""Newton-Schulz forms, dtypes and products against float64; coefficients."""

import numpy as np
import pytest
import torch
from helpers import oracle
from torch.optim._muon import _zeropower_via_newtonschulz

from muon8bit.orthogonalize import NAMES, NSMethod, choose_method, orthogonalize, resolve_coefficients, segments

JORDAN = resolve_coefficients("jordan", 5)

SPECTRA = {
    "gaussian": lambda _: None,
    "power_law": lambda k: 1.0 / np.arange(1, k + 1),
    "rank_deficient": lambda k: (np.arange(k) < (k + 1) // 2).astype(float),
}


def matrix_with(spectrum, rows, cols, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, cols))
    values = SPECTRA[spectrum](min(rows, cols))
    if values is not None:
        u, _, vt = np.linalg.svd(x, full_matrices=False)
        x = u * values @ vt
    return x / np.linalg.norm(x)


def error(result, exact):
    return np.linalg.norm(result.double().numpy() - exact) / np.linalg.norm(exact)


# Paths and the most that their error may be of torch.optim.Muon's. `kernel` runs the torch reference here: fp16 or bf16
# storage, fp32 products, one rounding.
HALF_PATHS = [
    (NSMethod("standard", torch.bfloat16), 1.05),
    (NSMethod("standard", torch.bfloat16, "kernel"), 1.05),
    (NSMethod("standard", torch.float16), 0.2),
    (NSMethod("standard", torch.float16, "kernel"), 0.2),
]
FP32_PATHS = [
    (NSMethod("standard", torch.float32), 0.5),
    (NSMethod("gram", torch.float32, "vendor", (5,)), 0.5),
    (NSMethod("gram", torch.float32, "vendor", (2, 3)), 0.5),
    (NSMethod("gram", torch.float32, "kernel", (5,)), 0.5),
]
FP16_GRAM_PATHS = [
    (NSMethod("gram", torch.float16, "vendor", (2, 3)), 0.5),
    (NSMethod("gram", torch.float16, "kernel", (2, 3)), 0.5),
]


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(
    ("rows", "cols", "seeds"),
    [(64, 64, 3), (80, 160, 3), (64, 256, 2), (256, 64, 2), (200, 200, 1), (512, 256, 1), (128, 512, 1)],
)
def test_error_of_a_path_over_that_of_torch(rows, cols, seeds, spectrum):
    """Against the same polynomials in float64. fp16 Gram on the shapes that may take it, 1:1.25 and narrower."""
    for seed in range(seeds):
        matrix = matrix_with(spectrum, rows, cols, seed)
        exact = oracle.newton_schulz(matrix, [oracle.JORDAN] * 5)
        theirs = error(_zeropower_via_newtonschulz(torch.tensor(matrix).float(), oracle.JORDAN, 5, 1e-7), exact)
        for path, bound in HALF_PATHS + FP32_PATHS + (FP16_GRAM_PATHS if rows != cols else []):
            x = torch.tensor(matrix).to(path.dtype)[None]
            # One matrix and a batch take different products.
            for batch in [x.clone()] if matrix.size > 2**15 else [x.clone(), x.repeat(2, 1, 1)]:
                for result in orthogonalize(batch, JORDAN, path):
                    assert result.dtype == path.dtype
                    assert error(result, exact) <= bound * theirs, (path, seed)


@pytest.mark.parametrize(("rows", "cols"), [(1, 20), (20, 1), (3, 7), (7, 3)])
def test_error_of_the_smallest_shapes(rows, cols):
    matrix = matrix_with("gaussian", rows, cols)
    exact = oracle.newton_schulz(matrix, [oracle.JORDAN] * 5)
    for path, _ in HALF_PATHS + FP32_PATHS + FP16_GRAM_PATHS:
        for batch in (1, 2):
            x = torch.tensor(matrix).to(path.dtype)[None].repeat(batch, 1, 1)
            bound = {torch.float32: 1e-5, torch.float16: 4e-3 if path.form == "standard" else 2e-2}.get(
                path.dtype, 3e-2
            )
            assert error(orthogonalize(x, JORDAN, path)[-1], exact) <= bound, path


def test_fp16_holds_the_small_elements_of_a_long_matrix():
    """64 x 32768: elements of 7e-4, one in twelve below fp16's smallest normal number (6e-5)."""
    matrix = matrix_with("gaussian", 64, 32768)
    exact = oracle.newton_schulz(matrix, [oracle.JORDAN] * 5)
    theirs = error(_zeropower_via_newtonschulz(torch.tensor(matrix).float(), oracle.JORDAN, 5, 1e-7), exact)
    for path, bound in (HALF_PATHS[2], *FP16_GRAM_PATHS):
        assert error(orthogonalize(torch.tensor(matrix).half()[None], JORDAN, path)[0], exact) <= bound * theirs


@pytest.mark.parametrize(
    ("dtype", "without_restart"), [(torch.float16, (5,)), (torch.bfloat16, (2, 3)), (torch.bfloat16, (5,))]
)
def test_half_precision_gram_needs_fp16_and_its_restart(dtype, without_restart):
    """The 1/k spectrum ruins what is not offered: worse than torch's bf16 standard form."""
    matrix = matrix_with("power_law", 256, 512)
    exact = oracle.newton_schulz(matrix, [oracle.JORDAN] * 5)
    theirs = error(_zeropower_via_newtonschulz(torch.tensor(matrix).float(), oracle.JORDAN, 5, 1e-7), exact)
    out = orthogonalize(
        torch.tensor(matrix).to(dtype)[None], JORDAN, NSMethod("gram", dtype, "kernel", without_restart)
    )
    assert error(out[0], exact) > 2 * theirs


SCHEDULES = {
    "you": resolve_coefficients("you", 5),
    "polar_express": resolve_coefficients("polar_express", 5),
    "jordan, 7 steps": resolve_coefficients("jordan", 7),
    "cubic": resolve_coefficients([(1.5, -0.5, 0.0)] * 8, 8),
    "quintic": resolve_coefficients((1.875, -1.25, 0.375), 7),
    "aol": resolve_coefficients(
        [
            (4.0098, -7.0585, 2.4635),
            (3.4585, -5.5479, 2.5959),
            (2.7573, -3.2939, 1.4254),
            (2.7215, -3.0494, 1.3169),
        ],
        4,
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_restarts_keep_the_gram_form_stable(spectrum, name):
    """With the restarts of `segments`: fp16 at most .5 of the error of the bf16 standard form, fp32 .1."""
    schedule = SCHEDULES[name]
    matrix = matrix_with(spectrum, 128, 256) / schedule.norm_factor
    exact = oracle_schedule(matrix, schedule.steps)
    start = torch.tensor(matrix)[None]
    standard = orthogonalize(start.bfloat16(), schedule, NSMethod("standard", torch.bfloat16))[0]
    for dtype, bound in ((torch.float16, 0.5), (torch.float32, 0.1)):
        parts = segments(schedule, dtype)
        assert sum(parts) == len(schedule.steps)
        for products in ("vendor", "kernel"):
            out = orthogonalize(start.to(dtype), schedule, NSMethod("gram", dtype, products, parts))[0]
            assert error(out, exact) <= bound * error(standard, exact), (dtype, products)


def test_segments_of_the_named_schedules():
    assert [segments(resolve_coefficients(name, 5), torch.float16) for name in ("jordan", "you", "polar_express")] == [
        (2, 3)
    ] * 3
    assert segments(resolve_coefficients("jordan", 5), torch.float32) == (5,)
    assert segments(resolve_coefficients("jordan", 6), torch.float32) == (5, 1)
    assert [segments(resolve_coefficients(name, 5), torch.float32) for name in ("you", "polar_express")] == [(2, 3)] * 2
    assert segments(resolve_coefficients("deepseek_v4", 10), torch.float32) == (3, 3, 4)
    assert segments(JORDAN, torch.bfloat16) is None


@pytest.mark.parametrize(
    "schedule",
    [
        resolve_coefficients("you", 5),
        resolve_coefficients("polar_express", 5),
        resolve_coefficients("deepseek_v4", 10),
        resolve_coefficients((2.0, -1.5, 0.5), 8),
        resolve_coefficients((3.0, -3.2, 1.2), 7),
    ],
)
@pytest.mark.parametrize("value", [1.0, -3e-5])
def test_a_constant_matrix_is_as_near_to_float64_as_others_where_the_schedule_converges(schedule, value):
    """Rank 1, and all roundings alike: the error was .018 to .045 for the named schedules. Now it is .0007 at most for
    them (128 to 512 rows), as in the standard form; the bound has twice that."""
    constant = np.full((256, 1024), value)
    constant = constant / (np.linalg.norm(constant) * schedule.norm_factor)
    exact = oracle_schedule(constant, schedule.steps)
    path = NSMethod("gram", torch.float32, "vendor", segments(schedule, torch.float32))
    out = orthogonalize(torch.tensor(constant).float()[None], schedule, path)[0]
    assert error(out, exact) < 1.4e-3


def test_fp16_is_refused_to_schedules_it_cannot_hold():
    """(60, -70, 11) takes a singular value of .7 to 42 - 24 + 2 = 20, and then 11 * 20**5 beyond all bounds."""
    wild = resolve_coefficients((60.0, -70.0, 11.0), 3)
    assert segments(wild, torch.float16) is None
    assert choose_method(512, 2048, wild, "cuda").dtype is torch.bfloat16
    with pytest.raises(ValueError, match=r"float16 cannot hold .* use torch\.bfloat16"):
        choose_method(512, 2048, wild, "cuda", torch.float16)


def test_large_fp32_products_match_float64():
    """Sizes at which CPU products go to oneDNN."""
    matrix = matrix_with("gaussian", 128, 200)
    exact = oracle.newton_schulz(matrix, [oracle.JORDAN] * 5)
    for path, _ in FP32_PATHS:
        for x, result in ((matrix, exact), (matrix.T, exact.T)):
            out = orthogonalize(torch.tensor(np.ascontiguousarray(x)).float()[None], JORDAN, path)
            assert error(out[0], result) < 1e-4


@pytest.mark.parametrize(
    ("form", "dtype", "parts"),
    [
        ("gram", torch.float32, (5,)),
        ("gram", torch.float16, (2, 3)),
        ("standard", torch.float32, ()),
        ("standard", torch.bfloat16, ()),
    ],
)
@pytest.mark.parametrize(("rows", "cols"), [(10, 24), (24, 11), (13, 13)])
def test_panels_match_whole_products(form, dtype, parts, rows, cols):
    """The path of large CPU matrices, on small ones."""
    x = torch.tensor(matrix_with("gaussian", rows, cols)).to(dtype)[None]
    whole = orthogonalize(x.clone(), JORDAN, NSMethod(form, dtype, "vendor", parts))
    panels = orthogonalize(x, JORDAN, NSMethod(form, dtype, "panels", parts))
    tolerance = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(panels, whole, rtol=0, atol=tolerance)


@pytest.mark.parametrize("products", ["vendor", "panels", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cubic_schedule_matches_float64(dtype, products):
    """c = 0 takes no product for the square term."""
    x = matrix_with("gaussian", 24, 60)
    steps = [(1.5, -0.5, 0.0)] * 5
    ours = orthogonalize(
        torch.tensor(x).to(dtype)[None], resolve_coefficients(steps, 5), NSMethod("standard", dtype, products)
    )[0]
    assert error(ours, oracle_schedule(x, steps)) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_named_schedules_bring_singular_values_near_one(name):
    """From a spectrum of 1 down to 1/50. Jordan's stop between 0.65 and 1.25; the others come closer."""
    steps = {"jordan": 5, "you": 5, "polar_express": 5, "deepseek_v4": 10}[name]
    schedule = resolve_coefficients(name, steps)
    assert len(schedule.steps) == steps
    rng = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(rng.standard_normal((24, 60)), full_matrices=False)
    x = u * np.geomspace(1, 1 / 50, 24) @ vt
    x = torch.tensor(x / (np.linalg.norm(x) * schedule.norm_factor))
    values = np.linalg.svd(oracle_schedule(x.numpy(), schedule.steps), compute_uv=False)
    ours = orthogonalize(
        x.float()[None], schedule, NSMethod("gram", torch.float32, "vendor", segments(schedule, torch.float32))
    )[0]
    assert error(ours, oracle_schedule(x.numpy(), schedule.steps)) < 1e-3
    low, high = (0.65, 1.25) if name == "jordan" else (0.8, 1.2)
    assert values.min() > low
    assert values.max() < high


def oracle_schedule(x, steps):
    for a, b, c in steps:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize(
    ("coefficients", "steps", "message"),
    [
        ("none_such", 5, "none_such.*jordan"),
        ("polar_express", 6, "ns_steps=5"),
        ([(1.0, 2.0, 3.0)] * 2, 5, "2 triples but ns_steps is 5"),
        ((1.0, 2.0), 5, "triple"),
        ("jordan", 0, "ns_steps"),
        ("jordan", 100, "ns_steps"),
    ],
)
def test_bad_coefficients_are_refused(coefficients, steps, message):
    with pytest.raises(ValueError, match=message):
        resolve_coefficients(coefficients, steps)
