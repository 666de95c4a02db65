"""Rows of all formats -> conversations, and what is wrong with bad ones."""

from __future__ import annotations

import json

import pytest

from finetune.config.errors import InputError
from finetune.data.chat import load_examples, load_parts
from finetune.data.columns import parse_columns
from finetune.data.report import DataReport
from finetune.data.row_formats import example_from_row

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


def test_rows_of_earlier_releases_keep_the_hash_by_which_a_run_is_resumed(tmp_path):
    """Made by release 0.1; a run continues only where it is the same."""
    rows = [
        {**FORMS[name][0], "id": i} | ({"prompt": f"p{i}"} if name == "texts" else {})
        for i, name in enumerate([*FORMS] * 3)
    ]
    write_jsonl(tmp_path / "r.jsonl", rows)
    parts = load_parts(str(tmp_path / "r.jsonl"), validation_fraction=0.3)
    assert (len(parts.train), len(parts.validation)) == (13, 5)
    assert parts.hash == "759c01accf8e7dd1df44fd7bd4fdc8d4ccddd1e65544ca5b3062b1e1abf77ded"


HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}
OTHER_FORMS = {
    "ShareGPT": ({"conversations": [{"from": "system", "value": "Be terse."}, HUMAN, GPT]}, None, "SUA", 0),
    "ShareGPT with roles": ({"conversations": [USER, ANSWER]}, None, "UA", 0),
    "messages of from and value": ({"messages": [HUMAN, GPT], "conversations": None}, None, "UA", 0),
    "response": ({"prompt": "Hi", "response": "Ho"}, None, "UA", 1),
    "answer": ({"question": "Hi", "answer": "Ho"}, None, "UA", 1),
    "system and history": (
        {"instruction": "Hi", "input": "", "output": "Ho", "system": "Be terse.", "history": [["Hi", "Ho"]]},
        None,
        "SUAUA",
        0,
    ),
    "history before a prompt": (
        {"prompt": "Hi", "response": "Ho", "history": [["Hi", "Ho"], ["Hi", "Ho"]]},
        None,
        "UAUAUA",
        5,
    ),
    "empty system, history and tools": (
        {"instruction": "Hi", "output": "Ho", "system": " ", "history": [], "tools": ""},
        None,
        "UA",
        0,
    ),
    "a column system": ({"system": "Be terse.", "messages": [USER, ANSWER]}, None, "SUA", 0),
    "the same system twice": ({"system": "Be terse.", "messages": [SYSTEM, USER, ANSWER]}, None, "SUA", 0),
    "a column system before a prompt": ({"system": "Be terse.", "prompt": [USER], "completion": "Ho"}, None, "SUA", 2),
    "text parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "Hi"]}, ANSWER]},
        None,
        "UA",
        0,
    ),
    "JSON": ({"messages": json.dumps([SYSTEM, USER, ANSWER])}, None, "SUA", 0),
    "JSON history": ({"instruction": "Hi", "output": "Ho", "history": '[["Hi", "Ho"]]'}, None, "UAUA", 0),
    "no system": ({"messages": [{"role": "system", "content": None}, USER, ANSWER]}, None, "UA", 0),
    "developer": ({"messages": [{**SYSTEM, "role": "developer"}, USER, ANSWER]}, None, "DUA", 0),
    "tool": ({"messages": [USER, ANSWER, {**USER, "role": "tool"}, ANSWER]}, None, "UATA", 0),
    "other keys": (
        {"dialog": [{"who": "user", "says": "Hi"}, {"who": "bot", "says": "Ho"}]},
        "messages=dialog,role=who,content=says,assistant=bot",
        "UA",
        0,
    ),
    "other columns": (
        {"Question": "Hi", "Reply": "Ho", "note": "Be terse.", "messages": [ANSWER]},
        "question=Question,answer=Reply,system=note",
        "SUA",
        2,
    ),
    "one of two formats": (
        {"question": "no", "answer": "no", "conversations": [HUMAN, GPT]},
        "conversations=conversations",
        "UA",
        0,
    ),
}
TURN_OF = {"S": SYSTEM, "U": USER, "A": ANSWER, "D": {**SYSTEM, "role": "developer"}, "T": {**USER, "role": "tool"}}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_rows_as_people_have_them_give_their_turns(form):
    row, columns, turns, first_answer = OTHER_FORMS[form]
    example = example_from_row(row, "row 1 of x.jsonl", parse_columns(columns))
    assert list(example.messages) == [TURN_OF[letter] for letter in turns]
    assert example.first_answer == first_answer


def test_weights_of_0_stay_with_their_turns_behind_what_other_columns_bring():
    quiet, answers = {**ANSWER, "weight": 0}, [ANSWER, {**ANSWER, "weight": 0}, {**ANSWER, "weight": 1.0}]
    rows = [
        ({"messages": [USER, *answers], "system": "Be terse."}, [2, 4]),
        ({"messages": [{**SYSTEM, "content": None}, USER, *answers]}, [1, 3]),
        ({"prompt": "Hi", "completion": answers, "system": "Be terse.", "history": [["Hi", "Ho"]]}, [4, 6]),
        ({"prompt": [USER, quiet, USER], "response": answers[:2], "history": [["Hi", "Ho"]]}, [5]),
    ]
    for row, learned in rows:
        assert example_from_row(row, "row 1").answers == learned, row


