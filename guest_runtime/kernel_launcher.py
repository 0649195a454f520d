"""Runs inside the Python kernel's process: starts ipykernel, and reseeds its generators when the agent asks.

The agent starts it as `python kernel_launcher.py FD CONNECTION_FILE [MODULE …]`. FD is a socket to the agent that carries lines of
JSON: we say {"ready": true, "failed": {module: error}} when ipykernel takes requests; {"reseed": HEX, "clone": BOOL} asks for fresh
seeds and is answered with {"reseeded": true}. When that socket ends, the agent is gone and so is everything of this process group. The
user's code runs in this process, so nothing that comes from it is trusted by anyone.

Imports nothing of guest_runtime: the user's code does not find the runtime on its path.
"""

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import threading
import warnings
from array import array
from collections.abc import Callable, Iterator
from typing import Any

STREAM_BLOCK = 1024 * 1024
"""A cell that prints waits for its reader every so many characters."""
HOST_LINE_MAGICS = ("snapshot", "restore", "undo", "vm", "pool")
HOST_CELL_MAGICS = ("fork",)
MT19937_WORDS = 624
PUBLISHED_AHEAD = 32
"""So many published messages may wait for the agent; at ZeroMQ's default of 1000, those of a flood take gigabytes."""


def _reseed(seed: bytes, clone: bool) -> None:
    """Seed the generators of this process from what the host gave.

    Those that nobody can seed by hand always: OpenSSL's, and that of names for temporary files. Of a clone also `random` and
    `numpy.random`, and the host name that Python remembers is forgotten.
    """
    if "_ssl" in sys.modules:
        import ssl

        ssl.RAND_add(seed, len(seed))
    if (tempfile := sys.modules.get("tempfile")) is not None:
        tempfile._name_sequence = None  # type: ignore[attr-defined]
    if not clone:
        return
    import random

    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "random"):
        _reseed_numpy(numpy.random)
    platform = sys.modules.get("platform")
    if platform is not None:
        platform._uname_cache = None  # type: ignore[attr-defined]


def _reseed_numpy(of: Any) -> None:
    """Give numpy's global generator a state of its own, from the kernel's generator, which has been reseeded before.

    Its `seed` comes to the same and runs ten times as much code, which a machine that was just thawed does for the first time.
    """
    generator = of.get_bit_generator() if hasattr(of, "get_bit_generator") else of.mtrand._rand._bit_generator
    if type(generator).__name__ == "MT19937":
        of.set_state(("MT19937", array("I", os.urandom(4 * MT19937_WORDS)), MT19937_WORDS, 0, 0.0))
    else:
        # The user has put another kind of generator into its place.
        of.set_bit_generator(type(generator)())


def _serve(agent: socket.socket) -> None:
    """Do what the agent asks, until it is gone."""
    try:
        with agent.makefile("r") as lines:
            for line in lines:
                request = json.loads(line)
                try:
                    _reseed(bytes.fromhex(request["reseed"]), request["clone"] is not False)
                except Exception:
                    agent.sendall(b'{"reseeded": false}\n')
                else:
                    agent.sendall(b'{"reseeded": true}\n')
    finally:
        os.killpg(0, signal.SIGKILL)


def _make_output_wait(app: Any) -> None:
    """Make output wait for its reader instead of being dropped, or collected without bound.

    ipykernel drops what it publishes when 1000 messages wait, and collects text without bound. A terminal or a pipe makes the writer
    wait instead, and so do we: publishing blocks ipykernel's IOPub thread, and writing blocks until earlier text has been published.
    """
    import zmq
    from ipykernel.iostream import OutStream

    def set_options() -> None:
        publisher = app.iopub_thread.socket
        publisher.set(zmq.XPUB_NODROP, 1)
        publisher.set(zmq.SNDHWM, PUBLISHED_AHEAD)

    app.iopub_thread.schedule(set_options)  # in its thread: a socket belongs to one

    write_at_once = OutStream.write

    def write(self: Any, string: str) -> Any:
        written = write_at_once(self, string)
        waiting = self.__dict__.get("_agentvm_waiting", 0) + len(string)
        if waiting >= STREAM_BLOCK:
            waiting = 0
            self.flush()  # gives up after 10 s, so a cell goes on even where nobody reads
        self.__dict__["_agentvm_waiting"] = waiting
        return written

    OutStream.write = write  # type: ignore[method-assign]


def _explain_host_magics(shell: Any) -> None:
    """Define magics of the names that the host takes out of cells: where one arrives here it was written where the host cannot run it.

    One that the host has run arrives marked as done, to be counted and kept in the history.
    """
    from IPython.core.error import UsageError

    def define(name: str, kind: str) -> None:
        def magic(line: str, cell: str | None = None) -> None:
            metadata = shell.kernel.get_parent().get("metadata")
            if not isinstance(metadata, dict) or metadata.get("agentvm") != "done":
                raise UsageError(
                    f"%{name} is about the whole machine: write it with its percent sign on a line of its own at the top level of a cell,"
                    " not in a function, a loop, an assignment or another magic."
                )

        magic.__doc__ = f"About the whole machine; `%{name}?` in a cell tells more."
        shell.register_magic_function(magic, kind, name)

    for name in HOST_LINE_MAGICS:
        define(name, "line")
    for name in HOST_CELL_MAGICS:
        define(name, "cell")


