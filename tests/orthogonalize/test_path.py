"""Which path a shape takes, and the counts it rests on."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from muon8bit_kernels.triton.gemm_tilings import tiling_for

from muon8bit import Muon8bit
from muon8bit.distributed import param_sharding, sharded_batch
from muon8bit.gradient_release import release_gradients
from muon8bit.orthogonalize import (
    RATES,
    NSMethod,
    Rates,
    choose_method,
    device_kind,
    flops,
    force_method,
    method_cost,
    rates_of,
    resolve_coefficients,
    symmetric_gain,
    triangle_gain,
)
from muon8bit.step import muon, phases

JORDAN = resolve_coefficients("jordan", 5)
FP32_GRAM = ("gram", torch.float32, "vendor")


def chosen(rows, cols, kind, dtype=None, schedule=JORDAN, **options):
    path = choose_method(rows, cols, schedule, kind, dtype, **options)
    return path.form, path.dtype, path.products


# By hand, five steps, 2 m^2 n for a product [m, n] x [n, m], 2 m^3 for one of two [m, m]:
#   standard     10 products with n, 5 without: 20 m^2 n + 10 m^3;    triangle  15 m^2 n +  5 m^3
#   Gram          2 products with n, 17 without:  4 m^2 n + 34 m^3;   triangle   3 m^2 n + 17 m^3
#   one restart   4 products with n, 14 without:  8 m^2 n + 28 m^3;   triangle   6 m^2 n + 14 m^3
HAND_COUNTS = {
    # m = n = 1024: m^2 n = m^3 = 1073741824, times 30, 20, 38, 20, 36, 20
    (1024, 1024): (32212254720, 21474836480, 40802189312, 21474836480, 38654705664, 21474836480),
    # m = 256, n = 1024: m^2 n = 67108864, m^3 = 16777216
    (256, 1024): (1509949440, 1090519040, 838860800, 486539264, 1006632960, 637534208),
    # m = 1024, n = 2816: m^2 n = 2952790016, m^3 = 1073741824
    (2816, 1024): (69793218560, 49660559360, 48318382080, 27111981056, 53687091200, 32749125632),
    # m = 3, n = 7: m^2 n = 63, m^3 = 27
    (3, 7): (1530, 1080, 1170, 648, 1260, 756),
    # m = 512, n = 4096: m^2 n = 1073741824, m^3 = 134217728
    (512, 4096): (22817013760, 16777216000, 8858370048, 5502926848, 12348030976, 8321499136),
}


@pytest.mark.parametrize("shape", HAND_COUNTS)
def test_flops_match_a_hand_count(shape):
    for rows, cols in (shape, shape[::-1]):
        counts = [
            flops(form, rows, cols, 5, triangle=triangle, num_segments=num_segments)
            for form, num_segments in (("standard", 1), ("gram", 1), ("gram", 2))
            for triangle in (False, True)
        ]
        assert tuple(counts) == HAND_COUNTS[shape]


def test_flops_of_one_step_and_of_many_restarts():
    """One step: R, R^2, Q X. Ten steps in segments of 2, 3, 3, 2: 4 of R and QX; 10 Z, 6 ZQ, 6 ZRZ of two."""
    assert flops("gram", 4, 10, 1) == 4 * 160 + 2 * 64
    assert flops("gram", 4, 10, 10, num_segments=4) == 4 * 4 * 160 + (10 + 6 + 12) * 2 * 64


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("cpu", (1000, 1000), ("standard", torch.float32, "vendor")),
        ("cpu", (1024, 1024), ("standard", torch.float32, "panels")),
        ("cpu", (4096, 1024), ("gram", torch.float32, "panels")),
        ("cpu", (256, 1024), FP32_GRAM),
        ("cpu_amx", (1024, 4096), ("standard", torch.bfloat16, "panels")),
        ("cpu_amx", (16, 4096), FP32_GRAM),  # too small for the matrix rate to matter
        ("cuda_sm90", (1024, 1024), ("standard", torch.float16, "vendor")),
        ("cuda_sm90", (1024, 4096), ("gram", torch.float16, "vendor")),
        ("cuda_sm90", (4096, 1024), ("gram", torch.float16, "vendor")),
        ("cuda_sm90", (2**14, 2**15), ("standard", torch.bfloat16, "kernel")),  # subnormal in fp16
        ("rocm", (1024, 4096), ("standard", torch.bfloat16, "vendor")),
        ("mps", (1024, 4096), ("standard", torch.bfloat16, "vendor")),
    ],
)
def test_path_is_the_cheapest_by_the_table(kind, shape, expected):
    assert chosen(*shape, kind) == expected


@pytest.mark.parametrize("kind", ["cpu", "cpu_avx512_bf16", "cpu_amx", "cuda_sm80", "mps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_path_honours_a_forced_dtype(kind, dtype):
    for shape in ((64, 4096), (1024, 1024), (4096, 1024), (2**14, 2**15)):
        path = choose_method(*shape, JORDAN, kind, dtype)
        assert path.dtype is dtype
        assert path == choose_method(*shape[::-1], JORDAN, kind, dtype)


def test_half_precision_gram_is_fp16_with_its_restart_on_narrow_shapes_only():
    with force_method(form="gram"):
        assert choose_method(800, 1000, JORDAN, "cuda", torch.float16).segments == (2, 3)
        with pytest.raises(ValueError, match=r"no method of a matrix \[801, 1000\] on cuda in torch.float16"):
            choose_method(801, 1000, JORDAN, "cuda", torch.float16)
        with pytest.raises(ValueError, match="no method"):
            choose_method(800, 1000, JORDAN, "cuda", torch.bfloat16)


@pytest.mark.parametrize("forced", [{"form": "gram"}, {"products": "kernel"}, {"dtype": torch.bfloat16}])
def test_forced_path_holds_inside_its_context_only(forced):
    before = choose_method(256, 4096, JORDAN, "cuda")
    with force_method(**forced):
        path = choose_method(256, 4096, JORDAN, "cuda")
        assert {name: getattr(path, name) for name in forced} == forced
    assert choose_method(256, 4096, JORDAN, "cuda") == before != path


def test_installed_rates_decide(monkeypatch):
    """Triangles at twice the vendor's speed: from 1:1.25 on the Gram form has fewer operations, by kernel."""
    rates = Rates(bf16=((0, 8.0),), fp16=((0, 8.0),), symmetric_kind="kernel", symmetric=((1024, 2.0),))
    monkeypatch.setitem(RATES, "cuda_sm90", rates)
    assert chosen(1024, 1024, "cuda_sm90") == ("standard", torch.float16, "kernel")
    assert chosen(1024, 1280, "cuda_sm90") == ("gram", torch.float16, "kernel")
    assert chosen(1000, 1000, "cuda_sm90") == ("standard", torch.float16, "vendor")  # no gain measured there
    assert chosen(1024, 1280, "cuda_sm80") == ("standard", torch.float16, "vendor")
    slower = Rates(bf16=((0, 8.0),), fp16=((0, 8.0),), symmetric_kind="kernel", symmetric=((0, 0.9),))
    monkeypatch.setitem(RATES, "cuda_sm90", slower)
    assert chosen(1024, 1024, "cuda_sm90") == ("standard", torch.float16, "vendor")


