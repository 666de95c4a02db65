"""The wheel holds our two packages and works alone; neither triton nor bitsandbytes is needed to import."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import muon8bit

ROOT = Path(__file__).parents[2]

STEP = """
import sys
for name in ("triton", "bitsandbytes", "transformers", "accelerate"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
from muon8bit import Muon8bit, param_groups, state_report
model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
optimizer = Muon8bit(param_groups(model, lr=1e-3))
model(torch.ones(2, 16)).sum().backward()
optimizer.step()
print(state_report(optimizer).total_bytes)
import muon8bit
print(muon8bit.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_wheel_holds_only_our_two_packages(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"muon8bit", "muon8bit_kernels", next(t for t in tops if t.endswith(".dist-info"))}
    assert {"muon8bit/py.typed", "muon8bit_kernels/py.typed"} <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    scripts = next(name for name in names if name.endswith("entry_points.txt"))
    assert "muon8bit = muon8bit.cli:main" in zipfile.ZipFile(wheel).read(scripts).decode()


def test_version_of_the_wheel_is_that_of_the_package(wheel):
    """Also that to be cited."""
    assert wheel.name.split("-")[1] == muon8bit.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == muon8bit.__version__


def test_a_registry_would_take_the_wheel(wheel):
    pytest.importorskip("twine", reason="twine is not installed: make install")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(wheel)], check=True)


def test_wheel_steps_without_optional_packages(wheel, tmp_path):
    """Run from the unpacked wheel, outside the repository."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    env = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    command = [sys.executable, "-P", "-c", STEP]
    if sys.version_info < (3, 11):
        command.remove("-P")
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    total, origin = result.stdout.split()
    # Two 16x16 matrices with 16 scales each, two biases under AdamW.
    assert int(total) == 2 * (16 * 16 + 4 * 16) + 2 * (2 * 4 * 16 + 4)
    assert origin.startswith(str(tmp_path))


def test_messages_advise_only_names_that_a_registry_has():
    """Those of the dependencies, and of constraints.txt, out of which `make` installs what brings a model.

    This package itself is installed out of a checkout.
    """
    project = (ROOT / "pyproject.toml").read_text()
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for folder in ("muon8bit", "kernels", "finetune", "benchmarks", "examples"):
        for path in ROOT.glob(f"{folder}/**/*.py"):
            text = path.read_text()
            assert "muon8bit[" not in re.sub(r"muon8bit\[\"", "", text), path
            for name in re.findall(r"pip install (?:--no-deps )?(?!'\.\[train\]' in the checkout)(\S*\w)", text):
                assert f'"{name}>=' in project or name in pinned, f"{path}: {name}"


def commands(text: str) -> list[str]:
    """Of a shell script, without what sets it up."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]


def test_workflow_runs_the_commands_of_ci_on_two_versions_of_torch():
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["run"]
    steps = [step["run"] for step in job["steps"] if "run" in step]
    assert steps[1:] == commands((ROOT / ".ci/run").read_text())
    versions = [row["torch"] for row in job["strategy"]["matrix"]["include"]]
    pinned = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    lowest = re.findall(r'^dependencies = \["torch>=([\d.]+)"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert versions == [f"{lowest[0]}.0", *pinned]


def test_versions_of_the_workflow_get_into_the_constraints(tmp_path):
    """The first command of the workflow, with a version put in."""
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["run"]
    row = job["strategy"]["matrix"]["include"][0]
    command = job["steps"][2]["run"]
    for name, value in row.items():
        command = command.replace(f"${{{{ matrix.{name} }}}}", value)
    before = (ROOT / "constraints.txt").read_text()
    (tmp_path / "constraints.txt").write_text(before)
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    changed = set((tmp_path / "constraints.txt").read_text().splitlines()) - set(before.splitlines())
    assert changed == {f"{name}=={value}" for name, value in row.items()}


def test_hooks_before_a_commit_are_those_of_make_check():
    recipe = (ROOT / "Makefile").read_text().split("\ncheck: install\n")[1].split("\n\n")[0]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == [
        line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()
    ]
