"""Which instructions count for the taken path of a tile, on machine code that was written for it."""

from __future__ import annotations

import pytest

from benchmarks.compile.sass import taken_path


def sass(*lines: str) -> str:
    """Number the instructions, as nvdisasm prints them; labels and functions stay as they are."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * number:04x}*/    {line} ;"
        for number, line in enumerate(lines)
    )


DIVISION = (
    "FCHK P2, R4, 127",
    "BSSY B2, `(.L_x_1)",
    "FFMA R3, R4, R19, RZ",
    "@!P2 BRA `(.L_x_0)",
    "MOV R14, 0xa50",
    "CALL.REL.NOINC `($__internal_0_$__slowpath)",
    ".L_x_0:",
    "BSYNC B2",
    ".L_x_1:",
)
SLOWPATH = (
    "$__internal_0_$__slowpath:",
    "MOV R1, R2",
    "@P1 BRA `(.L_x_9)",
    "FFMA R1, R1, R1, R1",
    ".L_x_9:",
    "RET.REL.NODEC R14 `(k)",
)
ONE, TWO, EXIT = "MOV R1, R2", ["FMUL R1, R1, R1", "FMUL R1, R1, R1"], "EXIT"
TO_4, TO_5, TO_6 = (f"BRA `(.L_x_{number})" for number in (4, 5, 6))


@pytest.mark.parametrize(
    ("lines", "taken", "with_branches", "whole"),
    [
        ([ONE, "@!P0 EXIT", "STG.E [R2], R1", EXIT, "NOP", "NOP"], 4, 4, 4),
        ([ONE, *DIVISION, EXIT, *SLOWPATH], 7, 9, 13),
        # Loops: a body that has a division counts once, also where the branch stands at its head.
        ([ONE, ".L_x_5:", *DIVISION, ONE, f"@P0 {TO_5}", EXIT, *SLOWPATH], 9, 11, 15),
        ([ONE, ".L_x_5:", f"@P0 {TO_6}", *DIVISION, TO_5, ".L_x_6:", EXIT, *SLOWPATH], 9, 11, 15),
        ([f"@P0 {TO_6}", ".L_x_5:", *DIVISION, f"@P1 {TO_5}", ONE, ".L_x_6:", EXIT, *SLOWPATH], 9, 11, 15),
        # The side of tiny scales does not count, divisions and all; the other one does.
        ([f"@P3 {TO_5}", *TWO, TO_6, ".L_x_5:", *DIVISION, ONE, ".L_x_6:", EXIT, *SLOWPATH], 5, 13, 17),
        # Neither side calls, or both do: both count.
        ([f"@P3 {TO_5}", *TWO, TO_6, ".L_x_5:", ONE, ".L_x_6:", EXIT], 6, 6, 6),
        # A side that leaves for good, and not by a call, does not make the other one slow.
        ([f"@P3 {TO_5}", *DIVISION, EXIT, ".L_x_5:", ONE, EXIT, *SLOWPATH], 9, 11, 15),
        # Conditional without a predicate, where the threads of a warp have parted; and with two predicates.
        (["BRA.DIV UR4, `(.L_x_5)", ONE, ".L_x_4:", EXIT, ".L_x_5:", DIVISION[5], TO_4, *SLOWPATH], 3, 5, 9),
        (["@!P3 BRA !P1, `(.L_x_5)", ONE, ".L_x_5:", EXIT], 3, 3, 3),
    ],
)
def test_slow_branches_and_subroutines_do_not_count(lines, taken, with_branches, whole):
    path = taken_path(sass(*lines))
    assert (path.count(), path.with_branches, path.whole) == (taken, with_branches, whole)


def test_instructions_are_counted_by_name():
    path = taken_path(sass("FFMA R1, R1, R1, R1", "@P0 FFMA.RZ R1, R1, R1, R1", "BAR.SYNC.DEFER_BLOCKING 0x0", "EXIT"))
    assert (path.count("FFMA.*"), path.count("FFMA"), path.count(r"BAR\..*")) == (2, 1, 1)


def test_what_is_no_machine_code_is_refused():
    with pytest.raises(ValueError, match="nvdisasm -c"):
        taken_path("ld.global.b32 %r1, [%rd1];")
