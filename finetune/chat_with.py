"""Talk to what a run trained: to a chat model in turns; a pretrained model goes on with what is typed.

    python -m finetune.chat_with runs/latest
    python -m finetune.chat_with runs/latest --prompt "What does os.path.join do?"

An adapter that was not merged is loaded on its base. An empty line or Ctrl-D ends.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: absolute imports come from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from finetune.command_line import run_script
from finetune.config.errors import InputError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("chat_with", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", metavar="RUN", help="the folder of a run, of an adapter or of a model")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this alone (default: what is typed, line by line)")
    parser.add_argument("--system", metavar="TEXT", help="a system message (default: none)")
    parser.add_argument("--base", metavar="FOLDER", help="an adapter's base, where it has moved")
    parser.add_argument("--max-tokens", type=int, metavar="N", default=256, help="of an answer (default: 256)")
    parser.add_argument(
        "--temperature", type=float, metavar="X", default=0.0, help="0 takes the likeliest token (default: 0)"
    )
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of answers above temperature 0 (default: 0)")
    return parser


def _work(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    if options.max_tokens < 1:
        raise InputError("--max-tokens", f"{options.max_tokens} must be above 0")
    if options.temperature < 0:
        raise InputError("--temperature", f"{options.temperature} must not be negative")
    from finetune.models.chat_session import ChatSession, open_session  # torch, after the options have passed

    session: ChatSession = open_session(Path(options.run).expanduser().resolve(), options.base, options.system)
    session.sample(options.max_tokens, options.temperature, options.seed)
    if options.prompt is not None:
        session.say(options.prompt)
        return 0
    print(f"{session.name}: an empty line or Ctrl-D ends", file=sys.stderr)
    while line := _next_line():
        try:
            session.say(line)
        except InputError as error:  # too long: the next line may be shorter
            print(error, file=sys.stderr)
    return 0


def _next_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chat; return the exit code: 0, 2 for bad input, told in one sentence, or 130 after Ctrl-C."""
    return run_script(lambda: _work(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
