"""Predicted state bytes against hand counts and against the true bytes of real steps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers.memory_models import LADDER, TINY, config_of, ladder_config
from torch import nn
from transformers import AutoModelForCausalLM

from muon8bit import AdaMuon8bit, Muon8bit, NorMuon8bit, param_groups, state_report
from muon8bit.estimate import report
from muon8bit.estimate.models import build
from muon8bit.estimate.optimizers import OPTIMIZERS, Param, state_bytes
from muon8bit.estimate.setup import Setup
from muon8bit.estimate.sizes import measure, nf4_bytes

VOCABULARY = 50257
# facts: decimal GB of the matrices alone, by (layers, d, ffn)
PUBLISHED = {
    "162M": {"adamw": 1.2970, "muon": 0.9573, "muon8bit": 0.7029, "muon8bit+adamw8bit": 0.2421},
    "405M": {"adamw": 3.2393, "muon": 2.0314, "muon8bit": 1.1264, "muon8bit+adamw8bit": 0.5120},
    "834M": {"adamw": 6.6709, "muon": 3.9530, "muon8bit": 1.9162, "muon8bit+adamw8bit": 0.9947},
    "1.4B": {"adamw": 11.3105, "muon": 6.4787, "muon8bit": 2.8571, "muon8bit+adamw8bit": 1.6285},
    "2.7B": {"adamw": 22.1912, "muon": 12.1249, "muon8bit": 4.5820, "muon8bit+adamw8bit": 3.0461},
}


def ceil(numerator: int, denominator: int) -> int:
    return (numerator + denominator - 1) // denominator


def adamw8(n: int) -> int:
    """Two codes an element and two fp32 maxima per 256; under 4096 elements two fp32 moments."""
    return 8 * n if n < 4096 else 2 * n + 2 * 4 * ceil(n, 256)


def hand_count(layers: int, d: int, f: int) -> tuple[dict[str, int], dict[str, int]]:
    """State bytes of a GPT-NeoX by column: of everything, and of the matrices alone without step counters."""
    matrices = [(3 * d, d), (d, d), (f, d), (d, f)] * layers
    tables = [VOCABULARY * d] * 2
    small = [3 * d, d, f, d, d, d, d, d] * layers + [d, d]  # biases, two norms a layer, the last norm
    elements = sum(r * c for r, c in matrices)
    linear8 = sum(r * c + 4 * r * ceil(c, 2048) for r, c in matrices)
    fp32 = 8 * (sum(tables) + sum(small)) + 4 * (len(tables) + len(small))
    int8 = sum(map(adamw8, tables + small)) + 4 * (len(tables) + len(small))
    every = [r * c for r, c in matrices] + tables + small
    whole = {
        "adamw": 8 * sum(every) + 4 * len(every),
        "adamw8bit": sum(map(adamw8, every)) + 2 * 256 * 4,
        "muon": 4 * elements + fp32,
        "muon_bf16": 2 * elements + fp32,
        "muon8bit": linear8 + fp32,
        "muon8bit+adamw8bit": linear8 + int8,
    }
    alone = {
        "adamw": 8 * (elements + sum(tables)),
        "muon": 4 * elements + 8 * sum(tables),
        "muon8bit": linear8 + 8 * sum(tables),
        "muon8bit+adamw8bit": linear8 + sum(map(adamw8, tables)),
    }
    return whole, alone


@pytest.mark.parametrize("size", LADDER)
def test_state_bytes_of_the_ladder_equal_a_hand_count(size: str) -> None:
    sizes = measure(build(config_of(ladder_config(size)), torch.float32), Setup())
    whole, alone = hand_count(*LADDER[size])
    assert {name: state_bytes(name, sizes.trained) for name in OPTIMIZERS} == whole
    for name, gigabytes in PUBLISHED[size].items():
        assert f"{alone[name] / 1e9:.4f}" == f"{gigabytes:.4f}"


def stepped(optimizer: torch.optim.Optimizer) -> int:
    """True bytes of the state after a step."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.full_like(param, 1e-3)
    optimizer.step()
    return state_report(optimizer).total_bytes


