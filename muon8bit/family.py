"""NorMuon and AdaMuon in 8 bits: `Muon8bit` with a second moment of the orthogonalized direction, and their presets.

Both have several published versions, which differ in momentum, coefficients, the statistic, eps, and the update's size.
A preset has the group keys of one of them. It leaves lr, weight_decay and the storage of the state to the caller, and
`adjust_lr_fn` where `rescale="rms"` makes that meaningless.
Equations: `muon8bit/step/second_moment.py`; one matrix in plain torch: `muon8bit/functional.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._values import is_choice, shown
from .config import DEFAULT_LR
from .optimizer import Muon8bit

_NORMUON = {
    "momentum": 0.95,
    "nesterov": False,
    "ns_coefficients": "jordan",
    "ns_steps": 5,
    "second_moment": "row",
    "beta2": 0.95,
    "second_moment_eps": 1e-8,
    "second_moment_eps_form": "add",
    "rescale": "keep",
    "sign_momentum": False,
    "cautious_weight_decay": False,
    "decay_lr_power": 1,
}
_ADAMUON = {**_NORMUON, "second_moment": "element", "rescale": "rms", "sign_momentum": True}

NORMUON_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {**_NORMUON, "rescale": "rms"},
    "official": {**_NORMUON, "nesterov": True, "adjust_lr_fn": "original", "second_moment_eps": 1e-10},
    "dion": {**_NORMUON, "ns_coefficients": "polar_express", "adjust_lr_fn": "spectral"},
    "modded": {
        **_NORMUON,
        "nesterov": True,
        "ns_coefficients": "polar_express",
        "adjust_lr_fn": "original",
        "second_moment": "shape",
        "beta2": 0.9,
        "second_moment_eps": 1e-10,
        "second_moment_eps_form": "clamp",
        "cautious_weight_decay": True,
        "decay_lr_power": 2,
    },
}
ADAMUON_PRESETS: Mapping[str, Mapping[str, Any]] = {"paper": _ADAMUON, "official": {**_ADAMUON, "nesterov": True}}


class _PresetOptimizer(Muon8bit):
    """A `Muon8bit` some of whose group keys are those of a preset.

    Attributes:
        presets: name -> group keys.
        preset: the name of this optimizer's.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]]
    _defaults: ClassVar[Mapping[str, Any]] = {}  # of this class, where they are not Muon8bit's

    def __init__(
        self, params: ParamsT, lr: float | Tensor = DEFAULT_LR, *, preset: str = "paper", **options: Any
    ) -> None:
        """Make the optimizer.

        Args:
            params: as `Muon8bit` takes them; groups with `algorithm="adamw"` are not affected.
            lr: as in `Muon8bit`.
            preset: one of `presets`.
            options: `Muon8bit`'s other arguments.

        Raises:
            ValueError: for an unknown preset, or an argument or group key that contradicts it.
        """
        if not is_choice(preset, tuple(self.presets)):
            raise ValueError(f"preset must be one of {', '.join(self.presets)}, not {shown(preset)}")
        self.preset = preset
        self._check_preset(options, "")
        super().__init__(params, lr, **{**self._defaults, **self.presets[preset], **options})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as `Muon8bit.add_param_group`; a key of a Muon group that contradicts the preset is an error."""
        if param_group.get("algorithm", "muon") == "muon":
            self._check_preset(param_group, f"parameter group {len(self.param_groups)}: ")
        super().add_param_group(param_group)

    def _check_loaded(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError for saved keys that are not the preset's, but a momentum, which schedules write."""
        for index, group in enumerate(groups):
            preset = {key: value for key, value in self.presets[self.preset].items() if key != "momentum"}
            other = [key for key in preset if group["algorithm"] == "muon" and group[key] != preset[key]]
            if other:
                fitting = [n for n, keys in self.presets.items() if all(group[k] == v for k, v in keys.items())]
                way_out = f"make it with preset={fitting[0]!r}" if fitting else "take Muon8bit with the keys as saved"
                raise ValueError(
                    f"group {index}: saved with {other[0]}={shown(group[other[0]])}, preset={self.preset!r} of "
                    f"{type(self).__name__} has {preset[other[0]]!r}: {way_out}"
                )

    def _check_preset(self, options: Mapping[str, Any], where: str) -> None:
        """Raise ValueError for a value that is not the preset's."""
        for key, value in self.presets[self.preset].items():
            if key in options and (isinstance(options[key], Tensor) or options[key] != value):
                way_out = (
                    f"leave it out, or take Muon8bit with the keys of {type(self).__name__}.presets[{self.preset!r}]"
                )
                if key == "adjust_lr_fn":
                    way_out = f"build the groups by param_groups(..., adjust_lr_fn={value!r}, adamw_lr=...)"
                raise ValueError(
                    f"{where}{key}={shown(options[key])} contradicts preset={self.preset!r} of {type(self).__name__}, "
                    f"which has {value!r}: {way_out}"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "preset": self.preset}


class NorMuon8bit(_PresetOptimizer):
    """NorMuon (arXiv 2510.05491) with its momentum in 8 bits: O is divided by the root of a second moment of its rows.

    The second moment is fp32, 4 bytes a row. Presets: `"paper"`; `"official"`, the authors' code (Nesterov, the norm of
    O is kept); `"dion"` (Polar Express, lr times sqrt(rows / cols)); `"modded"`, modded-nanogpt (the longer dimension's
    second moment, cautious weight decay by lr squared), without its momentum schedule, its doubled MLP output, and the
    1e-6 that it adds to the norm of a momentum. lr has each version's own meaning: the paper's update has RMS 0.2, so
    that AdamW's lr fits.
    """

    presets = NORMUON_PRESETS


class AdaMuon8bit(_PresetOptimizer):
    """AdaMuon (arXiv 2507.11005) in 8 bits: signs of the momentum are orthogonalized, O divided by its second moment.

    Both moments have 8 bits an element; the momentum's codebook is dynamic unless another is asked for, since of some
    matrices linear codes flip a sixth of the signs (docs/results/adamuon.md). The update has RMS 0.2, so that AdamW's
    lr and weight decay carry over. Presets: `"paper"`; `"official"`, the authors' code, which adds Nesterov.
    """

    presets = ADAMUON_PRESETS
    _defaults: ClassVar[Mapping[str, Any]] = {"codebook": "dynamic"}
