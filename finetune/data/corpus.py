"""Text to train on: pieces of documents, without duplicates, split into training and validation.

Text files are split **by file** (a lone file by stretches of it), rows of .jsonl, .parquet and `datasets` by the
hash of their text. Both are deterministic, and no text lies on both sides. A piece is at most `PIECE_BYTES` long, so
nothing here holds more than that, one row, or `REMEMBERED_ROWS` row digests.
"""

from __future__ import annotations

import codecs
import hashlib
import platform
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from finetune.config.errors import InputError
from finetune.config.recipe import Recipe
from finetune.data.files import row_kind
from finetune.data.readers import hub_rows, is_saved_dataset, text_rows
from finetune.data.report import some
from finetune.data.texts import BYTE_ORDER_MARK, SAVE, is_wide, not_utf8

Part: TypeAlias = Literal["train", "validation"]

PIECE_BYTES = 2**16
# A lone text file is cut into this many stretches at line ends, so that some can be held out.
STRETCHES = 64
# Digests kept to find duplicate rows (about 100 MB in the worst case). Later duplicates stay, on the same side.
REMEMBERED_ROWS = 1_000_000
ROW_SUFFIXES = (".jsonl", ".parquet")  # of a folder; a file that is given by itself may be of any kind of rows
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class CorpusPiece(NamedTuple):
    """A stretch of text of one document; `ends` marks its last piece."""

    part: Part
    text: str
    ends: bool


class Stretch(NamedTuple):
    """Bytes [start, end) of a text file; `name` (relative, with `/`) decides its side of the split."""

    name: str
    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class Corpus:
    """Text with a name.

    Args:
        label: what was asked for.
        hash: hex SHA-256 of the content and of the way it is split; for a `datasets` name, of its fingerprint.
        pieces: makes an iterator over all pieces, in a fixed order.
        endless: whether the text is a stream that is read only as far as needed.
    """

    label: str
    hash: str
    pieces: Callable[[], Iterator[CorpusPiece]]
    endless: bool = False


def check_exists(dataset: str) -> None:
    """Find out early that a dataset which can only be a path is not there: an InputError."""
    path = Path(dataset)
    if not path.exists() and (path.is_absolute() or path.suffix.lower() == ".txt" or row_kind(path)):
        raise InputError("--dataset", f"there is no {dataset}; give a file, a folder or a name for `datasets`")


def open_corpus(recipe: Recipe) -> Corpus:
    """Find the text that a recipe names. Reads every local file once, for its hash.

    Raises:
        InputError: nothing there, unreadable, or empty.
    """
    path = Path(recipe.dataset)
    if recipe.dataset == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [p for p in sorted(root.rglob("*.py")) if not STDLIB_LEFT_OUT & set(p.relative_to(root).parts)]
        label = f"source text of the standard library of Python {platform.python_version()}"
        return _local_corpus([p for p in files if _is_utf8(p)], root, label, recipe)
    if path.is_file():
        return _local_corpus([path], path.parent, recipe.dataset, recipe)
    if path.is_dir() and not is_saved_dataset(path):
        known = {".txt", *ROW_SUFFIXES}
        files = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in known and not p.is_dir()]
        others = sorted(str(p.relative_to(path)) for p in {*path.rglob("*")} - {*files} if not p.is_dir())
        label = f"{recipe.dataset} (not read: {some(others)})" if others else recipe.dataset
        return _local_corpus(files, path, label, recipe)
    identity, rows = hub_rows(recipe)
    digest = hashlib.sha256(f"{identity}\0{recipe.validation_fraction}".encode()).hexdigest()
    return Corpus(
        recipe.dataset, digest, lambda: _row_pieces(rows(), recipe.validation_fraction), endless=recipe.streaming
    )


def _local_corpus(files: Sequence[Path], root: Path, label: str, recipe: Recipe) -> Corpus:
    if not files:
        raise InputError("--dataset", f"no .txt, .jsonl or .parquet file in {root}; give a folder that has some")
    digest = hashlib.sha256(f"{recipe.text_column}\0{recipe.validation_fraction}".encode())
    texts, row_files, seen = [], [], set()
    for file in files:
        content, start = _file_digest(file)
        size = file.stat().st_size
        if content in seen or size == start:
            continue
        seen.add(content)
        name = file.relative_to(root).as_posix()
        digest.update(f"{name}\0{content}\n".encode())
        if kind := row_kind(file):
            if file.suffix.lower() not in ROW_SUFFIXES:  # which release 0.1 took for text
                digest.update(f"rows of {kind}\n".encode())
            row_files.append(file)
        else:
            texts.append(Stretch(name, file, start, size))
    if not seen:
        raise InputError("--dataset", f"{label} is empty; give files with text in them")
    if len(texts) == 1 and not row_files:
        texts = _cut(texts[0])
    held_out = _held_out(texts, recipe.validation_fraction)
    digest.update("\n".join(sorted(held_out)).encode())

    def pieces() -> Iterator[CorpusPiece]:
        for stretch in texts:
            part: Part = "validation" if stretch.name in held_out else "train"
            yield from _text_pieces(stretch, part)
        for file in row_files:
            yield from _row_pieces(text_rows(file, recipe.text_column), recipe.validation_fraction)

    return Corpus(label, digest.hexdigest(), pieces)


