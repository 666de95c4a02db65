"""A table of rates that was measured on a GPU: its text, its fingerprint, and the file that keeps it.

`muon8bit tune` writes it to the cache folder, a file for each kind of GPU. A new optimizer on such a GPU takes it,
unless MUON8BIT_RATES names another file, or `builtin`. The text goes into the parameter groups, and so into
checkpoints: a resumed run chooses by the table that it began with, wherever it goes on.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from .rates import Rates, device_kind

VARIABLE, BUILTIN = "MUON8BIT_RATES", "builtin"
_FORMAT = 1
_MAX_LETTERS = 2**16
_LOG = logging.getLogger("muon8bit")


@dataclass(frozen=True)
class RatesTable:
    """Rates of one device kind, with what they were measured on.

    Attributes:
        kind: the device kind, a key of `RATES`.
        rates: its row.
        about: GPU, driver, versions and date, by name.
    """

    kind: str
    rates: Rates
    about: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """Return the table as one line of JSON, equal for equal tables."""
        content = {"format": _FORMAT, "kind": self.kind, "about": dict(self.about), "rates": asdict(self.rates)}
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @property
    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits, equal for equal tables."""
        return blake2b(self.text.encode(), digest_size=8).hexdigest()

    @property
    def key(self) -> str:
        """Return the value of a group's key `rates`: the fingerprint, a colon, and the text."""
        return f"{self.fingerprint}:{self.text}"


def _is_by_size(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return False
    return all(_is_number(n) and _is_number(rate) and rate > 0 for n, rate in value) and value == sorted(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e30


@cache
def parse(text: str) -> RatesTable:
    """Return the table of a text.

    Raises:
        ValueError: says what is wrong with it.
    """
    if len(text) > _MAX_LETTERS:
        raise ValueError(f"it has more than {_MAX_LETTERS:,} characters, and goes into every checkpoint")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"it is no table of rates of format {_FORMAT}")
    kind, about, row = content.get("kind"), content.get("about"), content.get("rates")
    if not isinstance(kind, str) or not isinstance(about, dict) or not isinstance(row, dict):
        raise ValueError("it lacks kind, about or rates")
    if not all(isinstance(value, str) and f"{name}{value}".isprintable() for name, value in about.items()):
        raise ValueError("its facts are no strings that can be printed")
    if row.keys() != {field.name for field in fields(Rates)}:
        raise ValueError("its rates have other names than those of this release")
    for name in ("bf16", "fp16", "symmetric"):
        if not _is_by_size(row[name]) or (name != "symmetric" and not row[name]):
            raise ValueError(f"{name} must be pairs of a size and a rate over 0, in rising order")
    for name in ("triangle", "min_gain", "gram", "launch", "tiny"):
        is_optional = name not in ("min_gain", "launch")
        if not ((row[name] is None and is_optional) or (_is_number(row[name]) and (row[name] > 0 or name == "launch"))):
            raise ValueError(f"{name} must be a number over 0")
    if row["symmetric_kind"] not in (None, "panels", "kernel") or row["architecture"] not in (None, 80, 90, 100):
        raise ValueError("symmetric_kind or architecture is not one of those of this release")
    sizes = {name: tuple((n, rate) for n, rate in row[name]) for name in ("bf16", "fp16", "symmetric")}
    return RatesTable(kind, Rates(**{**row, **sizes}), tuple(sorted(about.items())))


@cache
def parse_key(value: str) -> RatesTable:
    """Return the table of a group's key `rates`.

    Raises:
        ValueError: says what is wrong with it.
    """
    fingerprint, _, text = value.partition(":")
    table = parse(text)
    if table.fingerprint != fingerprint:
        raise ValueError("its fingerprint is that of another table")
    return table


def check_key(value: object) -> None:
    """Raise ValueError for a group's key `rates` that is neither None nor a table of rates."""
    problem = "it is no text"
    try:
        if value is None or (isinstance(value, str) and parse_key(value)):
            return
    except ValueError as error:
        problem = str(error)
    raise ValueError(
        f"rates must be what an optimizer wrote there, and {problem}: delete the key to choose methods by the built-in "
        "table"
    )


def current_gpu() -> tuple[str, dict[str, str]] | None:
    """Return the kind of the current GPU, and the facts that its rates depend on; None without one of NVIDIA's.

    The facts are its name, the version of CUDA of its driver, and those of torch and Triton.
    """
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    return device_kind(device), {
        "GPU": torch.cuda.get_device_name(device),
        "driver": str(torch._C._cuda_getDriverVersion()),  # type: ignore[attr-defined]
        "torch": torch.__version__,
        "triton": triton_version() or "not installed",
    }


def triton_version() -> str | None:
    """Return the version of Triton, None where it is not installed; its distribution has other names in places."""
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _folder() -> Path:
    return Path(os.environ.get("MUON8BIT_CACHE") or "~/.cache/muon8bit").expanduser() / "rates"


def table_path(gpu: str) -> Path:
    """Return the file of a GPU's table in the cache folder: $MUON8BIT_CACHE, or ~/.cache/muon8bit."""
    return _folder() / re.sub(r"\W+", "-", gpu.lower()) / "rates.json"


def read_table(path: Path) -> RatesTable:
    """Return the table of a file.

    Raises:
        ValueError: names the file, what is wrong with it, and the way out.
    """
    way_out = f"measure it again (`muon8bit tune`), or set {VARIABLE}={BUILTIN}"
    try:
        return parse(path.read_text())
    except OSError as error:
        raise ValueError(f"the table of rates {path} cannot be read ({error.strerror}): {way_out}") from None
    except ValueError as error:
        raise ValueError(f"the table of rates {path} cannot be used, {error}: {way_out}") from None


def write_table(table: RatesTable, path: Path) -> None:
    """Write the table to a file, whole or not at all, also if another process does so at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".rates-", suffix=".json", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(table.text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


def active_table() -> RatesTable | None:
    """Return the table that new optimizers of this process choose by; None for the built-in one.

    A file in the cache folder that is damaged, of another GPU, or of another driver, torch or Triton, is passed over
    with a warning of one line.

    Raises:
        ValueError: for a file that MUON8BIT_RATES names and that cannot be used.
    """
    named = os.environ.get(VARIABLE, "")
    if named:
        return None if named == BUILTIN else read_table(Path(named).expanduser())
    if not _folder().exists():  # then CUDA need not be asked
        return None
    gpu = current_gpu()
    return None if gpu is None else _cached_table(table_path(gpu[1]["GPU"]))


@cache
def _cached_table(path: Path) -> RatesTable | None:
    """Return the table that `muon8bit tune` left for this GPU, if it is one; asked once for a file."""
    if not path.exists():
        return None
    try:
        table = read_table(path)
    except ValueError as error:
        _LOG.warning("%s. The built-in table is taken", error)
        return None
    problem = why_foreign(table)
    if problem:
        _LOG.warning("the table of rates %s %s: `muon8bit tune` again. The built-in table is taken", path, problem)
        return None
    return table


def why_foreign(table: RatesTable) -> str:
    """Return what of the GPU or the versions here is not what a table was measured with, or nothing."""
    gpu = current_gpu()
    if gpu is None:
        return "was measured on a GPU, and there is none"
    kind, facts = gpu
    measured = {"kind": table.kind, **dict(table.about)}
    for name, value in {"kind": kind, **facts}.items():
        if measured.get(name) != value:
            return f"was measured with {name} {measured.get(name)}, and here it is {value}"
    return ""
