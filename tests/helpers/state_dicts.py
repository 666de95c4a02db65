"""A small optimizer of both algorithms, its steps, and its state dict through a file."""

import io

import torch

from muon8bit import Muon8bit

SHAPES = {"a": (16, 40), "b": (40, 16), "narrow": (12, 4), "embed": (10, 8), "bias": (6,)}


def make(dtype=torch.float32, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    params = {n: torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}
    groups = [
        {"params": [(n, params[n]) for n in ("a", "b", "narrow")], "weight_decay": 0.2},
        {"params": [(n, params[n]) for n in ("embed", "bias")], "algorithm": "adamw", "lr": 1e-2},
    ]
    return params, Muon8bit(groups, lr=0.02, **options)


def train(params, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def snapshot(params, optimizer):
    tensors = {n: p.detach().clone() for n, p in params.items()}
    for name, param in params.items():
        tensors.update({f"{name}.{k}": v.clone() for k, v in optimizer.state.get(param, {}).items()})
    return tensors


def edit(path, value):
    """Return a function that puts a value, or a function of the old one, at `path` into a saved dict."""

    def change(saved):
        target = saved
        for key in path[:-1]:
            target = target[key]
        if value is None:
            del target[path[-1]]
        else:
            target[path[-1]] = value(target[path[-1]]) if callable(value) else value

    return change
