"""The look at a new device: what is right passes, and each kernel that is not is named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from muon8bit_kernels import reference
from muon8bit_kernels.self_check import self_check

CPU = torch.device("cpu")


def _kernels(**changed):
    return SimpleNamespace(**{name: getattr(reference, name) for name in reference.__all__} | changed)


def _first_bit(tensor):
    """Flip the lowest bit of the last element, in place."""
    tensor.view(-1)[-1:].view(torch.uint8)[0] ^= 1
    return tensor


def _quantize(values, **form):
    codes, scales = reference.quantize(values, **form)
    return _first_bit(codes), scales


def _quantize_scales(values, **form):
    codes, scales = reference.quantize(values, **form)
    return codes, _first_bit(scales)


def _apply(place):
    def momentum_apply(codes, scales, grads, norms, out, **how):
        reference.momentum_apply(codes, scales, grads, norms, out, **how)
        _first_bit((codes[0], scales[0], out)[place])

    return momentum_apply


def _update(dtype, *, stochastic):
    def update_params(params, directions, *, keys=None, moment=None, **how):
        if moment is not None:
            reference.update_params(params, directions, moment=moment, **how)
            return
        reference.update_params(params, directions, keys=keys, **how)
        if params[0].dtype == dtype and (keys is not None) == stochastic:
            _first_bit(params[0])

    return {"update_params": update_params}


def _stats(of_sums, of_largest):
    def second_moment_stats(directions, moment):
        found = reference.second_moment_stats(directions, moment)
        return torch.cat([found[:2] * of_sums, found[2:] * of_largest])

    return {"second_moment_stats": second_moment_stats}


def _moment_update(place):
    def update_params(params, directions, *, moment=None, **how):
        reference.update_params(params, directions, moment=moment, **how)
        if moment is not None:
            _first_bit((params[0], moment.codes[0])[place])

    return {"update_params": update_params}


WRONG = {
    "quantize": {"quantize": _quantize},
    r"quantize \(scales\)": {"quantize": _quantize_scales},
    "dequantize": {"dequantize": lambda *args, **form: _first_bit(reference.dequantize(*args, **form))},
    "momentum_stats": {"momentum_stats": lambda *args, **how: reference.momentum_stats(*args, **how) * 1.001},
    "momentum_apply": {"momentum_apply": _apply(0)},
    r"momentum_apply \(scales\)": {"momentum_apply": _apply(1)},
    r"momentum_apply \(out\)": {"momentum_apply": _apply(2)},
    r"update_params \(float32\)": _update(torch.float32, stochastic=False),
    r"update_params \(bfloat16\)": _update(torch.bfloat16, stochastic=False),
    r"update_params \(bfloat16, stochastic\)": _update(torch.bfloat16, stochastic=True),
    "second_moment_stats": _stats(1.001, 1.0),
    r"second_moment_stats \(largest\)": _stats(1.0, 1.0 + 2.0**-23),
    r"update_params \(second moment\)": _moment_update(0),
    r"update_params \(second moment's codes\)": _moment_update(1),
    "symmetric_product": {"symmetric_product": lambda A, B: _first_bit(reference.symmetric_product(A, B))},
}


def test_right_kernels_pass():
    self_check(_kernels(), CPU)


@pytest.mark.parametrize("name", WRONG)
def test_a_kernel_with_one_wrong_bit_is_named_with_the_way_out(name):
    with pytest.raises(RuntimeError, match=rf"the kernel {name} on cpu .*Upgrade torch.*backend='reference'"):
        self_check(_kernels(**WRONG[name]), CPU)


def test_the_default_device_and_dtype_do_not_matter():
    with torch.device("meta"):
        self_check(_kernels(), CPU)
    torch.set_default_dtype(torch.bfloat16)
    try:
        self_check(_kernels(), CPU)
    finally:
        torch.set_default_dtype(torch.float32)
