"""Tuning at small width: planted optima are found, uncertainty covers, edges are refused, costs add up."""

from __future__ import annotations

import functools
import itertools
import json
import math

import numpy as np
import pytest
import yaml
from helpers.refusals import check_refused
from helpers.sweep_script import loss_at_width

from finetune.config.recipe import read_recipe
from finetune.sweep import telescope as telescope_module
from finetune.sweep.command import main
from finetune.sweep.fits import GridLoss, find_optimum, slope_over_width
from finetune.sweep.reading import read_sweep
from finetune.sweep.records import FIELDS, read_records
from finetune.sweep.stages import list_stages
from finetune.sweep.telescope import Telescope
from finetune.sweep.telescope_report import costs_text, optima_text
from finetune.sweep.transfer import widths_of


@pytest.fixture(autouse=True)
def _fake(monkeypatch):
    monkeypatch.setattr(telescope_module, "SCRIPT", "helpers.sweep_script")


def grid(axes, of, seeds=(0,)):
    return [GridLoss(point, seed, of(*point, seed)) for point in itertools.product(*axes) for seed in seeds]


def test_a_fit_finds_the_minimum_of_a_quadratic_and_ignores_what_is_far_from_it():
    def of(x, y, seed):
        dx, dy = x + 6.8, y + 3.3
        return 3 + 0.2 * dx * dx + 0.1 * dx * dy + 0.3 * dy * dy + 0.4 * seed + (9.0 if x < -10 else 0)

    found = find_optimum(grid([range(-12, -3), range(-5, -1)], of, seeds=(0, 2)))
    assert found.point == pytest.approx((-6.8, -3.3), abs=1e-9)
    assert found.height == pytest.approx(3.4, abs=1e-9)  # over the mean seed
    assert found.curvature == pytest.approx((0.2, 0.3), abs=1e-9)
    assert found.half_widths == pytest.approx((0, 0), abs=1e-6)
    assert (found.lowest, found.edges, found.is_interior) == ((-7, -3), (0, 0), True)


def test_the_interval_of_an_optimum_covers_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [0, 0]
    for _ in range(200):
        level = rng.normal(0, 0.1, 3)

        def noisy(x, y, seed, level=level):
            return 0.1 * (x - 0.2) ** 2 + 0.1 * (y + 0.1) ** 2 + level[seed] + rng.normal(0, 0.01)

        found = find_optimum(grid([range(-2, 3), range(-2, 3)], noisy, seeds=range(3)))
        for i, true in enumerate((0.2, -0.1)):
            inside[i] += abs(found.point[i] - true) <= found.half_widths[i]
    assert all(0.9 * 200 <= count < 200 for count in inside), inside


def test_a_minimum_at_an_end_of_a_grid_or_beyond_it_is_none():
    rising = find_optimum(grid([range(4)], lambda x, _: 1 + x))
    assert (rising.edges, rising.is_interior) == ((-1,), False)
    beyond = find_optimum(grid([range(3), range(3)], lambda x, y, _: (x - 1) ** 2 + (y - 2) ** 2 + (x - 1) * (y - 2)))
    assert (beyond.point, beyond.edges) == (pytest.approx((1, 2)), (0, 1))
    # The mean is lowest inside, the fit of all values has its minimum outside.
    outside = find_optimum(grid([range(5)], lambda x, _: [9.0, 7.0, 5.0, 1.0, 1.1][x]))
    assert (outside.lowest, outside.edges) == ((3,), (1,))
    diverged = find_optimum(grid([range(4)], lambda x, _: [3.0, 2.0, 1.9, math.inf][x]))
    assert (diverged.lowest, diverged.edges) == ((2,), (0,))
    assert diverged.point[0] == pytest.approx(1.5 + 0.1 / 0.9)
    assert find_optimum(grid([range(3)], lambda *_: math.inf)) is None
    flat = find_optimum(grid([range(3)], lambda x, _: [1.0, 0.9, math.inf][x]))
    assert (flat.lowest, flat.point, flat.edges) == ((1,), None, (0,))


