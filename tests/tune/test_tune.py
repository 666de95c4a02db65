"""`muon8bit tune` from end to end with a clock that is not one; what becomes of its file; `muon8bit doctor`."""

from __future__ import annotations

import io
import json
import logging
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from muon8bit import Muon8bit, convert_state_dict, doctor, tune
from muon8bit.cli import main
from muon8bit.distributed import consistency
from muon8bit.estimate.optimizers import Param, step_bytes
from muon8bit.orthogonalize import (
    RATES,
    RatesTable,
    active_table,
    choose_method,
    device_kind,
    rates_of,
    rates_table,
    resolve_coefficients,
)
from muon8bit.orthogonalize.rates_table import read_table, table_path, write_table
from muon8bit.tune.measure import DRY_PLAN, TINY_SHAPE, _tiny_job

JORDAN = resolve_coefficients("jordan", 5)
FACTS = {"GPU": "NVIDIA H100 80GB HBM3", "driver": "12080", "torch": "2.13.0", "triton": "3.7.1"}
GAINS = {512: 1.1, 1024: 1.6, 2048: 0.9, 3072: 1.3, 4096: 1.4, 8192: 1.5}  # over the vendor, whatever the batch
FP32 = 50e9  # operations a millisecond


class FakeClock:
    """Says how long each job takes, and runs none."""

    def __init__(self, device):
        self.device = device

    def turns(self, makers, **_):
        return {name: tune.Result(device_ms=[[self.ms(name)]]) for name in makers}

    def ms(self, name):
        if name == "launch":
            return 64 * 0.010  # 10 us each
        if name == "tiny":
            m, n = TINY_SHAPE
            return (4 * m * m * n + 34 * m**3) / (FP32 / 400)  # each program has a 400th of the device
        arm, rest = name.split(" ", 1)
        if arm in ("gram", "standard"):
            batch, (rows, cols) = (
                int(rest.split(" x ")[0]),
                json.loads(rest.split(" x ")[1].translate({40: 91, 41: 93})),
            )
            work = {"gram": 8 * rows**2 * cols + 28 * rows**3, "standard": 20 * rows**2 * cols + 10 * rows**3}[arm]
            return batch * work / (8 * FP32) / (0.8 if arm == "gram" else 1)
        dtype, rest = rest.split(" ", 1)
        batch, n = map(int, rest.split(" x "))
        speed = {"fp32": 1, "bf16": 9, "fp16": 10}[dtype] * (GAINS[n] if arm == "symmetric" else 1)
        return batch * 2 * n**3 / (speed * FP32)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that is not there, with an empty cache folder; returns its facts, to be changed."""
    facts = dict(FACTS)
    monkeypatch.setattr(rates_table, "current_gpu", lambda: ("cuda_sm90", dict(facts)))
    monkeypatch.setattr(tune, "Clock", FakeClock)
    monkeypatch.setenv("MUON8BIT_CACHE", str(tmp_path))
    monkeypatch.delenv("MUON8BIT_RATES", raising=False)
    rates_table._cached_table.cache_clear()
    yield facts
    rates_table._cached_table.cache_clear()


def later_process():
    rates_table._cached_table.cache_clear()
    return active_table()


def optimizer_of(**kwargs):
    params = [torch.nn.Parameter(torch.ones(16, 16)) for _ in range(2)]
    return Muon8bit([{"params": params[:1]}, {"params": params[1:]}], **kwargs)


def other_table(**changes):
    row = replace(rates_of("cuda_sm90"), **changes)
    return RatesTable("cuda_sm90", row, tuple(sorted({**FACTS, "date": "2026-01-01"}.items())))


def test_tune_measures_writes_and_flips_a_choice(gpu, capsys):
    """By hand: half precision 9 and 10 times fp32, 0.8 of it in the Gram form, 10 us and a 400th of 50 TFLOP/s."""
    assert active_table() is None
    assert main(["tune"]) == 0
    assert "written to" in capsys.readouterr().out
    table = later_process()
    assert table == read_table(table_path(gpu["GPU"]))
    assert dict(table.about).items() >= FACTS.items()
    assert dict(table.about).keys() == {*FACTS, "date"}
    rates = table.rates
    assert rates.bf16 == ((0, 9.0), *[(n, 9.0) for n in list(GAINS)[1:]])
    assert rates.fp16[-1] == (8192, 10.0)
    assert rates.symmetric == tuple(GAINS.items())
    assert (rates.gram, rates.launch, rates.tiny, rates.architecture) == (0.8, 500_000_000, 0.0025, 90)
    how = {"count": 64, "budget_bytes": 2**30}
    built_in = [choose_method(n, n, JORDAN, "cuda_sm90", **how).products for n in (1024, 2048)]
    measured = [choose_method(n, n, JORDAN, "cuda_sm90", **how, rates=rates).products for n in (1024, 2048)]
    assert (built_in, measured) == (["vendor", "kernel"], ["vendor", "vendor"])
    better = replace(rates, triangle=1.3)
    assert choose_method(1024, 1024, JORDAN, "cuda_sm90", **how, rates=better).products == "kernel"
    optimizer = optimizer_of()
    assert {group["rates"] for group in optimizer.param_groups} == {table.key}
    assert {options.rates("cuda_sm90") for options in optimizer._options()} == {rates}
    assert {options.rates("cpu") for options in optimizer._options()} == {None}


def test_show_and_reset(gpu, capsys):
    assert main(["tune", "--show"]) == 0
    assert capsys.readouterr().out == "the built-in table\n"
    write_table(other_table(), table_path(gpu["GPU"]))
    rates_table._cached_table.cache_clear()
    assert main(["tune", "--show"]) == 0
    assert other_table().fingerprint in capsys.readouterr().out
    assert main(["tune", "--reset"]) == 0
    assert later_process() is None
    assert main(["tune", "--reset"]) == 0


def test_tune_needs_a_gpu_and_writes_nothing_where_a_job_fails(gpu, monkeypatch, capsys):
    monkeypatch.setattr(FakeClock, "turns", lambda _, makers, **__: {n: tune.Result(problem="oom") for n in makers})
    assert main(["tune"]) == 2
    assert "vendor bf16 1 x 512 could not be measured: oom" in capsys.readouterr().err
    assert not table_path(gpu["GPU"]).exists()
    monkeypatch.setattr(rates_table, "current_gpu", lambda: None)
    assert main(["tune"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["garbage", "format", "names", "order", "GPU", "driver", "torch", "triton", "kind"])
def test_files_that_do_not_fit_are_passed_over_with_one_line(gpu, monkeypatch, caplog, case):
    path, table = table_path(gpu["GPU"]), other_table()
    write_table(table, path)
    assert later_process() == table
    content = json.loads(path.read_text())
    if case == "garbage":
        path.write_bytes(path.read_bytes()[:40])
    elif case == "kind":
        monkeypatch.setattr(rates_table, "current_gpu", lambda: ("cuda_sm100", dict(gpu)))
    elif case in gpu:
        content["about"][case] += " other"
    else:
        content |= {"format": 2} if case == "format" else {}
        content["rates"] |= {"more": 1} if case == "names" else {}
        content["rates"]["symmetric"] = content["rates"]["symmetric"][:: -1 if case == "order" else 1]
    if case not in ("garbage", "kind"):
        path.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        assert later_process() is None
        assert active_table() is None  # told once
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert "\n" not in record.getMessage()
    assert "rates" not in optimizer_of().param_groups[0]


def test_a_table_is_written_whole_or_not_at_all(gpu, monkeypatch):
    path, tables = table_path(gpu["GPU"]), [other_table(gram=0.1 * number) for number in range(1, 5)]
    write_table(tables[0], path)
    threads = [threading.Thread(target=lambda t=t: [write_table(t, path) for _ in range(10)]) for t in tables]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert read_table(path) in tables
    before = path.read_text()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_table(other_table(gram=0.9), path)
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_variable_names_a_file_or_the_built_in_table(gpu, monkeypatch, tmp_path, capsys):
    write_table(other_table(), table_path(gpu["GPU"]))
    monkeypatch.setenv("MUON8BIT_RATES", "builtin")
    assert later_process() is None
    named = other_table(gram=0.5)
    write_table(named, tmp_path / "mine.json")
    monkeypatch.setenv("MUON8BIT_RATES", str(tmp_path / "mine.json"))
    assert optimizer_of().param_groups[0]["rates"] == named.key
    monkeypatch.setenv("MUON8BIT_RATES", str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none\.json cannot be read .*muon8bit tune.*MUON8BIT_RATES=builtin"):
        optimizer_of()
    assert main(["tune", "--show"]) == 2
    assert main(["estimate", "Llama-3.2-1B", "--rates", str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.count("none.json cannot be read") == 2


def test_estimate_chooses_by_the_table_that_it_is_given(monkeypatch, tmp_path):
    """By this one a LoRA matrix takes the general way, which has workspace for its iterates; by the built-in none."""
    monkeypatch.setitem(RATES, "cuda", RATES["cuda"])
    params = [Param("a", (16, 4096), torch.float32, is_muon=True)]
    before = step_bytes("muon8bit", params, "cuda")
    write_table(other_table(tiny=None), tmp_path / "rates.json")
    assert main(["estimate", "none", "--rates", str(tmp_path / "rates.json")]) == 2  # the model is not known
    assert before == 0 < step_bytes("muon8bit", params, "cuda")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("saved", "running"), [(0.5, None), (None, 0.5), (0.5, 0.6)])
def test_a_resumed_run_takes_the_table_of_its_checkpoint(monkeypatch, saved, running):
    tables = {gram: None if gram is None else other_table(gram=gram) for gram in (saved, running)}
    monkeypatch.setattr("muon8bit.optimizer.active_table", lambda: tables[saved])
    file = io.BytesIO()
    torch.save(optimizer_of().state_dict(), file)
    monkeypatch.setattr("muon8bit.optimizer.active_table", lambda: tables[running])
    optimizer = optimizer_of()
    optimizer.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(16, 16))]})
    assert {options.table for options in optimizer._options()} == {tables[saved]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 50_000, "it is no JSON"),
        (" " * 2**16 + "{}", "more than 65,536 characters"),
        (other_table().text.replace('"about":{', '"about":{"note":"\\ud800",'), "can be printed"),
    ],
)
def test_texts_that_nothing_could_print_or_keep_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        rates_table.parse(content)


def test_conversion_by_name_keeps_the_built_in_table_of_a_checkpoint(monkeypatch):
    params = [("weight", torch.nn.Parameter(torch.ones(16, 16)))]
    monkeypatch.setattr("muon8bit.optimizer.active_table", lambda: None)
    saved = Muon8bit(params).state_dict()
    monkeypatch.setattr("muon8bit.optimizer.active_table", other_table)
    like = Muon8bit(params)
    assert "rates" in like.param_groups[0]
    assert "rates" not in convert_state_dict(saved, like=like)["param_groups"][0]


@pytest.mark.usefixtures("gpu")
def test_a_damaged_table_in_a_group_is_refused_by_name():
    optimizer = optimizer_of()
    state = optimizer.state_dict()
    for value in (3, "0123456789abcdef:{}", other_table().key.replace('"gram":0.9', '"gram":0.8')):
        state["param_groups"][0]["rates"] = value
        with pytest.raises(ValueError, match=r"group 0 .*rates must be what an optimizer wrote there"):
            optimizer.load_state_dict(state)
    assert "rates" not in optimizer.param_groups[0]


@pytest.mark.usefixtures("gpu")
def test_ranks_with_different_tables_raise_an_error_that_names_them(monkeypatch):
    lines = []
    for table in (None, other_table()):
        monkeypatch.setattr("muon8bit.optimizer.active_table", lambda table=table: table)
        ranks = SimpleNamespace(device=torch.device("cpu"))
        groups = optimizer_of().param_groups
        lines.append([*consistency.SynchronizedRanks._fingerprint(ranks, groups, {}, ()), []])
    message = str(consistency._difference(lines))
    assert f"rank 0 by the built-in one, rank 1 by {other_table().fingerprint}. Set MUON8BIT_RATES" in message


def test_jobs_run_and_make_a_row_that_can_be_read_again():
    rates = tune.measure(tune.Clock(torch.device("cpu")), "cpu", DRY_PLAN)
    table = RatesTable("cpu", rates, (("GPU", "none"),))
    assert rates_table.parse(table.text) == table
    assert [n for n, _ in rates.symmetric] == [8, 16]
    job = _tiny_job(torch.device("cpu"), 2)  # which `measure` times on CUDA alone
    job.run()
    job.check()


def test_cuda_is_not_asked_where_nothing_was_tuned(gpu, monkeypatch):
    monkeypatch.setattr(rates_table, "current_gpu", lambda: pytest.fail("asked"))
    assert later_process() is None
    assert not table_path(gpu["GPU"]).exists()


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("cuda_sm80", 80),
        ("cuda_sm86", None),
        ("cuda_sm90", 90),
        ("cuda_sm103", 100),
        ("cuda_sm120", None),
    ],
)
def test_a_row_has_the_tilings_that_the_kernel_takes(monkeypatch, kind, architecture):
    gemm = pytest.importorskip("muon8bit_kernels.triton.gemm")
    capability = divmod(int(kind.removeprefix("cuda_sm")), 10)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert gemm._architecture(torch.device("cuda")) == architecture
    assert tune.measure(FakeClock(torch.device("cpu")), kind).architecture == architecture


@pytest.mark.gpu
def test_rates_of_a_gpu_make_a_table():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    device, plan = torch.device("cuda"), tune.Plan(sizes=(512, 1024), forms=((2, 256, 512),), rounds=1, repeats=1)
    kind = device_kind(torch.device("cuda", torch.cuda.current_device()))
    rates = tune.measure(tune.Clock(device), kind, plan)
    assert rates_table.parse(RatesTable(kind, rates, ()).text).rates == rates
    assert rates.tiny is not None
    assert rates.launch > 0


BAD = {
    "upgrade torch to a release that brings triton >= 3.7": {"triton": "3.6.0", "gpus": (("B200", (10, 0)),)},
    "install triton": {"triton": None, "gpus": (("H100", (9, 0)),)},
    "no bf16": {"gpus": (("V100", (7, 0)),)},
    "GPUs of several kinds": {"gpus": (("H100", (9, 0)), ("B200", (10, 0)))},
    "bitsandbytes is not installed": {"packages": {"bitsandbytes": None}},
    "ROCm": {"hip": "6.4", "gpus": (("MI300X", (9, 4)),)},
    "needs 2.11": {"torch": "2.10.1+cu128"},
}


@pytest.mark.parametrize("words", BAD)
def test_doctor_knows_what_does_not_work(words):
    good = doctor.Environment("2.13.0", "3.7.1", {"bitsandbytes": "0.50"}, (("H100", (9, 0)), ("H100", (9, 0))))
    assert list(doctor.known_bad(good)) == []
    (line,) = doctor.known_bad(replace(good, **BAD[words]))
    assert words in line


def test_doctor_prints_a_page_without_gpu_triton_bitsandbytes_and_transformers(monkeypatch, capsys):
    def missing(_):
        raise ImportError("transformers is not installed")

    monkeypatch.setattr(doctor, "triton_version", lambda: None)
    monkeypatch.setattr(doctor, "_version", lambda _: None)
    monkeypatch.setattr(doctor, "model_shapes", missing)
    assert main(["doctor", "Llama-3.2-1B"]) == 0
    out = capsys.readouterr().out
    for words in ("triton not installed", "not run: no CUDA GPU", "built in", "not shown: transformers is not"):
        assert words in out
    monkeypatch.setattr(doctor, "model_shapes", lambda _: {(2048, 2048): 32, (16, 2048): 4})
    monkeypatch.setattr(doctor, "device_kind", lambda _: "cuda_sm90")
    assert main(["doctor", "Llama-3.2-1B"]) == 0
    out = capsys.readouterr().out
    assert "32 x [2048, 2048]: standard form, products by kernel, float16" in out
    assert "4 x [16, 2048]: one launch, float32" in out
