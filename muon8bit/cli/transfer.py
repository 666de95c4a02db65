"""`muon8bit transfer RECIPE --width N`: what a rule of width makes of a recipe's rates, by the role of parameters."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..choices import SCALING_RULES
from .errors import UsageError
from .scripts import import_script

if TYPE_CHECKING:
    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DESCRIPTION = """Print shapes, initialization, lr and weight decay of a recipe's parameters at its and another width.

    muon8bit transfer llama_60m --width 2048
    muon8bit transfer llama_60m --width 2048 --rule essential --lr 3e-3

The recipe's lr, adamw_lr and weight_decay are those of its model as it is written. Nothing is trained; the pretraining
script trains so with the same --width and --scaling."""
# Column of the table -> key of a row.
_COLUMNS = {
    "parameter": "parameter",
    "role": "role",
    "goes to": "algorithm",
    "shape at base": "base_shape",
    "shape": "shape",
    "init x": "init_factor",
    "lr at base": "base_lr",
    "lr": "lr",
    "decay at base": "base_weight_decay",
    "decay": "weight_decay",
}


def add_parser(subparsers: _Subparsers) -> None:
    """Add `transfer` to the command."""
    parser = subparsers.add_parser(
        "transfer", help="what a rule of width makes of a recipe's rates (in a checkout)", description=_DESCRIPTION
    )
    parser.add_argument("recipe", metavar="RECIPE", help="of the pretraining script, or a YAML file")
    parser.add_argument("--width", type=int, required=True, metavar="N", help="hidden size that rates are carried to")
    parser.add_argument("--rule", choices=SCALING_RULES, default="spectral", help="as --scaling of the script")
    for name, text in (
        ("--lr", "of the base width"),
        ("--adamw-lr", "likewise, of the AdamW part"),
        ("--weight-decay", "likewise, per unit of lr"),
    ):
        parser.add_argument(name, type=float, metavar="X", help=f"{text} (default: the recipe's)")
    parser.add_argument("--optimizer", metavar="NAME", help="of the script (default: the recipe's)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; returns 0.

    Raises:
        UsageError: no such recipe, a width that its model cannot have, or no rule for the model or its optimizer.
    """
    module = import_script("models.transfer", "muon8bit transfer")
    keys = ("width", "lr", "adamw_lr", "weight_decay", "optimizer")
    asked = {key: value for key in keys if (value := getattr(args, key)) is not None}
    try:
        record = module.transferred(args.recipe, {**asked, "scaling": args.rule})
    except module.InputError as error:
        raise UsageError(f"muon8bit transfer: {error}") from None
    if args.json:
        print(json.dumps(record, indent=1))
        return 0
    from .._text import render

    rows = [[_cell(row[key]) for key in _COLUMNS.values()] for row in record["parameters"]]
    print(f"{args.recipe}, width {record['base_width']} to {record['width']}, {args.rule}, {record['optimizer']}\n")
    print(render(list(_COLUMNS), rows, "<<<<<>>>>>"))
    return 0


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " x ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
