"""List the models in the local Hugging Face cache that have weights this engine can read."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to print."""
    parser.add_argument("--paths", action="store_true", help="print the directories as well")


def run(options: argparse.Namespace) -> int:
    """Print one line per downloaded snapshot: name, size, revision."""
    from pace_nb.models import hub

    models = hub.list_cached()
    if not models:
        sys.stderr.write("no models in the cache; pace-nb pull OWNER/NAME downloads one\n")
    width = max((len(model.name) for model in models), default=0)
    for model in models:
        revision = ",".join(model.refs) or model.revision[:12]
        line = f"{model.name:<{width}}  {model.nbytes / 1e9:7.2f} GB  {revision}"
        print(f"{line}  {model.directory}" if options.paths else line)
    return 0
