"""Count the instructions that one tile of a momentum kernel takes on sm_90, in machine code that nothing runs.

    python -m benchmarks.compile.instructions --triton FOLDER --tree FOLDER --out benchmarks/results/instructions.md

`--tree` (may be repeated) is another checkout, whose kernels and cases are compiled beside this one's; `--triton` (may
be repeated) a folder into which pip has installed another Triton. `sass` says what the taken path is. About 10 seconds
for each tree and Triton.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from benchmarks.compile.one_tree import TARGET, compile_tree
from benchmarks.compile.sass import taken_path

ROOT = Path(__file__).parents[2]
NAMES = (
    *(f"{phase}-{codebook}" for phase in ("stats", "apply") for codebook in ("linear", "dynamic", "None")),
    *(f"{direction}-{codebook}" for direction in ("quantize", "dequantize") for codebook in ("linear", "dynamic")),
)
_DESCRIPTION = """\
# Instructions of one tile

sm_90, bf16 gradients, blocks of 2048 elements; compiled for a GPU that was not there: nothing was run. {date}, by
`python -m benchmarks.compile.instructions` with `--tree` and `--triton`.

Instructions of a thread in the machine code, over the elements that it has of a tile. Taken path: without subroutines
and without the slow branches that only subnormal or huge numbers take, each loop body once; the rules are those of
`benchmarks/compile/sass.py`. With branches: the kernel without its subroutines. Whole: all. Barriers are those of the
taken path.

"""
_COLUMNS = (
    "kernel", "tree", "Triton", "an element", "taken path", "with branches", "whole", "elements a thread", "registers",
    "spilled, bytes", "barriers",
)  # fmt: skip


@dataclass(frozen=True)
class Count:
    """Counts of one kernel of one tree by one Triton."""

    kernel: str
    tree: str
    triton: str
    taken: int
    with_branches: int
    whole: int
    elements: int  # of a tile, a thread
    registers: int
    spilled_bytes: int
    barriers: int

    @property
    def per_element(self) -> float:
        """Instructions on the taken path over the elements."""
        return self.taken / self.elements

    def row(self) -> str:
        """Return the line of the table."""
        cells = (
            self.kernel, self.tree, self.triton, f"{self.per_element:.1f}", self.taken, self.with_branches, self.whole,
            self.elements, self.registers, self.spilled_bytes, self.barriers,
        )  # fmt: skip
        return _line(cells)


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |\n"


def table(counts: Sequence[Count]) -> str:
    """Return the table in Markdown, with its head."""
    head = _DESCRIPTION.format(date=date.today().isoformat()) + _line(_COLUMNS) + _line(["---"] * len(_COLUMNS))
    return head + "".join(one.row() for one in counts)


def count(tree: Path, triton_folder: Path | None, names: Sequence[str], folder: Path) -> list[Count]:
    """Compile cases of a tree (see `compile_tree`) and count; the code is left in `folder`."""
    version = compile_tree(tree, triton_folder, names, folder)
    return [_count_one(folder / TARGET, name, _commit(tree), version) for name in names]


def _count_one(folder: Path, name: str, tree: str, version: str) -> Count:
    record = json.loads((folder / f"{name}.json").read_text())
    tile = json.loads((folder / f"{name}.tile.json").read_text())
    path = taken_path((folder / f"{name}.sass").read_text())
    return Count(
        kernel=name,
        tree=tree,
        triton=version,
        taken=path.count(),
        with_branches=path.with_branches,
        whole=path.whole,
        elements=tile // (32 * record["num_warps"]),
        registers=record["registers"],
        spilled_bytes=record["spilled_bytes"],
        barriers=path.count(r"BAR\..*"),
    )


def _commit(tree: Path) -> str:
    """Return the short hash of a checkout's commit; `here` for the checkout of this file, whose commit is to come."""
    if tree.resolve() == ROOT:
        return "here"
    command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def main() -> None:
    """Print the table, or write it and, beside it, the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, action="append", default=[], help="root of another checkout")
    parser.add_argument("--triton", type=Path, action="append", default=[], help="folder with another Triton")
    parser.add_argument("--kernels", nargs="+", default=NAMES, help="names of cases (default: the momentum's)")
    parser.add_argument("--out", type=Path, help="write the table there, and JSON beside it; else print it")
    parser.add_argument("--keep", type=Path, help="keep machine code and PTX in this folder")
    args = parser.parse_args()
    counts = []
    with tempfile.TemporaryDirectory() as temporary:
        for number, tree in enumerate([*args.tree, ROOT]):
            for other, triton_folder in enumerate([*args.triton, None]):
                folder = (args.keep or Path(temporary)) / f"{number}-{other}"
                counts += count(tree, triton_folder, args.kernels, folder)
    counts.sort(key=lambda one: args.kernels.index(one.kernel))
    if args.out is None:
        print(table(counts))
        return
    args.out.write_text(table(counts))
    records = [asdict(one) | {"per_element": round(one.per_element, 2)} for one in counts]
    args.out.with_suffix(".json").write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
