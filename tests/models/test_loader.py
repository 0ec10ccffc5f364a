from __future__ import annotations

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace_nb.errors import ModelFormatError, PaceError, UnsupportedModelError
from pace_nb.models.loader import Checkpoint

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 2}
NAMES = {np.dtype("f2"): "F16", np.dtype("f4"): "F32", np.dtype("u1"): "U8", np.dtype("i8"): "I64",
         np.dtype(ml_dtypes.bfloat16): "BF16"}  # fmt: skip
SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

rng = np.random.default_rng(3)
A = rng.standard_normal((4, 3)).astype(ml_dtypes.bfloat16)
B = rng.standard_normal(5).astype("f4")
C = rng.standard_normal((2, 2)).astype("f2")


def write_safetensors(path, tensors):
    header, position = {}, 0
    for name, array in tensors.items():
        stop = position + array.nbytes
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape),
                        "data_offsets": [position, stop]}  # fmt: skip
        position = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(array.tobytes() for array in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_config(directory, config=CONFIG):
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture
def single(tmp_path):
    """A directory with one file: a BF16 [4, 3], b F32 [5], c F16 [2, 2]."""
    write_config(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {"a": A, "b": B, "c": C})
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    """The same tensors: a and c in the first shard, b in the second."""
    write_config(tmp_path)
    write_safetensors(tmp_path / SHARD_1, {"a": A, "c": C})
    write_safetensors(tmp_path / SHARD_2, {"b": B})
    write_index(tmp_path, {"a": SHARD_1, "b": SHARD_2, "c": SHARD_1})
    return tmp_path


def write_index(directory, weight_map, **more):
    index = {"metadata": {"total_size": 1.5e10}, "weight_map": weight_map, **more}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def refused(directory, expected, error=ModelFormatError):
    with pytest.raises(error) as caught:
        Checkpoint.open(directory)
    assert expected in str(caught.value)
    assert str(directory) in str(caught.value)


# ---- sound checkpoints ---------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_tensors(request, layout):
    directory = request.getfixturevalue(layout)
    with Checkpoint.open(directory) as checkpoint:
        assert sorted(checkpoint.names()) == ["a", "b", "c"]
        assert checkpoint.nbytes == A.nbytes + B.nbytes + C.nbytes
        assert [path.name for path in checkpoint.files] == (
            ["model.safetensors"] if layout == "single" else [SHARD_1, SHARD_2]
        )
        for name, array, dtype in (("a", A, "BF16"), ("b", B, "F32"), ("c", C, "F16")):
            assert checkpoint.shape(name) == array.shape
            assert checkpoint.dtype(name) == dtype
            view = checkpoint.tensor(name, array.shape)
            assert view.dtype == (np.uint16 if dtype == "BF16" else array.dtype)
            assert view.tobytes() == array.tobytes()
            checkpoint.release(name)
            assert view.tobytes() == array.tobytes()


def test_config_and_generation_config(single):
    assert Checkpoint.open(single).config == CONFIG
    assert Checkpoint.open(single).generation_config == {}
    (single / "generation_config.json").write_text('{"temperature": 0.6}')
    assert Checkpoint.open(str(single)).generation_config == {"temperature": 0.6}


def test_one_file_goes_before_an_index(sharded):
    """As in transformers: an index left over from before the shards were merged."""
    write_safetensors(sharded / "model.safetensors", {"z": B})
    assert list(Checkpoint.open(sharded).names()) == ["z"]


def test_unused(single):
    checkpoint = Checkpoint.open(single)
    assert checkpoint.unused() == ["a", "b", "c"]
    checkpoint.tensor("b", (5,))
    checkpoint.shape("c")
    with pytest.raises(ModelFormatError):
        checkpoint.tensor("a", (3, 4))
    assert checkpoint.unused() == ["a", "c"]


def test_views_outlive_the_checkpoint(single):
    with Checkpoint.open(single) as checkpoint:
        view = checkpoint.tensor("b", (5,))
    assert view.tolist() == B.tolist()


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("a", (3, 4), "tensor 'a' has shape [4, 3], expected [3, 4]"),
        ("a", (12,), "tensor 'a' has shape [4, 3], expected [12]"),
        ("a", (4, 3, 1), "tensor 'a' has shape [4, 3], expected [4, 3, 1]"),
        ("b", (), "tensor 'b' has shape [5], expected []"),
        ("x\n", (5,), "tensor 'x\\n' is missing from the checkpoint"),
    ],
)
def test_tensor_refuses(single, name, shape, expected):
    with pytest.raises(ModelFormatError) as caught:
        Checkpoint.open(single).tensor(name, shape)
    assert expected in str(caught.value)
    assert str(single) in str(caught.value)


