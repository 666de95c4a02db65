"""Evidence: controls against oracles, biographies, tables of records whose answers are known, figures, tiny runs."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.refusals import check_refused
from torch import nn
from transformers import AutoModelForCausalLM

from finetune.evidence import figures, page
from finetune.evidence.arms import differences, read_arms
from finetune.evidence.associative_memory import embeddings, gap_curve, gradient, loss_and_gap, rotation
from finetune.evidence.biographies import QUESTIONS, make_biographies
from finetune.evidence.controls import keep_rounded, round_by_block, round_by_row, round_by_tensor
from finetune.evidence.direction_tables import direction_tables, errors_by_way, long_rows_table
from finetune.evidence.measures import deciles_of
from finetune.evidence.pretrain import main as pretrain_main
from finetune.evidence.rare import main as rare_main
from finetune.evidence.rare_tables import bootstrap, compare, comparison_step, rare_tables
from finetune.evidence.spectra_tables import spectra_tables
from finetune.evidence.tables import (
    ahead_table,
    controls_tables,
    deciles_table,
    family_table,
    gap_at,
    health_table,
    horizons_table,
    parity_tables,
    seeds_needed,
    slopes_tables,
    steps_to,
)
from finetune.models.build import model_config
from finetune.sweep.intervals import interval_of
from finetune.sweep.reading import read_sweep
from finetune.sweep.records import make_record
from muon8bit import Muon8bit, param_groups

ROOT = Path(__file__).resolve().parents[2]


def made(arm, seed, loss, rate=5e-3, **metrics):
    """A record; an infinite loss is one that diverged."""
    status = "finished" if math.isfinite(loss) else "diverged"
    known = {"arm": arm, "rate": rate, "seed": seed, "status": status}
    metrics = {"state_bytes": 2_500_000, "core_seconds": 100.0, "validation_curve": [[0, 7.0]], **metrics}
    return make_record(known, {"val_loss": loss if status == "finished" else None, **metrics})


@pytest.fixture
def arms_of(tmp_path):
    def read(records):
        file = tmp_path / "records.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return read_arms(file)

    return read


def rows_of(table):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {cells[0]: cells[1:] for cells in lines[2:]}


def test_a_momentum_rounded_behind_each_step_is_the_8_bit_optimizer_to_the_bit():
    """The claim that all controls stand on, held against the shipped class."""
    start = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    ends = []
    for bits in (8, 32):
        param = nn.Parameter(start.clone())
        optimizer = Muon8bit([param], lr=0.02, bits=bits, block_size=2048)
        if bits == 32:
            keep_rounded(optimizer, "momentum_buffer", functools.partial(round_by_row, levels=127))
        for step in range(6):
            param.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(step + 1))
            optimizer.step()
        ends.append(param.detach())
    assert torch.equal(*ends)


def test_roundings_have_the_codes_of_a_hand_computation():
    values = torch.tensor([[0.0, 0.0], [7.0, -3.4], [0.1, 0.07]])
    assert round_by_row(values, 7).tolist() == [[0, 0], [7, -3], [pytest.approx(0.1), pytest.approx(0.1 * 5 / 7)]]
    by_tensor = round_by_tensor(values, 7)
    assert by_tensor.tolist() == [[0, 0], [7, -3], [0, 0]]
    moments = torch.tensor([[255.0, 0.4, 3.0], [0.6, 1.0, 0.0]])
    repeated = round_by_block(moments.repeat(700, 2), 255, 4).view(-1, 12)  # blocks of maxima 255, 3 and 1
    assert repeated[0].tolist() == pytest.approx([255, 0, 3, 255, 0.4, 3, 0.6, 1, 0, 0.6, 1, 0])
    assert torch.equal(round_by_block(moments, 255, 4), moments)  # bitsandbytes keeps so few elements in fp32
    assert not round_by_row(torch.zeros(2, 3), 7).any()


def test_biographies_are_as_frequent_as_the_paper_says():
    data = make_biographies(9)
    assert np.bincount(data.groups).tolist() == [1, 1, 2, 4, 8, 16, 32, 64, 128, 256]
    samples = np.bincount(data.samples, minlength=len(data.rows)).reshape(512, 6)
    assert samples.sum() == 16_896
    assert [int(samples[data.groups == g].sum()) for g in range(10)] == [3072, *[1536] * 9]
    assert (samples == data.selections[:, None]).all()
    assert data.hash == make_biographies(9).hash != make_biographies(9, seed=1).hash
    assert [len(classes) for classes in data.measured_classes(64)] == [1, 1, 2, 4, 8, 16, 32, 64, 64, 64]


def test_the_first_token_of_an_answer_is_a_single_one_and_its_question_s_own():
    data = make_biographies(9)
    words = np.array(data.vocabulary)
    assert len(set(data.vocabulary)) == len(data.vocabulary)
    asked = {tuple(row[:at]) for row, at in zip(data.rows.tolist(), data.answer_at.tolist(), strict=True)}
    assert len(asked) == len(data.rows)  # every question has one answer
    sets = [set(data.first_tokens[:, i].tolist()) for i in range(6)]
    assert all(sets[i].isdisjoint(sets[j]) for i in range(6) for j in range(i))
    assert (words[data.rows[np.arange(len(data.rows)), data.answer_at - 1]] == "Answer:").all()
    for i, (name, level) in enumerate(data.chance().items()):
        weighted = [data.selections[data.first_tokens[:, i] == token].sum() for token in sorted(sets[i])]
        favourite = sorted(sets[i])[int(np.argmax(weighted))]
        rare = data.first_tokens[data.groups == 9, i].tolist()
        assert level == {
            "uniform": pytest.approx(1 / QUESTIONS[name][2], abs=1e-5),
            "most_frequent": pytest.approx(rare.count(favourite) / 256, abs=1e-5),
        }
        assert len(sets[i]) <= QUESTIONS[name][2]


def test_sweeps_that_share_records_share_runs():
    """Arms of one name have one recipe, so that no run is refused or repeated."""
    hashes = {}
    for name in ("controls", "horizons"):
        sweep = read_sweep(str(ROOT / "benchmarks" / "sweeps" / f"{name}.toml"))
        assert sweep.records.name == "evidence_4m.jsonl"
        for arm in sweep.arms.values():
            hashes.setdefault(arm.name, []).append(arm.recipe_hash)
    assert [len(of) for name, of in sorted(hashes.items()) if name in ("adamw32", "muon32")] == [2, 2]
    assert all(len(set(of)) == 1 for of in hashes.values())


@pytest.mark.parametrize(
    ("size", "hidden", "both_ends"), [("162m", 84934656, 77194752), ("405m", 301989888, 102926336)]
)
def test_the_ladder_has_the_published_sizes_batch_and_tokens(size, hidden, both_ends):
    sweep = read_sweep(ROOT / "benchmarks" / "sweeps" / f"ladder_{size}.toml")
    for arm in sweep.arms.values():
        recipe = arm.recipe
        assert recipe.batch_size * recipe.gradient_accumulation * recipe.seq_len == 524288
        assert recipe.max_steps * 524288 == pytest.approx(20 * (hidden + both_ends), rel=1e-3)
        assert recipe.warmup_steps == recipe.decay_steps == pytest.approx(recipe.max_steps / 10, abs=1)
        assert recipe.mixed_precision == "bf16"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(recipe))
    groups = param_groups(model, lr=1e-3)
    sizes = [(g["algorithm"], param.numel()) for g in groups for _, param in g["params"] if param.ndim > 1]
    assert sum(number for algorithm, number in sizes if algorithm == "muon") == hidden
    assert sum(number for _, number in sizes) == hidden + both_ends


def test_each_decile_holds_a_tenth_of_the_tokens():
    assert deciles_of([10] * 10).tolist() == list(range(10))
    counts = np.array(
        [0, 1, 1, 98]
    )  # one id has nearly all: it is in the middle, nothing is on either side but the rest
    assert deciles_of(counts).tolist() == [9, 9, 9, 4]


def test_parity_is_told_with_its_interval_and_the_placebo_s_spread(arms_of):
    changes = {"muon32": [0, 0, 0], "muon8_linear": [0.001, 0.002, 0.003], "placebo": [0.002, 0, -0.002]}
    changes["muon8_dynamic"] = [0.02] * 3
    losses = [3.0, 3.1, 2.9]
    arms = arms_of([made(a, s, losses[s] + change) for a, all_of in changes.items() for s, change in enumerate(all_of)])
    rows, losses = map(rows_of, parity_tables(arms).split("\n\n"))
    half = 4.302653 * 0.001 / math.sqrt(3)
    ends = f"{0.002 - half:+.4f} to {0.002 + half:+.4f}"
    assert rows["muon8_linear minus muon32"] == ["3", "+0.0020", "0.0010", ends, "yes", "0.5", "-"]
    assert rows["muon8_dynamic minus muon32"][4] == "no"
    assert rows["muon8_dynamic minus muon8_linear"][:3] == ["3", "+0.0180", "0.0010"]
    assert len(rows) == 4
    assert losses["muon32"] == ["0.005", "3", "3.0000", "0.1000", "2.5", "1.00"]


def test_the_family_is_told_with_its_pairs(arms_of):
    records = [made("normuon32", s, 3.0 + s, core_seconds=100.0 * 4**s) for s in (0, 1)]
    times = (120.0, 600.0, 130.0)  # 1.2 and 1.5 of the first arm's on their seeds; of the third seed it has no run
    records += [made("normuon8", s, 3.5 + s, core_seconds=time) for s, time in enumerate(times)]
    records += [made("adamw", 7, 4.0)]
    rows = rows_of(family_table(arms_of(records)))
    difference = ["normuon32", "+0.5000", "+0.5000 to +0.5000"]
    assert rows["normuon8"] == ["0.005", "3", "4.5000", "1.0000", "2.5", "1.35", *difference]
    assert rows["adamw"][:6] == ["0.005", "1", "4.0000", "-", "2.5", "-"]
    assert rows["adamw"][6:] == ["-", "-", "-"]


def test_which_member_is_ahead_is_said_where_its_interval_leaves_0(arms_of):
    losses = {"adamw": [4.0, 4.1], "muon32": [3.0, 3.1], "normuon32": [2.9, 3.2], "muon8": [3.0], "normuon8": [2.0]}
    arms = arms_of([made(arm, seed, loss) for arm, of in losses.items() for seed, loss in enumerate(of)])
    rows = rows_of(ahead_table(arms))
    assert rows["muon32 minus adamw"] == ["2", "-1.0000", "0.0000", "-1.0000 to -1.0000", "ahead"]
    assert rows["normuon32 minus muon32"][4] == "cannot be told apart"
    assert rows["normuon8 minus muon8"] == ["1", "-1.0000", "-", "-", "cannot be told apart"]
    assert "adamuon32 minus muon32" not in rows


def test_the_spread_of_six_seeds_says_how_many_it_takes():
    """For a spread of .01: 2.110 * .01 / sqrt(18) = .00497, and 2.120 * .01 / sqrt(17) = .00514."""
    pilot = [0.01 * math.sqrt(5 / 6) * sign for sign in (1, -1) * 3]
    assert seeds_needed(dict(enumerate([*pilot, 0.0, 5.0]))) == "18"
    assert seeds_needed(dict(enumerate(pilot[:5]))) == "-"


def test_the_rate_of_an_arm_is_the_one_with_most_seeds(arms_of):
    records = [made("a", 0, 2.0, rate=1.0), made("a", 0, 3.0, rate=2.0), made("a", 1, 3.0, rate=2.0)]
    assert {seed: record["rate"] for seed, record in arms_of(records)["a"].items()} == {0: 2.0, 1: 2.0}
    assert arms_of(records[:2])["a"][0]["rate"] == 1.0


def test_controls_that_do_not_learn_are_counted_and_not_averaged(arms_of):
    records = [made("muon32", s, 3.0) for s in range(3)] + [made("muon32_64", 0, 3.5)]
    records += [made("adamw32", s, 4.0) for s in range(3)]
    records += [made("muon_linear4_row", s, loss) for s, loss in enumerate((3.25, math.inf, 3.25))]
    records += [made("adamw_linear8", s, 4.5) for s in range(3)]
    records += [made("adamw_dynamic8", s, loss) for s, loss in enumerate((687.4, 7.5, 4.125))]
    records += [made("cooldown_adamw32", s, loss) for s, loss in enumerate((math.inf, 3.0))]
    records += [made("cooldown_adamw8", s, 3.5) for s in range(2)]
    arms = arms_of(records)
    rows, losses = map(rows_of, controls_tables(arms).split("\n\n"))
    assert rows["muon_linear4_row"][:3] == ["muon32", "3", "+0.2500"]
    assert rows["muon_linear4_row"][-1] == "1"
    assert rows["adamw_linear8"][:3] == ["adamw32", "3", "+0.5000"]
    assert rows["adamw_dynamic8"][:3] + rows["adamw_dynamic8"][-1:] == ["adamw32", "3", "+0.1250", "2"]
    assert rows["cooldown_adamw8"][:3] + rows["cooldown_adamw8"][-1:] == ["cooldown_adamw32", "2", "+0.5000", "0"]
    assert set(rows) == {"muon_linear4_row", "adamw_linear8", "adamw_dynamic8", "cooldown_adamw8"}
    assert losses["muon_linear4_row"][1:3] == ["2", "3.2500"]
    assert set(losses) == {*rows, "muon32", "adamw32", "cooldown_adamw32"}
    assert interval_of(differences(arms, "muon_linear4_row", "muon32")) is None


def test_steps_to_a_loss_lie_on_a_line_over_log_steps():
    curve = [(64.0, 4.0), (256.0, 3.0), (320.0, 2.9)]
    assert steps_to(curve, 3.5) == pytest.approx(128)
    assert steps_to(curve, 3.0) == pytest.approx(256)
    assert steps_to(curve, 4.1) is None
    assert steps_to(curve, 2.0) is None


def test_horizons_are_shares_of_adamw_s_steps_and_flops(arms_of):
    def run(arm, seed, loss, steps, per_step):
        tokens = {"steps": steps, "tokens": 100 * steps, "flops_per_token": 10, "optimizer_flops_per_step": per_step}
        return made(arm, seed, loss, **tokens)

    records = [run("adamw32", s, 3.5, 320, 0) for s in (0, 1)]
    records += [run(f"muon32_{n}", s, loss, n, 250) for s in (0, 1) for n, loss in ((256, 3.0), (64, 4.0))]
    rows = rows_of(horizons_table(arms_of(records)))
    assert rows == {"adamw32": ["muon32", "2 of 2", "128", "12,800", "40% +- 0%", "50% +- 0%"]}
    assert horizons_table(arms_of(records[:2])) == ""
    more = [run("adamw32", 2, 3.5, 320, 0)]  # of a seed that Muon has no run of: it says nothing of reaching
    assert rows_of(horizons_table(arms_of([*records, *more]))) == rows
    more += [run("muon32_64", 2, 3.9, 64, 250)]
    assert rows_of(horizons_table(arms_of([*records, *more])))["adamw32"][1] == "2 of 3"
    more += [run("muon32_32", 0, 4.5, 32, 250)]  # one more length, that not all seeds have run
    assert rows_of(horizons_table(arms_of([*more[1:][::-1], *records, more[0]])))["adamw32"][1] == "2 of 3"
    wider = [run("adamw32_init", 0, 3.0, 320, 0), run("adamw32_init", 1, 2.9, 320, 0)]
    rows = rows_of(horizons_table(arms_of([*records, *wider])))
    assert rows["adamw32_init"] == ["muon32", "1 of 2", "256", "25,600", "80%", "100%"]
    whole = [run("muon32", 1, 2.8, 400, 250), run("muon32", 2, 2.8, 400, 250)]  # seed 2 has no shorter run
    rows = rows_of(horizons_table(arms_of([*records, *wider, *more[:1], *whole])))
    assert rows["adamw32_init"][1:3] == ["2 of 2", f"{(256 + math.sqrt(256 * 400)) / 2:.0f}"]
    assert rows["adamw32"][1] == "2 of 2"


def test_losses_by_decile_are_paired(arms_of):
    by = {"muon32": [1.0] * 9 + [None], "muon8_linear": [1.5] * 7 + [1.2, 1.4, None]}
    made_of = [made(arm, s, 3.0, loss_by_decile=v, ids_by_decile=[7] * 10) for arm, v in by.items() for s in (0, 1)]
    rows = rows_of(deciles_table(arms_of(made_of)))
    assert rows["1"] == rows["7"] == ["7", "+0.5000 +- 0.0000"]
    assert rows["10"] == ["7", "-"]
    assert rows["1 to 7"] == ["49", "+0.5000 +- 0.0000"]
    assert rows["8 to 10"] == ["21", "-"]
    assert deciles_table(arms_of([made("muon8_linear", 0, 3.0)])) == ""


def rare_records():
    """Four groups of 1, 1, 2 and 4 measured classes at two steps; muon32 knows half of the rarest, muon8 a third."""
    right = {"adamw": ("2", "00", "0000"), "muon32": ("6", "33", "3333"), "muon8": ("6", "33", "2222")}
    chance = {"date": {"uniform": 0.1, "most_frequent": 0.2}}
    for arm, digits in right.items():
        for seed in range(2):
            later = ["6", "4", "63", digits[2]]
            curve = [[50, ["6", *digits]], [100, later]]
            yield made(arm, seed, 1.0, first_token_correct=curve, chance=chance)


def test_rare_groups_are_compared_where_adamw_passes_one_half(arms_of):
    arms = arms_of(rare_records())
    assert comparison_step(arms) == 100  # of group 1 of 0 to 3: 2 of 6 right, and then 4
    mean, low, high = compare(arms, "muon8", "muon32", 100, -1)
    assert (mean, low, high) == (pytest.approx(-1 / 6), pytest.approx(-1 / 6), pytest.approx(-1 / 6))
    text = rare_tables(arms)
    assert "| muon32 | 0.005 | 2 | 1.000 | 0.667 | 0.750 | 0.500 (0.500 to 0.500) |" in text
    assert "| muon8 minus muon32 | -0.167 | -0.167 to -0.167 | yes |" in text
    assert "| date | 0.100 | 0.200 |" in text
    part = [{**record, "arm": "muon32_vo_ffn"} for record in rare_records() if record["arm"] == "muon8"]
    assert "| muon32_vo_ffn minus adamw | +0.333 | +0.333 to +0.333 | yes |" in rare_tables(
        arms_of([*rare_records(), *part])
    )
    wider = [{**record, "arm": "adamw_init"} for record in rare_records() if record["arm"] == "muon32"]
    assert "| adamw_init minus adamw | +0.500 | +0.500 to +0.500 | yes |" in rare_tables(
        arms_of([*rare_records(), *wider])
    )


def test_an_adamw_that_stays_below_one_half_is_said(arms_of):
    records = [made("adamw", 0, 1.0, first_token_correct=[[50, ["6", "2", "11", "0000"]]], chance={})]
    assert rare_tables(arms_of(records)).startswith("AdamW does not pass one half.\n\nAt the last step, 50:")


def test_spectra_are_means_over_seeds_at_the_last_step_that_all_have(arms_of):
    def spectra(entropy, steps=(5, 10)):
        measures = {"entropy": entropy, "effective_rank": 7.0, "top_energy": 0.75, "quartile_ratio": 2.0}
        kinds = {"weights": {"QK": measures, "W_out": measures}, "updates": {"QK": measures}}
        return [[step, kinds] for step in steps]

    records = [made("muon32", seed, 3.0, spectra=spectra(0.5 + seed / 4)) for seed in (0, 1)]
    last = spectra(0.25, (5, 10, 15))
    last[1][1].pop("updates")
    records += [made("muon8", 0, 3.0, spectra=last), made("adamw", 0, 3.0)]
    records += [made("muon8", 1, math.inf, spectra=spectra(0.125))]
    text = spectra_tables(arms_of(records))
    weights, updates = text.split("\n\n")
    assert weights.startswith("| weights at step 10 | group | muon32 | muon8 |\n")
    assert "| normalized SVD entropy | QK | 0.625 ± 0.18 | 0.25 |\n" in weights
    assert "| energy of the 10 largest | W_out | 0.75 ± 0 | 0.75 |\n" in weights
    assert updates.splitlines()[0] == "| updates at step 10 | group | muon32 |"
    assert "| effective rank | QK | 7 ± 0 |\n" in updates
    assert "W_out" not in updates
    assert "adamw" not in text
    assert spectra_tables(arms_of(records[3:4])) == ""


def test_errors_of_the_direction_are_told_by_kind_and_by_the_choice_of_a_codebook():
    def of(model, phase, kind, linear, dynamic):
        def values(error):
            return [None] * 5 + [error, None, None]

        both = {"linear 64": values(linear / 2), "linear 256": values(linear), "dynamic 64": values(dynamic)}
        return {"model": model, "phase": phase, "kind": kind, "values": both}

    matrices = [of("a", "warm-up", "q", 0.1, 0.3), of("a", "warm-up", "MLP out", 0.1, 0.2)]
    matrices += [of("a", "end", "q", 0.2, 0.4), of("a", "end", "MLP out", 0.6, 0.3)]
    text = direction_tables(matrices)
    assert "| q | 8% (10%) | 15% (20%) | 15% (20%) | 35% (40%) | 35% (40%) | 35% (40%) |" in text
    found = {way: [error for _, error in errors] for way, errors in errors_by_way(matrices).items()}
    assert list(found.values()) == [[0.2, 0.6], [0.4, 0.3], [0.2, 0.3], [0.2, 0.6], [0.2, 0.3]]


def test_slopes_are_of_the_seeds_that_are_done(tmp_path):
    """Losses are parabolas over log2 of the rate, whose minima fall by half an octave a doubling without a rule."""
    sweep, file = read_sweep(str(ROOT / "benchmarks" / "sweeps" / "transfer.toml")), tmp_path / "transfer.jsonl"
    records = []
    for arm in sweep.arms.values():
        at = -7 - (math.log2(int(arm.name[-3:].strip("_")) / 256) / 2 if arm.name.startswith("none") else 0)
        for rate in arm.rates:
            loss = 3 + (math.log2(rate) - at) ** 2 / 8
            runs = [made(arm.name, seed, loss + seed, rate) for seed in (0, 1)]
            records += [run | {"recipe_hash": arm.recipe_hash} for run in runs]
    lost = records.pop()
    assert lost["seed"] == 1
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    text = page.table_text("transfer", tmp_path)
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(("| none", "| spectral"))]
    assert cells[0][:5] == ["none", "64", "6", "1", "3.0000"]
    assert [float(of[5]) for of in cells[:6]] == pytest.approx([2**-6, 2**-6.5, 2**-7, *[2**-7] * 3], rel=1e-3)
    assert [float(of[1]) for of in cells[6:]] == pytest.approx([-0.5, 0], abs=1e-3)
    assert [float(of[-1]) for of in cells[6:]] == pytest.approx([1 / 8, 0], abs=1e-3)  # an octave beside the minimum
    transfer = page.TABLES["transfer"]
    first, *others = transfer.draw(transfer.read(file)).axes
    assert "nats per token" in first.get_ylabel()
    assert all(axes.get_xlabel() == "learning rate" for axes in (first, *others))
    curves = [one for one in first.lines if not one.get_label().startswith("_")]
    assert len({(one.get_linestyle(), one.get_marker()) for one in curves}) == len(curves) == 3
    file.write_text(json.dumps(records[0]) + "\n")
    assert page.table_text("transfer", tmp_path).startswith(page.NOT_MEASURED)
    assert slopes_tables([]) == ""


def test_blocks_up_to_a_long_row():
    def of(cols, **errors):
        values = {name.replace("_", " "): [None] * 5 + [error] for name, error in errors.items()}
        return {"kind": "q", "cols": cols, "values": values}

    matrices = [of(2048, linear_64=0.9), of(4096, linear_64=0.1, linear_4096=0.2, dynamic_2048=0.3, dynamic_64=0.4)]
    columns = "linear 64 | linear 256 | linear 2048 | linear 4096 | linear 8192 | dynamic 64 |"
    text = long_rows_table(matrices)
    assert text.startswith(f"| kind, columns | {columns}")
    (row,) = text.splitlines()[2:]
    shown = [f"{error}% ({error}%)" for error in (10, 10, 10, 20, 20, 40, 40, 30, 30, 30)]
    assert row == f"| q, 4096 | {' | '.join(shown)} |"


def test_the_worst_matrix_of_a_watched_run_is_the_one_nearest_to_its_threshold(arms_of):
    def of(descent, least=0.97):
        return {"descent": descent, "min_descent": least, "update_cosine": 0.5, "step": 40}

    health = {"worst": {"q": of(0.98), "k": of(0.9, 0.8)}, "warnings": {}, "num_steps": 320}
    records = [made("muon8", 0, 3.0, health=health), made("muon8", 1, math.inf, health=health), made("adamw", 0, 3.0)]
    health = health | {"worst": {"q": of(0.96)}, "warnings": {"q": "it loses"}}
    rows = health_table(arms_of([*records, made("muon8", 2, 3.0, health=health)])).splitlines()[2:]
    assert rows[0] == "| muon8 | 0 | 320 | q | 40 | 0.98 | 0.97 | 0.5 | none |"
    assert rows[1:] == ["| muon8 | 2 | 320 | q | 40 | 0.96 | 0.97 | 0.5 | q |"]


def test_the_bootstrap_draws_classes_and_seeds():
    """Against the normal interval of a mean whose parts vary by class alone, and by seed alone."""
    rng = np.random.default_rng(0)
    by_class = np.tile(rng.normal(size=400), (5, 1))
    low, high = bootstrap(by_class)
    half = 1.96 * by_class[0].std() / 20
    assert low == pytest.approx(by_class.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(by_class.mean() + half, abs=0.15 * half)
    assert bootstrap(np.repeat([[0.0], [1.0]], 400, axis=1)) == (0.0, 1.0)  # a quarter of the draws has one seed twice


def test_rotations_and_signs_of_the_memory_are_the_paper_s():
    """Theorem 5.3's matrix: signs of the update's diagonal blocks, with overlapping supports."""
    keys, values = embeddings(300, coupled=True)
    assert torch.allclose(keys.T @ keys, torch.eye(300, dtype=torch.float64), atol=1e-12)
    grad = gradient(keys, values, torch.full((300,), 1 / 300, dtype=torch.float64))
    assert (-grad.sign())[:3, :3].tolist() == [[1, -1, -1], [1, -1, 1], [-1, -1, -1]]
    product = rotation(3.638, 2.949, 5.218).T @ (-grad.sign())[:3, :3] @ rotation(1.715, 0.876, 3.098)
    assert float(product[0, 0]) == pytest.approx(1.46552253, abs=1e-6)
    assert float(product[2, 2]) == pytest.approx(1.54147329, abs=1e-6)


def test_the_gradient_of_the_memory_is_autograd_s_and_its_gap_that_of_the_theorem():
    keys, values = embeddings(30, coupled=False)
    p = torch.tensor([0.1] * 6 + [0.4 / 24] * 24, dtype=torch.float64)
    W = torch.zeros(30, 30, dtype=torch.float64, requires_grad=True)
    loss = -(p * (values.T @ W @ keys).log_softmax(0).diagonal()).sum()
    loss.backward()
    grad = gradient(keys, values, p)
    assert torch.allclose(W.grad, grad, atol=1e-15)
    at, gap = loss_and_gap(-40 * grad, p)
    right = [math.exp(40 * q) / (math.exp(40 * q) + 29) for q in (0.1, 0.4 / 24)]
    assert gap == pytest.approx(right[0] - right[1])
    assert at == pytest.approx(-0.6 * math.log(right[0]) - 0.4 * math.log(right[1]))
    curve = gap_curve(torch.eye(30, dtype=torch.float64), keys, values, p)
    assert max(gap for _, gap in curve) == 0
    assert gap_at([[3.0, 0.0], [1.0, 0.5]], 2.0) == pytest.approx(0.25)


FIGURES = {
    "parity": lambda arms: figures.parity_figure(arms, "2M parameters"),
    "rare": figures.rare_figure,
    "horizons": figures.horizons_figure,
    "spectra": figures.spectra_figure,
    "deciles": lambda arms: figures.deciles_figure(arms, "2M parameters"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_axes_have_labels_and_lines_differ_in_style(arms_of, name):
    records = list(rare_records())
    even = [[7, {"weights": {group: {"entropy": 0.5} for group in figures.MEMORIES}}]]
    for arm in ("muon32_64", "muon32_96", "muon8_64", "muon8_96", "adamw32", "muon32", "muon8_linear", "placebo"):
        own = [] if name == "rare" else [0, 1]
        tokens = {"steps": int(arm[-2:]) if arm[-2:].isdigit() else 7}
        tokens |= {"loss_by_decile": [1.0, 2.0] * 5, "spectra": even}
        records += [made(arm, s, 3.0 + s, rate=1.0, **tokens) for s in own]
    records = [r for r in records if name == "rare" or r["rate"] == 1.0]
    figure = FIGURES[name](arms_of(records))
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert {t.get_fontsize() for t in (axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels())} == {10}
        curves = [one for one in axes.lines if not one.get_label().startswith("_")]
        looks = [(one.get_linestyle(), str(one._unscaled_dash_pattern), one.get_marker()) for one in curves]
        assert len(set(looks)) == len(looks) >= 2
        if "loss" in axes.get_ylabel():
            assert "nats per token" in axes.get_ylabel()


def test_the_page_is_what_its_records_make(tmp_path):
    """All tables of the docs' page, out of the committed records; what has none is said to be not measured."""
    text = (ROOT / "docs" / "results" / "evidence.md").read_text()
    assert page.filled(text) == text
    assert all(f"<!-- begin {name} -->" in text for name in page.TABLES)
    (tmp_path / "rare.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rare_records()))
    made_anew = page.filled("a\n<!-- begin rare -->old<!-- end rare -->\nb", tmp_path)
    assert "| muon8 minus muon32 | -0.167 |" in made_anew
    assert "(../records/rare.jsonl)" in made_anew
    assert "old" not in made_anew
    (tmp_path / "rare.jsonl").unlink()
    assert (
        page.table_text("rare", tmp_path) == "Not measured yet: `python -m finetune.sweep benchmarks/sweeps/rare.toml`."
    )


def test_the_command_refuses_what_has_no_table(command, tmp_path):
    (tmp_path / "odd.jsonl").touch()
    check_refused(command(page.main, tmp_path / "odd.jsonl"), "FILE", "odd.jsonl", "parity_2m.jsonl")
    check_refused(command(page.main, tmp_path / "none.jsonl"), "FILE", "there is no file")
    (tmp_path / "page.md").write_text("<!-- begin nothing --> <!-- end nothing -->")
    check_refused(command(page.main, "--page", tmp_path / "page.md"), "--page", "'nothing'", "parity")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--control", "placebo"), ("--control", "--optimizer muon8bit --bits 32")),
        (("--control", "adamw-linear8"), ("--control", "--optimizer adamw")),
        (("--optimizer", "adamw", "--no-nesterov"), ("--no-nesterov", "adamw")),
        (("--adjust-lr-fn", "original"), ("--adamw-lr", "original")),
        (("--dynamic-mlp-out", "--optimizer", "muon8bit", "--bits", 32), ("--dynamic-mlp-out", "--bits 8")),
        (("--dynamic-mlp-out", "--optimizer", "adamw"), ("--dynamic-mlp-out", "--optimizer muon8bit")),
    ],
)
def test_options_that_contradict_each_other_are_refused(command, recipe_file, options, words):
    check_refused(command(pretrain_main, "--recipe", recipe_file, *options), *words)


