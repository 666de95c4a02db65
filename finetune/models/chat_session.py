"""A trained model that answers: found in a run's folder, and asked in turns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TextStreamer, set_seed

from finetune.config.errors import InputError
from finetune.config.sft_recipe import SftRecipe
from finetune.data.messages import Message
from finetune.data.texts import ENCODING
from finetune.data.tokenize_chat import ChatEncoding
from finetune.models.merging import find_adapter, load_adapted
from finetune.models.pretrained import load_base_weights
from finetune.models.tokens import load_tokenizer
from finetune.models.weights import longest_of
from finetune.training.generation import generate_answer


class ChatSession:
    """A model and what was said to it.

    Args:
        name: for the user.
        model: causal language model, in evaluation mode.
        tokenizer: its tokenizer; with a chat template the model is asked in turns, else it goes on with a text.
        encoding: of the chat; None without a template.
        system: a system message, or None.
    """

    def __init__(
        self, name: str, model: Any, tokenizer: Any, encoding: ChatEncoding | None, system: str | None
    ) -> None:
        self.name, self.model, self.tokenizer, self.encoding = name, model, tokenizer, encoding
        self._first: list[Message] = [{"role": "system", "content": system}] if system else []
        self._turns = list(self._first)
        self.sample(256, 0.0, 0)

    def sample(self, max_tokens: int, temperature: float, seed: int) -> None:
        """Choose how answers are drawn: at most so many tokens, the likeliest ones at temperature 0."""
        set_seed(seed)
        self._max_tokens, self._temperature = max_tokens, temperature

    def say(self, text: str) -> str:
        """Print the answer to a text as it is generated, and return it. In a chat both stay for the next turn.

        A conversation that is longer than the model takes begins anew, which is said.

        Raises:
            InputError: the text alone is too long.
        """
        longest = longest_of(self.model.config) or 2**31
        turn: Message = {"role": "user", "content": text}
        turns = [*self._turns, turn]
        ids = self._encode(turns)
        if len(ids) >= longest and len(self._turns) > len(self._first):
            print(f"(the conversation is longer than the {longest:,} tokens that the model takes: it begins anew)")
            turns = [*self._first, turn]
            ids = self._encode(turns)
        if len(ids) >= longest:
            raise InputError("--prompt", f"it has {len(ids):,} tokens, and the model takes {longest:,}; shorten it")
        param = next(self.model.parameters())
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        # fp32 adapters and norms among bf16 weights need automatic mixed precision, as in training.
        with torch.autocast(param.device.type, torch.bfloat16, enabled=param.dtype == torch.bfloat16):
            max_tokens = min(self._max_tokens, longest - len(ids))
            answer = generate_answer(self.model, self.tokenizer, ids, max_tokens, self._temperature, streamer)
        self._turns = [*turns, {"role": "assistant", "content": answer}]
        return answer

    def _encode(self, turns: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation; of its last turn alone where there is no chat template."""
        if self.encoding is not None:
            return self.encoding.prompt(turns)
        ids: list[int] = self.tokenizer(turns[-1]["content"])["input_ids"]
        return ids


def open_session(path: Path, base: str | None, system: str | None) -> ChatSession:
    """Load what a run has trained: its model, also a merged one, or its adapter on the base.

    Args:
        path: folder of a run, of an adapter or of a model.
        base: where the base of an adapter lies now; None for where it was.
        system: a system message, or None.

    Raises:
        InputError: there is no model and no adapter, one cannot be loaded, or `system` is given and the tokenizer has
            no chat template.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    folder = next((f for f in (path, path / "model") if (f / "config.json").is_file()), None)
    if folder is None:
        source = find_adapter(path, base)
        model, folder = load_adapted(source, device), source.folder
    else:
        model = load_base_weights(str(folder), device, dtype="auto").eval()
    tokenizer = load_tokenizer(str(folder), "RUN")
    if not tokenizer.chat_template:
        if system:
            raise InputError("--system", f"the tokenizer of {folder} has no chat template; leave it out")
        return ChatSession(path.name, model, tokenizer, None, None)
    return ChatSession(path.name, model, tokenizer, ChatEncoding(tokenizer, date=_date(path)), system)


def _date(path: Path) -> str:
    """Return the day that the chat template saw as today in training."""
    file = next((f for f in (path / "recipe.yaml", path.parent / "recipe.yaml") if f.is_file()), None)
    values = {} if file is None else yaml.safe_load(file.read_text(encoding=ENCODING))
    return str(values.get("date") or SftRecipe.date)
