"""The connection to libvirt: URI rules, events, reconnection, QEMU's monitor, typed errors.

Everything here blocks; asyncio code calls it in threads (`asyncio.to_thread`). One thread per process runs libvirt's event loop: callbacks
run there and must neither block nor call libvirt. The kernel process imports this module, so it imports only the standard library and
libvirt.
"""

import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import libvirt
import libvirt_qemu

from agentvm_kernel.errors import (
    HostError,
    IllegalTransition,
    LibvirtError,
    MachineTimeout,
    MonitorError,
    PermissionDeniedError,
    QemuMissingError,
    UnknownMachineError,
    UnreachableError,
)
from agentvm_kernel.log import get_logger

log = get_logger(__name__)

VARIABLE = "AGENTVM_URI"
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_COUNT = 3
RECONNECT_S = 10.0
"""How long a call waits for a libvirtd that is being restarted."""
BACKGROUND_RECONNECT_S = 600.0

LifecycleListener = Callable[[int, int], None]
"""Called with libvirt's lifecycle event and its detail; (-1, 0) means: we were away, look for yourself."""
RESYNC = -1


def default_uri() -> str:
    """Return the URI of AGENTVM_URI, else the system's libvirt for root and the user's own for everybody else."""
    return os.environ.get(VARIABLE) or ("qemu:///system" if os.geteuid() == 0 else "qemu:///session")


