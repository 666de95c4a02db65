"""Measure step time and memory on a CUDA GPU, and check that what runs there is right.

    python -m benchmarks.gpu --first             # under 8 minutes: kernels, a step and pretraining are right
    python -m benchmarks.gpu --tests             # the suite's GPU tests, the decisive ones first
    python -m benchmarks.gpu --rates             # ceilings, momentum kernels, products: the table of rates
    python -m benchmarks.gpu --steps             # step times by that table, whole models and shapes alone
    python -m benchmarks.gpu --memory            # peaks inside of a step, state on the host
    python -m benchmarks.gpu --recipes           # peaks of the recipes of record
    python -m benchmarks.gpu [--only steps shapes] [--out benchmarks/results]

Each of the first six ends in less than 9 minutes, and begins nothing that might not; the same command goes on where it
ended. Without any of them all sections run, without a limit. `--dry-run` goes through the same code with tiny shapes on
a CPU, without figures. All write `<gpu>_<date>.csv` and an `.md`; sections of an earlier call of the same day and GPU
are kept. The ceilings are measured in every call that needs them. The exit status is 1 if a test, a check or an arm
failed; a missed target does not change it.
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
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.gpu import first, gpu_tests, host_state, products, rates, recipes, steps
from benchmarks.gpu.record import Record
from benchmarks.gpu.report import markdown
from muon8bit.orthogonalize import device_kind
from muon8bit.tune.timing import Clock

ROOT = Path(__file__).parents[2]
# Call -> its sections. Those that begin no case too late do so by `Record.begins`.
CALLS = {
    "first": ("first",),
    "tests": ("correctness",),
    "rates": ("rates", "momentum", "products", "paths"),
    "steps": ("rates", "steps", "shapes"),
    "memory": ("rates", "memory", "host"),
    "recipes": ("recipes",),
}
SECTIONS = ("correctness", "momentum", "products", "paths", "steps", "shapes", "host")
MORE_SECTIONS = ("first", "rates", "memory", "recipes")
STEPPING = {"steps", "shapes", "memory", "host"}
NEED_CEILINGS = {"momentum", "steps", "shapes"}
CALL_LIMIT_S = 400.0  # for what has begun by then; a case takes up to two minutes


def facts(device: torch.device) -> dict[str, str]:
    """Return what a figure depends on: GPU, driver, versions, date."""
    name, driver = "none", "none"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0]
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


def arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU, the same files, no figures")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder of the files")
    parser.add_argument("--cache", type=Path, help="folder made by `python -m benchmarks.gpu.compilations --cache`")
    which = parser.add_mutually_exclusive_group()
    for call, sections in CALLS.items():
        which.add_argument(
            f"--{call}", action="store_const", const=call, dest="call", help=f"a call of its own: {', '.join(sections)}"
        )
    which.add_argument("--only", nargs="+", choices=SECTIONS + MORE_SECTIONS, help="sections to run")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("needs a CUDA GPU; --dry-run goes through the same steps on a CPU")
    if args.cache is not None and not args.cache.is_dir():
        parser.error(f"--cache: {args.cache} is no folder")
    return args


def runners(clock: Clock, record: Record, ceilings: dict[str, float]) -> dict[str, Callable[[], bool | None]]:
    """Return for each section the function that runs it; False means that something failed."""
    return {
        "first": lambda: first.run_all(record),
        "correctness": lambda: gpu_tests.correctness(record),
        "rates": lambda: products.install(clock, record),
        "momentum": lambda: rates.momentum(clock, record, ceilings),
        "products": lambda: products.products(clock, record),
        "paths": lambda: products.paths(clock, record),
        "steps": lambda: steps.steps(clock, record, ceilings),
        "shapes": lambda: steps.shapes(clock, record),
        "memory": lambda: steps.memory(clock, record),
        "host": lambda: host_state.host_state(clock, record),
        "recipes": lambda: recipes.recipes(record),
    }


def run_sections(clock: Clock, record: Record, sections: tuple[str, ...], *, is_resumed: bool) -> bool:
    """Run the sections, and write the record after each; whether none failed.

    Args:
        clock: of the device.
        record: gets the rows.
        sections: their names.
        is_resumed: cases of an earlier call are kept, instead of the section being run anew.
    """
    good, ceilings = True, dict[str, float]()
    if NEED_CEILINGS & set(sections):
        record.restart("ceilings")
        ceilings |= rates.ceilings(clock, record)
    if STEPPING & set(sections) and "rates" not in sections:
        # Before the first step, so that it is the one that a tuned user gets.
        sections = ("rates", *sections)
    run = runners(clock, record, ceilings)
    for section in sections:
        start = time.perf_counter()
        if not is_resumed or section == gpu_tests.SECTION:
            record.restart(section)
        good &= run[section]() is not False
        record.write()
        record.path.with_suffix(".md").write_text(markdown(record))
        print(f"{section}: {time.perf_counter() - start:.0f} s", flush=True)
    return good


def main() -> int:
    """Run what the options ask for, and print the report."""
    args = arguments()
    device = torch.device("cpu") if args.dry_run else torch.device("cuda", 0)
    with tempfile.TemporaryDirectory() as cache:
        if args.cache is not None:
            from benchmarks.gpu.compilations import place_cache  # needs triton

            place_cache(args.cache, Path(cache))
            os.environ["TRITON_CACHE_DIR"] = cache
        return _run(args, device)


def _run(args: argparse.Namespace, device: torch.device) -> int:
    about = facts(device)
    name = "dry-run" if args.dry_run else re.sub(r"\W+", "-", about["GPU"].lower())
    args.out.mkdir(parents=True, exist_ok=True)
    record = Record(args.out / f"{name}_{about['date']}.csv", args.dry_run, CALL_LIMIT_S if args.call else None)
    sections = CALLS[args.call] if args.call else tuple(args.only or SECTIONS)
    options = ["--dry-run"] * args.dry_run + ([f"--{args.call}"] if args.call else [])
    options += ["--only", *args.only] if args.only else []
    record.about(about, shlex.join(["python", "-m", "benchmarks.gpu", *options]))
    good = run_sections(Clock(device), record, sections, is_resumed=args.call is not None)
    print(record.path.with_suffix(".md").read_text())
    if record.left:
        print(f"not all cases of {', '.join(record.left)} fitted into the time: give the same command again")
    return 0 if good and not record.failed() else 1


if __name__ == "__main__":
    sys.exit(main())
