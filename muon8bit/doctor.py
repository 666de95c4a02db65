"""One page on this machine, to be pasted into a report: versions, GPUs, self-check, rates, methods, what is known bad.

It works without a GPU, and without triton, bitsandbytes and transformers, and says what it cannot show.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata

import torch
from muon8bit_kernels import kernels_for

from .config import DEFAULT_NS_STEPS, DEFAULT_WORKSPACE_BYTES, SMALL_WORKSPACE_BYTES
from .orthogonalize import RatesTable, choose_method, device_kind, rates_of, resolve_coefficients
from .orthogonalize.rates_table import VARIABLE, triton_version

_PACKAGES = ("bitsandbytes", "transformers", "accelerate", "peft", "trl", "datasets")
_LEAST_TORCH, _LEAST_TRITON, _LEAST_TRITON_SM100 = (2, 11), (3, 6), (3, 7)


@dataclass(frozen=True)
class Environment:
    """Facts that decide what runs.

    Attributes:
        torch, triton: versions; triton None where it is not installed.
        packages: the versions of other packages; None where one is not installed.
        gpus: name and compute capability of each CUDA GPU.
        hip: the version of ROCm that torch was built for, or None.
    """

    torch: str
    triton: str | None
    packages: Mapping[str, str | None]
    gpus: tuple[tuple[str, tuple[int, int]], ...] = ()
    hip: str | None = None


def this_environment() -> Environment:
    """Return the facts of this process."""
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpus.append((torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)))
    packages = {name: _version(name) for name in _PACKAGES}
    return Environment(torch.__version__, triton_version(), packages, tuple(gpus), torch.version.hip)


def _version(name: str) -> str | None:
    """Return the version of an installed package, without importing it."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # its distribution has another name
        return "unknown version"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def known_bad(machine: Environment) -> Iterator[str]:
    """Give what is known not to work, or to work badly, with the way out of each."""
    if _numbers(machine.torch) < _LEAST_TORCH:
        yield f"torch {machine.torch}: muon8bit needs 2.11; upgrade torch"
    if machine.hip is not None:
        yield "ROCm: the kernels compile for it and have not been tried; pass backend='reference' if a step fails"
    for name, capability in machine.gpus if machine.hip is None else ():
        where = f"{name}, compute capability {capability[0]}.{capability[1]}"
        if machine.triton is None:
            yield f"{where} without triton: a step raises; install triton >= 3.6, or pass backend='reference'"
        elif capability[0] >= 10 and _numbers(machine.triton) < _LEAST_TRITON_SM100:
            yield (
                f"{where} with triton {machine.triton}, which fuses what must be rounded one by one there: upgrade "
                "torch to a release that brings triton >= 3.7"
            )
        elif _numbers(machine.triton) < _LEAST_TRITON:
            yield f"triton {machine.triton}: muon8bit needs 3.6; upgrade torch, which brings it"
        if capability < (8, 0):
            yield f"{where}: no bf16 there, and no kernel is compiled for it; pass backend='reference'"
    if len({capability for _, capability in machine.gpus}) > 1:
        yield "GPUs of several kinds: ranks on them must choose equal methods, or the first step raises"
    if machine.packages.get("bitsandbytes") is None:
        yield "bitsandbytes is not installed: adamw_bits=8 and QLoRA need it, nothing else does"
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield "TRITON_INTERPRET=1: kernels run in Triton's interpreter, thousands of times slower; unset it"


def self_checks(machine: Environment) -> Iterator[str]:
    """Run the check of every GPU against the reference, and give its outcome."""
    if not machine.gpus:
        yield "not run: no CUDA GPU; on a CPU the reference itself runs"
    for index, (name, _) in enumerate(machine.gpus):
        try:
            kernels_for(torch.device("cuda", index))
        except Exception as error:  # whatever it is, it is what the page is for
            yield f"{index}: {name}: {type(error).__name__}: {error}"
        else:
            yield f"{index}: {name}: equal to the reference, bit for bit"


def rates_lines(table: RatesTable | None, kind: str) -> Iterator[str]:
    """Give the table of rates that a new optimizer chooses by, and its row for a device kind."""
    if table is None:
        yield "built in" + (f" ({VARIABLE} is set)" if os.environ.get(VARIABLE) else "")
    else:
        yield f"{table.fingerprint} of {table.kind}: " + ", ".join(f"{name} {value}" for name, value in table.about)
    yield f"row of {kind}: {table.rates if table is not None and table.kind == kind else rates_of(kind)}"


def method_lines(shapes: Mapping[tuple[int, int], int], table: RatesTable | None, kind: str) -> Iterator[str]:
    """Give the method of each [rows, cols] on a device kind, for so many matrices of it in one group."""
    rates = table.rates if table is not None and table.kind == kind else None
    coefficients = resolve_coefficients("jordan", DEFAULT_NS_STEPS)
    budget = DEFAULT_WORKSPACE_BYTES - SMALL_WORKSPACE_BYTES
    for (rows, cols), count in shapes.items():
        method = choose_method(rows, cols, coefficients, kind, count=count, budget_bytes=budget, rates=rates)
        way = "one launch" if method.tiny else f"{method.form} form, products by {method.products}"
        yield f"{count} x [{rows}, {cols}]: {way}, {str(method.dtype).removeprefix('torch.')}"


def model_shapes(name: str) -> Counter[tuple[int, int]]:
    """Return how many matrices of each [rows, cols] Muon takes in a model.

    Raises:
        ValueError: for a model that is not known or cannot be built.
        ImportError: without transformers.
    """
    from .estimate import load_config
    from .estimate.models import build
    from .estimate.optimizers import row_pieces
    from .estimate.setup import Setup
    from .estimate.sizes import measure

    shapes: Counter[tuple[int, int]] = Counter()
    setup = Setup()
    for param in measure(
        build(load_config(name), setup.weight_dtype, setup.rank, setup.targets, setup.dora), setup
    ).whole:
        if param.is_muon:
            shapes.update(row_pieces(param))
    return shapes


def kind_of(machine: Environment) -> str:
    """Return the device kind that paths are chosen for: the first GPU's, else the CPU's."""
    return device_kind(torch.device("cuda", 0) if machine.gpus else torch.device("cpu"))


def environment_lines(version: str, machine: Environment) -> Iterator[str]:
    """Give versions, GPUs and the device kind; `version` is muon8bit's."""
    yield f"muon8bit {version}, python {platform.python_version()}, {platform.system()} {platform.machine()}"
    cuda, triton = torch.version.cuda or "none", machine.triton or "not installed"
    yield f"torch {machine.torch}, CUDA {cuda}, triton {triton}"
    yield ", ".join(f"{name} {found or 'not installed'}" for name, found in machine.packages.items())
    for index, (name, capability) in enumerate(machine.gpus):
        yield f"GPU {index}: {name}, compute capability {capability[0]}.{capability[1]}"
    yield f"paths are chosen for {kind_of(machine)}"
