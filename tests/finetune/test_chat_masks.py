"""Masks of assistant tokens against marked texts, written by hand: what stands between @( and )@ carries loss."""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.chat_tokenizers import make_tokenizer, template_text

from finetune.config.errors import InputError
from finetune.data.messages import Example
from finetune.data.packing import collate
from finetune.data.row_formats import example_from_row
from finetune.data.tokenize_chat import ChatEncoding, encode_examples
from finetune.setup.sft_data import read_template

DATE = "2024-07-26"
SYSTEM = ("system", "You are terse.")
ASK = ("user", "What is the capital of France?")
TURNS = [ASK, ("assistant", "Paris."), ("user", "And 2 + 2?"), ("assistant", "4, caf\u00e9 \U0001f600\ntoday")]

CHATML = (
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n@(Paris.<|im_end|>)@\n"
    "<|im_start|>user\nAnd 2 + 2?<|im_end|>\n<|im_start|>assistant\n@(4, caf\u00e9 \U0001f600\ntoday<|im_end|>)@\n"
)
TERSE = "<|im_start|>system\nYou are terse.<|im_end|>\n"
SMOL = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
# Qwen3 writes an empty block of thoughts in front of the answer to the last question.
QWEN3 = CHATML.replace("@(4", "@(<think>\n\n</think>\n\n4")
LLAMA3 = (
    "<|start_header_id|>user<|end_header_id|>\n\nWhat is the capital of France?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n@(Paris.<|eot_id|>)@"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd 2 + 2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n@(4, caf\u00e9 \U0001f600\ntoday<|eot_id|>)@"
)
LLAMA32_SYSTEM = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
)
MISTRAL = (
    "<s>[INST] What is the capital of France?[/INST]@( Paris.</s>)@"
    "[INST] And 2 + 2?[/INST]@( 4, caf\u00e9 \U0001f600\ntoday</s>)@"
)
ORACLE = {
    "chatml": (CHATML, TERSE + CHATML),
    "smollm2": (SMOL + CHATML, TERSE + CHATML),
    "qwen3": (QWEN3, TERSE + QWEN3),
    "llama3": (
        "<|begin_of_text|>" + LLAMA3,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are terse.<|eot_id|>" + LLAMA3,
    ),
    "llama32": (LLAMA32_SYSTEM + "<|eot_id|>" + LLAMA3, LLAMA32_SYSTEM + "You are terse.<|eot_id|>" + LLAMA3),
    # Where Mistral reads the system turn: at the head of the last user turn.
    "mistral": (MISTRAL, MISTRAL.replace("And", "You are terse.\n\nAnd")),
}


def conversation(*turns, first_answer=0, where="row 7 of some.jsonl"):
    return Example(tuple({"role": r, "content": c} for r, c in turns), where, first_answer)


def encode(example, tokenizer, max_length=999, drop_truncated=False, **more):
    encoding = ChatEncoding(tokenizer, date=DATE, **more)
    return encode_examples([example], encoding, max_length=max_length, drop_truncated=drop_truncated)


def assert_marked(encoded, tokenizer, marked):
    """Ids and mask equal those of the marked text, whose pieces are tokenized one by one."""
    ids, targets = [], []
    for number, piece in enumerate(re.split(r"@\(|\)@", marked)):
        piece_ids = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += piece_ids
        targets += [number % 2 == 1] * len(piece_ids)
    assert tokenizer.decode(encoded.input_ids) == tokenizer.decode(ids)
    assert encoded.input_ids.tolist() == ids
    assert encoded.targets.tolist() == targets


@pytest.mark.parametrize("with_system", [False, True])
@pytest.mark.parametrize("family", sorted(ORACLE))
def test_mask_of_several_turns_equals_the_marked_text(family, with_system):
    tokenizer = make_tokenizer(family)
    result = encode(conversation(*([SYSTEM] if with_system else []), *TURNS), tokenizer)
    assert_marked(result.rows[0], tokenizer, ORACLE[family][with_system])
    assert result.sources == {"shipped": 1}
    assert result.num_truncated == 0


@pytest.mark.parametrize("family", sorted(ORACLE))
def test_one_turn_with_the_last_answer_alone_and_as_a_completion(family):
    """Of a longer conversation, `last` and a prompt of messages mark the last stretch only."""
    tokenizer = make_tokenizer(family)
    before, _, last = ORACLE[family][0].rpartition("@(")
    marked = before.replace("@(", "").replace(")@", "") + "@(" + last
    assert_marked(encode(conversation(*TURNS), tokenizer, turns="last").rows[0], tokenizer, marked)
    assert_marked(encode(conversation(*TURNS, first_answer=2), tokenizer).rows[0], tokenizer, marked)


