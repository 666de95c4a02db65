"""What became of the shipped kernels for GPUs that need not be there: the records of the committed table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton")
import triton
from helpers.background import compile_kernels
from muon8bit_kernels.triton.gemm_tilings import TILINGS

from benchmarks.compile import products, table
from benchmarks.compile.cases import COMPILED_FOR, JOBS
from benchmarks.compile.products import epilogue

pytestmark = pytest.mark.background(command=compile_kernels)
NVIDIA = {"sm_80", "sm_90", "sm_100"}
# Shared memory that a program may have, in bytes, by the vendors' guides.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}
ANY_TENSOR_CORE = r"(?:HMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)(?:\..*)?"
BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)


def jobs(pattern: str, targets: set[str] = NVIDIA) -> list[tuple[str, str]]:
    """Names and targets of the compiled kernels whose whole name matches; of Triton 3.6's for sm_90 alone."""
    found = [(c.name, target) for c, target in JOBS if re.fullmatch(pattern, c.name) and target in targets]
    assert bool(found) == bool(targets & COMPILED_FOR), pattern
    return found


def ids(job: tuple[str, str]) -> str:
    return "-".join(job)


def instructions(text: str, pattern: str) -> list[int]:
    """The places of the PTX instructions whose name matches."""
    return [match.start() for match in re.finditer(rf"^\s*(?:@!?\S+ )?\s*{pattern}", text, re.MULTILINE)]


ELEMENTWISE = jobs("(?:stats|apply|update|quantize|dequantize|round)-.*")
EVERYWHERE = {*NVIDIA, "gfx942"}


def test_at_most_145_compilations_cover_every_kernel_and_configuration():
    """118 of them are Muon's; second moments have kernels of their own, and the update with them four forms."""
    names = {(case.name, target) for case, target in JOBS}
    assert len(names) == len(JOBS) <= 145
    for phase, codebook in (("stats", "linear"), ("stats", "dynamic"), ("apply", "linear"), ("apply", "dynamic")):
        for target in EVERYWHERE & COMPILED_FOR:
            assert (f"{phase}-{codebook}", target) in names
    for codebook in ("linear", "dynamic"):
        blocks = {int(n.rpartition("block")[2]) for n, _ in names if n.startswith(f"apply-{codebook}-block")}
        assert blocks | {2048} == set(BLOCKS)
    for capability, target in ((80, "sm_80"), (90, "sm_90"), (100, "sm_100"), (None, "sm_120")):
        for tiling in TILINGS[capability]:
            sizes = f"product-{tiling.block_m}x{tiling.block_n}x{tiling.block_k}-"
            assert target not in COMPILED_FOR or any(name.startswith(sizes) and at == target for name, at in names)


def test_nothing_is_spilled_and_shared_memory_suffices(compiled):
    assert set(compiled.records) == {(case.name, target) for case, target in JOBS}
    for record in compiled.records.values():
        assert record.spilled_bytes == 0, record
        assert record.count(r"(?:LDL|STL|scratch_).*") == 0, record
        assert 0 < record.registers <= 255, record
        assert record.shared_bytes <= SHARED_LIMIT[record.target], record


def test_elementwise_kernels_leave_room_for_a_thousand_threads(compiled):
    """So that loads of many programs are under way at once: 64 Ki registers and 64 KiB and more to a multiprocessor.

    Where a tensor lies across, most registers hold addresses. Triton 3.6 has a layout for the map that takes 95 then:
    two programs of 256 threads. A limit of 64 would spill, and twice the warps take 40% more instructions an element.
    """
    for name, target in jobs("(?:stats|apply|update|quantize|dequantize|round)-.*", EVERYWHERE):
        record = compiled.records[name, target]
        programs = 1024 // (record.num_warps * (64 if target == "gfx942" else 32))
        most = 96 if "dynamic-across" in name and triton.__version__.startswith("3.6.") else 80
        assert record.registers <= most, record
        assert record.shared_bytes * programs <= 64 << 10, record


