"""Bases: a GGUF file becomes an ordinary folder once; NF4 keeps its dtypes; recipes fit their models."""

from __future__ import annotations

import json
import sys
import types

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.config.errors import InputError
from finetune.models.pretrained import find_base, fingerprint, resized_base
from finetune.models.tokens import cache_root

BLOCK = 32  # elements per scale of Q8_0


def permuted(weight, num_heads):
    """Rows of a query or key matrix as llama.cpp stores them: halves of the rotary dimension interleaved."""
    rows, cols = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name):
    name = name.replace("model.embed_tokens", "token_embd").replace("model.norm", "output_norm")
    name = name.replace("model.layers.", "blk.")
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def write_gguf(file, base, leave_out="nothing"):
    """The tiny Llama as llama.cpp would store it: matrices in Q8_0, vectors in fp32, a byte-level BPE; without the
    weights whose names have `leave_out`."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    added = set(tokenizer.get_added_vocab())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in added else gguf.TokenType.NORMAL for t in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    kept = ((name, param) for name, param in model.named_parameters() if leave_out not in name)
    for name, param in kept:
        array = param.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            array = permuted(array, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if array.ndim == 1:
            writer.add_tensor(gguf_name(name), array)
        else:
            packed = gguf.quants.quantize(np.ascontiguousarray(array), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def gguf_file(chat_base, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", chat_base)


def test_a_gguf_becomes_an_ordinary_folder_with_its_weights_once(gguf_file, chat_base, capfd):
    folder = find_base(str(gguf_file))
    assert "dequantizing" in capfd.readouterr().out
    original, loaded = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (chat_base, folder))
    expected = dict(original.named_parameters())
    for name, param in loaded.named_parameters():
        value = expected[name].detach().numpy().astype(np.float64)
        bound = np.abs(value) * 2.0**-8  # bf16, and the fp16 of the scale, which is finer
        if value.ndim == 2:  # half a code step of Q8_0, whose scale is the block's maximum over 127
            blocks = np.abs(value).reshape(len(value), -1, BLOCK).max(-1) / 127
            bound = bound + np.repeat(0.51 * blocks, BLOCK, axis=1)
        assert (np.abs(param.detach().numpy() - value) <= bound + 1e-9).all(), name
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(chat_base)
    turns = [{"role": "user", "content": "abcd fgij?"}, {"role": "assistant", "content": "fgij"}]
    assert ours.apply_chat_template(turns)["input_ids"] == theirs.apply_chat_template(turns)["input_ids"]
    assert find_base(str(gguf_file)) == folder
    assert "dequantizing" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny-00001-of-00002.gguf", ["part 1 of 2 of a split GGUF", "--merge"]),
        ("renamed.gguf", ["missing model.layers.1.", "and 8 more", "renamed.gguf"]),
    ],
)
def test_a_part_of_a_gguf_is_refused_before_anything_is_cached(chat_base, tmp_path, name, words):
    """Its missing layers would be random."""
    write_gguf(tmp_path / name, chat_base, leave_out="layers.1.")
    before = sorted(cache_root().rglob("*"))
    for _ in range(2):
        with pytest.raises(InputError) as caught:
            find_base(str(tmp_path / name))
        assert caught.value.args[0] == "--model"
        assert all(word in str(caught.value) for word in words), caught.value
    assert sorted(cache_root().rglob("*")) == before


@pytest.mark.parametrize("mode", ["full", "lora", "qlora"])
def test_a_gguf_is_tuned_in_every_mode(sft, gguf_file, tmp_path, mode, monkeypatch):
    """Also named by the package that brings it."""
    package = types.ModuleType("brings_a_model")
    package.__spec__ = types.SimpleNamespace(submodule_search_locations=[str(gguf_file.parent)])
    monkeypatch.setitem(sys.modules, "brings_a_model", package)
    options = ["--model", "package:brings_a_model", "--mode", mode, "--max-steps", 2, "--output-dir", "run"]
    outcome = sft(*options, *(["--merge"] if mode == "qlora" else []))
    assert outcome.code == 0, outcome.err
    if mode == "lora":
        config = (tmp_path / "run" / "adapter" / "adapter_config.json").read_text()
        assert str(cache_root()) in config  # plain peft finds the base there
    else:
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def test_fingerprint_tells_bases_of_the_same_shapes_apart(chat_base):
    one, other = (AutoModelForCausalLM.from_pretrained(chat_base) for _ in range(2))
    assert fingerprint(one) == fingerprint(other)
    with torch.no_grad():
        other.model.norm.weight[3] += 1e-3
    assert fingerprint(one) != fingerprint(other)


@pytest.fixture
def enlarged(chat_base, tmp_path):
    """The tiny base, by default with a tied head, whose tokenizer has three tokens more than it has embeddings."""

    def make(tied=True, dtype=torch.float32):
        model = AutoModelForCausalLM.from_pretrained(chat_base, tie_word_embeddings=tied, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(chat_base)
        tokenizer.add_tokens([f"<more{i}>" for i in range(3)])
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / "base")
        return tmp_path / "base", model, tokenizer

    return make


@pytest.mark.parametrize(("tied", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_added_tokens_get_the_mean_embedding_and_the_rest_is_kept_to_the_bit(enlarged, tied, dtype):
    base, model, tokenizer = enlarged(tied, dtype)
    folder = resized_base(str(base), tokenizer)
    resized = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    num = model.config.vocab_size
    before, after = model.state_dict(), resized.state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name][: len(weight)], weight), name
        is_end = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert len(after[name]) == len(weight) + (3 if is_end else 0)
        if is_end:
            mean = torch.from_numpy(weight.double().numpy().mean(0)).to(dtype)
            assert torch.equal(after[name][num:], mean.expand(3, -1))
    assert resized.config.vocab_size == len(tokenizer) == len(AutoTokenizer.from_pretrained(folder)) == num + 3
    assert (resized.lm_head.weight is resized.model.embed_tokens.weight) == tied
    assert resized_base(str(base), tokenizer) == folder


def test_a_tokenizer_that_is_too_large_is_refused_or_its_model_is_resized(sft, enlarged, tmp_path):
    base, model, _ = enlarged()
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"prompt": f"abcd {i}?", "completion": f"<more{i % 3}> {i}"}) + "\n" for i in range(12))
    )
    options = ["--model", base, "--dataset", "chats.jsonl", "--num-answers", 0, "--max-steps", 3, "--output-dir", "run"]
    refused = sft(*options)
    num = model.config.vocab_size
    sizes = f"--model: its tokenizer has {num + 3} tokens and the model's vocab_size is {num}; give --resize-embeddings"
    assert (refused.code, sizes in refused.err) == (2, True), refused.err
    assert "--model-config" not in refused.err
    done = sft(*options, "--resize-embeddings")
    assert done.code == 0, done.err
    assert "note: the embeddings that --resize-embeddings added are the mean of the others, and an adapter" in done.out
    named = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), tmp_path / "run" / "adapter")
    assert AutoModelForCausalLM.from_pretrained(named).config.vocab_size == num + 3
    refused = sft("--resume", "run", "--max-steps", 4, "--no-resize-embeddings")
    assert (refused.code, "--resize-embeddings: " in refused.err) == (2, True), refused.err
    assert sft("--resume", "run", "--max-steps", 4).code == 0


def test_the_built_in_template_needs_its_token(sft, enlarged):
    base, _, _ = enlarged()
    for file in base.iterdir():
        if file.suffix == ".json":
            file.write_text(file.read_text().replace("<|im_end|>", "<|finish|>"))
    refused = sft("--model", base, "--resize-embeddings", "--chat-template", "chatml", "--preview", 1)
    assert "--chat-template: chatml ends turns with <|im_end|>, and the tokenizer has no such token" in refused.err
    shown = sft("--model", base, "--resize-embeddings", "--chat-template", "tulu", "--preview", 1)
    assert (shown.code, "<|finish|>]]" in shown.out) == (0, True), shown
