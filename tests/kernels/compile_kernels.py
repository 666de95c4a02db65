"""Compile what the wrappers launch for a GPU that need not be there; test_compiled.py runs it, in a process of its own.

python compile_kernels.py OUTPUT_FOLDER CAPABILITY calls every wrapper on tensors without storage, catches the launch,
and leaves <function>-<codebook>-<shape>.ptx and .sass, of the update <function>-<dtype>-<rounding>.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from muon8bit_kernels import CODE_DTYPES, triton_kernels, triton_update
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
}
SHAPES = {"wide": (4096, 4096), "narrow": (4096, 16)}


class CompiledInstead:
    """Stands for a kernel: `kernel[grid](...)` compiles it for those arguments, specialized as at a launch."""

    def __init__(self, kernel: Any, target: GPUTarget) -> None:
        self.kernel, self.target, self.compiled = kernel, target, None

    def __getitem__(self, grid: tuple[int]) -> CompiledInstead:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        names = self.kernel.arg_names
        options = {name: kwargs.pop(name) for name in set(kwargs) - set(names)}
        signature, constants, attributes = {}, {}, {}
        for place, name in enumerate(names):
            value = args[place] if place < len(args) else kwargs[name]
            if isinstance(value, torch.Tensor):
                signature[name], attributes[(place,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif name.isupper() or value is None or value == 1:
                signature[name], constants[(place,)] = "constexpr", value
            else:
                signature[name] = "i32"
                attributes |= {} if value % 16 else {(place,): [["tt.divisibility", 16]]}
        source = ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)
        self.compiled = triton.compile(source, target=self.target, options=options)


def launch(function: str, codebook: str | None, rows: int, cols: int) -> None:
    """Call one wrapper, with a bf16 gradient and output."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    codes = empty(rows, cols, dtype=torch.float32 if codebook is None else CODE_DTYPES[codebook])
    blocks = empty(rows, triton.cdiv(cols, 2048))
    scales = None if codebook is None else blocks
    grad = empty(rows, cols, dtype=torch.bfloat16)
    arguments = {
        "quantize": (grad,),
        "dequantize": (codes, scales),
        "momentum_stats": (codes, scales, grad),
        "momentum_apply": (codes, scales, grad, blocks, empty(), empty(rows, cols, dtype=torch.bfloat16)),
    }[function]
    options = {"beta": 0.95, "nesterov": True} if "momentum" in function else {}
    getattr(triton_kernels, function)(*arguments, **options, codebook=codebook, block_size=2048)


def write(stand_in: CompiledInstead, stem: Path) -> None:
    """Leave the compiled kernel's PTX and machine code."""
    stem.with_suffix(".ptx").write_text(stand_in.compiled.asm["ptx"])
    cubin = stem.with_suffix(".cubin")
    cubin.write_bytes(stand_in.compiled.asm["cubin"])
    command = [triton.knobs.nvidia.nvdisasm.path, "-c", cubin]
    stem.with_suffix(".sass").write_text(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def compile_update(folder: Path, target: GPUTarget) -> None:
    """The update of fp32 and bf16 parameters from directions of their dtype, and the rounding of AdamW's copies."""

    def empty(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(SHAPES["wide"], dtype=dtype, device="meta")

    stand_in = triton_update._update_param_kernel = CompiledInstead(triton_update._update_param_kernel, target)
    for name, dtype, key in (
        ("float32-nearest", torch.float32, None),
        ("bfloat16-nearest", torch.bfloat16, None),
        ("bfloat16-stochastic", torch.bfloat16, -5),
    ):
        triton_update.update_param(empty(dtype), empty(dtype), decay=0.9, scale=0.1, key=key)
        write(stand_in, folder / f"update_param-{name}")
    stand_in = triton_update._round_stochastic_kernel = CompiledInstead(triton_update._round_stochastic_kernel, target)
    triton_update.round_stochastic(empty(torch.float32), key=-5)
    write(stand_in, folder / "round_stochastic-bfloat16-stochastic")


def main(folder: Path, capability: int) -> None:
    target = GPUTarget("cuda", capability, 32)
    compile_update(folder, target)
    for function in ("quantize", "dequantize", "momentum_stats", "momentum_apply"):
        stand_in = CompiledInstead(getattr(triton_kernels, f"_{function}_kernel"), target)
        setattr(triton_kernels, f"_{function}_kernel", stand_in)
        for codebook in ("linear", "dynamic", None) if "momentum" in function else ("linear", "dynamic"):
            for shape in ("wide", "narrow") if function == "momentum_apply" else ("wide",):
                launch(function, codebook, *SHAPES[shape])
                write(stand_in, folder / f"{function}-{codebook}-{shape}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
