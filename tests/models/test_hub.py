"""Names and directories. No network: snapshot_download is replaced, or finds a made-up cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from pace_nb.errors import ModelFormatError, ModelNotFoundError
from pace_nb.models import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"  # noqa: S105


# ---- names that need no hub ----------------------------------------------------------------------
@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def test_nothing_means_the_bundled_model(no_hub):
    assert hub.resolve(None) == hub.DEMO_MODEL
    assert (hub.DEMO_MODEL / "config.json").is_file()


def test_a_directory_is_itself(no_hub, tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub.resolve(str(tmp_path)) == tmp_path
    assert hub.resolve(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("owner/name") == Path("owner/name")  # goes before the hub's
    assert hub.resolve(".") == Path(".")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/owner") == tmp_path / "owner"


@pytest.mark.parametrize(
    "name",
    ["/no/such/dir", "./name", "../name", "~/no/such", "~nobody-at-all/x", "a/b/c", "a/", "/a", "",
     " ", "a b", "a\\b", "owner/name\n", "x" * 97, "a/" + "x" * 97, "x" * 5000, "a\0b", "http://x/y",
     "-o/name", ".hidden", "é/x", Path("owner/name"), Path("name")],
)  # fmt: skip
def test_what_looks_like_a_path_does_not_go_to_the_hub(no_hub, name):
    with pytest.raises(ModelNotFoundError, match="no such directory, and not a hub name") as caught:
        hub.resolve(name)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_model(no_hub, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="is a file, expected its directory"):
        hub.resolve(tmp_path / "model.safetensors")


def test_a_directory_needs_no_huggingface_hub(tmp_path):
    code = (
        "import sys; from pace_nb.models import hub; hub.resolve(sys.argv[1]); hub.resolve(None);"
        "sys.exit('huggingface_hub' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


# ---- downloads -----------------------------------------------------------------------------------
@pytest.fixture
def fake_download(monkeypatch, tmp_path):
    """Replaces snapshot_download; `.calls` are its arguments, `.error` is what it raises."""
    fake = SimpleNamespace(calls=[], error=None, directory=tmp_path / "snapshot")
    fake.directory.mkdir()
    (fake.directory / "model.safetensors").write_bytes(b"")

    def snapshot_download(name, **options):
        fake.calls.append((name, options))
        if fake.error is not None:
            raise fake.error
        return str(fake.directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fake


@pytest.mark.parametrize("name", ["owner/name", "gpt2", "Qwen/Qwen2.5-0.5B", "_x/y_z.1", "1/2"])
def test_a_hub_name_is_downloaded(fake_download, name):
    found = hub.resolve(name, revision="v1", token=TOKEN, offline=True)
    assert found == fake_download.directory
    ((called, options),) = fake_download.calls
    assert called == name
    assert options["revision"] == "v1"
    assert options["token"] == TOKEN
    assert options["local_files_only"] is True


def test_what_is_downloaded(fake_download):
    hub.resolve("owner/name")
    ((_, options),) = fake_download.calls
    assert options["revision"] is None and options["token"] is None
    assert options["local_files_only"] is False
    repository = [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model",
        "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json",
    ]  # fmt: skip
    others = [
        "pytorch_model.bin", "pytorch_model.bin.index.json.bin", "original/consolidated.00.pth",
        "original/params.json", "original/model.safetensors", "consolidated.safetensors",
        "consolidated.00.pth", "onnx/model.onnx", "onnx/config.json", "model.gguf", "README.md",
        "modeling_evil.py", "flax_model.msgpack", ".gitattributes", "tokenizer.bin",
    ]  # fmt: skip
    taken = huggingface_hub.utils.filter_repo_objects(
        repository + others,
        allow_patterns=options["allow_patterns"],
        ignore_patterns=options["ignore_patterns"],
    )
    assert list(taken) == repository


def test_a_model_without_safetensors(fake_download):
    (fake_download.directory / "model.safetensors").unlink()
    with pytest.raises(ModelFormatError, match="model 'owner/name' has no safetensors weights"):
        hub.resolve("owner/name")


def http_error(error_class):
    response = SimpleNamespace(headers={}, request=None, status_code=403)
    return error_class(f"403 Client Error.\n\nBearer {TOKEN}\nretry", response=response)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (http_error(errors.GatedRepoError), "is gated: accept its licence at https://"),
        (http_error(errors.RepositoryNotFoundError), "no such directory, and not on the hub"),
        (http_error(errors.RevisionNotFoundError), "has the model but not this revision"),
        (http_error(errors.HfHubHTTPError), "cannot be downloaded: HfHubHTTPError"),
        (errors.HFValidationError("Repo id must\nbe"), "not a hub name (owner/name)"),
        (errors.LocalEntryNotFoundError(f"x\n{TOKEN}"), "not in the local cache"),
        (errors.IncompleteSnapshotError("x", snapshot_path="y"), "only partly in the local cache"),
        (OSError(28, "No space left on device"), "cannot be downloaded: No space left on device"),
        (TimeoutError(f"{TOKEN}"), "cannot be downloaded: TimeoutError"),
        (RuntimeError(f"headers: {TOKEN}\n"), "cannot be downloaded: RuntimeError"),
    ],
)
def test_one_line_per_failure(fake_download, error, expected):
    fake_download.error = error
    with pytest.raises(ModelNotFoundError) as caught:
        hub.resolve("owner/name", revision="v1", token=TOKEN)
    message = str(caught.value)
    assert message.startswith("model 'owner/name' at revision 'v1'")
    assert expected in message
    assert TOKEN not in message and "\n" not in message
    assert caught.value.__cause__ is error  # what --debug shows


def test_offline_or_unreachable(fake_download, monkeypatch):
    fake_download.error = errors.LocalEntryNotFoundError("x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelNotFoundError, match=r"not in the local cache, and https://.*reached"):
        hub.resolve("owner/name")
    with pytest.raises(ModelNotFoundError, match="not in the local cache, and offline mode is on"):
        hub.resolve("owner/name", offline=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="not in the local cache, and offline mode is on"):
        hub.resolve("owner/name")


# ---- the cache, with the real huggingface_hub and no network -------------------------------------
@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache directory in offline mode."""
    directory = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory))
    return directory


