"""Checks of one matrix in one process: rule, scale of gradients, resume, a NaN, bytes."""

from __future__ import annotations

import copy
import io
import math
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from benchmarks.peers.rules import closest, cosine, last_updates
from benchmarks.peers.subjects import Subject

SHAPE, NUM_STEPS = (128, 256), 8  # 32,768 elements: over every class's least size of a quantized state
LEAST_COSINE = 0.97  # that of an 8-bit AdaMuon, whose signs flip, is over it; that of another rule is not


class OneMatrix(nn.Module):
    """A module whose only parameter is a matrix of zeros, so that its change is the sum of the updates."""

    def __init__(self, dtype: torch.dtype = torch.float32, shape: tuple[int, int] = SHAPE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype))


def make_grads(num: int, shape: tuple[int, int] = SHAPE, seed: int = 0) -> list[Tensor]:
    """Return fp32 gradients with rows of several sizes around 1e-2."""
    rng = np.random.default_rng(seed)
    sizes = 1e-2 * np.exp(0.5 * rng.normal(size=(shape[0], 1)))
    return [torch.from_numpy(sizes * rng.normal(size=shape)).float() for _ in range(num)]


def take_step(optimizer: torch.optim.Optimizer, param: Tensor, grad: Tensor, seed: int = 7) -> np.ndarray:
    """Take a step with torch's generator at `seed`; return the update in float64, before minus after."""
    before = param.detach().double().numpy().copy()
    param.grad = grad.to(param.dtype)
    torch.manual_seed(seed)
    optimizer.step()
    return before - param.detach().double().numpy()


def check_rule(subject: Subject) -> dict[str, Any]:
    """Return the rule whose last of several updates is closest, its cosine, and the update's RMS over lr."""
    model, grads = OneMatrix(), make_grads(NUM_STEPS)
    optimizer = subject.make(list(model.named_parameters()))
    for i, grad in enumerate(grads):
        update = take_step(optimizer, model.weight, grad, seed=i)
    name, value = closest(update, last_updates([grad.double().numpy() for grad in grads]))
    rms = float(np.sqrt(np.mean(update**2))) / subject.lr
    return {"rule": name, "cosine": value, "rms": rms, "passed": value >= LEAST_COSINE}


def check_scale(subject: Subject) -> dict[str, Any]:
    """Return the cosine between updates after gradients and after 1000 times those."""
    updates = []
    for factor in (1.0, 1000.0):
        model = OneMatrix()
        optimizer = subject.make(list(model.named_parameters()))
        for i, grad in enumerate(make_grads(3)):
            update = take_step(optimizer, model.weight, factor * grad, seed=i)
        updates.append(update)
    value = cosine(*updates)
    return {"cosine": value, "passed": value >= LEAST_COSINE}


def check_resume(subject: Subject, dtype: torch.dtype) -> dict[str, Any]:
    """Save by torch.save, load into a new optimizer, and compare its next step with that of the old one."""
    notes: list[str] = []

    def through_a_file(_: nn.Module, optimizer: Any, model: nn.Module) -> Any:
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        try:
            state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        except Exception as error:
            notes.append(f"not loaded with weights_only=True ({type(error).__name__})")
            state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        resumed = subject.make(list(model.named_parameters()))
        resumed.load_state_dict(state)
        return resumed

    result = _compare_resumed(subject, dtype, through_a_file)
    result["notes"] += notes
    result["passed"] = result["is_bitwise"] and not notes
    return result


def check_names(subject: Subject) -> dict[str, Any]:
    """Check the same through get_optimizer_state_dict and set_optimizer_state_dict, which key state by names."""

    def through_names(old: nn.Module, optimizer: Any, model: nn.Module) -> Any:
        resumed = subject.make(list(model.named_parameters()))
        set_optimizer_state_dict(model, resumed, copy.deepcopy(get_optimizer_state_dict(old, optimizer)))
        return resumed

    return _compare_resumed(subject, torch.float32, through_names)


