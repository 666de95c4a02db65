"""State on the host against state with its parameters: the same bits, at most two batches on the device."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers.allocator import peak_bytes
from helpers.bitwise import assert_bitwise
from helpers.lanes import Early, Late, Recorded, force  # noqa: F401  # a fixture
from torch import nn

from muon8bit import Muon8bit, NonFiniteGradientError, release_gradients, state_report
from muon8bit.step import adamw, nonfinite, offload
from muon8bit.step.local_params import local_params, new_state
from muon8bit.step.offload import OffloadTask, StateOffload

MIB = 2**20
OPTIONS = {
    "linear": {},
    "dynamic": {"codebook": "dynamic", "block_size": 64, "nesterov": False},
    "bits=32": {"bits": 32, "clip_matrix_norm": 0.5},
    "maximize": {"maximize": True, "clip_matrix_norm": 0.5},
    "bf16": {"dtype": torch.bfloat16},
    "stochastic": {"dtype": torch.bfloat16, "param_rounding": "stochastic", "rounding_seed": 7},
    "cautious": {"dtype": torch.bfloat16, "param_rounding": "stochastic", "cautious_weight_decay": True},
    "normuon": {"second_moment": "shape", "rescale": "keep"},
    "adamuon": {"second_moment": "element", "rescale": "rms", "sign_momentum": True, "dtype": torch.bfloat16},
}


def make(dtype=torch.float32, workspace_bytes=MIB + 2**17, device="cpu", **options):
    """An optimizer of every kind of parameter, with so little workspace that most batches hold a few matrices, and
    AdamW's largest is cut."""
    generator = torch.Generator().manual_seed(0)

    def params(*shapes):
        made = [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]
        return made

    adamw = {"algorithm": "adamw", "lr": 0.01}
    convolution = torch.randn(6, 3, 3, 5, generator=generator).to(device, dtype, memory_format=torch.channels_last)
    groups = [
        {"params": params(*[(24, 70)] * 5, (70, 24), (40, 5), (3, 24, 70), (2, 2, 16, 40), (130, 140))},
        {"params": params((36, 16), (3, 36, 16)), "split_sizes": (16, 12, 8)},
        {"params": params((12, 48), (12, 48)), "split_sizes": (20, 28), "split_dim": -1},
        {"params": [nn.Parameter(convolution)], "flatten": True},
        {"params": params((900, 130), (33,), (), (7, 5)), **adamw},
        {"params": [nn.Parameter(convolution.clone(memory_format=torch.preserve_format))], **adamw},
        {"params": params((900, 512), (70, 70), (3000,), (50, 5, 100)), "adamw_bits": 8, **adamw},
    ]
    optimizer = Muon8bit(groups, lr=0.02, **options)
    optimizer.workspace_bytes = workspace_bytes  # the constructor refuses so little
    return optimizer


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def give_gradients(optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params_of(optimizer):
        param.grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)
        if param.shape == (3, 36, 16):
            param.grad[seed % 3] = 0  # an idle matrix of a stack


def train(optimizer, seeds):
    for seed in seeds:
        give_gradients(optimizer, seed)
        optimizer.step()


def assert_equal(optimizer, other):
    for param, its in zip(params_of(optimizer), params_of(other), strict=True):
        assert_bitwise(param.detach(), its.detach())
    states, its_states = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert states.keys() == its_states.keys()
    for index, state in states.items():
        assert list(state) == list(its_states[index])
        for key, tensor in state.items():
            assert tensor.shape == its_states[index][key].shape
            assert_bitwise(tensor, its_states[index][key])


