"""The second rule finds what was put in a wrong place by hand, and nothing in a place that is right."""

import re

import pytest
import torch
import transformers
from torch import nn

from benchmarks.robustness.model_classes import build
from benchmarks.robustness.second_rule import Placed, faults, lost

SWIN_TABLE = "swin.encoder.layers.0.blocks.0.attention.relative_position_bias.relative_position_bias_table"
# class of transformers; one of its parameters, in wrong hands; what the second rule calls it
PLANTED = (
    ("LlamaForCausalLM", "model.embed_tokens.weight", "embedding"),
    ("LlamaForCausalLM", "lm_head.weight", "output"),
    ("LlamaForCausalLM", "model.norm.weight", "1-D"),
    ("GPT2LMHeadModel", "transformer.wpe.weight", "embedding"),
    ("GPT2LMHeadModel", "lm_head.weight", "output"),  # tied: under its second name
    ("GPT2ForSequenceClassification", "score.weight", "vocabulary or labels"),
    ("T5ForConditionalGeneration", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "embedding"),
    ("MixtralForCausalLM", "model.layers.0.mlp.gate.weight", "router"),
    ("GptOssForCausalLM", "model.layers.0.mlp.router.weight", "router"),
    ("GptOssForCausalLM", "model.layers.0.mlp.experts.down_proj_bias", "bias"),
    ("Qwen2MoeForCausalLM", "model.layers.0.mlp.shared_expert_gate.weight", "one row or column"),
    ("BertForNextSentencePrediction", "cls.seq_relationship.weight", "may be an output"),
    ("IBertForSequenceClassification", "ibert.embeddings.word_embeddings.weight", "vocabulary or labels"),
    ("ViTForImageClassification", "classifier.weight", "vocabulary or labels"),
    ("ViTForImageClassification", "vit.embeddings.patch_embeddings.projection.weight", "convolution"),
    ("ViTForImageClassification", "vit.embeddings.position_embeddings", "table or latent"),
    ("SwinForImageClassification", SWIN_TABLE, "table or latent"),
    ("SamModel", "vision_encoder.layers.0.attn.rel_pos_h", "table or latent"),
    ("Blip2ForConditionalGeneration", "query_tokens", "table or latent"),
    ("DFineForObjectDetection", "model.enc_score_head.weight", "vocabulary or labels"),
    ("FSMTForConditionalGeneration", "model.decoder.output_projection.weight", "vocabulary or labels"),
    ("DiaForConditionalGeneration", "logits_dense.weight", "vocabulary or labels"),  # nine codebooks in one
    ("Wav2Vec2ForXVector", "objective.weight", "vocabulary or labels"),  # labels in its columns
    ("FastSpeech2ConformerModel", "encoder.conformer_layers.0.self_attn.pos_bias_u", "table or latent"),
    ("ZambaForCausalLM", "model.layers.0.mamba.D", "element by element"),
    ("MambaForCausalLM", "backbone.layers.0.mixer.A_log", "element by element"),
)


@pytest.mark.parametrize(("name", "planted", "kind"), PLANTED)
def test_a_planted_error_is_found(name, planted, kind):
    """Of a model whose parameters all went to AdamW, but one."""
    model = build(getattr(transformers, name), None if name.startswith("Zamba") else 2)
    names = [parameter for parameter, _ in model.named_parameters(remove_duplicate=False)]
    assert planted in names
    placed = dict.fromkeys(names, Placed("adamw", False))
    assert faults(model, placed) == []
    (fault,) = faults(model, {planted: Placed("muon", True)})
    assert kind in fault.kind
    assert model.get_parameter(fault.name) is model.get_parameter(planted)


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("ViTForImageClassification", "vit.embeddings.position_embeddings"),
        ("Blip2ForConditionalGeneration", "query_tokens"),
        ("ZambaForCausalLM", "model.layers.0.mamba.D"),
        ("GptOssForCausalLM", "model.layers.0.mlp.experts.down_proj_bias"),
        ("LlamaForCausalLM", "model.norm.weight"),
    ],
)
def test_decay_of_what_must_not_decay_is_found(name, planted):
    model = build(getattr(transformers, name), None if name.startswith("Zamba") else 2)
    assert faults(model, {planted: Placed("adamw", False)}) == []
    (fault,) = faults(model, {planted: Placed("adamw", True)})
    assert fault.kind.startswith("decayed")


def test_a_bare_matrix_and_a_last_linear_must_be_flagged():
    model = build(transformers.Gemma3ForConditionalGeneration, 2)
    name = "model.multi_modal_projector.mm_input_projection_weight"
    assert [fault.kind for fault in faults(model, {name: Placed("muon", True)})] == ["bare"]
    assert faults(model, {name: Placed("muon", True, is_flagged=True)}) == []


def test_hidden_matrices_are_no_faults_and_are_missed_where_adamw_has_them():
    """All matrices of numbered layers of a Llama, stacked experts of a Mixtral."""
    model = build(transformers.LlamaForCausalLM, 2)
    hidden = [name for name, param in model.named_parameters() if ".layers." in name and param.ndim == 2]
    assert len(hidden) == 2 * 7
    assert faults(model, dict.fromkeys(hidden, Placed("muon", True))) == []
    assert lost(model, dict.fromkeys(hidden, Placed("adamw", True))) == hidden
    model = build(transformers.MixtralForCausalLM, 2)
    stacks = [name for name, param in model.named_parameters() if param.ndim == 3]
    assert len(stacks) == 2 * 2
    assert faults(model, dict.fromkeys(stacks, Placed("muon", True))) == []


def test_a_model_without_config_is_looked_at_by_its_modules():
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(99, 32), nn.Linear(32, 64), nn.Conv1d(1, 8, 3), nn.Linear(64, 1))
    placed = {name: Placed("muon", True) for name, param in model.named_parameters() if param.ndim > 1}
    found = {re.sub(r"\D", "", fault.name): fault.kind for fault in faults(model, placed)}
    assert found == {"0": "embedding", "2": "convolution", "3": "one row or column"}
