"""Mixtures of experts: the losses of routers, biases that follow the load, the load itself, and experts without any."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from helpers.bitwise import assert_nested_equal
from helpers.expert_models import NUM_EXPERTS, SIZES, conversations, expert_config, expert_model, losses_of
from helpers.refusals import check_refused
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune.config.errors import InputError
from finetune.data.packing import Rows
from finetune.models.build import checkpoint_activations
from finetune.models.pretrained import buffer_fingerprint, fingerprint
from finetune.models.routers import find_routers, keep_biases_in_fp32
from finetune.setup.sft_prepare import SAME_RUN
from finetune.storage.resuming import check_same_run
from finetune.training.balancing import Balancing
from finetune.training.loss import IGNORED
from finetune.training.train_step import (
    Blocks,
    accumulate_gradients,
    begin_balancing,
    evaluate,
    step_batches,
    step_targets,
)

KINDS = ("mixtral", "qwen3_moe", "deepseek_v3")
LENGTHS = [[5, 7], [9], [3, 3, 4], [6]]  # of the conversations of each row
AUX, Z = 0.7, 0.05
ONE = SimpleNamespace(
    num_processes=1,
    process_index=0,
    device=torch.device("cpu"),
    distributed_type=DistributedType.NO,
    backward=lambda loss: loss.backward(),
    reduce=lambda tensor, _how: tensor,
    no_sync=lambda _model: nullcontext(),
)


def rows():
    """Four rows; the shuffled order is theirs."""
    encoded = conversations(LENGTHS)
    found = Rows([one for row in encoded for one in row], max_length=12, packing=False)
    found.rows, found._targets, found._tokens = [], [], []
    for row in encoded:
        first = sum(map(len, found.rows))
        found.rows.append(list(range(first, first + len(row))))
        found._targets.append(sum(len(one) - 2 for one in row))
        found._tokens.append(sum(map(len, row)))
    found.shuffled = lambda position: position
    return found


def recipe(**more):
    return SimpleNamespace(**({"router_aux_loss": 0.0, "router_z_loss": 0.0} | more))


def watched(model, **options):
    routers, note = find_routers(model, recipe(**options))
    assert note == ""
    return Balancing(model, routers, recipe(**options))


def take_step(model, balancing, batch_size, loss_chunk=0, data=None, position=0):
    """Gradients of one step over four rows, or as many of the data as there are in a micro-batch."""
    model.zero_grad()
    num = 1 if data else 4 // batch_size
    data = data or rows()
    if balancing:
        begin_balancing(balancing, data, ONE, position, batch_size, num)
    batches = list(step_batches(data, ONE, position, batch_size, num))
    targets = step_targets(data, ONE, position, batch_size, num)
    accumulate_gradients(ONE, model, batches, targets, loss_chunk, balancing)
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


def oracle(kind):
    """Gradients, balance loss and z-loss of all four rows in one piece, and tokens of each expert, in float64."""
    model, data, seen = expert_model(kind).double(), rows(), []
    model.set_experts_implementation("eager")  # the other one takes no float64
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _module, _args, out: seen.append((out[0], out[2])))
    batch = data.batch(range(4), ONE.device)
    targets = batch.pop("targets")
    logits = model(**batch, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    num_tokens = sum(map(sum, LENGTHS))
    both = [losses_of(kind, given.view(*targets.shape, -1), LENGTHS) for given, _ in seen]
    balance, z = (sum(parts) / (len(seen) * num_tokens) for parts in zip(*both, strict=True))
    (loss + AUX * balance + Z * z).backward()
    places = [i for i, row in enumerate(LENGTHS) for _ in range(sum(row))]
    places = [i * targets.shape[1] + places[:n].count(i) for n, i in enumerate(places)]
    counts = torch.cat([torch.bincount(chosen[places].flatten(), minlength=NUM_EXPERTS) for _, chosen in seen])
    gradients = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    return gradients, balance.item(), z.item(), counts


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_losses_of_the_papers_however_the_step_is_cut(kind):
    gradients, balance, z, counts = oracle(kind)
    model = expert_model(kind)
    balancing = watched(model, router_aux_loss=AUX, router_z_loss=Z)
    assert [router.layer for router in balancing.routers] == ([1] if kind == "deepseek_v3" else [0, 1])
    for batch_size, chunk, recomputes in ((4, 0, False), (1, 5, False), (2, 0, True)):
        if recomputes:
            checkpoint_activations(model)
        found = take_step(model, balancing, batch_size, chunk)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = (found[name].double() - gradient).norm() / gradient.norm()
            assert error < 1e-5, (name, float(error))  # at most 1.4e-6 was seen
        assert balancing.losses.tolist() == pytest.approx([balance, z], rel=1e-6)
        assert balancing.counts.tolist() == counts.tolist()


def test_without_a_loss_what_routers_give_is_left_as_it_is_and_evaluation_counts_nothing():
    model = expert_model("mixtral")
    before = take_step(model, None, 2)
    balancing = watched(model)
    assert_nested_equal(take_step(model, balancing, 2), before)
    counts = balancing.counts.clone()
    evaluate(ONE, model, rows(), 2)
    assert torch.equal(balancing.counts, counts)
    assert counts.sum() == 2 * 2 * sum(map(sum, LENGTHS))  # two layers, two experts a token


def test_the_fingerprint_of_a_run_knows_the_biases_of_its_base():
    """They are buffers, which a run with an adapter saves nowhere; runs that recorded none of them resume."""
    model = expert_model("deepseek_v3")
    saved, weights = buffer_fingerprint(model), fingerprint(model)
    assert buffer_fingerprint(model.bfloat16()) == saved
    adapted = get_peft_model(model, LoraConfig(target_modules=["o_proj"], target_parameters=["mlp.gate.weight"]))
    assert buffer_fingerprint(adapted) == saved
    model = adapted.unload().float()
    model.model.layers[1].mlp.gate.e_score_correction_bias[2] += 0.5
    changed = buffer_fingerprint(model)
    assert changed != saved
    assert fingerprint(expert_model("deepseek_v3")) == weights
    assert buffer_fingerprint(expert_model("mixtral")) is None
    facts = {"world_size": 1, "parallelism": "NO", "python": "3.11", "model": "m", "corpus": "c", "tokenizer": "t"}
    for before, now in ((facts, facts | {"buffers": changed}), (facts, facts), *[(facts | {"buffers": saved},) * 2]):
        check_same_run(SimpleNamespace(checkpoint="step", progress=lambda of=before: {"facts": of}), now, SAME_RUN)
    folder = SimpleNamespace(checkpoint="step", progress=lambda: {"facts": facts | {"buffers": saved}})
    for now in (facts | {"buffers": changed}, facts):
        with pytest.raises(InputError, match=rf"--resume: step is of another model .{saved[:12]}, .*give its --model"):
            check_same_run(folder, now, SAME_RUN)


def test_biases_move_by_the_rate_towards_the_mean_load():
    model = expert_model("deepseek_v3").bfloat16()
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.bfloat16
    routers, _ = find_routers(model, recipe())
    keep_biases_in_fp32(model, routers)
    balancing = Balancing(model, routers, recipe(router_bias_rate=0.001))
    for counts in ([4, 2, 3, 3, 0, 6], [3, 2, 3, 4, 3, 3]):  # 3 each
        balancing.counts = torch.tensor(counts)
        balancing.move_biases()
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    rate = torch.tensor(0.001)
    assert torch.equal(bias, torch.stack([-rate, rate + rate, 0 * rate, -rate, rate, -rate]))


@pytest.mark.parametrize(
    ("config", "option", "text"),
    [
        ({"model_type": "llama", **SIZES}, "--router-aux-loss", "LlamaForCausalLM has no mixture of experts; give 0"),
        (expert_config("mixtral"), "--router-bias-rate", "MixtralForCausalLM has no e_score_correction_bias; give 0"),
        (
            {"model_type": "llama4_text", **SIZES, "num_local_experts": 4, "intermediate_size_mlp": 48},
            "--router-z-loss",
            "model.layers.0.feed_forward (Llama4TextMoe) has no router that gives logits, then weights",
        ),
    ],
    ids=["dense", "no bias", "another form"],
)
def test_options_of_balancing_are_refused_where_they_would_do_nothing(pretrain, mixtures, config, option, text):
    check_refused(pretrain("--recipe", mixtures(config), option, 0.001), option, text)


@pytest.fixture
def mixtures(tmp_path, recipe_file):
    """Write the tiny recipe with another model."""

    def write(config):
        values = yaml.safe_load(recipe_file.read_text()) | {"model": config}
        (tmp_path / "experts.yaml").write_text(yaml.safe_dump(values))
        return tmp_path / "experts.yaml"

    return write


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def of_steps(run):
    """The metrics without seconds, which no two runs share."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in metrics(run)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder for one run of a mixture with biases, in bf16, that several tests look at."""
    return tmp_path_factory.mktemp("experts") / "whole"


