"""Every error that agentvm raises on purpose, in one hierarchy. Standard library only: the kernel process imports it."""


class AgentVMError(Exception):
    """Base of all errors.

    Args:
        message: what failed, on which machine or file.
        hint: what the user can do about it; shown after the message.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class ConfigError(AgentVMError):
    """A setting, name or profile is not valid."""


class HostError(AgentVMError):
    """The host lacks something: QEMU, libvirt, a permission, disk space."""


class LibvirtError(HostError):
    """libvirt refused a call or cannot be reached."""


class UnreachableError(LibvirtError):
    """No libvirt answers at the URI, or the connection to it broke."""


class PermissionDeniedError(LibvirtError):
    """libvirt or QEMU may not do something that it needs to do."""


class QemuMissingError(HostError):
    """libvirt finds no QEMU for this kind of machine."""


class MonitorError(LibvirtError):
    """QEMU refused a monitor (QMP) command.

    Args:
        error_class: QMP's class of the error, such as "GenericError".
        message: QEMU's text.
    """

    def __init__(self, error_class: str, message: str) -> None:
        super().__init__(message)
        self.error_class = error_class


class ImageError(AgentVMError):
    """A guest image is missing, damaged or could not be built."""


class MachineError(AgentVMError):
    """Something about one machine failed."""


class BootError(MachineError):
    """The guest did not come up; the message ends with the tail of its serial log."""


class IllegalTransition(MachineError):  # noqa: N818 (named after what happened)
    """The machine is in a state in which this cannot be done."""


class MachineLost(MachineError):  # noqa: N818
    """The machine is gone: QEMU died, was killed or crashed."""


class MachineTimeout(MachineError):  # noqa: N818
    """The machine did not answer or change its state in time."""


class UnknownMachineError(MachineError):
    """There is no machine of this name."""


class SnapshotError(AgentVMError):
    """A snapshot cannot be made, read, thawed or deleted."""


class SnapshotMismatchError(SnapshotError):
    """A snapshot was made by another QEMU, CPU or profile, or its files changed since; the message lists what differs."""


class TransportError(AgentVMError):
    """The connection between host and guest failed."""


class FrameError(TransportError):
    """The peer sent bytes that are not a valid frame or message."""


class AuthenticationError(TransportError):
    """The peer could not prove that it knows the secret of this lease."""


class ConnectionClosed(TransportError):  # noqa: N818
    """The connection ended while it was in use."""


class GuestError(AgentVMError):
    """The guest's runtime answered a JSON-RPC call with an error.

    Args:
        code: JSON-RPC 2.0 error code.
        message: the runtime's text.
        data: whatever the runtime attached.
    """

    def __init__(self, code: int, message: str, data: object = None) -> None:
        super().__init__(message)
        self.code = code
        self.data = data


class ExecutionError(AgentVMError):
    """Code that was run in a sandbox failed."""


class NotebookError(AgentVMError):
    """A notebook cannot be read, run or written."""
