"""A tiny corpus, a tiny recipe, a tiny chat model, and ways to run the scripts in this process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
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


def run_main(main: Callable[..., int], options: list[str], capfd: pytest.CaptureFixture[str]) -> Outcome:
    """Run a script's `main` as if in a process of its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    capfd.readouterr()
    code = main(options)
    captured = capfd.readouterr()
    return Outcome(code, captured.out, captured.err)


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the `main` of another command with its arguments."""
    return lambda main, *args: run_main(main, [str(a) for a in args], capfd)


@pytest.fixture
def pretrain(recipe_file: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the script's `main` with the tiny recipe (unless resuming) and further options."""

    def run(*args: object) -> Outcome:
        from finetune.pretrain import main

        options = [str(a) for a in args]
        if "--recipe" not in options and "--resume" not in options:
            options = ["--recipe", str(recipe_file), *options]
        return run_main(main, options, capfd)

    return run


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool | None], None]]:
    """Let Accelerate wrap the models of the next runs as compiled: whole (False), layer by layer (True) or not (None).

    They run uncompiled: names and what is saved are those of a compiled model, and compiling takes seconds.
    """

    def choose(by_layer: bool | None) -> None:
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no" if by_layer is None else "eager")
        monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", str(bool(by_layer)))

    with torch.compiler.set_stance("force_eager"):
        yield choose


@pytest.fixture(scope="session")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama with a chat tokenizer."""
    from helpers.finetune_chat import make_base

    return make_base(tmp_path_factory.mktemp("chat") / "base")


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file of 60 short conversations."""
    from helpers.finetune_chat import write_chats

    return write_chats(tmp_path_factory.mktemp("chat") / "chats.jsonl")


TINY_SFT = {
    "--seq-len": 64,
    "--max-steps": 6,
    "--warmup-steps": 1,
    "--lr": 3e-3,
    "--batch-size": 4,
    "--validation-fraction": 0.2,
    "--eval-every": 3,
    "--save-every": 3,
    "--keep-checkpoints": 9,
    "--num-answers": 1,
    "--answer-tokens": 4,
}


@pytest.fixture
def sft_options(chat_base: Path, chats: Path) -> dict[str, object]:
    """Options of a tiny fine-tuning run."""
    return {"--model": chat_base, "--dataset": chats, **TINY_SFT}


@pytest.fixture
def sft(sft_options: dict[str, object], capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the script's `main` with the tiny options (unless with a recipe or resuming), which further ones override."""

    def run(*args: object) -> Outcome:
        from finetune.sft import main

        given = [str(a) for a in args]
        defaults = {} if "--resume" in given or "--recipe" in given else sft_options
        options = [str(x) for key, value in defaults.items() if key not in given for x in (key, value)]
        return run_main(main, [*options, *given], capfd)

    return run
