"""Imports point down the list of rooms, never up. Anything else is an edge that nobody agreed to."""

import ast
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Room -> rooms that it may import from (its own aside). Order: from the top of the house to the ground.
ALLOWED = {
    "finetune": {"muon8bit", "cli"},
    "examples": {"muon8bit", "integrations"},
    "integrations": {"muon8bit"},
    "cli": {"muon8bit", "convert", "estimate", "choices"},
    "estimate": {
        "_names",
        "groups",
        "report",
        "adamw8bit",
        "adamw_chunks",
        "offload",
        "momentum",
        "options",
        "orthogonalize",
        "config",
    },
    "muon8bit": {"convert", "optimizer", "nonfinite", "gradient_release", "report", "routing"},
    "convert": {
        "kernels",
        "choices",
        "damage",
        "_names",
        "options",
        "adamw",
        "adamw8bit",
        "orthogonalize",
        "momentum",
        "config",
    },
    "gradient_release": {"local_params", "optimizer", "phases", "nonfinite", "config"},
    "report": {"dense", "_names", "_text_table", "config"},
    "optimizer": {
        *(
            "local_params",
            "phases",
            "sharded_optimizer",
            "nonfinite",
            "state_dict",
            "options",
            "config",
            "orthogonalize",
            "rounding",
        ),
        "commit",
        "distributed",
        "offload",
    },
    "sharded_optimizer": {"commit", "distributed", "options", "offload"},
    "phases": {
        "dense",
        "clipping",
        "local_params",
        "adamw",
        "muon",
        "adamw_chunks",
        "commit",
        "matrix_batches",
        "offload",
        "nonfinite",
        "options",
        "config",
        "distributed",
    },
    "local_params": {
        "config",
        "dense",
        "adamw",
        "adamw8bit",
        "rounding",
        "options",
        "offload",
        "momentum",
        "distributed",
    },
    "adamw_chunks": {"adamw", "offload", "commit", "config"},
    "offload": set(),
    "commit": set(),
    "nonfinite": set(),
    "clipping": {"matrix_batches", "options", "config"},
    "state_dict": {
        "damage",
        "dense",
        "_names",
        "local_params",
        "options",
        "config",
        "_values",
        "rounding",
        "offload",
        "distributed",
    },
    "muon": {"matrix_batches", "offload", "commit", "update", "orthogonalize", "momentum", "config"},
    "matrix_batches": {"momentum"},
    "options": {"dense", "_values", "adamw8bit", "orthogonalize", "config"},
    "functional": {"kernels"},
    "update": {"kernels"},
    "_names": set(),
    "damage": {"config"},
    "adamw": {"adamw8bit", "rounding", "config"},
    "adamw8bit": {"rounding", "kernels", "config"},
    "rounding": {"kernels"},
    "distributed": {
        "clipping",
        "muon",
        "adamw8bit",
        "matrix_batches",
        "update",
        "momentum",
        "options",
        "orthogonalize",
        "config",
    },
    "orthogonalize": {"kernels"},
    "momentum": {"kernels", "config"},
    "groups": {"dense", "_names", "rules", "ends", "outputs", "checks", "patterns", "table", "report", "config"},
    "table": {"rules", "_text_table", "config"},
    "checks": {"rules", "_values", "config"},
    "patterns": {"rules", "_text_table", "_values", "config"},
    "rules": {"ends", "experts", "newer_rules", "fused", "lora", "projections", "config"},
    "newer_rules": {"adapters", "ends", "experts", "fused", "linears", "lora", "outputs", "config"},
    "outputs": {"adapters", "ends", "linears", "lora"},
    "ends": {"lora", "config"},
    "experts": {"fused", "linears"},
    "adapters": {"lora"},
    "lora": {"fused", "projections"},
    "projections": {"fused"},
    "fused": {"linears"},
    "linears": set(),
    "_text_table": set(),
    "config": {"choices", "_values"},
    "choices": set(),
    "_values": {"dense"},
    "dense": set(),
    "routing": {"groups", "rules", "table"},
    "step": set(),
    "kernels": set(),
}


# Packages whose modules are rooms of their own.
SPLIT = ("step", "routing")


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "muon8bit" and parts[1] != "__init__":
        return parts[2] if parts[1] in SPLIT and parts[2] != "__init__" else parts[1]
    return parts[0]


def imported(path: Path) -> set[str]:
    """Modules that a file imports, absolute names, of this repository."""
    package = ["muon8bit_kernels"] if "muon8bit_kernels" in path.parts else list(path.relative_to(ROOT).parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return {n for n in names if n.split(".")[0] in ("muon8bit", "muon8bit_kernels", "finetune", "examples", "tests")}


def target_room(name: str) -> str:
    head, *rest = name.split(".")
    if head == "muon8bit_kernels":
        return "kernels"
    if head == "muon8bit" and rest and rest[0] in ALLOWED:
        return rest[1] if rest[0] in SPLIT and rest[1:] and rest[1] in ALLOWED else rest[0]
    return head


FILES = sorted(
    path
    for folder in ("muon8bit", "kernels/muon8bit_kernels", "finetune", "examples")
    for path in ROOT.glob(f"{folder}/**/*.py")
)


def test_every_file_has_a_room():
    assert FILES
    assert {room_of(path) for path in FILES} == set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_rooms(path):
    room = room_of(path)
    for name in imported(path):
        target = target_room(name)
        if name == "muon8bit.step":  # the package of the modules that are imported from it; it is empty
            continue
        if target == "muon8bit" and room not in ("finetune", "examples", "integrations", "cli", "muon8bit"):
            assert name == "muon8bit", name  # `from . import x` lists the package itself beside the module
            continue
        assert target == room or target in ALLOWED[room], f"{path.name} ({room}) may not import {name} ({target})"


def test_finetune_uses_public_names_only():
    for path in ROOT.glob("finetune/**/*.py"):
        for name in imported(path):
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
    files = [
        path for folder in ("muon8bit", "kernels", "finetune", "benchmarks") for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    classes = Counter(
        n.name for path in files for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef)
    )
    assert [name for name, count in classes.items() if count > 1] == []
