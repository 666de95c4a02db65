"""The screen in short: one class of each of many families; and that its command goes on after a crash and a kill."""

import sys

import pytest
import transformers

from benchmarks.robustness import routing_screen
from benchmarks.robustness.routing_screen import main, reason_of, screen, screen_one
from benchmarks.robustness.screen_record import BUILT, Row, read

TEXT = (
    "LlamaForCausalLM GPT2LMHeadModel OPTForCausalLM BloomForCausalLM FalconForCausalLM Phi3ForCausalLM "
    "XGLMForCausalLM Gemma3ForCausalLM Olmo2ForCausalLM Qwen3NextForCausalLM MixtralForCausalLM Qwen2MoeForCausalLM "
    "DeepseekV3ForCausalLM GptOssForCausalLM DbrxForCausalLM Llama4ForCausalLM JambaForCausalLM MambaForCausalLM "
    "RwkvForCausalLM BertForPreTraining BertForNextSentencePrediction RobertaForSequenceClassification "
    "DebertaV2ForTokenClassification ElectraForPreTraining IBertForSequenceClassification DPRReader "
    "T5ForConditionalGeneration BartForConditionalGeneration FSMTForConditionalGeneration XLNetForQuestionAnswering "
    "ModernBertForMaskedLM "
)
OTHERS = (
    "ViTForImageClassification DeiTForImageClassificationWithTeacher SwinForImageClassification SamModel "
    "SegformerForSemanticSegmentation DetrForObjectDetection YolosForObjectDetection VitPoseForPoseEstimation "
    "DPTForDepthEstimation ViTMAEForPreTraining Wav2Vec2ForCTC Wav2Vec2ForXVector HubertForSequenceClassification "
    "WhisperForConditionalGeneration FastSpeech2ConformerModel MusicgenForCausalLM DiaForConditionalGeneration "
    "BarkFineModel CsmForConditionalGeneration ClapModel CLIPModel LlavaForConditionalGeneration "
    "Gemma3ForConditionalGeneration Qwen2VLForConditionalGeneration Idefics2ForConditionalGeneration "
    "PerceiverForMaskedLM LayoutLMv3ForTokenClassification TimesFmModelForPrediction "
    "BlipForConditionalGeneration Blip2ForConditionalGeneration DecisionTransformerModel "
    "GroundingDinoForObjectDetection EsmFold2Model "
)


@pytest.mark.parametrize("name", (TEXT + OTHERS).split())
def test_the_second_rule_finds_nothing(name):
    cls = getattr(transformers, name)
    row = screen_one(cls.__module__, name, num_layers=2)
    assert (row.outcome, row.faults) == (BUILT, "")
    assert row.muon > 0
    assert row.lost == 0


CLASSES = """
import os
import threading
from transformers import LlamaConfig, LlamaForCausalLM


class Dies(LlamaForCausalLM):
    def __init__(self, config):
        os._exit(3)


class Raises(LlamaForCausalLM):
    def __init__(self, config):
        raise ValueError("has no | size")


class Works(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=1))


class Waits(LlamaForCausalLM):
    def __init__(self, config):
        threading.Event().wait()
"""


@pytest.fixture
def names(tmp_path, monkeypatch):
    """The module of four classes of one's own, for this process and for those that it starts."""
    (tmp_path / "screened_classes.py").write_text(CLASSES)
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *sys.path]))
    return [("screened_classes", name) for name in ("Raises", "Works", "Dies", "Waits")]


def test_a_class_that_dies_ends_itself_alone_and_the_command_goes_on(names, tmp_path, monkeypatch, capsys):
    """Its row says so; rows that are there are not made again, and not taken for those of other sources."""
    monkeypatch.setattr(routing_screen, "all_classes", lambda: iter([Row("other", "*", "needs timm"), *names[:3]]))
    record = tmp_path / "screen.csv"
    assert main(["--record", str(record)]) == 0
    first, rows = read(record)
    assert first == routing_screen.about()
    assert {row.name: row.outcome for row in rows} == {
        "*": "needs timm",
        "Raises": "ValueError: has no | size",
        "Works": BUILT,
        "Dies": "ends its process with status 3",
    }
    works = next(row for row in rows if row.name == "Works")
    assert (works.muon, works.adamw) == (7, 5)
    written = record.with_suffix(".md").read_text()
    assert "| built on the meta device at default widths, of 8 layers | 1 |" in written
    assert "| ValueError: has no / size | 1 | Raises |" in written

    record.write_text("".join(line for line in record.read_text().splitlines(True) if ",Raises," not in line))
    monkeypatch.setattr(routing_screen, "screen", lambda classes: [Row(*entry, "again") for entry in classes])
    assert main(["--record", str(record)]) == 0
    assert [row.name for row in read(record)[1] if row.outcome == "again"] == ["Raises"]

    monkeypatch.setattr(routing_screen, "about", lambda: "# other sources")
    assert main(["--record", str(record)]) == 2
    assert "give --again or another --record" in capsys.readouterr().out


def test_a_process_is_started_again_behind_the_class_that_ended_it(monkeypatch):
    def ends_at_the_second(classes):
        return iter([Row(*entry, "here") for entry in classes[:2]])

    monkeypatch.setattr(routing_screen, "run_child", ends_at_the_second)
    classes = [("module", str(index)) for index in range(5)]
    assert [row.name for row in screen(classes)] == ["0", "1", "2", "3", "4"]


def test_a_class_that_takes_too_long_is_left_behind(names, monkeypatch):
    monkeypatch.setattr(routing_screen, "SECONDS", 1)
    (row,) = screen(names[3:])
    assert row.outcome == "takes more than 1 s"


def test_reasons_are_the_same_for_all_classes_of_a_kind():
    assert reason_of(ImportError("TimmBackbone requires the timm library but it was not found")) == "needs timm"
    assert reason_of(ModuleNotFoundError("No module named 'torchaudio'")) == "needs torchaudio"