def check_dcp(subject: Subject) -> dict[str, Any]:
    """Check the same through torch.distributed.checkpoint, in one process."""

    def through_a_folder(old: nn.Module, optimizer: Any, model: nn.Module) -> Any:
        resumed = subject.make(list(model.named_parameters()))
        with tempfile.TemporaryDirectory() as folder:
            dcp.save(get_optimizer_state_dict(old, optimizer), checkpoint_id=folder, no_dist=True)
            state = get_optimizer_state_dict(model, resumed)
            dcp.load(state, checkpoint_id=folder, no_dist=True)
        set_optimizer_state_dict(model, resumed, state)
        return resumed

    return _compare_resumed(subject, torch.float32, through_a_folder)


def _compare_resumed(
    subject: Subject, dtype: torch.dtype, resume: Callable[[nn.Module, Any, nn.Module], Any]
) -> dict[str, Any]:
    grads, old, new = make_grads(NUM_STEPS + 1), OneMatrix(dtype), OneMatrix(dtype)
    optimizer = subject.make(list(old.named_parameters()))
    for i, grad in enumerate(grads[:-1]):
        take_step(optimizer, old.weight, grad, seed=i)
    new.weight.data.copy_(old.weight.data)
    old.weight.grad = None
    resumed = resume(old, optimizer, new)
    before, after = _dtypes(optimizer.state[old.weight]), _dtypes(resumed.state[new.weight])
    notes = [f"{key} {before[key]} became {after[key]}" for key in before if key in after and before[key] != after[key]]
    notes += [f"{key} is not loaded" for key in before if key not in after]
    expected, found = take_step(optimizer, old.weight, grads[-1]), take_step(resumed, new.weight, grads[-1])
    is_bitwise = torch.equal(old.weight, new.weight)
    value = 1.0 if is_bitwise else cosine(expected, found)
    return {"is_bitwise": is_bitwise, "cosine": value, "notes": notes, "passed": is_bitwise}


def _dtypes(state: dict[str, Any]) -> dict[str, str]:
    return {str(key): str(value.dtype).removeprefix("torch.") for key, value in state.items() if torch.is_tensor(value)}


def check_nan(subject: Subject) -> dict[str, Any]:
    """Tell what becomes of a gradient with one NaN, after two good ones."""
    model, grads = OneMatrix(), make_grads(3)
    optimizer = subject.make(list(model.named_parameters()))
    for grad in grads[:2]:
        take_step(optimizer, model.weight, grad)
    grads[2][3, 5] = math.nan
    before = model.weight.detach().clone()
    try:
        take_step(optimizer, model.weight, grads[2])
    except Exception as error:
        is_unchanged = torch.equal(before, model.weight)
        kept = "nothing is changed" if is_unchanged else "parameters are changed"
        return {"outcome": f"{type(error).__name__}, {kept}", "passed": is_unchanged}
    if num := int((~model.weight.isfinite()).sum()):
        which = "all" if num == model.weight.numel() else f"{num} of {model.weight.numel()}"
        return {"outcome": f"no error, {which} parameters are not finite", "passed": False}
    is_unchanged = torch.equal(before, model.weight)
    outcome = "no error, nothing is changed" if is_unchanged else "no error, the step is taken, parameters are finite"
    return {"outcome": outcome, "passed": is_unchanged}


def check_bytes(subject: Subject) -> dict[str, Any]:
    """Return the bytes of all tensors that the optimizer holds beside parameter and gradient, by storage."""
    shape = (256, 1024)
    model = OneMatrix(shape=shape)
    optimizer = subject.make(list(model.named_parameters()))
    take_step(optimizer, model.weight, make_grads(1, shape)[0])
    own = {model.weight.untyped_storage().data_ptr(), model.weight.grad.untyped_storage().data_ptr()}
    storages: dict[int, int] = {}
    _walk([dict(optimizer.state), vars(optimizer)], storages, set())
    total = sum(size for pointer, size in storages.items() if pointer not in own)
    return {"bytes_per_parameter": total / math.prod(shape), "passed": True}


def _walk(value: Any, storages: dict[int, int], seen: set[int]) -> None:
    """Gather address -> bytes of storages in containers, tensor subclasses and objects with attributes."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if torch.is_tensor(value):
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            _walk([getattr(value, name) for name in names], storages, seen)
        elif value.device.type != "meta":
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, dict):
        _walk(list(value.values()), storages, seen)
    elif isinstance(value, list | tuple | set):
        for entry in value:
            _walk(entry, storages, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        _walk(vars(value), storages, seen)
