"""How commands show amounts, times and tables."""

import time

import pytest

from agentvm_kernel.commands import _text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"),
        (0.4, "0 s"),
        (59.9, "59 s"),
        (61, "1 min 1 s"),
        (120, "2 min"),
        (3600 + 5 * 60 + 7, "1 h 5 min"),
        (7200, "2 h"),
        (3 * 86400 + 59, "3 d"),
        (3 * 86400 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_a_time_span_has_its_two_largest_units(seconds, shown):
    assert _text.duration(seconds) == shown


def test_amounts_and_moments(monkeypatch):
    assert (_text.mib(None), _text.mib(3 << 20)) == ("-", "3")
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    assert _text.local_time("2026-01-02T03:04:05+00:00") == _text.local_time(1767323045.0) == "2026-01-02 03:04"
    assert _text.local_time("") == "-"


def test_a_table_in_a_pipe_is_not_cut_and_takes_no_markup(capsys):
    _text.print_table(("Name", "Text"), [("a", "[bold]" + "x" * 300)])
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split() == ["Name", "Text"]
    assert line.rstrip() == "a     [bold]" + "x" * 300
