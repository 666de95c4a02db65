"""The page of runs: its figures have the values of the files, and a browser shows it without network or script."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from helpers.refusals import check_refused

from finetune.page.command import main
from finetune.page.figures import CURVES, band, draw_figures
from finetune.page.runs import read_lines
from finetune.storage.plots import MOST_LINES

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
VOID = {"meta", "br", "link"}


@pytest.fixture
def page(command):
    return functools.partial(command, main)


class Page(HTMLParser):
    """Elements with their attributes, and the text; checks that tags are closed in their order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and "style" not in self.open:
            self.texts.append(data.strip())

    def figures(self):
        """Heading of a figure -> its alternative text."""
        alts = [attrs["aria-label"] for tag, attrs in self.tags if tag == "svg"]
        titles = [text for i, text in enumerate(self.texts) if text in TITLES]
        assert len(alts) == len(titles)
        return dict(zip(titles, alts, strict=True))


TITLES = {figure.title for figure in CURVES} | {
    *("Loss by learning rate", "Optimizer state", "Peak of memory", "Step time"),
}


def read_page(path):
    return Page(path.read_text(encoding="utf-8"))


def write_run(folder, losses, complete=True, seed=0, lr=0.01, more=None, **options):
    """A run of 2 s for the first step and 0.25 s for each other one, with a validation loss at the end."""
    folder.mkdir(parents=True)
    recipe = {"name": folder.name, "optimizer": "muon8bit", "lr": lr, "seed": seed, "max_steps": len(losses), **options}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    lines = [
        {"step": i, "loss": loss, "lr": lr / i, "grad_norm": 1.0, "val_loss": None, "tokens": 100 * i}
        | {"seconds": 2 + 0.25 * (i - 1), **{key: values[i - 1] for key, values in (more or {}).items()}}
        for i, loss in enumerate(losses, 1)
    ]
    lines[-1]["val_loss"] = losses[-1] + 0.5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {"script": "pretrain", "torch": "2.13.0", "corpus": "c" * 64, "val_loss_before": 9.0}
    (folder / "run.json").write_text(json.dumps(facts))
    if complete:
        (folder / "result.json").write_text(json.dumps({"step": len(losses), "peak_bytes": 3 * 2**20}))
        (folder / "state_report.json").write_text(json.dumps({"total_bytes": 2**21}))


