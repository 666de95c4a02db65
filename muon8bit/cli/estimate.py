"""`muon8bit estimate MODEL`: whether training it fits, for each optimizer, and as which command."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..choices import PRESETS
from .errors import UsageError
from .parser import Progress
from .scripts import import_script

if TYPE_CHECKING:
    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DESCRIPTION = """Predict the memory of training a model, for each optimizer. With --budget also the commands that fit.

    muon8bit estimate Llama-3.1-8B --budget 24GB
    muon8bit estimate --recipe llama_3b_lora --batch-size 8
    muon8bit estimate my_llama/ --mode qlora --lora-rank 32 --seq-len 4096 --budget 16GB"""
# Of a run without a recipe; `seq_len`: see `_seq_len`.
DEFAULTS: dict[str, Any] = {
    "mode": "full",
    "lora_rank": 16,
    "lora_targets": "all-linear",
    "dora": False,
    "optimizer": "muon8bit",
    "adamw_bits": 32,
    "bits": 8,
    "preset": None,
    "block_size": 2048,
    "dtype": "bf16",
    "mixed_precision": "auto",
    "batch_size": 1,
    "seq_len": None,
    "usual_seq_len": 2048,
    "gradient_accumulation": 1,
    "activation_checkpointing": False,
    "loss_chunk": 0,
    "release_gradients": False,
    "state_device": "device",
    "cautious_weight_decay": False,
    "split_heads": "none",
    "routers": "adamw",
}
_UNSET: Any = argparse.SUPPRESS


def add_parser(subparsers: _Subparsers) -> None:
    """Add `estimate` to the command."""
    parser = subparsers.add_parser(
        "estimate",
        help="predict the memory of training a model, for each optimizer",
        usage="muon8bit estimate [MODEL | --recipe NAME] [--OPTION VALUE ...]",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a preset (Llama-3.1-8B, see --list), a config.json, its folder, a GGUF file or a hub name",
    )
    _add_model(parser)
    _add_memory(parser)
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--budget",
        metavar="SIZE",
        help="memory of a GPU, as 24GB: what fits, as commands (default: none)",
    )
    machine.add_argument("--gpus", type=int, default=1, metavar="N", help="how many GPUs")
    machine.add_argument(
        "--shard", choices=("none", "ddp", "fsdp2", "hsdp"), help="what they divide (default: ddp on several)"
    )
    machine.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where the step runs")
    machine.add_argument(
        "--rates",
        metavar="FILE",
        default="builtin",
        help="a table of rates that `muon8bit tune` wrote, by which a step on CUDA chooses its methods, or builtin",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--list", action="store_true", help="list the presets with their names on the hub, and end")
    output.add_argument("--json", action="store_true", help="print JSON, in bytes")
    output.add_argument("--plot", type=Path, metavar="FILE.png", help="write a picture of the peaks (default: none)")
    parser.set_defaults(run=run)


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Add what is trained, with the options of `finetune.sft`; without a default: what is not typed is not there."""
    model = parser.add_argument_group("model", "The options of the scripts, with their names.")
    model.add_argument("--recipe", metavar="NAME", help="of the scripts, or a YAML file, in a checkout (default: none)")
    width = "hidden size of the recipe's model, heads and intermediate sizes in proportion (default: as it is written)"
    model.add_argument("--width", type=int, default=_UNSET, metavar="N", help=width)
    model.add_argument("--mode", choices=("full", "lora", "qlora"), default=_UNSET, help="(default: full)")
    rank = "rank of the adapter (default: 16); --lora N is --mode lora --lora-rank N"
    model.add_argument("--lora-rank", type=int, default=_UNSET, metavar="N", help=rank)
    targets = "modules that have the adapter, with commas (default: all-linear, all but the head)"
    model.add_argument("--lora-targets", default=_UNSET, metavar="TEXT", help=targets)
    model.add_argument(
        "--dora", action=argparse.BooleanOptionalAction, default=_UNSET, help="magnitudes too (default: off)"
    )
    model.add_argument("--lora", type=int, default=_UNSET, metavar="N", help=argparse.SUPPRESS)
    model.add_argument("--qlora", action="store_true", default=_UNSET, help=argparse.SUPPRESS)
    optimizer = "whose commands are given; the table has all, normuon8bit and adamuon8bit if asked (default: muon8bit)"
    names = ("muon8bit", "normuon8bit", "adamuon8bit", "muon", "adamw", "adamw8bit")
    model.add_argument("--optimizer", choices=names, default=_UNSET, help=optimizer)
    preset = "version of normuon8bit or adamuon8bit (default: paper)"
    model.add_argument("--preset", choices=PRESETS["normuon8bit"], default=_UNSET, help=preset)
    own_bits = "bits of muon8bit's momentum, its kin's too, and of adamuon8bit's second moment (default: 8)"
    model.add_argument("--bits", type=int, choices=(8, 32), default=_UNSET, help=own_bits)
    bits = "bits of the moments of muon8bit's AdamW part, likewise (default: 32)"
    model.add_argument("--adamw-bits", type=int, choices=(8, 32), default=_UNSET, help=bits)
    model.add_argument(
        "--block-size", type=int, default=_UNSET, metavar="N", help="elements per scale of muon8bit (default: 2048)"
    )
    heads = "latent attention by head in muon8bit (default: none)"
    model.add_argument("--split-heads", choices=("none", "head", "head_kv"), default=_UNSET, help=heads)
    routers = "what trains MoE routers in muon8bit and muon (default: adamw)"
    model.add_argument("--routers", choices=("adamw", "muon"), default=_UNSET, help=routers)


