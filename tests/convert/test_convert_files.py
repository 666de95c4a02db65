"""`muon8bit convert`: files of torch.save in and out, tensor by tensor; what is damaged is found before it is used."""

import io
import random
import resource
import shutil
import warnings
import zipfile
from collections import namedtuple

import bitsandbytes as bnb
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.allocator import peak_bytes
from helpers.bitwise import assert_bitwise
from helpers.other_optimizers import MATRICES, OTHERS, both, ours_for, quietly, torch_pair, torch_params, torch_train
from helpers.refusals import check_refused
from helpers.state_dicts import make, train
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from muon8bit import AdaMuon8bit, Muon8bit, NorMuon8bit, param_groups
from muon8bit.cli import main

Outcome = namedtuple("Outcome", "code out err")


@pytest.fixture
def run(capsys):
    def run(*argv):
        code = main(["convert", *map(str, argv)])
        return Outcome(code, *capsys.readouterr())

    return run


def saved(path, **options):
    params, optimizer = make(**options)
    train(params, optimizer, 2, seed=1)
    torch.save(optimizer.state_dict(), path)
    return optimizer.state_dict()


def assert_equal(left, right):
    """Structures of equal types, keys and values, tensors to the bit."""
    if isinstance(right, torch.Tensor):
        assert_bitwise(left, right)
    elif isinstance(right, dict):
        assert left.keys() == right.keys()
        for key in right:
            assert_equal(left[key], right[key])
    elif isinstance(right, list):
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    else:
        assert left == right


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize(
    ("made", "arguments", "options"),
    [
        ({}, ["--bits", 32], {"bits": 32}),
        ({"bits": 32}, ["--bits", 8, "--codebook", "dynamic"], {"bits": 8, "codebook": "dynamic"}),
        ({"block_size": 64}, ["--block-size", 128], {"block_size": 128}),
        ({"codebook": "dynamic"}, ["--codebook", "linear"], {"codebook": "linear"}),
        ({}, ["--to", "torch"], {"target": "torch"}),
    ],
)
def test_the_file_holds_what_the_function_gives(tmp_path, run, made, arguments, options, mmap):
    state_dict = saved(tmp_path / "in.pt", **made)
    before = (tmp_path / "in.pt").read_bytes()
    outcome = run(tmp_path / "in.pt", tmp_path / f"out{mmap}.pt", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    words = "no momentum had to be" if "block_size" in options else "the momentum was"  # 40 columns are one block
    assert f"out{mmap}.pt: {words} converted" in outcome.out
    written = torch.load(tmp_path / f"out{mmap}.pt", weights_only=True, mmap=mmap)
    assert_equal(written, quietly(state_dict, **options))
    assert (tmp_path / "in.pt").read_bytes() == before
    assert zipfile.ZipFile(tmp_path / f"out{mmap}.pt").testzip() is None


def test_records_are_aligned_and_equal_content_is_an_equal_file(tmp_path, run):
    saved(tmp_path / "in.pt")
    for name in ("one.pt", "two.pt"):
        run(tmp_path / "in.pt", tmp_path / name, "--bits", 32)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()
    whole = torch.load(tmp_path / "one.pt", weights_only=True, mmap=True)
    tensors = [tensor for state in whole["state"].values() for tensor in state.values()]
    assert len(tensors) == 9
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)


def test_tensors_in_groups_and_empty_ones_are_written_too(tmp_path, run):
    params, optimizer = make()
    train(params, optimizer, 1, seed=1)
    saved_dict = optimizer.state_dict()
    saved_dict["param_groups"][0]["lr"] = torch.tensor(0.5, dtype=torch.float64)
    saved_dict["state"][1] = {"momentum_linear8": torch.empty(0, 16, dtype=torch.int8)}
    saved_dict["state"][1]["momentum_scales"] = torch.empty(0, 1)
    torch.save(saved_dict, tmp_path / "in.pt")
    assert run(tmp_path / "in.pt", tmp_path / "out.pt", "--bits", 32).code == 0
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert_bitwise(written["param_groups"][0]["lr"], torch.tensor(0.5, dtype=torch.float64))
    assert_bitwise(written["state"][1]["momentum_buffer"], torch.empty(0, 16))


