"""The docs are whole: links lead somewhere, code runs, what is made from the code is current, names and files exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest
import torch.distributed as dist
import yaml

import muon8bit
from examples.stand_in import llama, rows
from finetune import pretrain, sft

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "records" not in path.relative_to(DOCS).parts)
CODE = re.compile(r"(<!-- not run: [^\n]* -->\n)?^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    """Of the headings, as the builder makes them: lower case, punctuation away, spaces to hyphens."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.M
    )
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("https://", "http://")):
            yield target


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in links(page):
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.is_file(), target
        assert page == README or DOCS in Path(file.absolute()).parents, f"{target} is outside of the site"
        assert not heading or heading in anchors(file), target


def test_navigation_has_every_page_once():
    def pages(entry: Any) -> Iterator[str]:
        for value in entry.values() if isinstance(entry, dict) else entry:
            yield from [value] if isinstance(value, str) else pages(value)

    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(pages(config["nav"])) == [name_of(page) for page in PAGES]


def runnable(page: Path) -> list[str]:
    """Code blocks of a page, but those of `tests/docs/test_examples.py` and those that say why they do not run."""
    return [
        code for reason, code in CODE.findall(page.read_text()) if not reason and not code.startswith("# examples/")
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=name_of)
def test_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    """Given are a model, batches and a loss, and a process group of this process where the page says dist; `assert` in
    the code is part of what the page says."""
    monkeypatch.chdir(tmp_path)
    if "dist.group" in page.read_text():
        with one_rank(tmp_path / "store"):
            run_blocks(page)
    else:
        run_blocks(page)
    capsys.readouterr()


@contextmanager
def one_rank(store: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_blocks(page: Path) -> None:
    model = llama()
    batch = next(rows().with_format("torch").iter(batch_size=4))
    scope = {"model": model, "batch": batch, "batches": [batch] * 2, "loss": model(**batch).loss}
    for number, code in enumerate(runnable(page)):
        exec(compile(code, f"{name_of(page)}, block {number + 1}", "exec"), scope)


def test_made_pages_are_current():
    for name, page in script("generate").PAGES.items():
        assert (DOCS / name).read_text() == page(), f"{name}: run python docs/generate.py"
    drawn = script("picture").picture().encode("ascii", "xmlcharrefreplace")
    assert (DOCS / "design" / "step.svg").read_bytes() == drawn, "run python docs/picture.py"


@pytest.mark.parametrize("module", [pretrain, sft])
def test_every_option_of_the_command_line_is_on_the_page(module):
    page = (DOCS / "training" / "options.md").read_text()
    for action in module.build_parser()._actions:
        for name in action.option_strings:
            assert name in ("-h", "--help") or f"`{name}`" in page, name


def test_every_recipe_is_on_the_page():
    page = (DOCS / "training" / "recipes.md").read_text()
    recipes = list((ROOT / "finetune" / "recipes").rglob("*.yaml"))
    assert len(recipes) > 8
    assert all(f"### `{path.stem}`" in page for path in recipes)


def test_reference_has_every_public_name_and_no_other():
    shown = {name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)}
    for name in shown:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            assert getattr(importlib.import_module(module), attribute).__doc__, name
    public = {f"muon8bit.{name}" for name in muon8bit.__all__} | {"muon8bit.functional"}
    for path in (ROOT / "muon8bit" / "integrations").glob("[!_]*.py"):
        module = importlib.import_module(f"muon8bit.integrations.{path.stem}")
        own = [
            n
            for n, value in vars(module).items()
            if callable(value) and value.__module__ == module.__name__ and not isinstance(value, TypeVar)
        ]
        public |= {f"{module.__name__}.{name}" for name in own if name[0] != "_"}
    assert shown == public


# Words of the headings of the FAQ that a newcomer looks for.
QUESTIONS = [
    *("8B fit on 24 GB", "learning rate after AdamW", "resume, on another number of GPUs", "fused QKV", "conv stem"),
    *("tied head", "LoRA and QLoRA", "torch.compile, autocast or accumulation", "on_nonfinite", "add a codebook"),
    *("faster on my GPU", "files are trusted", "Where is the equation", "tried and failed", "How do I cite"),
    *("shows NaN", "rank dies", "from 32 bits to 8", "another Muon", "MPS, XPU or ROCm"),
]


def test_faq_answers_each_question_shortly_with_a_link():
    assert "](docs/faq.md)" in README.read_text()
    page = (DOCS / "faq.md").read_text()
    answers = dict(re.findall(r"^### ([^\n]*)\n\n(.*?)(?=\n#|\Z)", page, re.MULTILINE | re.DOTALL))
    assert len(answers) == page.count("\n### ")
    for words in QUESTIONS:
        assert [heading for heading in answers if words in heading.replace("`", "")], words
    for heading, answer in answers.items():
        assert re.search(r"\]\([\w/-]+\.md[#)]", answer), f"{heading}: no link"
        assert len(answer) < 640, f"{heading}: belongs on a page of the guide"


def test_speeds_of_the_faq_are_those_of_the_table():
    table = (DOCS / "results" / "speed.md").read_text().split("| shape | linear, with bf16 ")[1].split("\n\n")[0]
    cells = re.findall(r"^\| \d+ x \d+ \| (.*) \|$", table, re.MULTILINE)
    ratios = [cell for row in cells for cell in row.split(" | ")]
    assert len(ratios) == 20
    lowest, highest = min(ratios, key=float), max(ratios, key=float)
    assert f"{lowest} to {highest} times torch.optim.Muon's speed" in (DOCS / "faq.md").read_text()


def test_glossary_has_every_class_of_a_step_and_at_most_40_words():
    rows = re.findall(r"^\| (?!word|---)(.*) \| (.*?) ?\| .* \|$", (DOCS / "design" / "glossary.md").read_text(), re.M)
    assert 0 < len(rows) <= 40
    listed = [name for _, classes in rows for name in re.findall(r"`(\w+)`", classes)]
    trees = [ast.parse(p.read_text()) for f in ("step", "distributed") for p in (ROOT / "muon8bit" / f).glob("*.py")]
    classes = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert sorted(listed) == sorted(name for name in classes if name[0] != "_")
    # What is read of a class of `step` by those who must not import it; nothing is private so as not to be listed.
    assert [name for name in classes if name[0] == "_"] == ["_LocalParam"]


def test_files_named_in_the_map_exist():
    page = (DOCS / "design" / "architecture.md").read_text()
    lines = re.findall(
        r"^( *)((?:\w+/)*\w*\.?\w*)(?:  |$)", "".join(re.findall(r"```text\n(.*?)```", page, re.DOTALL)), re.MULTILINE
    )
    assert len(lines) > 30
    folders = {0: ""}
    for indent, name in lines:
        path = folders[len(indent)] + name
        folders[len(indent) + 2] = path
        assert (ROOT / path).exists(), path


def test_files_and_tests_named_in_text_exist():
    for page in [*PAGES, README]:
        for name in re.findall(r"`((?:muon8bit|kernels|finetune|tests|examples|docs)/[\w/.]*\.\w+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{name} in {page.name}"


def test_every_record_is_linked():
    """Of a table with a file of values beside it, one of the two."""
    linked = {target.partition("records/")[2] for page in PAGES for target in links(page) if "records/" in target}
    missing = {path.stem for path in (DOCS / "records").iterdir()} - {Path(name).stem for name in linked}
    assert not missing, "say on a page of docs/results what these records show"
