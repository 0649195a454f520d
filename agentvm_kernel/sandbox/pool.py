"""The pool: machines that were thawed, warmed up and paused before anybody needs them.

A machine is ready when its folder holds the file `ready-KEY`; KEY says what it is (image, profile, runtime). Claiming it is
renaming that file, which only one process can do, so no two ever get the same machine and nobody waits for a lock. libvirt's
metadata stay the truth about what a machine is used as; the reaper removes machines that were claimed by a process that died
before it had told libvirt.

`keeper.py` fills the pool. This module is light: the kernel process imports it.
"""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from agentvm_kernel import paths
from agentvm_kernel.errors import ConfigError
from agentvm_kernel.hypervisor import accelerator
from agentvm_kernel.hypervisor.files import CLAIMED, READY, machines_dir, write_atomically
from agentvm_kernel.image.runtime import runtime_digest
from agentvm_kernel.image.store import Image
from agentvm_kernel.transport.host import vsock_available

PACKAGE_HOME = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class PoolConfig:
    """What the pool should be; kept in pool.json of the state folder.

    Attributes:
        minimum: machines kept ready.
        maximum: most machines at once, ready or leased; 0 is no limit.
        ttl_s: seconds after which a ready machine is replaced.
        image: name or digest of their guest image.
        profile: their resource profile.
        uri: libvirt URI, None for the default.
    """

    minimum: int = 0
    maximum: int = 0
    ttl_s: float = 3600.0
    image: str = "default"
    profile: str = "standard"
    uri: str | None = None


@dataclass(frozen=True)
class PoolStatus:
    """What the pool is.

    Attributes:
        config: what it should be.
        ready: names of the machines that can be claimed.
        machines: how many machines there are, whatever for.
        keeper: process id of the keeper, None when there is none.
        error: why the keeper cannot fill it, empty when it can.
    """

    config: PoolConfig
    ready: tuple[str, ...]
    machines: int
    keeper: int | None
    error: str


def load_config() -> PoolConfig:
    """Return what the pool should be; without a file there is no pool.

    Raises:
        ConfigError: the file is damaged.
    """
    path = paths.state_dir() / "pool.json"
    try:
        config = PoolConfig(**json.loads(path.read_bytes()))
        numbers = (config.minimum, config.maximum, config.ttl_s)
        if not all(isinstance(number, int | float) and number >= 0 for number in numbers):
            raise ValueError("a number is missing or negative")
        return config
    except FileNotFoundError:
        return PoolConfig()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {error}.", hint="Write it anew with: agentvm pool resize") from error


def configure(**changes: Any) -> PoolConfig:
    """Change what the pool should be, within the limits of the host's owner; the keeper sees it within a second.

    Args:
        changes: fields of PoolConfig.

    Raises:
        ConfigError: a value is not possible or not allowed here.
    """
    from agentvm_kernel.config import load_config as load_settings

    try:
        before = load_config()
    except ConfigError:
        before = PoolConfig()  # this is how a damaged file is mended
    config = replace(before, **changes)
    settings = load_settings()
    settings.check_profile(config.profile)
    limit = settings.limits.max_pool
    if config.minimum < 0 or config.maximum < 0 or config.ttl_s <= 0:
        raise ConfigError("Pool sizes cannot be negative, and machines must live for a while.")
    if config.minimum > limit:
        raise ConfigError(f"A pool of {config.minimum} is more than this host allows.", hint=f"Choose {limit} at most.")
    if 0 < config.maximum < config.minimum:
        raise ConfigError(f"The pool cannot hold {config.minimum} ready machines and {config.maximum} at most.")
    write_atomically(paths.state_dir() / "pool.json", json.dumps(asdict(config), indent=1).encode())
    return config


def key(image: Image, profile: str, uri: str) -> str:
    """Return what tells apart machines that cannot stand in for one another, as 16 hexadecimal digits."""
    parts = (uri, image.digest, profile, runtime_digest(), accelerator.choose().kind, vsock_available())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def ready_machines(of: str = "*") -> list[Path]:
    """Return the `ready-KEY` files, oldest first."""
    return sorted(machines_dir().glob(f"*/{READY}{of}"), key=_age_key)


def claim(of: str) -> str | None:
    """Take a ready machine out of the pool and return its name; None when there is none."""
    for marker in ready_machines(of):
        if claim_marker(marker):
            return marker.parent.name
    return None


def claim_marker(marker: Path) -> bool:
    """Take one certain machine out of the pool; False when somebody else was quicker."""
    try:
        marker.rename(marker.with_name(CLAIMED))
    except FileNotFoundError:
        return False
    return True


def offer(folder: Path, of: str) -> None:
    """Put a prepared and paused machine into the pool."""
    (folder / CLAIMED).unlink(missing_ok=True)
    (folder / f"{READY}{of}").touch(mode=0o600)


def has_room() -> bool:
    """Return whether one more machine may be made."""
    maximum = load_config().maximum
    return maximum == 0 or count_machines() < maximum


def count_machines() -> int:
    """Return how many machines this user has."""
    return sum(1 for folder in machines_dir().iterdir() if folder.is_dir())


def status() -> PoolStatus:
    """Return what the pool should be and what it is. Does not ask libvirt."""
    note = keeper_note()
    pid = note.get("pid")
    alive = isinstance(pid, int) and keeper_runs()
    return PoolStatus(
        config=load_config(),
        ready=tuple(marker.parent.name for marker in ready_machines()),
        machines=count_machines(),
        keeper=pid if alive else None,
        error=str(note.get("error", "")),
    )


def as_text(of: PoolStatus) -> str:
    """Return a status in lines for people."""
    config = of.config
    if not config.minimum and not of.ready:
        return "There is no pool. To keep two machines ready: agentvm pool resize 2"
    limit = f", {config.maximum} machines at most" if config.maximum else ""
    lines = [
        f"{len(of.ready)} of {config.minimum} machines are ready ({config.profile}, image {config.image}{limit}).",
        f"{of.machines} machines exist. "
        + (f"Process {of.keeper} is the keeper." if of.keeper else "There is no keeper."),
    ]
    if of.error:
        lines.append(f"It cannot be filled: {of.error}")
    return "\n".join(lines)


# ---- the keeper, as others see it


def keeper_lock() -> Path:
    """The file that the keeper holds a lock on for as long as it lives."""
    return paths.state_dir() / "keeper.lock"


def keeper_note() -> dict[str, Any]:
    """What the keeper says about itself: pid, error."""
    try:
        note = json.loads((paths.state_dir() / "keeper.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def keeper_runs() -> bool:
    """Return whether some process is the keeper."""
    with keeper_lock().open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def ensure_keeper() -> None:
    """Start a keeper of its own process where there is a pool and nobody keeps it. Costs next to nothing otherwise."""
    if load_config().minimum > 0 and not keeper_runs():
        spawn(["-m", "agentvm_kernel.sandbox.keeper"])


def spawn(arguments: list[str]) -> None:
    """Start a detached Python process that outlives this one."""
    path = os.pathsep.join(filter(None, (str(PACKAGE_HOME), os.environ.get("PYTHONPATH"))))
    subprocess.Popen(
        [sys.executable, "-P", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": path},
    )


def _age_key(marker: Path) -> tuple[float, str]:
    try:
        return marker.stat().st_mtime, marker.parent.name
    except FileNotFoundError:
        return 0.0, marker.parent.name


def expired(ttl_s: float, now: float) -> Iterator[Path]:
    """Yield the ready machines that have waited too long."""
    for marker in ready_machines():
        waited_since, _ = _age_key(marker)
        if now - waited_since > ttl_s:
            yield marker
