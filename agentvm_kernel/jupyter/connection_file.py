"""Connection files: where a kernel listens and the key that signs its messages
(https://jupyter-client.readthedocs.io/en/stable/kernels.html#connection-files). Imports the standard library only.
"""

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from agentvm_kernel.errors import ConfigError

BACKLOG = 100
"""As many connections may wait to be accepted as with ZeroMQ."""
CHANNELS = ("shell", "iopub", "stdin", "control", "hb")


@dataclass(frozen=True)
class ConnectionInfo:
    """What a connection file says.

    Attributes:
        transport: `tcp` or `ipc`.
        ip: address to bind, or for ipc the prefix of the sockets' paths.
        shell_port, iopub_port, stdin_port, control_port, hb_port: TCP ports, or for ipc the suffixes of the paths; 0
            means that the kernel chooses.
        key: secret that signs messages.
        signature_scheme: `hmac-` and a hash.
        curve_publickey, curve_secretkey: Z85 keys of CurveZMQ, where the client wants its sockets encrypted; else
            empty.
    """

    transport: str = "tcp"
    ip: str = "127.0.0.1"
    shell_port: int = 0
    iopub_port: int = 0
    stdin_port: int = 0
    control_port: int = 0
    hb_port: int = 0
    key: str = ""
    signature_scheme: str = "hmac-sha256"
    curve_publickey: str = ""
    curve_secretkey: str = ""

    def port(self, channel: str) -> int:
        """Return the port of one of CHANNELS."""
        port: int = getattr(self, f"{channel}_port")
        return port

    def url(self, channel: str) -> str:
        """Return the ZeroMQ address of one of CHANNELS."""
        separator = ":" if self.transport == "tcp" else "-"
        return f"{self.transport}://{self.ip}{separator}{self.port(channel)}"

    def with_port(self, channel: str, port: int) -> "ConnectionInfo":
        """Return a copy with another port for one of CHANNELS."""
        changed: dict[str, Any] = {f"{channel}_port": port}
        return replace(self, **changed)

    def ports(self) -> dict[str, int]:
        """Return all ports by the names that connection files and connect_reply use."""
        return {f"{channel}_port": self.port(channel) for channel in CHANNELS}


def load(path: Path) -> ConnectionInfo:
    """Read a connection file.

    Raises:
        ConfigError: it cannot be read, or says something that a connection file must not say.
    """
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = {name: values[name] for name in ConnectionInfo.__dataclass_fields__ if values.get(name) is not None}
        info = replace(ConnectionInfo(), **known)
        if info.transport not in ("tcp", "ipc"):
            raise ValueError(f"unknown transport {info.transport!r}")
        if not all(isinstance(port, int) and 0 <= port < 65536 for port in info.ports().values()):
            raise ValueError("a port is not a number from 0 to 65535")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"The connection file {path} cannot be used: {error}.") from error
    if info.transport == "ipc" and "ip" not in values:
        # As jupyter_client does: sockets beside the connection file.
        info = replace(info, ip=f"{path.with_suffix('')}-ipc")
    return replace(info, ip="0.0.0.0") if info.ip == "*" else info  # noqa: S104 (the client asked for it)


def save(path: Path, info: ConnectionInfo) -> None:
    """Write a connection file that only its owner can read; what an existing file says beyond ours is kept."""
    values: dict[str, Any] = {}
    if path.exists():
        values = json.loads(path.read_text(encoding="utf-8"))
    values.update({name: value for name, value in asdict(info).items() if value or not name.startswith("curve_")})
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
    os.replace(temporary, path)


def new_info() -> ConnectionInfo:
    """Return information with a fresh key and no ports yet."""
    return ConnectionInfo(key=os.urandom(32).hex())


def runtime_dir() -> Path:
    """Return Jupyter's folder for connection files, as jupyter_core.paths.jupyter_runtime_dir does on Linux."""
    if folder := os.environ.get("JUPYTER_RUNTIME_DIR"):
        return Path(folder)
    if folder := os.environ.get("JUPYTER_DATA_DIR"):
        return Path(folder) / "runtime"
    data = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(data) / "jupyter" / "runtime"


def resolve(name: str) -> Path:
    """Return the path that a `-f` argument means: as given, or in Jupyter's runtime folder when it is a bare name."""
    path = Path(name).expanduser()
    if path.is_absolute() or path.exists() or path.parent != Path("."):
        return path.absolute()
    return runtime_dir() / path


def parse_arguments(arguments: Sequence[str]) -> Path | None:
    """Return the connection file that the client named, or None.

    Clients append arguments meant for ipykernel (`--HistoryManager.hist_file=…`); all but the connection file are
    ignored.
    """
    names = ("-f", "--f", "--connection-file", "--connection_file", "--IPKernelApp.connection_file")
    for number, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in names:
            if not equals:
                value = arguments[number + 1] if number + 1 < len(arguments) else ""
            return resolve(value) if value else None
        if argument.startswith("-f"):
            return resolve(argument[2:])
    return None


def listen(info: ConnectionInfo) -> dict[str, socket.socket]:
    """Listen on the TCP ports that a connection file names, by channel, before ZeroMQ is even imported; it takes the sockets over later.

    A client that finds nobody there looks again every tenth of a second, and so would find us late. Where a port is not to be had, there
    is no socket for it: ZeroMQ tries again and says why.
    """
    listening: dict[str, socket.socket] = {}
    if info.transport != "tcp":
        return listening
    for channel in CHANNELS:
        if not info.port(channel):
            continue
        one = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((info.ip, info.port(channel)))
            one.listen(BACKLOG)
        except OSError:
            one.close()
        else:
            listening[channel] = one
    return listening
