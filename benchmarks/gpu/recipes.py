"""Peaks of the recipes of record on a GPU, as rows of the record; `benchmarks.training.recipe_peaks` measures them.

Each recipe runs in a process of its own: a model of 8 billion parameters leaves its memory, and packages that are not
installed are told from what it prints.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.record import DRY, Record, missing_package
from muon8bit.tune.timing import FAILED

ROOT = Path(__file__).parents[2]
NAMES = ("llama31_8b_qlora_12gb", "llama32_3b_full_16gb", "llama31_8b_full_32gb")  # the quickest first
SECTION = "recipes"
_LIMIT_S = 420


def _row(name: str, dry: bool) -> dict[str, float | str] | str:
    """Return the row of a recipe, or the words that stand in its place."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "row.json")
        command = [sys.executable, "-m", "benchmarks.training.recipe_peaks", "--only", name, "--out", str(out)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)])
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        try:
            done = subprocess.run(
                [*command, *["--dry-run"] * dry],
                env=environment | {"PYTHONPATH": path, "TMPDIR": folder},
                cwd=ROOT,
                text=True,
                capture_output=True,
                timeout=_LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            return f"{FAILED}: not finished in {_LIMIT_S} s"
        if out.exists():
            rows: list[dict[str, float | str]] = json.loads(out.read_text())["rows"]
            return rows[0]
    if missing := missing_package(done.stderr):
        return f"skipped: needs {missing}"
    print(done.stderr[-4000:], flush=True)
    return f"{FAILED}: its process ended with {done.returncode}"


def recipes(record: Record) -> None:
    """Measure the peak of two steps of each recipe, and add it beside the estimate and what it may be at most."""
    for name in NAMES:
        if not record.begins(SECTION, name):
            continue
        print(f"recipes: {name}", flush=True)
        row = _row(name, record.dry)
        if isinstance(row, str):
            record.measured(SECTION, name, "", "peak", row, "")
        else:
            peak = row["measured_gib"] if record.dry else float(row["measured_gib"])
            record.measured(SECTION, name, str(row["optimizer"]), "peak", peak, "GiB", "torch's allocations")
            estimated = row["estimated_gib"]
            value = DRY if record.dry else f"{float(estimated):.6g}"
            record.measured(SECTION, name, str(row["optimizer"]), "estimate", value, "GiB")
            record.counted(SECTION, name, str(row["optimizer"]), "at most", float(row["most_gib"]), "GiB")
        record.write()