def num_fused(name: str) -> int:
    """The fused operations that a thread of an elementwise kernel should have.

    Each decoded linear code takes 2, each quotient by the scale 3, beside one for the scale; the guess of a dynamic
    code, which a comparison corrects, is the least of 7 lines. In pieces a thread has 8 elements, and makes codes
    without.
    """
    kernel, codebook = name.replace("-cut", "").split("-")[:2]
    if "across" in name:
        return 8 * 2 * (codebook == "linear")
    decoded, encoded = int(kernel in ("stats", "apply", "dequantize")), int(kernel in ("apply", "quantize"))
    if codebook == "linear":
        return 16 * (2 * decoded + 3 * encoded) + encoded
    return 16 * (3 + 7) * encoded + encoded if codebook == "dynamic" else 0


@pytest.mark.parametrize("job", ELEMENTWISE, ids=ids)
def test_ptx_fuses_the_counted_operations_of_divisions_alone_and_adds_in_a_fixed_order(compiled, job):
    ptx = compiled.text(*job, "ptx")
    assert not re.findall(r"\bmad\.\S*f32|\bdiv\.(?:full|approx)\S*|\brcp\S*|\S*\.ftz\S*", ptx)
    assert not re.findall(r"\b(?:atom|red)\.\S*", ptx)
    found = len(instructions(ptx, r"fma\.rn\.f32 ")) + 2 * len(instructions(ptx, r"fma\.rn\.f32x2 "))
    assert found == num_fused(job[0])
    assert set(re.findall(r"\bfma\.\S*", ptx)) <= {"fma.rn.f32", "fma.rn.f32x2"}
    names = set(re.findall(r"\b(?:add|sub|mul|div)\.\S*f32", ptx))
    assert names - {"add.f32"} <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32"}  # add.f32: sums over threads
    assert job[0] == "round-stochastic" or len(instructions(ptx, r"mul\.rn\.f32")) > 0


@pytest.mark.parametrize("job", [job for job in ELEMENTWISE if "across" not in job[0]], ids=ids)
def test_only_a_scale_and_a_norm_are_divided_by_as_the_assembler_does(compiled, job):
    """Once a thread each, for it has the elements of one row."""
    kernel, codebook = job[0].replace("-cut", "").split("-")[:2]
    scales = int(kernel in ("apply", "quantize") and codebook != "None")
    assert len(instructions(compiled.text(*job, "ptx"), r"div\.rn")) == scales + (
        kernel == "apply" and "signs" not in job[0]
    )


IN_ORDER = jobs("(?:stats|apply|dequantize)-linear|(?:apply|quantize)-dynamic", {"sm_80", "sm_90"})  # sm_100: in pairs


@pytest.mark.parametrize("job", IN_ORDER, ids=ids)
def test_ptx_divides_by_the_steps_that_are_proved_exact(compiled, job):
    """The operations of every element, found from the last one backwards; see `triton.exact`."""
    lines = re.finditer(r"^\s*(\S+)\s+(%r\d+), ([^;{]+);", compiled.text(*job, "ptx"), re.MULTILINE)
    made = {line[2]: (line[1], line[3].split(", ")) for line in lines}

    def factors(register: str, operation: str, added: str | None = None) -> set[str]:
        """What the operation multiplies whose result this is; it adds `added`."""
        name, operands = made[register]
        assert name == operation
        assert operands[2:] == ([] if added is None else [added])
        return set(operands[:2])

    minus_seventh, linear_max, largest, one = "0fBC010204", "0f42FE0000", "0f7F7FFFFF", "0f3F800000"
    by_127, by_scale = 0, 0
    for first_factor, second_factor, first in [o for name, o in made.values() if name == "fma.rn.f32"]:
        residual, factor = sorted((first_factor, second_factor), key=lambda o: o not in made or "0f" in o)
        if factor == minus_seventh:
            (unbounded,) = factors(residual, "min.f32") - {largest}
            minus_product = made[unbounded][1][2]
            assert factors(unbounded, "fma.rn.f32", minus_product) == {first, linear_max}
            assert factors(first, "mul.rn.f32") == {minus_product, minus_seventh}
            by_127 += 1
        elif first in made and made[first][0] == "fma.rn.f32":
            high = next(o for o in (first_factor, second_factor) if made[o][0] == "div.rn.f32")
            (residual,) = {first_factor, second_factor} - {high}
            numerator = made[high][1][0]
            assert one in (numerator, *made.get(numerator, ("mov.b32", []))[1])
            scaled = made[residual][1][2]
            (minus_divisor,) = factors(residual, "fma.rn.f32", scaled) - {first}
            times_low = made[first][1][2]
            assert factors(first, "fma.rn.f32", times_low) == {scaled, high}
            (low,) = factors(times_low, "mul.rn.f32") - {scaled}
            (residual_of_high,) = factors(low, "mul.rn.f32") - {high}
            assert factors(residual_of_high, "fma.rn.f32", one) == {minus_divisor, high}
            by_scale += 1
    kernel, codebook = job[0].split("-")[:2]
    assert by_127 == 16 * (codebook == "linear" and kernel != "quantize")
    assert by_scale == 16 * (kernel in ("apply", "quantize"))