class Hypervisor:
    """A connection to one libvirt, opened on first use and reopened when libvirtd was restarted.

    Use it as a context manager, or call `close`. Safe to use from several threads.

    Args:
        uri: libvirt URI; None takes `default_uri()`.
    """

    def __init__(self, uri: str | None = None) -> None:
        self.uri = uri or default_uri()
        self._lock = threading.RLock()
        self._connection: Any = None
        self._closed = False
        self._listeners: dict[str, LifecycleListener] = {}
        self._reconnecting = False
        self._dac_user: tuple[int, int] | None = None
        self._asked_dac_user = False
        self.limits_refused = False
        """Set once libvirt has said that it cannot limit CPU or memory here (no cgroup controllers)."""
        self.capabilities_refused = False
        """Set once libvirt has refused that a domain leaves out one of QEMU's capabilities."""
        self.memory_is_closed = False
        """Set once the host's kernel has refused access to a QEMU's memory (yama): snapshots need memory files of their own then."""

    def __enter__(self) -> "Hypervisor":
        try:
            self.connection()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Hypervisor({self.uri!r})"

    def connection(self) -> Any:
        """Return a live `libvirt.virConnect`.

        Raises:
            UnreachableError: libvirt does not answer, or (after a lost connection) does not come back within RECONNECT_S.
            PermissionDeniedError: it answers and refuses this user.
        """
        with self._lock:
            if self._closed:
                raise UnreachableError(f"The connection to {self.uri} was closed.")
            if self._connection is not None and self._connection.isAlive():
                return self._connection
            deadline = time.monotonic() + (RECONNECT_S if self._connection is not None else 0)
            pause = 0.05
            while True:
                try:
                    self._open()
                    break
                except UnreachableError:
                    if time.monotonic() + pause > deadline:
                        raise
                    time.sleep(pause)
                    pause = min(pause * 2, 1.0)
            return self._connection

    def close(self) -> None:
        """Close the connection; machines are left alone."""
        with self._lock:
            self._closed = True
            connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.unregisterCloseCallback()
                connection.close()
            except libvirt.libvirtError as error:  # a daemon that is gone needs no goodbye
                log.debug("libvirt_close_failed", uri=self.uri, error=str(error))

    def domain(self, name: str) -> Any:
        """Return the `libvirt.virDomain` of this name.

        Raises:
            UnknownMachineError: there is none.
        """
        with self.errors(f"looking up machine {name}"):
            return self.connection().lookupByName(name)

    def domains(self) -> list[Any]:
        """Return all domains that libvirt knows, running or not."""
        with self.errors("listing machines"):
            return list(self.connection().listAllDomains(0))

    @property
    def qemu_user(self) -> tuple[int, int]:
        """User and group id that QEMU runs as, whom a machine's files must belong to.

        Raises:
            HostError: QEMU runs as another user and we are not root, so no file could be given to it.
        """
        user = self.dac_user or (os.geteuid(), os.getegid())
        if user[0] != os.geteuid() and os.geteuid() != 0:
            raise HostError(
                f"Under {self.uri} QEMU runs as user {user[0]}, which can be given no files of yours.",
                hint="Use qemu:///session, or run as root.",
            )
        return user

    @property
    def dac_user(self) -> tuple[int, int] | None:
        """User and group that libvirt lets QEMU run as; None where it changes neither (qemu:///session)."""
        if not self._asked_dac_user:
            with self.errors("asking for the capabilities"):
                self._dac_user = _parse_qemu_user(self.connection().getCapabilities())
            self._asked_dac_user = True
        return self._dac_user

    def cpu_model(self, accelerator: str) -> str:
        """Return what tells the CPUs apart that guests see, for snapshots: a guest cannot be moved to another.

        Args:
            accelerator: "kvm" (guests see the host's CPU) or "tcg" (all that QEMU can emulate, whatever the host is).
        """
        if accelerator != "kvm":
            return "maximum"
        import hashlib
        import xml.etree.ElementTree as ElementTree

        with self.errors("asking for the host's CPU"):
            capabilities = ElementTree.fromstring(self.connection().getCapabilities())  # noqa: S314 (libvirt's own words)
        cpu = capabilities.find("./host/cpu")
        if cpu is None:
            raise LibvirtError(f"libvirt at {self.uri} does not say what CPU this host has.")
        features = sorted(feature.get("name", "") for feature in cpu.iterfind("feature"))
        digest = hashlib.sha256(" ".join(features).encode()).hexdigest()[:12]
        return f"{cpu.findtext('vendor')} {cpu.findtext('model')} {digest}"

    @property
    def qemu_version(self) -> tuple[int, int, int]:
        """Version of the QEMU that libvirt starts.

        Raises:
            QemuMissingError: it finds none.
        """
        with self.errors("asking for QEMU's version"):
            number = int(self.connection().getVersion())
        if not number:
            raise QemuMissingError(
                f"libvirt at {self.uri} finds no QEMU.", hint="Install qemu-system-x86 (or that of your CPU)."
            )
        return number // 1_000_000, number // 1000 % 1000, number % 1000

    def qmp(self, domain: Any, command: str, **arguments: Any) -> Any:
        """Run one command of the QEMU Machine Protocol and return its answer.

        https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html

        Args:
            domain: the machine's `virDomain`.
            command: its name, such as "query-status".
            arguments: its arguments; a trailing underscore is dropped and the others become hyphens.

        Raises:
            MonitorError: QEMU refused it.
        """
        request = {
            "execute": command,
            "arguments": {key.rstrip("_").replace("_", "-"): value for key, value in arguments.items()},
        }
        with self.errors(f"QEMU's monitor command {command}"):
            reply = json.loads(libvirt_qemu.qemuMonitorCommand(domain, json.dumps(request), 0))
        if "error" in reply:
            raise MonitorError(
                reply["error"].get("class", ""), f"{command} failed: {reply['error'].get('desc', reply['error'])}."
            )
        return reply["return"]

    @contextmanager
    def qmp_events(self, domain: Any, event: str) -> "Iterator[EventQueue]":
        """Collect QEMU's events of one kind, such as "MIGRATION", while the context is open."""
        events = EventQueue(event)
        connection = self.connection()

        def collect(
            _connection: Any, _domain: Any, _event: str, _seconds: int, _micros: int, details: str | None, _opaque: Any
        ) -> None:
            events.put(json.loads(details) if details else {})

        with self.errors(f"listening for {event}"):
            handle = libvirt_qemu.qemuMonitorEventRegister(connection, domain, event, collect, None, 0)
        try:
            yield events
        finally:
            try:
                libvirt_qemu.qemuMonitorEventDeregister(connection, handle)
            except libvirt.libvirtError as error:  # the connection broke: nothing is registered any more
                log.debug("event_deregister_failed", error=str(error))

    def listen(self, uuid: str, listener: LifecycleListener) -> None:
        """Call `listener` at each lifecycle event of the domain with this UUID, from the event thread."""
        with self._lock:
            self._listeners[uuid] = listener

    def unlisten(self, uuid: str) -> None:
        """Stop what `listen` began."""
        with self._lock:
            self._listeners.pop(uuid, None)

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Turn libvirt's errors into ours.

        Args:
            what: what is being done, for the message.
        """
        try:
            yield
        except libvirt.libvirtError as error:
            raise translate(error, what, self.uri) from error

    def _open(self) -> None:
        _start_event_loop()
        with self.errors("connecting"):
            connection = libvirt.open(self.uri)
            if (kind := connection.getType()) != "QEMU":
                raise HostError(
                    f"libvirt at {self.uri} manages {kind} and not QEMU.", hint=f"{VARIABLE} names another URI."
                )
            connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle, None)
            try:
                connection.registerCloseCallback(self._on_close, None)
                connection.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
            except libvirt.libvirtError as error:
                # The embedded driver has no daemon that could go away.
                if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
                    raise
        again, self._connection = self._connection is not None, connection
        if again:
            log.info("libvirt_reconnected", uri=self.uri)
            for listener in list(self._listeners.values()):
                listener(RESYNC, 0)

    def _on_lifecycle(self, _connection: Any, domain: Any, event: int, detail: int, _opaque: Any) -> None:
        listener = self._listeners.get(domain.UUIDString())
        if listener is not None:
            listener(event, detail)

    def _on_close(self, _connection: Any, reason: int, _opaque: Any) -> None:
        log.warning("libvirt_connection_lost", uri=self.uri, reason=reason)
        if self._listeners and not self._closed and not self._reconnecting:
            self._reconnecting = True
            threading.Thread(target=self._reconnect, name="agentvm-reconnect", daemon=True).start()

    def _reconnect(self) -> None:
        """Come back as soon as libvirtd does, so that nobody misses that a machine has ended meanwhile."""
        deadline = time.monotonic() + BACKGROUND_RECONNECT_S
        try:
            while not self._closed and self._listeners and time.monotonic() < deadline:
                try:
                    self.connection()
                    return
                except LibvirtError as error:
                    log.debug("libvirt_reconnect_failed", uri=self.uri, error=str(error))
        finally:
            self._reconnecting = False


class EventQueue:
    """Events of QEMU's monitor, in order.

    Args:
        name: the kind of event, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def put(self, details: dict[str, Any]) -> None:
        """Add one; called by libvirt's event thread."""
        self._queue.put(details)

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool], timeout_s: float) -> dict[str, Any]:
        """Return the first event that `wanted` accepts; earlier ones are dropped.

        Raises:
            MachineTimeout: none came within `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                details = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise MachineTimeout(f"QEMU sent no {self._name} event within {timeout_s:g} s.") from None
            if wanted(details):
                return details


_AUTHENTICATION = {libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_ERR_AUTH_CANCELLED, libvirt.VIR_ERR_AUTH_UNAVAILABLE}
_MAYBE_DENIED = {libvirt.VIR_ERR_OPERATION_DENIED, libvirt.VIR_ERR_ACCESS_DENIED, libvirt.VIR_ERR_SYSTEM_ERROR}
_DENIED = re.compile(r"permission denied|access denied|operation .*forbidden", re.IGNORECASE)
_NO_QEMU = re.compile(
    r"could not find capabilities for|find .*emulator|no emulator|cannot check qemu binary|qemu binary .*not found",
    re.IGNORECASE,
)
_UNREACHABLE = {
    libvirt.VIR_ERR_NO_CONNECT,
    libvirt.VIR_ERR_INVALID_CONN,
    libvirt.VIR_ERR_RPC,
    libvirt.VIR_ERR_NO_SERVER,
}
# A lost daemon shows as a plain system or internal error; only the words tell.
_BROKEN = re.compile(
    r"failed to connect socket|client socket is closed|cannot recv data|end of file while reading|cannot write data",
    re.IGNORECASE,
)


def translate(error: Any, what: str, uri: str) -> Exception:
    """Return the typed error for a `libvirt.libvirtError`.

    Args:
        error: libvirt's.
        what: what was being done.
        uri: where.
    """
    code, text = error.get_error_code(), str(error)
    if code == libvirt.VIR_ERR_NO_DOMAIN:
        return UnknownMachineError(
            f"{_capital(what)} failed: {uri} knows no such machine.", hint="`agentvm list` shows all."
        )
    if code in _AUTHENTICATION or (code in _MAYBE_DENIED and _DENIED.search(text)):
        return PermissionDeniedError(
            f"{_capital(what)} at {uri} was denied: {text}.",
            hint=f"Join the group libvirt, or use a libvirt of your own: {VARIABLE}=qemu:///session.",
        )
    if _NO_QEMU.search(text):
        return QemuMissingError(f"libvirt at {uri} finds no QEMU for this: {text}.", hint="Install qemu-system-x86.")
    if code in _UNREACHABLE or error.get_error_domain() == libvirt.VIR_FROM_RPC or _BROKEN.search(text):
        return UnreachableError(
            f"libvirt at {uri} cannot be reached ({what}): {text}.",
            hint=f"Is libvirtd running? {VARIABLE} names another URI.",
        )
    if code == libvirt.VIR_ERR_OPERATION_INVALID:
        return IllegalTransition(f"{_capital(what)} failed: {text}.")
    return LibvirtError(f"{_capital(what)} failed: {text}.")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _parse_qemu_user(capabilities: str) -> tuple[int, int] | None:
    """Read `+64055:+64055` off <secmodel><model>dac</model><baselabel>; None where libvirt changes no user (session)."""
    import xml.etree.ElementTree as ElementTree

    for model in ElementTree.fromstring(capabilities).iterfind("./host/secmodel"):  # noqa: S314 (libvirt's own words)
        if model.findtext("model") == "dac":
            match = re.fullmatch(r"\+?(\d+):\+?(\d+)", model.findtext("baselabel") or "")
            if match:
                return int(match[1]), int(match[2])
    return None


_loop_lock = threading.Lock()
_loop_running = False


def _start_event_loop() -> None:
    """Start the process's one libvirt event loop; it must be registered before the first connection is opened."""
    global _loop_running
    with _loop_lock:
        if _loop_running:
            return
        # Errors come as exceptions; libvirt would print them on standard error as well.
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run_event_loop, name="agentvm-libvirt", daemon=True).start()
        _loop_running = True


def _run_event_loop() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()
