"""The parser of every command line here: sections, defaults, the nearest name for a slip; and progress."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from typing import IO, Any, NoReturn

from .errors import UsageError

# What other trainers call our options, without dashes; close spellings are found by difflib.
OTHER_NAMES = {
    "learning_rate": "lr",
    "optim": "optimizer",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "gradient_checkpointing": "activation_checkpointing",
    "max_seq_length": "seq_len",
    "max_seq_len": "seq_len",
    "block_len": "seq_len",
    "num_train_epochs": "epochs",
    "max_grad_norm": "clip",
    "model_name_or_path": "model",
    "lora_r": "lora_rank",
    "lr_scheduler_type": "schedule",
    "save_steps": "save_every",
    "eval_steps": "eval_every",
    "report_to": "tracker",
    "bf16": "mixed_precision",
}


def nearest(name: str, known: Collection[str]) -> str | None:
    """Return the known name that `name` was most likely meant to be, or None.

    Args:
        name: an option such as `--lora-rnak`, or a key such as `lora_rnak`.
        known: options or keys of the same form.
    """
    plain = {word.lstrip("-").replace("-", "_"): word for word in known}
    key = name.lstrip("-").replace("-", "_").lower()
    if OTHER_NAMES.get(key) in plain:
        return plain[OTHER_NAMES[key]]
    close = get_close_matches(key, plain, n=1, cutoff=0.6)
    inside = [word for word in plain if key and word.endswith(f"_{key}")]
    return plain[close[0]] if close else plain[inside[0]] if inside else None


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Appends the default to the help of an option whose text does not say it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if (
            text is None
            or not action.option_strings
            or "default" in text
            or (action.nargs == 0 and action.dest in _ASKS)
        ):
            return text
        default = action.default
        if default is argparse.SUPPRESS or default is None:
            return text
        return f"{text} (default: {'off' if default is False else default})"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Return `--name VALUE` once; aliases stand in the help text."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[0]} {value}"


# Options that print something and end: they have no default.
_ASKS = ("help", "version")


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises UsageError instead of printing its usage and leaving.

    No option is abbreviated. An unknown one is told with the nearest that there is.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": _HelpFormatter, **options, "allow_abbrev": False})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse, and refuse what is left over.

        Raises:
            UsageError: by `error`.
        """
        parsed, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(self._unknown(rest))
        return parsed, rest

    def _unknown(self, rest: Sequence[str]) -> str:
        word = rest[0].split("=")[0]
        if not word.startswith("-"):
            return f"{word!r} belongs to no option"
        close = nearest(word, [option for option in self._option_string_actions if option.startswith("--")])
        return f"there is no option {word}" + (f"; did you mean {close}?" if close else "")

    def error(self, message: str) -> NoReturn:
        """Raise UsageError in place of argparse's exit."""
        end = "" if message.endswith("?") else ";"
        raise UsageError(f"{self.prog}: {message}{end} see {self.prog} --help")


class Progress:
    """Shows one line that changes on a terminal; elsewhere writes lines, once the command has taken `PATIENCE` s.

    Args:
        file: where to.
        clock: seconds.
    """

    PATIENCE = 5.0

    def __init__(self, file: IO[str] = sys.stderr, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._clock = file, clock
        self._started = clock()

    def tell(self, text: str) -> None:
        """Show what comes next."""
        if self._file.isatty():
            self._file.write(f"\r\x1b[K{text} ...")
            self._file.flush()
        elif self._clock() - self._started >= self.PATIENCE:
            print(f"{self._clock() - self._started:.0f} s: {text} ...", file=self._file, flush=True)

    def clear(self) -> None:
        """Take the line off the terminal."""
        if self._file.isatty():
            self._file.write("\r\x1b[K")
            self._file.flush()
