"""Kernels to measure: bare ipykernel, ours with a machine, ours with the runtime as a local process. What a client does, timed."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import KernelManager

BARE = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
OURS = [sys.executable, "-m", "agentvm_kernel", "-f", "{connection_file}"]
LOCAL = {"AGENTVM_LOCAL_RUNTIME": "1"}
READY_S = 300.0


class Kernel:
    """A running kernel with a client."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self.manager = manager
        self.client = client

    def cell(self, code: str, timeout_s: float = READY_S) -> float:
        """Run a cell and return the seconds until its reply."""
        began = time.perf_counter()
        reply = self.client.execute(code, reply=True, timeout=timeout_s)
        elapsed = time.perf_counter() - began
        if reply["content"]["status"] != "ok":
            raise RuntimeError(f"the cell failed: {reply['content']}")
        return elapsed

    def text(self, code: str, timeout_s: float = READY_S) -> str:
        """Run a cell and return what it printed."""
        shown: list[str] = []
        reply = self.client.execute_interactive(
            code, timeout=timeout_s, output_hook=lambda message: shown.append(message["content"].get("text", ""))
        )
        if reply["content"]["status"] != "ok":
            raise RuntimeError(f"the cell failed: {reply['content']}")
        return "".join(shown)

    def stdout_rate(self, code: str, size: int) -> float:
        """Run a cell that prints `size` bytes and return MB/s, from the request to the last byte."""
        began = time.perf_counter()
        self.client.execute(code)
        received = 0
        while received < size:
            message = self.client.get_iopub_msg(timeout=READY_S)
            received += len(message["content"].get("text", "")) if message["msg_type"] == "stream" else 0
        elapsed = time.perf_counter() - began
        self.client.get_shell_msg(timeout=READY_S)
        return size / 1e6 / elapsed


def manager_of(argv: list[str]) -> KernelManager:
    """Return a manager for a kernel with this command line."""
    manager = KernelManager()
    manager._kernel_spec = KernelSpec(argv=argv, display_name="bench", language="python", interrupt_mode="message")
    return manager


@contextmanager
def kernel(argv: list[str], **environment: str) -> Iterator[Kernel]:
    """Start a kernel, have it ready, and end it."""
    manager = manager_of(argv)
    manager.start_kernel(env={**os.environ, **environment}, stderr=subprocess.DEVNULL)
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=READY_S)
        started = Kernel(manager, client)
        started.cell("pass")
        yield started
    finally:
        client.stop_channels()
        manager.shutdown_kernel()


def start_time(argv: list[str], **environment: str) -> float:
    """Return the seconds from start_kernel to the first execute_reply, as a client sees them."""
    manager = manager_of(argv)
    began = time.perf_counter()
    manager.start_kernel(env={**os.environ, **environment}, stderr=subprocess.DEVNULL)
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=READY_S)
        reply = client.execute("1 + 1", reply=True, timeout=READY_S)
        elapsed = time.perf_counter() - began
        assert reply["content"]["status"] == "ok", reply
        return elapsed
    finally:
        client.stop_channels()
        manager.shutdown_kernel()


# Asks the guest's own ipykernel the same question from inside the guest, over its own sockets, without our path.
INSIDE = """
import json, subprocess, sys, time
probe = '''
import json, sys, time
from jupyter_client.blocking import BlockingKernelClient
client = BlockingKernelClient(connection_file="/run/agentvm/kernel/connection.json")
client.load_connection_file()
client.start_channels()
client.wait_for_ready(timeout=60)
def cell(code):
    began = time.perf_counter()
    client.execute(code, reply=True, timeout=60)
    return time.perf_counter() - began
def rate(code, size):
    began = time.perf_counter()
    client.execute(code)
    received = 0
    while received < size:
        message = client.get_iopub_msg(timeout=60)
        received += len(message["content"].get("text", "")) if message["msg_type"] == "stream" else 0
    elapsed = time.perf_counter() - began
    client.get_shell_msg(timeout=60)
    return size / 1e6 / elapsed
while client.get_iopub_msg(timeout=60)["content"].get("execution_state") != "idle":
    pass
for line in sys.stdin:
    what, code, size = json.loads(line)
    print(json.dumps(cell(code) if what == "cell" else rate(code, size)), file=open("/tmp/answer.new", "w"))
    import os; os.rename("/tmp/answer.new", "/tmp/answer")
'''
import os
inside = subprocess.Popen([sys.executable, "-c", probe], stdin=subprocess.PIPE, text=True, start_new_session=True)
"""


def start_inside(guest: Kernel) -> None:
    """Start the probe in the guest."""
    guest.cell(INSIDE)


def ask_inside(guest: Kernel, what: str, code: str, size: int = 0) -> float:
    """Have the probe measure once and return its result; the waiting cells do not overlap with the measurement."""
    request: Any = [what, code, size]
    import json

    guest.cell(
        "os.path.exists('/tmp/answer') and os.remove('/tmp/answer')\n"
        f"inside.stdin.write({json.dumps(request)!r} + '\\n'); inside.stdin.flush()"
    )
    deadline = time.monotonic() + READY_S
    pause = 0.5
    while time.monotonic() < deadline:
        time.sleep(pause)
        answer = guest.text("print(open('/tmp/answer').read() if os.path.exists('/tmp/answer') else '')").strip()
        if answer:
            return float(answer)
        pause = 1.0
    raise RuntimeError("the probe in the guest did not answer")
