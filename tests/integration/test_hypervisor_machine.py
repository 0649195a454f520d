"""Machines on a real libvirt, with a toy guest of a hundred bytes: states, ends, attaching, reaping."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import libvirt
import pytest
from toy_guest import counter, wait_until_counting

from agentvm_kernel.errors import (
    ConfigError,
    IllegalTransition,
    LibvirtError,
    MachineLost,
    MachineTimeout,
    MonitorError,
    UnknownMachineError,
)
from agentvm_kernel.hypervisor import reap as reaping
from agentvm_kernel.hypervisor.boot import boot_machine
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.files import MachineFiles
from agentvm_kernel.hypervisor.machine import Machine, MachineState
from agentvm_kernel.hypervisor.qcow2 import backing_file
from agentvm_kernel.hypervisor.tags import Owner
from agentvm_kernel.transport.address import UnixAddress

pytestmark = pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="needs QEMU")


def test_a_machine_runs_pauses_and_ends(hypervisor, toy):
    machine = boot_machine(hypervisor, toy(), "light")
    try:
        assert machine.state is MachineState.RUNNING
        assert machine.address == UnixAddress(machine.files.guest_socket)
        assert wait_until_counting(machine) > 0
        machine.pause()
        frozen = counter(machine)
        assert machine.state is MachineState.PAUSED
        assert counter(machine) == frozen
        machine.resume()
        assert machine.state is MachineState.RUNNING
        assert "512 MiB" in machine.description
        with pytest.raises(MonitorError, match="not been found"):
            machine.qmp("no-such-command")
    finally:
        machine.destroy()
    assert machine.state is MachineState.SHUT_OFF
    assert not machine.files.folder.exists()
    assert not machine.files.sockets.exists()
    with pytest.raises(UnknownMachineError):
        hypervisor.domain(machine.name)


def test_illegal_transitions_are_errors_that_say_what_would_be_legal(machine):
    with pytest.raises(IllegalTransition, match=r"running and cannot be resumed. It has to be paused"):
        machine.resume()
    with pytest.raises(IllegalTransition, match="cannot be started"):
        machine.start("<domain/>")
    machine.pause()
    with pytest.raises(IllegalTransition, match="cannot be paused"):
        machine.pause()
    with pytest.raises(IllegalTransition, match="cannot be shut down"):
        machine.shutdown()
    machine.stop()
    for call in (machine.resume, machine.pause, machine.shutdown):
        with pytest.raises(IllegalTransition, match=r"shut off \(it was destroyed\)"):
            call()
    machine.stop()


def test_a_guest_that_hears_the_power_button_shuts_down(machine):
    wait_until_counting(machine)
    machine.shutdown(20)
    assert machine.state is MachineState.SHUT_OFF
    assert machine.wait_stopped_reason(0) == f"machine {machine.name} ended: the guest shut down"


def test_a_guest_that_is_deaf_to_the_power_button_goes_on_running(hypervisor, toy):
    machine = boot_machine(hypervisor, toy(deaf=True), "light")
    try:
        wait_until_counting(machine)
        with pytest.raises(MachineTimeout, match=r"did not shut down within 0.2 s. It can be stopped by force"):
            machine.shutdown(0.2)
        assert machine.state is MachineState.RUNNING
        machine.pause()
    finally:
        machine.destroy()


def test_a_killed_qemu_is_noticed_by_event(machine):
    told: list[str] = []
    heard = threading.Event()
    machine.on_stopped(lambda reason: (told.append(reason), heard.set()))
    os.kill(machine.qemu_pid, signal.SIGKILL)
    assert heard.wait(10)
    assert machine.state is MachineState.CRASHED
    assert told == ["QEMU died or was killed"]
    with pytest.raises(MachineLost, match="QEMU died or was killed"):
        machine.wait_for(MachineState.PAUSED, 5)
    late: list[str] = []
    machine.on_stopped(late.append)
    assert late == told


def test_a_panic_is_a_crash_and_the_reason_is_its_words(hypervisor, toy):
    machine = boot_machine(hypervisor, toy(panic=True), "light")
    try:
        assert machine.wait_stopped_reason(20).endswith("Kernel panic - not syncing: toy")
        assert machine.state is MachineState.CRASHED
    finally:
        machine.destroy()


def test_waiting_for_a_state_ends_in_time(machine):
    began = time.monotonic()
    with pytest.raises(MachineTimeout, match=r"is running and not paused after 0.2 s"):
        machine.wait_for(MachineState.PAUSED, 0.2)
    assert time.monotonic() - began < 2


def test_metadata_can_be_changed_and_another_connection_reads_it(machine):
    machine.update_tags(lease="l-1", state="leased")
    with Hypervisor(machine.hypervisor.uri) as other:
        again = Machine.attach(other, machine.name)
        assert again.tags == machine.tags
        assert again.secret == machine.secret
        assert again.hardware == machine.hardware
        assert again.state is MachineState.RUNNING
        again.pause()
        machine.wait_for(MachineState.PAUSED, 10)
    with pytest.raises(UnknownMachineError):
        Machine.attach(machine.hypervisor, "no-such-machine")


def test_a_name_is_taken_once(hypervisor, toy, machine):
    with pytest.raises(ConfigError, match="already"):
        boot_machine(hypervisor, toy(), "light", name=machine.name)
    assert machine.state is MachineState.RUNNING
    assert machine.files.folder.exists()


def test_a_start_that_fails_leaves_nothing(hypervisor, toy):
    image = toy()
    image.kernel.unlink()
    with pytest.raises(LibvirtError, match=r"Starting machine agentvm-test-fails failed.*vmlinuz"):
        boot_machine(hypervisor, image, "light", name="agentvm-test-fails")
    files = MachineFiles.of("agentvm-test-fails")
    assert not files.folder.exists()
    assert not files.sockets.exists()


def test_only_qemus_user_gets_at_the_secret_and_shared_files_stay_ours(machine, hypervisor):
    files = machine.files
    assert files.secret.stat().st_mode & 0o777 == 0o600
    assert files.secret.stat().st_uid == os.geteuid()
    assert files.sockets.stat().st_mode & 0o777 == 0o700
    assert files.initrd.stat().st_mode & 0o777 == 0o400
    assert files.overlay.stat().st_uid == hypervisor.qemu_user[0]
    assert backing_file(files.overlay).stat().st_uid == os.geteuid()


def test_limits_reach_the_cgroup_where_there_is_one(machine):
    if machine.hypervisor.limits_refused:
        pytest.skip("libvirt has no cgroup controllers here")
    assert machine.domain.schedulerParameters()["global_quota"] == 100_000
    assert machine.domain.memoryParameters()["hard_limit"] == (512 + 1280) << 10


def test_a_released_machine_is_removed_by_a_process_of_its_own(machine):
    machine.release()
    assert machine.wait_stopped_reason(20).endswith("it was destroyed")
    _until_gone(machine.files.folder)


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from toy_guest import toy_image
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.boot import boot_machine
import tempfile
with Hypervisor({uri!r}) as hypervisor:
    folder = Path(tempfile.mkdtemp(dir={base!r}))
    folder.chmod(0o755)
    print(boot_machine(hypervisor, toy_image(folder / "image"), "light").name, flush=True)
    sys.stdin.read()
"""


