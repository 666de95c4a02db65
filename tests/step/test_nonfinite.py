"""What happens where the verdict on the gradients is not waited for, as on CUDA; played on the CPU."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from muon8bit_kernels import reference
from torch.utils._python_dispatch import TorchDispatchMode

from muon8bit import Muon8bit, NonFiniteGradientError, release_gradients
from muon8bit.step import nonfinite


@pytest.fixture(autouse=True)
def _asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonfinite.GradientCheck, "is_asynchronous", True)


def make(**options):
    torch.manual_seed(0)
    params = {name: torch.nn.Parameter(torch.randn(8, 16).bfloat16()) for name in ("a", "b", "embed")}
    groups = [
        {"params": [("a", params["a"]), ("b", params["b"])], "lr": 0.02},
        {"params": [("embed", params["embed"])], "algorithm": "adamw", "lr": 0.01},
    ]
    return params, Muon8bit(groups, param_rounding="stochastic", **options)


def set_grads(params, seed, bad=None, value=torch.nan):
    generator = torch.Generator().manual_seed(seed)
    for name, param in params.items():
        param.grad = torch.randn(8, 16, generator=generator).bfloat16()
        if name == bad:
            param.grad[3, 5] = value


def snapshot(params, optimizer):
    state = {(name, key): t.clone() for name, p in params.items() for key, t in optimizer.state[p].items()}
    return state | {(name, "param"): p.detach().clone() for name, p in params.items()}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[key]) for key, value in left.items())


@pytest.mark.parametrize("bad", ["a", "b", "embed"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_step_changes_nothing_and_is_told_at_the_next(bad, value):
    params, optimizer = make()
    for seed in range(2):
        set_grads(params, seed)
        optimizer.step()
    before = snapshot(params, optimizer)
    set_grads(params, 2, bad, value)
    optimizer.step()
    assert_equal(before, snapshot(params, optimizer))
    set_grads(params, 3)
    with pytest.raises(NonFiniteGradientError, match=rf"gradient of {bad}, at call 3 of step\(\)") as error:
        optimizer.step()
    assert (error.value.names, error.value.step) == ((bad,), 3)
    assert_equal(before, snapshot(params, optimizer))


def test_after_the_error_the_run_goes_on_as_if_the_bad_step_had_not_been():
    """Bitwise, stochastic rounding and AdamW's step counter included."""
    params, optimizer = make()
    twin_params, twin = make()
    for seed in range(4):
        if seed == 2:
            set_grads(params, 9, "b")
            optimizer.step()
            saved, expected = optimizer.state_dict(), twin.state_dict()  # which neither raises nor tells
            assert saved["param_groups"] == expected["param_groups"]
            assert_equal(*({(i, k): t for i, s in d["state"].items() for k, t in s.items()} for d in (saved, expected)))
            with pytest.raises(NonFiniteGradientError):
                optimizer.step()
        for some, its in ((params, optimizer), (twin_params, twin)):
            set_grads(some, seed)
            its.step()
    assert_equal(snapshot(params, optimizer), snapshot(twin_params, twin))
    assert optimizer.param_groups[0]["rounding_step"] == twin.param_groups[0]["rounding_step"] == 4


def test_skipped_steps_are_counted_and_leave_no_trace():
    params, optimizer = make(on_nonfinite="skip")
    twin_params, twin = make()
    for seed in range(3):
        set_grads(params, 7 + seed, "a")
        optimizer.step()
        for some, its in ((params, optimizer), (twin_params, twin)):
            set_grads(some, seed)
            its.step()
    assert optimizer.num_skipped_steps == 3
    assert_equal(snapshot(params, optimizer), snapshot(twin_params, twin))


def test_raise_at_once_waits_and_stores_nothing():
    params, optimizer = make(on_nonfinite="raise_at_once")
    set_grads(params, 0, "embed")
    with pytest.raises(NonFiniteGradientError, match="gradient of embed, at call 1"):
        optimizer.step()
    assert not optimizer.state
    optimizer.state_dict()  # nothing is left to tell


def test_a_copy_is_told_what_its_original_has_not_been():
    params, optimizer = make()
    set_grads(params, 0, "a")
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    for each in (optimizer, twin):
        with pytest.raises(NonFiniteGradientError):
            each.step()


def test_a_loaded_state_has_nothing_to_do_with_the_last_step():
    params, optimizer = make()
    set_grads(params, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    set_grads(params, 1, "a")
    optimizer.step()
    optimizer.load_state_dict(saved)
    set_grads(params, 2)
    optimizer.step()
    assert optimizer.param_groups[0]["rounding_step"] == 2


def test_a_step_that_was_not_waited_for_keeps_no_gradient_alive():
    """Until the next step the verdict stays; the gradients would be a second set beside those of that step."""
    params, optimizer = make()
    set_grads(params, 0)
    grads = [weakref.ref(param.grad) for param in params.values()]
    optimizer.step()
    optimizer.zero_grad()
    assert [grad() for grad in grads] == [None] * 3


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_step_that_failed_takes_back_no_step_of_rounding(policy, monkeypatch):
    params, optimizer = make(on_nonfinite=policy)
    set_grads(params, 0, "a")

    def fails(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(reference, "momentum_apply", fails)
        with pytest.raises(MemoryError):
            optimizer.step()
    set_grads(params, 1)
    optimizer.step()
    assert [group["rounding_step"] for group in optimizer.param_groups] == [1, 1]


def test_the_kernels_get_the_flag_and_not_the_host(monkeypatch):
    """One kernel call a batch, with the flag."""
    calls = []
    for name in ("momentum_apply", "update_params"):
        original = getattr(reference, name)

        def spy(*tensors, original=original, name=name, **how):
            calls.append((name, how["skip"]))
            return original(*tensors, **how)

        monkeypatch.setattr(reference, name, spy)
    params, optimizer = make()
    set_grads(params, 0, "b")
    optimizer.step()
    assert [name for name, _ in calls] == ["momentum_apply", "update_params"]
    assert all(skip.shape == () and skip.dtype == torch.float32 and skip == 1 for _, skip in calls)


@pytest.mark.parametrize("method", ["step", "backward"])
def test_a_captured_step_is_refused_and_changes_nothing(method, monkeypatch):
    params, optimizer = make(on_nonfinite="skip")
    set_grads(params, 0)
    loss = sum(param.float().sum() for param in params.values())
    call = optimizer.step if method == "step" else loss.backward
    if method == "backward":
        release_gradients(torch.nn.ParameterDict({**params}), optimizer)
    before = copy.deepcopy((list(params.values()), optimizer.state_dict()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"captured in a CUDA graph.*Capture forward and backward alone"):
        call()
    monkeypatch.undo()
    assert all(map(torch.equal, params.values(), before[0]))
    assert optimizer.state_dict() == before[1]


class _Copies(TorchDispatchMode):
    """What is copied to the CPU, and whether it was waited for. A meta tensor is a device of its own kind: all ones."""

    def __init__(self):
        super().__init__()
        self.waited_for = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            self.waited_for.append(not kwargs.get("non_blocking", False))
            return torch.ones(args[0].shape, dtype=args[0].dtype)
        return function(*args, **kwargs)


def test_flags_are_waited_for_where_no_event_tells_of_them():
    """On MPS and XPU a copy that is not waited for is read before it has arrived."""
    with _Copies() as copies:
        verdict = nonfinite.GradientCheck([(lambda: ["a"], torch.ones(1, dtype=torch.bool, device="meta"))], 1)
        assert verdict.nonfinite_names() == []
    assert copies.waited_for == [True]
