"""Estimates of state on the host: against a real step whose state is staged, and against hand counts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers.allocator import peak_bytes
from helpers.lanes import force  # noqa: F401  # a fixture
from helpers.memory_models import TINY, config_of
from transformers import AutoModelForCausalLM

from muon8bit import Muon8bit, param_groups
from muon8bit.cli import main
from muon8bit.estimate import OPTIMIZERS, Estimator, Setup, load_config
from muon8bit.estimate.host import bus_bytes, host_bytes, staging_bytes
from muon8bit.estimate.models import build
from muon8bit.estimate.optimizers import Param, state_bytes, step_bytes
from muon8bit.estimate.sizes import measure
from muon8bit.orthogonalize import device_kind
from muon8bit.step import adamw, adamw8bit, offload

# Some matrices of a batch, some alone, and a table that comes in pieces.
LLAMA = {**TINY["llama"], "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512}
STAGED = ("muon8bit", "muon8bit+adamw8bit")


@pytest.mark.parametrize("kind", [*TINY, "wide llama"])
@pytest.mark.parametrize("budget", [2**19 + 2**20, 2**26])
def test_staged_and_moved_bytes_are_those_of_a_real_step(kind, budget, force, monkeypatch):  # noqa: F811
    moved, buffers, real = [], [], offload.buffer_bytes

    class Counted(offload.CopyStream):
        def _copy(self, copies, is_waited_for=True):
            moved.extend(target.numel() * target.itemsize for target, _ in copies)
            super()._copy(copies, is_waited_for)

    force(Counted)
    monkeypatch.setattr(adamw, "_is_counter_staged", lambda _: True)  # as on CUDA
    config = config_of(TINY.get(kind, LLAMA))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = Muon8bit(param_groups(model, lr=1e-3), state_device="cpu")
    optimizer.workspace_bytes = budget
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    monkeypatch.setattr(offload, "buffer_bytes", lambda jobs: buffers.append(real(jobs)) or real(jobs))
    optimizer.step()
    params = measure(build(config, torch.float32), Setup()).trained
    estimated = staging_bytes("muon8bit", params, device_kind(torch.device("cpu")), budget=budget)
    # Exact for Llamas with wide matrices. Elsewhere the order of the groups decides which jobs share a buffer, and
    # AdamW's small tensors are packed group by group: up to 9% in these models.
    assert abs(estimated / max(map(sum, buffers)) - 1) <= 0.10
    num_pieces = 64  # of the table, which read the step counter again
    assert 0 <= sum(moved) - bus_bytes("muon8bit", params) <= 4 * num_pieces


@pytest.mark.parametrize("is_cautious", [False, True])
@pytest.mark.parametrize("bits", [32, 8])
def test_copies_of_an_adamw_weight_beside_its_staged_state_are_those_of_a_real_step(
    bits,
    is_cautious,
    force,  # noqa: F811
    monkeypatch,
):
    """With 8 bits bitsandbytes' own memory on a CPU is left out."""
    force(offload.CopyStream)
    monkeypatch.setattr(adamw, "_is_counter_staged", lambda _: True)  # as on CUDA
    monkeypatch.setattr(adamw8bit, "_update_", lambda *_: None)
    budget, weight = 2**25, torch.nn.Parameter(torch.randn(5 * 2**20).bfloat16())
    weight.grad = torch.randn_like(weight)
    group = {"params": [weight], "algorithm": "adamw", "lr": 1e-3, "adamw_bits": bits}
    optimizer = Muon8bit([group], state_device="cpu", workspace_bytes=budget, cautious_weight_decay=is_cautious)
    optimizer.step()
    peak, _ = peak_bytes(optimizer.step)
    name, params = ("muon8bit+adamw8bit" if bits == 8 else "muon8bit"), [Param("", weight.shape, weight.dtype, False)]
    workspace = step_bytes(name, params, "cpu", budget=budget, is_staged=True, is_cautious=is_cautious)
    assert peak == pytest.approx(workspace + staging_bytes(name, params, "cpu", budget=budget), rel=0.01)


def test_host_and_bus_bytes_by_hand():
    """Codes 1000 x 3000 and two scales a row; a norm of 3000; a table of 5000 x 100."""
    params = [
        Param("up", (1000, 3000), torch.bfloat16, True),
        Param("norm", (3000,), torch.bfloat16, False),
        Param("embed", (5000, 100), torch.bfloat16, False),
    ]
    muon, norm, embed = (3_000_000 + 8000), (4 + 24_000), (4 + 4_000_000)
    assert bus_bytes("muon8bit", params) == 3 * muon + 2 * (norm + embed)
    pinned = 2**22 + 2**13 + (4 + 2 * 2**14) + (4 + 2 * 2**21)
    assert host_bytes("muon8bit", params) == pinned
    embed8 = 4 + 2 * (500_000 + 4 * 1954)  # ceil(500000 / 256)
    assert bus_bytes("muon8bit+adamw8bit", params) == 3 * muon + 2 * (norm + embed8)
    assert host_bytes("muon8bit+adamw8bit", params) == 2**22 + 2**13 + (4 + 2 * 2**14) + 4 + 2 * (2**19 + 2**13)


