"""Stacked matrices, flattened convolutions and fused weights against separate matrices and a float64 oracle."""

import copy
import io

import numpy as np
import pytest
import torch
from helpers import oracle

from muon8bit import Muon8bit, NonFiniteGradientError, param_groups
from muon8bit.config import DEFAULT_WORKSPACE_BYTES
from muon8bit.step import muon

FORMATS = [{}, {"codebook": "dynamic"}, {"bits": 32}]
OPTIONS = {"lr": 0.1, "weight_decay": 0.2, "block_size": 64, "adjust_lr_fn": "original"}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(tensors, grads, group, workspace_bytes=None, **options):
    """Parameters and their states after one step for each element of `grads` (a list of gradients)."""
    params = [torch.nn.Parameter(tensor.clone(memory_format=torch.preserve_format)) for tensor in tensors]
    optimizer = Muon8bit([{"params": params, **group}], **OPTIONS | options)
    optimizer.workspace_bytes = workspace_bytes or optimizer.workspace_bytes  # the constructor refuses so little
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone(memory_format=torch.preserve_format)
        optimizer.step()
    return [param.detach() for param in params], [optimizer.state[param] for param in params]


def assert_states_join(whole, parts, join):
    """Every tensor of `whole`, bitwise, is `join` of those of `parts`."""
    assert whole.keys() == parts[0].keys()
    for key, value in whole.items():
        assert torch.equal(value, join([part[key] for part in parts])), key


@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 16, 70), (3, 40, 12), (2, 3, 8, 24), (2, 130, 140)])
def test_stack_equals_separate_matrices(shape, dtype, options):
    """The same Newton-Schulz batches, so the parameters are bitwise equal too."""
    start, grads = random(*shape, dtype=dtype), [random(*shape, seed=s, dtype=dtype) for s in (1, 2, 3)]

    def matrices(tensor):
        return list(tensor.flatten(0, -3))

    (stack,), (state,) = run([start], [[g] for g in grads], {}, **options)
    alone, states = run(matrices(start), [matrices(g) for g in grads], {}, **options)
    assert torch.equal(stack.flatten(0, -3), torch.stack(alone))
    assert_states_join(state, states, lambda tensors: torch.stack(tensors).view(*shape[:-2], *tensors[0].shape))