def test_the_slope_over_width_is_the_planted_one_and_its_intervals_cover_it(monkeypatch):
    def of(width, x, seed, shift=0.0, noise=0.0):
        return 3 + 0.1 * (x + 5 + 0.5 * math.log2(width / 64) - shift) ** 2 + seed + noise

    exact = {w: grid([range(-8, -2)], lambda x, seed, w=w: of(w, x, seed), (0, 1, 2)) for w in (64, 128, 256)}
    found = slope_over_width(exact)
    assert found.value == pytest.approx(-0.5)
    assert found.bootstrap == pytest.approx((-0.5, -0.5))
    assert (found.by_seed.mean, found.by_seed.half_width) == (pytest.approx(-0.5), pytest.approx(0, abs=1e-9))
    # A seed whose optimum moves by .1 more at width 256 alone has a slope of -.5 + .05.
    moved = {
        w: grid([range(-8, -2)], lambda x, s, w=w: of(w, x, s, 0.1 if (w, s) == (256, 2) else 0), (0, 1, 2))
        for w in (64, 128, 256)
    }
    found = slope_over_width(moved)
    assert found.value == pytest.approx(-0.5 + 0.05 / 3)
    assert found.bootstrap == pytest.approx((-0.5, -0.45))
    assert found.by_seed.half_width == pytest.approx(4.30265 * 0.05 / math.sqrt(3) / math.sqrt(3), rel=1e-4)
    falling = {w: grid([range(4)], lambda x, _: -float(x * x)) for w in (64, 128)}
    assert slope_over_width(falling) is None
    monkeypatch.setattr("finetune.sweep.fits.RESAMPLES", 400)
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(100):
        noisy = {
            w: grid([range(-8, -2)], lambda x, s, w=w: of(w, x, s, noise=rng.normal(0, 0.02)), range(4))
            for w in (64, 128, 256)
        }
        low, high = slope_over_width(noisy).by_seed.ends
        inside += low <= -0.5 <= high
    assert inside >= 88


def make(recipe_file, **changes):
    settings = {"tuned": ("lr", "weight_decay"), "widths": (32, 64, 128), "to": 256, "scaling": "none", "rates": ()}
    settings |= {"points": 5, "seeds": (0,), "extend": 0, **changes}
    return Telescope(recipe=str(recipe_file), **settings)


def run_all(telescope, of, seconds=1.0):
    """Records of all runs of a telescoping sweep, as it would make them."""
    records = []
    while True:
        stages = list_stages(telescope, records, "records.jsonl")
        stage = stages[-1]
        if stage.obstacle or (len(stages) == len(telescope.widths) and stage.best):
            return stages, records
        if stage.best is None:
            known = {(r["arm"], r["rate"], r["seed"]) for r in records}
            before = len(records)
            for arm in stage.sweep.arms.values():
                for rate, seed in itertools.product(arm.rates, arm.seeds):
                    if (arm.name, rate, seed) not in known:
                        value = of(stage.width, rate, seed, arm.options.get("weight_decay", 0.1))
                        metrics = {"val_loss": value, "core_seconds": seconds * stage.width**2}
                        status = "finished" if math.isfinite(value) else "diverged"
                        run = {"arm": arm.name, "rate": rate, "seed": seed, "recipe_hash": arm.recipe_hash}
                        records.append({**run, "status": status, "metrics": metrics})
            assert len(records) > before


