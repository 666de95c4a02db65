"""Files of rows as people have them: every kind, packed or not, and all that is wrong with odd ones."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import re
import struct
from pathlib import Path

import pytest
from helpers.chat_tokenizers import make_tokenizer
from helpers.refusals import check_refused

from finetune.config.errors import InputError
from finetune.data.chat import load_examples
from finetune.data.files import KINDS
from finetune.data.preview import show_example
from finetune.data.report import DataReport, RowError
from finetune.data.row_formats import example_from_row
from finetune.data.tokenize_chat import ChatEncoding

ROWS = [
    {"prompt": f'say "{i}",\n caf\u00e9 \U0001f600', "completion": f"it is {i}; \u2028 no; more", "input": ""}
    for i in range(4)
]
MARK = b"\xef\xbb\xbf"


def dialog(answer="Ho", ask="Hi", **more):
    return {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer, **more}]}


def jsonl(rows, **options):
    return "".join(json.dumps(row, **options) + "\n" for row in rows).encode()


def csv_of(rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def zstd(content):
    import pyarrow as pa

    return pa.Codec("zstd").compress(content, asbytes=True)


def parquet(rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


ARRAY = json.dumps(ROWS, indent=1).encode()
GOOD_FILES = {
    "a.jsonl": jsonl(ROWS),
    "mark.jsonl": MARK + jsonl(ROWS, ensure_ascii=False).replace(b"\n", b"\r\n"),
    "a.JSONL": jsonl(ROWS),
    "a.jsonl.gz": gzip.compress(jsonl(ROWS)),
    "two.jsonl.gz": gzip.compress(jsonl(ROWS[:1])) + gzip.compress(jsonl(ROWS[1:])),
    "a.jsonl.zst": zstd(jsonl(ROWS)),
    "two.jsonl.zst": zstd(jsonl(ROWS[:1])) + zstd(jsonl(ROWS[1:])),
    "a.json": ARRAY,
    "mark.json": MARK + json.dumps(ROWS, ensure_ascii=False).encode(),
    "lines.json": jsonl(ROWS),
    "a.json.gz": gzip.compress(ARRAY),
    "a.csv": csv_of(ROWS),
    "mark.csv": MARK + csv_of(ROWS).replace(b"\r\n", b"\n"),
    "blank.csv": csv_of(ROWS) + b"\r\n\r\n",
    "a.csv.zst": zstd(csv_of(ROWS)),
    "a.parquet": parquet(ROWS),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_the_same_rows_come_from_every_kind_of_file(tmp_path, name):
    (tmp_path / name).write_bytes(GOOD_FILES[name])
    found = load_examples(str(tmp_path / name))
    texts = [[message["content"] for message in example.messages] for example in found]
    assert texts == [[row["prompt"], row["completion"]] for row in ROWS]


def test_a_long_cell_and_columns_of_json_come_from_csv(tmp_path):
    turns = [{"from": "human", "value": "Hi " * 100_000}, {"from": "gpt", "value": "Ho"}]
    (tmp_path / "a.csv").write_bytes(csv_of([{"conversations": json.dumps(turns), "system": ""}]))
    (example,) = load_examples(str(tmp_path / "a.csv"))
    assert [message["content"] for message in example.messages] == ["Hi " * 100_000, "Ho"]


def test_of_a_folder_what_is_not_read_is_named(tmp_path):
    for name in ("sub", ".ipynb_checkpoints", "d.jsonl"):
        (tmp_path / name).mkdir()
    files = {
        "a.jsonl": jsonl(ROWS[:1]),
        "sub/b.jsonl.gz": gzip.compress(jsonl(ROWS[1:2])),
        "sub/one.json": json.dumps(ROWS[2], indent=1).encode(),
        "about.json": json.dumps({"name": "mine", "rows": 3}, indent=1).encode(),
        "none.jsonl": b"\n",
        "notes.txt": b"text",
        "rows.parquet.gz": b"?",
        "a.jsonl.xz": b"?",
        "._a.jsonl": b"\0\5",
        ".ipynb_checkpoints/a-checkpoint.jsonl": jsonl(ROWS),
        "~$a.csv": b"?",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "linked").symlink_to(tmp_path / "sub")
    report = DataReport()
    found = load_examples(str(tmp_path), report=report)
    assert [example.messages[0]["content"] for example in found] == [row["prompt"] for row in ROWS[:3]]
    assert sorted(report.unread) == [
        "._a.jsonl (hidden)",
        ".ipynb_checkpoints/a-checkpoint.jsonl (hidden)",
        "a.jsonl.xz",
        "about.json (one object, no row)",
        "linked (a link to a folder)",
        "none.jsonl (empty)",
        "notes.txt",
        "rows.parquet.gz",
        "~$a.csv (hidden)",
    ]
    assert report.notes()[0].startswith("note: files that were not read: ._a.jsonl (hidden), .ipynb_checkpoints/a-")


def bad_parquet():
    """A column of text whose second value is no UTF-8."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    offsets = pa.py_buffer(struct.pack("<4i", 0, 1, 2, 3))
    column = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xe9b")])
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": column, "completion": ["x"] * 3}), sink)
    return sink.getvalue()


