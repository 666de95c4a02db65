"""--release-gradients in whole runs: the training of ordinary steps, no gradient kept, and bad gradients told."""

from __future__ import annotations

import json
import math

import pytest

import finetune.training.stepping as stepping

RELEASED = ("--release-gradients", "--clip", 0)
NAME = "model.layers.0.mlp.up_proj.weight"


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("limit", [(), ("--clip-matrix-norm", 0.01)], ids=["", "clipped"])
def test_released_steps_train_as_ordinary_ones_and_keep_no_gradient(pretrain, tmp_path, monkeypatch, limit):
    assert pretrain("--clip", 0, *limit, "--output-dir", "ordinary").code == 0
    accumulate, num_kept = stepping.accumulate_gradients, []

    def watched(accelerator, model, *more):
        loss = accumulate(accelerator, model, *more)
        num_kept.append(sum(p.grad is not None for p in model.parameters()))
        return loss

    monkeypatch.setattr(stepping, "accumulate_gradients", watched)
    outcome = pretrain(*RELEASED, *limit, "--output-dir", "released", "--tracker", "tensorboard")
    assert outcome.code == 0, outcome.err
    assert num_kept == [0] * 6
    ordinary, released = metrics(tmp_path / "ordinary"), metrics(tmp_path / "released")
    assert [m["loss"] for m in released] == pytest.approx([m["loss"] for m in ordinary], rel=1e-5)
    assert released[-1]["val_loss"] == pytest.approx(ordinary[-1]["val_loss"], rel=1e-5)
    assert all(m["grad_norm"] > 0 for m in ordinary)
    assert all(m["grad_norm"] is None and m["num_skipped_steps"] == 0 for m in released)
    assert result(tmp_path / "released")["num_skipped_steps"] == 0
    assert "num_skipped_steps" not in result(tmp_path / "ordinary")


@pytest.fixture
def poison(monkeypatch):
    """Let the gradient of a matrix be infinite in some calls of a run's step; returns the function that says which."""
    accumulate, calls = stepping.accumulate_gradients, []

    def poisoned(accelerator, model, *more):
        calls.append(1)
        param = model.get_parameter(NAME)
        handle = param.register_hook(lambda grad: grad * (math.inf if len(calls) in poisoned.calls else 1))
        loss = accumulate(accelerator, model, *more)
        handle.remove()
        return loss

    def choose(*which):
        calls.clear()
        poisoned.calls = which

    monkeypatch.setattr(stepping, "accumulate_gradients", poisoned)
    return choose


def test_one_bad_gradient_is_left_out_told_and_remembered_over_a_resume(pretrain, tmp_path, poison):
    poison(2, 5)
    outcome = pretrain(*RELEASED, "--output-dir", "run")
    assert outcome.code == 0, outcome.err
    lines = [line for line in outcome.out.splitlines() if "was not finite" in line]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 5"]
    assert "(2 such steps so far" in lines[1]
    counts = [m["num_skipped_steps"] for m in metrics(tmp_path / "run")]
    assert counts == [0, 1, 1, 1, 2, 2]
    assert result(tmp_path / "run")["num_skipped_steps"] == 2
    last = tmp_path / "run" / "checkpoints" / "step-0000006"
    last.rename(tmp_path / "lost")
    poison(2)  # the fifth step is the second of the resumed run
    undisturbed = metrics(tmp_path / "run")
    assert pretrain("--resume", "run").code == 0
    for one, other in zip(undisturbed, metrics(tmp_path / "run"), strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert result(tmp_path / "run")["num_skipped_steps"] == 2


def test_bad_gradients_in_two_steps_in_a_row_end_the_run(pretrain, tmp_path, poison):
    poison(4, 5)
    outcome = pretrain(*RELEASED, "--output-dir", "run", "--save-every", 4)
    assert outcome.code == 1
    assert "step 5: a gradient is not finite, as in the step before" in outcome.err
    assert "--clip-matrix-norm" in outcome.err
    assert len(metrics(tmp_path / "run")) == 4
    poison(1)  # so does the resumed run, whose first step it is
    assert pretrain("--resume", "run").code == 1


def test_a_loss_that_is_not_finite_ends_the_run_at_once(pretrain, tmp_path, monkeypatch):
    import finetune.setup.prepare as prepare

    build = prepare.build_model

    def broken(*args):
        model = build(*args)
        model.model.norm.weight.data[0] = math.nan
        return model

    monkeypatch.setattr(prepare, "build_model", broken)
    outcome = pretrain(*RELEASED, "--output-dir", "run")
    assert outcome.code == 1
    assert "step 1: the loss and its gradient are not finite" in outcome.err
    assert metrics(tmp_path / "run") == []
    assert not (tmp_path / "run" / "checkpoints").exists()
