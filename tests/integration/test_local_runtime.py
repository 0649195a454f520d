"""The agent, the bridge and ipykernel as local processes: everything of the guest runtime that does not need a machine."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agentvm_kernel.errors import AuthenticationError, GuestError
from agentvm_kernel.transport.address import UnixAddress
from agentvm_kernel.transport.connection import GuestConnection, open_connection
from guest_runtime.wire import Channel

SECRET = bytes(range(32))
TIMEOUT_S = 60.0


class Cell:
    """One request to the kernel and what came back for it."""

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex
        self.done: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.started = asyncio.Event()
        self.pieces: list[str] = []
        self.results: list[str] = []
        self.reply: dict[str, Any] = {}
        self.idle = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Runtime:
    """A local runtime with one connection to it."""

    def __init__(self, process: "subprocess.Popen[bytes]", address: UnixAddress, connection: GuestConnection) -> None:
        self.process = process
        self.address = address
        self.connection = connection
        self.cells: dict[str, Cell] = {}
        self.notifications: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self.attach(connection)

    def attach(self, connection: GuestConnection) -> None:
        self.connection = connection
        connection.on_notification = lambda method, params: self.notifications.put_nowait((method, params))
        for channel in (Channel.SHELL, Channel.IOPUB, Channel.CONTROL):
            connection.on_message[channel] = lambda parts, channel=channel: self._on_message(channel, parts)

    def start(self, code: str) -> Cell:
        cell = Cell()
        self.cells[cell.id] = cell
        header = {
            "msg_id": cell.id, "msg_type": "execute_request", "session": "s", "username": "u", "version": "5.3",
            "date": "2026-01-01T00:00:00Z",
        }  # fmt: skip
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
        self.connection.send(Channel.SHELL, [json.dumps(part).encode() for part in (header, {}, {}, content)])
        return cell

    async def run(self, code: str) -> Cell:
        cell = self.start(code)
        await asyncio.wait_for(cell.done, TIMEOUT_S)
        return cell

    def _on_message(self, channel: int, parts: list[bytes]) -> None:
        header, parent, _, content = (json.loads(part) for part in parts[:4])
        cell = self.cells.get(parent.get("msg_id", ""))
        if cell is None:
            return
        if channel == Channel.SHELL:
            cell.reply = content
        elif header["msg_type"] == "stream":
            cell.pieces.append(content["text"])
        elif header["msg_type"] == "execute_result":
            cell.results.append(content["data"]["text/plain"])
        elif header["msg_type"] == "execute_input":
            cell.started.set()
        elif header["msg_type"] == "status" and content["execution_state"] == "idle":
            cell.idle = True
        if cell.idle and cell.reply and not cell.done.done():
            cell.done.set_result(cell.reply)


def launch(folder: Path, *options: str, **how: Any) -> "tuple[subprocess.Popen[bytes], UnixAddress]":
    (folder / "secret").write_bytes(SECRET)
    command = [sys.executable, "-m", "guest_runtime.local", "--socket", str(folder / "s"), "--secret-file"]
    how = {"stdin": subprocess.DEVNULL, **how}
    return subprocess.Popen([*command, str(folder / "secret"), *options], **how), UnixAddress(folder / "s")


async def connect(address: UnixAddress) -> GuestConnection:
    connection = await open_connection(address, SECRET, timeout_s=TIMEOUT_S)
    await connection.call("kernel.wait", timeout_s=TIMEOUT_S)
    return connection


async def end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    await asyncio.to_thread(process.wait, 20)


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[Runtime]:
    process, address = launch(tmp_path, "--connection-dir", str(tmp_path / "k"))
    runtime = Runtime(process, address, await connect(address))
    yield runtime
    await runtime.connection.close()
    await end(process)


async def gone(pid: int) -> None:
    """Wait until a process is gone; a zombie that nobody reaps yet counts."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"process {pid} is still there")


