"""Whether a setup fits a budget, by how much, and which single changes, or else several, would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .estimator import Estimate, Estimator
from .optimizers import LABELS, OPTIMIZERS
from .setup import Setup

# Tokens whose logits take about as much as a layer's activations.
LOSS_CHUNK = 512
# Options that leave what is trained and on how many GPUs, those first that change least. The last is Muon8bit's alone.
_ALONE = (
    *("--activation-checkpointing", "--loss-chunk", "--batch", "--release-gradients", "--dtype"),
    "--state-device",
)


@dataclass(frozen=True)
class BudgetCheck:
    """Of one optimizer: `spare_bytes` is the budget less the peak, negative where it does not fit; `changes` are the
    single changes with which it would fit; where none of them leaves what is trained and on how many GPUs, `together`
    are options with which it would."""

    spare_bytes: int
    changes: tuple[str, ...]
    together: str | None = None

    @property
    def fits(self) -> bool:
        return self.spare_bytes >= 0


def check_budget(estimator: Estimator, estimate: Estimate, budget: int) -> dict[str, BudgetCheck]:
    """The verdict on every optimizer. Changes are estimated only where something does not fit."""
    spare = {name: budget - estimate.peak_bytes(name) for name in OPTIMIZERS}
    changed: list[tuple[str, Estimate]] = []
    if min(spare.values()) < 0:
        for words, setup in changes(estimate.setup):
            try:
                changed.append((words, estimator.estimate(setup)))
            except ValueError:  # a model that cannot be changed so
                continue
    verdicts = {}
    for name in OPTIMIZERS:
        found: list[str] = []
        if spare[name] < 0:
            found = [f"the optimizer {LABELS[other]}" for other in OPTIMIZERS if spare[other] >= 0]
            found += [words for words, other in changed if other.peak_bytes(name) <= budget]
        verdicts[name] = BudgetCheck(spare[name], tuple(found))
    pending = [
        name
        for name in OPTIMIZERS
        if spare[name] < 0 and not any(words.startswith(_ALONE) for words in verdicts[name].changes)
    ]
    for words, setup in combined(estimate.setup) if pending else ():
        try:
            peak_bytes = estimator.estimate(setup).peak_bytes
        except ValueError:
            continue
        for name in [name for name in pending if peak_bytes(name) <= budget]:
            pending.remove(name)
            if words not in verdicts[name].changes:
                verdicts[name] = replace(verdicts[name], together=words)
        if not pending:
            break
    return verdicts


def changes(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """What else could be asked, each in the words of the option."""
    if not setup.checkpointing:
        yield "--activation-checkpointing", replace(setup, checkpointing=True)
    if not setup.release and setup.shard == "none" and setup.accumulation == 1:
        yield "--release-gradients", replace(setup, release=True)
    if setup.state_device == "device" and setup.device == "cuda" and setup.shard in ("none", "ddp"):
        yield "--state-device cpu", replace(setup, state_device="cpu")
    if setup.loss_chunk is None and setup.batch * setup.seq > LOSS_CHUNK:
        yield f"--loss-chunk {LOSS_CHUNK}", replace(setup, loss_chunk=LOSS_CHUNK)
    if setup.weight_dtype.itemsize > 2:
        yield "--dtype bf16", replace(setup, dtype="bf16")
    if setup.accumulation > 1 and setup.num_shards == 1:
        yield "--gradient-accumulation 1", replace(setup, accumulation=1)
    if setup.batch > 1:
        yield "--batch 1", replace(setup, batch=1)
    if setup.seq > 1:
        yield f"--seq {setup.seq // 2}", replace(setup, seq=setup.seq // 2)
    if setup.rank is None:
        yield "--lora 16", replace(setup, lora=16)
    if not setup.qlora:
        yield "--qlora", replace(setup, qlora=True)
    if not setup.release and setup.state_device == "device":
        for num_gpus in (2, 4, 8):
            if num_gpus > setup.num_shards:
                yield f"--gpus {num_gpus} --shard fsdp2", replace(setup, num_gpus=num_gpus, shard="fsdp2")


def combined(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """Changes of _ALONE on top of each other, on the same GPUs and sequences; then the same upon QLoRA."""
    for start in ((), ("--qlora",)):
        words: list[str] = []
        now = setup
        for wanted in (*start, *_ALONE):
            for option, changed in changes(now):
                if option.split()[0] == wanted:
                    words, now = [*words, option], changed
                    yield " ".join(words), now
