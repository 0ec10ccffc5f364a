from __future__ import annotations

import os
import socket
import time

import pytest

from pace_nb.errors import ModelFormatError
from pace_nb.models.model_files import MAX_JSON_DEPTH, open_file, parse_json, read_json, shown


def contents(directory, name):
    with os.fdopen(open_file(directory, name), "rb") as file:
        return file.read()


# ---- which files are opened ----------------------------------------------------------------------
def test_a_regular_file(tmp_path):
    (tmp_path / "a.json").write_bytes(b"{}")
    assert contents(tmp_path, "a.json") == b"{}"


def test_a_link_within_the_directory(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").symlink_to("a")
    assert contents(tmp_path, "b") == b"x"


def test_the_directory_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    assert contents(tmp_path / "link", "a") == b"x"


def hub_cache(root):
    """A snapshot as huggingface_hub lays it out: its files are links to blobs."""
    model = root / "hub" / "models--owner--name"
    snapshot = model / "snapshots" / ("c" * 40)
    for directory in (snapshot, model / "blobs", root / "hub" / "blobs" / "ab"):
        directory.mkdir(parents=True)
    return model, snapshot


def test_links_into_the_hub_cache(tmp_path):
    model, snapshot = hub_cache(tmp_path)
    (model / "blobs" / "1").write_bytes(b"own")
    (snapshot / "a").symlink_to("../../blobs/1")
    (tmp_path / "hub" / "blobs" / "ab" / "abc").write_bytes(b"shared")
    (model / "blobs" / "2").symlink_to("../../blobs/ab/abc")
    (snapshot / "b").symlink_to("../../blobs/2")
    assert (contents(snapshot, "a"), contents(snapshot, "b")) == (b"own", b"shared")


def test_links_out_of_the_hub_cache(tmp_path):
    model, snapshot = hub_cache(tmp_path)
    (tmp_path / "hub" / "secret").write_bytes(b"token")
    (model / "blobs" / "1").symlink_to("../../secret")
    (snapshot / "a").symlink_to("../../blobs/1")
    with pytest.raises(ModelFormatError, match="outside the model's directory"):
        open_file(snapshot, "a")


def outside(tmp_path, directory):
    (tmp_path / "secret").write_bytes(b"x")
    (directory / "f").symlink_to("../secret")
    return "outside the model's directory"


def device(tmp_path, directory):
    (directory / "f").symlink_to("/dev/zero")
    return "outside the model's directory"


def fifo(tmp_path, directory):
    os.mkfifo(directory / "f")
    return "a FIFO, socket or device"


def link_to_fifo(tmp_path, directory):
    os.mkfifo(directory / "g")
    (directory / "f").symlink_to("g")
    return "a FIFO, socket or device"


def unix_socket(tmp_path, directory):
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(directory)  # a socket's path may have 107 bytes, fewer than a tmp_path
        try:
            listener.bind("f")
        finally:
            os.chdir(here)
    return "a FIFO, socket or device"


def subdirectory(tmp_path, directory):
    (directory / "f").mkdir()
    return "is a directory, expected a file"


def circle(tmp_path, directory):
    (directory / "f").symlink_to("g")
    (directory / "g").symlink_to("f")
    return "cannot be opened"


def dangling(tmp_path, directory):
    (directory / "f").symlink_to("g")
    return "no such file"


def missing(tmp_path, directory):
    return "no such file"


@pytest.mark.parametrize(
    "make",
    [outside, device, fifo, link_to_fifo, unix_socket, subdirectory, circle, dangling, missing],
)
def test_refused_files(tmp_path, make):
    directory = tmp_path / "model"
    directory.mkdir()
    expected = make(tmp_path, directory)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ModelFormatError, match=expected) as caught:
        open_file(directory, "f")
    assert str(directory / "f") in str(caught.value)
    assert set(os.listdir("/proc/self/fd")) == before


# ---- JSON ----------------------------------------------------------------------------------------
def test_sound_json():
    text = ' {"a": [1, -2.5, 1e3, true, null, "\\u00e9\\ud83d\\ude00"], "b": {"c": {}}} '
    assert parse_json(text.encode(), "f") == {
        "a": [1, -2.5, 1000.0, True, None, "é😀"],
        "b": {"c": {}},
    }


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b"{}\0", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": 01}', "not valid JSON"),
        (b'{"a": "\n"}', "not valid JSON"),
        (b'{"a": 1} // no', "not valid JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": [-Infinity]}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "'1e999' is out of range"),
        (b'{"a": -1e999}', "'-1e999' is out of range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": 1, "a": 1}', "key 'a' appears twice"),
        (b'{"b": [{"a": 1, "c": 2, "\\u0061": 3}]}', "key 'a' appears twice"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 at byte 0"),
        (b'{"a": "\xc3"}', "not UTF-8 at byte 7"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        (b"[]", "holds a JSON array, expected an object"),
        (b'"a"', "holds a JSON string"),
        (b"null", "holds a JSON null"),
        (b"true", "holds a JSON boolean"),
        (b"3", "holds a JSON number"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"[" * 1_000_000, "nested too deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
        (b'{"a":' * (MAX_JSON_DEPTH + 1) + b"1" + b"}" * (MAX_JSON_DEPTH + 1), "nested deeper"),
        (b'{"a":' + b"[" * MAX_JSON_DEPTH + b"]" * MAX_JSON_DEPTH + b"}", "nested deeper"),
    ],
)
def test_refused_json(data, expected):
    start = time.monotonic()
    with pytest.raises(ModelFormatError) as caught:
        parse_json(data, "dir/f.json")
    assert str(caught.value).startswith("dir/f.json: ")
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 300
    assert time.monotonic() - start < 10  # a hang, not a timing


def test_the_deepest_json():
    assert parse_json(b'{"a":' * MAX_JSON_DEPTH + b"1" + b"}" * MAX_JSON_DEPTH, "f")


def test_size_cap(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": 1}')
    assert read_json(tmp_path, "a.json", max_bytes=8) == {"a": 1}
    with pytest.raises(ModelFormatError, match="8 bytes, expected at most 7"):
        read_json(tmp_path, "a.json", max_bytes=7)


def test_a_huge_sparse_file_is_not_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ModelFormatError, match="expected at most"):
        read_json(tmp_path, "config.json")


@pytest.mark.parametrize("value", ["x" * 10**7, list(range(10**6)), {"a": "b" * 10**6}, 10**4000])
def test_shown_is_short(value):
    assert len(shown(value)) <= 80
