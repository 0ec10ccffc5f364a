"""Download a model from the Hugging Face hub into the local cache, and print its directory."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to download."""
    parser.add_argument("model", metavar="MODEL", help="name on the hub: owner/name")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--hf-token", metavar="TOKEN", help="for gated models (HF_TOKEN is safer)")


def run(options: argparse.Namespace) -> int:
    """Download what is missing; print the directory."""
    from pace_nb.models import hub

    print(hub.resolve(options.model, options.revision, options.hf_token))
    return 0
