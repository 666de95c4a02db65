"""Parts of an optimizer step on a CPU, each timed by itself on one model's matrices: what the step is made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from muon8bit_kernels import reference
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from benchmarks.training.step_arms import FORMATS, matrix_shapes, seconds
from muon8bit.config import DEFAULT_BLOCK_SIZE
from muon8bit.orthogonalize import choose_method, device_kind, orthogonalize, resolve_coefficients

JORDAN = (3.4445, -4.7750, 2.0315)
CPU = torch.device("cpu")
CHUNK = 2**17  # elements that stay in a core's cache


class StepParts:
    """The matrices of a model as the kernels take them, and a function for every part."""

    def __init__(self, hidden: int, layers: int) -> None:
        torch.manual_seed(0)
        self.counts = matrix_shapes(hidden, layers)
        self.params = {shape: [torch.randn(1, *shape) for _ in range(n)] for shape, n in self.counts.items()}
        self.grads = {shape: [1e-2 * torch.randn(1, *shape) for _ in range(n)] for shape, n in self.counts.items()}
        self.states = {name: self._state(options) for name, options in FORMATS.items()}
        self.schedule = resolve_coefficients("jordan", 5)
        self.methods = {shape: choose_method(*shape, self.schedule, device_kind(CPU)) for shape in self.counts}

    def _state(self, options: dict[str, Any]) -> dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]]:
        """Make codes and scales of every matrix, by shape; with 32 bits no scales."""
        states = {}
        for shape, grads in self.grads.items():
            if "codebook" not in options:
                states[shape] = [grad.clone() for grad in grads], list[Tensor]()
                continue
            pairs = [
                reference.quantize(grad[0], codebook=options["codebook"], block_size=DEFAULT_BLOCK_SIZE)
                for grad in grads
            ]
            states[shape] = [codes[None] for codes, _ in pairs], [scales[None] for _, scales in pairs]
        return states

    def parts(self) -> dict[str, Callable[[], float]]:
        """Return by name a function that runs the part once for every matrix, and returns its CPU seconds."""
        found: dict[str, Callable[[], float]] = {
            "newton_schulz": self._newton_schulz,
            "newton_schulz torch": self._newton_schulz_torch,
            "update": partial(seconds, self._update),
            "read_write": partial(seconds, self._read_write),
            "read_write in cache": partial(seconds, self._in_cache),
        }
        for name in FORMATS:
            found[f"stats {name}"] = partial(seconds, partial(self._stats, name))
            found[f"apply {name}"] = partial(seconds, partial(self._apply, name))
        return found

    def _newton_schulz(self) -> float:
        """Measure one matrix of each shape, from the normalized matrix on, times their number."""
        total = 0.0
        for shape, count in self.counts.items():
            method, grad = self.methods[shape], self.grads[shape][0]
            X = (grad / grad.norm()).to(method.dtype)
            total += count * seconds(partial(orthogonalize, X, self.schedule, method))
        return total

    def _newton_schulz_torch(self) -> float:
        """Measure the same in torch's function, which casts and normalizes by itself."""
        grads = {shape: of[0][0] for shape, of in self.grads.items()}
        return sum(
            count * seconds(partial(_zeropower_via_newtonschulz, grads[shape], JORDAN, 5, 1e-7))
            for shape, count in self.counts.items()
        )

    def _options(self, name: str) -> dict[str, Any]:
        codebook = FORMATS[name].get("codebook")
        return {"beta": 0.95, "nesterov": True, "codebook": codebook, "block_size": DEFAULT_BLOCK_SIZE}

    def _stats(self, name: str) -> None:
        for shape, (codes, scales) in self.states[name].items():
            reference.momentum_stats(codes, scales or None, self.grads[shape], **self._options(name))

    def _apply(self, name: str) -> None:
        """Apply matrix by matrix, as a step does from 128 rows on."""
        for shape, (codes, scales) in self.states[name].items():
            norm, out = torch.ones(1), torch.empty(1, *shape, dtype=self.methods[shape].dtype)
            for i, grad in enumerate(self.grads[shape]):
                own = scales[i : i + 1] or None
                reference.momentum_apply(codes[i : i + 1], own, [grad], norm, out, **self._options(name))

    def _update(self) -> None:
        for shape, params in self.params.items():
            direction = torch.zeros(1, *shape, dtype=self.methods[shape].dtype)
            for param in params:
                reference.update_params([param], direction, decay=1.0, scale=1e-3)

    def _read_write(self) -> None:
        for params in self.params.values():
            for param in params:
                param.mul_(1.0)

    def _in_cache(self) -> None:
        """Run the pass of `read_write` over a buffer that stays in a core's cache."""
        buffer = torch.ones(CHUNK)
        for _ in range(sum(n * prod(shape) for shape, n in self.counts.items()) // CHUNK):
            buffer.mul_(1.0)