def test_imports_and_exports_by_name(tmp_path, run):
    params = torch_params()
    pair = torch_pair(params)
    torch_train(params, pair, 2, seed=1)
    (tmp_path / "names").write_text("\ufeff" + "\r\n".join([*MATRICES, *OTHERS]), encoding="utf-8")  # by Windows
    for part, optimizer in zip(("muon", "adamw"), pair, strict=True):
        nameless = optimizer.state_dict()
        del nameless["param_groups"][0]["param_names"]
        torch.save(nameless, tmp_path / f"{part}.pt")
    ours = ours_for(params, bits=8)
    torch.save(ours.state_dict(), tmp_path / "like.pt")
    arguments = ["--from", "torch", "--adamw", tmp_path / "adamw.pt", "--names", tmp_path / "names"]
    outcome = run(tmp_path / "muon.pt", tmp_path / "ours.pt", *arguments, "--like", tmp_path / "like.pt")
    assert outcome.code == 0, outcome
    assert "from torch.optim.Muon's to bits=8, codebook='linear', block_size=2048" in outcome.out
    expected = quietly(both(pair), source="torch", like=ours)
    assert_equal(torch.load(tmp_path / "ours.pt", weights_only=True), expected)
    torch.save(both(torch_pair(params)), tmp_path / "likes.pt")
    outcome = run(tmp_path / "ours.pt", tmp_path / "torch.pt", "--to", "torch", "--like", tmp_path / "likes.pt")
    assert outcome.code == 0, outcome
    back = torch.load(tmp_path / "torch.pt", weights_only=True)
    assert_equal(back["adamw"], pair[1].state_dict())
    assert back["muon"]["param_groups"] == pair[0].state_dict()["param_groups"]


@pytest.mark.parametrize("make", [torch.optim.AdamW, bnb.optim.AdamW8bit])
def test_a_run_starts_from_adamws_file(tmp_path, run, make):
    params = torch_params()
    adamw = make([*params.values()], lr=1e-2)
    torch_train(params, [adamw], 2, seed=1)
    ours = ours_for(params, bits=8)
    torch.save(adamw.state_dict(), tmp_path / "in.pt")
    torch.save(ours.state_dict(), tmp_path / "like.pt")
    (tmp_path / "names").write_text("\n".join(params))
    arguments = ["--from", "adamw", "--like", tmp_path / "like.pt", "--names", tmp_path / "names"]
    outcome = run(tmp_path / "in.pt", tmp_path / "out.pt", *arguments)
    assert outcome.code == 0, outcome
    assert "2 parameters start with its exp_avg as their first momentum, 2 keep its moments" in outcome.out
    expected = quietly(adamw.state_dict(), source="adamw", like=ours, names=list(params))
    assert_equal(torch.load(tmp_path / "out.pt", weights_only=True), expected)


# --- a file that holds more than the optimizer ------------------------------------------------------------------------


def whole_checkpoint(inner):
    """What a loop saves beside an optimizer: tied weights, a transposed one, a mask, bfloat16, a schedule, numbers."""
    model = torch.nn.Linear(8, 16)
    weights = model.state_dict()
    weights |= {"tied": weights["weight"], "turned": torch.arange(12.0).view(3, 4).T, "mask": torch.ones(3).bool()}
    weights["half"] = torch.ones(3, dtype=torch.bfloat16)
    return {"model": weights, **inner, "schedule": {"last_epoch": 3}, "rng": torch.get_rng_state(), "epoch": 3}


