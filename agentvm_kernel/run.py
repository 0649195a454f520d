"""Executes a notebook headless, in a machine by default. Built on nbclient; needs no registered kernelspec.

The executed notebook is written whatever happens: after a failed cell, a time limit, a dead kernel or ctrl-C it holds the outputs so
far and, in the cell that was running, an error that says what happened.
"""

import asyncio
import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import IO, Any

from jupyter_client.kernelspec import KernelSpec, NoSuchKernel
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import ensure_async
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from rich.console import Console

from agentvm_kernel.errors import AgentVMError, ConfigError, NotebookError
from agentvm_kernel.jupyter.kernelspec import kernel_dict
from agentvm_kernel.notebook import (
    check_writable,
    inject_parameters,
    node,
    parse_parameters,
    read_notebook,
    write_notebook,
)
from agentvm_kernel.run_report import Report, printable

READY_TIMEOUT_S = 60
"""Seconds within which the kernel process on the host must answer; the machine behind it may take longer."""
END_OF_INPUT = "\x04"
"""The answer that makes ipykernel raise EOFError, as input() does at the end of a file."""

SAID = "agentvm: "
"""How lines of our own kernel begin that tell a cell about its machine."""


@dataclass(frozen=True)
class RunOptions:
    """What `agentvm run` was asked for.

    Attributes:
        notebook: path of the notebook.
        output: where the executed notebook goes; None puts NAME.out.ipynb beside it.
        parameters: `NAME=VALUE` each.
        timeout_s: seconds that one cell may take; None is no limit.
        allow_errors: go on after a cell that failed.
        answers: what input() gets, in order.
        profile: resource profile of the machine; None takes the configured one.
        kernel: name of an installed kernel to use instead of a machine.
        start_from: name or id of a snapshot that the machine starts from; None takes a fresh machine.
        verbose: show what the kernel process logs.
    """

    notebook: str
    output: str | None = None
    parameters: Sequence[str] = ()
    timeout_s: float | None = None
    allow_errors: bool = False
    answers: Sequence[str] = ()
    profile: str | None = None
    kernel: str | None = None
    start_from: str | None = None
    verbose: bool = False


def default_output(notebook: Path) -> Path:
    """Return where the executed notebook goes when nobody says: NAME.out.ipynb beside NAME.ipynb."""
    return notebook.with_name(f"{notebook.stem}.out.ipynb")


def run_notebook(options: RunOptions) -> int:
    """Execute a notebook, write the result, tell on standard error how it goes; return the exit code.

    Raises:
        AgentVMError: nothing was executed, because what was asked for cannot be done.
    """
    path = Path(options.notebook)
    notebook = read_notebook(path)
    output = Path(options.output) if options.output else default_output(path)
    check_writable(output)
    inject_parameters(notebook, parse_parameters(options.parameters))
    environment = dict(os.environ)
    if options.kernel is None:
        from agentvm_kernel.config import load_config

        settings = load_config(profile=options.profile).sandbox_settings()
        environment["AGENTVM_PROFILE"] = settings.profile
        if options.start_from is not None:
            if options.profile is not None:
                raise ConfigError("A snapshot's machine has its size already.", hint="Leave out --profile or --from.")
            from agentvm_kernel.sandbox import snapshot_store

            environment[snapshot_store.START_FROM] = snapshot_store.find_any(options.start_from).id
    elif options.profile is not None or options.start_from is not None:
        wrong = "--profile" if options.profile is not None else "--from"
        raise ConfigError(f"{wrong} is for machines and --kernel for kernels without one.", hint="Use one of them.")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with tempfile.TemporaryFile() as kernel_log:
        manager = _manager(options.kernel)
        run = _Run(notebook, manager, options, output, console, None if options.verbose else kernel_log)
        return asyncio.run(run.run(environment, path.resolve().parent))


