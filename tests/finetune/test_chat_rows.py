"""Rows of all formats -> conversations, and what is wrong with bad ones."""

from __future__ import annotations

import json

import pytest

from finetune.config.errors import InputError
from finetune.data.chat import load_examples, load_parts

USER, ANSWER, SYSTEM = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
    {"role": "system", "content": "Be terse."},
)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def write_saved(path, rows):
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)


FORMATS = [("r.jsonl", write_jsonl), ("r.parquet", write_parquet), ("saved", write_saved)]
FORMS = {
    "messages": ({"messages": [SYSTEM, USER, ANSWER, USER, ANSWER], "id": "x", "prompt": "ignored"}, 0),
    "texts": ({"prompt": "Hi", "completion": "Ho"}, 1),
    "lists": ({"prompt": [SYSTEM, USER, ANSWER, USER], "completion": [ANSWER]}, 4),
    "instruction": ({"instruction": "Hi", "output": "Ho"}, 0),
    "input": ({"instruction": "Hi", "input": "there", "output": "Ho"}, 0),
    "no input": ({"instruction": "Hi", "input": "", "output": "Ho"}, 0),
}
EXPECTED = {
    "messages": [SYSTEM, USER, ANSWER, USER, ANSWER],
    "texts": [USER, ANSWER],
    "lists": [SYSTEM, USER, ANSWER, USER, ANSWER],
    "instruction": [USER, ANSWER],
    "input": [{"role": "user", "content": "Hi\n\nthere"}, ANSWER],
    "no input": [USER, ANSWER],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "write"), FORMATS)
def test_every_form_of_rows_in_every_format_gives_its_messages(tmp_path, name, write, form):
    row, first_answer = FORMS[form]
    write(tmp_path / name, [row, row])
    one, two = load_examples(str(tmp_path / name))
    assert list(one.messages) == list(two.messages) == EXPECTED[form]
    assert one.first_answer == first_answer
    assert two.where == f"row 2 of {tmp_path / name}"


def test_forms_may_be_mixed_in_a_file_and_files_in_a_folder(tmp_path):
    (tmp_path / "d").mkdir()
    write_jsonl(tmp_path / "d" / "a.jsonl", [FORMS["texts"][0], FORMS["input"][0] | {"messages": None}])
    write_parquet(tmp_path / "d" / "b.parquet", [FORMS["messages"][0]])
    found = load_examples(str(tmp_path / "d"))
    assert [list(example.messages) for example in found] == [EXPECTED[form] for form in ("texts", "input", "messages")]


def test_a_limit_draws_rows_by_seed_without_replacement(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "Ho"} for i in range(50)]
    for name, write in FORMATS:
        write(tmp_path / name, rows)
    drawn = [[e.messages[0]["content"] for e in load_examples(str(tmp_path / n), limit=20, seed=3)] for n, _ in FORMATS]
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(set(drawn[0])) == 20
    assert drawn[0] == sorted(drawn[0], key=lambda p: int(p[1:]))
    other = [e.messages[0]["content"] for e in load_examples(str(tmp_path / "r.jsonl"), limit=20, seed=4)]
    assert other != drawn[0]
    assert max(int(p[1:]) for p in other) >= 20  # a draw, not the beginning
    assert len(load_examples(str(tmp_path / "r.jsonl"), limit=99)) == 50


def test_no_prompt_is_on_both_sides_of_the_split(tmp_path):
    rows = [
        {"messages": [SYSTEM, {**USER, "content": f"q{i % 40}"}, {**ANSWER, "content": f"a{i}"}]} for i in range(99)
    ]
    write_jsonl(tmp_path / "r.jsonl", rows)
    parts = load_parts(str(tmp_path / "r.jsonl"), validation_fraction=0.1)
    prompts = [{e.messages[1]["content"] for e in part} for part in (parts.train, parts.validation)]
    assert not prompts[0] & prompts[1]
    assert [len(p) for p in prompts] == [36, 4]
    assert len(parts.train) + len(parts.validation) == 99
    write_jsonl(tmp_path / "r.jsonl", rows[::-1])  # the split depends on the prompts alone
    other = load_parts(str(tmp_path / "r.jsonl"), validation_fraction=0.1)
    assert {e.messages[1]["content"] for e in other.validation} == prompts[1]
    assert other.hash != parts.hash
    assert not load_parts(str(tmp_path / "r.jsonl"), validation_fraction=0).validation


