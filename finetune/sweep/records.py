"""Records of a sweep's runs, JSON lines of one schema, and the locks by which a run is taken. No torch in here.

The file is replaced as a whole, so that a record is there whole or not at all, whenever a process is killed.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import muon8bit
from finetune.config.errors import InputError
from finetune.storage.run_dir import RunFolder, write_beside
from finetune.sweep.spec import SweepRun

ROOT = Path(__file__).resolve().parents[2]
# Field of a record -> what it is; a page of the docs is made from both tables.
FIELDS = {
    "sweep": "name of the sweep",
    "arm": "name of the arm",
    "rate": "peak learning rate",
    "seed": "seed of weights and data order",
    "status": "`finished`; `diverged`: a gradient or a validation loss was not finite; `failed`: anything else",
    "error": "why it diverged or failed, in a sentence; else null",
    "script": "what ran",
    "recipe": "name of the recipe",
    "options": "options of the arm over the recipe",
    "recipe_hash": "hash of all options that are not at their default, but for rate and seed",
    "data_hash": "hash of the text and of how it is split; null where the run did not come so far",
    "threads": "threads of torch",
    "load": "load average of the machine over a minute, at start and end",
    "versions": "of Python, torch, transformers and muon8bit",
    "commit": "git commit of the checkout; null outside of one",
    "dirty": "whether a Python, YAML or TOML file differed from that commit",
    "started": "time of the start, UTC",
    "metrics": "what was measured: the fields below, and whatever else result.json of the run has",
}
METRICS = {
    "val_loss": "validation loss after the last step, nats per token or target; null unless finished",
    "steps": "optimizer steps taken",
    "tokens": "tokens or targets trained on",
    "state_bytes": "bytes of the optimizer's state; null unless finished",
    "seconds": "seconds of all steps",
    "core_seconds": "CPU seconds of the process; of a resumed run also the seconds of its earlier steps, in proportion",
    "wall_seconds": "seconds that this process took, start and end included",
    "training_curve": "pairs of step and training loss, each the mean of the last `curve_every` steps",
    "step_seconds": "pairs of step and seconds of all steps up to it: the first, and every `curve_every`",
    "validation_curve": "pairs of step and validation loss, from before the first step on",
}


def read_records(file: Path) -> list[dict[str, Any]]:
    """Read the records of a file, oldest first; none where there is no file.

    Raises:
        InputError: a line that is no record.
    """
    if not file.exists():
        return []
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            SweepRun(record["arm"], record["rate"], record["seed"])
        except (ValueError, KeyError, TypeError):
            raise InputError(str(file), f"line {number} is no record of a run; delete that line") from None
        records.append(record)
    return records


def latest(records: Sequence[Mapping[str, Any]]) -> dict[SweepRun, Mapping[str, Any]]:
    """Return the last record of each run: a run that failed may have been tried again."""
    return {SweepRun(record["arm"], record["rate"], record["seed"]): record for record in records}


def loss_of(record: Mapping[str, Any] | None) -> float | None:
    """Return a run's validation loss, infinite where it diverged; None where it failed or has no record."""
    if record is None or record["status"] == "failed":
        return None
    return math.inf if record["status"] == "diverged" else float(record["metrics"]["val_loss"])


def make_record(known: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with all of `FIELDS` and `METRICS`, None where a field is not known, and the other metrics."""
    return {key: known.get(key) for key in FIELDS} | {"metrics": {**dict.fromkeys(METRICS), **metrics}}


def append_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write a record behind those of a file, one process after another.

    Raises:
        OSError: the disk is full, or fails; the file is as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, allow_nan=False)
    with _locked_folder(file.parent):
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        write_beside(file, f"{before}{line}\n")


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which leaves no file in it."""
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def take(lock: Path) -> int | None:
    """Take a run by its lock file; return the open file, or None where another process has the run.

    The lock is the open file's: the kernel drops it when the last process that holds it has ended, however it ended.
    The file names the process that took it last.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    number = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(number)
        return None
    os.truncate(number, 0)
    os.write(number, f"process {os.getpid()} on {platform.node()}\n".encode())
    return number


def holder(lock: Path) -> str | None:
    """Return the process that has a run, as its lock file names it; None where nobody has it."""
    if not lock.exists():
        return None
    number = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return lock.read_text().strip() or "another process"
    finally:
        os.close(number)
    return None


def surroundings() -> dict[str, Any]:
    """Return versions, commit and whether the code differs from it, for a record."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "muon8bit": muon8bit.__version__}
    for name in ("torch", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", "*.py", "*.yaml", "*.toml")
    return {"versions": versions, "commit": commit or None, "dirty": None if changes is None else bool(changes)}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or no checkout: the record says null
        return None
    return done.stdout.strip()


def num_threads() -> int:
    """Return the threads of torch, or what it would take where the script has not imported it."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch else int(os.environ.get("OMP_NUM_THREADS", "1"))


def measure(folder: Path, curve_every: int) -> dict[str, Any]:
    """Return the metrics of a run that has ended, out of its folder; those of `METRICS` but what the process took.

    Whatever else its result.json has comes with them.
    """
    steps = [record for record in RunFolder(folder).metrics() if record.get("loss") is not None]
    result, facts = read_json(folder / "result.json"), read_json(folder / "run.json")
    before = facts.get("val_loss_before")
    validation = [] if before is None else [[0, before]]
    validation += [[m["step"], m["val_loss"]] for m in steps if m.get("val_loss") is not None]
    training = [
        [steps[end - 1]["step"], round(sum(m["loss"] for m in steps[end - curve_every : end]) / curve_every, 6)]
        for end in range(curve_every, len(steps) + 1, curve_every)
    ]
    last = steps[-1] if steps else {"step": 0, "tokens": 0, "seconds": 0.0}
    measured = {
        "val_loss": result.get("val_loss"),
        "steps": last["step"],
        "tokens": last["tokens"],
        "state_bytes": result.get("state_bytes"),
        "seconds": last["seconds"],
        "training_curve": _finite(training),
        "step_seconds": [[m["step"], m["seconds"]] for i, m in enumerate(steps, 1) if i == 1 or i % curve_every == 0],
        "validation_curve": _finite(validation),
    }
    more = {key: value for key, value in result.items() if key not in facts and key not in ("optimizer", "step")}
    return {**more, **measured}


def _finite(curve: Sequence[Sequence[float]]) -> list[list[float | None]]:
    """Return pairs with None for what JSON cannot hold."""
    return [[step, loss if math.isfinite(loss) else None] for step, loss in curve]


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON file of a run; {} where the run has not written it."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return content
