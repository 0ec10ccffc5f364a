"""What every notebook imports: timing, counting, checking, drawing, so that a cell says one thing.

    measure.py  timeit, limits, best_time, environment     how long, and how long at best
    counting.py count, show_counts                         what an interpreted run loads, computes
    checking.py check, exercise, expect                    is it right
    drawing.py  blocks, tiles, timeline, roofline, bars,   pictures from real index arithmetic
                curves, picture
    show.py     table, takeaway                            what is written beneath a cell

Knows how a notebook looks (docs/how-to/write-a-notebook.md) and `pace_nb`. Knows no topic.
`PACE_NB_FAST=1` times each thing once and changes nothing else.
"""

from nblib.checking import CheckFailed, check, exercise, expect
from nblib.counting import Counts, count, show_counts
from nblib.drawing import bars, blocks, curves, picture, roofline, tiles, timeline
from nblib.measure import (
    Best,
    Limit,
    Limits,
    Timing,
    Timings,
    best_time,
    copy_limit,
    environment,
    flop_limit,
    limits,
    read_limit,
    timeit,
)
from nblib.show import Table, seconds_text, table, takeaway

__all__ = [
    "Best", "CheckFailed", "Counts", "Limit", "Limits", "Table", "Timing", "Timings", "bars",
    "best_time", "blocks", "check", "copy_limit", "count", "curves", "environment", "exercise",
    "expect", "flop_limit", "limits", "picture", "read_limit", "roofline", "seconds_text",
    "show_counts", "table", "takeaway", "tiles", "timeit", "timeline",
]  # fmt: skip