BAD = [
    ({"messages": [USER]}, "row 2 of {file} has no assistant turn"),
    ({"prompt": "Hi", "completion": [USER]}, "row 2 of {file} has no assistant turn"),
    ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "row 2 of {file} has an empty assistant turn"),
    ({"messages": [USER, {"role": "bot", "content": "x"}]}, "message 2 of row 2 of {file} has the unknown role 'bot'"),
    ({"messages": [USER, {"content": "x"}]}, "message 2 of row 2 of {file} has no `role`"),
    ({"messages": [USER, {"role": "assistant"}]}, "`content` of message 2 of row 2 of {file} holds NoneType, not text"),
    ({"messages": [USER, {**ANSWER, "tool_calls": [1]}]}, "message 2 of row 2 of {file} has `tool_calls`"),
    ({"messages": "Hi"}, "`messages` of row 2 of {file} holds str, not a list"),
    ({"prompt": "Hi"}, "row 2 of {file} has `prompt`; it needs `messages`, or"),
    ({"instruction": "Hi", "output": 5}, "`output` of row 2 of {file} holds int, not text"),
    ({}, "row 2 of {file} has nothing; it needs"),
    ([], "row 2 of {file} is no object"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "words"), BAD)
def test_a_bad_row_is_named_in_one_sentence(tmp_path, row, words):
    file = tmp_path / "r.jsonl"
    write_jsonl(file, [FORMS["texts"][0], row])
    with pytest.raises(InputError) as caught:
        load_examples(str(file))
    assert caught.value.args[0] == "--dataset"
    assert words.format(file=file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("no.jsonl", None, "there is no {file}"),
        ("empty.jsonl", b"\n", "{file} is empty"),
        ("bad.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": \n', "line 2 of {file} is no JSON"),
        ("latin.jsonl", b'{"prompt": "caf\xe9"}\n', "line 1 of {file} is not UTF-8"),
        ("bad.parquet", b"PAR1 no", "cannot read {file} as parquet"),
        ("data.csv", b"prompt,completion\n", "{file} is no .jsonl or .parquet file"),
        ("folder", "folder", "{file} is no .jsonl or .parquet file, and no folder with one"),
    ],
)
def test_a_bad_file_is_named_in_one_sentence(tmp_path, name, content, words):
    file = tmp_path / name
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_examples(str(file))
    assert words.format(file=file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "write"), FORMATS[1:])
def test_a_table_without_the_columns_names_those_it_has(tmp_path, name, write):
    write(tmp_path / name, [{"text": "a", "id": 1}])
    with pytest.raises(InputError, match=r"has `text`, `id`; it needs `messages`, or `prompt` and `completion`, or"):
        load_examples(str(tmp_path / name))


def test_a_dataset_that_cannot_be_opened_is_an_error_with_its_reason(monkeypatch):
    import datasets

    def load(name, config, split, streaming):
        raise ConnectionError(f"Couldn't reach {name} on the Hub {config} {split} {streaming}\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError) as caught:
        load_examples("some/name", config="en", split="test")
    reason = "Couldn't reach some/name on the Hub en test False"
    assert str(caught.value) == f"--dataset: `datasets` cannot open 'some/name', split 'test': {reason}"


def test_a_single_prompt_cannot_be_split(tmp_path):
    write_jsonl(tmp_path / "r.jsonl", [FORMS["texts"][0]] * 5)
    with pytest.raises(InputError, match=r"--validation-fraction: .* has a single prompt"):
        load_parts(str(tmp_path / "r.jsonl"), validation_fraction=0.5)
