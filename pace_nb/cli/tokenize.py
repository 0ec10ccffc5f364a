"""Show the tokens of a text: one line per token, its id and what it stands for."""

from __future__ import annotations

import argparse
import json

from pace_nb.cli import options as shared
from pace_nb.cli.text_output import TextOutput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Text, model, and the form of the answer."""
    shared.add_prompt_arguments(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--ids", action="store_true", help="only the ids, as a JSON list")
    form.add_argument("--count", action="store_true", help="only the number of tokens")
    parser.add_argument(
        "--no-special-tokens",
        "--no-bos",
        action="store_true",
        help="without the tokens that the tokenizer adds by itself",
    )
    shared.add_model_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Print the tokens."""
    from pace_nb.tokenizer import Tokenizer

    text = shared.read_prompt(options)
    tokenizer = Tokenizer.from_directory(shared.resolve_model(options))
    ids = tokenizer.encode(text, add_special_tokens=not options.no_special_tokens)
    output = TextOutput()
    if options.count:
        output.write(f"{len(ids)}\n")
    elif options.ids:
        output.write(f"{json.dumps(ids)}\n")
    else:
        for token_id in ids:
            output.write(f"{token_id:>7}  {shown(tokenizer.token_bytes(token_id))}\n")
    return 0


def shown(token: bytes) -> str:
    """A token in quotes, or its bytes where they are only a part of a character."""
    try:
        return json.dumps(token.decode("utf-8"), ensure_ascii=False)
    except UnicodeDecodeError:
        return " ".join(f"0x{byte:02X}" for byte in token)
