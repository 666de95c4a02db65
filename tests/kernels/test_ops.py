"""The operators as the rest of PyTorch meets them: schema, fake tensors, functionalization, a compiled graph."""

from __future__ import annotations

import pytest
import torch
from muon8bit_kernels import ops, reference
from torch.library import opcheck

ROWS, COLS, BLOCK = 6, 150, 64


def momentum(codebook):
    """Stacks of two matrices and of one: codes, scales (none for an fp32 buffer), gradients."""
    values = torch.randn(3, ROWS, COLS, generator=torch.Generator().manual_seed(0))
    grads = torch.randn(3, ROWS, COLS, generator=torch.Generator().manual_seed(1))
    if codebook is None:
        return [values[:2].clone(), values[2:].clone()], [], [grads[:2], grads[2:]]
    codes, scales = zip(*(reference.quantize(v, codebook=codebook, block_size=BLOCK) for v in values), strict=True)
    return (
        [torch.stack(codes[:2]), codes[2][None]],
        [torch.stack(scales[:2]), scales[2][None]],
        [grads[:2], grads[2:]],
    )


def sample(name, codebook="linear"):
    """Tensors and numbers that an operator takes, by position and by keyword."""
    generator = torch.Generator().manual_seed(2)
    stacks = momentum(codebook)
    options = {"beta": 0.9, "nesterov": True, "codebook": codebook, "block_size": BLOCK}
    random_bits = {"keys": [1, -2, 3], "first_indices": [0, 900, 5], "row_stride": COLS}
    norms, skip = torch.tensor([0.5, 1.0, 2.0]), torch.tensor(0.0)
    directions = torch.randn(3, COLS, ROWS, generator=generator).mT
    params = [torch.randn(count, ROWS, COLS, generator=generator).bfloat16() for count in (1, 2)]
    factors = torch.tensor(0.99, dtype=torch.float64), torch.tensor(0.01, dtype=torch.float64)
    return {
        "momentum_stats": lambda: (stacks, options),
        "momentum_apply": lambda: ([*stacks, norms, torch.zeros(3, ROWS, COLS), skip], options),
        "update_params": lambda: ([params, directions, *factors, skip], {**random_bits, "backend": "reference"}),
        "step_tiny": lambda: (
            [*stacks, [torch.ones(3, ROWS, COLS).bfloat16()], norms * 10, *factors, skip],
            {**options, **random_bits, "coefficients": [3.4445, -4.7750, 2.0315] * 2},
        ),
        "symmetric_product": lambda: (
            [directions, directions, torch.ones(3, ROWS, ROWS)],
            {"alpha": 2.0, "beta": 0.5, "diagonal": 0.1},
        ),
        "round_stochastic": lambda: ([torch.randn(40, generator=generator)], {"key": -7, "first_index": 2**33}),
    }[name]()


CASES = [
    *((name, codebook) for name in ("momentum_stats", "momentum_apply") for codebook in ("linear", "dynamic", None)),
    *(("step_tiny", codebook) for codebook in ("linear", None)),
    ("update_params", "linear"),
    ("symmetric_product", "linear"),
    ("round_stochastic", "linear"),
]


def test_every_operator_is_here():
    defined = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "muon8bit::" in name
    }
    assert defined == {name for name, _ in CASES}


@pytest.mark.parametrize(("name", "codebook"), CASES)
def test_opcheck(name, codebook):
    tensors, numbers = sample(name, codebook)
    opcheck(getattr(ops, name), tuple(tensors), numbers)


@pytest.mark.parametrize(("name", "codebook"), CASES)
def test_compiled_whole_equals_eager_bitwise(name, codebook):
    """Without a graph break, what is written in place included."""
    torch.compiler.reset()  # else earlier cases count against the limit of recompilations
    operator, results = getattr(ops, name), []
    compiled = torch.compile(lambda *tensors, **how: operator(*tensors, **how), backend="aot_eager", fullgraph=True)
    for function in (operator, compiled):
        tensors, numbers = sample(name, codebook)
        result = function(*tensors, **numbers)
        written = [t for arg in tensors for t in (arg if isinstance(arg, list | tuple) else [arg])]
        results.append([t for t in [result, *written] if isinstance(t, torch.Tensor)])
    assert len(results[0]) == len(results[1]) > 1
    assert all(torch.equal(eager, other) for eager, other in zip(*results, strict=True))
