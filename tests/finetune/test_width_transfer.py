"""Width transfer from the command line: the table of a rule, and the coordinate check with its record and verdict."""

from __future__ import annotations

import json

import pytest
from helpers.refusals import check_refused

from finetune import coordinate_check
from finetune.coordinates import measure
from finetune.coordinates.verdict import judge
from muon8bit.cli import main as muon8bit


def test_the_table_of_a_rule_has_the_rates_of_both_widths(recipe_file, capsys):
    words = ["transfer", str(recipe_file), "--width", "128", "--lr", "0.01", "--weight-decay", "0.2", "--json"]
    assert muon8bit(words) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["base_width"], record["width"], record["rule"]) == (32, 128, "spectral")
    rows = {row["parameter"]: row for row in record["parameters"]}
    up = rows["model.layers.*.mlp.up_proj.weight"]
    assert (up["role"], up["base_shape"], up["shape"]) == ("hidden", [64, 32], [256, 128])
    assert (up["init_factor"], up["base_lr"], up["lr"]) == (0.5, 0.01, pytest.approx(0.005))
    assert (up["base_weight_decay"], up["weight_decay"]) == (0.2, pytest.approx(0.1))
    assert rows["lm_head.weight"]["lr"] == pytest.approx(0.0025)
    assert muon8bit([*words[:-1], "--optimizer", "adamw", "--rule", "essential"]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if "weight" in line}
    assert lines["model.layers.*.mlp.up_proj.weight"][1:3] == ["hidden", "adamw"]
    assert lines["model.layers.*.mlp.up_proj.weight"][-3:] == ["0.0025", "0.2", "0.2"]


def test_a_width_that_is_not_the_models_is_one_sentence(recipe_file, capsys):
    assert muon8bit(["transfer", str(recipe_file), "--width", "100"]) == 2
    assert "the nearest that work: 96 and 112" in capsys.readouterr().err


def check(command, recipe_file, *words):
    return command(coordinate_check.main, recipe_file, *words, "--seeds", 1, "--steps", 1)


def test_a_coordinate_check_leaves_a_record_and_a_picture_and_goes_on(recipe_file, command, tmp_path, monkeypatch):
    words = ("--widths", "16,32", "--output", "out")
    done = check(command, recipe_file, *words)
    assert done.code == 0, done
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert (tmp_path / "out" / "changes.png").stat().st_size > 1000
    names = [f"{kind} {layer}" for layer in (0, 1) for kind in ("attention", "mlp", "stream")]
    assert list(record["measured"][0]["activations"]) == [*names, "final norm", "logits"]
    assert record["verdict"]["text"] in done.out
    before = {one["width"]: one for one in record["measured"]}

    taken = []
    real = measure.measure_changes
    monkeypatch.setattr(
        measure, "measure_changes", lambda recipe, *rest: taken.append(recipe.width) or real(recipe, *rest)
    )
    again = check(command, recipe_file, "--widths", "16,32,64", "--output", "out")
    assert (again.code, taken) == (0, [64])
    after = {one["width"]: one for one in json.loads((tmp_path / "out" / "record.json").read_text())["measured"]}
    assert {width: after[width] for width in before} == before
    other = check(command, recipe_file, *words, "--scaling", "none")
    check_refused(other, "--output", "is of initialization 'spectral', not 'none'", "give another folder")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--widths", "32"], ["--widths", "one width", "give at least two"]),
        (["--widths", "32,wide"], ["--widths", "no list of whole numbers"]),
        (["--widths", "32,40"], ["--widths: ", "the nearest that work: 32 and 48"]),
        (["--widths", "16,32", "--", "--seed", "3"], ["--seed", "leave it out after --"]),
        (["--widths", "16,32", "--", "--lr", "-1"], ["--lr", "above 0"]),
    ],
)
def test_bad_input_of_a_coordinate_check_is_one_sentence(recipe_file, command, tmp_path, words, said):
    check_refused(command(coordinate_check.main, recipe_file, *words), *said)
    assert not list(tmp_path.iterdir())


def one(width, seed, change, initial=1.0):
    values = {name: {"initial": initial, "change": change * factor} for name, factor in (("a", 1), ("b", 2), ("c", 3))}
    return {"width": width, "seed": seed, "activations": values}


@pytest.mark.parametrize(
    ("changes", "initial", "text", "ratio"),
    [
        ({64: (0.9, 1.1), 128: (1.3, 1.3), 256: (1.1, 1.2)}, 1, "scales", 1.15),
        ({64: (1.0, 1.0), 256: (1.25, 1.25)}, 1, "does not scale", 1.25),  # the median
        ({64: (1.0, 1.0), 256: (0.5, 0.5)}, 1, "does not scale", 0.5),
        ({64: (1.0, 1.0), 256: (1.0, 1.0)}, 4, "too short to say", 1.0),
    ],
)
def test_the_verdict_is_of_the_ends_of_the_widths_and_means_over_seeds(changes, initial, text, ratio):
    measured = [
        one(w, seed, change, initial) for w, of_seeds in changes.items() for seed, change in enumerate(of_seeds)
    ]
    verdict = judge(measured)
    assert verdict.text == text
    assert verdict.ratios == pytest.approx({"a": ratio, "b": ratio, "c": ratio})
    assert [verdict.median, verdict.worst] == pytest.approx([max(ratio, 1 / ratio)] * 2)


def test_one_activation_that_grows_is_enough():
    measured = [one(64, 0, 1.0), one(256, 0, 1.0)]
    measured[1]["activations"]["c"]["change"] *= 1.7
    verdict = judge(measured)
    assert (verdict.text, verdict.median) == ("does not scale", 1)
