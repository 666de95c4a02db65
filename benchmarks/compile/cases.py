"""The calls whose kernels are compiled, and for which GPUs: every kernel that ships, in each of its configurations.

What a step of a large model launches is compiled for every target. Other block sizes, layouts and wrappers run the
same device code on tiles of as many elements: they are compiled for one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from muon8bit_kernels import CODE_DTYPES, ElementMoment
from muon8bit_kernels.codebooks import Codebook
from muon8bit_kernels.triton import gemm, kernels
from muon8bit_kernels.triton.gemm_tilings import FP32_TILING, TILINGS, UNALIGNED_TILING, GemmTiling
from muon8bit_kernels.triton.tiny import step_tiny

NVIDIA = ("sm_80", "sm_90", "sm_100")
EVERYWHERE, ONE = (*NVIDIA, "gfx942"), ("sm_90",)
WIDE, NARROW, EIGHTS, COUNT = (4096, 4096), (4096, 16), (4096, 4088), 3
# Blocks other than of 2048 elements; `stats` has no more device code than `apply`, so two of them will do.
OTHER_BLOCKS = {"apply": (64, 128, 256, 512, 1024, 4096), "stats": (64, 4096)}
JORDAN = ((3.4445, -4.7750, 2.0315),) * 5


@dataclass(frozen=True)
class Case:
    """One kernel and configuration: `call` launches it, once."""

    name: str
    call: Callable[[], Any]
    targets: tuple[str, ...] = EVERYWHERE


def empty(*shape: int, dtype: torch.dtype = torch.float32, across: bool = False) -> torch.Tensor:
    """Return a tensor without storage; `across`: each matrix column by column."""
    tensor = torch.empty(*shape[:-2], *shape[:-3:-1], dtype=dtype, device="meta")
    return tensor.mT if across else tensor.view(shape)


def flags(*, each: bool) -> torch.Tensor:
    """Return the flag of the step, or one of each matrix."""
    return empty(1, COUNT).view(COUNT) if each else empty(1, 1).view(())


def momentum(
    phase: str,
    codebook: str | None,
    block: int = 2048,
    shape: tuple[int, int] = WIDE,
    across: bool = False,
    *,
    each: bool = False,
    signs: bool = False,
) -> None:
    """Call a phase on bf16 gradients and output, the flag of the step given."""
    codes = empty(COUNT, *shape, dtype=torch.float32 if codebook is None else CODE_DTYPES[codebook])
    scales = None if codebook is None else [empty(COUNT, shape[0], triton.cdiv(shape[1], block))]
    grads = [empty(COUNT, *shape, dtype=torch.bfloat16, across=across)]
    options: dict[str, Any] = {"beta": 0.95, "nesterov": True, "codebook": codebook, "block_size": block}
    if phase == "stats":
        kernels.momentum_stats([codes], scales, grads, **options)
    else:
        out, norms = empty(COUNT, *shape, dtype=torch.bfloat16), empty(1, COUNT).view(COUNT)
        kernels.momentum_apply([codes], scales, grads, norms, out, **options, skip=flags(each=each), signs=signs)


def cut(phase: str, codebook: Codebook, *, each: bool = False) -> None:
    """Call a phase on the second of eight ranks' columns of a down projection of Llama-3.1-8B."""
    rows, cols, width = 4096, 14336, 1792
    codes, grads = (
        empty(COUNT, rows, width, dtype=CODE_DTYPES[codebook]),
        empty(COUNT, rows, width, dtype=torch.bfloat16),
    )
    tensors: list[Any] = [[codes], [empty(COUNT, rows, triton.cdiv(cols, 2048))], [grads]]
    options: dict[str, Any] = {"beta": 0.95, "nesterov": True, "codebook": codebook, "block_size": 2048}
    options |= {"first_col": width}
    if phase == "stats":
        kernels.momentum_stats_cut(*tensors, **options)
    else:
        out = empty(COUNT, rows, width, dtype=torch.bfloat16)
        tensors += [empty(COUNT, rows, triton.cdiv(cols, 2048)), empty(1, COUNT).view(COUNT), out]
        kernels.momentum_apply_cut(*tensors, **options, skip=flags(each=each))


