"""The symmetric product in torch against a float64 oracle."""

import numpy as np
import pytest
import torch
from muon8bit_kernels.reference.products import symmetric_product

# Half a unit in the last place; bf16 and fp16 round once, from fp32.
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def operands(batch: int, n: int, k: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """X [batch, n, k] and a symmetric D."""
    rng = np.random.default_rng(seed)
    X = torch.from_numpy(rng.standard_normal((batch, n, k)) / np.sqrt(k)).to(dtype)
    D = rng.standard_normal((batch, n, n))
    return X, torch.from_numpy(D + D.swapaxes(1, 2)).to(dtype)


@pytest.mark.parametrize("dtype", HALF_ULP)
@pytest.mark.parametrize(("batch", "n", "k"), [(1, 1, 1), (3, 5, 7), (2, 33, 64)])
@pytest.mark.parametrize("tall", [False, True])
def test_symmetric_product_matches_float64(batch, n, k, dtype, tall):
    X, D = operands(batch, n, k, dtype)
    X = X.mT.contiguous().mT if tall else X
    x, d = X.double().numpy(), D.double().numpy()
    expected = -2.5 * x @ x.swapaxes(1, 2) + 0.75 * d + 3.0 * np.eye(n)
    size = 2.5 * abs(x) @ abs(x).swapaxes(1, 2) + 0.75 * abs(d) + 3.0 * np.eye(n)
    C = symmetric_product(X, X, alpha=-2.5, D=D, beta=0.75, diagonal=3.0)
    assert C.dtype == dtype
    assert C.is_contiguous()
    error = abs(C.double().numpy() - expected)
    assert (error <= HALF_ULP[dtype] * abs(expected) * 1.01 + (k + 4) * 2.0**-24 * size).all()


def test_symmetric_product_ignores_d_where_beta_is_zero():
    X, D = operands(1, 4, 4, torch.float32)
    assert torch.equal(symmetric_product(X, X, D=D.fill_(torch.nan), beta=0.0), symmetric_product(X, X))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 3)), "A and B must be"),
        ((torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)), "A and B must be"),
        ((torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)), "D must be"),
        ((torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)[..., ::2]), "D must be contiguous"),
        ((torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, dtype=torch.float16)), "B is torch.float16"),
        ((torch.zeros(1, 2, 3).double(),) * 2, "A must be float32"),
        ((torch.zeros(1, 4, 6)[:, ::2, ::2],) * 2, "contiguous rows or columns"),
    ],
)
def test_symmetric_product_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        symmetric_product(*arguments[:2], D=arguments[2] if len(arguments) > 2 else None, beta=1.0)
