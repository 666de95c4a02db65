"""Python time of a step and bytes sent with parts, of other working trees and of this one, in turns.

    git worktree add /tmp/old COMMIT
    python -m benchmarks.scaling.host_time --tree /tmp/old --out benchmarks/results/host_time.json

Llama-3.1-8B on one GPU, and as one of 8 ranks under FSDP2 and DDP. Nothing is computed and nothing sent: what is
measured is CPU time of the process, the least of all steps, and what would be launched (`step_of_tree`). The bytes are
the planner's (`parts_of_tree`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.workloads import MODELS
from benchmarks.robustness.against_commit import commit_of

ROOT = Path(__file__).parents[2]
SETTINGS = ("one GPU", "FSDP 8", "DDP 8")
_LIMIT_S = 600


def run_in(tree: Path, script: str, *arguments: str) -> dict[str, Any]:
    """Run a script of this folder with the packages of a tree.

    Raises:
        RuntimeError: if it fails, or has imported another package than the tree's.
    """
    environment = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'kernels'}", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script)), *arguments, str(out)]
        done = subprocess.run(command, env=environment, cwd=folder, text=True, capture_output=True, timeout=_LIMIT_S)
        if done.returncode:
            raise RuntimeError(f"{script} failed with the package of {tree}:\n{done.stderr[-4000:]}")
        found: dict[str, Any] = json.loads(out.read_text())
    if Path(found.pop("package")) != tree:
        raise RuntimeError(f"another package than that of {tree} was imported")
    return found


def measure(trees: Sequence[Path], repeats: int, num_steps: int) -> list[dict[str, Any]]:
    """Return for each tree the least time of each setting in ms, the launches, and the bytes."""
    runs: list[list[dict[str, Any]]] = [[] for _ in trees]
    for _ in range(repeats):
        for tree, found in zip(trees, runs, strict=True):
            found.append(run_in(tree, "step_of_tree.py", str(num_steps), str(MODELS["Llama-3.1-8B"].layers)))
    results = []
    for tree, found in zip(trees, runs, strict=True):
        steps = {}
        for setting in SETTINGS:
            last = found[-1][setting]
            steps[setting] = {
                "ms": round(min(min(run[setting]["ms"]) for run in found), 2),
                "launches": sum(last["triton"].values()) + sum(last["torch"].values()),
                "triton": last["triton"],
                "torch": last["torch"],
            }
        results.append({"tree": commit_of(tree), "steps": steps, **run_in(tree, "parts_of_tree.py")})
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return a line for each setting, with this tree's figures over those of the first."""
    first, last = results[0], results[-1]
    lines = [f"{'':18}" + "".join(f"{result['tree'][:24]:>26}" for result in results) + f"{'ratio':>10}"]
    for setting in SETTINGS:
        for key in ("ms", "launches"):
            values = [result["steps"][setting][key] for result in results]
            ratio = last["steps"][setting][key] / first["steps"][setting][key]
            lines.append(f"{setting + ', ' + key:18}" + "".join(f"{value:26}" for value in values) + f"{ratio:10.3f}")
    for setting in first["settings"]:
        shown = [result["settings"][setting] for result in results]
        cells = "".join(f"{one['ratio']:20.3f} ({one['parts']:3})" for one in shown)
        lines.append(f"{setting:18}" + cells)
    return "\n".join(lines)


def main() -> None:
    """Print the table, and write all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, action="append", default=[], help="root of another checkout")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each tree")
    parser.add_argument("--steps", type=int, default=7, help="steps that are timed in each")
    parser.add_argument("--out", type=Path, help="write every figure there (JSON)")
    args = parser.parse_args()
    results = measure([tree.resolve() for tree in [*args.tree, ROOT]], args.repeats, args.steps)
    print(table(results))
    if args.out:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        command = "python -m benchmarks.scaling.host_time --tree OLD_TREE"
        record = {"command": command, "date": date.today().isoformat(), "versions": versions, "trees": results}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