# Without a division, which the assembler expands into exact fused operations of its own.
@pytest.mark.parametrize("job", jobs("dequantize-dynamic|stats-(?:dynamic|None).*|update-.*"), ids=ids)
def test_machine_code_has_no_fused_multiply_add(compiled, job):
    record = compiled.records[job]
    assert record.count(r"FMUL.*") > 0
    assert record.count(r"FFMA.*") == 0


def test_amd_machine_code_fuses_only_in_divisions(compiled):
    for name, target in jobs("stats-(?:dynamic|None)|update-.*", {"gfx942"}):
        record = compiled.records[name, target]
        assert record.count(r"v_(?:pk_)?mul_f32.*") > 0
        assert record.count(r"v_(?:pk_)?(?:fma|mad|fmac|mac)\w*_f32.*") == 0, record


@pytest.mark.parametrize("job", jobs("(?:apply|quantize)-linear.*"), ids=ids)
def test_codes_are_rounded_by_the_addition_that_leaves_no_fraction(compiled, job):
    """1.5 * 2**23 is added; nothing is converted by an instruction, which might truncate."""
    ptx = compiled.text(*job, "ptx")
    assert "0f4B400000" in ptx
    assert not instructions(ptx, r"cvt\.\S*\.s(?:8|16|32)\.f32")


@pytest.mark.parametrize("job", jobs("(?:apply|update)-(?!.*(?:across|cut)).*"), ids=ids)
def test_what_is_written_in_place_is_written_only_after_every_thread_has_read_it(compiled, job):
    """Of `apply` the first two stores are those of 16 elements of the Newton-Schulz input, which nobody reads."""
    ptx = compiled.text(*job, "ptx")
    # By 4 bytes: scales, norm and flag; the map of midpoints does not change.
    loads, stores = instructions(ptx, r"ld\.global\.(?:v|b)"), instructions(ptx, r"st\.global")
    in_place = stores[2] if job[0].startswith("apply") else stores[0]
    assert any(loads[-1] < barrier < in_place for barrier in instructions(ptx, r"bar\.sync"))


SUMS, MOMENT_UPDATES = jobs("(?:squares|moment-stats)-.*"), jobs("moment-update-.*")


def test_second_moments_leave_room_for_five_hundred_threads(compiled):
    """Roots and quotients of 16 elements are under way at once in updates."""
    for job in SUMS:
        assert compiled.records[job].registers <= 64, job
    for job in MOMENT_UPDATES:
        assert compiled.records[job].registers <= 104, job


@pytest.mark.parametrize("job", MOMENT_UPDATES, ids=ids)
def test_updates_take_one_exact_root_and_one_exact_quotient_an_element_and_fuse_nothing(compiled, job):
    ptx = compiled.text(*job, "ptx")
    assert not re.findall(
        r"\b(?:fma|mad)\.\S*f32|\b(?:div|sqrt)\.(?:full|approx)\S*|\br(?:cp|sqrt)\S*|\S*\.ftz\S*", ptx
    )
    assert len(instructions(ptx, r"div\.rn\.f32")) == 16
    assert len(instructions(ptx, r"sqrt\.rn\.f32")) == 16 + ("clamped" in job[0])  # that of eps
    names = set(re.findall(r"\b(?:add|sub|mul)\.\S*f32", ptx))
    assert names - {"add.f32"} <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32"}
    assert not instructions(ptx, r"cvt\.\S*bf16|cvt\.\S*\.[su](?:8|16|32)\.f32")


