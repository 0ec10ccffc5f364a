"""Docstrings as Markdown: a labelled paragraph ("Moves: ...", "Error: ...") stands by itself.

In the sources the sections of a kernel's docstring follow one another without a blank line, and
their later lines are indented. Knows griffe's objects.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

LABEL = re.compile(r"^(?=[A-Z][a-z]+: )")


def as_markdown(text: str) -> str:
    """A blank line and bold letters for each label; what is indented below it goes on with it."""
    lines: list[str] = []
    labelled = False
    for line in text.splitlines():
        if LABEL.match(line):
            if lines and lines[-1]:
                lines.append("")
            label, _, rest = line.partition(": ")
            lines.append(f"**{label}.** {rest}")
            labelled = True
        elif labelled and line.startswith("    "):
            lines.append(line.strip())
        else:
            labelled = labelled and not line.strip()
            if line.startswith("|") and lines and lines[-1] and not lines[-1].startswith("|"):
                lines.append("")
            lines.append(line)
    return "\n".join(lines)


class Labels(Extension):
    """Applies `as_markdown` to what is shown."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Called for every object whose docstring was read."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
