"""State bytes of any optimizer, measured by storage, beside what the usual optimizers would take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._text import collapse, format_bytes, render, template, unwrapper
from .config import (
    ADAMW8_BLOCK_SIZE,
    BUFFER_KEY,
    DYNAMIC_CODES_KEY,
    EXP_AVG_CODES_KEY,
    EXP_AVG_KEY,
    LINEAR_CODES_KEY,
    MIN_ADAMW8_ELEMENTS,
    MIN_QUANTIZED_COLUMNS,
    SCALES_KEY,
)
from .step.dense import is_fake

ADAMW_BYTES = 8  # per element: two fp32 moments
# torch's 0-d fp32 step counter; bitsandbytes counts in an int.
STEP_BYTES = 4
# bitsandbytes' two maps of 256 fp32 values, shared by all tensors.
BNB_MAPS_BYTES = 2 * 256 * 4


@dataclass(frozen=True)
class AlgorithmBytes:
    """One algorithm's share: `algorithm` is "muon", "adamw" or "other"; `num_parameters` counts elements."""

    algorithm: str
    num_tensors: int
    num_parameters: int
    state_bytes: int

    @property
    def bytes_per_parameter(self) -> float:
        """State bytes per element; 0 without elements."""
        return self.state_bytes / self.num_parameters if self.num_parameters else 0.0


@dataclass(frozen=True)
class ParamNote:
    """A parameter worth naming: qualified name, or `parameter 3 of group 0`; local shape; state bytes."""

    name: str
    shape: tuple[int, ...]
    state_bytes: int


@dataclass(frozen=True)
class UntouchedMatrices:
    """A stack of matrices, some of which never had a gradient: its name, how many of them, and how many it holds."""

    name: str
    num_untouched: int
    num_matrices: int


@dataclass(frozen=True)
class ActiveMatrices:
    """When the matrices of a stack were last stepped: its name, and the last step of each in order; 0: none seen."""

    name: str
    last_steps: tuple[int, ...]