def _add_memory(parser: argparse.ArgumentParser) -> None:
    """Add how a step is computed."""
    memory = parser.add_argument_group("memory")
    number: dict[str, Any] = {"type": int, "default": _UNSET, "metavar": "N"}
    memory.add_argument(
        "--batch-size", "--batch", **number, help="sequences of a micro-batch on each GPU (default: 1; also --batch)"
    )
    seq_len = "tokens of a sequence (default: 2048, or all that the model takes; also --seq)"
    memory.add_argument("--seq-len", "--seq", "--max-length", **number, help=seq_len)
    memory.add_argument("--gradient-accumulation", **number, help="micro-batches of a step (default: 1)")
    dtype = "of weights and gradients; mixed is fp32 with --mixed-precision bf16 (default: bf16)"
    memory.add_argument("--dtype", choices=("auto", "fp32", "bf16", "mixed"), default=_UNSET, help=dtype)
    precision = "what is computed in; auto is bf16 for an adapter on a bf16 base, else no (default: auto)"
    memory.add_argument("--mixed-precision", choices=("auto", "no", "bf16"), default=_UNSET, help=precision)
    for name, text in (
        ("--activation-checkpointing", "recompute activations in the backward pass (default: off)"),
        ("--release-gradients", "free each gradient in the backward pass (default: off)"),
        ("--cautious-weight-decay", "of muon8bit, whose AdamW part it takes through copies (default: off)"),
    ):
        memory.add_argument(name, action=argparse.BooleanOptionalAction, default=_UNSET, help=text)
    chunk = "tokens whose logits exist at once, recomputed; 0 keeps all (default: 0)"
    memory.add_argument("--loss-chunk", **number, help=chunk)
    device = "where Muon8bit keeps its state: with the parameters, or in host memory (default: device)"
    memory.add_argument("--state-device", choices=("device", "cpu"), default=_UNSET, help=device)


def run(args: argparse.Namespace) -> int:
    """Print the estimate; returns 0, whether it fits or not.

    Raises:
        UsageError: an unknown model, a configuration without a size, or options that do not go together.
    """
    progress = Progress()
    try:
        return _run(args, progress)
    except (ValueError, ImportError) as error:
        progress.clear()
        raise UsageError(f"muon8bit estimate: {error}") from None


def typed_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a run that were typed, by their names of now."""
    typed = {key: value for key, value in vars(args).items() if key in DEFAULTS}
    if hasattr(args, "lora"):
        typed |= {"lora_rank": args.lora, "mode": typed.get("mode", "lora")}
    if hasattr(args, "qlora"):
        typed["mode"] = "qlora"
    if typed.get("dtype") == "mixed":
        typed |= {"dtype": "fp32", "mixed_precision": "bf16"}
    return typed


def _list_presets() -> int:
    """Print every preset beside the name that its model has on the hub; returns 0."""
    from muon8bit.estimate import PRESETS, hub_name

    for name in PRESETS:
        print(f"{name:16} {hub_name(name)}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse a model that is not said or said twice, and what does not go with it."""
    if (args.model is None) == (args.recipe is None):
        raise ValueError("give a MODEL, such as Llama-3.1-8B, or a --recipe, and not both")
    if args.recipe is None and hasattr(args, "width"):
        raise ValueError("--width is of a recipe's model: give --recipe, or a config.json of that width")
    if args.plot is not None and args.plot.suffix != ".png":
        raise ValueError(f"--plot {args.plot}: give a file that ends in .png")


