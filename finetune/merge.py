"""Fold an adapter into its base, and save an ordinary model.

    python -m finetune.merge runs/latest              # writes runs/latest/model/
    python -m finetune.merge my_adapter/ --base my_llama/ --output my_model/

Also `muon8bit merge`, and `--merge` of `finetune.sft`. It runs on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: absolute imports come from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from finetune.command_line import run_script
from finetune.config.errors import InputError


def build_parser(prog: str = "merge") -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(prog, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", metavar="RUN", help="the folder of a fine-tuning run, or of an adapter")
    parser.add_argument(
        "--output", metavar="FOLDER", help="a new or empty folder (default: model/ in the run, or ADAPTER-merged/)"
    )
    parser.add_argument("--base", metavar="FOLDER", help="the base, where it has moved (default: as when trained)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="what is saved (default: as the base when trained)")
    return parser


def choose_output(run: Path, given: str | None) -> Path:
    """Return the folder that a merged model is written to.

    Args:
        run: folder of a run or of an adapter.
        given: by the user; None for the default.

    Raises:
        InputError: something is there.
    """
    in_run = (run / "recipe.yaml").is_file()
    output = Path(given).expanduser() if given else run / "model" if in_run else run.with_name(f"{run.name}-merged")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise InputError("--output", f"{output} is in use; give a new folder, or remove it first")
    return output


def _work(argv: Sequence[str]) -> int:
    options = build_parser().parse_args(argv)
    run = Path(options.run).expanduser().resolve()
    from finetune.models.merging import find_adapter, merge_adapter  # torch and peft, after the options have passed

    source = find_adapter(run, options.base)
    merge_adapter(source, choose_output(run, options.output), options.dtype, print)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Merge. Returns the exit code: 0, or 2 for bad input, told in one sentence."""
    return run_script(lambda: _work(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
