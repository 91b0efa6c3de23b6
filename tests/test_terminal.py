"""lab.terminal: a terminal sees bars and notices, a notebook and a pipe see nothing."""

import contextlib
import sys

import pytest
from lora2qlora.lab import terminal
from transformers.utils import logging

either = pytest.mark.parametrize("is_terminal", [True, False])


@either
def test_a_bar_is_drawn_on_a_terminal_only(is_terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert list(terminal.progress(range(3), "train")) == [0, 1, 2]
    assert ("train" in capsys.readouterr().err) == is_terminal


@either
def test_a_notice_is_seen_on_a_terminal_only(is_terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    terminal.notice("converting again")
    found = capsys.readouterr()
    assert found.err == ("converting again\n" if is_terminal else "")
    assert found.out == ""


@either
def test_bars_are_off_within_and_on_again_after_an_error(is_terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    with contextlib.suppress(ValueError), terminal.quiet_unless_terminal():
        assert logging.is_progress_bar_enabled() == is_terminal
        print("a bar", file=sys.stderr)
        raise ValueError("wrong")
    assert logging.is_progress_bar_enabled()
    assert ("a bar" in capsys.readouterr().err) == is_terminal
