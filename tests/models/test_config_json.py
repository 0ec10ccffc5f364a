"""Every field is checked where it is read; both spellings of the rotary settings mean the same."""

from __future__ import annotations

import json
import math

import pytest

from pace_nb.errors import ModelFormatError, UnsupportedModelError
from pace_nb.layers.rope import RopeParameters
from pace_nb.models.config_json import ConfigJson


@pytest.mark.parametrize(
    "value", [0, -4, 2**31, 10**40, 4.0, "4", True, [4], {}], ids=lambda v: repr(v)[:12]
)
def test_an_integer_is_an_integer_in_range(value):
    with pytest.raises(ModelFormatError, match=r"config\.json: heads is .*, expected an integer"):
        ConfigJson({"heads": value}).integer("heads")


def test_integers_and_defaults():
    config = ConfigJson({"heads": 8, "kv": None})
    assert config.integer("heads") == 8
    assert config.integer("kv", 4) == 4
    assert config.integer("absent", 5) == 5
    with pytest.raises(ModelFormatError, match=r"config\.json: kv is missing, expected an integer"):
        config.integer("kv")


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, 10**400, "1e-5", True, None])
def test_a_number_is_finite_and_above_zero(value):
    with pytest.raises(ModelFormatError, match="eps is"):
        ConfigJson({"eps": value}).number("eps")
    assert ConfigJson({"eps": 1}).number("eps") == 1.0
    assert ConfigJson({"eps": value}).optional_number("x") is None


def test_other_types():
    config = ConfigJson({"flag": 1, "name": 3, "list": [1, "2"], "object": []})
    for read in (
        lambda: config.boolean("flag", False),
        lambda: config.text("name"),
        lambda: config.numbers("list"),
        lambda: config.integers("list"),
        lambda: config.section("object"),
    ):
        with pytest.raises(ModelFormatError, match="expected"):
            read()
    with pytest.raises(ModelFormatError, match=r"huge is .*a list of numbers above 0"):
        ConfigJson({"huge": [1, 10**400]}).numbers("huge")
    good = ConfigJson({"flag": True, "name": "silu", "list": [1, 2.5], "object": {"x": 0}})
    assert good.boolean("flag", False) and good.text("name") == "silu"
    assert good.numbers("list") == (1.0, 2.5) and good.numbers("absent") == ()
    layers = ConfigJson({"moe": [0, 3], "none": [], "wrong": [True], "negative": [-1]})
    assert layers.integers("moe") == (0, 3)
    assert layers.integers("none") == layers.integers("absent") == ()
    for field in ("wrong", "negative"):
        with pytest.raises(ModelFormatError, match=f"{field} is .* a list of integers from 0"):
            layers.integers(field)
    with pytest.raises(ModelFormatError, match=r"config\.json: object: x is 0, expected"):
        good.section("object").integer("x")


def test_defaults_fill_what_is_absent_or_null():
    config = ConfigJson({"heads": 8, "kv": None, "other": None}, ["a.weight"])
    filled = config.with_defaults({"heads": 1, "kv": 2, "head_dim": 256})
    assert [filled.integer(field) for field in ("heads", "kv", "head_dim")] == [8, 2, 256]
    assert not filled.has("other") and not config.has("head_dim")
    assert filled.has_tensor("a.weight") and not filled.has_tensor("b.weight")


def test_a_nested_config_knows_the_checkpoints_tensors():
    """They bound its layers, as they do at the top (`text_config`)."""
    config = ConfigJson({"text_config": {"num_hidden_layers": 3}}, ["a", "b", "c"])
    assert config.section("text_config").num_hidden_layers() == 3
    with pytest.raises(ModelFormatError, match="num_hidden_layers is 3"):
        ConfigJson({"num_hidden_layers": 3}, ["a", "b"]).num_hidden_layers()


def test_a_long_value_is_cut_to_one_short_line():
    with pytest.raises(ModelFormatError) as caught:
        ConfigJson({"name": ["line\n" * 10] * 1000}).text("name")
    assert len(str(caught.value)) < 120 and "\n" not in str(caught.value)


def test_layers_are_bounded_by_the_tensors_there_are():
    config = ConfigJson({"num_hidden_layers": 10**9}, ["a", "b", "c"])
    with pytest.raises(ModelFormatError, match="expected an integer from 1 to 3"):
        config.num_hidden_layers()
    assert ConfigJson({"num_hidden_layers": 3}, ["a", "b", "c"]).num_hidden_layers() == 3


def test_the_head_is_tied_by_word_or_by_absence():
    head = ["lm_head.weight"]
    assert not ConfigJson({}, head).tie_word_embeddings(False)
    assert ConfigJson({}, []).tie_word_embeddings(False)
    assert ConfigJson({"tie_word_embeddings": True}, head).tie_word_embeddings(False)
    assert not ConfigJson({"tie_word_embeddings": False}, head).tie_word_embeddings(True)


def test_a_layer_that_does_not_see_all_has_a_familys_own_name():
    listed = ["chunked_attention", "full_attention"]
    names = {"kind": "chunked_attention", "size": "attention_chunk_size"}
    config = ConfigJson({"layer_types": listed})
    assert config.layer_windows(2, 8, 0, **names) == (8, 0)
    with pytest.raises(ModelFormatError, match=r"attention_chunk_size is None, .* has chunked_att"):
        config.layer_windows(2, None, 0, **names)
    with pytest.raises(ModelFormatError, match="'chunked_attention', expected full_attention or s"):
        config.layer_windows(2, 8, 0)


