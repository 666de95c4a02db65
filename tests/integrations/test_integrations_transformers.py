"""Muon8bit in Hugging Face's Trainer: values of TrainingArguments, decay, frozen parameters, stop and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import routing_models
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from examples.stand_in import llama, rows
from muon8bit import Muon8bit
from muon8bit.integrations.transformers import Muon8bitFactory, muon8bit_for_trainer

QUIET = {"report_to": [], "disable_tqdm": True}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values = {"learning_rate": 3e-3, "weight_decay": 0.07, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6}
    return TrainingArguments(str(folder), **QUIET | values | {"per_device_train_batch_size": 4} | changes)


def trainer(model: nn.Module, args: TrainingArguments, *, callbacks: Any = None, **options: Any) -> Trainer:
    pair = muon8bit_for_trainer(args, **options)
    return Trainer(model, args, train_dataset=rows(), callbacks=callbacks, optimizer_cls_and_kwargs=pair)


def names(optimizer: torch.optim.Optimizer, **wanted: Any) -> set[str]:
    groups = [group for group in optimizer.param_groups if all(group[key] == value for key, value in wanted.items())]
    return {name for group in groups for name in group["param_names"]}


def test_groups_carry_the_values_of_training_arguments(tmp_path: Path) -> None:
    optimizer = trainer(llama(), arguments(tmp_path), codebook="dynamic").create_optimizer()
    assert isinstance(optimizer, Muon8bit)
    muon, decayed, other = optimizer.param_groups
    assert [group["algorithm"] for group in (muon, decayed, other)] == ["muon", "adamw", "adamw"]
    assert {group["lr"] for group in (muon, decayed, other)} == {3e-3}
    assert [group["weight_decay"] for group in (muon, decayed, other)] == [0.07, 0.07, 0.0]
    assert {group["betas"] for group in (decayed, other)} == {(0.8, 0.9)}
    assert {group["eps"] for group in (decayed, other)} == {1e-6}
    assert (muon["adjust_lr_fn"], muon["codebook"]) == ("match_rms_adamw", "dynamic")


def test_options_win_over_training_arguments(tmp_path: Path) -> None:
    optimizer = trainer(llama(), arguments(tmp_path), lr=1e-2, adamw_lr=1e-4, adamw_betas=(0.7, 0.8)).create_optimizer()
    assert [(group["lr"], group.get("betas")) for group in optimizer.param_groups] == [
        (1e-2, None),
        (1e-4, (0.7, 0.8)),
        (1e-4, (0.7, 0.8)),
    ]


def test_heads_and_routers_are_options_of_the_factory(tmp_path: Path) -> None:
    options = {"split_heads": "head", "routers": "muon"}
    optimizer = trainer(routing_models.latent(), arguments(tmp_path), **options).create_optimizer()
    heads = {name for size in (8, 12) for name in names(optimizer, algorithm="muon", split_sizes=(size,) * 4)}
    assert {name.split(".")[-2] for name in heads} == {"q_b_proj", "kv_b_proj"}
    assert "model.layers.1.mlp.gate.weight" in names(optimizer, algorithm="muon")
    with pytest.raises(ValueError, match="split_heads must be None or one of"):
        trainer(routing_models.latent(), arguments(tmp_path), split_heads="none").create_optimizer()


class Odd(nn.Module):
    """Weights that Trainer's rule exempts by name or module though they are matrices, and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.final_norm = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.matrix_norm = nn.LayerNorm((4, 8))
        self.blocks = nn.ModuleList([nn.ModuleDict({"norm": nn.Linear(8, 8, bias=False), "out": nn.Linear(8, 8)})])


def test_no_decay_is_trainers_rule_and_vectors(tmp_path: Path) -> None:
    for model in (llama(), Odd()):
        reference = Trainer(model, arguments(tmp_path), train_dataset=rows())
        theirs = set(reference.get_decay_parameter_names(model))
        optimizer = trainer(model, arguments(tmp_path)).create_optimizer()
        params = dict(model.named_parameters())
        assert names(optimizer) == set(params)
        assert names(optimizer, weight_decay=0.07) == {name for name in theirs if params[name].ndim > 1}
    exempt = {"final_norm.weight", "blocks.0.norm.weight"}
    assert names(optimizer, weight_decay=0.0, algorithm="muon") == exempt


def test_own_no_decay_patterns_are_added_to_trainers(tmp_path: Path) -> None:
    optimizer = trainer(Odd(), arguments(tmp_path), no_decay=["hidden.*"]).create_optimizer()
    exempt = {"final_norm.weight", "blocks.0.norm.weight", "hidden.weight"}
    assert names(optimizer, weight_decay=0.0, algorithm="muon") == exempt


