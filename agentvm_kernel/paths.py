"""Where agentvm keeps its files. Standard library only: the kernel process imports it.

Root with the system libvirt uses the system's folders, everybody else the XDG base directories
(https://specifications.freedesktop.org/basedir-spec/latest/). AGENTVM_CACHE_DIR, AGENTVM_STATE_DIR and AGENTVM_RUN_DIR win over both.
"""

import os
import zlib
from pathlib import Path

OWNER_CONFIG = Path("/etc/agentvm/config.toml")
"""Settings and limits of the host's owner."""


def user_config() -> Path:
    """The user's settings; the file need not exist."""
    if value := os.environ.get("AGENTVM_CONFIG"):
        return Path(value)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()) / "agentvm" / "config.toml"


def cache_dir() -> Path:
    """Things that can be rebuilt: guest images, downloads."""
    return _folder("AGENTVM_CACHE_DIR", "/var/cache/agentvm", "XDG_CACHE_HOME", "~/.cache")


def state_dir() -> Path:
    """Things that must not be lost: machines, snapshots."""
    return _folder("AGENTVM_STATE_DIR", "/var/lib/agentvm", "XDG_STATE_HOME", "~/.local/state")


def run_dir() -> Path:
    """Sockets and locks; a short path, since a Unix socket's is limited to 107 bytes.

    Another state folder gets another one of these by itself: what the machines of one know nothing of is removed from it.
    """
    of_state = os.environ.get("AGENTVM_STATE_DIR", "")
    suffix = f"-{zlib.crc32(of_state.encode()):08x}" if of_state else ""
    return _folder("AGENTVM_RUN_DIR", "/run/agentvm", "XDG_RUNTIME_DIR", "~/.local/state/agentvm-run", suffix)


def _folder(variable: str, system: str, xdg: str, fallback: str, suffix: str = "") -> Path:
    if value := os.environ.get(variable):
        path = Path(value)
    elif os.geteuid() == 0:
        path = Path(system + suffix)
    else:
        path = Path(os.environ.get(xdg) or Path(fallback).expanduser()) / f"agentvm{suffix}"
    # Root's QEMU runs as another user, which must be able to pass through to its own files.
    path.mkdir(parents=True, exist_ok=True, mode=0o711 if os.geteuid() == 0 else 0o700)
    return path
