"""Compile the symmetric product as shipped, for GPUs that need not be there, and say what came out of it.

python compile_gemm.py prints the records as JSON. In a process of its own: Triton's driver is replaced, and
TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from muon8bit_kernels import triton_gemm
from muon8bit_kernels.gemm_tilings import FP32_TILING, TILINGS, Tiling
from triton.backends.compiler import GPUTarget

# Instructions that say how the product is computed and moved; the width is kept where it is 128 bits.
COUNTED = "HMMA|HGMMA|UTCHMMA|FFMA|LDGSTS|UTMALDG|LDG|STG|LDL|STL"
SIZE = 4096


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target: registers and local bytes (spills, stack) of a thread, shared bytes of a program,
    and how often an instruction stands in the machine code (such as "HGMMA" or "STG.128")."""

    name: str
    target: str
    registers: int
    shared_bytes: int
    local_bytes: int
    instructions: dict[str, int]


class Target:
    """Stands for Triton's driver: the GPU to compile for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return device


class CompiledInstead:
    """Stands for a kernel: `kernel[grid](...)` compiles it for those arguments, specialized as at a launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> CompiledInstead:
        self.grid = grid
        return self

    def __call__(self, *args: Any, **constants: Any) -> None:
        self.compiled = self.kernel.warmup(*args, grid=self.grid, **constants)


def examined(name: str, capability: int, compiled: Any) -> Compiled:
    """Read the machine code with the tools that come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, code = (
            subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, option, cubin.name], capture_output=True, check=True, text=True
            ).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    registers, stack, local = (int(re.findall(rf"\b{key}:(\d+)", usage)[0]) for key in ("REG", "STACK", "LOCAL"))
    found = re.findall(rf"^\s*/\*\w+\*/\s+(?:@!?\w+ )?\s*({COUNTED})((?:\.\w+)*)\s", code, re.MULTILINE)
    counts = Counter(stem + (".128" if ".128" in rest else "") for stem, rest in found)
    return Compiled(
        name, f"sm_{capability}", registers, compiled.metadata.shared, stack + local, dict(sorted(counts.items()))
    )


def compile_product(
    capability: int, tiling: Tiling, dtype: torch.dtype, *, tall: bool, with_descriptors: bool, k: int = SIZE
) -> Compiled:
    """X X^T + D of [2, SIZE, k], in one tiling."""
    triton.runtime.driver.set_active(Target(capability))
    kernel = triton_gemm._symmetric_product_kernel
    stand_in = CompiledInstead(kernel)
    triton_gemm._symmetric_product_kernel = stand_in
    X = torch.empty((2, k, SIZE) if tall else (2, SIZE, k), dtype=dtype, device="meta")
    D = torch.empty(2, SIZE, SIZE, dtype=dtype, device="meta")
    triton_gemm._launch(X.mT if tall else X, X.mT if tall else X, D, (1.5, 0.5, 0.0), tiling, with_descriptors)
    triton_gemm._symmetric_product_kernel = kernel
    sizes = f"{tiling.block_m}x{tiling.block_n}x{tiling.block_k}"
    parts = ["symmetric_product", sizes, str(dtype).removeprefix("torch."), "tall" if tall else "flat"]
    return examined("-".join([*parts, "tma" if with_descriptors else "pointers"]), capability, stand_in.compiled)


def records() -> list[Compiled]:
    """Every tiling for both orders of the operands; and through pointers, in a tail, what TMA cannot take."""
    compiled = [
        compile_product(capability, tiling, dtype, tall=dtype == torch.float16, with_descriptors=capability >= 90)
        for capability in (80, 90, 100)
        for tiling in TILINGS[capability]
        for dtype in (torch.bfloat16, torch.float16)
    ]
    compiled.append(compile_product(80, FP32_TILING, torch.float32, tall=False, with_descriptors=False))
    tail = {"tall": False, "with_descriptors": False, "k": SIZE - 16}
    compiled.append(compile_product(90, TILINGS[90][-1], torch.bfloat16, **tail))
    return compiled


if __name__ == "__main__":
    print(json.dumps([asdict(record) for record in records()], indent=1))