def test_biographies_take_no_text(command, recipe_file):
    check_refused(command(rare_main, "--recipe", recipe_file), "--dataset", "leave it out")


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def test_a_placebo_moves_a_run_a_little_and_resuming_perturbs_nothing_again(command, recipe_file, tmp_path):
    def run(name, *options):
        base = ("--recipe", recipe_file, "--bits", 32, "--output-dir", tmp_path / name, *options)
        return command(pretrain_main, *base)

    assert run("plain").code == 0
    assert run("placebo", "--control", "placebo").code == 0
    apart = [
        (a - b).abs().max()
        for a, b in zip(*(weights(tmp_path / n).values() for n in ("plain", "placebo")), strict=True)
    ]
    assert 0 < max(apart) < 1e-3
    assert run("half", "--control", "placebo", "--max-steps", 6).code == 0
    for gone in ("result.json", "checkpoints/step-0000006"):
        path = tmp_path / "half" / gone
        path.unlink() if path.is_file() else shutil.rmtree(path)
    assert command(pretrain_main, "--resume", tmp_path / "half").code == 0
    assert all(
        torch.equal(a, b) for a, b in zip(*(weights(tmp_path / n).values() for n in ("half", "placebo")), strict=True)
    )
    result = json.loads((tmp_path / "plain" / "result.json").read_text())
    per_token = zip(result["loss_by_decile"], result["targets_by_decile"], strict=True)
    total = sum(loss * n for loss, n in per_token if n)
    assert total / sum(result["targets_by_decile"]) == pytest.approx(result["val_loss"], rel=1e-4)
    assert sum(result["ids_by_decile"]) == 288
    square, wide = 4 * (20 * 32**3 + 10 * 32**3), 3 * (20 * 32**2 * 64 + 10 * 32**3)
    assert result["optimizer_flops_per_step"] == 2 * (square + wide)


