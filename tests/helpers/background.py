"""Commands that run beside the tests: from the moment that these are collected, on the core that they leave idle."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TypeAlias

# A new folder -> arguments and environment of the command.
Command: TypeAlias = Callable[[Path], tuple[list[object], Mapping[str, str]]]


def compile_kernels(folder: Path) -> tuple[list[object], Mapping[str, str]]:
    """Return the command behind the committed table of compiled kernels.

    What it compiles is kept until a source changes.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return [sys.executable, "-m", "benchmarks.compile.table", "--out", folder / "table.md"], environment


class Background:
    """The commands of one session, by the function that tells them."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._running: dict[Command, tuple[subprocess.Popen[str], Path, IO[str], IO[str]]] = {}

    def start(self, command: Command) -> None:
        """Start a command, unless it has been started."""
        if command in self._running:
            return
        folder = Path(self._folder.name) / str(len(self._running))
        (folder / "files").mkdir(parents=True)
        arguments, environment = command(folder / "files")
        out, err = (folder / "out").open("w+"), (folder / "err").open("w+")
        process = subprocess.Popen(list(map(str, arguments)), env=environment, stdout=out, stderr=err, text=True)
        self._running[command] = process, folder / "files", out, err

    def result(self, command: Command) -> tuple[subprocess.CompletedProcess[str], Path]:
        """Wait for a command, started now if nothing has; what it returned and printed, and its folder."""
        self.start(command)
        process, folder, out, err = self._running[command]
        process.wait()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(process.args, process.returncode, out.read(), err.read()), folder

    def end(self) -> None:
        """Kill what still runs, and delete the folders."""
        for process, _, out, err in self._running.values():
            process.kill()
            process.wait()
            out.close()
            err.close()
        self._folder.cleanup()
