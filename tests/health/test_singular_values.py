"""Spectra against numpy in float64, and which matrix belongs to which group of layers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from muon8bit import singular_values, spectra
from muon8bit.routing.layer_groups import group_of

FIELDS = ("entropy", "effective_rank", "top_energy", "quartile_ratio", "rank")


class Block(nn.Module):
    """Attention, a gated MLP, and torch's fused attention, with names of the field."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({f"{x}_proj": nn.Linear(24, 24, bias=False) for x in "qkvo"})
        self.mlp = nn.ModuleDict(
            {"gate_proj": nn.Linear(24, 40), "up_proj": nn.Linear(24, 40), "down_proj": nn.Linear(40, 24)}
        )
        self.cross_attn = nn.MultiheadAttention(24, 2)
        self.mixer = nn.Linear(24, 24)


class Experts(nn.Module):
    """A stack as transformers keeps it, gate rows before up rows."""

    has_gate, is_transposed, is_concatenated = True, False, True

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 32, 24))
        self.down_proj = nn.Parameter(torch.randn(3, 24, 16))


class Model(nn.Module):
    """Two blocks and experts between an embedding and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.layers = nn.ModuleList([Block(), Block()])
        self.experts = Experts()
        self.norm = nn.LayerNorm(24)
        self.lm_head = nn.Linear(24, 50, bias=False)
        self.lm_head.weight = self.embed.weight


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def measures64(matrix):
    """The measures by their definitions, in float64."""
    s = np.linalg.svd(np.asarray(matrix.detach(), dtype=np.float64), compute_uv=False)
    s = s[s > s[0] * max(matrix.shape) * 2.0**-23]
    q = s**2 / (s**2).sum()
    nats = -(q * np.log(q)).sum()
    third, first = np.percentile(s**2, [75, 25])
    return [nats / math.log(len(s)), math.exp(nats), np.sort(q)[-10:].sum(), third / first, len(s)]


def low_rank(rows, cols, rank):
    return torch.randn(rows, rank) @ torch.randn(rank, cols)


def test_measures_match_numpy_in_float64(monkeypatch):
    """Also in chunks, of tall matrices, of rank-deficient ones, and in bf16."""
    torch.manual_seed(0)
    tensors = {
        "wide": torch.randn(20, 48),
        "tall": torch.randn(48, 20) * torch.linspace(1, 9, 20),
        "deficient": low_rank(30, 40, 12),
        "half": torch.randn(16, 24).bfloat16(),
        "stack": torch.randn(2, 3, 12, 16),
    }
    monkeypatch.setattr(singular_values, "CHUNK_BYTES", 4 * 4 * 12 * 16)  # four of the six matrices of the stack
    found = {of.name: of for of in spectra(tensors).matrices}
    stack = tensors.pop("stack").flatten(0, 1)
    tensors |= {f"stack, matrix {i}": stack[i] for i in range(6)}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        values = [getattr(found[name].spectrum, field) for field in FIELDS]
        # Singular values of fp32 are off by some 2^-23 of the largest: of the squares' quartiles that is most.
        np.testing.assert_allclose(values, measures64(tensor.float()), rtol=1e-4, err_msg=name)
        assert found[name].shape == tuple(tensor.shape)


def test_ends_of_the_scale():
    """Equal singular values have entropy 1 and full rank; a zero matrix has none, rank 1 is one direction."""
    even, zero, one = (
        of.spectrum
        for of in spectra({"even": torch.eye(12, 30), "zero": torch.zeros(3, 4), "one": torch.ones(5, 6)}).matrices
    )
    assert [getattr(even, f) for f in FIELDS] == pytest.approx([1, 12, 10 / 12, 1, 12], rel=1e-6)
    assert [getattr(zero, f) for f in FIELDS] == [0] * 5
    assert [getattr(one, f) for f in FIELDS] == pytest.approx([1, 1, 1, 1, 1], rel=1e-6)


def test_model_by_groups_means_and_record(model):
    model.layers[0].mixer.weight.requires_grad_(False)
    found = spectra(model)
    counts = {group: sum(of.group == group for of in found.matrices) for group in found.groups}
    # Of each block q, k and two thirds of torch's in_proj; of three experts a gate, an in and an out.
    assert counts == {"QK": 8, "VO": 8, "W_gate": 5, "W_in": 5, "W_out": 5, "mixer": 2}
    by_name = {of.name: of for of in found.matrices}
    fused = model.layers[1].cross_attn.in_proj_weight
    np.testing.assert_allclose(
        by_name["layers.1.cross_attn.in_proj_weight, piece 2"].spectrum.effective_rank,
        measures64(fused[48:])[1],
        rtol=1e-5,
    )
    up = model.experts.gate_up_proj[1, 16:]
    assert by_name["experts.gate_up_proj, piece 1, matrix 1"].group == "W_in"
    np.testing.assert_allclose(
        by_name["experts.gate_up_proj, piece 1, matrix 1"].spectrum.entropy, measures64(up)[0], rtol=1e-5
    )
    out = [of.spectrum.top_energy for of in found.matrices if of.group == "W_out"]
    assert found.groups["W_out"].top_energy == pytest.approx(sum(out) / 5)
    record = json.loads(json.dumps(found.to_dict()))
    assert record["groups"]["W_out"]["top_energy"] == found.groups["W_out"].top_energy
    assert record["matrices"]["layers.0.mixer.weight"]["shape"] == [24, 24]
    assert str(found).splitlines()[2].split()[:2] == ["QK", "8"]


def test_updates_in_place_of_weights(model):
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    update = {"layers.0.mlp.down_proj.weight": low_rank(24, 40, 2), "experts.down_proj": torch.randn(3, 24, 16)}
    found = spectra(model, updates=update)
    assert [of.spectrum.rank for of in found.matrices if "mlp" in of.name] == [2]
    assert len(found.matrices) == 4
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_updates_of_all_parameters_by_the_names_that_a_wrapper_gives_them(model):
    wrapped = nn.ModuleDict({"module": model})
    update = {name: param.detach() for name, param in wrapped.named_parameters()}
    assert spectra(wrapped, updates=update) == spectra(model)


NAMES = """
QK layers.3.self_attn.q_proj.weight h.0.attn.k_proj.weight layer.1.attention.self.query.weight layers.0.attention.wq
QK model.layers.0.self_attn.q_b_proj.weight
VO layers.0.attention.wo.weight h.2.attn.c_proj.weight encoder.layer.0.attention.output.dense.weight
VO model.layers.1.self_attn.out_proj.weight blocks.0.attn.proj.weight b.SelfAttention.o.weight
W_in h.0.mlp.c_fc.weight encoder.layer.0.intermediate.dense.weight layers.0.feed_forward.w3.weight
W_in layers.0.ffn.w1.weight layers.0.linear1.weight
W_gate layers.0.feed_forward.w1.weight model.layers.0.mlp.gate_proj.base_layer.weight
W_out h.0.mlp.c_proj.weight encoder.layer.0.output.dense.weight b.DenseReluDense.wo.weight
W_out model.layers.0.mlp.shared_experts.down_proj.weight layers.0.feed_forward.w2.weight
mamba.in_proj layers.4.mamba.in_proj.weight
self_attn.q_proj.lora_A.default model.layers.0.self_attn.q_proj.lora_A.default.weight
"""
PAIRS = [(group, name) for group, *names in map(str.split, NAMES.strip().splitlines()) for name in names]


@pytest.mark.parametrize(("group", "name"), PAIRS)
def test_names_of_the_field_tell_the_group(group, name):
    assert group_of(name, [name for _, name in PAIRS]) == group


def test_what_has_no_spectrum_is_refused_by_name(model):
    with pytest.raises(TypeError, match="not a list: give the model"):
        spectra([torch.ones(2, 2)])
    with pytest.raises(ValueError, match="no matrix to look at"):
        spectra(nn.Embedding(8, 8))
    with pytest.raises(ValueError, match=r"embedding.weight is no parameter .*; leave it out. It has: "):
        spectra(model, {"embedding.weight": torch.ones(50, 24)})
    with pytest.raises(ValueError, match="no matrix to look at"):
        spectra(model, {"embed.weight": torch.ones(50, 24)})
    with pytest.raises(ValueError, match=r"mixer.weight has shape \(2, 2\), its parameter \(24, 24\)"):
        spectra(model, {"layers.0.mixer.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="w holds NaN or Inf"):
        spectra({"w": torch.full((2, 2), math.nan)})
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.weight has no values"):
        spectra(model.to("meta"))
