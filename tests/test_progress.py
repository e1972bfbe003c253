"""The progress display: speed and time left on a terminal, nothing at all elsewhere."""

import io
import re
import sys
import time

import pytest
from rich.console import Console
from tiny import WORDS, save_tiny_bert

from guided_dropout.cli import app as cli
from guided_dropout.cli import console


@pytest.fixture
def measured(tmp_path, monkeypatch, capsys):
    """A function that runs `fisher` on 60 samples and returns what it wrote to stdout and stderr."""
    save_tiny_bert(tmp_path / "model")
    (tmp_path / "text.txt").write_text(
        "\n".join(" ".join(WORDS[(i * j + i) % 17] for j in range(12)) for i in range(99))
    )

    def run():
        line = "fisher model --text text.txt --samples 60 --max-length 12 --batch-size 4 --device cpu --out profile"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["guided-dropout", *line.split()])
        monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        assert not stopped.value.code, err
        return out, err

    return run


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal in place of stderr is sent."""
    monkeypatch.setenv("TERM", "xterm-256color")
    sent = io.StringIO()
    monkeypatch.setattr(console, "errors", Console(file=sent, force_terminal=True, width=120))
    return sent


def shown(sent):
    """The lines of a terminal's text, without the codes that colour and move."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", sent.getvalue()))


def test_a_terminal_shows_samples_and_tokens_per_second_and_the_time_left(measured, terminal):
    out, _ = measured()
    bars = [line for line in shown(terminal) if "samples" in line]
    assert re.search(r"samples .*\d+/60 [\d,.]+/s, [\d,]+ tokens/s \d:\d\d:\d\d", bars[-1])
    assert any("blocks of text" in line for line in shown(terminal))
    assert terminal.getvalue().endswith("\x1b[2K")  # and is gone in the end
    assert "/60" not in out


def test_elsewhere_nothing_of_it_is_printed(measured):
    out, err = measured()
    assert err == ""
    assert [line.split()[-1] for line in out.splitlines()] == ["rule", "profile"]
    assert "/s" not in out
    assert "\x1b" not in out


def test_the_time_left_is_a_guess_from_the_speed(terminal):
    with console.progress_bar("steps", 1000) as update:
        for done in (1, 2, 3):
            update(done)
            time.sleep(0.03)
    (hours, minutes, seconds) = re.search(r"steps .* 3/1000 [\d.]+/s (\d):(\d\d):(\d\d)", shown(terminal)[-2]).groups()
    assert 15 < 3600 * int(hours) + 60 * int(minutes) + int(seconds) < 600


def test_without_a_total_there_is_the_speed(terminal):
    with console.progress_bar("blocks", None) as update:
        for done in (1, 2, 3):
            update(done)
            time.sleep(0.01)
    assert re.search(r"blocks .* 3/\? [\d,.]+/s", "\n".join(shown(terminal)))


def test_what_is_printed_meanwhile_stands_above_the_bar(terminal, monkeypatch):
    """Where both go to one terminal."""
    monkeypatch.setattr(console, "console", Console(file=terminal, force_terminal=True, width=120))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with console.progress_bar("steps", 10) as update:
        update(1)
        console.console.print("half of them are left out")
    assert "half of them are left out" in shown(terminal)
    assert terminal.getvalue().endswith("\x1b[2K")


def test_what_is_printed_meanwhile_reaches_a_file(terminal, capsys):
    with console.progress_bar("steps", 10) as update:
        update(1)
        console.console.print("half of them are left out")
    assert capsys.readouterr().out == "half of them are left out\n"
    assert any("1/10" in line for line in shown(terminal))
    assert "half of them" not in terminal.getvalue()


def test_brackets_in_names_of_files_are_text(terminal, capsys):
    with console.progress_bar("part[ab].csv [/guided]", 10) as update:
        update(1)
        console.console.print("part[ab].csv [/guided]")
    assert capsys.readouterr().out == "part[ab].csv [/guided]\n"
    assert any("part[ab].csv [/guided]" in line for line in shown(terminal))
