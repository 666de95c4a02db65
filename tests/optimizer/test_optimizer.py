"""Muon8bit as an optimizer: its signature, groups, errors and the non-finite policy."""

import copy
import inspect
import math
import pickle
from contextlib import nullcontext
from fractions import Fraction

import numpy as np
import pytest
import torch

from muon8bit import Muon8bit, NonFiniteGradientError, convert_state_dict, state_report
from muon8bit.orthogonalize import NAMES


def param_with_grad(rows=16, cols=24, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    param = torch.nn.Parameter(torch.randn(rows, cols, generator=generator).to(dtype))
    param.grad = torch.randn(rows, cols, generator=generator).to(dtype)
    return param


def test_signature_starts_with_torchs():
    ours = list(inspect.signature(Muon8bit.__init__).parameters.values())
    theirs = list(inspect.signature(torch.optim.Muon.__init__).parameters.values())
    for our, their in zip(ours, theirs, strict=False):
        assert (our.name, our.default, our.kind) == (their.name, their.default, their.kind)
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])


TWICE = torch.nn.Parameter(torch.ones(4, 4))


def test_one_optimizer_steps_muon_and_adamw_parts_like_their_own():
    """A mixed optimizer equals two separate ones, bitwise."""

    def model(seed):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.ReLU(), torch.nn.Linear(20, 12))

    mixed_model, split_model = model(0), model(0)

    def parts(m):
        return [p for p in m.parameters() if p.ndim == 2], [p for p in m.parameters() if p.ndim == 1]

    hidden, rest = parts(mixed_model)
    mixed = Muon8bit(
        [{"params": hidden}, {"params": rest, "algorithm": "adamw", "lr": 1e-2, "betas": (0.9, 0.999)}], lr=0.01
    )
    hidden, rest = parts(split_model)
    split = Muon8bit(hidden, lr=0.01), torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(5):
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(step))
        for m, optimizers in ((mixed_model, (mixed,)), (split_model, split)):
            m.zero_grad()
            m(x).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    for left, right in zip(mixed_model.parameters(), split_model.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["muon", "second", "adamw", "narrow"])
@pytest.mark.parametrize("options", [{}, {"codebook": "dynamic"}, {"bits": 32}])
@pytest.mark.parametrize("warm", [True, False])
def test_nonfinite_gradient_changes_nothing(options, where, bad, warm):
    params = {
        "muon": param_with_grad(),
        "second": param_with_grad(16, 70, torch.bfloat16),
        "narrow": param_with_grad(9, 3),
        "adamw": param_with_grad(5, 7),
    }
    groups = [
        {"params": [(n, params[n]) for n in ("muon", "second", "narrow")], "block_size": 64},
        {"params": [("adamw", params["adamw"])], "algorithm": "adamw", "lr": 1e-3},
    ]
    for policy in ("raise", "skip"):
        optimizer = Muon8bit(copy.deepcopy(groups), on_nonfinite=policy, **options)
        own = dict(zip(["muon", "second", "narrow", "adamw"], _params(optimizer), strict=True))
        for name, param in own.items():
            param.grad = params[name].grad.clone()
        if warm:
            optimizer.step()
        own[where].grad[-1, -1] = bad
        before = copy.deepcopy((optimizer.state_dict(), list(own.values())))
        if policy == "raise":
            with pytest.raises(NonFiniteGradientError, match=f"gradient of {where}") as caught:
                optimizer.step()
            assert caught.value.names == (where,)
            assert pickle.loads(pickle.dumps(caught.value)).names == (where,)
        else:
            assert optimizer.step(lambda: 3.0) == 3.0
            optimizer.step()
            assert optimizer.num_skipped_steps == 2
        after = optimizer.state_dict()
        assert before[0]["state"].keys() == after["state"].keys()
        for index, tensors in before[0]["state"].items():
            for key, value in tensors.items():
                assert torch.equal(value, after["state"][index][key])
        for old, new in zip(before[1], own.values(), strict=True):
            assert torch.equal(old, new)


