"""The same run on one process and on several ranks of a mesh, with the same injected gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from muon8bit import Muon8bit

# Every shape once, so that a single process orthogonalizes each matrix alone, as its owner does. Uneven and empty
# shards on 2, 3 and 4 ranks.
MATRICES = {
    "wide": (10, 24),
    "square": (9, 9),
    "few rows": (2, 40),
    "one row": (1, 16),
    "narrow": (6, 5),
    "several blocks": (6, 150),
}
EXPERTS = {"experts": (5, 6, 16)}
VECTORS = {"embedding": (10, 16), "bias": (21,)}


def values(shapes, dtype, seed):
    """Return a tensor of normal numbers for every shape, the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


class Run:
    """Parameters with an optimizer; `placed` puts a whole tensor where this run has it."""

    def __init__(self, shapes, dtype, placed, *, vectors=VECTORS, group=None, adamw=None, **options):
        self.names, self.dtype, self.placed = {**shapes, **vectors}, dtype, placed
        whole = values(self.names, dtype, 0)
        self.params = {name: torch.nn.Parameter(placed(value)) for name, value in whole.items()}
        groups = [{"params": [(name, self.params[name]) for name in shapes], **(group or {})}]
        if vectors:
            of = [(name, self.params[name]) for name in vectors]
            groups.append({"params": of, "algorithm": "adamw", "lr": 0.01, **(adamw or {})})
        options = {"lr": 0.02, "block_size": 64, "ns_dtype": torch.float32, **options}
        self.optimizer = Muon8bit(groups, **options)

    def set_grads(self, seed):
        for name, grad in values(self.names, self.dtype, seed).items():
            self.params[name].grad = self.placed(grad)

    def train(self, seeds):
        for seed in seeds:
            self.set_grads(seed)
            self.optimizer.step()
        return self

    def continue_from(self, single, seeds):
        """Take over what one process has, out of its plain state dict, and train both on: equal state, to the bit."""
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(self.placed(single.params[name].detach()))
        self.optimizer.load_state_dict(single.optimizer.state_dict())
        assert_same(self.state_whole(), single.state_whole())
        for run in (single, self):
            run.train(seeds)
        assert_same(self.state_whole(), single.state_whole())

    def params_whole(self):
        return {name: whole(param.detach()) for name, param in self.params.items()}

    def state_whole(self):
        state = self.optimizer.state
        return {(n, key): whole(value) for n, param in self.params.items() for key, value in state[param].items()}


def whole(tensor):
    """Return the whole tensor: a collective where it is a DTensor."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def on_mesh(mesh, placements):
    """Place copies of tensors on a mesh, without communication.

    `placements`: a list, or a function of the tensor.
    """

    def placed(tensor):
        found = placements(tensor) if callable(placements) else placements
        return distribute_tensor(tensor.clone(), mesh, found, src_data_rank=None)

    return placed


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), (key, (actual[key].double() - value.double()).abs().max().item())


def raises(error, words, work):
    """Return whether `work` raises this error with these words in it, on this rank."""
    try:
        work()
    except error as found:
        if missing := [word for word in words if word not in str(found)]:
            raise AssertionError(f"{missing} not in: {found}") from None
        return found
    raise AssertionError(f"no {error.__name__} on rank {dist.get_rank()}")
