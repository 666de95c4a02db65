"""One step of a model on many GPUs as the planner would have it: bytes by link, operations by rank.

Beside it stands what gathering momenta would take instead. Nothing is run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu.workloads import Llama
from benchmarks.scaling.transfers import gathered_bytes, sent
from muon8bit.config import DEFAULT_BLOCK_SIZE, DEFAULT_NS_STEPS, DEFAULT_WORKSPACE_BYTES
from muon8bit.distributed.assignment import Assignment, plan
from muon8bit.distributed.exchange import NUM_SHARES
from muon8bit.distributed.matrix_sharding import MatrixSharding, Region
from muon8bit.distributed.planned_transfers import Matrix
from muon8bit.orthogonalize import choose_method, flops, resolve_coefficients

# HSDP: a replica is the least power of two of at least one node whose GPUs take this much each of bf16 weights, bf16
# gradients and 8-bit momentum (an 80 GB card, half of it left for everything else).
MIN_SHARDS, BYTES_PER_ELEMENT, BYTES_PER_GPU = 8, 5, 40e9
PLANNED_BYTES = DEFAULT_WORKSPACE_BYTES // NUM_SHARES  # what a step gives the planner
MOONLIGHT_ITEMSIZE = 2  # it gathers in bf16


@dataclass(frozen=True)
class Machine:
    """Assumed rates: each GPU's products, its link inside a node and its share of the network, each direction."""

    tflops: float = 400.0
    node_gb_s: float = 360.0
    network_gb_s: float = 40.0
    node_size: int = 8


class SimulatedTraffic:
    """Bytes by rank: sent and received, inside the node and over the network."""

    def __init__(self, num_ranks: int, machine: Machine) -> None:
        self.machine = machine
        self.sent, self.received = [[0] * num_ranks for _ in range(2)], [[0] * num_ranks for _ in range(2)]

    def add(self, source: int, target: int, num_bytes: int) -> None:
        remote = source // self.machine.node_size != target // self.machine.node_size
        self.sent[remote][source] += num_bytes
        self.received[remote][target] += num_bytes

    def merge(self, other: SimulatedTraffic) -> None:
        """Add the bytes of another."""
        for ours, theirs in ((self.sent, other.sent), (self.received, other.received)):
            for kind, more in zip(ours, theirs, strict=True):
                kind[:] = map(int.__add__, kind, more)

    def totals(self, direction: list[list[int]]) -> list[int]:
        return [sum(pair) for pair in zip(*direction, strict=True)]

    def ms(self) -> float:
        """Return the slowest rank's time, both kinds of links and both directions at once, latencies aside."""
        machine = self.machine
        inside = max(*self.sent[0], *self.received[0]) / machine.node_gb_s
        return max(inside, max(*self.sent[1], *self.received[1]) / machine.network_gb_s) / 1e6


@dataclass(frozen=True)
class SimulatedStep:
    """One model on one mesh.

    Bytes of one step and one rank, the mean and the most of any; ms of the slowest rank, ours round after round.

    Attributes:
        balance: the most loaded rank's cost over the mean.
        num_rounds, num_parts: of the plan: all-to-alls of X, and of O.
        busiest: what the busiest sender sends, over the mean, summed over all of these.
        sums_bytes: of the all-gather of row sums, received, not in the bytes above; replicas take part, padded.
        gathered_fp32_bytes: received where every rank of a replica gathers every fp32 momentum.
        moonlight_*: see `moonlight`.
        state_bytes, fp32_state_bytes: momentum of the matrices, of the rank that has most.
    """

    model: str
    num_gpus: int
    num_shards: int
    num_matrices: int
    balance: float
    num_rounds: int
    num_parts: int
    busiest: float
    mean_bytes: float
    most_sent_bytes: int
    most_received_bytes: int
    sums_bytes: int
    gathered_fp32_bytes: float
    moonlight_mean_bytes: float
    moonlight_most_bytes: int
    state_bytes: int
    fp32_state_bytes: int
    arithmetic_ms: float
    transfer_ms: float
    moonlight_arithmetic_ms: float
    moonlight_transfer_ms: float


def shards_of(model: Llama) -> int:
    """Count the GPUs of one replica in HSDP."""
    needed = sum(rows * cols for rows, cols in model.linears()) * model.layers * BYTES_PER_ELEMENT / BYTES_PER_GPU
    count = MIN_SHARDS
    while count < needed:
        count *= 2
    return count