def _params(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_gradient_whose_norm_overflows_is_refused_and_a_large_one_is_not():
    """An overflowing momentum would stay in the state: no later step could be finite."""
    param = param_with_grad()
    before = param.detach().clone()
    optimizer = Muon8bit([param])
    param.grad = torch.full_like(param, 1e20)
    with pytest.raises(NonFiniteGradientError, match="overflow"):
        optimizer.step()
    assert torch.equal(param, before)
    param.grad = torch.full_like(param, 1e17)
    optimizer.step()
    assert param.isfinite().all()
    assert not torch.equal(param, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0"),
        ({"lr": torch.ones(2)}, "1-element"),
        ({"lr": float("inf")}, "lr must be >= 0"),
        ({"lr": None}, "lr must be >= 0"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": None}, "momentum"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"eps": 0.0}, "eps"),
        ({"adjust_lr_fn": "none"}, "adjust_lr_fn.*match_rms_adamw"),
        ({"bits": 4}, "bits.*8, 32"),
        ({"codebook": "log"}, "codebook.*linear.*dynamic"),
        ({"block_size": 100}, "block_size.*2048"),
        ({"block_size": 2048.0}, "block_size.*2048"),
        ({"ns_steps": 5.0}, "ns_steps.*integer"),
        ({"ns_coefficients": 7}, "ns_coefficients"),
        ({"backend": "cuda"}, "backend.*triton"),
        ({"on_nonfinite": "warn"}, "on_nonfinite.*skip"),
        ({"ns_dtype": torch.float64}, "ns_dtype"),
        ({"ns_dtype": torch.float16, "ns_coefficients": (90.0, -4.7, 2.0)}, "ns_dtype.*cannot hold.*bfloat16"),
        ({"ns_coefficients": "polar"}, "polar_express"),
        ({"ns_steps": 3, "ns_coefficients": "polar_express"}, "ns_steps=5"),
        ({"ns_coefficients": (0.9, 0.95, 0.9)}, "parameter group 0: ns_coefficients let .*grow beyond float32"),
        ({"lr": 10**400}, r"lr must be .*not 1000.*\.\.\."),
        ({"weight_decay": Fraction(1, 10)}, "weight_decay must be .*Fraction"),
        ({"clip_matrix_norm": 2**64}, "clip_matrix_norm must be .*beyond 64 bits: give a float"),
        ({"shard_state": 1}, "shard_state must be True or False"),
        *[({key: np.ones(2)}, key) for key in ("backend", "on_nonfinite", "ns_dtype", "param_rounding", "bits")],
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Muon8bit([param_with_grad()], **arguments)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"params": [("norm.weight", torch.nn.Parameter(torch.ones(4)))]}, "norm.weight has 1 dim.*param_groups"),
        ({"params": [torch.nn.Parameter(torch.ones(4))]}, r"parameter 0 of group 1, shape \(4,\)"),
        ({"params": [("scalar", torch.nn.Parameter(torch.ones(())))]}, "scalar has 0 dim"),
        ({"params": [("x", torch.nn.Parameter(torch.ones(4, 4).double()))]}, "x is torch.float64"),
        ({"params": [torch.nn.Parameter(torch.ones(4))], "algorithm": "adamw"}, "own 'lr'"),
        ({"params": [torch.nn.Parameter(torch.ones(4))], "algorithm": "sgd"}, "sgd.*muon, adamw"),
        ({"params": [param_with_grad()], "betas": (0.9, 0.9)}, "betas has no meaning"),
        ({"params": [param_with_grad()], "algorithm": "adamw", "lr": 1.0, "bits": 8}, "bits has no meaning"),
        ({"params": [param_with_grad()], "algorithm": "adamw", "lr": 1.0, "betas": (0.9, 1.0)}, "group 1: betas"),
        ({"params": [param_with_grad()], "block_size": 7}, "group 1: block_size"),
        ({"params": [param_with_grad()], "algorithm": "adamw", "lr": 1.0, "beta": (0.9, 0.9)}, "did you mean 'betas'"),
        ({"params": [param_with_grad()], "backend": "triton"}, "backend has no meaning"),
        ({"params": [param_with_grad()], "state_device": "cpu"}, "state_device has no meaning"),
        ({"params": [param_with_grad()], "shard_state": True}, "shard_state has no meaning"),
        ({"params": [param_with_grad()], "algorithm": "adamw", "lr": 1.0, "amsgrad": True}, "amsgrad has no meaning"),
        ({"params": [TWICE, TWICE]}, "parameter 1 of group 1.*twice"),
        ({"params": [torch.nn.Parameter(torch.zeros(1, 16).expand(8, 16))]}, "expanded"),
    ],
)
def test_bad_groups_are_refused_and_leave_the_optimizer_as_it_was(group, message):
    names = "param" if isinstance(group["params"][0], tuple) else None
    first = [(names, param_with_grad())] if names else [param_with_grad()]
    optimizer = Muon8bit(first)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    optimizer.step()