@pytest.mark.parametrize("lane", [Early, Late])
@pytest.mark.parametrize("is_counter_staged", [False, True])  # AdamW's; True is played, as on CUDA
@pytest.mark.parametrize("name", OPTIONS)
def test_staged_training_equals_training_in_place_bitwise(name, is_counter_staged, lane, force, monkeypatch):  # noqa: F811
    its = make(**OPTIONS[name])
    train(its, range(4))
    force(lane)
    optimizer = make(**OPTIONS[name], state_device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(adamw, "_is_counter_staged", lambda _: is_counter_staged)
        train(optimizer, range(4))
    assert_equal(optimizer, its)
    assert state_report(optimizer).to_dict() == state_report(its).to_dict()


def test_one_batch_of_everything_equals_training_in_place_bitwise(force):  # noqa: F811
    its = make(workspace_bytes=64 * MIB)
    force(Late)
    optimizer = make(workspace_bytes=64 * MIB, state_device="cpu")
    train(optimizer, range(2))
    train(its, range(2))
    assert_equal(optimizer, its)


def test_nothing_is_copied_for_parameters_on_the_host(monkeypatch):
    assert offload.lane_of(torch.device("cpu")) is None
    monkeypatch.setattr(offload, "_run_staged", None)  # would raise
    optimizer, its = make(state_device="cpu"), make()
    train(optimizer, range(2))
    train(its, range(2))
    assert_equal(optimizer, its)


def test_the_next_state_is_fetched_before_the_work_into_two_buffers_in_turn(force):  # noqa: F811
    lane = force(Recorded)
    host = [torch.full((size,), float(size)) for size in (3, 400, 300, 2, 1)]

    def job(index):
        def run(staged):
            lane.events.append(f"work {index}")
            assert [tensor.tolist() for tensor in staged] == [host[index].tolist(), [9.0]]
            staged[0].add_(1)
            staged[1].add_(1)

        return OffloadTask(torch.device("cpu"), run, written=[host[index]], read=[nine])

    nine = torch.full((1,), 9.0)
    StateOffload("cpu").run([job(i) for i in range(5)])
    expected = ["begin", "fetch 0"]
    for i in range(4):
        expected += [f"fetch {i + 1}", f"arrive {i}", f"work {i}", "write"]
    assert lane.events == [*expected, "arrive 4", "work 4", "write", "end"]
    assert [storage.data_ptr() for storage in lane.buffers] == [lane.buffers[i % 2].data_ptr() for i in range(5)]
    # Tensors begin at multiples of 512 bytes: of 3, 300 and 1 floats the second, of 400 and 2 the first is the largest.
    assert [storage.nbytes() for storage in lane.buffers[:2]] == [1536 + 512, 2048 + 512]
    assert [int(tensor[0]) for tensor in host] == [4, 401, 301, 3, 2]
    assert nine.item() == 9


def test_a_job_that_fails_leaves_no_copy_behind(force):  # noqa: F811
    lane = force(Recorded)

    def fail(_):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        StateOffload("cpu").run([OffloadTask(torch.device("cpu"), fail, written=[torch.zeros(2)])] * 2)
    assert lane.events[-1] == "end"


def test_an_optimizer_step_has_two_transfers_in_and_one_out_for_muon_and_one_each_for_adamw(force):  # noqa: F811
    moved = {"fetch": 0, "write": 0}

    class Counted(offload.CopyStream):
        def fetch(self, copies):
            moved["fetch"] += sum(target.numel() * target.itemsize for target, _ in copies)
            return super().fetch(copies)

        def write(self, copies):
            moved["write"] += sum(target.numel() * target.itemsize for target, _ in copies)
            super().write(copies)

    force(Counted)
    matrix, vector = nn.Parameter(torch.randn(64, 4096)), nn.Parameter(torch.randn(5000))
    groups = [{"params": [matrix]}, {"params": [vector], "algorithm": "adamw", "lr": 0.1}]
    optimizer = Muon8bit(groups, state_device="cpu")
    matrix.grad, vector.grad = torch.randn(64, 4096), torch.randn(5000)
    optimizer.step()
    codes, moments = 64 * 4096 + 64 * 2 * 4, 8 * 5000  # the counter is read on the host
    assert moved == {"fetch": 2 * codes + moments, "write": codes + moments}


CASES = {
    "matrices": ([(64, 4096)] * 64, torch.float32, {}),
    "bits=32": ([(64, 4096)] * 64, torch.float32, {"bits": 32}),
    "pieces of columns": ([(32, 64, 8192)], torch.float32, {"split_sizes": (4096, 4096), "split_dim": -1}),
}


@pytest.mark.parametrize("name", CASES)
def test_at_most_two_batches_are_on_the_device(name, force, monkeypatch):  # noqa: F811
    """Allocated bytes of a step, staged, against the bytes of the largest batches."""
    shapes, dtype, group = CASES[name]

    def peak(state_device):
        params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
        optimizer = Muon8bit([{"params": params, **group}], workspace_bytes=32 * MIB, state_device=state_device)
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        return peak_bytes(optimizer.step)

    in_place, _ = peak(None)
    force(offload.CopyStream)
    sizes, real = [], offload.buffer_bytes
    monkeypatch.setattr(offload, "buffer_bytes", lambda jobs: sizes.append(list(jobs)) or real(jobs))
    staged, left = peak("cpu")
    assert left == 0
    assert max(len(jobs) for jobs in sizes) > 2
    two = max(2 * max(jobs) for jobs in sizes)
    assert in_place <= staged <= in_place + two
    assert two <= 32 * MIB * (2 if name == "bits=32" else 0.51)  # with the scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_keeps_to_the_workspace_with_its_staged_state(dtype, force):  # noqa: F811
    param = nn.Parameter(torch.randn(4096, 4096).to(dtype))
    param.grad = torch.randn_like(param)
    force(offload.CopyStream)
    group = {"params": [param], "algorithm": "adamw", "lr": 1e-3}
    optimizer = Muon8bit([group], workspace_bytes=32 * MIB, state_device="cpu")
    optimizer.step()
    peak, left = peak_bytes(optimizer.step)
    assert 8 * MIB < peak <= 32 * MIB
    assert left == 0


@pytest.mark.parametrize("is_asynchronous", [False, True])  # as on CUDA, played on the CPU
@pytest.mark.parametrize("index", [0, -3])  # a matrix, and one of AdamW's
def test_a_nonfinite_gradient_changes_nothing(index, is_asynchronous, force, monkeypatch):  # noqa: F811
    monkeypatch.setattr(nonfinite.GradientCheck, "is_asynchronous", is_asynchronous)
    force(Late)
    how = OPTIONS["stochastic"]
    optimizer, its = make(**how, state_device="cpu"), make(**how)
    train(optimizer, [0])
    train(its, [0])
    give_gradients(optimizer, 1)
    params_of(optimizer)[index].grad.view(-1)[-1] = torch.nan
    if not is_asynchronous:
        with pytest.raises(NonFiniteGradientError):
            optimizer.step()
    else:
        optimizer.step()
    assert_equal(optimizer, its)
    if is_asynchronous:
        with pytest.raises(NonFiniteGradientError):
            optimizer.step()
    train(optimizer, [2])
    train(its, [2])
    assert_equal(optimizer, its)


@pytest.mark.parametrize("read", [Muon8bit.state_dict, copy.deepcopy, pickle.dumps])
def test_who_reads_the_state_waits_until_all_is_written_back(read, force):  # noqa: F811
    lane = force(Late)
    optimizer = make(state_device="cpu")
    train(optimizer, range(2))
    assert lane.pending
    read(optimizer)
    assert not lane.pending


@pytest.mark.parametrize("before", [None, "cpu"])
@pytest.mark.parametrize("after", [None, "cpu"])
def test_a_checkpoint_is_the_same_with_and_without_and_loads_into_either(before, after, force):  # noqa: F811
    force(Late)
    saved, its = make(state_device=before), make()
    train(saved, range(2))
    train(its, range(4))
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    loaded = make(state_device=after)
    for param, start in zip(params_of(loaded), params_of(saved), strict=True):
        param.data.copy_(start)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    train(loaded, range(2, 4))
    assert_equal(loaded, its)


def test_a_copied_and_an_unpickled_optimizer_go_on_alike(force):  # noqa: F811
    its = make()
    train(its, range(3))
    force(Early)
    optimizer = make(state_device="cpu")
    train(optimizer, range(2))
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.state_device == "cpu"
        train(other, [2])
        assert_equal(other, its)


@pytest.mark.parametrize("door", ["load_state_dict", "deepcopy", "empty_state"])
def test_state_of_parameters_elsewhere_lives_on_the_host(door):
    """Parameters on the meta device: what was moved there would be lost."""
    its = make()
    train(its, range(2))
    saved = its.state_dict()
    optimizer = make(device="meta", state_device="cpu")
    if door == "empty_state":
        states = list(optimizer.empty_state().values())
    else:
        optimizer.load_state_dict(saved)
        optimizer = copy.deepcopy(optimizer) if door == "deepcopy" else optimizer
        states = list(optimizer.state_dict()["state"].values())
    for state, expected in zip(states, saved["state"].values(), strict=True):
        assert {tensor.device.type for tensor in state.values()} == {"cpu"}
        assert {key: (t.shape, t.dtype) for key, t in state.items()} == {
            key: (t.shape, t.dtype) for key, t in expected.items()
        }
        if door != "empty_state":
            for key, tensor in state.items():
                assert_bitwise(tensor, expected[key])


def test_state_on_the_host_is_pinned_for_parameters_on_cuda(monkeypatch):
    pinned = torch.ones(3)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor is pinned)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda _: pinned)
    tensor, cuda = torch.ones(3), torch.device("cuda", 0)
    assert StateOffload("cpu").at_home(tensor, cuda) is pinned
    assert StateOffload("cpu").at_home(pinned, cuda) is pinned
    assert StateOffload("cpu").at_home(tensor, torch.device("cpu")) is tensor
    assert StateOffload(None).at_home(tensor, cuda) is tensor


