"""Measures against numpy in float64, which matrices are watched, what is warned of, and what is refused."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from helpers.oracle import JORDAN, newton_schulz
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from muon8bit import (
    AdaMuon8bit,
    Muon8bit,
    NorMuon8bit,
    QuantizationHealth,
    QuantizationWarning,
    param_groups,
    release_gradients,
)

MEMBERS = {
    "muon linear": (Muon8bit, {}),
    "muon dynamic": (Muon8bit, {"codebook": "dynamic"}),
    "normuon": (NorMuon8bit, {}),
    "adamuon": (AdaMuon8bit, {}),
}


def groups_of(model, kind, **options):
    groups = param_groups(model, lr=5e-3, **options)
    for group in groups if kind is not Muon8bit else ():
        group.pop("adjust_lr_fn", None)
    return groups


class Network(nn.Module):
    """Two layers with an MLP each; `gains` [cols] scale the columns of the second layer's `out`."""

    def __init__(self, gains=None):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(32, 256, bias=False), "out": nn.Linear(256, 32, bias=False)})
            for _ in range(2)
        )
        self.gains = gains

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            hidden = torch.relu(layer["up"](x))
            x = x + layer["out"](hidden if self.gains is None or number == 0 else hidden * self.gains)
        return x


def train(model, optimizer, num_steps):
    """A regression on noisy targets, with the rate of the recipes' scale."""
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(32, 32, generator=generator)
    for _ in range(num_steps):
        x = torch.randn(64, 32, generator=generator)
        target = torch.tanh(x @ wanted) + 0.5 * torch.randn(64, 32, generator=generator)
        (model(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def inputs64(codes, scales, grad, m32, block_size, beta=0.95):
    """u of both momenta with Nesterov, and the fp32 momentum after the step; linear codes, all in float64."""
    decoded = codes.astype(np.float64) * np.repeat(scales.astype(np.float64), block_size, 1)[:, : codes.shape[1]] / 127
    new = [beta * m + (1 - beta) * grad for m in (m32, decoded)]
    return [beta * m + (1 - beta) * grad for m in new], new[0]


def test_measures_match_numpy_in_float64():
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(20, 150))
    optimizer = Muon8bit([("w", param)], block_size=64)
    health = QuantizationHealth(optimizer, every=6)
    m32, grads = np.zeros((20, 150)), [torch.randn(20, 150) * torch.linspace(0.01, 3, 150) ** 2 for _ in range(6)]
    for grad in grads[:-1]:
        param.grad = grad.clone()
        optimizer.step()
        m32 = 0.95 * m32 + 0.05 * grad.double().numpy()
    assert health.latest() == ()
    state = {key: value.clone().numpy() for key, value in optimizer.state[param].items()}
    param.grad = grads[-1].clone()
    optimizer.step()
    grad = grads[-1].double().numpy()
    (u, u8), m32 = inputs64(state["momentum_linear8"], state["momentum_scales"], grad, m32, 64)
    by_fp32, by_8bit = (newton_schulz(matrix, [JORDAN] * 5) for matrix in (u, u8))
    codes, scales = (optimizer.state[param][key].numpy() for key in ("momentum_linear8", "momentum_scales"))
    stored = codes * np.repeat(scales.astype(np.float64), 64, 1)[:, :150] / 127
    (found,) = health.latest()
    expected = {
        "descent": (by_8bit * u).sum() / (by_fp32 * u).sum(),
        "update_cosine": (by_8bit * by_fp32).sum() / np.linalg.norm(by_8bit) / np.linalg.norm(by_fp32),
        "momentum_error": np.linalg.norm(stored - m32) / np.linalg.norm(m32),
        "sign_flips": (u * u8 < 0).mean(),
        "zero_codes": (codes == 0).mean(),
        "extreme_codes": (np.abs(codes.astype(int)) == 127).mean(),
    }
    for key, value in expected.items():
        assert getattr(found, key) == pytest.approx(value, rel=2e-4), key
    assert 0 < found.sign_flips < 0.2
    assert found.momentum_error > 0.005
    assert (found.name, found.shape, found.step) == ("w", (20, 150), 6)


def test_dynamic_codes_and_signs_are_measured_too():
    """Zeros and ends of the other codebook, and Newton-Schulz of signs: by what is known of a planted gradient."""
    param = nn.Parameter(torch.randn(16, 64))
    optimizer = AdaMuon8bit([("w", param)])
    health = QuantizationHealth(optimizer, every=1)
    param.grad = torch.cat([torch.ones(16, 16), torch.zeros(16, 32), torch.full((16, 16), -1.0)], 1)
    optimizer.step()
    (found,) = health.latest()
    assert (found.zero_codes, found.extreme_codes, found.sign_flips) == (0.5, 0.5, 0)
    assert found.descent == pytest.approx(1, abs=1e-5)
    assert found.min_descent == 0.8


@pytest.mark.parametrize(("kind", "options"), MEMBERS.values(), ids=MEMBERS)
def test_members_of_the_family_train_without_a_warning(kind, options):
    """A tiny stand-in for the default recipe; its runs are in docs/results/health.md."""
    torch.manual_seed(0)
    model = Network()
    optimizer = kind(groups_of(model, kind), lr=5e-3, **options)
    health = QuantizationHealth(optimizer, every=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 40)
    report = health.report()
    assert report.is_sound
    assert "sound: each update keeps at least" in str(report)
    assert len(report.last) == 4
    assert all(of.momentum_error > 0.005 for of in report.last)  # as 8 bits have


def planted(codebook, block_size=4096):
    """Momentum of singular values 1/k with log-normal rows and columns of 4096, one block a row."""
    torch.manual_seed(0)
    rows, cols = 256, 4096
    param = nn.Parameter(torch.zeros(rows, cols))
    left, right = (torch.linalg.qr(torch.randn(size, rows))[0] for size in (rows, cols))
    scales = torch.exp(torch.randn(rows, 1)) * torch.exp(torch.randn(1, cols))
    optimizer = Muon8bit([("layers.7.w", param)], block_size=block_size, codebook=codebook)
    health = QuantizationHealth(optimizer, every=10)
    for _ in range(40):
        noise = torch.randn(cols, rows) / cols**0.5
        param.grad = (left / torch.arange(1, rows + 1)) @ (right + 0.5 * noise).T * scales
        optimizer.step()
    return health.report()


def test_planted_bad_case_is_flagged_with_the_way_out():
    with pytest.warns(QuantizationWarning) as caught:
        report = planted("linear")
    (text,) = (str(warning.message) for warning in caught)  # once
    assert text.startswith("layers.7.w: in 8 bits (codebook='linear', block_size=4096) its update keeps 9")
    assert 'Better for it: {"codebook": "dynamic"}, by param_groups(model, patterns=[("layers.7.w", {"codebook"' in text
    assert not report.is_sound
    assert text in str(report)
    record = json.loads(json.dumps(report.to_dict()))
    assert record["warnings"] == {"layers.7.w": text}
    assert record["worst"]["layers.7.w"]["descent"] < 0.95


def test_the_way_out_is_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert planted("dynamic").is_sound


def test_one_wrong_codebook_inside_a_run_is_found():
    """AdaMuon with linear codes for one matrix whose columns are uneven; the other matrices have the default."""
    torch.manual_seed(0)
    model = Network(gains=torch.exp(2 * torch.randn(256)))
    patterns = [("layers.1.out.weight", {"codebook": "linear"})]
    optimizer = AdaMuon8bit(groups_of(model, AdaMuon8bit, patterns=patterns), lr=5e-3, codebook="dynamic")
    health = QuantizationHealth(optimizer, every=20)
    with pytest.warns(QuantizationWarning, match="layers.1.out.weight") as caught:
        train(model, optimizer, 40)
    assert len(caught) == 1
    assert '{"codebook": "dynamic"}' in str(caught[0].message)
    assert list(health.report().warnings) == ["layers.1.out.weight"]


def test_sample_is_spread_over_shapes_kinds_and_depth():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            for name, size in {"q": (32, 32), "k": (32, 32), "up": (32, 64), "down": (64, 32)}.items():
                setattr(self, name, nn.Linear(*size, bias=False))

    model = nn.Module()
    model.layers = nn.ModuleList(Layer() for _ in range(8))
    optimizer = Muon8bit(param_groups(model, lr=1e-3))

    def names(sample):
        return [shadow.of.name.removesuffix(".weight") for shadow in QuantizationHealth(optimizer, sample)._shadows]

    assert names(4) == ["layers.1.down", "layers.3.up", "layers.5.q", "layers.7.k"]
    assert names(4) == names(4)
    assert names(1) == ["layers.4.down"]
    assert len(set(names(10))) == 10
    assert len(names(1000)) == 32


def test_unnamed_parameters_and_those_in_32_bits():
    params = [nn.Parameter(torch.randn(16, 4)), *(nn.Parameter(torch.randn(16, 24)) for _ in range(6))]
    optimizer = Muon8bit([{"params": params[:4]}, {"params": params[4:], "bits": 32}])
    found = [shadow.of.name for shadow in QuantizationHealth(optimizer)._shadows]
    assert found == [f"parameter {i} of group 0, shape (16, 24)" for i in (2, 1, 3)]


def test_cost_by_counting_is_at_most_a_tenth_of_the_steps():
    """Of all four matrices watched, every 20 steps: products counted, forward and backward left out."""

    def flops(is_watched):
        params = [nn.Parameter(torch.randn(32, 96)) for _ in range(4)]
        optimizer = Muon8bit(params, ns_dtype=torch.float32)
        if is_watched:
            QuantizationHealth(optimizer, sample=4, every=20)
        with FlopCounterMode(display=False) as counter:
            for _ in range(20):
                for param in params:
                    param.grad = torch.randn_like(param)
                optimizer.step()
        return counter.get_total_flops()

    without, watched = flops(False), flops(True)
    assert without < watched <= 1.1 * without


def test_what_cannot_be_watched_is_refused_by_name():
    model = Network()
    optimizer = Muon8bit(param_groups(model, lr=1e-3), on_nonfinite="skip")
    with pytest.raises(TypeError, match=r"not a SGD: of an optimizer that Accelerate has prepared pass `.optimizer`"):
        QuantizationHealth(torch.optim.SGD(model.parameters()))
    for name, value in {"sample": 0, "every": True}.items():
        with pytest.raises(ValueError, match=f"{name} must be an int above 0, not {value}"):
            QuantizationHealth(optimizer, **{name: value})
    with pytest.raises(ValueError, match="no momentum is in 8 bits"):
        QuantizationHealth(Muon8bit(model.parameters(), bits=32))
    QuantizationHealth(optimizer)
    handle = release_gradients(model, optimizer)
    with pytest.raises(NotImplementedError, match="release_gradients has freed the gradients"):
        QuantizationHealth(optimizer)
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(NotImplementedError, match="release_gradients"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    handle.remove()
    optimizer.shard_state = True
    with pytest.raises(NotImplementedError, match="shard_state=False"):
        QuantizationHealth(optimizer)
