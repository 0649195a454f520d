"""The kernel process between a real client and a real ipykernel, with the runtime as a local process instead of a machine."""

import asyncio
import signal
import time
from contextlib import asynccontextmanager
from queue import Empty

import nbformat
import psutil
import pytest
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError

from agentvm_kernel.jupyter import kernelspec
from agentvm_kernel.jupyter.kernel_app import EXIT_GUEST_ENDED

pytestmark = pytest.mark.timeout(120)
TIMEOUT_S = 60


@pytest.fixture(autouse=True)
def spec(tmp_path, monkeypatch):
    kernelspec.write(tmp_path / "kernels" / "agentvm", "agentvm", {"AGENTVM_LOCAL_RUNTIME": "1"})
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))


class Kernel:
    """A started kernel and one client of it."""

    def __init__(self, manager, client):
        self.manager, self.client = manager, client

    @property
    def process(self):
        return psutil.Process(self.manager.provisioner.pid)

    @property
    def runtime(self):
        """The process that stands in for the machine."""
        return next(child for child in self.process.children() if "guest_runtime.local" in child.cmdline())

    async def run(self, code, *, answers=()):
        """Run a cell; return its reply's content and what it published, as (type, content)."""
        asked = self.client.execute(code, allow_stdin=bool(answers))
        return await self.result(asked, answers=answers)

    async def result(self, asked, *, answers=()):
        async with asyncio.timeout(TIMEOUT_S):
            answering = asyncio.ensure_future(self._answer(list(answers)))
            reply = await self.reply(asked)
            answering.cancel()
            return reply, [(m["msg_type"], m["content"]) for m in await self.outputs(asked)]

    async def _answer(self, answers):
        for answer in answers:
            await self.client.get_stdin_msg(timeout=TIMEOUT_S)
            self.client.input(answer)

    async def reply(self, asked):
        while (message := await self.client.get_shell_msg(timeout=TIMEOUT_S))["parent_header"].get("msg_id") != asked:
            pass
        return message["content"]

    async def iopub(self, asked):
        while (message := await self.client.get_iopub_msg(timeout=TIMEOUT_S))["parent_header"].get("msg_id") != asked:
            pass
        return message

    async def outputs(self, asked):
        """All that is published about a request up to its idle; without the statuses."""
        messages = []
        while True:
            message = await self.iopub(asked)
            if message["msg_type"] != "status":
                messages.append(message)
            elif message["content"]["execution_state"] == "idle":
                return messages

    async def started(self, asked):
        """Wait until a cell prints something."""
        while (await self.iopub(asked))["msg_type"] != "stream":
            pass


@asynccontextmanager
async def running_kernel(**options):
    manager = AsyncKernelManager(kernel_name="agentvm", **options)
    await manager.start_kernel()
    client = manager.client()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=TIMEOUT_S)
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        await manager.shutdown_kernel(now=True)


@pytest.fixture
async def kernel():
    async with running_kernel() as kernel:
        yield kernel


def text(outputs, name="stdout"):
    return "".join(content["text"] for msg_type, content in outputs if msg_type == "stream" and content["name"] == name)


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
async def test_cells_run(transport, tmp_path):
    options = {"transport": "ipc", "ip": str(tmp_path / "s")} if transport == "ipc" else {}
    async with running_kernel(**options) as kernel:
        reply, outputs = await kernel.run("print('hi'); 6 * 7")
        assert reply["status"] == "ok"
        assert [msg_type for msg_type, _ in outputs] == ["execute_input", "stream", "execute_result"]
        assert outputs[-1][1]["data"]["text/plain"] == "42"


async def test_with_encrypted_sockets():
    async with running_kernel(transport_encryption="required") as kernel:
        assert kernel.manager.curve_secretkey
        _, outputs = await kernel.run("print('hi')")
        assert text(outputs) == "hi\n"


async def test_the_kernel_answers_before_its_machine_is_there():
    manager = AsyncKernelManager(kernel_name="agentvm")
    await manager.start_kernel()
    client = manager.client()
    client.start_channels()
    try:
        asked = client.kernel_info()
        reply = await client.get_shell_msg(timeout=TIMEOUT_S)
        assert reply["parent_header"]["msg_id"] == asked
        kernel = Kernel(manager, client)
        # What is asked before there is a machine is held, and runs in it.
        _, outputs = await kernel.run("print('and runs')")
        assert text(outputs) == "and runs\n"
    finally:
        client.stop_channels()
        await manager.shutdown_kernel(now=True)


async def test_input(kernel):
    reply, outputs = await kernel.run("print(input('name? ') + input())", answers=["Ada", " Lovelace"])
    assert reply["status"] == "ok"
    assert text(outputs) == "Ada Lovelace\n"


