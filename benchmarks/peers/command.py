"""Hold optimizer classes to float64 rules, resume, sharding, routing, bytes and step time.

    python -m benchmarks.peers                                        # our classes, and the peers that are installed
    python -m benchmarks.peers my_package.module:MyMuon --lr 1e-3     # a class of your own beside torch's
    python -m benchmarks.peers --out benchmarks/results/peers         # peers.json and peers.md

Calls classes only; each runs in a process of its own. Exit code 1 where a check of our classes fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

import muon8bit
from benchmarks.peers.matrices import (
    check_bytes,
    check_dcp,
    check_names,
    check_nan,
    check_resume,
    check_rule,
    check_scale,
)
from benchmarks.peers.models import check_routing, check_step_time
from benchmarks.peers.sharding import check_sharding, describe_error
from benchmarks.peers.subjects import DOORS, LR, NOT_PACKAGED, SUBJECTS, Subject
from benchmarks.peers.tables import write_tables

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 1800
CHECKS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "rule": check_rule,
    "scale": check_scale,
    "resume fp32": lambda subject: check_resume(subject, torch.float32),
    "resume bf16": lambda subject: check_resume(subject, torch.bfloat16),
    "resume by names": check_names,
    "resume dcp": check_dcp,
    "nan": check_nan,
    "bytes": check_bytes,
    "routing": check_routing,
    "step time": check_step_time,
    "sharding": check_sharding,
}


def run_checks(subject: Subject, names: Sequence[str] = tuple(CHECKS)) -> dict[str, Any]:
    """Run checks of a class in this process; return name -> result.

    An exception in one is its result: the class cannot do what is asked.
    """
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    for name in names:
        try:
            results[name] = CHECKS[name](subject)
        except CheckpointException as error:  # no Exception; its causes are by rank
            results[name] = {"error": describe_error(next(iter(error.failures.values()))[0]), "passed": False}
        except Exception as error:
            results[name] = {"error": describe_error(error), "passed": False}
    return results


def run_subject(subject: Subject, names: Sequence[str]) -> dict[str, Any]:
    """Run checks of a class in a process of its own; return its record."""
    record: dict[str, Any] = {**asdict(subject), "version": _version(subject.package), "results": {}, "reason": ""}
    if importlib.util.find_spec(subject.target.split(":")[0].split(".")[0]) is None:
        return record | {"reason": "not installed"}
    words = [sys.executable, "-m", "benchmarks.peers.command", "--worker", json.dumps([asdict(subject), list(names)])]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return record | {"reason": f"no end within {TIMEOUT_S} s"}
    if done.returncode:
        return record | {"reason": (done.stderr.strip().splitlines() or ["failed"])[-1][:200]}
    return record | {"results": json.loads(done.stdout.splitlines()[-1])}


def _version(package: str) -> str | None:
    if package == "muon8bit":  # what an editable install tells may be older
        return muon8bit.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def work_as_worker(argument: str) -> int:
    """Run the checks that another process asks for, and print their results as the last line."""
    values, names = json.loads(argument)
    subject = Subject(**values)
    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr):
        _ = subject.kind
        results = run_checks(subject, names)
    print(json.dumps(results))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        "peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("target", metavar="MODULE:CLASS", nargs="?", help="a class (default: ours and the peers)")
    parser.add_argument("--lr", type=float, default=LR, help=f"its learning rate (default: {LR:g})")
    parser.add_argument("--options", metavar="JSON", default="{}", help="further arguments of its constructor")
    parser.add_argument("--door", choices=DOORS, default="tensors", help="how it takes parameters (default: tensors)")
    parser.add_argument("--only", metavar="TEXT", help="classes whose name has this text")
    parser.add_argument("--checks", metavar="NAME", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--out", metavar="STEM", type=Path, help="write STEM.json and STEM.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def _subjects(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Subject]:
    if options.target is None:
        found = [subject for subject in SUBJECTS if not options.only or options.only in subject.name]
        if not found:
            parser.error(f"--only {options.only}: no class has that in its name; see benchmarks/peers/subjects.py")
        return found
    module, colon, name = options.target.partition(":")
    try:
        values = json.loads(options.options)
    except ValueError as error:
        parser.error(f"--options is not JSON ({error}); give an object, as '{{\"momentum\": 0.9}}'")
    if not isinstance(values, dict):
        parser.error("--options is not a JSON object; give one, as '{\"momentum\": 0.9}'")
    subject = Subject(name or module, module.split(".")[0], options.target, values, options.door, options.lr)
    try:
        _ = subject.kind
    except (ImportError, AttributeError, ValueError) as error:
        parser.error(f"{options.target} cannot be imported{'' if colon else ' (give MODULE:CLASS)'}: {error}")
    return [subject, replace(next(s for s in SUBJECTS if s.package == "torch"), lr=options.lr)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and print the tables. Returns the exit code: 0, 1 where ours fail, 2 for bad input."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.worker is not None:
        return work_as_worker(options.worker)
    records = []
    for subject in _subjects(parser, options):
        print(f"{subject.name} ...", file=sys.stderr, flush=True)
        records.append(run_subject(subject, options.checks))
    not_run = {} if options.target else NOT_PACKAGED
    text = write_tables(records, not_run)
    print(text)
    if options.out:
        environment = {name: _version(name) for name in ("muon8bit", "torch", "torchao")}
        environment |= {"python": sys.version.split()[0], "device": "cpu", "threads": 1}
        content = {"environment": environment, "not_run": not_run, "classes": records}
        options.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text)
    ours = [record for record in records if record["is_ours"]]
    failed = [r["name"] for r in ours if r["reason"] or not all(c["passed"] for c in r["results"].values())]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
