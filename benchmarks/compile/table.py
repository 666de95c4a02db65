"""Compile every shipped kernel for GPUs that need not be there, and write registers, shared memory and instructions.

    python -m benchmarks.compile.table --out benchmarks/results/compiled.md

One to two seconds a kernel, in two processes; what was compiled from the same sources is kept in `--cache`, which the
tests share. Rows that the file has of another Triton stay: with that one first on PYTHONPATH the command writes them
anew. Not with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from benchmarks.compile.cases import JOBS
from benchmarks.compile.compiling import Compiled, compile_case, load

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / f"triton-{triton.__version__}"
PROCESSES = 2
# What is worth a column entry, by its name in NVIDIA's and in AMD's machine code.
SHOWN = {
    "wgmma": r"HGMMA.*",
    "tcgen05": r"UTCHMMA.*",
    "mma": r"HMMA.*",
    "TMA load": r"UTMALDG.*",
    "16-byte load": r"LDG\.(?:.*\.)?128.*|(?:global|buffer)_load_dwordx4",
    "16-byte async load": r"LDGSTS\.(?:.*\.)?128.*",
    "16-byte store": r"STG\.(?:.*\.)?128.*|(?:global|buffer)_store_dwordx4",
    "narrower load": r"LDG\.(?!.*128).*|(?:global|buffer)_load_(?!dwordx4)\w+",
    "narrower store": r"STG\.(?!.*128).*|(?:global|buffer)_store_(?!dwordx4)\w+",
    "fma": r"FFMA.*|v_(?:pk_)?fma\w*_f32.*",
    "special function": r"MUFU.*|v_(?:rcp|rsq|sqrt|exp|log)_f32.*",
    "spill": r"LDL.*|STL.*|scratch_\w+",
}


def sources_key() -> str:
    """Return a hash of what the machine code depends on."""
    digest = hashlib.sha256(f"{triton.__version__} {torch.__version__}".encode())
    beside = [Path(__file__).with_name(f"{name}.py") for name in ("cases", "compiling")]
    for path in sorted([*(ROOT / "kernels/muon8bit_kernels").rglob("*.py"), *beside]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(index: int, folder: Path) -> None:
    case, target = JOBS[index]
    compile_case(case.name, case.call, target, folder)


def _compile_all(folder: Path) -> None:
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        for job in [pool.submit(_compile, index, folder) for index in range(len(JOBS))]:
            job.result()


def compiled_folder(cache: Path, make: Callable[[Path], None] = _compile_all) -> Path:
    """Return the folder with the records and the code of all JOBS, made if these sources have none yet.

    See `compile_case`. Folders of other sources are deleted. Processes that ask at once wait for the first.
    """
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"compiled-{sources_key()}"
    with (cache / "compiled.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for old in cache.glob("compiled-*"):
                shutil.rmtree(old)
            unfinished = cache / "compiled-unfinished"
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


def row(record: Compiled) -> str:
    counts = {name: record.count(pattern) for name, pattern in SHOWN.items()}
    shown = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    sizes = record.num_warps, record.registers, record.shared_bytes, record.spilled_bytes
    return "| " + " | ".join(map(str, [record.name, triton.__version__, record.target, *sizes, shown])) + " |\n"


def rows_of_others(text: str) -> str:
    """Return the rows of a table that another Triton has made."""
    rows = [line for line in text.splitlines(keepends=True) if re.match(r"\| [\w-]+ \| \d+\.", line)]
    return "".join(line for line in rows if line.split(" | ")[1] != triton.__version__)


def rows_are_of(before: str) -> str:
    """Return the line that says by what the first rows are: this Triton, or a newer one of which the table has rows."""
    said = re.search(r"^Rows of Triton (\S+), .*\n", before, re.MULTILINE)
    if said is not None and f"| {said[1]} |" in before and said[1] > triton.__version__:
        return said[0]
    return f"Rows of Triton {triton.__version__}, torch {torch.__version__}, {date.today().isoformat()}, by\n"


def table(records: dict[tuple[str, str], Compiled], before: str = "") -> str:
    """Return the table in Markdown, in the order of the cases; rows of another Triton stay as they are in `before`."""
    others = rows_of_others(before)
    head = (
        "# Compiled kernels\n\n"
        "Every shipped kernel as its wrapper launches it, compiled for GPUs that were not there: nothing was run.\n"
        f"{rows_are_of(before)}"
        "`python -m benchmarks.compile.table --out benchmarks/results/compiled.md`; those of 3.6, for sm_90\n"
        "alone, by the same with that Triton first on PYTHONPATH.\n\n"
        "Registers of a thread (AMD: vector registers), shared memory of a program, spilled: stack and local bytes of\n"
        "a thread. Instructions are counted in the machine code, branches that are never taken included. The fma of\n"
        "elementwise kernels are those of `triton.exact`, which a test counts in the PTX, and those of dividing one\n"
        "by a scale or a norm, which the assembler writes out with its special functions.\n\n"
        "| kernel, configuration | Triton | target | warps | registers | shared, bytes | spilled, bytes "
        "| instructions |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
    )
    rows = "".join(row(records[case.name, target]) for case, target in JOBS)
    return head + "".join(sorted([rows, others], key=lambda part: part.split(" | ")[1:2], reverse=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table there; else print it")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of records, machine code and PTX")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("nothing can be compiled under TRITON_INTERPRET=1")
    before = args.out.read_text() if args.out and args.out.exists() else ""
    text = table(load(compiled_folder(args.cache)), before)
    if args.out:
        args.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
