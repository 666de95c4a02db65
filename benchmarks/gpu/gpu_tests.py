"""The tests of the suite that are marked gpu, in processes side by side, the decisive ones first.

Each process takes some of the tests; what it prints of each is read as far as it got when the time was over.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.record import Record

ROOT = Path(__file__).parents[2]
# Where tests are marked gpu. A dry run takes one module, whose GPU tests skip themselves.
TESTS, DRY_TESTS = ("tests/kernels", "tests/step", "tests/tune"), ("tests/kernels/test_reference.py",)
LIMIT_S = 480.0
_COLLECTION_LIMIT_S = 120.0
_OUTCOME = re.compile(r"^(tests/.*::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
SECTION, CASE = "correctness", "pytest -m gpu"
WORDS = {"PASSED": "passed", "FAILED": "failed", "ERROR": "errors", "SKIPPED": "skipped"}
NOT_RUN = "not run"


def side_by_side(is_dry: bool) -> int:
    """Return how many processes run side by side: one fewer than the processors, 1 in a dry run."""
    return 1 if is_dry else max(2, min(14, (os.cpu_count() or 2) - 1))


def _pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def collect(where: Sequence[str], marks: str) -> list[str]:
    """Return the ids of the tests with these marks; modules that need a package that is not there are left out.

    Raises:
        RuntimeError: if none can be collected.
    """
    command = _pytest(*where, "-m", marks, "--collect-only", "--continue-on-collection-errors")
    done = subprocess.run(
        command, cwd=ROOT, env=_environment(), text=True, capture_output=True, timeout=_COLLECTION_LIMIT_S
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line]
    if not found:
        raise RuntimeError(f"no tests can be collected: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    for line in done.stdout.splitlines():
        if line.startswith("ERROR"):
            print(f"  left out: {line}", flush=True)
    return found


def outcomes(log: str) -> dict[str, str]:
    """Return the outcome of each test that a verbose pytest has printed."""
    return {name: WORDS[word] for name, word in _OUTCOME.findall(log)}


def run_side_by_side(tests: Sequence[str], num_processes: int, limit_s: float) -> dict[str, str]:
    """Run tests in processes, each those of one place in the order, and return the outcomes until the limit."""
    deadline, running = time.monotonic() + limit_s, []
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(min(num_processes, len(tests))):
            names, log = Path(folder, f"{number}.txt"), Path(folder, f"{number}.log")
            names.write_text("\n".join(tests[number::num_processes]))
            with log.open("w") as file:
                command = _pytest("-vv", "--tb=short", f"@{names}")
                process = subprocess.Popen(
                    command, cwd=ROOT, env=_environment(), stdout=file, stderr=file, start_new_session=True
                )
            running.append((process, log))
        for process, log in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            text = log.read_text()
            of_process = outcomes(text)
            found |= of_process
            if process.returncode not in (0, 5) or set(of_process.values()) & {"failed", "errors"}:
                print(text[-6000:], flush=True)
    return found


def correctness(record: Record, num_processes: int | None = None, limit_s: float = LIMIT_S) -> bool:
    """Run the tests and add how many passed, failed, were skipped, or had no time; whether none failed.

    Args:
        record: gets the rows.
        num_processes: processes side by side; None is what `side_by_side` says.
        limit_s: seconds for all of them.
    """
    where, start = (DRY_TESTS if record.dry else TESTS), time.monotonic()
    first = collect(where, "gpu and decisive")
    decisive = set(first)
    # A dry run has shown by now that tests are collected.
    others = [] if record.dry else [name for name in collect(where, "gpu") if name not in decisive]
    count = num_processes or side_by_side(record.dry)
    found = {}
    for tests in (first, others):
        found |= run_side_by_side(tests, count, limit_s - (time.monotonic() - start))
    all_run = [found.get(name, NOT_RUN) for name in (*first, *others)]
    counts = Counter(all_run)
    for name in (*WORDS.values(), NOT_RUN):
        record.measured(SECTION, CASE, name, "tests", counts[name], "tests")
    record.measured(SECTION, CASE, "decisive, not passed", "tests", _not_passed(first, found), "tests")
    return not counts["failed"] + counts["errors"] and all(name in found for name in first)


def _not_passed(names: Sequence[str], found: dict[str, str]) -> int:
    return sum(found.get(name) != "passed" for name in names)
