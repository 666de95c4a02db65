"""Compile what the wrappers launch, for GPUs that need not be there, and read the resources and the machine code.

Wrappers are called on tensors without storage while a stand-in for Triton's driver says which GPU is there. Triton then
specializes and compiles as for a launch, and launches nothing. Not in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_SASS = r"^\s*/\*\w{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)"
_AMDGCN = r"^\t([a-z]\w+)"


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target."""

    name: str  # of the case
    target: str
    num_warps: int
    registers: int  # of a thread; of AMD's the vector ones
    shared_bytes: int  # of a program
    spilled_bytes: int  # stack and local memory of a thread
    instructions: dict[str, int]  # how often each stands in the machine code, slow paths of divisions included

    def count(self, pattern: str) -> int:
        """Count the instructions whose whole name matches the regular expression."""
        return sum(number for name, number in self.instructions.items() if re.fullmatch(pattern, name))


class StandInDriver:
    """Stands for Triton's driver: a GPU of `target` is there. Kernels are kept by device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)

    def get_current_stream(self, device: str) -> str:
        return device


def binary_of(call: Callable[[], None], target: str) -> Any:
    """Return the kernel that `call` launches, once, compiled for a key of TARGETS."""
    run, binaries = triton.JITFunction.run, []

    def compile_only(kernel: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:  # noqa: ARG001
        binaries.append(run(kernel, *args, warmup=True, **kwargs))
        return binaries[-1]

    triton.runtime.driver.set_active(StandInDriver(TARGETS[target]))
    with mock.patch.object(triton.JITFunction, "run", compile_only):
        call()
    (binary,) = binaries
    return binary


def compile_case(name: str, call: Callable[[], None], target: str, folder: Path) -> None:
    """Compile, and write the fields of `Compiled` to FOLDER/TARGET/NAME.json.

    The code lies beside it, as .ptx and .sass or as .amdgcn.
    """
    binary = binary_of(call, target)
    common = {"name": name, "target": target, "num_warps": binary.metadata.num_warps}
    if TARGETS[target].backend == "cuda":
        usage = _tool(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary.asm["cubin"])
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
        texts = {"ptx": binary.asm["ptx"], "sass": _tool(triton.knobs.nvidia.nvdisasm.path, "-c", binary.asm["cubin"])}
        registers, spilled, found = used["REG"], used["STACK"] + used["LOCAL"], re.findall(_SASS, texts["sass"], re.M)
    else:
        texts = {"amdgcn": binary.asm["amdgcn"]}
        fields = re.findall(r"\.(\w+):\s+(\d+)\s*$", texts["amdgcn"], re.M)
        used = {key: int(value) for key, value in fields}
        registers, spilled = used["vgpr_count"], used["private_segment_fixed_size"]
        found = re.findall(_AMDGCN, texts["amdgcn"], re.M)
    record = Compiled(
        **common,
        registers=registers,
        shared_bytes=binary.metadata.shared,
        spilled_bytes=spilled,
        instructions=dict(Counter(found).most_common()),
    )
    place = folder / target
    place.mkdir(parents=True, exist_ok=True)
    for suffix, text in texts.items():
        (place / f"{name}.{suffix}").write_text(text)
    (place / f"{name}.json").write_text(json.dumps(asdict(record), indent=1))


def load(folder: Path) -> dict[tuple[str, str], Compiled]:
    """Return the records of a folder by name and target."""
    records = [Compiled(**json.loads(path.read_text())) for path in sorted(folder.glob("*/*.json"))]
    return {(record.name, record.target): record for record in records}


def _tool(path: str, option: str, image: bytes) -> str:
    """Return what one of the programs in Triton's wheel prints about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, check=True, text=True).stdout
