"""The optimizer: groups, lazy state, the two-phase step, state dicts. The equations are in `update.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import adamw, loading, muon, rounding
from .config import (
    DEFAULT_BLOCK_SIZE,
    DEFAULT_EPS,
    DEFAULT_LR,
    DEFAULT_MOMENTUM,
    DEFAULT_NS_STEPS,
    DEFAULT_WEIGHT_DECAY,
    ON_NONFINITE,
    PARAM_ROUNDINGS,
    Backend,
    Codebook,
    OnNonfinite,
    ParamRounding,
)
from .groups import MATRIX_DEFAULTS, MUON_ONLY_KEYS, check_options, check_params, complete_group, describe
from .orthogonalize.coefficients import JORDAN


class NonFiniteGradientError(RuntimeError):
    """A gradient holds a NaN or Inf, or values beyond 1e19, whose squares overflow fp32; nothing changed.

    Attributes:
        names: the parameters whose gradients are not finite.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        shown = ", ".join(self.names[:5]) + (f" and {len(self.names) - 5} more" if len(self.names) > 5 else "")
        super().__init__(
            f"NaN, Inf or overflow in the gradient of {shown}. Nothing was changed. Lower the learning rate or find "
            "the operation that overflows; on_nonfinite='skip' skips such steps and counts them"
        )

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:
        return type(self), (self.names,)


@dataclass(frozen=True)
class _Entry:
    """A parameter of this step; `reading` is None in an AdamW group, `key` where rounding is to nearest."""

    name: str
    param: Tensor
    grad: Tensor
    key: int | None
    reading: muon.Reading | None


def _nonfinite_names(entries: Sequence[_Entry]) -> list[str]:
    """Parameters whose gradient is not finite, or overflows in its norm; one host read a device."""
    by_device: dict[torch.device, list[tuple[Tensor, str]]] = {}
    for entry in entries:
        squares: list[Tensor] = []
        if entry.reading is not None:
            squares = [matrix.sumsq for matrix in entry.reading.matrices]
        elif entry.grad.numel():  # both ends propagate NaN; AdamW squares
            squares = [end.float().square() for end in entry.grad.aminmax()]
        if squares:
            flag = torch.stack(squares).isfinite().all()
            by_device.setdefault(flag.device, []).append((flag, entry.name))
    names = []
    for flags in by_device.values():
        finite = torch.stack([flag for flag, _ in flags]).tolist()
        names += [name for ok, (_, name) in zip(finite, flags, strict=True) if not ok]
    return names