def measured(name: str, model: nn.Module) -> int:
    """True state bytes of the real optimizers of a column."""
    if name.endswith("adamw8bit"):
        pytest.importorskip("bitsandbytes")
    groups = param_groups(model, lr=1e-3, adamw_bits=8 if name == "muon8bit+adamw8bit" else 32)
    if name.startswith("muon8bit"):
        return stepped(Muon8bit(groups, lr=1e-3))
    if name == "muon":
        return stepped(Muon8bit(groups, lr=1e-3, bits=32))
    trained = [param for param in model.parameters() if param.requires_grad]
    if name == "adamw":
        return stepped(torch.optim.AdamW(trained, lr=1e-3))
    if name == "adamw8bit":
        return stepped(pytest.importorskip("bitsandbytes").optim.AdamW8bit(trained, lr=1e-3))
    model.bfloat16()  # torch.optim.Muon keeps its momentum in the parameters' dtype, and takes matrices only
    matrices = [param for group in groups if group["algorithm"] == "muon" for _, param in group["params"]]
    flat = [nn.Parameter(m) for p in matrices for m in (p.detach().unbind(0) if p.ndim == 3 else [p.detach()])]
    rest = [group for group in groups if group["algorithm"] == "adamw"]
    return stepped(torch.optim.Muon(flat, lr=1e-3)) + (stepped(Muon8bit(rest, lr=1e-3)) if rest else 0)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("lora_rank", [None, 4])
def test_predicted_state_bytes_equal_the_measured_ones(kind: str, lora_rank: int | None) -> None:
    config = config_of(TINY[kind])
    sizes = measure(build(config, torch.float32, lora_rank), Setup(lora=lora_rank))
    for name in OPTIMIZERS:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if lora_rank is not None:
            peft = pytest.importorskip("peft")
            model = peft.get_peft_model(model, peft.LoraConfig(r=lora_rank, target_modules="all-linear"))
        assert state_bytes(name, sizes.trained) == measured(name, model), name
        assert sizes.num_parameters == sum(param.numel() for param in model.parameters())


def test_routers_on_muon_and_heads_are_counted_as_a_step_and_a_report_have_them() -> None:
    """By hand: a router of 8 x 64 on Muon has a byte an element and a scale a row, on AdamW eight and its counter."""
    config = config_of(TINY["deepseek_v3"])
    plain = measure(build(config, torch.float32), Setup())
    asked = measure(build(config, torch.float32), Setup(split_heads="head_kv", routers="muon"))
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    groups = param_groups(model, lr=1e-3, split_heads="head_kv", routers="muon")
    found = state_bytes("muon8bit", asked.trained)
    assert found == stepped(Muon8bit(groups, lr=1e-3))
    assert state_bytes("muon8bit", plain.trained) - found == (8 * 8 * 64 + 4) - 8 * (64 + 4)
    assert {p.split for p in asked.whole if "kv_b_proj" in p.name} == {((16, 24) * 4, -2)}
    assert state_bytes("adamw", plain.trained) == state_bytes("adamw", asked.trained)


# Keys of a group of one parameter; by hand, with blocks of 64, the bytes of its momentum in 8 bits, and of its second
# moment by row, by the longer dimension, and by element in 8 bits. In 32 bits an element takes 4 bytes.
MOMENTS: dict[str, tuple[dict[str, Any], int, int, int, int]] = {
    "wide": ({"shape": (24, 100)}, 2400 + 4 * 24 * 2, 4 * 24, 4 * 100, 2400 + 4 * 24 * 2),
    "tall": ({"shape": (100, 24)}, 2400 + 4 * 100, 4 * 100, 4 * 100, 2400 + 4 * 100),
    "rows cut": (
        {"shape": (48, 100), "split_sizes": (16, 32)},
        *(4800 + 4 * 48 * 2, 4 * 48, 4 * 2 * 100, 4800 + 4 * 48 * 2),
    ),
    "columns cut": (  # into blocks of 64, 6 and 30
        {"shape": (24, 100), "split_sizes": (70, 30), "split_dim": -1},
        *(2400 + 4 * 24 * 2, 4 * 24 * 2, 4 * 100, 2400 + 4 * 24 * 3),
    ),
    "stack": ({"shape": (3, 24, 100)}, 3 * (2400 + 4 * 24 * 2), 3 * 4 * 24, 3 * 4 * 100, 3 * (2400 + 4 * 24 * 2)),
    "convolution": (
        {"shape": (24, 25, 2, 2), "flatten": True},
        *(2400 + 4 * 24 * 2, 4 * 24, 4 * 100, 2400 + 4 * 24 * 2),
    ),
    "narrow": ({"shape": (40, 4)}, 4 * 160, 4 * 40, 4 * 40, 4 * 160),
}


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(("kind", "preset"), [("row", "official"), ("shape", "modded"), ("element", "paper")])
def test_bytes_of_second_moments_are_those_counted_by_hand(
    bits: Literal[8, 32], kind: Literal["row", "shape", "element"], preset: str, tmp_path: Path
) -> None:
    """Of a step, of its report, of the report of its file, and of the prediction from shapes."""
    name = "adamuon8bit" if kind == "element" else "normuon8bit"
    expected, groups, params = {}, [], []
    for which, (keys, momentum, *moments) in MOMENTS.items():
        keys, moment = dict(keys), moments[("row", "shape", "element").index(kind)]
        shape = keys.pop("shape")
        in_32_bits = 4 * math.prod(shape)
        own = momentum if bits == 8 else in_32_bits
        expected[which] = own + (in_32_bits if kind == "element" and bits == 32 else moment)
        groups.append({"params": [(which, nn.Parameter(torch.randn(shape)))], **keys})
        split = (keys["split_sizes"], keys.get("split_dim", -2)) if "split_sizes" in keys else None
        more: Any = {"block_size": 64, "bits": bits, "normuon_moment": "row" if kind == "element" else kind}
        params.append(Param(which, shape, torch.float32, True, split, "flatten" in keys, **more))
    optimizer = (AdaMuon8bit if kind == "element" else NorMuon8bit)(groups, preset=preset, bits=bits, block_size=64)
    assert stepped(optimizer) == sum(expected.values())
    assert {p.name: state_bytes(name, [p]) for p in params} == expected
    kept = {note.name for note in state_report(optimizer).kept_32bit}
    assert kept == ({"narrow"} if bits == 8 else set())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = report(tmp_path / "optimizer.pt")
    assert (found.optimizer, found.total.difference_bytes) == (name, 0)
    assert found.total.measured_bytes == sum(expected.values())


