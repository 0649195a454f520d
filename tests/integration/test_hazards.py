"""The hazards of snapshots and clones, each on real guests: two clones of one template, lent as notebooks get them.

The numbers are those of the list of hazards that this project keeps. Others have tests elsewhere: 5 with time travel, 11 to 13 with the
connection and the parsers, 19 with the templates.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from agentvm_kernel import paths
from agentvm_kernel.errors import AuthenticationError, MachineLost, MonitorError
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.files import machines_dir, sockets_dir
from agentvm_kernel.hypervisor.inventory import list_machines
from agentvm_kernel.hypervisor.memory import content_digest
from agentvm_kernel.hypervisor.reap import read_tags, reap
from agentvm_kernel.hypervisor.snapshot import load
from agentvm_kernel.image import store
from agentvm_kernel.sandbox import identity, lease, templates
from agentvm_kernel.sandbox.lease import acquire
from agentvm_kernel.sandbox.sandbox import Sandbox
from agentvm_kernel.sandbox.settings import SandboxSettings
from agentvm_kernel.transport.connection import GuestConnection, open_connection

pytestmark = [pytest.mark.guest, pytest.mark.asyncio(loop_scope="module")]

SETTINGS = SandboxSettings(profile="light")

FACTS = """
import json, os, pathlib, platform, random, secrets, socket, ssl, tempfile, time, uuid
import numpy as np
print(json.dumps({
    "urandom": os.urandom(16).hex(), "random": random.random(), "bits": random.getrandbits(128), "fresh": random.Random().random(),
    "numpy": np.random.random(), "numpy_normal": np.random.standard_normal(), "default_rng": np.random.default_rng().random(),
    "uuid4": str(uuid.uuid4()), "secret": secrets.token_hex(16), "kernel_uuid": pathlib.Path("/proc/sys/kernel/random/uuid").read_text(),
    "ssl": ssl.RAND_bytes(16).hex(), "temporary": os.path.basename(tempfile.mktemp()),
    "machine_id": pathlib.Path("/etc/machine-id").read_text(), "boot_id": pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(),
    "hostname": socket.gethostname(), "node": platform.node(), "etc_hostname": pathlib.Path("/etc/hostname").read_text(),
    "addresses": sorted(pathlib.Path(f"/sys/class/net/{name}/address").read_text() for _, name in socket.if_nameindex() if name != "lo"),
}))
"""
DRAW = "import random, numpy as np; print(random.random(), random.gauss(0, 1), np.random.random(), np.random.randint(1 << 30))"


async def ask(sandbox: Sandbox, code: str, timeout_s: float = 60) -> str:
    """Run a cell that must go well and return what it printed."""
    return (await sandbox.run(code, timeout_s=timeout_s)).require_ok().stdout


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair() -> AsyncIterator[tuple[Sandbox, Sandbox]]:
    """Two clones of one template, on which no cell has run."""
    first = await Sandbox.create(SETTINGS)
    try:
        second = await Sandbox.create(SETTINGS)
        try:
            assert first.lease.machine.tags.template == second.lease.machine.tags.template != ""
            yield first, second
        finally:
            await second.close()
    finally:
        await first.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def facts(pair: tuple[Sandbox, Sandbox]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the first cell of each of the two sees."""
    first, second = [json.loads(await ask(each, FACTS)) for each in pair]
    return first, second


RANDOM = ("urandom", "kernel_uuid", "uuid4", "secret", "ssl", "default_rng", "fresh", "temporary")


@pytest.mark.parametrize("name", RANDOM)
async def test_hazard_1_clones_do_not_share_the_kernels_random_numbers(facts, name):
    first, second = facts
    assert first[name] != second[name]


@pytest.mark.parametrize("name", ["random", "bits", "numpy", "numpy_normal"])
async def test_hazard_2_clones_do_not_share_the_state_of_random_and_numpy(facts, name):
    first, second = facts
    assert first[name] != second[name]


async def test_hazard_2_a_users_own_seed_gives_the_same_numbers_everywhere(pair):
    seeded = f"import random, numpy as np; random.seed(7); np.random.seed(7)\n{DRAW}"
    first, second = [await ask(each, seeded) for each in pair]
    assert first == second
    assert await ask(pair[0], seeded) == first


