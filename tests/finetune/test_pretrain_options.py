"""Bad options: one sentence that names the option, exit code 2, nothing written, nothing heavy imported."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.refusals import check_refused

from finetune.config.errors import InputError
from finetune.config.recipe import read_recipe
from finetune.storage.run_dir import RunFolder

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--nonsense", "1"], ["--nonsense", "--help"]),
        (["--bath-size", "1"], ["--bath-size", "did you mean --batch-size?"]),
        (["--max-seq-length", "8"], ["--max-seq-length", "did you mean --seq-len?"]),
        (["--recipe", "lama_4m"], ["lama_4m", "did you mean llama_4m?"]),
        (["--recipe", "llama_3b_lora"], ["did you mean llama_3b_lora, a recipe of sft? It must be one of gqa_100m"]),
        (["--lr", "fast"], ["--lr", "fast"]),
        (["--lr", "-1"], ["--lr", "above 0"]),
        (["--lr", "nan"], ["--lr", "finite"]),
        (["--optimizer", "sgd"], ["--optimizer", "adamw8bit"]),
        (["--batch-size", "0"], ["--batch-size", "above 0"]),
        (["--seq-len", "65"], ["--seq-len", "max_position_embeddings 64"]),
        (["--max-steps", "1", "--warmup-steps", "2"], ["--warmup-steps", "2 steps", "--max-steps"]),
        (["--schedule", "warmup_stable_decay"], ["--decay-steps", "above 0"]),
        (["--validation-fraction", "1"], ["--validation-fraction"]),
        (["--block-size", "100"], ["--block-size", "100"]),
        (["--optimizer", "muon", "--param-rounding", "stochastic"], ["--param-rounding", "give nearest", "muon8bit"]),
        (["--param-rounding", "stochastic"], ["--param-rounding", "fp32", "--dtype bf16"]),
        (["--optimizer", "adamw", "--release-gradients", "--clip", "0"], ["give --no-release-gradients", "muon8bit"]),
        (["--release-gradients"], ["--release-gradients", "--clip, here 1,", "--clip 0", "--clip-matrix-norm"]),
        (
            ["--release-gradients", "--clip", "0", "--gradient-accumulation", "2"],
            ["--release-gradients", "--gradient-accumulation 1"],
        ),
        (["--optimizer", "muon", "--clip-matrix-norm", "1"], ["--clip-matrix-norm", "muon8bit"]),
        (["--clip-matrix-norm", "-1"], ["--clip-matrix-norm", "negative"]),
        (["--health-every", "-1"], ["--health-every", "negative"]),
        (["--spectra-every", "-1"], ["--spectra-every", "negative"]),
        (["--health-every", "5", "--optimizer", "muon"], ["--health-every", "give 0", "muon8bit"]),
        (["--health-every", "5", "--bits", "32"], ["--health-every", "no 8-bit momentum", "--bits 8"]),
        (["--health-every", "5", "--release-gradients", "--clip", "0"], ["--health-every", "--no-release-gradients"]),
        (["--optimizer", "muon", "--cautious-weight-decay"], ["--cautious-weight-decay", "give --no-cautious"]),
        (
            ["--preset", "paper"],
            ["--preset", "muon8bit has no", "normuon8bit has paper, official, dion"],
        ),
        (["--optimizer", "adamuon8bit", "--preset", "dion"], ["--preset", "adamuon8bit has paper, official"]),
        (["--optimizer", "normuon8bit", "--preset", "muon"], ["--preset", "dion", "modded"]),
        (["--optimizer", "normuon8bit", "--preset", "dion"], ["--adamw-lr", "a scale of its own"]),
        (
            ["--optimizer", "adamuon8bit", "--cautious-weight-decay"],
            ["--cautious-weight-decay", "preset paper"],
        ),
        (["--optimizer", "muon", "--bits", "32"], ["--bits", "give 8", "--optimizer muon8bit"]),
        (["--optimizer", "muon8bit", "--bits", "4"], ["--bits", "8, 32"]),
        (["--cautious-weight-decay", "--weight-decay", "0"], ["--cautious-weight-decay", "--weight-decay above 0"]),
        (["--optimizer", "adamw", "--adamw-bits", "8"], ["--adamw-bits", "give 32", "muon8bit"]),
        (["--adamw-bits", "4"], ["--adamw-bits", "32"]),
        (["--optimizer", "muon", "--state-device", "cpu"], ["--state-device", "give device", "muon8bit"]),
        (["--step-timeout", "0"], ["--step-timeout", "above 0"]),
        (["--step-timeout", "1e6"], ["--step-timeout", "below 1000000 s"]),
        (["--optimizer", "adamw", "--step-timeout", "5"], ["--step-timeout", "give 60", "muon8bit"]),
        (["--loss-chunk", "-1"], ["--loss-chunk", "negative"]),
        (["--width", "40"], ["--width", "2 heads and 2 KV heads at width 32", "at 40", "32 and 48"]),
        (["--width", "8"], ["--width", "the nearest that work: 16"]),
        (["--width", "0"], ["--width", "above 0"]),
        (["--width", "32", "--init-from", "gpt2"], ["--width", "--init-from"]),
        (["--recipe", "no_such"], ["--recipe", "no_such", "llama_4m"]),
        (["--model-config", "no_such.json"], ["--model-config", "no_such.json"]),
        (["--tracker", "paper"], ["--tracker", "tensorboard"]),
        (["--tracker", "aim"], ["--tracker", "not installed"]),
        (["--dataset", "no_such.jsonl"], ["--dataset", "no_such.jsonl"]),
        (["--resume", "latest"], ["--resume", "not a run's folder"]),
        (["--resume", "no_such"], ["--resume", "no_such"]),
    ],
)
def test_a_bad_option_is_refused_in_one_sentence(pretrain, tmp_path, args, words):
    check_refused(pretrain(*args), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 1}, ["bad.yaml", "'learning_rate'", "did you mean 'lr'?"]),
        ({"warmup_step": 1}, ["bad.yaml", "did you mean 'warmup_steps'?"]),
        ({"batch_size": 2.5}, ["--batch-size", "int"]),
        ({"streaming": "yes"}, ["--streaming", "bool"]),
        ({"model": {"hidden_size": 3}}, ["model"]),
    ],
)
def test_a_bad_recipe_is_refused_in_one_sentence(pretrain, recipe_file, tmp_path, change, words):
    values = {**yaml.safe_load(recipe_file.read_text()), **change}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(values))
    check_refused(pretrain("--recipe", "bad.yaml"), *words)


def test_yaml_numbers_without_a_dot_are_numbers(recipe_file, tmp_path):
    from finetune.config.recipe import read_recipe

    (tmp_path / "r.yaml").write_text(recipe_file.read_text().replace("lr: 0.003", "lr: 1e-3"))
    assert read_recipe("r.yaml").lr == 1e-3


def test_an_output_folder_in_use_is_refused_and_kept(pretrain, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep me")
    check_refused(pretrain("--output-dir", "mine"), "--output-dir", "in use", "--resume")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes"]
    assert (tmp_path / "mine" / "notes").read_text() == "keep me"


def test_init_from_and_model_config_exclude_each_other(pretrain, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    check_refused(pretrain("--model-config", "config.json", "--init-from", "gpt2"), "--model-config", "--init-from")


def test_a_misspelt_key_of_the_model_is_refused(pretrain, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hiden_size": 32}))
    check_refused(pretrain("--model-config", "config.json"), "hiden_size", "hidden_size")


def test_the_error_survives_the_way_between_ranks():
    error = pickle.loads(pickle.dumps(InputError("--dataset", "it is empty")))
    assert str(error) == "--dataset: it is empty"


def test_a_folder_taken_between_choice_and_start_is_not_shared(recipe_file, tmp_path):
    """Two runs that chose the same folder before either made it: the second is refused, the first is kept."""
    first, second = (RunFolder(tmp_path / "run") for _ in range(2))
    recipe = read_recipe(str(recipe_file))
    first.create(recipe)
    with pytest.raises(InputError, match=r"--output-dir: another run"):
        second.create(recipe)


def test_bad_options_import_nothing_heavy_and_exit_with_2(tmp_path):
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from finetune.pretrain import main\n"
        "assert main(['--max-steps', '-3']) == 2\n"
        "heavy = {'torch', 'transformers', 'numpy', 'accelerate', 'datasets', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in (["-m", "finetune.pretrain"], [str(ROOT / "finetune" / "pretrain.py")]):
        done = subprocess.run(
            [sys.executable, *command, "--nonsense"], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "--nonsense" in done.stderr
        assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_option_of_the_readme(tmp_path):
    script = str(ROOT / "finetune" / "pretrain.py")
    done = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    wanted = """--recipe --dataset --text-column --split --tokenizer --model-config --init-from --optimizer --lr
        --batch-size --seq-len --max-steps --save-every --eval-every --mixed-precision --seed --output-dir --resume"""
    for option in wanted.split():
        assert f"{option} " in done.stdout


def test_a_recipes_warm_up_shrinks_to_fewer_steps_and_says_so(recipe_file):
    from finetune.pretrain import parse

    lines = []
    recipe, _ = parse(["--recipe", str(recipe_file), "--max-steps", "1"], lines.extend)
    assert recipe.warmup_steps == 0
    assert lines == ["warmup steps 0, of the recipe's 2: --max-steps 1 leaves no more"]
    wsd = ["--schedule", "warmup_stable_decay", "--decay-steps", "2", "--max-steps", "3"]
    recipe, _ = parse(["--recipe", str(recipe_file), *wsd])
    assert (recipe.warmup_steps, recipe.decay_steps) == (1, 2)


@pytest.mark.parametrize("script", ["pretrain", "sft"])
def test_help_gives_every_option_a_section_and_a_default_without_torch(script):
    import argparse

    from finetune.config.options import SECTIONS

    code = f"import sys; from finetune import {script}; {script}.main(['--help'])"
    names = "{'torch', 'transformers', 'numpy', 'accelerate', 'datasets'}"
    code = f"import atexit, sys\natexit.register(lambda: print(sorted({names} & set(sys.modules))))\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("\n[]")
    for section in SECTIONS:
        assert f"\n{section}:\n" in done.stdout
    parser = importlib.import_module(f"finetune.{script}").build_parser()
    options = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
    assert len(options) > 40
    for action in options:
        assert "(default: " in action.help, action.option_strings
        assert "None" not in action.help, action.option_strings


def test_a_model_config_replaces_the_recipes_model(recipe_file, tmp_path):
    from finetune.pretrain import parse

    config = {"model_type": "llama", "hidden_size": 48, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for given in ("config.json", "."):
        recipe, _ = parse(["--recipe", str(recipe_file), "--model-config", given])
        assert recipe.model == config
