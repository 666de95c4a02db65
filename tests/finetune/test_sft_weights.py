"""Pretrained weights are loaded whole or refused, and of a model that takes images the text part is trained."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from helpers.finetune_chat import make_base, make_tokenizer
from helpers.refusals import check_refused
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from finetune.config.errors import InputError
from finetune.config.recipe import recipe_from
from finetune.models.build import model_config
from finetune.models.pretrained import load_base_weights
from finetune.models.weights import beside_text, load_whole, longest_of
from finetune.parallel.launch import load_device

NORM, HEAD = "model.norm.weight", "lm_head.weight"
LAYERS = ("model.layers.0.", "model.layers.1.")


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A base whose head has weights of its own."""
    return make_base(tmp_path_factory.mktemp("untied") / "base", tie_word_embeddings=False)


def without(name):
    return lambda weights: {key: value for key, value in weights.items() if name not in key}


CHANGES = {
    "a norm": (without(NORM), ["missing model.norm.weight;"]),
    "a head": (without(HEAD), ["missing lm_head.weight;"]),
    "a layer": (without(LAYERS[1]), ["missing model.layers.1.", "and 8 more"]),
    "a prefix": (
        lambda weights: {f"module.{key}": value for key, value in weights.items()},
        ["missing lm_head.weight and 20 more", "unexpected module.lm_head.weight and 20 more"],
    ),
    "another part": (lambda weights: {**weights, "score.weight": torch.ones(2, 64)}, ["unexpected score.weight;"]),
    "another shape": (lambda weights: {**weights, NORM: torch.ones(63)}, [f"of another shape {NORM};"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_do_not_fit_are_named(untied, tmp_path, change):
    changed, words = CHANGES[change]
    shutil.copytree(untied, tmp_path / "base")
    weights = load_file(untied / "model.safetensors")
    save_file(changed(weights), tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        load_base_weights(str(tmp_path / "base"), dtype=torch.float32)
    assert caught.value.args[0] == "--model"
    for word in (*words, "does not hold the weights of LlamaForCausalLM", "give a whole checkpoint"):
        assert word in str(caught.value)


def test_what_is_rightly_not_in_a_checkpoint_or_more_is_no_fault(untied, chat_base, tmp_path):
    """A tied head is saved once; earlier versions saved tables of positions, which are buffers now."""
    assert HEAD not in load_file(chat_base / "model.safetensors")
    load_base_weights(str(chat_base), dtype=torch.float32)
    shutil.copytree(untied, tmp_path / "base")
    weights = load_file(untied / "model.safetensors")
    tables = {f"{layer}self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in LAYERS}
    save_file({**weights, **tables}, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    model = load_base_weights(str(tmp_path / "base"), dtype=torch.float32)
    assert all(torch.equal(param, weights[name]) for name, param in model.named_parameters())


@pytest.mark.parametrize("damage", ["no second file", "cut second file", "emptied index", "no index"])
def test_an_incomplete_sharded_checkpoint_is_refused(untied, tmp_path, damage):
    AutoModelForCausalLM.from_pretrained(untied).save_pretrained(tmp_path / "base", max_shard_size="200KB")
    first, second, *_ = sorted((tmp_path / "base").glob("*.safetensors"))
    index = tmp_path / "base" / "model.safetensors.index.json"
    assert load_base_weights(str(tmp_path / "base"), dtype=torch.float32).num_parameters() > 0
    if damage == "no second file":
        second.unlink()
    elif damage == "cut second file":
        second.write_bytes(second.read_bytes()[:-100])
    elif damage == "no index":
        index.unlink()
    else:
        record = json.loads(index.read_text())
        record["weight_map"] = {key: file for key, file in record["weight_map"].items() if file == first.name}
        index.write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"--model: .*base"):
        load_base_weights(str(tmp_path / "base"), dtype=torch.float32)


def test_both_scripts_refuse_and_write_nothing(sft, pretrain, untied, tmp_path):
    shutil.copytree(untied, tmp_path / "base")
    weights = load_file(untied / "model.safetensors")
    save_file(without(NORM)(weights), tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    check_refused(sft("--model", "base", "--output-dir", "run"), "--model", f"missing {NORM}")
    refused = pretrain("--init-from", tmp_path / "base", "--output-dir", "run")
    check_refused(refused, "--init-from", f"missing {NORM}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 14}


def save_gemma(folder):
    tokenizer = make_tokenizer()
    text = {**TEXT, "vocab_size": len(tokenizer), "head_dim": 8, "sliding_window": 32}
    tokens = {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7, "mm_tokens_per_image": 4}
    config = Gemma3Config(text_config=text, vision_config=VISION, **tokens)
    return save(folder, Gemma3ForConditionalGeneration, config, tokenizer)


def save_llava(folder):
    tokenizer = make_tokenizer()
    text = {**TEXT, "model_type": "llama", "vocab_size": len(tokenizer)}
    vision = {**VISION, "model_type": "clip_vision_model", "projection_dim": 32}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    return save(folder, LlavaForConditionalGeneration, config, tokenizer)


def save(folder, kind, config, tokenizer):
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return kind


@pytest.mark.parametrize("save", [save_gemma, save_llava])
def test_the_text_part_of_a_model_with_images_is_trained_and_the_rest_is_kept(sft, tmp_path, save):
    kind = save(tmp_path / "base")
    options = ["--model", "base", "--max-steps", 2, "--num-answers", 1]
    done = sft(*options, "--mode", "full", "--output-dir", "full")
    assert done.code == 0, done.err
    assert "the text part alone is trained; model.vision_tower, model.multi_modal_projector are saved" in done.out
    before, after = (kind.from_pretrained(tmp_path / path).state_dict() for path in ("base", "full/model"))
    beside = {name for name in before if "vision" in name or "multi_modal" in name}
    assert len(beside) > 10
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not changed & beside
    assert {name for name in before if "self_attn.q_proj.weight" in name} - beside <= changed
    done = sft(*options, "--packing", "--output-dir", "lora")
    assert done.code == 0, done.err
    adapted = load_file(tmp_path / "lora" / "adapter" / "adapter_model.safetensors")
    assert len(adapted) == 2 * 2 * 7  # A and B of seven matrices in two layers
    assert all("language_model.layers" in name for name in adapted)


def test_sizes_are_those_of_the_text_part(sft, tmp_path):
    save_gemma(tmp_path / "base")
    refused = sft("--model", "base", "--seq-len", 129, "--output-dir", "run")
    check_refused(refused, "--seq-len", "max_position_embeddings 128")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    recipe = recipe_from({"name": "x", "model": config, "seq_len": 128}, "a test")
    new = model_config(recipe)
    assert (new.model_type, new.vocab_size) == ("gemma3_text", config["text_config"]["vocab_size"])
    assert beside_text(AutoModelForCausalLM.from_config(new)) == []
    with pytest.raises(InputError, match="--seq-len: 129 exceeds the model's max_position_embeddings 128"):
        model_config(recipe_from({"name": "x", "model": config, "seq_len": 129}, "a test"))
    endless = {"model_type": "llama", **TEXT, "max_position_embeddings": -1, "vocab_size": 300}
    assert longest_of(model_config(recipe_from({"name": "x", "model": endless, "seq_len": 512}, "a test"))) is None


def test_a_model_that_does_not_take_text_alone_is_one_sentence(sft, tmp_path, monkeypatch):
    save_gemma(tmp_path / "base")
    forward = Gemma3ForConditionalGeneration.forward

    def wants_types(self, *args, token_type_ids=None, **kwargs):
        if self.training and token_type_ids is None:
            raise ValueError("`token_type_ids` are required in training")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Gemma3ForConditionalGeneration, "forward", wants_types)
    refused = sft("--model", "base", "--output-dir", "run")
    check_refused(refused, "--model", "does not take text alone", "`token_type_ids` are required")


def test_a_weight_that_transformers_cannot_read_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff")
    with pytest.raises(InputError, match="--init-from: transformers cannot read"):
        load_whole(AutoModelForCausalLM, tmp_path, "--init-from")


@pytest.mark.parametrize(("device", "expected"), [(None, None), ("cpu", None), ("cuda:1", "cuda:1")])
def test_weights_go_to_an_accelerator_without_a_copy_on_the_host(device, expected):
    """As transformers and Accelerate understand a device map of one device; a CPU is left to them as before."""
    given = {}

    class Kind:
        @staticmethod
        def from_pretrained(_source, **options):
            given.update(options)
            raise OSError("no weights")

    with pytest.raises(InputError, match="no weights"):
        load_whole(Kind, "base", "--model", None if device is None else torch.device(device), dtype=torch.float32)
    assert given.get("device_map") == (None if expected is None else {"": torch.device(expected)})


def test_every_process_loads_to_its_device_but_where_parameters_are_to_be_sharded():
    for kind, expected in ((DistributedType.MULTI_GPU, "cuda:1"), (DistributedType.FSDP, "cpu")):
        accelerator = SimpleNamespace(distributed_type=kind, device=torch.device("cuda:1"))
        assert load_device(accelerator) == torch.device(expected)
