"""The life of one kernel process: sockets first, then a machine, then forwarding until a client or a signal ends it.

    bind sockets ─► answer kernel_info and friends at once
         └► lease a machine ─► forward ─► machine lost ─► next request leases a fresh one
                                      └► guest's Python ended ─► tell, exit (the client restarts or reports a dead
                                      kernel)

Imports nothing heavy: this is on the path of every kernel start.
"""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from agentvm_kernel.errors import AgentVMError, MachineError, MachineLost
from agentvm_kernel.jupyter import connection_file
from agentvm_kernel.jupyter.backend import Backend, Lease
from agentvm_kernel.jupyter.idle import IdleWatch
from agentvm_kernel.jupyter.proxy import Proxy
from agentvm_kernel.jupyter.requests import Request
from agentvm_kernel.jupyter.sockets import ClientSockets
from agentvm_kernel.jupyter.wire import Session
from agentvm_kernel.log import get_logger
from agentvm_kernel.paths import state_dir

if TYPE_CHECKING:
    from agentvm_kernel.jupyter.magics.engine import HostCells
    from agentvm_kernel.sandbox.head_start import HeadStart

log = get_logger(__name__)

EXIT_GUEST_ENDED = 1
EXIT_UNUSABLE = 2
EXIT_PARENT_GONE = 3
INTERRUPT_TIMEOUT_S = 5.0
RESTART_TIMEOUT_S = 60.0
# A machine from the pool is there before anyone would read a message; a cold boot deserves one.
PROGRESS_AFTER_S = 2.0
# The last output of a kernel that died may still be on its way.
LAST_OUTPUT_S = 0.2
# Clients wait 2.5 s for a kernel to end before they send signals.
RELEASE_TIMEOUT_S = 1.5
THREADS_TIMEOUT_S = 0.2
# ZeroMQ tries again every 0.1 s to connect.
SUBSCRIBER_TIMEOUT_S = 1.0
# Not while a first cell wants the CPUs, and long before anybody deletes the snapshots of a process that is gone.
ADOPT_AFTER_S = 20.0


