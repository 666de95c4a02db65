"""Imports point down the list of rooms, never up. Anything else is an edge that nobody agreed to."""

import ast
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Room -> rooms that it may import from, its own aside. From the top of the house to the ground; where rooms import from
# each other, modules do not: see `test_no_module_imports_itself_over_others`.
ALLOWED = {
    "benchmarks": {
        "base",
        "cli",
        "distributed",
        "estimate",
        "finetune",
        "kernels",
        "muon8bit",
        "orthogonalize",
        "step",
        "tests",  # the float64 rules of tests/helpers, of which there is one copy
        "tune",
    },
    "examples": {"integrations", "muon8bit"},
    "finetune": {"cli", "estimate", "muon8bit"},
    "integrations": {"muon8bit"},
    "cli": {"base", "convert", "doctor", "estimate", "muon8bit", "orthogonalize", "tune"},
    "doctor": {"base", "estimate", "kernels", "orthogonalize", "routing", "step"},
    "tune": {"kernels", "orthogonalize"},
    "health": {"base", "kernels", "muon8bit", "orthogonalize", "step"},
    "muon8bit": {"base", "convert", "distributed", "health", "orthogonalize", "report", "routing", "step"},
    "convert": {"base", "kernels", "orthogonalize", "step"},
    "estimate": {"base", "distributed", "orthogonalize", "report", "routing", "step"},
    "routing": {"base", "report", "step"},  # of the step: how lr depends on a shape, which width rules divide out
    "report": {"base"},
    "step": {"base", "distributed", "kernels", "orthogonalize"},
    "distributed": {"base", "kernels", "orthogonalize", "step"},
    "orthogonalize": {"kernels"},
    "functional": {"kernels"},
    "base": set(),
    "kernels": set(),
}
# Modules of muon8bit on which all others stand.
BASE = ("_text", "_values", "choices", "config", "step.dense")
FOLDERS = ("muon8bit", "kernels/muon8bit_kernels", "finetune", "benchmarks", "examples")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[parts[0] == "kernels" : -1 if parts[-1] == "__init__" else None])


MODULES = {module_name(path): path for folder in FOLDERS for path in sorted(ROOT.glob(f"{folder}/**/*.py"))}


def room_of(module: str) -> str:
    head, *rest = module.split(".")
    if module == "muon8bit.__main__":
        return "cli"
    if head == "muon8bit" and rest:
        return "base" if ".".join(rest) in BASE else rest[0] if rest[0] in ALLOWED else "muon8bit"
    return "kernels" if head == "muon8bit_kernels" else head


def imported(module: str) -> set[str]:
    """Modules of this repository that a module imports; of a package that it takes names from, the package."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            submodules = {f"{source}.{alias.name}" for alias in node.names}
            names |= submodules & MODULES.keys() if submodules <= MODULES.keys() else {source, *submodules}
    heads = {name.split(".")[0] for name in MODULES} | {"tests", "helpers"}
    return {name if name in MODULES else name.rpartition(".")[0] for name in names if name.split(".")[0] in heads}


def test_every_module_has_a_room():
    assert {room_of(module) for module in MODULES} == set(ALLOWED)


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_follow_the_rooms(room):
    for module in MODULES:
        for name in imported(module) if room_of(module) == room else ():
            target = room_of(name)
            assert target == room or target in ALLOWED[room], f"{module} ({room}) may not import {name} ({target})"


def test_no_module_imports_itself_over_others():
    """Also where rooms import from each other, and inside of packages: modules can be put into one order."""
    left = {module: imported(module) - {module} for module in MODULES}
    while ready := [module for module, names in left.items() if not names & left.keys()]:
        for module in ready:
            del left[module]
    assert not left, "imports in a circle, and modules that need them"


# Modules under 60 lines that wait to be merged with a neighbour; the list only gets shorter.
TOO_SMALL = {
    *("muon8bit.choices", "muon8bit.cli.errors", "muon8bit.cli.report", "muon8bit.integrations.accelerate"),
    "muon8bit.orthogonalize.sharded",
    *("muon8bit.routing.adapters", "muon8bit.step.commit"),
    *("muon8bit_kernels.random_bits", "muon8bit_kernels.triton.kernels"),
    *("finetune.config.defaults", "finetune.config.errors", "finetune.data.messages", "finetune.data.preview"),
    *("finetune.parallel.launcher", "finetune.storage.sft_outputs", "finetune.training.generation"),
    *("finetune.training.memory", "benchmarks.gpu.release_time"),
}
TOO_LARGE = {"muon8bit.optimizer"}  # over 400
TOO_LONG = {"step_tiny_kernel", "set_up"}  # functions of more than 60 lines behind the docstring


def test_modules_have_60_to_400_lines():
    """Examples are as short as they can be."""
    lines = {
        module: len(path.read_text().splitlines())
        for module, path in MODULES.items()
        if room_of(module) != "examples" and path.name not in ("__init__.py", "__main__.py")
    }
    assert {module for module, number in lines.items() if number < 60} <= TOO_SMALL
    assert {module for module, number in lines.items() if number > 400} <= TOO_LARGE


def test_functions_have_at_most_60_lines():
    long = set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if body and body[-1].end_lineno - body[0].lineno >= 60:
                    long.add(node.name)
    assert long <= TOO_LONG


def test_finetune_uses_public_names_only():
    for module in MODULES:
        for name in imported(module) if room_of(module) == "finetune" else ():
            if name.startswith("muon8bit"):
                parts = name.split(".")
                assert len(parts) <= 2, name
                assert len(parts) == 1 or not (ROOT / "muon8bit" / f"{parts[1]}.py").exists(), name


def test_muon8bit_imports_no_library_that_it_integrates():
    libraries = {"transformers", "peft", "trl", "accelerate"}
    code = f"import sys; from muon8bit import *; print(sorted({libraries} & sys.modules.keys()))"
    env = {**os.environ, "PYTHONPATH": ".:kernels"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True, capture_output=True, check=True)
    assert run.stdout.strip() == "[]"


def test_kernels_is_a_source_root_not_a_package():
    """An importable `kernels` would shadow the distribution of that name, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_class_name_stands_twice():
    classes = Counter(
        n.name
        for path in MODULES.values()
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.ClassDef)
    )
    assert [name for name, count in classes.items() if count > 1] == []
