"""Text, its split and the token cache, against what is in the files."""

from __future__ import annotations

import json
import sysconfig
import tracemalloc
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from finetune.config.errors import InputError
from finetune.config.recipe import read_recipe, recipe_from
from finetune.data.corpus import PIECE_BYTES, STDLIB_LEFT_OUT, open_corpus
from finetune.models.tokens import BATCH_CHARS, load_tokenizer, token_cache, train_tokenizer
from finetune.training.train_step import Blocks


@pytest.fixture
def recipe_of(recipe_file):
    import dataclasses

    base = dataclasses.asdict(read_recipe(str(recipe_file)))
    return lambda dataset, **more: recipe_from({**base, "dataset": str(dataset), **more}, "a test")


def documents(corpus):
    """{part: [whole documents]}, put together from the pieces."""
    found, text = {"train": [], "validation": []}, ""
    for piece in corpus.pieces():
        text += piece.text
        if piece.ends:
            found[piece.part].append(text)
            text = ""
    assert text == ""
    return found


def test_split_is_by_file_disjoint_complete_and_repeatable(recipe_of, texts):
    found = documents(open_corpus(recipe_of(texts)))
    assert found == documents(open_corpus(recipe_of(texts)))
    assert not set(found["train"]) & set(found["validation"])
    contents = Counter(p.read_text() for p in texts.iterdir())
    assert Counter(found["train"] + found["validation"]) == contents
    share = sum(map(len, found["validation"])) / sum(map(len, contents))
    assert 0.05 <= share <= 0.16  # asked for 0.1, in whole files of about 0.042


def test_duplicate_files_are_read_once(recipe_of, texts, tmp_path):
    import shutil

    shutil.copytree(texts, tmp_path / "c")
    for i in range(5):
        shutil.copy(texts / f"text0{i}.txt", tmp_path / "c" / f"copy{i}.txt")
    found = documents(open_corpus(recipe_of(tmp_path / "c")))
    assert len(found["train"] + found["validation"]) == len(list(texts.iterdir()))


def test_default_data_is_the_standard_library_without_tests(recipe_of):
    root = Path(sysconfig.get_paths()["stdlib"])
    found = documents(open_corpus(recipe_of("stdlib", validation_fraction=0.02)))
    everything = found["train"] + found["validation"]
    assert len(set(everything)) == len(everything) > 400
    size = sum(len(text.encode()) for text in everything)
    assert 8e6 < size < 20e6
    assert (root / "argparse.py").read_text(encoding="utf-8") in everything
    some_test = next(p for p in (root / "unittest").glob("**/test*.py")) if (root / "test").exists() else None
    assert {"test", "tests", "idle_test", "site-packages"} <= STDLIB_LEFT_OUT
    if some_test is not None and STDLIB_LEFT_OUT & set(some_test.relative_to(root).parts):
        assert some_test.read_text(encoding="utf-8") not in everything
    assert 0.01 < sum(len(t.encode()) for t in found["validation"]) / size < 0.04


def test_a_lone_file_is_split_at_line_ends(recipe_of, tmp_path):
    text = "".join(f"line {i} of a longer text, caf\u00e9\n" for i in range(5000))
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    corpus = open_corpus(recipe_of(tmp_path / "one.txt"))
    found = documents(corpus)
    assert found["validation"]
    assert sorted("".join(found["train"] + found["validation"]).splitlines()) == sorted(text.splitlines())
    assert all(piece.text.endswith("\n") for piece in corpus.pieces())


def test_long_documents_come_in_bounded_pieces_and_lose_nothing(recipe_of, tmp_path):
    folder = tmp_path / "long"
    folder.mkdir()
    wide = "\u00e9" * PIECE_BYTES  # two bytes each, no line end: cut inside, between characters
    (folder / "a.txt").write_text(wide, encoding="utf-8")
    (folder / "b.txt").write_text("x\n" * PIECE_BYTES, encoding="utf-8")
    corpus = open_corpus(recipe_of(folder))
    assert max(len(piece.text.encode()) for piece in corpus.pieces()) <= 2 * PIECE_BYTES
    found = documents(corpus)
    assert sorted(found["train"] + found["validation"]) == ["x\n" * PIECE_BYTES, wide]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))


def write_parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": rows}), path)


def write_saved(path, rows):
    import datasets

    datasets.Dataset.from_dict({"body": rows}).save_to_disk(path)


