"""The pool with real machines and keepers, claimed from by several processes at once."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from agentvm_kernel import paths
from agentvm_kernel.errors import MachineTimeout
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.files import MachineFiles
from agentvm_kernel.hypervisor.reap import reap
from agentvm_kernel.image import store
from agentvm_kernel.sandbox import pool, templates
from agentvm_kernel.sandbox.keeper import drain
from agentvm_kernel.sandbox.lease import acquire
from agentvm_kernel.sandbox.settings import SandboxSettings

pytestmark = pytest.mark.guest

SETTINGS = SandboxSettings(profile="standard")
FILL_S = 120
CLAIM = """
import asyncio, json
from agentvm_kernel.sandbox.lease import acquire
from agentvm_kernel.sandbox.settings import SandboxSettings

async def main():
    lease = await acquire(SandboxSettings(profile="standard"))
    info = await lease.connection.call("system")
    print(json.dumps([lease.machine.name, info["hostname"]]), flush=True)
    await asyncio.to_thread(input)
    await lease.release()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def templates_of_the_user() -> Path:
    """A template for these tests, made once and kept; return the state folder that it is in."""

    async def ensure() -> None:
        with Hypervisor() as hypervisor:
            await templates.ensure(hypervisor, store.find("default"), SETTINGS.profile, timeout_s=240)

    asyncio.run(ensure())
    return paths.state_dir()


