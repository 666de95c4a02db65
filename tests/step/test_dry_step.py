"""Steps of parameters without values: the state is made as a real step would make it, and nothing else happens."""

import gc
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from muon8bit import Muon8bit, param_groups, release_gradients, state_report

OPTIONS = [
    {},
    {"bits": 32},
    {"codebook": "dynamic", "block_size": 64},
    {"state_device": "cpu"},
    {"param_rounding": "stochastic"},
    {"lr": torch.tensor(0.02), "clip_matrix_norm": 1.0},
]


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.norm = torch.nn.Embedding(64, 72), torch.nn.Linear(72, 16), torch.nn.LayerNorm(16)
        self.unused = torch.nn.Linear(3, 4)
        self.experts = torch.nn.Parameter(torch.zeros(3, 16, 16))

    def forward(self, tokens):
        return self.norm(self.up(self.embed(tokens))) @ self.experts


def make(adamw_bits=32, **options):
    model = Net()
    named = list(model.named_parameters())
    is_muon = {"up.weight", "experts", "unused.weight"}
    groups = [
        {"params": [(n, p) for n, p in named if n in is_muon]},
        {"params": [(n, p) for n, p in named if n not in is_muon], "algorithm": "adamw", "lr": 0.01},
    ]
    groups[1]["adamw_bits"] = adamw_bits
    return model, Muon8bit(groups, **options)


def train(model, optimizer):
    for _ in range(2):
        model(torch.zeros(4, dtype=torch.long)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def layout(optimizer):
    """By parameter's place, key: shape and dtype of its state."""
    state = optimizer.state_dict()["state"]
    return {i: {k: (tuple(v.shape), v.dtype) for k, v in of.items()} for i, of in state.items()}


@pytest.mark.parametrize("adamw_bits", [32, 8])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode])
def test_a_dry_step_makes_the_state_of_a_real_one(mode, options, adamw_bits):
    if adamw_bits == 8:
        pytest.importorskip("bitsandbytes")
    real_model, real = make(adamw_bits, **options)
    train(real_model, real)
    expected = state_report(real)
    with mode() as active:
        model, optimizer = make(adamw_bits, **options)
        train(model, optimizer)
        assert layout(optimizer) == layout(real)
        report = state_report(optimizer)
    assert (report.total_bytes, report.num_parameters) == (expected.total_bytes, expected.num_parameters)
    tensors = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    on_host = not isinstance(active, FakeTensorMode) and "state_device" in options  # as it was asked for
    assert all((v.is_meta or is_fake(v)) != on_host for v in tensors)
    for new, old in zip(optimizer.param_groups, real.param_groups, strict=True):
        assert new.get("rounding_step") == old.get("rounding_step")


def test_a_dry_step_outside_its_mode_makes_fake_state():
    with FakeTensorMode():
        model, optimizer = make()
        model(torch.zeros(4, dtype=torch.long)).sum().backward()
    optimizer.step()
    assert all(is_fake(v) for state in optimizer.state.values() for v in state.values())


def test_distributed_checkpointing_takes_the_state_of_a_meta_model():
    with torch.device("meta"):
        model, optimizer = make()
    found = get_optimizer_state_dict(model, optimizer)
    real_model, real = make()
    expected = get_optimizer_state_dict(real_model, real)
    assert found["state"].keys() == expected["state"].keys()
    for name, state in expected["state"].items():
        shapes = {key: (value.shape, value.dtype) for key, value in found["state"][name].items()}
        assert shapes == {key: (value.shape, value.dtype) for key, value in state.items()}
    assert found["param_groups"] == expected["param_groups"]


def test_gradients_released_on_meta_make_the_state_too():
    real_model, real = make(on_nonfinite="skip")
    train(real_model, real)
    with torch.device("meta"):
        model, optimizer = make(on_nonfinite="skip")
        release_gradients(model, optimizer)
        train(model, optimizer)
    assert layout(optimizer) == layout(real)
    assert optimizer.num_skipped_steps == 0
    assert [float(s["step"]) for s in optimizer.state.values() if "step" in s] == [2.0] * 4


def test_values_beside_none_are_refused_by_name_and_nothing_changes():
    params = [torch.nn.Parameter(torch.ones(8, 8, device=device)) for device in ("meta", "cpu")]
    for order in (params, params[::-1]):
        optimizer = Muon8bit([(f"on {param.device}", param) for param in order])
        for param in order:
            param.grad = torch.ones_like(param)
        with pytest.raises(ValueError, match=r"on (cpu|meta) has a gradient with"):
            optimizer.step()
        assert not optimizer.state
    assert torch.equal(params[1], torch.ones(8, 8))


def test_a_fake_gradient_of_a_real_parameter_is_refused_and_makes_no_state():
    param = torch.nn.Parameter(torch.ones(8, 8))
    param.grad = FakeTensorMode().from_tensor(torch.ones(8, 8))
    optimizer = Muon8bit([("w", param)])
    with pytest.raises(ValueError, match=r"w has a gradient without values, of a FakeTensorMode"):
        optimizer.step()
    assert not optimizer.state


def test_release_gradients_does_not_keep_the_optimizer():
    model, optimizer = make(on_nonfinite="skip")
    handle = release_gradients(model, optimizer)
    train(model, optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    before = [param.detach().clone() for param in model.parameters()]
    model(torch.zeros(4, dtype=torch.long)).sum().backward()
    assert model.up.weight.grad is not None
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    handle.remove()
    release_gradients(model, Muon8bit([model.up.weight], on_nonfinite="skip")).remove()


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode])
def test_a_model_without_values_is_routed_in_silence(mode):
    with mode():
        groups = param_groups(Net(), lr=0.1)
    assert str(groups) == str(param_groups(Net(), lr=0.1))
