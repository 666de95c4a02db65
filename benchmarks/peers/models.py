"""Checks on small models in one process: what becomes of each kind of parameter, and the time of a step."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.subjects import Subject

ROUNDS = 9
# An update has a form if its cosine is over this: five steps of Newton-Schulz in bf16 are at .97 and more.
LEAST_COSINE = 0.9


class Experts(nn.Module):
    """Four matrices in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 32, 48))


KINDS = {
    "hidden": lambda: nn.Linear(48, 32, bias=False),
    "embed_tokens": lambda: nn.Embedding(64, 32),
    "lm_head": lambda: nn.Linear(32, 64, bias=False),
    "conv": lambda: nn.Conv2d(8, 16, 3, bias=False),
    "experts": Experts,
    "norm": lambda: nn.LayerNorm(32, bias=False),
}


class SmallModel(nn.Module):
    """A hidden layer, and one module of another kind under the name that it has in transformers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(48, 48, bias=False)])
        self.add_module(kind, KINDS[kind]())


def check_routing(subject: Subject) -> dict[str, Any]:
    """Return kind of parameter -> what its first update is; given as the class's documentation gives a model."""
    found = {kind: _routed(subject, kind) for kind in KINDS}
    is_right = found["embed_tokens"] == found["lm_head"] == found["norm"] == "element-wise"
    is_right &= found["hidden"].startswith("orthogonalized")
    return {"kinds": found, "passed": is_right}


def _routed(subject: Subject, kind: str) -> str:
    torch.manual_seed(0)
    model = SmallModel(kind)
    for param in model.parameters():
        param.data.zero_()
        param.grad = 1e-2 * torch.randn_like(param)
    (param,) = getattr(model, kind).parameters()
    grad = param.grad.clone()
    try:
        subject.make_for(model).step()
    except Exception as error:
        return f"refused ({type(error).__name__})"
    return describe_update(-param.detach(), grad)


def describe_update(update: Tensor, grad: Tensor) -> str:
    """Name the first update of a tensor by what it is closest to: signs of the gradient, or its orthogonalizations."""
    if not update.any():
        return "none"
    forms = [("element-wise", grad.sign())]
    if grad.ndim == 2:
        forms += [("orthogonalized", form) for form in _polar_forms(grad)]
    elif grad.ndim > 2:
        forms += [("orthogonalized as one matrix", f.reshape(grad.shape)) for f in _polar_forms(grad.flatten(1))]
        forms += [("orthogonalized, each matrix", form) for form in _polar_forms(grad)]
    found = [(float(torch.cosine_similarity(update.flatten(), f.flatten(), dim=0)), name) for name, f in forms]
    value, name = found[0] if found[0][0] > 0.999 else max(found)  # signs of few long rows are nearly orthogonal
    return name if value >= LEAST_COSINE else f"another (cosine {value:.2f}, {name})"


def _polar_forms(matrices: Tensor) -> list[Tensor]:
    """Return the orthogonal factors, and the signs of those of signs, which are AdaMuon's first update."""
    return [_polar(matrices), _polar(matrices.sign()).sign()]


def _polar(matrices: Tensor) -> Tensor:
    """Return the orthogonal factor of each matrix over the last two dimensions."""
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    return u @ v


def check_step_time(subject: Subject) -> dict[str, Any]:
    """Return the ratio of median step times to torch.optim.Muon's, in turns on the same small model, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    arms: dict[str, tuple[Any, list[float]]] = {}
    for name, arm in {"torch": Subject("torch", "torch", "torch.optim:Muon"), "own": subject}.items():
        torch.manual_seed(0)
        params = [(f"w{i}", nn.Parameter(torch.randn(s))) for i, s in enumerate([(256, 256)] * 4 + [(256, 1024)] * 2)]
        for _, param in params:
            param.grad = torch.randn_like(param)
        arms[name] = arm.make(params), []
    for i in range(ROUNDS + 1):
        for optimizer, times in arms.values():
            begun = time.perf_counter()
            optimizer.step()
            if i:  # the first step makes the state
                times.append(time.perf_counter() - begun)
    torch.set_num_threads(threads)
    medians = {name: 1000 * statistics.median(times) for name, (_, times) in arms.items()}
    return {
        "ratio": medians["own"] / medians["torch"],
        "ms": medians["own"],
        "torch_ms": medians["torch"],
        "passed": True,
    }
