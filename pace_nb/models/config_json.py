"""`ConfigJson`: a config.json read field by field, each checked where it is read.

Knows JSON types, bounds, the two spellings of rotary settings, and the names of the checkpoint's
tensors, which bound the number of layers and tell whether there is a separate output head. Does not
know any family: a model file asks for the fields it uses and thereby says which it needs; all other
fields are ignored (`auto_map` among them).
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from pace_nb.errors import ModelFormatError
from pace_nb.layers.rope import RopeParameters

MAX_SIZE = 2**31 - 1  # token ids, positions and sizes travel as int32
MAX_HEAD_DIM = 512  # the attention kernels keep a head's accumulators on chip


class ConfigJson:
    """Typed access to one JSON object. Every error is one line: field, found, expected."""

    def __init__(
        self,
        values: Mapping[str, Any],
        tensor_names: Collection[str] = (),
        *,
        name: str = "config.json",
    ) -> None:
        self._values = values
        self._tensor_names = tensor_names
        self._name = name

    def has(self, field: str) -> bool:
        """True where the field is there and not null."""
        return self._values.get(field) is not None

    def integer(
        self, field: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_SIZE
    ) -> int:
        """An integer in minimum .. maximum. Without a default the field is required."""
        value = self._value(field, default, f"an integer from {minimum} to {maximum}")
        if type(value) is not int or not minimum <= value <= maximum:
            raise self._wrong(field, value, f"an integer from {minimum} to {maximum}")
        return value

    def optional_integer(self, field: str, missing: int | None = None) -> int | None:
        """An integer from 1; None where the field is null, `missing` where it is absent."""
        if self.has(field):
            return self.integer(field)
        return None if field in self._values else missing

    def number(self, field: str, default: float | None = None) -> float:
        """A finite number above 0. Without a default the field is required."""
        value = self._value(field, default, "a number above 0")
        if not _is_number(value):
            raise self._wrong(field, value, "a number above 0")
        return float(value)

    def optional_number(self, field: str) -> float | None:
        """A finite number above 0, or None where the field is absent or null."""
        return self.number(field) if self.has(field) else None

    def number_or_zero(self, field: str) -> float:
        """A finite number from 0; 0 where the field is absent or null."""
        return 0.0 if self._values.get(field) in (None, 0) else self.number(field)

    def boolean(self, field: str, default: bool) -> bool:
        """true or false."""
        value = self._value(field, default, "true or false")
        if type(value) is not bool:
            raise self._wrong(field, value, "true or false")
        return value

    def text(self, field: str, default: str | None = None) -> str:
        """A string."""
        value = self._value(field, default, "a string")
        if type(value) is not str:
            raise self._wrong(field, value, "a string")
        return value

    def numbers(self, field: str) -> tuple[float, ...]:
        """A list of numbers above 0; empty where the field is absent or null."""
        value = self._value(field, [], "a list of numbers above 0")
        if type(value) is not list or not all(map(_is_number, value)):
            raise self._wrong(field, value, "a list of numbers above 0")
        return tuple(float(item) for item in value)

    def integers(self, field: str) -> tuple[int, ...]:
        """A list of integers from 0; empty where the field is absent or null."""
        value = self._value(field, [], "a list of integers from 0")
        if type(value) is not list or not all(
            type(item) is int and 0 <= item <= MAX_SIZE for item in value
        ):
            raise self._wrong(field, value, "a list of integers from 0")
        return tuple(value)

    def section(self, field: str) -> ConfigJson:
        """The nested object; an empty one where the field is absent or null."""
        value = self._value(field, {}, "an object")
        if type(value) is not dict:
            raise self._wrong(field, value, "an object")
        return ConfigJson(value, self._tensor_names, name=f"{self._name}: {field}")

    def with_defaults(self, defaults: Mapping[str, Any]) -> ConfigJson:
        """The same object with values for fields that are absent or null: some families publish
        only what differs from the defaults of their configuration class."""
        missing = {f: value for f, value in defaults.items() if not self.has(f)}
        return ConfigJson({**self._values, **missing}, self._tensor_names, name=self._name)

    def has_tensor(self, name: str) -> bool:
        """True where the checkpoint has a tensor of this name."""
        return name in self._tensor_names

    def is_empty(self) -> bool:
        """True where the object has no fields."""
        return not self._values

    def num_hidden_layers(self, field: str = "num_hidden_layers") -> int:
        """`field`; at most the checkpoint's tensors: nobody builds 10**9 shells."""
        return self.integer(field, maximum=max(1, len(self._tensor_names)))

    def tie_word_embeddings(self, default: bool, head: str = "lm_head.weight") -> bool:
        """True where the field says so, or says nothing and there is no tensor `head`."""
        tied = self.boolean("tie_word_embeddings", default)
        if tied or self.has_tensor(head):
            return tied
        if self.has("tie_word_embeddings"):
            raise self._wrong(
                "tie_word_embeddings", False, f"true, for the checkpoint has no {head}"
            )
        return True

    def head_dim(self, hidden_size: int, num_heads: int) -> int:
        """`head_dim` where given, else hidden_size / num_attention_heads, which must divide."""
        if self.has("head_dim"):
            return self.integer("head_dim", maximum=MAX_HEAD_DIM)
        if hidden_size % num_heads:
            raise self._wrong(
                "hidden_size", hidden_size, f"a multiple of num_attention_heads ({num_heads})"
            )
        return hidden_size // num_heads

    def num_key_value_heads(self, num_heads: int) -> int:
        """`num_key_value_heads`, by default num_attention_heads; divides it."""
        count = self.integer("num_key_value_heads", num_heads)
        if num_heads % count:
            raise self._wrong(
                "num_key_value_heads", count, f"a divisor of num_attention_heads ({num_heads})"
            )
        return count

    def layer_windows(
        self,
        num_layers: int,
        window: int | None,
        first_sliding: int,
        *,
        kind: str = "sliding_attention",
        size: str = "sliding_window",
    ) -> tuple[int, ...]:
        """Positions that each layer sees, 0 = all: `layer_types` where it is given, else the layers
        from `first_sliding` on slide. `window` None: no layer may. `kind` is what layer_types calls
        a layer that does not see all, `size` the field that `window` was read from."""
        listed = self._values.get("layer_types")
        if listed is None:
            limited = [window is not None and i >= first_sliding for i in range(num_layers)]
        elif type(listed) is not list or len(listed) != num_layers:
            raise self._wrong("layer_types", listed, f"a list of {num_layers} strings")
        else:
            known = ("full_attention", kind)
            for item in listed:
                if item not in known:
                    raise self._wrong("layer_types", item, " or ".join(known))
            limited = [item == kind for item in listed]
        if any(limited) and window is None:
            raise self._wrong(size, None, f"a window, for layer_types has {kind}")
        return tuple((window or 0) if limit else 0 for limit in limited)

    def rope_parameters(
        self,
        head_dim: int,
        *,
        default_theta: float = 10000.0,
        layer_type: str | None = None,
        aliases: Mapping[str, str] = MappingProxyType({}),
    ) -> RopeParameters:
        """Rotary settings from either spelling.

        Older: `rope_scaling` (may be null) beside `rope_theta` and `partial_rotary_factor`. Newer:
        all of it in `rope_parameters`, in families whose layers differ once more per `layer_type`.
        `rope_scaling` wins where both are there, and `type` is an old name of `rope_type`
        (transformers 5.19, RotaryEmbeddingConfigMixin). `aliases`: a family's own old names of
        types.
        """
        rope = self.section("rope_scaling")
        if rope.is_empty():
            rope = self.section("rope_parameters")
            if layer_type is not None and rope.has(layer_type):
                rope = rope.section(layer_type)
        rope_type = rope.text("rope_type" if rope.has("rope_type") else "type", "default")
        rope_type = aliases.get(rope_type, rope_type)
        # Phi-3 keeps the pretrained length outside the nested object, and there it counts first.
        original = self if self.has("original_max_position_embeddings") else rope
        partial = (rope if rope.has("partial_rotary_factor") else self).number(
            "partial_rotary_factor", 1.0
        )
        theta = (rope if rope.has("rope_theta") else self).number("rope_theta", default_theta)
        if partial > 1.0:
            raise self._wrong("partial_rotary_factor", partial, "a number above 0, at most 1")
        return RopeParameters(
            rotary_dim=int(head_dim * partial),
            max_position_embeddings=self.integer("max_position_embeddings"),
            rope_theta=theta,
            rope_type=rope_type,
            factor=rope.optional_number("factor"),
            original_max_position_embeddings=original.optional_integer(
                "original_max_position_embeddings"
            ),
            low_freq_factor=rope.optional_number("low_freq_factor"),
            high_freq_factor=rope.optional_number("high_freq_factor"),
            attention_factor=rope.optional_number("attention_factor"),
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            mscale=rope.number_or_zero("mscale"),
            mscale_all_dim=rope.number_or_zero("mscale_all_dim"),
            truncate=rope.boolean("truncate", True),
            short_factor=rope.numbers("short_factor"),
            long_factor=rope.numbers("long_factor"),
        )

    def _value(self, field: str, default: Any, expected: str) -> Any:
        value = self._values.get(field)
        if value is None:
            value = default
        if value is None:
            raise ModelFormatError(f"{self._name}: {field} is missing, expected {expected}")
        return value

    def _wrong(self, field: str, value: Any, expected: str) -> ModelFormatError:
        shown = repr(value)
        if len(shown) > 60:
            shown = shown[:57] + "..."
        return ModelFormatError(f"{self._name}: {field} is {shown}, expected {expected}")


def _is_number(value: object) -> bool:
    """True for a number above 0 that a float can hold."""
    return type(value) in (int, float) and 0 < value <= sys.float_info.max  # type: ignore[operator]
