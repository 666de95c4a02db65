"""Matrices of a stack whose gradient is zero: left as they are to the bit, the others stepped as without a stack."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers.bitwise import assert_bitwise
from muon8bit_kernels import reference
from torch import nn

from muon8bit import Muon8bit, NonFiniteGradientError, StackActivity, release_gradients, state_report
from muon8bit.orthogonalize import NSMethod
from muon8bit.step import muon, nonfinite
from muon8bit.step.matrix_batches import are_zero

OPTIONS = {
    "linear": {},
    "dynamic": {"codebook": "dynamic", "nesterov": False},
    "bits=32": {"bits": 32, "cautious_weight_decay": True},
    "bf16": {"dtype": torch.bfloat16},
    "pieces of rows": {"group": {"split_sizes": (30, 20)}},
    "pieces of columns": {"group": {"split_sizes": (40, 32), "split_dim": -1}},
    "clipped": {"clip_matrix_norm": 0.5, "maximize": True},
    "scaled": {"scale": 8.0},
    "state in host memory": {"state_device": "cpu"},
    "one launch": {"shape": (12, 72), "fused": True},
    "a batch cut": {"workspace_bytes": 2**15},
    "moments of rows": {"second_moment": "row", "rescale": "keep", "group": {"split_sizes": (30, 20)}},
    "moments of elements": {"second_moment": "element", "sign_momentum": True, "rescale": "rms"},
    "moments, one launch": {"second_moment": "element", "bits": 32, "shape": (12, 72), "fused": True},
}
# By step: the matrices of the stack that have a gradient.
ACTIVE = [(0, 1), (0, 2, 3), (), (0, 1, 2, 3), (3,), (1, 2)]


def grads_of(step, shape, dtype, count=4):
    generator = torch.Generator().manual_seed(step)
    grads = torch.randn(count, *shape, generator=generator).to(dtype)
    for number in range(count):
        if number not in ACTIVE[step]:
            grads[number] = -0.0 if number % 2 else 0.0
    if step == 4:  # in one element, so that of most pieces the gradient is zero
        grads[3, :-1], grads[3, :, :-1] = 0, 0
    return grads


def optimizer_of(params, **options):
    """Return an optimizer of one Muon group."""
    scale, group, workspace_bytes = (options.pop(key, None) for key in ("scale", "group", "workspace_bytes"))
    own = {key: value for key, value in options.items() if key not in ("dtype", "shape", "fused")}
    optimizer = Muon8bit([{"params": params, **(group or {})}], **{"lr": 0.1, "block_size": 64, **own})
    if workspace_bytes is not None:
        optimizer.workspace_bytes = workspace_bytes  # the constructor refuses so little
    if scale is not None:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
    return optimizer


def matrices(optimizer, params):
    """Return copies of all tensors of each matrix, by its number: parameter, codes, scales."""
    found = []
    for param in params:
        tensors = [param.detach(), *(optimizer.state[param][key] for key in sorted(optimizer.state[param]))]
        stacked = [t if param.ndim == 3 else t[None] for t in tensors]
        found += [[t[number].clone() for t in stacked] for number in range(len(stacked[0]))]
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_idle_matrices_keep_every_bit_and_the_others_are_stepped_as_without_a_stack(name, monkeypatch):
    options = OPTIONS[name]
    if options.get("fused"):
        partition, tiny = muon.partition, NSMethod("gram", torch.float32, "vendor", (5,), tiny=True)

        def in_one_launch(*args, **how):
            found = partition(*args, **how)
            return found._replace(pieces=(found.pieces[0]._replace(method=tiny),))

        monkeypatch.setattr(muon, "partition", in_one_launch)
    shape, dtype, scale = options.get("shape", (50, 72)), options.get("dtype", torch.float32), options.get("scale", 1)
    start = torch.randn(4, *shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    stack, alone = [nn.Parameter(start.clone())], [nn.Parameter(matrix.clone()) for matrix in start]
    stacked, unstacked = optimizer_of(stack, **options), optimizer_of(alone, **options)
    activity, before = StackActivity(stacked), None
    for step, active in enumerate(ACTIVE):
        grads = grads_of(step, shape, dtype) * scale
        stack[0].grad = grads.clone()
        for number, param in enumerate(alone):  # a matrix by itself without gradient has None
            param.grad = grads[number].clone() if number in active else None
        stacked.step()
        unstacked.step()
        after = matrices(stacked, stack)
        for number, (ours, param) in enumerate(zip(after, alone, strict=True)):
            if number not in active and before is not None:
                assert all(map(torch.equal, ours, before[number]))
            if unstacked.state[param]:
                for found, expected in zip(ours, *matrices(unstacked, [param]), strict=True):
                    assert_bitwise(found, expected)
        last_steps = [max(s + 1 for s in range(-1, step + 1) if s < 0 or n in ACTIVE[s]) for n in range(4)]
        assert activity.local()["parameter 0 of group 0"].tolist() == last_steps
        before = after
    assert not torch.equal(before[0][0], start[0])


@pytest.mark.parametrize("name", ["bf16", "pieces of rows", "a batch cut"])
def test_random_bits_of_the_others_do_not_depend_on_it(name):
    """Nor does anything else: two runs that differ in the gradient of one matrix agree in the others to the bit."""
    options = {**OPTIONS[name], "dtype": torch.bfloat16, "param_rounding": "stochastic", "rounding_seed": 3}
    found = []
    for is_idle in (True, False):
        params = [nn.Parameter(torch.ones(4, 50, 72, dtype=torch.bfloat16))]
        optimizer = optimizer_of(params, **options)
        for step in (3, 3, 3):
            params[0].grad = grads_of(step, (50, 72), torch.bfloat16)
            params[0].grad[1] *= not is_idle
            optimizer.step()
        found.append(matrices(optimizer, params))
    idle, active = found
    assert [all(map(torch.equal, *pair)) for pair in zip(idle, active, strict=True)] == [True, False, True, True]
    assert torch.equal(idle[1][0], torch.ones(50, 72))


@pytest.mark.parametrize(
    ("value", "shape", "group", "moves"),
    [
        ("skip", (2, 12, 16), {}, False),
        ("skip", (1, 12, 16), {}, False),
        ("skip", (2, 1, 12, 16), {}, False),
        ("step", (2, 12, 16), {}, True),
        ("skip", (12, 16), {}, True),  # a matrix by itself is never idle
        ("skip", (12, 4, 4), {"flatten": True}, True),
    ],
)
def test_only_matrices_of_stacks_are_idle_and_only_where_asked(value, shape, group, moves):
    param = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    optimizer = Muon8bit([{"params": [param], "zero_slices": value, **group}])
    param.grad = torch.ones(shape)
    optimizer.step()
    before = param.detach().clone(), copy.deepcopy(optimizer.state[param])
    param.grad = torch.zeros(shape)
    optimizer.step()
    assert torch.equal(param, before[0]) != moves
    assert all(torch.equal(value, before[1][key]) for key, value in optimizer.state[param].items()) != moves


def test_the_default_is_to_skip_and_other_values_are_refused():
    params = [nn.Parameter(torch.ones(2, 8, 8))]
    assert Muon8bit(params).param_groups[0]["zero_slices"] == "skip"
    with pytest.raises(ValueError, match=r"zero_slices must be one of \('skip', 'step'\)"):
        Muon8bit(params, zero_slices="keep")
    with pytest.raises(ValueError, match="zero_slices has no meaning in a group of 'adamw'"):
        Muon8bit([{"params": params, "algorithm": "adamw", "lr": 0.1, "zero_slices": "skip"}])


def test_a_number_however_small_is_a_gradient_and_so_is_nan():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        grads = torch.zeros(2, 4, 6, 10, dtype=dtype).mT  # strided
        grads[0, 1, 3, 2] = torch.finfo(dtype).smallest_normal
        grads[0, 2, 9, 5], grads[1, 0, 0, 0], grads[1, 3, 1, 1] = torch.nan, -torch.inf, -1.0
        grads[1, 2] = -0.0
        expected = [[True, False, False, True], [False, True, True, False]]
        assert are_zero(grads).tolist() == are_zero(grads[..., 1:, :]).logical_and(are_zero(grads)).tolist() == expected
    assert are_zero(torch.zeros(3, 4, 5, device="meta")).device.type == "meta"  # cannot be waited for


@pytest.mark.parametrize("is_asynchronous", [True, False])
def test_a_non_finite_gradient_of_one_matrix_changes_nothing_where_others_are_idle(is_asynchronous, monkeypatch):
    """Also where the flag of the step meets those of the matrices on the device."""
    monkeypatch.setattr(nonfinite.GradientCheck, "is_asynchronous", is_asynchronous)
    flags = []
    original = reference.momentum_apply
    monkeypatch.setattr(
        reference, "momentum_apply", lambda *args, **how: flags.append(how["skip"]) or original(*args, **how)
    )
    params = [nn.Parameter(torch.ones(4, 50, 72))]
    optimizer = optimizer_of(params)
    for step in (3, 0):
        params[0].grad = grads_of(step, (50, 72), torch.float32)
        optimizer.step()
    assert flags[-1].tolist() == [0, 0, 1, 1]
    before = matrices(optimizer, params)
    for bad in (torch.nan, torch.inf):
        params[0].grad[1, 3, 4] = bad
        if is_asynchronous:
            optimizer.step()
        with pytest.raises(NonFiniteGradientError):
            optimizer.step()
        assert len(flags) == (2 if not is_asynchronous else 3 if bad != bad else 4)
        assert not is_asynchronous or flags[-1].tolist() == [1, 1, 1, 1]
        assert all(all(map(torch.equal, *pair)) for pair in zip(before, matrices(optimizer, params), strict=True))


def test_gradients_released_in_backward_and_accumulated_to_zero():
    """A sum that is zero to the bit is a zero gradient, whatever its terms."""
    params = [nn.Parameter(torch.ones(3, 20, 16))]
    optimizer = optimizer_of(params, on_nonfinite="skip")
    handle, activity = release_gradients(nn.ParameterList(params), optimizer), StackActivity(optimizer)
    (params[0] * grads_of(3, (20, 16), torch.float32, 3)).sum().backward()
    optimizer.step()
    before = matrices(optimizer, params)
    (params[0][::2] * grads_of(3, (20, 16), torch.float32, 3)[::2]).sum().backward()
    optimizer.step()
    handle.remove()
    after = matrices(optimizer, params)
    assert [all(map(torch.equal, *pair)) for pair in zip(before, after, strict=True)] == [False, True, False]
    for sign in (1, -1):
        (sign * params[0][0]).sum().backward()
    (params[0][1] * 2).sum().backward()
    optimizer.step()
    pairs = zip(after, matrices(optimizer, params), strict=True)
    assert [all(map(torch.equal, *pair)) for pair in pairs] == [True, False, True]
    assert activity.local()["parameter 0 of group 0"].tolist() == [2, 3, 2]


@pytest.mark.parametrize("is_asynchronous", [True, False])
def test_the_last_active_step_of_each_matrix_is_reported_and_resumed(is_asynchronous, monkeypatch):
    """Steps that changed nothing count, and are of no matrix."""
    monkeypatch.setattr(nonfinite.GradientCheck, "is_asynchronous", is_asynchronous)

    def made():
        stack, conv, other = (nn.Parameter(torch.ones(shape)) for shape in ((2, 2, 12, 16), (12, 2, 8), (2, 12, 8)))
        groups = [{"params": [("experts", stack)]}, {"params": [("conv", conv)], "flatten": True}]
        groups += [{"params": [("other", other)], "zero_slices": "step"}]
        optimizer = Muon8bit(groups, on_nonfinite="skip")
        return stack, optimizer

    def step(stack, optimizer, number, bad=False):
        stack.grad = grads_of(number, (12, 16), torch.float32).view(2, 2, 12, 16)
        for group in optimizer.param_groups[1:]:
            group["params"][0].grad = torch.ones_like(group["params"][0])
        if bad:
            stack.grad[0, 0, 3, 3] = torch.nan
        optimizer.step()

    stack, optimizer = made()
    assert state_report(optimizer).activity == ()
    assert "moved" not in str(state_report(optimizer))
    step(stack, optimizer, 0)  # before it looks
    activity = StackActivity(optimizer)
    for number in (1, 0, 4):
        step(stack, optimizer, number, bad=number == 0)
    assert activity.local()["experts"].tolist() == [[2, 0], [2, 4]]
    saved = copy.deepcopy(activity.state_dict())
    resumed, later = made()
    again = StackActivity(later)
    later.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again.load_state_dict(saved)
    step(resumed, later, 2)  # none
    report = state_report(later)
    assert report.to_dict()["step"] == 5
    assert report.to_dict()["activity"] == [{"name": "experts", "last_steps": [2, 0, 2, 4]}]
    assert "step 5 moved 0 of 4 matrices in experts; longest idle: number 1, not seen to move" in str(report)
    step(resumed, later, 3)
    assert again.last_steps()["experts"].tolist() == [[6, 6], [6, 6]]
    assert str(state_report(later)).endswith("step 6 moved 4 of 4 matrices in experts")
    wrapped = SimpleNamespace(optimizer=later, state=later.state, param_groups=later.param_groups)
    assert state_report(wrapped) == state_report(later)
    for name, wrong in (("experts", torch.zeros(4)), ("others", torch.zeros(2))):
        with pytest.raises(ValueError, match=f"the activity saved of {name} has matrices"):
            again.load_state_dict({"step": 9, "last_steps": {**saved["last_steps"], name: wrong}})
    assert again.step == 6
    with pytest.raises(TypeError, match="takes a Muon8bit, not a SGD"):
        StackActivity(torch.optim.SGD([stack]))


def test_a_group_saved_without_the_key_goes_on_with_step():
    params = [nn.Parameter(torch.ones(2, 12, 16))]
    optimizer = Muon8bit(params)
    params[0].grad = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    saved = optimizer.state_dict()
    for is_old in (False, True):
        if is_old:
            del saved["param_groups"][0]["zero_slices"]
        new = [nn.Parameter(torch.ones(2, 12, 16))]
        resumed = Muon8bit(new)
        resumed.load_state_dict(copy.deepcopy(saved))
        new[0].grad = torch.zeros(2, 12, 16)
        resumed.step()
        assert torch.equal(new[0], torch.ones(2, 12, 16)) != is_old
        assert resumed.state_dict()["param_groups"][0]["zero_slices"] == ("step" if is_old else "skip")


@pytest.mark.parametrize("execution", ["eager", "grouped_mm"])
def test_experts_of_transformers_without_tokens_have_zero_slices_and_stay(execution):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32}
    config = transformers.Qwen3MoeConfig(**sizes, num_experts=6, num_experts_per_tok=2, decoder_sparse_step=1)
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config)
    model.set_experts_implementation(execution)
    experts = {name: param for name, param in model.named_parameters() if param.ndim == 3}
    optimizer = Muon8bit([{"params": list(experts.items())}])
    for tokens in (torch.arange(32), torch.tensor([3, 3])):  # every expert has tokens, then at most 2
        before = {name: param.detach().clone() for name, param in experts.items()}
        model(tokens[None], labels=tokens[None]).loss.backward()
        optimizer.step()
        idle = {name: are_zero(param.grad) for name, param in experts.items()}
        optimizer.zero_grad()
    assert len(experts) == 2
    for name, param in experts.items():
        assert 0 < idle[name].sum() < 6
        assert idle[name].tolist() == [torch.equal(*pair) for pair in zip(param, before[name], strict=True)]