GOOD, BAD = dialog(), {"text": "a"}
PACKED = gzip.compress(jsonl([GOOD, GOOD, GOOD]), mtime=0)
# File -> its bytes, the rows of it that are good, and for each bad row its number and the beginning of the reason; a
# file that cannot be read to its end has the number None, and a part of the sentence.
ODD_FILES = {
    "01.jsonl": (jsonl([GOOD, BAD, GOOD, BAD]), 2, [(2, "no format fits"), (4, "no format fits")]),
    "02.jsonl": (jsonl([GOOD]) + b"{\n" + jsonl([GOOD]) + b'{"a": 1} x\n', 2, [(2, "a line that"), (4, "a line")]),
    "03.jsonl": (jsonl([GOOD]) + b'{"prompt": "caf\xe9", "completion": "x"}\n', 1, [(2, "a line that is not UTF-8")]),
    "04.jsonl": (b"\0" * 9 + b"\n" + jsonl([GOOD]), 1, [(1, "a line that is no JSON")]),
    "05.jsonl": (jsonl([dialog("hi \ud83d"), GOOD]), 1, [(1, "half of a character")]),
    "00.jsonl": (json.dumps([GOOD, GOOD], indent=1).encode(), 0, [(None, "one value over several; call it .json")]),
    "06.jsonl": (jsonl([[GOOD], 5, None, GOOD]), 1, [(i, "no object with columns") for i in (1, 2, 3)]),
    "07.jsonl": (jsonl([GOOD]) + b'{"messages": [{"ro', 1, [(2, "a line that is no JSON")]),
    "08.jsonl": (jsonl([GOOD]).decode().encode("utf-16"), 0, [(None, "the file seems to be UTF-16")]),
    "09.jsonl": (PACKED, 0, [(None, "the file seems to be compressed (gzip)")]),
    "10.jsonl.gz": (PACKED[:-9], 3, [(None, "as gzip JSON lines: Compressed file ended before")]),
    "11.jsonl.gz": (PACKED[:-8] + b"12345678", 3, [(None, "as gzip JSON lines: CRC check failed")]),
    "12.jsonl.gz": (jsonl([GOOD]), 0, [(None, "as gzip JSON lines: Not a gzipped file")]),
    "13.jsonl.gz": (gzip.compress(jsonl([BAD, GOOD])), 1, [(1, "no format fits")]),
    "14.jsonl.zst": (zstd(jsonl([GOOD]) * 3)[:-3], 0, [(None, "as zstd JSON lines: ")]),
    "15.jsonl.zst": (jsonl([GOOD]), 0, [(None, "as zstd JSON lines: ")]),
    "16.json": (json.dumps([GOOD, BAD, 7]).encode(), 1, [(2, "no format fits"), (3, "no object with columns")]),
    "17.json": (json.dumps([GOOD] * 3, indent=1).encode()[:-9], 0, [(None, "is no JSON: ")]),
    "18.json": (jsonl([GOOD, BAD]) + b"{", 1, [(2, "no format fits"), (3, "a line that is no JSON")]),
    "19.json": (b'"text"', 0, [(None, "holds str; give an array of rows")]),
    "20.json": (b'[{"prompt": "a",\n"completion": "caf\xe9"}]', 0, [(None, "line 2 of {file} is not UTF-8 text")]),
    "21.json": (b"[" * 100_000, 0, [(None, "{file} cannot be read as JSON")]),
    "22.csv": (b"prompt,completion\na,b\nc\nd,e,f\ng,h\n", 2, [(3, "more or fewer cells"), (4, "more or fewer cells")]),
    "23.csv": (b'prompt,completion\n"a\nb",c\nd,\ne,f\n', 2, [(4, "an empty assistant turn")]),
    "24.csv": (b'prompt,completion\na,b\nc,"d\n', 1, [(None, "as CSV: unexpected end of data")]),
    "25.csv": (b"prompt;completion\na;b\n", 0, [(None, "save it with commas between the columns")]),
    "26.csv": (b"prompt,completion,prompt\na,b,c\n", 0, [(None, "has the column 'prompt' twice")]),
    "27.csv": (b"prompt,completion\ncaf\xe9,b\nc,d\n", 1, [(2, "a line that is not UTF-8")]),
    "28.csv": (b"title,body\na,b\n", 0, [(2, "no format fits")]),
    "29.parquet": (parquet([GOOD, GOOD])[:-20], 0, [(None, "as parquet")]),
    "30.parquet": (bad_parquet(), 2, [(2, "text that is not UTF-8")]),
    "31.parquet": (parquet([{"prompt": "a", "completion": None}, {"prompt": "a", "completion": "b"}]), 1,
                   [(1, "no format fits")]),
    "32.parquet": (parquet([dialog(weight=0), dialog(weight=1)]), 1, [(1, "no assistant turn with a weight")]),
    "33.jsonl": (jsonl([dialog(""), GOOD, {"messages": []}]), 1, [(1, "an empty assistant"), (3, "no assistant turn")]),
    "34.jsonl": (jsonl([{"conversations": [{"from": "x", "value": "y"}]}, GOOD]), 1, [(1, "the unknown role 'x'")]),
}  # fmt: skip


