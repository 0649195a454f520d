"""Time travel with real guests: exactly the old state comes back, again and again, and nothing is lost or left when something fails."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator

import pytest

from agentvm_kernel import Sandbox
from agentvm_kernel.errors import AgentVMError, ExecutionError, HostError, MachineLost, SnapshotError
from agentvm_kernel.hypervisor import garbage, memory
from agentvm_kernel.hypervisor import snapshot as files
from agentvm_kernel.hypervisor.disk import MAX_LAYERS, layers_under
from agentvm_kernel.hypervisor.files import machines_dir
from agentvm_kernel.hypervisor.freeze import MAX_DELTAS
from agentvm_kernel.sandbox import snapshot_store

pytestmark = [pytest.mark.guest, pytest.mark.timeout(240)]

STATE = """
import os, queue, random, socket, subprocess, tempfile, threading, time
import numpy as np

random.seed(7); np.random.seed(7)
generator = (n * n for n in range(100)); taken = [next(generator) for _ in range(10)]
path = os.path.expanduser("~/notes"); file = open(path, "w+"); file.write("0123456789" * 500); file.flush(); file.seek(4321)
ticks = []; tick = threading.Event()
def run():
    while True:
        ticks.append(time.monotonic()); tick.set(); time.sleep(0.05)