def update(
    dtype: torch.dtype,
    keys: list[int] | None = None,
    across: bool = False,
    *,
    cautious: bool = False,
    each: bool = False,
    factors: tuple[int, int] | None = None,
    moment: ElementMoment | None = None,
) -> None:
    """Call an update of parameters by directions of their dtype, the flag of the step given.

    Args:
        dtype: of parameters and directions.
        keys: of stochastic rounding.
        across: the directions lie column by column.
        cautious: decay where signs agree.
        each: every matrix has its own flag.
        factors: the last two dimensions of the factors by which directions are multiplied; None means none.
        moment: second moments of the elements.
    """
    params, directions = [empty(COUNT, *WIDE, dtype=dtype)], empty(COUNT, *WIDE, dtype=dtype, across=across)
    options: dict[str, Any] = {"decay": 0.9, "scale": 0.1, "cautious": cautious, "keys": keys, "skip": flags(each=each)}
    options["factors"] = None if factors is None else empty(COUNT, *factors)
    inverses = None if moment is None or moment.steps is None else empty(*moment.steps.shape)
    kernels.update_params(params, directions, **options, moment=moment, inverses=inverses)


def elements(block: int | None, *, is_clamped: bool = False) -> ElementMoment:
    """Return second moments of elements in blocks, or with None in fp32."""
    codes = empty(COUNT, *WIDE, dtype=torch.float32 if block is None else torch.uint8)
    steps = None if block is None else empty(COUNT, WIDE[0], triton.cdiv(WIDE[1], block))
    return ElementMoment([codes], steps, 0.95, 1e-8, is_clamped, block or 2048)


def moment_stats(block: int | None, across: bool = False) -> None:
    """Call the reading pass of second moments of elements on fp16 directions."""
    kernels.second_moment_stats(empty(COUNT, *WIDE, dtype=torch.float16, across=across), elements(block))


def squares(columns: bool, across: bool = False) -> None:
    """Call the sums of squares of fp16 directions."""
    kernels.direction_squares(empty(COUNT, *WIDE, dtype=torch.float16, across=across), columns=columns)


def quantize(codebook: Codebook) -> None:
    kernels.quantize(empty(*WIDE, dtype=torch.bfloat16), codebook=codebook, block_size=2048)


def dequantize(codebook: Codebook) -> None:
    codes, scales = empty(*WIDE, dtype=CODE_DTYPES[codebook]), empty(WIDE[0], 2)
    kernels.dequantize(codes, scales, codebook=codebook, block_size=2048)


def _elementwise() -> list[Case]:
    cases = [
        Case(f"{phase}-{codebook}", partial(momentum, phase, codebook))
        for phase in ("stats", "apply")
        for codebook in ("linear", "dynamic", None)
    ]
    cases += [
        Case(f"{phase}-{codebook}-block{block}", partial(momentum, phase, codebook, block), ONE)
        for phase in ("stats", "apply")
        for codebook in ("linear", "dynamic")
        for block in OTHER_BLOCKS[phase]
    ]
    codebooks: tuple[Codebook, ...] = ("linear", "dynamic")
    stochastic = partial(update, torch.bfloat16, [-5] * COUNT)
    return [
        *cases,
        *[
            Case(f"{phase}-linear-eights", partial(momentum, phase, "linear", shape=EIGHTS), ONE)
            for phase in ("stats", "apply")
        ],
        Case("apply-linear-narrow-flags", partial(momentum, "apply", "linear", shape=NARROW, each=True), ONE),
        Case("apply-dynamic-across", partial(momentum, "apply", "dynamic", across=True), ONE),
        Case("stats-linear-across", partial(momentum, "stats", "linear", across=True), ONE),
        Case("stats-cut-linear", partial(cut, "stats", "linear"), NVIDIA),
        Case("apply-cut-linear", partial(cut, "apply", "linear"), ("sm_80", "sm_100")),
        Case("apply-cut-linear-flags", partial(cut, "apply", "linear", each=True), ONE),
        Case("update-fp32", partial(update, torch.float32)),
        Case("update-bf16", partial(update, torch.bfloat16)),
        Case("update-bf16-stochastic", stochastic),
        Case("update-bf16-cautious", partial(update, torch.bfloat16, cautious=True), NVIDIA),
        Case("update-bf16-across-flags", partial(update, torch.bfloat16, across=True, each=True), ONE),
        *[Case(f"quantize-{codebook}", partial(quantize, codebook), ONE) for codebook in codebooks],
        *[Case(f"dequantize-{codebook}", partial(dequantize, codebook), ONE) for codebook in codebooks],
        *_second_moments(),
        Case("round-stochastic", partial(kernels.round_stochastic, empty(*WIDE), key=-5), ONE),
    ]


