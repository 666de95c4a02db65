"""Compile what the wrappers launch for GPUs that need not be there, and say what came out.

    compiled(target, names=None) -> Iterator[Compiled]      target: "sm_80", "sm_90", "sm_100" or "gfx942"

calls wrappers on tensors without storage, catches the launches and compiles them as a launch would. `CASES` lists the
calls, `names_for(target)` which of them are shipped for a target. As a script,

    python compile_kernels.py OUTPUT_FOLDER TARGET [NAME ...]

writes OUTPUT_FOLDER/TARGET.json, a list of records (the fields of `Compiled` but for `texts`), and NAME.ptx and
NAME.sass (NAME.amdgcn for gfx942) into OUTPUT_FOLDER/TARGET/. Not in a process with TRITON_INTERPRET=1. Triton caches
what it has compiled before; else it takes one to two seconds a kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from muon8bit_kernels import CODE_DTYPES, triton_kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}
WIDE, NARROW, COUNT = (4096, 4096), (4096, 16), 3


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target."""

    name: str  # of the case
    target: str
    num_warps: int
    registers: int  # of a thread; of AMD's the vector ones
    shared_bytes: int  # of a block of threads
    spilled_bytes: int  # stack and local memory of a thread
    instructions: dict[str, int]  # how often each stands in the machine code, slow paths of divisions included
    texts: dict[str, str]  # "ptx" and "sass", or "amdgcn"


def empty(*shape: int, dtype: torch.dtype = torch.float32, across: bool = False) -> torch.Tensor:
    """Without storage; `across`: each matrix column by column."""
    tensor = torch.empty(*shape[:-2], *shape[:-3:-1], dtype=dtype, device="meta")
    return tensor.mT if across else tensor.view(shape)


def momentum(phase: str, codebook: str | None, shape: tuple[int, int] = WIDE, across: bool = False) -> None:
    """bf16 gradients and output, blocks of 2048, the flag of the step given."""
    codes = empty(COUNT, *shape, dtype=torch.float32 if codebook is None else CODE_DTYPES[codebook])
    scales = None if codebook is None else [empty(COUNT, shape[0], triton.cdiv(shape[1], 2048))]
    grads = [empty(COUNT, *shape, dtype=torch.bfloat16, across=across)]
    options: dict[str, Any] = {"beta": 0.95, "nesterov": True, "codebook": codebook, "block_size": 2048}
    if phase == "stats":
        triton_kernels.momentum_stats([codes], scales, grads, **options)
    else:
        out, norms, skip = empty(COUNT, *shape, dtype=torch.bfloat16), empty(1, COUNT).view(COUNT), empty(1, 1).view(())
        triton_kernels.momentum_apply([codes], scales, grads, norms, out, **options, skip=skip)


def update(dtype: torch.dtype, keys: list[int] | None = None, across: bool = False) -> None:
    params, directions = [empty(COUNT, *WIDE, dtype=dtype)], empty(COUNT, *WIDE, dtype=dtype, across=across)
    triton_kernels.update_params(params, directions, decay=0.9, scale=0.1, keys=keys, skip=empty(1, 1).view(()))


def quantize(codebook: str) -> None:
    triton_kernels.quantize(empty(*WIDE, dtype=torch.bfloat16), codebook=codebook, block_size=2048)


def dequantize(codebook: str) -> None:
    codes, scales = empty(*WIDE, dtype=CODE_DTYPES[codebook]), empty(WIDE[0], 2)
    triton_kernels.dequantize(codes, scales, codebook=codebook, block_size=2048)