@pytest.fixture
def odd_folder(tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    for name, (content, _, _) in ODD_FILES.items():
        (folder / name).write_bytes(content)
    return folder


def test_every_bad_row_of_odd_files_is_found_in_one_run(odd_folder):
    report = DataReport("list")
    found = load_examples(str(odd_folder), report=report)
    for name, (_, num_good, bad) in ODD_FILES.items():
        errors = [error for error in report.errors if f"{odd_folder / name}" in str(error)]
        assert len(errors) == len(bad), (name, [str(error) for error in errors])
        for error, (number, words) in zip(errors, bad, strict=True):
            if number is None:
                assert words.format(file=odd_folder / name) in str(error)
            else:
                assert f" {number} of {odd_folder / name}" in str(error)
                assert error.reason.startswith(words)
        assert sum(str(odd_folder / name) in example.where for example in found) == num_good, name
    assert sum(report.reasons().values()) == len(report.errors) == sum(len(bad) for _, _, bad in ODD_FILES.values())
    num_rows = sum(num_good + sum(number is not None for number, _ in bad) for _, num_good, bad in ODD_FILES.values())
    assert report.num_rows == num_rows


@pytest.mark.parametrize("name", ODD_FILES)
def test_without_a_report_the_first_fault_of_an_odd_file_is_one_sentence(odd_folder, name):
    with pytest.raises(InputError) as caught:
        load_examples(str(odd_folder / name))
    assert str(odd_folder / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    _, num_good, bad = ODD_FILES[name]
    report = DataReport("skip")
    if all(number is not None for number, _ in bad) and num_good:
        assert len(load_examples(str(odd_folder / name), report=report)) == num_good
    else:  # a damaged file is no bad row
        with pytest.raises(InputError, match=name):
            load_examples(str(odd_folder / name), report=report)


CHATS = [
    dialog("abcd"),
    dialog("ij", ask="gh?", weight=1) | {"id": 1},
    {
        "messages": [
            {"role": "user", "content": "x\x1b[31m"},
            *dialog("no", weight=0)["messages"][1:],
            *dialog()["messages"],
        ]
    },
]


def write_chats(folder, rows):
    (folder / "chats.jsonl").write_bytes(jsonl(rows))


def ran_nothing(outcome, folder):
    """Nothing of a run was made, and no weights were loaded."""
    assert outcome.err == ""
    assert sorted(path.name for path in folder.iterdir()) == ["chats.jsonl"]


def test_preview_prints_what_is_learned_in_brackets_and_exits(sft, tmp_path, chat_base):
    """The marked text by hand; how many tokens it has, the tokenizer says of its parts."""
    from transformers import AutoTokenizer

    write_chats(tmp_path, CHATS)
    outcome = sft("--dataset", "chats.jsonl", "--preview", 3)
    assert outcome.code == 0, outcome.err
    ran_nothing(outcome, tmp_path)
    file = tmp_path / "chats.jsonl"
    texts = [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n@abcd<|im_end|>@\n",
        "<|im_start|>user\ngh?<|im_end|>\n<|im_start|>assistant\n@ij<|im_end|>@\n",
        "<|im_start|>user\nx\x1b[31m<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n@Ho<|im_end|>@\n",
    ]
    tokenizer = AutoTokenizer.from_pretrained(chat_base)
    expected = ""
    for number, text in enumerate(texts, 1):
        before, learned, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split("@"))
        num = len(before) + len(learned) + len(after)
        shown = text.replace("@", "[[", 1).replace("@", "]]").replace("\x1b", "\\x1b")
        expected += f"row {number} of {file}: {num} tokens, {len(learned)} learned\n{shown}\n"
    assert outcome.out == f"{expected}3 of 3 conversations\nnote: columns and keys that were not used: `id` (1 rows)\n"


@pytest.mark.parametrize(("is_terminal", "no_colour"), [(True, None), (True, "1"), (False, None)])
def test_preview_marks_in_colour_on_a_terminal_alone_and_says_what_is_cut_off(monkeypatch, is_terminal, no_colour):
    monkeypatch.setattr("sys.stdout", type("Output", (), {"isatty": lambda _: is_terminal})())
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_colour:
        monkeypatch.setenv("NO_COLOR", no_colour)
    encoding = ChatEncoding(make_tokenizer("llama3"), date="2024-07-26")
    example = example_from_row(dialog("caf\u00e9 Paris"), "row 1")
    start, end = ("\x1b[1;32m", "\x1b[0m") if is_terminal and not no_colour else ("[[", "]]")
    before = (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    ids = encoding.tokenizer(before, add_special_tokens=False)["input_ids"]
    answer = encoding.tokenizer("caf\u00e9 Paris<|eot_id|>", add_special_tokens=False)["input_ids"]
    head = f"row 1: {len(ids) + len(answer)} tokens, {len(answer)} learned"
    whole = f"{head}\n{before}{start}caf\u00e9 Paris<|eot_id|>{end}\n"
    assert show_example(example, encoding, 999) == whole
    cut = show_example(example, encoding, len(ids) + len(answer) - 1)
    assert cut == whole.replace("<|eot_id|>" + end, end).replace(
        head.removeprefix("row 1: "),
        f"{len(ids) + len(answer) - 1} tokens, {len(answer) - 1} learned, 1 more cut off by --seq-len",
    )


def test_check_data_lists_all_bad_rows_by_reason(sft, tmp_path):
    """Of reading, of the template and of the length, in one run."""
    rows = [dialog(), dialog(""), {"text": "a"}, dialog(ask="abcd " * 80), dialog(""), dialog(ask="gh?"), 5]
    write_chats(tmp_path, rows)
    outcome = sft("--dataset", "chats.jsonl", "--check-data")
    assert outcome.code == 2
    ran_nothing(outcome, tmp_path)
    file = tmp_path / "chats.jsonl"
    head, *lines = outcome.out.splitlines()
    assert head.startswith(f"{file}: 7 rows, 5 faults; usable: 2 conversations, ")
    assert [line for line in lines if not line.startswith("  ")] == [
        "2 an empty assistant turn:",
        "1 no format fits:",
        "1 no object with columns:",
        "1 answers that --seq-len cuts off:",
    ]
    assert lines[1:3] == [
        f"  --dataset: row {number} of {file} has an empty assistant turn (message 2); leave it out"
        for number in (2, 5)
    ]
    assert f"--seq-len: row 4 of {file} has " in lines[-1]
    write_chats(tmp_path, [dialog(), dialog(ask="gh?")])
    outcome = sft("--dataset", "chats.jsonl", "--check-data")
    assert (outcome.code, outcome.out.count("\n")) == (0, 1)
    assert "2 rows, 0 faults; usable: 2 conversations" in outcome.out


def test_a_row_error_survives_the_way_to_another_process():
    error = pickle.loads(pickle.dumps(RowError("--dataset", "row 1 is bad", "badness")))
    assert (str(error), error.reason) == ("--dataset: row 1 is bad", "badness")


def test_the_odd_files_are_listed_by_check_data_too(sft, odd_folder):
    outcome = sft("--dataset", odd_folder, "--check-data")
    assert outcome.code == 2
    listed = [line for line in outcome.out.splitlines() if line.startswith("  --")]
    assert len(listed) == sum(len(bad) for _, _, bad in ODD_FILES.values())


def test_bad_rows_are_left_out_and_counted_and_the_run_is_that_of_the_others(sft, tmp_path):
    good = [dialog(f"a{i}", ask=f"q{i}") for i in range(12)]
    write_chats(tmp_path, good)
    short = ["--dataset", "chats.jsonl", "--max-steps", 2, "--num-answers", 0]
    assert sft(*short, "--output-dir", "good").code == 0
    write_chats(tmp_path, [{"text": "a"}, *good[:5], dialog(""), *good[5:], dialog(""), dialog(ask="abcd " * 80)])
    refused = sft(*short, "--output-dir", "run")
    assert (refused.code, "row 1 of" in refused.err) == (2, True)
    done = sft(*short, "--output-dir", "run", "--skip-bad-rows")
    assert done.code == 0, done.err
    assert (
        "note: 4 of 16 rows are bad and left out: 2 an empty assistant turn, 1 no format fits, 1 answers that --seq-len"
        in done.out
    )
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("good", "run")]
    assert results[1]["num_bad_rows"] == 4
    assert results[0]["parameter_hashes"] == results[1]["parameter_hashes"]
    for args in (["--skip-bad-rows"], ["--columns", "system=x"]):
        other = sft("--resume", "good", "--max-steps", 8, *args)
        assert (other.code, args[0] in other.err) == (2, True), other.err
    write_chats(tmp_path, [{"text": "a"}, dialog("")])
    refused = sft("--dataset", "chats.jsonl", "--output-dir", "none", "--skip-bad-rows")
    assert "--skip-bad-rows: every row of" in refused.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--preview", "0"], "--preview: 0 must be above 0"),
        (["--preview", "2", "--check-data"], "--preview: --check-data does something else"),
        (["--preview", "two"], "--preview"),
        (["--columns", "role"], "--columns: 'role' is not NAME=YOURS"),
        (["--dataset", "stdlib", "--columns", "role=from"], "--columns: the standard library has no columns"),
    ],
)
def test_bad_options_of_the_data_are_one_sentence(sft, args, words):
    outcome = sft(*args)
    assert outcome.code == 2
    assert words in outcome.err


