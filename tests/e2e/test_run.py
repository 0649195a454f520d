"""`agentvm run` as people run it: a process of its own, with a kernel behind it.

How a run goes and ends does not depend on where the cells run, so most tests use the runtime as a local process; those marked `guest` use a
machine.
"""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest

v4 = nbformat.v4
ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240
WAITING = (
    "import pathlib, time\nprint('begun', flush=True)\ntime.sleep(0.5)\npathlib.Path({flag!r}).touch()\ntime.sleep(600)"
)


class Run:
    """`agentvm run` on a notebook of these cells.

    Args:
        folder: for the notebook and its result.
        environment: variables to set.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.notebook = folder / "book.ipynb"
        self.result = folder / "book.out.ipynb"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AGENTVM_", "JPY_"))}
        coverage = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
        folders = {
            name: value for name, value in os.environ.items() if name.startswith("AGENTVM_") and name.endswith("_DIR")
        }
        self.environment = {**kept, **coverage, **folders, "XDG_CONFIG_HOME": str(folder / "config"), **environment}
        self.stdout = self.stderr = ""

    def write(self, *sources: str | Any) -> None:
        cells = [v4.new_code_cell(textwrap.dedent(cell)) if isinstance(cell, str) else cell for cell in sources]
        nbformat.write(v4.new_notebook(cells=cells), self.notebook)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "agentvm_kernel.cli", "run", str(self.notebook), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=self.environment, cwd=self.folder)

    def end(self, process: "subprocess.Popen[str]") -> int:
        self.stdout, self.stderr = process.communicate(timeout=TIMEOUT_S)
        assert "Traceback (most recent call last):\n  File" not in self.stderr, self.stderr
        return process.returncode

    def __call__(self, *arguments: str) -> int:
        return self.end(self.start(*arguments))

    def outputs(self, *, of: Path | None = None) -> list[str]:
        """What each code cell of the result showed, as text."""
        book = nbformat.read(of or self.result, as_version=4)
        nbformat.validate(book)
        return ["".join(map(text_of, cell.outputs)) for cell in book.cells if cell.cell_type == "code"]


def text_of(output: Any) -> str:
    """One output as text; an error as `name: value`."""
    if output.output_type == "error":
        return f"{output.ename}: {output.evalue}"
    return str(output.get("text") or output.get("data", {}).get("text/plain", ""))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, {"AGENTVM_LOCAL_RUNTIME": "1"})


@pytest.fixture
def flag(run: Run) -> Path:
    """A file that a cell makes when it runs; the runtime is a local process, so it is ours too."""
    return run.folder / "running"


@pytest.fixture
def waiting(run: Run, flag: Path) -> "Iterator[Callable[[], subprocess.Popen[str]]]":
    """Start a run whose second cell waits for ever, and return when it does."""
    processes = []

    def start() -> "subprocess.Popen[str]":
        run.write("print('first')", WAITING.format(flag=str(flag)), "print('third')")
        process = run.start()
        processes.append(process)
        while not flag.exists():
            assert process.poll() is None
            os.sched_yield()
            psutil.Process(process.pid).cpu_percent(0.05)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_cells_run_in_order_and_the_result_is_beside_the_notebook(run):
    before = run.write("x = 1\nprint('one')", v4.new_markdown_cell("text"), "", "x + 1") or run.notebook.read_bytes()
    assert run() == 0
    assert run.outputs() == ["one\n", "", "2"]
    assert run.notebook.read_bytes() == before
    assert run.stdout == f"Executed notebook: {run.result}\n"
    lines = [line for line in run.stderr.splitlines() if "✓" in line]
    assert "starting the machine" in lines[0]
    assert [line.split("  ")[-1] for line in lines[1:]] == ["[1/2] x = 1", "[2/2] x + 1"]
    book = nbformat.read(run.result, as_version=4)
    assert [cell.execution_count for cell in book.cells if cell.cell_type == "code" and cell.source] == [1, 2]
    assert book.metadata.language_info.name == "python"


def test_parameters_and_a_chosen_output(run):
    run.write(v4.new_code_cell("rows, name = 1, 'a'", metadata={"tags": ["parameters"]}), "print(rows + 1, name)")
    assert run("-p", "rows=41", "-p", "name=two words", "-o", "else.ipynb") == 0
    assert run.outputs(of=run.folder / "else.ipynb") == ["", "", "42 two words\n"]
    assert not run.result.exists()


def test_a_notebook_can_be_executed_in_place(run):
    run.write("6 * 7")
    assert run("-o", str(run.notebook)) == 0
    assert run.outputs(of=run.notebook) == ["42"]


def test_a_notebook_without_code_is_soon_done(run):
    run.write(v4.new_markdown_cell("# only text"))
    assert run() == 0
    assert nbformat.read(run.result, as_version=4).cells[0].source == "# only text"


def test_a_failed_cell_is_shown_and_ends_the_run(run):
    run.write("1", "def f():\n    return 1 / 0\n\nf()", "print('never')")
    assert run() == 1
    assert run.outputs() == ["1", "ZeroDivisionError: division by zero", ""]
    assert "[2/3] def f():" in run.stderr
    assert "    4 | f()" in run.stderr
    assert "----> 2     return 1 / 0" in run.stderr
    assert "agentvm: cell 2 of 3 failed: ZeroDivisionError: division by zero" in run.stderr
    assert str(run.result) in run.stderr
    assert run.stdout == ""


def test_errors_can_be_allowed(run):
    run.write("1 / 0", "print('next')")
    assert run("--allow-errors") == 0
    assert run.outputs() == ["ZeroDivisionError: division by zero", "next\n"]
    assert "1 of 2 cells failed" in run.stderr


def test_a_cell_may_be_tagged_to_raise(run):
    run.write(v4.new_code_cell("1 / 0", metadata={"tags": ["raises-exception"]}), "print('next')")
    assert run() == 0
    assert run.outputs()[1] == "next\n"


def test_input_is_answered_in_order_and_shown_as_in_jupyterlab(run):
    run.write("a = input('Name? ')", "import getpass\nprint(a, input('Age? '), getpass.getpass('Secret? '))")
    assert run("--input", "Ada", "--input", "36", "--input", "hush") == 0
    assert run.outputs()[0] == "Name? Ada\n"
    shown = run.outputs()[1]
    assert "Ada 36 hush" in shown
    assert "Age? 36\n" in shown
    assert "Secret? ········\n" in shown


def test_input_without_answers_is_an_error_in_the_cell(run):
    run.write("input('Name? ')", "2")
    assert run() == 1
    assert run.outputs()[0].startswith("StdinNotImplementedError")
    assert "--input TEXT" in run.stderr


def test_input_with_too_few_answers_is_the_end_of_the_file(run):
    run.write("print(input('Name? '), input('Age? '))")
    assert run("--input", "Ada") == 1
    assert "EOFError" in run.outputs()[0]
    assert "(Age?)" in run.stderr
    assert "--input TEXT" in run.stderr


def test_a_cell_that_takes_too_long(run):
    run.write("print('first')", "import time\nprint('begun', flush=True)\ntime.sleep(600)")
    assert run("--timeout", "1.5") == 1
    assert run.outputs() == ["first\n", "begun\nTimeoutError: cell 2 of 2 ran longer than 1.5 s."]
    assert "agentvm: cell 2 of 2 ran longer than 1.5 s." in run.stderr


def test_a_kernel_that_dies(run):
    run.write("print('first')", "import os, time\nprint('bye', flush=True)\ntime.sleep(0.5)\nos._exit(3)", "3")
    assert run() == 1
    first, second, third = run.outputs()
    assert (first, third) == ("first\n", "")
    assert second.startswith("bye\n")
    assert "DeadKernelError: The kernel died in cell 2 of 3." in second
    assert "exit code 3" in run.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_run_and_keeps_what_there_is(run, waiting, number, code):
    process = waiting()
    kernels = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert run.end(process) == code
    first, second, third = run.outputs()
    assert (first, third) == ("first\n", "")
    assert second.startswith("begun\n")
    assert "KeyboardInterrupt" in second
    assert "in cell 2 of 3" in run.stderr
    _, alive = psutil.wait_procs(kernels, timeout=20)
    assert not alive


def test_widgets_keep_their_state(run):
    run.write("import ipywidgets\nslider = ipywidgets.IntSlider(3)\nslider", "slider.value = 7")
    assert run() == 0
    state = nbformat.read(run.result, as_version=4).metadata.widgets["application/vnd.jupyter.widget-state+json"][
        "state"
    ]
    assert [model["state"]["value"] for model in state.values() if model["model_name"] == "IntSliderModel"] == [7]


def test_progress_bars_end_as_one_line(run):
    run.write("from tqdm import tqdm\nfor _ in tqdm(range(50), mininterval=0): pass")
    assert run() == 0
    assert run.outputs()[0].count("50/50") == 1
    assert "0/50" not in run.outputs()[0].replace("50/50", "")


def test_escape_sequences_of_a_guest_do_not_reach_the_terminal(run):
    run.write("raise ValueError('\\x1b]0;owned\\x07\\x1b[2J')")
    assert run() == 1
    assert "\x1b" not in run.stderr
    assert "\x07" not in run.stderr


def test_another_kernel_can_be_used(run, tmp_path):
    from ipykernel.kernelspec import install

    install(prefix=str(tmp_path / "prefix"), kernel_name="plain")
    run.environment["JUPYTER_PATH"] = str(tmp_path / "prefix" / "share" / "jupyter")
    run.write("print('plain')")
    assert run("--kernel", "plain") == 0
    assert "starting the kernel" in run.stderr


@pytest.mark.guest
def test_in_a_machine_it_is_not_this_host(tmp_path):
    run = Run(tmp_path, {})
    run.write("import platform\nprint(platform.node(), platform.release())")
    assert run("--profile", "light") == 0
    node, release = run.outputs()[0].split()
    assert node.startswith("agentvm-")
    assert release != os.uname().release


@pytest.mark.guest
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"AGENTVM_URI": "qemu+tcp://127.0.0.1:1/system"}, "127.0.0.1:1"),
        ({"AGENTVM_IMAGE": "nowhere"}, "There is no guest image 'nowhere'"),
        ({"AGENTVM_URI": "test:///default"}, "manages TEST and not QEMU"),
    ],
)
def test_where_no_machine_can_be_had_it_says_why(tmp_path, environment, reason):
    run = Run(tmp_path, environment)
    run.write("1", "2")
    assert run() == 1
    assert "agentvm: The machine could not be started: " in run.stderr
    assert reason in run.stderr
    assert "agentvm doctor" in run.stderr
    assert run.outputs()[0].startswith("MachineError: ")
    assert run.outputs()[1] == ""
