"""The recipes of record fit their GPUs by the estimate of their own options, and train and resume with them."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace

import pytest
from helpers.finetune_chat import make_base
from torch.distributed._tools.mem_tracker import MemTracker

from benchmarks.training import recipe_peaks
from benchmarks.training.memory_peaks import tracked_bytes
from finetune.config.reading import SFT_RECIPES
from finetune.config.sft_recipe import resolve
from finetune.sft import parse
from muon8bit.cli import main as muon8bit
from muon8bit.estimate import LABELS, Estimator, Setup, load_config

NAMES = tuple(recipe_peaks.MOST)
SMALL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 640,
    "head_dim": 32,
    "max_position_embeddings": 256,
}


@pytest.mark.parametrize("name", NAMES)
def test_estimate_of_a_recipes_own_options_is_what_it_says_and_fits(name, capsys):
    """The command in its first lines asks for what the recipe does, and gives the figures that stand there."""
    recipe = recipe_peaks.recipe_of(name)
    head = (SFT_RECIPES / f"{name}.yaml").read_text().split("\nmodel:")[0]
    command = next(line.removeprefix("#") for line in head.splitlines() if "muon8bit estimate" in line)
    assert muon8bit([*shlex.split(command)[1:], "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert estimate["model"] == recipe_peaks.preset_of(recipe)
    assert Setup(**estimate["setup"]) == recipe_peaks.setup_of(recipe)
    peaks = {key: memory["peak_bytes"] / 2**30 for key, memory in estimate["optimizers"].items()}
    column = recipe_peaks.column_of(recipe)
    said = re.findall(r"(\d+\.\d+) GiB", head)
    assert said[0] == f"{peaks[column]:.2f}"
    assert said[1:] in ([], [f"{peaks['muon8bit']:.2f}"])
    assert f"({LABELS[column]})" in " ".join(head.split())
    gib = int(name.rpartition("_")[2].removesuffix("gb"))
    assert f"GPU of {gib} GiB" in head
    assert peaks[column] <= recipe_peaks.MOST[name] <= gib - 1.5  # the CUDA context and fragmentation need room


@pytest.mark.parametrize("name", [name for name in NAMES if "full" in name])
def test_the_run_to_keep_beside_a_recipe_is_adamws_own(name):
    """The options that its first lines give are taken together with it, and are those of a run without the recipe."""
    head = (SFT_RECIPES / f"{name}.yaml").read_text().split("\nmodel:")[0]
    options = next(line.removeprefix("#").split() for line in head.splitlines() if "--optimizer" in line)
    recipe, _ = parse(["--recipe", name, *options])
    default, _ = resolve(parse(["--model", recipe.model, "--mode", "full", "--optimizer", "adamw"])[0], 1000, 1)
    for key in ("optimizer", "lr", "clip", "param_rounding", "adamw_bits", "release_gradients", "mixed_precision"):
        assert getattr(recipe, key) == getattr(default, key), key
    assert recipe.dtype == "fp32"  # AdamW's updates are too small for bf16 weights rounded to nearest


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_model_trains_with_a_recipes_options_and_resumes_to_the_bit(name, tmp_path, chats, sft):
    base = make_base(tmp_path / "base", tie_word_embeddings="3b" in name)
    shorter = {
        "--max-steps": 4,
        "--warmup-steps": 1,
        "--save-every": 2,
        "--eval-every": 2,
        "--validation-fraction": 0.2,
    }
    own = {"--model": base, "--dataset": chats, "--seq-len": 96, "--num-answers": 1, "--answer-tokens": 4}
    options = [word for pair in {**own, **shorter}.items() for word in pair]
    for folder in ("whole", "crashed"):
        outcome = sft("--recipe", name, *options, "--output-dir", folder)
        assert outcome.code == 0, outcome.err
    (tmp_path / "crashed" / "checkpoints" / "step-0000004").rename(tmp_path / "lost")
    resumed = sft("--resume", "crashed")
    assert resumed.code == 0, resumed.err
    whole, crashed = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "crashed")
    )
    for one, other in zip(whole, crashed, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    hashes = [
        json.loads((tmp_path / run / "result.json").read_text())["parameter_hashes"] for run in ("whole", "crashed")
    ]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("name", [name for name in NAMES if "full" in name])
def test_steps_of_a_recipe_take_the_estimates_memory(name):
    """All tensors of a small model on a CPU, in the second step: 1.0001 and 1.0020 of it on a CPU with AVX-512."""
    recipe, config = recipe_peaks.recipe_of(name), load_config(recipe_peaks.preset_of(recipe_peaks.recipe_of(name)))
    config.update({**recipe_peaks.TINY, **SMALL})
    recipe = replace(recipe, seq_len=256, loss_chunk=64)
    estimate = Estimator(config).estimate(replace(recipe_peaks.setup_of(recipe), device="cpu"))
    training = recipe_peaks.RecipeTraining(recipe, config)
    training.step()
    external = (
        training.model,
        *(optimizer.optimizer for optimizer in training.optimizers),
        *training.batches[0].values(),
    )
    measured = tracked_bytes(MemTracker(), training.step, *external)
    assert measured == pytest.approx(estimate.peak_bytes(recipe_peaks.column_of(recipe)), rel=0.02)


def test_the_measurement_of_their_peaks_goes_through_dry(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipe_peaks.py", "--dry-run", "--out", str(tmp_path / "record.json")])
    assert recipe_peaks.main() == 0
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert [row["recipe"] for row in rows] == list(NAMES)
    assert {row["measured_gib"] for row in rows} == {"dry run"}