PAGE = (Path(__file__).parents[2] / "docs" / "training" / "data-formats.md").read_text(encoding="utf-8")
TABLE_ROW = re.compile(r"^\| (?:(?P<name>[^`|][^|]*) \| )?`(?P<row>\{.*\})` \| (?P<says>.*) \|$", re.MULTILINE)


def test_the_rows_on_the_page_of_formats_give_the_turns_or_the_sentences_beside_them():
    found = [match.groupdict() for match in TABLE_ROW.finditer(PAGE)]
    assert len([one for one in found if one["name"]]) >= 11
    assert len([one for one in found if not one["name"]]) >= 12
    for one in found:
        if one["name"]:
            example = example_from_row(json.loads(one["row"]), "row 2 of chats.jsonl")
            assert ", ".join(message["role"] for message in example.messages) == one["says"], one
        else:
            with pytest.raises(InputError) as caught:
                example_from_row(json.loads(one["row"]), "row 2 of chats.jsonl")
            assert str(caught.value) == one["says"]
    assert all(f"| `{kind}` |" in PAGE for kind in KINDS)


def test_the_page_of_formats_shows_what_the_commands_print(sft, tmp_path):
    rows = [dialog("Ho") | {"id": 7}, {"question": "Hi"}, dialog(" ")]
    write_chats(tmp_path, rows)
    for args in (["--check-data"], ["--preview", 1]):
        shown = sft("--dataset", "chats.jsonl", *args).out.replace(str(tmp_path), "/data")
        assert without_sizes(f"```text\n{shown}```") in without_sizes(PAGE), shown


