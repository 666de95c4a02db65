"""Whole steps of small models: on a GPU against the reference on the CPU, without values, and in pretraining.

The first model is made of what a Llama has: squares and their neighbours large enough for the triangle kernel where the
table takes it, matrices for the one-launch kernel, an embedding, norms. The second is that of the default recipe.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.gpu.first_cases import Found
from benchmarks.gpu.record import missing_package
from muon8bit import AdaMuon8bit, Muon8bit, NorMuon8bit, param_groups
from muon8bit.config import DYNAMIC_CODES_KEY, LINEAR_CODES_KEY, SCALES_KEY, SECOND_MOMENT_KEY

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "finetune/recipes/llama_4m.yaml"
NUM_STEPS, PRETRAINING_STEPS = 2, 8
# Of the norm of what two steps change: half precision in Newton-Schulz on the GPU, fp32 on the CPU, bf16 parameters.
STEP_BOUND = 5e-2
_LIMIT_S = 240
_UNKNOWN_TO_META = ("torch.autocast", "muon8bit.step.adamw.adamw")


class Layers(nn.Module):
    """An embedding, a norm, and linear layers of these [out, in]."""

    def __init__(self, width: int, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(64, width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(nn.Linear(cols, rows, bias=False) for rows, cols in shapes)


def bf16_layers(small: bool = False) -> nn.Module:
    """Return the first model, in bf16."""
    n = 64 if small else 2048
    shapes = [(n, n)] * 3 + [(n // 4, n)] * 2 + [(n, n // 4)] + [(16, n), (n, 16)]
    return Layers(n, shapes).to(torch.bfloat16)


def square_layers(small: bool = False) -> nn.Module:
    """Return a model of two squares, in bf16, whose steps launch little that was not compiled before."""
    n = 64 if small else 2048
    return Layers(n, [(n, n)] * 2).to(torch.bfloat16)


def _recipe_model() -> dict[str, Any]:
    import yaml  # optional, as transformers is

    values: dict[str, Any] = yaml.safe_load(RECIPE.read_text())["model"]
    return values


def pretrained_model(small: bool = False) -> nn.Module:  # noqa: ARG001
    """Return the second model, in fp32 on the meta device, as mixed precision keeps it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        causal: Any = AutoModelForCausalLM
        return causal.from_config(AutoConfig.for_model(**_recipe_model()))  # type: ignore[no-any-return]


MODELS: dict[str, Callable[..., nn.Module]] = {"bf16 layers": bf16_layers, "the default recipe": pretrained_model}
FAMILY: dict[str, type[Muon8bit]] = {"NorMuon8bit": NorMuon8bit, "AdaMuon8bit": AdaMuon8bit}


def optimizer_of(model: nn.Module, ns_dtype: torch.dtype | None = None, of: type[Muon8bit] = Muon8bit) -> Muon8bit:
    """Return the optimizer that a user would make, with steps that bf16 shows."""
    groups = param_groups(model, lr=0.05)
    if of is not Muon8bit:
        for group in groups:
            group.pop("adjust_lr_fn", None)  # the preset has its own
    return of(groups, ns_dtype=ns_dtype)


def stepped(device: torch.device, small: bool, of: type[Muon8bit] = Muon8bit) -> Found:
    """Take two steps of a model with given gradients, of the first one by Muon8bit; the reference does it on the CPU.

    Second moments are those of an O that differs by rounding: their rows are compared with a bound, the momentum's
    codes bit for bit.
    """
    torch.manual_seed(0)
    model = bf16_layers(small) if of is Muon8bit else square_layers(small)
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    model.to(device)
    # A CPU with instructions for bf16 would take it, which is less exact than the GPU's fp16.
    optimizer = optimizer_of(model, torch.float32 if device.type == "cpu" else None, of)
    generator = torch.Generator("cpu").manual_seed(1)
    for _ in range(NUM_STEPS):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator, device="cpu").to(device, torch.bfloat16)
        optimizer.step()
    found = Found()
    for name, param in model.named_parameters():
        state = optimizer.state[param]
        exact = LINEAR_CODES_KEY, DYNAMIC_CODES_KEY, SCALES_KEY
        found.exact |= {f"{key} of {name}": state[key] for key in exact if key in state}
        if SECOND_MOMENT_KEY in state:
            found.close[f"second moment of {name}"] = state[SECOND_MOMENT_KEY], STEP_BOUND
        found.close[name] = (param.detach().cpu().float() - start[name].float(), STEP_BOUND)
    return found


