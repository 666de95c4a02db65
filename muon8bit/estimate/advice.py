"""Which setups fit a budget: the one asked for, with single options more or less, with several, with adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from .estimator import Estimate, Estimator
from .optimizers import OURS
from .setup import Setup

# Tokens whose logits take about as much as a layer's activations.
LOSS_CHUNK = 512
# An optimizer, of `OPTIMIZERS` or `FAMILY`, and how it trains.
Choice: TypeAlias = tuple[str, Setup]


@dataclass(frozen=True)
class BudgetCheck:
    """Result for one optimizer: `spare_bytes` is the budget less the peak, negative where the setup does not fit."""

    spare_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget."""
        return self.spare_bytes >= 0


@dataclass(frozen=True)
class Offer:
    """A setup and what it takes.

    Attributes:
        optimizer: of `OPTIMIZERS` or `FAMILY`.
        setup: how it trains.
        peak_bytes: of a GPU.
        host_bytes: of host memory, beside it, for state that is kept there.
    """

    optimizer: str
    setup: Setup
    peak_bytes: int
    host_bytes: int = 0


@dataclass(frozen=True)
class Advice:
    """Offers that fit a budget, or the nearest miss.

    Attributes:
        offers: those first that change least.
        least: where there are none, what takes least of all that was tried; else None.
    """

    offers: list[Offer]
    least: Offer | None


def check_budget(estimate: Estimate, budget: int) -> dict[str, BudgetCheck]:
    """Check every optimizer's peak against a budget in bytes."""
    return {name: BudgetCheck(budget - estimate.peak_bytes(name)) for name in estimate.optimizers}


def offers(estimator: Estimator, setup: Setup, optimizer: str, budget: int) -> list[Offer]:
    """Return the offers of `advise`."""
    return advise(estimator, setup, optimizer, budget).offers


def advise(estimator: Estimator, setup: Setup, optimizer: str, budget: int) -> Advice:
    """Find what fits, those first that change least; only the setup itself where that fits.

    Every offer has been counted. What the model cannot do is left out: checkpointing, a loss in chunks, an adapter.

    Args:
        estimator: of the model.
        setup: as asked.
        optimizer: of `OPTIMIZERS` or `FAMILY`.
        budget: bytes.
    """
    search = _Search(estimator, budget)
    asked = (optimizer, setup)
    if as_asked := search.fits(asked):
        return Advice([as_asked], None)
    singles = [changed for change in CHANGES if (changed := change(asked))]
    found = [offer for changed in singles if (offer := search.fits(changed))] or search.fewest(asked)
    can_shard = setup.mode == "full" and setup.num_shards == 1 and not setup.release and setup.state_device == "device"
    if can_shard and setup.num_gpus > 1:
        found += search.fewest(_sharded(asked, setup.num_gpus))
    for mode in ("lora", "qlora"):
        if setup.mode == "full" or (setup.mode, mode) == ("lora", "qlora"):
            found += search.fewest(_with_adapter(asked, mode))
    if can_shard and setup.num_gpus == 1:
        sharded = (search.fewest(_sharded(asked, num_gpus)) for num_gpus in (2, 4, 8))
        found += next((several for several in sharded if several), [])
    return Advice(list(dict.fromkeys(found)), None if found else search.least)


def untried(setup: Setup) -> list[str]:
    """Return what `advise` does not try, as options with what they change, for a setup that nothing makes fit."""
    ways = [f"a shorter sequence: --seq-len {setup.seq // 2}"] if setup.seq > 1 else []
    if setup.targets == "all-linear":
        ways.append("an adapter on fewer modules, such as --lora-targets q_proj,k_proj,v_proj,o_proj")
    if setup.mode == "full":
        ways.append(f"more GPUs: --gpus {max(16, 2 * setup.num_gpus)} --shard fsdp2")
    else:
        ways.append("all weights, sharded (adapters are not): --mode full --gpus 8 --shard fsdp2 --adamw-bits 8")
    return ways