def test_keys_of_the_other_algorithm_stand_at_none_and_the_users_dict_is_untouched():
    mine = {"params": [torch.nn.Parameter(torch.ones(3))], "algorithm": "adamw", "lr": 0.1, "tag": "norms"}
    optimizer = Muon8bit([{"params": [param_with_grad()], "bits": 32}, mine])
    muon, adamw = optimizer.param_groups
    assert muon["bits"] == 32
    flags = {"maximize", "cautious_weight_decay", "foreach", "fused", "capturable", "differentiable"}
    own = {"params", "algorithm", "lr", "weight_decay", "betas", "eps", "adamw_bits", "tag", *flags}
    assert {key for key in adamw if key not in own} == set(muon) - own
    assert all(adamw[key] is None for key in set(adamw) - own)
    assert set(mine) == {"params", "algorithm", "lr", "tag"}


def test_added_groups_step():
    optimizer = Muon8bit([param_with_grad()])
    late = param_with_grad(seed=1)
    before = late.detach().clone()
    optimizer.add_param_group({"params": late, "lr": 0.1})
    optimizer.step()
    assert not torch.equal(before, late)


def test_parameters_without_a_gradient_are_left_alone_and_get_no_state():
    params = [param_with_grad(), param_with_grad()]
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer = Muon8bit(params)
    optimizer.step()
    assert torch.equal(params[1], before)
    assert list(optimizer.state) == [params[0]]


@pytest.mark.parametrize("shape", [(0, 16), (16, 0)])
def test_empty_parameters_step(shape):
    param = torch.nn.Parameter(torch.zeros(shape))
    param.grad = torch.zeros(shape)
    optimizer = Muon8bit([param, param_with_grad()])
    optimizer.step()
    assert param in optimizer.state


def test_gradient_strides_do_not_matter():
    results = []
    for layout in (lambda g: g, lambda g: g.T.contiguous().T, lambda g: g.repeat(1, 2)[:, : g.shape[1]]):
        param = param_with_grad()
        param.grad = layout(param.grad)
        Muon8bit([param], block_size=64).step()
        results.append(param.detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_tensor_lr_and_scheduler_and_closure():
    fixed, scheduled = param_with_grad(), param_with_grad()
    grad = fixed.grad.clone()
    plain, tensor_lr = Muon8bit([fixed], lr=0.1), Muon8bit([scheduled], lr=torch.tensor(0.1))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (plain, tensor_lr)]
    for optimizer, param, scheduler in zip((plain, tensor_lr), (fixed, scheduled), schedulers, strict=True):
        for _ in range(3):

            def closure(param=param):
                assert torch.is_grad_enabled()
                param.grad = grad.clone()
                return 2.5

            assert optimizer.step(closure) == 2.5
            scheduler.step()
    assert plain.param_groups[0]["lr"] == pytest.approx(0.0125)
    torch.testing.assert_close(fixed, scheduled, rtol=1e-6, atol=1e-6)


