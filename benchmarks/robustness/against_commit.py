"""Compare what this tree computes with another commit's, bit by bit: where nothing may change for users.

    git worktree add /tmp/old COMMIT
    python -m benchmarks.robustness.against_commit /tmp/old [--new TREE] [--out FILE.json] [--only NAME ...] [--perturb]

`step_worker.py` runs the cases of `step_cases.py` by each tree's package, in a process with one thread: three steps,
state and parameters saved; the old tree's checkpoint loaded by both, and two more steps. Compared are parameters,
gradients, codes, scales, decoded momenta and moments, groups, and the text of `muon8bit estimate`. The exit status is 1
where anything differs. `--perturb` flips the lowest bit of one element of the new results in each case and stage: all
of them must be found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.step_time import cpu_flags

ROOT = Path(__file__).parents[2]
STAGES = ("3 steps", "loaded", "2 more")
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def run_tree(tree: Path, out: Path, checkpoints: Path | None, only: list[str] | None) -> dict[str, Any]:
    """Run the worker by a tree's package; returns its results by case.

    Raises:
        RuntimeError: if the worker fails, or has imported another package than the tree's.
    """
    command = [sys.executable, str(Path(__file__).with_name("step_worker.py")), "--out", str(out)]
    command += ["--checkpoints", str(checkpoints)] if checkpoints else []
    command += ["--only", *only] if only else []
    env = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'kernels'}", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=out.parent, env=env, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"the worker failed with the package of {tree}:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = torch.load(out)
    if [Path(package) for package in found["packages"]] != [tree / "muon8bit", tree / "kernels" / "muon8bit_kernels"]:
        raise RuntimeError(f"{found['packages']} were imported, not the packages of {tree}")
    cases: dict[str, Any] = found["cases"]
    return cases


def integers(tensor: Tensor) -> Tensor:
    """Return the bits of each element, flat: -0.0 differs from 0.0."""
    return tensor.contiguous().view(-1).view(INTEGERS[tensor.itemsize])


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what differs between the items of a stage: how many elements, and the largest difference with its unit.

    The unit of a parameter is the largest change of an element of it in the last step; of codes one code; of all else
    the largest magnitude in the old tensor. "before ..." is not compared: it only gives the unit.
    """
    for item in sorted(old.keys() | new.keys()):
        if item.startswith("before "):
            continue
        left, right = old.get(item), new.get(item)
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            if type(left) is not type(right) or left != right:
                yield {"item": item, "old": _shown(left), "new": _shown(right)}
        elif (left.dtype, left.shape) != (right.dtype, right.shape):
            yield {"item": item, "old": f"{left.dtype} {list(left.shape)}", "new": f"{right.dtype} {list(right.shape)}"}
        elif count := int((integers(left) != integers(right)).sum()):
            size, unit = _size(item, left, right, old)
            yield {"item": item, "elements": count, "of": left.numel(), "largest": size, "unit": unit}


def _size(item: str, left: Tensor, right: Tensor, old: dict[str, Any]) -> tuple[float, str]:
    """Return the largest difference, and its unit."""
    values = left.double()
    size = float((values - right.double()).abs().max())
    if not left.is_floating_point():
        return size, "codes"
    before = old.get(item.replace("param ", "before ", 1)) if item.startswith("param ") else None
    unit, name = (values, "of the largest") if before is None else (values - before.double(), "updates")
    largest = float(unit.abs().max())
    return (size / largest, name) if largest else (size, "absolute")


def _shown(value: Any) -> str:
    return repr(value)[:200]


def perturbed(items: dict[str, Any], place: int) -> dict[str, Any]:
    """Return the items with the lowest bit flipped of one element of one tensor; of texts, one letter changed."""
    names = [name for name, value in items.items() if not name.startswith("before ") and _can_flip(value)]
    name = names[place % len(names)]
    value = items[name]
    if isinstance(value, str):
        return {**items, name: value[:-1] + chr(ord(value[-1]) ^ 1)}
    changed = value.contiguous().clone()
    integers(changed)[place % changed.numel()] ^= 1
    return {**items, name: changed}


def _can_flip(value: Any) -> bool:
    return bool(value) if isinstance(value, str) else isinstance(value, Tensor) and value.numel() > 0