@pytest.mark.parametrize(
    ("name", "write"), [("r.jsonl", write_jsonl), ("r.parquet", write_parquet), ("saved", write_saved)]
)
def test_rows_of_all_formats_give_the_same_split(recipe_of, tmp_path, name, write):
    rows = [f"row number {i} says {i * i}" for i in range(400)]
    write(tmp_path / name, [*rows, *rows[:50], "  "])
    found = documents(open_corpus(recipe_of(tmp_path / name, text_column="body")))
    assert sorted(found["train"] + found["validation"]) == sorted(rows)
    write_jsonl(tmp_path / "other.jsonl", rows)
    same = documents(open_corpus(recipe_of(tmp_path / "other.jsonl", text_column="body")))
    assert set(found["validation"]) == set(same["validation"])
    assert 20 <= len(found["validation"]) <= 60


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("no_such.txt", None, ["--dataset", "no_such.txt"]),
        ("empty.txt", b"", ["--dataset", "empty"]),
        ("latin.txt", b"caf\xe9\n" * 99, ["--dataset", "UTF-8"]),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', ["--dataset", "bad.jsonl"]),
        ("other.jsonl", b'{"body": "a"}\n', ["--text-column", "'body'"]),
        ("number.jsonl", b'{"text": 5}\n', ["--text-column", "int"]),
        ("bad.parquet", b"PAR1 no", ["--dataset", "bad.parquet"]),
        ("empty_folder", "folder", ["--dataset", ".parquet"]),
        ("small.txt", b"too small\n" * 20, ["--dataset", "--seq-len 32"]),
    ],
)
def test_a_bad_dataset_is_refused_in_one_sentence(pretrain, tmp_path, name, content, words):
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    outcome = pretrain("--dataset", tmp_path / name)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err
    assert sorted(tmp_path.rglob("*")) == before


def test_cache_holds_the_tokens_of_each_document_and_is_keyed_by_content(recipe_of, tmp_path, texts):
    import shutil

    shutil.copytree(texts, tmp_path / "c")
    recipe = recipe_of(tmp_path / "c")
    corpus = open_corpus(recipe)
    tokenizer = load_tokenizer(str(train_tokenizer(corpus, 288)))
    cache = token_cache(corpus, tokenizer)
    found = documents(corpus)
    for part, tokens in (("train", cache.train), ("validation", cache.validation)):
        assert isinstance(tokens, np.memmap)
        expected = tokenizer.eos_token.join(found[part]) + tokenizer.eos_token
        assert tokenizer.decode(tokens.tolist()) == expected
        assert cache.meta[part]["bytes"] == sum(len(text.encode()) for text in found[part])
    again = token_cache(open_corpus(recipe), tokenizer)
    assert again.train.filename == cache.train.filename
    (tmp_path / "c" / "text00.txt").write_text("something else\n" * 50)
    changed = open_corpus(recipe)
    assert changed.hash != corpus.hash
    assert token_cache(changed, tokenizer).train.filename != cache.train.filename


@pytest.mark.parametrize("damage", ["cut", "grown", "gone", "meta"])
def test_a_damaged_cache_of_tokens_is_refused_by_its_folder(recipe_of, texts, tmp_path, monkeypatch, damage):
    """memmap takes any length that is a multiple of the dtype, and a run would train on what is there."""
    monkeypatch.setenv("MUON8BIT_CACHE", str(tmp_path / "cache"))
    corpus = open_corpus(recipe_of(texts))
    tokenizer = load_tokenizer(str(train_tokenizer(corpus, 288)))
    file = Path(token_cache(corpus, tokenizer).train.filename)
    content = file.read_bytes()
    if damage == "meta":
        (file.parent / "meta.json").write_text("{}")
    elif damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-2] if damage == "cut" else content + b"\0\0")
    with pytest.raises(InputError, match=rf"(?s)--dataset.*{file.parent}.*delete that folder"):
        token_cache(corpus, tokenizer)


