"""The guest runtime as ordinary processes of this host, behind a Unix socket, instead of a machine.

For benchmarks (what does the path cost without emulation?) and for tests of the proxy. It isolates nothing and is
never offered to users: only AGENTVM_LOCAL_RUNTIME=1 chooses it. Imports nothing heavy.
"""

import asyncio
import os
import secrets
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from agentvm_kernel.errors import AgentVMError, BootError, MachineError
from agentvm_kernel.jupyter.backend import OnProgress
from agentvm_kernel.sandbox.settings import CellLimits, IdlePolicy, load_settings
from agentvm_kernel.transport.address import UnixAddress
from agentvm_kernel.transport.connection import GuestConnection, open_connection

VARIABLE = "AGENTVM_LOCAL_RUNTIME"
_START_TIMEOUT_S = 60.0


class LocalLease:
    """A runtime process of ours with the connection to it."""

    def __init__(
        self, process: asyncio.subprocess.Process, folder: Path, connection: GuestConnection, kernel_pid: int
    ) -> None:
        self.connection = connection
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._process = process
        self._folder = folder
        self._kernel_pid = kernel_pid
        connection.closed.add_done_callback(self._on_closed)

    @property
    def description(self) -> str:
        """One line for people."""
        return f"a local process (pid {self._process.pid}), without any isolation"

    def _on_closed(self, closed: "asyncio.Future[str]") -> None:
        if not self.lost.done():
            self.lost.set_result(f"the connection to the local runtime ended: {closed.result()}")

    @property
    def idle(self) -> IdlePolicy:
        """It is never paused."""
        return IdlePolicy()

    def cpu_seconds(self) -> float:
        """It is never paused, so nobody looks."""
        return 0.0

    async def pause(self) -> None:
        """Refuse: only machines can be paused."""
        raise MachineError("A local process is not paused.")

    async def resume(self) -> None:
        """Do nothing, since it was never paused."""

    async def release(self) -> None:
        """End the runtime and its kernel."""
        await self.connection.close()
        await _end(self._process, self._folder)
        # Where the runtime was killed, its Python kernel is left: a process group of its own.
        with suppress(ProcessLookupError):
            os.killpg(self._kernel_pid, signal.SIGKILL)


class LocalBackend:
    """Starts a runtime process for every lease."""

    def cell_limits(self) -> CellLimits:
        """Return what a cell may use up. Raises ConfigError."""
        return load_settings().cells

    async def acquire(self, on_progress: OnProgress) -> LocalLease:
        """Start `python -m guest_runtime.local` and connect to it. Raises BootError."""
        on_progress("Starting the runtime as a local process")
        folder = Path(tempfile.mkdtemp(prefix="agentvm-local-"))
        secret = secrets.token_bytes(32)
        (folder / "secret").write_bytes(secret)
        environment = {name: value for name, value in os.environ.items() if name != "JUPYTER_PATH"}
        # Its log must not look like this kernel's: clients watch that.
        with (folder / "log").open("w") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "guest_runtime.local"),
                *("--socket", str(folder / "runtime.sock"), "--secret-file", str(folder / "secret")),
                *("--parent", str(os.getpid())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        try:
            connection = await _connect(process, UnixAddress(folder / "runtime.sock"), secret)
            await connection.call("kernel.wait", timeout_s=_START_TIMEOUT_S)
            kernel_pid = int((await connection.call("kernel.status"))["pid"])
        except BaseException as error:
            tail = (folder / "log").read_text()[-2000:]
            await _end(process, folder)
            if isinstance(error, AgentVMError):
                raise BootError(f"The local runtime did not come up: {error.message}", hint=tail) from error
            raise
        return LocalLease(process, folder, connection, kernel_pid)


async def _connect(process: asyncio.subprocess.Process, address: UnixAddress, secret: bytes) -> GuestConnection:
    connecting = asyncio.ensure_future(open_connection(address, secret, timeout_s=_START_TIMEOUT_S))
    ended = asyncio.ensure_future(process.wait())
    try:
        await asyncio.wait((connecting, ended), return_when=asyncio.FIRST_COMPLETED)
        if not connecting.done():
            raise BootError(f"It ended with exit code {process.returncode}.")
        return connecting.result()
    finally:
        connecting.cancel()
        ended.cancel()


async def _end(process: asyncio.subprocess.Process, folder: Path) -> None:
    if process.returncode is None:
        process.terminate()
        await process.wait()
    shutil.rmtree(folder, ignore_errors=True)