def test_frozen_parameters_are_left_out_and_keep_their_values(tmp_path: Path) -> None:
    model = llama()
    frozen = {name for name, _ in model.named_parameters() if ".layers.0." in name or "embed" in name}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    run = trainer(model, arguments(tmp_path, max_steps=2))
    run.train()
    assert names(run.optimizer) == before.keys() - frozen
    assert {name for name, param in model.named_parameters() if torch.equal(param, before[name])} == frozen


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def with_lora() -> nn.Module:
    model = llama()
    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_dropout=0.1, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


@pytest.mark.parametrize(("make", "options"), [(llama, {}), (with_lora, {"loraplus_ratio": 4})], ids=["full", "lora"])
def test_stop_and_resume_is_bitwise(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    values = {"max_steps": 8, "lr_scheduler_type": "cosine", "warmup_steps": 2, "save_strategy": "no"}
    whole = trainer(make(), arguments(tmp_path / "whole", **values), **options)
    whole.train()
    args = arguments(tmp_path / "parts", **values)
    stopped = trainer(make(), args, callbacks=[StopAt(3)], **options)
    stopped.train()
    assert stopped.state.global_step == 3
    saved = torch.load(tmp_path / "parts/checkpoint-3/optimizer.pt", weights_only=True)
    assert any("momentum_linear8" in state for state in saved["state"].values())
    resumed = trainer(make(), args, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    ends = [run.model.state_dict() for run in (whole, resumed, stopped)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert not all(torch.equal(value, ends[2][name]) for name, value in ends[0].items())
    states = [run.optimizer.state_dict()["state"] for run in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        for key, value in state.items():
            assert value.dtype == states[1][index][key].dtype
            assert torch.equal(value, states[1][index][key]), key


def test_bare_factory_without_lr_raises_and_names_the_way_out(tmp_path: Path) -> None:
    run = Trainer(llama(), arguments(tmp_path), train_dataset=rows(), optimizer_cls_and_kwargs=(Muon8bitFactory, {}))
    with pytest.raises(ValueError, match=r"needs lr.*muon8bit_for_trainer\(args\)"):
        run.create_optimizer()


def test_bare_factory_takes_lr_from_its_own_arguments(tmp_path: Path) -> None:
    pair = (Muon8bitFactory, {"lr": 2e-4, "weight_decay": 0.02, "bits": 32})
    run = Trainer(llama(), arguments(tmp_path), train_dataset=rows(), optimizer_cls_and_kwargs=pair)
    muon, decayed, other = run.create_optimizer().param_groups
    assert (muon["lr"], decayed["lr"], muon["weight_decay"], other["weight_decay"]) == (2e-4, 2e-4, 0.02, 0.0)
    assert muon["bits"] == 32


def test_factory_called_as_an_optimizer_class_raises() -> None:
    """Trainer before transformers 5.2 calls `optimizer_cls(groups, **kwargs)`."""
    with pytest.raises(TypeError, match=r"before 5\.2.*optimizers="):
        Muon8bitFactory([{"params": list(llama().parameters())}], lr=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 0.95)}, "unknown option 'betas', did you mean 'adamw_betas'"),
        ({"eps": 1e-8}, "unknown option 'eps', did you mean 'adamw_eps'"),
        ({"code_book": "linear"}, "unknown option 'code_book', did you mean 'codebook'"),
        ({"zzz": 1}, "unknown option 'zzz'; there are adamw_betas"),
    ],
)
def test_unknown_option_raises_before_training(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        muon8bit_for_trainer(arguments(tmp_path), **options)
    with pytest.raises(ValueError, match=message):
        Muon8bitFactory()(llama(), lr=1e-3, **options)


@pytest.mark.parametrize("changes", [{"optim": "adafactor"}, {"optim": "adamw_torch", "optim_args": "a=1"}])
def test_other_optimizer_in_training_arguments_raises(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of TrainingArguments would be ignored"):
        muon8bit_for_trainer(arguments(tmp_path, **changes))


def test_deepspeed_in_training_arguments_raises(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.deepspeed_plugin = object()
    with pytest.raises(NotImplementedError, match=r"DeepSpeed.*use DDP"):
        muon8bit_for_trainer(args)


def test_sharded_state_is_refused_by_name(tmp_path: Path) -> None:
    """Trainer asks one rank alone for the state."""
    with pytest.raises(NotImplementedError, match=r"shard_state=True cannot be used in Trainer.*fully_shard"):
        trainer(llama(), arguments(tmp_path), shard_state=True).create_optimizer()
