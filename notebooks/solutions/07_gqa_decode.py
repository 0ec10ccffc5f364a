"""Solutions of notebooks/07_gqa_decode.ipynb, and mistakes that its checks refuse."""


def bytes_per_token(layers, kv_heads, d, size):
    return layers * 2 * kv_heads * d * size


def bytes_per_token_wrong(layers, kv_heads, d, size):
    """Keys only."""
    return layers * kv_heads * d * size


def bytes_per_token_wrong_2(layers, kv_heads, d, size):
    """Always BF16."""
    return layers * 2 * kv_heads * d * 2


def busy_share(tasks, threads):
    return tasks / (threads * -(-tasks // threads))


def busy_share_wrong(tasks, threads):
    """As if the rest of a division cost nothing."""
    return min(1.0, tasks / threads)


def busy_share_wrong_2(tasks, threads):
    """Rounds down."""
    return tasks / (threads * max(1, tasks // threads))


def place_of_row(r, kv_head, group):
    return r // group, kv_head * group + r % group


def place_of_row_wrong(r, kv_head, group):
    """Forgets the groups before."""
    return r // group, r % group


def place_of_row_wrong_2(r, kv_head, group):
    """As if rows were ordered by head, then by token."""
    return r % group, kv_head * group + r // group
