"""`muon8bit estimate MODEL`: whether training it fits, for each optimizer. No weights are read."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: _Subparsers) -> None:
    """Add `estimate` to the command."""
    parser = subparsers.add_parser("estimate", help="predict the memory of training a model, for each optimizer")
    parser.add_argument(
        "model", metavar="MODEL", help="a preset (Llama-3.1-8B), config.json, its folder, or a hub name"
    )
    parser.add_argument("--batch", type=int, default=1, help="sequences of a micro-batch on each GPU (default 1)")
    parser.add_argument("--seq", type=int, help="tokens of a sequence (default 2048, or all that the model takes)")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "mixed"),
        default="bf16",
        help="of weights and gradients; mixed: fp32, computed in bf16 (default bf16)",
    )
    parser.add_argument("--activation-checkpointing", action="store_true", help="judge the run that recomputes them")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train an adapter on all linear layers but the head")
    parser.add_argument("--qlora", action="store_true", help="an adapter (rank 16 without --lora) on a base in NF4")
    parser.add_argument("--release-gradients", action="store_true", help="free each gradient in the backward pass")
    parser.add_argument(
        "--loss-chunk", type=int, metavar="TOKENS", help="cross-entropy over so many tokens at a time, recomputed"
    )
    parser.add_argument(
        "--gradient-accumulation", type=int, default=1, metavar="N", help="micro-batches of a step (default 1)"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="how many GPUs (default 1)")
    parser.add_argument("--shard", choices=("none", "ddp", "fsdp2", "hsdp"), help="what they divide (default ddp)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where the step runs (default cuda)")
    parser.add_argument(
        "--state-device",
        choices=("device", "cpu"),
        default="device",
        help="where Muon8bit keeps its state: with the parameters, or in host memory (default device)",
    )
    parser.add_argument("--budget", metavar="SIZE", help="memory of a GPU, as 24GiB: does it fit, and what would help")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write a picture of the peaks")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the estimate; returns 0, whether it fits or not.

    Raises:
        InputError: an unknown model, a configuration without a size, or options that do not go together.
    """
    try:
        return _run(args)
    except (ValueError, ImportError) as error:
        raise UsageError(f"muon8bit estimate: {error}") from None


def _run(args: argparse.Namespace) -> int:
    from muon8bit.estimate import Estimator, Setup, check_budget, describe, load_config, parse_bytes, plot, print_table
    from muon8bit.estimate.classes import longest as longest_sequence

    budget = None if args.budget is None else parse_bytes(args.budget)
    if args.plot is not None and args.plot.suffix != ".png":
        raise ValueError(f"--plot {args.plot}: give a file that ends in .png")
    config = load_config(args.model)
    longest = longest_sequence(config) or 2048
    setup = Setup(
        batch=args.batch,
        seq=min(2048, longest) if args.seq is None else args.seq,
        dtype=args.dtype,
        checkpointing=args.activation_checkpointing,
        lora=args.lora,
        qlora=args.qlora,
        release=args.release_gradients,
        loss_chunk=args.loss_chunk,
        accumulation=args.gradient_accumulation,
        num_gpus=args.gpus,
        shard=args.shard or ("none" if args.gpus == 1 else "ddp"),
        device=args.device,
        state_device=args.state_device,
    )
    # It warns on some CPUs that a 4-bit product will be slow, and none is taken here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    estimator = Estimator(config)
    estimate = estimator.estimate(setup)
    verdicts = None if budget is None else check_budget(estimator, estimate, budget)
    if args.json:
        record = {"model": args.model, **estimate.to_dict(), "budget_bytes": budget}
        for name, verdict in (verdicts or {}).items():
            found = {"fits": verdict.fits, "spare_bytes": verdict.spare_bytes, "changes": list(verdict.changes)}
            found["together"] = verdict.together
            record["optimizers"][name] |= found
        print(json.dumps(record, indent=1))
    else:
        print_table(f"{args.model}: {describe(setup)}", estimate, verdicts, budget, sys.stdout)
    if args.plot is not None:
        try:
            plot(args.plot, args.model, estimate, budget)
        except OSError as error:
            raise ValueError(f"--plot {args.plot}: {error.strerror}") from None
    return 0
