"""Solutions of notebooks/00_where_the_time_goes.ipynb, and mistakes its checks must refuse."""


def weight_bytes_of(config):
    E, F, V = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, kv_heads, D = (
        config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    attention = E * heads * D + 2 * E * kv_heads * D + heads * D * E
    mlp = 3 * E * F
    return 2 * (config["num_hidden_layers"] * (attention + mlp) + V * E)


def weight_bytes_of_wrong(config):
    """Keys and values as wide as queries."""
    E, F, V = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    inside = config["num_attention_heads"] * config["head_dim"]
    return 2 * (config["num_hidden_layers"] * (4 * E * inside + 3 * E * F) + V * E)


def weight_bytes_of_wrong_2(config):
    """The embedding read twice where it is not tied."""
    more = 0 if config["tie_word_embeddings"] else config["vocab_size"] * config["hidden_size"]
    return weight_bytes_of(config) + 2 * more


def weight_bytes_of_wrong_3(config):
    """Weights instead of bytes."""
    return weight_bytes_of(config) // 2


def step_speedup(share, factor):
    return 1 / (share / factor + 1 - share)


def step_speedup_wrong(share, factor):
    """As if kernels were all."""
    return factor


def step_speedup_wrong_2(share, factor):
    """Averages speeds, not times."""
    return share * factor + (1 - share)


def equal_context(config, weight_bytes):
    per_token = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return -(-weight_bytes // per_token)


def equal_context_wrong(config, weight_bytes):
    """Query heads counted."""
    per_token = 4 * config["num_hidden_layers"] * config["num_attention_heads"] * config["head_dim"]
    return -(-weight_bytes // per_token)


def equal_context_wrong_2(config, weight_bytes):
    """One too many where it divides."""
    per_token = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return weight_bytes // per_token + 1
