"""Arguments, help, completion and drawing of the host magics."""

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentvm_kernel.jupyter import cell_guard
from agentvm_kernel.jupyter.magics import assist, machine, render
from agentvm_kernel.jupyter.magics.arguments import UsageError, split_words
from agentvm_kernel.jupyter.magics.engine import load_magics
from agentvm_kernel.jupyter.magics.names import CELL_MAGICS, HOST_MAGICS
from agentvm_kernel.jupyter.magics.render import Column

MAGICS = load_magics()


class Travel:
    def names(self):
        return ["before", "after", "best-1"]


class Notebook:
    travel = Travel()


def test_every_name_has_a_magic_with_help():
    assert set(MAGICS) == HOST_MAGICS
    for name, magic in MAGICS.items():
        assert magic.is_cell_magic == (name in CELL_MAGICS)
        text = magic.help()
        assert text.startswith(f"{magic.written} ")
        assert "%%%" not in text
        assert len(text) > 200
        assert max(map(len, text.split("\n"))) <= 120


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        ("snapshot", "a", {"name": "a", "description": "", "list": False, "delete": None, "export": False}),
        ("snapshot", "a -d 'two words'  # and a comment", {"name": "a", "description": "two words"}),
        ("snapshot", "--delete a", {"name": None, "delete": "a"}),
        ("restore", "a", {"name": "a"}),
        ("undo", "", {"cells": 1}),
        ("undo", "3", {"cells": 3}),
        ("vm", "", {"action": "status", "value": None}),
        ("vm", "timeout 3", {"action": "timeout", "value": "3"}),
        ("pool", "2", {"size": "2"}),
    ],
)
def test_lines_are_read(name, line, expected):
    read = vars(MAGICS[name].read(split_words(line), None))
    assert {key: read[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "line", "body", "said"),
    [
        ("snapshot", "a b", None, "unrecognized arguments: b"),
        ("snapshot", "--what", None, "--what"),
        ("snapshot", "'open", None, "no closing quotation"),
        ("snapshot", "a", "body", "%%snapshot does not exist"),
        ("restore", "", None, "NAME"),
        ("undo", "many", None, "invalid int value"),
        ("vm", "explode", None, "invalid choice"),
        ("fork", "3", None, "%%fork"),
        ("fork", "", "x", "N"),
    ],
)
def test_what_does_not_fit_is_a_usage_error_that_says_how_it_is_done(name, line, body, said):
    with pytest.raises(UsageError) as caught:
        MAGICS[name].read(split_words(line), body)
    assert said in str(caught.value)
    assert caught.value.hint


@given(st.text(max_size=80))
def test_any_line_is_read_or_refused(line):
    for magic in MAGICS.values():
        with contextlib.suppress(UsageError):
            magic.read(split_words(line), "x" if magic.is_cell_magic else None)


# ---- Tab and Shift-Tab


def completed(code, cursor=None):
    reply = assist.complete(MAGICS, Notebook(), code, len(code) if cursor is None else cursor)
    return None if reply is None else reply["matches"]


def test_names_of_snapshots_are_offered():
    assert completed("%restore ") == ["before", "after", "best-1"]
    assert completed("x = 1\n%restore be") == ["before", "best-1"]
    assert completed("%restore before ") == []
    assert completed("%snapshot --delete b") == ["before", "best-1"]


def test_options_and_words_are_offered():
    assert completed("%snapshot --") == ["--description", "--list", "--delete", "--export"]
    assert completed("%snapshot -d ") == []
    assert completed("%vm re") == ["restart", "resume"]
    assert completed("%vm autocheckpoint ") == ["on", "off"]
    assert "--keep" in completed("%%fork 3 ")


def test_the_match_replaces_the_word_at_the_cursor():
    reply = assist.complete(MAGICS, Notebook(), "é\n%restore be\nx = 1", 13)
    assert (reply["cursor_start"], reply["cursor_end"]) == (11, 13)


@pytest.mark.parametrize(
    "code", ["%res", "%restore", "restore ", "x %restore ", "%%time\nx", "print(", "%time %restore x"]
)
def test_the_rest_is_the_guests_to_complete(code):
    assert completed(code) is None