class _Interrupts:
    """Lets SIGINT into the user's code only.

    While ipykernel serves a request, it takes an interrupt wherever it is: before the cell's first statement it is lost; in the middle
    of a message it costs the reply, and the cell never ends. Here one that comes between waits for the cell's next statement.
    """

    def __init__(self, app: Any) -> None:
        self._main = threading.get_ident()
        self._waiting = False
        kernel, shell, session = app.kernel, app.shell, app.session
        self._kernel = kernel
        kernel.pre_handler_hook = self._take_over
        kernel.shell_handlers["execute_request"] = self._around_cell(kernel.shell_handlers["execute_request"])
        shell.run_code = self._around_statement(shell.run_code)
        shell.events.trigger = self._around_callbacks(shell.events.trigger)
        session.send = self._around_message(session.send)

    def _take_over(self) -> None:
        self._waiting = False
        self._kernel.saved_sigint_handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._waiting = True

    def _raise(self) -> None:
        if not self._waiting or threading.get_ident() != self._main:
            return
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._waiting = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def _set(self, is_open: bool) -> Iterator[None]:
        # Python's own handler leaves no trace of us in the user's traceback. Cells that await have ipykernel's, which stays.
        ours = (self._on_signal, signal.default_int_handler)
        before, wanted = ours if is_open else ours[::-1]
        # A subshell has its own thread; signals come to the main one only.
        if threading.get_ident() != self._main or signal.getsignal(signal.SIGINT) != before:
            yield
            return
        signal.signal(signal.SIGINT, wanted)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _around_message(self, send: Callable[..., Any]) -> Callable[..., Any]:
        def send_whole(*arguments: Any, **named: Any) -> Any:
            with self._set(False):
                sent = send(*arguments, **named)
            self._raise()
            return sent

        return send_whole

    def _around_statement(self, run: Callable[..., Any]) -> Callable[..., Any]:
        async def run_code(*arguments: Any, **named: Any) -> Any:
            with self._set(True):
                self._raise()
                return await run(*arguments, **named)

        return run_code

    def _around_callbacks(self, trigger: Callable[..., Any]) -> Callable[..., Any]:
        def trigger_interruptibly(*arguments: Any, **named: Any) -> None:
            # Figures are drawn there. IPython shows what a callback raises; what is raised between two of them waits.
            try:
                with self._set(True):
                    trigger(*arguments, **named)
            except KeyboardInterrupt:
                self._waiting = True

        return trigger_interruptibly

    def _around_cell(self, execute: Callable[..., Any]) -> Callable[..., Any]:
        async def execute_request(*arguments: Any) -> None:
            with self._set(False):
                await execute(*arguments)
                if threading.get_ident() == self._main:
                    self._waiting = False

        return execute_request


def main() -> None:
    """Start ipykernel and stay in its loop until it ends."""
    agent = socket.socket(fileno=int(sys.argv[1]))
    agent.set_inheritable(False)
    # The agent is exempt from the out-of-memory killer; the user's code is not.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("0")
    connection_file = sys.argv[2]
    modules = sys.argv[3:]
    # As `python -m ipykernel_launcher` does: the working directory comes first, this script's folder not at all.
    sys.path[0] = ""
    sys.argv = ["ipykernel_launcher.py", "-f", connection_file]
    warnings.filterwarnings("ignore", message=".*signing is disabled.*")

    from ipykernel.kernelapp import IPKernelApp

    failed = {}
    for name in modules:
        try:
            __import__(name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    # ipykernel takes no signal of ours: 1 is a parent that it never looks for, and does not explain Ctrl-C to.
    app = IPKernelApp.instance(parent_handle=1)
    # A history file would only be of this machine anyway, and costs a write to the disk for each cell.
    app.initialize(["-f", connection_file, "--HistoryManager.hist_file=:memory:"])  # type: ignore[no-untyped-call]
    _make_output_wait(app)
    _explain_host_magics(app.shell)
    _Interrupts(app)
    if "_ssl" in sys.modules:
        import ssl

        # OpenSSL sets its generator up when it is first used. In a template that is done once; then seeds are mixed into it.
        ssl.RAND_bytes(1)
    # What is imported now stays: the collector need not touch it, so machines that share these pages go on sharing them.
    gc.collect()
    gc.freeze()
    threading.Thread(target=_serve, args=(agent,), name="agentvm-reseed", daemon=True).start()
    agent.sendall(json.dumps({"ready": True, "failed": failed}).encode() + b"\n")
    app.start()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
