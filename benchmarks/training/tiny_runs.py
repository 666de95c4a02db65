"""Runs of a tiny Llama, each in a process of its own, and what must hold of the folders that they leave."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SAVE_EVERY = 2
KEEP = 2
MODEL = {
    "model_type": "llama",
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
PROCESSES = multiprocessing.get_context("forkserver")  # imports torch once; each run is a process of its own


def train(arguments: list[str], log: Path, largest_file: int | None) -> None:
    """Run the pretraining script in this process, its output in a file, and end with its exit code."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout.reconfigure(line_buffering=True)  # what was printed before a kill is in the file
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    from finetune.pretrain import main

    sys.exit(main(arguments))


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints that have a name."""
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def check_sealed(folder: Path) -> None:
    """Check that every checkpoint with a name matches its manifest; read here without the code under test."""
    for step in saved_steps(folder):
        checkpoint = named(folder, step)
        listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
        assert {"model.safetensors", "optimizer.bin", "random_states_0.pkl", "progress.json"} <= set(listed)
        for name, entry in listed.items():
            content = (checkpoint / name).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"]), name


class Runs:
    """Runs of one tiny recipe, all with equally many steps.

    Args:
        work: a folder of their own.
        num_saves: how often a whole run saves.
        seed: of the texts, the data order and the weights.
    """

    def __init__(self, work: Path, num_saves: int, seed: int) -> None:
        self.work, self.log = work, work / "log"
        rng = random.Random(seed)
        words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(80)]
        (work / "texts").mkdir(parents=True)
        for i in range(20):
            lines = (" ".join(rng.choices(words, k=12)) + ".\n" for _ in range(20))
            (work / "texts" / f"{i}.txt").write_text("".join(lines))
        steps = num_saves * SAVE_EVERY
        recipe = {"name": "tiny", "model": MODEL, "dataset": str(work / "texts"), "validation_fraction": 0.1}
        recipe |= {"lr": 3e-3, "batch_size": 2, "seq_len": 32, "max_steps": steps, "eval_every": steps, "seed": seed}
        recipe |= {"save_every": SAVE_EVERY, "keep_checkpoints": KEEP, "warmup_steps": 2}
        self.recipe = work / "tiny.json"  # JSON is YAML
        self.recipe.write_text(json.dumps(recipe))
        os.environ |= {"MUON8BIT_CACHE": str(work / "cache"), "CUDA_VISIBLE_DEVICES": ""}
        PROCESSES.set_forkserver_preload(
            ["finetune.training.trainer", "finetune.storage.outputs", "finetune.setup.prepare"]
        )

    def start(self, folder: Path, largest_file: int | None = None) -> Any:
        """Begin the run, or resume it if it has saved; the process."""
        arguments = ["--resume", str(folder)]
        if not saved_steps(folder):
            shutil.rmtree(folder, ignore_errors=True)
            arguments = ["--recipe", str(self.recipe), "--output-dir", str(folder)]
        process = PROCESSES.Process(target=train, args=(arguments, self.log, largest_file))
        process.start()
        return process

    def finish(self, folder: Path, largest_file: int | None = None, code: int = 0) -> None:
        """Begin or resume the run, and wait for its end with this exit code."""
        process = self.start(folder, largest_file)
        process.join()
        assert process.exitcode == code, f"exit code {process.exitcode}:\n{self.log.read_text()}"

    def wait_until(self, process: Any, happened: Callable[[], bool]) -> float:
        """Wait for something that a running process does; returns the time in s."""
        while not happened():
            assert process.is_alive(), f"it ended without doing it:\n{self.log.read_text()}"
            time.sleep(1e-4)
        return time.perf_counter()


def named(folder: Path, step: int) -> Path:
    """Return a complete checkpoint."""
    return folder / "checkpoints" / f"step-{step:07d}"


def partial(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is written before it has its name."""
    return folder / "checkpoints" / f".step-{step:07d}.partial"


def check_same(folder: Path, other: Path) -> None:
    """Check that two whole runs have the same weights and the same losses, bit for bit."""
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (folder, other)]
    texts = [(run / "metrics.jsonl").read_text().splitlines() for run in (folder, other)]
    losses = [[{**json.loads(line), "seconds": 0} for line in lines] for lines in texts]
    assert weights[0] == weights[1], f"the weights of {folder} are not those of {other}"
    assert losses[0] == losses[1], f"the losses of {folder} are not those of {other}"
    assert len(saved_steps(folder)) == KEEP