def test_tokenizer_is_trained_on_the_training_part_only(recipe_of, tmp_path, texts):
    import shutil

    shutil.copytree(texts, tmp_path / "c")
    held_out = documents(open_corpus(recipe_of(tmp_path / "c")))["validation"][0]
    name = next(p.name for p in texts.iterdir() if p.read_text() == held_out)
    (tmp_path / "c" / name).write_text("QQQQ" * (len(held_out) // 4))  # as long: the split stays
    corpus = open_corpus(recipe_of(tmp_path / "c"))
    assert any("QQQQ" in text for text in documents(corpus)["validation"])
    tokenizer = load_tokenizer(str(train_tokenizer(corpus, 288)))
    assert "QQ" not in tokenizer.get_vocab()
    assert len(tokenizer) == 288


def test_a_failed_write_leaves_no_cache(recipe_of, tmp_path):
    from finetune.models.tokens import cache_root

    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 3 + "not json\n")
    (tmp_path / "ok.txt").write_text("some text\n" * 100)
    tokenizer = load_tokenizer(str(train_tokenizer(open_corpus(recipe_of(tmp_path / "ok.txt")), 257)))
    before = sorted((cache_root() / "tokens").glob("*"))
    with pytest.raises(InputError, match=r"a\.jsonl"):
        token_cache(open_corpus(recipe_of(tmp_path / "a.jsonl")), tokenizer)
    assert sorted((cache_root() / "tokens").glob("*")) == before


def test_a_stream_is_read_only_as_far_as_the_run_needs(pretrain, recipe_of, texts, tmp_path, monkeypatch):
    """An endless stream: 6 steps of 4 sequences of 32 tokens are taken, and hardly a document more."""
    import datasets

    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield {"text": f"document {read} has its own number, {read * read}"}

    def load(name, config, split, streaming):
        assert (name, config, split, streaming) == ("some/name", None, "train", True)
        return datasets.IterableDataset.from_generator(endless)

    monkeypatch.setattr(datasets, "load_dataset", load)
    tokenizer = train_tokenizer(open_corpus(recipe_of(texts)), 288)
    outcome = pretrain("--dataset", "some/name", "--streaming", "--tokenizer", tokenizer, "--output-dir", "run")
    assert outcome.code == 0, outcome.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["tokens"] == 6 * 4 * 32
    # The stream is left after the batch of `BATCH_CHARS` characters in which the run's tokens are complete.
    assert read * 40 < 2 * BATCH_CHARS


class Traced:
    """A tokenizer whose encodings are Python objects, so that Python's allocator counts them too."""

    def __init__(self, own):
        self.own = own

    def __getattr__(self, name):
        return getattr(self.own, name)

    def encode_batch_fast(self, texts, **options):
        return [SimpleNamespace(ids=encoding.ids) for encoding in self.own.encode_batch_fast(texts, **options)]


def test_memory_does_not_grow_with_the_corpus(recipe_of, tmp_path, monkeypatch):
    """Of what Python and numpy allocate while 4 MB of text, rather than 1 MB, are tokenized and read as blocks."""
    line = "the quick brown foxes jumped over lazy dogs again and again and again\n"
    (tmp_path / "words.txt").write_text(line * 50)
    tokenizer = load_tokenizer(str(train_tokenizer(open_corpus(recipe_of(tmp_path / "words.txt")), 288)))
    own = Tokenizer.from_str
    monkeypatch.setattr("finetune.models.tokens.Tokenizer", SimpleNamespace(from_str=lambda text: Traced(own(text))))

    def peaks_and_tokens(name, num_files):
        """Bytes at once while writing, and while reading, and bytes of the tokens. All files have one size."""
        (tmp_path / name).mkdir()
        for i in range(num_files):
            (tmp_path / name / f"{i}.txt").write_text(f"{name} {i}\n" + line * 900)
        recipe = recipe_of(tmp_path / name)
        tracemalloc.start()
        try:
            cache = token_cache(open_corpus(recipe), tokenizer)
            writing = tracemalloc.get_traced_memory()[1]
            tracemalloc.reset_peak()
            blocks = Blocks(cache.train, 32)
            for i in range(0, len(blocks), 64):
                blocks.batch([blocks.shuffled(i + j) for j in range(64)], torch.device("cpu"))
            return writing, tracemalloc.get_traced_memory()[1], cache.train.nbytes
        finally:
            tracemalloc.stop()

    peaks_and_tokens("first", 5)  # imports
    small, large = peaks_and_tokens("small", 16), peaks_and_tokens("large", 64)
    growth = [more - less for less, more in zip(small, large, strict=True)]
    assert growth[2] > 1.5e6
    # A permutation of the blocks is 8 bytes for 32 tokens of 2, copied once: a quarter. Tokens that stay are one whole.
    assert max(growth[:2]) < 0.5 * growth[2], (small, large)
