"""A script's process and the one that launched it."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from finetune.parallel.launcher import follow_launcher
os.setpgid(0, 0)  # what the terminal sends does not reach it either
signal.signal(signal.SIGTERM, lambda *_: os._exit(print("told", flush=True) or 0))
follow_launcher()
print(os.getpid(), flush=True)
signal.pause()
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


@pytest.mark.parametrize(("name", "is_told"), [("torchrun", True), ("accelerate", True), ("my_shell", False)])
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_a_launcher_that_dies_takes_its_script_along_and_no_other_parent_does(tmp_path, name, is_told):
    program = tmp_path / name
    program.write_text(LAUNCHER)
    with subprocess.Popen(
        [sys.executable, program, CHILD, ROOT], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as launcher:
        child = int(launcher.stdout.readline())
        launcher.kill()
        launcher.wait()
        if not is_told:
            os.kill(child, signal.SIGKILL)
        assert launcher.stdout.read() == ("told\n" if is_told else "")


@pytest.mark.parametrize(
    ("launch", "below"),
    [
        (["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"], 1),
        (["accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "1", "--num_machines", "1"], 0),
    ],
    ids=["torchrun", "accelerate"],
)
def test_the_one_sentence_is_the_last_thing_that_a_launcher_shows(tmp_path, launch, below):
    """Of its own box torchrun prints the lower border behind it."""
    script = str(ROOT / "finetune" / "pretrain.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *launch, script, "--lr", "-1"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert lines[-1 - below].removeprefix("  traceback : ") == "--lr: -1.0 must be above 0"
    assert set("".join(lines[len(lines) - below :])) <= {"="}


def test_what_the_scripts_need_is_told_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("yaml", "peft") else name)
    package = ROOT / "finetune" / "__init__.py"
    with pytest.raises(ModuleNotFoundError, match=r"need peft, yaml: pip install '\.\[train\]' in the checkout"):
        exec(compile(package.read_text(), package, "exec"), {})


def test_the_scripts_do_not_show_that_bitsandbytes_found_no_package_kernels():
    """It logs a warning at its import, on some CPUs."""
    code = "import finetune, logging; print(logging.getLogger('bitsandbytes.backends.cpu.ops').isEnabledFor(30))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
