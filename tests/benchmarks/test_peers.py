"""The kit that holds optimizer classes to the same checks: ours pass, and planted faults are told."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from helpers.family_rules import JORDAN, iterated

from benchmarks.peers.command import CHECKS, main, run_checks, run_subject
from benchmarks.peers.matrices import check_bytes, make_grads
from benchmarks.peers.models import describe_update
from benchmarks.peers.rules import closest, cosine, last_updates
from benchmarks.peers.subjects import SUBJECTS, Subject
from benchmarks.peers.tables import write_tables

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
OURS = [subject for subject in SUBJECTS if subject.is_ours]
QUICK = [name for name in CHECKS if name not in ("sharding", "step time")]


class Faulty(torch.optim.Optimizer):
    """Muon in 8 bits with one scale a tensor, whose codes lose their sign when they are loaded."""

    def __init__(self, params, lr, momentum=0.95, nesterov=True):
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                grad, state = param.grad.nan_to_num().clamp(-1, 1).flatten(1), self.state[param]
                if not state:
                    state["codes"], state["scale"] = torch.zeros_like(grad, dtype=torch.int8), torch.zeros(())
                momentum = state["codes"].float() * state["scale"] * 0.95 + 0.05 * grad
                state["scale"] = momentum.abs().max() / 127
                state["codes"] = (momentum / state["scale"]).round().to(torch.int8)
                blend = 0.95 * momentum + 0.05 * grad
                param -= group["lr"] * iterated(blend / blend.norm(), JORDAN).reshape(param.shape)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state, saved in zip(self.state.values(), state_dict["state"].values(), strict=True):
            state["codes"] = saved["codes"].to(torch.uint8)


@pytest.fixture
def faulty(monkeypatch):
    monkeypatch.setattr(Subject, "kind", property(lambda _: Faulty))
    return Subject("faulty", "none", "x:Faulty")


@pytest.mark.parametrize("subject", OURS, ids=lambda subject: subject.name)
def test_our_classes_pass(subject):
    results = run_checks(subject, QUICK)
    assert {name: result for name, result in results.items() if not result["passed"]} == {}
    rules = {"NorMuon8bit": "NorMuon, paper", "AdaMuon8bit": "AdaMuon, paper"}
    expected = rules.get(subject.target.split(":")[1], "Muon, Nesterov, momentum 0.95, Jordan")
    assert results["rule"]["rule"] == expected
    assert "nothing is changed" in results["nan"]["outcome"]


def test_rules_are_told_apart():
    """The rule that an update follows has cosine 1, and the next one less, also where only Nesterov differs."""
    directions = last_updates([grad.double().numpy() for grad in make_grads(8)])
    for name, direction in directions.items():
        assert closest(direction, directions) == (name, pytest.approx(1))
        others = {other: d for other, d in directions.items() if other != name}
        assert closest(3 * direction, others)[1] < 0.9999
    assert cosine(np.zeros(3), np.ones(3)) == 0


def test_faults_are_told(faulty):
    results = run_checks(faulty, QUICK)
    assert results["rule"]["rule"].startswith("Muon, Nesterov, momentum 0.95")
    for name in ("resume fp32", "resume bf16"):
        assert results[name]["notes"][0] == "codes int8 became uint8"
        assert results[name]["cosine"] < 0.9
        assert not results[name]["passed"]
    assert results["nan"]["outcome"] == "no error, the step is taken, parameters are finite"
    assert results["scale"]["cosine"] < 0.97
    assert results["bytes"]["bytes_per_parameter"] == (256 * 1024 + 4) / (256 * 1024)
    kinds = results["routing"]["kinds"]
    assert kinds["embed_tokens"] == kinds["lm_head"] == "orthogonalized"
    assert kinds["conv"] == kinds["experts"] == "orthogonalized as one matrix"
    assert kinds["norm"] == "refused (IndexError)"


def test_forms_of_updates_are_told_apart():
    grad = torch.randn(4, 32, 48, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(grad, full_matrices=False)
    assert describe_update(u @ v, grad) == "orthogonalized, each matrix"
    assert describe_update(0.1 * grad.sign(), grad) == "element-wise"
    assert describe_update(torch.zeros(3), torch.ones(3)) == "none"
    assert describe_update(grad[0], grad[0].flip(0)).startswith("another")


def test_bytes_count_storages_of_objects_and_views_once():
    class Box:
        def __init__(self, tensor):
            self.tensor, self.again = tensor, tensor[:1]

    class Boxed(torch.optim.SGD):
        def step(self):
            for param in self.param_groups[0]["params"]:
                self.state[param] = {"box": Box(torch.zeros(256 * 1024, dtype=torch.int16)), "param": param}

    subject = Subject("boxed", "none", "x:y")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Subject, "kind", property(lambda _: Boxed))
        assert check_bytes(subject)["bytes_per_parameter"] == 2


def test_a_worker_runs_a_class_and_tables_have_what_was_not_run(capsys):
    subject = Subject("SGD", "torch", "torch.optim:SGD", {"momentum": 0.9})
    assert main(["--worker", json.dumps([asdict(subject), ["bytes"]])]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["bytes"]["bytes_per_parameter"] == 4
    missing = run_subject(Subject("other", "none", "not_installed_at_all:Class"), ["rule"])
    assert missing["reason"] == "not installed"
    failing = {
        **missing,
        "name": "failing",
        "reason": "",
        "results": {"rule": {"error": "E: x"}, "nan": {"error": "E: x"}},
    }
    tables = write_tables(
        [{**missing, "name": "SGD", "reason": "", "results": results}, missing, failing], {"one": "no"}
    )
    assert "| SGD | 4.000 | - |" in tables
    not_run = tables[tables.index("## Not run") :]
    assert all(f"| {name} | {reason} |" in not_run for name, reason in [("other", "not installed"), ("one", "no")])
    assert "| failing | E: x |" in not_run


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["torch.optim:Nothing"], "torch.optim:Nothing cannot be imported"),
        (["nowhere"], "give MODULE:CLASS"),
        (["torch.optim:SGD", "--options", "[1]"], "--options is not a JSON object"),
        (["--only", "x?"], "--only x?: no class has that in its name"),
    ],
)
def test_bad_input_is_one_sentence(words, told, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
