"""Two ranks agree when to stop, whether a save failed, which checkpoint is whole; FSDP2 is the same training."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from helpers import finetune_ranks
from helpers.architectures import TINY
from helpers.bitwise import assert_nested_equal
from helpers.expert_models import expert_config
from helpers.ranks import start_processes
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune.models.build import parameter_hash

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def call_ranks(work, folder, *args):
    """Run `work` on two ranks; what each call of the script returned and printed: [call][rank]."""
    (folder / "calls").mkdir(parents=True)
    start_processes(work, (folder, *args), finetune_ranks.WORLD)
    num_calls = len(list((folder / "calls").glob("*.0.json")))
    return [
        [json.loads((folder / "calls" / f"{call}.{rank}.json").read_text()) for rank in range(finetune_ranks.WORLD)]
        for call in range(num_calls)
    ]


def result(run):
    return json.loads((run / "result.json").read_text())


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def saved(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def codes(call):
    return [rank["code"] for rank in call]


def check_equal_training(run, expected):
    """The same losses and gradient norms, summed in another order."""
    one, two = metrics(expected), metrics(run)
    assert [m["tokens"] for m in one] == [m["tokens"] for m in two]
    for key in ("loss", "grad_norm"):
        assert two[0][key] == pytest.approx(one[0][key], rel=1e-5)
        assert [m[key] for m in two] == pytest.approx([m[key] for m in one], rel=1e-3)
    assert two[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=1e-3)


@pytest.fixture
def mixture(tmp_path, recipe_file):
    """A recipe of a mixture with biases, four steps long."""
    values = yaml.safe_load(recipe_file.read_text()) | {"model": expert_config("deepseek_v3"), "max_steps": 4}
    file = tmp_path / "experts.yaml"
    file.write_text(yaml.safe_dump(values | {"save_every": 2, "warmup_steps": 1}))
    return file


def check_equal_balancing(run, expected):
    """The tokens of all ranks, and the biases of one process; the losses of routers summed in another order."""
    check_equal_training(run, expected)
    one, two = metrics(expected), metrics(run)
    for key in ("expert_load_cv", "expert_share_min", "expert_share_max"):
        assert [m[key] for m in two] == pytest.approx([m[key] for m in one], rel=1e-12)
    for key in ("aux_loss", "z_loss"):
        assert [m[key] for m in two] == pytest.approx([m[key] for m in one], rel=1e-4)
    found, oracle = (load_file(folder / "model" / "model.safetensors")[BIAS] for folder in (run, expected))
    assert oracle.abs().max() > 0
    assert torch.equal(found, oracle)


def test_what_one_rank_alone_knows_stops_or_fails_or_skips_on_both(tmp_path, recipe_file, mixture, pretrain):
    calls = call_ranks(finetune_ranks.replicated, tmp_path, str(recipe_file), str(mixture))
    whole, chunked, experts, refused, staged, timed_out, stopped, full, resumed = calls
    assert codes(whole) == [0, 0]
    assert result(tmp_path / "whole")["world_size"] == 2
    assert codes(chunked) == [0, 0], chunked
    check_equal_training(tmp_path / "chunked", tmp_path / "whole")
    assert codes(experts) == [0, 0], experts
    options = map(str, finetune_ranks.BALANCED)
    assert pretrain("--recipe", mixture, *options, "--output-dir", "one", "--gradient-accumulation", 2).code == 0
    check_equal_balancing(tmp_path / "experts", tmp_path / "one")
    assert codes(refused) == [2, 2]
    assert "--release-gradients: here are 2 processes" in refused[0]["err"]
    assert codes(staged) == [2, 2]
    assert "--state-device: here are 2 processes" in staged[0]["err"]
    assert codes(timed_out) == [124, 124]
    assert "torchrun --nproc_per_node 2" in timed_out[0]["out"]
    assert codes(stopped) == [143, 143]
    assert "at step 1\n" in stopped[0]["out"]
    assert codes(full) == [1, 1]
    assert "cannot save a checkpoint" in full[0]["err"]
    assert codes(resumed) == [0, 0], resumed
    assert "skipped the checkpoint" in resumed[0]["out"]
    assert "step-0000002: random_states_1.pkl does not match its SHA-256" in resumed[0]["out"]
    assert "at step 1\n" in resumed[0]["out"]
    assert saved(tmp_path / "run") == [f"step-000000{step}" for step in range(1, 7)]
    hashes = result(tmp_path / "run")["parameter_hashes"]
    assert hashes == result(tmp_path / "whole")["parameter_hashes"]
    assert len(hashes) == 2
    assert len(set(hashes)) == 1
    checkpoint = tmp_path / "run" / "checkpoints" / "step-0000006"
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert_nested_equal(load_file(checkpoint / "model.safetensors"), weights)  # named as in one process
    groups = torch.load(checkpoint / "optimizer.bin")["param_groups"]
    assert sorted(name for group in groups for name in group["param_names"]) == sorted(weights)


@pytest.mark.parametrize(("optimizer", "architecture"), [("adamw", None), ("muon8bit", "mla_moe")])
def test_a_run_sharded_by_fsdp2_saves_resumes_and_ends_as_one_process_does(
    tmp_path, recipe_file, mixture, pretrain, optimizer, architecture
):
    """The losses of one process with twice the micro-batches are the oracle; one of two saves, or resumes, compiled."""
    recipe, is_balanced = recipe_file, architecture is not None
    if architecture:  # latent attention, a dense layer and one of stacked experts with a shared one, by a rule of width
        recipe, written = tmp_path / "architecture.yaml", yaml.safe_load(recipe_file.read_text())
        scaled = {"model": TINY[architecture], "width": 64, "scaling": "spectral"}
        recipe.write_text(yaml.safe_dump({**written, **scaled}))
    args = (tmp_path, str(recipe), optimizer, str(mixture) if is_balanced else None)
    *calls, bad = call_ranks(finetune_ranks.sharded, *args)
    whole, first, resumed, refused, unclipped, widened, chunked, *balanced = calls
    assert codes(whole) == codes(first) == codes(resumed) == [0, 0], (whole, first, resumed)
    alone = ("--recipe", recipe, "--optimizer", optimizer, "--gradient-accumulation", 2)
    assert pretrain("--output-dir", "one", *alone).code == 0
    check_equal_training(tmp_path / "whole", tmp_path / "one")
    assert codes(chunked) == [0, 0], chunked
    check_equal_training(tmp_path / "chunked", tmp_path / "one")
    if is_balanced:
        assert [codes(call) for call in balanced] == [[0, 0]] * 2, balanced
        options = (*finetune_ranks.BALANCED, "--gradient-accumulation", 2)
        assert pretrain("--recipe", mixture, *options, "--output-dir", "one-experts").code == 0
        check_equal_balancing(tmp_path / "experts", tmp_path / "one-experts")
        again, run = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("again", "experts"))
        assert_nested_equal(again, run)
    hashes = result(tmp_path / "whole")["parameter_hashes"]
    assert result(tmp_path / "whole")["parallelism"] == "FSDP"
    assert hashes[0] == hashes[1] == parameter_hash(AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model"))
    assert "step-0000006: optimizer_0/__1_0.distcp does not match its SHA-256" in resumed[0]["out"]
    assert "at step 3\n" in resumed[0]["out"]
    assert result(tmp_path / "run")["parameter_hashes"] == hashes
    assert codes(refused) == [2, 2]
    assert "--optimizer: muon does not run on FSDP2" in refused[0]["err"]
    assert codes(unclipped) == [2, 2]
    assert "--clip-matrix-norm: FSDP2 shards" in unclipped[0]["err"]
    assert codes(widened) == [2, 2]
    assert "--dtype: FSDP2 with mixed precision would make bf16 weights fp32" in widened[0]["err"]
    assert codes(bad) == [1, 1]
    assert "the gradient of model.layers.0.mlp.up_proj.weight is not finite" in bad[0]["err"]


def test_under_fsdp2_the_main_process_alone_loads_and_the_run_is_the_one_that_all_load_for(
    tmp_path, recipe_file, chat_base, chats
):
    """To the bit, with dropout and tied weights; a failure to load ends both processes with the cause."""
    values = yaml.safe_load(recipe_file.read_text())
    values["model"] |= {"tie_word_embeddings": True, "attention_dropout": 0.1}
    recipe, broken = tmp_path / "tied.yaml", tmp_path / "broken_base"
    recipe.write_text(yaml.safe_dump(values))
    shutil.copytree(chat_base, broken)
    weights = load_file(chat_base / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    folder = tmp_path / "ranks"
    args = (folder, str(recipe), str(chat_base), str(broken), str(chats))
    refused, *calls = call_ranks(finetune_ranks.loaded_once, *args)
    assert codes(refused) == [2, 2]
    assert "broken_base does not hold the weights of LlamaForCausalLM: missing model.norm.weight" in refused[0]["err"]
    assert [codes(call) for call in calls] == [[0, 0]] * 4, calls
    for kind in ("pretrain", "sft"):
        once, everywhere = (folder / f"{kind}-{name}" for name in ("once", "everywhere"))
        assert result(once)["parameter_hashes"] == result(everywhere)["parameter_hashes"]
        assert [m["loss"] for m in metrics(once)] == [m["loss"] for m in metrics(everywhere)]
        assert metrics(once)[-1]["val_loss"] == metrics(everywhere)[-1]["val_loss"]
        for run in (once, everywhere):  # a tied head is saved once, as one process does
            AutoModelForCausalLM.from_pretrained(run / "model", dtype="auto").save_pretrained(folder / "plain")
            whole, plain = (load_file(at / "model.safetensors") for at in (run / "model", folder / "plain"))
            assert_nested_equal(whole, plain)
            assert kind == "sft" or "lm_head.weight" not in whole