def _file_digest(file: Path) -> tuple[str, int]:
    """Return the SHA-256 of a file's content, and where that begins: behind a byte order mark, if there is one."""
    digest, start = hashlib.sha256(), 0
    try:
        with file.open("rb") as opened:
            if opened.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
                start = len(BYTE_ORDER_MARK)
            opened.seek(start)
            while chunk := opened.read(2**20):
                digest.update(chunk)
    except OSError as error:
        raise InputError("--dataset", f"cannot read {file}: {error.strerror}") from None
    return digest.hexdigest(), start


def _is_utf8(file: Path) -> bool:
    try:
        return bool(file.read_bytes().decode("utf-8"))
    except (OSError, UnicodeDecodeError):
        return False


def _held_out(texts: Sequence[Stretch], fraction: float) -> set[str]:
    """Choose the stretches for validation, in the order of their names' hashes, until their bytes suffice.

    A stretch that would overshoot by half is passed over, so that a single large file does not decide the share.
    """
    goal = fraction * sum(s.end - s.start for s in texts)
    chosen: set[str] = set()
    size = 0
    for stretch in sorted(texts, key=lambda s: hashlib.sha256(s.name.encode()).digest()):
        if size + stretch.end - stretch.start <= 1.5 * goal:
            chosen.add(stretch.name)
            size += stretch.end - stretch.start
        if size >= goal:
            break
    if not chosen and len(texts) > 1:
        chosen.add(min(texts, key=lambda s: (s.end - s.start, s.name)).name)
    return chosen


def _cut(stretch: Stretch) -> list[Stretch]:
    """Cut a file into about `STRETCHES` stretches, each ending with a line (lines over `PIECE_BYTES` are cut)."""
    bounds = [stretch.start]
    with stretch.path.open("rb") as file:
        for i in range(1, STRETCHES):
            file.seek(max(stretch.start + (stretch.end - stretch.start) * i // STRETCHES, bounds[-1]))
            file.readline(PIECE_BYTES)
            bound = file.tell() + _rest_of_character(file.read(3))
            if bounds[-1] < bound < stretch.end:
                bounds.append(bound)
    bounds.append(stretch.end)
    return [Stretch(f"{stretch.name}#{i}", stretch.path, start, end) for i, (start, end) in enumerate(pairwise(bounds))]


def _rest_of_character(following: bytes) -> int:
    """Count the bytes, before the next character, that continue one in UTF-8: 0 unless a long line is cut inside it."""
    return next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))


def _text_pieces(stretch: Stretch, part: Part) -> Iterator[CorpusPiece]:
    """Yield the text of a stretch in pieces that end with a line wherever there is one."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest, left, undecoded = "", stretch.end - stretch.start, 0
    is_first = stretch.start in (0, len(BYTE_ORDER_MARK))
    try:
        with stretch.path.open("rb") as file:
            file.seek(stretch.start)
            while left > 0:
                raw = file.read(min(PIECE_BYTES, left))
                left = left - len(raw) if raw else 0
                undecoded = len(decoder.getstate()[0]) + len(raw)
                rest += decoder.decode(raw, final=left == 0)
                if is_first and is_wide(rest):
                    raise InputError("--dataset", f"{stretch.path} seems to be UTF-16 without a mark; {SAVE}")
                is_first = False
                cut = len(rest) if left == 0 else (rest.rfind("\n") + 1 or len(rest))
                yield CorpusPiece(part, rest[:cut], ends=left == 0)
                rest = rest[cut:]
    except OSError as error:
        raise InputError("--dataset", f"cannot read {stretch.path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        place = stretch.end - left - undecoded + error.start + 1
        raise InputError("--dataset", f"byte {place} of {stretch.path} {not_utf8(stretch.path)}") from None


def _row_pieces(rows: Iterator[str], fraction: float) -> Iterator[CorpusPiece]:
    """Yield rows as pieces, without empty ones and duplicates; the hash of a row's text decides its part."""
    seen: set[int] = set()
    for text in rows:
        if not text.strip():
            continue
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        if digest in seen:
            continue
        if len(seen) < REMEMBERED_ROWS:
            seen.add(digest)
        part: Part = "validation" if digest < fraction * 2**64 else "train"
        starts = range(0, len(text), PIECE_BYTES)
        for start in starts:
            yield CorpusPiece(part, text[start : start + PIECE_BYTES], ends=start == starts[-1])