def test_batches_of_one_shape_equal_single_steps():
    """Batched products may round differently; fp32 keeps them within 1e-5."""
    together = [param_with_grad(seed=i) for i in range(5)]
    alone = [param_with_grad(seed=i) for i in range(5)]
    Muon8bit(together, lr=1.0).step()
    for param in alone:
        Muon8bit([param], lr=1.0).step()
    for left, right in zip(together, alone, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(48, 12), (12, 48)])
def test_batches_scale_like_single_steps_on_tall_and_wide_shapes(shape):
    together = [param_with_grad(*shape, seed=i) for i in range(3)]
    alone = [param_with_grad(*shape, seed=i) for i in range(3)]
    Muon8bit(together, lr=1.0).step()
    for left, right in zip(together, alone, strict=True):
        Muon8bit([right], lr=1.0).step()
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"bits": 32}, {"codebook": "dynamic"}, {"ns_coefficients": "polar_express"}])
@pytest.mark.parametrize("size", [1e-17, 1e-21, 1e-23, 1e-26, 1e-38])
@pytest.mark.parametrize("split", [None, (8, 24)])
def test_a_tiny_eps_does_not_blow_up_gradients_whose_squares_vanish(size, options, split):
    """Their norm is then at most that of a whole update, sqrt(rows) and the schedule's own excess."""
    grad = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)) * size
    param = torch.nn.Parameter(torch.zeros(16, 32))
    group = {"params": [param], "split_sizes": split, "split_dim": -1}
    optimizer = Muon8bit([group], lr=1.0, weight_decay=0.0, eps=1e-40, **options)
    for _ in range(3):
        param.data.zero_()
        param.grad = grad.clone()
        optimizer.step()
        assert param.norm() <= 1.3 * math.sqrt(16 * (1 if split is None else 2))
    if size >= 1e-17:  # these squares are fp32 numbers: the direction is a whole one
        assert param.norm() > 0.6 * math.sqrt(16)


def test_eps_bounds_the_norm_from_below():
    """A gradient far under eps gives a direction that is small in proportion, not a unit one."""
    directions = []
    for eps in (1e-7, 1e3):
        param = param_with_grad()
        before = param.detach().clone()
        Muon8bit([param], lr=1.0, weight_decay=0.0, eps=eps).step()
        directions.append((param - before).norm().item())
    assert directions[1] < 0.3 * directions[0]


@pytest.mark.parametrize("name", NAMES)
def test_rank_deficient_gradients_stay_finite_under_every_schedule(name):
    """4 tokens give a gradient of rank 4: the Gram form would amplify rounding in a long schedule."""
    steps = {"deepseek_v4": 10}.get(name, 5)
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(64, 512))
    param.grad = torch.randn(64, 4) @ torch.randn(4, 512)
    Muon8bit([param], lr=1.0, ns_coefficients=name, ns_steps=steps).step()
    values = torch.linalg.svdvals(param)
    assert 0.6 < values[3] <= values[0] < 1.3
    assert values[4] < 0.1


def test_default_dtype_and_autocast_do_not_reach_the_state_or_the_update():
    results = []
    for default, autocast in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        params = [param_with_grad(24, 40), param_with_grad(5, 7), param_with_grad(24, 40, seed=2)]
        groups = [{"params": [params[0]]}, {"params": [params[1]], "algorithm": "adamw", "lr": 0.1}]
        groups += [{"params": [params[2]], "split_sizes": (16, 24), "split_dim": -1, "clip_matrix_norm": 1.0}]
        optimizer = Muon8bit(groups)
        torch.set_default_dtype(default)
        try:
            with torch.autocast("cpu", enabled=autocast):
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append(params)
        assert {t.dtype for t in optimizer.state[params[1]].values()} == {torch.float32}
    for params in results[1:]:
        for left, right in zip(results[0], params, strict=True):
            assert torch.equal(left, right)