def write_records(file, losses):
    """Records of a sweep: (arm, rate, seed) -> loss, None for a run that diverged."""
    lines = []
    for (arm, rate, seed), loss in losses.items():
        metrics = {"val_loss": loss, "steps": 4, "tokens": 400, "state_bytes": 2**20, "seconds": 4.0}
        metrics |= {"training_curve": [[2, 5.0 + seed], [4, loss]], "step_seconds": [[1, 1.0], [2, 1.5], [4, 2.5]]}
        metrics |= {"validation_curve": [[0, 9.0], [4, loss]]}
        known = {"sweep": "s", "arm": arm, "rate": rate, "seed": seed, "recipe": "r", "options": {"optimizer": arm}}
        known |= {"status": "diverged" if loss is None else "finished", "versions": {"torch": "2.13.0"}}
        known |= {"script": "pretrain", "commit": None, "threads": 1, "data_hash": "d" * 64, "metrics": metrics}
        lines.append(json.dumps(known) + "\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines))


SWEEP = {
    ("muon", 0.01, 0): 3.0,
    ("muon", 0.01, 1): 3.5,
    ("muon", 0.02, 0): 2.75,
    ("adamw", 0.001, 0): 4.0,
    ("adamw", 0.002, 0): None,
}


def test_a_page_of_a_run_has_its_values_and_no_empty_figure(page, tmp_path):
    write_run(tmp_path / "it", [5.0, 4.0, 3.0])
    outcome = page("it")
    assert outcome.code == 0, outcome.err
    found = read_page(tmp_path / "page.html")
    figures = found.figures()
    assert list(figures) == [
        *("Validation loss", "Training loss", "Learning rate", "Gradient norm"),
        *("Optimizer state", "Peak of memory", "Step time"),
    ]
    assert "it: 9 at step 0, 3.5 at step 3" in figures["Validation loss"]
    assert "it: 0.01 at step 1, 0.003333 at step 3" in figures["Learning rate"]
    assert "it: 2." in figures["Optimizer state"]
    assert "it: 250." in figures["Step time"]
    row = found.texts[found.texts.index("status") + 1 :][:11]
    assert row == ["it", "muon8bit", "0", "3", "3.0000", "3.5000", "400", "250.0", "2.0 MiB", "3.0 MiB", "finished"]
    assert "2.13.0" in found.texts


def test_a_run_that_is_not_complete_has_no_figure_of_what_it_does_not_tell(page, tmp_path):
    write_run(tmp_path / "it", [5.0], complete=False)
    assert page("it", "--output", "here.html", "--title", "a <b> & c").code == 0
    found = read_page(tmp_path / "here.html")
    assert list(found.figures()) == ["Validation loss", "Training loss", "Learning rate", "Gradient norm"]
    assert found.texts.count("a <b> & c") == 2
    assert "not complete" in found.texts


def test_lines_differ_in_style_and_what_only_one_run_has_is_drawn_with_units(tmp_path):
    for i in range(6):
        write_run(tmp_path / f"run{i}", [5.0, 4.0], complete=i == 0, weight_decay=i / 10)
    load = {"expert_load_cv": [0.5, 0.25], "expert_share_min": [0.0, 0.125], "expert_share_max": [0.5, 0.25]}
    health = {"a": {"descent": 0.99, "sign_flips": 0.01}, "b": {"descent": 0.97, "sign_flips": 0.02}}
    load |= {"dead_experts": [None, {"0": [1, 2], "3": [4]}], "health": [None, health]}
    of_groups = {group: {"entropy": value, "top_energy": 0.5} for group, value in (("QK", 0.75), ("VO", 0.875))}
    load |= {"spectra": [None, {"weights": of_groups}]}
    write_run(tmp_path / "moe", [5.0, 4.0], more=load)
    figures = {figure.title: figure.svg for figure in draw_figures(read_lines([str(tmp_path)]))}
    assert "moe: 0.5 at step 1, 0.25 at step 2" in figures["Expert load"]
    assert "moe: 0.125 to 0.25 at step 2" in figures["Shares of experts"]
    assert "moe: 3 at step 2" in figures["Dead experts"]
    assert "moe: 0.97 at step 2" in figures["Descent kept in 8 bits"]
    assert "moe: 0.02 at step 2" in figures["Flipped signs"]
    assert "moe, QK: 0.75 at step 2; moe, VO: 0.875 at step 2" in figures["Entropy of weights"]
    assert not {"z-loss", "Codes that are 0", "Entropy of updates"} & set(figures)
    paths = ET.fromstring(figures["Training loss"]).iter("{http://www.w3.org/2000/svg}path")
    curves = [style for path in paths if "stroke-width: 1.5" in (style := path.get("style", ""))]
    assert len({re.sub(r"stroke: #\w+;?", "", style) for style in curves}) == 7
    assert len(set(curves)) == 7
    texts = {title: set(ET.fromstring(svg).itertext()) for title, svg in figures.items()}
    labels = {"Training loss": "training loss (nats per token)", "Optimizer state": "state (MiB)"}
    labels |= {"Step time": "step time (ms)", "Peak of memory": "peak (MiB)", "Learning rate": "learning rate"}
    assert all(label in texts[title] for title, label in labels.items())
    assert "step" in texts["Training loss"]


@pytest.mark.parametrize("dead", [[0, 0], [0, 1]])
def test_steps_and_counts_have_whole_ticks(tmp_path, dead):
    write_run(tmp_path / "moe", [5.0, 4.0], more={"dead_experts": [{"0": list(range(num))} for num in dead]})
    figures = {figure.title: figure.svg for figure in draw_figures(read_lines([str(tmp_path)]))}
    ticks = [text for text in ET.fromstring(figures["Dead experts"]).itertext() if re.fullmatch(r"[\d.\u2212]+", text)]
    assert {"1", "2"} <= set(ticks)
    assert all(text.isdigit() for text in ticks), ticks


def test_a_loss_of_routers_that_was_not_asked_for_is_not_drawn(tmp_path):
    """Runs wrote 0 for the one of both that was not added."""
    losses = {"aux_loss": [1.25, 1.0], "z_loss": [0.0, 0.0]}
    write_run(tmp_path / "moe", [5.0, 4.0], more=losses, router_aux_loss=0.01, router_z_loss=0.0)
    curves = read_lines([str(tmp_path)])[0].runs[0].curves
    assert curves["aux_loss"] == ([1, 2], [1.25, 1.0])
    assert "z_loss" not in curves


def test_runs_that_differ_in_the_seed_alone_are_one_line_with_a_band(page, tmp_path):
    for seed in range(3):
        write_run(tmp_path / "runs" / f"muon-seed{seed}", [5.0, 4.0, 3.0 + seed], seed=seed)
    write_run(tmp_path / "runs" / "adamw", [5.0, 4.5, 4.0], optimizer="adamw")
    lines = read_lines([str(tmp_path / "runs")])
    assert {line.name: [run.seed for run in line.runs] for line in lines} == {"adamw": [0], "muon": [0, 1, 2]}
    assert band(lines[1].runs, "val_loss") == [(0, 9.0, 9.0, 9.0), (3, 4.5, 3.5, 5.5)]
    assert page("runs").code == 0
    found = read_page(tmp_path / "page.html")
    assert "muon: 9 at step 0, 4.5 at step 3" in found.figures()["Validation loss"]
    assert "4.5000 ± 1.0000" in found.texts  # the sample's deviation of 3.5, 4.5, 5.5
    assert "3 (0 to 2)" in found.texts
    differ = found.texts[found.texts.index("Options that differ") :]
    assert differ[1:7] == ["run", "optimizer", "adamw", "adamw", "muon", "muon8bit"]


def test_a_step_that_one_run_does_not_have_is_in_no_band_and_what_is_not_finite_is_a_gap(tmp_path):
    write_run(tmp_path / "seed0", [5.0, 4.0, 3.0])
    write_run(tmp_path / "seed1", [6.0, float("nan")], seed=1, max_steps=3)
    (line,) = read_lines([str(tmp_path)])
    (first, second) = band(line.runs, "loss")
    assert first == (1, 5.5, 5.0, 6.0)
    assert second[0] == 2
    assert all(value != value for value in second[1:])


def test_a_sweep_draws_each_arm_at_its_best_rate_and_losses_by_rate(page, tmp_path):
    write_records(tmp_path / "sweep" / "records.jsonl", SWEEP)
    outcome = page("sweep")
    assert outcome.code == 0, outcome.err
    found = read_page(tmp_path / "page.html")
    figures = found.figures()
    # 0.01 has two seeds, 0.02 one.
    assert "muon, lr 0.01: 9 at step 0, 3.25 at step 4; adamw, lr 0.001: 9 at" in figures["Validation loss"]
    assert "muon: lowest 2.75 at 0.02; adamw: lowest 4 at 0.001" in figures["Loss by learning rate"]
    assert "muon, lr 0.01: 500" in figures["Step time"]
    assert "Learning rate" not in figures
    assert {"muon, lr 0.02", "adamw, lr 0.002", "diverged"} <= set(found.texts)
    page("sweep/records.jsonl", "--output", "again.html")
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "page.html").read_bytes()
    check_needs_nothing(found, (tmp_path / "page.html").read_text())