def test_sentencepiece_words_keep_their_space_in_the_answer():
    tokenizer = make_tokenizer("mistral", metaspace=True)
    turns = [(role, content.replace("caf\u00e9 \U0001f600\n", "")) for role, content in TURNS]
    marked = ORACLE["mistral"][0].replace("caf\u00e9 \U0001f600\n", "")
    row = encode(conversation(*turns), tokenizer).rows[0]
    assert_marked(row, tokenizer, marked)
    assert tokenizer.convert_ids_to_tokens(int(row.input_ids[row.targets][0])).startswith("\u2581")


def test_thoughts_of_qwen3_are_learned_after_the_last_question_only():
    tokenizer = make_tokenizer("qwen3")
    turns = [
        ASK,
        ("assistant", "<think>\nhm\n</think>\n\nParis."),
        ("user", "Sure?"),
        ("assistant", "<think>\nso\n</think>\n\nYes."),
    ]
    with pytest.raises(InputError, match=r"changes an answer of row 7 .*: of message 2, '<think>.*--turns last"):
        encode(conversation(*turns), tokenizer)
    row = encode(conversation(*turns), tokenizer, turns="last").rows[0]
    assert tokenizer.decode(row.input_ids[row.targets]) == "<think>\nso\n</think>\n\nYes.<|im_end|>"
    text = tokenizer.decode(row.input_ids)
    assert "hm" not in text
    assert "Paris." in text