def add_model(cache, name, source, commit=COMMIT, ref="main", kind="models"):
    """Lay out `source`'s files as one snapshot, each a link to a blob."""
    model = cache / f"{kind}--{name.replace('/', '--')}"
    snapshot = model / "snapshots" / commit
    for directory in (snapshot, model / "blobs", model / "refs"):
        directory.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(sorted(source.iterdir())):
        blob = model / "blobs" / f"{commit[:8]}{number}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    (model / "refs" / ref).write_text(commit)
    return snapshot


@pytest.fixture
def tiny(tmp_path):
    """A model directory: two tensors, 10 BF16 and 3 F32 elements."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    header = {
        "a": {"dtype": "BF16", "shape": [5, 2], "data_offsets": [0, 20]},
        "b": {"dtype": "F32", "shape": [3], "data_offsets": [20, 32]},
    }
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + bytes(32)
    )
    (directory / "config.json").write_text(
        json.dumps({
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 2048,
            "text_config": {"hidden_size": 2, "vocab_size": True},
            "num_hidden_layers": "two",
        })
    )  # fmt: skip
    return directory


def test_no_cache_yet(cache):
    assert hub.list_cached() == []
    with pytest.raises(ModelNotFoundError, match="offline mode is on"):
        hub.resolve("owner/name")


def test_a_cached_model(cache, tiny):
    snapshot = add_model(cache, "owner/name", tiny)
    assert hub.resolve("owner/name") == snapshot
    assert hub.resolve("owner/name", revision=COMMIT) == snapshot
    assert hub.resolve("owner/name", offline=True) == snapshot
    with pytest.raises(ModelNotFoundError, match=r"at revision 'v2': .* and offline mode is on"):
        hub.resolve("owner/name", revision="v2")
    facts = hub.show("owner/name")
    assert facts == hub.ModelFacts(
        name="owner/name", directory=snapshot, architecture="LlamaForCausalLM", is_supported=True,
        num_parameters=13, dtypes=("BF16", "F32"), nbytes=32, num_files=1, num_tensors=2,
        context_length=2048, vocab_size=None, hidden_size=2, num_hidden_layers=None,
        num_attention_heads=None, num_key_value_heads=None,
    )  # fmt: skip


def test_a_cached_model_without_weights(cache, tiny):
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    add_model(cache, "owner/name", tiny)
    assert hub.list_cached() == []
    with pytest.raises(ModelFormatError, match="has no safetensors weights"):
        hub.resolve("owner/name")


def test_list_cached(cache, tiny):
    older = add_model(cache, "b/two", tiny, commit="a" * 40, ref="v1")
    newer = add_model(cache, "b/two", tiny)
    first = add_model(cache, "a/one", tiny)
    add_model(cache, "some/data", tiny, kind="datasets")
    for snapshot, seconds in ((older, 1000), (newer, 2000), (first, 3000)):
        for file in snapshot.iterdir():
            os.utime(file.resolve(), (seconds, seconds))
    cached = hub.list_cached()
    size = sum(file.stat().st_size for file in tiny.iterdir())
    assert [(m.name, m.directory, m.revision, m.refs, m.nbytes) for m in cached] == [
        ("a/one", first, COMMIT, ("main",), size),
        ("b/two", newer, COMMIT, ("main",), size),
        ("b/two", older, "a" * 40, ("v1",), size),
    ]
    assert [m.last_modified for m in cached] == [3000, 2000, 1000]


def test_show_the_bundled_model():
    facts = hub.show(None)
    assert (facts.name, facts.directory) == ("demo", hub.DEMO_MODEL)
    assert facts.is_supported and facts.architecture == "LlamaForCausalLM"
    config = json.loads((hub.DEMO_MODEL / "config.json").read_text())
    assert facts.vocab_size == config["vocab_size"]
    assert facts.nbytes == 2 * facts.num_parameters <= 6_000_000


@pytest.mark.parametrize(
    "architectures", [None, [], ["NoSuchForCausalLM"], [3], "LlamaForCausalLM"]
)
def test_show_an_unknown_architecture(tiny, architectures):
    (tiny / "config.json").write_text(json.dumps({"architectures": architectures}))
    facts = hub.show(tiny)
    assert not facts.is_supported
    known = architectures == ["NoSuchForCausalLM"]
    assert facts.architecture == ("NoSuchForCausalLM" if known else None)
