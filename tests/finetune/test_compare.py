"""Runs beside each other: what the table says is what their files say, whichever release wrote them."""

from __future__ import annotations

import functools
import json
import math
import struct

import pytest
from helpers.refusals import check_refused

from finetune.compare import main


@pytest.fixture
def compare(command):
    return functools.partial(command, main)


def write_run(folder, losses, **more):
    """A run as it is while it trains: 100 tokens a step, 0.5 s a step and 2 s more for the first one."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: it\noptimizer: adamw\n")
    lines = [
        {"step": i, "loss": loss, "lr": 1e-3, "val_loss": None, "tokens": 100 * i, "seconds": 2 + 0.5 * i, **more}
        for i, loss in enumerate(losses, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_table_of_a_folder_of_runs_has_what_their_files_say(pretrain, compare, tmp_path):
    for name, optimizer in (("one", "muon8bit"), ("two", "adamw")):
        assert pretrain("--output-dir", f"runs/{name}", "--optimizer", optimizer).code == 0
    write_run(tmp_path / "runs" / "old", [5.0, 4.0, 3.0], corpus="0" * 64, python="3.11.7")  # of 0.1, not complete
    outcome = compare("runs")
    assert outcome.code == 0, outcome.err
    heading, *rows = outcome.out.splitlines()
    assert heading.split() == ["run", "optimizer", "step", "loss", "validation", "tokens/s", "state", "peak"]
    assert [row.split()[:3] for row in rows] == [["old", "adamw", "3"], ["one", "muon8bit", "6"], ["two", "adamw", "6"]]
    assert rows[0].split()[3:] == ["3.0000", "-", "200", "-", "-"]
    for row in rows[1:]:
        result = json.loads((tmp_path / "runs" / row.split()[0] / "result.json").read_text())
        assert row.split()[4] == f"{result['val_loss']:.4f}"
        assert row.split()[6] == f"{result['state_bytes'] / 2**20:.1f}"
        assert row.split()[8] == f"{result['peak_bytes'] / 2**20:,.1f}"
    assert "not all on the same data" in outcome.err
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_compare_names_its_runs_apart_and_gives_json(compare, tmp_path):
    for folder, loss in (("a/run", 2.0), ("b/run", 4.0)):
        write_run(tmp_path / folder, [loss] * 40)
    outcome = compare("a/run", "b", "b/run", "--json", "--no-plot")
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    first, second = json.loads(outcome.out)
    assert (first["run"], second["run"]) == ("a/run", "b/run")
    assert math.isclose(first["loss"], 2)
    assert second["tokens_per_second"] == 200
    assert second["state_bytes"] is None
    assert not (tmp_path / "compare.png").exists()


def test_the_load_of_experts_stands_below_the_losses_where_a_run_has_one(compare, tmp_path):
    """The picture is then 720 instead of 540 pixels high."""
    write_run(tmp_path / "runs" / "dense", [2.0, 1.0])
    assert compare("runs", "--output", "dense.png").code == 0
    write_run(tmp_path / "runs" / "mixture", [2.0, 1.0], expert_load_cv=0.25)
    outcome = compare("runs", "--json")
    assert outcome.code == 0, outcome.err
    assert [run.get("expert_load_cv") for run in json.loads(outcome.out)] == [None, 0.25]
    sizes = [struct.unpack(">II", (tmp_path / name).read_bytes()[16:24]) for name in ("dense.png", "compare.png")]
    assert sizes == [(840, 540), (840, 720)]


def test_compare_refuses_what_is_no_run(compare, tmp_path):
    write_run(tmp_path / "run", [])
    check_refused(compare("run"), "RUN", "no step")
    check_refused(compare(tmp_path / "nowhere"), "RUN", "nowhere", "metrics.jsonl")
    write_run(tmp_path / "good", [1.0])
    check_refused(compare("good", "--output", "nowhere/x.png"), "--output", "nowhere/x.png")
    (tmp_path / "good" / "result.json").write_text("{")
    check_refused(compare("good"), "RUN", "result.json")


def test_a_run_without_a_step_is_left_out_of_a_folders_table_with_a_note(compare, tmp_path):
    write_run(tmp_path / "runs" / "good", [1.0])
    write_run(tmp_path / "runs" / "begun", [])
    outcome = compare("runs", "--no-plot")
    assert outcome.code == 0, outcome.err
    assert [row.split()[0] for row in outcome.out.splitlines()] == ["run", "good"]
    assert outcome.err == f"note: left out, without a step: {tmp_path / 'runs' / 'begun'}\n"