class KernelApp:
    """One kernel process.

    Args:
        sockets: bound to what the connection file says.
        session: signs with the connection file's key.
        backend: where machines come from.
        session_name: names the history of this notebook; a kernel that is restarted has the same.
    """

    def __init__(self, sockets: ClientSockets, session: Session, backend: Backend, session_name: str = "") -> None:
        self._sockets = sockets
        self._backend = backend
        self._proxy = Proxy(session, sockets, self)
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[int] = self._loop.create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._lease: Lease | None = None
        self._acquiring: asyncio.Task[None] | None = None
        self._idle: IdleWatch | None = None
        self._cells: HostCells | None = None
        self._limited = False
        self._session_name = session_name
        self._stage = ""
        self._slow = False

    def start(self) -> None:
        """Listen to signals, to the parent process and to clients, and lease a machine."""
        self._loop.add_signal_handler(signal.SIGINT, self._on_sigint)
        for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            self._loop.add_signal_handler(signum, self._end, 0)
        self._watch_parent()
        # We answer before a client's iopub socket has connected, and what is published then is lost to it: let that one
        # come first.
        self._sockets.pause("shell", True)
        self._loop.call_later(SUBSCRIBER_TIMEOUT_S, self._sockets.pause, "shell", False)
        self._sockets.start(self._proxy.on_client_message, self._on_subscribe)
        self.machine_wanted()
        if self._session_name:
            self._spawn(self._adopt_snapshots())

    async def _adopt_snapshots(self) -> None:
        """Keep the snapshots of the process before this one, where the kernel was restarted, from being collected."""
        await asyncio.sleep(ADOPT_AFTER_S)
        if (state_dir() / "snapshots").is_dir():
            from agentvm_kernel.sandbox.snapshot_store import adopt

            with suppress(AgentVMError, OSError):
                await asyncio.to_thread(adopt, self._session_name)

    async def wait(self) -> int:
        """Serve until a client, a signal or the guest's end says otherwise; return the exit code."""
        code = await self._exit
        for task in self._tasks:
            task.cancel()
        if self._lease is not None:
            self._give_back(self._lease)
        if self._cells is not None:
            self._cells.notebook.leave()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=RELEASE_TIMEOUT_S)
        return code

    # ---- what the proxy asks for

    def machine_wanted(self) -> None:
        """Lease a machine unless that is already under way."""
        if self._acquiring is None and self._lease is None:
            self._acquiring = self._spawn(self._acquire())
        if self._idle is not None:
            self._idle.wake()
        self._show_stage()

    def interrupt(self, done: Callable[[dict[str, Any]], None]) -> None:
        """Send SIGINT to the guest's kernel, then call `done` with the content of the reply."""
        self._proxy.when_cell_runs(lambda: self._spawn(self._interrupt(done)))

    def shutdown(self) -> None:
        """End this process; the machine is given back on the way out."""
        self._end(0)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call something after a while."""
        self._loop.call_later(delay_s, callback)

    def plan_cell(self, code: str) -> object:
        """Return the parts of a cell that holds host magics, None when the guest runs all of it."""
        return self._host_cells().plan(code)

    def assist(self, msg_type: str, content: dict[str, Any]) -> dict[str, Any] | None:
        """Return the reply to a complete_request or inspect_request about a host magic."""
        return self._host_cells().assist(msg_type, content)

    def run_cell(self, request: Request) -> None:
        """Run a cell as planned."""
        self._spawn(self._host_cells().run(request))

    def end_python(self, error: AgentVMError) -> None:
        """End the guest's Python process and start another one, in the same machine."""
        self._spawn(self._restart_python(error))

    async def _restart_python(self, error: AgentVMError) -> None:
        lease = self._lease
        if lease is None:
            return
        try:
            await lease.connection.call("kernel.restart", timeout_s=RESTART_TIMEOUT_S)
        except AgentVMError as problem:
            if self._lease is lease:
                self._give_back(lease)
                self._proxy.detach(MachineLost(f"{error.message} Its Python could not be ended: {problem.message}"))
            return
        if self._lease is lease:
            self._proxy.detach(
                error, notice="agentvm: the Python process was ended and started again, its variables are gone."
            )
            self._proxy.attach(lease.connection)

    def interrupt_cell(self) -> None:
        """Interrupt what the host does for a cell."""
        self._host_cells().interrupt()

    def _host_cells(self) -> "HostCells":
        # Few notebooks need it, and it imports a lot.
        if self._cells is None:
            from agentvm_kernel.jupyter.magics.engine import HostCells
            from agentvm_kernel.jupyter.magics.notebook import Notebook

            self._cells = HostCells(self._proxy, Notebook(self, self._proxy, self._backend, self._session_name))
        return self._cells

    # ---- what magics ask for

    @property
    def lease(self) -> Lease | None:
        """The machine in use."""
        return self._lease

    def pause(self) -> None:
        """Pause the machine when no request is being answered any more; the next one wakes it."""
        if self._idle is not None:
            self._idle.pause_now()

    def use(self, lease: Lease) -> None:
        """Go on with another machine, in which everything is as the user wants it; the present one is given back."""
        before = self._lease
        if before is not None:
            self._give_back(before)
        self._adopt(lease)
        self._proxy.switch(lease.connection)

    # ---- the machine

    async def _acquire(self) -> None:
        slow_start = self._loop.call_later(PROGRESS_AFTER_S, self._on_slow_start)
        try:
            lease = await self._backend.acquire(self._on_progress)
        except AgentVMError as error:
            self._proxy.detach(error)
        except Exception as error:
            log.error("no machine", exc_info=True)
            self._proxy.detach(MachineError(f"No machine could be had: {type(error).__name__}: {error}"))
        else:
            if self._lease is not None:
                # A magic has put another one into its place meanwhile.
                await lease.release()
                return
            self._adopt(lease)
            self._limit_cells()
            self._proxy.attach(lease.connection)
        finally:
            slow_start.cancel()
            self._slow = False
            self._acquiring = None

    def _limit_cells(self) -> None:
        if not self._limited:
            self._proxy.guard.limits = self._backend.cell_limits()
            self._limited = True

    def _adopt(self, lease: Lease) -> None:
        self._lease = lease
        self._idle = IdleWatch(
            lease, self._proxy, on_cull=partial(self._on_culled, lease), on_failure=partial(self._on_not_woken, lease)
        )
        lease.lost.add_done_callback(lambda lost: self._on_lost(lease, lost.result()))
        lease.connection.on_notification = self._on_notification

    def _on_progress(self, text: str) -> None:
        # Machines are made in threads, and it is those that report.
        self._loop.call_soon_threadsafe(self._set_stage, text)

    def _set_stage(self, text: str) -> None:
        self._stage = text
        self._show_stage()

    def _on_slow_start(self) -> None:
        self._slow = True
        self._show_stage()

    def _show_stage(self) -> None:
        if self._slow and self._stage:
            self._proxy.show_progress(f"agentvm: {self._stage}…")

    def _on_lost(self, lease: Lease, reason: str) -> None:
        if self._lease is not lease or self._exit.done():
            return
        self._give_back(lease)
        self._proxy.detach(
            MachineLost(
                f"The machine is gone: {reason}.", hint="Its variables are lost; the next cell runs in a fresh machine."
            ),
            notice=f"agentvm: {reason}. This cell runs in a fresh machine, the variables of the lost one are gone.",
        )

    def _on_culled(self, lease: Lease) -> None:
        self._give_back(lease)
        self._proxy.detach(
            MachineLost("The machine was idle for long and was ended."),
            notice="agentvm: the machine was idle for long and was ended. This cell runs in a fresh one, without the old variables.",
        )

    def _on_not_woken(self, lease: Lease, error: AgentVMError) -> None:
        if self._lease is lease:
            self._give_back(lease)
            self._proxy.detach(
                MachineLost(f"The paused machine could not be woken: {error.message}", hint="Its variables are lost."),
                notice="agentvm: the machine could not be woken. This cell runs in a fresh one, without the old variables.",
            )

    def _give_back(self, lease: Lease) -> None:
        self._lease = None
        if self._idle is not None:
            self._idle.stop()
            self._idle = None
        self._spawn(lease.release())

    def _on_notification(self, method: str, params: Any) -> None:
        if method == "kernel.died" and isinstance(params, dict):
            self._loop.call_later(LAST_OUTPUT_S, self._on_kernel_died, params)

    def _on_kernel_died(self, params: dict[str, Any]) -> None:
        """The user's code ended the Python process: so does this one, which is how clients learn that a kernel died."""
        if self._exit.done() or self._lease is None:
            return
        story = f"the Python process in the machine {_ending(params)}"
        if params.get("restarting") is True:
            connection = self._lease.connection
            self._proxy.detach(
                MachineError(f"Its variables are gone: {story} and was started again."),
                notice=f"agentvm: {story} and was started again without its variables.",
            )
            self._proxy.attach(connection)
        elif params.get("exit_code") == 0:
            # exit() and quit() do this.
            self._end(0)
        else:
            self._proxy.tell_running(f"agentvm: {story}.")
            self._end(EXIT_GUEST_ENDED)

    async def _interrupt(self, done: Callable[[dict[str, Any]], None]) -> None:
        content: dict[str, Any] = {"status": "ok"}
        # In a paused machine nothing runs that could be interrupted.
        if self._lease is not None and not (self._idle is not None and self._idle.paused):
            try:
                await self._lease.connection.call("kernel.interrupt", timeout_s=INTERRUPT_TIMEOUT_S)
            except AgentVMError as error:
                content = {"status": "error", "ename": type(error).__name__, "evalue": str(error), "traceback": []}
        done(content)

    # ---- the process

    def _on_subscribe(self, topic: bytes) -> None:
        self._proxy.on_subscribe(topic)
        self._sockets.pause("shell", False)

    def _on_sigint(self) -> None:
        self._proxy.interrupt_held()
        self.interrupt(lambda _: None)

    def _watch_parent(self) -> None:
        """End with the client that started this process, as ipykernel does: no machine is left without its notebook."""
        parent = int(os.environ.get("JPY_PARENT_PID") or 0)
        if parent > 1 and parent == os.getppid():
            with suppress(ProcessLookupError):
                descriptor = os.pidfd_open(parent)
                self._loop.add_reader(descriptor, self._end, EXIT_PARENT_GONE)

    def _end(self, code: int) -> None:
        if not self._exit.done():
            self._exit.set_result(code)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _ending(params: dict[str, Any]) -> str:
    number = params.get("signal")
    if type(number) is not int or number <= 0:
        return f"ended with exit code {str(params.get('exit_code'))[:20]}"
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return f"was killed by {name}" + (", as happens when memory runs out" if name == "SIGKILL" else "")


