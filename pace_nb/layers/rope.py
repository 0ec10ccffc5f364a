"""`RotaryEmbedding`: the cos and sin that rotate queries and keys, for every `rope_type` that
models use.

Knows how each type turns its parameters into R/2 angular frequencies, and keeps cos/sin tables that
grow with the longest position seen. Does not know config.json (`models/config_json.py` reads it
into `RopeParameters`) nor how a vector is rotated (`kernels/rope.py`).

    angle[p, i] = p * inv_freq[i]        cos, sin = attention_factor * (cos angle, sin angle)

    | rope_type | inv_freq, with f[i] = rope_theta ^ (-2 i / R)                              |
    |-----------|----------------------------------------------------------------------------|
    | default   | f                                                                          |
    | linear    | f / factor                                                                 |
    | dynamic   | f of a larger theta for sequences beyond max_position_embeddings (NTK)     |
    | llama3    | f for short wavelengths, f / factor for long ones, a blend between         |
    | yarn      | f for fast dimensions, f / factor for slow ones, a ramp; attention_factor  |
    | longrope  | f / short_factor or f / long_factor by sequence length; attention_factor   |

Frequencies and angles are computed in float64 and rounded once, to the float32 tables. transformers
computes them in float32, which at position 100 000 may be off by 1e-2 radians; at the positions
of the goldens both agree to 1e-5.

`dynamic` and `longrope` depend on the length of the whole sequence. `RotaryEmbedding.__call__`
takes it per sequence, so that a sequence never depends on its neighbours in the batch. transformers
takes the longest of the batch.
Source: the `_compute_*_parameters` functions of transformers 5.19,
modeling_rope_utils.py; LongRoPE arXiv:2402.13753; YaRN arXiv:2309.00071.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pace_nb.errors import ModelFormatError, UnsupportedModelError
from pace_nb.kernels.rope import Rotation, rotation
from pace_nb.layers.weights import Float32Array

Float64Array = NDArray[np.float64]
Int32Array = NDArray[np.int32]


@dataclass(frozen=True)
class RopeParameters:
    """Rotary settings under their config.json names, except `rotary_dim` = R, the leading dims of a
    head that rotate.

    Raises UnsupportedModelError for an unknown rope_type, ModelFormatError naming the field for an
    impossible value.
    """

    rotary_dim: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0  # 0 = not set
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rope_type not in _INV_FREQ:
            raise UnsupportedModelError(
                f"rope_type {self.rope_type!r} is not supported, supported: {', '.join(_INV_FREQ)}"
            )
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ModelFormatError(
                f"rotary dimension is {self.rotary_dim}, expected an even number from 2"
                " (head_dim * partial_rotary_factor)"
            )
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ModelFormatError(f"rope {name} is {value}, expected a positive number")
        for name in _REQUIRED.get(self.rope_type, ()):
            if not getattr(self, name):
                raise ModelFormatError(
                    f"rope {name} is missing, rope_type {self.rope_type!r} needs it"
                )
        if self.rope_type == "dynamic" and self.rotary_dim < 4:
            raise ModelFormatError("rotary dimension is 2, rope_type 'dynamic' needs at least 4")
        if self.rope_type == "yarn" and self.rope_theta == 1.0:
            raise ModelFormatError("rope rope_theta is 1.0, rope_type 'yarn' needs another base")
        if self.rope_type == "longrope":
            self._check_factor_lists()

    def _check_factor_lists(self) -> None:
        for name in ("short_factor", "long_factor"):
            values: tuple[float, ...] = getattr(self, name)
            if len(values) != self.rotary_dim // 2:
                raise ModelFormatError(
                    f"rope {name} has {len(values)} numbers, expected {self.rotary_dim // 2}"
                    " (half the rotary dimension)"
                )
            if not all(math.isfinite(value) and value > 0 for value in values):
                raise ModelFormatError(f"rope {name} must hold positive numbers only")
        if self.original_max_position_embeddings == 1:
            raise ModelFormatError(
                "rope original_max_position_embeddings is 1, rope_type 'longrope' needs at least 2"
            )

    @property
    def original_length(self) -> int:
        """Positions the model was pretrained on, before its context was stretched."""
        return self.original_max_position_embeddings or self.max_position_embeddings

    @property
    def by_length(self) -> bool:
        """True where a token's rotation depends on the length of its whole sequence."""
        return self.rope_type in _BY_LENGTH

    @property
    def switch_length(self) -> int | None:
        """A sequence of more tokens rotates otherwise, at all its positions; None = there is no
        such length. `dynamic` has none: it changes beyond max_position_embeddings, where no
        sequence gets."""
        return self.original_length if self.rope_type == "longrope" else None

    @property
    def stretch(self) -> float:
        """`factor`, or where it is left out the ratio of the context lengths (yarn, longrope)."""
        if self.factor is not None:
            return self.factor
        return self.max_position_embeddings / self.original_length


