from __future__ import annotations

import inspect

import pytest

from pace_nb import errors
from pace_nb.errors import PaceError, one_line

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, PaceError)]


@pytest.mark.parametrize("error_class", CLASSES)
def test_a_message_is_one_line_whatever_is_put_into_it(error_class):
    error = error_class("tensor 'a\nb'\r\n  is wrong:\x1b[31m red \ud800 \u2028 end\x00")
    assert str(error) == "tensor 'a b' is wrong:\\x1b[31m red \\ud800 end\\x00"
    str(error).encode()  # can be written to any UTF-8 terminal


@pytest.mark.parametrize("error_class", CLASSES)
def test_each_says_what_it_is_for(error_class):
    assert error_class.__doc__ and error_class.__doc__ != PaceError.__base__.__doc__


def test_wrong_values_are_value_errors():
    """Code that knows nothing of pace_nb catches them by the usual name."""
    wrong_values = {c.__name__ for c in CLASSES if issubclass(c, ValueError)}
    assert wrong_values == {"InvalidRequestError", "ApiError", "ShapeError", "ConfigError"}


def test_text_a_person_can_read_is_left_alone():
    assert one_line("größe 日本 – ok") == "größe 日本 – ok"
