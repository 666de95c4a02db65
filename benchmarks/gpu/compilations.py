"""Kernels that the first call on a GPU compiles, found without one, and a Triton cache of them to be taken along.

    python -m benchmarks.gpu.compilations                                # the list
    python -m benchmarks.gpu.compilations --cache FOLDER [--wheel FILE]  # and the kernels, compiled for sm_90
    python -m benchmarks.gpu.compilations --check FOLDER                 # what is not in the cache

Every case of `first_cases` is called on the meta device, as is a step of the models that the first call steps, while a
stand-in for Triton's driver says that an H100 is there. A compilation is a kernel with signature, constants, hints and
options. `--wheel` is the wheel of Triton, of the same version, that the machine with the GPU has, if its Python is not
this one: the cache's keys hash the compiled library in it. Two processes compile, one to three minutes in all.

The folder is used by `python -m benchmarks.gpu --cache FOLDER`. Shown, with Triton 3.6.0 and 3.7.1: a key hashes
Triton's files, the kernel's source, signature, constants, hints, options with the architecture, the version of ptxas,
and what the environment sets, nothing of the GPU; and `--check`, another process with tensors that have storage and the
folder elsewhere, compiles nothing. Not shown: that every tensor on a GPU is aligned as here (a kernel that differs is
compiled there), and that the GPU's machine has the very files of the wheel and sets nothing (TRITON_PTXAS_PATH, say).
Launchers, which Triton 3.6 builds with a C compiler, are not in it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from muon8bit_kernels.triton import gemm, kernels

from benchmarks.compile.compiling import TARGETS, StandInDriver
from benchmarks.gpu.first_cases import CASES
from benchmarks.gpu.first_steps import FAMILY, MODELS, square_layers, step_on_meta

TARGET, ARCHITECTURE = "sm_90", 90
PROCESSES = 2
_META = torch.device("meta")
MOST_BYTES = 60 * 2**20


@dataclass(frozen=True)
class Compilation:
    """A kernel with all that its machine code depends on."""

    kernel: str
    signature: str
    constants: str
    hints: str
    options: str

    def __str__(self) -> str:
        """Return a line: constants by their values, and which arguments are known to be multiples of 16."""
        return f"{self.kernel}  {self.signature}  {self.constants}  {self.hints}  {self.options}"


class _NoKernel:
    """Stands for what was compiled."""


@contextmanager
def recording(found: list[Compilation], *, compiled: bool) -> Iterator[None]:
    """Add every compilation of this context to `found`; nothing is launched, and compiled only if asked for."""
    run, compile_one = triton.JITFunction.run, triton.JITFunction._do_compile

    def warm_up(kernel: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:  # noqa: ARG001
        return run(kernel, *args, warmup=True, **kwargs)

    def note(kernel: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, hints: Any, *more: Any):  # type: ignore[no-untyped-def]
        shown = {name: options.__dict__[name] for name in ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")}
        named = {kernel.arg_names[place[0]]: value for place, value in constants.items()}
        where = [kernel.arg_names[place[0]] for place, value in hints.items() if value]
        found.append(Compilation(kernel.fn.__name__, *map(str, (signature, named, where, shown))))
        if compiled:
            return compile_one(kernel, key, signature, device, constants, options, hints, *more)
        cache = kernel.device_caches[device][0]
        cache[key] = _NoKernel()
        return cache[key]

    triton.runtime.driver.set_active(StandInDriver(TARGETS[TARGET]))
    with (
        mock.patch.object(triton.JITFunction, "run", warm_up),
        mock.patch.object(triton.JITFunction, "_do_compile", note),
        mock.patch.object(gemm, "_architecture", return_value=ARCHITECTURE),
    ):
        yield


def calls(device: torch.device = _META) -> dict[str, Callable[[], Any]]:
    """Return what the first call runs on a GPU, by name, the cases with tensors on `device`."""
    from muon8bit_kernels.self_check import self_check

    def check() -> None:
        with mock.patch("muon8bit_kernels.self_check._compare"):  # there are no values to be compared
            self_check(kernels, device)

    of_cases = {case.name: (lambda case=case: case.run(kernels, device, False)) for case in CASES}
    of_steps = {f"a step of {name}": (lambda name=name: step_on_meta(MODELS[name]())) for name in MODELS}
    of_family = {f"a step of {name}": (lambda of=of: step_on_meta(square_layers(), of)) for name, of in FAMILY.items()}
    return {"self check": check, **of_cases, **of_steps, **of_family}


def listed() -> dict[str, list[Compilation]]:
    """Return the compilations of each call that no earlier one has."""
    known, result = set[Compilation](), {}
    for name, call in calls().items():
        found: list[Compilation] = []
        with recording(found, compiled=False):
            call()
        result[name] = [one for one in dict.fromkeys(found) if one not in known]
        known |= set(found)
    return result


def key_of_wheel(wheel: Path) -> str:
    """Return what `triton_key` gives where this wheel is installed: versions and hashes of its files.

    Raises:
        ValueError: if the wheel has another version than the Triton of this process, or other Python files.
    """
    here = Path(triton.__file__).parent
    with zipfile.ZipFile(wheel) as files:
        names = {name for name in files.namelist() if name.startswith("triton/")}
        for name in names:
            if name.endswith(".py") and files.read(name) != (here.parent / name).read_bytes():
                raise ValueError(f"{wheel} has another {name} than triton {triton.__version__}, which is imported here")
        library = hashlib.sha256(files.read("triton/_C/libtriton.so")).hexdigest()
    ours = hashlib.sha256((here / "_C/libtriton.so").read_bytes()).hexdigest()
    return str(_triton_key().replace(ours, library))


def _triton_key() -> str:
    return str(importlib.import_module("triton.runtime.cache").triton_key())


def _compile(names: Sequence[str], folder: Path, key: str | None) -> None:
    """Compile what these calls launch, into a cache."""
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    with ExitStack() as stack:
        if key is not None:
            stack.enter_context(mock.patch("triton.runtime.cache.triton_key", return_value=key))
        every = calls()
        for name in names:
            with recording([], compiled=True):
                every[name]()


def make_cache(folder: Path, wheel: Path | None = None, names: Sequence[str] | None = None) -> int:
    """Compile all kernels of the list, and return the bytes of the folder.

    Raises:
        ValueError: for a folder that is not empty, for `key_of_wheel`, or if it gets larger than 60 MiB.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: give --cache a new folder")
    key = None if wheel is None else key_of_wheel(wheel)
    names = list(calls()) if names is None else names
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        for job in [pool.submit(_compile, names[n::PROCESSES], folder.resolve(), key) for n in range(PROCESSES)]:
            job.result()
    for group in folder.glob("*/__grp__*.json"):
        _relative(group)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        raise ValueError(f"{folder} has {size / 2**20:.1f} MiB, more than {MOST_BYTES / 2**20:.0f}")
    return size


