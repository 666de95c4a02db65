"""Files of rows as people have them: every kind, packed or not, and all that is wrong with odd ones."""

from __future__ import annotations

import csv
import gzip
import io
import json
import struct

import pytest

from finetune.config.errors import InputError
from finetune.data.chat import load_examples
from finetune.data.report import DataReport

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
    report = DataReport()
    found = load_examples(str(tmp_path), report=report)
    assert [example.messages[0]["content"] for example in found] == [row["prompt"] for row in ROWS[:3]]
    assert sorted(report.unread) == [
        "._a.jsonl (hidden)",
        ".ipynb_checkpoints/a-checkpoint.jsonl (hidden)",
        "a.jsonl.xz",
        "about.json (one object, no row)",
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
