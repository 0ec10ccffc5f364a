"""Solutions of notebooks/12_kv_cache.ipynb, and likely mistakes that its checks must refuse."""


def tokens_computed(prompt, new):
    return prompt + new - 1, new * (2 * prompt + new - 1) // 2


def tokens_computed_wrong(prompt, new):
    """Computes the last token, too, which nobody asks to go on from."""
    return prompt + new, new * (2 * prompt + new - 1) // 2


def tokens_computed_wrong_2(prompt, new):
    """Forgets that the prompt is read again as well."""
    return prompt + new - 1, new * (new + 1) // 2 + prompt


def place(position, h, d, table):
    logical, slot = divmod(position, 16)
    unit = int(table[logical])
    return (h, unit, d // 2, slot, d % 2), (h, unit, slot // 2, d, slot % 2)


def place_wrong(position, h, d, table):
    """Values as keys."""
    logical, slot = divmod(position, 16)
    unit = int(table[logical])
    return (h, unit, d // 2, slot, d % 2), (h, unit, d // 2, slot, d % 2)


def place_wrong_2(position, h, d, table):
    """Units in order, whatever the table says."""
    logical, slot = divmod(position, 16)
    return (h, logical, d // 2, slot, d % 2), (h, logical, slot // 2, d, slot % 2)


def sequences_that_fit(layers, kv_heads, head_dim, length, memory):
    per_unit = 16 * layers * kv_heads * 2 * head_dim * 2
    return memory // (-(-length // 16) * per_unit)


def sequences_that_fit_wrong(layers, kv_heads, head_dim, length, memory):
    """Not in whole units."""
    return memory // (length * layers * kv_heads * 2 * head_dim * 2)


def sequences_that_fit_wrong_2(layers, kv_heads, head_dim, length, memory):
    """Keys without values."""
    return memory // (-(-length // 16) * 16 * layers * kv_heads * head_dim * 2)