def test_labels_of_near_learning_rates_do_not_overlap(page, tmp_path):
    """Twelve rates, as of a grid that narrows: the labels that are there stand apart, and the outermost are there."""
    wide, narrow = [0.00125 * 2**i for i in range(7)], [0.02148, 0.03038, 0.04296, 0.06075]
    losses = {("a", rate, 0): 4.0 for rate in wide} | {("b", rate, 0): 4.0 for rate in narrow}
    write_records(tmp_path / "sweep" / "records.jsonl", losses)
    page("sweep")
    svg = next(
        text
        for text in re.findall(r"<svg.*?</svg>", (tmp_path / "page.html").read_text(), re.S)
        if "by learning" in text
    )
    shown = {float(text) for text in re.findall(r">(0\.0\d+)</text>", svg)}
    labels = sorted(shown & {*wide, *narrow})
    assert (labels[0], labels[-1]) == (0.00125, 0.08)
    assert all(high / low > 1.3 for low, high in itertools.pairwise(labels))


def check_needs_nothing(found, text):
    """Nothing that a browser would fetch or run, and no reference to an element that is not there."""
    assert not {"script", "link", "img", "image", "iframe", "object"} & {tag for tag, _ in found.tags}
    for _, attrs in found.tags:
        for key, value in attrs.items():
            assert key.startswith("xmlns") or "//" not in (value or ""), (key, value)
            assert not key.startswith("on")
            assert "href" not in key or value.startswith("#")
    assert "@import" not in text
    assert "@media print" in text
    clips = re.findall(r"url\(#([^)]*)\)", text)
    assert clips
    assert all(f'id="{name}"' in text for name in clips)