def test_no_gpu_without_measured_gain_uses_the_symmetric_kernel():
    for rows, cols in [(128, 128), (512, 2048), (4096, 14336), (8192, 8192)]:
        for dtype in (None, torch.float16, torch.bfloat16, torch.float32):
            assert choose_method(rows, cols, JORDAN, "cuda_sm120", dtype).products == "vendor"


def test_gain_of_triangles_counts_the_tiles_of_the_last_wave():
    """By hand, on 132 multiprocessors: [2048, 2048] has 36 squares of 256 rows, two tiles each, 72 at a time."""
    tiling = tiling_for(2048, 3, torch.float16, 90)
    assert (tiling.block_m, tiling.block_n) == (128, 256)
    whole, epilogue = 2048 * 2048 / 132, 1 + tiling.epilogue / 2048
    for count, num_waves in ((1, 1), (3, 2), (4, 3), (15, 9)):  # 72, 216, 288, 1080 tiles
        expected = count * whole / (num_waves * 128 * 256 * epilogue)
        assert triangle_gain(2048, count, 90) == pytest.approx(expected, rel=1e-12)


def test_first_row_of_sm90_is_the_lower_expectation():
    """Over cuBLAS: 1.35 from 4096 rows on, 1.3 at 3072 and 1.2 at 2048 in a batch, below 1 for one of 2048 rows."""
    row = rates_of("cuda_sm90")
    for n, count, most in ((2048, 10, 1.2), (3072, 4, 1.3), (4096, 3, 1.35), (8192, 8, 1.35)):
        assert 1.15 <= symmetric_gain(n, count, row) <= most
    for n, count in ((512, 64), (1024, 64), (1984, 64), (2048, 1), (2048, 2)):
        assert symmetric_gain(n, count, row) is None
    assert chosen(2048, 2048, "cuda_sm90", count=32) == ("standard", torch.float16, "kernel")
    assert chosen(2048, 2048, "cuda_sm90", count=1) == ("standard", torch.float16, "vendor")
    assert chosen(2048, 8192, "cuda_sm90", count=32) == ("gram", torch.float16, "kernel")
    # The workspace holds one of them at a time.
    assert chosen(2048, 8192, "cuda_sm90", count=32, budget_bytes=2**27) == ("gram", torch.float16, "vendor")