def step_on_meta(model: nn.Module, of: type[Muon8bit] = Muon8bit) -> None:
    """Call the kernels of one step of a model without values; the meta device stands for an H100.

    What the package's modules have imported is replaced for good: to be called in a process for it.
    """
    from muon8bit_kernels import kernels_for
    from muon8bit_kernels.triton import kernels

    from benchmarks.scaling.step_of_tree import Gradient, NoCheck, replace_everywhere
    from muon8bit.orthogonalize import device_kind
    from muon8bit.step import nonfinite, phases

    class Unread(NoCheck):
        """Flags that are not read on the host; the kernels get one of the dtype that they get on a GPU."""

        def skip(self, device: torch.device) -> torch.Tensor:
            return torch.empty((), dtype=torch.float32, device=device)

    replace_everywhere(device_kind, lambda _: "cuda_sm90")
    replace_everywhere(kernels_for, lambda *_: kernels)
    replace_everywhere(nonfinite.GradientCheck, Unread)
    phases.is_dry = lambda _: False  # type: ignore[assignment]
    model.to("meta")
    for param in model.parameters():
        param.grad = torch.empty_like(param).as_subclass(Gradient)  # type: ignore[arg-type]
    # Neither torch's autocast nor its fused AdamW knows the meta device.
    no_autocast, no_adamw = (mock.patch(name, return_value=nullcontext()) for name in _UNKNOWN_TO_META)
    with no_autocast, no_adamw:
        optimizer_of(model, of=of).step()


def pretrain(folder: Path, small: bool) -> None:
    """Run a few steps of pretraining in bf16 by `accelerate launch`, on a CPU with `small`.

    Raises:
        ValueError: if the run fails, or a loss is not finite, or none is lower than the first.
    """
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(80)]
    (folder / "texts").mkdir(parents=True)
    for number in range(20):
        lines = (" ".join(rng.choices(words, k=12)) + ".\n" for _ in range(20 if small else 400))
        (folder / "texts" / f"{number}.txt").write_text("".join(lines))
    model = _recipe_model() | {"vocab_size": 288}
    if small:
        model |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        model |= {"num_key_value_heads": 2}
    steps = 3 if small else PRETRAINING_STEPS
    recipe = {"name": "first", "model": model, "dataset": str(folder / "texts"), "validation_fraction": 0.1}
    recipe |= {"lr": 5e-3, "batch_size": 2, "seq_len": 32 if small else 256, "max_steps": steps, "warmup_steps": 1}
    (folder / "first.json").write_text(json.dumps(recipe))  # JSON is YAML
    precision = ["--cpu", "--mixed_precision", "no"] if small else ["--mixed_precision", "bf16"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += [*precision, "--dynamo_backend", "no", str(ROOT / "finetune/pretrain.py")]
    command += ["--recipe", str(folder / "first.json"), "--output-dir", str(folder / "run")]
    environment = os.environ | {"MUON8BIT_CACHE": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=_LIMIT_S, cwd=ROOT)
    if done.returncode != 0 and (missing := missing_package(done.stderr)):
        raise ModuleNotFoundError(f"needs {missing}", name=missing)
    if done.returncode != 0:
        raise ValueError(f"pretraining failed with {done.returncode}: {done.stderr[-2000:]}")
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    if not losses or not all(map(math.isfinite, losses)) or (not small and min(losses[1:]) >= losses[0]):
        raise ValueError(f"losses of pretraining: {losses}")


def pretrained(small: bool) -> None:
    """Run `pretrain` in a folder that is deleted."""
    with tempfile.TemporaryDirectory() as folder:
        pretrain(Path(folder), small)
