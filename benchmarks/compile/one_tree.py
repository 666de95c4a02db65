"""Compile the kernels of another checkout, or with another Triton, in a process of their own.

That process runs this file as a script, and takes cases and kernels from the checkout: only what checkouts of every age
have is imported from there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import muon8bit_kernels
import triton

from benchmarks.compile.cases import CASES
from benchmarks.compile.compiling import compile_case

TARGET = "sm_90"
_LIMIT_S = 300


def compile_tree(tree: Path, triton_folder: Path | None, names: Sequence[str], folder: Path) -> str:
    """Compile cases for sm_90, and return the version of the Triton that did.

    Args:
        tree: the root of a checkout.
        triton_folder: a folder into which pip has installed another Triton, or None for the one of this process.
        names: names of cases.
        folder: gets the files of `compile_case`, and NAME.tile.json: the number of elements of a tile.

    Raises:
        RuntimeError: if the process fails, or has found the kernels of another tree; with its output.
    """
    path = [*([triton_folder] if triton_folder else []), tree, tree / "kernels"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(entry.resolve()) for entry in path)
    command = [sys.executable, __file__, str(folder), *names]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    if process.returncode != 0:
        raise RuntimeError(f"compiling the kernels of {tree} failed: {process.stdout}{process.stderr}")
    about: dict[str, str] = json.loads((folder / "about.json").read_text())
    if Path(about["kernels"]).parents[1] != tree.resolve():
        raise RuntimeError(f"the kernels of {tree} were asked for, and those of {about['kernels']} found")
    return about["triton"]


def main() -> None:
    """Do the work of `compile_tree`: the arguments are the folder and the names."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    run, tiles = triton.JITFunction.run, list[int]()

    def noting_the_tile(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        sides = ("ROWS", "COLS") if "COLS" in kwargs else ("HEIGHT", "WIDTH")
        tiles.append(kwargs[sides[0]] * kwargs[sides[1]])
        return run(kernel, *args, **kwargs)

    triton.JITFunction.run = noting_the_tile
    calls = {case.name: case.call for case in CASES}
    for name in names:
        compile_case(name, calls[name], TARGET, folder)
        (folder / TARGET / f"{name}.tile.json").write_text(json.dumps(tiles.pop()))
    about = {"triton": triton.__version__, "kernels": str(Path(muon8bit_kernels.__file__).parent)}
    (folder / "about.json").write_text(json.dumps(about))


if __name__ == "__main__":
    main()