async def test_a_notebook_that_asks_for_input_runs_in_nbclient():
    class AnsweringClient(NotebookClient):
        async def async_start_new_kernel_client(self):
            client = await super().async_start_new_kernel_client()
            client.allow_stdin = True
            self.answering = asyncio.ensure_future(self.answer(client))
            return client

        async def answer(self, client):
            question = await client.stdin_channel.get_msg(timeout=TIMEOUT_S)
            assert question["content"] == {"prompt": "name? ", "password": False}
            client.input("Grace")

    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("name = input('name? ')"), nbformat.v4.new_code_cell("print(name); name")]
    )
    await AnsweringClient(notebook, kernel_name="agentvm", timeout=TIMEOUT_S).async_execute()
    assert [output.output_type for output in notebook.cells[1].outputs] == ["stream", "execute_result"]
    assert notebook.cells[1].outputs[0].text == "Grace\n"
    assert [cell.execution_count for cell in notebook.cells] == [1, 2]


@pytest.mark.parametrize("way", ["message", "signal"])
async def test_interrupting_a_loop(kernel, way):
    await kernel.run("x = 1")
    asked = kernel.client.execute("print('started', flush=True)\nwhile True: pass")
    queued = kernel.client.execute("never = 1")
    await kernel.started(asked)
    if way == "message":
        await kernel.manager.interrupt_kernel()
    else:
        kernel.process.send_signal(signal.SIGINT)
    reply, outputs = await kernel.result(asked)
    assert reply["ename"] == "KeyboardInterrupt"
    assert "kernel_launcher" not in "".join(reply["traceback"])
    assert outputs[-1][0] == "error"
    assert (await kernel.reply(queued))["status"] == "aborted"
    _, outputs = await kernel.run("print(x, 'never' in globals())")
    assert text(outputs) == "1 False\n"


async def test_no_interrupt_is_lost_however_early_it_comes(kernel):
    for number in range(40):
        asked = kernel.client.execute("import time; time.sleep(600)")
        await asyncio.sleep(number / 2000)
        await kernel.manager.interrupt_kernel()
        reply, _ = await kernel.result(asked)
        assert reply["ename"] == "KeyboardInterrupt"


async def test_interrupting_input(kernel):
    asked = kernel.client.execute("input()", allow_stdin=True)
    await kernel.client.get_stdin_msg(timeout=TIMEOUT_S)
    await kernel.manager.interrupt_kernel()
    assert (await kernel.reply(asked))["ename"] == "KeyboardInterrupt"


async def test_comms_both_ways_with_buffers(kernel):
    await kernel.run(
        "from comm import get_comm_manager\n"
        "def opened(comm, message):\n"
        "    comm.on_msg(lambda m: comm.send({'got': m['content']['data']}, buffers=[b'<', *m['buffers'], b'>']))\n"
        "    comm.send('hello')\n"
        "get_comm_manager().register_target('echo', opened)"
    )
    session, channel = kernel.client.session, kernel.client.shell_channel
    opening = session.msg("comm_open", {"comm_id": "c-1", "target_name": "echo", "data": {}})
    channel.send(opening)
    outputs = await kernel.outputs(opening["header"]["msg_id"])
    assert outputs == []  # data that is not an object is no comm message
    message = session.msg("comm_msg", {"comm_id": "c-1", "data": {"n": 1}})
    session.send(channel.socket, message, buffers=[b"\x00\xff" * 100_000])
    (answer,) = await kernel.outputs(message["header"]["msg_id"])
    assert answer["content"] == {"comm_id": "c-1", "data": {"got": {"n": 1}}}
    assert [bytes(buffer) for buffer in answer["buffers"]] == [b"<", b"\x00\xff" * 100_000, b">"]
    asked = kernel.client.comm_info()
    assert (await kernel.reply(asked))["comms"] == {"c-1": {"target_name": "echo"}}


async def test_widgets_are_shown(kernel):
    reply, outputs = await kernel.run("import ipywidgets; slider = ipywidgets.IntSlider(3); slider")
    assert reply["status"] == "ok"
    opened = [content for msg_type, content in outputs if msg_type == "comm_open"]
    assert {content["target_name"] for content in opened} == {"jupyter.widget"}
    assert "application/vnd.jupyter.widget-view+json" in outputs[-1][1]["data"]


async def test_threads_print_after_their_cell(kernel):
    asked = kernel.client.execute(
        "import threading\ngo = threading.Event()\n"
        "threading.Thread(target=lambda: (go.wait(), print('late', flush=True))).start()"
    )
    await kernel.result(asked)
    setting = kernel.client.execute("go.set()")
    text = ""
    # print writes the end of the line separately, and what is there may be sent in between.
    while not text.endswith("\n"):
        message = await kernel.client.get_iopub_msg(timeout=TIMEOUT_S)
        if message["msg_type"] == "stream":
            text += message["content"]["text"]
            assert message["parent_header"]["msg_id"] in (asked, setting)
    assert text == "late\n"


async def test_a_flood_of_output_arrives_whole(kernel):
    size = 20_000_000
    _, outputs = await kernel.run(f"for _ in range({size // 100}): print('x' * 99)")
    assert sum(len(content["text"]) for msg_type, content in outputs if msg_type == "stream") == size