R1 = (
    "{% for m in messages %}{% set c = m.content.split('</think>')[-1] if m.role == 'assistant' else m.content %}"
    "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("marked", [False, True])
def test_an_answer_that_the_template_changes_is_refused_if_it_is_learned(marked):
    template = R1
    if marked:
        template = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content.split('</think>')"
        template += "[-1] }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    tokenizer = make_tokenizer("chatml")
    thoughtful = [ASK, ("assistant", "<think>a city</think>Paris.")]
    with pytest.raises(InputError) as caught:
        encode(conversation(*thoughtful), tokenizer, chat_template=template)
    assert str(caught.value) == (
        "--chat-template: the chat template changes an answer of row 7 of some.jsonl: of message 2, "
        "'<think>a city</think>Paris.', it leaves something out; give a template that writes all of it"
    )
    later = conversation(*thoughtful, ("user", "And 2 + 2?"), ("assistant", "4."))
    row = encode(later, tokenizer, chat_template=template, turns="last").rows[0]
    assert tokenizer.decode(row.input_ids[row.targets]) == "4.<|im_end|>"
    masked = Example(later.messages, later.where, masked=frozenset({1}))
    row = encode(masked, tokenizer, chat_template=template).rows[0]
    assert tokenizer.decode(row.input_ids[row.targets]) == "4.<|im_end|>"


def test_space_that_a_template_trims_or_adds_changes_no_answer():
    """And what opens an answer may stand in the prompt."""
    tokenizer = make_tokenizer("qwen3")
    row = encode(conversation(ASK, ("assistant", "  <think>so</think>Yes.\n")), tokenizer).rows[0]
    assert tokenizer.decode(row.input_ids[row.targets]) == "<think>\nso\n</think>\n\nYes.\n<|im_end|>"
    opened = UNKNOWN.replace("<|im_start|>assistant:", "<|im_start|>assistant: <think>")
    row = encode(conversation(ASK, ("assistant", "<think>so</think>Yes.")), tokenizer, chat_template=opened).rows[0]
    assert tokenizer.decode(row.input_ids[row.targets]) == "so</think>Yes.<|im_end|>"


@pytest.mark.parametrize("family", sorted(ORACLE))
def test_a_turn_of_weight_0_is_read_and_not_learned(family):
    tokenizer = make_tokenizer(family)
    before, _, last = ORACLE[family][0].rpartition("@(")
    marked = before.replace("@(", "").replace(")@", "") + "@(" + last
    example = conversation(*TURNS)
    assert_marked(
        encode(Example(example.messages, "a row", masked=frozenset({1})), tokenizer).rows[0], tokenizer, marked
    )


@pytest.mark.parametrize("role", ["developer", "tool"])
def test_turns_of_other_roles_are_read_where_the_template_writes_them(role):
    turns = [(role, "Be terse."), *TURNS[:2]]
    tokenizer = make_tokenizer("chatml")
    marked = f"<|im_start|>{role}\nBe terse.<|im_end|>\n" + CHATML[: CHATML.index(")@\n") + 3]
    assert_marked(encode(conversation(*turns), tokenizer).rows[0], tokenizer, marked)
    without = UNKNOWN.replace("in messages %}", "in messages if m.role in ('user', 'assistant') %}")
    with pytest.raises(InputError, match=f"leaves out the {role} turn of row 7"):
        encode(conversation(*turns), tokenizer, chat_template=without)


WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}
CALL = {"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}


def tool_row(**more):
    asked = {"role": "user", "content": "What is it like?"}
    turns = [asked, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    turns += [{"role": "tool", "name": "weather", "content": "sunny"}, {"role": "assistant", "content": "Sunny."}]
    return {"messages": turns, "tools": json.dumps([WEATHER]), **more}


def test_tools_and_their_calls_go_to_the_template():
    tokenizer = make_tokenizer("qwen3")
    example = example_from_row(tool_row(), "row 7")
    row = encode(example, tokenizer, turns="last").rows[0]
    text = tokenizer.decode(row.input_ids)
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in text
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>' in text
    assert "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>" in text
    assert tokenizer.decode(row.input_ids[row.targets]) == "<think>\n\n</think>\n\nSunny.<|im_end|>"
    prompt = ChatEncoding(tokenizer, date=DATE).prompt(example.messages[:1], example.tools)
    assert tokenizer.decode(prompt) == text[: text.index("<|im_start|>assistant\n") + len("<|im_start|>assistant\n")]
    call = example_from_row({**tool_row(), "messages": tool_row()["messages"][:2]}, "row 7")
    row = encode(call, tokenizer).rows[0]
    learned = tokenizer.decode(row.input_ids[row.targets])
    assert learned.endswith('<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>')


CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content | tojson if m.role == 'tool' else m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + '(' + ARGUMENTS + ')' }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_content_and_arguments_may_be_written_as_json_and_not_left_out():
    turns = tool_row()["messages"]
    turns[1]["tool_calls"] = [{"function": {"name": "weather", "arguments": {"city": ['Pa"r\nis']}}}]
    turns[2]["content"] = 'sun "and"\nwind'
    example = example_from_row({"messages": turns}, "row 7")
    tokenizer = make_tokenizer("chatml")
    template = CALLS.replace("ARGUMENTS", "c.function.arguments | tojson")
    row = encode(example, tokenizer, chat_template=template).rows[0]
    learned = tokenizer.decode(row.input_ids[row.targets])
    assert learned == 'weather({"city": ["Pa\\"r\\nis"]})<|im_end|>Sunny.<|im_end|>'
    with pytest.raises(InputError, match=r"changes an answer of row 7: of message 2, 'Pa\"r\\nis', it leaves"):
        encode(example, tokenizer, chat_template=CALLS.replace("ARGUMENTS", "''"))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (tool_row(), "leaves out the tool 'weather' of row 7"),
        (tool_row(tools=None), "changes an answer of row 7: of message 2, 'weather'"),
    ],
)
def test_tools_and_calls_that_the_template_leaves_out_are_refused(row, words):
    with pytest.raises(InputError, match=words):
        encode(example_from_row(row, "row 7"), make_tokenizer("chatml"))


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral"])
def test_end_of_turn_is_a_target_where_pad_equals_it(family):
    """Padded with the very token that ends a turn, each answer still has to predict it, and padding nothing."""
    tokenizer = make_tokenizer(family)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    short, long = (encode(conversation(*turns), tokenizer).rows[0] for turns in (TURNS[:2], TURNS))
    batch = collate([[short], [long]], torch.device("cpu"), pad_id=tokenizer.pad_token_id)
    assert batch["input_ids"].shape == (2, len(long))
    ends = (batch["targets"] == tokenizer.eos_token_id).sum(1).tolist()
    assert ends == [1, 2]
    assert (batch["targets"][0, len(short) - 1 :] == -100).all()


