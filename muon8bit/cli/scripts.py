"""`muon8bit pretrain`, `sft`, `merge` and `recipes`: the scripts of a checkout and what they can be given."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .parser import nearest

if TYPE_CHECKING:
    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

# What Accelerate's launcher is told on a machine without a GPU, as in the Makefile.
ON_CPU = (
    *("--cpu", "--num_processes", "1", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)
_SCRIPTS = {
    "pretrain": "pretrain a model on text, started by Accelerate (in a checkout)",
    "sft": "fine-tune a model on chats, started by Accelerate (in a checkout)",
    "merge": "fold an adapter into its base (in a checkout)",
}


def find_checkout(command: str) -> Path:
    """Return the root of a checkout: the current folder, or the one in which this package lies.

    Args:
        command: what is asked for, as errors call it, such as `muon8bit recipes`.

    Raises:
        UsageError: neither has the scripts.
    """
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (root / "finetune" / "command_line.py").is_file():
            return root
    raise UsageError(
        f"{command}: the training scripts are not part of the installed package; run it in the folder of a checkout of "
        "muon8bit's repository, the one that holds finetune/"
    )


def import_script(name: str, command: str) -> Any:
    """Import a module of `finetune` from the checkout.

    Args:
        name: such as `sft` or `config.estimated`.
        command: as for `find_checkout`.

    Raises:
        UsageError: there is no checkout, it has no such module, or a library of the scripts is not installed.
    """
    root = str(find_checkout(command))
    if root not in sys.path:
        sys.path.insert(0, root)
    if find_spec(f"finetune.{name}") is None:
        raise UsageError(f"{command}: the checkout in {root} has no finetune/{name.replace('.', '/')}.py; update it")
    try:
        return import_module(f"finetune.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "finetune":
            raise
        raise UsageError(f"{command}: {error.name} is not installed; pip install '.[train]' in the checkout") from None


def add_parser(subparsers: _Subparsers) -> None:
    """Add the four to the command. The scripts parse what follows their names themselves."""
    for name, summary in _SCRIPTS.items():
        parser = subparsers.add_parser(name, help=summary, prefix_chars="\0", add_help=False)
        parser.add_argument(
            "words", nargs="*", metavar="OPTION", help=f"of `python -m finetune.{name}`, see its --help"
        )
        parser.set_defaults(run=_merge if name == "merge" else _launch)
    parser = subparsers.add_parser("recipes", help="list the recipes of the scripts, or show one (in a checkout)")
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this recipe (default: list all)")
    parser.set_defaults(run=_recipes)


def _merge(args: argparse.Namespace) -> int:
    code: int = import_script("merge", "muon8bit merge").main(args.words)
    return code


def _launch(args: argparse.Namespace) -> int:
    """Check the options, then become Accelerate's launcher of the script.

    They are checked here first, since the launcher makes exit code 1 and a traceback of a script's 2.
    """
    name, words = args.command, args.words
    script = import_script(name, f"muon8bit {name}")
    if {"-h", "--help"} & set(words):
        code: int = script.main(["--help"])
        return code
    code = script.main(words, only_check=True)
    if code == 0:
        command = launch_command(find_checkout(f"muon8bit {name}") / "finetune" / f"{name}.py", words)
        sys.stdout.flush()
        os.execv(command[0], command)
    return code


def launch_command(script: Path, words: Sequence[str]) -> list[str]:
    """Return the command that starts a script under Accelerate, as `make pretrain` does.

    Raises:
        UsageError: Accelerate is not installed.
    """
    if find_spec("accelerate") is None:
        raise UsageError(f"muon8bit {script.stem}: accelerate is not installed; pip install '.[train]' in the checkout")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    return [*launcher, *(() if _has_gpu() else ON_CPU), str(script), *words]


def _has_gpu() -> bool:
    """Return whether NVIDIA's driver lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    return "GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout


def _recipes(args: argparse.Namespace) -> int:
    """Print the recipes of both scripts with the first sentence of their remarks, or one of them whole."""
    folder = find_checkout("muon8bit recipes") / "finetune" / "recipes"
    files = {path.stem: path for path in sorted([*folder.glob("*.yaml"), *folder.glob("sft/*.yaml")])}
    if args.name is not None:
        if args.name not in files:
            close = nearest(args.name, files)
            meant = f"did you mean {close}? The" if close else "the"
            raise UsageError(f"muon8bit recipes: there is no {args.name!r}; {meant} recipes are {', '.join(files)}")
        print(files[args.name].read_text(encoding="utf-8"), end="")
        return 0
    for script in ("pretrain", "sft"):
        print(f"muon8bit {script} --recipe NAME")
        for name, path in files.items():
            if (path.parent.name == "sft") == (script == "sft"):
                print(textwrap.fill(f"  {name:22} {_remark(path)}", 79, subsequent_indent=" " * 25))
    return 0


def _remark(path: Path) -> str:
    """Return the first sentence of the comment at the head of a recipe."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    text = " ".join(line.removeprefix("#").strip() for line in head)
    return text.split(". ")[0].rstrip(".")