def test_dtypes_are_asked_for(tmp_path):
    write_config(tmp_path)
    packed, mask = np.arange(6, dtype="u1"), np.zeros(2, "i8")
    write_safetensors(tmp_path / "model.safetensors", {"packed": packed, "mask": mask, "a": A})
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(ModelFormatError, match=r"'packed' is U8, expected BF16 or F16 or F32"):
        checkpoint.tensor("packed", (6,))
    assert checkpoint.tensor("packed", (6,), dtypes=("U8",)).tolist() == packed.tolist()
    with pytest.raises(ModelFormatError, match=r"'a' is BF16, expected U8$"):
        checkpoint.tensor("a", (4, 3), dtypes=("U8",))
    with pytest.raises(UnsupportedModelError, match=r"'mask' is I64, expected one of BF16"):
        checkpoint.tensor("mask", (2,))
    assert checkpoint.unused() == ["a", "mask"]


# ---- directories without weights that can be read ------------------------------------------------
@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt", "weights.pkl",
     "MODEL.BIN", "model.gguf", "tf_model.h5", "pytorch_model-00001-of-00002.bin"],
)  # fmt: skip
def test_other_weights_are_refused_by_name(tmp_path, name):
    write_config(tmp_path)
    os.mkfifo(tmp_path / name)  # to open it would wait for ever
    refused(tmp_path, f"{tmp_path / name}: only safetensors weights are read")


def test_pickles_beside_safetensors_do_not_matter(single):
    os.mkfifo(single / "pytorch_model.bin")
    assert len(Checkpoint.open(single).names()) == 3


def test_no_weights(tmp_path):
    write_config(tmp_path)
    refused(tmp_path, "has neither model.safetensors nor model.safetensors.index.json")
    write_safetensors(tmp_path / SHARD_1, {"a": A})
    refused(tmp_path, f"(found {SHARD_1})")


def test_not_a_directory(tmp_path):
    refused(tmp_path / "absent", "not a readable model directory: No such file")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "not a readable model directory: Not a directory")
    with pytest.raises(ModelFormatError, match="null byte"):
        Checkpoint.open("a\0b")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not valid JSON"),
        ("[]", "holds a JSON array, expected an object"),
        ('{"rms_norm_eps": NaN}', "NaN is not a JSON number"),
        ('{"rope_theta": 1e400}', "'1e400' is out of range"),
        ('{"a": 1, "a": 2}', "key 'a' appears twice"),
        ('{"a":' * 100_000, "nested too deep"),
        (" " * 10_000_001, "10000001 bytes, expected at most 10000000"),
    ],
)
def test_bad_configuration(single, name, text, expected):
    (single / name).write_text(text)
    refused(single, expected)
    refused(single, f"{name}: ")


def test_config_is_required(single):
    (single / "config.json").unlink()
    refused(single, "config.json: no such file")


def test_bad_weights(single):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(single, "model.safetensors: the file has")


def test_links_that_lead_elsewhere(single, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("model.safetensors", "config.json"):
        (single / name).rename(elsewhere / name)
        (single / name).symlink_to(elsewhere / name)
        refused(single, "outside the model's directory")
        (single / name).unlink()
        (elsewhere / name).rename(single / name)
    assert Checkpoint.open(single)


# ---- shards --------------------------------------------------------------------------------------
SHARD_NAMES = [
    "../model.safetensors", "/etc/passwd", "/etc/x.safetensors", "sub/x.safetensors", "..",
    ".", "", "x.bin", "x.safetensors.bin", "x.safetensors\n", "\nx.safetensors", "a b.safetensors",
    "x.safetensors/..", "..\\x.safetensors", "C:x.safetensors", "~/x.safetensors",
    "x\0.safetensors", "é.safetensors", ".safetensor", "x.SAFETENSORS", "file:x.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("shard", SHARD_NAMES)
def test_shard_names(sharded, shard):
    write_index(sharded, {"a": SHARD_1, "b": shard})
    refused(sharded, "model.safetensors.index.json: tensor 'b' is in ")


@pytest.mark.parametrize("shard", [None, 1, True, [SHARD_1], {}])
def test_shard_names_are_text(sharded, shard):
    write_index(sharded, {"a": shard})
    refused(sharded, "tensor 'a' is in ")


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": null}',
     '{"weight_map": "x"}', '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
     '{"weight_map":' * 50_000, '{"weight_map": {"a": NaN}}', "", "\0"],
)  # fmt: skip
def test_bad_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    refused(sharded, "model.safetensors.index.json: ")


def missing_shard(directory):
    (directory / SHARD_2).unlink()
    return f"{SHARD_2}: no such file"


def truncated_shard(directory):
    data = (directory / SHARD_2).read_bytes()
    (directory / SHARD_2).write_bytes(data[:-4])
    return f"{SHARD_2}: the file has"


def shard_lacks_a_tensor(directory):
    write_index(directory, {"a": SHARD_1, "b": SHARD_2, "c": SHARD_1, "d": SHARD_2})
    return f"{SHARD_2}: has no tensor 'd', which model.safetensors.index.json says is in it"


def tensor_in_another_shard(directory):
    write_index(directory, {"a": SHARD_1, "b": SHARD_2, "c": SHARD_2})
    return f"{SHARD_1}: holds tensor 'c', which model.safetensors.index.json says is in '{SHARD_2}'"


