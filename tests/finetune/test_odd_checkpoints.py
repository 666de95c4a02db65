"""Folders of checkpoints as users leave them: copies beside, links to another disk, limits that are lowered."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from helpers.refusals import check_refused

from finetune.config.recipe import read_recipe
from finetune.storage.checkpoints import (
    file_names,
    named_checkpoints,
    partial_checkpoint,
    remove,
    remove_leftovers,
    seal_files,
)
from finetune.storage.run_dir import RunFolder


def result(run):
    return json.loads((run / "result.json").read_text())


def test_all_that_a_resumed_run_needs_has_reached_the_disk(tmp_path, monkeypatch, recipe_file):
    """Every file and every list of names, the parent's too: one that did not is lost by a power failure."""
    run = RunFolder(tmp_path / "run")
    synced = set()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), fsync(file)))
    run.create(read_recipe(str(recipe_file)))
    run.append_metrics({"step": 1})
    partial = partial_checkpoint(run.path, 1)
    (partial / "shards").mkdir(parents=True)
    for name in ("progress.json", "shards/0.bin"):
        (partial / name).write_text(name)
    run.finish_checkpoint(partial, seal_files(partial, file_names(partial)), keep=2)
    needed = [tmp_path, run.path, *run.path.rglob("*")]
    assert len(needed) == 10
    assert [path for path in needed if path.stat().st_ino not in synced] == []


@pytest.fixture
def run(pretrain, tmp_path):
    """Stopped after its first step, which was saved and not evaluated; keeps one checkpoint."""
    options = ("--output-dir", "run", "--keep-checkpoints", 1, "--save-every", 1, "--eval-every", 50)
    assert pretrain(*options, "--max-minutes", 1e-9).code == 124
    return tmp_path / "run"


def test_what_is_no_checkpoint_of_ours_is_neither_taken_nor_deleted(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for name in ("step-0000003", "step-0000003.bak", "step-best", "step-", ".step-0000004.partial", ".step-notes"):
        (checkpoints / name).mkdir(parents=True)
    (checkpoints / "step-0000009").touch()
    assert named_checkpoints(tmp_path) == [checkpoints / "step-0000003"]
    remove_leftovers(tmp_path)
    left = {path.name for path in checkpoints.iterdir()}
    assert left == {"step-0000003", "step-0000003.bak", "step-best", "step-", "step-0000009", ".step-notes"}


def test_a_linked_checkpoint_loses_its_link_only(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "model").touch()
    (tmp_path / "checkpoints").mkdir()
    links = [tmp_path / "checkpoints" / name for name in ("step-0000003", ".step-0000001.old")]
    for link in links:
        link.symlink_to(tmp_path / "disk")
    remove(links[0])
    remove_leftovers(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert (tmp_path / "disk" / "model").exists()


def test_a_run_goes_on_beside_copies_and_with_its_checkpoints_on_another_disk(pretrain, run, tmp_path):
    checkpoints = run / "checkpoints"
    checkpoints.rename(tmp_path / "disk")
    checkpoints.symlink_to(tmp_path / "disk")
    shutil.copytree(checkpoints / "step-0000001", checkpoints / "step-0000001.bak")
    resumed = pretrain("--resume", checkpoints / "step-0000001", "--max-minutes", 0)
    assert resumed.code == 0, resumed.err
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-0000001.bak", "step-0000006"]
    assert result(run)["step"] == 6


def test_a_limit_lowered_to_a_step_that_was_not_evaluated_is_refused(pretrain, run):
    assert pretrain("--resume", run).code == 124
    check_refused(pretrain("--resume", run, "--max-steps", 2), "already at step 2", "--max-steps")
    assert pretrain("--resume", run, "--max-minutes", 0).code == 0
    (run / "result.json").unlink()
    check_refused(pretrain("--resume", run, "--max-steps", 5), "already at step 6", "--max-steps")
    assert pretrain("--resume", run).code == 0
    assert result(run)["step"] == 6
