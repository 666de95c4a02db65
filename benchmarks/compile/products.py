"""Count what a symmetric product does after its loop along k, in machine code that nothing runs.

    python -m benchmarks.compile.products --triton FOLDER --out benchmarks/results/products.md

`--triton` (may be repeated) is a folder into which pip has installed another Triton. A tile goes one way through the
code behind the loop, a square on the diagonal another than the rest: counted is the longest way.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from functools import cache
from pathlib import Path

import triton

from benchmarks.compile.cases import CASES
from benchmarks.compile.compiling import compile_case, load
from benchmarks.compile.sass import blocks_of

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_80", "sm_90", "sm_100")
_MMA = ("HGMMA", "HMMA", "UTCHMMA")
_COLUMNS = ("product", "target", "Triton", "after the loop", "barriers", "registers", "spilled, bytes")
_LIMIT_S = 500


def epilogue(sass: str) -> tuple[int, int]:
    """Return instructions and barriers on the longest way from the loop with the last product to the end.

    Raises:
        ValueError: if there is no product in a loop.
    """
    blocks = blocks_of(sass)
    last = max((i for i, block in enumerate(blocks) if any(name.startswith(_MMA) for name in block.names)), default=-1)
    # The loop ends where code from its last product on first jumps back over it.
    ends = [i for i in range(max(0, last), len(blocks)) if any(0 <= j <= last for j in blocks[i].following)]
    if last < 0 or not ends:
        raise ValueError("no product in a loop: sass must be that of a product, from nvdisasm -c")

    @cache
    def longest(index: int) -> tuple[int, int]:
        block = blocks[index]
        rest = [longest(j) for j in block.following if j > index]
        count, barriers = max((r[0] for r in rest), default=0), max((r[1] for r in rest), default=0)
        return len(block.names) + count, sum(name.startswith("BAR") for name in block.names) + barriers

    return longest(ends[0] + 1)


def measure(folder: Path) -> list[dict[str, str | int]]:
    """Compile the cases of products with this process's Triton, and return one row each."""
    has_sm_100 = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
    rows: list[dict[str, str | int]] = []
    for case in CASES:
        for target in case.targets:
            is_half = case.name.startswith("product-") and "fp32" not in case.name
            if not is_half or target not in TARGETS or (target == "sm_100" and not has_sm_100):
                continue
            compile_case(case.name, case.call, target, folder)
            record = load(folder)[case.name, target]
            after, barriers = epilogue((folder / target / f"{case.name}.sass").read_text())
            cells = (case.name, target, triton.__version__, after, barriers, record.registers, record.spilled_bytes)
            rows.append(dict(zip(_COLUMNS, cells, strict=True)))
    return rows


def table(rows: Sequence[dict[str, str | int]]) -> str:
    """Return the table in Markdown."""
    lines = [list(_COLUMNS), ["---"] * len(_COLUMNS), *[[str(row[name]) for name in _COLUMNS] for row in rows]]
    return (
        "# Symmetric products, behind the loop along k\n\n"
        f"Compiled for GPUs that were not there: nothing was run. {date.today().isoformat()}, by\n"
        "`python -m benchmarks.compile.products`. Instructions and barriers of a warp on the longest way from the\n"
        "loop to the end, registers of a thread, stack and local bytes of a thread.\n\n"
        + "".join("| " + " | ".join(line) + " |\n" for line in lines)
    )


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", type=Path, action="append", default=[], help="folder with another Triton")
    parser.add_argument("--out", type=Path, help="write the table there; else print it")
    parser.add_argument("--json", action="store_true", help="print the rows of this process's Triton as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    if args.json:
        print(json.dumps(rows))
        return
    for other in args.triton:
        path = os.pathsep.join([str(other.resolve()), str(ROOT), str(ROOT / "kernels")])
        command = [sys.executable, "-m", "benchmarks.compile.products", "--json"]
        run = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=True,
        )
        rows += json.loads(run.stdout)
    rows.sort(key=lambda row: (TARGETS.index(str(row["target"])), str(row["product"]), str(row["Triton"])))
    if args.out:
        args.out.write_text(table(rows))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