class Muon8bit(Optimizer):
    """Muon with its momentum in 8 bits, and AdamW for the rest of the model, in one optimizer.

    The first nine arguments are torch.optim.Muon's, with its order, defaults and meaning. Source of the method:
    arXiv 2509.23106; of the update: Jordan 2024, Moonlight arXiv 2502.16982. Equations: `muon8bit/update.py`.

    Args:
        params: tensors of two or more dimensions, `(name, tensor)` pairs, or groups (dicts), which
            `muon8bit.param_groups(model, ...)` makes. float32, bfloat16 or float16. A group with
            `algorithm="adamw"` takes any shape and the keys lr (required), betas, eps, weight_decay. A Muon group
            takes the arguments below from lr to block_size, and three keys for tensors that hold several matrices.
            Three or more dimensions are a stack over the last two; with `flatten=True` one matrix of the first
            dimension by all others (convolutions). `split_sizes` (ints) cuts dimension `split_dim` of each matrix,
            -2 (default) or -1, into pieces orthogonalized and scaled by their own shape (fused QKV, gate/up).
        lr: spectral norm of one update (RMS 1/sqrt(max(rows, cols)) of it) times the factor of `adjust_lr_fn`;
            a float or a 1-element tensor.
        weight_decay: decoupled; a step multiplies the parameter by `1 - lr * weight_decay`.
        momentum: factor of the exponential moving average, in [0, 1).
        nesterov: orthogonalize the blend of gradient and momentum instead of the momentum.
        ns_coefficients: one triple, a schedule of `ns_steps` triples, or `"jordan"`, `"you"` (5 steps),
            `"polar_express"` (5), `"deepseek_v4"` (10).
        eps: lower bound of the Frobenius norm that divides the Newton-Schulz input.
        ns_steps: number of Newton-Schulz steps.
        adjust_lr_fn: None or `"original"`: sqrt(max(1, rows / cols)); `"match_rms_adamw"`:
            0.2 sqrt(max(rows, cols)), with which AdamW's lr and weight decay carry over.
        bits: 8, or 32 for the same code path with an fp32 momentum.
        codebook: `"linear"` (int8) or `"dynamic"` (uint8, bitsandbytes' signed map; for uneven rows and columns).
        block_size: elements that share one fp32 scale: 64, 128, ... 4096. A block never crosses a row.
        backend: None (by device), `"reference"` or `"triton"`; a request that cannot be met raises.
        on_nonfinite: `"raise"` or `"skip"` a step with a NaN or Inf in any gradient, AdamW groups included. In
            both cases nothing at all changes.
        ns_dtype: torch.float32 or torch.bfloat16 for Newton-Schulz; None: the cheaper one for shape and device.
        param_rounding: how bfloat16 parameters are rounded, AdamW groups included: `"nearest"`, or `"stochastic"`,
            unbiased, so that updates below half a unit in the last place are not lost. float32 parameters are not
            affected, float16 ones refused. Then `rounding_seed` and `rounding_step` are ints in `param_groups`,
            saved and loaded: runs with equal ones are bitwise the same.
        rounding_seed: 0 .. 2**64 - 1; the same on all replicas. Without meaning for `"nearest"`.

    Attributes:
        num_skipped_steps: steps that `on_nonfinite="skip"` left out.

    State of a Muon parameter [..., rows, cols]: `momentum_linear8` (int8) or `momentum_dynamic8` (uint8) of its
    shape with `momentum_scales` (fp32) [..., rows, ceil(cols / block_size)] (`flatten`: rows and columns of that
    matrix); or `momentum_buffer` (fp32) with bits=32 or fewer than 8 columns. Splits do not change it. Of an AdamW
    parameter: `step`, `exp_avg`, `exp_avg_sq` (fp32).

    Raises:
        ValueError: names the parameter or argument and what it may be.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = DEFAULT_LR,
        weight_decay: float = DEFAULT_WEIGHT_DECAY,
        momentum: float = DEFAULT_MOMENTUM,
        nesterov: bool = True,
        ns_coefficients: str | Sequence[float] | Sequence[Sequence[float]] = JORDAN,
        eps: float = DEFAULT_EPS,
        ns_steps: int = DEFAULT_NS_STEPS,
        adjust_lr_fn: str | None = None,
        *,
        bits: int = 8,
        codebook: Codebook = "linear",
        block_size: int = DEFAULT_BLOCK_SIZE,
        backend: Backend | None = None,
        on_nonfinite: OnNonfinite = "raise",
        ns_dtype: torch.dtype | None = None,
        param_rounding: ParamRounding = "nearest",
        rounding_seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "bits": bits,
            "codebook": codebook,
            "block_size": block_size,
            **rounding.initial(param_rounding, rounding_seed),
            **MATRIX_DEFAULTS,
        }
        check_options({**defaults, "rounding_seed": rounding_seed})
        if param_rounding not in PARAM_ROUNDINGS:
            raise ValueError(f"param_rounding must be one of {PARAM_ROUNDINGS}, not {param_rounding!r}")
        if on_nonfinite not in ON_NONFINITE:
            raise ValueError(f"on_nonfinite must be one of {ON_NONFINITE}, not {on_nonfinite!r}")
        if ns_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"ns_dtype must be None, torch.float32 or torch.bfloat16, not {ns_dtype}")
        if backend not in (None, "reference", "triton"):
            raise ValueError(f"backend must be None, 'reference' or 'triton', not {backend!r}")
        self.backend, self.on_nonfinite, self.ns_dtype = backend, on_nonfinite, ns_dtype
        self.param_rounding = param_rounding
        self.num_skipped_steps = 0
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked whole before anything changes. See the class for its keys."""
        index = len(self.param_groups)
        group = complete_group(param_group, index)
        super().add_param_group(group)
        try:
            if group["algorithm"] == "adamw":
                for key in MUON_ONLY_KEYS:
                    del group[key]
            check_options(group, f"parameter group {index}: ")
            check_params(group, index)
            if "rounding_step" in group:
                group["rounding_step"] = self.param_groups[0]["rounding_step"]
            for place, param in enumerate(group["params"]):
                rounding.key_of(param, describe(group, index, place), place, group)
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` (called with gradients enabled) returned, else None.

        Raises:
            NonFiniteGradientError: with `on_nonfinite="raise"`, before anything was written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries = [list(self._read(i)) for i in range(len(self.param_groups))]
        nonfinite = _nonfinite_names([entry for members in entries for entry in members])
        if nonfinite:
            if self.on_nonfinite == "raise":
                raise NonFiniteGradientError(nonfinite)
            self.num_skipped_steps += 1
            return loss
        for group, members in zip(self.param_groups, entries, strict=True):
            if group["algorithm"] == "muon":
                matrices = []
                for entry in members:
                    if entry.reading is not None:
                        self.state[entry.param].update(entry.reading.momentum.to_state())
                        matrices += entry.reading.matrices
                muon.step_(matrices, group, ns_dtype=self.ns_dtype, backend=self.backend)
            else:
                for entry in members:
                    if not self.state.get(entry.param):
                        self.state[entry.param] = adamw.init_state(entry.param)
                params = [entry.param for entry in members]
                states, keys = [self.state[p] for p in params], [entry.key for entry in members]
                adamw.step_(params, [entry.grad for entry in members], states, group, keys, self.backend)
        rounding.advance(self.param_groups)
        return loss

    def _read(self, group_index: int) -> Iterator[_Entry]:
        """First phase, read only: the parameters of a group that have a gradient now."""
        group = self.param_groups[group_index]
        num_before = sum(len(earlier["params"]) for earlier in self.param_groups[:group_index])
        for index, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            name = describe(group, group_index, index)
            if param.grad.is_sparse:
                raise ValueError(f"{name} has a sparse gradient: use sparse=False in its embedding")
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.device.type != "cpu" and lr.device != param.device:
                raise ValueError(f"lr is a tensor on {lr.device}, {name} is on {param.device}: keep lr on the CPU")
            key = rounding.key_of(param, name, num_before + index, group)
            reading = None
            if group["algorithm"] == "muon":
                reading = muon.read(param, param.grad, self.state.get(param), group, self.backend, key)
            yield _Entry(name, param, param.grad, key, reading)

    def __getstate__(self) -> dict[str, Any]:
        own = ("backend", "on_nonfinite", "ns_dtype", "param_rounding", "num_skipped_steps")
        return {**super().__getstate__(), **{key: getattr(self, key) for key in own}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, keeping every dtype. Checked whole first: after an error the optimizer is as before.

        `backend`, `on_nonfinite`, `param_rounding` and what says how a group is stored and cut (`bits`, `codebook`,
        `block_size`, `flatten`, `split_sizes`, `split_dim`; other saved values are refused) stay the constructor's, all
        other hyper-parameters come from `state_dict`, seed and step of stochastic rounding too; without them there,
        rounding starts at step 0 of the running seed. torch's own method casts the state to the parameter's dtype.

        Raises:
            ValueError: names the group, parameter or key that does not fit.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            hooked = pre_hook(self, state_dict)
            state_dict = state_dict if hooked is None else hooked
        groups, state = loading.checked(state_dict, self.param_groups)
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)