async def test_hazard_2_a_restored_machine_goes_on_with_its_users_seed_and_forks_do_not():
    hidden = "import os, ssl, tempfile; print(ssl.RAND_bytes(16), os.path.basename(tempfile.mktemp()), sep=chr(10))"
    async with await Sandbox.create(SETTINGS) as sandbox:
        await ask(sandbox, f"import random, numpy as np; random.seed(7); np.random.seed(7)\n{hidden}")
        await sandbox.snapshot("seeded")
        forks = await sandbox.fork(2)
        try:
            drawn = [await ask(each, DRAW) for each in (sandbox, *forks)]
            assert len(set(drawn)) == 3
            told = [(await ask(each, hidden)).split("\n") for each in (sandbox, *forks)]
            assert len({numbers for numbers, *_ in told}) == 3
            assert len({name for _, name, *_ in told}) == 3
        finally:
            for each in forks:
                await each.close()
        await sandbox.restore("seeded")
        assert await ask(sandbox, DRAW) == drawn[0]
        # What nobody can seed is new even there.
        numbers, name, *_ = (await ask(sandbox, hidden)).split("\n")
        assert numbers != told[0][0]
        assert name != told[0][1]


async def test_hazard_3_the_wall_clock_is_right_and_the_monotonic_clock_goes_on(pair):
    template = load(pair[1].lease.machine.tags.template)
    for each in pair:
        before = time.time()
        told = float(await ask(each, "import time; print(time.time())"))
        assert before - 0.5 < told < time.time() + 0.5
        assert told > template.created
    sandbox, _ = pair
    clocks = "import time; print(time.time(), time.monotonic())"
    wall, monotonic = map(float, (await ask(sandbox, clocks)).split())
    await sandbox.lease.pause()
    await asyncio.sleep(3)
    await sandbox.lease.resume()
    before = time.time()
    later_wall, later_monotonic = map(float, (await ask(sandbox, clocks)).split())
    assert before - 0.5 < later_wall < time.time() + 0.5
    assert 0 < later_monotonic - monotonic < later_wall - wall - 2


@pytest.mark.parametrize("name", ["machine_id", "boot_id", "hostname", "node", "etc_hostname"])
async def test_hazard_4_clones_have_identities_of_their_own(facts, pair, name):
    first, second = facts
    assert first[name] != second[name]
    if name in ("hostname", "node", "etc_hostname"):
        assert [told[name].strip() for told in facts] == [each.lease.machine.name for each in pair]


async def test_hazard_4_clones_share_no_address_of_a_network_card(facts):
    first, second = facts
    assert not set(first["addresses"]) & set(second["addresses"])


async def test_hazard_4_each_clone_has_a_secret_of_its_own_and_has_forgotten_the_templates(pair):
    template = load(pair[1].lease.machine.tags.template)
    secrets = {each.lease.machine.secret for each in pair} | {template.secret.read_bytes()}
    assert len(secrets) == 3
    clone = await acquire(SETTINGS)
    try:
        machine = clone.machine
        await clone.connection.close()
        for wrong in (template.secret.read_bytes(), pair[0].lease.machine.secret):
            with pytest.raises(AuthenticationError):
                await open_connection(machine.address, wrong, timeout_s=20)
        connection = await open_connection(machine.address, machine.secret, timeout_s=20)
        assert (await connection.call("system"))["hostname"] == machine.name
        await connection.close()
    finally:
        await clone.release()


CONNECT = """
import fcntl, socket, struct, subprocess, sys
add = '''
import fcntl, socket, struct
address = struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton("10.9.9.9"))
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8916, struct.pack("16s16s", b"lo:1", address))
'''
subprocess.run(["sudo", "-n", sys.executable, "-c", add], check=True)
listener = socket.create_server(("10.9.9.9", 0))
client = socket.create_connection(listener.getsockname())
server, _ = listener.accept()
client.settimeout(5)
server.settimeout(5)
client.sendall(b"before")
print(server.recv(6))
"""
SAY = "client.sendall(b'after!'); print(server.recv(6))"


async def test_hazard_4_clones_inherit_no_connections(pair):
    _, sandbox = pair
    assert await ask(sandbox, CONNECT) == "b'before'\n"
    (fork,) = await sandbox.fork(1)
    try:
        result = await fork.run(SAY, timeout_s=30)
        assert result.error is not None
        assert result.error.name in ("ConnectionAbortedError", "ConnectionResetError", "BrokenPipeError")
    finally:
        await fork.close()
    assert await ask(sandbox, SAY) == "b'after!'\n"


async def test_hazard_6_nobody_gets_a_machine_before_its_identity_is_renewed(monkeypatch):
    asked, gate = asyncio.Event(), asyncio.Event()
    renew = identity.renew_identity

    async def slow(*arguments: Any, **options: Any) -> Any:
        asked.set()
        await gate.wait()
        return await renew(*arguments, **options)

    monkeypatch.setattr(identity, "renew_identity", slow)
    monkeypatch.setattr(lease.pool, "claim", lambda key: None)
    waiting = asyncio.create_task(Sandbox.create(SETTINGS))
    await asked.wait()
    done, _ = await asyncio.wait([waiting], timeout=1)
    assert not done
    gate.set()
    async with await waiting as sandbox:
        assert (await ask(sandbox, "import socket; print(socket.gethostname())")).strip() == sandbox.lease.machine.name