@dataclass(frozen=True)
class StateReport:
    """Bytes of an optimizer's state, and of what others would take.

    Attributes:
        algorithms: bytes and elements of Muon, AdamW and others.
        baselines: name of an optimizer -> the bytes that it would take for the same parameters.
        kept_32bit: matrices too narrow for 8 bits.
        adamw_kept_32bit: AdamW's tensors too small for `adamw_bits=8`.
        without_state: parameters that no step has reached.
        is_sharded: some tensor is a DTensor, and every figure is of this rank's part.
        untouched: stacks in which the momentum of some matrices, as of experts without tokens, is zero. Stacks whose
            state lies on another device than they do are left out: it may be on its way there.
        step: the number of the last call of `step()`, and
        activity: what this rank knows of every stack; of an optimizer with a `StackActivity`, else 0 and nothing.
    """

    algorithms: tuple[AlgorithmBytes, ...]
    baselines: dict[str, int]
    kept_32bit: tuple[ParamNote, ...]
    adamw_kept_32bit: tuple[ParamNote, ...]
    without_state: tuple[ParamNote, ...]
    is_sharded: bool
    untouched: tuple[UntouchedMatrices, ...] = ()
    step: int = 0
    activity: tuple[ActiveMatrices, ...] = ()

    @property
    def total_bytes(self) -> int:
        """State bytes of all algorithms."""
        return sum(entry.state_bytes for entry in self.algorithms)

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters in the groups."""
        return sum(entry.num_parameters for entry in self.algorithms)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON takes it.

        Keys: `total_bytes`, `num_parameters` (elements), `bytes_per_parameter`, `is_sharded`,
        `algorithms` ({"muon" | "adamw" | "other": {num_tensors, num_parameters, state_bytes,
        bytes_per_parameter}}), `baselines` ({name: bytes}), `kept_32bit`, `adamw_kept_32bit` and `without_state` (lists
        of {name, shape, state_bytes}), `untouched` (list of {name, num_untouched, num_matrices}), `step` (int),
        `activity` (list of {name, last_steps}), `note` (str).
        """
        total = AlgorithmBytes("", 0, self.num_parameters, self.total_bytes)
        algorithms = {}
        for entry in self.algorithms:
            fields = asdict(entry) | {"bytes_per_parameter": entry.bytes_per_parameter}
            algorithms[fields.pop("algorithm")] = fields
        return {
            "total_bytes": self.total_bytes,
            "num_parameters": self.num_parameters,
            "bytes_per_parameter": total.bytes_per_parameter,
            "is_sharded": self.is_sharded,
            "algorithms": algorithms,
            "baselines": dict(self.baselines),
            **{
                key: [asdict(note) | {"shape": list(note.shape)} for note in getattr(self, key)]
                for key in ("kept_32bit", "adamw_kept_32bit", "without_state")
            },
            "untouched": [asdict(stack) for stack in self.untouched],
            "step": self.step,
            "activity": [{"name": stack.name, "last_steps": list(stack.last_steps)} for stack in self.activity],
            "note": self.note,
        }

    @property
    def note(self) -> str:
        """When the report was taken: state is made by the first step that finds a gradient."""
        num_tensors = sum(entry.num_tensors for entry in self.algorithms)
        if not self.without_state:
            return "after the first step: every parameter has its state"
        if len(self.without_state) == num_tensors:
            return "before the first step: state is made lazily, so there is none yet"
        return f"{len(self.without_state)} of {num_tensors} tensors have no state yet: no gradient so far"

    def __str__(self) -> str:
        rows = [(entry.algorithm, *_cells(entry.state_bytes, entry.num_parameters), "") for entry in self.algorithms]
        rows.append(("in all", *_cells(self.total_bytes, self.num_parameters), "1.00 x"))
        for name, num_bytes in self.baselines.items():
            ratio = f"{num_bytes / self.total_bytes:.2f} x" if self.total_bytes else "-"
            rows.append((f"{name} would take", *_cells(num_bytes, self.num_parameters), ratio))
        header = ("state of", "parameters", "state bytes", "B per parameter", "ratio")
        lines = [render(header, rows, "<>>>>"), "", self.note]
        if self.is_sharded:
            lines.append("sharded: every figure is of this rank's local tensors")
        if self.kept_32bit:
            title = f"left in 32 bits though bits=8 (under {MIN_QUANTIZED_COLUMNS} columns)"
            lines.append(f"{title}: {_listed(self.kept_32bit)}")
        if self.adamw_kept_32bit:
            title = f"left in 32 bits though adamw_bits=8 (under {MIN_ADAMW8_ELEMENTS} elements)"
            lines.append(f"{title}: {_listed(self.adamw_kept_32bit)}")
        if self.without_state and self.total_bytes:
            lines.append(f"no state yet: {_listed(self.without_state)}")
        if self.untouched:
            stacks = [f"{s.num_untouched} of {s.num_matrices} in {s.name}" for s in self.untouched]
            lines.append(f"matrices of stacks without a gradient so far: {', '.join(stacks)}")
        for stack in self.activity if self.step else ():
            steps = stack.last_steps
            line = f"step {self.step} moved {steps.count(self.step)} of {len(steps)} matrices in {stack.name}"
            least = min(steps, default=self.step)
            if least < self.step:
                last = f"last moved in step {least}" if least else "not seen to move"
                line += f"; longest idle: number {steps.index(least)}, {last}"
            lines.append(line)
        return "\n".join(lines)