@pytest.fixture
def home(templates_of_the_user: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder with a pool of its own, and the user's templates."""
    folder = Path(tempfile.mkdtemp(prefix="agentvm-p", dir="/var/tmp"))
    folder.chmod(0o711)
    state = folder / "state"
    state.mkdir(mode=0o711)
    for name in ("snapshots", "layers"):
        (state / name).symlink_to(templates_of_the_user / name)
    monkeypatch.setenv("AGENTVM_STATE_DIR", str(state))
    monkeypatch.setenv("AGENTVM_RUN_DIR", str(folder / "run"))
    yield state
    pool.configure(minimum=0)
    asyncio.run(drain())
    wait_until(lambda: not pool.keeper_runs())
    with Hypervisor() as hypervisor:
        wait_until(lambda: (reap(hypervisor), pool.count_machines())[1] == 0)
    assert not list((folder / "run" / "m").iterdir())
    # A reaper that was started meanwhile may still look around in there.
    wait_until(lambda: (shutil.rmtree(folder, ignore_errors=True), not folder.exists())[1])


@pytest.fixture
def keeper(home: Path) -> "Iterator[Callable[[], subprocess.Popen[bytes]]]":
    """Start keepers as `agentvm pool run` does."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> "subprocess.Popen[bytes]":
        process = subprocess.Popen([sys.executable, "-m", "agentvm_kernel.cli", "pool", "run"])
        started.append(process)
        return process

    yield start
    for process in started:
        process.terminate()
        process.wait()


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 60) -> None:
    """Wait for something that another process does and nobody announces."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen in time; the pool: {pool.status()}"
        time.sleep(0.05)


def fill(number: int) -> list[str]:
    """Have the pool hold so many machines, and return their names once it does."""
    pool.configure(minimum=number, profile=SETTINGS.profile)
    wait_until(lambda: len(pool.ready_machines()) == number, timeout_s=FILL_S)
    return [marker.parent.name for marker in pool.ready_machines()]


def qemu(name: str) -> psutil.Process:
    return psutil.Process(int(MachineFiles.of(name).pid_file.read_text()))


def test_eight_processes_never_get_the_same_machine(home, keeper):
    process = keeper()
    ready = fill(4)
    process.terminate()
    process.wait()
    pool.configure(minimum=0)
    pipe = subprocess.PIPE
    processes = [subprocess.Popen([sys.executable, "-c", CLAIM], stdin=pipe, stdout=pipe, text=True) for _ in range(8)]
    told = [json.loads(process.stdout.readline()) for process in processes]
    for process in processes:
        process.communicate("\n")
        assert process.returncode == 0
    names = [name for name, _ in told]
    assert len(set(names)) == 8
    assert [hostname for _, hostname in told] == names
    assert set(ready) < set(names)


def test_ready_machines_use_no_cpu_and_are_woken_with_the_right_time(home, keeper):
    keeper()
    (name,) = fill(1)
    process = qemu(name)
    before = process.cpu_times()
    time.sleep(1.5)
    assert process.cpu_times() == before

    async def claim() -> None:
        lease = await acquire(SETTINGS)
        assert lease.machine.name == name
        began = time.time()
        told = (await lease.connection.call("system"))["time_ns"] / 1e9
        assert began - 0.5 < told < time.time() + 0.5
        await lease.release()

    asyncio.run(claim())


def test_a_killed_keeper_is_replaced_by_whoever_holds_a_machine(home, keeper):
    first = keeper()
    ready = fill(2)

    async def hold() -> None:
        lease = await acquire(SETTINGS)
        first.kill()
        first.wait()
        pool.ensure_keeper()
        await asyncio.to_thread(wait_until, lambda: pool.status().keeper not in (None, first.pid))
        await asyncio.to_thread(wait_until, lambda: len(pool.ready_machines()) == 2, timeout_s=FILL_S)
        assert lease.machine.name in ready
        assert len({marker.parent.name for marker in pool.ready_machines()} & set(ready)) == 1
        await lease.release()

    asyncio.run(hold())


def test_a_second_keeper_says_that_there_is_one(home, keeper):
    keeper()
    fill(1)
    second = subprocess.run(
        [sys.executable, "-m", "agentvm_kernel.cli", "pool", "run"], capture_output=True, text=True, timeout=30
    )
    assert second.returncode == 1
    assert "another process keeps the pool" in second.stderr


def test_broken_old_and_surplus_machines_are_replaced(home, keeper):
    keeper()
    broken, _ = fill(2)
    qemu(broken).send_signal(signal.SIGKILL)

    async def claim() -> None:
        lease = await acquire(SETTINGS)
        assert lease.machine.name != broken
        await lease.release()

    asyncio.run(claim())
    fill(1)
    pool.configure(ttl_s=0.1)
    (marker,) = pool.ready_machines()
    os.utime(marker, (0, 0))
    assert list(pool.expired(60.0, time.time())) == [marker]


def test_the_maximum_makes_others_wait_and_then_give_up(home, keeper):
    pool.configure(minimum=0, maximum=1, profile=SETTINGS.profile)

    async def two() -> None:
        lease = await acquire(SETTINGS)
        with pytest.raises(MachineTimeout, match="All 1 machines of the pool are in use"):
            await acquire(SandboxSettings(profile="standard", acquire_timeout_s=0.5))
        waiting = asyncio.create_task(acquire(SETTINGS))
        await lease.release()
        await (await waiting).release()

    asyncio.run(two())


def test_a_full_disk_is_reported_and_not_tried_all_the_time(home, keeper):
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    machines = home / "machines"
    links = {name: (home / name).readlink() for name in ("snapshots", "layers")}
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=0711", "none", str(home)], check=True)
    try:
        for name, target in links.items():
            (home / name).symlink_to(target)
        pool.configure(minimum=2, profile=SETTINGS.profile)
        process = keeper()
        wait_until(lambda: "MiB of disk are free" in pool.status().error)
        assert "AGENTVM_STATE_DIR" in pool.as_text(pool.status())
        busy = psutil.Process(process.pid)
        before = sum(busy.cpu_times()[:2])
        time.sleep(2)
        assert sum(busy.cpu_times()[:2]) - before < 0.5
        assert not list(machines.iterdir())
        process.terminate()
        process.wait()
    finally:
        subprocess.run(["umount", str(home)], check=True)


def test_what_cannot_be_is_refused(home):
    from agentvm_kernel.errors import ConfigError

    for changes in ({"minimum": -1}, {"minimum": 1000}, {"minimum": 3, "maximum": 2}, {"ttl_s": 0}):
        with pytest.raises(ConfigError):
            pool.configure(**changes)
    with pytest.raises(ConfigError, match="profile"):
        pool.configure(profile="huge")
    (home / "pool.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        pool.load_config()
    (home / "pool.json").write_text('{"minimum": "x"}')
    with pytest.raises(ConfigError, match="damaged"):
        pool.load_config()
    assert pool.configure(maximum=3) == pool.PoolConfig(maximum=3)
