"""Workloads: the hidden matrices of real models, of LoRA adapters on one, and of a layer of experts.

Dimensions are those of the models' published config.json: hidden_size, intermediate_size, num_hidden_layers,
num_attention_heads, num_key_value_heads and head_dim of meta-llama/Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B.
Embeddings, head and norms are not Muon's and not here. Nothing is left out of a model: all layers are stepped.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import prod

Shape = tuple[int, ...]  # [rows, cols], or [experts, rows, cols]


@dataclass(frozen=True)
class Llama:
    """A Llama-style model; `kv` is num_key_value_heads * head_dim, queries have `hidden` columns in all of these."""

    hidden: int
    intermediate: int
    layers: int
    kv: int

    def linears(self) -> list[Shape]:
        """Return [out, in] of q, k, v, o, gate, up and down of one layer."""
        h, f, kv = self.hidden, self.intermediate, self.kv
        return [(h, h), (kv, h), (kv, h), (h, h), (f, h), (f, h), (h, f)]


@dataclass(frozen=True)
class Workload:
    """Parameters that one optimizer steps together."""

    name: str
    shapes: list[Shape]
    note: str

    @property
    def num_elements(self) -> int:
        return sum(prod(shape) for shape in self.shapes)

    def matrices(self) -> Counter[tuple[int, int]]:
        """Return how many matrices of each [rows, cols]; a stack of experts counts each of them."""
        counts: Counter[tuple[int, int]] = Counter()
        for shape in self.shapes:
            counts[shape[-2], shape[-1]] += prod(shape[:-2])
        return counts


MODELS = {
    "Llama-3.2-1B": Llama(hidden=2048, intermediate=8192, layers=16, kv=8 * 64),
    "Llama-3.2-3B": Llama(hidden=3072, intermediate=8192, layers=28, kv=8 * 128),
    "Llama-3.1-8B": Llama(hidden=4096, intermediate=14336, layers=32, kv=8 * 128),
}
LORA, LORA_MODEL, LORA_RANK = "LoRA r=16 on Llama-3.2-3B", "Llama-3.2-3B", 16
MOE = "MoE 64 x (1024, 2048)"
MOE_EXPERTS, MOE_ROWS, MOE_COLS = 64, 1024, 2048
# A dry run divides every dimension by this and keeps one layer and two experts.
DRY_DIVISOR = 32


def _dry(model: Llama) -> Llama:
    d = DRY_DIVISOR
    return replace(model, hidden=model.hidden // d, intermediate=model.intermediate // d, layers=1, kv=model.kv // d)


def workloads(dry: bool = False) -> list[Workload]:
    """Return the five workloads, in the order of the report; with `dry` tiny ones of the same form."""
    models = {name: _dry(model) if dry else model for name, model in MODELS.items()}
    result = [
        Workload(name, model.linears() * model.layers, f"all hidden matrices, {model.layers} layers")
        for name, model in models.items()
    ]
    rank = LORA_RANK // 4 if dry else LORA_RANK
    base = models[LORA_MODEL]
    pairs: list[Shape] = [pair for out, into in base.linears() for pair in ((rank, into), (out, rank))]
    result.append(Workload(LORA, pairs * base.layers, f"A and B of all linear layers, {base.layers} layers"))
    experts, rows, cols = (
        (2, MOE_ROWS // DRY_DIVISOR, MOE_COLS // DRY_DIVISOR) if dry else (MOE_EXPERTS, MOE_ROWS, MOE_COLS)
    )
    stacks: list[Shape] = [(experts, rows, cols), (experts, rows, cols), (experts, cols, rows)]
    result.append(Workload(MOE, stacks, "one layer: gate, up and down stacked over the experts"))
    return result


def shape_classes(dry: bool = False, largest_class: int = 16) -> list[Workload]:
    """Return each distinct matrix shape of the workloads by itself.

    It is there as one matrix and as a class of up to `largest_class`.
    """
    counts: Counter[tuple[int, int]] = Counter()
    for workload in workloads(dry):
        for shape, count in workload.matrices().items():
            counts[shape] = max(counts[shape], count)
    result = []
    for (rows, cols), count in counts.items():
        for number in sorted({1, min(count, largest_class)}):
            result.append(Workload(f"{number} x ({rows}, {cols})", [(rows, cols)] * number, ""))
    return result
