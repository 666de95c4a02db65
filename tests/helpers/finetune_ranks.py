"""Two ranks that run the pretraining script again and again, over gloo, under DDP or under Accelerate's FSDP2."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import math
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from helpers.finetune_spread import spread_models

WORLD = 2


class Script:
    """One rank's way to call `main`, in a process group of its own each time."""

    def __init__(self, rank: int, folder: Path) -> None:
        torch.set_num_threads(1)
        self.rank, self.folder, self.num_calls, self.groups = rank, folder, 0, []
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
        os.environ |= {"LOCAL_WORLD_SIZE": str(WORLD), "MUON8BIT_CACHE": str(folder / "cache"), "MASTER_PORT": "0"}
        os.chdir(folder)

    def __call__(self, *args: object, kind: str = "pretrain") -> None:
        """Run it, and leave exit code and output in `calls/<number>.<rank>.json`."""
        from accelerate.state import AcceleratorState

        main = importlib.import_module(f"finetune.{kind}").main
        AcceleratorState._reset_state(reset_partial_state=True)
        store = self.folder / f"store{self.num_calls}"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=self.rank, world_size=WORLD)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(a) for a in args])
        if dist.is_initialized():  # bad input
            self.groups.append(dist.group.WORLD)  # as `finetune.training.trainer.leave` does
            dist.destroy_process_group()
        record = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
        (self.folder / "calls" / f"{self.num_calls}.{self.rank}.json").write_text(json.dumps(record))
        self.num_calls += 1

    def on_main(self, work) -> None:
        """Do something on the main process while the other waits."""
        self.together(lambda: work() if self.rank == 0 else None)

    def together(self, work) -> None:
        """Do something on all processes, in a group of their own."""
        store = self.folder / f"store{self.num_calls}.between"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=self.rank, world_size=WORLD)
        work()
        dist.barrier()
        self.groups.append(dist.group.WORLD)
        dist.destroy_process_group()


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


BALANCED = ("--router-bias-rate", 0.002, "--router-aux-loss", 0.5, "--router-z-loss", 0.01)