async def test_a_flood_of_output_does_not_delay_an_interrupt(kernel):
    asked = kernel.client.execute("for _ in range(2_000_000): print('x' * 99)")
    await kernel.started(asked)
    reading = asyncio.ensure_future(kernel.outputs(asked))
    began = time.monotonic()
    await kernel.manager.interrupt_kernel()
    reply = await kernel.reply(asked)
    assert time.monotonic() - began < 2
    assert reply["ename"] == "KeyboardInterrupt"
    async with asyncio.timeout(TIMEOUT_S):
        await reading


# ---- ends


async def test_a_kernel_that_kills_itself_is_a_dead_kernel(kernel):
    asked = kernel.client.execute("import os, time; print('last words', flush=True); time.sleep(0.5); os._exit(3)")
    async with asyncio.timeout(10):
        while await kernel.manager.is_alive():
            await asyncio.sleep(0.05)
    assert await kernel.manager.provisioner.poll() in (None, EXIT_GUEST_ENDED)
    said = ""
    try:
        while True:
            message = await kernel.client.get_iopub_msg(timeout=1)
            if message["parent_header"].get("msg_id") == asked and message["msg_type"] == "stream":
                said += message["content"]["text"]
    except Empty:
        pass
    assert "last words" in said
    assert "ended with exit code 3" in said


async def test_nbclient_sees_a_dead_kernel():
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")]
    )
    with pytest.raises(DeadKernelError):
        await NotebookClient(notebook, kernel_name="agentvm", timeout=TIMEOUT_S).async_execute()


async def test_exit_ends_the_kernel_without_an_error(kernel):
    process = kernel.process
    await kernel.run("exit()")
    assert process.wait(10) in (0, None)


async def test_a_lost_machine_is_an_error_within_five_seconds_and_the_next_cell_gets_a_fresh_one(kernel):
    await kernel.run("x = 1")
    asked = kernel.client.execute("print('started', flush=True)\nwhile True: pass")
    await kernel.started(asked)
    lost = kernel.runtime
    began = time.monotonic()
    lost.kill()
    reply, outputs = await kernel.result(asked)
    assert time.monotonic() - began < 5
    assert reply["status"] == "error"
    assert reply["ename"] == "MachineLost"
    assert outputs[-1][0] == "error"
    reply, outputs = await kernel.run("print('x' in globals())")
    assert reply["status"] == "ok"
    assert text(outputs) == "False\n"
    assert "fresh machine" in text(outputs, "stderr")
    assert kernel.runtime.pid != lost.pid
    _, outputs = await kernel.run("print('again')")
    assert text(outputs, "stderr") == ""


async def test_a_machine_lost_while_nothing_runs(kernel):
    await kernel.run("x = 1")
    kernel.runtime.kill()
    reply, outputs = await kernel.run("print('x' in globals())")
    # The cell may have been on its way when the machine went.
    if reply["status"] == "error":
        assert reply["ename"] == "MachineLost"
        reply, outputs = await kernel.run("print('x' in globals())")
    assert text(outputs) == "False\n"
    assert "fresh machine" in text(outputs, "stderr")


async def test_no_machine_is_one_clear_error_for_each_cell(tmp_path):
    """A real machine is asked for, of which there is no image here, or not even libvirt."""
    folders = {f"AGENTVM_{name}_DIR": str(tmp_path / name) for name in ("CACHE", "STATE", "RUN")}
    kernelspec.write(tmp_path / "kernels" / "broken", "broken", folders)
    manager = AsyncKernelManager(kernel_name="broken")
    await manager.start_kernel()
    client = manager.client()
    client.start_channels()
    kernel = Kernel(manager, client)
    try:
        for _ in range(2):
            reply, outputs = await kernel.run("1 + 1")
            assert reply["status"] == "error"
            assert reply["ename"].endswith("Error")
            assert reply["evalue"]
            assert [msg_type for msg_type, _ in outputs] == ["error"]
    finally:
        client.stop_channels()
        await manager.shutdown_kernel(now=True)


async def test_restart_by_the_client(kernel):
    await kernel.run("x = 1")
    before = kernel.process
    await kernel.manager.restart_kernel()
    assert not before.is_running()
    await kernel.client.wait_for_ready(timeout=TIMEOUT_S)
    _, outputs = await kernel.run("print('x' in globals())")
    assert text(outputs) == "False\n"


async def test_shutdown_is_quick_and_leaves_nothing(kernel):
    await kernel.run("import subprocess; p = subprocess.Popen(['sleep', '1000'])")
    processes = [kernel.process, *kernel.process.children(recursive=True)]
    began = time.monotonic()
    await kernel.manager.shutdown_kernel()
    assert time.monotonic() - began < 2
    _, left = psutil.wait_procs(processes[:2], timeout=5)
    assert not left


async def test_shutdown_while_the_machine_starts():
    manager = AsyncKernelManager(kernel_name="agentvm")
    await manager.start_kernel()
    process = psutil.Process(manager.provisioner.pid)
    began = time.monotonic()
    await manager.shutdown_kernel()
    assert time.monotonic() - began < 3
    assert not process.is_running()


async def test_killed_kernel_process_takes_its_runtime_along(kernel):
    await kernel.run("1")
    runtime = kernel.runtime
    kernel.process.kill()
    _, left = psutil.wait_procs([runtime, *runtime.children()], timeout=10)
    assert not left