def test_no_default_method_is_slower_than_the_vendors_standard_form():
    row = rates_of("cuda_sm90")
    for rows, cols in ((128, 128), (512, 2048), (1024, 4096), (2048, 2048), (3072, 8192), (4096, 14336)):
        for count in (1, 2, 3, 7, 64):
            theirs = method_cost(NSMethod("standard", torch.bfloat16), rows, cols, 5, row, count)
            assert choose_method(rows, cols, JORDAN, "cuda_sm90", count=count).cost <= theirs


def test_tiny_matrices_take_one_launch_on_cuda_where_that_is_cheaper():
    """One has a multiprocessor alone: its size decides; many fill them, and one launch is saved the rest."""
    assert choose_method(16, 2048, JORDAN, "cuda") == NSMethod("gram", torch.float32, "vendor", (5,), tiny=True)
    assert choose_method(16, 8192, JORDAN, "cuda_sm90", count=28).tiny
    for count in (1, 3, 64):  # by one program 3 ms each
        assert not choose_method(64, 2**14, JORDAN, "cuda", count=count).tiny
    assert [choose_method(16, cols, JORDAN, "cuda").tiny for cols in (2**13, 2**14)] == [True, False]
    assert choose_method(64, 256, JORDAN, "cuda", torch.float32).cost > 0
    for shape, kind, options in (
        ((16, 2048), "cpu", {}),
        ((16, 2048), "rocm", {}),
        ((65, 2048), "cuda", {}),
        ((64, 2**14 + 1), "cuda", {}),  # too long for one program
        ((16, 2048), "cuda", {"tiny": False}),
        ((16, 2048), "cuda", {"dtype": torch.float16}),
        ((16, 2048), "cuda", {"schedule": resolve_coefficients("jordan", 6)}),  # fp32 would need a restart
    ):
        assert not choose_method(*shape, options.pop("schedule", JORDAN), kind, **options).tiny, (shape, kind)


# By it one [96, 96] gains .71, three 2.1 at most: the kernel is taken from two on.
SMALL_ROW = Rates(
    ((0, 8.0),), ((0, 8.0),), "kernel", ((96, 1.5),), triangle=400.0, min_gain=1.15, gram=None, architecture=90
)