def _second_moments() -> list[Case]:
    """Return the cases of NorMuon and AdaMuon: what a step of theirs launches beside Muon's, or in its place."""
    of_elements = partial(update, torch.bfloat16, factors=(1, 1))
    return [
        Case("apply-dynamic-signs", partial(momentum, "apply", "dynamic", signs=True), ONE),
        Case("squares-rows", partial(squares, columns=False), NVIDIA),
        Case("squares-columns", partial(squares, columns=True), ONE),
        Case("squares-columns-across", partial(squares, columns=True, across=True), ONE),
        Case("update-bf16-rows", partial(update, torch.bfloat16, factors=(WIDE[0], 1)), NVIDIA),
        Case("update-bf16-columns", partial(update, torch.bfloat16, factors=(1, WIDE[1])), ONE),
        Case("moment-stats-2048", partial(moment_stats, 2048), NVIDIA),
        Case("moment-stats-256", partial(moment_stats, 256), ONE),
        Case("moment-stats-None", partial(moment_stats, None), ONE),
        Case("moment-stats-2048-across", partial(moment_stats, 2048, across=True), ONE),
        Case("moment-update-2048", partial(of_elements, moment=elements(2048)), NVIDIA),
        Case("moment-update-64", partial(of_elements, moment=elements(64)), ONE),
        Case("moment-update-2048-clamped", partial(of_elements, moment=elements(2048, is_clamped=True)), ONE),
        Case("moment-update-None", partial(of_elements, moment=elements(None)), ONE),
        Case("moment-update-2048-across", partial(of_elements, across=True, moment=elements(2048)), ONE),
    ]


def product(
    tiling: GemmTiling,
    dtype: torch.dtype,
    *,
    tall: bool,
    with_descriptors: bool,
    n: int = WIDE[0],
    k: int = WIDE[0],
) -> None:
    """Call X X^T + D, through TMA or through pointers."""
    X = empty(2, n, k, dtype=dtype, across=tall)
    D = empty(2, n, n, dtype=dtype)
    gemm._launch(X, X, D, (1.5, 0.5, 0.0), tiling, with_descriptors)


def _products() -> list[Case]:
    """Return the cases of the product.

    They are every tiling for both orders of the operands, the small ones for one; those of consumer GPUs; fp32; and
    what TMA cannot take, odd sides and, through pointers, sides of 8 mod 16.
    """
    through_pointers: dict[str, Any] = {"tall": False, "with_descriptors": False}
    cases = []
    for target in NVIDIA:
        capability = int(target.removeprefix("sm_"))
        with_descriptors = capability >= 90
        for tiling in TILINGS[capability]:
            name = f"product-{_sizes(tiling)}-{'tma' if with_descriptors else 'pointers'}"
            call = partial(product, tiling, torch.float16, tall=True, with_descriptors=with_descriptors)
            cases.append(Case(f"{name}-fp16-tall", call, (target,)))
            if tiling.block_m > 64:
                call = partial(product, tiling, torch.bfloat16, tall=False, with_descriptors=with_descriptors)
                cases.append(Case(f"{name}-bf16-flat", call, (target,)))
    for tiling in TILINGS[None]:
        call = partial(product, tiling, torch.bfloat16, **through_pointers)
        cases.append(Case(f"product-{_sizes(tiling)}-pointers-bf16-flat", call, ("sm_120",)))
    in_fp32 = partial(product, FP32_TILING, torch.float32, **through_pointers)
    odd = {"n": WIDE[0] - 1, "k": WIDE[0] - 1}
    cases += [
        Case(
            f"product-{_sizes(UNALIGNED_TILING)}-pointers-fp16-tall-odd",
            partial(product, UNALIGNED_TILING, torch.float16, tall=True, with_descriptors=True, **odd),
            NVIDIA,
        ),
        Case(
            f"product-{_sizes(UNALIGNED_TILING)}-pointers-bf16-flat-odd",
            partial(product, UNALIGNED_TILING, torch.bfloat16, **through_pointers, **odd),
            ONE,
        ),
    ]
    eights = partial(product, TILINGS[80][-1], torch.bfloat16, **through_pointers, n=WIDE[0] - 8, k=WIDE[0] - 8)
    return [
        *cases,
        Case(f"product-{_sizes(FP32_TILING)}-pointers-fp32-flat", in_fp32, NVIDIA),
        Case(f"product-{_sizes(TILINGS[80][-1])}-pointers-bf16-flat-eights", eights, ("sm_80",)),
    ]