def test_a_machine_whose_owner_was_killed_is_reaped_and_others_are_not(hypervisor, machine, guest_folder):
    code = CHILD.format(tests=str(Path(__file__).parent), uri=hypervisor.uri, base=str(guest_folder))
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    name = child.stdout.readline().strip()
    assert hypervisor.domain(name).isActive()
    assert name not in reaping.reap(hypervisor)
    child.kill()
    child.wait()
    assert name in reaping.reap(hypervisor)
    with pytest.raises(UnknownMachineError):
        hypervisor.domain(name)
    assert not MachineFiles.of(name).folder.exists()
    assert not MachineFiles.of(name).sockets.exists()
    assert machine.state is MachineState.RUNNING


def test_folders_and_sockets_of_dead_machines_are_reaped_even_without_libvirt(hypervisor, machine, tmp_path):
    files = MachineFiles.of("agentvm-test-orphan")
    files.claim()
    files.prepare((os.geteuid(), os.getegid()), {"owner": {"pid": 2**22, "start": 1}, "uri": hypervisor.uri})
    unfinished = MachineFiles.of("agentvm-test-unfinished")
    unfinished.folder.mkdir()
    lonely = MachineFiles.of("agentvm-test-lonely").sockets
    lonely.mkdir()
    # The running machine's record names a dead owner too, and its domain cannot be seen: its QEMU must keep it alive.
    record = machine.files.read_record()
    machine.files.write_record(record | {"owner": {"pid": 2**22, "start": 1}})
    try:
        with_no_libvirt = Hypervisor(f"qemu+unix:///system?socket={tmp_path}/none")
        assert reaping.reap(with_no_libvirt) == ["agentvm-test-orphan"]
        assert not files.folder.exists()
        assert not files.sockets.exists()
        assert not lonely.exists()
        assert unfinished.folder.exists()
        assert machine.files.folder.exists()
        os.utime(unfinished.folder, (0, 0))
        assert reaping.reap(with_no_libvirt) == ["agentvm-test-unfinished"]
    finally:
        machine.files.write_record(record)