def test_grids_narrow_as_those_of_the_paper_and_stay_around_a_drifting_optimum(recipe_file):
    paper = make(recipe_file, points=8, widths=(32, 64, 128, 256))
    assert [paper.points_at(number) for number in range(4)] == [(8, 8), (5, 5), (3, 3), (3, 3)]
    assert make(recipe_file, points=16, tuned=("lr",), widths=(32, 64)).points_at(1) == (5,)  # 16 / 4, odd
    telescope = make(recipe_file, rates=(0.0025, 0.005, 0.01, 0.02, 0.04), points=3)
    stages, records = run_all(telescope, loss_at_width)
    assert [tuple(map(len, stage.axes)) for stage in stages] == [(5, 3), (3, 3), (3, 3)]
    assert len(records) == 15 + 9 + 9
    for stage in stages:
        rate, decay = stage.best
        assert rate == pytest.approx(0.01 * (32 / stage.width) ** 0.1, rel=1e-3)
        assert decay == pytest.approx(0.1, rel=1e-3)
    assert stages[1].axes[0] == pytest.approx([0.01 / 2**0.5, 0.01, 0.01 * 2**0.5], rel=1e-3)
    assert stages[2].axes[1] == pytest.approx([0.1 / 2**0.25, 0.1, 0.1 * 2**0.25], rel=1e-3)
    table = [line.split() for line in optima_text(telescope, stages).splitlines()]
    assert (table[-1][0], table[-1][8]) == ("128", "0.008706")  # 0.01 * 4 ** -0.1


def test_an_optimum_at_an_end_stops_the_sweep_or_its_grid_grows(recipe_file):
    # The grid around the tiny recipe's rate of .003 ends at .012; at width 32 the best one is .04.
    far = lambda width, rate, seed, decay: loss_at_width(width, rate / 4, seed, decay)  # noqa: E731
    lr = {"tuned": ("lr",), "widths": (32, 64)}
    stages, _ = run_all(make(recipe_file, **lr), far)
    assert len(stages) == 1
    assert stages[0].best is None
    assert stages[0].obstacle == (
        "the best --lr at width 32 is at the upper end of its grid, 0.00075 to 0.012, which is no result; raise "
        "--extend-rates, or give higher --rates and another --output-dir"
    )
    stages, records = run_all(make(recipe_file, extend=3, **lr), far)
    assert stages[0].best[0] == pytest.approx(0.04, rel=1e-3)
    assert [tuple(map(len, stage.axes)) for stage in stages] == [(8,), (3,)]
    assert len(records) == 8 + 3
    stages, _ = run_all(make(recipe_file, **lr), lambda *_: math.inf)
    assert stages[0].obstacle == "every run at width 32 diverged; give lower --rates and another --output-dir"
    small = make(recipe_file, rates=(0.005, 0.01, 0.02), points=3)
    stages, _ = run_all(small, lambda width, rate, seed, decay: loss_at_width(width, rate, seed, decay * 4))
    assert "lower end" in stages[0].obstacle
    assert "give the recipe a lower weight_decay and another --output-dir" in stages[0].obstacle


def test_costs_add_up(recipe_file):
    telescope = make(recipe_file, rates=(0.0025, 0.005, 0.01, 0.02, 0.04), points=3, seeds=(0, 1))
    stages, records = run_all(telescope, loss_at_width, seconds=3600 / 1024)

    def probe(hours):  # no set-up and no validation: 6 steps of the recipe take this long
        steps = [[1, 600 * hours], [4, 2400 * hours]]
        metrics = {"core_seconds": 2400 * hours, "wall_seconds": 2400 * hours, "seconds": 2400 * hours}
        metrics |= {"evaluation_seconds": 0.0, "step_seconds": steps, "validation_curve": [[0, 9.0], [4, 9.0]]}
        return {"status": "finished", "metrics": metrics}

    probes = {f"w{width}": probe((width / 32) ** 2) for width in (32, 64, 128, 256)}
    lines = costs_text(telescope, stages, records, probes).splitlines()
    assert lines[1].split() == ["32", "5", "x", "3", "2", "30", "30", "1.000", "30.000", "30.000"]
    assert lines[3].split() == ["128", "3", "x", "3", "2", "18", "18", "16.000", "288.000", "288.000"]
    assert lines[-1] == (
        "the grids: 390.000 core-hours predicted, 390.000 measured; the first grid at width 256 would take 1920.000"
    )
    nothing = costs_text(telescope, stages[:1], records[:30], {}).splitlines()
    assert nothing[2].split() == ["64", "3", "x", "3", "2", "18", "0", "-", "-", "0.000"]