def memory_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


async def test_a_cell_runs(runtime: Runtime) -> None:
    cell = await runtime.run("print('hello'); 6 * 7")
    assert (cell.text, cell.results, cell.reply["status"]) == ("hello\n", ["42"], "ok")
    assert cell.reply["execution_count"] == 1  # the warm-up has not counted


async def test_warming_everything_up_makes_completion_fast_and_leaves_no_trace(runtime: Runtime) -> None:
    names = "print(sorted(n for n in globals() if not n.startswith('__')), In, hasattr(sys, 'last_value'))"
    before = await runtime.run(f"import sys; {names}")
    assert await runtime.connection.call("kernel.warm_up", {"everything": True}, timeout_s=TIMEOUT_S) == {"warm": True}
    after = await runtime.run(names)
    assert "agentvm" not in after.text
    assert after.text.partition("]")[0] == before.text.partition("]")[0].replace("'_i1'", "'_i1', '_i2'")
    assert after.text.endswith("False\n")
    assert after.reply["execution_count"] == 2
    loaded = await runtime.run("print('jedi' in sys.modules, 'stack_data' in sys.modules)")
    assert loaded.text == "True True\n"


async def test_the_users_code_does_not_see_the_runtime(runtime: Runtime) -> None:
    cell = await runtime.run(
        "import os, sys, importlib.util as u\n"
        "print(sys.path[0] == '', [n for n in os.environ if n.startswith(('PYTHON', 'JPY', 'JUPYTER'))],"
        " os.getsid(0) == os.getpid(), os.environ['MPLBACKEND'])"
    )
    assert cell.text == "True [] True module://matplotlib_inline.backend_inline\n"


async def test_output_arrives_whole_and_waits_in_bounded_memory(runtime: Runtime) -> None:
    agent = runtime.connection.ready["pid"]
    runtime.connection.pause(Channel.IOPUB)
    before = memory_mib(agent)
    cell = runtime.start("for i in range(200_000): print(f'{i:0999}')")
    await runtime.connection.call("ping")
    # Until the queues are full, and then some: nothing may grow any more.
    await asyncio.sleep(3)
    assert memory_mib(agent) < before + 80
    runtime.connection.resume(Channel.IOPUB)
    await asyncio.wait_for(cell.done, 120)
    assert len(cell.text) == 200_000 * 1000
    assert cell.text.endswith(f"{199_999:0999}\n")
    assert [int(line) for line in cell.text.splitlines()[::10_000]] == list(range(0, 200_000, 10_000))
    assert memory_mib(agent) < before + 80


async def test_not_one_of_many_messages_is_dropped_while_the_host_waits(runtime: Runtime) -> None:
    runtime.connection.pause(Channel.IOPUB)
    seen = 0
    relay = runtime.connection.on_message[Channel.IOPUB]

    def count(parts: list[bytes]) -> None:
        nonlocal seen
        seen += b'"display_data"' in parts[0]
        relay(parts)

    runtime.connection.on_message[Channel.IOPUB] = count
    cell = runtime.start("for i in range(5_000): display(i)")
    # ipykernel alone drops after a thousand; this one takes no more meanwhile.
    await asyncio.sleep(2)
    assert seen < 5_000
    runtime.connection.resume(Channel.IOPUB)
    await asyncio.wait_for(cell.done, 120)
    assert seen == 5_000


async def test_a_flood_can_be_interrupted(runtime: Runtime) -> None:
    cell = runtime.start("while True: print('y' * 1000)")
    while not cell.pieces:  # ipykernel itself loses an interrupt that comes before the code runs
        await asyncio.sleep(0.01)
    await runtime.connection.call("kernel.interrupt")
    reply = await asyncio.wait_for(cell.done, TIMEOUT_S)
    assert reply["ename"] == "KeyboardInterrupt"


