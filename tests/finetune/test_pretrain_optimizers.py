"""The baselines train a model with stacked experts too."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.optimizers import build_optimizers
from finetune.recipe import Recipe

SIZES = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_local_experts": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "model_type": "mixtral"}


def mixtral() -> nn.Module:
    config = AutoConfig.for_model(**SIZES)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["muon8bit", "muon", "adamw"])
def test_every_parameter_of_a_mixture_of_experts_is_trained_once(kind):
    model = mixtral()
    optimizers = build_optimizers(model, Recipe(name="moe", model=SIZES, optimizer=kind))
    held = [param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == set(model.parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = [param.detach().clone() for param in held]
    for optimizer in optimizers:
        optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, held, strict=True))
    is_muon = [type(optimizer).__name__ == "Muon" for optimizer in optimizers]
    stacked = {i for i, o in enumerate(optimizers) for g in o.param_groups for p in g["params"] if p.ndim == 3}
    assert not any(is_muon[i] for i in stacked)
