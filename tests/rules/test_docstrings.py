"""Docstrings begin with a verb, and public ones name every parameter, and every error that is raised there."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import muon8bit

ROOT = Path(__file__).parents[2]
ROOMS = ("muon8bit", "kernels", "finetune", "benchmarks", "examples", "tests/helpers")
VERBS = """
Add Allocate Apply Ask Assign Average Begin Build Call Check Choose Clip Close Compare Compile Compute Continue
Convert Copy Count Create Cut Decode Delete Dequantize Describe Detect Divide Do Draw Encode Enter Estimate Evaluate
Exit Export Extract Fail Fill Filter Find Forget Format Gather Generate Give Go Group Hash Hold Ignore Import
Initialize Install Join Keep Kill Launch Learn Leave Let List Load Log Look Make Map Mark Match Measure Merge Move
Multiply Name Normalize Note Open Order Orthogonalize Pack Pad Parse Pass Pick Place Plan Plant Predict Prepare Print
Put Quantize Raise Read Receive Reduce Refuse Register Release Remove Render Replace Reset Resolve Restore Resume
Return Round Route Run Save Say Screen Seal Search Select Send Set Share Shift Show Shuffle Skip Sort Split Start Step
Stop Store Sum Swap Sync Synchronize Take Tell Test Trace Train Translate Turn Undo Update Use Verify Wait Warn Watch
Wrap Write Yield
"""
RIDDLES = ("What", "Of", "How", "Whether", "Where", "As")


def files() -> list[Path]:
    return [
        p for room in ROOMS for p in sorted(ROOT.glob(f"{room}/**/*.py")) if not p.name.startswith("sharded_checks")
    ]


def docstrings(path: Path) -> Iterator[tuple[ast.AST, str, str]]:
    """Node, name and docstring of the module, its classes and functions; properties are named like attributes."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            is_property = any(ast.unparse(d).endswith("property") for d in getattr(node, "decorator_list", ()))
            if (text := ast.get_docstring(node)) and not is_property:
                yield node, getattr(node, "name", "the module"), text


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_a_verb(path: Path) -> None:
    """Those of functions; of classes and modules with a noun."""
    for node, name, text in docstrings(path):
        word = re.split(r"[\s.,:;]", text, maxsplit=1)[0]
        if isinstance(node, ast.FunctionDef):
            assert word in VERBS.split(), f"{name}: {text.splitlines()[0]!r} begins with no verb that VERBS has"
        else:
            assert word not in RIDDLES, f"{name}: {text.splitlines()[0]!r}: say what it is"


def public() -> list[Any]:
    """Functions, and methods of classes that somebody calls."""
    modules = [f"muon8bit.integrations.{p.stem}" for p in (ROOT / "muon8bit/integrations").glob("[!_]*.py")]
    values = [getattr(muon8bit, name) for name in muon8bit.__all__]
    for name in (*modules, "muon8bit.functional"):
        module = importlib.import_module(name)
        values += [v for n, v in vars(module).items() if n[0] != "_" and getattr(v, "__module__", "") == name]
    values += [m for value in values if inspect.isclass(value) for n, m in vars(value).items() if n[0] != "_"]
    functions = [value for value in values if inspect.isfunction(value)]
    return [*functions, muon8bit.Muon8bit]


@pytest.mark.parametrize("function", public(), ids=lambda function: function.__qualname__)
def test_public_docstrings_name_parameters_and_errors(function: Callable[..., Any]) -> None:
    text = inspect.getdoc(function)
    assert text
    arguments = re.search(r"^Args:\n((?:    .*\n|\n)*)", text + "\n", re.MULTILINE)
    heads = " ".join(re.findall(r"^    (\w[\w, ]*):", arguments.group(1), re.MULTILINE)) if arguments else text
    for name in inspect.signature(function).parameters:
        assert name == "self" or re.search(rf"\b{name}\b", heads), f"{name} is not described"
    body = function.__init__ if inspect.isclass(function) else inspect.unwrap(function)
    source = inspect.getsource(body)
    for error in set(re.findall(r"^ +raise (\w+)\(", source, re.MULTILINE)):
        assert error in text, f"{error} is not described"
