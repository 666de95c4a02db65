"""The estimate against the peak of real CPU steps, by torch's accounting of tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.memory_models import TINY, config_of
from transformers import AutoModelForCausalLM

from benchmarks.training import advice_peaks
from benchmarks.training.memory_peaks import MEASURED, compare
from muon8bit.estimate import Estimator, Setup
from muon8bit.estimate.losses import loss_of

# Wider than the tiny ones, so that no table of a few KiB decides.
LLAMA = {**TINY["llama"], "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512}
TOLERANCE = 0.10


@pytest.fixture(scope="module")
def estimator() -> Estimator:
    return Estimator(config_of(LLAMA))


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("release", [False, True], ids=["stepped", "released"])
@pytest.mark.parametrize("seq", [16, 128])
def test_estimated_peak_is_near_the_measured_one(estimator: Estimator, name: str, release: bool, seq: int) -> None:
    pytest.importorskip("bitsandbytes")
    for checkpointing in (False, True) if seq == 128 else (False,):
        dtype = "bf16" if name == "muon_bf16" else "fp32"
        setup = Setup(2, seq, dtype, checkpointing, release=release, device="cpu")
        row = compare(estimator.config, name, setup, estimator)
        assert abs(row["error"]) <= TOLERANCE, row


def test_loss_by_chunks_is_the_same_and_its_peak_is_near_the_measured_one(estimator: Estimator) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(estimator.config, dtype=torch.float32)
    tokens = torch.randint(4096, (2, 128))
    whole, parts = loss_of(model, tokens, None), loss_of(model, tokens, 100)
    torch.testing.assert_close(parts, whole)
    setup = Setup(4, 128, "fp32", True, loss_chunk=64, device="cpu")
    row = compare(estimator.config, "muon8bit", setup, estimator)
    assert abs(row["error"]) <= 0.02, row
    at_once = estimator.estimate(replace(setup, loss_chunk=None))
    assert row["estimated_bytes"] < at_once.peak_bytes("muon8bit")


def test_peak_with_accumulated_gradients_is_near_the_measured_one(estimator: Estimator) -> None:
    setup = Setup(8, 128, "fp32", accumulation=2, device="cpu")
    row = compare(estimator.config, "muon8bit", setup, estimator)
    assert abs(row["error"]) <= 0.02, row
    once = estimator.estimate(replace(setup, accumulation=1))
    assert row["measured_bytes"] > 1.05 * once.peak_bytes("muon8bit")


@pytest.mark.parametrize(("model", "share"), [("llama", 0.35), ("gemma2", 0.6)])
def test_commands_that_are_offered_take_what_is_said(monkeypatch: pytest.MonkeyPatch, model: str, share: float) -> None:
    """Two cells of the record; with 4 layers and all cells 1.2% at most."""
    monkeypatch.setitem(advice_peaks.MODELS, model, {**advice_peaks.MODELS[model], "num_hidden_layers": 1})
    found = list(advice_peaks.rows([model], (share,)))
    assert {row["command"].partition("--mode ")[2].split(" ")[0] for row in found} >= {"full", "qlora"}
    for row in found:
        assert abs(row["error"]) <= advice_peaks.TOLERANCE, row
        assert row["estimated_bytes"] <= row["budget_bytes"]


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind != "llama"])
def test_estimated_peak_holds_for_other_architectures(kind: str) -> None:
    config = config_of(TINY[kind])
    for checkpointing in (False, True):
        setup = Setup(4, 128, "fp32", checkpointing, device="cpu")
        row = compare(config, "muon8bit", setup, Estimator(config))
        assert abs(row["error"]) <= 0.02, row
