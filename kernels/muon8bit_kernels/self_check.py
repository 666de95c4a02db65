"""Check of every new device: whether its compiler and it give the bits of the reference.

Compilers have miscompiled kernels for single architectures before. Such a fault shows in no error, but in a momentum
that is slightly wrong for weeks. A few tiles of the operations most exposed to it (one-byte stores, exact divisions,
products on tensor cores) cost a second, most of it compilation that the first step needs anyway. `dispatch` makes
it once a process and device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .backend import Kernels
from .element_moment import SQRT_MAX, ElementMoment

# More than one tile each way, and a ragged end of rows and columns.
_ROWS, _COLS, _BLOCK = 10, 2048 + 72, 2048
_N, _K = 136, 192


def self_check(kernels: Kernels, device: torch.device) -> None:
    """Compare quantization, momentum, updates, second moments and one symmetric product with the reference's bits.

    Args:
        kernels: the backend that is checked.
        device: where it runs. The reference runs on the CPU.

    Raises:
        RuntimeError: names the first kernel whose result differs, the device, and the way out.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    how: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}  # whatever the process has set
    values = torch.randn(_ROWS, _COLS, generator=generator, **how)
    values *= torch.logspace(-37, 17, _ROWS, **how).unsqueeze(1)  # quotients by 127 below the smallest normal, too
    values[1], values[2, ::3] = 0.0, 0.0
    grad = torch.randn(1, _ROWS, _COLS, generator=generator, **how).to(torch.bfloat16)
    for codebook in ("linear", "dynamic"):
        _compare(
            _momentum(reference, values, grad, codebook), _momentum(kernels, values, grad, codebook, device), device
        )
    for dtype, keys in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, [-5])):
        params = grad.to(dtype) * 3.0
        _compare(
            _update(reference, params, values, keys),
            _update(kernels, params.to(device), values.to(device), keys),
            device,
        )
    moment = torch.randint(0, 256, grad.shape, generator=generator, device="cpu").to(torch.uint8)
    moment[0, 1] = 0  # and so are its directions: both stay 0
    second = grad * values[:, :1].clamp(max=1.0), moment, values.abs()[:, :2].unsqueeze(0) / SQRT_MAX
    inverses = reference.second_moment_stats(second[0], _moment_of(*second[1:]))[2].reciprocal().nan_to_num(posinf=0.0)
    ours = _second_moment(kernels, *(tensor.to(device, copy=True) for tensor in (*second, inverses)))
    _compare(_second_moment(reference, *second, inverses), ours, device)
    # Sums of few ones and minus ones: fp16 holds them exactly, in whatever order they are added.
    A = torch.randint(-1, 2, (1, _N, _K), generator=generator, device="cpu").half()
    ours = {"symmetric_product": kernels.symmetric_product(A.to(device), A.to(device))}
    _compare({"symmetric_product": reference.symmetric_product(A, A)}, ours, device)


def _momentum(
    kernels: Kernels, values: Tensor, grad: Tensor, codebook: str, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Quantize `values`, do one step of the momentum with `grad`, and return each kernel's results by its name."""
    form = {"codebook": codebook, "block_size": _BLOCK}
    codes, scales = kernels.quantize(values.to(device), **form)  # type: ignore[arg-type]
    made = {"quantize": codes.clone(), "quantize (scales)": scales.clone()}
    made["dequantize"] = kernels.dequantize(codes, scales, **form)  # type: ignore[arg-type]
    stacks = [codes.unsqueeze(0)], [scales.unsqueeze(0)], [grad.to(device)]
    how = {"beta": 0.95, "nesterov": True, **form}
    made["momentum_stats"] = kernels.momentum_stats(*stacks, **how)  # type: ignore[arg-type]
    out = torch.empty(grad.shape, dtype=torch.float32, device=device)
    norms = torch.full((1,), 3.0, dtype=torch.float32, device=device)
    kernels.momentum_apply(*stacks, norms, out, **how)  # type: ignore[arg-type]
    return {**made, "momentum_apply": codes, "momentum_apply (scales)": scales, "momentum_apply (out)": out}


def _update(kernels: Kernels, params: Tensor, directions: Tensor, keys: list[int] | None) -> dict[str, Tensor]:
    """Return parameters [1, rows, cols] after an update, by the kernel's name; rounded stochastically with keys."""
    params, name = params.clone(), f"update_params ({params.dtype}{'' if keys is None else ', stochastic'})"
    kernels.update_params([params], directions.unsqueeze(0), decay=0.9, scale=0.1, keys=keys)
    return {name.replace("torch.", ""): params}


def _moment_of(codes: Tensor, steps: Tensor) -> ElementMoment:
    return ElementMoment([codes], steps, beta2=0.95, eps=1e-8, is_clamped=False, block_size=_BLOCK)


def _second_moment(
    kernels: Kernels, directions: Tensor, codes: Tensor, steps: Tensor, inverses: Tensor
) -> dict[str, Tensor]:
    """Update parameters by directions over their second moments, in 8 bits, and times a factor for each row."""
    moment, params = _moment_of(codes, steps), directions.float() + 1.0
    sums, plain, largest = kernels.second_moment_stats(directions, moment)
    made = {"second_moment_stats": torch.stack([sums, plain]), "second_moment_stats (largest)": largest}
    factors = steps[:, :, :1].clamp(max=1.0) + 0.5
    how = {"decay": 0.9, "scale": 0.1, "factors": factors, "moment": moment, "inverses": inverses * SQRT_MAX}
    kernels.update_params([params], directions, **how)  # type: ignore[arg-type]
    return {**made, "update_params (second moment)": params, "update_params (second moment's codes)": codes}


def _compare(expected: dict[str, Tensor], found: dict[str, Tensor], device: torch.device) -> None:
    """Raise RuntimeError where a kernel's result is not the expected one, bit for bit; a sum has a bound."""
    for kernel, wanted in expected.items():
        ours = found[kernel].cpu()
        if kernel.endswith("_stats"):  # sums: their order is the backend's, a bound says that nothing else differs
            is_right = torch.allclose(ours, wanted, rtol=1e-4, atol=0.0)
        else:
            is_right = torch.equal(ours, wanted)
        if not is_right:
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
            raise RuntimeError(
                f"the kernel {kernel} on {device} ({name}) does not give the bits of the reference: a fault of the "
                "compiler or of the device, by which training would be wrong without a word. Upgrade torch, which "
                "brings triton; until then pass backend='reference' (slower)"
            )
