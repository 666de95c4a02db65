"""Pairs from the standard library, against its files."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import pytest

from finetune.data.chat import load_parts
from finetune.data.stdlib_pairs import ASK, MAX_CHARS, standard_library

ROOT = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def parts():
    return load_parts("stdlib", validation_fraction=0.1)


def module_of(example):
    return example.where.split(" of ")[1]


def code(text):
    assert text.endswith("\n```")
    return text.removesuffix("\n```").rpartition("```python\n")[2]


def test_modules_are_held_out_whole_and_pairs_are_many_and_different(parts):
    modules = [{module_of(example) for example in part} for part in (parts.train, parts.validation)]
    assert not modules[0] & modules[1]
    assert len(modules[1]) == -(-sum(map(len, modules)) // 10)
    assert len(parts.train) >= 600
    assert len(parts.validation) >= 40
    everything = [*parts.train, *parts.validation]
    for turn in (0, 1):
        assert len({example.messages[turn]["content"] for example in everything}) == len(everything)
    assert all(sum(len(m["content"]) for m in example.messages) <= MAX_CHARS for example in everything)
    assert f"{len(parts.train):,} pairs of {len(modules[0])} modules" in parts.label


def test_question_and_answer_are_the_parts_of_the_function_in_the_file(parts):
    """Signature and docstring of the question, signature and body of the answer, compared as syntax trees."""
    trees = {}
    for example in [*parts.train[::50], *parts.validation[::20]]:
        name = module_of(example)
        if name not in trees:
            tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
            functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
            trees[name] = {node.lineno: node for node in functions}
        node = trees[name][int(example.where.split()[1])]
        ask, answer = (example.messages[turn]["content"] for turn in (0, 1))
        assert ask.startswith(ASK)
        (asked,), (answered,) = (ast.parse(text).body for text in (code(ask), answer))
        assert asked.name == answered.name == node.name
        assert ast.dump(asked.args) == ast.dump(answered.args) == ast.dump(node.args)
        assert ast.get_docstring(asked) == ast.get_docstring(node)
        assert ast.get_docstring(answered) is None
        assert [ast.dump(n) for n in answered.body] == [ast.dump(n) for n in node.body[1:]]


def test_pairs_are_the_same_every_time_and_unreadable_files_give_none(tmp_path, monkeypatch):
    good = 'def f(a):\n    """Return a, doubled for good measure."""\n    b = a + a\n    return b\n'
    for i in range(4):
        (tmp_path / f"m{i}.py").write_text(good.replace("f(a)", f"f{i}(a)").replace("b", f"b{i}"))
    (tmp_path / "copy.py").write_text((tmp_path / "m0.py").read_text())
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "latin.py").write_bytes(b'x = "caf\xe9"\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text(good)
    (tmp_path / "poor.py").write_text(
        'def none(a):\n    b = a\n    return b\n\ndef short(a):\n    """Too short."""\n    b = a\n    return b\n\n'
        'def one(a):\n    """Return a, which is very simple."""\n    return a\n'
        f'def long(a):\n    """Return a, and say a lot."""\n    b = "{"x" * MAX_CHARS}"\n    return b\n'
    )
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    train, validation, label = standard_library(0.25)
    assert [len(train), len(validation)] == [3, 1]
    assert "3 pairs of 3 modules, 1 of 1 modules held out" in label
    assert sorted(map(module_of, train + validation)) == ["copy.py", "m1.py", "m2.py", "m3.py"]
    assert (train, validation, label) == standard_library(0.25)
    pair = next(e for e in train + validation if module_of(e) == "m2.py")
    assert pair.messages[0]["content"] == (
        f'{ASK}```python\ndef f2(a):\n    """Return a, dou{"b2"}led for good measure."""\n```'
    )
    assert pair.messages[1]["content"] == "def f2(a):\n    b2 = a + a\n    return b2"