def tensor_not_in_the_index(directory):
    write_index(directory, {"a": SHARD_1, "b": SHARD_2})
    return f"{SHARD_1}: holds tensor 'c', which model.safetensors.index.json says is in None"


def tensor_in_two_shards(directory):
    write_safetensors(directory / SHARD_2, {"b": B, "a": A})
    return f"{SHARD_2}: holds tensor 'a'"


def shard_under_two_names(directory):
    (directory / SHARD_2).unlink()
    (directory / SHARD_2).symlink_to(SHARD_1)
    return f"{SHARD_2}: is the same file as {SHARD_1}"


def shard_hard_linked(directory):
    (directory / SHARD_2).unlink()
    (directory / SHARD_2).hardlink_to(directory / SHARD_1)
    return f"{SHARD_2}: is the same file as {SHARD_1}"


def shard_is_a_fifo(directory):
    (directory / SHARD_2).unlink()
    os.mkfifo(directory / SHARD_2)
    return f"{SHARD_2}: a FIFO, socket or device"


def shard_is_a_device(directory):
    (directory / SHARD_2).unlink()
    (directory / SHARD_2).symlink_to("/dev/zero")
    return f"{SHARD_2}: a link to /dev/zero, outside"


def shard_is_a_directory(directory):
    (directory / SHARD_2).unlink()
    (directory / SHARD_2).mkdir()
    return f"{SHARD_2}: is a directory"


def shard_is_a_pickle(directory):
    (directory / SHARD_2).write_bytes(b"\x80\x04\x95\x0b" + b"\0" * 60)
    return f"{SHARD_2}: header"


@pytest.mark.parametrize(
    "damage",
    [missing_shard, truncated_shard, shard_lacks_a_tensor, tensor_in_another_shard,
     tensor_not_in_the_index, tensor_in_two_shards, shard_under_two_names, shard_hard_linked,
     shard_is_a_fifo, shard_is_a_device, shard_is_a_directory, shard_is_a_pickle],
)  # fmt: skip
def test_damaged_shards(sharded, damage):
    expected = damage(sharded)
    before = len(os.listdir("/proc/self/fd"))
    refused(sharded, expected)
    assert len(os.listdir("/proc/self/fd")) == before


# ---- what is opened ------------------------------------------------------------------------------
AUDIT = """
import sys
from pace_nb.models.loader import Checkpoint
from pace_nb.errors import PaceError
directory, opened, suspicious = sys.argv[1], set(), []

def hook(event, arguments):
    if event == "open" and str(arguments[0]).startswith(directory + "/"):
        opened.add(str(arguments[0])[len(directory) + 1:])
    elif event.split(".")[0] in {"pickle", "marshal", "exec", "compile", "socket", "subprocess"}:
        suspicious.append(event)

sys.addaudithook(hook)
try:
    with Checkpoint.open(directory) as checkpoint:
        for name in checkpoint.names():
            checkpoint.tensor(name, checkpoint.shape(name))
except PaceError as error:
    print(f"refused: {error}")
print(f"opened: {sorted(opened)} suspicious: {suspicious}")
"""


@pytest.mark.parametrize("layout", ["single", "sharded", "pickles"])
def test_only_the_expected_files_are_opened(request, tmp_path, layout):
    expected = ["config.json", "generation_config.json"]
    if layout == "pickles":
        write_config(tmp_path)
        expected = []
    else:
        request.getfixturevalue(layout)
        expected += (
            ["model.safetensors"]
            if layout == "single"
            else [SHARD_1, SHARD_2, "model.safetensors.index.json"]
        )
    (tmp_path / "generation_config.json").write_text("{}")
    config = {**CONFIG, "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    write_config(tmp_path, config)
    for bait in ("pytorch_model.bin", "training_args.pt", "modeling_evil.py", "tokenizer.pkl",
                 "extra.safetensors", "adapter_config.json", "chat_template.jinja"):  # fmt: skip
        (tmp_path / bait).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    result = subprocess.run(
        [sys.executable, "-c", AUDIT, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert f"opened: {sorted(expected)} suspicious: []" in result.stdout
    assert ("pytorch_model.bin: only safetensors" in result.stdout) == (layout == "pickles")


# ---- fuzzing a whole directory -------------------------------------------------------------------
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([SHARD_1, SHARD_2, "model.safetensors", "config.json"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["a", "b", "c", "weight_map"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(index=JSON_VALUES | st.fixed_dictionaries({"weight_map": JSON_VALUES}), config=JSON_VALUES)
def test_any_index_and_config(tmp_path_factory, index, config):
    directory = tmp_path_factory.mktemp("fuzz")
    write_safetensors(directory / SHARD_1, {"a": A, "c": C})
    write_safetensors(directory / SHARD_2, {"b": B})
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))
    try:
        checkpoint = Checkpoint.open(directory)
    except PaceError as error:
        assert type(error) is ModelFormatError and "\n" not in str(error)
    else:
        assert type(config) is dict
        for name in checkpoint.names():
            assert checkpoint.tensor(name, checkpoint.shape(name)).shape == checkpoint.shape(name)
