"""Values that no group, gradient, state or saved state may have, each with the words that its refusal has to say."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy
import pytest
import torch

from helpers.bitwise import bits
from muon8bit import Muon8bit

NAN, INF = math.nan, math.inf
HUGE = (10**400, -(10**400), 2**64, Fraction(1, 10))  # numbers, but none that torch takes
SHAPES = {"a": (16, 72), "stack": (2, 6, 16), "narrow": (12, 4), "embed": (64, 64), "bias": (6,)}
NUM_MUON = 3


def tensor(*values):
    return torch.tensor(values if len(values) != 1 else values[0])


class Odd:
    """Nothing that an option can be compared with."""

    def __eq__(self, other):
        raise RuntimeError("an option was compared with what it cannot be")

    __hash__ = None


# What a hand or a scheduler may write into group 0 (Muon) or 1 (AdamW) of a running optimizer.
GROUP_VALUES = [
    *[(0, "lr", value) for value in (None, NAN, INF, -0.1, "0.1", True, [0.1], tensor(0.1, 0.2), tensor(NAN))],
    *[(0, "lr", value) for value in (tensor(-0.1), tensor(INF), tensor(1), torch.tensor([]), 1j)],
    *[(1, "lr", value) for value in (1e39, None, NAN, -1e-3, tensor(0.1, 0.2), tensor(NAN).double())],
    *[(0, "weight_decay", value) for value in (1e300, None, NAN, -0.1, INF, tensor(NAN), "0")],
    *[(1, "weight_decay", value) for value in (None, NAN, -0.1, tensor(-1.0), *HUGE[:2], HUGE[3])],
    *[(i, "lr", value) for i in (0, 1) for value in (*HUGE[:2], Odd(), numpy.longdouble("1e1000"))],
    *[(i, "lr", torch.tensor([0.1]).to_sparse()) for i in (0, 1)],
    *[(i, "lr", torch.tensor(0.1, device="meta")) for i in (0, 1)],
    *[(0, key, value) for key in ("weight_decay", "momentum", "eps", "clip_matrix_norm") for value in HUGE],
    *[(1, "eps", 10**400), (1, "momentum", Fraction(1, 10)), (1, "betas", (0.9, 10**400)), (1, "lr", Fraction(1, 10))],
    *[(0, "ns_coefficients", value) for value in ((10**400, 1, 1), (1e300, 1.0, 1.0), (0.9, 0.95, 0.9))],
    *[(0, key, value) for key in ("eps", "ns_steps") for value in (1e300, 10**400)],
    # Of the other algorithm, where they would be without effect.
    *[(0, key, value) for key in ("betas", "adamw_bits") for value in ((0.9, 0.95), 8, tensor(0.1, 0.2))],
    *[(1, key, value) for key, value in (("nesterov", True), ("ns_steps", 3), ("codebook", "dynamic"), ("flatten", 0))],
    *[(i, key, value) for i in (0, 1) for key in ("algorithm", "maximize") for value in (numpy.ones(2), Odd())],
    *[(i, "cautious_weight_decay", value) for i in (0, 1) for value in (None, 1, "yes", tensor(1.0))],
    *[(0, "decay_lr_power", value) for value in (None, 0, 3, 1.0, True, tensor(2))],
    *[(1, "decay_lr_power", value) for value in (1, 2)],
    *[(0, "zero_slices", value) for value in (None, "keep", True, 0, tensor(1))],
    (1, "zero_slices", "skip"),
    *[(0, key, value) for key in ("bits", "codebook", "nesterov") for value in (numpy.ones(2), Odd())],
    *[(0, "momentum", value) for value in (None, NAN, -0.1, 1.0, tensor(0.5, 0.6), (0.9, 0.95))],
    *[(1, "betas", value) for value in (None, 0.9, (0.9,), (0.9, NAN), (1.0, 0.95), (0.9, -0.1), (0.9, 0.9, 0.9))],
    *[(1, "betas", value) for value in (tensor(0.9, 0.95), (0.9, None))],
    *[(0, "eps", value) for value in (None, 0, -1e-8, NAN, INF, tensor(NAN))],
    *[(1, "eps", value) for value in (None, 0.0, NAN, 1e-50)],
    *[(0, "nesterov", value) for value in (None, "yes", 2)],
    *[(0, "ns_steps", value) for value in (None, 0, 100, 5.0, True, NAN)],
    *[(0, "ns_coefficients", value) for value in (None, "jordam", (1.0, 2.0), (NAN, 1.0, 1.0), (INF, 1.0, 1.0))],
    *[(0, "ns_coefficients", value) for value in ([(1.0, 2.0, 3.0)] * 4, ("3", "4", "5"), [(1.0, NAN, 1.0)] * 5, 3.4)],
    *[(0, "adjust_lr_fn", value) for value in ("rms", 1, tensor(0.2, 0.3))],
    *[(0, "bits", value) for value in (None, 4, 8.0, True, tensor(8))],
    *[(0, "codebook", value) for value in (None, "nf4", 8)],
    *[(0, "block_size", value) for value in (None, 0, 100, 64.0, -64)],
    *[(0, "flatten", value) for value in (None, 1)],
    *[(0, "split_sizes", value) for value in ((0, 16), (-4, 20), 16, "16", (8.0, 8.0))],
    *[(0, "split_dim", value) for value in (None, 0, -2.0)],
    *[(0, "clip_matrix_norm", value) for value in (0, -1.0, NAN, "1")],
    *[(1, "adamw_bits", value) for value in (None, 4, 8.0)],
    *[(i, "algorithm", value) for i in (0, 1) for value in ("adam", None, 3)],
    *[(i, key, value) for i in (0, 1) for key in ("rounding_seed", "rounding_step") for value in (None, -1, 0.5)],
]
# On several ranks those of the others are told before.
NAMES = [(i, "param_names", value) for i in (0, 1) for value in (3, tensor(0.1), "stack", ["a"] * 9)]
LISTS = [(i, "params", value) for i in (0, 1) for value in (None, 3, tensor(0.1), "ab", [None], {})]
# Right values, but not of what the group's parameters are.
MISFITS = [
    (0, "bits", 32, ["a", "parameter group 0", "bits=32", "asks for a state of"]),
    (0, "codebook", "dynamic", ["a", "parameter group 0", "codebook='dynamic'", "asks for a state of"]),
    (0, "block_size", 64, ["a", "parameter group 0", "block_size=64", "asks for a state of"]),
    (0, "split_sizes", (4, 4), ["a", "parameter group 0", "split_sizes"]),
    (1, "adamw_bits", 8, ["embed", "parameter group 1", "adamw_bits=8", "asks for a state of"]),
    (0, "algorithm", "adamw", ["parameter group 0", "algorithm='adamw'", "betas"]),
    (1, "algorithm", "muon", ["parameter group 1", "algorithm='muon'", "momentum"]),
]
MISSING_KEYS = [(0, key) for key in ("lr", "algorithm", "eps", "momentum", "ns_steps", "bits", "rounding_step")]
MISSING_KEYS += [(1, key) for key in ("lr", "betas", "algorithm", "weight_decay", "adamw_bits", "rounding_seed")]


def make(**options):
    """Make a named optimizer of two groups that has taken a step, with the gradients of another."""
    generator = torch.Generator().manual_seed(0)
    params = {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()}
    named = list(params.items())
    groups = [
        {"params": named[:NUM_MUON], "weight_decay": 0.2},
        {"params": named[NUM_MUON:], "algorithm": "adamw", "lr": 0.01},
    ]
    optimizer = Muon8bit(groups, lr=0.02, param_rounding="stochastic", **options)
    for _ in range(2):
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator)
        if not optimizer.state:
            optimizer.step()
    return params, optimizer


def everything(params, optimizer):
    """Return copies of parameters, gradients and state, as integers, and the groups as text."""
    found = {}
    for name, param in params.items():
        grad = param.grad.coalesce().values() if param.grad.layout == torch.sparse_coo else param.grad
        found[name], found[name, "grad"] = param.detach().clone(), grad.detach().clone()
        of_state = {k: getattr(v, "_local_tensor", v) for k, v in optimizer.state[param].items()}
        found |= {(name, k): v.detach().clone() for k, v in of_state.items() if isinstance(v, torch.Tensor)}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return found, repr(groups)


def assert_unchanged(params, optimizer, before):
    tensors, groups = everything(params, optimizer)
    assert groups == before[1]
    assert tensors.keys() == before[0].keys()
    for key, value in before[0].items():
        assert tensors[key].dtype == value.dtype
        is_real = not value.is_complex()
        assert torch.equal(*((bits(t) if is_real else torch.view_as_real(t)) for t in (tensors[key], value))), key


def refused(work, words, error=ValueError):
    """Check that `work` raises exactly this error with all these words."""
    with pytest.raises(error) as found:
        work()
    assert found.type is error
    missing = [word for word in words if word not in str(found.value)]
    assert not missing, f"{missing} not in: {found.value}"


def written(optimizer, index, key, value):
    """Write a value into a group; the words that refuse it, and what undoes it."""
    group = optimizer.param_groups[index]
    old = dict(group)
    group[key] = value

    def undo():
        group.clear()
        group.update(old)

    return [f"parameter group {index}", key], undo


def without(optimizer, index, key):
    """Delete a key of a group."""
    group = optimizer.param_groups[index]
    old = group.pop(key)

    def undo():
        group[key] = old

    return [f"parameter group {index}", key, "missing"], undo


# By name: what is done to a parameter, its gradient or its state by hand, and the words of the refusal.
def _grad(make_grad, name="a", dtype=None):
    def damage(params, _):
        param = params[name]
        param.grad, old = None, param.grad
        if dtype is not None:
            param.grad_dtype = dtype
        param.grad = make_grad(old)

        def undo():
            param.grad = None
            param.grad_dtype = param.dtype
            param.grad = old

        return undo

    return damage


def _state(key, change, name="a"):
    def damage(params, optimizer):
        state = optimizer.state[params[name]]
        old, new = state[key], change(state[key])
        state.pop(key)
        if new is not None:
            state[key] = new

        def undo():
            state[key] = old

        return undo

    return damage


def _double(params, _):
    param = params["a"]
    old = param.data, param.grad
    param.grad = None
    param.data = param.data.double()
    param.grad = old[1].double()

    def undo():
        param.grad = None
        param.data = old[0]
        param.grad = old[1]

    return undo


def _transposed(t):
    return t.mT.contiguous().mT


BY_HAND = {
    "a model made float64": (_double, ["a", "torch.float64"]),
    "a complex gradient": (_grad(lambda g: g.to(torch.complex64), dtype=torch.complex64), ["a", "torch.complex64"]),
    "a float64 gradient": (_grad(lambda g: g.double(), dtype=torch.float64), ["a", "torch.float64"]),
    "an integer gradient": (_grad(lambda g: g.int(), dtype=torch.int32), ["a", "torch.int32"]),
    "a complex gradient of AdamW": (
        _grad(lambda g: g.to(torch.complex64), "bias", torch.complex64),
        ["bias", "torch.complex64"],
    ),
    "a sparse gradient": (_grad(lambda g: g.to_sparse()), ["a", "sparse"]),
    "a sparse gradient of an embedding": (_grad(lambda g: g.to_sparse(), "embed"), ["embed", "sparse=False"]),
    "state without its scales": (_state("momentum_scales", lambda _: None), ["a", "asks for a state of"]),
    "state of another dtype": (_state("momentum_scales", lambda t: t.half()), ["a", "momentum_scales", "float16"]),
    "codes of another dtype": (_state("momentum_linear8", lambda t: t.byte()), ["a", "momentum_linear8", "uint8"]),
    "state of another shape": (_state("momentum_linear8", lambda t: t[:8]), ["a", "asks for a state of"]),
    "codes in another order": (_state("momentum_linear8", _transposed), ["a", "momentum_linear8", "contiguous"]),
    "no tensor": (_state("momentum_linear8", lambda _: 3), ["a", "momentum_linear8", "int"]),
    "no step": (_state("step", lambda _: None, "bias"), ["bias", "asks for a state of"]),
    "a number as step": (_state("step", lambda t: t.item(), "bias"), ["bias", "step", "float"]),
    "a moment of half": (_state("exp_avg", lambda t: t.half(), "embed"), ["embed", "exp_avg", "float16"]),
}


# By name: a change of a saved dict, and the words of the refusal.
def _saved(*path, to):
    def change(saved):
        target = saved
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = to(target[path[-1]]) if callable(to) else to

    return change


def _element(value):
    def changed(t):
        t = t.clone()
        t.view(-1)[-1] = value
        return t

    return changed


def _group(index, key, value):
    return _saved("param_groups", index, key, to=value), [f"group {index}", key]


CODES, SCALES = ("state", 0, "momentum_linear8"), ("state", 0, "momentum_scales")
SAVED = {
    "scales under zero": (_saved(*SCALES, to=_element(-1.0)), ["a", "momentum_scales", "-1"]),
    "scales of NaN": (_saved(*SCALES, to=_element(NAN)), ["a", "momentum_scales", "NaN or Inf"]),
    "scales of infinity": (_saved(*SCALES, to=_element(INF)), ["a", "momentum_scales", "NaN or Inf"]),
    "a step beyond all numbers": (_saved("state", 3, "step", to=10**400), ["embed", "step", "Inf"]),
    "a code that is none": (_saved(*CODES, to=_element(-128)), ["a", "momentum_linear8", "-128"]),
    "codes on meta": (_saved(*CODES, to=lambda t: t.to("meta")), ["a", "momentum_linear8", "meta"]),
    "scales on meta": (_saved(*SCALES, to=lambda t: t.to("meta")), ["a", "momentum_scales", "meta"]),
    "sparse codes": (_saved(*CODES, to=lambda t: t.to_sparse_csr()), ["a", "momentum_linear8", "dense"]),
    "a step under zero": (_saved("state", 3, "step", to=-1.0), ["embed", "step", "-1"]),
    "a step tensor under zero": (_saved("state", 3, "step", to=tensor(-2.0)), ["embed", "step", "-2"]),
    "a step of NaN": (_saved("state", 3, "step", to=tensor(NAN)), ["embed", "step", "NaN"]),
    "half a step": (_saved("state", 3, "step", to=1.5), ["embed", "step", "1.5"]),
    "a step as text": (_saved("state", 3, "step", to="2"), ["embed", "step", "str"]),
    "a step that is true": (_saved("state", 3, "step", to=True), ["embed", "step", "bool"]),
    "steps by element": (_saved("state", 3, "step", to=torch.ones(64)), ["embed", "step", "(64,)"]),
    "a second moment under zero": (
        _saved("state", 3, "exp_avg_sq", to=_element(-1e-9)),
        ["embed", "exp_avg_sq", "-1e-09"],
    ),
    "a first moment of NaN": (_saved("state", 4, "exp_avg", to=_element(NAN)), ["bias", "exp_avg", "NaN"]),
    "a moment on meta": (_saved("state", 4, "exp_avg", to=lambda t: t.to("meta")), ["bias", "exp_avg", "meta"]),
    "a wrapper's tensor on meta": (_saved("state", 0, "slow", to=torch.ones(2, device="meta")), ["a", "slow", "meta"]),
    "a momentum of NaN": (
        _saved("state", 2, "momentum_buffer", to=_element(NAN)),
        ["narrow", "NaN"],
    ),
    "state of another optimizer": (_saved("state", 0, to={"square_avg": torch.ones(1), "step": 1}), ["a", "missing"]),
    "no mapping": (_saved("state", 1, to=[]), ["stack", "list"]),
    "a parameter twice": (_saved("param_groups", 0, "params", to=[0, 1, 1]), ["1", "twice"]),
    "no list of parameters": (_saved("param_groups", 0, "params", to=3), ["group 0", "'params'"]),
    "parameters of odd ids": (_saved("param_groups", 0, "params", to=[0, 1, [2]]), ["group 0", "'params'"]),
    "too few names": _group(0, "param_names", ["a"]),
    "names of no text": _group(0, "param_names", [1.0, 2, None]),
    "betas in a group of Muon": _group(0, "betas", (0.9, 0.95)),
    "an algorithm of no kind": _group(0, "algorithm", numpy.ones(2)),
    "names that are none": _group(0, "param_names", 7),
    **{f"lr {v!r}": _group(0, "lr", v) for v in (None, NAN, -1.0, tensor(NAN), tensor(0.1, 0.2))},
    **{f"betas {v!r}": _group(1, "betas", v) for v in (None, [0.9], [0.9, NAN], 0.9)},
    **{f"eps {v!r}": _group(1, "eps", v) for v in (0, NAN, 1e-60)},
    **{f"bits {v!r}": _group(0, "bits", v) for v in (tensor(8, 8), 16)},
    "an algorithm of another kind": _group(0, "algorithm", "lion"),
    "coefficients of NaN": _group(0, "ns_coefficients", [NAN, 1.0, 1.0]),
    "a step of rounding under zero": _group(1, "rounding_step", -3),
}
