"""A tiny corpus, a tiny recipe and a way to run the script in this process."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

TINY_MODEL = {
    "model_type": "llama",
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TINY = {
    "name": "tiny",
    "model": TINY_MODEL,
    "validation_fraction": 0.1,
    "lr": 3e-3,
    "warmup_steps": 2,
    "batch_size": 4,
    "seq_len": 32,
    "max_steps": 6,
    "eval_every": 2,
    "save_every": 3,
    "keep_checkpoints": 9,
}


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def make_texts(folder: Path, num_files: int = 24, seed: int = 0) -> Path:
    """A folder of small .txt files of made-up sentences, all different."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(80)]
    folder.mkdir(parents=True)
    for i in range(num_files):
        lines = (" ".join(rng.choices(words, k=12)) + ".\n" for _ in range(20))
        (folder / f"text{i:02}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, with a cache that the tests of this room share."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUON8BIT_CACHE", str(tmp_path_factory.getbasetemp() / "finetune_cache"))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_texts(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(yaml.safe_dump({**TINY, "dataset": str(texts)}))
    return file


@pytest.fixture
def pretrain(recipe_file: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the script's `main` with the tiny recipe (unless resuming) and further options."""

    def run(*args: object) -> Outcome:
        from accelerate.state import AcceleratorState

        from finetune.pretrain import main

        AcceleratorState._reset_state(reset_partial_state=True)  # each call stands for a process of its own
        options = [str(a) for a in args]
        if "--recipe" not in options and "--resume" not in options:
            options = ["--recipe", str(recipe_file), *options]
        capfd.readouterr()
        code = main(options)
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run