@given(st.text(max_size=60), st.integers(-5, 70))
def test_completing_anything_anywhere_is_safe(code, cursor):
    assist.complete(MAGICS, Notebook(), code, cursor)
    assist.inspect(MAGICS, f"%vm {code}", cursor)


@pytest.mark.parametrize("code", ["%restore", "%restore x", "  %restore?", "?%restore"])
def test_help_for_the_line_with_the_cursor(code):
    reply = assist.inspect(MAGICS, f"x = 1\n{code}\ny", 6 + len(code))
    assert reply["found"]
    assert "Put the machine back" in reply["data"]["text/plain"]
    assert assist.inspect(MAGICS, f"x = 1\n{code}\ny", 2) is None


# ---- drawing


def test_columns_as_text_and_html():
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": "\x1b[31mred\x1b[0m 10%\r100%\n"},
        {"output_type": "execute_result", "data": {"text/plain": "<Thing>"}},
        {"output_type": "error", "ename": "E", "evalue": "v", "traceback": ["line <1>", "\x1b[0;31mE\x1b[0m: v"]},
        {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo=\n", "text/plain": "<Figure>"}},
    ]
    columns = [Column("FORK = 0", "done", outputs), Column("FORK = 1")]
    assert render.as_text(columns) == "── FORK = 0 (done) ──\n100%\n<Thing>\nE: v\n<Figure>\n── FORK = 1 (starting) ──"
    page = render.as_html(columns)
    assert "&lt;Thing&gt;" in page
    assert "line &lt;1&gt;\nE: v" in page
    assert 'src="data:image/png;base64,iVBORw0KGgo="' in page
    assert "\x1b" not in page


def test_tables_survive_and_scripts_do_not():
    markup = (
        "<style>td {color: red}</style><table border='1' onclick='x()'><tr><td colspan=2 style='x'>1 &lt; 2</td></tr></table>"
        "<script>alert(1)</script><img src=x onerror=alert(1)><a href='javascript:x'>link</a></div><b>open"
    )
    assert render.clean_html(markup) == '<table><tr><td colspan="2">1 &lt; 2</td></tr></table>link<b>open</b>'


def test_much_output_is_cut_at_whole_pieces():
    outputs = [{"output_type": "stream", "name": "stdout", "text": "x" * 100_000}] * 100
    page = render.as_html([Column("0", "done", outputs)])
    assert len(page) < 2 * render.MAX_COLUMN
    assert page.count("<pre") == page.count("</pre>")


TAG = re.compile(r"<(/?)([a-z0-9]+)((?: colspan=\"[0-9]+\"| rowspan=\"[0-9]+\")*)>")


@given(st.text(alphabet=st.sampled_from(list("<>/ab=\"' &;!-#x?scriptylef")), max_size=80))
def test_cleaned_html_holds_nothing_but_known_elements_well_nested(markup):
    cleaned = render.clean_html(markup)
    rest = TAG.sub("", cleaned)
    assert "<" not in rest
    assert ">" not in rest
    stack = []
    for closing, name, _ in TAG.findall(cleaned):
        assert name in render._ELEMENTS
        if closing:
            assert stack.pop() == name
        elif name not in ("br", "hr"):
            stack.append(name)
    assert not stack


# ---- values


@pytest.mark.parametrize(("text", "size"), [("100", 100), ("10k", 10240), ("10M", 10 << 20), ("2GB", 2 << 30)])
def test_sizes(text, size):
    assert machine._size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5M", "M", "10T", "٣", "9" * 20])
def test_what_is_no_size(text):
    with pytest.raises(UsageError):
        machine._size(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "1e9", "nan", "inf", "off", "٣"])
def test_what_is_no_time(text):
    with pytest.raises(UsageError):
        machine._seconds(text)


@pytest.mark.parametrize(
    ("size", "text"), [(1, "1 bytes"), (1024, "1 KiB"), (1536, "1.5 KiB"), (10 << 20, "10 MiB"), (3 << 40, "3072 GiB")]
)
def test_sizes_for_people(size, text):
    assert cell_guard.cap_text(size) == text