def test_heads_divide():
    assert ConfigJson({}).head_dim(128, 4) == 32
    assert ConfigJson({"head_dim": 80}).head_dim(128, 3) == 80
    with pytest.raises(ModelFormatError, match=r"hidden_size is 128, .*num_attention_heads \(3\)"):
        ConfigJson({}).head_dim(128, 3)
    with pytest.raises(ModelFormatError, match="head_dim is 4096"):
        ConfigJson({"head_dim": 4096}).head_dim(128, 4)
    assert ConfigJson({"num_key_value_heads": 2}).num_key_value_heads(4) == 2
    assert ConfigJson({}).num_key_value_heads(4) == 4
    with pytest.raises(ModelFormatError, match="num_key_value_heads is 3, expected a divisor"):
        ConfigJson({"num_key_value_heads": 3}).num_key_value_heads(4)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_theta": 500000, "rope_scaling": {"type": "llama3"} | LLAMA3},
        {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}},
        {"rope_theta": 1.0, "rope_parameters": LLAMA3 | {"rope_theta": 500000.0}},
        {
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA3,
            "rope_parameters": {"rope_type": "default"},
        },
    ],
)
def test_both_spellings_of_rope(fields):
    config = ConfigJson({"max_position_embeddings": 131072} | fields)
    assert config.rope_parameters(64) == RopeParameters(
        rotary_dim=64,
        max_position_embeddings=131072,
        rope_type="llama3",
        rope_theta=500000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


def test_rope_defaults_and_partial_rotation():
    plain = {"max_position_embeddings": 2048, "rope_scaling": None}
    assert ConfigJson(plain).rope_parameters(32) == RopeParameters(32, 2048, 10000.0)
    assert ConfigJson(plain).rope_parameters(32, default_theta=5e5).rope_theta == 5e5
    for fields in (
        {"partial_rotary_factor": 0.75},
        {"rope_parameters": {"partial_rotary_factor": 0.75}},
    ):
        assert ConfigJson(plain | fields).rope_parameters(32).rotary_dim == 24
    with pytest.raises(ModelFormatError, match=r"partial_rotary_factor is 1\.5"):
        ConfigJson(plain | {"partial_rotary_factor": 1.5}).rope_parameters(32)


def test_the_pretrained_length_beside_rope_scaling_counts_first():
    """Phi-3 keeps it there (golden phi4mini)."""
    fields = json.loads(
        """{"max_position_embeddings": 2048, "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 99,
        "short_factor": [1, 1], "long_factor": [1.0, 47.77]}}"""
    )
    rope = ConfigJson(fields).rope_parameters(4)
    assert rope.original_length == 64 and rope.stretch == 32.0
    assert rope.long_factor == (1.0, 47.77)


def test_rope_parameters_of_one_layer_type():
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = ConfigJson({"max_position_embeddings": 64, "rope_parameters": nested})
    read = [config.rope_parameters(8, layer_type=name) for name in nested]
    assert read == [
        RopeParameters(8, 64, 1e6, rope_type="linear", factor=8.0),
        RopeParameters(8, 64, 1e4),
    ]


def test_a_familys_old_name_of_a_rope_type():
    fields = {"max_position_embeddings": 64, "rope_scaling": {"type": "su", "factor": 2.0}}
    rope = ConfigJson(fields).rope_parameters(8, aliases={"su": "linear"})
    assert rope.rope_type == "linear"
    with pytest.raises(UnsupportedModelError, match="'su' is not supported"):
        ConfigJson(fields).rope_parameters(8)


def test_yarn_fields_are_read():
    fields = {
        "rope_type": "yarn",
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0,
        "truncate": False,
        "beta_fast": 16,
        "beta_slow": None,
    }
    rope = ConfigJson({"max_position_embeddings": 4096, "rope_scaling": fields}).rope_parameters(32)
    assert (rope.factor, rope.mscale, rope.mscale_all_dim) == (40.0, 0.707, 0.0)
    assert (rope.truncate, rope.beta_fast, rope.beta_slow) == (False, 16.0, 1.0)
    assert rope.original_length == 4096


def test_the_output_head_is_tied_where_the_field_and_the_checkpoint_say_so():
    head = ["lm_head.weight"]
    for values, names, tied in (
        ({}, [], True),
        ({"tie_word_embeddings": None}, [], True),
        ({"tie_word_embeddings": True}, [], True),
        ({"tie_word_embeddings": True}, head, True),
        ({"tie_word_embeddings": False}, head, False),
        ({}, head, False),
    ):
        assert ConfigJson(values, names).tie_word_embeddings(False) is tied
    with pytest.raises(ModelFormatError, match=r"tie_word_embeddings is False, .*no lm_head"):
        ConfigJson({"tie_word_embeddings": False}).tie_word_embeddings(False)
    head = "language_model.lm_head.weight"
    untied = ConfigJson({"tie_word_embeddings": False}, [head])
    assert untied.tie_word_embeddings(False, head) is False
    with pytest.raises(ModelFormatError, match=r"true, for the checkpoint has no x\.weight"):
        untied.tie_word_embeddings(False, "x.weight")