def test_adamw_gradient_whose_square_overflows_is_refused():
    param = param_with_grad(5, 7)
    optimizer = Muon8bit([{"params": [("head", param)], "algorithm": "adamw", "lr": 0.1}])
    param.grad[0, 0] = 1e25
    with pytest.raises(NonFiniteGradientError, match="head"):
        optimizer.step()


def no_dense_params():
    ones = torch.ones(8, 16)
    yield "sparse", ones.to_sparse()
    yield "sparse_csr", ones.to_sparse_csr()
    yield "nested", torch.nested.nested_tensor([ones, ones[:4]])
    yield "nested", torch.nested.nested_tensor([ones, ones[:4]], layout=torch.jagged)
    yield "expanded", torch.ones(1, 16).expand(8, 16)
    yield "expanded", torch.ones(100).as_strided((8, 16), (1, 1))
    yield "expanded", torch.ones(100).as_strided((8, 16), (4, 1))


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
@pytest.mark.parametrize("place", range(7))
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
def test_what_is_no_dense_parameter_is_called_what_it_is(place, algorithm):
    kind, tensor = list(no_dense_params())[place]
    with pytest.raises(ValueError, match=f"w is an? {kind} tensor"):
        Muon8bit([{"params": [("w", torch.nn.Parameter(tensor))], "algorithm": algorithm, "lr": 0.1}])


def no_written_params():
    yield torch._neg_view(torch.ones(8, 16)), "negated view"
    yield torch._efficientzerotensor((8, 16)), "zero without memory"
    yield torch.nn.UninitializedParameter(), "no shape yet.*lazy module"
    yield torch.nested.nested_tensor([torch.ones(8, 16), torch.ones(4, 16)]), "nested"


@pytest.mark.parametrize("place", range(4))
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_a_parameter_that_cannot_be_written_is_refused_with_and_without_its_name(place):
    tensor, words = list(no_written_params())[place]
    param = tensor if isinstance(tensor, torch.nn.Parameter) else torch.nn.Parameter(tensor)
    for params, name in (([("w", param)], "w"), ([param], "parameter 0 of group 0")):
        with pytest.raises(ValueError, match=f"^{name}.*{words}"):
            Muon8bit(params)


@pytest.mark.parametrize("options", [{}, {"clip_matrix_norm": 0.1}, {"algorithm": "adamw"}, {"adamw_bits": 8}])
def test_gradients_that_are_negated_or_zero_without_memory_are_their_values(options):
    options = {"algorithm": "adamw", **options} if "adamw_bits" in options else options
    values = torch.randn(64, 72)
    for grad, value in ((torch._neg_view(values), -values), (torch._efficientzerotensor((64, 72)), 0 * values)):
        found = []
        for given in (grad, value.clone()):
            param = torch.nn.Parameter(torch.ones(64, 72))
            param.grad = given
            optimizer = Muon8bit([{"params": [("w", param)], "lr": 0.1, **options}])
            optimizer.step()
            found.append([param.detach(), *optimizer.state[param].values()])
        assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


def test_inference_mode_leaves_no_state_that_later_steps_cannot_change():
    runs = []
    for mode in (torch.inference_mode, nullcontext):
        params, optimizer = mixed_optimizer()
        with mode():
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        runs.append(params)
    assert all(torch.equal(left, right) for left, right in zip(*runs, strict=True))