def state_report(optimizer: torch.optim.Optimizer) -> StateReport:
    """Measure the state of any torch optimizer, at any time; reads `state` and `param_groups` only.

    No values are read, but of stacks of matrices: the scales of their momentum, or the momentum in 32 bits.

    Bytes are `untyped_storage().nbytes()`, each storage counted once: a padded or viewed storage counts
    whole, and what several parameters share goes to the first. Of a DTensor the local tensor counts.

    A group's "algorithm" says whose bytes they are; without one: Muon if the state has momentum codes or the
    optimizer's class name says so, AdamW if it has two moments.

    Baselines, as `muon8bit report` has them: `muon_fp32` and `muon_bf16` (4 and 2 B per element of the parameters
    routed to Muon, AdamW in fp32 for the rest; absent where nothing is routed to Muon), `adamw_fp32` (8 B per element,
    4 B per tensor for its step counter), `adamw_8bit` (bitsandbytes: 2 B per element and 8 B per 256 elements; fp32 for
    tensors under 4096 elements; once 2 KiB for its two maps).

    Raises:
        TypeError: for what is no optimizer, such as the model.

    Source: torch.optim.Muon and AdamW state; bitsandbytes 0.50 `Optimizer2State.init_state`, `min_8bit_size`.
    """
    if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "state"):
        kind = type(optimizer).__name__
        raise TypeError(f"state_report takes an optimizer after its first step, not a {kind}: give the optimizer")
    entries = list(named_params(optimizer))
    states = [optimizer.state.get(param, {}) for _, param, _ in entries]
    has_codes = any(key in state for state in states for key in (LINEAR_CODES_KEY, DYNAMIC_CODES_KEY))
    seen: set[tuple[torch.device, int]] = set()
    counts: dict[str, list[int]] = {}
    baselines = {"muon_fp32": 0, "muon_bf16": 0, "adamw_fp32": 0, "adamw_8bit": 0}
    kept, adamw_kept, missing, untouched, has_maps = [], [], [], list[UntouchedMatrices](), False
    for (name, param, group), state in zip(entries, states, strict=True):
        local, algorithm = _local(param), _algorithm(group, state, optimizer)
        num_bytes, num_elements = _storage_bytes(state, seen), local.numel()
        entry = counts.setdefault(algorithm, [0, 0, 0])
        for i, value in enumerate((1, num_elements, num_bytes)):
            entry[i] += value
        is_muon = algorithm == "muon"
        adamw_bytes = ADAMW_BYTES * num_elements + STEP_BYTES
        baselines["muon_fp32"] += 4 * num_elements if is_muon else adamw_bytes
        baselines["muon_bf16"] += 2 * num_elements if is_muon else adamw_bytes
        baselines["adamw_fp32"] += adamw_bytes
        baselines["adamw_8bit"] += bnb_bytes(num_elements)
        has_maps |= num_elements >= MIN_ADAMW8_ELEMENTS
        note = ParamNote(name, tuple(local.shape), num_bytes)
        if is_muon and local.ndim > 2 and not group.get("flatten"):
            untouched += _untouched(name, local, state)
        if not any(True for _ in _tensors(state)):
            missing.append(note)
        elif is_muon and BUFFER_KEY in state and group.get("bits", 8 if has_codes else 32) == 8:
            kept.append(note)
        elif EXP_AVG_KEY in state and group.get("adamw_bits") == 8:
            adamw_kept.append(note)
    baselines["adamw_8bit"] += BNB_MAPS_BYTES * has_maps
    known = {param for _, param, _ in entries}
    strays = _storage_bytes([state for key, state in optimizer.state.items() if key not in known], seen)
    if strays:
        counts.setdefault("other", [0, 0, 0])[2] += strays
    if "muon" not in counts:
        del baselines["muon_fp32"], baselines["muon_bf16"]
    is_sharded = any(hasattr(param, "to_local") for _, param, _ in entries)
    order = [algorithm for algorithm in ("muon", "adamw", "other") if algorithm in counts]
    algorithms = tuple(AlgorithmBytes(algorithm, *counts[algorithm]) for algorithm in order)
    notes = tuple(kept), tuple(adamw_kept), tuple(missing)
    report = StateReport(algorithms, baselines, *notes, is_sharded, tuple(untouched))
    held = getattr(optimizer, "optimizer", optimizer)  # by Accelerate's wrapper
    if (activity := getattr(held, "stack_activity", None)) is None:
        return report
    stacks = tuple(ActiveMatrices(name, tuple(steps.flatten().tolist())) for name, steps in activity.local().items())
    return replace(report, step=activity.step, activity=stacks)


