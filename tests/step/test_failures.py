"""A step that fails: until its first Newton-Schulz has returned nothing has changed; later the optimizer says so."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.bitwise import assert_nested_equal

from muon8bit import Muon8bit, release_gradients
from muon8bit.orthogonalize import NSMethod
from muon8bit.step import adamw, clipping, muon, phases

SHAPES = {"a": (160, 256), "b": (160, 256), "c": (8, 24), "d": (2, 12, 40), "embed": (30, 16), "norm": (16,)}
FORMATS = {
    "linear": {},
    "dynamic": {"codebook": "dynamic"},
    "fp32": {"bits": 32},
    "clipped": {"clip_matrix_norm": 0.5},
    "columns": {"split_sizes": (8, 16), "split_dim": -1},
    "adamuon": {"second_moment": "element", "rescale": "rms", "sign_momentum": True},
}
CAUSES = {
    "exception": RuntimeError("planted"),
    "memory": torch.OutOfMemoryError("planted"),
    "interrupt": KeyboardInterrupt("planted"),
}


def make(form="linear", dtype=torch.float32, **options):
    """A model of every kind of parameter, and its optimizer."""
    torch.manual_seed(0)
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.randn(s).to(dtype)) for name, s in SHAPES.items()})
    named = {name: (name, param) for name, param in model.items()}
    adamw = {"algorithm": "adamw", "lr": 0.02}
    if form == "columns":
        groups = [{"params": [named["c"]], **FORMATS[form]}, {"params": [named["embed"]], **adamw}]
    else:
        groups = [
            {"params": [named["embed"], named["norm"]], **adamw},
            {"params": [named[name] for name in "abcd"], **FORMATS[form]},
        ]
    return model, Muon8bit(groups, lr=0.02, **options)


def set_grads(model, seed=1):
    torch.manual_seed(seed)
    for param in model.values():
        param.grad = torch.randn(param.shape).to(param.dtype)


def everything(model, optimizer):
    """Copies of all that a step changes: parameters, gradients, state and groups."""
    params = {name: param.detach().clone() for name, param in model.items()}
    grads = {name: None if param.grad is None else param.grad.clone() for name, param in model.items()}
    state = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in model.values()]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return params, grads, state, copy.deepcopy(groups)


def failing(original, cause, call=1):
    """A function that raises at that call of it."""
    calls = []

    def function(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise cause
        return original(*args, **kwargs)

    return function


def plant(patch, where, cause):
    module, name, call = where
    patch.setattr(module, name, failing(getattr(module, name), cause, call))


EARLY = {
    "clipping": (clipping, "with_factor", 1),
    "reading": (muon, "squares", 2),
    "looking at AdamW's gradients": (phases, "_sums_of_squares", 1),
    "making state": (phases, "new_state", 3),
    "allocating": (torch, "empty", 1),
    "encoding": (muon, "average_", 1),
    "first Newton-Schulz": (muon, "orthogonalize", 1),
}
LATE = {
    "second Newton-Schulz": (muon, "orthogonalize", 2),
    "encoding": (muon, "average_", 3),
    "first update": (muon, "update_params_", 1),
    "later update": (muon, "update_params_", 2),
    "AdamW": (adamw, "apply", 1),
    "the counter of rounding": (muon, "update_params_", 3),
}


@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("where", EARLY)
@pytest.mark.parametrize("form", FORMATS)
def test_what_fails_before_the_first_write_changes_nothing_and_can_be_tried_again(
    form, where, cause, is_warm, monkeypatch
):
    if form == "columns" and where == "reading":
        where = "encoding"  # there is one stack alone
    if form == "columns" and where == "making state":
        pytest.skip("two parameters make no third state")
    if where == "clipping" and form != "clipped":
        pytest.skip("nothing is clipped")
    if is_warm and where == "making state":
        pytest.skip("there is state")
    model, optimizer = make(form, param_rounding="stochastic", dtype=torch.bfloat16)
    twins, twin = make(form, param_rounding="stochastic", dtype=torch.bfloat16)
    for params, each in ((model, optimizer), (twins, twin)):
        if is_warm:
            set_grads(params, seed=0)
            each.step()
        set_grads(params)
    before = everything(model, optimizer)
    with monkeypatch.context() as patch:
        plant(patch, EARLY[where], CAUSES[cause])
        with pytest.raises(type(CAUSES[cause]), match="planted"):
            optimizer.step()
    assert_nested_equal(everything(model, optimizer), before)
    optimizer.step()
    twin.step()
    assert_nested_equal(everything(model, optimizer), everything(twins, twin))


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("where", LATE)
def test_what_fails_later_marks_the_optimizer_until_a_state_is_loaded(where, cause, monkeypatch):
    model, optimizer = make()
    set_grads(model, seed=0)
    optimizer.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    set_grads(model)
    with monkeypatch.context() as patch:
        plant(patch, LATE[where], CAUSES[cause])
        with pytest.raises(type(CAUSES[cause]), match="planted"):
            optimizer.step()
    name = type(CAUSES[cause]).__name__
    for use in (
        optimizer.step,
        optimizer.state_dict,
        lambda: copy.deepcopy(optimizer),
        lambda: pickle.dumps(optimizer),
    ):
        with pytest.raises(
            RuntimeError, match=rf"failed when it had begun to write \({name}: planted\).*load_state_dict"
        ):
            use()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    optimizer.step()
    twins, twin = make()
    for seed in (0, 1):
        set_grads(twins, seed)
        twin.step()
    assert_nested_equal(everything(model, optimizer), everything(twins, twin))


def test_a_second_moment_that_fails_after_the_launch_of_all_else_marks_the_optimizer(monkeypatch):
    """The launch has written the momentum."""
    param = torch.nn.Parameter(torch.ones(8, 24))
    optimizer = Muon8bit([param], second_moment="row")
    param.grad = torch.eye(24)[:8]
    partition, tiny = muon.partition, NSMethod("gram", torch.float32, "vendor", (5,), tiny=True)

    def in_one_launch(*args, **how):
        found = partition(*args, **how)
        return found._replace(pieces=(found.pieces[0]._replace(method=tiny),))

    monkeypatch.setattr(muon, "partition", in_one_launch)
    with monkeypatch.context() as patch:
        plant(patch, (muon, "normalize", 1), torch.OutOfMemoryError("planted"))
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    with pytest.raises(RuntimeError, match=r"begun to write .*planted"):
        optimizer.step()


def loss_of(model):
    torch.manual_seed(2)
    return sum((param.float() * torch.randn(param.shape)).sum() for param in model.values())


def test_a_first_release_that_fails_can_be_tried_again(monkeypatch):
    model, optimizer = make(on_nonfinite="skip")
    twins, twin = make(on_nonfinite="skip")
    release_gradients(model, optimizer)
    release_gradients(twins, twin)
    before = everything(model, optimizer)[0]
    with monkeypatch.context() as patch:
        plant(patch, (phases, "new_state", 1), torch.OutOfMemoryError("planted"))
        with pytest.raises(torch.OutOfMemoryError):
            loss_of(model).backward()
    optimizer.zero_grad()
    assert_nested_equal(everything(model, optimizer)[0], before)
    for params, each in ((model, optimizer), (twins, twin)):
        loss_of(params).backward()
        each.step()
    assert_nested_equal(everything(model, optimizer), everything(twins, twin))


def test_a_later_release_that_fails_marks_the_optimizer(monkeypatch):
    """Other parameters have been stepped by then."""
    model, optimizer = make(on_nonfinite="skip")
    release_gradients(model, optimizer)
    with monkeypatch.context() as patch:
        plant(patch, (phases, "new_state", 2), torch.OutOfMemoryError("planted"))
        with pytest.raises(torch.OutOfMemoryError):
            loss_of(model).backward()
    with pytest.raises(RuntimeError, match=r"begun to write .*planted"):
        optimizer.step()
