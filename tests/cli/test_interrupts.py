"""Ctrl-C comes when it may, and is not lost."""

from __future__ import annotations

import os
import signal

import pytest

from pace_nb.cli import interrupts


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_one_is_noted_and_the_handler_comes_back():
    before = signal.getsignal(signal.SIGINT)
    with interrupts.noted() as interrupted:
        assert not interrupted()
        interrupt()
        assert interrupted()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_one_is_for_good():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts.noted():
        interrupt()
        interrupt()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_deferred_one_comes_at_the_end():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.deferred():
        interrupt()
        done.append(True)
    assert done
    with interrupts.deferred():
        pass


def test_an_error_inside_wins():
    with pytest.raises(ZeroDivisionError), interrupts.deferred():
        interrupt()
        raise ZeroDivisionError
