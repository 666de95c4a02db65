"""Models in wrappers: names, patterns and checkpoints are those of the model inside, and of each other's."""

import copy
import itertools

import pytest
import torch
from helpers.bitwise import assert_bitwise
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from muon8bit import Muon8bit, convert_state_dict, param_groups, state_report
from muon8bit._text import is_same, unwrapper


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(11, 16)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2))
        self.norm = torch.nn.LayerNorm(16)
        self.lm_head = torch.nn.Linear(16, 11, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x).tanh()
        return self.lm_head(self.norm(x))


class _Around(torch.nn.Module):
    """As DDP and FSDP1 name what they hold, without a process group."""

    def __init__(self, model, name):
        super().__init__()
        self.add_module(name, model)

    def forward(self, tokens):
        return next(iter(self.children()))(tokens)


def compiled(model):
    return torch.compile(model, backend="eager")


def by_layer(wrap):
    def wrapped(model):
        for i, layer in enumerate(model.layers):
            model.layers[i] = wrap(layer)
        return model

    return wrapped


WRAPPERS = {
    "plain": lambda model: model,
    "torch.compile": compiled,
    "torch.compile of layers": by_layer(compiled),
    "checkpointed layers": by_layer(checkpoint_wrapper),
    "DataParallel": torch.nn.DataParallel,
    "FSDP1's segment": lambda model: _Around(model, "_fsdp_wrapped_module"),
    "DDP of a compiled model": lambda model: _Around(compiled(model), "module"),
    "a compiled DDP": lambda model: compiled(_Around(model, "module")),
}


def make(wrapper, **options):
    model = WRAPPERS[wrapper](Net())
    return model, Muon8bit(param_groups(model, lr=0.02, **options))


def train(model, optimizer, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def tables(model, **options):
    groups = param_groups(model, lr=0.02, **options)
    return groups.routes, str(groups)


@pytest.mark.parametrize("wrapper", list(WRAPPERS)[1:])
def test_routes_are_those_of_the_model_inside(wrapper):
    model, expected = WRAPPERS[wrapper](Net()), tables(Net())
    assert tables(model) == expected
    patterns = [("layers.1.weight", "adamw")]
    assert tables(model, patterns=patterns) == tables(Net(), patterns=patterns)
    raw = next(name for name, _ in model.named_parameters() if name.endswith("1.weight") or "1._" in name)
    by_raw = param_groups(model, lr=0.02, patterns=[(raw, "adamw")], no_decay=[raw]).routes
    route = next(route for route in by_raw if route.name == "layers.1.weight")
    assert (route.algorithm, route.weight_decay) == ("adamw", 0)


@pytest.mark.parametrize(("saver", "loader"), [*((w, "plain") for w in WRAPPERS), *(("plain", w) for w in WRAPPERS)])
@pytest.mark.parametrize("are_raw", [False, True])
def test_a_run_resumes_under_another_wrapper_bitwise(saver, loader, are_raw):
    """Also where the names of the state are those of the wrapped model, as the first release saved them."""
    model, optimizer = make(saver)
    train(model, optimizer, [1, 2])
    saved = copy.deepcopy(optimizer.state_dict())
    if are_raw:
        raw = {p: name for name, p in model.named_parameters()}
        for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
            group["param_names"] = [raw[param] for param in own["params"]]
    other, resumed = make(loader)
    with torch.no_grad():
        for theirs, ours in zip(model.parameters(), other.parameters(), strict=True):
            ours.copy_(theirs)
    resumed.load_state_dict(saved)
    converted = convert_state_dict(saved, like=resumed)
    train(model, optimizer, [3])
    train(other, resumed, [3])
    for theirs, ours in zip(model.parameters(), other.parameters(), strict=True):
        assert_bitwise(ours, theirs)
        for key, value in optimizer.state[theirs].items():
            assert_bitwise(resumed.state[ours][key], value)
    assert converted["param_groups"][0]["param_names"] == resumed.param_groups[0]["param_names"]


def test_a_report_names_the_model_inside():
    model = WRAPPERS["DDP of a compiled model"](Net())
    optimizer = Muon8bit([{"params": list(model.named_parameters()), "algorithm": "adamw", "lr": 0.01}])
    assert [note.name for note in state_report(optimizer).without_state] == [n for n, _ in Net().named_parameters()]


def test_a_model_that_has_a_part_called_module_keeps_it():
    inner = torch.nn.ModuleDict({"module": torch.nn.Linear(16, 16), "other": torch.nn.Linear(16, 16)})
    names = [name for name, _ in inner.named_parameters()]
    assert [route.name for route in param_groups(inner, lr=0.1).routes] == names
    wrapped = torch.nn.DataParallel(compiled(inner))
    assert [route.name for route in param_groups(wrapped, lr=0.1).routes] == names


def test_names_that_would_become_equal_stay():
    names = ["a._orig_mod.weight", "a.weight"]
    assert list(map(unwrapper(names), names)) == names


def test_other_names_differ():
    names = ["layers.0.weight", "layers.1.weight", "module_list.0.weight", "layers.0._orig_mode.weight", "0.weight"]
    assert not any(itertools.starmap(is_same, itertools.permutations(names, 2)))
    assert is_same("module.layers.0.module._orig_mod.weight", "layers.0.weight")
