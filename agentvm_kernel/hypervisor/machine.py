"""One machine: a libvirt domain of ours with its files, and the states it may go through.

Machines are transient domains (virDomainCreateXML): when QEMU ends, libvirt forgets them and nothing stays defined. The calls block;
asyncio code runs them in threads. The kernel process imports this module.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import libvirt

from agentvm_kernel.errors import IllegalTransition, LibvirtError, MachineLost, MachineTimeout, UnknownMachineError
from agentvm_kernel.hypervisor import console
from agentvm_kernel.hypervisor.connection import RESYNC, Hypervisor
from agentvm_kernel.hypervisor.files import MachineFiles, read_untrusted, write_private
from agentvm_kernel.hypervisor.states import STOPPED_REASONS, TRANSITIONS, Hardware, MachineState
from agentvm_kernel.hypervisor.tags import NAMESPACE, PREFIX, Tags
from agentvm_kernel.log import get_logger
from agentvm_kernel.transport.address import Address, UnixAddress, VsockAddress

log = get_logger(__name__)

GUEST_PORT = 5005
"""AF_VSOCK port on which the guest's runtime listens."""
EVENT_TIMEOUT_S = 10.0
"""How long libvirt's event may come after the call that caused it."""
QEMU_OVERHEAD_MIB = 1280
"""Memory that QEMU may use beyond the guest's before the cgroup limit strikes: translated code under emulation, caches, buffers."""