def test_weights_and_tools_make_another_dataset(tmp_path):
    """By whose hash a run is resumed."""
    rows = [{"messages": [USER, ANSWER, {**USER, "content": str(i)}, ANSWER]} for i in range(3)]
    quiet = [USER, {**ANSWER, "weight": 0}, {**USER, "content": "2"}, ANSWER]
    tools = {"tools": [{"function": {"name": "look"}}]}
    hashes = []
    for last in (rows[2], {"messages": quiet}, {**rows[2], **tools}, {"messages": quiet, **tools}):
        write_jsonl(tmp_path / "r.jsonl", [*rows[:2], last])
        hashes.append(load_parts(str(tmp_path / "r.jsonl"), validation_fraction=0).hash)
    assert len(set(hashes)) == 4


@pytest.mark.parametrize(("name", "write"), FORMATS)
def test_other_forms_and_names_are_read_from_every_kind_of_source(tmp_path, name, write):
    write(tmp_path / name, [{"talk": [HUMAN, GPT], "system": "Be terse.", "id": 7}] * 2)
    report = DataReport()
    one, _ = load_examples(str(tmp_path / name), columns="conversations=talk", report=report)
    assert list(one.messages) == [SYSTEM, USER, ANSWER]
    assert report.unused == {"id": 2}
    assert report.notes() == ["note: columns and keys that were not used: `id` (2 rows)"]
    for other in ("system=sys", "assistant=sys", "weight=sys"):
        with pytest.raises(InputError, match=rf"--columns: no row of .* has `sys`; correct {other}, or leave it out"):
            load_examples(str(tmp_path / name), columns=f"conversations=talk,{other}")


def test_what_nothing_reads_is_named_and_unusual_conversations_are_counted(tmp_path):
    rows = [
        {"messages": [{**USER, "name": "Ann", "x": None}, ANSWER], "score": 0.5, "prompt": "Hi", "completion": "no"},
        {"messages": [ANSWER, USER, ANSWER, USER], "score": None, "note": ""},
        {"messages": [SYSTEM, ANSWER, USER]},
        {"prompt": "Hi", "completion": "Ho", "score": 1},
    ]
    write_jsonl(tmp_path / "r.jsonl", rows)
    report = DataReport()
    load_examples(str(tmp_path / "r.jsonl"), report=report)
    assert report.unused == {"score": 2, "prompt": 1, "completion": 1, "messages.name": 1}
    assert report.notes()[1:] == [
        "note: 2 conversations begin with an assistant turn",
        "note: 2 conversations end with a turn that no answer follows: nothing is learned from it",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("role", "'role' is not NAME=YOURS"),
        ("role=from,", "'' is not NAME=YOURS"),
        ("role=", "'role=' is not NAME=YOURS"),
        ("text=body", "'text' is no name that is known here; give one of the columns messages"),
        ("role=a,role=b", "'role' stands twice"),
    ],
)
def test_columns_that_cannot_be_read_are_one_sentence(text, words):
    with pytest.raises(InputError) as caught:
        parse_columns(text)
    assert caught.value.args[0] == "--columns"
    assert words in str(caught.value)


BAD = [
    ({"question": "a", "answer": "b", "prompt": "c", "response": "d"}, "row 2 of {file} fits several formats: `prompt` "
     "and `response`, and `question` and `answer`; say which to take, such as --columns prompt=prompt,response="),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "give --columns completion=chosen"),
    ({"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": []}, "give --columns messages=chosen"),
    ({"text": "a"}, "plain text is what finetune.pretrain trains on"),
    ({"instruction": "Hi", "output": "Ho", "history": ["Hi"]}, "`history` of row 2 of {file} holds something"),
    ({"system": "Be kind.", "messages": [SYSTEM, USER, ANSWER]}, "and another text in `system`"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER]}, "has a part of type 'ima"),
    ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "message 2 of row 2 of {file} has the weight 0.5; give 1 to"),
    ({"messages": [USER, {**ANSWER, "weight": 0}]}, "row 2 of {file} has no assistant turn whose weight is above 0"),
    ({"messages": [USER, ANSWER], "tools": "x"}, "`tools` of row 2 of {file} is no list of JSON schemas"),
    ({"messages": [{"role": "user", "content": None}, ANSWER]}, "`content` of message 1 of row 2 of {file} holds null"),
    ({"messages": [USER]}, "row 2 of {file} has no assistant turn"),
    ({"prompt": "Hi", "completion": [USER]}, "row 2 of {file} has no assistant turn"),
    ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "row 2 of {file} has an empty assistant turn"),
    ({"messages": [USER, {"role": "bot", "content": "x"}]}, "to learn its turns, --columns user=bot not to; or leave"),
    ({"messages": [USER, {"content": "x"}]}, "message 2 of row 2 of {file} has no `role`"),
    ({"messages": [USER, {"role": "assistant"}]}, "`content` of message 2 of row 2 of {file} holds null, not text"),
    ({"messages": [USER, {**ANSWER, "tool_calls": [1]}]}, "message 2 of row 2 of {file} has `tool_calls`"),
    ({"messages": "Hi"}, "`messages` of row 2 of {file} holds str, not a list"),
    ({"prompt": "Hi"}, "row 2 of {file} has `prompt`; it needs `messages`, or"),
    ({"instruction": "Hi", "output": 5}, "`output` of row 2 of {file} holds int, not text"),
    ({}, "row 2 of {file} has nothing; it needs"),
    ([], "row 2 of {file} is no object"),
    ([FORMS["texts"][0]], "; a file that is one array is to be called .json"),
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
        ("empty.csv", b"prompt,completion\n", "{file} is empty"),
        (
            "data.txt",
            b"prompt,completion\n",
            "{file} is no file of rows (.jsonl, .json, .csv, .parquet; text",
        ),
        ("folder", "folder", "and no folder with one"),
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