@pytest.mark.parametrize("place", ["optimizer", "trainer.optimizer", "optimizer_states[0]"])
def test_the_optimizer_inside_a_file_is_converted_and_all_else_is_kept(tmp_path, run, place):
    state_dict = saved(tmp_path / "alone.pt")
    inner = {"optimizer": {"optimizer": state_dict}, "trainer.optimizer": {"trainer": {"optimizer": state_dict}}}
    before = whole_checkpoint(inner.get(place, {"optimizer_states": [state_dict]}))
    torch.save(before, tmp_path / "in.pt")
    outcome = run(tmp_path / "in.pt", tmp_path / "out.pt", "--bits", 32)
    assert (outcome.code, outcome.err) == (0, "")
    assert f"the optimizer under {place} was converted, all else kept" in outcome.out
    for mmap in (True, False):
        after = torch.load(tmp_path / "out.pt", weights_only=True, mmap=mmap)
        wanted = quietly(state_dict, bits=32)
        inner = {"optimizer": {"optimizer": wanted}, "trainer.optimizer": {"trainer": {"optimizer": wanted}}}
        assert_equal(after, {**before, **inner.get(place, {"optimizer_states": [wanted]})})
        assert list(after) == list(before)
        assert after["model"]._metadata == before["model"]._metadata
        assert after["model"]["tied"].data_ptr() == after["model"]["weight"].data_ptr()
        assert after["model"]["turned"].stride() == (1, 4)
    check_nothing_written(tmp_path, "alone.pt", "in.pt", "out.pt")


def test_a_file_of_an_adamws_loop_becomes_one_of_muon8bits(tmp_path, run):
    """IN and --like may both hold more, and torch's pair of state dicts is one optimizer."""
    params = torch_params()
    adamw, pair, ours = torch.optim.AdamW([*params.items()], lr=1e-2), torch_pair(params), ours_for(params)
    torch_train(params, [adamw, *pair], 1, seed=1)
    torch.save({"optimizer": ours.state_dict()}, tmp_path / "like.pt")
    for source, state_dict in (("adamw", adamw.state_dict()), ("torch", both(pair))):
        torch.save(before := whole_checkpoint({"optimizer": state_dict}), tmp_path / f"{source}.pt")
        arguments = ["--from", source, "--like", tmp_path / "like.pt"]
        assert run(tmp_path / f"{source}.pt", tmp_path / f"{source}.out", *arguments).code == 0
        wanted = {**before, "optimizer": quietly(state_dict, source=source, like=ours)}
        assert_equal(torch.load(tmp_path / f"{source}.out", weights_only=True), wanted)
    torch.save({"muon": pair[0].state_dict()}, tmp_path / "muon.pt")
    assert run(tmp_path / "muon.pt", tmp_path / "muon.out", "--from", "torch").code == 0
    assert torch.load(tmp_path / "muon.out", weights_only=True).keys() == {"state", "param_groups"}


def test_moved_parameters_are_dropped_by_an_option(tmp_path, run):
    state_dict = saved(tmp_path / "in.pt")
    params, _ = make()
    muon, other = [{"params": [(n, params[n]) for n in names.split()]} for names in ("a", "b narrow embed bias")]
    like = Muon8bit([muon, {**other, "algorithm": "adamw", "lr": 1e-2}], lr=0.02)
    torch.save(like.state_dict(), tmp_path / "like.pt")
    arguments = (tmp_path / "in.pt", tmp_path / "out.pt", "--like", tmp_path / "like.pt")
    check_refused(run(*arguments), "b was stepped by muon", "--drop-moved")
    outcome = run(*arguments, "--drop-moved")
    assert outcome.code == 0, outcome
    assert "without their state, as it is another algorithm's: b (from muon to adamw), narrow" in outcome.out
    assert_equal(torch.load(tmp_path / "out.pt", weights_only=True), quietly(state_dict, like=like, drop_moved=True))


def test_a_file_with_several_optimizers_is_refused(tmp_path, run):
    state_dict = saved(tmp_path / "alone.pt")
    torch.save({"generator": state_dict, "critics": [{}, state_dict]}, tmp_path / "in.pt")
    refused = run(tmp_path / "in.pt", tmp_path / "out.pt", "--bits", 32)
    check_refused(refused, "in.pt holds 2 optimizers (generator, critics[1]): save the one to convert alone")
    check_nothing_written(tmp_path, "alone.pt", "in.pt")


