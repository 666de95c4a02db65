"""The results of one tree in every case, into a file: `against_commit` runs this by each tree's package.

    PYTHONPATH=TREE:TREE/kernels python step_worker.py --out FILE [--checkpoints FILE] [--only NAME ...]

Of each case: three steps; then an optimizer that loads a checkpoint of that moment, the other tree's with
`--checkpoints`, and takes two more steps.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from case_run import run_case
from step_cases import ESTIMATES, MODELS, StepCase, cases
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import muon8bit
from muon8bit import Muon8bit, param_groups

NUM_RANKS = 2


class Routed(nn.Module):
    """A model of every kind of parameter that `param_groups` tells apart; built, not run."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(30, 24), nn.Conv2d(3, 4, 3)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(24, 72), nn.LayerNorm(72), nn.Linear(72, 24)) for _ in "ab")
        self.lm_head = nn.Linear(24, 30, bias=False)


def run_routed() -> dict[str, Any]:
    """Return where `param_groups` sends what, and two steps of these groups."""
    torch.manual_seed(0)
    model, found = Routed(), {}
    for name, options in {
        "0.2": {},
        "0.1": {"routing": "0.1"},
        "patterns": {"patterns": [("conv.*", "adamw")]},
    }.items():
        groups = param_groups(model, lr=0.02, **options)  # type: ignore[arg-type]
        found[f"routes, {name}"] = str(groups)
    params, optimizer = dict(model.named_parameters()), Muon8bit(groups, lr=0.02)
    for seed in range(2):
        before = {f"before {name}": param.detach().clone() for name, param in params.items()}
        for index, param in enumerate(params.values()):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(100 * seed + index))
        optimizer.step()
    found["report"] = str(muon8bit.state_report(optimizer))
    state = {f"{key} {n}": value for n, p in params.items() for key, value in optimizer.state[p].items()}
    return {"3 steps": {**found, **before, **state, **{f"param {n}": p.detach() for n, p in params.items()}}}


def run_estimates() -> dict[str, Any]:
    """Return what `muon8bit estimate` prints. Configurations are written into the working directory."""
    from muon8bit.cli import main

    found: dict[str, str] = {}
    for name, config in MODELS.items():
        Path(f"{name}.json").write_text(json.dumps(config))
    names = {name: f"{name}.json" for name in MODELS}
    for arguments in ESTIMATES:
        line, printed = [argument.format(**names) for argument in arguments], io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = main(["estimate", *line])
        found[" ".join(line)] = f"{printed.getvalue()}exit code {code}"
    return {"3 steps": found}


def read_checkpoints(file: Path | None) -> dict[str, Any]:
    """Return the checkpoint of each case in a file of this script's, none without a file."""
    return {} if file is None else {n: stages.get("checkpoint") for n, stages in torch.load(file)["cases"].items()}


def run_ranks(rank: int, todo: list[StepCase], file: Path | None, folder: str) -> None:
    """Run one rank of the cases on two, into a file of the folder."""
    torch.set_num_threads(1)
    checkpoints = read_checkpoints(file)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_RANKS)
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    found = {case.name: run_case(case, checkpoints.get(case.name), mesh) for case in todo}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(todo: list[StepCase], file: Path | None) -> dict[str, Any]:
    """Return what all ranks have, each item with its rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_ranks, (todo, file, folder), nprocs=NUM_RANKS)
        ranks = [torch.load(f"{folder}/{rank}.pt") for rank in range(NUM_RANKS)]
    found: dict[str, Any] = {}
    for case in todo:
        found[case.name] = {"checkpoint": ranks[0][case.name]["checkpoint"]}
        for stage in ("3 steps", "loaded", "2 more"):
            by_rank = enumerate(rank[case.name][stage] for rank in ranks)
            found[case.name][stage] = {f"{item} of rank {i}": v for i, items in by_rank for item, v in items.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, help="a file of another tree, whose checkpoints are loaded")
    parser.add_argument("--only", nargs="+", help="parts of the names of cases")
    args = parser.parse_args()
    torch.set_num_threads(1)
    checkpoints = read_checkpoints(args.checkpoints)

    def is_asked(name: str) -> bool:
        return not args.only or any(part in name for part in args.only)

    todo = [case for case in cases() if is_asked(case.name)]
    found: dict[str, Any] = {}
    for case in todo:
        if not case.is_on_ranks:
            found[case.name] = run_case(case, checkpoints.get(case.name))
    ranked = [case for case in todo if case.is_on_ranks]
    found |= on_ranks(ranked, args.checkpoints) if ranked else {}
    more: Iterable[tuple[str, Callable[[], dict[str, Any]]]] = (
        ("param_groups", run_routed),
        ("muon8bit estimate", run_estimates),
    )
    found |= {name: run() for name, run in more if is_asked(name)}
    packages = [str(Path(package.__file__ or "").parent) for package in (muon8bit, __import__("muon8bit_kernels"))]
    torch.save({"packages": packages, "cases": found}, args.out)


if __name__ == "__main__":
    main()
