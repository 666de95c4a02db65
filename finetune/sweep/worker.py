"""One run of a sweep, in a process of its own: `python -m finetune.sweep.worker JOB`, which the sweep starts.

It begins the run, or resumes it from its checkpoint, and writes its record.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from finetune.storage.checkpoints import named_checkpoints, step_of
from finetune.sweep.records import append_record, make_record, measure, num_threads, read_json, surroundings
from finetune.sweep.spec import import_script

STARTED = time.monotonic()
LARGE = ("checkpoints", "model", "adapter")


@dataclass(frozen=True, kw_only=True)
class SweepJob:
    """One run as its worker is told of it.

    Args:
        facts: fields of its record that are known before it runs.
        words: command line of its script, without where it writes.
        name: of its files.
        folder: of the sweep.
        records: the file that takes the record.
        curve_every: of the sweep.
        keep_models: of the sweep.
        minutes: after which the script stops and can be resumed; 0 is no limit.
    """

    facts: dict[str, Any]
    words: list[str]
    name: str
    folder: str
    records: str
    curve_every: int
    keep_models: bool
    minutes: float = 0.0

    @property
    def run_folder(self) -> Path:
        """Folder that the script writes into."""
        return Path(self.folder) / "runs" / self.name

    def file(self, kind: str) -> Path:
        """Return a file beside the run's folder: its lock, its log, its error, or the options that it began with."""
        return Path(self.folder) / "jobs" / f"{self.name}.{kind}"

    def write(self) -> str:
        """Return the job as the argument of its worker."""
        return json.dumps(asdict(self))


def begin_or_resume(job: SweepJob) -> list[str]:
    """Return the words that begin a run, or continue it from its newest checkpoint.

    A run without a checkpoint, or that was begun with other options, begins anew. One that was cut off behind its last
    step writes its results again.
    """
    folder, begun_with = job.run_folder, job.file("options")
    stamp = json.dumps([job.facts["recipe_hash"], job.words])
    minutes = f"--max-minutes={job.minutes!r}"  # also of no limit: a resumed run would keep the one that it began with
    if begun_with.exists() and begun_with.read_text() == stamp and named_checkpoints(folder):
        (folder / "result.json").unlink(missing_ok=True)
        return ["--resume", str(folder), minutes]
    shutil.rmtree(folder, ignore_errors=True)
    begun_with.write_text(stamp)
    return [*job.words, "--output-dir", str(folder), minutes]


def run(job: SweepJob) -> int:
    """Run a job and write its record; return the script's exit code.

    A run that was told to stop leaves no record.
    """
    started, load = datetime.now(timezone.utc), os.getloadavg()[0]
    facts, error_file = surroundings(), job.file("error")
    error_file.unlink(missing_ok=True)
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(error_file)  # where the scripts leave why they end
    words = begin_or_resume(job)
    resumed_at = step_of(named_checkpoints(job.run_folder)[-1]) if words[0] == "--resume" else 0
    print(f"\n{started:%Y-%m-%d %H:%M:%S} {job.facts['script']} {' '.join(words)}", flush=True)
    try:
        code: int = import_script(job.facts["script"]).main(words)
    except Exception:  # told in the record, and in the log in full
        traceback.print_exc()
        code = 1
    if code not in (0, 1, 2):
        return code
    diverged = read_json(job.run_folder / "diverged.json")
    error = diverged.get("error") or (_error(error_file, code, job.file("log")) if code else None)
    metrics = measure(job.run_folder, job.curve_every)
    measured = {"core_seconds": _core_seconds(metrics, resumed_at), "wall_seconds": time.monotonic() - STARTED}
    metrics |= {key: round(seconds, 2) for key, seconds in measured.items()}
    known = {
        **job.facts,
        "status": "diverged" if diverged else "failed" if code else "finished",
        "error": error,
        "data_hash": read_json(job.run_folder / "run.json").get("corpus"),
        "threads": num_threads(),
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
        **facts,
        "started": f"{started:%Y-%m-%dT%H:%M:%SZ}",
    }
    record = make_record(known, metrics)
    append_record(Path(job.records), record)
    if record["status"] != "failed":
        for name in LARGE[: 1 if job.keep_models else None]:
            shutil.rmtree(job.run_folder / name, ignore_errors=True)
    return code


def _core_seconds(metrics: Mapping[str, Any], resumed_at: int) -> float:
    """Return the CPU seconds of a run: of this process, and for the steps before it the seconds that they took."""
    before: float = metrics["seconds"] * resumed_at / max(1, metrics["steps"])
    return sum(os.times()[:4]) + before


def _error(file: Path, code: int, log: Path) -> str:
    """Return why a script ended, as it told its launcher."""
    told = read_json(file).get("message", {})
    return str(told.get("message") or f"exit code {code}; see {log.name}")


def main() -> int:
    """Run the job that is the only argument."""
    return run(SweepJob(**json.loads(sys.argv[1])))


if __name__ == "__main__":
    exit_code = main()
    print(f"ended with {exit_code} after {time.monotonic() - STARTED:.0f} s", flush=True)
    sys.exit(exit_code)
