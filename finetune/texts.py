"""Text that users give: UTF-8 with or without a byte order mark, and nothing but characters. No torch in here."""

from __future__ import annotations

from pathlib import Path

from finetune.errors import InputError

# Windows writes a byte order mark; this codec drops it where there is one.
ENCODING = "utf-8-sig"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
OTHER_BEGINNINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "compressed (gzip)", b"PK": "an archive"}


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
    with file.open("rb") as opened:
        beginning = opened.read(2)
    kind = OTHER_BEGINNINGS.get(beginning)
    seems = f" (the file seems to be {kind})" if kind else ""
    return f"is not UTF-8 text{seems}; save the file as UTF-8"


def check_characters(text: str, what: str) -> None:
    """Check that a text of a dataset can be written as UTF-8, as tokenizers need it.

    Args:
        text: a value that was read.
        what: the value, the row and the file that it is from, to be shown to people.

    Raises:
        InputError: it holds a lone surrogate, which is half of a character beyond U+FFFF.
    """
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise InputError(
            "--dataset",
            f"{what} holds half of a character ({half}, a lone surrogate) at position {error.start + 1}; correct the "
            "text, or leave the row out",
        ) from None
