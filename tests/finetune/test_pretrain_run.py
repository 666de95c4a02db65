"""Whole runs: what they leave behind, and that a stopped run continues to the bit."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.bitwise import assert_nested_equal
from helpers.refusals import check_refused
from safetensors.torch import load_file

from finetune.command_line import outlasting_readers
from finetune.parallel.stopping import StopSignal
from finetune.setup import prepare
from finetune.storage import plots
from finetune.storage.checkpoints import complete, file_names, seal_files
from finetune.training import stepping, trainer
from muon8bit.cli import main as muon8bit
from muon8bit.estimate import gib

ROOT = Path(__file__).resolve().parents[2]
# Take the standard input, a terminal, for one's own, and become the command that follows.
IN_A_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


@pytest.fixture(autouse=True)
def signals_of_a_shell():
    """A suite that runs in the background or under nohup ignores some of them, and its processes inherit that."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [(m["step"], m["loss"], m["lr"], m["val_loss"], m["tokens"]) for m in metrics(folder)]


def weights(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


@pytest.mark.parametrize(
    "optimizer",
    [
        ["muon8bit"],
        ["muon8bit", "--codebook", "dynamic"],
        ["muon8bit", "--dtype", "bf16"],
        ["muon8bit", "--release-gradients", "--clip", "0", "--clip-matrix-norm", "0.01", "--loss-chunk", "24"],
        ["muon8bit", "--adamw-bits", "8"],
        ["muon8bit", "--state-device", "cpu"],
        ["normuon8bit", "--preset", "modded", "--adamw-lr", "3e-3"],
        ["adamuon8bit"],
        ["muon"],
        ["adamw"],
    ],
    ids=" ".join,
)
def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(pretrain, tmp_path, optimizer):
    options = ["--optimizer", *optimizer]
    whole = pretrain(*options, "--output-dir", "whole")
    assert whole.code == 0, whole.err
    # The same run with its later steps lost, as after a crash: one checkpoint, and metrics that go beyond it.
    crashed = pretrain(*options, "--output-dir", "crashed")
    assert crashed.code == 0
    folder = tmp_path / "crashed"
    for lost in (folder / "checkpoints").glob("step-*6"):
        for file in lost.iterdir():
            file.unlink()
        lost.rmdir()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    resumed = pretrain("--resume", "crashed")
    assert resumed.code == 0, resumed.err
    assert "at step 3" in resumed.out
    assert losses(folder) == losses(tmp_path / "whole")
    assert [m["step"] for m in metrics(folder)] == [1, 2, 3, 4, 5, 6]
    expected = weights(tmp_path / "whole")
    for name, value in weights(folder).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_run_saved_compiled_resumes_uncompiled_and_the_reverse_to_the_bit(pretrain, tmp_path, compiling, by_layer):
    """As `accelerate launch --dynamo_backend` compiles; what every run leaves has the names of the model inside."""
    assert pretrain("--optimizer", "adamw", "--output-dir", "plain").code == 0
    shutil.copytree("plain", "expected")
    compiling(by_layer)
    compiled = pretrain("--optimizer", "adamw", "--output-dir", "compiled")
    assert compiled.code == 0, compiled.err
    check_same_weights_and_moments(tmp_path / "compiled", tmp_path / "expected")
    for run in ("plain", "compiled"):
        shutil.rmtree(f"{run}/checkpoints/step-0000006")
        shutil.rmtree(f"{run}/model")
    for run, layers in (("plain", by_layer), ("compiled", None)):
        compiling(layers)
        resumed = pretrain("--resume", run)
        assert resumed.code == 0, resumed.err
        assert "at step 3" in resumed.out
        check_same_weights_and_moments(tmp_path / run, tmp_path / "expected")


def check_same_weights_and_moments(run, expected):
    for step in ("step-0000003", "step-0000006"):
        one, other = (folder / "checkpoints" / step for folder in (run, expected))
        assert_nested_equal(load_file(one / "model.safetensors"), load_file(other / "model.safetensors"))
        assert_nested_equal(torch.load(one / "optimizer.bin"), torch.load(other / "optimizer.bin"))
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (run, expected))
    assert_nested_equal(one, other)
    one, other = (json.loads((folder / "result.json").read_text()) for folder in (run, expected))
    assert one["parameter_hashes"] == other["parameter_hashes"]