@pytest.mark.parametrize("part", ["entropy", "reseed", "connections"])
async def test_hazard_6_a_machine_that_does_not_confirm_is_discarded(monkeypatch, part):
    call, renewed = GuestConnection.call, []

    async def liar(self: GuestConnection, method: str, params: Any = None, **options: Any) -> Any:
        answer = await call(self, method, params, **options)
        if method == "renew":
            renewed.append(params["hostname"])
            return {**answer, part: False}
        return answer

    monkeypatch.setattr(lease.pool, "claim", lambda key: None)
    with monkeypatch.context() as patch:
        patch.setattr(GuestConnection, "call", liar)
        with pytest.raises(MachineLost, match=f"did not confirm.*{part}"):
            await acquire(SETTINGS)
    (name,) = renewed
    await until(lambda: name not in [machine.name for machine in list_machines()])
    assert not (machines_dir() / name).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
async def test_hazard_7_no_other_user_can_read_or_thaw_a_template(pair, tmp_path):
    template = load(pair[1].lease.machine.tags.template)
    for path in (template.memory, template.state, template.secret, template.folder / "snapshot.json"):
        done = subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat", str(path)], capture_output=True
        )
        assert done.returncode != 0, f"another user can read {path}"
        assert b"denied" in done.stderr
    # Another user's state folder is another one, and only there templates are looked for.
    other = {**os.environ, "AGENTVM_STATE_DIR": str(tmp_path)}
    code = "from agentvm_kernel.hypervisor.snapshot import list_all; print(list_all())"
    assert subprocess.run([sys.executable, "-c", code], env=other, capture_output=True, text=True).stdout == "[]\n"


async def test_hazard_8_what_clones_write_never_reaches_the_templates_memory(pair):
    template = load(pair[1].lease.machine.tags.template)
    before = template.memory.stat()
    for each in pair:
        await ask(
            each,
            "import gc; block = bytearray(48 << 20); block[:] = b'agentvm!' * (len(block) // 8); gc.collect(); del block",
        )
    after = template.memory.stat()
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    assert content_digest(template.memory) == template.digests["memory"]
    for each in pair:
        maps = Path(f"/proc/{each.lease.machine.qemu_pid}/maps").read_text().splitlines()
        mappings = [line.split()[1] for line in maps if line.endswith(str(template.memory))]
        assert mappings
        assert all(mode.endswith("p") for mode in mappings)


async def test_hazard_9_and_10_clones_have_no_balloon_and_no_shared_folders(pair):
    for each in pair:
        machine = each.lease.machine
        domain = ElementTree.fromstring(machine.domain.XMLDesc(0))
        assert [balloon.get("model") for balloon in domain.iterfind("./devices/memballoon")] in ([], ["none"])
        with pytest.raises(MonitorError):
            machine.qmp("query-balloon")
        assert domain.find("./devices/filesystem") is None
        mounted = await ask(each, "print(open('/proc/filesystems').read()); print(open('/proc/mounts').read())")
        kinds = {line.split()[2] for line in mounted.splitlines() if len(line.split()) == 6}
        assert not kinds & {"9p", "virtiofs", "nfs", "cifs", "fuse"}


async def test_hazard_11_the_sockets_lie_in_a_folder_of_qemus_user_alone(pair):
    for each in pair:
        status = each.lease.machine.files.sockets.stat()
        assert status.st_mode & 0o777 == 0o700
        assert status.st_uid == each.lease.machine.hypervisor.qemu_user[0]
        assert each.lease.machine.files.secret.stat().st_mode & 0o777 == 0o600


# ---- 18: whatever is killed and when


async def until(condition: Any, timeout_s: float = 60) -> None:
    """Wait for something that another process does and nobody announces."""
    deadline = time.monotonic() + timeout_s
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.05)


@pytest.fixture
def home() -> Iterator[dict[str, str]]:
    """The environment of a user with the same templates and no machines."""
    state = paths.state_dir()
    folder = Path(tempfile.mkdtemp(prefix="agentvm-h", dir="/var/tmp"))
    folder.chmod(0o711)
    own = folder / "state"
    own.mkdir(mode=0o711)
    for name in ("snapshots", "layers"):
        (own / name).symlink_to(state / name)
    yield {**os.environ, "AGENTVM_STATE_DIR": str(own), "AGENTVM_RUN_DIR": str(folder / "run")}
    shutil.rmtree(folder)


