"""A kernel with a real machine behind it: what it isolates, and that nothing is left behind however it ends."""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import KernelManager

from agentvm_kernel import paths

pytestmark = pytest.mark.guest

BOOT_S = 240
GONE_S = 30


class Notebook:
    """A kernel as a notebook sees it."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self.manager = manager
        self.client = client

    @property
    def pid(self) -> int:
        provisioner: Any = self.manager.provisioner
        return int(provisioner.process.pid)

    def run(self, code: str, *, timeout_s: float = 120) -> tuple[dict[str, Any], str]:
        """Run a cell and return the reply's content and all text that it showed."""
        shown: list[str] = []

        def on_output(message: dict[str, Any]) -> None:
            content = message["content"]
            shown.append(
                content.get("text") or content.get("data", {}).get("text/plain", "") or content.get("evalue", "")
            )

        reply = self.client.execute_interactive(code, timeout=timeout_s, output_hook=on_output, allow_stdin=False)
        return reply["content"], "".join(shown)

    def machine(self) -> tuple[int, Path]:
        """The process id of this kernel's QEMU and the folder of its machine."""
        _, name = self.run("import socket; print(socket.gethostname())")
        folder = paths.state_dir() / "machines" / name.strip()
        return qemu_of(name.strip()), folder


def qemu_of(machine: str) -> int:
    """Process id of the QEMU that runs a machine."""
    for process in psutil.process_iter(["name", "cmdline"]):
        if "qemu" in (process.info["name"] or "") and any(
            f"guest={machine}," in part for part in process.info["cmdline"] or ()
        ):
            return int(process.pid)
    raise AssertionError(f"no QEMU runs {machine}")


def wait_until(condition: Callable[[], bool], *, timeout_s: float = GONE_S) -> None:
    """Wait for something that another process does and nobody announces."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@contextmanager
def notebook() -> Iterator[Notebook]:
    manager = KernelManager()
    manager._kernel_spec = KernelSpec(
        argv=[sys.executable, "-m", "agentvm_kernel", "-f", "{connection_file}"],
        display_name="Python 3 (agentvm)",
        language="python",
        interrupt_mode="message",
    )
    manager.start_kernel()
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=30)
        yield Notebook(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.fixture
def fresh() -> Iterator[Notebook]:
    with notebook() as started:
        started.run("pass", timeout_s=BOOT_S)
        yield started


def test_cells_run_in_another_kernel_on_another_host(fresh: Notebook) -> None:
    reply, shown = fresh.run("import platform, getpass; print(platform.release(), platform.node(), getpass.getuser())")
    release, node, user = shown.split()
    assert reply["status"] == "ok"
    assert release != platform.release()
    assert node != socket.gethostname()
    assert user == "notebook"
    _, disk = fresh.run("import subprocess; print(subprocess.getoutput('findmnt -no SOURCE /'))")
    assert "/dev/vda" in disk


def test_the_guest_user_may_become_root_inside_and_sees_no_host_files(fresh: Notebook) -> None:
    _, shown = fresh.run("import subprocess; print(subprocess.getoutput('sudo -n id -u'))")
    assert shown.strip() == "0"
    _, shown = fresh.run(f"import os; print(os.path.exists({str(Path(__file__).resolve())!r}))")
    assert shown.strip() == "False"


def test_pip_installs_a_local_wheel(fresh: Notebook) -> None:
    make_wheel = """
