"""Optimizer of the package: groups, lazy state, the two-phase step, state dicts. Equations are in `step/muon.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ._values import check_is_params, check_named
from .config import (
    DEFAULT_BETA2,
    DEFAULT_BLOCK_SIZE,
    DEFAULT_EPS,
    DEFAULT_LR,
    DEFAULT_MOMENTUM,
    DEFAULT_NS_STEPS,
    DEFAULT_SECOND_MOMENT_EPS,
    DEFAULT_STEP_TIMEOUT,
    DEFAULT_WEIGHT_DECAY,
    DEFAULT_WORKSPACE_BYTES,
    STATE_KEYS,
    Backend,
    Codebook,
    EpsForm,
    OnNonfinite,
    ParamRounding,
    Rescale,
    SecondMomentKind,
    StateDevice,
    ZeroSlices,
    check_running,
)
from .orthogonalize import active_table
from .orthogonalize.coefficients import JORDAN
from .sharded_optimizer import ShardedOptimizer
from .state_dict import checked, empty
from .step import phases, rounding
from .step.commit import Commit
from .step.group_options import GroupOptions, Options
from .step.new_groups import check_params, check_scaled_for, complete_group
from .step.nonfinite import GradientCheck, NonFiniteGradientError, PerParamGradientCheck
from .step.offload import StateOffload
from .step.options import (
    IMPLEMENTATION_DEFAULTS,
    MATRIX_DEFAULTS,
    RATES_KEY,
    SCALED_FOR_KEY,
    check_listed,
    check_options,
    check_schedule,
    describe,
    resolve_options,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .distributed import Gathering, RankGroup


class Muon8bit(ShardedOptimizer):
    """Muon with its momentum in 8 bits, and AdamW for the rest of the model, in one optimizer.

    The first nine arguments are torch.optim.Muon's, with its order, defaults and meaning. Sources: arXiv 2509.23106
    (the method); Jordan 2024, Moonlight arXiv 2502.16982 (the update). Equations: `muon8bit/step/muon.py`.

    Args:
        params: tensors of two or more dimensions, `(name, tensor)` pairs, or groups (dicts), which
            `muon8bit.param_groups(model, ...)` makes. float32, bfloat16 or float16. A group with `algorithm="adamw"`
            takes any shape and the keys lr (required), betas, eps, weight_decay, and adamw_bits: 32, or 8 for both
            moments in 8 bits (by bitsandbytes) in tensors of 4096 elements and more. A Muon group takes the arguments
            below from lr to clip_matrix_norm, and three keys for tensors of several matrices. A tensor of three or more
            dimensions holds matrices over its last two, or, with `flatten=True`, one matrix of the first dimension by
            all others (convolutions). `split_sizes` (ints) cuts dimension `split_dim` of each matrix, -2 (default) or
            -1, into pieces orthogonalized and scaled by their own shape (fused QKV, gate/up).
        lr: spectral norm of one update (RMS 1/sqrt(max(rows, cols)) of it) times the factor of `adjust_lr_fn`; a float
            or a 1-element tensor.
        weight_decay: decoupled; a step multiplies the parameter by `1 - lr * weight_decay`.
        momentum: factor of the exponential moving average, in [0, 1).
        nesterov: orthogonalize the blend of gradient and momentum instead of the momentum.
        ns_coefficients: one triple, a sequence of `ns_steps` triples, or `"jordan"`, `"you"` (5 steps),
            `"polar_express"` (5), `"deepseek_v4"` (10).
        eps: lower bound of the Frobenius norm that divides the Newton-Schulz input. At least 2^-60 (8.7e-19) is taken.
        ns_steps: number of Newton-Schulz steps.
        adjust_lr_fn: None or `"original"`: sqrt(max(1, rows / cols)); `"match_rms_adamw"`: 0.2 sqrt(max(rows, cols)),
            with which AdamW's lr and weight decay carry over; `"spectral"`: sqrt(rows / cols).
        bits: 8, or 32 for the same code path with an fp32 momentum.
        codebook: `"linear"` (int8) or `"dynamic"` (uint8, bitsandbytes' signed map; for uneven rows and columns).
        block_size: elements that share one fp32 scale: 64, 128, ... 4096. A block never crosses a row.
        clip_matrix_norm: Frobenius norm that the gradient of a matrix may have at most: a larger one is scaled down to
            it, in place, before the step. None: as it is. Not for sharded parameters.
        backend: None (by device), `"reference"` or `"triton"`; a request that cannot be met raises.
        on_nonfinite: `"raise"` or `"skip"` a step with a NaN or Inf in any gradient, AdamW groups included. In both
            cases nothing at all changes. With all parameters on CUDA, where `step()` does not wait for the device, the
            error comes at the next `step()`; `"raise_at_once"` waits, every step. Under torch's GradScaler, whose
            `grad_scale` and `found_inf` are honoured without waiting, no step raises: it is skipped and counted.
        ns_dtype: float32, float16 or bfloat16 for Newton-Schulz; None: the cheapest for shape and device, by the table
            of rates that `muon8bit tune` has measured on such a GPU, else by the built-in one. A measured table stands
            in the key `rates` of the groups, a string, and goes with them into checkpoints.
        param_rounding: how bfloat16 parameters are rounded, AdamW groups included: `"nearest"`, or `"stochastic"`,
            unbiased, so that updates below half a unit in the last place are not lost. float32 parameters are not
            affected, float16 ones refused. Then `rounding_seed` and `rounding_step` are ints in `param_groups`, saved
            and loaded: runs with equal ones are bitwise the same.
        rounding_seed: 0 .. 2**64 - 1; the same on all replicas. Without meaning for `"nearest"`.
        workspace_bytes: the bytes that a step may allocate at once beyond its state, freed before it returns; at least
            32 MiB. Only a single matrix that needs more exceeds it.
        state_device: None: the state lies with its parameter. `"cpu"`: in host memory, pinned where parameters are on
            CUDA, and each step brings it, batch by batch: 3 bytes over the bus for an element of a Muon parameter, 16
            of an AdamW one. Bitwise the same training, and checkpoint. Beside `workspace_bytes` two batches of it are
            on the device during a step: see `step/offload.py`. Read it from `state_dict()`, which waits for the copies,
            and before the next step. Not with sharded parameters or a `process_group`.
        process_group: ranks with equal parameters and gradients (DDP), which divide the orthogonalization among them.
            None: plain parameters need no communication. Beside sharded parameters on a mesh of several dimensions that
            is not the whole world, a group of just its ranks.
        step_timeout: seconds that a rank waits inside a step for the others that share its matrices. One that is
            killed, stops, or fails when it has begun to write then ends the step on all, with the cause. The process
            group's own timeout says how long a rank waits for others that have not come to `step()` yet. gloo waits on
            the host; with NCCL its watchdog ends the process.
        shard_state: keep only some rows of every momentum on each rank of `process_group`; AdamW's state stays whole.
            Then `state_dict()` needs `consolidate_state_dict` or `sharded_state_dict` first.
        zero_slices: what becomes of a matrix of a stack, as an expert, whose gradient is all zero: `"skip"` it, with
            momentum, decay and rounding, to the bit; or `"step"` it along the momentum that it has, at full size. Other
            parameters are always stepped. Also a key of every Muon group; a group saved without it goes on with
            `"step"`.
        second_moment: divides the orthogonalized O by the root of its second moment: `"row"`, one number a row
            (NorMuon); `"shape"`, a number a row of tall matrices and a column of wide ones; `"element"` (AdaMuon); None
            leaves O. Equations: `step/second_moment.py`. The next four say how; `NorMuon8bit` and `AdaMuon8bit` have
            them for each published version.
        beta2: averaging factor of the second moment, in [0, 1).
        second_moment_eps: in the unit of O, added to the root; with the form `"clamp"` a lower bound under it.
        second_moment_eps_form: `"add"` or `"clamp"`.
        rescale: `"keep"` gives the quotient the norm of O, `"rms"` an RMS of 0.2, without `adjust_lr_fn`; None neither.
        sign_momentum: orthogonalize the signs of the Newton-Schulz input.
        maximize: go up the gradient: the step is that of the negated gradient, to the bit. Also a key of every group.
        cautious_weight_decay: decay only elements that the update moves towards 0, or not at all (arXiv 2510.12402):
            those with update * parameter >= 0. Also a key of every group, AdamW's too.
        decay_lr_power: 1, or 2, with which Muon's decay, `lr * weight_decay`, is multiplied by lr once more, and by the
            shape's factor, as the update is (modded-nanogpt's).
        foreach, fused, capturable, differentiable: None or False. True, which in torch's optimizers asks for one of
            several implementations, is refused: kernels are chosen by device and shape.

    Sharded parameters (DTensors, of `fully_shard` or tensor parallelism): every matrix is orthogonalized whole, once,
    by one rank; the state is sharded like the parameter. All ranks must call `step()` together, with the same groups
    and gradients for the same parameters.

    State of a Muon parameter [..., rows, cols]: `momentum_linear8` (int8) or `momentum_dynamic8` (uint8) of its shape
    with `momentum_scales` (fp32) [..., rows, ceil(cols / block_size)] (`flatten`: rows and columns of that matrix); or
    `momentum_buffer` (fp32) with bits=32 or fewer than 8 columns. Splits do not change it. A second moment is
    `second_moment` (fp32) [..., rows, pieces] or [..., pieces, cols]; of elements `second_moment_sqrt8` (uint8) of the
    parameter's shape with `second_moment_scales` (fp32) [..., rows, blocks], or `second_moment` of its shape where the
    momentum is fp32. State of an AdamW parameter: `step`, `exp_avg`, `exp_avg_sq` (fp32); in 8 bits `step`, on the
    host, `exp_avg_dynamic8` and `exp_avg_sq_dynamic8` (uint8) of its shape, `exp_avg_scales` and `exp_avg_sq_scales`
    (fp32) [..., cols / 256] where that is whole, else [ceil(elements / 256)].

    Raises:
        ValueError: for a parameter or argument that cannot be taken; the message names it and what it may be.
        ImportError: for adamw_bits=8 without bitsandbytes.
        NotImplementedError: for a parameter that is sharded as this optimizer cannot take, by name; for adamw_bits=8
            where this version of bitsandbytes has no kernel; for `state_device` with a `process_group` or sharded
            parameters.
    """

    _step_supports_amp_scaling = True  # torch's GradScaler then gives `grad_scale` and `found_inf` to `step`
    _is_released = False  # `release` sets it

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
        clip_matrix_norm: float | None = None,
        backend: Backend | None = None,
        on_nonfinite: OnNonfinite = "raise",
        ns_dtype: torch.dtype | None = None,
        param_rounding: ParamRounding = "nearest",
        rounding_seed: int = 0,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
        state_device: StateDevice | None = None,
        process_group: ProcessGroup | None = None,
        shard_state: bool = False,
        maximize: bool = False,
        second_moment: SecondMomentKind | None = None,
        beta2: float = DEFAULT_BETA2,
        second_moment_eps: float = DEFAULT_SECOND_MOMENT_EPS,
        second_moment_eps_form: EpsForm = "add",
        rescale: Rescale | None = None,
        sign_momentum: bool = False,
        cautious_weight_decay: bool = False,
        decay_lr_power: int = 1,
        zero_slices: ZeroSlices = "skip",
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool | None = False,
        differentiable: bool | None = False,
        step_timeout: float = DEFAULT_STEP_TIMEOUT,
    ) -> None:
        check_running(
            param_rounding=param_rounding,
            on_nonfinite=on_nonfinite,
            ns_dtype=ns_dtype,
            backend=backend,
            workspace_bytes=workspace_bytes,
            state_device=state_device,
            step_timeout=step_timeout,
            shard_state=shard_state,
        )
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
            "clip_matrix_norm": clip_matrix_norm,
            "maximize": maximize,
            "cautious_weight_decay": cautious_weight_decay,
            "decay_lr_power": decay_lr_power,
            "zero_slices": zero_slices,
            **IMPLEMENTATION_DEFAULTS,
            **rounding.initial(param_rounding, rounding_seed),
            **MATRIX_DEFAULTS,
            "second_moment": second_moment,
            "beta2": beta2,
            "second_moment_eps": second_moment_eps,
            "second_moment_eps_form": second_moment_eps_form,
            "rescale": rescale,
            "sign_momentum": sign_momentum,
        }
        check_is_params(params)
        flags = {"foreach": foreach, "fused": fused, "capturable": capturable, "differentiable": differentiable}
        check_options({**defaults, **flags, "rounding_seed": rounding_seed})
        self.backend, self.on_nonfinite, self.ns_dtype = backend, on_nonfinite, ns_dtype
        self.param_rounding, self.workspace_bytes = param_rounding, workspace_bytes
        self.step_timeout = step_timeout
        self._num_calls = self._num_skipped_steps = 0
        self._pending: GradientCheck | PerParamGradientCheck | None = (
            None  # of the last step, if that did not wait for it
        )
        self._unreported: tuple[list[str], int, bool] | None = None  # what was learned of it by others than `step`
        self._failure: str | None = None  # of a step that had begun to write
        self._table = active_table()
        offload = StateOffload(state_device)
        super().__init__(params, defaults, process_group=process_group, shard_state=shard_state, offload=offload)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked whole before anything changes; the class describes its keys.

        Args:
            param_group: a dict with `params` and the group's options.

        Raises:
            ValueError, ImportError, NotImplementedError: as the class raises them; no group is added.
        """
        index = len(self.param_groups)
        own = ("backend", "on_nonfinite", "ns_dtype", "param_rounding", "workspace_bytes", "state_device")
        group = complete_group(param_group, index, {**self.defaults, **{key: getattr(self, key) for key in own}})
        check_named(group, index, self.param_groups)
        scaled_for = group.pop(SCALED_FOR_KEY, None)
        if group["algorithm"] == "muon" and RATES_KEY not in group:
            first = next((g for g in self.param_groups if g["algorithm"] == "muon"), None)
            key = first.get(RATES_KEY) if first else self._table and self._table.key
            group |= {} if key is None else {RATES_KEY: key}
        super().add_param_group(group)
        try:
            check_options(group, f"parameter group {index}: ")
            check_params(group, index)
            check_scaled_for(scaled_for, group, f"parameter group {index}: ")
            self._check_sharded(group, index)
            check_schedule(group, self.ns_dtype, f"parameter group {index}: ")
            if "rounding_step" in group:
                group["rounding_step"] = self.param_groups[0]["rounding_step"]
            for place, param in enumerate(group["params"]):
                rounding.key_of(param, describe(group, index, place), place, group)
        except Exception:
            self.param_groups.pop()
            raise

    # There is nothing to fuse between the kernels, and the bits of a run would change.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.inference_mode(mode=False)  # in which state would be made that no later step can change
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all groups once.

        In a compiled training step it runs eagerly. For parameters without values, on the meta device or under a
        FakeTensorMode, it makes the state, without values too, and counts.

        Args:
            closure: called with gradients enabled, before the step.

        Returns:
            The result of `closure`, else None.

        Raises:
            NonFiniteGradientError: by this step, before anything was written, or on CUDA by the one before.
            ValueError: for a value that was written into a group, or a gradient that cannot be taken; the message names
                the group or the parameter, and nothing has changed.
            RuntimeError: while a CUDA graph is captured; after a step that failed when it had begun to write.
            Exception: for any other failure, as torch.OutOfMemoryError. Up to the first Newton-Schulz nothing has
                changed, and the step can be tried again. Later parameters and state belong to different steps: `step()`
                and `state_dict()` then refuse, until a state is loaded.
        """
        if torch.cuda.is_available():
            phases.check_not_captured()
        if self._rank_group is None and self._failure is not None:
            self._check_not_failed()
        if self._pending is not None or self._unreported is not None:
            self._resolve_pending_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._num_calls += 1
        for index, group in enumerate(self.param_groups):  # which the next lines go through
            check_listed(group, f"parameter group {index}: ")
        rank_group = self._find_rank_group()
        if phases.is_dry(self.param_groups):
            self._check_not_failed()
            phases.dry_run(self.param_groups, self._options(), self.state, rank_group, self._offload)
            self._consolidated = None
            rounding.advance(self.param_groups)
            return loss
        if rank_group is not None:
            self._wait_for_ranks(rank_group)
        with self._committing(rank_group) as commit:
            check, is_written = self._step_groups(self.param_groups, rank_group, commit, self._num_calls)
            if not is_written:
                self._raise_or_count(check.nonfinite_names(), check.step, check.is_scaled)
                return loss
            if self.param_rounding == "stochastic":
                rounding.advance(self.param_groups)
            self._pending = check if check.is_pending else None  # settling takes back what was advanced
            self._consolidated = None
        return loss

    def _options(self, groups: Sequence[dict[str, Any]] | None = None) -> list[GroupOptions]:
        """Check what groups say now, and return it.

        Raises:
            ValueError: for a value that a hand or a scheduler has written into a group since it was made; the message
                names the group.
        """
        running = Options(
            self.ns_dtype, self.backend, self.workspace_bytes, grad_scale=getattr(self, "grad_scale", None)
        )
        is_rounded = self.param_rounding == "stochastic"
        groups = self.param_groups if groups is None else groups
        return [resolve_options(group, index, running, is_rounded=is_rounded) for index, group in enumerate(groups)]

    def _step_groups(
        self,
        groups: Sequence[dict[str, Any]],
        rank_group: RankGroup | None,
        commit: Commit,
        number: int,
        num_before: int = 0,
    ) -> tuple[GradientCheck, bool]:
        """Read, decide whether the gradients are finite, and write unless they are known not to be.

        Args:
            groups: the parameter groups.
            rank_group: the ranks that share matrices, or None.
            commit: called before the first write.
            number: the number of the call of `step()`.
            num_before: the number of parameters of the optimizer in front of these groups.

        Returns:
            The check of the gradients, and whether the step was written.
        """
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        running = Options(self.ns_dtype, self.backend, self.workspace_bytes)

        def read() -> tuple[list[phases.GroupStep], Gathering | None]:
            work = phases.read(groups, self._options(groups), self.state, rank_group, self._offload, num_before)
            return work, phases.gathering(work, rank_group, found_inf) if rank_group else None

        if rank_group is None:
            work, gathering = read()
        else:
            alike = running, self.on_nonfinite, self.shard_state, found_inf is not None
            work, gathering = rank_group.check_ranks_agree(read, self.param_groups, self.state, alike)
        flags = phases.finite_flags(work, rank_group, gathering, found_inf)
        check = GradientCheck(flags, number, is_scaled=found_inf is not None)
        check.is_pending = check.is_asynchronous and self.on_nonfinite != "raise_at_once"
        if not check.is_pending and check.nonfinite_names():
            return check, False
        pending = check if check.is_pending else None
        phases.write(work, self.state, running, pending, rank_group, self._offload, commit)
        if self.stack_activity is not None:
            self.stack_activity.record(work, pending, number)
        return check, True

    def _wait_for_ranks(self, rank_group: RankGroup) -> None:
        """Wait for the other ranks; if a step failed on one of them when it had begun to write, all refuse to go on."""
        failure: Exception | None = None
        try:
            self._check_not_failed()
        except RuntimeError as error:
            failure = error
        try:
            rank_group.wait_for_ranks(failure)
        except RuntimeError as error:
            if rank_group.is_failure_known and self._failure is None:  # no other failure is told here
                self._failure = str(error)
            raise

    @contextmanager
    def _committing(self, rank_group: RankGroup | None = None, *, has_begun: bool = False) -> Iterator[Commit]:
        """Mark the optimizer if its step fails after `Commit`, and tell the other ranks of the failure.

        With `has_begun` it is marked for any failure.
        """
        commit = Commit(rank_group.confirm if rank_group is not None else None)
        try:
            yield commit
        except BaseException as error:
            if commit.is_done or has_begun:
                self._failure = f"{type(error).__name__}: {error}"
            if rank_group is not None and not isinstance(error, NonFiniteGradientError):  # which all ranks raise
                rank_group.report_failure(error, is_agreed=commit.is_confirmed)
            raise

    def _check_not_failed(self) -> None:
        """Raise RuntimeError after a step that failed when it had begun to write."""
        if self._failure is not None:
            raise RuntimeError(
                f"a step failed when it had begun to write ({self._failure}): some parameters and their state are a "
                "step ahead of the others. Load a checkpoint into the model, and its optimizer state by "
                "load_state_dict(), which makes this optimizer usable again"
            )

    def _raise_or_count(self, names: list[str], step: int, is_scaled: bool) -> None:
        """Raise an error for a step with gradients that are not finite, or count it."""
        if self.on_nonfinite != "skip" and not is_scaled:
            raise NonFiniteGradientError(names, step)
        self._num_skipped_steps += 1

    def _read_pending_check(self) -> None:
        """Wait for the last step's check if that step did not; `_resolve_pending_check` raises or counts it."""
        check, self._pending = self._pending, None
        names = [] if check is None else check.nonfinite_names()
        if check is not None and names:
            check.undo_counters()
            if check.is_whole:
                rounding.advance(self.param_groups, by=-1)
            self._unreported = names, check.step, check.is_scaled

    def _resolve_pending_check(self) -> None:
        """Wait for the last step's check, and raise or count it."""
        self._read_pending_check()
        untold, self._unreported = self._unreported, None
        if untold is not None:
            self._raise_or_count(*untold)

    @property
    def num_skipped_steps(self) -> int:
        """Return how many steps `on_nonfinite="skip"` or a GradScaler left out; on CUDA wait for the last one."""
        self._read_pending_check()
        if self._unreported is not None and (self.on_nonfinite == "skip" or self._unreported[2]):
            self._resolve_pending_check()
        return self._num_skipped_steps

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict, as torch does; with `shard_state` see `ShardedOptimizer.state_dict`.

        A gradient of the last step that is not finite is told by the next `step()`, not here. The last step's check is
        waited for only where numbers on the host depend on it: the counters of stochastic rounding and of AdamW in 8
        bits.

        Raises:
            RuntimeError: after a step that failed when it had begun to write.
        """
        self._check_not_failed()
        if self._pending is not None and (self._pending.advanced or self.param_rounding == "stochastic"):
            self._read_pending_check()
        self._offload.synchronize()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._check_not_failed()
        self._read_pending_check()
        self._offload.synchronize()
        own = ["backend", "on_nonfinite", "ns_dtype", "param_rounding", "workspace_bytes", "step_timeout"]
        own += ["_num_calls", "_num_skipped_steps", "_pending", "_unreported", "_failure"]
        return {**super().__getstate__(), **{key: getattr(self, key) for key in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state from loading, copying or pickling, which all leave tensors in pageable memory."""
        super().__setstate__(state)
        for param, tensors in self.state.items():
            for key in STATE_KEYS & tensors.keys():
                tensors[key] = self._offload.at_home(tensors[key], param.device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, keeping every dtype; it is checked whole first, so that an error changes nothing.

        `backend`, `on_nonfinite`, `param_rounding` and the options of a group's storage and cut (`bits`, `codebook`,
        `block_size`, `flatten`, `split_sizes`, `split_dim`, `adamw_bits`; other saved values are refused) stay the
        constructor's. All other hyper-parameters come from `state_dict`, seed and step of stochastic rounding too;
        without them there, rounding starts at step 0 of the running seed. Each rank takes its part of sharded state,
        out of whole tensors or of DTensors that lie alike, without communication. torch's own method casts the state to
        the parameter's dtype. A check of the last step that has not been told yet is dropped.

        Args:
            state_dict: from `state_dict()`, of this or another run.

        Raises:
            ValueError: for a state that does not fit; the message names the group, parameter or key.
        """
        self.prepare_load(state_dict)()

    def prepare_load(self, state_dict: dict[str, Any]) -> Callable[[], None]:
        """Check a state dict, and return a function that then loads it, for ranks that must all load or none.

        Args:
            state_dict: as for `load_state_dict`.

        Raises:
            ValueError: for a state that does not fit; the message names the group, parameter or key.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"a state dict is needed, as state_dict() gives it, not a {type(state_dict).__name__}")
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            hooked = pre_hook(self, state_dict)
            state_dict = state_dict if hooked is None else hooked
        if self._pending is not None and self._pending.nonfinite_names():
            self._pending.undo_counters()  # what is loaded may be the running state itself
        with torch.inference_mode(mode=False):  # state made in it could not be changed outside
            groups, state = checked(state_dict, self.param_groups, self._find_rank_group(), self._offload)
        self._check_loaded(groups)

        def load() -> None:
            self._pending = self._unreported = self._consolidated = self._failure = None
            self.__setstate__({"state": state, "param_groups": groups})
            for post_hook in self._optimizer_load_state_dict_post_hooks.values():
                post_hook(self)

        return load

    def _check_loaded(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError for loaded groups that a class over this one cannot take."""

    def empty_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Return parameter -> its entry of `state` after a step, with values that mean nothing.

        Distributed checkpointing loads into it. It takes this rank's memory alone, on the state's devices; `state`
        itself does not change.
        """
        return empty(self.param_groups, self._find_rank_group(), self._offload)