@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize("rule", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("sizes", [(24, 24), (32, 8, 8)])
@pytest.mark.parametrize("experts", [(), (3,)])
def test_row_pieces_equal_separate_matrices(experts, sizes, rule, options):
    """Pieces of one matrix share no batch with those of the separate run: bitwise state, parameters within 1e-5."""
    shape = (*experts, sum(sizes), 100)
    start, grads = random(*shape), [random(*shape, seed=s) for s in (1, 2, 3)]
    options = options | {"adjust_lr_fn": rule}
    (fused,), (state,) = run([start], [[g] for g in grads], {"split_sizes": list(sizes)}, **options)
    pieces, states = run(start.split(sizes, -2), [g.split(sizes, -2) for g in grads], {}, **options)
    torch.testing.assert_close(fused, torch.cat(pieces, -2), rtol=0, atol=1e-5)
    assert_states_join(state, states, lambda tensors: torch.cat(tensors, -2))


@pytest.mark.parametrize("experts", [(), (3,)])
@pytest.mark.parametrize(("rows", "sizes"), [(16, (40, 40, 40)), (48, (100, 36)), (8, (64, 128)), (140, (130, 260))])
def test_column_pieces_match_float64(rows, sizes, experts):
    """Blocks of 64 straddle the borders of most; state is that of the unsplit parameter, bitwise.

    bits=32 and fp32 Newton-Schulz: 3 steps stayed within 9e-7 on 5 seeds of these matrices, asserted 1e-5.
    """
    shape = (*experts, rows, sum(sizes))
    start, grads = random(*shape), [random(*shape, seed=s) for s in (1, 2, 3)]
    group = {"split_sizes": sizes, "split_dim": -1, "ns_steps": 5}
    options = OPTIONS | {"bits": 32}
    param = torch.nn.Parameter(start.clone())
    optimizer = Muon8bit([{"params": [param], **group}], ns_dtype=torch.float32, **options)
    (_,), (unsplit,) = run([start], [[g] for g in grads], {}, bits=32)
    simulated = {}
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        for e, matrix in enumerate(grad.view(-1, *shape[-2:])):
            pieces = zip(start.view(-1, *shape[-2:])[e].split(sizes, -1), matrix.split(sizes, -1), strict=True)
            for p, (weight, piece) in enumerate(pieces):
                known = simulated.setdefault((e, p), oracle.Muon64(weight.numpy(), lr=0.1, decay=0.2))
                known.step(piece.double().numpy())
    for (e, p), exact in simulated.items():
        ours = param.detach().view(-1, *shape[-2:])[e].split(sizes, -1)[p]
        assert np.abs(ours.double().numpy() - exact.weight).max() < 1e-5
    assert_states_join(optimizer.state[param], [unsplit], lambda tensors: tensors[0])


@pytest.mark.parametrize("codebook", ["linear", "dynamic"])
def test_column_pieces_leave_the_codes_of_the_whole_row(codebook):
    """Codes and scales do not depend on the split, so neither does the checkpoint's format."""
    start, grads = random(16, 120), [[random(16, 120, seed=s)] for s in (1, 2, 3)]
    states = [
        run([start], grads, group, codebook=codebook)[1][0]
        for group in ({}, {"split_sizes": (40, 80), "split_dim": -1}, {"split_sizes": (4, 12)})
    ]
    for state in states[1:]:
        assert_states_join(state, states[:1], lambda tensors: tensors[0])


def test_column_pieces_equal_separate_matrices_where_blocks_end_at_the_border():
    start, grads = random(16, 192), [random(16, 192, seed=s) for s in (1, 2, 3)]
    group = {"split_sizes": (64, 128), "split_dim": -1}
    (fused,), (state,) = run([start], [[g] for g in grads], group)
    pieces, states = run(start.split((64, 128), -1), [g.split((64, 128), -1) for g in grads], {})
    torch.testing.assert_close(fused, torch.cat(pieces, -1), rtol=0, atol=1e-5)
    assert_states_join(state, states, lambda tensors: torch.cat(tensors, -1))


@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("split", [{}, {"split_sizes": (4, 8)}])
def test_flattened_convolution_equals_the_reshaped_matrix(split, layout, options):
    start, grads = random(12, 8, 3, 3), [random(12, 8, 3, 3, seed=s) for s in (1, 2, 3)]
    laid_out = [[g.to(memory_format=layout)] for g in grads]
    (conv,), (state,) = run([start.to(memory_format=layout)], laid_out, {"flatten": True, **split}, **options)
    (matrix,), (wanted,) = run([start.flatten(1)], [[g.flatten(1)] for g in grads], split, **options)
    assert conv.is_contiguous(memory_format=layout)
    assert torch.equal(conv.flatten(1), matrix)
    for key, value in state.items():
        assert torch.equal(value.flatten(1), wanted[key])
        assert value.shape == (wanted[key].shape if key == "momentum_scales" else start.shape)


def test_flatten_does_nothing_to_a_matrix():
    start, grads = random(12, 70), [[random(12, 70, seed=1)]]
    results = [run([start], grads, group)[0][0] for group in ({}, {"flatten": True})]
    assert torch.equal(*results)


def test_state_bytes_are_true_bytes():
    """1 byte an element and one fp32 scale a block of a row; a flattened kernel's row is all of its inputs."""
    for shape, group, expected in (
        ((5, 8, 100), {"split_sizes": (4, 4)}, 5 * 8 * (100 + 4 * 2)),
        ((5, 8, 100), {"split_sizes": (50, 50), "split_dim": -1}, 5 * 8 * (100 + 4 * 2)),
        ((6, 10, 3, 3), {"flatten": True}, 6 * (90 + 4 * 2)),
        ((6, 10, 3, 3), {}, 6 * 10 * 9 * 4),
    ):
        (_,), (state,) = run([random(*shape)], [[random(*shape)]], group)
        assert sum(t.untyped_storage().nbytes() for t in state.values()) == expected


def test_gradient_of_other_strides_gives_the_same_step():
    start, grad = random(3, 16, 24), random(3, 16, 24, seed=1)
    for group in ({}, {"split_sizes": (12, 12), "split_dim": -1}):
        results = [run([start], [[g]], group)[0][0] for g in (grad, grad.mT.contiguous().mT)]
        assert torch.equal(*results)


GROUPS = {
    "experts": ((3, 16, 40), {"split_sizes": (8, 8)}),
    "fused": ((16, 120), {"split_sizes": (40, 80), "split_dim": -1}),
    "conv": ((12, 8, 3, 3), {"flatten": True}),
}


def make(**options):
    params = {name: torch.nn.Parameter(random(*shape)) for name, (shape, _) in GROUPS.items()}
    groups = [{"params": [(name, params[name])], **group} for name, (_, group) in GROUPS.items()]
    return params, Muon8bit(groups, **OPTIONS | options)


def train(params, optimizer, seed):
    for step in range(3):
        for index, param in enumerate(params.values()):
            param.grad = random(*param.shape, seed=100 * seed + 10 * step + index)
        optimizer.step()


@pytest.mark.parametrize("options", FORMATS)
def test_continues_bitwise_through_a_file(options):
    params, optimizer = make(**options)
    train(params, optimizer, 1)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed_params, resumed = make(**options)
    with torch.no_grad():
        for name, param in resumed_params.items():
            param.copy_(params[name])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for pair in ((params, optimizer), (resumed_params, resumed)):
        train(*pair, 2)
    for name, param in params.items():
        assert torch.equal(param, resumed_params[name])
        for key, value in optimizer.state[param].items():
            assert torch.equal(value, resumed.state[resumed_params[name]][key])


@pytest.mark.parametrize(
    ("index", "key", "value"), [(0, "split_sizes", (4, 12)), (1, "split_dim", -2), (2, "flatten", False)]
)
def test_a_checkpoint_of_other_splits_is_refused(index, key, value):
    params, optimizer = make()
    train(params, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][index][key] = value
    with pytest.raises(ValueError, match=rf"group {index}: saved with {key}="):
        make()[1].load_state_dict(saved)


def test_a_checkpoint_of_before_these_keys_or_with_lists_loads():
    """Whole 2-D matrices then, as now without the keys; JSON and distributed checkpointing turn tuples to lists."""
    params, optimizer = make()
    train(params, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["split_sizes"] = [8, 8]
    other = make()[1]
    other.load_state_dict(saved)
    assert other.param_groups[0]["split_sizes"] == (8, 8)
    plain = Muon8bit([torch.nn.Parameter(random(16, 40))])
    old = copy.deepcopy(plain.state_dict())
    for key in ("split_sizes", "split_dim", "flatten"):
        del old["param_groups"][0][key]
    plain.load_state_dict(old)
    assert plain.param_groups[0]["split_sizes"] is None


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("warm", [True, False])
def test_nonfinite_in_one_matrix_changes_nothing(name, warm):
    params, optimizer = make()
    train(params, optimizer, 1)
    if not warm:
        optimizer.state.clear()
    params[name].grad.view(-1)[-1] = float("nan")
    before = copy.deepcopy((optimizer.state_dict()["state"], list(params.values())))
    with pytest.raises(NonFiniteGradientError, match=f"gradient of {name}"):
        optimizer.step()
    after = optimizer.state_dict()["state"]
    assert before[0].keys() == after.keys()
    for index, tensors in before[0].items():
        for key, value in tensors.items():
            assert torch.equal(value, after[index][key])
    for old, new in zip(before[1], params.values(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("shape", [(0, 16, 24), (3, 0, 24), (3, 16, 0)])
def test_empty_stacks_step(shape):
    (_,), (state,) = run([torch.zeros(shape)], [[torch.zeros(shape)]], {})
    assert state


def param(*shape):
    return [("w", torch.nn.Parameter(torch.ones(shape)))]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"params": param(16, 24), "split_sizes": (8, 9)}, r"w of shape \(16, 24\).*sum to 17.*dimension -2.*16"),
        ({"params": param(3, 16, 24), "split_sizes": (8, 8), "split_dim": -1}, r"sum to 16.*dimension -1.*24"),
        ({"params": param(8, 3, 3, 3), "flatten": True, "split_sizes": (1, 2)}, r"\(8, 27\).*sum to 3.*-2.*8"),
        ({"params": param(16, 24), "split_sizes": (8, 8), "split_dim": 0}, r"group 1: split_dim.*\(-2, -1\)"),
        ({"params": param(16, 24), "split_sizes": (16, 0)}, "group 1: split_sizes.*positive int"),
        ({"params": param(16, 24), "split_sizes": ()}, "group 1: split_sizes.*positive int"),
        ({"params": param(16, 24), "split_sizes": 8}, "group 1: split_sizes.*positive int"),
        ({"params": param(16, 24), "flatten": 1}, "group 1: flatten"),
        ({"params": param(8, 3, 3), "flatten": True, "split_sizes": (3, 6), "split_dim": -1}, "split_dim.*flatten"),
        ({"params": param(8), "flatten": True}, "w has 1 dim.*param_groups"),
        ({"params": param(8, 8), "algorithm": "adamw", "lr": 1.0, "flatten": True}, "flatten has no meaning"),
    ],
)
def test_bad_groups_are_refused_by_name(group, message):
    optimizer = Muon8bit(param(16, 24))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("split", [{}, {"split_sizes": (8, 8)}, {"split_sizes": (12, 12), "split_dim": -1}])
