"""Correctness, floors, step time and memory, state on the host, on a CUDA GPU; writes `<gpu>_<date>.csv` and an `.md`.

    python -m benchmarks.gpu [--only steps shapes] [--out benchmarks/results]
    python -m benchmarks.gpu --dry-run --out FOLDER      # tiny shapes on a CPU, no figures

The ceilings are measured in every call. Sections of an earlier call of the same day and GPU are kept in its files, so
that a run may be made in parts. The exit status is 1 if a test or an arm failed; a missed target does not change it.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.gpu import host_state, products, rates, steps
from benchmarks.gpu.record import Record
from benchmarks.gpu.report import markdown
from muon8bit.orthogonalize import device_kind
from muon8bit.tune.timing import Clock

ROOT = Path(__file__).parents[2]
SECTIONS = ("correctness", "momentum", "products", "paths", "steps", "shapes", "host")
STEPPING = ("steps", "shapes", "host")
# A dry run takes one module, whose GPU tests skip themselves.
TESTS, DRY_TESTS = "tests", "tests/kernels/test_reference.py"
TESTS_LIMIT_S = 400


def facts(device: torch.device) -> dict[str, str]:
    """Return what a figure depends on: GPU, driver, versions, date."""
    name, driver = "none", "none"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    installed = {dist.name.lower() for dist in metadata.distributions()}
    versions = {
        package: metadata.version(package) if package in installed else "not installed"
        for package in ("triton", "bitsandbytes")
    }
    return {
        "GPU": name,
        "kind": device_kind(device),
        "driver": driver,
        "CUDA": torch.version.cuda or "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        "date": date.today().isoformat(),
    }


def correctness(record: Record) -> bool:
    """Run the tests marked gpu in a process of their own; whether none failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", DRY_TESTS if record.dry else TESTS]
        command += ["-p", "no:cacheprovider", f"--junitxml={report}"]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        try:
            subprocess.run(command, cwd=ROOT, env=environment, timeout=TESTS_LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            record.measured("correctness", "pytest -m gpu", "passed", "tests", f"none in {TESTS_LIMIT_S} s", "")
            return False
        suite = ElementTree.parse(report).getroot().find("testsuite")
    if suite is None:
        raise RuntimeError("pytest wrote no results")
    counts = {name: int(suite.attrib[attribute]) for name, attribute in _COUNTS.items()}
    counts = {"passed": counts.pop("total") - sum(counts.values()), **counts}
    for name, number in counts.items():
        record.measured("correctness", "pytest -m gpu", name, "tests", number, "tests")
    return counts["failed"] + counts["errors"] == 0


_COUNTS = {"total": "tests", "failed": "failures", "errors": "errors", "skipped": "skipped"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU, the same files, no figures")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder of the files")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections to run")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("needs a CUDA GPU; --dry-run goes through the same steps on a CPU")
    return args


def main() -> int:
    args = arguments()
    device = torch.device("cpu") if args.dry_run else torch.device("cuda", 0)
    about = facts(device)
    name = "dry-run" if args.dry_run else re.sub(r"\W+", "-", about["GPU"].lower())
    args.out.mkdir(parents=True, exist_ok=True)
    record = Record(args.out / f"{name}_{about['date']}.csv", args.dry_run)
    options = ["--dry-run"] * args.dry_run + (["--only", *args.only] if args.only != SECTIONS else [])
    record.about(about, shlex.join(["python", "benchmarks/gpu/run.py", *options]))
    clock, good = Clock(device), True

    def finish(section: str, since: float) -> None:
        record.write()
        record.path.with_suffix(".md").write_text(markdown(record))
        print(f"{section}: {time.perf_counter() - since:.0f} s", flush=True)

    # The rates before the first step that is timed, so that it is the one that a tuned user gets.
    is_stepping = any(section in STEPPING for section in args.only)
    for section in ("ceilings", *["rates"] * is_stepping, *args.only):
        start = time.perf_counter()
        record.restart(section)
        if section == "ceilings":
            measured = rates.ceilings(clock, record)
        elif section == "rates":
            products.install(clock, record)
        elif section == "correctness":
            good &= correctness(record)
        elif section == "momentum":
            rates.momentum(clock, record, measured)
        elif section == "products":
            products.products(clock, record)
        elif section == "paths":
            products.paths(clock, record)
        elif section == "steps":
            steps.steps(clock, record, measured)
        elif section == "shapes":
            steps.shapes(clock, record)
        else:
            host_state.host_state(clock, record)
        finish(section, start)
    print(record.path.with_suffix(".md").read_text())
    return 0 if good and not record.failed() else 1


if __name__ == "__main__":
    sys.exit(main())
