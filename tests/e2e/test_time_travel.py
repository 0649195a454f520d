"""Snapshots, restore, undo and fork as a notebook's user has them, with real machines."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty
from typing import Any

import nbformat
import psutil
import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import KernelManager

from agentvm_kernel import paths
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.reap import reap
from agentvm_kernel.image import store
from agentvm_kernel.sandbox.settings import SandboxSettings
from agentvm_kernel.sandbox.template_store import find_sound

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
BOOT_S = 400


class Book:
    """A kernel with a machine, and one client of it."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self.manager, self.client = manager, client
        self.messages: list[dict[str, Any]] = []

    def run(self, code: str, **options: Any) -> dict[str, Any]:
        """Run a cell and return the reply's content; what it published is in `messages`."""
        self.messages = []
        reply = self.client.execute_interactive(
            code, timeout=BOOT_S, output_hook=self.messages.append, allow_stdin=False, **options
        )
        content: dict[str, Any] = reply["content"]
        return content

    def text(self) -> str:
        """All text that the last cell showed."""
        return "".join(
            content.get("text") or content.get("data", {}).get("text/plain", "") or content.get("evalue", "")
            for content in (message["content"] for message in self.messages)
        )

    def value(self, expression: str) -> str:
        """The value of an expression, as text."""
        reply = self.run(f"print(({expression}))")
        assert reply["status"] == "ok", reply
        return self.text().strip()

    def machine(self) -> str:
        """Name of the machine, as its host knows it."""
        self.run("%vm")
        return self.text().split()[1].rstrip(",")


def start() -> tuple[KernelManager, BlockingKernelClient]:
    manager = KernelManager()
    manager._kernel_spec = KernelSpec(
        argv=[sys.executable, "-m", "agentvm_kernel", "-f", "{connection_file}"],
        display_name="Python (agentvm)",
        language="python",
        interrupt_mode="message",
    )
    manager.start_kernel()
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    return manager, client