@pytest.mark.parametrize("job", MOMENT_UPDATES, ids=ids)
def test_parameters_and_second_moments_are_written_after_every_thread_has_read_them(compiled, job):
    ptx = compiled.text(*job, "ptx")
    loads, stores = instructions(ptx, r"ld\.global\.(?:v|b)"), instructions(ptx, r"st\.global")
    assert any(loads[-1] < barrier < stores[0] for barrier in instructions(ptx, r"bar\.sync"))


@pytest.mark.parametrize("job", SUMS, ids=ids)
def test_sums_of_second_moments_fuse_nothing_and_add_in_a_fixed_order(compiled, job):
    """The largest root is exact; what is only added up is not, in half the instructions."""
    ptx = compiled.text(*job, "ptx")
    assert not re.findall(r"\b(?:fma|mad)\.\S*f32|\b(?:atom|red)\.\S*|div\.rn", ptx)
    is_stats = job[0].startswith("moment")
    assert len(instructions(ptx, r"sqrt\.rn\.f32")) == is_stats


@pytest.mark.parametrize("job", [*SUMS, *MOMENT_UPDATES], ids=ids)
def test_directions_and_codes_of_second_moments_move_many_bytes_at_a_time(compiled, job):
    """16 bytes of directions, parameters and fp32 moments; codes of 8 elements or more; by 4 bytes what rows have."""
    widths = re.findall(r"\b(?:ld|st)\.global\.(\S+)", compiled.text(*job, "ptx"))
    assert set(widths) <= {"v4.b32", "v2.b32", "b32", "b64"}
    assert widths.count("v4.b32") >= (1 if "across" in job[0] else 2 if job in SUMS else 6)


@pytest.mark.parametrize("job", jobs("apply-cut-.*"), ids=ids)
def test_codes_of_some_columns_are_written_only_after_every_thread_has_read_them(compiled, job):
    """What is loaded later are scales of blocks that no program here reads."""
    ptx = compiled.text(*job, "ptx")
    loads, stores = instructions(ptx, r"ld\.global\.v4"), instructions(ptx, r"st\.global")
    assert any(loads[-1] < barrier < stores[0] for barrier in instructions(ptx, r"bar\.sync"))


@pytest.mark.parametrize("job", ELEMENTWISE, ids=ids)
def test_codes_gradients_and_parameters_move_16_bytes_at_a_time(compiled, job):
    widths = re.findall(r"\b(?:ld|st)\.global\.(\S+)", compiled.text(*job, "ptx"))
    # b32: scales, norms, flag, and, as constants (nc), the map; b64: the table. Of pieces a thread has 8 elements, of
    # which the codes are 8 bytes; so they are where a row is 8 mod 16 codes long.
    narrower = ["v2.b32"] if "across" in job[0] or "eights" in job[0] else []
    assert set(widths) <= {"v4.b32", "b32", "nc.b32", "b64", *narrower}
    assert widths.count("v4.b32") >= (1 if job[0] == "stats-linear-across" else 2 if "eights" in job[0] else 3)


def test_codes_and_gradients_move_16_bytes_at_a_time_on_amd(compiled):
    for job in jobs(".*", {"gfx942"}):
        assert compiled.records[job].count(r"(?:global|buffer)_load_dwordx4") > 0, job


@pytest.mark.parametrize("job", jobs("update-bf16.*|round-.*"), ids=ids)
def test_bf16_parameters_are_rounded_on_the_bits(compiled, job):
    """No conversion to bf16 of the hardware's, which would hide what the integers did."""
    assert not instructions(compiled.text(*job, "ptx"), r"cvt\.\S*bf16")


