"""Pretrain as finetune.pretrain does, with negative controls and ablations beside its options.

    python -m finetune.evidence.pretrain --optimizer muon8bit --bits 32 --control placebo
    python -m finetune.sweep benchmarks/sweeps/controls.toml

result.json of a run has the loss by frequency of tokens and the FLOPs beside.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from finetune import pretrain
from finetune.command_line import Parser, run_script, say_on_main, told_when_stopped
from finetune.config.checks import typed_names
from finetune.evidence.options import EvidenceRecipe, check_options
from finetune.storage.run_dir import RunFolder


def build_parser() -> Parser:
    """Return the parser of the script's options."""
    return pretrain.build_parser("evidence.pretrain", __doc__ or "", EvidenceRecipe)


def parse(argv: Sequence[str], tell: Callable[[list[str]], None] | None = None) -> tuple[EvidenceRecipe, RunFolder]:
    """Read the options as `finetune.pretrain.parse_as` does.

    Raises:
        InputError: any option that cannot be obeyed.
    """
    recipe, folder = pretrain.parse_as(build_parser(), EvidenceRecipe, argv, tell)
    check_options(recipe)
    return recipe, folder


def _work(argv: Sequence[str]) -> int:
    recipe, folder = parse(argv, say_on_main)
    with told_when_stopped(folder):
        from finetune.evidence.controls import build_control
        from finetune.evidence.measures import flops, loss_by_decile
        from finetune.setup.prepare import PretrainRun, set_up
        from finetune.storage.outputs import finish
        from finetune.training.trainer import run_job  # torch and transformers, after the options have passed

        run = set_up(recipe, folder, build_control)

    def finish_measured(run: PretrainRun) -> None:
        finish(run, {**loss_by_decile(run), **flops(run)})

    return run_job(run, finish_measured, script=os.path.abspath(__file__))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script. Returns the exit code, see EXIT_CODES."""
    words = sys.argv[1:] if argv is None else argv
    return run_script(lambda: _work(words), typed_names(words, EvidenceRecipe))


if __name__ == "__main__":
    sys.exit(main())