def _untouched(name: str, param: Tensor, state: Mapping[str, Any]) -> list[UntouchedMatrices]:
    """Return how many matrices of a stack have a zero momentum, if any has."""
    momentum = _local(state.get(SCALES_KEY, state.get(BUFFER_KEY, param)))
    if momentum is param or momentum.device != param.device or is_fake(momentum) or not momentum.numel():
        return []
    are_touched = momentum.flatten(-2).any(-1)
    num_untouched = int((~are_touched).sum())
    return [UntouchedMatrices(name, num_untouched, are_touched.numel())] if num_untouched else []


def named_params(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor, Mapping[str, Any]]]:
    """Yield name, tensor and group of every parameter in the groups."""
    unwrapped = unwrapper(name for group in optimizer.param_groups for name in group.get("param_names") or ())
    for i, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [f"parameter {j} of group {i}" for j in range(len(group["params"]))]
        yield from ((unwrapped(name), param, group) for name, param in zip(names, group["params"], strict=True))


def _algorithm(group: Mapping[str, Any], state: Mapping[str, Any], optimizer: object) -> str:
    """Return "muon", "adamw" or "other": by the group, else by the state, else by the class's name."""
    if group.get("algorithm") in ("muon", "adamw"):
        return str(group["algorithm"])
    name = type(optimizer).__name__.lower()
    if LINEAR_CODES_KEY in state or DYNAMIC_CODES_KEY in state or "muon" in name:
        return "muon"
    return "adamw" if EXP_AVG_KEY in state or EXP_AVG_CODES_KEY in state or "adamw" in name else "other"


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, and any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield every plain tensor inside nested state; a wrapper subclass (as torchao's) is taken apart."""
    if isinstance(value, Tensor):
        value = _local(value)
        if hasattr(value, "__tensor_flatten__"):
            for key in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, key))
        else:
            yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _storage_bytes(value: object, seen: set[tuple[torch.device, int]]) -> int:
    """Return the bytes of the storages under `value` that are not in `seen` yet, and add them to it."""
    num_bytes = 0
    for tensor in _tensors(value):
        storage = tensor.untyped_storage()
        key = (tensor.device, storage._cdata if is_fake(tensor) else storage.data_ptr())
        if key not in seen or not key[1]:  # meta tensors and empty ones have no address
            seen.add(key)
            num_bytes += storage.nbytes()
    return num_bytes


def bnb_bytes(num_elements: int) -> int:
    """Return the state bytes of one tensor in bitsandbytes' AdamW8bit.

    Two codes per element and two fp32 maxima per 256 elements; under 4096 elements (its `min_8bit_size`) fp32. The two
    1 KiB maps that all tensors share are left out.
    """
    if num_elements < MIN_ADAMW8_ELEMENTS:
        return ADAMW_BYTES * num_elements
    return 2 * num_elements + 8 * math.ceil(num_elements / ADAMW8_BLOCK_SIZE)


def _cells(num_bytes: int, num_elements: int) -> tuple[str, str, str]:
    """Return the cells of a table: elements, bytes, bytes per element."""
    per_parameter = f"{num_bytes / num_elements:.4f}" if num_elements else "-"
    return f"{num_elements:,}", format_bytes(num_bytes), per_parameter


def _listed(notes: Iterable[ParamNote]) -> str:
    """Return the names with shapes and bytes, repeated layers collapsed."""
    groups: dict[tuple[str, tuple[int, ...]], list[ParamNote]] = {}
    for note in notes:
        groups.setdefault((template(note.name), note.shape), []).append(note)
    return ", ".join(
        f"{collapse([note.name for note in group])} ({' x '.join(map(str, group[0].shape)) or 'scalar'})"
        for group in groups.values()
    )
