"""The `muon8bit` command: help, and bad input told in one line with exit code 2."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

import muon8bit
from muon8bit.cli import build_parser, main

ROOT = Path(__file__).parents[2]


def outcome(capsys, *argv):
    try:
        code = main(argv)
    except SystemExit as exit:  # argparse after --help and --version
        code = exit.code
    return code, *capsys.readouterr()


COMMANDS = ("estimate", "report", "convert", "tune", "doctor", "merge", "recipes", "pretrain", "sft")


def test_every_way_of_asking_for_help_shows_each_subcommand_with_an_example(capsys):
    code, out, err = outcome(capsys, "--help")
    assert (code, err) == (0, "")
    for name in COMMANDS:
        assert f"\n    {name} " in out
        assert f"\n  muon8bit {name} " in out or f"\n  muon8bit {name}\n" in out
    assert max(map(len, out.splitlines())) <= 80
    assert outcome(capsys) == (0, out, "")
    run = subprocess.run([sys.executable, "-m", "muon8bit"], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, out, "")


def test_help_of_each_command_needs_no_torch_and_gives_a_default_for_every_option():
    code = (
        "import sys, contextlib, io\n"
        "from muon8bit.cli import build_parser, main\n"
        f"for name in {COMMANDS[:5]} + ('recipes', 'pretrain', 'sft'):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        main([name, '--help'])\n"
        "    assert 'usage: ' in out.getvalue(), name\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'accelerate'} & sys.modules.keys()))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name in COMMANDS[:5]:
        parser = commands.choices[name]
        for action in parser._actions:
            is_shown = action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)
            if action.option_strings and is_shown:
                assert "default" in parser._get_formatter()._expand_help(action), (name, action.option_strings)


def test_version_is_printed(capsys):
    """Also from a source tree that is not installed."""
    assert outcome(capsys, "--version") == (0, f"muon8bit {muon8bit.__version__}\n", "")


def test_recipes_are_listed_and_shown(capsys):
    code, out, _ = outcome(capsys, "recipes")
    assert code == 0
    names = [path.stem for path in (ROOT / "finetune" / "recipes").glob("**/*.yaml")]
    assert names
    for name in names:
        assert f"\n  {name} " in out
    assert max(map(len, out.splitlines())) <= 80
    text = (ROOT / "finetune" / "recipes" / "llama_4m.yaml").read_text()
    assert outcome(capsys, "recipes", "llama_4m") == (0, text, "")


def test_the_scripts_start_under_accelerate_as_the_makefile_starts_them(capsys, monkeypatch):
    started = []
    monkeypatch.setattr("muon8bit.cli.scripts.os.execv", lambda path, words: started.append((path, words)))
    monkeypatch.setattr("muon8bit.cli.scripts._has_gpu", lambda: False)
    assert outcome(capsys, "pretrain", "--max-steps", "30", "--lr", "1e-3")[0] == 0
    ((program, words),) = started
    launch = re.search(r"LAUNCH := \S+ launch --quiet \$\(if \$\(HAS_GPU\),,(.*)\)\n", (ROOT / "Makefile").read_text())[
        1
    ]
    script = str(ROOT / "finetune" / "pretrain.py")
    options = ["--max-steps", "30", "--lr", "1e-3"]
    assert words == [program, "-m", "accelerate.commands.launch", "--quiet", *launch.split(), script, *options]
    assert program == sys.executable


def test_a_scripts_bad_option_is_told_before_anything_is_started(capsys, monkeypatch):
    monkeypatch.setattr("muon8bit.cli.scripts.os.execv", lambda *_: pytest.fail("started"))
    code, out, err = outcome(capsys, "sft", "--model", "x", "--lora-rnak", "4")
    assert (code, out) == (2, "")
    assert "--lora-rnak; did you mean --lora-rank?" in err
    code, out, err = outcome(capsys, "recipes", "no_such")
    assert (code, out) == (2, "")
    assert "llama_4m" in err


@pytest.mark.parametrize("argv", [("pretrain",), ("sft", "--help"), ("merge", "a"), ("recipes",)])
def test_without_a_checkout_its_commands_say_where_to_be(capsys, monkeypatch, tmp_path, argv):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("muon8bit.cli.scripts.__file__", str(tmp_path / "site" / "muon8bit" / "cli" / "scripts.py"))
    code, out, err = outcome(capsys, *argv)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert f"muon8bit {argv[0]}:" in err
    assert "checkout" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("translate",), ("muon8bit:", "translate", "convert")),
        (("convert",), ("muon8bit convert:", "IN", "OUT")),
        (("convert", "in", "out", "--bit", "8"), ("muon8bit convert:", "--bit")),
    ],
)
def test_bad_command_line_is_one_sentence_and_exit_code_2(capsys, argv, words):
    code, out, err = outcome(capsys, *argv)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    for word in (*words, "--help"):
        assert word in err