@contextmanager
def opened() -> Iterator[Book]:
    manager, client = start()
    try:
        yield Book(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def book() -> Iterator[Book]:
    with opened() as book:
        book.run("pass")
        yield book


def test_snapshot_and_restore_take_variables_files_threads_and_counts_back(book: Book) -> None:
    book.run(
        "import itertools, threading, time\n"
        "ticks, go_on = itertools.count(), True\n"
        "def work():\n    while go_on:\n        global last\n        last = next(ticks)\n        time.sleep(0.02)\n"
        "worker = threading.Thread(target=work, daemon=True); worker.start()\n"
        "note = open('/tmp/note', 'w+'); note.write('before'); note.flush()\nx = 'before'"
    )
    counted = book.run("%snapshot both -d 'memory and disk'")
    assert counted["status"] == "ok", counted
    assert "Snapshot both" in book.text()
    book.run("x = 'after'; note.seek(0); note.write('after!'); note.flush(); go_on = False")
    reply = book.run("%restore both")
    assert reply["status"] == "ok", reply
    assert reply["execution_count"] == counted["execution_count"]
    assert book.run("pass")["execution_count"] == counted["execution_count"] + 1
    assert book.value("x, open('/tmp/note').read(), worker.is_alive()") == "('before', 'before', True)"
    assert int(book.value("(time.sleep(0.2), last)[1]")) > 0
    book.run("go_on = False")


def test_one_cell_to_the_client(book: Book) -> None:
    reply = book.run("a = 1\na + 1\n%snapshot mixed\na + 2", user_expressions={"n": "a * 10"})
    kinds = [message["msg_type"] for message in book.messages]
    assert kinds == ["status", "execute_input", "stream", "execute_result", "status"]
    assert book.messages[1]["content"]["code"] == "a = 1\na + 1\n%snapshot mixed\na + 2"
    assert book.messages[3]["content"]["data"]["text/plain"] == "3"
    assert {message["content"].get("execution_count", reply["execution_count"]) for message in book.messages} == {
        reply["execution_count"]
    }
    assert reply["user_expressions"]["n"]["data"]["text/plain"] == "10"


def test_variables_can_name_a_snapshot(book: Book) -> None:
    book.run("step = 4")
    assert book.run("%snapshot step-{step}")["status"] == "ok"
    assert "Snapshot step-4" in book.text()


def test_a_traceback_counts_the_lines_of_the_whole_cell(book: Book) -> None:
    reply = book.run("ok = 1\n%snapshot --list\n\nwrong = 1 / 0")
    assert reply["ename"] == "ZeroDivisionError"
    assert any("line 4" in line or "----> 4" in line for line in reply["traceback"]), reply["traceback"]


@pytest.mark.parametrize(
    ("cell", "ename", "said"),
    [
        ("%restore nowhere", "SnapshotError", "no snapshot 'nowhere'"),
        ("%snapshot mixed", "SnapshotError", "already"),
        ("%snapshot ../../etc", "SnapshotError", "is no name"),
        ("%snapshot --delete nowhere", "SnapshotError", "no snapshot"),
        ("%snapshot a b", "UsageError", "unrecognized arguments"),
        ("%undo", "SnapshotError", "switched on"),
        ("%%fork 99\nx", "UsageError", "1 to 16"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_machine_goes_on(book: Book, cell: str, ename: str, said: str) -> None:
    book.run("alive = 'yes'")
    reply = book.run(cell)
    assert (reply["status"], reply["ename"]) == ("error", ename)
    assert said in reply["evalue"]
    assert book.value("alive") == "yes"


def test_in_a_loop_or_a_function_it_is_a_clear_error(book: Book) -> None:
    reply = book.run("for i in range(3):\n    %snapshot inner")
    assert reply["ename"] == "UsageError"
    assert "at the top level of a cell" in book.text()


def test_a_snapshot_waits_for_the_cells_of_other_clients(book: Book) -> None:
    other = book.manager.blocking_client()
    other.start_channels()
    try:
        asked = other.execute("import time; time.sleep(1.5); slow = 'done'", allow_stdin=False)
        while (message := other.get_iopub_msg(timeout=60))["msg_type"] != "execute_input":
            pass
        assert message["parent_header"]["msg_id"] == asked
        assert book.run("%snapshot patient")["status"] == "ok"
        book.run("slow = 'overwritten'")
        book.run("%restore patient")
        assert book.value("slow") == "done"
    finally:
        other.stop_channels()


def test_tab_offers_the_names_and_help_is_shown(book: Book) -> None:
    reply = book.client.complete("%restore pat", reply=True, timeout=60)
    assert reply["content"]["matches"] == ["patient"]
    reply = book.client.complete("%resto", reply=True, timeout=60)
    assert "%restore" in reply["content"]["matches"]
    assert book.client.inspect("%snapshot", reply=True, timeout=60)["content"]["found"]
    (page,) = book.run("%snapshot?")["payload"]
    assert "-d TEXT" in page["data"]["text/plain"]


def test_undo(book: Book) -> None:
    book.run("%vm autocheckpoint on")
    for number in (1, 2, 3):
        book.run(f"value = {number}")
    assert book.run("%undo")["status"] == "ok"
    assert book.value("value") == "2"
    # That cell counts as well, so two steps lead to the state before the second assignment.
    assert book.run("%undo 2")["status"] == "ok"
    assert book.run("value")["status"] == "ok"
    assert book.text() == "1"
    # A snapshot that the user has made is not an automatic one, and cells in between count nevertheless.
    book.run("%snapshot named")
    book.run("value = 'wrong'")
    book.run("%restore named")
    book.run("value = 'also wrong'")
    assert book.run("%undo\nvalue")["status"] == "ok"
    assert book.text().endswith("1")
    book.run("%vm autocheckpoint off")
    assert "off; the last took" in book.text()


def test_fork_runs_copies_side_by_side_and_leaves_the_parent_alone(book: Book) -> None:
    book.run("import random; random.seed(1); base = 10; name = __import__('socket').gethostname()")
    reply = book.run(
        "%%fork 3\nimport socket\nprint(FORK, base + FORK, random.random(), socket.gethostname() != name)\n"
        "if FORK == 2: raise ValueError('third')\nbase = None"
    )
    assert reply["status"] == "ok", reply
    shown = [message["content"] for message in book.messages if message["msg_type"] == "update_display_data"]
    text, page = shown[-1]["data"]["text/plain"], shown[-1]["data"]["text/html"]
    lines = [line.split() for line in text.split("\n") if line.endswith("True")]
    assert [(line[0], line[1]) for line in lines] == [("0", "10"), ("1", "11"), ("2", "12")]
    assert len({line[2] for line in lines}) == 3, "each copy has random numbers of its own"
    assert "ValueError: third" in text
    assert page.count("FORK = ") == 3
    assert "1 of 3 copies failed" in book.text()
    assert book.value("base, 'FORK' in globals()") == "(10, False)"


def test_fork_can_keep_a_copy(book: Book) -> None:
    before = book.machine()
    assert book.run("%%fork 2 --keep 1\nchosen = FORK")["status"] == "ok"
    assert book.value("chosen, FORK") == "(1, 1)"
    assert book.machine() != before
    reply = book.run("%%fork 2 --keep 0\n1 / 0")
    assert reply["ename"] == "ForkError"
    assert book.value("chosen") == "1"


def test_interrupting_a_fork(book: Book) -> None:
    asked = book.client.execute("%%fork 2\nprint('begun', flush=True)\nimport time\ntime.sleep(600)")
    while (message := book.client.get_iopub_msg(timeout=120))["msg_type"] != "update_display_data" or message[
        "content"
    ]["data"]["text/plain"].count("begun") < 2:
        pass
    book.manager.interrupt_kernel()
    while (reply := book.client.get_shell_msg(timeout=60))["parent_header"]["msg_id"] != asked:
        pass
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    assert book.value("chosen") == "1"


def test_pause_and_resume(book: Book) -> None:
    book.run("kept = 5")
    assert book.run("%vm pause")["status"] == "ok"
    assert book.value("kept") == "5"
    assert book.run("%vm resume")["status"] == "ok"
    assert "running" in (book.run("%vm status"), book.text())[1]


def test_a_machine_killed_under_a_snapshot_is_declared_lost_and_comes_back_from_an_earlier_one(book: Book) -> None:
    book.run("treasure = 'kept'")
    book.run("%snapshot safe")
    name = book.machine()
    os.kill(qemu_of(name), signal.SIGKILL)
    reply = book.run("%snapshot never")
    shown = book.text() + str(reply.get("evalue"))
    # Whichever noticed it first: the snapshot, or the proxy, which then gives the cell a fresh machine.
    assert reply["status"] == "error" or "fresh machine" in shown
    assert book.run("%restore safe")["status"] == "ok", book.text()
    assert book.value("treasure") == "kept"


def test_a_machine_killed_while_it_is_put_back_costs_nothing(book: Book) -> None:
    book.run("precious = 'yes'")
    before = book.machine()
    ours = qemu_of(before)
    asked = book.client.execute("%restore safe", allow_stdin=False)
    reply: dict[str, Any] | None = None
    while reply is None:
        # Also those that were thawed ahead.
        for pid in set(machines()) - {ours}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(Empty):
            message = book.client.get_shell_msg(timeout=0.02)
            reply = message["content"] if message["parent_header"]["msg_id"] == asked else None
    assert reply["status"] == "error", reply
    assert book.value("precious") == "yes"
    assert book.machine() == before


@pytest.fixture
def small_disk(book: Book, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder on a disk of its own, with the template that the other tests use."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    with Hypervisor() as hypervisor:
        template = find_sound(hypervisor, store.find("default"), SandboxSettings().profile)
    assert template is not None
    folder = Path(tempfile.mkdtemp(prefix="agentvm-disk", dir="/var/tmp"))
    folder.chmod(0o711)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3g,mode=0711", "none", str(folder)], check=True)
    try:
        for source in (template.folder, template.disk):
            target = folder / source.parent.name
            target.mkdir(mode=0o711, exist_ok=True)
            subprocess.run(["cp", "-a", "--sparse=always", str(source), str(target)], check=True)
        monkeypatch.setenv("AGENTVM_STATE_DIR", str(folder))
        yield folder
        with Hypervisor() as hypervisor:
            reap(hypervisor)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


def leave_free(disk: Path, megabytes: int) -> None:
    """Fill a disk but for so much."""
    with (disk / "filler").open("w") as file:
        free = shutil.disk_usage(disk).free
        os.posix_fallocate(file.fileno(), 0, free - megabytes * 1_000_000)


def test_a_disk_that_fills_up_during_a_snapshot(small_disk: Path) -> None:
    with opened() as book:
        assert book.run("import numpy as np\nkept = np.arange(50_000_000)")["status"] == "ok"
        before = {path.name for path in (small_disk / "snapshots").iterdir()}
        leave_free(small_disk, 320)  # enough to begin with
        reply = book.run("%snapshot large")
        assert (reply["status"], reply["ename"]) == ("error", "HostError")
        assert "No space left" in reply["evalue"]
        assert "runs on" in reply["evalue"]
        assert {path.name for path in (small_disk / "snapshots").iterdir()} == before
        leave_free(small_disk, 100)
        assert "MiB of disk are free" in book.run("%snapshot large")["evalue"]
        assert book.value("int(kept.sum())") == str(sum(range(50_000_000)))
        (small_disk / "filler").unlink()
        assert book.run("%snapshot large")["status"] == "ok", book.text()
        book.run("kept = None")
        assert book.run("%restore large")["status"] == "ok", book.text()
        assert book.value("int(kept[-1])") == "49999999"


def test_a_restarted_kernel_finds_its_snapshots(book: Book) -> None:
    book.run("survivor = 42")
    book.run("%snapshot survivor")
    book.client.stop_channels()
    book.manager.restart_kernel()
    book.client = book.manager.blocking_client()
    book.client.start_channels()
    book.client.wait_for_ready(timeout=60)
    assert book.value("'survivor' in globals()").endswith("False")
    assert book.run("%restore survivor")["status"] == "ok", book.text()
    assert book.value("survivor") == "42"


def test_a_fresh_machine_in_its_place(book: Book) -> None:
    book.run("old = 1")
    assert book.run("%vm restart")["status"] == "ok"
    assert book.run("'old' in globals()")["execution_count"] == 2
    assert book.text() == "False"


def test_the_story_told_by_the_notebook(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agentvm_kernel.cli", "run", str(ROOT / "notebooks" / "time_travel.ipynb")]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out.ipynb")], capture_output=True, text=True, check=False, timeout=BOOT_S
    )
    assert done.returncode == 0, done.stderr
    cells = {cell.id: cell for cell in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells}
    shown = {
        name: "".join(
            output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.get("outputs", ())
        )
        for name, cell in cells.items()
    }
    assert "loss before training: 2" in shown["data"]
    assert "lines in the log: 200" in shown["wrong"]
    assert "lines in the log: 0 - still open: True" in shown["restore"]
    assert cells["fork"].execution_count == cells["snapshot"].execution_count + 1, "counts go back with the machine"
    assert shown["fork"].count("done after") == 3
    before = shown["data"].split()[-1]
    assert shown["untouched"].split()[-1] == before
    assert float(shown["kept"].split()[-1]) < 0.1
    assert shown["undo"].split()[-1] == shown["kept"].split()[-1]
    assert "untrained" in shown["tree"]
    assert json.dumps(cells["fork"].outputs[0]["data"]["text/html"]).count("FORK = ") == 3


def machines() -> dict[int, str]:
    """The QEMU processes of our state folder, with their command lines."""
    found = {}
    for process in psutil.process_iter(["name", "cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if "qemu" in (process.info["name"] or "") and str(paths.state_dir()) in line:
            found[int(process.pid)] = line
    return found


def qemu_of(machine: str) -> int:
    """Process id of the QEMU that runs a machine."""
    return next(pid for pid, line in machines().items() if f"guest={machine}," in line)
