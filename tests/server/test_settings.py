"""Who may be reached by whom is decided before anything listens."""

from __future__ import annotations

import pytest

from pace_nb.errors import ConfigError
from pace_nb.server.settings import Settings


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])
def test_a_public_address_needs_a_key_or_courage(host):
    with pytest.raises(ConfigError, match="--api-key"):
        Settings(host=host)
    assert not Settings(host=host, api_keys=("k",)).is_local
    assert not Settings(host=host, insecure_no_auth=True).is_local


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "::1", "localhost"])
def test_loopback_needs_none(host):
    assert Settings(host=host).is_local


def test_a_unix_socket_is_local_whatever_the_host():
    settings = Settings(host="0.0.0.0", uds="/tmp/x")
    assert settings.is_local and settings.host_names == frozenset()


def test_names_of_the_host():
    assert Settings(host="::1", allowed_hosts=("Box.lan",)).host_names == {
        "localhost", "127.0.0.1", "[::1]", "box.lan",
    }  # fmt: skip
    public = {"host": "0.0.0.0", "api_keys": ("k",)}
    assert Settings(**public).host_names == frozenset()
    assert "box.lan" in Settings(**public, allowed_hosts=("box.lan",)).host_names


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"port": 70000}, "port is 70000"),
        ({"port": True}, "port is True"),
        ({"host": ""}, "host is empty"),
        ({"api_keys": ("",)}, "API key is wrong"),
        ({"api_keys": ("clé",)}, "API key is wrong"),
        ({"served_model_names": ("",)}, "served_model_name is empty"),
        ({"data_parallel_size": 0}, "data_parallel_size is 0"),
        ({"metrics_prefix": "a b"}, "metrics_prefix is 'a b'"),
    ],
)
def test_what_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**wrong)


def test_keys_are_not_shown():
    assert "secret" not in repr(Settings(api_keys=("secret",)))


def test_readers_of_messages_have_names():
    Settings(reasoning_parser="qwen3", tool_call_parser="none")
    with pytest.raises(ConfigError, match="tool_call_parser is 'xml', expected hermes"):
        Settings(tool_call_parser="xml")
