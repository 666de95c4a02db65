"""The comparison with another commit finds one changed bit, and nothing where nothing has changed."""

import json

import pytest
import torch

from benchmarks.robustness import against_commit
from benchmarks.robustness.against_commit import ROOT, compare, perturbed, run_tree


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Cases of this tree as the old one and as the new one, which has loaded the old one's checkpoints."""
    folder, only = tmp_path_factory.mktemp("trees"), ["linear: defaults", "dynamic: stochastic", "param_groups"]
    old = run_tree(ROOT, folder / "old.pt", None, only)
    return old, run_tree(ROOT, folder / "new.pt", folder / "old.pt", only)


def test_a_tree_equals_itself_in_every_stage(trees):
    rows = compare(*trees)
    assert [row["differences"] for row in rows] == [[]] * 10
    assert all(row["elements"] > 1000 for row in rows)
    assert {row["stage"] for row in rows} == {"3 steps", "loaded", "2 more"}


def test_one_bit_of_any_item_is_found(trees):
    old, new = trees
    names = {}
    for case, stages in old.items():
        for place in range(100):
            (found,) = against_commit.differences(stages["3 steps"], perturbed(new[case]["3 steps"], place))
            assert found.get("elements", 1) == 1
            names.setdefault(case, set()).add(found["item"])
    assert {"param wide", "momentum_linear8 wide", "momentum_scales wide"} <= names["linear: defaults"]
    assert {"param fused", "momentum_dynamic8 fused", "exp_avg bias"} <= names["dynamic: stochastic rounding, split"]
    assert "routes, 0.2" in names["param_groups"]


def test_differences_have_units():
    old = {"param a": torch.tensor([1.0, 2.0]), "before a": torch.tensor([1.0, 1.5]), "codes a": torch.tensor([1, 9])}
    new = {"param a": torch.tensor([1.0, 2.25]), "codes a": torch.tensor([4, 9])}
    codes, param = against_commit.differences(old, new)
    assert (codes["elements"], codes["largest"], codes["unit"]) == (1, 3.0, "codes")
    assert (param["elements"], param["of"], param["largest"], param["unit"]) == (1, 2, 0.5, "updates")


def test_zeros_of_both_signs_differ_and_equal_nans_do_not():
    old = {"a": torch.tensor([0.0, torch.nan])}
    (found,) = against_commit.differences(old, {"a": torch.tensor([-0.0, torch.nan])})
    assert found["elements"] == 1


def test_the_command_ends_with_1_where_something_differs(trees, monkeypatch, tmp_path, capsys):
    results = iter([trees[0], trees[1]] * 2)
    monkeypatch.setattr(against_commit, "run_tree", lambda *_: next(results))
    assert against_commit.main([str(ROOT), "--out", str(tmp_path / "record.json")]) == 0
    assert json.loads((tmp_path / "record.json").read_text())["different"] == 0
    assert against_commit.main([str(ROOT), "--perturb"]) == 1
    assert "10 comparisons" in (printed := capsys.readouterr().out)
    assert printed.splitlines()[-1].endswith("10 differ")
    assert " elements, by " in printed