def inverse_frequencies(parameters: RopeParameters, sequence_len: int = 0) -> Float64Array:
    """float64[R/2] radians per position; `sequence_len` matters to dynamic and longrope only."""
    return _INV_FREQ[parameters.rope_type](parameters, sequence_len)


def attention_factor(parameters: RopeParameters) -> float:
    """What cos and sin are multiplied by; other than 1 for yarn and longrope only."""
    if parameters.rope_type not in ("yarn", "longrope"):
        return 1.0
    if parameters.attention_factor is not None:
        return parameters.attention_factor
    stretch = parameters.stretch
    if parameters.rope_type == "longrope":
        if stretch <= 1.0:
            return 1.0
        return math.sqrt(1.0 + math.log(stretch) / math.log(parameters.original_length))
    if parameters.mscale and parameters.mscale_all_dim:
        return _mscale(stretch, parameters.mscale) / _mscale(stretch, parameters.mscale_all_dim)
    return _mscale(stretch, 1.0)


class RotaryEmbedding:
    """cos/sin for the tokens of a batch. One object serves every layer with the same parameters.

    `interleaved`: the rotated pairs are (0, 1), (2, 3), ... (GPT-J, Llama 4) instead of (i, i +
    R/2).
    """

    def __init__(self, parameters: RopeParameters, *, interleaved: bool = False) -> None:
        self.parameters = parameters
        self.interleaved = interleaved
        self._factor = attention_factor(parameters)
        self._inv_freq = inverse_frequencies(parameters)
        empty = np.empty((0, parameters.rotary_dim // 2), np.float32)
        self._table = (empty, empty)

    def __call__(self, positions: Int32Array, sequence_lens: Int32Array) -> Rotation:
        """positions int32[T]; sequence_lens int32[T], length of the sequence each token is in."""
        if self.parameters.by_length:
            return self._by_length(positions, sequence_lens)
        needed = int(positions.max()) + 1 if len(positions) else 0
        cos, sin = self._grown_to(needed)
        return rotation(cos, sin, positions, self.interleaved)

    def _grown_to(self, length: int) -> tuple[Float32Array, Float32Array]:
        """The table, doubled until it has `length` rows; rows that exist are kept to the bit."""
        have = len(self._table[0])
        if length > have:
            target = max(_FIRST_ROWS, have)
            while target < length:
                target *= 2
            more = self._rows(np.arange(have, target, dtype=np.float64), self._inv_freq)
            cos, sin = (np.concatenate(pair) for pair in zip(self._table, more, strict=True))
            self._table = (cos, sin)
        return self._table

    def _by_length(self, positions: Int32Array, sequence_lens: Int32Array) -> Rotation:
        """Rows computed for this batch alone: the frequencies may change with every new token."""
        inv_freq = np.empty((len(positions), self.parameters.rotary_dim // 2))
        for length in np.unique(sequence_lens):
            inv_freq[sequence_lens == length] = inverse_frequencies(self.parameters, int(length))
        cos, sin = self._rows(positions.astype(np.float64), inv_freq)
        rows = np.arange(len(positions), dtype=np.int32)
        return rotation(cos, sin, rows, self.interleaved)

    def _rows(
        self, positions: Float64Array, inv_freq: Float64Array
    ) -> tuple[Float32Array, Float32Array]:
        """positions [P], inv_freq [R/2] or [P, R/2] -> cos, sin f32[P, R/2]."""
        angle = positions[:, None] * inv_freq
        return (
            (np.cos(angle) * self._factor).astype(np.float32),
            (np.sin(angle) * self._factor).astype(np.float32),
        )


# ---- the rope types ------------------------------------------------------------------------------
def _default(p: RopeParameters, sequence_len: int = 0) -> Float64Array:
    return _powers(p.rope_theta, p.rotary_dim)


def _linear(p: RopeParameters, sequence_len: int) -> Float64Array:
    return _default(p) / _given(p.factor)


def _dynamic(p: RopeParameters, sequence_len: int) -> Float64Array:
    factor, longest = _given(p.factor), p.max_position_embeddings
    grown = factor * max(sequence_len, longest) / longest - (factor - 1.0)
    return _powers(p.rope_theta * grown ** (p.rotary_dim / (p.rotary_dim - 2)), p.rotary_dim)


def _llama3(p: RopeParameters, sequence_len: int) -> Float64Array:
    inv_freq = _default(p)
    turns = p.original_length * inv_freq / (2.0 * math.pi)  # rotations within the original context
    low, high = _given(p.low_freq_factor), _given(p.high_freq_factor)
    # Llama 4 sets low == high: no wavelength lies between, and the blend would divide by zero.
    smooth = (turns - low) / (high - low) if high != low else np.ones_like(turns)
    blend = (1.0 - smooth) * inv_freq / _given(p.factor) + smooth * inv_freq
    return np.where(
        turns < low, inv_freq / _given(p.factor), np.where(turns > high, inv_freq, blend)
    )


def _yarn(p: RopeParameters, sequence_len: int) -> Float64Array:
    inv_freq = _default(p)

    def dim_of(rotations: float) -> float:
        """The (fractional) dimension that turns this often within the original context."""
        turn = math.log(p.original_length / (rotations * 2.0 * math.pi))
        return p.rotary_dim * turn / (2.0 * math.log(p.rope_theta))

    low, high = dim_of(p.beta_fast), dim_of(p.beta_slow)
    if p.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, p.rotary_dim - 1)
    if low == high:
        high += 0.001  # as in the reference: a step instead of a division by zero
    ramp: Float64Array = np.clip((np.arange(p.rotary_dim // 2) - low) / (high - low), 0.0, 1.0)
    return inv_freq / p.stretch * ramp + inv_freq * (1.0 - ramp)


def _longrope(p: RopeParameters, sequence_len: int) -> Float64Array:
    # Exactly at the original length the short factors still hold.
    factors = p.long_factor if sequence_len > p.original_length else p.short_factor
    stretch: Float64Array = np.array(factors)
    return _default(p) / stretch


def _powers(theta: float, rotary_dim: int) -> Float64Array:
    """theta ^ (-2 i / R) for i in 0 .. R/2 - 1."""
    return np.power(float(theta), -np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)


def _mscale(stretch: float, mscale: float) -> float:
    return 1.0 if stretch <= 1.0 else 0.1 * mscale * math.log(stretch) + 1.0


def _given(value: float | None) -> float:
    """A field that `_REQUIRED` guarantees for this rope_type."""
    if value is None:
        raise ModelFormatError("rope parameters are incomplete")
    return value


_INV_FREQ: dict[str, Callable[[RopeParameters, int], Float64Array]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
_BY_LENGTH = ("dynamic", "longrope")
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_POSITIVE = (
    "max_position_embeddings",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
)
_FIRST_ROWS = 256  # one growth serves most prompts; the table of a 128-dim head is then 128 KiB