thread = threading.Thread(target=run, daemon=True); thread.start()
child = subprocess.Popen(["sed", "-u", "s/^/child: /"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
def ask(text):
    child.stdin.write(text + "\\n"); child.stdin.flush(); return child.stdout.readline().strip()
listener = socket.create_server(("127.0.0.1", 0)); near = socket.create_connection(listener.getsockname()); far, _ = listener.accept()
near.sendall(b"sent before, read after")
double = lambda n: 2 * n + len(taken)
lock = threading.Lock(); lock.acquire(); unpicklable = (lock, double, generator, child)
os.makedirs(os.path.expanduser("~/work"), exist_ok=True); os.chdir(os.path.expanduser("~/work")); os.environ["COLOUR"] = "blue"
data = np.arange(2_000_000); values = [1, 2, 3]
subprocess.run("sync; sudo sync", shell=True, check=True)
print(ask("hello"), os.getpid(), child.pid)
"""
DAMAGE = """
list(generator); file.close(); os.remove(path); child.kill(); near.close(); far.close(); lock.release()
os.chdir("/"); os.environ["COLOUR"] = "red"
data[:] = 0; values.clear(); del double, ask; random.seed(1); np.random.seed(1); ticks.clear()
open(os.path.expanduser("~/later"), "w").write("made after the snapshot")
"""
CHECK = """
assert [next(generator), next(generator)] == [100, 121]
assert file.tell() == 4321 and file.read(5) == "12345", file.tell()
assert open(path).read() == "0123456789" * 500 and not os.path.exists(os.path.expanduser("~/later"))
tick.clear(); before = len(ticks); assert before and thread.is_alive() and tick.wait(5)
tick.clear(); assert tick.wait(5) and len(ticks) > before
assert ask("are you there?") == "child: are you there?" and child.poll() is None
assert far.recv(100) == b"sent before, read after"; far.sendall(b"back"); assert near.recv(10) == b"back"
assert double(4) == 18 and lock.locked() and unpicklable[0] is lock
assert os.getcwd() == os.path.expanduser("~/work") and os.environ["COLOUR"] == "blue"
assert int(data.sum()) == 1_999_999_000_000 and values == [1, 2, 3]
print(random.random(), np.random.rand(), os.getpid(), child.pid, socket.gethostname())
"""


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    """A sandbox with a fresh machine."""
    async with await Sandbox.create() as made:
        yield made


async def output(sandbox: Sandbox, code: str) -> str:
    """Run a cell that has to succeed and return what it printed."""
    result = await sandbox.run(code, timeout_s=120)
    assert result.ok, "\n".join(result.error.traceback if result.error else ()) or result
    return result.stdout.strip()


def qemu_pid(sandbox: Sandbox) -> int:
    return sandbox.lease.machine.qemu_pid


def names(sandbox: Sandbox) -> list[str]:
    """The names of the sandbox's own snapshots, without those that were exported before."""
    return [one.name for one in files.list_all() if one.session == sandbox.history.session and one.name]


def machines() -> set[str]:
    """The names of all machines that have left something on the disk."""
    return {path.name for path in machines_dir().iterdir()}


async def gone(name: str) -> None:
    """Wait until nothing is left of a machine; the process that removes it does not tell us."""
    async with asyncio.timeout(30):
        while (machines_dir() / name).exists():
            await asyncio.sleep(0.1)


async def test_exactly_the_old_state_comes_back(sandbox):
    said, pid, child = (await output(sandbox, STATE)).rsplit(maxsplit=2)
    assert said == "child: hello"
    connection, host = sandbox.lease.connection, sandbox.lease.machine.name
    frozen = await sandbox.snapshot("state", description="before the damage")
    assert sandbox.lease.connection is connection
    assert snapshot_store.find("state", sandbox.history.session).description == "before the damage"
    assert not connection.closed.done()
    assert 0 < frozen.pause_s < 5
    # The machine that was frozen goes on with everything, too.
    first = (await output(sandbox, CHECK)).split()
    assert first[2:] == [pid, child, host]
    for _ in range(2):
        await output(sandbox, DAMAGE)
        await sandbox.restore("state")
        assert (await output(sandbox, CHECK)).split() == first  # random numbers included
    drift = float(await output(sandbox, "print(time.time())")) - time.time()
    assert abs(drift) < 5
    assert await output(sandbox, "print(os.urandom(8).hex())") != await output(sandbox, "print(os.urandom(8).hex())")


async def test_hazard_5_memory_and_disk_are_of_one_moment(sandbox):
    writer = """
import os, threading, time
count = 0; log = open(os.path.expanduser("~/log"), "w", buffering=1)
def write():
    global count
    while True:
        log.write(f"{count + 1:08}\\n"); os.fsync(log.fileno()); count += 1
threading.Thread(target=write, daemon=True).start()
time.sleep(0.3)
"""
    await output(sandbox, writer)
    for number in range(3):
        await sandbox.snapshot(f"s{number}")
    for number in (1, 0, 2):
        await sandbox.restore(f"s{number}")
        # Read past the page cache what the disk had.
        check = """
command = "sync; sudo sh -c 'echo 3 > /proc/sys/vm/drop_caches'; cat ~/log"
lines = subprocess.run(command, shell=True, text=True, capture_output=True).stdout.split()
seen = count
assert [int(line) for line in lines] == list(range(1, len(lines) + 1)) and 0 < len(lines) <= seen + 1, (len(lines), seen)
"""
        await output(sandbox, f"import subprocess{check}")


async def test_twenty_restores_and_histories_that_branch(sandbox):
    await output(sandbox, "import random; random.seed(3); history = []")
    await sandbox.snapshot("root")
    first = await output(sandbox, "print(random.random())")
    machines = {sandbox.lease.machine.name}
    for number in range(20):
        await output(sandbox, f"history.append({number})")
        await sandbox.restore("root")
        machines.add(sandbox.lease.machine.name)
        assert await output(sandbox, "print(history, random.random())") == f"[] {first}"
    assert len(machines) == 21
    # A snapshot of a restored machine, one of a restored machine of that one, and back and forth between them.
    for name in ("a", "b", "c"):
        await output(sandbox, f"history.append({name!r})")
        await sandbox.snapshot(name)
        await sandbox.restore(name)
    for name, wanted in (("a", "a"), ("c", "abc"), ("root", ""), ("b", "ab")):
        await sandbox.restore(name)
        assert await output(sandbox, "print(''.join(history))") == wanted
    await output(sandbox, "history.append('x')")
    await sandbox.snapshot("branch", description="another way")
    text = snapshot_store.as_text(
        [one for one in files.list_all() if one.session == sandbox.history.session and one.name], sandbox.history.here
    )
    order = [line.lstrip("* │├└─").split()[0] for line in text.splitlines()]
    assert order[:3] == ["root", "a", "b"]
    assert set(order[3:]) == {"c", "branch"}
    assert next(line for line in text.splitlines() if line.startswith("*")).split()[-2:] == ["another", "way"]
    assert "another way" in sandbox.history.as_html()
    # What lies before a snapshot may go without harm to it.
    await sandbox.history.delete("a")
    await sandbox.history.delete("root")
    assert names(sandbox) == ["b", "c", "branch"]
    for name, wanted in (("c", "abc"), ("branch", "abx")):
        await sandbox.restore(name)
        assert await output(sandbox, "print(''.join(history))") == wanted


async def test_a_chain_of_fifty_snapshots_stays_bounded(sandbox):
    await output(sandbox, "import os; n = 0; held = bytearray(8 << 20)")
    depths, layers = [], []
    for number in range(50):
        cell = f"n = {number}; held[n << 12] = n; open(f'file-{{n}}', 'w').write(str(n)); os.sync()"
        await output(sandbox, cell)
        made = await sandbox.snapshot(f"s{number}")
        await sandbox.history.settled()
        depths.append(len(memory.sources(sandbox.lease.machine.hypervisor, made)[1]))
        layers.append(len(layers_under(sandbox.lease.machine)))
    assert max(depths) == MAX_DELTAS
    assert max(layers) <= MAX_LAYERS + 1
    # Several of them are whole again; none is as large as the machine.
    assert depths.count(1) >= 3
    assert sum(one.size() for one in files.list_all() if one.session == sandbox.history.session) < 50 * (64 << 20)
    for number in (0, 16, 33, 49):
        await sandbox.restore(f"s{number}")
        look = "print(n, sum(held[i << 12] for i in range(50)), sum(os.path.exists(f'file-{i}') for i in range(50)))"
        assert await output(sandbox, look) == f"{number} {sum(range(number + 1))} {number + 1}"


async def test_undo_goes_back_cell_by_cell(sandbox):
    history = sandbox.history

    async def cell(code: str) -> None:
        assert await history.checkpoint(sandbox.lease) is not None
        await output(sandbox, code)

    async def undo(steps: int) -> str:
        before = sandbox.lease
        sandbox._attach(await history.undo(steps, before))
        await before.release()
        return await output(sandbox, "print(steps)")

    with pytest.raises(SnapshotError, match="nothing to undo"):
        await history.undo(1, sandbox.lease)
    await output(sandbox, "steps = []")
    for number in range(4):
        await cell(f"steps.append({number})")
    assert await undo(1) == "[0, 1, 2]"
    assert await undo(2) == "[0]"
    await cell("steps.append('other')")
    assert await undo(1) == "[0]"
    with pytest.raises(SnapshotError, match="Only 1 cells can be undone"):
        await history.undo(2, sandbox.lease)


async def test_automatic_snapshots_do_not_grow_without_bound(sandbox, monkeypatch):
    monkeypatch.setattr("agentvm_kernel.sandbox.timetravel.CHECKPOINTS", 3)
    await output(sandbox, "import subprocess; n = 0")
    await sandbox.snapshot("kept")
    most = 0
    for number in range(14):
        assert await sandbox.history.checkpoint(sandbox.lease) is not None
        await output(
            sandbox, f"n = {number + 1}; open(f'file-{{n}}', 'w').write('x' * n * 10000); subprocess.run('sync')"
        )
        await sandbox.history.settled()
        most = max(most, len(layers_under(sandbox.lease.machine)))
    # Disk layers were drawn together, and all that is on the disk is still there.
    assert len(layers_under(sandbox.lease.machine)) < most <= MAX_LAYERS + 1
    assert names(sandbox) == ["kept", "before-12", "before-13", "before-14"]
    for name, n in (("kept", 0), ("before-14", 13), ("before-12", 11)):
        await sandbox.restore(name)
        look = "subprocess.run('sudo sh -c \"echo 3 > /proc/sys/vm/drop_caches\"', shell=True)\n"
        look += "import glob; print(n, sorted(len(open(f).read()) // 10000 for f in glob.glob('file-*')))"
        assert await output(sandbox, look) == f"{n} {list(range(1, n + 1))}"


async def test_copies_run_side_by_side_and_share_nothing(sandbox):
    await output(sandbox, "import random, socket, numpy as np; random.seed(1); np.random.seed(1); items = ['shared']")
    original = await output(sandbox, "print(socket.gethostname(), open('/etc/machine-id').read().strip())")
    copies = await sandbox.fork(3)
    try:
        ask = """
items.append({})
identity = socket.gethostname(), open('/etc/machine-id').read().strip()
print(items, random.random(), np.random.rand(), *identity, sep='|')
"""
        answers = [
            text.split("|")
            for text in await asyncio.gather(*(output(one, ask.format(number)) for number, one in enumerate(copies)))
        ]
        assert [answer[0] for answer in answers] == [f"['shared', {number}]" for number in range(3)]
        for column in range(1, 5):
            assert len({answer[column] for answer in answers}) == 3
        assert original not in {f"{answer[3]} {answer[4]}" for answer in answers}
        assert await output(sandbox, "print(items, random.random())") == "['shared'] 0.13436424411240122"
        # A copy has a history of its own on top.
        await copies[0].snapshot("of-a-copy")
        await output(copies[0], "items.clear()")
        await copies[0].restore("of-a-copy")
        assert await output(copies[0], "print(items)") == "['shared', 0]"
    finally:
        await asyncio.gather(*(one.close() for one in copies))
    await asyncio.gather(*(gone(answer[3]) for answer in answers))
    assert all(one.name for one in files.list_all() if one.session == sandbox.history.session and not one.automatic)


async def test_what_is_given_up_half_way_leaves_no_machine(sandbox):
    await output(sandbox, "value = 1")
    await sandbox.snapshot("here")
    sandbox.history._spare.drop()
    before = machines()
    for attempt in (sandbox.fork(3), sandbox.restore("here")):
        task = asyncio.ensure_future(attempt)
        async with asyncio.timeout(60):
            while machines() <= before:
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(60):
            while not machines() <= before:
                await asyncio.sleep(0.1)
    assert await output(sandbox, "print(value)") == "1"


async def test_a_killed_machine_comes_back_and_the_connection_of_another_stays(sandbox):
    await output(sandbox, "value = 'precious'")
    await sandbox.snapshot("safe")
    running = asyncio.ensure_future(sandbox.run("import time; time.sleep(60)"))
    await asyncio.sleep(0)
    os.kill(qemu_pid(sandbox), signal.SIGKILL)
    with pytest.raises(MachineLost, match=r"ended|killed|lost"):
        await running
    with pytest.raises(AgentVMError):
        await sandbox.snapshot("of-nothing")
    await sandbox.restore("safe")
    assert await output(sandbox, "print(value)") == "precious"
    assert names(sandbox) == ["safe"]


async def test_what_is_refused_changes_nothing(sandbox, monkeypatch):
    await output(sandbox, "value = 1")
    await sandbox.snapshot("one")
    with pytest.raises(SnapshotError, match="There is a snapshot 'one' already"):
        await sandbox.snapshot("one")
    for bad in ("", "../x", "a b", "-x", "x" * 64, "a/b", "a\n"):
        with pytest.raises(SnapshotError, match="no name for a snapshot"):
            await sandbox.snapshot(bad)
    with pytest.raises(SnapshotError, match=r"no snapshot 'nowhere'.* Snapshots: .*\bone\b"):
        await sandbox.restore("nowhere")
    with pytest.raises(SnapshotError, match="no snapshot 'nowhere'"):
        await sandbox.history.delete("nowhere")
    # While a cell runs there is no clean boundary.
    monkeypatch.setattr("agentvm_kernel.sandbox.timetravel.QUIESCE_S", 0.5)
    busy = asyncio.ensure_future(sandbox.run("import time; time.sleep(4); value = 2"))
    await asyncio.sleep(0)
    with pytest.raises(SnapshotError, match="a cell was still running"):
        await sandbox.snapshot("two")
    assert (await busy).ok
    monkeypatch.undo()

    # The disk runs full while the snapshot is written.
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("agentvm_kernel.hypervisor.freeze.write_changes", full)
        with pytest.raises(HostError, match=r"No space left on device.* The machine runs on"):
            await sandbox.snapshot("three")
        assert await sandbox.history.checkpoint(sandbox.lease) is None
    # QEMU dies while a restore is under way.
    from agentvm_kernel.hypervisor import thaw

    load = thaw.load_devices

    def killed(machine, state) -> None:
        os.kill(machine.qemu_pid, signal.SIGKILL)
        load(machine, state)

    sandbox.history._spare.drop()
    before = machines()
    with monkeypatch.context() as patch:
        patch.setattr(thaw, "load_devices", killed)
        with pytest.raises((AgentVMError, OSError)):
            await sandbox.restore("one")
    assert sandbox.lease.machine.name in machines() <= before
    assert await output(sandbox, "print(value)") == "2"
    assert names(sandbox) == ["one"]
    assert not list(files.snapshots_dir().glob(f"{files.PARTIAL}*"))
    await sandbox.snapshot("four")
    await sandbox.restore("four")
    assert await output(sandbox, "print(value)") == "2"


async def test_exported_snapshots_outlive_their_sandbox_and_start_new_ones(tmp_path):
    name = f"kept-{uuid.uuid4().hex[:8]}"
    async with await Sandbox.create() as sandbox:
        session = sandbox.history.session
        await output(sandbox, "import random; random.seed(1); kept = 'from before'")
        await sandbox.snapshot("dropped")
        await sandbox.snapshot(name)
        with pytest.raises(SnapshotError, match=f"no snapshot '{name}'"):
            await Sandbox.from_snapshot(name)
        exported = await sandbox.history.export(name)
        assert exported.exported
        assert set(snapshot_store.find(name).digests) == {"state", "delta"}
        machine = sandbox.lease.machine.name
    try:
        await gone(machine)
        garbage.collect()
        assert [one.name for one in files.list_all() if one.session == session and one.name] == [name]
        seen = set()
        for _ in range(2):
            async with await Sandbox.from_snapshot(name) as again:
                assert await output(again, "print(kept)") == "from before"
                seen.add(await output(again, "import socket; print(random.random(), socket.gethostname())"))
        assert len(seen) == 2  # they are copies, each with an identity and random numbers of its own
        agentvm = [sys.executable, "-m", "agentvm_kernel.cli"]
        notebook = tmp_path / "n.ipynb"
        cell = {"cell_type": "code", "source": "print(kept)", "metadata": {}, "outputs": [], "execution_count": None}
        notebook.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}))
        done = subprocess.run([*agentvm, "run", notebook, "--from", name], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "from before" in (tmp_path / "n.out.ipynb").read_text()
        listed = json.loads(subprocess.check_output([*agentvm, "snapshot", "list", "--json"], timeout=60))
        assert [(one["exported"], one["id"]) for one in listed if one["name"] == name] == [(True, exported.id)]
        assert name in subprocess.check_output([*agentvm, "snapshot", "list"], text=True, timeout=60)
    finally:
        done = subprocess.run([*agentvm, "snapshot", "delete", name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    with pytest.raises(SnapshotError):
        snapshot_store.find(name)


async def test_results_of_cells_and_their_time_limit(sandbox):
    good = await sandbox.run("print('out'); import sys; print('err', file=sys.stderr); 6 * 7")
    assert (good.ok, good.stdout, good.stderr, good.value, good.error) == (True, "out\n", "err\n", "42", None)
    assert good.require_ok() is good
    bad = await sandbox.run("print('before'); 1 / 0")
    assert (bad.ok, bad.stdout) == (False, "before\n")
    assert (bad.error.name, bad.error.message) == ("ZeroDivisionError", "division by zero")
    with pytest.raises(ExecutionError, match="ZeroDivisionError"):
        bad.require_ok()
    slow = await sandbox.run("while True: pass", timeout_s=1)
    assert slow.error.name == "TimeoutError"
    assert await output(sandbox, "print('still here')") == "still here"
    first, second = await asyncio.gather(sandbox.run("a = 1"), sandbox.run("a + 1"))
    assert (first.ok, second.value) == (True, "2")
    await sandbox.close()
    with contextlib.suppress(MachineLost):
        await sandbox.run("1")
        pytest.fail("a closed sandbox ran something")