@pytest.fixture
def tune(command, recipe_file):
    """Run the command on the tiny recipe."""
    return functools.partial(command, main, recipe_file, "--tune")


def test_what_cannot_be_tuned_is_refused_by_name(tune, command, tmp_path):
    widths = "--widths", "32,64", "--to", "128"
    check_refused(tune("lr,weight_dcay", *widths), "--tune", "'weight_dcay'", "did you mean 'weight_decay'")
    check_refused(tune("lr,optimizer", *widths), "--tune", "'optimizer'")
    check_refused(tune("lr,clip_matrix_norm", *widths), "--tune", "clip_matrix_norm", "above 0")
    check_refused(tune("weight_decay", *widths), "--tune", "needs lr")
    check_refused(tune("lr", "--widths", "64,32", "--to", "128"), "--widths", "64,32", "ascend")
    check_refused(tune("lr", "--widths", "32,256", "--to", "128"), "--widths", "--to 128")
    check_refused(tune("lr", "--widths", "32,40", "--to", "128"), "--widths: ", "40", "32 and 48")
    check_refused(tune("lr", "--widths", "32,64", "--to", "136"), "--to: ", "136", "128 and 144")
    check_refused(tune("lr", *widths, "--rates", "1e-3,1e-2"), "--rates", "3 values")
    check_refused(tune("lr", *widths, "--rates", "1e-3,0,1e-2"), "--rates", "0")
    check_refused(tune("lr", *widths, "--scaling", "spectrl"), "--scaling: 'spectrl'", "essential")
    check_refused(tune("lr", *widths, "--only", "w32"), "--only", "--tune")
    check_refused(tune("lr", "--to", "128"), "--widths", "needed")
    check_refused(tune("lr", *widths, "--processes", "2", "--gpus", "0,1"), "--processes", "--gpus")
    check_refused(command(main, "x.toml", "--widths", "32"), "--widths", "--tune")
    check_refused(command(main, "nowhere", "--tune", "lr", *widths), "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_the_command_tunes_on_several_gpus_writes_the_recipe_and_repeats_nothing(tune, command, recipe_file, tmp_path):
    words = "lr", "--widths", "64", "--to", "128", "--rates", "0.005,0.01,0.02", "--scaling", "spectral"
    words += "--gpus", "3,GPU-b"
    done = tune(*words)
    assert done.code == 0, done.err
    folder = tmp_path / "runs" / "tune-tiny"
    records = read_records(folder / "records.jsonl")
    assert len(records) == 3
    assert {r["metrics"]["gpus"] for r in records} == {"3", "GPU-b"}
    assert (folder / "rates.png").stat().st_size > 0
    result, before = read_recipe(str(folder / "tiny_w128.yaml")), read_recipe(str(recipe_file))
    assert result.lr == pytest.approx(0.01 / 2**0.1, rel=1e-3)
    assert result.scaling == "spectral"
    assert (result.width, result.sized_model["hidden_size"], result.name) == (128, 128, "tiny_w128")
    assert (result.weight_decay, result.model, result.dataset) == (before.weight_decay, before.model, before.dataset)
    content = (folder / "records.jsonl").read_bytes()
    assert tune(*words).code == 0
    assert (folder / "records.jsonl").read_bytes() == content
    assert "0.00933 (-)" in tune(*words, "--report").out  # three losses of one seed leave no room for an interval
    check_refused(tune(*words, "--scaling", "essential"), "--scaling", "spectral", "essential")
    check_refused(tune(*words, "--seeds", "0,1"), "--seeds", "tune-tiny", "0", "0,1", "--output-dir")
    check_refused(tune(*words, "--rates", "0.01,0.02,0.04"), "--rates", "0.005,0.01,0.02")
    changed = {**yaml.safe_load(recipe_file.read_text()), "batch_size": 2}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(changed))
    check_refused(command(main, "tiny.yaml", "--tune", *words), "--recipe", "tune-tiny", "as it was", "--output-dir")
    (folder / "telescope.json").unlink()  # as of a sweep's file
    check_refused(tune(*words), "--output-dir", "tune-tiny", "another sweep")


