"""Describe a model from its config.json and the headers of its weight files; reads no weight."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pace_nb.cli import options as shared

if TYPE_CHECKING:
    from pace_nb.models.hub import ModelFacts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model."""
    shared.add_model_arguments(parser, positional=True)


def run(options: argparse.Namespace) -> int:
    """Print one fact per line."""
    from pace_nb.models import hub

    facts = hub.show(options.model, options.revision, options.hf_token, options.offline or None)
    for name, value in described(facts):
        print(f"{name:<13} {value}")
    return 0


def described(facts: ModelFacts) -> Iterator[tuple[str, str]]:
    """(name, value) of what is known; a fact that config.json does not give is left out."""
    yield "name", facts.name
    yield "directory", str(facts.directory)
    support = "supported" if facts.is_supported else "NOT supported"
    yield "architecture", f"{facts.architecture or 'not given'} ({support})"
    yield "parameters", f"{facts.num_parameters:,} in {facts.num_tensors} tensors"
    files = f"{facts.num_files} file{'s' * (facts.num_files != 1)}"
    yield "weights", f"{facts.nbytes / 1e6:,.1f} MB in {files}, {' and '.join(facts.dtypes)}"
    for name, value in (
        ("context", facts.context_length),
        ("vocabulary", facts.vocab_size),
        ("hidden size", facts.hidden_size),
        ("layers", facts.num_hidden_layers),
        ("heads", facts.num_attention_heads),
        ("KV heads", facts.num_key_value_heads),
    ):
        if value is not None:
            yield name, f"{value:,}"