def _default_backend(head_start: "HeadStart | None") -> Backend:
    from agentvm_kernel.jupyter import local_runtime

    if os.environ.get(local_runtime.VARIABLE) == "1":
        return local_runtime.LocalBackend()
    from agentvm_kernel.jupyter.machine_backend import MachineBackend

    return MachineBackend(head_start)


def main(
    arguments: Sequence[str] | None = None,
    *,
    head_start: "HeadStart | None" = None,
    listening: Mapping[str, socket.socket] | None = None,
) -> int:
    """Run a kernel; return the exit code of the process.

    Args:
        arguments: of the command line; None takes those of the process.
        head_start: may have a machine already.
        listening: by channel, sockets that listen already where the connection file says.
    """
    named = connection_file.parse_arguments(sys.argv[1:] if arguments is None else arguments)
    path = named or connection_file.runtime_dir() / f"kernel-{os.getpid()}.json"
    is_ours = not path.exists()
    try:
        info = connection_file.new_info() if is_ours else connection_file.load(path)
        session = Session(info.key.encode(), info.signature_scheme)
        sockets = ClientSockets(info, listening or {})
    except AgentVMError as error:
        print(f"agentvm: {error}", file=sys.stderr)
        if head_start is not None:
            head_start.drop()
        return EXIT_UNUSABLE
    announcement = "" if named else f"To connect: jupyter console --existing {path.name}\nTo end the kernel: Ctrl-\\"
    try:
        if sockets.info != info or is_ours:
            connection_file.save(path, sockets.info)
        # Not asyncio.run: it would wait for threads that boot a machine which nobody wants any more.
        code, threads_left = asyncio.new_event_loop().run_until_complete(
            _serve(sockets, session, path.stem, announcement, head_start)
        )
        sockets.close()
    finally:
        if is_ours:
            path.unlink(missing_ok=True)
    if threads_left:
        # So would Python's own exit. The reaper finds that machine by our process being gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


async def _serve(
    sockets: ClientSockets, session: Session, name: str, announcement: str, head_start: "HeadStart | None"
) -> tuple[int, bool]:
    app = KernelApp(sockets, session, _default_backend(head_start), name)
    app.start()
    if announcement:
        print(announcement, flush=True)
    code = await app.wait()
    try:
        async with asyncio.timeout(THREADS_TIMEOUT_S):
            await asyncio.get_running_loop().shutdown_default_executor()
    except TimeoutError:
        return code, True
    return code, False