def compare(old: dict[str, Any], new: dict[str, Any], *, perturb: bool = False) -> list[dict[str, Any]]:
    """Return a row for every case and stage: `items` and `elements` compared, and `differences`."""
    if old.keys() != new.keys() or not old:
        raise RuntimeError(f"cases of one tree alone, or none: {sorted(old.keys() ^ new.keys())}")
    rows = []
    for index, (case, stages) in enumerate(old.items()):
        for stage in STAGES:
            if stage not in stages:
                continue
            items = new[case][stage]
            items = perturbed(items, index) if perturb else items
            found = list(differences(stages[stage], items))
            compared = [value for item, value in stages[stage].items() if not item.startswith("before ")]
            elements = sum(value.numel() for value in compared if isinstance(value, Tensor))
            row = {"case": case, "stage": stage, "items": len(compared), "elements": elements}
            rows.append({**row, "differences": found})
    return rows


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for every case, and one for every item of it that differs."""
    width = max(len(row["case"]) for row in rows)
    yield f"{'case':{width}}  " + "  ".join(f"{stage:10}" for stage in STAGES)
    for case in dict.fromkeys(row["case"] for row in rows):
        by_stage = {row["stage"]: row["differences"] for row in rows if row["case"] == case}
        cells = [("differs" if by_stage[stage] else "equal") if stage in by_stage else "" for stage in STAGES]
        yield f"{case:{width}}  " + "  ".join(f"{cell:10}" for cell in cells)
        for stage, found in by_stage.items():
            for one in found:
                what = f"{one.get('old')} -> {one.get('new')}"
                if "elements" in one:
                    what = f"{one['elements']} of {one['of']} elements, by {one['largest']:.3g} {one['unit']} at most"
                yield f"    {stage}, {one['item']}: {what}"


def commit_of(tree: Path) -> str:
    """Return a tree's commit, the last one that changed its packages, and "changed" if they were since."""
    ask, packages = ["git", "-C", str(tree)], ["--", "muon8bit", "kernels/muon8bit_kernels"]
    commands = (["log", "-1", "--format=%h"], ["log", "-1", "--format=%h", *packages], ["status", "-s", *packages])
    head, last, changes = (
        subprocess.run([*ask, *command], text=True, capture_output=True, check=True).stdout.strip()
        for command in commands
    )
    return f"{head}, packages of {last}" + (", changed" if changes else "")


def main(arguments: list[str] | None = None) -> int:
    """Return 1 where anything differs, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD_TREE", help="a working tree of the other commit")
    parser.add_argument("--new", type=Path, default=ROOT, metavar="NEW_TREE", help="default: this tree")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only cases whose names hold one of these")
    parser.add_argument("--perturb", action="store_true", help="flip one bit of each case's new results: a control")
    parser.add_argument("--out", type=Path, help="write the record there (JSON)")
    args = parser.parse_args(arguments)
    old_tree, new_tree = args.old.resolve(), args.new.resolve()
    with tempfile.TemporaryDirectory() as folder:
        old = run_tree(old_tree, Path(folder, "old.pt"), None, args.only)
        new = run_tree(new_tree, Path(folder, "new.pt"), Path(folder, "old.pt"), args.only)
    rows = compare(old, new, perturb=args.perturb)
    print(*table(rows), sep="\n")
    num_different = sum(bool(row["differences"]) for row in rows)
    elements = {case: sum(row["elements"] for row in rows if row["case"] == case) for case in old}
    summary = {"comparisons": len(rows), "different": num_different, "elements": sum(elements.values())}
    print(f"{len(old)} cases, {len(rows)} comparisons of {summary['elements']} elements: {num_different} differ")
    if args.out:
        record = {
            "command": shlex.join(["python", "-m", "benchmarks.robustness.against_commit", "OLD_TREE"]),
            "date": date.today().isoformat(),
            "old": commit_of(old_tree),
            "new": commit_of(new_tree),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "cpu": {"machine": platform.machine(), "flags": cpu_flags(), "threads": 1},
            **summary,
            "elements_by_case": elements,
            "differences": [row for row in rows if row["differences"]],
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(num_different > 0)


if __name__ == "__main__":
    sys.exit(main())
