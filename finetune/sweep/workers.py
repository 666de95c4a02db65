"""Processes side by side, each with one thread. No torch in here."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from finetune.sweep.worker import SweepJob

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Places:
    """Room for processes side by side.

    Args:
        limit: how many.
        gpus: one for each, as `CUDA_VISIBLE_DEVICES` names them; () where each process sees all that this one sees.
    """

    limit: int
    gpus: Sequence[str] = ()


@dataclass
class Workers:
    """Processes that run side by side.

    Args:
        places: for them.
        running: name of a job -> its process.
    """

    places: Places
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _ended: queue.Queue[SweepJob] = field(default_factory=queue.Queue)
    _gpu_of: dict[str, str] = field(default_factory=dict)

    def start(self, job: SweepJob, lock: int) -> None:
        """Start the worker of a job; it holds the job's lock until it ends, also where this process is killed."""
        environment = {**os.environ, **ONE_THREAD}
        if self.places.gpus:
            self._gpu_of[job.name] = next(gpu for gpu in self.places.gpus if gpu not in self._gpu_of.values())
            environment["CUDA_VISIBLE_DEVICES"] = self._gpu_of[job.name]
        paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)]
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
        try:
            with job.file("log").open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "finetune.sweep.worker", job.write()],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(lock,),
                    start_new_session=True,  # Ctrl-C comes to the sweep alone, which tells its workers
                )
        finally:
            os.close(lock)
        self.running[job.name] = process
        threading.Thread(target=self._wait, args=(job, process), daemon=True).start()

    def _wait(self, job: SweepJob, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._ended.put(job)

    def next_end(self) -> tuple[SweepJob, int]:
        """Wait until a process ends; return its job and exit code, below 0 for a signal."""
        job = self._ended.get()
        self._gpu_of.pop(job.name, None)
        return job, self.running.pop(job.name).wait()

    @contextmanager
    def ended_together(self) -> Iterator[None]:
        """Tell all processes to save and stop if the block is left by an exception, and wait for them."""
        try:
            yield
        except BaseException:
            for process in self.running.values():
                process.terminate()
            if self.running:
                print(f"stopping {', '.join(self.running)}: each saves first", file=sys.stderr, flush=True)
            for process in self.running.values():
                process.wait()
            raise
