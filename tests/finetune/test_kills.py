"""A run that is killed in the middle of a save resumes, and ends with the weights of the undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_three_kills_at_random_moments_of_saving_lose_nothing_but_that_save(tmp_path):
    """The script checks hashes, losses and weights itself, and writes its record only if all agree."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    options = ["--kills", "3", "--disk", "none", "--work", str(tmp_path / "work"), "--record", str(tmp_path / "record")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.robustness.kill_saves", *options],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    killed = json.loads((tmp_path / "record").read_text())["killed"]
    assert killed["kills"] == killed["resumed"] == len(killed["each"]) == 3
    assert all(kill["stage"] and kill["step"] - kill["newest_checkpoint"] in (0, 2) for kill in killed["each"])