async def test_an_interrupt_reaches_children(runtime: Runtime) -> None:
    cell = runtime.start("import subprocess; print('go', flush=True); subprocess.run(['sleep', '1000'])")
    await asyncio.wait_for(cell.started.wait(), TIMEOUT_S)
    while "go" not in cell.text:
        await asyncio.sleep(0.01)
    await runtime.connection.call("kernel.interrupt")
    assert (await asyncio.wait_for(cell.done, TIMEOUT_S))["ename"] == "KeyboardInterrupt"


async def test_quiesce_waits_for_cells_and_output(runtime: Runtime) -> None:
    assert await runtime.connection.call("quiesce") == {"quiet": True}
    for code in ("import time; time.sleep(1); print('x' * 10_000_000)", "import asyncio; await asyncio.sleep(1)"):
        cell = runtime.start(code)
        with pytest.raises(GuestError, match="still running") as error:
            await runtime.connection.call("quiesce", {"timeout_s": 0.2})
        assert error.value.code == -32001
        await runtime.connection.call("quiesce", {"timeout_s": 20.0})
        assert cell.done.done(), "all output came before the answer"


async def test_a_restart_ends_all_that_the_kernel_has_started(runtime: Runtime) -> None:
    cell = await runtime.run("import subprocess; x = 1; print(subprocess.Popen(['sleep', '1000']).pid)")
    before = await runtime.connection.call("kernel.status")
    await runtime.connection.call("kernel.restart", timeout_s=TIMEOUT_S)
    await gone(int(cell.text))
    await gone(before["pid"])
    assert (await runtime.run("x")).reply["ename"] == "NameError"
    assert not Path(before["connection_file"]).exists()
    assert runtime.notifications.empty()


async def test_the_host_is_told_when_the_kernel_dies(runtime: Runtime) -> None:
    runtime.start("import os; os.write(2, b'last words'); os._exit(7)")
    method, how = await asyncio.wait_for(runtime.notifications.get(), TIMEOUT_S)
    assert (method, how["exit_code"], how["signal"], how["restarting"]) == ("kernel.died", 7, None, False)
    assert (await runtime.connection.call("kernel.status"))["running"] is False
    with pytest.raises(GuestError, match="ended"):
        await runtime.connection.call("kernel.wait")
    with pytest.raises(GuestError, match="no Python kernel"):
        await runtime.connection.call("kernel.interrupt")
    await runtime.connection.call("kernel.start", {"environment": {"SOME": "thing"}})
    await runtime.connection.call("kernel.wait", timeout_s=TIMEOUT_S)
    assert (await runtime.run("import os; os.environ['SOME']")).results == ["'thing'"]