def test_a_run_with_biases_resumes_to_the_bit(pretrain, mixtures, whole, tmp_path):
    """Biases are fp32 beside bf16 weights, and the load since the last evaluation is in the checkpoint."""
    file = mixtures(expert_config("deepseek_v3"))
    options = ("--recipe", file, "--router-bias-rate", 0.002, "--router-aux-loss", 0.01, "--dtype", "bf16")
    outcome = pretrain(*options, "--output-dir", whole)
    assert outcome.code == 0, outcome.err
    shutil.copytree(whole, tmp_path / "run")
    outcome = pretrain("--resume", tmp_path / "run" / "checkpoints" / "step-0000003")
    assert outcome.code == 0, outcome.err
    assert of_steps(tmp_path / "run") == of_steps(whole)
    model, again = (load_file(run / "model" / "model.safetensors") for run in (whole, tmp_path / "run"))
    assert_nested_equal(again, model)
    bias = model["model.layers.1.mlp.gate.e_score_correction_bias"]
    moved = bias / torch.tensor(0.002)
    assert bias.dtype == torch.float32
    assert moved.abs().max() >= 2
    assert (moved - moved.round()).abs().max() < 1e-5, "steps of the rate, forth or back"
    loaded = AutoModelForCausalLM.from_pretrained(whole / "model", dtype=torch.bfloat16)
    assert torch.equal(loaded.model.layers[1].mlp.gate.e_score_correction_bias, bias)


