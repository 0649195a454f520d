"""What `agentvm run` prints: text from guests must not drive the terminal."""

import io

from hypothesis import given
from hypothesis import strategies as st
from nbformat import v4
from rich.console import Console

from agentvm_kernel.run_report import SOURCE_LINES, Report, printable


def test_colours_and_controls_are_removed():
    assert printable("\x1b[0;31mred\x1b[0m\ttext\n") == "red\ttext\n"
    assert printable("\x1b]0;title\x07x") == "x"
    assert printable("\x1b]8;;http://evil\x1b\\link") == "link"
    assert printable("a\rb\x9b2Jc\x08") == "a\ufffdb\ufffd2Jc\ufffd"
    assert printable("\u202egnp.exe") == "\ufffdgnp.exe"


@given(st.text(st.sampled_from("\x1b\x9b[]();?m0123;\x07\\ab\r\n\x00\x7f")))
def test_nothing_that_a_terminal_obeys_is_left(text):
    assert not set(printable(text)) - set("[]();?m0123;\\ab\n\ufffd")


def shown(act) -> str:
    stream = io.StringIO()
    with Report(Console(file=stream, width=80, soft_wrap=True)) as report:
        act(report)
    return stream.getvalue()


def test_a_line_for_each_cell_in_a_log():
    def act(report):
        report.starting("machine")
        report.stage("Booting a virtual machine")
        report.started(1.5)
        report.cell_begins(2, 10, "\n  [bold]x[/bold] = 1\ny")
        report.cell_ends(0.25, failed=False)
        report.cell_begins(3, 10, "z" * 100)
        report.cell_ends(0.5, failed=True)

    assert shown(act).splitlines() == [
        "            Booting a virtual machine",
        "✓   1.50 s  starting the machine",
        "✓   0.25 s  [ 2/10] [bold]x[/bold] = 1",
        f"✗   0.50 s  [ 3/10] {'z' * 59}…",
    ]


def test_a_failed_cell_is_shown_in_excerpts():
    error = v4.new_output("error", ename="E", evalue="v", traceback=[f"\x1b[31mline {n}\x1b[0m" for n in range(100)])
    cell = v4.new_code_cell("\n".join(f"code {n}" for n in range(30)), outputs=[error])
    text = shown(lambda report: report.show_failure(cell))
    assert "code 0" in text
    assert f"code {SOURCE_LINES}" not in text
    assert "20 more lines" in text
    assert "line 0" in text
    assert "line 99" in text
    assert "… 60 lines" in text
    assert "\x1b" not in text
