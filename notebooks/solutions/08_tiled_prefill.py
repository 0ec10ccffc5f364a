"""Solutions of notebooks/08_tiled_prefill.ipynb, and mistakes that its checks refuse."""


def pairs_of_chunk(tokens, cached):
    return tokens * cached + tokens * (tokens + 1) // 2


def pairs_of_chunk_wrong(tokens, cached):
    """The rectangle: every row sees every key."""
    return tokens * (cached + tokens)


def pairs_of_chunk_wrong_2(tokens, cached):
    """A row that does not see itself."""
    return tokens * cached + tokens * (tokens - 1) // 2


def kind_with_window(row, key, window):
    last = row + 5
    if last < key or max(0, row + 1 - window) > key + 63:
        return -1
    return 0 if row >= key + 63 and max(0, last + 1 - window) <= key else 1


def kind_with_window_wrong(row, key, window):
    """Forgets that rows also stop seeing old keys."""
    return -1 if row + 5 < key else 0 if row >= key + 63 else 1


def kind_with_window_wrong_2(row, key, window):
    """Asks the first row where the window begins: the last row begins later."""
    last = row + 5
    if last < key or max(0, row + 1 - window) > key + 63:
        return -1
    return 0 if row >= key + 63 and max(0, row + 1 - window) <= key else 1


def worker_of(task, workers):
    place, odd = task % workers, task // workers % 2
    return workers - 1 - place if odd else place


def worker_of_wrong(task, workers):
    """Round robin: the last worker always gets the longer task."""
    return task % workers


def worker_of_wrong_2(task, workers):
    """Everything to one."""
    return 0
