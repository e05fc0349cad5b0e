"""Tables fit the width they are printed at, and any stream takes any text."""

import io
import re
import sys

import pytest
from rich.console import Console

from emp_callbacks.terminal import FittedTable, any_output, make_console

NAMES = ["model.encoder.layers.11.self_attention.query_projection.weight", "fc.weight"]
NUMBERS = ["1,234,567", "+26.11 [+17.63, +34.59]", "0.5740"]


def a_table():
    table = FittedTable("title", more="report.html has them")
    table.add_column("layer")
    table.add_column("N", worth=1)
    table.add_column("difference [95 %]", worth=0)
    table.add_column("density", worth=2, footer="0.61")
    table.add_column("verdict", words=True)
    for name in NAMES:
        table.add_row(name, *NUMBERS, "no difference shown")
    return table


def shown_at(width, table=None):
    out = io.StringIO()
    Console(file=out, width=width).print(table or a_table())
    return out.getvalue()


@pytest.mark.parametrize("width", [160, 80, 60, 40])
def test_names_and_numbers_are_whole_at_any_width(width):
    shown = shown_at(width)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width
    assert "\u2026" not in shown
    body = re.split("\u2500+\\n", shown)[1].splitlines()
    first_column = "".join(line.split()[0] for line in body if line.strip() and not line[0].isspace())
    assert first_column.startswith("".join(NAMES))
    for number in ("+26.11", "[+17.63, +34.59]"):
        assert shown.count(number) == 2
    for number, heading in ((NUMBERS[0], "N"), (NUMBERS[2], "density")):
        told = re.search(r"not shown in \d+ columns: ([^;]*);", " ".join(shown.split()))
        assert (number in shown) != (told is not None and heading in told[1].split(", "))


def test_the_least_worthy_columns_are_left_out_first_and_said():
    assert "not shown" not in shown_at(160)
    shown = " ".join(shown_at(75).split())
    assert "not shown in 75 columns: density; widen the terminal, or set COLUMNS (report.html has them)" in shown


def test_a_long_word_does_not_take_the_room_of_names():
    table = FittedTable()
    table.add_column("")
    table.add_column("", words=True)
    table.add_row("checkpoints", "/a/very/long/path" * 6)
    assert "checkpoints " in shown_at(60, table)


def test_a_file_is_wider_than_a_terminal_of_80_columns_unless_columns_says_so(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert make_console().width == 160
    monkeypatch.setenv("COLUMNS", "77")
    assert make_console().width == 77


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_a_stream_that_is_not_utf_8_gets_a_plain_sign(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with any_output():
        make_console().print(a_table())
        sys.stdout.write("\u22121.5 \u2264 2 \u03b2")
        sys.stdout.flush()
    assert raw.getvalue().decode(encoding).endswith("-1.5 <= 2 \\u03b2")
    with pytest.raises(UnicodeEncodeError):
        sys.stdout.write("\u2212")