def test_the_folders_of_a_sweeps_runs_are_read_as_its_arms(tmp_path, capsys):
    for rate in (0.01, 0.02):
        write_run(tmp_path / "sweep" / "runs" / f"muon-lr{rate:g}-seed0", [5.0, 4.0 + rate], lr=rate)
    write_run(tmp_path / "sweep" / "runs" / "muon-lr0.04-seed0", [5.0], lr=0.04, complete=False)
    lines = read_lines([str(tmp_path / "sweep")])
    assert capsys.readouterr().err == "note: left out, not complete: muon-lr0.04-seed0\n"
    assert [(line.name, line.arm, line.is_drawn) for line in lines] == [
        ("muon, lr 0.01", "muon", True),
        ("muon, lr 0.02", "muon", False),
    ]
    assert "lr" in lines[0].runs[0].curves


def test_unreadable_input_is_one_sentence_with_the_file(page, tmp_path):
    check_refused(page("nowhere"), "RUN", "nowhere")
    write_run(tmp_path / "run", [5.0])
    check_refused(page("run", "--output", "no/where.html"), "--output", "no/where.html")
    for file, text in {
        "metrics.jsonl": '{"step": 1, "loss": "much"}\n',
        "result.json": "[1]",
        "run.json": "{",
        "recipe.yaml": "a: [",
    }.items():
        before = (tmp_path / "run" / file).read_bytes()
        (tmp_path / "run" / file).write_text(text)
        check_refused(page("run"), file)
        (tmp_path / "run" / file).write_bytes(b"\xff\xfe")
        check_refused(page("run"), file)
        (tmp_path / "run" / file).write_bytes(before)
    for text in (b"", b"{}\n", b'{"arm": "a", "rate": 1, "seed": 0}\n', b"\xff"):
        (tmp_path / "bad.jsonl").write_bytes(text)
        check_refused(page("bad.jsonl"), "RUN", "bad.jsonl")
    assert MOST_LINES == 56
    for i in range(MOST_LINES + 1):
        write_run(tmp_path / "many" / f"r{i}", [5.0], weight_decay=i)
    check_refused(page("many"), "RUN", "57", "56")


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed: the page is not opened in a browser")
def test_a_browser_lays_the_page_out(page, tmp_path):
    write_records(tmp_path / "a.jsonl", SWEEP)
    assert page("a.jsonl").code == 0
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,1600"]
    words += [f"--user-data-dir={tmp_path / 'browser'}", f"--screenshot={tmp_path / 'page.png'}"]
    words += ["--dump-dom", "--enable-logging=stderr", (tmp_path / "page.html").as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr  # refused by the page's own policy, or not understood
    assert Page(done.stdout).figures() == read_page(tmp_path / "page.html").figures()
    from matplotlib.image import imread

    picture = imread(tmp_path / "page.png")[..., :3]
    assert picture.shape == (1600, 1200, 3)
    is_dark = (picture < 0.5).all(axis=2)
    for half in (is_dark[:, :600], is_dark[:, 600:]):  # two columns of figures, with something in every band
        assert all(part.any() for part in (half[300:600], half[600:900]))
