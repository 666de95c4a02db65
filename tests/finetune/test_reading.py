"""Files that users give, as other programs write them: byte order marks, other encodings, halves, damage."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import json
import lzma
import struct

import pytest

from finetune import pretrain, sft
from finetune.config.errors import InputError
from finetune.config.reading import read_values
from finetune.config.recipe import Recipe, read_model_config, read_recipe, recipe_from
from finetune.config.sft_recipe import sft_recipe_from
from finetune.data.chat import load_examples
from finetune.data.corpus import PIECE_BYTES, open_corpus
from finetune.data.parquet_files import parquet_objects
from finetune.data.readers import opened_rows
from finetune.data.report import DataReport
from finetune.data.texts import check_characters, read_text
from finetune.models.adapters import base_of_adapter
from finetune.models.pretrained import pretrained_with

MARK = b"\xef\xbb\xbf"
ROWS = [{"text": f"row {i} caf\u00e9", "prompt": f"row {i} caf\u00e9", "completion": "yes"} for i in range(3)]


def lines(rows=ROWS, end="\n"):
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


@pytest.fixture
def texts_of(recipe_file):
    """Documents that pretraining reads of a dataset."""
    base = dataclasses.asdict(read_recipe(str(recipe_file)))

    def read(dataset):
        found, text = [], ""
        for piece in open_corpus(recipe_from({**base, "dataset": str(dataset)}, "a test")).pieces():
            text += piece.text
            if piece.ends:
                found.append(text)
                text = ""
        return found

    return read


def prompts_of(dataset):
    """Prompts that fine-tuning reads of a dataset."""
    return [example.messages[0]["content"] for example in load_examples(str(dataset))]


@pytest.mark.parametrize(
    "content",
    [
        MARK + lines(),
        MARK + lines(end="\r\n"),
        lines(end="\r"),
        MARK + lines(ROWS[:1]) + MARK + lines(ROWS[1:]),  # joined files
        b"\n \r\n" + lines() + b"\n",
    ],
    ids=["mark", "mark and CRLF", "CR", "joined", "blank lines"],
)
def test_jsonl_of_other_systems_gives_the_same_rows(tmp_path, texts_of, content):
    (tmp_path / "r.jsonl").write_bytes(content)
    assert sorted(texts_of(tmp_path / "r.jsonl")) == prompts_of(tmp_path / "r.jsonl") == [r["text"] for r in ROWS]


@pytest.mark.parametrize("name", ["r.json", "r.json.gz", "r.jsonl.gz", "r.csv"])
def test_a_lone_file_of_rows_is_no_text_of_its_syntax(tmp_path, texts_of, name):
    array = json.dumps(ROWS, indent=1).encode()
    table = "text\n" + "".join(row["text"] + "\n" for row in ROWS)
    contents = {"r.json": array, "r.json.gz": gzip.compress(array), "r.jsonl.gz": gzip.compress(lines())}
    (tmp_path / name).write_bytes(contents.get(name, table.encode()))
    assert texts_of(tmp_path / name) == [r["text"] for r in ROWS]


def test_what_pretraining_does_not_read_of_a_folder_is_named(tmp_path, recipe_file):
    for name in ("a.txt", "b.json", "c.md"):
        (tmp_path / name).write_text("some text\n")
    recipe = dataclasses.replace(read_recipe(str(recipe_file)), dataset=str(tmp_path))
    assert open_corpus(recipe).label == f"{tmp_path} (not read: b.json, c.md)"


def test_a_mark_is_no_text_wherever_text_is_read(tmp_path, texts_of):
    text = "a line of text, caf\u00e9\n" * 300
    for name, content in (("plain", text.encode()), ("marked", MARK + text.encode())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_bytes(content)
    stretches = texts_of(tmp_path / "plain")  # a lone file is cut
    assert "".join(stretches) == text
    assert texts_of(tmp_path / "marked") == stretches
    (tmp_path / "plain" / "b.txt").write_bytes(MARK + text.encode())
    assert texts_of(tmp_path / "plain") == stretches  # the same content, once
    (tmp_path / "plain" / "a.txt").write_bytes(MARK)
    (tmp_path / "plain" / "b.txt").write_bytes(MARK)
    with pytest.raises(InputError, match="plain is empty"):
        texts_of(tmp_path / "plain")
    (tmp_path / "r.yaml").write_bytes(MARK + b"lr: 1e-3\ndate: 2024-07-26\n")
    values, origin = read_values(str(tmp_path / "r.yaml"), tmp_path, Recipe)
    assert set(values) == {"lr", "date", "name"}
    assert sft_recipe_from({**values, "model": "m"}, origin).date == "2024-07-26"  # YAML made a date of it
    (tmp_path / "config.json").write_bytes(MARK + b'{"model_type": "llama"}')
    assert read_model_config(str(tmp_path)) == {"model_type": "llama"}
    (tmp_path / "t.jinja").write_bytes(MARK + b"{{ x }}")
    assert read_text(tmp_path / "t.jinja", "--chat-template") == "{{ x }}"
    (tmp_path / "base").mkdir()
    for content, expected in ((MARK + b'{"optimizer": "adamw"}', "adamw"), (b"[1]", None), (b"\xff", None)):
        (tmp_path / "result.json").write_bytes(content)
        assert pretrained_with(str(tmp_path / "base"), None) == expected


def test_a_long_line_is_cut_between_characters(tmp_path, texts_of):
    """A file without line ends, each character of three bytes: a cut after PIECE_BYTES would fall inside one."""
    text = "\u20ac" * (64 * PIECE_BYTES // 2)
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    found = texts_of(tmp_path / "one.txt")
    assert len(found) > 1
    assert "".join(found) == text


HALF = '{"text": "hi \\ud83d", "prompt": "hi \\ud83d", "completion": "yes"}\n'
BAD_LINES = {
    "half a character": (HALF.encode(), ["of row 3 of", "of line 3 of"], "\\ud83d, a lone surrogate) at position 4"),
    "latin-1": ('{"text": "caf\u00e9"}\n'.encode("latin-1"), ["line 3 of"] * 2, "is not UTF-8"),
    "a half in UTF-8": (b'{"text": "\xed\xa0\xbd"}\n', ["line 3 of"] * 2, "is not UTF-8"),
    "NUL bytes": (
        b"\0" * 64 + b"\n",
        ["line 3 of"] * 2,
        "is no JSON: it holds NUL bytes, as where a write was cut off",
    ),
    "over several lines": (b'{\n"text": "a"}\n', ["line 3 of"] * 2, "each line must hold one whole value"),
    "no end": (b'{"text": "a', ["line 3 of"] * 2, "is no JSON"),
    "too deep": (b"[" * 100_000 + b"\n", ["line 3 of"] * 2, "cannot be read as JSON"),
    "too many digits": (b'{"text": ' + b"1" * 5000 + b"}\n", ["line 3 of"] * 2, "cannot be read as JSON"),
    "a list": (b"[1]\n", ["row 3 of", "line 3 of"], "no object with columns"),
    "a number": (b"5\n", ["row 3 of", "line 3 of"], "no object with columns"),
    "null": (b"null\n", ["row 3 of", "line 3 of"], "no object with columns"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_line_that_cannot_be_read_is_named_with_its_file(tmp_path, texts_of, kind):
    content, places, reason = BAD_LINES[kind]
    file = tmp_path / "r.jsonl"
    file.write_bytes(lines(ROWS[:2]) + content)
    for read, place in zip((prompts_of, texts_of), places, strict=True):
        check_sentence(lambda read=read: read(file), "--dataset", f"{place} {file}", reason)


def check_sentence(work, option, *words):
    with pytest.raises(InputError) as caught:
        work()
    assert caught.value.args[0] == option
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "seems"),
    [
        (b"\xff\xfe" + lines().decode().encode("utf-16-le"), "UTF-16"),
        (b"\xfe\xff" + lines().decode().encode("utf-16-be"), "UTF-16"),
        (gzip.compress(lines()), "gzip"),
        (gzip.compress(lines())[:-9], "gzip"),
        (lzma.compress(lines()), "(xz)); unpack it"),
        (bz2.compress(lines()), "(bzip2)); unpack it"),
        (b"\x28\xb5\x2f\xfd\x04\xff", "(zstd)); unpack it"),
        (lines().decode().encode("utf-32"), "UTF-32"),
    ],
    ids=["little endian", "big endian", "gzip", "broken gzip", "xz", "bzip2", "zstd", "utf-32"],
)
def test_another_encoding_is_told(tmp_path, texts_of, content, seems):
    (tmp_path / "r.jsonl").write_bytes(content)
    (tmp_path / "r.txt").write_bytes(content * 3)
    for read in (prompts_of, texts_of):
        check_sentence(lambda read=read: read(tmp_path / "r.jsonl"), "--dataset", "line 1 of", seems, "as UTF-8")
    check_sentence(lambda: texts_of(tmp_path / "r.txt"), "--dataset", f"{tmp_path / 'r.txt'} is not UTF-8", seems)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_is_told(tmp_path, texts_of, encoding):
    (tmp_path / "r.jsonl").write_bytes(lines().decode().encode(encoding))
    (tmp_path / "r.txt").write_bytes(("a line of text\n" * 200).encode(encoding))
    for read in (prompts_of, texts_of):
        check_sentence(lambda read=read: read(tmp_path / "r.jsonl"), "--dataset", "line 1 of", "UTF-16", "as UTF-8")
    check_sentence(lambda: texts_of(tmp_path / "r.txt"), "--dataset", str(tmp_path / "r.txt"), "UTF-16", "as UTF-8")


@pytest.mark.parametrize("value", ["x" * 5000, "~nobody-of-this-name/a.jsonl"])
@pytest.mark.parametrize("script", [pretrain, sft])
def test_a_path_that_cannot_be_looked_up_is_one_sentence(value, script):
    check_sentence(lambda: script.parse(["--dataset", value]), "--dataset", "cannot look up", value[:300])


def test_a_parquet_value_that_python_cannot_hold_names_its_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"when": pa.array([0, 2**62], pa.timestamp("us"))})  # the year 148000
    pq.write_table(table, tmp_path / "r.parquet")
    next(rows := parquet_objects(tmp_path / "r.parquet", ["text"], DataReport()))
    check_sentence(lambda: next(rows), "--dataset", f"row 2 of {tmp_path / 'r.parquet'}", "leave it out")


def test_a_bad_byte_of_a_text_is_counted_from_its_file(tmp_path, texts_of):
    """Behind a mark, several pieces and a character that a piece cuts."""
    before = MARK + "\u20ac".encode() * PIECE_BYTES
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.txt").write_bytes(before + b"\xe9 and more")
    (tmp_path / "a" / "b.txt").write_bytes(b"other")
    check_sentence(
        lambda: texts_of(tmp_path / "a"), "--dataset", f"byte {len(before) + 1} of {tmp_path / 'a' / 'a.txt'}"
    )
    (tmp_path / "a" / "a.txt").write_bytes(before[:-1])
    check_sentence(
        lambda: texts_of(tmp_path / "a"), "--dataset", f"byte {len(before) - 2} of {tmp_path / 'a' / 'a.txt'}"
    )


def not_utf8_column(values):
    """An Arrow column of text whose bytes nobody checked, as foreign writers leave them."""
    import pyarrow as pa

    offsets = struct.pack(f"<{len(values) + 1}i", 0, *[sum(map(len, values[: i + 1])) for i in range(len(values))])
    return pa.Array.from_buffers(
        pa.string(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))]
    )


def test_a_parquet_row_that_is_not_utf8_is_named(tmp_path, texts_of):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "r.parquet"
    column = not_utf8_column([b"row %d" % i if i != 299 else b"caf\xe9" for i in range(400)])
    pq.write_table(pa.table({"text": column, "prompt": column, "completion": column}), file)
    for read in (prompts_of, texts_of):
        check_sentence(lambda read=read: read(file), "--dataset", f"row 300 of {file} holds text that is not UTF-8")


@pytest.mark.parametrize("damage", ["truncated", "page", "empty", "folder"])
def test_a_damaged_parquet_is_one_sentence(tmp_path, texts_of, damage):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "r.parquet"
    if damage == "folder":
        (tmp_path / "d" / "r.parquet").mkdir(parents=True)  # the name of a file, and one that has rows beside it
        (tmp_path / "d" / "r.jsonl").write_bytes(lines())
        assert prompts_of(tmp_path / "d") == sorted(texts_of(tmp_path / "d")) == [r["text"] for r in ROWS]
        return
    pq.write_table(pa.table({key: [r[key] * 99 for r in ROWS] for key in ROWS[0]}), file, compression="gzip")
    content = bytearray(file.read_bytes())
    if damage == "page":
        end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")  # of the pages; the footer follows
        content[4:end] = bytes(end - 4)
    file.write_bytes({"truncated": content[:-20], "page": content, "empty": b""}[damage])
    check_sentence(lambda: prompts_of(file), "--dataset", str(file))
    check_sentence(lambda: texts_of(file), "--dataset", str(file))


def test_a_row_that_datasets_cannot_read_is_named():
    def rows():
        yield {"text": "a"}
        raise OSError("the connection is gone\nsince long")

    found = opened_rows(rows(), "some/name", iter([3, 7]))
    assert next(found) == (3, {"text": "a"})
    check_sentence(lambda: next(found), "--dataset", "row 7 of some/name: the connection is gone")


def test_a_broken_link_in_a_folder_is_not_passed_over(tmp_path, texts_of):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_bytes(lines())
    (tmp_path / "d" / "b.jsonl").symlink_to(tmp_path / "nowhere")
    for read in (prompts_of, texts_of):
        check_sentence(lambda read=read: read(tmp_path / "d"), "--dataset", "cannot read", "b.jsonl", "No such file")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"lr: caf\xe9\n", "byte 8 is not UTF-8"),
        (b"\xff\xfel\0r\0", "UTF-16"),
        (b"date: 2024-13-45\n", "month"),
        (b"lr: [1\n", "line 2"),
        (b"a: \0\n", "cannot read"),
        (b"- lr\n", "no mapping"),
        (b"[" * 2000, "cannot read"),
    ],
    ids=["latin-1", "UTF-16", "no day", "no YAML", "NUL", "a list", "too deep"],
)
def test_a_recipe_that_cannot_be_read_is_one_sentence(tmp_path, content, word):
    (tmp_path / "r.yaml").write_bytes(content)
    check_sentence(
        lambda: read_values(str(tmp_path / "r.yaml"), tmp_path, Recipe), "--recipe", str(tmp_path / "r.yaml"), word
    )


def test_a_key_that_is_no_text_is_an_unknown_key(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"model: m\n1: 2\nlearning: 3\n")
    values, origin = read_values(str(tmp_path / "r.yaml"), tmp_path, Recipe)
    check_sentence(lambda: sft_recipe_from(values, origin), "--recipe", "unknown key '1'")


@pytest.mark.parametrize("content", [b"[1]", b'"text"', b"{", b"\xff\xfe{\0", b"[" * 100_000])
def test_a_json_file_that_is_not_what_it_should_be_is_one_sentence(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    (tmp_path / "adapter_config.json").write_bytes(content)
    check_sentence(lambda: read_model_config(str(tmp_path)), "--model-config", "config.json")
    check_sentence(lambda: base_of_adapter(tmp_path, "--adapter"), "--adapter", "adapter_config.json")


def test_whole_characters_pass():
    check_characters("caf\u00e9 \U0001f600 \0", "a text")