def _run(args: argparse.Namespace, progress: Progress) -> int:
    if args.list:
        return _list_presets()
    _check(args)
    own: dict[str, Any] = {}
    options, name, script = DEFAULTS | typed_options(args), args.model, ""
    if args.recipe is not None:
        script, own = _of_recipe(args, {})
        width = {"width": args.width} if hasattr(args, "width") else {}
        script, options = _of_recipe(args, {**typed_options(args), **width})
        name = args.recipe
    elif options["dtype"] == "auto":
        options["dtype"] = "bf16"
    progress.tell("importing transformers")
    from muon8bit import estimate as est

    if args.rates != "builtin":
        _install(args.rates)
    if options["loss_chunk"] < 0:
        raise ValueError(f"--loss-chunk must not be negative, and is {options['loss_chunk']}")
    budget, note = (None, "") if args.budget is None else est.parse_budget(args.budget)
    source = options["model"] if args.recipe is not None else args.model
    config = est.load_config(source)
    options["seq_len"] = options["seq_len"] or min(options["usual_seq_len"], est.longest(config) or sys.maxsize)
    shard = args.shard or ("none" if args.gpus == 1 else "ddp")
    setup = est.setup_of(options, device=args.device, num_gpus=args.gpus, shard=shard)
    column = est.column_of(options["optimizer"], options["adamw_bits"], setup)
    # It warns on some CPUs that a 4-bit product will be slow, and none is taken here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    estimator = est.Estimator(config, progress.tell)
    estimate = estimator.estimate(setup, column)
    advice = est.Advice([], None) if budget is None else est.advise(estimator, setup, column, budget)
    progress.clear()
    words = ("--recipe", args.recipe, *(("--width", str(args.width)) if hasattr(args, "width") else ()))
    recipe = None if args.recipe is None else est.Script(script, words, own)
    scripts = [recipe or est.script_for(source, config, offer.setup) for offer in advice.offers]
    commands = [est.command(script, offer) for script, offer in zip(scripts, advice.offers, strict=True)]
    remarks = [script.remark for script in scripts]
    verdicts = None if budget is None else est.check_budget(estimate, budget)
    if args.json:
        record = {"model": name, **estimate.to_dict(), "budget_bytes": budget, "optimizer": column}
        for key, verdict in (verdicts or {}).items():
            record["optimizers"][key] |= {"fits": verdict.fits, "spare_bytes": verdict.spare_bytes}
        record["offers"] = [
            {"command": line, "remark": remark, **_offer_dict(offer)}
            for line, remark, offer in zip(commands, remarks, advice.offers, strict=True)
        ]
        record["least"] = None if advice.least is None else _offer_dict(advice.least)
        print(json.dumps(record, indent=1))
    else:
        est.print_table(f"{name}: {est.describe(setup)}", estimate, verdicts, budget, sys.stdout)
        if budget is not None:
            est.print_offers(advice, commands, column, budget, note, sys.stdout, setup=setup, remarks=remarks)
    if args.plot is not None:
        try:
            est.plot(args.plot, name, estimate, budget)
        except OSError as error:
            raise ValueError(f"--plot {args.plot}: {error.strerror}") from None
    return 0


def _install(rates: str) -> None:
    """Let methods on CUDA be chosen in this process by a table of rates in a file."""
    from ..orthogonalize import RATES
    from ..orthogonalize.rates_table import read_table

    RATES["cuda"] = read_table(Path(rates).expanduser()).rates


def _offer_dict(offer: Any) -> dict[str, Any]:
    return {**vars(offer), "setup": vars(offer.setup)}


def _of_recipe(args: argparse.Namespace, typed: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the script of the recipe, and the options that it makes with the typed ones."""
    module = import_script("config.estimated", "muon8bit estimate --recipe")
    try:
        script, recipe = module.read_any_recipe(args.recipe, typed)
        options: dict[str, Any] = module.memory_options(recipe, args.device == "cuda", has_bf16=True)
    except module.InputError as error:
        raise UsageError(f"muon8bit estimate: {error}") from None
    return script, options
