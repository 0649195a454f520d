"""What this host offers for reaching guests. Standard library only: the kernel process imports it."""

import os
import socket

VHOST_VSOCK = "/dev/vhost-vsock"
"""The device through which QEMU gives a guest its vsock."""


def vsock_problem(device: str = VHOST_VSOCK) -> str:
    """Return why this process cannot use virtio-vsock, for `agentvm doctor`; empty when it can.

    Args:
        device: path of the vhost device.
    """
    if not hasattr(socket, "AF_VSOCK"):
        return "this Python has no socket.AF_VSOCK"
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except FileNotFoundError:
        return f"{device} does not exist (is the module vhost_vsock loaded?)"
    except OSError as error:
        return f"{error.filename or 'an AF_VSOCK socket'} cannot be opened: {error.strerror}"
    return ""


def vsock_available(device: str = VHOST_VSOCK) -> bool:
    """Return whether machines can have a vsock: the vhost device really opens, and AF_VSOCK sockets exist."""
    return not vsock_problem(device)


def vsock_loopback_available() -> bool:
    """Return whether AF_VSOCK works within this host (module vsock_loopback), as tests inside a guest use it."""
    if not hasattr(socket, "AF_VSOCK"):
        return False
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
            listener.bind((1, socket.VMADDR_PORT_ANY))  # 1 is VMADDR_CID_LOCAL
            listener.listen()
            with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client:
                client.settimeout(1)
                client.connect((1, listener.getsockname()[1]))
    except OSError:
        return False
    return True