def tracked(folder):
    """Tag -> steps and values in a run's TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (path for path in folder.rglob("events.out.tfevents*") if "tiny" in str(path.parent.relative_to(folder)))
    events = EventAccumulator(str(file)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_run_leaves_everything_it_promises(pretrain, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    outcome = pretrain("--tracker", "tensorboard")
    assert outcome.code == 0, outcome.err
    folder = (tmp_path / "runs" / "latest").resolve()
    assert folder.parent == tmp_path / "runs"
    assert folder.name.startswith("tiny-")
    lines = outcome.out.strip().splitlines()
    assert lines[0] == lines[-1] == f"run folder: {folder}"
    assert "world size 1" in outcome.out
    records = metrics(folder)
    assert [m["step"] for m in records] == list(range(1, 7))
    for record in records:
        assert {"step", "loss", "lr", "val_loss", "tokens", "seconds"} <= set(record)
        assert (record["val_loss"] is None) == (record["step"] % 2 == 1)
        assert record["tokens"] == record["step"] * 4 * 32
        assert "corpus" not in record
    assert records[0]["loss"] == pytest.approx(math.log(288), abs=0.2)
    assert records[-1]["loss"] < records[0]["loss"]
    rates = [m["lr"] for m in records]
    assert rates[0] == 0
    assert max(rates) == rates[2] == 3e-3
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    scalars = tracked(folder)
    assert [step for step, _ in scalars["tokens_per_second"]] == [1, 2, 3, 4, 5, 6]
    assert all(value > 0 for _, value in scalars["tokens_per_second"])
    assert all(2**20 < value < 2**40 for _, value in scalars["peak_bytes"])
    report = json.loads((folder / "state_report.json").read_text())
    assert str(report["total_bytes"]) in outcome.out.replace(",", "")
    result = json.loads((folder / "result.json").read_text())
    assert f"{result['bigram_val_loss']:.4f}" in outcome.out
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["script"], facts["name"], facts["optimizer"]) == ("pretrain", "tiny", "muon8bit")
    assert all(result[key] == facts[key] for key in ("corpus", "tokenizer", "python", "torch", "val_loss_before"))
    assert facts["val_loss_before"] == pytest.approx(math.log(288), abs=0.2)
    assert f"step 0: validation {facts['val_loss_before']:.4f}" in outcome.out
    assert result["state_bytes"] == report["total_bytes"]
    # The saved model and tokenizer give the recorded validation loss.
    from finetune.config.recipe import read_recipe
    from finetune.data.corpus import open_corpus
    from finetune.models.tokens import token_cache

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert tokenizer.decode(tokenizer("abc def.")["input_ids"]) == "abc def."
    cache = token_cache(open_corpus(read_recipe(str(folder / "recipe.yaml"))), tokenizer)
    ids = torch.tensor(cache.validation[: (len(cache.validation) - 1) // 32 * 32 + 1].astype("int64"))
    with torch.no_grad():
        logits = model(input_ids=ids[:-1].view(-1, 32)).logits
    loss = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[1:]))
    assert loss == pytest.approx(records[-1]["val_loss"], rel=1e-5)
    assert loss == pytest.approx(result["val_loss"], rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(loss / math.log(2) / cache.bytes_per_token, rel=1e-5)


def test_latest_is_the_last_run_and_resumes_to_more_steps(pretrain, tmp_path):
    first = pretrain("--optimizer", "adamw")
    second = pretrain("--optimizer", "muon8bit", "--seed", 1)
    assert first.code == second.code == 0
    folders = sorted(p for p in (tmp_path / "runs").iterdir() if not p.is_symlink())
    assert len(folders) == 2
    assert pretrain("--resume", "latest").code == 2  # nothing left to do
    more = pretrain("--resume", "latest", "--max-steps", 8, "--step-timeout", 5)
    assert more.code == 0, more.err
    assert yaml.safe_load((tmp_path / "runs" / "latest" / "recipe.yaml").read_text())["step_timeout"] == 5
    assert f"run folder: {(tmp_path / 'runs' / 'latest').resolve()}" in more.out
    assert sorted(len(metrics(f)) for f in folders) == [6, 8]


@pytest.mark.parametrize("script", ["pretrain", "sft"])
def test_a_run_resumed_to_another_length_steps_by_the_new_schedule_at_once(script, request, tmp_path, monkeypatch):
    """The rates of all groups are those of the cosine over the new length, written out here."""
    run, asked = request.getfixturevalue(script), {"--lr": 3e-3, "--adamw-lr": 1e-3, "--warmup-steps": 2}
    options = [x for pair in asked.items() for x in pair]
    if script == "sft":
        options += ["--mode", "full", "--num-answers", 0]
    assert run(*options, "--output-dir", "run").code == 0
    taken = []

    def noted(run):
        taken.append([(g["initial_lr"], g["lr"]) for o in run.optimizers for g in o.param_groups])
        return stepping.one_step(run)

    monkeypatch.setattr(trainer, "one_step", noted)
    for checkpoint, steps in ((6, 8), (3, 5)):
        taken.clear()
        folder = tmp_path / "run" / "checkpoints" / f"step-{checkpoint:07}"
        resumed = run("--resume", folder, "--max-steps", steps, "--eval-every", 100)
        assert resumed.code == 0, resumed.err
        assert f"the cosine schedule of lr is that of {steps} steps from step {checkpoint + 1} on" in resumed.out
        assert len(taken) == steps - checkpoint
        for step, groups in enumerate(taken, start=checkpoint):
            factor = 0.5 * (1 + math.cos(math.pi * (step - 2) / (steps - 2)))
            assert {base for base, _ in groups} == {3e-3, 1e-3}
            assert [lr for _, lr in groups] == pytest.approx([base * factor for base, _ in groups], rel=1e-12)


def change_facts(checkpoint, facts):
    """Change what a checkpoint says about its run, and seal it again."""
    progress = checkpoint / "progress.json"
    record = json.loads(progress.read_text())
    progress.write_text(json.dumps(record | {"facts": record["facts"] | facts}))
    files = seal_files(checkpoint, file_names(checkpoint))
    complete(checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.partial")), files)


@pytest.fixture
def finished(pretrain, tmp_path, texts):
    """A run with its own copy of the texts."""
    import shutil

    shutil.copytree(texts, tmp_path / "mine")
    outcome = pretrain("--dataset", "mine", "--output-dir", "done", "--optimizer", "adamw")
    assert outcome.code == 0, outcome.err
    return tmp_path / "done"


def test_a_checkpoint_of_another_run_is_refused_and_kept(pretrain, finished, tmp_path, texts):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    config = {**yaml.safe_load((finished / "recipe.yaml").read_text())["model"], "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    cases = [
        (["--optimizer", "muon"], ["--optimizer", "'adamw'"]),
        (["--seq-len", "16"], ["--seq-len", "32"]),
        (["--lr", "1e-4"], ["--lr", "0.003"]),
        (["--model-config", "config.json"], ["--model-config", "another model"]),
        (["--output-dir", "elsewhere"], ["--output-dir"]),
    ]
    for args, words in cases:
        outcome = pretrain("--resume", finished, "--max-steps", 8, *args)
        assert outcome.code == 2
        assert outcome.err.count("\n") == 1
        assert all(word in outcome.err for word in words), outcome.err
    (tmp_path / "mine" / "text01.txt").write_text("now another text, and much longer\n" * 9)
    outcome = pretrain("--resume", finished, "--max-steps", 8)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "--dataset" in outcome.err
    assert "another corpus" in outcome.err
    # A checkpoint whose record does not fit the recipe beside it is found out as well.
    last = finished / "checkpoints" / "step-0000006"
    change_facts(last, {"model_config": "0" * 64})
    outcome = pretrain("--resume", finished, "--max-steps", 8, "--dataset", texts)
    assert outcome.code == 2
    assert "another model" in outcome.err
    for name in ("progress.json", "manifest.json"):
        (last / name).write_bytes(before[last / name])
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_a_checkpoint_of_another_launch_and_one_that_does_not_load_are_refused(pretrain, finished):
    last = finished / "checkpoints" / "step-0000006"
    change_facts(last, {"world_size": 2, "parallelism": "MULTI_GPU"})
    check_refused(pretrain("--resume", finished, "--max-steps", 8), "2 processes (MULTI_GPU)", "1 processes (NO)")
    change_facts(last, {"world_size": 1, "parallelism": "NO"})
    optimizer = next(last.glob("optimizer*"))
    optimizer.write_bytes(b"not written by torch")
    change_facts(last, {})  # with a manifest that fits
    check_refused(pretrain("--resume", finished, "--max-steps", 8), "step-0000006", "cannot load", "earlier checkpoint")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(pretrain, finished, recipe_file, tmp_path):
    config = {**yaml.safe_load(recipe_file.read_text())["model"], "vocab_size": 280}
    (tmp_path / "config.json").write_text(json.dumps(config))
    outcome = pretrain("--tokenizer", finished / "model", "--model-config", "config.json", "--output-dir", "new")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    for word in ("--tokenizer", "--model-config", "288", "280"):
        assert word in outcome.err
    assert not (tmp_path / "new").exists()


def test_a_run_that_crashed_while_saving_its_model_is_completed(pretrain, finished):
    import shutil

    expected = weights(finished)
    shutil.rmtree(finished / "model")
    outcome = pretrain("--resume", finished)
    assert outcome.code == 0, outcome.err
    assert all(torch.equal(value, expected[name]) for name, value in weights(finished).items())
    assert len(metrics(finished)) == 6


def test_activation_checkpointing_and_bf16_change_the_arithmetic_little(pretrain, tmp_path):
    for name, options in (("a", []), ("b", ["--activation-checkpointing"]), ("c", ["--mixed-precision", "bf16"])):
        outcome = pretrain("--output-dir", name, "--max-steps", 3, *options)
        assert outcome.code == 0, outcome.err
    plain, recomputed, half = (losses(tmp_path / name) for name in "abc")
    assert recomputed == plain
    assert half != plain
    assert [m[1] for m in half] == pytest.approx([m[1] for m in plain], rel=2e-2)


def test_health_is_measured_and_a_resumed_run_says_that_it_restarts(pretrain, tmp_path, monkeypatch):
    """The run is the one without it, to the bit."""
    assert pretrain("--output-dir", "plain").code == 0
    outcome = pretrain("--output-dir", "watched", "--health-every", 2, "--max-steps", 6)
    assert outcome.code == 0, outcome.err
    assert losses(tmp_path / "watched") == losses(tmp_path / "plain")
    assert re.search(r"step 4: 8-bit momenta keep 9\d\.\d+% of the descent and more, least in model\.", outcome.out)
    assert "what 8 bits did to the updates" in outcome.out
    records = metrics(tmp_path / "watched")
    assert [m["step"] for m in records if "health" in m] == [2, 4, 6]
    assert len(records[1]["health"]) == 4
    result = json.loads((tmp_path / "watched" / "result.json").read_text())["health"]
    name, measures = next(iter(records[5]["health"].items()))
    assert {key: result["last"][name][key] for key in measures} == measures
    logged = []
    monkeypatch.setattr("accelerate.Accelerator.log", lambda _, values, **__: logged.append(values))
    more = pretrain("--resume", "watched", "--max-steps", 8)
    assert more.code == 0, more.err
    assert "after step 0 a state was loaded" in more.out
    assert [m["step"] for m in metrics(tmp_path / "watched") if "health" in m] == [2, 4, 6, 8]
    assert logged[-1][f"health/descent/{name}"] == metrics(tmp_path / "watched")[7]["health"][name]["descent"]


def test_spectra_are_those_of_the_weights_and_the_updates_and_change_nothing(pretrain, tmp_path, monkeypatch):
    assert pretrain("--output-dir", "plain", "--max-steps", 4).code == 0
    options = ("--spectra-every", 2, "--max-steps", 4, "--save-every", 1, "--keep-checkpoints", 4)
    logged = {}
    monkeypatch.setattr("accelerate.Accelerator.log", lambda _, values, step: logged.setdefault(step, values))
    outcome = pretrain("--output-dir", "seen", *options)
    assert outcome.code == 0, outcome.err
    assert losses(tmp_path / "seen") == losses(tmp_path / "plain")
    found = {m["step"]: m["spectra"] for m in metrics(tmp_path / "seen") if "spectra" in m}
    assert list(found) == [2, 4]
    assert json.loads((tmp_path / "seen" / "result.json").read_text())["spectra"] == [[k, v] for k, v in found.items()]
    before, after = (
        load_file(next((tmp_path / "seen" / "checkpoints" / f"step-{n:07}").rglob("*.safetensors"))) for n in (3, 4)
    )
    names = [name for name in after if re.search(r"[qk]_proj", name)]
    for kind, values in (("weights", after), ("updates", {name: after[name] - before[name] for name in names})):
        energies = [np.linalg.svd(values[name].double().numpy(), compute_uv=False) ** 2 for name in names]
        shares = [energy / energy.sum() for energy in energies]
        entropy = np.mean([-(q * np.log(q)).sum() / np.log(len(q)) for q in shares])
        assert found[4][kind]["QK"]["entropy"] == pytest.approx(entropy, rel=1e-4)
        assert logged[4][f"spectra/{kind}/entropy/QK"] == found[4][kind]["QK"]["entropy"]
    assert not any(name.startswith("spectra") for name in logged[3])


def test_init_from_continues_from_the_trained_weights(pretrain, finished, tmp_path):
    outcome = pretrain("--init-from", finished / "model", "--output-dir", "on", "--dataset", "mine")
    assert outcome.code == 0, outcome.err
    assert metrics(tmp_path / "on")[0]["loss"] < metrics(finished)[0]["loss"] - 0.3


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_parameter(pretrain, tmp_path, monkeypatch):
    accumulate = stepping.accumulate_gradients

    def poisoned(accelerator, model, *more):
        loss = accumulate(accelerator, model, *more)
        model.get_parameter("model.layers.0.mlp.up_proj.weight").grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(stepping, "accumulate_gradients", poisoned)
    outcome = pretrain("--output-dir", "bad")
    assert outcome.code == 1
    assert "step 1" in outcome.err
    assert "model.layers.0.mlp.up_proj.weight" in outcome.err
    assert metrics(tmp_path / "bad") == []


@pytest.mark.parametrize("optimizer", ["muon8bit", "adamw"])
def test_a_step_that_is_read_after_the_next_one_leaves_the_same_logs_and_weights(
    pretrain, tmp_path, monkeypatch, optimizer
):
    """As on a GPU, whose work is not done when a call returns: reading at once would wait."""
    options = ("--optimizer", optimizer, "--save-every", 4, "--eval-every", 3, "--max-steps", 7)
    assert pretrain(*options, "--output-dir", "at_once").code == 0
    read, order = stepping.read_step, []
    queue = stepping.one_step
    monkeypatch.setattr(trainer, "reads_later", lambda _run: True)
    monkeypatch.setattr(stepping, "reads_later", lambda _run: True)
    monkeypatch.setattr(trainer, "one_step", lambda run: order.append(f"queue {run.step + 1}") or queue(run))
    monkeypatch.setattr(trainer, "read_step", lambda run, step: order.append(f"read {step.step}") or read(run, step))
    outcome = pretrain(*options, "--output-dir", "later")
    assert outcome.code == 0, outcome.err
    words = {"q": "queue", "r": "read"}
    short = "q1 q2 r1 q3 r2 r3 q4 r4 q5 q6 r5 r6 q7 r7"  # read at once where it is evaluated or saved
    assert order == [f"{words[word[0]]} {word[1]}" for word in short.split()]
    for one, other in zip(metrics(tmp_path / "at_once"), metrics(tmp_path / "later"), strict=True):
        assert list(one) == list(other)
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert all(torch.equal(weights(tmp_path / "at_once")[n], p) for n, p in weights(tmp_path / "later").items())


@pytest.mark.parametrize("optimizer", ["muon8bit", "adamw"])
def test_a_bad_gradient_that_is_read_late_is_told_of_its_own_step_and_never_saved(
    pretrain, tmp_path, monkeypatch, optimizer
):
    accumulate, calls = stepping.accumulate_gradients, []

    def poisoned(accelerator, model, *more):
        loss = accumulate(accelerator, model, *more)
        calls.append(1)
        if len(calls) == 2:
            model.get_parameter("model.layers.0.mlp.up_proj.weight").grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(stepping, "accumulate_gradients", poisoned)
    for module in (trainer, stepping):
        monkeypatch.setattr(module, "reads_later", lambda _run: True)
    outcome = pretrain("--output-dir", "bad", "--optimizer", optimizer, "--eval-every", 9, "--save-every", 3)
    assert outcome.code == 1
    assert "step 2: the gradient of model.layers.0.mlp.up_proj.weight is not finite" in outcome.err
    assert [m["step"] for m in metrics(tmp_path / "bad")] == [1]
    assert not list((tmp_path / "bad").glob("checkpoints/*"))


@pytest.mark.parametrize("release", [(), ("--release-gradients", "--clip", 0)], ids=["", "released"])
def test_a_last_step_that_breaks_the_weights_is_no_complete_run(pretrain, tmp_path, release):
    outcome = pretrain("--output-dir", "bad", "--lr", 1e38, "--max-steps", 1, "--warmup-steps", 0, *release)
    assert outcome.code == 1
    assert "step 1: the weights that it leaves have no finite validation loss" in outcome.err
    assert metrics(tmp_path / "bad") == []
    assert not any((tmp_path / "bad" / name).exists() for name in ("result.json", "model", "checkpoints"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_saves_and_ends_with_the_command_that_resumes(pretrain, tmp_path, monkeypatch, number):
    queue = trainer.one_step

    def interrupted(run):
        if run.step == 4:
            os.kill(os.getpid(), number)
        return queue(run)

    before = signal.signal(number, signal.SIG_DFL)  # a test that is started in the background ignores some
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "one_step", interrupted)
        stopped = pretrain("--output-dir", "run", "--max-steps", 100, "--save-every", 100)
    signal.signal(number, before)
    assert stopped.code == 128 + number, stopped.err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000005"]
    *_, folder, said, command = stopped.out.splitlines()
    assert folder == f"run folder: {tmp_path / 'run'}"
    assert said == "stopped at step 5 of 100 and saved; to resume:"
    interpreter, *command = command.split()
    assert [interpreter, *command] == [
        *(sys.executable, str(ROOT / "finetune" / "pretrain.py")),
        *("--resume", str(tmp_path / "run")),
    ]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")  # of the evaluations until then
    resumed = pretrain(*command[1:], "--max-steps", 7)
    assert resumed.code == 0, resumed.err
    assert [m["step"] for m in metrics(tmp_path / "run")] == list(range(1, 8))


@pytest.mark.parametrize("place", ["trainer._train", "prepare.bigram_loss", "prepare.build_model"])
def test_a_stop_before_the_first_step_says_so_and_that_its_folder_can_go(
    pretrain, command, tmp_path, monkeypatch, place
):
    from finetune.chat_with import main as chat
    from finetune.compare import main as compare

    module, name = place.split(".")
    folder = tmp_path / "early"
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        before, stop = signal.getsignal(number), partial(signal.raise_signal, number)
        with monkeypatch.context() as patch:
            patch.setattr({"trainer": trainer, "prepare": prepare}[module], name, lambda *_, stop=stop: stop())
            early = pretrain("--output-dir", "early")
        assert signal.getsignal(number) == before
        assert early.code == code
        gone = f" ({folder} can be deleted)" if folder.exists() else ""
        last = f"stopped before the first step: nothing to resume; start anew{gone}"
        assert early.err.splitlines()[-1] == last
        assert folder.exists() == (name != "build_model")
        if folder.exists():
            check_refused(pretrain("--output-dir", "early"), "--output-dir", "no checkpoint", "delete")
            check_refused(pretrain("--resume", "early"), "--resume", "nothing to resume", "start anew", "delete")
            check_refused(command(chat, "early"), "RUN", "no checkpoint", "delete", "start it anew")
            check_refused(command(compare, "early"), "RUN", "no step")
            check_refused(command(compare, "."), "RUN", "no run in . has a step")
            shutil.rmtree(folder)


def test_ctrl_c_after_the_loop_tells_what_can_be_resumed(pretrain, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_finish", interrupted)
    late = pretrain("--output-dir", "late")
    assert late.code == 130
    assert late.err.splitlines()[-1].split()[1:] == [
        str(ROOT / "finetune" / "pretrain.py"),
        *("--resume", str(tmp_path / "late")),
    ]
    monkeypatch.setattr(prepare, "build_model", interrupted)
    again = pretrain("--resume", "late", "--max-steps", 8)
    assert again.code == 130
    assert again.err.splitlines()[-1] == f"stopped before another step; {tmp_path / 'late'} is as it was: resume it"


def long_run(recipe_file, tmp_path, read_end, *before, **streams):
    """Start a run that would not end, close the only reader of what it prints in its midst, return its exit code."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    options = ["--recipe", recipe_file, "--output-dir", "run", "--max-steps", "100000", "--save-every", "100000"]
    words = [*before, sys.executable, "-m", "finetune.pretrain", *map(str, options)]
    process = subprocess.Popen(words, cwd=tmp_path, env=env, start_new_session=True, **streams)
    for stream in {number for number in streams.values() if number >= 0}:
        os.close(stream)
    file = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (file.exists() and file.read_text().count("\n") >= 3):
        os.read(read_end, 2**16)
    os.close(read_end)
    return process.wait(600)


