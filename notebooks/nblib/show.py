"""Text beneath a cell: tables and the boxed takeaway, as HTML for pages and as plain text.

Knows how rows become a table. Knows nothing of what they mean.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

# Opaque, with its own text colour: the same on a light page and on a dark one.
_BOX = (
    "background:#fff8e1;color:#1a1a1a;border-left:6px solid #b26a00;"
    "padding:0.7em 1em;margin:0.6em 0;font-size:1.05em"
)


class Table:
    """Rows of text under headers; the first column is aligned left, the others right."""

    def __init__(
        self, headers: Sequence[str], rows: Sequence[Sequence[object]], caption: str = ""
    ) -> None:
        self.headers = [str(h) for h in headers]
        self.rows = [[str(value) for value in row] for row in rows]
        self.caption = caption
        for row in self.rows:
            if len(row) != len(self.headers):
                raise ValueError(f"table: row {row} has {len(row)} of {len(self.headers)} columns")

    def __repr__(self) -> str:
        lines = [self.headers, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.headers))]

        def text(line: list[str]) -> str:
            first = line[0].ljust(widths[0])
            rest = [v.rjust(w) for v, w in zip(line[1:], widths[1:], strict=True)]
            return "  ".join([first, *rest]).rstrip()

        ruler = "  ".join("-" * w for w in widths)
        body = [text(self.headers), ruler, *(text(row) for row in self.rows)]
        return "\n".join(body + ([self.caption] if self.caption else []))

    def _repr_html_(self) -> str:
        def line(values: list[str], tag: str) -> str:
            cells = [
                f'<{tag} style="text-align:{"right" if i else "left"}">{html.escape(v)}</{tag}>'
                for i, v in enumerate(values)
            ]
            return f"<tr>{''.join(cells)}</tr>"

        rows = "".join(line(row, "td") for row in self.rows)
        note = f"<p><small>{html.escape(self.caption)}</small></p>" if self.caption else ""
        head = line(self.headers, "th")
        return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>{note}"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> Table:
    """A table of anything: `table(["array", "bytes"], [["x", 2 * M * K]])`, values by `str`."""
    return Table(headers, rows, caption)


class _Takeaway:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"Takeaway: {self.text}"

    def _repr_html_(self) -> str:
        return f'<div style="{_BOX}"><b>Takeaway.</b> {html.escape(self.text)}</div>'


def takeaway(sentence: str) -> _Takeaway:
    """The notebook's one boxed sentence. Its number comes from a result: f"... {row.share:.0%}".

    ValueError where there is no number in it.
    """
    if not re.search(r"\d", sentence):
        raise ValueError(f"takeaway: no number in {sentence!r}")
    return _Takeaway(sentence)


def seconds_text(seconds: float) -> str:
    """0.00123 -> "1.23 ms"."""
    scale, unit = (1.0, "s") if seconds >= 1 else (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "us")
    value = seconds / scale
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