def test_names_that_are_no_text_are_refused_with_their_file(tmp_path, run):
    saved(tmp_path / "in.pt")
    (tmp_path / "names").write_bytes(b"a\ncaf\xe9\n")
    refused = run(tmp_path / "in.pt", tmp_path / "out.pt", "--bits", 32, "--names", tmp_path / "names")
    check_refused(refused, f"--names: byte 6 of {tmp_path / 'names'} is not UTF-8")
    assert not (tmp_path / "out.pt").exists()


# --- memory ----------------------------------------------------------------------------------------------------------


def large(path, bits):
    """Twelve matrices of 512 KiB in fp32, and one AdamW parameter as large; returns the bytes of one."""
    params = [torch.nn.Parameter(torch.ones(256, 512)) for _ in range(13)]
    groups = [{"params": params[:12]}, {"params": params[12:], "algorithm": "adamw", "lr": 1.0}]
    optimizer = Muon8bit(groups, bits=bits)
    for param in params:
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    torch.save(optimizer.state_dict(), path)
    return 256 * 512 * 4


@pytest.mark.parametrize(("bits", "other"), [(8, 32), (32, 8)])
def test_a_file_is_converted_in_the_memory_of_a_few_tensors(tmp_path, bits, other):
    """The allocator's peak: at most the values and codes of one matrix and the temporaries of a chunk, none of IN,
    which is mapped. Reading and writing whole takes IN, OUT and more."""
    one = large(tmp_path / "in.pt", bits)
    assert main(["convert", str(tmp_path / "in.pt"), str(tmp_path / "warm.pt"), "--bits", str(other)]) == 0

    def streaming():
        assert main(["convert", str(tmp_path / "in.pt"), str(tmp_path / "out.pt"), "--bits", str(other)]) == 0

    def naive():
        whole = torch.load(tmp_path / "in.pt", weights_only=True)
        torch.save(quietly(whole, bits=other), tmp_path / "naive.pt")

    mapped = (tmp_path / "in.pt").stat().st_size
    assert mapped > 4 * one
    peak, _ = peak_bytes(streaming, mapped)
    assert peak <= 3 * one
    peak, _ = peak_bytes(naive)
    assert peak >= 14 * one


# --- damage ----------------------------------------------------------------------------------------------------------


def check_nothing_written(tmp_path, *expected):
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(expected)


def test_a_truncated_file_is_named(tmp_path, run):
    saved(tmp_path / "in.pt")
    whole = (tmp_path / "in.pt").read_bytes()
    for length in (0, 3, 30, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "in.pt").write_bytes(whole[:length])
        check_refused(run(tmp_path / "in.pt", tmp_path / "out.pt", "--bits", 32), "in.pt")
    check_nothing_written(tmp_path, "in.pt")