class _MachineKernelManager(AsyncKernelManager):
    """Starts our kernel with this Python, whether a kernelspec is registered or not."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**kernel_dict("Python 3 (agentvm)"))


def _manager(kernel: str | None) -> AsyncKernelManager:
    if kernel is None:
        return _MachineKernelManager(kernel_name="agentvm")
    manager = AsyncKernelManager(kernel_name=kernel)
    try:
        assert manager.kernel_spec is not None  # noqa: S101 (raises NoSuchKernel where there is none)
    except NoSuchKernel as error:
        raise ConfigError(f"There is no kernel {kernel!r}.", hint="`jupyter kernelspec list` shows all.") from error
    return manager


class _Stopped(Exception):  # noqa: N818
    """A signal asked us to stop."""

    def __init__(self, number: int) -> None:
        super().__init__("Interrupted." if number == signal.SIGINT else f"Stopped by {signal.Signals(number).name}.")
        self.exit_code = 128 + number


class _Run:
    """One execution of one notebook."""

    def __init__(
        self,
        notebook: NotebookNode,
        manager: AsyncKernelManager,
        options: RunOptions,
        output: Path,
        console: Console,
        kernel_log: IO[bytes] | None,
    ) -> None:
        self._notebook = notebook
        self._manager = manager
        self._options = options
        self._output = output
        self._report = Report(console)
        self._kernel_log = kernel_log
        self._answers = deque(options.answers)
        self._numbers = {
            index: number
            for number, index in enumerate(
                (i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and cell.source.strip()),
                start=1,
            )
        }
        self._current = next(iter(self._numbers), None)
        self._failed = 0
        self._unanswered = ""

    async def run(self, environment: dict[str, str], folder: Path) -> int:
        """Execute all cells; write the notebook; return the exit code."""
        loop = asyncio.get_running_loop()
        stop: asyncio.Future[int] = loop.create_future()

        def on_signal(number: int) -> None:
            if not stop.done():
                stop.set_result(number)

        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in signals:
            loop.add_signal_handler(number, on_signal, number)
        for cell in self._notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        failure: Exception | None = None
        try:
            with self._report:
                work = asyncio.create_task(self._execute(environment, folder))
                either: set[asyncio.Future[Any]] = {work, stop}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    work.cancel()
                    await asyncio.gather(work, return_exceptions=True)
                    failure = _Stopped(stop.result())
                else:
                    error = work.exception()
                    if error is not None and not isinstance(error, Exception):
                        raise error
                    failure = error
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
            try:
                # First of all, so that not even a second ctrl-C loses what has been computed.
                code = self._finish(failure)
            finally:
                await self._end_kernel()
        return code

    async def _execute(self, environment: dict[str, str], folder: Path) -> None:
        client = NotebookClient(
            self._notebook,
            km=self._manager,
            timeout_func=lambda _: self._options.timeout_s,
            allow_errors=self._options.allow_errors,
            coalesce_streams=True,
            iopub_timeout=30,
        )
        client.reset_execution_trackers()
        self._report.starting("kernel" if self._options.kernel else "machine")
        began = time.monotonic()
        await self._manager.start_kernel(
            env=environment, cwd=str(folder), stdout=self._kernel_log, stderr=self._kernel_log
        )
        channels = self._manager.client()
        client.kc = channels
        channels.start_channels()
        try:
            await channels.wait_for_ready(timeout=READY_TIMEOUT_S)
            channels.allow_stdin = bool(self._options.answers)
            await self._wait_for_machine(channels)
            self._report.started(time.monotonic() - began)
            answering = asyncio.create_task(self._answer_input(channels))
            try:
                for index in self._numbers:
                    await self._execute_cell(client, index)
            finally:
                answering.cancel()
            await self._take_language(client)
        finally:
            client.set_widgets_metadata()
            channels.stop_channels()

    async def _wait_for_machine(self, channels: Any) -> None:
        """Wait until cells can run: no part of a machine's start shall count against a cell's time limit."""
        # Not silent: the kernel tells cells that wait what its machine is doing.
        request = channels.execute("", store_history=False)
        telling = asyncio.create_task(self._tell_stages(channels, request))
        try:
            while True:
                try:
                    reply = await channels.shell_channel.get_msg(timeout=1)
                except Empty:
                    if not await channels.is_alive():
                        raise DeadKernelError("the kernel process ended before it was ready") from None
                    continue
                if reply["parent_header"].get("msg_id") == request:
                    break
        finally:
            telling.cancel()
        if reply["content"]["status"] == "error":
            raise NotebookError(str(reply["content"].get("evalue")))

    async def _tell_stages(self, channels: Any, request: str) -> None:
        while True:
            message = await channels.iopub_channel.get_msg(timeout=None)
            if message["msg_type"] == "stream" and message["parent_header"].get("msg_id") == request:
                self._report.stage(printable(message["content"]["text"].removeprefix(SAID)).strip())

    async def _execute_cell(self, client: NotebookClient, index: int) -> None:
        cell = self._notebook.cells[index]
        self._current = index
        self._report.cell_begins(self._numbers[index], len(self._numbers), cell.source)
        began = time.monotonic()
        failed = True
        try:
            await client.async_execute_cell(cell, index)
            failed = any(output.output_type == "error" for output in cell.outputs)
        finally:
            self._failed += failed
            self._report.cell_ends(time.monotonic() - began, failed=failed)

    async def _answer_input(self, channels: Any) -> None:
        """Answer input() in the notebook, and show question and answer in the cell as JupyterLab does."""
        while True:
            message = await channels.stdin_channel.get_msg(timeout=None)
            if message["msg_type"] != "input_request" or self._current is None:
                continue
            prompt = str(message["content"].get("prompt", ""))
            if not self._answers:
                self._unanswered = prompt or "input()"
                channels.input(END_OF_INPUT)
                continue
            answer = self._answers.popleft()
            shown = "········" if message["content"].get("password") else answer
            outputs = self._notebook.cells[self._current].outputs
            outputs.append(node(output_type="stream", name="stdout", text=f"{prompt}{shown}\n"))
            channels.input(answer)

    async def _take_language(self, client: NotebookClient) -> None:
        reply = await client.async_wait_for_reply(client.kc.kernel_info())  # type: ignore[union-attr]
        if reply is not None and "language_info" in reply["content"]:
            self._notebook.metadata["language_info"] = reply["content"]["language_info"]

    def _finish(self, failure: Exception | None) -> int:
        """Write the notebook and say how it went."""
        code, ename, message, hint = self._explain(failure)
        cell = None if self._current is None else self._notebook.cells[self._current]
        if ename and cell is not None:
            cell.outputs.append(
                node(output_type="error", ename=ename, evalue=message, traceback=[f"{ename}: {message}"])
            )
        write_notebook(self._notebook, self._output)
        if isinstance(failure, CellExecutionError) and cell is not None:
            self._report.show_failure(cell)
        if failure is not None:
            hint = f"{hint}\n" if hint else ""
            self._report.error(message, f"{hint}What was executed is in {self._output}")
        elif self._failed:
            self._report.note(f"{self._failed} of {len(self._numbers)} cells failed, as was allowed.")
        if failure is None:
            print(f"Executed notebook: {self._output}")
        return code

    def _explain(self, failure: Exception | None) -> tuple[int, str, str, str]:
        """Return exit code, name of the error to add to the cell (empty: none), message and hint."""
        where = f"cell {self._numbers.get(self._current or 0, 0)} of {len(self._numbers)}"
        match failure:
            case None:
                return 0, "", "", ""
            case _Stopped():
                return failure.exit_code, "KeyboardInterrupt", f"{failure} It happened in {where}.", ""
            case CellExecutionError():
                return (
                    1,
                    "",
                    f"{where} failed: {printable(f'{failure.ename}: {failure.evalue}')}",
                    self._input_hint(failure),
                )
            case CellTimeoutError():
                limit = f"{self._options.timeout_s:g} s"
                return 1, "TimeoutError", f"{where} ran longer than {limit}.", "--timeout sets the limit."
            case DeadKernelError():
                return 1, "DeadKernelError", f"The kernel died in {where}.", self._last_words() or self._kernel_words()
            case NotebookError():
                return (
                    1,
                    "MachineError",
                    f"The machine could not be started: {printable(failure.message)}",
                    "`agentvm doctor` finds out why.",
                )
            case RuntimeError() if "died" in str(failure):
                return 1, "DeadKernelError", "The kernel process did not start.", self._kernel_words()
            case AgentVMError():
                return 1, type(failure).__name__, failure.message, failure.hint
            case _:
                raise failure

    def _input_hint(self, failure: CellExecutionError) -> str:
        if failure.ename == "StdinNotImplementedError":
            return "It asks for input: answer with --input TEXT."
        if self._unanswered and failure.ename == "EOFError":
            return f"It asks for more input ({printable(self._unanswered).strip()}): give one --input TEXT for each question."
        return ""

    def _last_words(self) -> str:
        """Return what our kernel told the running cell about the guest's end, for a hint."""
        outputs = [] if self._current is None else self._notebook.cells[self._current].outputs
        lines = "".join(output.text for output in outputs if output.get("name") == "stderr").splitlines()
        return "\n".join(printable(line.removeprefix(SAID)) for line in lines if line.startswith(SAID))

    def _kernel_words(self) -> str:
        """Return the last lines that the kernel process wrote, for a hint."""
        if self._kernel_log is None:
            return ""
        self._kernel_log.seek(0)
        lines = self._kernel_log.read().decode("utf-8", "replace").splitlines()
        return "\n".join(printable(line) for line in lines[-8:])

    async def _end_kernel(self) -> None:
        if self._manager.has_kernel:
            await self._manager.shutdown_kernel()
        await ensure_async(self._manager.cleanup_resources())
