"""Conversion of checkpoints: between 8 and 32 bits, codebooks and block sizes, and from and to other Muons.

The others are torch.optim.Muon beside an AdamW, K. Jordan's and heavy-ball Muon, NorMuon's, AdaMuon's and Dion's own;
the first is a target too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..choices import DIALECTS, EXPORTS, Dialect
from .arrange import Like, arrange, targets
from .entries import Group
from .results import Keep, own, stored, torchs
from .sources import read

__all__ = ["DIALECTS", "EXPORTS", "Dialect", "convert_state_dict"]


def convert_state_dict(
    state_dict: Mapping[str, Any],
    *,
    like: Like | None = None,
    source: Dialect = "muon8bit",
    target: Dialect = "muon8bit",
    bits: int | None = None,
    codebook: str | None = None,
    block_size: int | None = None,
    adamw_bits: int | None = None,
    momentum: float | None = None,
    names: Sequence[str] | None = None,
    keep: Keep | None = None,
    drop_moved: bool = False,
    new_second_moment: bool = False,
) -> dict[str, Any]:
    """Convert a saved optimizer to another format, with a warning that names both.

    On load:

        optimizer.load_state_dict(convert_state_dict(saved, like=optimizer))

    From 8 to 32 bits the values are decoded exactly: the next step is bitwise that of the 8-bit optimizer. To 8 bits
    they are rounded as a step rounds them, by at most half a step of the codebook times the block's scale. Linear to 32
    bits and back keeps every code, and every scale to a unit in its last place. AdamW's moments in 8 bits are decoded
    exactly, and encoded to the nearest codes, of the second moment never 0. So are AdaMuon8bit's second moments, whose
    codes are those of their roots. What need not change is shared, not copied.
    Nothing given is changed.

    Args:
        state_dict: as `Optimizer.state_dict` gives it. Saved by others: of torch.optim.Muon, of torch.optim.AdamW, both
            as `{"muon": ..., "adamw": ...}`, or of a heavy-ball Muon with its own AdamW.
        like: an optimizer (or its state dict; with target="torch" a dict of them: 'muon', 'adamw') whose groups,
            order and format the result shall have; parameters are matched by name. All other hyper-parameters are the
            saved ones, lr too (with a warning where `like` has another), but where parameters that were saved with
            several share a group of `like`: then those of `like`, with a warning. None: the saved order, Muon's before
            AdamW's where these are two.
        source: who saved it: `"muon8bit"`; `"torch"`: Muon with an EMA momentum, as torch.optim.Muon;
            `"jordan"`: K. Jordan's Muon since February 2025, an average with AdamW in the same or in own groups.
            `"heavy-ball"`: b <- beta b + g, whose values are larger by 1 / (1 - beta). `"normuon"`, `"adamuon"`: their
            authors' code, with its second moments; `"dion"`: Dion's NorMuon or Muon, with its AdamW.
            `"adamw"`: an AdamW over the whole model, torch's or bitsandbytes', which is not continued: its exp_avg, an
            average too, becomes the first momentum as it is; AdamW's parameters of `like` keep their whole state; all
            options are those of `like`, which it needs.
        target: `"muon8bit"`, or `"torch"`: a dict with `muon`, `adamw` or both.
        bits, codebook, block_size, adamw_bits: the format of the result, as for `Muon8bit` and its AdamW groups; None:
            as saved, or the defaults (8, `"linear"`, 2048, 32) if others saved it. Not beside `like` or target="torch".
        momentum: beta of a heavy-ball checkpoint whose groups do not say it.
        names: one a saved parameter, in the saved order, Muon's before AdamW's, for checkpoints without `param_names`.
        keep: called with every finished tensor of the state, one after the other; what it returns goes into the result
            in its place.
        drop_moved: leave out, with a warning, the state of parameters that `like` has in a group of the other
            algorithm, so that they start at zero; False: an error that names the first.
        new_second_moment: let a second moment start at zero where `like` has one, and the saved state has none, or one
            of other rows or columns, as a Muon8bit's that goes on as NorMuon8bit; False: an error that names the first.
            A group whose `second_moment` is not the saved one has all options of `like`, with a warning.

    Raises:
        ValueError: names the argument, group, parameter or key that is missing, foreign, damaged or cannot be
            represented (stacks, convolutions and split matrices in torch.optim.Muon).

    Source: that the two momenta differ by 1 / (1 - beta): torch.optim.Muon's and Moonlight's (arXiv 2502.16982) code.
    """
    if target not in EXPORTS:
        raise ValueError(f"target must be one of {EXPORTS}, not {target!r}")
    chosen = {"bits": bits, "codebook": codebook, "block_size": block_size, "adamw_bits": adamw_bits}
    format_options = {key: value for key, value in chosen.items() if value is not None}
    if format_options and (like is not None or target == "torch"):
        raise ValueError(f"{', '.join(format_options)}: the format is that of `like`, or torch's; leave it out")
    if momentum is not None and source != "heavy-ball":
        raise ValueError("momentum is only needed with source='heavy-ball': leave it out")
    if drop_moved and like is None:
        raise ValueError("drop_moved is about the groups of `like` (--like): give it, or leave drop_moved out")
    if new_second_moment and like is None:
        raise ValueError("new_second_moment is about the groups of `like` (--like): give it, or leave it out")
    if source == "adamw" and like is None:
        raise ValueError(
            "source='adamw' needs like (--like), a new optimizer or its state dict: its groups say what Muon takes"
        )
    groups = read(state_dict, source, names, momentum)
    if like is not None:
        groups = arrange(groups, targets(like, target), drop_moved=drop_moved, is_named_by_hand=names is not None)
    groups = [stored(group, format_options, i) for i, group in enumerate(groups)]
    write = partial(own, new_second_moment=new_second_moment) if target == "muon8bit" else torchs
    result, changes = write(groups, keep or _same)
    if source == "adamw":
        warnings.warn(_started(groups), stacklevel=2)
    for what, before, after in sorted(changes):
        warnings.warn(f"{what} converted from {before} to {after}", stacklevel=2)
    return result


def _started(groups: Sequence[Group]) -> str:
    """Return what a run that starts from AdamW's state has of it."""
    entries = [entry for group in groups for entry in group.entries if entry.tensors]
    num_muon = sum(entry.algorithm == "muon" for entry in entries)
    return (
        f"AdamW's run is not continued: {num_muon} parameters start with its exp_avg as their first momentum, "
        f"{len(entries) - num_muon} keep its moments and count of steps; all options are those of `like`"
    )


def _same(tensor: Tensor) -> Tensor:
    return tensor