@pytest.mark.parametrize("door", ["load_state_dict", "deepcopy", "pickle"])
def test_loading_copying_and_pickling_bring_every_tensor_home(door, monkeypatch):
    """They all make pageable tensors."""
    optimizer = make(state_device="cpu")
    train(optimizer, [0])
    home = set()

    def at_home(_, tensor, device):
        assert device == torch.device("cpu")
        home.add(id(tensor))
        return tensor

    monkeypatch.setattr(StateOffload, "at_home", at_home)
    if door == "load_state_dict":
        optimizer.load_state_dict(optimizer.state_dict())
    else:
        optimizer = copy.deepcopy(optimizer) if door == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert len(optimizer.state) == len(params_of(optimizer))
    assert home == {id(tensor) for state in optimizer.state.values() for tensor in state.values()}


def test_new_state_of_parameters_elsewhere_is_made_on_the_host():
    optimizer, staged = make(device="meta", state_device="cpu"), StateOffload("cpu")
    give_gradients(optimizer, 0)
    num_found = 0
    for group, options in zip(optimizer.param_groups, optimizer._options(), strict=True):
        for local in local_params(group, options, 0, 0, {}, None, staged):
            new = new_state(local, group, staged)
            assert {tensor.device.type for tensor in new.values()} == {"cpu"}
            assert all(tensor.is_contiguous() for tensor in new.values())
            num_found += 1
    assert num_found == len(params_of(optimizer))


