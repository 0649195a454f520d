"""The files of one machine: a folder below the state directory, and one for its sockets below the run directory.

Standard library only: the kernel process imports this module.
"""

import json
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentvm_kernel.errors import ConfigError, HostError
from agentvm_kernel.hypervisor.tags import Owner
from agentvm_kernel.paths import run_dir, state_dir

MACHINE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
READY = "ready-"
"""Prefix of the file in the folder of a machine that waits in the pool (see `sandbox.pool`)."""
CLAIMED = "claimed"
"""What that file is renamed to by the one process that takes the machine."""
MAX_SOCKET_PATH = 107
"""Bytes in sockaddr_un.sun_path without its final zero (unix(7))."""


def machines_dir() -> Path:
    """Return the folder with one folder per machine."""
    return subfolder(state_dir() / "machines")


def sockets_dir() -> Path:
    """Return the folder with one folder of sockets per machine."""
    return subfolder(run_dir() / "m")


@dataclass(frozen=True, slots=True)
class MachineFiles:
    """Paths of one machine.

    Attributes:
        name: of the machine.
        folder: its files.
        sockets: its sockets, in a folder that only QEMU's user (and root) may enter.
    """

    name: str
    folder: Path
    sockets: Path

    @classmethod
    def of(cls, name: str) -> "MachineFiles":
        """Return the paths for a machine of this name, whether it exists or not.

        Raises:
            ConfigError: the name is not one for a machine, or the run directory's path is too long for sockets.
        """
        if not MACHINE_NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} is no name for a machine.",
                hint="Use letters, digits, '.', '_' and '-', at most 63, not beginning with a sign.",
            )
        files = cls(name, machines_dir() / name, sockets_dir() / name)
        if len(os.fsencode(files.incoming_socket)) > MAX_SOCKET_PATH:
            raise ConfigError(
                f"{files.sockets} is too long a path for sockets.",
                hint="Set AGENTVM_RUN_DIR to a short one, such as /tmp/agentvm-$USER.",
            )
        return files

    @property
    def overlay(self) -> Path:
        """The machine's own disk layer."""
        return self.folder / "overlay.qcow2"

    @property
    def initrd(self) -> Path:
        """The initial ramdisk of a cold boot; it holds the secret."""
        return self.folder / "initrd"

    @property
    def memory(self) -> Path:
        """The guest's memory while a template is being made."""
        return self.folder / "memory"

    @property
    def serial_log(self) -> Path:
        """What the guest writes to its console."""
        return self.folder / "serial.log"

    @property
    def secret(self) -> Path:
        """The current secret of the lease (mode 0600)."""
        return self.folder / "secret"

    @property
    def record(self) -> Path:
        """machine.json: what another process needs to attach to the machine or to remove it."""
        return self.folder / "machine.json"

    @property
    def guest_socket(self) -> Path:
        """QEMU's end of the virtio-serial port."""
        return self.sockets / "guest"

    @property
    def incoming_socket(self) -> Path:
        """Where a thawing QEMU takes the device state."""
        return self.sockets / "incoming"

    @property
    def outgoing_socket(self) -> Path:
        """Where a QEMU that becomes a template sends its device state."""
        return self.sockets / "outgoing"

    @property
    def pid_file(self) -> Path:
        """QEMU writes its process id here."""
        return self.sockets / "pid"

    def claim(self) -> None:
        """Take the name by making the machine's folder; nobody else can have it then.

        Raises:
            ConfigError: there is a machine of this name.
        """
        try:
            self.folder.mkdir(mode=0o711)
        except FileExistsError:
            hint = "Choose another name, or destroy it first."
            raise ConfigError(f"There is a machine {self.name!r} already.", hint=hint) from None

    def prepare(self, qemu_user: tuple[int, int], record: dict[str, Any]) -> None:
        """Make what every machine needs; `record` goes to machine.json first, so that a reaper knows whose the folder is."""
        self.write_record(record)
        self.sockets.mkdir(mode=0o700, exist_ok=True)
        give(self.sockets, qemu_user)
        self.serial_log.touch(mode=0o600)
        give(self.serial_log, qemu_user)

    def write_record(self, record: dict[str, Any]) -> None:
        """Replace machine.json in one step."""
        write_atomically(self.record, json.dumps(record, indent=1).encode())

    def read_record(self) -> dict[str, Any] | None:
        """Return what machine.json holds, None where it is missing or unreadable."""
        try:
            record = json.loads(self.record.read_bytes())
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) else None

    def owner(self) -> Owner | None:
        """Return the process that machine.json names."""
        record = self.read_record()
        try:
            return Owner(int(record["owner"]["pid"]), int(record["owner"]["start"])) if record else None
        except (KeyError, TypeError, ValueError):
            return None

    def remove(self) -> None:
        """Delete both folders; what is gone already is no error."""
        for folder in (self.sockets, self.folder):
            try:
                shutil.rmtree(folder)
            except FileNotFoundError:
                continue


def give(path: Path, user: tuple[int, int]) -> None:
    """Make `path` belong to this user and group, where that is not ourselves."""
    if user[0] != os.geteuid():
        os.chown(path, *user)


def write_private(path: Path, data: bytes, *, user: tuple[int, int] | None = None, mode: int = 0o600) -> None:
    """Write a new file that nobody else may read, not even for a moment.

    Args:
        path: of the file; replaced where it exists.
        data: its content.
        user: who it shall belong to; None is ourselves.
        mode: its mode.
    """
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as file:
        file.write(data)
    if user is not None:
        give(path, user)


def read_untrusted(path: Path, limit: int) -> bytes:
    """Return what QEMU wrote to a file of its own, which it might have replaced by a link to one of ours.

    Args:
        path: of the file.
        limit: most bytes that it may have.

    Raises:
        HostError: it is not a plain file, or is too long.
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_size > limit:
            raise HostError(f"{path} is not what QEMU should have written.")
        return file.read(limit)


def write_atomically(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace a file in one step; a reader sees the old or the new content."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    write_private(partial, data, mode=mode)
    partial.replace(path)


def subfolder(path: Path) -> Path:
    """Return `path`, made if need be, so that QEMU's user may pass through under root and nobody else may otherwise."""
    path.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
    return path