def test_the_second_moment_of_a_run_is_kept_in_codes(command, recipe_file, tmp_path):
    control = ("--optimizer", "adamw", "--control", "adamw-linear8", "--max-steps", 2, "--output-dir", tmp_path / "run")
    assert command(pretrain_main, "--recipe", recipe_file, *control).code == 0
    state = torch.load(tmp_path / "run" / "checkpoints" / "step-0000002" / "optimizer.bin")["state"]
    are_rounded = {}
    for moments in (of["exp_avg_sq"].flatten() for of in state.values()):
        codes = torch.cat([block / block.max().clamp(min=1e-30) * 255 for block in moments.split(256)])
        are_rounded.setdefault(moments.numel() >= 4096, []).append(torch.allclose(codes, codes.round(), atol=1e-3))
    assert all(are_rounded[True])
    assert not any(are_rounded[False])


def muon_groups(recipe_file, **options):
    """The model of a recipe with further options, and Muon's groups of its optimizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune.config.recipe import read_recipe
    from finetune.evidence.controls import build_control
    from finetune.evidence.options import EvidenceRecipe

    recipe = dataclasses.replace(read_recipe(str(recipe_file), EvidenceRecipe), **options)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**recipe.model))
    (optimizer,) = build_control(model, recipe)
    return model, [group for group in optimizer.param_groups if group["algorithm"] == "muon"]


@pytest.mark.parametrize("muon_on", ["all", "vo-ffn", "qk"])
def test_muon_trains_the_matrices_that_it_is_told_to(recipe_file, muon_on):
    model, groups = muon_groups(recipe_file, muon_on=muon_on, nesterov=False)
    trained = {id(param) for group in groups for param in group["params"]}
    names = {name.split(".")[-2] for name, param in model.named_parameters() if id(param) in trained}
    mlp, vo, qk = {"gate_proj", "up_proj", "down_proj"}, {"v_proj", "o_proj"}, {"q_proj", "k_proj"}
    assert names == {"all": mlp | vo | qk, "vo-ffn": mlp | vo, "qk": qk}[muon_on]
    assert not any(group["nesterov"] for group in groups)


def test_output_projections_of_mlps_alone_get_dynamic_codes(recipe_file):
    _, groups = muon_groups(recipe_file, dynamic_mlp_out=True)
    codebooks = {name: group["codebook"] for group in groups for name in group["param_names"]}
    assert {codebooks[name] for name in codebooks if "down_proj" in name} == {"dynamic"}
    assert {codebooks[name] for name in codebooks if "down_proj" not in name} == {"linear"}


def test_a_run_on_biographies_counts_right_first_tokens(command, tmp_path):
    config = ROOT / "benchmarks" / "sweeps" / "rare.yaml"
    small = ("--groups", 2, "--max-steps", 40, "--eval-every", 20, "--save-every", 40, "--lr", 1e-2, "--batch-size", 24)
    small += ("--spectra-every", 20)
    assert command(rare_main, "--recipe", config, *small, "--output-dir", tmp_path / "run").code == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    curve = dict(result["first_token_correct"])
    assert sorted(curve) == sorted(step for step, _ in result["spectra"]) == [20, 40]
    assert [len(digits) for digits in curve[40]] == [1, 1, 2]
    assert curve[40][0] == "6"  # it is asked for four times a pass
    assert set(result["chance"]) == set(QUESTIONS)
