"""Removes machines that nobody owns any more: domain, folder, sockets. Nothing may leak, whoever was killed and when.

A machine is orphaned when the process named in its metadata is gone; one in the pool belongs to nobody until it is claimed. Every
keeper pass calls `reap`; a process that is done with a machine starts `python -m agentvm_kernel.hypervisor.reap --machine NAME`
detached, so that nobody waits for QEMU's end. The kernel process never imports this module.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt

from agentvm_kernel.errors import (
    AgentVMError,
    ConfigError,
    HostError,
    IllegalTransition,
    LibvirtError,
    MachineError,
    UnknownMachineError,
)
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.files import CLAIMED, READY, MachineFiles, machines_dir, read_untrusted, sockets_dir
from agentvm_kernel.hypervisor.garbage import collect
from agentvm_kernel.hypervisor.tags import NAMESPACE, Tags
from agentvm_kernel.log import get_logger
from agentvm_kernel.paths import state_dir

log = get_logger(__name__)

UNFINISHED_S = 60.0
"""A folder without machine.json may be one that is being made; after this time it is not."""
CLAIM_S = 60.0
"""Who takes a machine out of the pool has told libvirt so by then, or is dead."""


def reap(hypervisor: Hypervisor) -> list[str]:
    """Remove all orphaned machines and return their names, then delete snapshots that nobody can reach any more.

    One process at a time does it; the others return at once.

    A libvirt that cannot be reached is no error: folders of machines without a QEMU process are removed all the same.

    Args:
        hypervisor: where to look for domains.
    """
    with _lock() as ours:
        if not ours:
            return []
        reaped: set[str] = set()
        known: set[str] | None = None
        try:
            known = set()
            for domain in hypervisor.domains():
                known.add(domain.name())
                tags = read_tags(domain)
                if tags is not None and _orphaned(tags) and _remove_domain(hypervisor, domain, tags):
                    reaped.add(domain.name())
                    known.discard(domain.name())
        except HostError as error:
            log.warning("reap_without_libvirt", uri=hypervisor.uri, error=str(error))
            known = None
        reaped |= set(_reap_folders(hypervisor.uri, known))
        _reap_sockets()
        collect()
        for name in sorted(reaped):
            log.info("machine_reaped", machine=name)
        return sorted(reaped)


def _orphaned(tags: Tags) -> bool:
    if tags.state != "pooled":
        return not tags.owner.alive()
    if any(tags.folder.glob(f"{READY}*")):
        return False
    try:
        # The rename that claims a machine moves the file's change time.
        return time.time() - (tags.folder / CLAIMED).stat().st_ctime > CLAIM_S
    except FileNotFoundError:
        return not tags.owner.alive()


def remove_machine(hypervisor: Hypervisor, name: str) -> None:
    """Destroy the machine `name` and delete its files, whoever owns it. A domain of this name that is not ours is left alone.

    Raises:
        LibvirtError: libvirt cannot be reached or refuses; a later `reap` tries again.
    """
    with contextlib.suppress(UnknownMachineError):
        domain = hypervisor.domain(name)
        if read_tags(domain) is not None:
            _destroy(hypervisor, domain)
    MachineFiles.of(name).remove()


def read_tags(domain: Any) -> Tags | None:
    """Return our metadata of a `libvirt.virDomain`; None where it is not ours or is going away."""
    try:
        return Tags.from_xml(domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, NAMESPACE))
    except (libvirt.libvirtError, ValueError):
        return None


def qemu_alive(files: MachineFiles) -> bool:
    """Return whether the machine's QEMU still runs, without asking libvirt."""
    try:
        pid = int(read_untrusted(files.pid_file, 32))
        return f"guest={files.name}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _lock() -> Iterator[bool]:
    descriptor = os.open(state_dir() / "reap.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _destroy(hypervisor: Hypervisor, domain: Any) -> None:
    try:
        with hypervisor.errors("destroying an orphaned machine"):
            if domain.isPersistent():  # who thawed it died on the way (see `internal`)
                domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA)
            domain.destroyFlags(libvirt.VIR_DOMAIN_DESTROY_DEFAULT)
    except (UnknownMachineError, IllegalTransition):
        return  # it ended by itself meanwhile


def _remove_domain(hypervisor: Hypervisor, domain: Any, tags: Tags) -> bool:
    name, uuid = domain.name(), domain.UUIDString()
    try:
        _destroy(hypervisor, domain)
    except (LibvirtError, MachineError) as error:
        log.warning("reap_failed", machine=name, error=str(error))
        return False
    if tags.folder == machines_dir() / name:
        MachineFiles.of(name).remove()
    elif _record_uuid(tags.folder) == uuid:
        # Made under another AGENTVM_STATE_DIR; the record proves that the folder is this machine's.
        shutil.rmtree(tags.folder, ignore_errors=True)
    return True


def _record_uuid(folder: Path) -> str | None:
    try:
        record = json.loads((folder / "machine.json").read_bytes())
        return str(record["uuid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _reap_folders(uri: str, known: set[str] | None) -> Iterator[str]:
    """Remove folders whose machine is gone.

    Args:
        uri: of the libvirt that was asked.
        known: names of its domains; None where it did not answer.
    """
    for folder in machines_dir().iterdir():
        try:
            files = MachineFiles.of(folder.name)
        except ConfigError:
            continue
        record, owner = files.read_record(), files.owner()
        if record is None or owner is None:
            if _age(folder) < UNFINISHED_S:
                continue
        elif owner.alive():
            continue
        asked = known is not None and record is not None and record.get("uri") == uri
        if (known is not None and folder.name in known) or (not asked and qemu_alive(files)):
            continue
        files.remove()
        yield folder.name


def _reap_sockets() -> None:
    """Remove socket folders without a machine: the machine's folder is made first and removed last."""
    for folder in sockets_dir().iterdir():
        if not (machines_dir() / folder.name).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def main(argv: list[str] | None = None) -> int:
    """Reap everything, or with --machine one machine whose owner is done with it."""
    parser = argparse.ArgumentParser(prog="python -m agentvm_kernel.hypervisor.reap", description=main.__doc__)
    parser.add_argument("--uri", help="libvirt URI")
    parser.add_argument("--machine", help="name of the machine to remove")
    options = parser.parse_args(argv)
    try:
        with Hypervisor(options.uri) as hypervisor:
            if options.machine:
                remove_machine(hypervisor, options.machine)
            # The process that is done with one machine may have ended meanwhile, and have had others.
            reaped = reap(hypervisor)
            if not options.machine:
                print("\n".join(reaped))
    except AgentVMError as error:
        log.error("reap_failed", machine=options.machine, error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
