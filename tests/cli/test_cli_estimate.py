"""`muon8bit estimate`: presets, JSON, budget, picture, and bad input."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.memory_models import LADDER, TINY, config_of, ladder_config

from muon8bit.cli import build_parser, main
from muon8bit.cli.estimate import typed_options
from muon8bit.cli.parser import Progress
from muon8bit.estimate import (
    LABELS,
    OPTIMIZERS,
    Advice,
    Estimator,
    Memory,
    Offer,
    Setup,
    check_budget,
    gib,
    load_config,
    offers,
    parse_budget,
    parse_bytes,
    print_offers,
    print_table,
    script_options,
)
from muon8bit.estimate.advice import untried
from muon8bit.estimate.classes import longest
from muon8bit.estimate.models import build
from muon8bit.estimate.presets import NAMES
from muon8bit.estimate.sizes import measure
from muon8bit.estimate.token_costs import active_parameters, token_costs

# As published with the weights; a buffer of DeepSeek's router (58 layers of 256) counts as parameters there.
PUBLISHED = {
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Mistral-7B": 7_241_732_096,
    "Mixtral-8x7B": 46_702_792_704,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "TinyLlama-1.1B": 1_100_048_384,
    "DeepSeek-V3": 671_026_419_200 - 58 * 256,
}
# By hand, of the models with experts: ends, then for each layer attention with its norms, router and experts.
ACTIVE = {
    "Qwen3-30B-A3B": (2 * 151936 + 1) * 2048
    + 48 * 2048 * (2 * 32 * 128 + 2 * 4 * 128 + 2 + 128 + 8 * 3 * 768)
    + 48 * 2 * 128,
    "Qwen3-235B-A22B": (2 * 151936 + 1) * 4096
    + 94 * 4096 * (2 * 64 * 128 + 2 * 4 * 128 + 2 + 128 + 8 * 3 * 1536)
    + 94 * 2 * 128,
    "Mixtral-8x7B": (2 * 32000 + 1) * 4096 + 32 * 4096 * (2 * 4096 + 2 * 1024 + 2 + 8 + 2 * 3 * 14336),
    "DeepSeek-V3": (2 * 129280 + 1) * 7168
    + 61 * (7168 * (1536 + 512 + 64 + 128 * 128 + 2) + 1536 * 128 * 192 + 512 * 128 * 256 + 1536 + 512)
    + 3 * 3 * 7168 * 18432
    + 58 * 7168 * (256 + (8 + 1) * 3 * 2048),
}
# Published: 3.3, 22, 12.9 and 37.
BILLIONS_ACTIVE = {"Qwen3-30B-A3B": 3.35, "Qwen3-235B-A22B": 22.19, "Mixtral-8x7B": 12.88, "DeepSeek-V3": 37.55}
# Layers, numbers that a token leaves in each, and bytes in bf16: of keys and values by their heads, or of the latent
# and the rotated key that all heads share.
CACHED = {
    "Llama-3.1-8B": 32 * 2 * 8 * 128 * 2,
    "Qwen3-30B-A3B": 48 * 2 * 4 * 128 * 2,
    "Mixtral-8x7B": 32 * 2 * 8 * 128 * 2,
    "DeepSeek-V3": 61 * (512 + 64) * 2,
}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY["llama"]))
    return path


@pytest.fixture(scope="module")
def estimator() -> Estimator:
    return Estimator(config_of(TINY["llama"]))


def run(capfd: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    capfd.readouterr()
    code = main([str(word) for word in argv])
    return code, *capfd.readouterr()


def record(capfd: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    code, out, _ = run(capfd, "estimate", *argv, "--json")
    assert code == 0
    found: dict[str, Any] = json.loads(out)
    return found


def test_every_preset_has_the_published_number_of_parameters() -> None:
    assert set(PUBLISHED) == set(NAMES)
    assert {name: round(number / 1e9, 2) for name, number in ACTIVE.items()} == BILLIONS_ACTIVE
    for name, num_parameters in PUBLISHED.items():
        config = load_config(name.lower())
        model = build(config, torch.bfloat16)
        assert sum(param.numel() for param in model.parameters()) == num_parameters, name
        assert active_parameters(model, config) == ACTIVE.get(name, num_parameters), name
        if name in CACHED:
            assert token_costs(model, config).cache_bytes == CACHED[name], name


def test_what_a_token_takes_is_in_table_and_json(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of 4 experts two are taken; a window ends what a layer keeps; a model that only encodes keeps nothing."""
    path, expert = tmp_path / "config.json", 3 * 64 * 96
    path.write_text(json.dumps({**TINY["mixtral"], "sliding_window": 32}))
    found = record(capfd, path, "--seq", 8, "--dtype", "fp32")
    assert found["num_parameters"] - found["num_active_parameters"] == 2 * 2 * expert
    assert found["kv_cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 4  # layers, K and V, heads, head_dim, bytes
    assert any("2 of 2 layers attend to a window: of a longer text they keep 31 tokens." in n for n in found["notes"])
    _, out, _ = run(capfd, "estimate", path, "--seq", 8)
    words = " ".join(out.split())
    assert f"{found['num_active_parameters']:,} of them active for a token" in words
    assert "a token takes 256 bytes of KV cache in bf16" in words
    adapted = record(capfd, path, "--seq", 8, "--lora", 4)
    factors = 8 * (64 + 2 * 96) + 4 * (96 + 64)  # of an expert: twice the rank for two matrices in one
    assert adapted["num_parameters"] - adapted["num_active_parameters"] == 2 * 2 * (expert + factors)
    encoder = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": 512}
    encoder |= {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    path.write_text(json.dumps(encoder))
    assert record(capfd, path, "--seq", 8)["kv_cache_bytes_per_token"] is None


def test_ladder_from_a_config_file_has_the_bytes_of_a_hand_count(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(ladder_config("162M")))
    layers, d, f = LADDER["162M"]
    hidden = layers * (3 * d * d + d * d + 2 * d * f)
    scales = layers * (3 * d + d + f + 2 * d) * 4  # one block a row; rows of 3072 have two
    rest = 2 * 50257 * d + layers * (3 * d + d + f + d + 4 * d) + 2 * d
    found = record(capfd, path, "--dtype", "fp32", "--seq", 8)
    muon8bit = found["optimizers"]["muon8bit"]
    assert muon8bit["state_bytes"] == hidden + scales + 8 * rest + 4 * (2 + layers * 8 + 2)
    assert found["num_parameters"] == hidden + rest
    assert muon8bit["gradients_bytes"] == 4 * (hidden + rest)
    assert set(found["optimizers"]) == set(OPTIMIZERS)
    for entry in found["optimizers"].values():
        alive = entry["weights_bytes"] + entry["state_bytes"]
        assert entry["peak_bytes"] >= alive + entry["gradients_bytes"] + entry["workspace_bytes"]
        assert entry["peak_bytes"] >= alive + entry["activations_bytes"]
        assert entry["with_checkpointing"]["activations_bytes"] <= entry["without_checkpointing"]["activations_bytes"]


def test_the_asked_member_of_the_family_has_a_row_and_a_command(capfd: pytest.CaptureFixture[str], llama: Path) -> None:
    """By hand: a number a row, or a longer column, and in 32 bits 4 bytes an element where 8 bits have codes."""
    plain = record(capfd, llama)
    assert not {"normuon8bit", "adamuon8bit"} & plain["optimizers"].keys()
    d, f, kv, layers = 64, 96, 32, 2
    shapes = [(d, d), (kv, d), (kv, d), (d, d), (f, d), (f, d), (d, f)] * layers
    muon8bit = plain["optimizers"]["muon8bit"]["state_bytes"]
    momentum = sum(rows * cols + 4 * rows for rows, cols in shapes)
    in_32_bits = sum(4 * rows * cols for rows, cols in shapes)
    for optimizer, more, extra in (
        ("normuon8bit", (), sum(4 * rows for rows, _ in shapes)),
        ("normuon8bit", ("--preset", "modded"), sum(4 * max(shape) for shape in shapes)),
        ("normuon8bit", ("--bits", 32), sum(4 * rows for rows, _ in shapes) + in_32_bits - momentum),
        ("adamuon8bit", (), momentum),
        ("adamuon8bit", ("--bits", 32), 2 * in_32_bits - momentum),
    ):
        found = record(capfd, llama, "--optimizer", optimizer, *more, "--budget", "24GB")
        assert found["optimizers"][optimizer]["state_bytes"] == muon8bit + extra, (optimizer, more)
        assert found["optimizer"] == optimizer
        (offer,) = found["offers"]
        for word in ("--optimizer", optimizer, *map(str, more)):
            assert word in offer["command"].split()
    named = record(capfd, llama, "--optimizer", "adamuon8bit", "--adamw-bits", 8)
    assert named["optimizer"] == "adamuon8bit+adamw8bit"


def test_presets_and_bits_of_others_are_refused(capfd: pytest.CaptureFixture[str], llama: Path) -> None:
    for words, said in (
        (("--preset", "dion"), "normuon8bit has paper, official, dion, modded; adamuon8bit has paper, official"),
        (("--optimizer", "adamuon8bit", "--preset", "modded"), "adamuon8bit has none of that name"),
        (("--optimizer", "muon", "--bits", "32"), "--bits 32: muon has no choice of it"),
    ):
        assert main(["estimate", str(llama), *words]) == 2
        assert said in capfd.readouterr().err


def test_folder_and_file_give_the_same_estimate(capfd: pytest.CaptureFixture[str], llama: Path) -> None:
    of_file, of_folder = record(capfd, llama), record(capfd, llama.parent)
    assert of_file.pop("model") != of_folder.pop("model")
    assert of_file == of_folder
    assert of_file["setup"]["seq"] == TINY["llama"]["max_position_embeddings"]


def test_adapter_and_nf4_train_few_parameters_on_a_small_base(capfd: pytest.CaptureFixture[str], llama: Path) -> None:
    pytest.importorskip("peft")
    full, lora, qlora = (record(capfd, llama, *how) for how in ((), ("--lora", 4), ("--qlora", "--lora", 4)))
    sizes = TINY["llama"]
    d, f, kv = sizes["hidden_size"], sizes["intermediate_size"], sizes["hidden_size"] // 2
    matrices = [(d, d), (kv, d), (kv, d), (d, d), (f, d), (f, d), (d, f)] * sizes["num_hidden_layers"]
    num_trained = sum(4 * (rows + cols) for rows, cols in matrices)
    assert lora["num_trained_parameters"] == qlora["num_trained_parameters"] == num_trained
    one = {name: found["optimizers"]["muon8bit"] for name, found in (("full", full), ("lora", lora), ("qlora", qlora))}
    assert one["lora"]["gradients_bytes"] == one["qlora"]["gradients_bytes"] == 4 * num_trained
    assert one["lora"]["weights_bytes"] == one["full"]["weights_bytes"] + 4 * num_trained
    norms = (2 * sizes["num_hidden_layers"] + 1) * d * 2  # fp32 instead of bf16
    saved = sum(2 * r * c - (r * c // 2 + r * c // 64 + 4 * -(-r * c // 64 // 256) + 68) for r, c in matrices)
    assert one["lora"]["weights_bytes"] - one["qlora"]["weights_bytes"] == saved - norms


def test_gpus_divide_what_their_way_of_sharding_divides(estimator: Estimator) -> None:
    def muon8bit(**how: Any) -> Memory:
        return estimator.estimate(Setup(seq=128, **how)).optimizers["muon8bit"]

    alone = muon8bit()
    ddp = muon8bit(num_gpus=4, shard="ddp")
    assert ddp.communication_bytes == alone.gradients_bytes
    assert ddp.plain.peak_bytes - alone.plain.peak_bytes == alone.gradients_bytes
    for shard, gpus, parts in (("fsdp2", 4, 4), ("fsdp2", 16, 16), ("hsdp", 16, 8)):
        part = muon8bit(num_gpus=gpus, shard=shard)
        assert part.gradients_bytes == alone.gradients_bytes // parts  # all rows divide evenly
        assert part.state_bytes == pytest.approx(alone.state_bytes / parts, abs=4 * 100)  # step counters do not
    assert muon8bit(num_gpus=4) == alone


def test_accumulated_gradients_lie_beside_the_activations_unless_they_are_added_to_shards(estimator: Estimator) -> None:
    def muon8bit(**how: Any) -> Memory:
        return estimator.estimate(Setup(seq=128, batch=8, **how)).optimizers["muon8bit"]

    once, more = muon8bit(), muon8bit(accumulation=2)
    assert more.plain.peak_bytes == more.plain.activations_bytes + sum(
        (more.gradients_bytes, more.weights_bytes, more.state_bytes)
    )
    assert more.plain.peak_bytes > once.plain.peak_bytes
    assert muon8bit(accumulation=9) == more
    assert muon8bit(num_gpus=4, shard="fsdp2", accumulation=2) == muon8bit(num_gpus=4, shard="fsdp2")


def test_what_fsdp2_sends_of_a_gradient_is_fp32_where_it_computes_in_bf16() -> None:
    model = build(config_of(TINY["llama"]), torch.float32, None)
    sizes = {dtype: measure(model, Setup(num_gpus=4, shard="fsdp2", dtype=dtype)) for dtype in ("fp32", "mixed")}
    layer = max(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
    rest = sum(p.numel() for n, p in model.named_parameters() if ".layers." not in n)
    assert sizes["fp32"].communication_bytes == 4 * (rest + 2 * layer + 2 * max(rest, layer))
    assert sizes["mixed"].communication_bytes == 2 * (rest + 2 * layer) + (2 + 4) * max(rest, layer)


def test_released_gradients_are_the_two_largest(capfd: pytest.CaptureFixture[str], llama: Path) -> None:
    entry = record(capfd, llama, "--release-gradients")["optimizers"]["muon8bit"]
    table = TINY["llama"]["vocab_size"] * TINY["llama"]["hidden_size"]
    assert entry["gradients_bytes"] == 2 * 2 * table  # embeddings and head, bf16


def test_every_offer_fits_and_is_the_fewest_changes(estimator: Estimator) -> None:
    """Single options where one is enough; else several, none of which can be left out."""
    setup = Setup(seq=128, batch=8, dtype="fp32")
    peak = estimator.estimate(setup).peak_bytes("muon8bit")
    (as_asked,) = offers(estimator, setup, "muon8bit", peak)
    assert (as_asked.setup, as_asked.peak_bytes) == (setup, peak)
    singles = offers(estimator, setup, "muon8bit", peak - 1)
    alone = [offer.setup for offer in singles if offer.setup.mode == "full" and offer.setup.num_gpus == 1]
    assert replace(setup, checkpointing=True) in alone
    assert replace(setup, batch=1) in alone
    assert replace(setup, dtype="bf16") in alone
    assert {offer.setup.mode for offer in singles} == {"full", "lora", "qlora"}
    budget = estimator.estimate(replace(setup, checkpointing=True, batch=1)).peak_bytes("muon8bit")
    several = offers(estimator, setup, "muon8bit", budget)
    assert several
    assert several[0].setup == replace(setup, checkpointing=True, batch=1)
    for offer in [*singles, *several]:
        assert offer.peak_bytes == estimator.memory(offer.optimizer, offer.setup).peak_bytes
        assert offer.peak_bytes <= (budget if offer in several else peak - 1)
    adapter = replace(setup, lora=16, checkpointing=True)
    found = offers(estimator, setup, "muon8bit", estimator.memory("muon8bit", adapter).peak_bytes)
    assert adapter in [offer.setup for offer in found]
    assert offers(estimator, setup, "muon8bit", 1000) == []


def test_the_verdict_of_every_optimizer_stands_in_its_row(estimator: Estimator) -> None:
    estimate = estimator.estimate(Setup(seq=128, batch=8))
    peaks = {name: estimate.peak_bytes(name) for name in OPTIMIZERS}
    budget = (min(peaks.values()) + max(peaks.values())) // 2
    verdicts = check_budget(estimate, budget)
    assert {verdict.fits for verdict in verdicts.values()} == {True, False}
    table = StringIO()
    print_table("a llama", estimate, verdicts, budget, table)
    assert max(map(len, table.getvalue().splitlines())) <= 80
    for name, verdict in verdicts.items():
        assert verdict.spare_bytes == budget - peaks[name]
        row = next(line for line in table.getvalue().splitlines() if line.startswith(f"{LABELS[name]} "))
        assert (row.endswith(" fits"), row.endswith(" over")) == (verdict.fits, not verdict.fits)


def test_what_is_offered_is_a_command_of_the_script_that_makes_the_same_setup(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that caps its logits none has --loss-chunk; of a configuration without weights it is pretrained."""
    monkeypatch.chdir(tmp_path)
    path = Path("config.json")
    path.write_text(json.dumps({**TINY["llama"], "model_type": "gemma2", "head_dim": 16}))
    peak = record(capfd, path, "--device", "cpu", "--batch-size", 8)["optimizers"]["muon8bit"]["peak_bytes"]
    asked = ("--device", "cpu", "--batch-size", 8, "--budget", f"{int(0.6 * peak)}B")
    found = record(capfd, path, *asked)["offers"]
    scripts = set()
    for offer in found:
        words = shlex.split(offer["command"])
        assert "--loss-chunk" not in words
        setup = Setup(**offer["setup"])
        if setup.num_gpus > 1:
            assert words[:4] == ["accelerate", "launch", "--config_file", "finetune/configs/fsdp2.yaml"]
            continue
        module = importlib.import_module(words[2])
        scripts.add(words[2])
        recipe, _ = module.parse(words[3:])
        for key, value in script_options(offer["optimizer"], setup).items():
            assert getattr(recipe, key, "full") == value, key
    assert scripts == {"finetune.pretrain", "finetune.sft"}
    text = StringIO()
    made = [Offer(offer["optimizer"], Setup(**offer["setup"]), offer["peak_bytes"]) for offer in found]
    commands, remarks = ([offer[key] for offer in found] for key in ("command", "remark"))
    print_offers(Advice(made, None), commands, "muon8bit", peak, "", text, setup=made[0].setup, remarks=remarks)
    assert max(map(len, text.getvalue().splitlines())) <= 80
    for offer in found:
        assert offer["command"] in " ".join(text.getvalue().replace("\\\n", " ").split())


def test_a_recipe_is_estimated_with_its_options_and_those_that_are_typed(capfd: pytest.CaptureFixture[str]) -> None:
    found = record(capfd, "--recipe", "llama_4m", "--device", "cpu")
    setup = Setup(**found["setup"])
    assert (setup.batch, setup.seq, setup.dtype, setup.mixed_precision) == (8, 256, "fp32", "no")
    assert (found["model"], found["optimizer"]) == ("llama_4m", "muon8bit")
    assert record(capfd, "--recipe", "llama_4m")["setup"]["mixed_precision"] == "bf16"
    typed = record(capfd, "--recipe", "llama_4m", "--batch-size", 2, "--adamw-bits", 8, "--budget", "1GB")
    assert (typed["setup"]["batch"], typed["optimizer"]) == (2, "muon8bit+adamw8bit")
    (offer,) = typed["offers"]
    assert offer["command"] == "python -m finetune.pretrain --recipe llama_4m --adamw-bits 8 --batch-size 2"
    wide = record(capfd, "--recipe", "llama_4m", "--width", 640, "--budget", "1GB")
    assert wide["offers"][0]["command"] == "python -m finetune.pretrain --recipe llama_4m --width 640"
    embedding, layer = 1024 * 320, 4 * 320**2 + 3 * 320 * 864
    assert wide["num_parameters"] == 2 * embedding + 3 * 2**2 * layer + 7 * 2 * 320


def test_heads_and_routers_stand_in_the_commands_that_take_them(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY["deepseek_v3"]))
    found = record(capfd, path, "--device", "cpu", "--budget", "1GB", "--split-heads", "head", "--routers", "muon")
    (offer,) = found["offers"]
    assert offer["command"].endswith("--split-heads head --routers muon")
    setup = Setup(**offer["setup"])
    kept = {name: script_options(name, setup) for name in ("muon8bit+adamw8bit", "muon", "adamw", "adamw8bit")}
    assert [options["split_heads"] for options in kept.values()] == ["head", "none", "none", "none"]
    assert [options["routers"] for options in kept.values()] == ["muon", "muon", "adamw", "adamw"]


def test_former_names_are_the_same_options() -> None:
    for before, now in (
        ("--batch 2 --seq 64", "--batch-size 2 --seq-len 64"),
        ("--lora 4", "--mode lora --lora-rank 4"),
        ("--qlora --lora 4", "--mode qlora --lora-rank 4"),
        ("--dtype mixed", "--dtype fp32 --mixed-precision bf16"),
    ):
        parsed = [build_parser().parse_args(["estimate", "x", *words.split()]) for words in (before, now)]
        assert typed_options(parsed[0]) == typed_options(parsed[1])


def test_a_card_of_24_gb_has_24_gib(capfd: pytest.CaptureFixture[str], llama: Path) -> None:
    assert parse_budget("24GiB") == (24 * 2**30, "")
    num_bytes, note = parse_budget("24 GB")
    assert num_bytes == 24 * 2**30
    assert note == "24 GB is taken for 24GiB, as cards are sold; --budget 24000000000B is 22.35 GiB."
    _, out, _ = run(capfd, "estimate", llama, "--budget", "24GB")
    assert "24GB is taken for 24GiB" in out


def test_qlora_says_what_stays_unquantized(capfd: pytest.CaptureFixture[str], llama: Path) -> None:
    pytest.importorskip("peft")
    found = record(capfd, llama, "--qlora", "--lora", 4)
    sizes = TINY["llama"]
    unquantized = 2 * 2 * sizes["vocab_size"] * sizes["hidden_size"]  # embeddings and head, bf16
    unquantized += 4 * sizes["hidden_size"] * (2 * sizes["num_hidden_layers"] + 1)  # norms, fp32
    (note,) = (note for note in found["notes"] if "NF4" in note)
    assert f"stay unquantized, {unquantized / 2**20:.2f} MiB of the weights" in note


def test_stacked_experts_stay_unquantized_and_their_bytes_are_told(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """bitsandbytes makes NF4 of linear layers; an expert's weight is a slice of [experts, rows, columns]."""
    pytest.importorskip("peft")
    path, sizes = tmp_path / "config.json", TINY["mixtral"]
    path.write_text(json.dumps(sizes))
    found = record(capfd, path, "--qlora", "--seq", 8)
    experts = sizes["num_hidden_layers"] * sizes["num_local_experts"] * 3 * sizes["hidden_size"]
    experts *= 2 * sizes["intermediate_size"]  # bf16
    told = " ".join(found["notes"])
    assert f"The stacked experts stay unquantized too, {experts / 2**20:.2f} MiB of the weights" in told
    moe, setup = Estimator(config_of(sizes)), Setup(seq=8, qlora=True)  # LoRA's B over stacked experts is AdamW's
    budget = moe.memory("muon8bit+adamw8bit", setup).peak_bytes
    assert "muon8bit+adamw8bit" in [o.optimizer for o in offers(moe, setup, "muon8bit", budget) if o.setup == setup]
    assert "--lora-targets q_proj,k_proj,v_proj,o_proj" in " ".join(untried(Setup(qlora=True)))
    assert "--mode full --gpus 8 --shard fsdp2" in untried(Setup(qlora=True))[-1]
    assert "--gpus 16 --shard fsdp2" in untried(Setup())[-1]


@pytest.mark.parametrize("optimizer", ["muon8bit", "muon"])  # torch's does not run on sharded parameters
def test_on_several_gpus_sharding_is_offered_before_another_mode(optimizer: str, estimator: Estimator) -> None:
    setup = Setup(seq=8, num_gpus=8, shard="ddp")
    sharded = replace(setup, shard="fsdp2")
    budget = estimator.memory("muon8bit", sharded).peak_bytes
    assert budget < estimator.memory("muon8bit", setup).peak_bytes
    found = offers(estimator, setup, optimizer, budget)
    assert ("muon8bit", sharded) in [(offer.optimizer, offer.setup) for offer in found]
    is_full = [offer.setup.mode == "full" for offer in found]
    assert is_full == sorted(is_full, reverse=True)


def test_a_sharded_adapter_is_not_offered_as_a_command_of_the_scripts(
    capfd: pytest.CaptureFixture[str], llama: Path
) -> None:
    """They refuse it; a loop of one's own does not."""
    options = "--lora", 2, "--gpus", 2, "--shard", "fsdp2", "--budget", "1GiB"
    (offer,) = record(capfd, llama, "--seq", 8, *options)["offers"]
    assert offer["command"].startswith("muon8bit estimate ")
    assert "the scripts train adapters with --shard ddp" in offer["remark"]


def test_a_folder_without_weights_is_told_above_the_command_that_pretrains(
    capfd: pytest.CaptureFixture[str], llama: Path
) -> None:
    _, out, _ = run(capfd, "estimate", llama.parent, "--seq", 8, "--budget", "1GiB")
    remark, command = out.split("Fits in")[1].split("# no weights in ")[1].split("python -m ")
    assert " ".join(remark.replace("#", "").split()) == (
        f"{llama.parent}: this starts from random ones; for fine-tuning give --model a folder with weights"
    )
    assert command.split()[0] == "finetune.pretrain"
    (adapter,) = record(capfd, llama, "--seq", 8, "--lora", 2, "--budget", "1GiB")["offers"]
    assert adapter["command"].startswith("python -m finetune.sft --model ")
    assert adapter["remark"].startswith(f"no weights in {llama.parent}: put them there")
    (llama.parent / "model.safetensors").write_bytes(b"")
    (tuned,) = record(capfd, llama, "--seq", 8, "--budget", "1GiB")["offers"]
    assert (tuned["command"].split()[2], tuned["remark"]) == ("finetune.sft", "")


def test_the_host_memory_of_an_offer_is_printed_beside_its_peak(capfd: pytest.CaptureFixture[str], llama: Path) -> None:
    asked = (llama, "--seq", 8, "--state-device", "cpu", "--budget", "1GiB")
    found = record(capfd, *asked)
    (offer,) = found["offers"]
    host = found["optimizers"]["muon8bit"]["host_state_bytes"]
    assert offer["host_bytes"] == host > 0
    _, out, _ = run(capfd, "estimate", *asked)
    assert f"at the peak + {host / 2**20:.2f} MiB of host memory: Muon8bit" in " ".join(out.replace("#", "").split())
    (plain,) = record(capfd, llama, "--seq", 8, "--budget", "1GiB")["offers"]
    assert plain["host_bytes"] == 0


def test_the_presets_are_listed_with_their_names_on_the_hub(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capfd, "estimate", "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(PUBLISHED)
    assert "Llama-2-7B       meta-llama/Llama-2-7b-hf" in out.splitlines()


def test_a_checkpoint_has_the_bytes_of_its_tensors(
    capfd: pytest.CaptureFixture[str], llama: Path, estimator: Estimator
) -> None:
    """Sharded, of all GPUs; of an adapter, without its base."""
    model = build(load_config(str(llama)), torch.bfloat16)
    weights = sum(param.numel() * 2 for param in model.parameters())
    found = record(capfd, llama, "--seq", 8)["optimizers"]["adamw"]
    assert found["checkpoint_bytes"] == weights + found["state_bytes"]
    alone, sharded = (
        estimator.estimate(Setup(seq=8, **more)).optimizers["muon8bit"]
        for more in ({}, {"num_gpus": 4, "shard": "fsdp2"})
    )
    assert sharded.checkpoint_bytes == alone.checkpoint_bytes == weights + alone.state_bytes
    adapter = estimator.estimate(Setup(seq=8, lora=2)).optimizers["muon8bit"]
    assert adapter.checkpoint_bytes == adapter.gradients_bytes + adapter.state_bytes


def test_small_sizes_are_told_in_small_units() -> None:
    assert [gib(size) for size in (3 * 2**29, 2**29, 2**26, 2**20, 2**16, 10)] == (
        ["1.50 GiB", "0.50 GiB", "64.00 MiB", "1.00 MiB", "64.00 KiB", "0.01 KiB"]
    )
    assert parse_budget("6MB")[1].endswith("--budget 6000000B is 5.72 MiB.")


def test_the_legend_of_the_picture_lies_below_its_bars(
    capfd: pytest.CaptureFixture[str], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    record(capfd, llama, "--seq", 8, "--budget", "1GiB", "--plot", tmp_path / "memory.png")
    (axes,) = drawn[0].axes
    (legend,) = drawn[0].legends
    assert axes.get_legend() is None
    assert legend.get_window_extent().y1 <= axes.get_window_extent().y0


def test_a_hub_that_is_not_there_is_told_at_once(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(*address: Any, **_: Any) -> None:
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr("muon8bit.estimate.configs.getproxies", dict)
    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    code, out, err = run(capfd, "estimate", "nobody/no-model")
    assert (code, out, len(err.splitlines()), len(asked)) == (2, "", 1, 1)
    assert "nobody/no-model: the hub cannot be reached" in err


def test_progress_is_shown_on_a_terminal_and_elsewhere_only_after_a_while() -> None:
    now, log = [0.0], StringIO()
    progress = Progress(log, lambda: now[0])
    progress.tell("first")
    now[0] = 5.0
    progress.tell("second")
    assert log.getvalue() == "5 s: second ...\n"
    terminal = StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    progress = Progress(terminal, lambda: 0.0)
    progress.tell("first")
    progress.clear()
    assert terminal.getvalue() == "\r\x1b[Kfirst ...\r\x1b[K"


def test_budget_is_judged_and_the_picture_is_written(
    capfd: pytest.CaptureFixture[str], llama: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "memory.png"
    found = record(capfd, llama, "--budget", "1GiB", "--plot", picture)
    assert found["budget_bytes"] == 2**30
    for entry in found["optimizers"].values():
        assert entry["fits"]
        assert entry["spare_bytes"] == 2**30 - entry["peak_bytes"]
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("24GiB", 24 * 2**30), ("24 GB", 24 * 10**9), ("1.5TiB", 3 * 2**39), ("512B", 512)]
)
def test_sizes_have_the_bytes_of_their_unit(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("Lama-3.2-3b",), ("Lama-3.2-3b", "Llama-3.2-3B")),
        (("nowhere/config.json",), ("nowhere/config.json", "no such file")),
        (("CONFIG", "--budget", "24"), ("24", "unit", "24GiB")),
        (("CONFIG", "--budget", "24 apples"), ("apples", "GiB")),
        (("CONFIG", "--budget", "GiB"), ("GiB", "no size")),
        (("CONFIG", "--seq", "4096"), ("--seq-len 4096", "128")),
        (("CONFIG", "--batch", "0"), ("--batch-size", "0")),
        (("CONFIG", "--lora", "0"), ("--lora-rank", "0")),
        (("CONFIG", "--loss-chunk", "-1"), ("--loss-chunk", "-1")),
        (("CONFIG", "--lora-rnak", "4"), ("--lora-rnak", "did you mean --lora-rank?")),
        ((), ("MODEL", "--recipe")),
        (("CONFIG", "--recipe", "llama_4m"), ("MODEL", "--recipe")),
        (("--recipe", "llama_4n"), ("llama_4n", "did you mean llama_4m?")),
        (("--recipe", "llama_3b_lorra"), ("did you mean llama_3b_lora? It must be one of", "llama_4m", "smollm2_135m")),
        (("--recipe", "llama_4m", "--mode", "lora"), ("--mode", "llama_4m")),
        (("--recipe", "llama_4m", "--width", "100"), ("--width", "the nearest that work: 64 and 128")),
        (("CONFIG", "--width", "64"), ("--width", "give --recipe")),
        (("CONFIG", "--split-heads", "head"), ("split_heads='head'", "no MLA projections")),
        (("CONFIG", "--routers", "muon"), ("routers='muon'", "no trainable MoE router")),
        (("CONFIG", "--gpus", "0"), ("--gpus", "0")),
        (("CONFIG", "--gradient-accumulation", "0"), ("--gradient-accumulation", "0")),
        (("CONFIG", "--gradient-accumulation", "2", "--release-gradients"), ("--release-gradients", "accumulation 2")),
        (("CONFIG", "--shard", "fsdp2"), ("--shard fsdp2", "--gpus")),
        (("CONFIG", "--gpus", "12", "--shard", "hsdp"), ("hsdp", "12", "8")),
        (("CONFIG", "--gpus", "2", "--release-gradients"), ("--release-gradients", "ddp")),
        (("CONFIG", "--plot", "memory.jpg"), ("memory.jpg", ".png")),
        (("CONFIG", "--plot", "nowhere/memory.png"), ("nowhere/memory.png", "No such file")),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    capfd: pytest.CaptureFixture[str], llama: Path, argv: tuple[str, ...], words: tuple[str, ...]
) -> None:
    code, out, err = run(capfd, "estimate", *(llama if word == "CONFIG" else word for word in argv), "--json")
    assert code == 2
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in out
    for word in words:
        assert word in err


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "model_type"])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_config_without_a_size_is_refused_by_its_name(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, kind: str, key: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: value for name, value in TINY[kind].items() if name != key}))
    code, _, err = run(capfd, "estimate", path)
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert str(path) in err
    assert repr(key) in err


@pytest.mark.parametrize("text", ["", "[]", '{"model_type": "nothing_known"}', '{"model_type": "t5"}'])
def test_file_that_is_no_configuration_is_refused(capfd: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    code, _, err = run(capfd, "estimate", path)
    assert (code, len(err.strip().splitlines())) == (2, 1), err


def test_folder_without_a_configuration_is_refused_by_name(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capfd, "estimate", tmp_path)
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert f"{tmp_path}: this folder holds no config.json" in err


@pytest.mark.parametrize(
    ("missing", "argv"),
    [
        ("transformers", ("--json",)),
        ("transformers", ()),
        ("matplotlib", ("--json", "--plot", "x.png")),
        ("peft", ("--lora", "4")),
    ],
)
def test_missing_library_is_told_with_what_to_install(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    llama: Path,
    missing: str,
    argv: tuple[str, ...],
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    code, _, err = run(capfd, "estimate", llama, "--seq", 8, *argv)
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert f"pip install {missing}" in err


def test_tiny_models_are_the_ones_their_names_say() -> None:
    assert [config_of(values).model_type for values in TINY.values()] == list(TINY)


_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}
_WHISPER = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 1000}
_WHISPER |= {
    "max_source_positions": 20,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "pad_token_id": 0,
}
_EYES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 28}
_KINDS = {
    "a mask read by its own code": ({**_SMALL, "model_type": "falcon"}, "FalconForCausalLM", ""),
    "speech to text": (
        {"model_type": "whisper", **_WHISPER, "decoder_start_token_id": 1},
        "WhisperForConditionalGeneration",
        "",
    ),
    "a classifier": ({**_SMALL, "model_type": "llama", "pad_token_id": 0}, "LlamaForSequenceClassification", ""),
    "images, text part": (
        {
            "model_type": "mistral3",
            "text_config": {**_SMALL, "model_type": "mistral", "num_key_value_heads": 2},
            "vision_config": {**_EYES, "model_type": "pixtral", "patch_size": 14},
        },
        "Mistral3ForConditionalGeneration",
        "MistralForCausalLM",
    ),
    "images, text part of a causal language model": (
        {
            "model_type": "gemma3",
            "text_config": {**_SMALL, "model_type": "gemma3_text", "num_key_value_heads": 2, "head_dim": 16},
            "vision_config": {**_EYES, "model_type": "siglip_vision_model", "patch_size": 14},
        },
        "Gemma3ForConditionalGeneration",
        "Gemma3ForCausalLM",
    ),
}


@pytest.mark.parametrize("kind", _KINDS)
def test_the_class_of_the_architecture_is_counted_whole(kind, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    values, name, built = _KINDS[kind]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**values, "architectures": [name]}))
    assert main(["estimate", str(path), "--seq", "64", "--budget", "1GiB", "--json"]) == 0
    config = transformers.AutoConfig.for_model(**values)
    config = config.get_text_config() if built else config
    with torch.device("meta"):
        model = getattr(transformers, built or name)(config)
    found = json.loads(capsys.readouterr().out)
    assert found["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert [note.split(" of this ")[0] for note in found["notes"] if "part" in note] == (
        [f"Only the text part ({values['text_config']['model_type']})"] if built else []
    )
    assert any("eager attention" in note for note in found["notes"]) == (values["model_type"] == "falcon")