HOLD = """
import asyncio
from agentvm_kernel.sandbox.lease import acquire
from agentvm_kernel.sandbox.settings import SandboxSettings

async def main():
    lease = await acquire(SandboxSettings(profile="light"), on_progress=lambda text: print(text, flush=True))
    print("leased", lease.machine.name, lease.machine.qemu_pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
DELAYS_S = (0.0, 0.15, 0.3, 0.45, 0.6, 0.8, 1.1)


def left_behind(state: Path, run: Path) -> list[str]:
    """Everything of a user that is still there: domains, folders, sockets, QEMU processes."""
    found = [str(path) for folder in (state / "machines", run / "m") if folder.exists() for path in folder.iterdir()]
    with Hypervisor() as hypervisor:
        for domain in hypervisor.domains():
            tags = read_tags(domain)
            if tags is not None and tags.folder.parent == state / "machines":
                found.append(f"domain {domain.name()}")
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(run).encode() in command.read_bytes():
                found.append(str(command))
        except OSError:
            continue
    return found


async def test_hazard_18_an_owner_killed_at_any_moment_leaves_nothing_after_the_next_pass(home, pair, monkeypatch):
    state, run = Path(home["AGENTVM_STATE_DIR"]), Path(home["AGENTVM_RUN_DIR"])
    seen = 0
    for delay in DELAYS_S:
        owner = subprocess.Popen([sys.executable, "-c", HOLD], env=home, stdout=subprocess.PIPE, text=True)
        assert owner.stdout is not None
        while "Thawing" not in (line := await asyncio.to_thread(owner.stdout.readline)):
            assert line
        await asyncio.sleep(delay)
        owner.kill()
        owner.wait()
        owner.stdout.close()
        with monkeypatch.context() as patch:
            for name in ("AGENTVM_STATE_DIR", "AGENTVM_RUN_DIR"):
                patch.setenv(name, home[name])
            seen += bool(left_behind(state, run))
            patch.setattr("agentvm_kernel.hypervisor.reap.UNFINISHED_S", 0.0)
            with Hypervisor() as hypervisor:
                # QEMU may have been on its way: libvirt finishes what it began for the one who was killed.
                await until(lambda: reap(hypervisor) is not None and not left_behind(state, run))
    assert seen, "the owner was never killed with anything in its hands"
    # Templates outlive all that.
    assert load(pair[1].lease.machine.tags.template).memory.exists()


async def test_hazard_18_a_killed_qemu_is_told_at_once_and_leaves_nothing(home, monkeypatch):
    for name in ("AGENTVM_STATE_DIR", "AGENTVM_RUN_DIR"):
        monkeypatch.setenv(name, home[name])
    sandbox = await Sandbox.create(SETTINGS)
    name, pid, lost = sandbox.lease.machine.name, sandbox.lease.machine.qemu_pid, sandbox.lease.lost
    running = asyncio.create_task(sandbox.run("import time; time.sleep(600)"))
    await asyncio.sleep(0)
    os.kill(pid, signal.SIGKILL)
    reason = await asyncio.wait_for(asyncio.shield(lost), 10)
    assert name in reason
    with pytest.raises(MachineLost, match=name):
        await asyncio.wait_for(running, 10)
    await sandbox.close()
    await until(lambda: not left_behind(Path(home["AGENTVM_STATE_DIR"]), Path(home["AGENTVM_RUN_DIR"])))


async def test_hazard_18_a_template_builder_that_is_killed_leaves_no_template_and_no_machine(home, monkeypatch):
    own = Path(home["AGENTVM_STATE_DIR"])
    for name in ("snapshots", "layers"):
        (own / name).unlink()
    builder = subprocess.Popen([sys.executable, "-c", HOLD], env=home, stdout=subprocess.PIPE, text=True)
    assert builder.stdout is not None
    while "Waiting for the Python kernel" not in (line := await asyncio.to_thread(builder.stdout.readline)):
        assert line
    builder.kill()
    builder.wait()
    builder.stdout.close()
    for name in ("AGENTVM_STATE_DIR", "AGENTVM_RUN_DIR"):
        monkeypatch.setenv(name, home[name])
    with Hypervisor() as hypervisor:
        await until(lambda: reap(hypervisor) is not None and not left_behind(own, Path(home["AGENTVM_RUN_DIR"])))
        assert templates.find(hypervisor, store.find(SETTINGS.image), SETTINGS.profile) is None
    assert not [path for path in (own / "snapshots").iterdir() if not path.name.startswith(".")]
    assert sockets_dir().exists()
