"""Imports point down the list of rooms, never up. Anything else is an edge that nobody agreed to."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Room -> rooms that it may import from (its own aside). Order: from the top of the house to the ground.
ALLOWED = {
    "finetune": {"muon8bit"},
    "examples": {"muon8bit", "integrations"},
    "integrations": {"muon8bit"},
    "cli": {"muon8bit", "convert", "memory", "config"},
    "memory": {
        "names",
        "routing",
        "report",
        "adamw8",
        "pieces",
        "staging",
        "state",
        "groups",
        "orthogonalize",
        "config",
    },
    "muon8bit": {"convert", "optimizer", "nonfinite", "release", "report", "routing"},
    "convert": {"damage", "names", "groups", "adamw", "adamw8", "orthogonalize", "state", "config"},
    "release": {"entries", "optimizer", "phases", "nonfinite", "config"},
    "report": {"dense", "names", "_table", "config"},
    "optimizer": {
        *(
            "entries",
            "phases",
            "sharing",
            "nonfinite",
            "loading",
            "groups",
            "config",
            "orthogonalize",
            "rounding",
        ),
        "commit",
        "distributed",
        "staging",
    },
    "sharing": {"commit", "distributed", "groups", "staging"},
    "phases": {
        "dense",
        "clipping",
        "entries",
        "adamw",
        "muon",
        "pieces",
        "commit",
        "stacks",
        "staging",
        "nonfinite",
        "groups",
        "config",
        "distributed",
    },
    "entries": {"config", "dense", "adamw", "adamw8", "rounding", "groups", "staging", "state", "distributed"},
    "pieces": {"adamw", "staging", "commit", "config"},
    "staging": set(),
    "commit": set(),
    "nonfinite": set(),
    "clipping": {"stacks", "groups", "config"},
    "moved": {"groups", "names"},
    "loading": {
        "moved",
        "damage",
        "dense",
        "names",
        "entries",
        "groups",
        "config",
        "values",
        "rounding",
        "staging",
        "distributed",
    },
    "muon": {"stacks", "staging", "commit", "update", "orthogonalize", "state", "config"},
    "stacks": {"state"},
    "groups": {"dense", "values", "adamw8", "orthogonalize", "config"},
    "functional": {"kernels"},
    "update": {"kernels"},
    "names": set(),
    "damage": {"config"},
    "adamw": {"adamw8", "rounding", "config"},
    "adamw8": {"rounding", "kernels", "config"},
    "rounding": {"kernels"},
    "distributed": {"clipping", "muon", "adamw8", "stacks", "update", "state", "groups", "orthogonalize", "config"},
    "plan": {"orthogonalize", "config"},
    "orthogonalize": {"kernels"},
    "state": {"kernels", "config"},
    "routing": {"dense", "names", "_roles", "_ends", "_outputs", "_route_checks", "_table", "report", "config"},
    "_route_checks": {"_roles", "_table", "config"},
    "_roles": {"_ends", "_experts", "_newer", "_fused", "_lora", "config"},
    "_newer": {"_adapters", "_ends", "_experts", "_fused", "_linears", "_lora", "_outputs", "config"},
    "_outputs": {"_adapters", "_ends", "_linears", "_lora"},
    "_ends": {"_lora", "config"},
    "_experts": {"_fused", "_linears"},
    "_adapters": {"_lora"},
    "_lora": {"_fused"},
    "_fused": {"_linears"},
    "_linears": set(),
    "_table": set(),
    "config": {"values"},
    "values": {"dense"},
    "dense": set(),
    "kernels": set(),
}


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "muon8bit":
        return "muon8bit" if parts[1] == "__init__" else parts[1]
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
        return rest[0]
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
    code = "import sys, muon8bit; print(sorted({'transformers', 'peft', 'trl', 'accelerate'} & sys.modules.keys()))"
    env = {**os.environ, "PYTHONPATH": ".:kernels"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True, capture_output=True, check=True)
    assert run.stdout.strip() == "[]"


def test_kernels_is_a_source_root_not_a_package():
    """An importable `kernels` would shadow the distribution of that name, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
