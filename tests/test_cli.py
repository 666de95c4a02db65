"""The `muon8bit` command: help, and bad input told in one line with exit code 2."""

import pytest

import muon8bit
from muon8bit.cli import main


def outcome(capsys, *argv):
    try:
        code = main(argv)
    except SystemExit as exit:  # argparse after --help and --version
        code = exit.code
    return code, *capsys.readouterr()


def test_help_lists_every_subcommand(capsys):
    code, out, err = outcome(capsys, "--help")
    assert (code, err) == (0, "")
    assert "convert" in out


def test_version_is_printed(capsys):
    """Also from a source tree that is not installed."""
    assert outcome(capsys, "--version") == (0, f"muon8bit {muon8bit.__version__}\n", "")


def test_nothing_asked_is_refused(capsys):
    code, out, err = outcome(capsys)
    assert (code, bool(out), bool(err)) == (2, False, True)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), ("muon8bit:", "COMMAND")),
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
