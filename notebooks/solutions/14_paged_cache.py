"""Solutions of notebooks/14_paged_cache.ipynb, and likely mistakes that its checks must refuse."""

from hashlib import blake2b


def blocks_held(n, shared, own, block):
    whole = shared // block
    return whole + n * (-(-(shared + own) // block) - whole)


def blocks_held_wrong(n, shared, own, block):
    """As if the shared part ended with a block."""
    return -(-shared // block) + n * -(-own // block)


def blocks_held_wrong_2(n, shared, own, block):
    """Nothing shared."""
    return n * -(-(shared + own) // block)


def block_names(tokens, block, salt):
    names, before = [], salt.encode()
    for start in range(0, len(tokens) - block + 1, block):
        text = ",".join(map(str, tokens[start : start + block]))
        before = blake2b(before + b"|" + text.encode()).digest()
        names.append(before)
    return names


def block_names_wrong(tokens, block, salt):
    """Without the name before: a block is found after any beginning."""
    starts = range(0, len(tokens) - block + 1, block)
    return [hash((salt, *tokens[start : start + block])) for start in starts]


def block_names_wrong_2(tokens, block, salt):
    """Everything in every name."""
    starts = range(0, len(tokens) - block + 1, block)
    return [(salt, *tokens[: start + block]) for start in starts]


def block_names_wrong_3(tokens, block, salt):
    """The salt is forgotten."""
    return block_names(tokens, block, "")


def still_found(pool, first, second):
    return max(0, min(first, pool - second))


def still_found_wrong(pool, first, second):
    """Takes cached blocks before free ones."""
    return max(0, first - second)


def still_found_wrong_2(pool, first, second):
    """From the beginning: then nothing can be reused once the first block is gone."""
    return first if pool - first >= second else 0
