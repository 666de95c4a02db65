"""A run on disk: recipe.yaml, metrics.jsonl, checkpoints/, model/. No torch in here."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.config.errors import InputError
from finetune.config.options import Training
from finetune.storage.checkpoints import (
    PROGRESS_FILE,
    complete,
    named_checkpoints,
    remove,
    remove_leftovers,
    step_of,
    sync,
)

RUNS = Path("runs")


@dataclass
class RunFolder:
    """The folder that a run writes into.

    Args:
        path: absolute path of the folder; it need not exist before `create`.
        link: `runs/latest`, moved to this run by `create`; None leaves it alone.
        candidates: checkpoints that a resumed run may continue from, best first; empty for a new run.
        checkpoint: the undamaged one of them that was chosen; None for a new run, and before the choice.
    """

    path: Path
    link: Path | None = None
    candidates: tuple[Path, ...] = ()
    checkpoint: Path | None = None

    @property
    def recipe_file(self) -> Path:
        """Path of the run's recipe."""
        return self.path / "recipe.yaml"

    @property
    def metrics_file(self) -> Path:
        """Path of the run's metrics, a JSON record a line."""
        return self.path / "metrics.jsonl"

    @property
    def diverged_file(self) -> Path:
        """Path of what a run leaves whose gradient or validation loss was not finite."""
        return self.path / "diverged.json"

    @property
    def step(self) -> int:
        """Optimizer steps that the checkpoint holds; 0 for a new run."""
        return int(self.progress()["step"]) if self.checkpoint else 0

    def progress(self) -> dict[str, Any]:
        """Read the chosen checkpoint's record of its run."""
        assert self.checkpoint is not None
        record: dict[str, Any] = json.loads((self.checkpoint / PROGRESS_FILE).read_text())
        return record

    def is_finished(self) -> bool:
        """Check whether the run has left all results that follow the step of its checkpoint."""
        try:
            done = json.loads((self.path / "result.json").read_text())["step"] == self.step
        except (OSError, ValueError, KeyError):
            return False
        return done and any((self.path / name).is_dir() for name in ("model", "adapter"))

    def awaits_merge(self, last_step: int) -> bool:
        """Check whether a complete run that is to be resumed has left an adapter that is not merged."""
        try:
            done = json.loads((self.path / "result.json").read_text())["step"] == last_step
        except (OSError, ValueError, KeyError):
            return False
        has_adapter = (self.path / "adapter").is_dir() and not (self.path / "model").exists()
        return bool(self.candidates) and done and has_adapter

    def is_evaluated(self) -> bool:
        """Check whether the metrics have a validation loss of the checkpoint's step; a run's results need one."""
        return any(m["step"] == self.step and m["val_loss"] is not None for m in self.metrics())

    def create(self, recipe: Training) -> None:
        """Make the folder and point `runs/latest` to it; for a resumed run, forget steps after its checkpoint.

        Later checkpoints, damaged or of a continuation that is given up, lose their names, and go with the next save.

        Raises:
            InputError: the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.checkpoint is None:
                self.recipe_file.touch(exist_ok=False)
            self._begin(recipe)
        except FileExistsError:
            raise InputError("--output-dir", f"another run has just taken {self.path}; give one of your own") from None
        except OSError as error:
            raise InputError("--output-dir", f"cannot write to {self.path}: {error.strerror}") from None

    def _begin(self, recipe: Training) -> None:
        write_beside(self.recipe_file, yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))
        sync(self.path.parent)
        remove_leftovers(self.path)
        self.diverged_file.unlink(missing_ok=True)
        for later in named_checkpoints(self.path):
            if step_of(later) > self.step:
                later.rename(later.with_name(f".{later.name}.given-up"))
        kept = [record for record in self.metrics() if record["step"] <= self.step]
        write_beside(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))
        if self.link is not None:
            beside = scratch_beside(self.link)
            beside.symlink_to(self.path.name)
            beside.replace(self.link)

    def metrics(self) -> list[dict[str, Any]]:
        """Read the records of metrics.jsonl; a last line cut off by a crash is left out."""
        records = []
        if self.metrics_file.exists():
            for line in self.metrics_file.read_text().splitlines():
                try:
                    records.append(json.loads(line))
                except ValueError:
                    break
        return records

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Write a record to the end of metrics.jsonl."""
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def finish_checkpoint(self, partial: Path, files: dict[str, dict[str, Any]], keep: int) -> None:
        """Name a checkpoint whose files are sealed, then delete all but the last `keep`, and what has no name.

        Raises:
            OSError: the disk is full, or fails.
        """
        sync(self.metrics_file)
        complete(partial, files)
        for old in named_checkpoints(self.path)[:-keep]:
            remove(old)
        remove_leftovers(self.path)


