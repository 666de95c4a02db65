"""The first minutes on a GPU: whether kernels, a step and pretraining are right, in processes side by side.

`python -m benchmarks.gpu --first` runs it. Each process takes some of the checks and writes what came of each at once.
A check that fails ends its process, since errors of CUDA stay; the checks behind it get a new one. Compiling is most
of the time: `compilations` lists what is compiled.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from muon8bit_kernels import kernels_for, reference

from benchmarks.gpu.first_cases import CASES, Found, compare
from benchmarks.gpu.first_steps import FAMILY, pretrained, stepped
from benchmarks.gpu.gpu_tests import side_by_side
from benchmarks.gpu.record import Record
from muon8bit import Muon8bit
from muon8bit.tune.timing import FAILED, poisoned

SECTION = "first"
ROOT = Path(__file__).parents[2]
PASSED, SKIPPED, UNFINISHED = "passed", "skipped: needs", "not finished"
LIMIT_S = 450.0  # the rest of 8 minutes is for starting and writing
_CPU = torch.device("cpu")


def _self_check(device: torch.device, dry: bool) -> None:  # noqa: ARG001
    kernels_for(device)


def _step(device: torch.device, dry: bool, of: type[Muon8bit] = Muon8bit) -> None:
    compare(stepped(device, dry, of), stepped(_CPU, dry, of))


def _pretrain(_: torch.device, dry: bool) -> None:
    pretrained(dry)


def _bits(run: Callable[[Any, torch.device, bool], Found], device: torch.device, dry: bool) -> None:
    """Compare a case, its fresh memory filled with NaN, with the reference on the CPU."""
    if dry:
        kernels: Any = reference
    else:
        from muon8bit_kernels.triton import kernels  # `kernels_for` would check the device first, in every process
    with poisoned():
        ours = run(kernels, device, dry)
    compare(ours, run(reference, _CPU, dry))


def checks() -> dict[str, Callable[[torch.device, bool], None]]:
    """Return the checks by name, the longest first."""
    whole: dict[str, Callable[[torch.device, bool], None]]
    whole = {"pretraining in bf16": _pretrain, "two steps against the reference": _step, "self check": _self_check}
    whole |= {f"two steps of {name}": partial(_step, of=of) for name, of in FAMILY.items()}
    return whole | {case.name: (lambda device, dry, case=case: _bits(case.run, device, dry)) for case in CASES}


def run_check(check: Callable[[torch.device, bool], None], device: torch.device, dry: bool) -> str:
    """Return what came of a check, in words."""
    try:
        check(device, dry)
    except ModuleNotFoundError as error:
        return f"{SKIPPED} {error.name}"
    except Exception as error:  # the other checks go on; the command ends with an error
        traceback.print_exc()
        return f"{FAILED}: {type(error).__name__}: {error}".splitlines()[0][:300]
    return PASSED


def worker(out: Path, dry: bool, names: Sequence[str]) -> int:
    """Run these checks in this process, a line of JSON each; stop after one that fails."""
    device, every = _CPU if dry else torch.device("cuda", 0), checks()
    for name in names:
        start = time.perf_counter()
        verdict = run_check(every[name], device, dry)
        with out.open("a") as file:
            file.write(json.dumps({"name": name, "verdict": verdict, "s": time.perf_counter() - start}) + "\n")
        if verdict.startswith(FAILED):
            return 1
    return 0


class _Group:
    """Checks that processes run one after the other until `deadline`, a time of `time.monotonic`."""

    def __init__(self, names: Sequence[str], dry: bool, folder: Path, deadline: float) -> None:
        self.names, self.dry, self.folder, self.deadline = list(names), dry, folder, deadline

    def run(self, tell: Callable[[str, str, float], None]) -> None:
        """Run them all, and tell the name, verdict and seconds of each."""
        while self.names:
            number = len(self.names)
            self.folder.mkdir(exist_ok=True)
            out, log = self.folder / f"{number}.jsonl", self.folder / f"{number}.log"
            reason = self._process(out, log)
            lines = out.read_text().splitlines() if out.exists() else []
            for line in map(json.loads, lines):
                self.names.remove(line["name"])
                tell(line["name"], line["verdict"], line["s"])
                if line["verdict"].startswith(FAILED):
                    print(log.read_text()[-4000:], flush=True)
            if reason == UNFINISHED:
                for name in self.names:
                    tell(name, f"{UNFINISHED} in {LIMIT_S:.0f} s", 0.0)
                return
            if reason and self.names and not any(json.loads(line)["verdict"].startswith(FAILED) for line in lines[-1:]):
                print(log.read_text()[-4000:], flush=True)
                tell(self.names.pop(0), f"{FAILED}: its process {reason}", 0.0)

    def _process(self, out: Path, log: Path) -> str:
        """Run a process for the checks that are left; return why it ended early, or nothing."""
        command = [sys.executable, "-m", "benchmarks.gpu.first", str(out), str(int(self.dry)), *self.names]
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)])
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1" if self.dry else "4"}
        with log.open("w") as file:
            process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=file, stderr=file, start_new_session=True
            )
            try:
                status = process.wait(max(0.0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return UNFINISHED
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # what it has started too
                    process.wait()
        return f"ended with {status}" if status else ""


def run_all(record: Record, num_processes: int | None = None, limit_s: float = LIMIT_S) -> bool:
    """Run what has not passed in an earlier call of the day, and add a row each; whether none failed.

    Args:
        record: gets the rows, and is written after each.
        num_processes: processes side by side; None is what `side_by_side` says.
        limit_s: seconds after which what still runs is ended.
    """
    passed = {row.case for row in record.find(SECTION, "verdict") if row.value == PASSED}
    record.rows = [row for row in record.rows if row.section != SECTION or row.case in passed]
    names = [name for name in checks() if name not in passed]
    count = num_processes or side_by_side(record.dry)
    lock, deadline = threading.Lock(), time.monotonic() + limit_s

    def tell(name: str, verdict: str, seconds: float) -> None:
        with lock:
            record.measured(SECTION, name, "", "verdict", verdict, "")
            record.measured(SECTION, name, "", "time", seconds, "s", "compilation included")
            record.write()
            print(f"  {name}: {verdict}", flush=True)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(count) as pool:
        groups = [_Group(names[n::count], record.dry, Path(folder, str(n)), deadline) for n in range(count)]
        for job in [pool.submit(group.run, tell) for group in groups]:
            job.result()
    verdicts = [row.value for row in record.find(SECTION, "verdict")]
    return not any(verdict.startswith((FAILED, UNFINISHED)) for verdict in verdicts)


if __name__ == "__main__":
    sys.exit(worker(Path(sys.argv[1]), bool(int(sys.argv[2])), sys.argv[3:]))