def has_saved_its_last_step(folder):
    (checkpoint,) = (folder / "checkpoints").iterdir()
    return checkpoint.name == f"step-{metrics(folder)[-1]['step']:07}"


def test_a_closed_terminal_saves_and_an_ignored_hangup_does_not_count(recipe_file, tmp_path):
    """What is printed to a terminal that is gone fails; under nohup SIGHUP is ignored."""
    ours, theirs = pty.openpty()
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    code = long_run(recipe_file, tmp_path, ours, sys.executable, "-c", IN_A_TERMINAL, **streams)
    assert code == 128 + signal.SIGHUP
    assert has_saved_its_last_step(tmp_path / "run")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal().listening() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("streams", [("stdout",), ("stderr",), ("stdout", "stderr")], ids="+".join)
def test_a_pipe_that_loses_its_reader_saves_like_a_closed_terminal(recipe_file, tmp_path, streams):
    """As behind `| tee` where that is killed, or behind ssh without a terminal; no signal comes."""
    ours, theirs = os.pipe()
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **dict.fromkeys(streams, theirs)}
    assert long_run(recipe_file, tmp_path, ours, **pipes) == 128 + signal.SIGHUP
    assert has_saved_its_last_step(tmp_path / "run")


def test_a_write_that_learns_first_of_a_closed_terminal_counts_as_its_signal(monkeypatch):
    """The signal may be on its way when the write fails."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        with outlasting_readers(), StopSignal().listening() as stop:
            os.close(ours)
            print("lost", flush=True)
            assert stop.code == 128 + signal.SIGHUP
            print("lost too", flush=True)
        assert sys.stdout is terminal


def test_a_run_is_resumed_by_its_own_script(sft, finished):
    check_refused(sft("--resume", finished), "--resume", f"python -m finetune.pretrain --resume {finished}")


def test_a_run_of_0_1_resumes_and_its_records_stay(pretrain, finished):
    """Its metrics had facts on every line; it had no run.json, and did not evaluate before the first step."""
    (finished / "run.json").unlink()
    last = finished / "checkpoints" / "step-0000006"
    record = json.loads((last / "progress.json").read_text())
    del record["facts"]["val_loss_before"]
    (last / "progress.json").write_text(json.dumps(record))
    change_facts(last, {})
    old = [{**m, "corpus": record["facts"]["corpus"], "python": record["facts"]["python"]} for m in metrics(finished)]
    (finished / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in old))
    outcome = pretrain("--resume", finished, "--max-steps", 8)
    assert outcome.code == 0, outcome.err
    assert metrics(finished)[:6] == old
    assert [m["step"] for m in metrics(finished)] == list(range(1, 9))
    assert "val_loss_before" not in json.loads((finished / "run.json").read_text())
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_smoothing_weighs_losses_by_their_distance_and_begins_at_the_first():
    assert plots.smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    losses = [math.sin(i) for i in range(200)]
    beta = 1 - 2 / 11  # a span of 10 of 200
    for at, value in list(enumerate(plots.smooth(losses)))[::37]:
        weights = [beta ** (at - i) for i in range(at + 1)]
        expected = math.fsum(w * x for w, x in zip(weights, losses, strict=False)) / math.fsum(weights)
        assert value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("num", "label"), [(20, "training"), (60, "training, smoothed")])
def test_the_picture_says_smoothed_where_it_is(tmp_path, monkeypatch, num, label):
    from matplotlib.figure import Figure

    found = []

    def noted(figure, beside, **_):
        found.extend(text.get_text() for text in figure.axes[0].get_legend().get_texts())
        beside.touch()

    monkeypatch.setattr(Figure, "savefig", noted)
    records = [{"step": i, "loss": 1 / i, "val_loss": None} for i in range(1, num + 1)]
    plots.plot_losses([plots.LossCurve("run", records)], tmp_path / "loss.png", "title")
    assert found == [label, "validation"]


def test_two_ranks_train_one_model_on_the_data_of_one(recipe_file, pretrain, tmp_path):
    """torchrun with two processes: equal parameters on both, and the losses of one process that accumulates."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "CUDA_VISIBLE_DEVICES": ""}
    script = str(ROOT / "finetune" / "pretrain.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--recipe", str(recipe_file), "--output-dir", "two", "--batch-size", "2"]
    done = subprocess.run(
        [*launch, script, *options],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "world size 2" in done.stdout
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["world_size"] == 2
    assert len(result["parameter_hashes"]) == 2
    assert len(set(result["parameter_hashes"])) == 1
    assert pretrain("--output-dir", "one", "--batch-size", 2, "--gradient-accumulation", 2).code == 0
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [m["tokens"] for m in one] == [m["tokens"] for m in two]
    # The same sequences, summed in another order: the gap grows from one fp32 rounding.
    assert [m["loss"] for m in two] == pytest.approx([m["loss"] for m in one], rel=1e-3)
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    # Neither optimizer would notice a gradient that is twice too large or too small; its norm does.
    assert [m["grad_norm"] for m in two] == pytest.approx([m["grad_norm"] for m in one], rel=1e-2)
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    assert two[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=1e-3)
    assert json.loads((tmp_path / "one" / "result.json").read_text())["parameter_hashes"] != result["parameter_hashes"]


def test_a_run_tells_its_peak_as_estimate_does_and_what_it_saves(pretrain, recipe_file, capfd):
    outcome = pretrain("--max-steps", "1", "--warmup-steps", "0", "--batch-size", "4")
    assert outcome.code == 0, outcome.err
    said = re.search(r"^estimated peak: (.*) of tensors, with full rows of (\d+) tokens$", outcome.out, re.MULTILINE)
    options = ("--recipe", str(recipe_file), "--batch-size", "4", "--device", "cpu", "--json")
    assert muon8bit(["estimate", *options]) == 0
    found = json.loads(capfd.readouterr().out)
    assert said[1] == gib(found["optimizers"][found["optimizer"]]["peak_bytes"])
    assert int(said[2]) == found["setup"]["seq"]
    state, adamw, saved = re.search(
        r"^bytes saved: the state of muon8bit takes (.*) MiB, AdamW's would take (.*) MiB, (.*) MiB more$",
        outcome.out,
        re.MULTILINE,
    ).groups()
    assert float(adamw) - float(state) == pytest.approx(float(saved), abs=0.011)
