"""Optimizers of every option that shapes saved state, as the first release saved them: `tests/data/` has their state.

The files were written by that release (commit 2966fc6) and are never written anew: they hold what users have on disk.
`python tests/helpers/old_checkpoints.py FOLDER` makes them again on a checkout of it, with
`PYTHONPATH=.:kernels:tests`.
They hold state and options, no results, so that later code may compute other bits from them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from helpers.ranks import on_ranks
from muon8bit import Muon8bit

FOLDER = Path(__file__).parents[1] / "data"
FILE, DCP_FOLDER = "checkpoints_0_1_0.pt", "dcp_0_1_0"

# By name: arguments of the optimizer, keys of the Muon group, keys of the AdamW group.
CASES = {
    "linear": ({}, {}, {}),
    "dynamic": ({"codebook": "dynamic"}, {}, {}),
    "bits=32": ({"bits": 32}, {}, {}),
    **{f"linear, blocks of {size}": ({"block_size": size}, {}, {}) for size in (64, 128, 4096)},
    "dynamic, blocks of 64": ({"codebook": "dynamic", "block_size": 64}, {}, {}),
    "flattened": ({"block_size": 64}, {"flatten": True}, {}),
    "flattened, dynamic": ({"codebook": "dynamic"}, {"flatten": True}, {}),
    "flattened, bits=32": ({"bits": 32}, {"flatten": True}, {}),
    "split rows": ({}, {"split_sizes": (4, 8), "split_dim": -2}, {}),
    "split columns": ({"block_size": 64}, {"split_sizes": (16, 56), "split_dim": -1}, {}),
    "split rows, bits=32": ({"bits": 32}, {"split_sizes": (4, 8)}, {}),
    "8-bit AdamW": ({}, {}, {"adamw_bits": 8}),
    "8-bit AdamW, dynamic": ({"codebook": "dynamic"}, {}, {"adamw_bits": 8}),
    "stochastic rounding": ({"param_rounding": "stochastic", "rounding_seed": 2**64 - 5}, {}, {}),
    "stochastic rounding, 8-bit AdamW": ({"param_rounding": "stochastic"}, {}, {"adamw_bits": 8}),
    "clipped": ({"clip_matrix_norm": 0.5}, {}, {}),
    "clipped in its group": ({}, {"clip_matrix_norm": 2.0}, {}),
    "unnamed": ({}, {}, {}),
    "state in host memory": ({"state_device": "cpu"}, {}, {"adamw_bits": 8}),
    "schedule of triples": ({"ns_coefficients": [(3.4445, -4.775, 2.0315)] * 3, "ns_steps": 3}, {}, {}),
    "named schedule": ({"ns_coefficients": "polar_express", "adjust_lr_fn": "match_rms_adamw"}, {}, {}),
    "a tensor as lr": ({"lr": torch.tensor(0.02)}, {}, {"lr": torch.tensor(0.01)}),
    "a parameter without gradients": ({}, {}, {}),
    "no step": ({}, {}, {}),
    "shard_state, consolidated": ({"block_size": 64}, {}, {}),
}


def build(name, dtype=None, **more):
    """Return parameters by name and an optimizer of the case's options; `more` are further arguments of it."""
    options, muon, adamw = CASES[name]
    is_8bit = adamw.get("adamw_bits") == 8
    stack = (2, 12, 72) if not muon.get("flatten") else (6, 3, 5, 5)
    shapes = {"wide": (12, 72), "stack": stack, "embedding": (64, 64) if is_8bit else (9, 5), "bias": (6,)}
    if "split_sizes" not in muon:
        shapes["narrow"] = (6, 4)
    if dtype is None:
        dtype = torch.bfloat16 if "param_rounding" in options else torch.float32
    generator = torch.Generator().manual_seed(0)
    params = {n: torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in shapes.items()}
    pairs = {n: param if name == "unnamed" else (n, param) for n, param in params.items()}
    groups = [
        {"params": [pairs[n] for n in ("wide", "stack", "narrow") if n in pairs], "weight_decay": 0.2, **muon},
        {"params": [pairs[n] for n in ("embedding", "bias")], "algorithm": "adamw", "lr": 0.01, **adamw},
    ]
    return params, Muon8bit(groups, **{"lr": 0.02, **options, **more})


def train(name, params, optimizer, seeds):
    """Take steps with injected gradients."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for n, param in params.items():
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            param.grad = None if (name, n) == ("a parameter without gradients", "stack") else grad
        optimizer.step()


class Net(torch.nn.Module):
    """Model that the folder of distributed checkpointing holds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(24, 10), torch.nn.Linear(10, 9)


def optimizer_of(model):
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim == 2]},
        {"params": [(n, p) for n, p in named if p.ndim == 1], "algorithm": "adamw", "lr": 0.01},
    ]
    return Muon8bit(groups, lr=0.02, block_size=64)


def _consolidated(file):
    name = "shard_state, consolidated"
    params, optimizer = build(name, process_group=dist.group.WORLD, shard_state=True)
    train(name, params, optimizer, (1, 2))
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        torch.save(optimizer.state_dict(), file)


def save(folder):
    """Write both files; with the first release alone."""
    saved = {}
    for name in CASES:
        if name == "shard_state, consolidated":
            on_ranks(2, _consolidated, str(folder / "one"))
            saved[name] = torch.load(folder / "one", weights_only=True)
            (folder / "one").unlink()
            continue
        params, optimizer = build(name)
        train(name, params, optimizer, () if name == "no step" else (1, 2))
        saved[name] = optimizer.state_dict()
    torch.save(saved, folder / FILE)
    model = Net()
    optimizer = optimizer_of(model)
    train("", dict(model.named_parameters()), optimizer, (1, 2))
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / DCP_FOLDER, no_dist=True)


if __name__ == "__main__":
    save(Path(sys.argv[1]))
