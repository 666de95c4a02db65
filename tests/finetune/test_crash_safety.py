"""Runs whose disk fills up or decays: what a resumed run takes, what it says, and that the weights are the same."""

from __future__ import annotations

import json
import resource
import shutil
from contextlib import contextmanager

import pytest
from helpers.refusals import check_refused


def steps_saved(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def hashes(folder):
    return json.loads((folder / "result.json").read_text())["parameter_hashes"]


@contextmanager
def largest_file(num_bytes):
    """Writing beyond it fails, as on a full disk, though with another errno."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def whole(pretrain, tmp_path):
    outcome = pretrain("--output-dir", "whole")
    assert outcome.code == 0, outcome.err
    return tmp_path / "whole"


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_each_file_of_a_real_checkpoint_is_caught_and_named(pretrain, whole):
    last = whole / "checkpoints" / "step-0000006"
    files = [path for path in last.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"model.safetensors", "optimizer.bin", "random_states_0.pkl", "progress.json", "manifest.json"} <= names
    for path in files:
        content = path.read_bytes()
        flip_a_bit(path)
        check_refused(pretrain("--resume", last, "--max-steps", 8), str(last), path.name)
        path.write_bytes(content)
    assert steps_saved(whole) == ["step-0000003", "step-0000006"]


def test_resume_takes_the_newest_undamaged_checkpoint_and_names_the_skipped(pretrain, whole, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(whole, damaged)
    shutil.rmtree(damaged / "model")
    flip_a_bit(damaged / "checkpoints" / "step-0000006" / "optimizer.bin")
    (damaged / "checkpoints" / ".step-0000009.partial").mkdir()
    resumed = pretrain("--resume", damaged)
    assert resumed.code == 0, resumed.err
    (line,) = (line for line in resumed.out.splitlines() if line.startswith("skipped"))
    assert "step-0000006: optimizer.bin does not match its SHA-256" in line
    assert "step-0000003 at step 3" in resumed.out
    assert hashes(damaged) == hashes(whole)
    assert steps_saved(damaged) == ["step-0000003", "step-0000006"]
    for name in steps_saved(damaged):
        flip_a_bit(damaged / "checkpoints" / name / "model.safetensors")
    outcome = pretrain("--resume", damaged, "--max-steps", 8)
    check_refused(outcome, "step-0000003: model.safetensors", "step-0000006: model.safetensors")


def test_resuming_an_earlier_checkpoint_gives_up_the_later_ones(pretrain, whole):
    """Otherwise the newest one would be of a run that its metrics no longer tell of."""
    stopped = pretrain("--resume", whole / "checkpoints" / "step-0000003", "--save-every", 1, "--max-minutes", 1e-9)
    assert stopped.code == 124, stopped.err
    assert steps_saved(whole) == ["step-0000003", "step-0000004"]
    assert [m["step"] for m in metrics(whole)] == [1, 2, 3, 4]


def test_max_minutes_finishes_the_step_saves_and_prints_the_command_that_resumes(pretrain, whole, tmp_path):
    stopped = pretrain("--output-dir", "run", "--max-minutes", 1e-9)
    assert stopped.code == 124, stopped.err
    assert steps_saved(tmp_path / "run") == ["step-0000001"]
    assert not (tmp_path / "run" / "result.json").exists()
    command = next(line for line in stopped.out.splitlines() if "--resume" in line).split()
    for step in range(2, 7):  # the limit stays until it is changed: a chain of short jobs
        outcome = pretrain(*command[2:])
        assert outcome.code == (124 if step < 6 else 0), outcome.err
    assert hashes(tmp_path / "run") == hashes(whole)


def test_a_full_disk_while_saving_ends_the_run_and_leaves_the_checkpoint_before(pretrain, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-0000006")
    first = tmp_path / "run" / "checkpoints" / "step-0000003"
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    sizes = {path.name: len(content) for path, content in before.items()}
    # Only the optimizer's file, only the model's too, and the first file of all.
    for limit in (sizes["optimizer.bin"] // 2, sizes["model.safetensors"] // 2, 4000):
        with largest_file(limit):
            outcome = pretrain("--resume", "run")
        assert outcome.code == 1
        assert "step 6: cannot save a checkpoint" in outcome.err
        assert "MiB are free" in outcome.err
        command = outcome.err.splitlines()[-1].split()
        assert command[2:] == ["--resume", str(tmp_path / "run")]
        assert {path: path.read_bytes() for path in first.parent.rglob("*") if path.is_file()} == before
    assert pretrain(*command[2:]).code == 0
    assert hashes(tmp_path / "run") == hashes(whole)
    assert metrics(tmp_path / "run")[-1]["val_loss"] == metrics(whole)[-1]["val_loss"]


def test_a_full_disk_before_the_first_checkpoint_or_while_writing_metrics_is_said_in_one_line(pretrain, tmp_path):
    with largest_file(4000):
        outcome = pretrain("--output-dir", "first")
    assert outcome.code == 1
    assert "step 3: cannot save a checkpoint" in outcome.err
    assert "--resume" not in outcome.err
    assert steps_saved(tmp_path / "first") == []
    with largest_file(4000):
        outcome = pretrain("--output-dir", "metrics", "--max-steps", 40, "--save-every", 40)
    assert outcome.code == 1
    assert "cannot write metrics.jsonl: " in outcome.err


def test_a_full_disk_while_writing_the_model_keeps_the_model_before(pretrain, whole):
    from transformers import AutoModelForCausalLM

    size = (whole / "model" / "model.safetensors").stat().st_size
    kept = (whole / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(whole / "checkpoints" / "step-0000003")
    (whole / "result.json").unlink()
    with largest_file(size // 2):
        outcome = pretrain("--resume", whole)
    assert outcome.code == 1
    assert "cannot write the results" in outcome.err
    assert (whole / "model" / "model.safetensors").read_bytes() == kept
    assert pretrain("--resume", whole).code == 0
    assert AutoModelForCausalLM.from_pretrained(whole / "model").config.hidden_size == 32
    assert [path.name for path in whole.glob(".*")] == []