def test_a_flipped_bit_is_named_or_changes_nothing(tmp_path, run):
    """Every record's every byte is under a checksum; what is not is padding, dates and the like."""
    saved(tmp_path / "in.pt")
    whole = bytearray((tmp_path / "in.pt").read_bytes())
    assert run(tmp_path / "in.pt", tmp_path / "good.pt", "--bits", 32).code == 0
    good = (tmp_path / "good.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "in.pt") as archive:
        inside = {}
        for info in archive.infolist():
            name_size, extra_size = (int.from_bytes(whole[info.header_offset + i :][:2], "little") for i in (26, 28))
            start = info.header_offset + 30 + name_size + extra_size
            inside[info.filename] = range(start, start + info.file_size)
    generator = random.Random(0)
    anywhere = generator.sample(range(len(whole)), 150)
    chosen = [(place, None) for place in anywhere]
    chosen += [(generator.choice(places), name) for name, places in inside.items() if places]
    num_refused = 0
    for place, name in chosen:
        damaged = whole.copy()
        damaged[place] ^= 1 << generator.randrange(8)
        (tmp_path / "in.pt").write_bytes(damaged)
        outcome = run(tmp_path / "in.pt", tmp_path / "out.pt", "--bits", 32)
        if name is not None:
            check_refused(outcome, "in.pt", f"record {name}", "checksum")
        if outcome.code == 0:
            assert (tmp_path / "out.pt").read_bytes() == good
            (tmp_path / "out.pt").unlink()
        else:
            check_refused(outcome, "in.pt")
            num_refused += 1
    assert num_refused > len(inside) - 1
    check_nothing_written(tmp_path, "in.pt", "good.pt")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"hello", ["no checkpoint of torch.save"]),
        ("zip", ["cannot be read by torch.load"]),
        ({"epoch": 3}, ["no optimizer's state dict", "epoch"]),
        (torch.zeros(3), ["not an optimizer's state dict but a Tensor"]),
        ({"state": {}, "param_groups": [{"params": [0], "lr": 0.1}]}, ["group 0 was not saved by Muon8bit", "--from"]),
        (random.Random(0), ["cannot be read by torch.load", "weights_only"]),
    ],
)
def test_foreign_files_are_named(tmp_path, run, content, words):
    if isinstance(content, bytes):
        (tmp_path / "in.pt").write_bytes(content)
    elif content == "zip":
        with zipfile.ZipFile(tmp_path / "in.pt", "w") as archive:
            archive.writestr("readme.txt", "hello")
    else:
        torch.save(content, tmp_path / "in.pt")
    check_refused(run(tmp_path / "in.pt", tmp_path / "out.pt", "--bits", 32), "in.pt", *words)
    check_nothing_written(tmp_path, "in.pt")


def test_a_file_that_was_compressed_later_is_refused(tmp_path, run):
    """Its checksums are right, and torch.load with mmap=True takes the compressed bytes for codes."""
    saved(tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "in.pt", "w") as packed:
        for name in whole.namelist():
            kind = zipfile.ZIP_DEFLATED if name.endswith("data/0") else zipfile.ZIP_STORED
            packed.writestr(name, whole.read(name), kind)
    check_refused(run(tmp_path / "in.pt", tmp_path / "out.pt", "--bits", 32), "in.pt", "compressed", "data/0")
    check_nothing_written(tmp_path, "whole.pt", "in.pt")


def test_a_tensor_that_cannot_be_written_is_refused_by_its_dtype(tmp_path, run):
    _, optimizer = make()
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0]["note"] = torch.zeros(2, dtype=torch.complex64)
    torch.save(state_dict, tmp_path / "in.pt")
    check_refused(run(tmp_path / "in.pt", tmp_path / "out.pt", "--bits", 32), "in.pt", "torch.complex64")
    check_nothing_written(tmp_path, "in.pt")


