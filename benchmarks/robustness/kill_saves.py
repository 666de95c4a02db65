"""Kill a pretraining run (SIGKILL) at random moments of saving, fill its disk, and see that it always resumes.

    python -m benchmarks.robustness.kill_saves               # 20 kills, a tmpfs that fills up (as root)
    python -m benchmarks.robustness.kill_saves --disk limit  # without root: RLIMIT_FSIZE in its place

A tiny Llama is trained undisturbed, and how long the first and the second save of a process take is measured. Then it
is trained again: each process is killed in one of these saves, at a moment drawn from that time and a tenth more, and
the next resumes. A kill counts where the folder shows that a save had begun and had not ended; others are counted as
missed and repeated. After each kill every checkpoint that has a name must match its manifest, and the next process must
resume from the newest, which is at most the killed save behind. In the end model and losses must be those of the
undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.training.tiny_runs import KEEP, SAVE_EVERY, Runs, check_same, check_sealed, named, partial, saved_steps

RECORD = Path(__file__).parents[1] / "results" / "kill_saves.json"
# What a killed save leaves behind, in the order of time.
STAGES = ("files being written", "files being synced and hashed", "manifest written", "named, older ones being deleted")


def save_seconds(runs: Runs) -> list[float]:
    """Return the median times, in s, of the first and of the second save of a process, to the end of its deletions."""
    folder = runs.work / "rehearsal"
    seconds: list[list[float]] = [[], []]
    for _ in range(4):
        before = (saved_steps(folder)[-1:] or [0])[0]
        process = runs.start(folder)
        for save in range(2):
            step = before + SAVE_EVERY * (save + 1)
            began = wait_for_save(runs, process, folder, step)
            ended = runs.wait_until(process, lambda: not list((folder / "checkpoints").glob(".step-*")))
            seconds[save].append(ended - began)
        process.kill()
        process.join()
    return [statistics.median(times) for times in seconds]


def wait_for_save(runs: Runs, process: Any, folder: Path, step: int) -> float:
    """Wait until the save of a step has begun, or has already ended; returns the time in s."""
    return runs.wait_until(process, lambda: partial(folder, step).exists() or named(folder, step).exists())


def kill_one(runs: Runs, folder: Path, num_saves_before: int, seconds: float) -> dict[str, Any]:
    """Begin or resume the run and kill it in a save.

    Args:
        runs: of the recipe.
        folder: of the run.
        num_saves_before: saves of this process that are let pass.
        seconds: from the start of the save to the kill.

    Returns:
        What the folder shows: step of the save, stage (None: not while saving), and the newest checkpoint.
    """
    before = saved_steps(folder)[-1:] or [0]
    step = before[0] + SAVE_EVERY * (num_saves_before + 1)
    process = runs.start(folder)
    runs.wait_until(process, lambda: not partial(folder, step).exists())  # what the kill before left
    began = wait_for_save(runs, process, folder, step)
    while time.perf_counter() < began + seconds:
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert before == [0] or f"at step {before[0]}\n" in runs.log.read_text(), runs.log.read_text()
    check_sealed(folder)
    saved, stage = saved_steps(folder), None
    if partial(folder, step).exists():
        stage = STAGES[sum((partial(folder, step) / name).exists() for name in ("progress.json", "manifest.json"))]
        assert saved[-1:] == ([step - SAVE_EVERY] if step > SAVE_EVERY else [])
    elif saved[-1] == step and (len(saved) > KEEP or list((folder / "checkpoints").glob(".step-*"))):
        stage = STAGES[3]
    assert (saved or [0])[-1] >= step - SAVE_EVERY
    return {"step": step, "stage": stage, "newest_checkpoint": (saved or [0])[-1]}


def kill_many(runs: Runs, whole: Path, num_kills: int, seconds: list[float], seed: int) -> dict[str, Any]:
    """Kill so many saves, then let the run end, and compare it with the undisturbed one."""
    rng, folder = random.Random(seed), runs.work / "killed"
    kills: list[dict[str, Any]] = []
    missed = 0
    while len(kills) < num_kills:
        share, save = 1.1 * rng.random(), rng.randrange(2)
        kill = kill_one(runs, folder, save, share * seconds[save])
        if kill["stage"] is None:
            missed += 1
            continue
        kills.append({"share_of_a_save": round(share, 3), **kill})
        print(len(kills), kills[-1], flush=True)
    runs.finish(folder)
    check_same(folder, whole)
    stages = {stage: sum(kill["stage"] == stage for kill in kills) for stage in STAGES}
    return {"kills": num_kills, "resumed": num_kills, "stages": stages, "missed_and_repeated": missed, "each": kills}


def fill_disk(runs: Runs, whole: Path, how: str) -> dict[str, Any]:
    """Let the disk fill up in a save, make room, resume, and compare with the undisturbed run."""
    folder = runs.work / "full"
    process = runs.start(folder)
    runs.wait_until(process, named(folder, KEEP * SAVE_EVERY).exists)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM, runs.log.read_text()
    before = saved_steps(folder)
    newest = named(folder, before[-1])
    one = sum(path.stat().st_size for path in newest.iterdir())
    if how == "tmpfs":
        disk = runs.work / "disk"
        disk.mkdir()
        used = sum(path.stat().st_size + 4096 for path in folder.rglob("*"))
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={used + one // 2}", "tmpfs", str(disk)], check=True)
        try:
            folder = Path(shutil.copytree(folder, disk / "full"))
            record = _full(runs, folder, before, None)
            subprocess.run(["mount", "-o", f"remount,size={used + 20 * one}", str(disk)], check=True)
            runs.finish(folder)
            check_same(folder, whole)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    else:
        record = _full(runs, folder, before, (newest / "optimizer.bin").stat().st_size // 2)
        runs.finish(folder)
        check_same(folder, whole)
    return {"disk": how, **record, "resumed": True}


def _full(runs: Runs, folder: Path, before: list[int], largest_file: int | None) -> dict[str, Any]:
    runs.finish(folder, largest_file, code=1)
    check_sealed(folder)
    assert saved_steps(folder) == before
    assert not list((folder / "checkpoints").glob(".*"))
    lines = [line for line in runs.log.read_text().splitlines() if "cannot save" in line or "--resume" in line]
    assert len(lines) == 2, runs.log.read_text()
    message, command = (line.replace(str(folder), "RUN").replace(str(Path.cwd()), ".").strip() for line in lines)
    return {"exit_code": 1, "message": message, "command_printed": "--resume RUN" in command}


def main() -> None:
    """Run everything; the record is written only if all went well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--disk", choices=("tmpfs", "limit", "none"), default="tmpfs", help="how the disk fills up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="a new folder to work in, which stays; default: a temporary one")
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary) / "work").resolve()
        num_saves = 4 * options.kills + 12  # the rehearsal takes 8, a kill up to 2, a miss as many; some room
        runs = Runs(work, num_saves, options.seed)
        runs.finish(work / "whole")
        record: dict[str, Any] = {
            "command": f"python -m benchmarks.robustness.kill_saves --kills {options.kills} --disk {options.disk} "
            f"--seed {options.seed}",
            "versions": {name: version(name) for name in ("torch", "accelerate", "safetensors")},
            "python": platform.python_version(),
            "saves_of_a_whole_run": num_saves,
            "killed": kill_many(runs, work / "whole", options.kills, save_seconds(runs), options.seed),
        }
        if options.disk != "none":
            record["full_disk"] = fill_disk(runs, work / "whole", options.disk)
    record["weights_and_losses"] = "bit for bit those of the undisturbed run"
    options.record.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{options.kills} kills, all resumed: {options.record}")


if __name__ == "__main__":
    main()
