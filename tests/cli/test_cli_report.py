"""`muon8bit report`: measured bytes of checkpoints against predicted ones, and what is no checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.memory_models import TINY, config_of
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from muon8bit import Muon8bit, param_groups, state_report
from muon8bit.cli import main


def stepped(*optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.full_like(param, 1e-3)
        optimizer.step()


def run(capfd: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    capfd.readouterr()
    code = main(["report", *map(str, argv)])
    return code, *capfd.readouterr()


def record(capfd: pytest.CaptureFixture[str], path: Path) -> dict[str, Any]:
    code, out, err = run(capfd, path, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.fixture
def model() -> nn.Module:
    built: nn.Module = AutoModelForCausalLM.from_config(config_of(TINY["mixtral"]), dtype=torch.float32)
    return built


OPTIONS = [{}, {"codebook": "dynamic", "block_size": 64}, {"bits": 32}, {"adamw_bits": 8}]


@pytest.mark.parametrize("options", OPTIONS)
def test_checkpoint_of_muon8bit_measures_what_was_predicted(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, model: nn.Module, options: dict[str, Any]
) -> None:
    adamw_bits = options.get("adamw_bits", 32)
    if adamw_bits == 8:
        pytest.importorskip("bitsandbytes")
    groups = param_groups(model, lr=1e-3, adamw_bits=adamw_bits)
    optimizer = Muon8bit(groups, lr=1e-3, **{k: v for k, v in options.items() if k != "adamw_bits"})
    stepped(optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.bin")
    save_file({n: p.detach().bfloat16() for n, p in model.named_parameters()}, tmp_path / "model.safetensors")
    truth, num_parameters = state_report(optimizer).total_bytes, sum(p.numel() for p in model.parameters())
    for path in (tmp_path, tmp_path / "optimizer.bin"):
        found = record(capfd, path)
        name = "muon" if options.get("bits") == 32 else "muon8bit"
        assert found["optimizer"] == (f"{name}+adamw8bit" if adamw_bits == 8 else name)
        assert found["state"] == {
            "num_parameters": num_parameters,
            "measured_bytes": truth,
            "predicted_bytes": truth,
            "difference_bytes": 0,
        }
        for entry in state_report(optimizer).algorithms:
            assert found["parts"][entry.algorithm]["measured_bytes"] == entry.state_bytes
    weights = record(capfd, tmp_path)["weights"]
    assert weights["measured_bytes"] == weights["predicted_bytes"] == 2 * num_parameters


def test_baselines_in_a_run_folder_measure_what_was_predicted(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    matrix, table, norm = (nn.Parameter(torch.randn(shape)) for shape in ((64, 96), (300, 64), (64,)))
    half = nn.Parameter(matrix.detach().bfloat16())
    arms = {
        "adamw": ([torch.optim.AdamW([matrix, table, norm])], 8 * (64 * 96 + 300 * 64 + 64) + 12),
        "adamw8bit": ([bitsandbytes.optim.AdamW8bit([table, norm])], 2 * 19200 + 8 * 75 + 8 * 64 + 2048),
        "muon": ([torch.optim.Muon([matrix]), torch.optim.AdamW([norm])], 4 * 64 * 96 + 8 * 64 + 4),
        "muon_bf16": ([torch.optim.Muon([half]), torch.optim.AdamW([norm])], 2 * 64 * 96 + 8 * 64 + 4),
    }
    for step, (name, (optimizers, num_bytes)) in enumerate(arms.items(), 1):
        stepped(*optimizers)
        folder = tmp_path / "checkpoints" / f"step-{step:07d}"
        folder.mkdir(parents=True)
        for index, optimizer in enumerate(optimizers):
            torch.save(optimizer.state_dict(), folder / ("optimizer.bin" if index == 0 else f"optimizer_{index}.bin"))
        (folder / "progress.json").write_text("{}")
        (tmp_path / "checkpoints" / f".step-{step + 1:07d}.partial").mkdir()
        found = record(capfd, tmp_path)  # the newest complete one
        assert found["optimizer"] == name
        assert found["state"]["measured_bytes"] == found["state"]["predicted_bytes"] == num_bytes, name
    assert found["optimizers"]["muon_bf16"]["state_bytes"] == num_bytes


def test_padded_storage_and_wrong_shape_show_as_a_difference(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 96, bias=False))
    optimizer = Muon8bit(param_groups(model, lr=1e-3), lr=1e-3)
    stepped(optimizer)
    saved = optimizer.state_dict()
    codes = saved["state"][0]["momentum_linear8"]
    saved["state"][0]["momentum_linear8"] = torch.zeros(10_000, dtype=torch.int8)[: codes.numel()].view(codes.shape)
    torch.save(saved, tmp_path / "optimizer.bin")
    assert record(capfd, tmp_path)["state"]["difference_bytes"] == 10_000 - 64 * 96
    save_file({"0.weight": torch.zeros(96, 128)}, tmp_path / "model.safetensors")  # the shape that the names say
    assert record(capfd, tmp_path)["state"]["difference_bytes"] == 10_000 - 128 * 96
    code, out, _ = run(capfd, tmp_path)
    assert code == 0
    assert f"{10_000 - 128 * 96:,}" in out
    for label in ("Muon8bit", "state in all", "weights", "8-bit AdamW, would be"):
        assert label in out


def test_what_is_no_checkpoint_of_ours_is_refused_in_one_sentence(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cases: dict[str, tuple[Any, tuple[str, ...]]] = {
        "text.bin": ("no pickle", ("text.bin", "state_dict")),
        "weights.bin": ({"weight": torch.zeros(3)}, ("weights.bin", "state_dict")),
        "empty.bin": ({"state": {}, "param_groups": [{"params": [0]}]}, ("empty.bin", "no state")),
        "sgd.bin": (
            {"state": {0: {"velocity": torch.zeros(3)}}, "param_groups": [{"params": [0], "param_names": ["head"]}]},
            ("sgd.bin", "head", "velocity"),
        ),
        "object.bin": ({"state": {0: Path("x")}, "param_groups": [{"params": [0]}]}, ("object.bin", "state_dict")),
    }
    for name, (content, words) in cases.items():
        path = tmp_path / name
        if isinstance(content, str):
            path.write_text(content)
        else:
            torch.save(content, path)
        check_refused(run(capfd, path), *words)
    check_refused(run(capfd, tmp_path / "nowhere"), "nowhere", "no such")
    folder = tmp_path / "folder"
    folder.mkdir()
    check_refused(run(capfd, folder), "folder", "optimizer.bin")
    (folder / ".metadata").write_text("")
    check_refused(run(capfd, folder), "folder", "torch.distributed.checkpoint")
    torch.save({"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"params": [0]}]}, folder / "optimizer.pt")
    (folder / "model.safetensors").write_bytes(b"not a header")
    check_refused(run(capfd, folder), "model.safetensors")


def check_refused(outcome: tuple[int, str, str], *words: str) -> None:
    code, out, err = outcome
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1), outcome
    for word in words:
        assert word in err


def test_other_optimizers_are_not_named_as_ours(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    makers: dict[str, Any] = {
        "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        "adam": torch.optim.Adam,
        "radam": torch.optim.RAdam,
        "nadam": torch.optim.NAdam,
        "adamax": torch.optim.Adamax,
        "lion8bit": lambda params: bitsandbytes.optim.Lion8bit(params, min_8bit_size=1024),
        "paged": bitsandbytes.optim.PagedAdamW,
    }
    for name, make in makers.items():
        optimizer = make([nn.Parameter(torch.randn(64, 64))])
        stepped(optimizer)
        torch.save(optimizer.state_dict(), tmp_path / f"{name}.bin")
        check_refused(run(capfd, tmp_path / f"{name}.bin"), f"{name}.bin", "no optimizer known")


def test_optimizer_inside_a_training_checkpoint_is_measured(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 96, bias=False))
    optimizer = Muon8bit(param_groups(model, lr=1e-3), lr=1e-3)
    stepped(optimizer)
    saved = optimizer.state_dict()
    truth = state_report(optimizer).total_bytes
    trainer = tmp_path / "trainer"
    for step in (9, 10):
        (trainer / f"checkpoint-{step}").mkdir(parents=True)
    torch.save({"state": {}, "param_groups": [{"params": [0]}]}, trainer / "checkpoint-9" / "optimizer.pt")
    torch.save(saved, trainer / "checkpoint-10" / "optimizer.pt")
    torch.save({"model": model.state_dict(), "optimizer": saved}, tmp_path / "loop.pt")
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [saved], "epoch": 1}, tmp_path / "l.ckpt")
    for path in (trainer, tmp_path / "loop.pt", tmp_path / "l.ckpt"):
        found = record(capfd, path)
        assert (found["optimizer"], found["state"]["measured_bytes"]) == ("muon8bit", truth)
    save_file({"w": torch.ones(4)}, tmp_path / "model.safetensors")
    check_refused(run(capfd, tmp_path / "model.safetensors"), "model.safetensors", "state_dict")
    (tmp_path / "cut.safetensors").write_bytes(bytes(20))
    check_refused(run(capfd, tmp_path / "cut.safetensors"), "cut.safetensors", "state_dict")


def test_state_report_and_the_command_give_other_optimizers_equal_bytes(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, model: Any
) -> None:
    optimizer = Muon8bit(param_groups(model, lr=1e-3), lr=1e-3)
    stepped(optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    others = record(capfd, tmp_path / "optimizer.pt")["optimizers"]
    names = {"muon_fp32": "muon", "muon_bf16": "muon_bf16", "adamw_fp32": "adamw", "adamw_8bit": "adamw8bit"}
    found = {name: others[other]["state_bytes"] for name, other in names.items()}
    assert state_report(optimizer).baselines == found


def known(found: dict[str, Any], where: str) -> dict[str, Any]:
    """The weights of a report whose every state was predicted for the shape of its weight."""
    assert found["notes"] == [f"Weights: {where}; the state is predicted for their shapes."]
    assert found["state"]["difference_bytes"] == 0
    weights: dict[str, Any] = found["weights"]
    assert weights["difference_bytes"] == 0
    return weights


def test_weights_in_shards_are_read_whole_or_the_missing_one_is_named(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, model: Any
) -> None:
    optimizer = Muon8bit(param_groups(model, lr=1e-3), lr=1e-3)
    stepped(optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.bin")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    shards = sorted(file.name for file in tmp_path.glob("model-*.safetensors"))
    num_shards, num_parameters = len(shards), sum(p.numel() for p in model.parameters())
    assert num_shards > 2
    index = (tmp_path / "model.safetensors.index.json").read_text()
    for text in (index, None):  # the names of the shards say how many there are, too
        (tmp_path / "model.safetensors.index.json").unlink() if text is None else None
        # The experts of transformers' model are stacked, those in the file not.
        found = record(capfd, tmp_path)["weights"]
        assert (found["num_parameters"], found["measured_bytes"]) == (num_parameters, 4 * num_parameters)
    (tmp_path / shards[1]).unlink()
    for text in (None, index):
        (tmp_path / "model.safetensors.index.json").write_text(text) if text is not None else None
        check_refused(run(capfd, tmp_path), shards[1], "missing", f"1 of {num_shards}")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    check_refused(run(capfd, tmp_path), "model.safetensors.index.json", "weight_map")


def test_an_adapter_beside_the_optimizer_has_the_shapes_of_its_parameters(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_config(config_of(TINY["llama"]), dtype=torch.float32)
    adapter = peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, adapter)
    optimizer = Muon8bit(param_groups(model, lr=1e-3), lr=1e-3)
    stepped(optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    model.save_pretrained(tmp_path)
    weights = known(record(capfd, tmp_path), "the adapter in adapter_model.safetensors")
    assert weights["num_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("wrapper", ["none", "compile", "parallel"])
def test_weights_inside_a_training_file_are_found_under_the_names_of_wrappers(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, wrapper: str
) -> None:
    plain = nn.Sequential(nn.Linear(64, 96, bias=False), nn.LayerNorm(96))
    model = {"none": lambda m: m, "compile": torch.compile, "parallel": nn.DataParallel}[wrapper](plain)
    named, num_bytes = Muon8bit(param_groups(plain, lr=1e-3), lr=1e-3), 4 * (64 * 96 + 2 * 96)
    stepped(named)
    optimizer, weights = named.state_dict(), model.state_dict()
    assert next(iter(weights)) == {"none": "", "compile": "_orig_mod.", "parallel": "module."}[wrapper] + "0.weight"
    torch.save({"model": weights, "optimizer": optimizer, "ema": weights}, tmp_path / "loop.pt")
    inner = {f"net.{name}": tensor for name, tensor in weights.items()} | {"net._extra_state": None}
    torch.save({"state_dict": inner, "optimizer_states": [optimizer]}, tmp_path / "l.ckpt")
    for name, key in (("loop.pt", "model"), ("l.ckpt", "state_dict")):
        assert known(record(capfd, tmp_path / name), f"'{key}' of {name}")["measured_bytes"] == num_bytes
    wrapped = Muon8bit(param_groups(model, lr=1e-3), lr=1e-3)
    stepped(wrapped)
    folder = tmp_path / "folder"
    folder.mkdir()
    torch.save(wrapped.state_dict(), folder / "optimizer.bin")
    save_file(plain.state_dict(), folder / "model.safetensors")
    assert known(record(capfd, folder), "model.safetensors")["measured_bytes"] == num_bytes


def test_what_is_not_known_of_the_weights_is_told(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 96, bias=False))
    optimizer = Muon8bit(param_groups(model, lr=1e-3), lr=1e-3)
    stepped(optimizer)
    saved, other = optimizer.state_dict(), {"1.weight": torch.zeros(96, 64)}
    nameless = {
        **saved,
        "param_groups": [{k: v for k, v in g.items() if k != "param_names"} for g in saved["param_groups"]],
    }
    cases = (
        ({"ema": other, "net": other, "optimizer": saved}, "several sets of weights (ema, net)"),
        (saved, "no weights were found"),
        ({"model": other, "optimizer": saved}, "(1 of 1 parameters: they have no 0.weight)"),
        ({"model": {"0": torch.zeros(3)}, "optimizer": nameless}, "(1 of 1 parameters: the optimizer saved no names)"),
    )
    for content, words in cases:
        torch.save(content, tmp_path / "x.pt")
        (note,) = record(capfd, tmp_path / "x.pt")["notes"]
        assert words in note
        code, out, _ = run(capfd, tmp_path / "x.pt")
        assert (code, words in " ".join(out.split())) == (0, True)


def test_the_newest_of_lightnings_files_is_taken_or_they_are_listed(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    sizes = {"epoch=1-step=90.ckpt": 64, "epoch=10-step=1000.ckpt": 96, "epoch=9-step=900.ckpt": 80}

    def write(name: str, size: int) -> None:
        optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(size))])
        stepped(optimizer)
        torch.save({"state_dict": {}, "optimizer_states": [optimizer.state_dict()]}, folder / name)

    for name, size in sizes.items():
        write(name, size)
    for path in (folder, tmp_path):
        assert record(capfd, path)["state"]["num_parameters"] == 96
    write("best.ckpt", 7)
    check_refused(run(capfd, folder), "best.ckpt, epoch=1-step=90.ckpt, epoch=10-step=1000.ckpt", "give one")
    (folder / "best.ckpt").unlink()
    write("epoch=10-step=1000-v1.ckpt", 7)
    check_refused(run(capfd, tmp_path), "epoch=10-step=1000-v1.ckpt", "give one")
    write("last.ckpt", 11)
    for path in (folder, tmp_path):
        assert record(capfd, path)["state"]["num_parameters"] == 11


def test_objects_in_a_file_are_refused_by_their_class(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved = {"optimizer_states": [], "hyper_parameters": Path("x")}
    torch.save(saved, tmp_path / "l.ckpt")
    check_refused(run(capfd, tmp_path / "l.ckpt"), "l.ckpt", "pathlib", "not run", "state_dict()")


def test_values_that_no_optimizer_saves_are_refused_by_the_name_of_the_parameter(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    optimizer = Muon8bit(param_groups(nn.Sequential(nn.Linear(64, 96, bias=False)), lr=1e-3), lr=1e-3)
    stepped(optimizer)
    path = tmp_path / "optimizer.bin"
    cases: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
        ({"bits": 4}, ("bits=4", "damaged")),
        ({"codebook": []}, ("codebook=[]",)),
        ({"block_size": torch.zeros(2)}, ("RuntimeError", "damaged")),
        ({"flatten": [[]]}, ("damaged",)),
    )
    for changed, words in cases:
        saved = optimizer.state_dict()
        saved["param_groups"][0].update(changed)
        torch.save(saved, path)
        check_refused(run(capfd, path), "optimizer.bin: parameter 0.weight", *words)
    saved = optimizer.state_dict()
    for key in ("flatten", "split_sizes", "split_dim"):
        del saved["param_groups"][0][key]  # options that are off where a file does not have them
    torch.save(saved, path)
    assert record(capfd, path)["state"]["difference_bytes"] == 0
    torch.save({**saved, "state": torch.zeros(2)}, path)
    check_refused(run(capfd, path), "optimizer.bin", "state_dict")
    torch.save({**saved, "state": {0: "x"}}, path)
    check_refused(run(capfd, path), "optimizer.bin: parameter 0.weight", "damaged")