def choose_folder(output_dir: str | None, recipe_name: str) -> RunFolder:
    """Choose the folder of a new run; nothing is created.

    Raises:
        InputError: `output_dir` is a file, or a folder with something in it.
    """
    if output_dir is None:
        # One name for all ranks of a launch: the launcher's process starts them within its own lifetime.
        now = time.time()
        plain = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "-", recipe_name)  # Windows takes none of these
        name = f"{plain}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{int(now * 1000) % 1000:03d}"
        runs, number = RUNS.resolve(), 1
        path = runs / name
        while path.exists():
            number += 1
            path = runs / f"{name}-{number}"
        return RunFolder(path, link=runs / "latest")
    path = Path(output_dir).expanduser().resolve()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        if holds_nothing(path):
            raise InputError(
                "--output-dir",
                f"{path} holds a run with no checkpoint; delete it if no process works in it, or give a new folder",
            )
        raise InputError("--output-dir", f"{path} is in use; give a new folder, or continue it with --resume")
    return RunFolder(path)


def holds_nothing(path: Path) -> bool:
    """Check whether a folder is that of a run with no checkpoint yet; its process may be at work in it."""
    return (path / "recipe.yaml").is_file() and not named_checkpoints(path)


def newest_complete(runs: Path) -> Path | None:
    """Return the folder in `runs` of the run that left its results last; None where there is no complete run."""
    found = [
        file
        for file in runs.glob("*/result.json")
        if not file.parent.is_symlink() and any((file.parent / name).is_dir() for name in ("model", "adapter"))
    ]
    return max(found, key=lambda file: file.stat().st_mtime).parent if found else None


def find_run(resume: str) -> RunFolder:
    """Find the folder of a run to continue, and the checkpoints to choose from, newest first.

    Args:
        resume: `latest` (what runs/latest points to), a run's folder, or one checkpoint in it.

    Raises:
        InputError: there is no run, or no checkpoint in it.
    """
    given = Path(os.path.abspath(RUNS / "latest" if resume == "latest" else Path(resume).expanduser()))
    # checkpoints/ and what is in it may be links to another disk: looked for where the run has them.
    path = given if given.parent.name == "checkpoints" else given.resolve()
    if path.parent.name == "checkpoints" and path.is_dir():
        run = path.parent.parent.resolve()
        return RunFolder(run, candidates=(run / "checkpoints" / path.name,))
    if not (path / "recipe.yaml").is_file():
        hint = " (runs/ lies where the run was started)" if resume == "latest" else ""
        raise InputError("--resume", f"{path} is not a run's folder{hint}; give one that holds recipe.yaml")
    checkpoints = named_checkpoints(path)
    if not checkpoints:
        raise InputError(
            "--resume",
            f"{path} has no complete checkpoint: nothing to resume; start anew without --resume, and delete "
            "the folder if no process works in it",
        )
    return RunFolder(path, candidates=tuple(reversed(checkpoints)))


def check_script(folder: RunFolder, values: Mapping[str, Any], script: str) -> None:
    """Check that a run is resumed by the script that began it.

    Args:
        folder: of the run.
        values: of its recipe; that of pretraining alone has a model's configuration.
        script: `pretrain` or `sft`, which is to resume it.

    Raises:
        InputError: it is a run of the other one.
    """
    began = "pretrain" if isinstance(values.get("model"), dict) else "sft"
    if began != script:
        raise InputError(
            "--resume",
            f"{folder.path} is a run of finetune.{began}; resume it by: python -m finetune.{began} --resume "
            f"{folder.path}",
        )


def scratch_beside(path: Path) -> Path:
    """Return a hidden path beside `path` that no other process takes, on this machine or on one that shares the disk.

    Process ids do not tell machines or containers apart.
    """
    return path.with_name(f".{path.name[:80]}.{platform.node()[:64]}.{uuid.uuid4().hex}")


def write_beside(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part, also after a power failure."""
    beside = scratch_beside(path)
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    beside.replace(path)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Yield a new folder that takes the name `path` when the block ends without an error; another writer may win."""
    beside = scratch_beside(path)
    beside.mkdir(parents=True, exist_ok=False)
    try:
        yield beside
        try:
            beside.rename(path)
        except OSError:  # somebody else finished the same folder first
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
