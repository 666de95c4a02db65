"""Read NVIDIA machine code: the basic blocks of a kernel, and those on the path that every ordinary number takes.

The taken path is what is left of the kernel's own code when these are left out, and nothing else is:

1. Subroutines, since only a CALL leads there: the assembler writes the slow half of an exact division as one.
2. Of a conditional branch whose two sides meet again before the kernel ends, the side with a CALL, if only one has one:
   ordinary numbers never get there. Between the branch and the place where they meet, a side is what can be reached
   from its first block. The branch of a loop, from which one side leads back to it, is not such a branch, nor one that
   leads round a whole loop.

Each instruction of that path counts once, that of a loop's body too; predicated ones count whether they do anything or
not. So a path through two sides without a CALL counts both: the number is never too low for one tile.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

_LINE = re.compile(
    r"^(?:\.L_(?P<label>\w+):|(?P<function>\$\S+):|"
    r"\s*/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?\w+\s+)?(?P<name>[A-Z][\w.]*)(?P<operands>[^;]*);)",
    re.MULTILINE,
)
_TARGET = re.compile(r"`\(\.L_(\w+)\)")
_END = -1  # the successor of an EXIT


@dataclass
class Block:
    """Instructions without a branch between them, by name, and the indices of the blocks that may follow."""

    names: list[str] = field(default_factory=list)
    following: list[int] = field(default_factory=list)

    @property
    def calls(self) -> bool:
        return any(name.startswith("CALL") for name in self.names)


@dataclass(frozen=True)
class Path:
    """Counts by name of the instructions on the taken path, and numbers of all instructions."""

    instructions: Mapping[str, int]
    with_branches: int  # without subroutines alone
    whole: int

    def count(self, pattern: str = r".*") -> int:
        """Count the instructions of the path whose whole name matches the regular expression."""
        return sum(number for name, number in self.instructions.items() if re.fullmatch(pattern, name))


def taken_path(sass: str) -> Path:
    """Return the taken path of the one kernel in the output of `nvdisasm -c`.

    Padding behind the last instruction counts neither there nor in the whole.

    Raises:
        ValueError: if `sass` has no instruction.
    """
    blocks = blocks_of(sass)
    if not blocks:
        raise ValueError("sass has no instruction: it must be the output of nvdisasm -c")
    kernel = _reachable(blocks, 0)
    taken = _reachable(blocks, 0, without=_slow_sides(blocks, kernel))
    counts = Counter(name for index in taken for name in blocks[index].names)
    with_branches = sum(len(blocks[index].names) for index in kernel)
    whole = sum(name != "NOP" for block in blocks for name in block.names)
    return Path(dict(counts.most_common()), with_branches, whole)


def blocks_of(sass: str) -> list[Block]:
    """Cut the code into blocks; a subroutine's stand behind the kernel's, and no edge leads to them."""
    blocks, labels, jumps = [Block()], dict[str, int](), list[tuple[int, str]]()
    falls_through = True  # from the block before into the one that begins

    def begin() -> None:
        if not blocks[-1].names:
            return
        if falls_through:
            blocks[-1].following.append(len(blocks))
        blocks.append(Block())

    for line in _LINE.finditer(sass):
        name, operands = line["name"], line["operands"]
        if name is None:
            begin()
            falls_through = True
            if line["label"]:
                labels[line["label"]] = len(blocks) - 1
            continue
        blocks[-1].names.append(name)
        if name.startswith(("BRA", "EXIT", "RET")):
            # Also conditional: BRA.DIV, taken where the threads of a warp have parted, and BRA with a second predicate.
            falls_through = bool(line["guard"]) or ".DIV" in name or bool(re.match(r"\s*!?U?P\w", operands))
            target = _TARGET.search(operands)
            if target:
                jumps.append((len(blocks) - 1, target[1]))
            else:
                blocks[-1].following.append(_END)
            begin()
            falls_through = True
    for index, label in jumps:
        blocks[index].following.append(labels[label])
    return [block for block in blocks if block.names]


def _reachable(blocks: list[Block], first: int, without: Set[int] = frozenset()) -> set[int]:
    """Return the blocks that can be reached from block `first`, itself included, through none of `without`."""
    found, waiting = set[int](), [first]
    while waiting:
        index = waiting.pop()
        if index not in found and index not in without and index != _END:
            found.add(index)
            waiting += blocks[index].following
    return found


def _meeting_places(blocks: list[Block], kernel: set[int]) -> dict[int, set[int]]:
    """Return for each block of the kernel the blocks that every way from it to the end passes, itself included."""
    passed = {index: set(kernel) for index in kernel}
    passed[_END] = set()
    changed = True
    while changed:
        changed = False
        for index in sorted(kernel, reverse=True):
            common = set.intersection(*(passed[after] for after in blocks[index].following)) | {index}
            if common != passed[index]:
                passed[index], changed = common, True
    return passed


def _has_loop(blocks: list[Block], side: set[int]) -> bool:
    """Return whether a block of the side leads back to itself without leaving the side."""
    others = set(range(len(blocks))) - side
    return any(index in _reachable(blocks, after, others) for index in side for after in blocks[index].following)


def _slow_sides(blocks: list[Block], kernel: set[int]) -> set[int]:
    """Return the blocks of the second rule."""
    passed, slow = _meeting_places(blocks, kernel), set[int]()
    for index in kernel:
        first, *others = dict.fromkeys(blocks[index].following)
        if len(others) != 1 or _END in (first, *others):
            continue
        meeting = passed[first] & passed[others[0]]
        if not meeting:
            continue
        sides = [_reachable(blocks, side, without=meeting) for side in (first, others[0])]
        if any(index in side or _has_loop(blocks, side) for side in sides):
            continue
        calling = [side for side in sides if any(blocks[block].calls for block in side)]
        if len(calling) == 1:
            slow |= calling[0]
    return slow
