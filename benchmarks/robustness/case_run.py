"""One of `step_cases` run by the package that is imported: parameters with an optimizer, steps, what they leave behind.

Gradients are drawn, not computed, so that nothing else can differ.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from step_cases import StepCase
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from muon8bit import Muon8bit, NonFiniteGradientError, convert_state_dict, release_gradients

Items = dict[str, Any]  # what is compared: tensors and texts, by what they are
NUM_STEPS, NUM_MORE = 3, 2
MAX_DECODED = 2**20  # elements of a case; of larger ones codes and scales are enough


def drawn(case: StepCase, seed: int) -> dict[str, Tensor]:
    """Return a tensor for every parameter, of its dtype and strides."""
    tensors = {}
    for index, (name, shape) in enumerate({**case.matrices, **case.vectors}.items()):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        tensor = torch.randn(shape, generator=generator)
        if seed and case.grads == "uneven":
            tensor *= 10.0 ** torch.empty(shape[0], *(1 for _ in shape[1:])).uniform_(-9, 2, generator=generator)
        elif seed and case.grads == "tiny":
            tensor *= 1e-38
        elif seed and case.grads == "zero":
            tensor *= 0 if seed == 1 else (torch.rand(shape, generator=generator) > 0.5)
        tensor = tensor.to(case.dtype)
        if case.layout == "transposed" and tensor.ndim == 2:
            tensor = tensor.T.contiguous().T
        elif case.layout == "channels_last" and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        tensors[name] = tensor
    return tensors


class CaseRun:
    """Parameters and an optimizer of a case; `mesh` where it runs on ranks."""

    def __init__(self, case: StepCase, values: dict[str, Tensor], mesh: Any = None) -> None:
        self.case, self.mesh = case, mesh
        self.model = nn.ParameterDict({_key(name): nn.Parameter(self._placed(v)) for name, v in values.items()})
        if case.way == "rows":
            fully_shard(self.model, mesh=mesh)
        self.params: dict[str, Tensor] = {name: self.model[_key(name)] for name in values}
        groups: list[dict[str, Any]] = [{"params": [(n, self.params[n]) for n in case.matrices], **case.muon}]
        if case.vectors:
            of = [(n, self.params[n]) for n in case.vectors]
            groups.append({"params": of, "algorithm": "adamw", "lr": 0.01, **case.adamw})
        options = copy.deepcopy({"lr": 0.02, **case.options})
        if case.options.get("maximize"):
            groups[-1]["maximize"] = True
        if case.way == "replicas":
            options["process_group"] = mesh.get_group()
        self.optimizer = Muon8bit(groups, **options)
        if case.way == "release":
            release_gradients(self.model, self.optimizer)
        self.before: dict[str, Tensor] = {}
        self.told: list[str] = []

    def _placed(self, value: Tensor) -> Tensor:
        value = value.clone()  # of the same strides
        if self.case.way == "columns" and value.ndim > 1:
            return distribute_tensor(value, self.mesh, [Shard(value.ndim - 1)], src_data_rank=None)
        return value

    def step(self, seed: int) -> None:
        """Take a step with the gradients of this seed."""
        self.before = {name: _local(param).detach().clone() for name, param in self.params.items()}
        grads, way, optimizer = drawn(self.case, seed), self.case.way, self.optimizer
        is_bad = seed == 2 and way in ("skip", "raise")
        if is_bad:
            grads[next(iter(grads))].view(-1)[3] = torch.nan
        if self.case.grads == "some" and seed > 1:
            del grads[list(grads)[seed % len(grads)]]
        if way == "release":
            torch.stack([(self.params[n] * g).float().sum() for n, g in grads.items()]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            return
        for name, param in self.params.items():
            grad = grads.get(name)
            if grad is not None and isinstance(param, DTensor):
                grad = distribute_tensor(grad, self.mesh, param.placements, src_data_rank=None)
            param.grad = grad
        if way in ("scaler", "overflow"):  # as torch's GradScaler does it
            optimizer.grad_scale = torch.tensor(512.0)  # type: ignore[attr-defined]
            optimizer.found_inf = torch.tensor(float(way == "overflow" and seed == 2))  # type: ignore[attr-defined]
        try:
            self.told.append(str(optimizer.step(lambda: seed) if way == "closure" else optimizer.step()))
        except NonFiniteGradientError as error:
            self.told.append(str(error))

    def items(self) -> Items:
        """Return parameters, gradients and state, of this rank; momenta and moments decoded too."""
        found: Items = {"returned": self.told, "skipped steps": self.optimizer.num_skipped_steps}
        for name, param in self.params.items():
            found[f"param {name}"] = _local(param).detach().clone()
            found[f"before {name}"] = self.before.get(name)
            if param.grad is not None:
                found[f"grad {name}"] = _local(param.grad).clone()
            for key, value in self.optimizer.state[param].items():
                found[f"{key} {name}"] = _local(value).clone()
        saved = self.checkpoint()
        found["groups"] = [_plain(group) for group in saved["optimizer"]["param_groups"]]
        if not self.case.is_on_ranks and sum(param.numel() for param in self.params.values()) <= MAX_DECODED:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it says what it converts
                decoded = convert_state_dict(saved["optimizer"], bits=32, adamw_bits=32)
            for index, name in enumerate(self.params):
                for key, value in decoded["state"].get(index, {}).items():
                    found[f"decoded {key} {name}"] = value.clone()
        return found

    def checkpoint(self) -> dict[str, Any]:
        """Return whole parameters and the optimizer's state dict, on every rank."""
        self.optimizer.consolidate_state_dict()
        state = self.optimizer.state_dict()
        whole = {i: {key: _whole(value) for key, value in of.items()} for i, of in state["state"].items()}
        params = {name: _whole(param.detach()) for name, param in self.params.items()}
        return copy.deepcopy({"params": params, "optimizer": {**state, "state": whole}})


def _key(name: str) -> str:
    return name.replace(" ", "_")


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _plain(value: Any) -> str:
    return repr(sorted(value.items())) if isinstance(value, dict) else repr(value)


def run_case(case: StepCase, checkpoint: dict[str, Any] | None, mesh: Any = None) -> dict[str, Any]:
    """Return the items after three steps, after loading and after two more steps, and the checkpoint of this tree."""
    run = CaseRun(case, drawn(case, 0), mesh)
    for seed in range(1, NUM_STEPS + 1):
        run.step(seed)
    first, own = run.items(), run.checkpoint()
    checkpoint = copy.deepcopy(own if checkpoint is None else checkpoint)
    run = CaseRun(case, checkpoint["params"], mesh)
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    loaded = run.items()
    for seed in range(NUM_STEPS + 1, NUM_STEPS + NUM_MORE + 1):
        run.step(seed)
    return {"3 steps": first, "loaded": loaded, "2 more": run.items(), "checkpoint": own}