def test_two_reapers_do_not_meet(hypervisor):
    with reaping._lock() as first, reaping._lock() as second:
        assert (first, second) == (True, False)
        assert reaping.reap(hypervisor) == []


def test_a_foreign_domain_is_left_alone(hypervisor):
    xml = "<domain type='qemu'><name>agentvm-test-foreign</name><memory unit='MiB'>64</memory>"
    xml += "<os><type machine='q35'>hvm</type></os></domain>"
    domain = hypervisor.connection().createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED)
    try:
        reaping.reap(hypervisor)
        assert domain.isActive()
    finally:
        domain.destroy()


class Relay:
    """A Unix socket in front of libvirtd's, so that a test can do to us what a restart of libvirtd does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ends: list[socket.socket] = []
        self.open()

    def open(self) -> None:
        self.path.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen()
        threading.Thread(target=self.serve, args=(self.listener,), daemon=True).start()

    def serve(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect("/run/libvirt/libvirt-sock")
                self.ends += [client, server]
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self.pump, args=(source, target), daemon=True).start()

    def pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self.listener.close()
        self.ends = []


@pytest.fixture
def relayed(machine, tmp_path):
    """The machine as seen over a connection that the test can cut."""
    if machine.hypervisor.uri != "qemu:///system":
        pytest.skip("the relay stands before the system's libvirtd")
    relay = Relay(tmp_path / "libvirt")
    with Hypervisor(f"qemu+unix:///system?socket={relay.path}") as hypervisor:
        yield relay, Machine.attach(hypervisor, machine.name)
    relay.cut()


def test_after_a_restart_of_libvirtd_machines_are_still_known_and_watched(relayed):
    relay, machine = relayed
    relay.cut()
    threading.Timer(0.5, relay.open).start()
    machine.pause()  # waits for libvirtd to come back
    assert machine.state is MachineState.PAUSED
    os.kill(machine.qemu_pid, signal.SIGKILL)
    assert machine.wait_stopped_reason(10).endswith("QEMU died or was killed")


def test_a_machine_that_ends_while_libvirtd_is_away_is_noticed_when_it_comes_back(relayed, machine):
    relay, seen = relayed
    relay.cut()
    machine.stop()
    assert seen.wait_stopped_reason(0.3) == ""
    relay.open()
    assert seen.wait_stopped_reason(20).endswith("it ended while libvirt could not be reached")


def _until_gone(path: Path, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while path.exists():
        assert time.monotonic() < deadline, f"{path} is still there"
        time.sleep(0.02)


def test_an_owner_in_the_metadata_is_this_process(machine):
    assert machine.tags.owner == Owner.current()