def test_what_was_made_in_inference_mode_is_refused_by_name_where_it_would_be_written():
    with torch.inference_mode():
        frozen, grad = torch.nn.Parameter(torch.ones(8, 16)), torch.ones(8, 16)
    param = torch.nn.Parameter(torch.ones(8, 16))
    for of, options in ((frozen, {}), (param, {"clip_matrix_norm": 0.1})):
        of.grad = grad
        optimizer = Muon8bit([("w", of)], **options)
        with pytest.raises(ValueError, match=r"w .*made in torch\.inference_mode\(\)"):
            optimizer.step()
        assert torch.equal(of, torch.ones(8, 16))
        assert not optimizer.state
    Muon8bit([("w", param)]).step()
    assert not torch.equal(param, torch.ones(8, 16))


def test_elements_that_only_lie_apart_or_are_none_are_taken():
    for tensor in (
        torch.ones(8, 32)[:, :16],
        torch.ones(8, 32)[:, ::2],
        torch.ones(16, 8).t(),
        torch.ones(8, 3, 2, 2).to(memory_format=torch.channels_last),
        torch.ones(1).expand(2, 0, 1),
    ):
        param = torch.nn.Parameter(tensor)
        param.grad = torch.ones_like(param)
        Muon8bit([("w", param)], weight_decay=0.0).step()
        assert (param != 1).all()


def test_a_gradient_whose_elements_share_memory_is_not_clipped_in_place():
    for grad in (torch.ones(1, 16).expand(8, 16), torch.ones(100).as_strided((8, 16), (1, 1))):
        param = torch.nn.Parameter(torch.ones(8, 16))
        param.grad = grad
        Muon8bit([("w", param)]).step()
        assert param.isfinite().all()
        before, old = param.detach().clone(), grad.clone()
        with pytest.raises(ValueError, match=r"w has a gradient whose elements share memory.*clone"):
            Muon8bit([("w", param)], clip_matrix_norm=1e-3).step()
        assert torch.equal(param, before)
        assert torch.equal(param.grad, old)


def test_sparse_gradient_is_refused_by_name():
    param = param_with_grad()
    param.grad = param.grad.to_sparse()
    with pytest.raises(ValueError, match="embed has a sparse gradient"):
        Muon8bit([("embed", param)]).step()


def test_state_bytes_are_true_bytes():
    """1 byte an element and one fp32 scale a block, no padded or viewed storage."""
    for (rows, cols), block, expected in (
        ((8, 4096), 2048, 8 * (4096 + 4 * 2)),
        ((8, 100), 64, 8 * (100 + 4 * 2)),
        ((8, 7), 64, 8 * 7 * 4),
    ):
        param = param_with_grad(rows, cols)
        optimizer = Muon8bit([param], block_size=block)
        optimizer.step()
        assert sum(t.untyped_storage().nbytes() for t in optimizer.state[param].values()) == expected


def test_unavailable_backend_raises_and_says_the_way_out(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        Muon8bit([param_with_grad()], backend="triton").step()


def mixed_optimizer(seed=0, **options):
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 12), (8, 12), (2, 9, 20), (5,))]
    params += [torch.nn.Parameter(torch.randn(8, 12).bfloat16())]
    groups = [
        {"params": params[:3]},
        {"params": params[4:], "split_sizes": (4, 8), "split_dim": -1, "codebook": "dynamic"},
        {"params": params[3:4], "algorithm": "adamw", "lr": 0.01},
    ]
    for param in params:
        param.grad = torch.randn(param.shape).to(param.dtype)
    return params, Muon8bit(groups, param_rounding="stochastic", **options)


