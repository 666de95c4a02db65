"""Models that one of two processes builds, and that both hold sharded afterwards."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.config.errors import InputError, OtherRankError
from finetune.config.recipe import DEFAULT_RECIPE, read_recipe
from finetune.parallel.ranks import connect
from finetune.parallel.sharding import build_once, spread
from helpers.bitwise import assert_bitwise
from muon8bit import Scaling, param_groups

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 30, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
EXPERTS = {"n_routed_experts": 3, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MODELS = [
    # Tied weights, and buffers that are in no state dict.
    {"model_type": "llama", **SIZES, "tie_word_embeddings": True}
    | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    # A buffer in the state dict, and 3 experts for 2 processes.
    {"model_type": "deepseek_v3", **SIZES, **LATENT, **EXPERTS, "first_k_dense_replace": 1},
]


def base_of(keys):
    """Return the configuration of half the width."""
    halved = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "moe_intermediate_size")
    return AutoConfig.for_model(**{k: v // 2 if k in halved else v for k, v in keys.items()})


def rates_of(model, keys):
    groups = param_groups(model, lr=1.0, scaling=Scaling(base=base_of(keys)))
    found = {name: (group["lr"], group["weight_decay"]) for group in groups for name, _ in group["params"]}
    assert len(set(found.values())) >= 3
    return found


def spread_models(rank: int, kind: type) -> None:
    """Check values, ties, dtypes, gradients required, parameters of the optimizer and random state of each model."""
    for keys in MODELS:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator, recipe = kind(cpu=True), read_recipe(DEFAULT_RECIPE)
        connect(accelerator)
        # As a file for `accelerate launch` may ask for; it would move what process 0 holds to the meta device.
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = True

        def build(keys=keys):
            torch.manual_seed(3)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys))
            Scaling(base=base_of(keys)).initialize(model)
            model.model.norm.requires_grad_(False)
            return model.bfloat16(), "more"

        expected = build()[0]
        random_state = torch.get_rng_state()
        torch.manual_seed(4)
        model, more, weights = build_once(accelerator, recipe, build if rank == 0 else None)
        assert more == "more"
        assert torch.equal(torch.get_rng_state(), random_state)
        assert {param.device.type for param in model.parameters()} == {"meta"}
        assert bool(weights.by_name) == (rank == 0)
        optimizer = torch.optim.AdamW(list(model.named_parameters())[::-1])
        prepared, wrapped = accelerator.prepare(model, optimizer)
        spread(accelerator, prepared, weights)
        assert weights.by_name == {}
        found, state = (m.state_dict() | dict(m.named_buffers()) for m in (prepared, expected))
        assert list(found) == list(state)
        for name, value in state.items():
            assert_bitwise(found[name].full_tensor() if isinstance(found[name], DTensor) else found[name], value)
        named, oracle = dict(prepared.named_parameters()), dict(expected.named_parameters())
        assert {n: p.requires_grad for n, p in named.items()} == {n: p.requires_grad for n, p in oracle.items()}
        assert list(map(id, wrapped.param_groups[0]["params"])) == list(map(id, reversed(named.values())))
        assert rates_of(prepared, keys) == rates_of(expected, keys)  # by shapes of whole parameters
        ids = torch.arange(6).view(1, 6)
        with torch.no_grad():
            assert_bitwise(prepared(input_ids=ids).logits, expected(input_ids=ids).logits)

    for failing in (0, 1):

        def fail(failing=failing):
            if rank == failing:
                raise ValueError("no memory")

        with pytest.raises(ValueError if rank == failing else OtherRankError, match="no memory") as raised:
            (build_once if failing == 0 else replicated)(accelerator, recipe, fail)
        assert rank == failing or str(raised.value) == f"process {failing} failed: ValueError: no memory"

    def lack():
        if rank == 1:
            raise InputError("--model", "cannot read it")

    with pytest.raises(InputError, match="--model: cannot read it"):
        replicated(accelerator, recipe, lack)


def replicated(accelerator, recipe, build):
    """Call `build_once` where every process has a whole model."""
    accelerator.state.distributed_type = DistributedType.MULTI_CPU
    return build_once(accelerator, recipe, build)