def replicated(rank: int, folder: Path, recipe: str, experts: str) -> None:
    """Run DDP with a stop, a full disk and a damaged file that one rank alone knows of."""
    import finetune.training.trainer as job

    script = Script(rank, folder)
    script("--recipe", recipe, "--output-dir", "whole")
    script("--recipe", recipe, "--output-dir", "chunked", "--loss-chunk", 24)
    script("--recipe", experts, *BALANCED, "--output-dir", "experts")
    script("--recipe", recipe, "--output-dir", "refused", "--release-gradients", "--clip", 0)
    script("--recipe", recipe, "--output-dir", "refused", "--state-device", "cpu")
    started, one_step = job.STARTED, job.one_step
    if rank == 1:
        job.STARTED -= 1e6
    script("--recipe", recipe, "--output-dir", "run", "--save-every", 1, "--max-minutes", 1000)
    job.STARTED = started

    def interrupted(run):
        record = one_step(run)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return record

    job.one_step = interrupted
    script("--resume", "run")
    job.one_step = one_step
    save, unlimited = job.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(run):
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
        try:
            save(run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    job.save = full
    script("--resume", "run")
    job.save = save
    script.on_main(lambda: flip_a_bit(folder / "run/checkpoints/step-0000002/random_states_1.pkl"))
    script("--resume", "run")


def sharded(rank: int, folder: Path, recipe: str, optimizer: str, experts: str | None) -> None:
    """Run FSDP2 as Accelerate prepares, saves and loads it; on a CPU it has to be told that it may."""
    import finetune.training.run
    import finetune.training.stepping as stepping

    finetune.training.run.Accelerator = sharding_accelerator()
    script = Script(rank, folder)
    options = ("--recipe", recipe, "--optimizer", optimizer)
    script(*options, "--output-dir", "whole")
    with compiled(optimizer == "adamw"):
        script(*options, "--output-dir", "run")
    script.on_main(lambda: flip_a_bit(folder / "run/checkpoints/step-0000006/optimizer_0/__1_0.distcp"))
    with compiled(optimizer == "muon8bit"):
        script("--resume", "run")
    script("--recipe", recipe, "--optimizer", "muon", "--output-dir", "refused")
    script("--recipe", recipe, "--clip-matrix-norm", 1, "--output-dir", "refused")
    script(*options, "--dtype", "bf16", "--mixed-precision", "bf16", "--output-dir", "refused")
    script(*options, "--output-dir", "chunked", "--loss-chunk", 24)
    if experts:
        script("--recipe", experts, *BALANCED, "--output-dir", "experts")
        script.on_main(lambda: shutil.copytree("experts", "again"))
        script("--resume", "again/checkpoints/step-0000002")
    accumulate = stepping.accumulate_gradients

    def poisoned(accelerator, model, *more):
        loss = accumulate(accelerator, model, *more)
        grad = model.get_parameter("model.layers.0.mlp.up_proj.weight").grad.to_local()
        if rank == 1:
            grad[0, 0] = math.inf
        return loss

    stepping.accumulate_gradients = poisoned
    script(*options, "--output-dir", "bad")


@contextlib.contextmanager
def compiled(is_wrapped: bool) -> Iterator[None]:
    """Let Accelerate wrap the models inside as `torch.compile` does, but run uncompiled; yield whether it has."""
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = "eager" if is_wrapped else "no"
    with torch.compiler.set_stance("force_eager"):
        yield
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = "no"


def loaded_once(rank: int, folder: Path, recipe: str, base: str, broken: str, chats: str) -> None:
    """Run FSDP2 with what the main process alone builds, and the same runs with a model built by every process."""
    import finetune.setup.prepare
    import finetune.setup.sft_prepare
    import finetune.training.run

    finetune.training.run.Accelerator = sharding_accelerator()
    script = Script(rank, folder)
    script.together(lambda: spread_models(rank, finetune.training.run.Accelerator))
    pretraining = ("--recipe", recipe, "--max-steps", 2)
    tuning = ("--model", base, "--dataset", chats, "--mode", "full", "--seq-len", 64, "--max-steps", 2)
    tuning += ("--packing", "--loss-chunk", 24, "--activation-checkpointing", "--batch-size", 4, "--dtype", "bf16")
    script("--recipe", recipe, "--init-from", broken, "--output-dir", "broken")
    for name in ("once", "everywhere"):
        if name == "everywhere":
            for module in (finetune.setup.prepare, finetune.setup.sft_prepare):
                module.build_once = lambda _accelerator, _recipe, build: (*build(), None)
        with counted_loads() as loads:
            script(*pretraining, "--output-dir", f"pretrain-{name}")
            script(*tuning, "--output-dir", f"sft-{name}", kind="sft")
        assert loads == ([] if rank == 1 and name == "once" else ["from_config", "from_pretrained"])


def _load(loads: list[str], name: str, made, *args, **options):
    if torch.get_default_device().type != "meta":
        loads.append(name)
    return made(*args, **options)


@contextlib.contextmanager
def counted_loads() -> Iterator[list[str]]:
    """Yield how a causal language model with weights was made."""
    from transformers import AutoModelForCausalLM

    loads: list[str] = []
    own = {name: vars(AutoModelForCausalLM).get(name) for name in ("from_config", "from_pretrained")}
    for name in own:
        setattr(AutoModelForCausalLM, name, functools.partial(_load, loads, name, getattr(AutoModelForCausalLM, name)))
    yield loads
    for name, value in own.items():
        delattr(AutoModelForCausalLM, name) if value is None else setattr(AutoModelForCausalLM, name, value)


def sharding_accelerator() -> type:
    """Return the accelerator of `finetune/configs/fsdp2.yaml`, without the GPU that FSDP needs to be chosen."""
    from accelerate import Accelerator
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    class Sharding(Accelerator):
        def __init__(self, **options):
            super().__init__(**options)
            assert self.num_processes == WORLD
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.state.distributed_type = DistributedType.FSDP
            self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                state_dict_type="SHARDED_STATE_DICT",
                cpu_ram_efficient_loading=False,
            )

    return Sharding