SLOPES = """
recipe = "{recipe}"
rates = [2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2]
seeds = [0, 1, 2]
[common]
max_steps = 4
[arms.base]
[arms.free_64]
width = 64
[arms.free_128]
width = 128
[arms.scaled_64]
width = 64
scaling = "spectral"
[arms.scaled_128]
width = 128
scaling = "spectral"
[arms.decayed_64]
width = 64
weight_decay = 0.2
[arms.decayed_128]
width = 128
weight_decay = 0.2
"""


def test_slopes_of_a_sweep_share_the_recipes_own_width_and_need_optima_inside(command, recipe_file, tmp_path):
    """Rules are series that have the recipe's own width in common, other options are series without it."""
    drift = {"base": 0.0, "free": 0.5, "scaled": -0.1, "decayed": 3.0}  # the last to the lower end at width 128
    (tmp_path / "it.toml").write_text(SLOPES.replace("{recipe}", str(recipe_file)))
    it = read_sweep("it.toml")
    records = []
    for arm in it.arms.values():
        for rate, seed in itertools.product(arm.rates, arm.seeds):
            width, own = widths_of(arm)
            assert own == 32
            best = 0.01 * (32 / width) ** drift[arm.name.split("_")[0]]
            value = 2 + 0.1 * math.log2(rate / best) ** 2 + seed
            run = {**dict.fromkeys(FIELDS), "arm": arm.name, "rate": rate, "seed": seed, "status": "finished"}
            metrics = {"val_loss": value, "core_seconds": 1.0}
            records.append({**run, "recipe_hash": arm.recipe_hash, "metrics": metrics})
    folder = tmp_path / "runs" / "sweep-it"
    folder.mkdir(parents=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    told = command(main, "it.toml", "--slopes")
    assert told.code == 0, told.err
    rows = [line.split() for line in told.out.splitlines()]
    doublings = math.log2(max(widths_of(arm)[0] for arm in it.arms.values()) / 32)
    none_cost, scaled_cost = (f"{0.1 * (slope * doublings) ** 2:.4f}" for slope in (0.5, 0.1))
    assert ["none", "32", "5", "3", "3.0000", "0.01", "0.01", "to", "0.01", "yes"] in rows
    assert ["none", "-0.500", "-0.500", "to", "-0.500", "-0.500", "to", "-0.500", none_cost] in rows
    assert ["spectral", "32", "5", "3", "3.0000", "0.01", "0.01", "to", "0.01", "yes"] in rows
    assert ["spectral", "+0.100", "+0.100", "to", "+0.100", "+0.100", "to", "+0.100", scaled_cost] in rows
    assert ["none,", "weight_decay=0.2", "-", "-", "-", "-"] in rows
    assert "width 128: the best rate is at the lower end of its grid, which is no result; add lower `rates`" in told.out
    assert (folder / "slopes.png").stat().st_size > 0
    (tmp_path / "it.toml").write_text(SLOPES.replace("{recipe}", str(recipe_file)) + "\n[arms.other]\nseeds = [0]\n")
    (folder / "records.jsonl").unlink()
    assert "runs are open or failed" in command(main, "it.toml", "--slopes").out
    text = SLOPES.replace("{recipe}", str(recipe_file)).replace("[common]", "rates_on_seed = 0\n[common]")
    (tmp_path / "it.toml").write_text(text)
    check_refused(command(main, "it.toml", "--slopes"), "it.toml", "--slopes", "rates_on_seed")
    check_refused(command(main, recipe_file, "--tune", "lr", "--slopes"), "--slopes", "--tune")
