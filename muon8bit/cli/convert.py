"""`muon8bit convert IN OUT`: an optimizer's checkpoint in another format, tensor by tensor."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..choices import BITS, BLOCK_SIZES, CODEBOOKS, DIALECTS, EXPORTS
from .errors import UsageError

if TYPE_CHECKING:
    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_FORMAT = ("bits", "codebook", "block_size", "adamw_bits")
_ASKED = (*_FORMAT, "momentum", "target", "drop_moved", "new_second_moment")
_DESCRIPTION = """Write the checkpoint of an optimizer in another format. IN is a file of torch.save, such as
Accelerate's optimizer.bin, or a folder of torch.distributed.checkpoint, and is not changed; OUT, of the same kind,
must not exist, and appears when it is complete. Of a file that holds more, such as {"model": ..., "optimizer": ...},
OUT has all else as it was; of a folder it has the optimizer only. Tensors are converted one by one, so checkpoints
larger than memory work."""


def add_parser(subparsers: _Subparsers) -> None:
    """Add `convert` to the command."""
    parser = subparsers.add_parser(
        "convert", help="write an optimizer's checkpoint in another format", description=_DESCRIPTION
    )
    parser.add_argument(
        "source",
        metavar="IN",
        type=Path,
        help="an optimizer's state dict, alone in a file or under any key of a file or folder",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the file or folder to write")
    parser.add_argument("--bits", type=int, choices=BITS, help="of the momentum; default: as saved, 8 for imports")
    parser.add_argument("--codebook", choices=CODEBOOKS, help="of 8 bits; default: as saved, linear for imports")
    parser.add_argument("--block-size", type=int, choices=BLOCK_SIZES, help="elements a scale; default: as saved, 2048")
    parser.add_argument(
        "--adamw-bits", type=int, choices=BITS, help="of AdamW's moments; default: as saved, 32 for imports"
    )
    parser.add_argument(
        "--from", dest="dialect", choices=DIALECTS, default="muon8bit", help="who saved IN (default: muon8bit)"
    )
    parser.add_argument(
        "--to",
        dest="target",
        choices=EXPORTS,
        default="muon8bit",
        help="whose format OUT has (default: muon8bit); torch: a dict with the state dicts of torch.optim.Muon under "
        "'muon' and of torch.optim.AdamW under 'adamw'",
    )
    parser.add_argument(
        "--adamw", metavar="FILE", type=Path, help="with --from: AdamW's state dict, if IN is Muon's (default: none)"
    )
    parser.add_argument(
        "--like",
        metavar="FILE",
        type=Path,
        help="a checkpoint whose groups, order and format OUT shall have, such as the state dict of a new optimizer; "
        "parameters are matched by name (default: none)",
    )
    parser.add_argument(
        "--names",
        metavar="FILE",
        type=Path,
        help="one parameter name a line, Muon's before AdamW's, if IN has none (default: IN's)",
    )
    parser.add_argument(
        "--momentum", type=float, help="beta of a heavy-ball IN whose groups do not say it (default: theirs)"
    )
    parser.add_argument(
        "--drop-moved",
        action="store_true",
        help="leave out the state of parameters that --like has with the other algorithm, so that they start at zero",
    )
    parser.add_argument(
        "--new-second-moment",
        action="store_true",
        help="let second moments start at zero where --like has some and IN none that fit, as from Muon8bit to "
        "NorMuon8bit",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert; returns 0.

    Raises:
        InputError: names the file, key or option that does not fit; then nothing was written.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            _convert(args)
    except (ValueError, OSError) as error:
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        raise UsageError(f"muon8bit convert: {message}") from error
    for message in [str(warning.message) for warning in caught] or ["no momentum had to be converted"]:
        print(f"{args.out}: {message}")
    return 0


def _convert(args: argparse.Namespace) -> None:
    from ..convert import convert_state_dict, files, folders  # with torch, which --help does not wait for

    is_folder = args.source.is_dir()
    _check(args)
    with files.appearing(args.out) as (beside, scratch_folder):
        scratch = folders.Scratch(scratch_folder)

        def read(path: Path | None) -> tuple[Any, Any, tuple[Any, ...]]:
            """Return an optimizer, what holds it, and the keys under which it lies there."""
            if path is None:
                return None, None, ()
            if path.is_dir():
                inside, root = folders.read(path, scratch)
                return inside, None, root
            loaded = files.read(path)
            keys = files.optimizer_inside(path, loaded)
            return files.at(loaded, keys), loaded, keys

        (saved, whole, keys), (adamw, *_), (like, *_) = read(args.source), read(args.adamw), read(args.like)
        if is_folder and args.target == "torch":
            what = "is a folder, and --to torch writes two state dicts"
            raise ValueError(f"{args.source} {what}: give a file of torch.save")
        names = None if args.names is None else _names(args.names)
        options: dict[str, Any] = {key: getattr(args, key) for key in _ASKED}
        options |= {"source": args.dialect, "like": like, "names": names}
        saved = saved if adamw is None else {"muon": saved, "adamw": adamw}
        try:
            if is_folder:
                folders.write(convert_state_dict(saved, keep=scratch.copy, **options), keys, beside)
            elif keys:
                converted = convert_state_dict(saved, keep=scratch.copy, **options)
                files.save(files.replaced(whole, keys, converted), beside)
                warnings.warn(f"the optimizer under {files.place(keys)} was converted, all else kept", stacklevel=1)
            else:
                with files.written(beside) as writer:
                    writer.finish(convert_state_dict(saved, keep=writer.keep, **options))
        except ValueError as error:
            raise ValueError(f"{args.source}: {error}") from error


def _names(path: Path) -> list[str]:
    """Read the parameter names of a text file, UTF-8 with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig").split()
    except UnicodeDecodeError as error:
        what = f"--names: byte {error.start + 1} of {path} is not UTF-8 text"
        raise ValueError(f"{what}; save the file as UTF-8") from None


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError where the options make no sense together."""
    if args.adamw is not None and args.dialect == "adamw":
        raise ValueError("--adamw: with --from adamw IN is AdamW's state dict; leave it out")
    if args.dialect == "adamw" and args.like is None:
        raise ValueError(
            "--from adamw needs --like, the saved state dict of a new Muon8bit: its groups say what Muon takes, and how"
        )
    if args.adamw is not None and args.dialect == "muon8bit":
        raise ValueError(
            "--adamw: Muon8bit saves one state dict; leave it out, or say --from torch, jordan or heavy-ball"
        )
    asked = [args.like, args.names, *(getattr(args, key) for key in _FORMAT)]
    if args.dialect == args.target == "muon8bit" and all(value is None for value in asked):
        raise ValueError("nothing to do: give --bits, --codebook, --block-size, --adamw-bits, --like, --from or --to")