def _relative(group: Path) -> None:
    children = json.loads(group.read_text())["child_paths"]
    group.write_text(json.dumps({"child_paths": {name: Path(path).name for name, path in children.items()}}))


def place_cache(folder: Path, where: Path) -> None:
    """Copy a cache to where it is used; Triton 3.6 keeps absolute paths in it."""
    for path in folder.rglob("*"):
        if path.is_file():
            target = where / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            if path.name.startswith("__grp__"):
                children = json.loads(path.read_text())["child_paths"]
                children = {name: str(target.parent.resolve() / Path(child).name) for name, child in children.items()}
                target.write_text(json.dumps({"child_paths": children}))


def compiled_anew(folder: Path) -> list[str]:
    """Return the kernels that a process compiles which has this cache elsewhere; to be called in a process for it.

    The cases are called on tensors that have storage, whose addresses and strides decide the hints as on a GPU.
    """
    anew: list[str] = []

    def note(*, src: Any, cache_hit: bool, **_: Any) -> None:
        anew.extend([src.name] * (not cache_hit))

    with tempfile.TemporaryDirectory() as elsewhere:
        place_cache(folder, Path(elsewhere))
        os.environ["TRITON_CACHE_DIR"] = elsewhere
        with mock.patch.object(triton.knobs.compilation, "listener", note):
            for name, call in calls(torch.device("cpu")).items():
                with recording([], compiled=True):
                    call()
                print(f"  {name}: {len(anew)} compiled anew so far", flush=True)
    return anew


def main() -> None:
    """Print the list, make the cache, or look what is not in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="compile them into this new folder")
    parser.add_argument("--wheel", type=Path, help="the wheel of Triton that the machine with the GPU has")
    parser.add_argument("--check", type=Path, help="look what a process with this cache would compile anew")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("nothing can be compiled under TRITON_INTERPRET=1")
    if args.check:
        anew = compiled_anew(args.check)
        sys.exit(f"{len(anew)} compiled anew: {', '.join(anew)}" if anew else 0)
    found = listed()
    for name, new in found.items():
        print(f"{name}: {len(new)}", *new, sep="\n    ")
    print(f"{sum(map(len, found.values()))} compilations")
    if args.cache:
        size = make_cache(args.cache, args.wheel)
        print(f"{args.cache}: {size / 2**20:.1f} MiB for triton {triton.__version__}, {TARGET}")


if __name__ == "__main__":
    main()