def methods_of(optimizer, num_ranks):
    """The methods of a step by shape, of one process, or of rank 1 of several that have replicas."""
    ranks = None
    if num_ranks > 1:
        ranks = SimpleNamespace(
            device=torch.device("cpu"),
            sharding_of=lambda param, *_: param_sharding.replicated(tuple(param.shape), num_ranks, 1),
            sharded_batches=sharded_batch.group_into_batches,
        )
    (work,) = phases.read(optimizer.param_groups, optimizer._options(), optimizer.state, ranks, optimizer._offload)
    found = {(b.matrix.rows, b.matrix.cols): b.matrix.method for b in work.sharded}
    for batch in work.batches:
        (part, *_) = muon.apply_parts(batch, is_first=True)
        found[batch.rows, batch.cols] = part.partition.pieces[0].method
    return found


@pytest.mark.parametrize("shape", [(96, 96), (2, 96, 96), (192, 96)])
def test_neither_ranks_nor_missing_gradients_change_a_method(monkeypatch, shape):
    """Three parameters go together by their group; one matrix alone would take the vendor's products."""
    monkeypatch.setitem(RATES, "cuda_sm90", SMALL_ROW)
    for module in (muon, sharded_batch):
        monkeypatch.setattr(module, "device_kind", lambda _: "cuda_sm90")
    assert chosen(96, 96, "cuda_sm90", count=1)[-1] == "vendor"
    split = {"split_sizes": (96, 96)} if shape[0] == 192 else {}
    params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
    optimizer = Muon8bit([{"params": params, **split}])
    for num_ranks, num_missing in product((1, 4), (0, 1, 2)):
        for index, param in enumerate(params):
            param.grad = None if index < num_missing else torch.randn(shape)
        found = methods_of(optimizer, num_ranks)
        assert {(s, method.products) for s, method in found.items()} == {((96, 96), "kernel")}


def test_a_released_gradient_takes_the_method_of_its_group(monkeypatch):
    """Each is stepped alone, as the whole group's."""
    monkeypatch.setitem(RATES, "cuda_sm90", SMALL_ROW)
    monkeypatch.setattr(muon, "device_kind", lambda _: "cuda_sm90")
    model = torch.nn.Sequential(*[torch.nn.Linear(96, 96, bias=False) for _ in range(3)])
    optimizer = Muon8bit(model.parameters(), on_nonfinite="skip")
    taken = []
    monkeypatch.setattr(muon, "apply", lambda batch, _: taken.append(batch.partition.pieces[0].method.products))
    release_gradients(model, optimizer)
    model(torch.randn(2, 96)).sum().backward()
    assert taken == ["kernel"] * 3


def test_fp32_gram_restarts_where_the_schedule_amplifies_rounding():
    assert choose_method(64, 4096, JORDAN, "cpu").segments == (5,)
    assert choose_method(64, 4096, resolve_coefficients("jordan", 10), "cpu").segments == (5, 5)


@pytest.mark.parametrize(
    ("amx", "bf16", "limit", "kind"),
    [
        (True, True, "", "cpu_amx"),
        (False, True, "", "cpu_avx512_bf16"),
        (False, False, "", "cpu"),
        (True, True, "AVX512_CORE_BF16", "cpu_avx512_bf16"),
        (True, True, "avx2", "cpu"),
        (True, True, "AVX512_CORE_AMX", "cpu_amx"),
    ],
)
def test_cpu_kind_is_what_onednn_may_use(monkeypatch, amx, bf16, limit, kind):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert device_kind.__wrapped__(torch.device("cpu")) == kind


def test_cuda_kind_names_the_architecture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert device_kind.__wrapped__(torch.device("cuda", 3)) == "cuda_sm90"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert device_kind.__wrapped__(torch.device("cuda", 3)) == "rocm"