def test_the_load_of_experts_is_told_beside_the_loss(whole):
    """In each step 128 tokens go to 2 of 6 experts, so that shares are multiples of 1 / 256."""
    steps, result = metrics(whole), json.loads((whole / "result.json").read_text())
    for record in steps:
        least, greatest = record["expert_share_min"], record["expert_share_max"]
        assert 0 <= least < 1 / 6 < greatest <= 1 / 2
        assert (least * 256).is_integer()
        assert (greatest * 256).is_integer()
        assert 0 < record["expert_load_cv"] < 6 * (greatest - least)
        assert record["aux_loss"] == pytest.approx(1, abs=0.2)
        assert "z_loss" not in record, "it is not added"
        assert ("dead_experts" in record) == (record["val_loss"] is not None)
    for key in ("expert_load_cv", "expert_share_min", "expert_share_max", "dead_experts"):
        assert result[key] == steps[-1][key]


def test_an_expert_that_gets_no_token_is_named(pretrain, whole, tmp_path):
    shutil.copytree(whole / "model", tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.gate.e_score_correction_bias"][4] = -9
    save_file(weights, file, {"format": "pt"})
    outcome = pretrain("--init-from", tmp_path / "base", "--output-dir", "run", "--max-steps", 3, "--eval-every", 2)
    assert outcome.code == 0, outcome.err
    assert "step 2: 1 dead expert, without a token since step 0: layer 1: 4\n" in outcome.out
    assert "step 3: 1 dead expert, without a token since step 2: layer 1: 4\n" in outcome.out
    assert [m.get("dead_experts") for m in metrics(tmp_path / "run")] == [None, {"1": [4]}, {"1": [4]}]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["dead_experts"] == {"1": [4]}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("mixtral", {"router_aux_loss": 1.0}), ("deepseek_v3", {"router_bias_rate": 0.01})],
    ids=["loss", "bias"],
)
def test_with_balancing_the_load_gets_more_even(kind, options):
    """Mean coefficient of variation of steps 31 to 40: .155 with the loss, else .269; .112 with biases, else .206."""
    data = Blocks(np.random.default_rng(0).integers(1, 288, 64 * 32 + 1), 32)
    ends = []
    for chosen in ({}, options):
        model = expert_model(kind)
        balancing = watched(model, **chosen)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        variations = []
        for step in range(40):
            take_step(model, balancing, 8, data=data, position=8 * step)
            optimizer.step()
            balancing.move_biases()
            variations.append(balancing.load.add(balancing.counts.tolist())["expert_load_cv"])
        ends.append(sum(variations[-10:]) / 10)
    assert ends[1] < 0.75 * ends[0]