def test_a_second_moment_comes_and_goes_once_by_hand():
    """A momentum of 1000 x 3000 comes twice; a number a row, or codes and two scales a row, once."""
    params, momentum = [Param("up", (1000, 3000), torch.bfloat16, True)], 3_000_000 + 8000
    assert bus_bytes("normuon8bit", params) == 3 * momentum + 2 * 4 * 1000
    assert bus_bytes("adamuon8bit", params) == 5 * momentum
    assert host_bytes("normuon8bit", params) == 2**22 + 2**13 + 2**12
    assert host_bytes("adamuon8bit", params) == 2 * (2**22 + 2**13)
    # One matrix: codes, scales and numbers begin at multiples of 512 bytes.
    staged = staging_bytes("normuon8bit", params, "cpu")
    assert staged == 3_000_320 + 8192 + 4096
    assert staging_bytes("adamuon8bit", params, "cpu") == 2 * (3_000_320 + 8192)


@pytest.fixture(scope="module")
def estimator():
    return Estimator(config_of(LLAMA))


@pytest.mark.parametrize("release", [False, True])
def test_the_gpu_has_the_staged_bytes_instead_of_the_state_and_others_are_as_before(estimator, release):
    setup = Setup(seq=64, release=release)
    before, after = estimator.estimate(setup), estimator.estimate(replace(setup, state_device="cpu"))
    for name in OPTIMIZERS:
        old, new = before.optimizers[name], after.optimizers[name]
        assert new.state_bytes == old.state_bytes
        if name not in STAGED:
            assert new == old
            continue
        assert old.host_state_bytes == old.staging_bytes == old.bus_bytes == 0
        assert old.state_bytes <= new.host_state_bytes < 2 * old.state_bytes
        assert 0 < new.staging_bytes < new.bus_bytes
        saved = old.plain.peak_bytes - new.plain.peak_bytes
        assert old.state_bytes - new.staging_bytes <= saved <= old.state_bytes
        if not release and old.plain.phase == "step" and new.plain.phase == "step":
            assert saved == old.state_bytes - new.staging_bytes


def test_8b_with_everything_small_by_hand():
    """Elements of Llama-3.1-8B: 32 layers of 2 h h + 2 kv h + 3 f h; two tables; 65 norms."""
    hidden = 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    rest = 2 * 128256 * 4096 + 65 * 4096
    scales = 32 * 4 * (2 * (4096 + 4096 + 1024 + 1024) + 2 * 14336 * 2 + 4096 * 7)
    sizes = measure(build(load_config("Llama-3.1-8B"), torch.bfloat16), Setup())
    counters = 4 * 67
    assert bus_bytes("muon8bit", sizes.trained) == 3 * (hidden + scales) + 2 * (8 * rest + counters)
    assert state_bytes("muon8bit", sizes.trained) == hidden + scales + 8 * rest + counters
    # 32 key or value matrices are read at once, a quarter of the workspace of 512 MiB: codes and two scales a row.
    assert staging_bytes("muon8bit", sizes.trained, "cuda") == 2 * 32 * (1024 * 4096 + 1024 * 2 * 4)


def test_on_a_cpu_nothing_changes(estimator):
    setup = Setup(seq=64, device="cpu")
    assert estimator.estimate(setup).optimizers == estimator.estimate(replace(setup, state_device="cpu")).optimizers


@pytest.fixture
def llama(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


def test_command_tells_host_bytes_and_offers_it(llama, capfd):
    words = ["estimate", str(llama), "--seq", "64"]
    assert main([*words, "--json"]) == 0
    before = json.loads(capfd.readouterr().out)["optimizers"]
    assert main([*words, "--state-device", "cpu", "--json"]) == 0
    after = json.loads(capfd.readouterr().out)["optimizers"]
    for name in OPTIMIZERS:
        assert after[name]["state_bytes"] == before[name]["state_bytes"]
        assert (after[name]["host_state_bytes"] > 0) == (name in STAGED)
        assert (after[name]["peak_bytes"] < before[name]["peak_bytes"]) == (name in STAGED)
    budget = f"{after['muon8bit']['peak_bytes']}B"
    assert main([*words, "--budget", budget, "--json"]) == 0
    offered = json.loads(capfd.readouterr().out)["offers"]
    assert any("--state-device cpu" in offer["command"] for offer in offered)
    assert main([*words, "--state-device", "cpu"]) == 0
    out = capfd.readouterr().out
    assert "on the host" in out
    assert "GB over the bus in a step" in out
    assert " 0.0 to 0.0 GB" not in out
    assert "Muon8bit's state on the host" in out


def test_command_refuses_it_for_shards(llama, capfd):
    words = ["estimate", str(llama), "--state-device", "cpu", "--gpus", "2", "--shard", "fsdp2"]
    assert main(words) == 2
    assert "--state-device cpu does not go with --shard fsdp2" in capfd.readouterr().err