def test_preview_shows_the_good_rows_and_counts_the_others(sft, tmp_path):
    """Also those that only the template refuses, up to the last row shown."""
    silent = (
        "{% for m in messages if m['content'] != 'Hush' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    )
    (tmp_path / "t.jinja").write_text(
        silent + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    write_chats(tmp_path, [{"question": "Hi"}, dialog("Hush"), dialog("Ho"), dialog(" "), dialog("He")])
    shown = sft("--dataset", "chats.jsonl", "--chat-template", "t.jinja", "--preview", 2)
    assert shown.code == 0, shown.err
    assert [f"row {n} of" in shown.out for n in (1, 2, 3, 4, 5)] == [False, False, True, False, True]
    assert "\nnote: 3 of 5 rows are bad, and would end a run: 1 no format fits" in shown.out
    assert "--skip-bad-rows" in shown.out.splitlines()[-1]
    left_out = sft("--dataset", "chats.jsonl", "--chat-template", "t.jinja", "--preview", 2, "--skip-bad-rows")
    assert "\nnote: 3 of 5 rows are bad and left out: 1 no format fits" in left_out.out
    write_chats(tmp_path, [{"question": "Hi"}, dialog(" ")])
    check_refused(
        sft("--dataset", "chats.jsonl", "--preview", 2), "--dataset", "every row", "`question`", "--check-data"
    )


def without_sizes(text):
    """Leave out how many tokens a text has, which is the tokenizer's affair."""
    return re.sub(r"\d+ (tokens|learned|of them targets)", r"N \1", text)
