"""Options of the scripts of evidence, over those of pretraining. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.errors import InputError
from finetune.config.options import FAMILY, option
from finetune.config.recipe import Recipe

# Control -> the optimizer that it is made of, and the bits of its momentum.
CONTROLS = {
    "placebo": ("muon8bit", 32),
    "muon-linear4-row": ("muon8bit", 32),
    "muon-int8-tensor": ("muon8bit", 32),
    "adamw-linear8": ("adamw", 8),
}
ADJUST_LR = ("match_rms_adamw", "original")
# What Muon trains -> patterns of `param_groups`, in the names of Llama and Qwen; the rest is AdamW's.
MUON_ON: dict[str, tuple[tuple[str, str], ...]] = {
    "all": (),
    "vo-ffn": (("*.q_proj.weight", "adamw"), ("*.k_proj.weight", "adamw")),
    "qk": (("*.v_proj.weight", "adamw"), ("*.o_proj.weight", "adamw"), ("*.mlp.*.weight", "adamw")),
}
# Output projections of MLPs, in the names of Llama and Qwen.
DYNAMIC_MLP_OUT: tuple[tuple[str, dict[str, str]], ...] = (("*.down_proj.weight", {"codebook": "dynamic"}),)


@dataclass(frozen=True, kw_only=True)
class EvidenceRecipe(Recipe):
    """One run of a comparison; only Muon's own classes take the options here, and `adamw` one of the controls."""

    control: str | None = option(
        None,
        "what is done to the optimizer's state after each step: placebo multiplies the momentum by 1 + 1e-7 z once, "
        "behind the first step; the others round it to codes and back, which is to keep it so",
        *CONTROLS,
        section="optimizer",
        unset="nothing",
    )
    nesterov: bool = option(True, "orthogonalize the blend of gradient and momentum", section="optimizer")
    adjust_lr_fn: str = option(
        ADJUST_LR[0], "how Muon's lr depends on a matrix's shape, of muon8bit alone", *ADJUST_LR, section="optimizer"
    )
    muon_on: str = option(
        "all", "hidden matrices that Muon trains: all, V, O and MLP, or Q and K", *MUON_ON, section="optimizer"
    )
    dynamic_mlp_out: bool = option(
        False, "give output projections of MLPs dynamic codes, and all else those of --codebook", section="optimizer"
    )


@dataclass(frozen=True, kw_only=True)
class RareRecipe(EvidenceRecipe):
    """One run on biographies."""

    groups: int = option(
        9, "the rarest group of classes: group g has 2^(g - 1) of them, each selected 2^(groups - g) times"
    )
    measured_classes: int = option(64, "classes of each group whose answers are asked for", section="results")


def check_options(recipe: EvidenceRecipe) -> None:
    """Check the options that plain pretraining does not have.

    Raises:
        InputError: one that the optimizer cannot obey, or two that contradict each other.
    """
    if recipe.control is not None:
        optimizer, bits = CONTROLS[recipe.control]
        if (recipe.optimizer, recipe.bits) != (optimizer, bits):
            more = f" --bits {bits}" if optimizer in FAMILY else ""
            raise InputError(
                "--control", f"{recipe.control} is made of another optimizer; give --optimizer {optimizer}{more}"
            )
    asked = {
        "--no-nesterov": not recipe.nesterov,
        "--adjust-lr-fn": recipe.adjust_lr_fn != ADJUST_LR[0],
        "--muon-on": recipe.muon_on != "all",
        "--dynamic-mlp-out": recipe.dynamic_mlp_out,
    }
    for name, is_asked in asked.items():
        takers = FAMILY if name in ("--muon-on", "--dynamic-mlp-out") else ("muon8bit",)
        if is_asked and recipe.optimizer not in takers:
            raise InputError(name, f"{recipe.optimizer} cannot do it; leave it out, or give --optimizer muon8bit")
    if recipe.dynamic_mlp_out and recipe.bits != 8:
        raise InputError("--dynamic-mlp-out", f"--bits {recipe.bits} has no codes; leave it out, or give --bits 8")
    if recipe.adjust_lr_fn == "original" and recipe.adamw_lr is None:
        raise InputError("--adamw-lr", "with --adjust-lr-fn original the lr of Muon is not AdamW's; give it")