@pytest.mark.parametrize("name", ["linear", "stochastic"])
def test_released_gradients_with_staged_state_equal_those_without_bitwise(name, force):  # noqa: F811
    force(Late)
    how = {**OPTIONS[name], "on_nonfinite": "skip"}
    optimizers = [make(**how, state_device=device) for device in ("cpu", None)]
    for optimizer in optimizers:
        params = nn.ParameterList(params_of(optimizer))
        release_gradients(params, optimizer)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            weights = [torch.randn(param.shape, generator=generator) for param in params]
            sum((param.float() * w).sum() for param, w in zip(params, weights, strict=True)).backward()
            optimizer.step()
    assert_equal(*optimizers)


@pytest.mark.parametrize("value", ["cuda", "disk", torch.device("cpu"), True])
def test_another_state_device_is_refused(value):
    with pytest.raises(ValueError, match=r"state_device must be None.*or 'cpu'"):
        Muon8bit([nn.Parameter(torch.zeros(2, 2))], state_device=value)


def test_what_ranks_share_is_refused():
    with pytest.raises(NotImplementedError, match=r"does not go with a process_group.*Leave state_device out"):
        Muon8bit([nn.Parameter(torch.zeros(2, 2))], state_device="cpu", process_group=object())
    sharded = nn.Parameter(torch.zeros(2, 2))
    sharded.device_mesh = object()
    with pytest.raises(NotImplementedError, match="does not go with up, which is sharded"):
        Muon8bit([("up", sharded)], state_device="cpu")
    param = nn.Parameter(torch.zeros(2, 2))
    optimizer = Muon8bit([param], state_device="cpu")
    optimizer.param_groups[0]["params"] = [sharded]  # as Accelerate does
    with pytest.raises(NotImplementedError, match="does not go with sharded parameters"):
        optimizer.step()


@pytest.mark.gpu
@pytest.mark.decisive
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("workspace_bytes", [MIB + 2**17, 64 * MIB])
def test_on_cuda_state_on_the_host_is_pinned_and_trains_the_same_bitwise(name, workspace_bytes):
    how = {**OPTIONS[name], "device": "cuda", "workspace_bytes": workspace_bytes}
    optimizer, its = make(**how, state_device="cpu"), make(**how)
    train(optimizer, range(6))
    train(its, range(6))
    assert_equal(optimizer, its)
    for other in (optimizer, copy.deepcopy(optimizer), make(**how, state_device="cpu")):
        other.load_state_dict(its.state_dict())
        tensors = [tensor for state in other.state.values() for tensor in state.values()]
        assert tensors
        assert all(tensor.device.type == "cpu" and tensor.is_pinned() for tensor in tensors)


@pytest.mark.gpu
@pytest.mark.decisive
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_cuda_state_on_the_host_lowers_the_peak_by_the_state_less_two_batches():
    peaks = {}
    for state_device in (None, "cpu"):
        params = [nn.Parameter(torch.randn(1024, 4096, device="cuda", dtype=torch.bfloat16)) for _ in range(64)]
        optimizer = Muon8bit(params, workspace_bytes=64 * MIB, state_device=state_device)
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        torch.cuda.synchronize()
        peaks[state_device] = torch.cuda.max_memory_allocated()
        del params, optimizer, param
    state = 64 * (1024 * 4096 + 1024 * 2 * 4)
    assert state - 64 * MIB / 2 - 2 * MIB <= peaks[None] - peaks["cpu"] <= state