@pytest.mark.parametrize("job", jobs("product-.*(?:bf16|fp16).*", {*NVIDIA, "sm_120"}), ids=ids)
def test_half_precision_products_run_on_the_widest_tensor_core_instruction(compiled, job):
    record, expected = compiled.records[job], TENSOR_CORE[job[1]]
    assert record.count(rf"{expected}(?:\..*)?") > 0
    assert record.count(ANY_TENSOR_CORE) == record.count(rf"{expected}(?:\..*)?")


@pytest.mark.parametrize("job", jobs("product-.*fp32.*"), ids=ids)
def test_fp32_products_use_no_tensor_core(compiled, job):
    """Tensor cores take fp32 as TF32: ten bits of mantissa."""
    record = compiled.records[job]
    assert record.count(ANY_TENSOR_CORE) == 0
    assert "tf32" not in compiled.text(*job, "ptx")
    assert record.count(r"FFMA.*") > 0


@pytest.mark.parametrize("job", jobs("product-128.*-tma-.*", {"sm_90"}), ids=ids)
def test_products_have_little_to_do_after_their_loop(compiled, job):
    """What the first kernel took: 1789 instructions and 54 barriers, 3378 in a tile of 256 columns, and spills."""
    after, barriers = epilogue(compiled.text(*job, "sass"))
    assert after <= (1200 if "128x128" in job[0] else 1700)
    assert barriers <= 30


def test_committed_counts_of_products_are_those_of_their_code(compiled):
    """Of this Triton; the other's are what the command found."""
    text = (Path(table.__file__).parents[1] / "results" / "products.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    rows = [row for row in rows if row[2] == triton.__version__ and (row[0], row[1]) in compiled.records]
    for name, target, _, *counts in rows:
        record = compiled.records[name, target]
        found = *epilogue(compiled.text(name, target, "sass")), record.registers, record.spilled_bytes
        assert counts == [str(number) for number in found], f"run {products.__doc__.splitlines()[2].strip()}"
    assert rows or triton.__version__ not in text


@pytest.mark.parametrize("job", jobs("product-.*(?<!odd)", {*NVIDIA, "sm_120"}), ids=ids)
def test_products_operands_and_results_move_16_bytes_at_a_time_or_by_tma(compiled, job):
    record = compiled.records[job]
    if "-tma-" in job[0]:
        assert record.count(r"UTMALDG.*") > 0
        assert record.count(r"LDGSTS.*") == 0
    else:
        assert record.count(r"LDGSTS.*\.128.*") > 0
    for kind in ("LDG", "STG", "LDGSTS"):  # LDG: D
        assert record.count(rf"{kind}(?:\..*)?") == record.count(rf"{kind}\.(?:.*\.)?128.*"), kind
    load, store = (r"UTMALDG.*", r"UTMASTG.*") if "-tma-" in job[0] else (r"LDG\..*", r"STG\..*")
    assert record.count(load) > 0
    assert record.count(store) > 0


def test_committed_table_is_what_the_command_writes(compiled):
    """By the Triton that is here, if the table has rows of it; another one's registers differ, its kernels do not."""
    committed = Path(table.__file__).parents[1] / "results" / "compiled.md"
    lines, expected = ([x for x in t.splitlines() if x[:1] == "|"][2:] for t in (committed.read_text(), compiled.table))
    own = [line for line in lines if f"| {triton.__version__} |" in line]
    if not own:
        own, expected = ([line.split("|")[1:4:2] for line in rows] for rows in (lines, expected))
        own = own[: len(expected)]
    assert own == expected, f"run {table.__doc__.splitlines()[2].strip()}"


def test_rows_of_another_triton_stay_in_the_table():
    ours, theirs = f"| a-b | {triton.__version__} | sm_90 | 4 |\n", "| a-b | 3.0.0 | sm_90 | 4 |\n"
    assert table.rows_of_others(f"text | 3.0.0 |\n| kernel | Triton |\n| --- | --- |\n{ours}{theirs}") == theirs
    for version, stays in (("99.0", True), ("3.0.0", False)):
        said = f"Rows of Triton {version}, torch 2, 2026-01-01, by\n"
        assert (table.rows_are_of(f"# Head\n{said}| a-b | {version} | sm_90 | 4 |\n") == said) == stays