def test_the_date_is_the_recipes_and_not_todays():
    """`strftime_now` is fixed in every format, `date_string` too; with the original both would say today."""
    template = (
        "{{ strftime_now('%Y-%m-%d, %A %-d %B %y, %H:%M') }} {{ date_string }}"
        "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    encoding = ChatEncoding(make_tokenizer("chatml"), date="2023-02-04", chat_template=template)
    text = encoding.template.render(conversation(ASK).messages, "a test")
    assert text.startswith("2023-02-04, Saturday 4 February 23, 00:00 04 Feb 2023What")


MARKED = """{% for m in messages %}{% if m.role == 'assistant' %}
{% generation %}A: {{ m.content + '<|im_end|>' }}
{% endgeneration %}{% else %}Q: {{ m.content }}
{% endif %}{% endfor %}"""


def test_own_markers_are_taken_as_they_are():
    """Even the line end that this template's author put inside."""
    tokenizer = make_tokenizer("chatml")
    result = encode(conversation(*TURNS), tokenizer, chat_template=MARKED)
    row = result.rows[0]
    assert tokenizer.decode(row.input_ids[row.targets]) == (
        "A: Paris.<|im_end|>\nA: 4, caf\u00e9 \U0001f600\ntoday<|im_end|>\n"
    )
    assert result.sources == {"markers": 1}


def test_end_of_text_behind_the_markers_is_a_target():
    template = MARKED.replace(" + '<|im_end|>' }}\n{% endgeneration %}", " }}{% endgeneration %}<|im_end|>\n")
    tokenizer = make_tokenizer("chatml")
    row = encode(conversation(*TURNS[:2]), tokenizer, chat_template=template).rows[0]
    assert tokenizer.decode(row.input_ids[row.targets]) == "A: Paris.<|im_end|>"


UNKNOWN = """{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content + '<|im_end|>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"""


def test_an_unknown_template_that_keeps_prefixes_gives_differences():
    """The answer begins behind the generation prompt, and the line end behind the turn is no target."""
    tokenizer = make_tokenizer("chatml")
    result = encode(conversation(SYSTEM, *TURNS), tokenizer, chat_template=UNKNOWN)
    assert_marked(
        result.rows[0],
        tokenizer,
        "<|im_start|>system: You are terse.<|im_end|>\n<|im_start|>user: What is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant:@( Paris.<|im_end|>)@\n<|im_start|>user: And 2 + 2?<|im_end|>\n"
        "<|im_start|>assistant:@( 4, caf\u00e9 \U0001f600\ntoday<|im_end|>)@\n",
    )
    assert result.sources == {"prefix": 1}


@pytest.fixture
def encode_with_trl(monkeypatch):
    """Encode by a template of a tokenizer for which TRL has this training template."""

    def run(own, trls, *turns):
        tokenizer = make_tokenizer("chatml")
        monkeypatch.setattr(tokenizer, "chat_template", own)
        monkeypatch.setitem(sys.modules, "trl", SimpleNamespace())
        module = SimpleNamespace(get_training_chat_template=lambda _: trls)
        monkeypatch.setitem(sys.modules, "trl.chat_template_utils", module)
        return encode(conversation(*turns), tokenizer)

    return run


def test_trls_template_serves_where_it_says_the_same(encode_with_trl):
    """The own template changes earlier turns, so it has no prefix; TRL's is taken for its markers."""
    own = "{% for m in messages %}{{ messages|length ~ m.role }}\n\n{{ m.content }}{{ eos_token }}{% endfor %}"
    marks = "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    same = own.replace("{{ m.content }}{{ eos_token }}", marks)  # the user's turns as well, to tell it from others
    result = encode_with_trl(own, same, *TURNS[:2])
    assert result.sources == {"trl": 1}
    marked = f"2user\n\n@({ASK[1]}<|im_end|>)@2assistant\n\n@(Paris.<|im_end|>)@"
    assert_marked(result.rows[0], make_tokenizer("chatml"), marked)
    for useless in (same.replace("~ m.role", "~ m.role|upper"), None):
        with pytest.raises(InputError, match="cannot be told from the rest"):
            encode_with_trl(own, useless, *TURNS[:2])
    with pytest.raises(InputError, match="leaves out the system turn of row 7"):
        encode_with_trl(*(t.replace("in messages", "in messages[1:]") for t in (own, same)), SYSTEM, *TURNS)


NO_END = UNKNOWN.replace("<|im_end|>", "")
THINKING = UNKNOWN.replace("assistant:' }}", "assistant: <think>' }}")
WITHOUT_FIRST = "in messages[1:]"
ALL = [SYSTEM, *TURNS]
BAD = [
    (NO_END, ALL, "--chat-template", "row 7 of some.jsonl ends without an end-of-turn token"),
    (THINKING, ALL, "--chat-template", "the answers of row 7 of some.jsonl cannot be told"),
    (
        UNKNOWN.replace("in messages", WITHOUT_FIRST),
        ALL,
        "--chat-template",
        "leaves out the system turn of row 7 of so",
    ),
    (MARKED.replace("in messages", WITHOUT_FIRST), ALL, "--chat-template", "leaves out the system turn of row 7 of so"),
    (MARKED.replace("'assistant'", "'robot'"), ALL, "--chat-template", "no token of row 7 of some.jsonl"),
    (
        UNKNOWN + "{{ '' if add_generation_prompt else '<|im_end|>' }}",
        ALL,
        "--chat-template",
        "of row 7 of some.jsonl cannot",
    ),
    (
        template_text("mistral").replace("[INST]", "[INST]:"),
        ALL,
        "--chat-template",
        "leaves out the system turn of row 7",
    ),
    (MARKED + "{% oops", ALL, "--chat-template", "no valid template"),
    (template_text("mistral"), [ASK, ASK, TURNS[1]], "--dataset", "refuses row 7 of some.jsonl: After the optional"),
    (
        UNKNOWN + "{{ messages[0].content.split('#')[1] + 1 }}",
        [("user", "a#b"), TURNS[1]],
        "--chat-template",
        "fails at row 7 of some.jsonl: TypeError: ",
    ),
    (
        UNKNOWN + "{{ messages[9].content.upper() }}",
        ALL,
        "--dataset",
        "refuses row 7 of some.jsonl: ",
    ),
    (MARKED + "{{ '\ud83d' }}", ALL, "--chat-template", "fails at row 7 of some.jsonl: it writes half of a character"),
    (
        MARKED + "{{ 1 // (messages|length - 5) }}",
        [SYSTEM, *TURNS],
        "--chat-template",
        "fails at row 7 of some.jsonl: ZeroDivisionError: ",
    ),
]


@pytest.mark.parametrize(("template", "turns", "option", "words"), BAD)
def test_a_template_that_cannot_serve_is_refused_in_one_sentence(template, turns, option, words):
    with pytest.raises(InputError) as caught:
        encode(conversation(*turns), make_tokenizer("chatml"), chat_template=template)
    assert caught.value.args[0] == option
    assert words in str(caught.value)


def test_tokens_of_spaces_alone_belong_to_the_side_that_they_stand_on():
    """Byte-level tokenizers report them without width, at their end."""
    tokenizer = make_tokenizer("chatml")
    template = MARKED.replace("A: {{", "{{").replace("Q: {{ m.content }}", "{{ m.content }}")
    turns = [("user", "capital   "), ("assistant", "   \n   today  ")]
    row = encode(conversation(*turns), tokenizer, chat_template=template.replace("}}\n{% endif", "}}{% endif")).rows[0]
    tokens = [tokenizer.decode([i]) for i in row.input_ids[row.targets]]
    assert any(not token.strip(" ") for token in tokens)
    assert "".join(tokens) == "   \n   today  <|im_end|>\n"


def test_the_first_token_is_no_target_even_of_an_answer():
    """Nothing predicts it, so it must not be counted either."""
    tokenizer = make_tokenizer("chatml")
    result = encode(conversation(("assistant", "Paris."), *TURNS[2:]), tokenizer, chat_template=MARKED)
    assert result.rows[0].targets[:3].tolist() == [False, True, True]
    batch = collate([result.rows], torch.device("cpu"))
    assert int((batch["targets"] != -100).sum()) == result.num_targets


def test_turns_that_cannot_be_told_apart_are_refused():
    template = MARKED.replace("A: ", "A: {% endgeneration %}{% generation %}")
    with pytest.raises(InputError, match="marks 4 stretches for the 2 assistant turns of row 7"):
        encode(conversation(*TURNS), make_tokenizer("chatml"), chat_template=template, turns="last")


def test_a_tokenizer_without_a_template_and_a_bad_date_are_refused(monkeypatch):
    tokenizer = make_tokenizer("chatml")
    with pytest.raises(InputError, match=r"--date: '26 Jul' is no day"):
        ChatEncoding(tokenizer, date="26 Jul")
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(InputError, match="has no chat template; give tulu, chatml or a Jinja file as --chat-template"):
        ChatEncoding(tokenizer, date=DATE)


def test_of_several_templates_one_is_named_or_the_default(monkeypatch):
    tokenizer = make_tokenizer("chatml")
    own = tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", {"default": own, "rag": MARKED})
    assert encode(conversation(*TURNS), tokenizer).sources == {"shipped": 1}
    assert encode(conversation(*TURNS), tokenizer, chat_template="rag").sources == {"markers": 1}
    assert read_template("rag", tokenizer.chat_template) == MARKED
    assert read_template("chatml", {"chatml": MARKED}) == MARKED  # the tokenizer's goes before the built-in one
    with pytest.raises(InputError, match=r"--chat-template: there is no file rug, .* templates are default, rag; give"):
        read_template("rug", tokenizer.chat_template)
    with pytest.raises(InputError, match=r"--chat-template: there is no file rug, and the tokenizer has a single"):
        read_template("rug", own)
    monkeypatch.setattr(tokenizer, "chat_template", {"tools": own, "rag": MARKED})
    with pytest.raises(InputError, match=r"--chat-template: the tokenizer has several, and no default; .* rag, tools"):
        encode(conversation(*TURNS), tokenizer)


def test_the_built_in_template_and_those_of_recipes_are_taken_by_name():
    """The built-in one writes what the common template writes, and marks the answers itself."""
    tokenizer = make_tokenizer("chatml")
    result = encode(conversation(SYSTEM, *TURNS), tokenizer, chat_template=read_template("chatml", None))
    assert_marked(result.rows[0], tokenizer, TERSE + CHATML)
    assert result.sources == {"markers": 1}
    encoding = ChatEncoding(tokenizer, date=DATE, chat_template=read_template("chatml", None))
    prompt = tokenizer.decode(encoding.prompt(conversation(ASK).messages))
    assert prompt == CHATML[: CHATML.index("@(")]
    tulu = encode(conversation(*TURNS[:2]), make_tokenizer("llama3"), chat_template=read_template("tulu", None)).rows[0]
    assert make_tokenizer("llama3").decode(tulu.input_ids[tulu.targets]) == "Paris.<|eot_id|>"
    with pytest.raises(InputError, match=r"no file rug, .* without a name; give one of chatml, tulu, or a file"):
        read_template("rug", None)


def test_truncation_keeps_the_beginning_and_is_counted():
    tokenizer = make_tokenizer("chatml")
    whole = encode(conversation(*TURNS), tokenizer)
    length, first = len(whole.rows[0]), int(np.flatnonzero(whole.rows[0].targets)[0])
    assert (whole.num_truncated, whole.num_tokens_cut, whole.num_tokens) == (0, 0, length)
    cut = encode(conversation(*TURNS), tokenizer, max_length=first + 2)
    assert (cut.num_truncated, cut.num_tokens_cut, cut.num_dropped) == (1, length - first - 2, 0)
    assert cut.rows[0].input_ids.tolist() == whole.rows[0].input_ids[: first + 2].tolist()
    assert cut.num_targets == 2
    assert f"1 truncated to {first + 2}, {length - first - 2} tokens cut off, 0 left out" in str(cut)


def test_a_row_that_loses_its_whole_answer_is_refused_or_left_out_and_counted():
    tokenizer = make_tokenizer("chatml")
    first = int(np.flatnonzero(encode(conversation(*TURNS), tokenizer).rows[0].targets)[0])
    with pytest.raises(InputError, match=rf"--seq-len: row 7 of some.jsonl has \d+ tokens, and its first {first} "):
        encode(conversation(*TURNS), tokenizer, max_length=first)
    encoding = ChatEncoding(tokenizer, date=DATE)
    both = [conversation(*TURNS), conversation(("user", "Hi"), ("assistant", "Ho"))]
    kept = encode_examples(both, encoding, max_length=first, drop_truncated=True)
    assert (len(kept.rows), kept.num_dropped, kept.num_truncated) == (1, 1, 1)
    with pytest.raises(InputError, match="--seq-len: no conversation keeps"):
        encode_examples(both[:1], encoding, max_length=first, drop_truncated=True)


@pytest.mark.parametrize("family", sorted(ORACLE))
def test_a_prompt_ends_where_the_answer_would_begin(family):
    tokenizer = make_tokenizer(family)
    encoding = ChatEncoding(tokenizer, date=DATE)
    ids = encoding.prompt(conversation(ASK).messages)
    row = encode_examples([conversation(*TURNS[:2])], encoding, max_length=999).rows[0]
    assert row.input_ids[: len(ids)].tolist() == ids
    assert int(np.flatnonzero(row.targets)[0]) == len(ids)
