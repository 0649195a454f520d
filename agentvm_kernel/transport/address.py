"""Where a guest can be reached. Standard library only: the kernel process imports it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class VsockAddress:
    """A port that the guest listens on, over virtio-vsock.

    Attributes:
        cid: context id of the machine; 1 is this host itself (the vsock_loopback module).
        port: AF_VSOCK port, 0 to 2**32 - 2.
    """

    cid: int
    port: int

    def __str__(self) -> str:
        return f"vsock:{self.cid}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """The socket on which QEMU offers the guest's virtio-serial port (libvirt: `<channel type='unix'>`).

    Attributes:
        path: of the socket; at most 107 bytes, the kernel's limit.
    """

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


Address = VsockAddress | UnixAddress
