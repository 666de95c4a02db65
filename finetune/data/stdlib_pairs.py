"""Instruction pairs from the standard library of the running Python: signature and docstring ask, the function answers.

Needs no download. The pairs depend on the Python version, whose files are read; their label names it.
"""

from __future__ import annotations

import ast
import hashlib
import math
import platform
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from finetune.config.errors import InputError
from finetune.data.messages import Example, Message

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef

# Not library code, or generated tables.
LEFT_OUT = {"test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3", "site-packages", "dist-packages"}
LEFT_OUT |= {"__pycache__", "config", "pydoc_data", "encodings"}
# A pair of 640 characters has about 200 tokens with a chat template around it, and seldom more than 256.
MAX_CHARS = 640
MIN_STATEMENTS = 2
MIN_DOC_WORDS = 5
ASK = "Write the Python function with this signature and docstring.\n\n"


def standard_library(validation_fraction: float) -> tuple[list[Example], list[Example], str]:
    """Make instruction pairs of all modules, some modules held out.

    Taken are functions and methods with a docstring of at least five words and a body of two statements or more that
    does something, whose pair has at most `MAX_CHARS` characters; not twice the same question, and not twice the same
    answer. The answer is the source of the function without its docstring, and nothing around it.

    Args:
        validation_fraction: share of the modules to hold out, in the order of the hashes of their names; rounded up.

    Returns:
        Training pairs and held-out pairs, each in the order of files and lines, and a label for the log.

    Raises:
        InputError: this Python has no source files, or the fraction leaves a part empty.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(root).parts)]
    modules: dict[str, list[Example]] = {}
    seen: set[str] = set()
    for file in files:
        name = file.relative_to(root).as_posix()
        pairs = []
        for ask, answer, line in _pairs(file):
            if not seen & {ask, answer}:
                messages = (Message(role="user", content=ask), Message(role="assistant", content=answer))
                pairs.append(Example(messages, f"line {line} of {name}"))
            seen |= {ask, answer}
        if pairs:
            modules[name] = pairs
    by_hash = sorted(modules, key=lambda name: hashlib.sha256(name.encode()).digest())
    held_out = set(by_hash[: math.ceil(validation_fraction * len(modules))])
    train = [pair for name in modules if name not in held_out for pair in modules[name]]
    validation = [pair for name in modules if name in held_out for pair in modules[name]]
    if not train or (validation_fraction and not validation):
        raise InputError("--dataset", f"the standard library in {root} gives too few pairs; give another dataset")
    label = (
        f"functions of Python {platform.python_version()}'s standard library: {len(train):,} pairs of "
        f"{len(modules) - len(held_out)} modules, {len(validation):,} of {len(held_out)} modules held out"
    )
    return train, validation, label


def _pairs(file: Path) -> Iterator[tuple[str, str, int]]:
    """Yield (question, answer, line) of every function of a file that qualifies; none of a file that does not parse."""
    try:
        source = file.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old files
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):  # samples of bad syntax and of other encodings are no use here
        return
    lines = source.splitlines()
    for node in _functions(tree):
        pair = _pair(node, lines)
        if pair is not None:
            yield *pair, node.lineno


def _functions(scope: ast.Module | ast.ClassDef) -> Iterator[Function]:
    """Yield functions and methods in order, but none that is nested in a function or behind a condition."""
    for node in scope.body:
        if isinstance(node, Function):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node)


def _pair(node: Function, lines: list[str]) -> tuple[str, str] | None:
    doc, body = ast.get_docstring(node), node.body[1:]
    if doc is None or len(doc.split()) < MIN_DOC_WORDS or len(body) < MIN_STATEMENTS:
        return None
    first = node.body[0]
    if first.lineno == node.lineno or body[0].lineno == first.end_lineno:  # all on one line
        return None
    assert first.end_lineno is not None
    signature = lines[node.lineno - 1 : first.lineno - 1]
    rest = "\n".join(lines[first.end_lineno : node.end_lineno]).strip("\n").split("\n")
    asked = textwrap.dedent("\n".join([*signature, *lines[first.lineno - 1 : first.end_lineno]]))
    answered = textwrap.dedent("\n".join([*signature, *rest]))
    ask = f"{ASK}```python\n{asked}\n```"
    if len(ask) + len(answered) > MAX_CHARS:
        return None
    try:  # moved to the left margin, strings over several lines may have changed
        (question,), (function,) = ast.parse(asked).body, ast.parse(answered).body
    except SyntaxError:
        return None
    same = isinstance(question, Function) and ast.get_docstring(question) == doc
    same &= isinstance(function, Function) and list(map(ast.dump, function.body)) == list(map(ast.dump, body))
    return (ask, answered) if same else None
