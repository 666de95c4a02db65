"""Parameters of adapters other than LoRA, by what peft's layers say of themselves; peft is not imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .lora import is_adapter

# Factors whose product, Kronecker's included, is added to or multiplies the weight: LoHa, LoKr, DeLoRA, HiRA and
# supertuning in peft 0.21. All other parts are rotations, reflections, spectra, masks or vectors.
_FACTORS = re.compile(r"hada_w[12]_[ab]|lokr_w[12](_[ab])?|(delora|hira|supertuning_lora)_[AB]")

# Trained copies of a module, and rows of an embedding: routed as what they stand for.
_COPIES = ("modules_to_save", "trainable_tokens_delta")


@dataclass(frozen=True)
class OtherPart:
    """A parameter of an adapter: `kind` is the attribute of peft's layer that holds it, `base` the adapted weight."""

    kind: str
    base: Tensor | None

    @property
    def is_factor(self) -> bool:
        """Whether it is a matrix that is multiplied with another one."""
        return _FACTORS.fullmatch(self.kind) is not None


def other_adapter(name: str, modules: Mapping[str, nn.Module]) -> OtherPart | None:
    """Return what the parameter `name` is of an adapter that is no LoRA, or None."""
    if is_adapter(name):
        return None
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        layer = modules.get(".".join(parts[:depth]))
        if parts[depth] in getattr(layer, "adapter_layer_names", ()) and parts[depth] not in _COPIES:
            base = layer
            while isinstance(inner := getattr(base, "base_layer", None), nn.Module):
                base = inner
            weight = getattr(base, "weight", None)
            return OtherPart(parts[depth], weight if isinstance(weight, Tensor) else None)
    return None