class _Search:
    """The choices of one model that fit one budget, bytes."""

    def __init__(self, estimator: Estimator, budget: int) -> None:
        self._estimator, self._budget = estimator, budget
        self.least: Offer | None = None

    def _peak(self, choice: Choice) -> int | None:
        """Return the bytes of a choice's peak, or None where the model does not support the choice."""
        try:
            return self._estimator.memory(*choice).peak_bytes
        except ValueError:
            return None

    def fits(self, choice: Choice) -> Offer | None:
        """Return the choice as an offer, or None where it does not fit."""
        peak = self._peak(choice)
        if peak is None:
            return None
        offer = Offer(*choice, peak, self._estimator.host_bytes(*choice))
        if self.least is None or peak < self.least.peak_bytes:
            self.least = offer
        return offer if peak <= self._budget else None

    def fewest(self, start: Choice) -> list[Offer]:
        """Return an offer with few changes, if any: made one by one until it fits, then undone where it still does."""
        made: list[_Change] = []
        now, found = start, self.fits(start)
        for change in CHANGES:
            changed = None if found else change(now)
            if changed is not None and self._peak(changed) is not None:
                made, now, found = [*made, change], changed, self.fits(changed)
        for change in made[:-1] if found else ():
            fewer = [other for other in made if other is not change]
            if smaller := self.fits(_made(start, fewer)):
                made, found = fewer, smaller
        return [found] if found else []


def _made(start: Choice, made: Sequence[_Change]) -> Choice:
    """Apply the changes to the start; a change that does nothing without another one is left out."""
    for change in made:
        start = change(start) or start
    return start


def _sharded(choice: Choice, num_gpus: int) -> Choice:
    """Return a choice sharded by FSDP2, with Muon8bit in place of an optimizer that does not run so."""
    optimizer, setup = choice
    can = optimizer == "adamw" or optimizer in OURS
    return optimizer if can else "muon8bit", replace(setup, num_gpus=num_gpus, shard="fsdp2")


def _with_adapter(choice: Choice, mode: str) -> Choice:
    """Replace full training by LoRA or QLoRA, and drop `+adamw8bit`: of most models AdamW then trains nothing."""
    optimizer, setup = choice
    more: dict[str, Any] = {"qlora": True, "dtype": "bf16"} if mode == "qlora" else {}
    setup = replace(setup, lora=setup.lora or 16, mixed_precision="auto", **more)
    return optimizer.removesuffix("+adamw8bit"), setup


def _muon8bit(choice: Choice) -> Choice | None:
    return None if choice[0] in OURS else ("muon8bit", choice[1])


def _checkpointing(choice: Choice) -> Choice | None:
    return None if choice[1].checkpointing else (choice[0], replace(choice[1], checkpointing=True))


def _loss_chunk(choice: Choice) -> Choice | None:
    optimizer, setup = choice
    is_short = setup.loss_chunk is not None or setup.batch * setup.seq <= LOSS_CHUNK
    return None if is_short else (optimizer, replace(setup, loss_chunk=LOSS_CHUNK))


def _adamw8(choice: Choice) -> Choice | None:
    optimizer, setup = choice
    can = optimizer in OURS and not optimizer.endswith("+adamw8bit")
    return (f"{optimizer}+adamw8bit", setup) if can else None


def _batch(choice: Choice) -> Choice | None:
    return None if choice[1].batch == 1 else (choice[0], replace(choice[1], batch=1))


def _accumulation(choice: Choice) -> Choice | None:
    optimizer, setup = choice
    is_one = setup.accumulation == 1 or setup.num_shards > 1
    return None if is_one else (optimizer, replace(setup, accumulation=1))


def _release(choice: Choice) -> Choice | None:
    optimizer, setup = choice
    can = optimizer in OURS and setup.shard == "none" and setup.accumulation == 1 and not setup.release
    return (optimizer, replace(setup, release=True)) if can else None


def _dtype(choice: Choice) -> Choice | None:
    optimizer, setup = choice
    if setup.dtype == "bf16":
        return None
    return optimizer, replace(setup, dtype="bf16", mixed_precision="auto")


def _state_device(choice: Choice) -> Choice | None:
    optimizer, setup = choice
    can = optimizer in OURS and setup.device == "cuda" and setup.num_shards == 1
    return (optimizer, replace(setup, state_device="cpu")) if can and setup.state_device == "device" else None


_Change: TypeAlias = Callable[[Choice], Choice | None]
# Those first that change least; each gives None where it changes nothing or is not possible.
CHANGES: tuple[_Change, ...] = (
    *(_muon8bit, _checkpointing, _loss_chunk, _adamw8, _batch, _accumulation, _release, _dtype, _state_device),
)
