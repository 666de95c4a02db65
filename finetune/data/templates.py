"""Chat templates with {% generation %} markers, for families whose own templates have none.

A template of these is used only where it renders a conversation to exactly the text that the model's own template
gives, so nothing here can change what a model reads; tool calls, which these leave out, never match. One exception is
named in `rendering`: a system turn that the own template loses.
"""

from __future__ import annotations

from typing import Any

_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
"""


def _chatml(default_system: str) -> str:
    """Return a ChatML template that writes this system turn where a conversation has none."""
    opening = f"<|im_start|>system\\n{default_system}<|im_end|>\\n"
    return "{%- if messages[0]['role'] != 'system' %}{{- '" + opening + "' }}{%- endif %}\n" + _CHATML


# Qwen3 drops the thoughts of answers before the last question, and gives an answer after it a block of thoughts, if
# only an empty one.
_QWEN3 = """\
{%- set found = namespace(last=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set response = message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>') %}
    {%- if found.searching and message.role == 'user' and not response %}
        {%- set found.searching = false %}
        {%- set found.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set thoughts, answer = '', message.content %}
        {%- if '</think>' in answer %}
            {%- set thoughts = answer.split('</think>')[0].rstrip('\\n').split('<think>')[-1].strip('\\n') %}
            {%- set answer = answer.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- generation %}
        {%- if loop.index0 > found.last and (loop.last or thoughts) %}
            {{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' + answer.lstrip('\\n') }}
        {%- else %}
            {{- answer }}
        {%- endif %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
"""

_LLAMA3_TURNS = """\
{%- for message in turns %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content']|trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content']|trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
"""

_LLAMA3 = "{{- bos_token }}{%- set turns = messages %}\n" + _LLAMA3_TURNS

# Llama 3.1, 3.2 and 3.3 always write a system turn, with today's date.
_LLAMA31 = (
    """\
{{- bos_token }}
{%- set has_system = messages[0]['role'] == 'system' %}
{%- set turns = messages[1:] if has_system else messages %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n' }}
{{- 'Today Date: ' + date_string + '\\n\\n' }}
{%- if has_system %}{{- messages[0]['content']|trim }}{%- endif %}
{{- '<|eot_id|>' }}
"""
    + _LLAMA3_TURNS
)


def _mistral(before_ask: str, before_answer: str, trim: str = "") -> str:
    """Return one of Mistral's templates, which differ in spaces.

    The system turn is at the head of the last user turn, where the model reads it when it answers that turn. Mistral's
    own templates look for that place in the last *message*, and so lose the system turn as soon as an answer follows.
    """
    return f"""\
{{%- set has_system = messages[0]['role'] == 'system' %}}
{{%- set turns = messages[1:] if has_system else messages %}}
{{%- set last = namespace(user=0) %}}
{{%- for message in turns %}}
    {{%- if message['role'] == 'user' %}}{{%- set last.user = loop.index0 %}}{{%- endif %}}
{{%- endfor %}}
{{{{- bos_token }}}}
{{%- for message in turns %}}
    {{%- if message['role'] == 'user' %}}
        {{{{- '[INST]{before_ask}' }}}}
        {{%- if has_system and loop.index0 == last.user %}}{{{{- messages[0]['content'] + '\\n\\n' }}}}{{%- endif %}}
        {{{{- message['content'] + '[/INST]' }}}}
    {{%- else %}}
        {{%- generation %}}{{{{- '{before_answer}' + message['content']{trim} + eos_token }}}}{{%- endgeneration %}}
    {{%- endif %}}
{{%- endfor %}}
"""


# Templates that are given by name, where the tokenizer has none of that name.
BUILT_IN = {
    "chatml": _CHATML + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n",
}
TRAINING_TEMPLATES = {
    "ChatML": _CHATML,
    "SmolLM2": _chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "Qwen2": _chatml("You are a helpful assistant."),
    "Qwen2.5": _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "Qwen3": _QWEN3,
    "Llama-3": _LLAMA3,
    "Llama-3.1": _LLAMA31,
    "Mistral": _mistral(" ", " ", "|trim"),
    "Ministral": _mistral("", " ", "|trim"),
    "Mistral-Nemo": _mistral("", ""),
}


def trl_template(tokenizer: Any) -> str | None:
    """Return TRL's training template for this tokenizer's own, where TRL is installed and has one."""
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ImportError:
        return None
    try:
        text: str | None = get_training_chat_template(tokenizer)
    except Exception:  # a template that it does not know, or that fails in its trials
        return None
    return text