async def test_a_dead_kernel_is_started_again_where_that_is_wanted(tmp_path: Path) -> None:
    process, address = launch(tmp_path, "--restart-kernel")
    runtime = Runtime(process, address, await connect(address))
    try:
        told = []
        for _ in range(4):
            await runtime.connection.call("kernel.wait", timeout_s=TIMEOUT_S)
            assert (await runtime.run("1 + 1")).results == ["2"]
            runtime.start("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
            _, how = await asyncio.wait_for(runtime.notifications.get(), TIMEOUT_S)
            assert how["signal"] == signal.SIGKILL
            told.append(how["restarting"])
        assert told == [True, True, True, False], "not for ever"
    finally:
        await runtime.connection.close()
        await end(process)


async def test_a_kernel_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "ipykernel").mkdir()
    (tmp_path / "ipykernel" / "__init__.py").write_text("raise SystemExit('this ipykernel is broken')")
    process, address = launch(tmp_path, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
    try:
        connection = await open_connection(address, SECRET, timeout_s=TIMEOUT_S)
        with pytest.raises(GuestError, match="ended") as error:
            await connection.call("kernel.wait")
        assert "this ipykernel is broken" in error.value.data["log"]
        await connection.close()
    finally:
        await end(process)


async def test_modules_that_cannot_be_preloaded_are_named(tmp_path: Path) -> None:
    process, address = launch(tmp_path, "--preload", "colorsys", "no_such_module")
    try:
        connection = await open_connection(address, SECRET, timeout_s=TIMEOUT_S)
        answer = await connection.call("kernel.wait", timeout_s=TIMEOUT_S)
        assert list(answer["failed_preload"]) == ["no_such_module"]
        await connection.close()
    finally:
        await end(process)


async def test_the_newest_host_wins_and_gets_what_the_old_one_left(runtime: Runtime) -> None:
    old = runtime.connection
    cell = runtime.start("import time; time.sleep(1); print('done')")
    await asyncio.wait_for(cell.started.wait(), TIMEOUT_S)
    runtime.attach(await open_connection(runtime.address, SECRET, timeout_s=TIMEOUT_S))
    await asyncio.wait_for(old.closed, TIMEOUT_S)
    await asyncio.wait_for(cell.done, TIMEOUT_S)
    assert cell.text == "done\n"


async def test_strangers_change_nothing(runtime: Runtime) -> None:
    strangers = [await asyncio.open_unix_connection(runtime.address.path) for _ in range(40)]
    for _, writer in strangers:
        writer.write(os.urandom(10_000))
    with pytest.raises(AuthenticationError):
        await open_connection(runtime.address, bytes(32), timeout_s=0.5)
    assert (await runtime.run("1")).results == ["1"]
    for _, writer in strangers:
        writer.close()


async def test_calls_that_change_a_machine_are_refused(runtime: Runtime) -> None:
    for method in ("renew", "shutdown", "reboot"):
        with pytest.raises(GuestError) as error:
            await runtime.connection.call(method)
        assert error.value.code == -32601


async def test_a_message_bigger_than_the_connection_takes_is_named(runtime: Runtime) -> None:
    cell = await runtime.run("print('x' * 300_000_000); print('end')")
    assert "message of 286 MiB in 4 parts was left out" in cell.text
    assert cell.text.endswith("end\n")


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL", "stdin"])
async def test_nothing_is_left_behind(tmp_path: Path, how: str) -> None:
    process, address = launch(tmp_path, stdin=subprocess.PIPE)
    runtime = Runtime(process, address, await connect(address))
    child = int((await runtime.run("import subprocess; print(subprocess.Popen(['sleep', '1000']).pid)")).text)
    kernel = (await runtime.connection.call("kernel.status"))["pid"]
    if how == "stdin":
        assert process.stdin is not None
        process.stdin.close()
    else:
        process.send_signal(getattr(signal, how))
    await asyncio.to_thread(process.wait, 20)
    await gone(kernel)
    await gone(child)
    await runtime.connection.close()


async def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    parent = subprocess.Popen(
        [
            sys.executable, "-c",
            "import subprocess, sys; p = subprocess.Popen([sys.executable, '-m', 'guest_runtime.local', *sys.argv[1:]]); p.wait()",
            "--socket", str(tmp_path / "s"), "--secret-file", str(tmp_path / "secret"),
        ],
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    connection = await connect(UnixAddress(tmp_path / "s"))
    kernel = (await connection.call("kernel.status"))["pid"]
    agent = connection.ready["pid"]
    parent.kill()
    parent.wait()
    await gone(agent)
    await gone(kernel)
    await connection.close()


async def test_an_idle_runtime_does_nothing(runtime: Runtime) -> None:
    agent = runtime.connection.ready["pid"]

    def switches() -> int:
        threads = Path(f"/proc/{agent}/task").iterdir()
        texts = [(thread / "status").read_text() for thread in threads]
        return sum(int(text.partition("voluntary_ctxt_switches:")[2].split()[0]) for text in texts)

    await runtime.run("1")
    await runtime.connection.call("quiesce")
    before = switches()
    await asyncio.sleep(3)
    assert switches() - before <= 2