def test_what_the_figures_leave_out_of_a_model_that_sees_is_told_under_a_budget_that_nothing_fits(tmp_path, capsys):
    path = tmp_path / "config.json"
    values = _KINDS["images, text part of a causal language model"][0]
    path.write_text(json.dumps({**values, "text_config": {**values["text_config"], "num_hidden_layers": 1}}))
    assert main(["estimate", str(path), "--seq", "8", "--budget", "1KiB"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Only the text part (gemma3_text) of this gemma3 model is counted: the rest (vision_config)" in told
    assert "Muon8bit would fit in 1.00 KiB with nothing that was tried. The least takes" in told
    assert "Not tried: - a shorter sequence: --seq-len 4 - an adapter on fewer modules" in told


def test_a_model_that_fails_with_both_ways_of_attention_is_refused_with_both_reasons(monkeypatch, llama, capsys):
    from transformers import LlamaModel

    def fail(*_, attention_mask=None, **__):
        raise RuntimeError("unmasked fails" if attention_mask is None else "masked fails too")

    monkeypatch.setattr(LlamaModel, "forward", fail)
    assert main(["estimate", str(llama), "--seq", "8"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "with fused attention RuntimeError: unmasked fails; with eager attention" in error
    assert "RuntimeError: masked fails too" in error


def test_a_failure_of_a_models_own_code_is_one_sentence_with_its_reason(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({**_SMALL, "model_type": "llama", "num_attention_heads": 4, "hidden_act": "no such thing"})
    )
    assert main(["estimate", str(path), "--seq", "64"]) == 2
    error = capsys.readouterr().err
    assert "no such thing" in error
    assert error.count("\n") == 1


_PLAIN = {**_SMALL, "model_type": "llama", "num_key_value_heads": 2}
_T5 = {"model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "vocab_size": 1000}
_M2M = {"model_type": "m2m_100", **_WHISPER, "encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5}
_QWEN = {**_SMALL, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
_QWEN3_VL = {
    "model_type": "qwen3_vl",
    "text_config": {**_QWEN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "vision_config": {"hidden_size": 32, "depth": 1, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 64}
    | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
}
_MLLAMA = {
    "model_type": "mllama",
    "text_config": {**_PLAIN, "model_type": "mllama_text_model", "cross_attention_layers": [1], "pad_token_id": 0},
    "vision_config": {"hidden_size": 32, "attention_heads": 4, "num_hidden_layers": 1, "num_global_layers": 1}
    | {"intermediate_size": 64, "image_size": 28, "patch_size": 14, "intermediate_layers_indices": [0]},
}
# A configuration, the class that must be counted, options.
_SWEPT = {
    "layers dropped at random": (_M2M, "M2M100ForConditionalGeneration", ()),
    "encoder-decoder that says nothing of its start": (_T5, "T5ForConditionalGeneration", ("--lora", "2")),
    "encoder-decoder that hears": (_KINDS["speech to text"][0], "WhisperForConditionalGeneration", ("--lora", "2")),
    "classifier without padding": (_PLAIN, "LlamaForSequenceClassification", ("--batch", "2")),
    "classifier of tokens": ({**_SMALL, "model_type": "bert"}, "BertForTokenClassification", ("--lora", "2")),
    "classifier with two layers in its head": (
        {"model_type": "distilbert", "dim": 64, "n_layers": 1, "n_heads": 4, "hidden_dim": 128, "vocab_size": 99},
        "DistilBertForSequenceClassification",
        ("--lora", "2"),
    ),
    "images, no class for the text part": (_QWEN3_VL, "Qwen3VLForConditionalGeneration", ()),
    "images, another class for the text part": (_MLLAMA, "MllamaForCausalLM", ("--gradient-accumulation", "2")),
}


@pytest.mark.parametrize("kind", _SWEPT)
def test_every_kind_of_architecture_is_counted_with_the_parameters_of_its_class(kind, tmp_path, capfd):
    values, name, options = _SWEPT[kind]
    if "--lora" in options:
        pytest.importorskip("peft")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**values, "architectures": [name]}))
    found = record(capfd, path, "--seq", "8", *options)
    import transformers

    config = transformers.AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = getattr(transformers, name)(config.text_config if "mllama" in values["model_type"] else config)
    sizes = {name: param.numel() for name, param in model.named_parameters() if param.requires_grad}
    fixed = sum(param.numel() for param in model.parameters()) - sum(sizes.values())
    seen = sum(size for name, size in sizes.items() if ".visual." in name)
    if "--lora" in options:  # a classifier's head is trained whole beside its frozen self
        head = sum(size for name, size in sizes.items() if "classifier" in name)
        assert found["num_parameters"] == found["num_trained_parameters"] + sum(sizes.values()) + fixed
        assert found["num_trained_parameters"] == head + sum(
            2 * sum(module.weight.shape)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and not name.endswith(("lm_head", "proj_out", "classifier"))
        )
    else:
        assert (found["num_parameters"], found["num_trained_parameters"]) == (
            sum(sizes.values()) + fixed,
            sum(sizes.values()) - seen,
        )
        notes = {
            "qwen3_vl": "of the rest (vision_config) the weights are counted, frozen",
            "mllama": "Only the text part",
        }
        assert notes.get(values["model_type"], "") in "".join(found["notes"])


@pytest.mark.parametrize(
    ("values", "name", "options", "words"),
    [
        ({**_SMALL, "model_type": "wav2vec2"}, "Wav2Vec2ForCTC", (), ("wav2vec2", "no language model")),
        ({"model_type": "vision-encoder-decoder"}, "VisionEncoderDecoderModel", (), ("takes pixel_values",)),
        (_T5, "T5EncoderModel", (), ("T5EncoderModel", "'architectures'")),
        (_T5, "T5ForConditionalGeneration", ("--loss-chunk", "4"), ("--loss-chunk", "leave it out")),
        (_PLAIN, "LlamaForSequenceClassification", ("--loss-chunk", "4"), ("--loss-chunk", "leave it out")),
        (_MLLAMA, "MllamaForCausalLM", ("--loss-chunk", "4"), ("--loss-chunk", "leave it out")),
        ({**_T5, "is_encoder_decoder": True}, "T5ForSequenceClassification", (), ("the values of tensors", "measure")),
        (
            {"model_type": "gptj", "n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 99, "rotary_dim": 64},
            "",
            (),
            ("config.json",),
        ),
    ],
)
def test_what_cannot_be_counted_is_one_line_and_nothing_else(values, name, options, words, tmp_path, capfd):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**values, "architectures": [name]}))
    code, out, err = run(capfd, "estimate", path, "--seq", "8", *options)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1), err
    for word in words:
        assert word in err


_LFM2 = {"model_type": "lfm2", **_SMALL, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
_MAMBA2 = {"model_type": "mamba2", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 99, "num_heads": 4}
_MAMBA2 |= {"head_dim": 32, "n_groups": 1, "state_size": 8}
# A config.json with the names or numbers of now, and another text for the same one.
_FORMS = {
    "gpt2": (
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32},
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32},
        {"model_type": "gpt2", "vocab_size": 99},
    ),
    "mpt": (
        {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
        {"d_model": 64, "n_layers": 1, "n_heads": 4},
        {"model_type": "mpt", "vocab_size": 99, "max_seq_len": 32},
    ),
    "lfm2": ({"intermediate_size": 160}, {"block_ff_dim": 160}, {k: v for k, v in _LFM2.items() if "inter" not in k}),
    "lfm2, as by default": (
        {"intermediate_size": 12288},
        {"block_ff_dim": 12288},
        {k: v for k, v in _LFM2.items() if "inter" not in k},
    ),
    "Infinity": ({"time_step_limit": [0.0, 1e30]}, {"time_step_limit": [0.0, float("inf")]}, _MAMBA2),
    "__float__": ({"time_step_limit": [0.0, 1e30]}, {"time_step_limit": [0.0, {"__float__": "Infinity"}]}, _MAMBA2),
    "NaN": ({"eval_loss": 0.1}, {"eval_loss": float("nan")}, _PLAIN),
    "no limit": ({"max_position_embeddings": 4096}, {"max_position_embeddings": -1}, {**_PLAIN, "vocab_size": 99}),
}


@pytest.mark.parametrize(
    ("values", "listed", "name"),
    [
        (_PLAIN, "LlamaForSequenceClassification", "LlamaForSequenceClassification"),
        (_PLAIN, [None, "LlamaForSequenceClassification"], "LlamaForSequenceClassification"),
        (_PLAIN, -1, "LlamaForCausalLM"),
        (_PLAIN, ["NoClassOfTransformers"], "LlamaForCausalLM"),
        (_T5, ["T5Config"], "T5ForConditionalGeneration"),
        (_T5, None, "T5ForConditionalGeneration"),
    ],
)
def test_the_class_is_found_whatever_architectures_says(values, listed, name):
    config = config_of(values)
    config.architectures = listed
    assert type(build(config, torch.bfloat16)).__name__ == name


@pytest.mark.parametrize("form", _FORMS)
def test_a_configuration_in_another_form_is_the_same_model(form, tmp_path):
    *texts, common = _FORMS[form]
    path = tmp_path / "config.json"
    found = []
    for text in texts:
        path.write_text(json.dumps({**common, **text}))
        config = load_config(str(path))
        shapes = {name: param.shape for name, param in build(config, torch.bfloat16).named_parameters()}
        found.append((shapes, {"no limit": None}.get(form, longest(config))))
    assert found[0] == found[1]
    assert found[1][1] == {"gpt2": 32, "mpt": 32, "NaN": 2048}.get(form, 128000 if "lfm2" in form else None)


def test_a_size_that_a_list_of_layers_says_is_not_missing(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.2")
    if not hasattr(transformers, "NemotronHConfig"):
        pytest.skip("transformers without Nemotron-H")
    transformers.NemotronHConfig().save_pretrained(tmp_path)  # which leaves the number of layers out
    assert load_config(str(tmp_path)).num_hidden_layers == transformers.NemotronHConfig().num_hidden_layers


def test_a_model_without_a_limit_of_positions_is_counted_with_the_default(tmp_path, capfd):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**_PLAIN, "num_hidden_layers": 1, "vocab_size": 99, "max_position_embeddings": -1}))
    assert record(capfd, path)["setup"]["seq"] == 2048
    assert record(capfd, path, "--seq", 4096)["setup"]["seq"] == 4096


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "gpt2", "vocab_size": 99, "n_layer": 2, "n_head": 4}, "'hidden_size' is missing"),
        ({**_PLAIN, "initializer_range": float("nan")}, "'initializer_range'"),
    ],
)
def test_a_number_that_a_configuration_lacks_is_told_by_its_name(values, words, tmp_path, capfd):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    code, _, err = run(capfd, "estimate", path)
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert words in err
