"""Solutions of notebooks/03_gemm_ladder.ipynb, and likely mistakes that its checks must refuse."""

from pace_nb.kernels.tiles import tile_dot, tile_load, tile_store, tile_zeros


def packed_offset(n, k, num_inputs):
    panel, row = divmod(n, 64)
    pair, half = divmod(k, 2)
    return ((panel * (num_inputs // 2) + pair) * 64 + row) * 2 + half


def packed_offset_wrong(n, k, num_inputs):
    """As if it were not cut into panels."""
    return (k // 2 * 64 + n) * 2 + k % 2


def packed_offset_wrong_2(n, k, num_inputs):
    """The layout of float32."""
    return (n // 64 * num_inputs + k) * 64 + n % 64


def best_tile(registers):
    shapes = [(mr, nv) for mr in range(1, registers) for nv in range(1, registers)]
    fitting = [(mr, nv) for mr, nv in shapes if mr * nv + nv + 1 <= registers]
    return min(fitting, key=lambda tile: sum(tile) / (tile[0] * tile[1]))


def best_tile_wrong(registers):
    """The package's, whatever the registers."""
    return 6, 4


def best_tile_wrong_2(registers):
    """Forgets that W and A need registers too."""
    side = int(registers**0.5)
    return side, side


def tile_with_bias(x, panel, bias, c, k):
    acc = tile_load(6, 4, bias, 0, 0)
    for p in range(k):
        acc = tile_dot(acc, x, p, k, panel, p * 64, 16)
    tile_store(acc, c, 0, 64)


def tile_with_bias_wrong(x, panel, bias, c, k):
    """No bias."""
    acc = tile_zeros(6, 4)
    for p in range(k):
        acc = tile_dot(acc, x, p, k, panel, p * 64, 16)
    tile_store(acc, c, 0, 64)


def tile_with_bias_wrong_2(x, panel, bias, c, k):
    """Right numbers, but C is stored twice."""
    tile_with_bias(x, panel, bias, c, k)
    acc = tile_load(6, 4, c, 0, 64)
    tile_store(acc, c, 0, 64)