class Machine:
    """A machine of ours. Made by `boot.boot_machine`, by a thaw or by `Machine.attach`.

    Attributes:
        name: of the domain.
        uuid: of the domain.
        files: where its files are.
        hardware: what it is made of.
        tags: its metadata, as last written.
        overlay: its current disk layer.
        memory_of: id of the snapshot whose memory file it maps; empty after a cold boot.
        limits_due: it gets its limits as soon as it runs (see `set_limits`).
    """

    def __init__(
        self, hypervisor: Hypervisor, files: MachineFiles, *, uuid: str, hardware: Hardware, tags: Tags, secret: bytes
    ) -> None:
        self.hypervisor = hypervisor
        self.files = files
        self.name = files.name
        self.uuid = uuid
        self.hardware = hardware
        self.tags = tags
        self.overlay = files.overlay
        self.memory_of = tags.template
        self.limits_due = False
        self._secret = secret
        self._cid: int | None = None
        self._state = MachineState.DEFINED
        self._reason = ""
        self._changed = threading.Condition()
        self._start_paused = False
        self._stopped_callbacks: list[Callable[[str], None]] = []
        self._domain: tuple[Any, Any] = (None, None)
        hypervisor.listen(uuid, self._on_lifecycle)

    @classmethod
    def attach(cls, hypervisor: Hypervisor, name: str) -> "Machine":
        """Return the running machine of this name, which another process may have started.

        Raises:
            UnknownMachineError: there is none, or its files are not here.
        """
        files = MachineFiles.of(name)
        record = files.read_record()
        if record is None:
            raise UnknownMachineError(f"There is no machine {name!r} here.", hint="`agentvm list` shows all.")
        domain = hypervisor.domain(name)
        with hypervisor.errors(f"reading the metadata of machine {name}"):
            tags = Tags.from_xml(domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, NAMESPACE))
        machine = cls(
            hypervisor,
            files,
            uuid=record["uuid"],
            hardware=Hardware(**record["hardware"]),
            tags=tags,
            secret=files.secret.read_bytes(),
        )
        machine.overlay = files.folder / record["overlay"]
        machine.memory_of = record.get("memory", tags.template)
        machine._resync()
        return machine

    def __repr__(self) -> str:
        return f"Machine({self.name!r}, {self._state.value})"

    @property
    def state(self) -> MachineState:
        """The state as of libvirt's last event."""
        return self._state

    @property
    def description(self) -> str:
        """One line for people."""
        runs = "KVM" if self.hardware.accelerator == "kvm" else "software emulation"
        return (
            f"{self.name} ({self.hardware.profile}: {self.hardware.vcpus} vCPU, {self.hardware.memory_mib} MiB, {runs})"
        )

    @property
    def address(self) -> Address:
        """Where its runtime can be reached."""
        if not self.hardware.vsock:
            return UnixAddress(self.files.guest_socket)
        if self._cid is None:
            import xml.etree.ElementTree as ElementTree

            with self.hypervisor.errors(f"asking for the vsock CID of machine {self.name}"):
                domain = ElementTree.fromstring(self.domain.XMLDesc(0))  # noqa: S314 (libvirt's own words)
            cid = domain.find("./devices/vsock/cid")
            if cid is None or "address" not in cid.attrib:
                raise LibvirtError(f"libvirt gave machine {self.name} no vsock CID.")
            self._cid = int(cid.attrib["address"])
        return VsockAddress(self._cid, GUEST_PORT)

    @property
    def secret(self) -> bytes:
        """What both ends of the connection prove that they know; setting it also stores it for processes that attach later."""
        return self._secret

    @secret.setter
    def secret(self, value: bytes) -> None:
        write_private(self.files.secret, value)
        self._secret = value

    @property
    def domain(self) -> Any:
        """The `libvirt.virDomain`, valid for the current connection.

        Raises:
            MachineLost: libvirt does not know it any more.
        """
        connection = self.hypervisor.connection()
        if self._domain[0] is not connection:
            try:
                with self.hypervisor.errors(f"looking up machine {self.name}"):
                    self._domain = connection, connection.lookupByUUIDString(self.uuid)
            except UnknownMachineError as error:
                raise MachineLost(
                    f"Machine {self.name} is gone: {self._reason or 'libvirt does not know it any more'}."
                ) from error
        return self._domain[1]

    @property
    def qemu_pid(self) -> int:
        """Process id of its QEMU.

        Raises:
            MachineLost: it has none.
        """
        try:
            return int(read_untrusted(self.files.pid_file, 32))
        except (OSError, ValueError) as error:
            raise MachineLost(f"Machine {self.name} has no QEMU process.") from error

    def cpu_seconds(self) -> float:
        """Return the CPU time that its QEMU has used, for guest and emulation together (proc(5), stat fields 14 and 15).

        Raises:
            MachineLost: it has ended.
        """
        try:
            text = Path(f"/proc/{self.qemu_pid}/stat").read_text()
        except OSError as error:
            raise MachineLost(f"Machine {self.name} has no QEMU process.") from error
        fields = text[text.rindex(")") + 2 :].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def start(self, xml: str, *, paused: bool = False) -> None:
        """Create the domain and return when it runs (or is paused).

        Args:
            xml: its domain XML.
            paused: leave it paused before its first instruction.

        Raises:
            IllegalTransition: it was started before.
            LibvirtError: libvirt or QEMU refused.
        """
        flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0
        self.start_by(lambda connection: connection.createXML(xml, flags), paused=paused)

    def start_by(self, create: Callable[[Any], Any], *, paused: bool) -> None:
        """Create the domain as `create` does, given a `libvirt.virConnect`, and return when it runs (or is paused); see `start`."""
        self._require("started", MachineState.DEFINED)
        self._start_paused = paused
        self._move(MachineState.STARTING)
        connection = self.hypervisor.connection()
        try:
            with self.hypervisor.errors(f"starting machine {self.name}"):
                self._domain = connection, create(connection)
        except BaseException:
            self._move(MachineState.SHUT_OFF, "it could not be started")
            raise
        self.wait_for(MachineState.PAUSED if paused else MachineState.RUNNING, EVENT_TIMEOUT_S)

    def pause(self) -> None:
        """Stop its CPUs; nothing in the guest runs until `resume`.

        Raises:
            IllegalTransition: it does not run.
        """
        self._require("paused", MachineState.RUNNING)
        with self.hypervisor.errors(f"pausing machine {self.name}"):
            self.domain.suspend()
        self.wait_for(MachineState.PAUSED, EVENT_TIMEOUT_S)

    def resume(self) -> None:
        """Let it run on.

        Raises:
            IllegalTransition: it is not paused.
        """
        self._require("resumed", MachineState.PAUSED)
        with self.hypervisor.errors(f"resuming machine {self.name}"):
            self.domain.resume()
        self.wait_for(MachineState.RUNNING, EVENT_TIMEOUT_S)
        if self.limits_due:
            self.limits_due = False
            self.set_limits()

    def shutdown(self, timeout_s: float = 30.0) -> None:
        """Press the power button and wait until the guest has shut down by itself.

        Args:
            timeout_s: how long it may take.

        Raises:
            IllegalTransition: it does not run.
            MachineTimeout: it still runs; `destroy` does not ask.
        """
        self._require("shut down", MachineState.RUNNING)
        with self.hypervisor.errors(f"shutting down machine {self.name}"):
            self.domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
        self._move(MachineState.STOPPING)
        try:
            self.wait_for(MachineState.SHUT_OFF, timeout_s)
        except MachineTimeout as error:
            self._move(MachineState.RUNNING)
            raise MachineTimeout(
                f"Machine {self.name} did not shut down within {timeout_s:g} s.",
                hint="It can be stopped by force: `agentvm destroy`.",
            ) from error

    def stop(self) -> None:
        """Stop it by force: as if its power failed. Its files stay until `destroy`. A machine that has ended stays as it is."""
        if self._state.ended:
            return
        try:
            with self.hypervisor.errors(f"stopping machine {self.name}"):
                self.domain.destroyFlags(libvirt.VIR_DOMAIN_DESTROY_DEFAULT)
        except (MachineLost, UnknownMachineError):
            self._move(MachineState.SHUT_OFF, "it was gone already")
        except IllegalTransition:  # libvirt: "domain is not running"; its event is on the way
            pass
        if not self._state.ended:
            self.wait_for(MachineState.SHUT_OFF, EVENT_TIMEOUT_S, or_ended=True)

    def destroy(self) -> None:
        """Stop it by force and delete its files. It takes 0.2 s and more: `release` does not make anybody wait."""
        self.stop()
        self.hypervisor.unlisten(self.uuid)
        self.files.remove()

    def release(self) -> None:
        """Have it destroyed by a process of its own and return at once; this process may end meanwhile."""
        spawn_releaser(self.name, self.hypervisor.uri)

    def wait_for(self, state: MachineState, timeout_s: float, *, or_ended: bool = False) -> None:
        """Wait for libvirt's event that it has reached `state`.

        Args:
            state: what to wait for.
            timeout_s: for how long.
            or_ended: any end will do.

        Raises:
            MachineTimeout: it did not in time.
            MachineLost: it ended instead.
        """
        with self._changed:
            reached = self._changed.wait_for(lambda: self._state is state or self._state.ended, timeout_s)
            if self._state is state or (or_ended and self._state.ended):
                return
            if reached:
                raise MachineLost(f"Machine {self.name} ended: {self._reason}.")
            raise MachineTimeout(
                f"Machine {self.name} is {self._state.value} and not {state.value} after {timeout_s:g} s."
            )

    def wait_stopped_reason(self, timeout_s: float) -> str:
        """Wait until it has ended and return why, in words; empty when it still lives after `timeout_s` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._state.ended, timeout_s)
            return f"machine {self.name} ended: {self._reason}" if self._state.ended else ""

    def on_stopped(self, callback: Callable[[str], None]) -> None:
        """Call `callback(reason)` when the machine has ended, at once if it has; from libvirt's event thread, so it must not block."""
        with self._changed:
            if not self._state.ended:
                self._stopped_callbacks.append(callback)
                return
        callback(self._reason)

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a command of QEMU's monitor (see `Hypervisor.qmp`)."""
        return self.hypervisor.qmp(self.domain, command, **arguments)

    def update_tags(self, **changes: Any) -> None:
        """Change fields of its metadata, in libvirt and in machine.json.

        Args:
            changes: fields of `Tags` and their new values.
        """
        tags = replace(self.tags, **changes)
        with self.hypervisor.errors(f"writing the metadata of machine {self.name}"):
            self.domain.setMetadata(
                libvirt.VIR_DOMAIN_METADATA_ELEMENT,
                tags.to_xml(namespaced=False),
                PREFIX,
                NAMESPACE,
                libvirt.VIR_DOMAIN_AFFECT_LIVE,
            )
        self.tags = tags
        self.files.write_record(self.record())

    def set_overlay(self, overlay: Path) -> None:
        """Note that the machine writes to another disk layer now.

        Args:
            overlay: in the machine's folder.
        """
        self.overlay = overlay
        self.files.write_record(self.record())

    def set_limits(self) -> None:
        """Limit the host's CPU time and memory that QEMU may use, where libvirt has the cgroup controllers for that; else log so, once."""
        if self.hypervisor.limits_refused:
            return
        live, period_us = libvirt.VIR_DOMAIN_AFFECT_LIVE, 100_000
        cpu = {"global_period": period_us, "global_quota": self.hardware.cpu_quota_percent * period_us // 100}
        memory = {"hard_limit": (self.hardware.memory_mib + QEMU_OVERHEAD_MIB) << 10}
        domain = self.domain
        try:
            domain.setSchedulerParametersFlags(cpu, live)
            domain.setMemoryParameters(memory, live)
        except libvirt.libvirtError as error:
            if not domain.isActive():
                raise MachineLost(f"Machine {self.name} ended: {self._reason or 'QEMU is gone'}.") from error
            self.hypervisor.limits_refused = True
            log.info("no_resource_limits", uri=self.hypervisor.uri, reason=str(error))

    def record(self) -> dict[str, Any]:
        """Return what machine.json keeps."""
        return {
            "name": self.name,
            "uuid": self.uuid,
            "uri": self.hypervisor.uri,
            "owner": asdict(self.tags.owner),
            "created": self.tags.created,
            "template": self.tags.template,
            "memory": self.memory_of,
            "overlay": self.overlay.name,
            "hardware": asdict(self.hardware),
        }

    def console_tail(self, lines: int = 20) -> str:
        """Return the last lines of its console, without control characters."""
        return console.tail(self.files.serial_log, lines)

    def _require(self, done: str, *states: MachineState) -> None:
        if self._state not in states:
            reason = f" ({self._reason})" if self._reason else ""
            raise IllegalTransition(
                f"Machine {self.name} is {self._state.value}{reason} and cannot be {done}.",
                hint=f"It has to be {' or '.join(state.value for state in states)}.",
            )

    def _move(self, state: MachineState, reason: str = "") -> None:
        """Enter `state`, unless that is impossible from here (a late event after the end)."""
        with self._changed:
            if state is self._state or state not in TRANSITIONS[self._state]:
                return
            self._state, self._reason = state, reason
            callbacks = self._stopped_callbacks if state.ended else []
            if state.ended:
                self._stopped_callbacks = []
            self._changed.notify_all()
        for callback in callbacks:
            try:
                callback(reason)
            except Exception:
                log.exception("stopped_callback_failed", machine=self.name)

    def _on_lifecycle(self, event: int, detail: int) -> None:
        if event == RESYNC:
            # Called under the connection's lock, by whoever reconnected; libvirt may be asked here.
            self._resync()
        elif event == libvirt.VIR_DOMAIN_EVENT_STARTED:
            if not self._start_paused:
                self._move(MachineState.RUNNING)
        elif event == libvirt.VIR_DOMAIN_EVENT_RESUMED:
            self._move(MachineState.RUNNING)
        elif event == libvirt.VIR_DOMAIN_EVENT_SUSPENDED:
            self._move(
                MachineState.PAUSED,
                "the host's disk is full or failed" if detail == libvirt.VIR_DOMAIN_EVENT_SUSPENDED_IOERROR else "",
            )
        elif event == libvirt.VIR_DOMAIN_EVENT_SHUTDOWN:
            self._move(MachineState.STOPPING)
        elif event == libvirt.VIR_DOMAIN_EVENT_CRASHED:
            self._move(MachineState.CRASHED, "the guest crashed")
        elif event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            self._ended(detail)

    def _ended(self, detail: int) -> None:
        reason = STOPPED_REASONS.get(detail, "it stopped")
        crashed = detail in (libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED, libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED)
        # A panic ends as a reboot, which ends as a shutdown; the console tells them apart.
        if detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN and "Kernel panic" in (tail := self.console_tail(60)):
            crashed = True
            reason = next(line for line in tail.splitlines() if "Kernel panic" in line).strip()
        self._move(MachineState.CRASHED if crashed else MachineState.SHUT_OFF, reason)

    def _resync(self) -> None:
        """Learn the state from libvirt, after events may have been missed."""
        try:
            state = self.domain.state()[0]
        except MachineLost:
            self._move(MachineState.CRASHED, "it ended while libvirt could not be reached")
            return
        except libvirt.libvirtError as error:
            log.warning("resync_failed", machine=self.name, error=str(error))
            return
        if self._state is MachineState.DEFINED:
            self._move(MachineState.STARTING)
        if state == libvirt.VIR_DOMAIN_PAUSED:
            self._move(MachineState.PAUSED)
        elif state == libvirt.VIR_DOMAIN_SHUTDOWN:
            self._move(MachineState.STOPPING)
        elif state in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED):
            self._move(MachineState.RUNNING)
        else:
            self._move(MachineState.SHUT_OFF, "it is off")


def new_name() -> str:
    """Return a name for a machine that nobody named."""
    return f"agentvm-{os.urandom(4).hex()}"


def spawn_releaser(name: str | None, uri: str) -> None:
    """Start a detached process that destroys machines and deletes their files.

    Args:
        name: of the machine; None: of all whose owner is gone.
        uri: of its libvirt.
    """
    package_home = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (package_home, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-P", "-m", "agentvm_kernel.hypervisor.reap", "--uri", uri]
    if name is not None:
        command += ["--machine", name]
    releaser = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": path},
    )
    # Nobody waits here, but a process that lives on must not collect zombies.
    threading.Thread(target=releaser.wait, name="agentvm-releaser", daemon=True).start()