def test_a_stack_is_chunked_to_the_byte_budget(split, monkeypatch):
    """A tenth of the workspace that 40 experts together would take: several batches, the same result."""
    shape, batches = (40, 16, 24), []
    original = muon.orthogonalize

    def spy(X, *args):
        batches.append(X.nbytes)
        return original(X, *args)

    monkeypatch.setattr(muon, "orthogonalize", spy)
    (whole,), _ = run([random(*shape)], [[random(*shape, seed=1)]], split)
    num_whole, budget = len(batches), 4 * 40 * 16 * 24 // 10
    assert num_whole == (2 if "split_dim" in split else 1)  # pieces of columns one after the other
    assert max(batches) < DEFAULT_WORKSPACE_BYTES
    batches.clear()
    (chunked,), _ = run([random(*shape)], [[random(*shape, seed=1)]], split, workspace_bytes=budget)
    assert len(batches) >= 10
    assert max(batches) <= budget
    torch.testing.assert_close(whole, chunked, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize("split_heads", ["head", "head_kv"])
def test_a_step_by_head_equals_separate_heads_bitwise(split_heads, options):
    """Three steps of the whole model beside one whose every head is a parameter; blocks of 64 end inside a row."""
    sizes = {"q_b_proj": (6,) * 4, "kv_b_proj": (10,) * 4 if split_heads == "head" else (4, 6) * 4}
    model = torch.nn.Module()
    model.attention = torch.nn.Module()
    model.attention.q_b_proj = torch.nn.Linear(72, 24, bias=False)
    model.attention.kv_b_proj = torch.nn.Linear(100, 40, bias=False)
    names = {"num_heads": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 6}
    for name, size in names.items():
        setattr(model.attention, name, size)
    shapes = {"q_b_proj": (24, 72), "kv_b_proj": (40, 100)}
    start = {name: random(*shape) for name, shape in shapes.items()}
    grads = [{name: random(*shape, seed=step) for name, shape in shapes.items()} for step in (1, 2, 3)]
    params = {name: getattr(model.attention, name).weight for name in shapes}
    for name, param in params.items():
        param.data.copy_(start[name])
    settings = {"block_size": 64, "backend": "reference", **options}
    by_head = Muon8bit(param_groups(model, lr=0.1, weight_decay=0.2, split_heads=split_heads), **settings)
    parts = {name: [torch.nn.Parameter(t.clone()) for t in start[name].split(sizes[name])] for name in shapes}
    groups = [{"params": parts[name]} for name in shapes]
    alone = Muon8bit(groups, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw", **settings)
    for step in grads:
        for name, param in params.items():
            param.grad = step[name].clone()
            for part, grad in zip(parts[name], step[name].split(sizes[name]), strict=True):
                part.grad = grad.clone()
        by_head.step()
        alone.step()
    for name, param in params.items():
        assert torch.equal(param, torch.cat(parts[name]))
        assert_states_join(by_head.state[param], [alone.state[part] for part in parts[name]], torch.cat)
        whole = run([start[name]], [[step[name]] for step in grads], {}, **options)[1][0]
        assert_states_join(by_head.state[param], [whole], lambda tensors: tensors[0])  # no split shows in the state
