"""States on stderr: each once where it is no terminal; a spinner, then nothing, where it is one."""

import io
import os

import pytest

from lightvllm.cli.terminal import status, stdout


def test_lines_where_it_is_no_terminal(capsys):
    with status() as show:
        for what in ("one", "one", "two [b]"):
            show(what)
    assert capsys.readouterr() == ("", "one\ntwo [b]\n")


def test_a_spinner_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with status() as show:
        show("loading [weights]")
    assert "loading [weights]" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K"), "the line is cleared at the end"


def test_nobody_reads(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(os.dup(writer), "w", buffering=1) as file:
        monkeypatch.setattr("sys.stdout", file)
        os.close(writer)
        with pytest.raises(BrokenPipeError):
            stdout().print("text")
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # what is buffered still has to go somewhere