def test_a_compiled_training_step_equals_the_eager_one():
    """Bitwise: the step runs eagerly in it."""
    params, optimizer = mixed_optimizer()
    twins, twin = mixed_optimizer()
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        step()
        twin.step()
    torch.compile(lambda: optimizer.step(), backend="eager")()
    twin.step()
    for left, right in zip(params, twins, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("options", [{}, {"codebook": "dynamic"}, {"bits": 32}])
def test_the_default_device_does_not_matter(options):
    """torch.set_default_device is where tensors without a device are made; none of a step or a checkpoint is one."""
    runs = []
    for device in ("cpu", "meta"):
        params, optimizer = mixed_optimizer(**options)
        with torch.device(device):
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
            with pytest.warns(UserWarning, match="converted from") if options.get("bits") != 32 else nullcontext():
                converted = convert_state_dict(optimizer.state_dict(), bits=32)
            report = str(state_report(optimizer))
        runs.append(([*params, *(value for state in converted["state"].values() for value in state.values())], report))
    (tensors, report), (twins, twin_report) = runs
    assert report == twin_report
    for left, right in zip(tensors, twins, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("shape", [(8, 24), (24, 24), (24, 16), (2, 8, 24)])
@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_a_parameter_of_a_new_shape_is_refused_by_name(shape, algorithm):
    """Its momentum is of the old one; a smaller parameter must not pass for a piece of it."""
    param = param_with_grad()
    optimizer = Muon8bit([{"params": [("layer.weight", param)], "algorithm": algorithm, "lr": 0.1}])
    optimizer.step()
    before = {key: tensor.clone() for key, tensor in optimizer.state[param].items()}
    param.grad = None
    param.data = torch.ones(shape)
    param.grad = torch.ones(shape)
    with pytest.raises(ValueError, match=r"layer.weight .*has one of .*\(16, 24\)"):
        optimizer.step()
    assert torch.equal(param, torch.ones(shape))
    assert all(torch.equal(tensor, before[key]) for key, tensor in optimizer.state[param].items())


@pytest.mark.parametrize(
    ("algorithm", "key", "value"),
    [("muon", "bits", 32), ("muon", "codebook", "dynamic"), ("muon", "block_size", 64), ("adamw", "adamw_bits", 8)],
)
def test_a_format_changed_by_hand_is_refused_by_name(algorithm, key, value):
    """The state would not be what the checkpoint says of it, nor load; and scales of other blocks would be read."""
    param = torch.nn.Parameter(torch.ones(32, 256))
    param.grad = torch.ones(32, 256)
    optimizer = Muon8bit([{"params": [("layer.weight", param)], "algorithm": algorithm, "lr": 0.1}])
    optimizer.step()
    saved, before = optimizer.param_groups[0][key], param.detach().clone()
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=r"layer.weight .*asks for a state of .*and has one of"):
        optimizer.step()
    assert torch.equal(param, before)
    optimizer.param_groups[0][key] = saved
    optimizer.step()
    optimizer.param_groups[0][key] = value
    del optimizer.state[param]
    optimizer.step()


@pytest.mark.parametrize(
    "group", [{"algorithm": "muon"}, {"algorithm": "adamw"}, {"algorithm": "adamw", "adamw_bits": 8}]
)
def test_a_state_that_a_parameter_has_left_behind_is_refused_by_name(group):
    """Of a model moved after its first steps; a kernel would read addresses of another device."""
    param = torch.nn.Parameter(torch.ones(32, 256))
    param.grad = torch.ones(32, 256)
    optimizer = Muon8bit([{"params": [("layer.weight", param)], "lr": 0.1, **group}])
    optimizer.step()
    kept, before = optimizer.state[param], param.detach().clone()
    optimizer.state[param] = {key: tensor.to("meta") for key, tensor in kept.items()}
    with pytest.raises(ValueError, match=r"layer.weight .* on cpu now, its state on meta: .*load_state_dict"):
        optimizer.step()
    assert torch.equal(param, before)
    optimizer.state[param] = kept
    optimizer.step()


@pytest.mark.parametrize("sizes", [None, (8, 16)])
def test_zero_gradients_move_nothing_however_small_eps_is(sizes):
    """fp32 cannot hold this eps, which would be a division by zero."""
    param = param_with_grad()
    before = param.detach().clone()
    param.grad.zero_()
    Muon8bit([{"params": [param], "split_sizes": sizes, "split_dim": -1}], weight_decay=0.0, eps=1e-60).step()
    assert torch.equal(param, before)
