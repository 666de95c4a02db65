"""Gradient release against ordinary steps of the same optimizer: equal bits, or a refusal that says why."""

from __future__ import annotations

import io

import pytest
import torch
from helpers.bitwise import assert_bitwise
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from muon8bit import Muon8bit, release_gradients
from muon8bit.step import nonfinite


class Net(nn.Module):
    """Every kind of parameter, and no two matrices of one shape, so that ordinary steps take them one by one too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 24)
        self.up = nn.Linear(24, 40)
        self.experts = nn.Parameter(torch.randn(3, 40, 16))
        self.fused = nn.Linear(16, 36, bias=False)
        self.down = nn.Linear(36, 24, bias=False)
        self.frozen = nn.Linear(24, 24, bias=False).requires_grad_(False)
        self.unused = nn.Linear(24, 12)
        self.head = nn.Linear(24, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.up(self.embed(tokens)).tanh()
        x = torch.einsum("bd,edo->bo", x, self.experts).tanh()
        return self.head(self.frozen(self.down(self.fused(x).tanh())))


def make(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Net().to(dtype)
    named = dict(model.named_parameters())

    def group(*names, **keys):
        return {"params": [(name, named[name]) for name in names], **keys}

    groups = [
        group("up.weight", "experts", "frozen.weight", "unused.weight", "down.weight"),
        group("fused.weight", split_sizes=(16, 12, 8)),
        group("embed.weight", "up.bias", "unused.bias", algorithm="adamw", lr=0.01),
    ]
    optimizer = Muon8bit(groups, lr=0.02, **{"on_nonfinite": "skip", **options})
    return model, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 0.3, 1.0, 4)


def loss_of(model, seed):
    tokens = torch.randint(30, (8,), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(tokens).float(), tokens.roll(1))


def train(model, optimizer, scheduler, seeds):
    for seed in seeds:
        loss_of(model, seed).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def assert_equal(model, optimizer, twin, its):
    for (name, param), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_bitwise(param.detach(), other.detach())
        assert optimizer.state[param].keys() == its.state[other].keys(), name
        for key, value in optimizer.state[param].items():
            assert_bitwise(value, its.state[other][key])
    for group, other in zip(optimizer.state_dict()["param_groups"], its.state_dict()["param_groups"], strict=True):
        assert group == other


OPTIONS = {
    "linear": {},
    "dynamic": {"codebook": "dynamic", "nesterov": False},
    "fp32 state": {"bits": 32},
    "bf16, stochastic": {"dtype": torch.bfloat16, "param_rounding": "stochastic", "rounding_seed": 5},
    "cautious": {"cautious_weight_decay": True, "decay_lr_power": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_released_steps_equal_ordinary_steps_bitwise(name):
    """Tied, frozen and unused parameters, experts, pieces, a schedule of lr: all as without release."""
    model, optimizer, scheduler = make(**OPTIONS[name])
    twin, its, its_scheduler = make(**OPTIONS[name])
    release_gradients(model, optimizer)
    for step in range(4):
        train(model, optimizer, scheduler, [step])
        train(twin, its, its_scheduler, [step])
        assert_equal(model, optimizer, twin, its)
    assert torch.count_nonzero(
        optimizer.state[model.experts][
            "momentum_buffer"
            if name == "fp32 state"
            else "momentum_dynamic8"
            if name == "dynamic"
            else "momentum_linear8"
        ]
    )


def test_no_gradient_is_left_after_backward():
    model, optimizer, _ = make()
    release_gradients(model, optimizer)
    before = model.up.weight.detach().clone()
    loss_of(model, 0).backward()
    assert all(param.grad is None for param in model.parameters())
    assert not torch.equal(before, model.up.weight)


def test_a_closure_is_stepped_like_a_backward_before_step():
    model, optimizer, _ = make()
    twin, its, _ = make()
    release_gradients(model, optimizer)
    for seed in range(2):

        def closure(seed=seed):
            loss = loss_of(model, seed)
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0
        loss_of(twin, seed).backward()
        its.step()
        its.zero_grad()
    assert_equal(model, optimizer, twin, its)


def test_removed_release_leaves_ordinary_steps_and_ends_the_open_step():
    model, optimizer, scheduler = make()
    twin, its, its_scheduler = make()
    handle = release_gradients(model, optimizer)
    loss_of(model, 0).backward()
    handle.remove()
    optimizer.step()
    scheduler.step()
    loss_of(model, 1).backward()
    assert model.up.weight.grad is not None
    optimizer.step()
    scheduler.step()
    train(twin, its, its_scheduler, range(2))
    assert_equal(model, optimizer, twin, its)
    release_gradients(model, optimizer)  # may begin anew


@pytest.mark.filterwarnings("ignore:no saved state for")  # of `frozen` and `unused`
@pytest.mark.parametrize("door", ["torch.save", "distributed checkpointing"])
def test_a_resumed_run_equals_an_unbroken_ordinary_one_bitwise(door):
    how = OPTIONS["bf16, stochastic"]
    first, optimizer, scheduler = make(**how)
    release_gradients(first, optimizer)
    train(first, optimizer, scheduler, range(3))
    second, resumed, its_scheduler = make(**how)
    release_gradients(second, resumed)
    second.load_state_dict(first.state_dict())
    if door == "torch.save":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
    else:  # initialises the state by a step with gradients of zero, which it assigns
        options = StateDictOptions(strict=False)  # no state for `unused`
        set_optimizer_state_dict(second, resumed, get_optimizer_state_dict(first, optimizer), options=options)
    its_scheduler.load_state_dict(scheduler.state_dict())
    train(second, resumed, its_scheduler, range(3, 5))
    twin, its, ordinary_scheduler = make(**how)
    train(twin, its, ordinary_scheduler, range(5))
    for param, other in zip(second.parameters(), twin.parameters(), strict=True):
        assert_bitwise(param.detach(), other.detach())
    assert resumed.param_groups[0]["rounding_step"] == 5


@pytest.mark.parametrize("is_asynchronous", [False, True])  # as on CUDA, played on the CPU
@pytest.mark.parametrize("bad", ["up.weight", "embed.weight"])
def test_a_bad_gradient_leaves_out_its_parameter_alone(bad, is_asynchronous, monkeypatch):
    monkeypatch.setattr(nonfinite.GradientCheck, "is_asynchronous", is_asynchronous)
    how = OPTIONS["bf16, stochastic"]
    model, optimizer, scheduler = make(**how)
    twin, its, its_scheduler = make(**how)
    release_gradients(model, optimizer)
    train(model, optimizer, scheduler, [0])
    train(twin, its, its_scheduler, [0])
    param = dict(model.named_parameters())[bad]
    left_out = [param.detach().clone(), *(value.clone() for value in optimizer.state[param].values())]
    hook = param.register_hook(lambda grad: grad * torch.inf)
    train(model, optimizer, scheduler, [1])
    hook.remove()
    train(twin, its, its_scheduler, [1])
    for actual, expected in zip([param.detach(), *optimizer.state[param].values()], left_out, strict=True):
        assert_bitwise(actual, expected)
    others = dict(twin.named_parameters())
    for name, other in model.named_parameters():
        assert name == bad or torch.equal(other, others[name])
    assert (optimizer.num_skipped_steps, its.num_skipped_steps) == (1, 0)
    assert optimizer.param_groups[0]["rounding_step"] == 2  # the step was done, for the others
    train(model, optimizer, scheduler, [2])
    assert optimizer.num_skipped_steps == 1