# What every step runs: for every target.
EVERYWHERE: dict[str, Callable[[], None]] = {
    **{f"stats-{codebook}": lambda c=codebook: momentum("stats", c) for codebook in ("linear", "dynamic", None)},
    **{f"apply-{codebook}": lambda c=codebook: momentum("apply", c) for codebook in ("linear", "dynamic", None)},
    "update-fp32": lambda: update(torch.float32),
    "update-bf16": lambda: update(torch.bfloat16),
    "update-bf16-stochastic": lambda: update(torch.bfloat16, [-5] * COUNT),
}
# The same device code in other shapes and wrappers: for one.
ONCE: dict[str, Callable[[], None]] = {
    "apply-linear-narrow": lambda: momentum("apply", "linear", NARROW),
    "apply-dynamic-across": lambda: momentum("apply", "dynamic", across=True),
    "stats-linear-across": lambda: momentum("stats", "linear", across=True),
    "update-bf16-across": lambda: update(torch.bfloat16, across=True),
    "quantize-linear": lambda: quantize("linear"),
    "quantize-dynamic": lambda: quantize("dynamic"),
    "dequantize-linear": lambda: dequantize("linear"),
    "dequantize-dynamic": lambda: dequantize("dynamic"),
    "round-stochastic": lambda: triton_kernels.round_stochastic(empty(*WIDE), key=-5),
}
CASES = {**EVERYWHERE, **ONCE}


def names_for(target: str) -> list[str]:
    """The cases to compile for a target."""
    return list(CASES if target == "sm_90" else EVERYWHERE)


def launched(call: Callable[[], None]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The kernel that `call` launches, once, with its arguments."""
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:  # noqa: ARG001
        launches.append((kernel, args, kwargs))

    with mock.patch.object(triton.JITFunction, "run", run):
        call()
    (launch,) = launches
    return launch


def compile_launch(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: GPUTarget) -> Any:
    """Compile a kernel for these arguments, specialized as at a launch."""
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for place, param in enumerate(kernel.params):
        value = args[place] if place < len(args) else kwargs[param.name]
        divisible = False
        if param.is_constexpr or value is None:
            signature[param.name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name], divisible = POINTERS[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        elif value == 1 and not param.do_not_specialize:
            signature[param.name], constants[(place,)] = "constexpr", value
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and not param.do_not_specialize
        if divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def tool(path: str, *arguments: str, image: bytes) -> str:
    """What one of the programs in Triton's wheel prints about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        return subprocess.run([path, *arguments, file.name], capture_output=True, check=True, text=True).stdout


def mnemonics(assembly: str, pattern: str) -> dict[str, int]:
    return dict(Counter(re.findall(pattern, assembly, re.MULTILINE)).most_common())


def compiled(target: str, names: Iterable[str] | None = None) -> Iterator[Compiled]:
    """Compile cases (None: `names_for(target)`) for a target; see `Compiled`.

    Raises:
        KeyError: for an unknown target or case.
    """
    for name in names_for(target) if names is None else names:
        binary = compile_launch(*launched(CASES[name]), TARGETS[target])
        common = {"name": name, "target": target, "num_warps": binary.metadata.num_warps}
        if TARGETS[target].backend == "cuda":
            usage = tool(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", image=binary.asm["cubin"])
            used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
            sass = tool(triton.knobs.nvidia.nvdisasm.path, "-c", image=binary.asm["cubin"])
            yield Compiled(
                **common,
                registers=used["REG"],
                shared_bytes=binary.metadata.shared,
                spilled_bytes=used["STACK"] + used["LOCAL"],
                instructions=mnemonics(sass, r"^\s*/\*\w{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)"),
                texts={"ptx": binary.asm["ptx"], "sass": sass},
            )
        else:
            amdgcn = binary.asm["amdgcn"]
            used = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", amdgcn, re.MULTILINE)}
            yield Compiled(
                **common,
                registers=used["vgpr_count"],
                shared_bytes=binary.metadata.shared,
                spilled_bytes=used["private_segment_fixed_size"],
                instructions=mnemonics(amdgcn, r"^\t([a-z]\w+)"),
                texts={"amdgcn": amdgcn},
            )


def main(folder: Path, target: str, names: list[str]) -> None:
    (folder / target).mkdir(parents=True, exist_ok=True)
    records = []
    for record in compiled(target, names or None):
        fields = asdict(record)
        for suffix, text in fields.pop("texts").items():
            (folder / target / f"{record.name}.{suffix}").write_text(text)
        records.append(fields)
    (folder / f"{target}.json").write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
