"""Newton-Schulz forms against float64, and the plan that picks between them."""

import numpy as np
import oracle
import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from muon8bit.orthogonalize import NAMES, Path, batch_size, choose, flops, newton_schulz, orthogonalize, path, resolve

SPECTRA = {
    "gaussian": lambda _: None,
    "power_law": lambda k: 1.0 / np.arange(1, k + 1),
    "rank_deficient": lambda k: (np.arange(k) < (k + 1) // 2).astype(float),
}


def matrix_with(spectrum, rows, cols):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, cols))
    values = SPECTRA[spectrum](min(rows, cols))
    if values is not None:
        u, _, vt = np.linalg.svd(x, full_matrices=False)
        x = u * values @ vt
    return x / np.linalg.norm(x)


def error(result, exact):
    return np.linalg.norm(result.double().numpy() - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("rows", "cols"), [(48, 160), (160, 48), (96, 96), (1, 20), (20, 1)])
def test_forms_match_float64_against_torch(rows, cols, spectrum):
    """Error over torch's bf16 error: at most 1.05 in bf16, 0.5 in fp32 of either form."""
    matrix = matrix_with(spectrum, rows, cols)
    exact = oracle.newton_schulz(matrix, [oracle.JORDAN] * 5)
    theirs = error(_zeropower_via_newtonschulz(torch.tensor(matrix).float(), oracle.JORDAN, 5, 1e-7), exact)
    schedule = resolve("jordan", 5)
    for form, dtype, bound in (
        ("standard", torch.bfloat16, 1.05),
        ("standard", torch.float32, 0.5),
        ("gram", torch.float32, 0.5),
    ):
        x = torch.tensor(matrix).to(dtype)[None].repeat(3, 1, 1)
        for batch in (x[:1], x):  # one matrix and a batch take different products
            for result in orthogonalize(batch, schedule, Path(form, dtype, 0.0)):
                assert error(result, exact) <= bound * theirs + 1e-6, (form, dtype)


def test_large_fp32_products_match_float64():
    """Sizes at which CPU products go to oneDNN."""
    matrix = matrix_with("gaussian", 128, 200)
    exact = oracle.newton_schulz(matrix, [oracle.JORDAN] * 5)
    for form in ("standard", "gram"):
        for x in (matrix, np.ascontiguousarray(matrix.T).T):
            out = orthogonalize(torch.tensor(x).float()[None], resolve("jordan", 5), Path(form, torch.float32, 0.0))
            assert error(out[0], exact) < 1e-4


@pytest.mark.parametrize(
    ("form", "dtype"), [("gram", torch.float32), ("standard", torch.float32), ("standard", torch.bfloat16)]
)
@pytest.mark.parametrize(("rows", "cols"), [(10, 24), (24, 11), (13, 13)])
def test_panels_match_whole_products(monkeypatch, form, dtype, rows, cols):
    """The path of large CPU matrices, on small ones."""
    x = torch.tensor(matrix_with("gaussian", rows, cols)).to(dtype)[None]
    whole = orthogonalize(x, resolve("jordan", 5), Path(form, dtype, 0.0))
    monkeypatch.setattr(newton_schulz, "_CPU_PANELS_MIN_ROWS", 8)
    panels = orthogonalize(x, resolve("jordan", 5), Path(form, dtype, 0.0))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(panels, whole, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cubic_schedule_matches_float64(dtype):
    """c = 0 takes no product for the square term."""
    x = matrix_with("gaussian", 24, 60)
    steps = [(1.5, -0.5, 0.0)] * 5
    ours = orthogonalize(torch.tensor(x).to(dtype)[None], resolve(steps, 5), Path("standard", dtype, 0.0))[0]
    assert error(ours, oracle_schedule(x, steps)) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_named_schedules_bring_singular_values_near_one(name):
    """From a spectrum of 1 down to 1/50. Jordan's stop between 0.65 and 1.25; the others come closer."""
    steps = {"jordan": 5, "you": 5, "polar_express": 5, "deepseek_v4": 10}[name]
    schedule = resolve(name, steps)
    assert len(schedule.steps) == steps
    rng = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(rng.standard_normal((24, 60)), full_matrices=False)
    x = u * np.geomspace(1, 1 / 50, 24) @ vt
    x = torch.tensor(x / (np.linalg.norm(x) * schedule.norm_factor))
    values = np.linalg.svd(oracle_schedule(x.numpy(), schedule.steps), compute_uv=False)
    ours = orthogonalize(x.float()[None], schedule, Path("gram", torch.float32, 0.0))[0]
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
        resolve(coefficients, steps)


def test_flops_match_hand_count():
    """5 steps, m <= n: standard 20 m^2 n + 10 m^3, Gram 4 m^2 n + 34 m^3."""
    for m, n in [(1024, 1024), (256, 1024), (1024, 2816), (3, 7), (512, 4096)]:
        for rows, cols in ((m, n), (n, m)):
            assert flops("standard", rows, cols, 5) == 20 * m * m * n + 10 * m**3
            assert flops("gram", rows, cols, 5) == 4 * m * m * n + 34 * m**3


@pytest.mark.parametrize(
    ("rate", "shape", "expected"),
    [
        (0.4, (1024, 1024), ("standard", torch.float32)),
        (0.4, (1024, 4096), ("gram", torch.float32)),
        (0.4, (4096, 1024), ("gram", torch.float32)),
        (8.0, (1024, 4096), ("standard", torch.bfloat16)),
        (8.0, (16, 4096), ("gram", torch.float32)),  # too small for the matrix rate to matter
    ],
)
def test_path_is_the_cheapest_at_the_rate_of_the_cpu(monkeypatch, rate, shape, expected):
    monkeypatch.setattr(path, "_bf16_rate", lambda _: rate)
    choose.cache_clear()
    chosen = choose(*shape, resolve("jordan", 5), "cpu")
    choose.cache_clear()
    assert (chosen.form, chosen.dtype) == expected


def test_path_honours_a_forced_dtype():
    jordan = resolve("jordan", 5)
    assert choose(1024, 4096, jordan, "cuda", torch.float32).dtype is torch.float32
    assert choose(64, 4096, jordan, "cpu", torch.bfloat16) == choose(4096, 64, jordan, "cpu", torch.bfloat16)


@pytest.mark.parametrize(("name", "steps", "form"), [("jordan", 5, "gram"), ("jordan", 6, "standard")])
def test_gram_form_is_left_where_the_schedule_amplifies_rounding(name, steps, form):
    assert choose(64, 4096, resolve(name, steps), "cpu").form == form
    assert choose(64, 4096, resolve("deepseek_v4", 10), "cpu").form == "standard"


def test_batches_fit_the_budget():
    """Live at once: X and its successor (m x n) and three products (m x m)."""
    per_matrix = 4 * (2 * 64 * 512 + 3 * 64 * 64)
    assert batch_size(64, 512, torch.float32, "cuda", 10 * per_matrix) == 10
    assert batch_size(64, 512, torch.float32, "cuda", per_matrix - 1) == 1
    assert batch_size(512, 512, torch.float32, "cpu", 2**40) == 1
