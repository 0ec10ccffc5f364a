"""Solutions of notebooks/13_slab_pool.ipynb, and likely mistakes that its checks must refuse."""


def unused(lengths, block):
    return sum(-length % block for length in lengths)


def unused_wrong(lengths, block):
    """A whole block for one that ends with its block."""
    return sum(block - length % block for length in lengths)


def unused_wrong_2(lengths, block):
    """As if sequences shared blocks."""
    return -sum(lengths) % block


def largest_hole(units, ranges):
    largest, end = 0, 0
    for first, after in [*sorted(ranges), (units, units)]:
        largest = max(largest, first - end)
        end = after
    return largest


def largest_hole_wrong(units, ranges):
    """All that is free, in however many pieces."""
    return units - sum(after - first for first, after in ranges)


def largest_hole_wrong_2(units, ranges):
    """Not the gap behind the last."""
    largest, end = 0, 0
    for first, after in sorted(ranges):
        largest = max(largest, first - end)
        end = after
    return largest


def block_size(l2, kv_heads, head_dim):
    per_token = 2 * kv_heads * head_dim * 2
    return next((size for size in (256, 128, 64, 32) if size * per_token <= l2 // 4), 32)


def block_size_wrong(l2, kv_heads, head_dim):
    """Keys without values."""
    per_token = kv_heads * head_dim * 2
    return next((size for size in (256, 128, 64, 32) if size * per_token <= l2 // 4), 32)


def block_size_wrong_2(l2, kv_heads, head_dim):
    """All of L2."""
    per_token = 2 * kv_heads * head_dim * 2
    return next((size for size in (256, 128, 64, 32) if size * per_token <= l2), 32)
