"""State on the host (`state_device="cpu"`): what it takes there, and what a step stages on the GPU, from shapes alone.

Only Muon8bit and what is built on it can, and on CUDA alone: a run on a CPU has its state there already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from ..config import DEFAULT_NS_STEPS, DEFAULT_WORKSPACE_BYTES, SMALL_WORKSPACE_BYTES
from ..orthogonalize import partition, resolve_coefficients
from ..orthogonalize.coefficients import JORDAN
from ..step.adamw_chunks import ALIGNMENT
from ..step.offload import NUM_BUFFERS, aligned_bytes, buffer_bytes
from .optimizers import OURS, Param, adamw_bits, matrix_shapes, moments_sizes, muon_sizes
from .setup import Setup

STAGED = OURS


def is_on_host(optimizer: str, setup: Setup) -> bool:
    """Check whether the state of an optimizer lies in host memory, away from the GPU."""
    return optimizer in STAGED and setup.state_device == "cpu" and setup.device == "cuda"


def host_bytes(optimizer: str, params: Sequence[Param]) -> int:
    """Return the bytes of pinned memory for the state: torch rounds every tensor up to a power of two bytes."""
    return sum(2 ** (size - 1).bit_length() for p in params for size in _tensors(optimizer, p) if size)


def bus_bytes(optimizer: str, params: Sequence[Param]) -> int:
    """Return the bytes moved between host and GPU in a step.

    Muon's momentum comes to the GPU twice and goes back once; all else comes and goes once.
    """
    num_bytes = sum(2 * sum(_tensors(optimizer, p)) for p in params)
    return num_bytes + sum(sum(muon_sizes("muon8bit", p)) for p in params if p.is_muon)


def staging_bytes(optimizer: str, params: Sequence[Param], kind: str, *, budget: int = DEFAULT_WORKSPACE_BYTES) -> int:
    """Return the bytes of the staging buffers on the GPU, in the phase of the step that has the larger ones.

    Args:
        optimizer: of `STAGED`.
        kind: device kind of `orthogonalize.device_kind`.
        budget: `workspace_bytes`, which decides what is stepped together.
    """
    own = [p for p in params if p.is_muon]
    matrices = _matrices(own)
    read: list[int] = []
    written: list[int] = []

    def matrix_bytes(of: str, rows: int, cols: int) -> int:
        matrix = replace(own[0], shape=(rows, cols), split=None, flatten=False, whole_elements=None, num_shards=1)
        return sum(map(aligned_bytes, muon_sizes(of, matrix)))

    for (rows, cols, row_sizes, col_sizes), count in matrices.items():
        one = matrix_bytes(optimizer, rows, cols)
        for size in set(row_sizes or (rows,)):
            num = count * (row_sizes or (rows,)).count(size)
            read += _cut(matrix_bytes("muon8bit", size, cols), num, budget // (4 * size * cols))
            if col_sizes is None:
                written += _cut(matrix_bytes(optimizer, size, cols), num, _together(size, cols, num, kind, budget))
        if col_sizes is not None:
            written += _cut(one, count, _together(rows, cols, count, kind, budget, col_sizes))
    written += _adamw_jobs(optimizer, [p for p in params if not p.is_muon], budget // 2 // NUM_BUFFERS)
    return max(sum(buffer_bytes(read)), sum(buffer_bytes(written)))


def _together(rows: int, cols: int, count: int, kind: str, budget: int, widths: Sequence[int] | None = None) -> int:
    """Return how many of `count` matrices are stepped together."""
    coefficients = resolve_coefficients(JORDAN, DEFAULT_NS_STEPS)
    budget -= SMALL_WORKSPACE_BYTES
    return partition(rows, cols, coefficients, kind, budget, count=count, widths=widths).size


def _cut(num_bytes: int, count: int, size: int) -> list[int]:
    """Return the bytes of each job when `count` matrices of `num_bytes` each are cut into jobs of at most `size`."""
    full, rest = divmod(count, max(1, size))
    return [num_bytes * max(1, size)] * full + [num_bytes * rest] * (rest > 0)


def _matrices(
    params: Iterable[Param],
) -> Counter[tuple[int, int, tuple[int, ...] | None, tuple[int, ...] | None]]:
    """Count the matrices of each [rows, cols], with the pieces of their rows or of their columns."""
    counts: Counter[tuple[int, int, tuple[int, ...] | None, tuple[int, ...] | None]] = Counter()
    for param in params:
        sizes, dim = param.split or (None, -2)
        for (rows, cols), count in matrix_shapes(param).items():
            counts[rows, cols, sizes if dim == -2 else None, sizes if dim == -1 else None] += count
    return counts


def _adamw_jobs(optimizer: str, params: Iterable[Param], buffer: int) -> list[int]:
    """Return the bytes of each job; a job holds several small parameters, or a piece of a large one."""
    jobs: list[int] = []
    filled = buffer + 1
    for param in params:
        for num_bytes in _pieces(optimizer, param, buffer):
            if filled + num_bytes > buffer:
                jobs.append(0)
                filled = 0
            jobs[-1] += num_bytes
            filled += num_bytes
    return jobs


def _pieces(optimizer: str, param: Param, buffer: int) -> Iterator[int]:
    whole, num_elements = sum(_tensors(optimizer, param)), param.num_elements
    size = max(ALIGNMENT, buffer * num_elements // whole // ALIGNMENT * ALIGNMENT)
    for start in range(0, max(1, num_elements), size):
        part = min(size, num_elements - start)
        yield sum(map(aligned_bytes, moments_sizes((part,), adamw_bits(optimizer), num_elements)))


def _tensors(optimizer: str, param: Param) -> list[int]:
    """Return the bytes of each tensor of a parameter's state."""
    if param.is_muon:
        return muon_sizes(optimizer, param)
    return moments_sizes(param.shape, adamw_bits(optimizer))
