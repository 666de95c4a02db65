"""state_report against storages counted by hand, real optimizers' states and acceptance figures."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import LlamaConfig, LlamaForCausalLM

from muon8bit import Muon8bit
from muon8bit.config import BUFFER_KEY, LINEAR_CODES_KEY, SCALES_KEY
from muon8bit.report import state_report
from muon8bit.routing.groups import param_groups

SHAPES = ((64, 96), (80, 64), (64,), ())


class Holder(torch.optim.Optimizer):
    """An optimizer whose state the tests write by hand, in Muon8bit's format."""

    def __init__(self, params: object) -> None:
        super().__init__(params, {"lr": 1e-3})  # type: ignore[arg-type]

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Nothing."""


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()
    return optimizer


def params(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def linear8_state(param: Tensor, block_size: int = 2048) -> dict[str, Tensor]:
    rows, columns = param.shape
    scales = torch.zeros(rows, math.ceil(columns / block_size))
    return {LINEAR_CODES_KEY: torch.zeros(rows, columns, dtype=torch.int8), SCALES_KEY: scales}


@pytest.mark.parametrize("bits", [8, 32])
def test_matrices_of_a_stack_that_never_had_a_gradient_are_counted(bits: int) -> None:
    stack, matrix, conv = params((2, 3, 12, 16), (12, 16), (4, 3, 3, 3))
    groups = [{"params": [("experts", stack), ("dense", matrix)]}, {"params": [("conv", conv)], "flatten": True}]
    optimizer = stepped(Muon8bit(groups, bits=bits))  # zero gradients: all of them
    assert state_report(optimizer).to_dict()["untouched"] == [
        {"name": "experts", "num_untouched": 6, "num_matrices": 6}
    ]
    for gradient in (1.0, 0.0):  # once is enough
        stack.grad[0, 1], stack.grad[1, 2, 3, 4] = gradient, gradient
        optimizer.step()
        report = state_report(optimizer)
        assert [(of.name, of.num_untouched, of.num_matrices) for of in report.untouched] == [("experts", 4, 6)]
    assert "matrices of stacks without a gradient so far: 4 of 6 in experts" in str(report)
    stack.grad.fill_(1.0)
    optimizer.step()
    assert state_report(optimizer).untouched == ()
    assert state_report(Muon8bit(groups, bits=bits)).untouched == ()  # without state


def test_adamw_bytes_equal_two_moments_and_a_step_counter() -> None:
    report = state_report(stepped(torch.optim.AdamW(params(*SHAPES))))
    num_elements = 64 * 96 + 80 * 64 + 64 + 1
    assert report.num_parameters == num_elements
    assert report.total_bytes == report.baselines["adamw_fp32"] == 8 * num_elements + 4 * len(SHAPES)
    assert [entry.algorithm for entry in report.algorithms] == ["adamw"]
    assert "muon_fp32" not in report.baselines


def test_muon_bytes_equal_torch_muon_in_fp32_and_bf16() -> None:
    shapes = SHAPES[:2]
    num_elements = 64 * 96 + 80 * 64
    report = state_report(stepped(torch.optim.Muon(params(*shapes))))
    assert report.total_bytes == report.baselines["muon_fp32"] == 4 * num_elements
    half = [nn.Parameter(param.detach().bfloat16()) for param in params(*shapes)]
    report = state_report(stepped(torch.optim.Muon(half)))
    assert report.total_bytes == report.baselines["muon_bf16"] == 2 * num_elements


def test_adamw_8bit_baseline_equals_bitsandbytes_state() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    shapes = ((64, 96), (4096,), (4095,), (65, 65))
    report = state_report(stepped(bitsandbytes.optim.AdamW8bit(params(*shapes))))
    assert report.total_bytes == report.baselines["adamw_8bit"]  # the two maps included, once
    assert report.baselines["adamw_8bit"] < report.baselines["adamw_fp32"]
    small = state_report(stepped(bitsandbytes.optim.AdamW8bit(params((4095,)))))
    assert small.total_bytes == small.baselines["adamw_8bit"] == 8 * 4095  # no code, no map


@pytest.mark.parametrize("given", [nn.Linear(2, 2), {}, None])
def test_what_is_no_optimizer_is_refused_by_its_type(given: object) -> None:
    with pytest.raises(TypeError, match=f"takes an optimizer .*not a {type(given).__name__}: give the optimizer"):
        state_report(given)  # type: ignore[arg-type]


def test_padded_viewed_and_shared_storages_count_whole_and_once() -> None:
    first, second = params((8, 16), (8, 16))
    optimizer = Holder([{"params": [first, second], "algorithm": "muon"}])
    padded = torch.zeros(4096, dtype=torch.int8)
    optimizer.state[first] = {LINEAR_CODES_KEY: padded[:128].view(8, 16), SCALES_KEY: torch.zeros(8, 1)}
    optimizer.state[second] = {LINEAR_CODES_KEY: padded[128:256].view(8, 16), SCALES_KEY: torch.zeros(16)[::2]}
    assert state_report(optimizer).total_bytes == 4096 + 8 * 4 + 16 * 4


def test_nested_foreign_and_non_tensor_state_is_counted() -> None:
    (param,) = params((8, 16))
    optimizer = Holder([param])
    optimizer.state[param] = {"step": 3, "parts": [torch.zeros(5), {"x": torch.zeros(2)}], "empty": torch.zeros(0)}
    optimizer.state["shared"] = {"map": torch.zeros(256)}  # type: ignore[index]
    (entry,) = state_report(optimizer).algorithms
    assert (entry.algorithm, entry.state_bytes) == ("other", 4 * (5 + 2 + 256))


def test_algorithms_are_told_apart_by_group_then_state() -> None:
    matrix, norm, unlabelled = params((32, 64), (64,), (16, 2049))
    groups = [
        {"params": [matrix], "algorithm": "muon"},
        {"params": [norm], "algorithm": "adamw"},
        {"params": [unlabelled]},
    ]
    optimizer = Holder(groups)
    optimizer.state[matrix] = linear8_state(matrix)
    optimizer.state[norm] = {"exp_avg": torch.zeros(64), "exp_avg_sq": torch.zeros(64)}
    optimizer.state[unlabelled] = linear8_state(unlabelled)
    report = state_report(optimizer)
    muon = 32 * 64 + 32 * 4 + 16 * 2049 + 16 * 2 * 4
    assert [(e.algorithm, e.num_tensors, e.state_bytes) for e in report.algorithms] == [
        ("muon", 2, muon),
        ("adamw", 1, 512),
    ]
    num_muon = 32 * 64 + 16 * 2049
    assert report.baselines == {
        "muon_fp32": 4 * num_muon + 512 + 4,
        "muon_bf16": 2 * num_muon + 512 + 4,
        "adamw_fp32": 8 * num_muon + 512 + 3 * 4,
        "adamw_8bit": 2 * 256 * 4 + 8 * 2048 + 2 * 16 * 2049 + 8 * math.ceil(16 * 2049 / 256) + 512,
    }


def test_narrow_matrices_are_listed_only_beside_8_bit_state() -> None:
    narrow, wide = params((16, 7), (16, 8))
    optimizer = Holder([{"params": [("narrow", narrow), ("wide", wide)], "algorithm": "muon"}])
    optimizer.state[narrow] = {BUFFER_KEY: torch.zeros(16, 7)}
    optimizer.state[wide] = {BUFFER_KEY: torch.zeros(16, 8)}
    assert state_report(optimizer).kept_32bit == ()  # bits=32
    optimizer.state[wide] = linear8_state(wide)
    (note,) = state_report(optimizer).kept_32bit
    assert (note.name, note.shape, note.state_bytes) == ("narrow", (16, 7), 448)
    assert "(under 8 columns): narrow (16 x 7)" in str(state_report(optimizer))
    optimizer.param_groups[0]["bits"] = 32
    assert state_report(optimizer).kept_32bit == ()


def test_report_before_first_step_says_so_and_lists_what_has_no_state() -> None:
    first, second = params((16, 8), (4, 8))
    optimizer = torch.optim.AdamW([first, second])
    report = state_report(optimizer)
    assert (report.total_bytes, report.num_parameters) == (0, 160)
    assert report.note.startswith("before the first step")
    assert "before the first step" in str(report)
    second.grad = torch.ones_like(second)
    optimizer.step()
    report = state_report(optimizer)
    assert [note.name for note in report.without_state] == ["parameter 0 of group 0"]
    assert report.note.startswith("1 of 2 tensors have no state yet")
    assert "parameter 0 of group 0 (16 x 8)" in str(report)


def test_dict_is_json_and_agrees_with_the_report() -> None:
    report = state_report(stepped(torch.optim.Muon(params(*SHAPES[:2]))))
    record = json.loads(json.dumps(report.to_dict()))
    assert record["total_bytes"] == report.total_bytes == record["algorithms"]["muon"]["state_bytes"]
    assert record["bytes_per_parameter"] == record["algorithms"]["muon"]["bytes_per_parameter"] == 4.0
    assert record["baselines"] == report.baselines
    assert record["note"] == report.note


def test_table_prints_bytes_units_and_ratios() -> None:
    text = str(state_report(stepped(torch.optim.Muon(params((1024, 1024))))))
    assert text.isascii()
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines() if line}
    assert lines["muon"] == ["muon", "1,048,576", "4,194,304", "B", "(4.00", "MiB)", "4.0000"]
    assert lines["adamw_fp32 would take"][-2:] == ["2.00", "x"]
    assert lines["muon_bf16 would take"][-2:] == ["0.50", "x"]


def test_dtensor_state_counts_the_local_part() -> None:
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))
        local = torch.zeros(8, 32)
        param = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)]))
        optimizer = Holder([{"params": [param], "algorithm": "muon"}])
        optimizer.state[param] = {
            key: DTensor.from_local(value, mesh, [Shard(0)]) for key, value in linear8_state(local).items()
        }
        report = state_report(optimizer)
    finally:
        dist.destroy_process_group()
    assert report.is_sharded
    assert (report.num_parameters, report.total_bytes) == (8 * 32, 8 * 32 + 8 * 4)
    assert "this rank's local tensors" in str(report)


def llama(**sizes: int) -> nn.Module:
    config = LlamaConfig(vocab_size=64, num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).to_empty(device="cpu")


def muon8bit_step(model: nn.Module, **options: object) -> tuple[Muon8bit, int]:
    """The optimizer after one cheap step, and the bytes that routing had predicted."""
    groups = param_groups(model, lr=1e-3)
    optimizer = Muon8bit(groups, lr=1e-3, ns_steps=1, **options)  # type: ignore
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    stepped(optimizer)
    return optimizer, sum(route.state_bytes for route in groups.routes)


@pytest.mark.parametrize("intermediate", [5632, 8192])
def test_hidden_matrices_of_llama_2048_take_at_most_1_0025_bytes(intermediate: int) -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": intermediate}
    optimizer, _ = muon8bit_step(llama(**sizes, num_attention_heads=16, num_key_value_heads=4))
    (muon,) = (entry for entry in state_report(optimizer).algorithms if entry.algorithm == "muon")
    assert muon.num_parameters == 2048 * (2 * 2048 + 2 * 512 + 3 * intermediate)
    assert 1.0 < muon.bytes_per_parameter <= 1.0025


@pytest.mark.parametrize("codebook", ["linear", "dynamic"])
def test_routing_prediction_equals_measured_bytes(codebook: str) -> None:
    model = llama(hidden_size=20, intermediate_size=2056, num_attention_heads=5, num_key_value_heads=1)
    optimizer, predicted = muon8bit_step(model, codebook=codebook)
    num_adamw = sum(len(group["params"]) for group in optimizer.param_groups if group["algorithm"] == "adamw")
    report = state_report(optimizer)
    assert report.total_bytes == predicted + 4 * num_adamw  # AdamW's step counters
    assert report.without_state == ()


def test_routing_prediction_equals_measured_bytes_of_experts_and_convolutions() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.small = nn.Conv2d(300, 4, 3, bias=False), nn.Conv1d(2, 4, 3, bias=False)
            self.experts = nn.Module()
            self.experts.gate_up_proj = nn.Parameter(torch.zeros(3, 16, 2056))
            self.experts.down_proj = nn.Parameter(torch.zeros(3, 2056, 8))
            self.experts.is_concatenated = True

    groups = param_groups(Model(), lr=1e-3, patterns=[("conv.*", "muon"), ("small.*", "muon")])
    assert [group.get("split_sizes") for group in groups] == [None, None, (8, 8)]
    optimizer = stepped(Muon8bit(groups, ns_steps=1))
    report = state_report(optimizer)
    assert report.total_bytes == sum(route.state_bytes for route in groups.routes)
    assert [note.name for note in report.kept_32bit] == ["small.weight"]


def test_muon8bit_narrow_matrix_is_reported_even_alone() -> None:
    optimizer, predicted = muon8bit_step(nn.Sequential(nn.Linear(7, 16, bias=False)))
    report = state_report(optimizer)
    assert [note.name for note in report.kept_32bit] == ["0.weight"]
    assert report.total_bytes == predicted == 4 * 7 * 16