def test_an_error_in_the_last_tensor_leaves_nothing(tmp_path, run):
    state_dict = saved(tmp_path / "in.pt")
    state_dict["state"][4]["exp_avg_sq"][0] = torch.nan
    torch.save(state_dict, tmp_path / "in.pt")
    check_refused(run(tmp_path / "in.pt", tmp_path / "out.pt", "--bits", 32), "in.pt", "bias", "exp_avg_sq", "NaN")
    check_nothing_written(tmp_path, "in.pt")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["in.pt", "in.pt", "--bits", 32], ["in.pt exists"]),
        (["missing.pt", "out.pt", "--bits", 32], ["missing.pt", "No such file"]),
        (["in.pt", "folder/out.pt", "--bits", 32], ["folder is no folder"]),
        (["in.pt", "out.pt"], ["nothing to do", "--bits", "--to"]),
        (["in.pt", "out.pt", "--bits", 16], ["--bits", "16"]),
        (["in.pt", "out.pt", "--adamw", "in.pt"], ["--adamw", "--from"]),
        (["in.pt", "out.pt", "--from", "adamw"], ["--from adamw needs --like", "what Muon takes"]),
        (["in.pt", "out.pt", "--from", "adamw", "--adamw", "in.pt"], ["--adamw", "IN is AdamW's", "leave it out"]),
        (["in.pt", "out.pt", "--like", "in.pt", "--bits", 8], ["bits", "like"]),
        (["in.pt", "out.pt", "--to", "torch", "--bits", 8], ["bits", "torch"]),
        (["in.pt", "out.pt", "--names", "missing"], ["missing", "No such file"]),
    ],
)
def test_bad_arguments_are_one_sentence_and_write_nothing(tmp_path, run, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    saved("in.pt")
    check_refused(run(*arguments), *words)
    check_nothing_written(tmp_path, "in.pt")


def test_an_accelerate_checkpoint_is_converted_where_it_lies(tmp_path, run):
    """`optimizer.bin` of Accelerate's save_state; the converted one goes on as `convert_state_dict` does."""
    from accelerate import Accelerator

    model = torch.nn.Linear(24, 16, bias=False)
    optimizer = Muon8bit([("weight", model.weight)])
    accelerator = Accelerator(cpu=True)
    model, prepared = accelerator.prepare(model, optimizer)
    model(torch.ones(2, 24)).square().sum().backward()
    prepared.step()
    accelerator.save_state(str(tmp_path / "state"))
    assert run(tmp_path / "state" / "optimizer.bin", tmp_path / "optimizer.bin", "--bits", 32).code == 0
    other = Muon8bit([("weight", torch.nn.Parameter(torch.zeros(16, 24)))], bits=32)
    other.load_state_dict(torch.load(tmp_path / "optimizer.bin", weights_only=True))
    expected = quietly(optimizer.state_dict(), bits=32)
    assert_equal(other.state_dict()["state"], expected["state"])


@pytest.mark.parametrize("kind", ["file", "folder", "more"])
@pytest.mark.parametrize("limit", [100, 900, 3000])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, run, kind, limit):
    """The system refuses to write on after so many bytes of a file, as it does on a full disk."""
    folder(tmp_path / "in") if kind == "folder" else saved(tmp_path / "in")
    if kind == "more":
        torch.save(whole_checkpoint({"optimizer": torch.load(tmp_path / "in", weights_only=True)}), tmp_path / "in")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        outcome = run(tmp_path / "in", tmp_path / "out", "--bits", 32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_refused(outcome, "out", "File too large")
    check_nothing_written(tmp_path, "in")


# --- folders of torch.distributed.checkpoint --------------------------------------------------------------------------


def family(kind, model, **options):
    """An optimizer for the layers of a model whose groups leave `adjust_lr_fn` to the preset."""
    groups = param_groups(model, lr=1e-2)
    for group in groups if kind is not Muon8bit else ():
        group.pop("adjust_lr_fn", None)
    return kind(groups, **options)


def folder(path, kind=Muon8bit, **options):
    """A model and its optimizer, saved by torch.distributed.checkpoint."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.Linear(16, 24))
    optimizer = family(kind, model, **options)
    model(torch.ones(2, 24)).square().sum().backward()
    optimizer.step()
    model.zero_grad()  # with gradients torch's get_optimizer_state_dict would not initialise another optimizer's state
    saved_dict = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.save(saved_dict, checkpoint_id=path, no_dist=True)
    return model, optimizer


def test_a_folder_of_distributed_checkpointing_is_converted_into_one(tmp_path, run):
    model, optimizer = folder(tmp_path / "in")
    before = {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    outcome = run(tmp_path / "in", tmp_path / "out", "--bits", 32)
    assert (outcome.code, outcome.err) == (0, "")
    assert len(outcome.out.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before
    check_nothing_written(tmp_path, "in", "out")
    other = Muon8bit(param_groups(model, lr=5.0), bits=32)
    template = {"optimizer": get_optimizer_state_dict(model, other)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(template, checkpoint_id=tmp_path / "out", no_dist=True)
    set_optimizer_state_dict(model, other, template["optimizer"])
    assert_equal(other.state_dict(), quietly(optimizer.state_dict(), bits=32))


@pytest.mark.parametrize("saved_bits", [8, 32])
@pytest.mark.parametrize(
    ("kind", "preset"), [(NorMuon8bit, "official"), (NorMuon8bit, "modded"), (AdaMuon8bit, "paper")]
)
def test_second_moments_go_through_folders(tmp_path, run, kind, preset, saved_bits):
    """Of rows, of the longer dimension and of elements, to the other number of bits: as the function converts them."""
    how = {"block_size": 64, "codebook": "dynamic", "preset": preset}
    model, optimizer = folder(tmp_path / "in", kind, bits=saved_bits, **how)
    bits = 40 - saved_bits
    outcome = run(tmp_path / "in", tmp_path / "out", "--bits", bits)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("second moment was converted") == (kind is AdaMuon8bit)
    other = family(kind, model, bits=bits, **how)
    template = {"optimizer": get_optimizer_state_dict(model, other)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(template, checkpoint_id=tmp_path / "out", no_dist=True)
    set_optimizer_state_dict(model, other, template["optimizer"])
    assert_equal(other.state_dict(), quietly(optimizer.state_dict(), bits=bits))
    assert any(key.startswith("second_moment") for state in other.state.values() for key in state)


def test_a_flipped_bit_in_a_folder_is_named(tmp_path, run):
    folder(tmp_path / "in")
    file = tmp_path / "in" / "__0_0.distcp"
    whole = file.read_bytes()
    metadata = dcp.FileSystemReader(tmp_path / "in").read_metadata()
    generator, num_named = random.Random(0), 0
    for index, info in metadata.storage_data.items():
        content = whole[info.offset : info.offset + info.length]
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            record = max(archive.infolist(), key=lambda record: (record.filename.endswith("data/0"), record.file_size))
        name_size, extra_size = (int.from_bytes(content[record.header_offset + i :][:2], "little") for i in (26, 28))
        place = info.offset + record.header_offset + 30 + name_size + extra_size + generator.randrange(record.file_size)
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        outcome = run(tmp_path / "in", tmp_path / "out", "--bits", 32)
        if index.fqn.startswith("optimizer"):
            check_refused(outcome, "__0_0.distcp", index.fqn, "checksum")
            num_named += 1
        else:  # the model's weights are not read
            assert outcome.code == 0
            shutil.rmtree(tmp_path / "out")
    assert num_named > 30
    check_nothing_written(tmp_path, "in")


def test_other_folders_are_named(tmp_path, run):
    (tmp_path / "empty").mkdir()
    check_refused(run(tmp_path / "empty", tmp_path / "out", "--bits", 32), "empty", "no .metadata")
    newest = tmp_path / "run" / "checkpoints" / "step-0000020" / "optimizer.bin"
    for path in (newest, newest.parent.with_name("step-0000010") / "optimizer.bin"):
        path.parent.mkdir(parents=True)
        path.touch()
    for what in ("--bits", 32), ("--to", "torch"):
        check_refused(run(tmp_path / "run", tmp_path / "out", *what), "no .metadata", f"give {newest}")
    folder(tmp_path / "in")
    check_refused(run(tmp_path / "in", tmp_path / "out", "--to", "torch"), "in is a folder", "--to torch")
    (tmp_path / "in" / ".metadata").write_bytes(b"\x80\x02damaged")
    check_refused(run(tmp_path / "in", tmp_path / "out", "--bits", 32), "in: its .metadata is damaged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.save({"model": {"weight": torch.zeros(3)}}, checkpoint_id=tmp_path / "model", no_dist=True)
    check_refused(run(tmp_path / "model", tmp_path / "out", "--bits", 32), "'param_groups' of 0 optimizers")
    check_nothing_written(tmp_path, "empty", "in", "model", "run")