import zipfile
name = "/tmp/agentvm_probe-1.0-py3-none-any.whl"
with zipfile.ZipFile(name, "w") as wheel:
    wheel.writestr("agentvm_probe.py", "value = 41 + 1")
    wheel.writestr("agentvm_probe-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: agentvm-probe\\nVersion: 1.0\\n")
    wheel.writestr("agentvm_probe-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nGenerator: t\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    wheel.writestr("agentvm_probe-1.0.dist-info/RECORD", "")
"""
    assert fresh.run(make_wheel)[0]["status"] == "ok"
    reply, shown = fresh.run("%pip install --no-index --no-deps /tmp/agentvm_probe-1.0-py3-none-any.whl")
    assert reply["status"] == "ok", shown
    assert fresh.run("import agentvm_probe; print(agentvm_probe.value)")[1].strip() == "42"


def test_shutdown_leaves_nothing() -> None:
    with notebook() as nb:
        nb.run("pass", timeout_s=BOOT_S)
        qemu, folder = nb.machine()
        assert folder.is_dir()
        began = time.monotonic()
        nb.manager.shutdown_kernel()
        assert time.monotonic() - began < 4, "the client had to wait for the machine's end"
    wait_until(lambda: not psutil.pid_exists(qemu) and not folder.exists())


def test_a_killed_kernel_process_leaves_nothing_after_the_next_start() -> None:
    with notebook() as nb:
        nb.run("pass", timeout_s=BOOT_S)
        qemu, folder = nb.machine()
        os.kill(nb.pid, signal.SIGKILL)
    with notebook() as other:
        wait_until(lambda: not psutil.pid_exists(qemu) and not folder.exists(), timeout_s=60)
        other.run("pass", timeout_s=BOOT_S)


def test_a_kernel_that_cannot_listen_gives_back_the_machine_that_it_has_begun_with(tmp_path: Path) -> None:
    with notebook() as nb:
        nb.run("pass", timeout_s=BOOT_S)  # so there is a template
        _, folder = nb.machine()
    before = set(folder.parent.iterdir())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (tmp_path / "kernel.json").write_text(json.dumps({"shell_port": taken.getsockname()[1]}))
        done = subprocess.run(
            [sys.executable, "-m", "agentvm_kernel", "-f", str(tmp_path / "kernel.json")],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert "cannot listen" in done.stderr
    wait_until(lambda: set(folder.parent.iterdir()) <= before)


def test_killing_qemu_in_a_running_cell_is_reported_and_the_next_cell_gets_a_fresh_machine(fresh: Notebook) -> None:
    fresh.run("mine = 1")
    qemu, folder = fresh.machine()
    request = fresh.client.execute("import time\nprint('running', flush=True)\ntime.sleep(600)")
    while (message := fresh.client.get_iopub_msg(timeout=60))["msg_type"] != "stream":
        pass
    assert message["content"]["text"].startswith("running")
    os.kill(qemu, signal.SIGKILL)
    reply = fresh.client.get_shell_msg(timeout=5)
    assert reply["parent_header"]["msg_id"] == request
    assert reply["content"]["status"] == "error"
    assert folder.name in reply["content"]["evalue"]
    reply, shown = fresh.run("print('mine' in globals())", timeout_s=BOOT_S)
    assert reply["status"] == "ok"
    assert "lost" in shown
    assert shown.rstrip().endswith("False")
    wait_until(lambda: not folder.exists())


def test_two_hundred_megabytes_of_output_do_not_delay_an_interrupt(fresh: Notebook) -> None:
    fresh.client.execute("line = 'x' * 99 + '\\n'\nwhile True: print(line * 1000, end='')")
    received = 0
    while received < 5_000_000:
        message = fresh.client.get_iopub_msg(timeout=60)
        received += len(message["content"].get("text", ""))
    began = time.monotonic()
    fresh.manager.interrupt_kernel()
    while (reply := fresh.client.get_shell_msg(timeout=30))["msg_type"] != "execute_reply":
        pass
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    assert time.monotonic() - began < 10


def test_no_qemu_gives_one_clear_error(tmp_path: Path) -> None:
    environment = {**os.environ, "AGENTVM_URI": "qemu+unix:///system?socket=" + str(tmp_path / "nobody")}
    done = subprocess.run(
        [sys.executable, "-m", "agentvm_kernel.cli", "run", "notebooks/quickstart.ipynb", "-o", str(tmp_path / "out.ipynb")],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "libvirt" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_idle_machine_is_paused_and_wakes_for_the_next_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTVM_IDLE_PAUSE", "0.5")
    with notebook() as nb:
        nb.run("import time\nmine = 7", timeout_s=BOOT_S)
        qemu, _ = nb.machine()
        process = psutil.Process(qemu)

        def still() -> bool:
            before = process.cpu_times()
            time.sleep(0.5)
            return process.cpu_times() == before

        wait_until(still)
        time.sleep(2)
        began = time.time()
        _, shown = nb.run("print(mine, time.time())")
        value, clock = shown.split()
        assert value == "7"
        assert began - 0.5 < float(clock) < time.time() + 0.5
        wait_until(still)
        # With its reply, as only then it cannot be overtaken by the next cell, which has another socket.
        nb.client.control_channel.send(nb.client.session.msg("interrupt_request", {}))
        assert nb.client.get_control_msg(timeout=30)["content"]["status"] == "ok"
        assert nb.run("mine + 1")[1] == "8"


def test_a_machine_at_work_in_the_background_is_not_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTVM_IDLE_PAUSE", "0.5")
    with notebook() as nb:
        nb.run("import subprocess\nwork = subprocess.Popen(['sh', '-c', 'while :; do :; done'])", timeout_s=BOOT_S)
        qemu, _ = nb.machine()
        before = sum(psutil.Process(qemu).cpu_times()[:2])
        time.sleep(4)
        assert sum(psutil.Process(qemu).cpu_times()[:2]) - before > 1


def test_a_machine_idle_for_too_long_is_given_back_and_the_next_cell_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTVM_IDLE_PAUSE", "0.3")
    monkeypatch.setenv("AGENTVM_IDLE_CULL", "0.5")
    with notebook() as nb:
        nb.run("mine = 7", timeout_s=BOOT_S)
        _, folder = nb.machine()
        wait_until(lambda: not folder.exists())
        _, shown = nb.run("print('mine' in globals())", timeout_s=BOOT_S)
        assert "idle for long" in shown
        assert shown.rstrip().endswith("False")