@pytest.mark.parametrize("preset", NorMuon8bit.presets)
def test_a_setup_has_the_keys_of_the_preset_that_bytes_depend_on(preset: str) -> None:
    setup, keys = Setup(1, 16, preset=preset), NorMuon8bit.presets[preset]
    assert (setup.normuon_moment, setup.normuon_coefficients) == (keys["second_moment"], keys["ns_coefficients"])


def test_the_first_part_of_a_matrix_has_the_moment_of_all_columns() -> None:
    """By hand: 8 of 24 rows have 800 codes and two scales a row; one row of 100 columns is not divided by three."""
    part = Param("up", (8, 100), torch.float32, True, None, False, 2400, 64, 8, "shape", num_shards=3)
    assert state_bytes("normuon8bit", [part]) == 800 + 4 * 8 * 2 + 4 * 100
    assert state_bytes("normuon8bit", [replace(part, normuon_moment="row")]) == 800 + 4 * 8 * 2 + 4 * 8
    assert state_bytes("adamuon8bit", [part]) == 2 * (800 + 4 * 8 * 2)


def test_state_bytes_of_a_shard_equal_those_of_the_largest_part() -> None:
    config = config_of(TINY["llama"])
    whole = measure(build(config, torch.float32), Setup())
    part = measure(build(config, torch.float32), Setup(num_gpus=3, shard="fsdp2"))
    shards = [torch.empty(param.shape, device="meta").chunk(3)[0] for param in whole.whole]
    assert [param.shape for param in part.trained] == [tuple(shard.shape) for shard in shards]
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for param, shard in zip(whole.whole, shards, strict=True):
        groups[param.is_muon].append(nn.Parameter(torch.zeros(shard.shape)))
    optimizer = Muon8bit([{"params": groups[True]}, {"params": groups[False], "algorithm": "adamw", "lr": 1e-3}])
    assert state_bytes("muon8bit", part.trained) == stepped(optimizer)


def test_8_bit_moments_of_a_shard_are_those_of_the_whole_parameter() -> None:
    """A table of 512 x 64 is in 8 bits, and so is a part of it with under 4096 elements."""
    whole = measure(build(config_of(TINY["llama"]), torch.float32), Setup())
    part = measure(build(config_of(TINY["llama"]), torch.float32), Setup(num_gpus=16, shard="fsdp2"))
    tables = [p for p in part.trained if p.whole_elements == 512 * 64]
    assert [p.shape for p in tables] == [(32, 64)] * 2
    assert state_bytes("muon8bit+adamw8bit", tables) == 2 * (4 + 2 * (32 * 64 + 4 * 8))
    norms = [p for p in whole.trained if p.num_elements == 64]
    assert state_bytes("muon8bit+adamw8bit", norms) == len(norms) * (4 + 8 * 64)


def test_weights_bytes_equal_the_storages_of_a_tied_model() -> None:
    config = config_of({**TINY["llama"], "tie_word_embeddings": True})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}
    buffers = sum(t.untyped_storage().nbytes() for t in model.buffers())
    assert measure(build(config, torch.bfloat16), Setup()).weights_bytes == sum(storages.values()) + buffers


@pytest.mark.parametrize("shape", [(128, 128), (96, 200), (65, 64)])
def test_nf4_bytes_equal_the_storages_of_bitsandbytes(shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(torch.randn(shape), quant_type="nf4", compress_statistics=True)
    tensors = [packed, state.absmax, state.state2.absmax, state.offset, state.code]
    assert nf4_bytes(math.prod(shape)) == sum(tensor.untyped_storage().nbytes() for tensor in tensors)
