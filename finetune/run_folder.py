"""A run on disk: recipe.yaml, metrics.jsonl, checkpoints/, model/. No torch in here."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import InputError
from finetune.options import Training

RUNS = Path("runs")
# Last file of a checkpoint to be written; the folder takes its final name only after it.
PROGRESS_FILE = "progress.json"


@dataclass
class RunFolder:
    """Where a run writes.

    Args:
        path: absolute path of the folder; it need not exist before `create`.
        link: `runs/latest`, moved to this run by `create`; None leaves it alone.
        checkpoint: the complete checkpoint to continue from, or None for a new run.
    """

    path: Path
    link: Path | None = None
    checkpoint: Path | None = None

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def step(self) -> int:
        """Optimizer steps that the checkpoint holds; 0 for a new run."""
        return int(self.progress()["step"]) if self.checkpoint else 0

    def progress(self) -> dict[str, Any]:
        """What the checkpoint says about itself.

        Raises:
            InputError: its record is unreadable.
        """
        assert self.checkpoint is not None
        try:
            record: dict[str, Any] = json.loads((self.checkpoint / PROGRESS_FILE).read_text())
        except (OSError, ValueError) as error:
            raise InputError("--resume", f"cannot read {self.checkpoint}: {error}") from None
        return record

    def create(self, recipe: Training) -> None:
        """Make the folder and point `runs/latest` to it; for a resumed run, forget steps after its checkpoint.

        Raises:
            InputError: the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.checkpoint is None:
                self.recipe_file.touch(exist_ok=False)
        except FileExistsError:
            raise InputError("--output-dir", f"another run has just taken {self.path}; give one of your own") from None
        except OSError as error:
            raise InputError("--output-dir", f"cannot make {self.path}: {error.strerror}") from None
        write_beside(self.recipe_file, yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))
        kept = [record for record in self.metrics() if record["step"] <= self.step]
        write_beside(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))
        if self.link is not None:
            beside = self.link.with_name(f".{self.link.name}.{os.getpid()}")
            beside.symlink_to(self.path.name)
            beside.replace(self.link)

    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; a last line cut off by a crash is left out."""
        records = []
        if self.metrics_file.exists():
            for line in self.metrics_file.read_text().splitlines():
                try:
                    records.append(json.loads(line))
                except ValueError:
                    break
        return records

    def append_metrics(self, record: dict[str, Any]) -> None:
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def checkpoint_paths(self, step: int) -> tuple[Path, Path]:
        """(folder to write into, name that it takes when complete) of the checkpoint of a step."""
        name = f"step-{step:07d}"
        return self.path / "checkpoints" / f".{name}.partial", self.path / "checkpoints" / name

    def finish_checkpoint(self, step: int, record: dict[str, Any], keep: int) -> None:
        """Record the progress, give the checkpoint its name, and delete all but the last `keep`."""
        partial, final = self.checkpoint_paths(step)
        (partial / PROGRESS_FILE).write_text(json.dumps(record, indent=1))
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        for old in complete_checkpoints(self.path)[:-keep]:
            shutil.rmtree(old)


def complete_checkpoints(path: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(p.parent for p in (path / "checkpoints").glob(f"step-*/{PROGRESS_FILE}"))


def choose_folder(output_dir: str | None, recipe_name: str) -> RunFolder:
    """Folder of a new run; nothing is created.

    Raises:
        InputError: `output_dir` is a file, or a folder with something in it.
    """
    if output_dir is None:
        # One name for all ranks of a launch: the launcher's process starts them within its own lifetime.
        now = time.time()
        name = f"{recipe_name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{int(now * 1000) % 1000:03d}"
        runs, number = RUNS.resolve(), 1
        path = runs / name
        while path.exists():
            number += 1
            path = runs / f"{name}-{number}"
        return RunFolder(path, link=runs / "latest")
    path = Path(output_dir).expanduser().resolve()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise InputError("--output-dir", f"{path} is in use; give a new folder, or continue it with --resume")
    return RunFolder(path)


def find_run(resume: str) -> RunFolder:
    """Folder of a run to continue, with its last complete checkpoint.

    Args:
        resume: `latest` (what runs/latest points to), a run's folder, or one checkpoint in it.

    Raises:
        InputError: there is no run, or no complete checkpoint in it.
    """
    path = (RUNS / "latest" if resume == "latest" else Path(resume).expanduser()).resolve()
    if (path / PROGRESS_FILE).is_file():
        return RunFolder(path.parent.parent, checkpoint=path)
    if not (path / "recipe.yaml").is_file():
        hint = " (runs/ lies where the run was started)" if resume == "latest" else ""
        raise InputError("--resume", f"{path} is not a run's folder{hint}; give one that holds recipe.yaml")
    checkpoints = complete_checkpoints(path)
    if not checkpoints:
        raise InputError("--resume", f"{path} has no complete checkpoint; start anew without --resume")
    return RunFolder(path, checkpoint=checkpoints[-1])


def write_beside(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A new folder that takes the name `path` when the block ends without an error; another writer may win."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        try:
            beside.rename(path)
        except OSError:  # somebody else finished the same folder first
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
