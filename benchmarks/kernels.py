"""Kernels to measure, started and asked through jupyter_client as any client does: bare ipykernel, ours, ours without a machine."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ipykernel.kernelspec import write_kernel_spec
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

from agentvm_kernel.jupyter import kernelspec, local_runtime

BARE = "python3"
OURS = "agentvm"
LOCAL = "agentvm-local"
ANSWER_S = 600.0
LINE = "x" * 99


class Kernel:
    """A kernel that was started, with a client."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self.manager = manager
        self.client = client

    def ask(self, code: str, timeout_s: float = ANSWER_S) -> tuple[float, str]:
        """Run a cell; return the seconds until its reply, and what it printed.

        Raises:
            RuntimeError: the cell failed.
        """
        began = time.perf_counter()
        asked = self.client.execute(code)
        reply = self._reply(asked, timeout_s)
        elapsed = time.perf_counter() - began
        text = "".join(self._texts(asked, timeout_s))
        if reply["status"] != "ok":
            raise RuntimeError(f"{code[:60]!r} failed: {reply.get('ename')}: {reply.get('evalue')} {text[-500:]}")
        return elapsed, text

    def cells(self, code: str, count: int) -> list[float]:
        """Run a cell several times; return for each the seconds until its reply and its idle have come."""
        times = []
        for _ in range(count):
            began = time.perf_counter()
            asked = self.client.execute(code)
            self._reply(asked, ANSWER_S)
            for _ in self._texts(asked, ANSWER_S):
                pass
            times.append(time.perf_counter() - began)
        return times

    def printed(self, code: str, size: int) -> float:
        """Run a cell that prints `size` characters; return MB/s from the request to its idle.

        Raises:
            RuntimeError: not all of it came.
        """
        began = time.perf_counter()
        asked = self.client.execute(code)
        received = sum(map(len, self._texts(asked, ANSWER_S)))
        elapsed = time.perf_counter() - began
        self._reply(asked, ANSWER_S)
        if received != size:
            raise RuntimeError(f"{received} of {size} characters arrived")
        return size / 1e6 / elapsed

    def _reply(self, asked: str, timeout_s: float) -> dict[str, Any]:
        while True:
            message: dict[str, Any] = self.client.get_shell_msg(timeout=timeout_s)
            if message["parent_header"].get("msg_id") == asked:
                content: dict[str, Any] = message["content"]
                return content

    def _texts(self, asked: str, timeout_s: float) -> Iterator[str]:
        while True:
            message = self.client.get_iopub_msg(timeout=timeout_s)
            if message["parent_header"].get("msg_id") != asked:
                continue
            if message["msg_type"] == "stream":
                yield message["content"]["text"]
            elif message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return


def printing(megabytes: float) -> tuple[str, int]:
    """Return a cell that prints lines of 100 characters, and how many characters in all."""
    lines = round(megabytes * 10_000)
    return f"for _ in range({lines}): print({LINE!r})", lines * 100


class Kernels:
    """The kernelspecs to compare, in a folder of their own.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        write_kernel_spec(folder / BARE)
        kernelspec.write(folder / OURS, OURS)
        kernelspec.write(folder / LOCAL, LOCAL, {local_runtime.VARIABLE: "1"})
        self._log = folder / "kernels.log"
        self._specs = KernelSpecManager(kernel_dirs=[str(folder)], ensure_native_kernel=False)

    def manager(self, name: str) -> KernelManager:
        """Return a manager that will start this kernel."""
        return KernelManager(kernel_name=name, kernel_spec_manager=self._specs)

    @contextmanager
    def _running(self, name: str) -> Iterator[Kernel]:
        manager = self.manager(name)
        with self._log.open("w") as log:
            manager.start_kernel(stderr=log, stdout=log)
        client = manager.client()
        client.start_channels()
        try:
            yield Kernel(manager, client)
        except RuntimeError as error:
            raise RuntimeError(
                f"{error} (kernel {name} wrote: {self._log.read_text()[-500:].strip() or 'nothing'})"
            ) from error
        finally:
            client.stop_channels()
            manager.shutdown_kernel()

    @contextmanager
    def started(self, name: str, *, warm_up: int = 20) -> Iterator[Kernel]:
        """Start a kernel, let it run some cells, and end it afterwards."""
        with self._running(name) as kernel:
            kernel.client.wait_for_ready(timeout=ANSWER_S)
            kernel.cells("pass", warm_up)
            yield kernel

    def start_time(self, name: str) -> float:
        """Return the seconds from start_kernel to the first execute_reply.

        The cell is sent at once, as a notebook does that runs all cells: wait_for_ready would add a constant of its own to both sides.
        """
        began = time.perf_counter()
        with self._running(name) as kernel:
            reply = kernel.client.execute("1 + 1", reply=True, timeout=ANSWER_S)
            elapsed = time.perf_counter() - began
            if reply["content"]["status"] != "ok":
                raise RuntimeError(f"the first cell failed: {reply['content']}")
            return elapsed


@contextmanager
def kernels() -> Iterator[Kernels]:
    """The kernels to compare, while they are needed."""
    # Clients' and kernels' own settings are not ours to measure.
    os.environ.setdefault("JUPYTER_NO_CONFIG", "1")
    with tempfile.TemporaryDirectory(prefix="agentvm-bench-") as folder:
        yield Kernels(Path(folder))
