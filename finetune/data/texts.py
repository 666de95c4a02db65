"""Text that users give: UTF-8 with or without a byte order mark, and nothing but characters. No torch in here."""

from __future__ import annotations

from pathlib import Path

from finetune.config.errors import InputError
from finetune.data.report import RowError

# Windows writes a byte order mark; this codec drops it where there is one.
ENCODING = "utf-8-sig"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SAVE = "save the file as UTF-8"
UNPACK = "unpack it, and save the text as UTF-8"
# How other files begin: what they are, and what to do.
OTHER_BEGINNINGS = {
    b"\xff\xfe\0\0": ("UTF-32", SAVE),
    b"\xff\xfe": ("UTF-16", SAVE),
    b"\xfe\xff": ("UTF-16", SAVE),
    b"\x1f\x8b": ("compressed (gzip)", UNPACK),
    b"\x28\xb5\x2f\xfd": ("compressed (zstd)", UNPACK),
    b"\xfd7zXZ": ("compressed (xz)", UNPACK),
    b"BZh": ("compressed (bzip2)", UNPACK),
    b"PK": ("an archive", UNPACK),
    b"PAR1": ("parquet", "call it .parquet"),
}


def read_text(file: Path, option: str) -> str:
    """Read a whole text file; `option` is what gave it.

    Raises:
        InputError: unreadable, or not UTF-8.
    """
    try:
        return file.read_text(encoding=ENCODING)
    except OSError as error:
        raise InputError(option, f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(option, f"cannot read {file}: byte {error.start + 1} {not_utf8(file)}") from None


def not_utf8(file: Path) -> str:
    """Return the end of a sentence on a file that is not UTF-8: what it seems to be, and the way out."""
    kind, way_out = other_kind(file) or ("", SAVE)
    seems = f" (the file seems to be {kind})" if kind else ""
    return f"is not UTF-8 text{seems}; {way_out}"


def other_kind(file: Path) -> tuple[str, str] | None:
    """Return what a file that is not UTF-8 seems to be by its beginning, and the way out; None if nothing known."""
    with file.open("rb") as opened:
        beginning = opened.read(8)
    known = (found for start, found in OTHER_BEGINNINGS.items() if beginning.startswith(start))
    return next(known, ("UTF-16 without a mark", SAVE) if is_wide(beginning) else None)


def holds_nul(text: str) -> str:
    """Say what NUL bytes in a text mean, and the way out; empty where there are none."""
    if "\0" not in text:
        return ""
    if is_wide(text):
        return f"it holds NUL bytes, as UTF-16 does; {SAVE}"
    return "it holds NUL bytes, as where a write was cut off; correct the line, or leave it out"


def is_wide(beginning: str | bytes) -> bool:
    """Check for UTF-16 without a mark: exactly one of the first two characters or bytes is NUL."""
    nul: str | bytes = "\0" if isinstance(beginning, str) else b"\0"
    return (beginning[:1] == nul) != (beginning[1:2] == nul)


def check_characters(text: str, what: str) -> None:
    """Check that a text of a dataset can be written as UTF-8, as tokenizers need it.

    Args:
        text: a value that was read.
        what: the value, the row and the file that it is from, to be shown to people.

    Raises:
        RowError: it holds a lone surrogate, which is half of a character beyond U+FFFF.
    """
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise RowError(
            "--dataset",
            f"{what} holds half of a character ({half}, a lone surrogate) at position {error.start + 1}; correct the "
            "text, or leave the row out",
            "half of a character",
        ) from None


def kind_of(value: object) -> str:
    """Return what a value of a dataset is, in a word; of nothing, what JSON calls it."""
    return "null" if value is None else type(value).__name__