def matrices_of(model: Llama, num_shards: int, replicas: int, kind: str) -> list[Matrix]:
    """Return every hidden matrix, its rows in chunks (torch.chunk, FSDP2's `Shard(0)`), replica after replica."""
    schedule = resolve_coefficients("jordan", DEFAULT_NS_STEPS)
    found: dict[tuple[int, ...], Matrix] = {}
    for rows, cols in model.linears():
        size = -(-rows // num_shards)
        spans = [(min(i * size, rows), min((i + 1) * size, rows)) for i in range(num_shards)]
        held = tuple(Region(span, (0, cols)) if span[0] < span[1] else None for span in spans) * replicas
        count = model.linears().count((rows, cols)) * model.layers
        together = {"count": count, "budget_bytes": DEFAULT_WORKSPACE_BYTES}
        method = choose_method(rows, cols, schedule, kind, tiny=False, **together)
        found[rows, cols] = Matrix(rows, cols, MatrixSharding(held, held), method)
    return [found[shape] for shape in model.linears()] * model.layers


def operations(matrix: Matrix) -> int:
    """Count the floating-point operations of one matrix by its method."""
    method = matrix.method
    num_segments = max(1, len(method.segments))
    return flops(method.form, matrix.rows, matrix.cols, DEFAULT_NS_STEPS, num_segments=num_segments)


def slowest_of_rounds(planned: Assignment) -> int:
    """Sum the operations of the slowest owner of each round, for which all wait."""
    total = 0
    for a_round in planned.rounds:
        work: Counter[int] = Counter()
        for transfer in a_round.transfers:
            work[transfer.owner] += operations(transfer.matrix)
        total += max(work.values())
    return total


def traffic_of_rounds(planned: Assignment, machine: Machine) -> list[SimulatedTraffic]:
    """Return the traffic of the inputs of each round, and of its updates.

    These return in parts, one after the other, of which each has the same share of the rows of every matrix: so they
    take as long, together, as all of them would at once.
    """
    found = []
    for a_round in planned.rounds:
        inputs, updates = (SimulatedTraffic(len(planned.load), machine) for _ in range(2))
        for transfer in a_round.transfers:
            for source, target, num_bytes in sent(transfer):
                (inputs if target == transfer.owner else updates).add(source, target, num_bytes)
        found += [inputs, updates]
    return found


def moonlight(matrices: Sequence[Matrix], num_ranks: int, machine: Machine) -> tuple[SimulatedTraffic, list[int]]:
    """Count traffic and operations by rank of one replica in Moonlight's Distributed Muon.

    It is algorithm 1 of arXiv 2502.16982. Our reading: ZeRO-1 as in Megatron. The momenta of all matrices, one after
    the other, are cut into equal ranges, one a rank. Each rank gathers in bf16 every matrix of which its range has a
    part, orthogonalizes it whole, and keeps its part. Not counted, on neither side, are gradients and the all-gather
    of updated parameters.
    """
    traffic, work = SimulatedTraffic(num_ranks, machine), [0] * num_ranks
    total, start = sum(m.rows * m.cols for m in matrices), 0
    for matrix in matrices:
        stop, parts = start + matrix.rows * matrix.cols, dict[int, int]()
        for rank in range(start * num_ranks // total, min(num_ranks - 1, stop * num_ranks // total) + 1):
            low, high = total * rank // num_ranks, total * (rank + 1) // num_ranks
            if (size := min(high, stop) - max(low, start)) > 0:
                parts[rank] = size
        for target in parts:
            work[target] += operations(matrix)
            for source, size in parts.items():
                if source != target:
                    traffic.add(source, target, size * MOONLIGHT_ITEMSIZE)
        start = stop
    return traffic, work


def simulate(name: str, model: Llama, num_gpus: int, num_shards: int, kind: str, machine: Machine) -> SimulatedStep:
    """Plan one step of `model` on `num_gpus`, in replicas of `num_shards`."""
    matrices = matrices_of(model, num_shards, num_gpus // num_shards, kind)
    planned = plan(matrices, num_gpus, PLANNED_BYTES)
    traffic, one_by_one = SimulatedTraffic(num_gpus, machine), traffic_of_rounds(planned, machine)
    for part in one_by_one:
        traffic.merge(part)
    busiest = sum(max(part.totals(part.sent)) for part in one_by_one)
    theirs, their_work = moonlight(matrices, num_shards, machine)
    their_bytes = theirs.totals(theirs.received)
    held = [(-(-m.rows // num_shards), m.cols, -(-m.cols // DEFAULT_BLOCK_SIZE)) for m in matrices]
    num_sums = sum(rows * blocks for rows, _, blocks in held)
    elements = sum(rows * cols for rows, cols, _ in held)
    received = traffic.totals(traffic.received)
    return SimulatedStep(
        model=name,
        num_gpus=num_gpus,
        num_shards=num_shards,
        num_matrices=len(matrices),
        balance=max(planned.load) * num_gpus / sum(planned.load),
        num_rounds=len(planned.rounds),
        num_parts=sum(a_round.num_parts for a_round in planned.rounds),
        busiest=busiest * num_gpus / sum(received),
        mean_bytes=sum(received) / num_gpus,
        most_sent_bytes=max(traffic.totals(traffic.sent)),
        most_received_bytes=max(received),
        sums_bytes=gathered_bytes([num_sums] * num_gpus),
        gathered_fp32_bytes=4 * sum(m.rows * m.cols for m in matrices) * (num_shards - 1) / num_shards,
        moonlight_mean_bytes=sum(their_bytes) / num_shards,
        moonlight_most_bytes=max(*their_bytes, *theirs.totals(theirs.sent)),
        state_bytes=elements + 4 * num_sums,
        fp32_state_bytes=4 * elements,
        arithmetic_ms=slowest_of_rounds(planned) / machine.tflops / 1e9,
        transfer_ms=sum(part.ms() for part in one_by_one),
        moonlight_arithmetic_ms=max(their_work) / machine.tflops / 1e9,
        moonlight_transfer_ms=theirs.ms(),
    )