def _sizes(tiling: GemmTiling) -> str:
    return f"{tiling.block_m}x{tiling.block_n}x{tiling.block_k}"


def tiny(
    rows: int,
    cols: int,
    codebook: str | None = "linear",
    *,
    dtype: torch.dtype = torch.bfloat16,
    keys: list[int] | None = None,
    block: int = 2048,
    cautious: bool = False,
    each: bool = False,
) -> None:
    """Call the whole step of LoRA's matrices, gradients and parameters of one dtype, the flag of the step given."""
    codes = empty(COUNT, rows, cols, dtype=torch.float32 if codebook is None else CODE_DTYPES[codebook])
    scales = None if codebook is None else [empty(COUNT, rows, triton.cdiv(cols, block))]
    matrices, norms = [empty(COUNT, rows, cols, dtype=dtype)], empty(1, COUNT).view(COUNT)
    options: dict[str, Any] = {"beta": 0.95, "nesterov": True, "codebook": codebook, "block_size": block, "keys": keys}
    options |= {"steps": JORDAN, "decay": 0.9, "scale": 0.1, "cautious": cautious, "skip": flags(each=each)}
    step_tiny([codes], scales, matrices, matrices, norms, **options)


def _tiny() -> list[Case]:
    """Return every tile shape for one target, the smallest and the largest for all."""
    stochastic: dict[str, Any] = {"codebook": "dynamic", "keys": [-5] * COUNT}
    return [
        Case("tiny-wide-16", partial(tiny, 16, 2048), NVIDIA),
        Case("tiny-tall-16", partial(tiny, 2048, 16), ONE),
        Case("tiny-tall-64", partial(tiny, 2048, 64), NVIDIA),
        Case("tiny-wide-32", partial(tiny, 32, 2048), ONE),
        Case("tiny-tall-32", partial(tiny, 2048, 32), ONE),
        Case("tiny-wide-64", partial(tiny, 64, 2048), ONE),
        Case("tiny-wide-16-dynamic-stochastic", partial(tiny, 16, 2048, **stochastic), ONE),
        Case("tiny-tall-64-dynamic-stochastic", partial(tiny, 2048, 64, **stochastic), ONE),
        Case("tiny-wide-64-cautious", partial(tiny, 64, 2048, cautious=True), ONE),
        Case("tiny-wide-64-None-fp32", partial(tiny, 64, 2048, None, dtype=torch.float32), ONE),
        Case("tiny-wide-16-block-64-flags", partial(tiny, 16, 2048, block=64, each=True), ONE),
    ]


CASES = [*_elementwise(), *_products(), *_tiny()]
# Before 3.7 Triton fuses on sm_100 what it is told not to, and is refused there: it is compared on sm_90.
COMPILED_FOR = {*EVERYWHERE, "sm_120"} if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else {*ONE}
JOBS = [(case, target) for case in CASES for target in case.targets if target in COMPILED_FOR]
