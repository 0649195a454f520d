"""`%vm`, about the notebook's machine, and `%pool`, about the machines kept ready."""

import argparse
import asyncio
import html
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentvm_kernel.errors import ConfigError
from agentvm_kernel.jupyter.cell_guard import describe
from agentvm_kernel.jupyter.magics.arguments import HostMagic, Options, UsageError
from agentvm_kernel.jupyter.magics.cell import Cell
from agentvm_kernel.jupyter.magics.notebook import Notebook

ABOUT_VM = """\
Look after the machine that this notebook's cells run in.

  %vm                      what it is and how it is (also: %vm status)
  %vm info                 its system, disks and network, as it sees them itself
  %vm logs [LINES]         the end of its console
  %vm restart              a fresh machine in its place; variables and files are gone, snapshots stay
  %vm pause                stop it until the next cell; it keeps everything and takes no CPU time
  %vm resume               let it go on
  %vm autocheckpoint on    make an automatic snapshot before every cell, for %undo (off by default)
  %vm timeout 60           interrupt cells that run longer than so many seconds (off: never)
  %vm output 10M           show so much output of a cell, and cut off the rest (off: no limit)
"""
ABOUT_POOL = """\
Keep machines ready, so that notebooks start at once.

  %pool            how many there are (also: %pool status)
  %pool 2          keep two ready
  %pool 0          keep none
"""
LOG_LINES = 20
MAX_LOG_LINES = 1000
SIZES = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}
ACTIONS = ("status", "info", "logs", "restart", "pause", "resume", "autocheckpoint", "timeout", "output")

Rows = list[tuple[str, str]]


class VmMagic(HostMagic):
    """`%vm`."""

    name = "vm"

    def options(self) -> Options:
        """Describe its line."""
        options = Options("%vm", ABOUT_VM)
        options.add_argument(
            "action", nargs="?", default="status", choices=ACTIONS, metavar="ACTION", help=", ".join(ACTIONS)
        )
        options.add_argument("value", nargs="?", metavar="VALUE", help="of autocheckpoint, timeout, output and logs")
        return options

    async def run(self, cell: Cell, arguments: argparse.Namespace, body: str) -> None:
        """Do what is asked for."""
        action: str = arguments.action
        value: str | None = arguments.value
        if value is not None and action not in ("logs", "autocheckpoint", "timeout", "output"):
            raise UsageError(f"%vm {action} takes no value, such as {value[:40]!r}.")
        match action:
            case "status":
                _show(cell, await _status(cell.notebook))
            case "info":
                _show(cell, await _info(cell.notebook))
            case "logs":
                lines = min(_number(value, "%vm logs"), MAX_LOG_LINES) if value else LOG_LINES
                tail = await asyncio.to_thread(cell.notebook.lease.machine.console_tail, lines)
                cell.write(tail or "The console is empty.")
            case "restart":
                await self._restart(cell)
            case "pause":
                cell.notebook.pause()
                cell.write("The machine is paused when this cell has ended; the next cell wakes it.")
            case "resume":
                # Asking for anything has woken it.
                cell.write(f"The machine runs: {cell.notebook.lease.description}.")
            case "autocheckpoint":
                self._set_checkpoints(cell, value)
            case "timeout":
                self._set_timeout(cell, value)
            case "output":
                self._set_output(cell, value)

    async def _restart(self, cell: Cell) -> None:
        began = time.monotonic()
        async with cell.machine_standing_still():
            cell.notebook.use(await cell.notebook.fresh())
        cell.write(
            f"This is a fresh machine, after {time.monotonic() - began:.2f} s. Snapshots of the old one are still there."
        )

    def _set_checkpoints(self, cell: Cell, value: str | None) -> None:
        notebook = cell.notebook
        if value not in (None, "on", "off"):
            raise UsageError("It can be on or off.", hint="%vm autocheckpoint on")
        if value == "on":
            _ = notebook.lease  # there has to be a machine to make snapshots of
            notebook.checkpoints = True
        elif value == "off":
            notebook.checkpoints = False
        cell.write(f"Automatic snapshots before each cell: {_checkpoints(notebook)}.")

    def _set_timeout(self, cell: Cell, value: str | None) -> None:
        notebook = cell.notebook
        if value is not None:
            seconds = 0.0 if value == "off" else _seconds(value)
            longest = notebook.limits.max_timeout_s
            if longest and not 0 < seconds <= longest:
                raise ConfigError(f"The owner of this host allows a cell {longest:g} s at most.")
            notebook.limits = replace(notebook.limits, timeout_s=seconds)
        cell.write(f"Cell timeout: {describe(notebook.limits)['timeout']}.")

    def _set_output(self, cell: Cell, value: str | None) -> None:
        notebook = cell.notebook
        if value is not None:
            size = 0 if value == "off" else _size(value)
            most = notebook.limits.max_output_bytes
            if most and not 0 < size <= most:
                raise ConfigError(f"The owner of this host allows a cell {most} bytes of output at most.")
            notebook.limits = replace(notebook.limits, output_bytes=size)
        cell.write(f"Output of a cell: {describe(notebook.limits)['output']}.")

    def words(self, notebook: Notebook, before: Sequence[str]) -> list[str]:
        """Actions, and their values."""
        if not before:
            return list(ACTIONS)
        if len(before) == 1:
            return {"autocheckpoint": ["on", "off"], "timeout": ["off", "60"], "output": ["off", "10M"]}.get(
                before[0], []
            )
        return []


class PoolMagic(HostMagic):
    """`%pool`."""

    name = "pool"

    def options(self) -> Options:
        """Describe its line."""
        options = Options("%pool", ABOUT_POOL)
        options.add_argument(
            "size", nargs="?", default="status", metavar="SIZE", help="machines to keep ready, or status"
        )
        return options

    async def run(self, cell: Cell, arguments: argparse.Namespace, body: str) -> None:
        """Show or change it."""
        from agentvm_kernel.sandbox import pool

        size: str = arguments.size
        if size != "status":
            await asyncio.to_thread(pool.configure, minimum=_number(size, "%pool"))
            await asyncio.to_thread(pool.ensure_keeper)
        status = await asyncio.to_thread(pool.status)
        rows = [
            ("ready", f"{len(status.ready)} of {status.config.minimum}"),
            (
                "machines in all",
                f"{status.machines}" + (f" of {status.config.maximum} at most" if status.config.maximum else ""),
            ),
            ("kind", f"profile {status.config.profile}, image {status.config.image}"),
            ("keeper", f"process {status.keeper}" if status.keeper else "none runs"),
        ]
        _show(cell, rows + ([("problem", status.error)] if status.error else []))

    def words(self, notebook: Notebook, before: Sequence[str]) -> list[str]:
        """A word or a number."""
        return [] if before else ["status", "0", "1", "2"]


async def _status(notebook: Notebook) -> Rows:
    lease = notebook.lease
    machine = lease.machine
    hardware = machine.hardware
    emulated = "KVM" if hardware.accelerator == "kvm" else "emulated (no KVM here), so slow"
    rows = [
        ("machine", f"{machine.name}, {machine.state.value}"),
        (
            "size",
            f"{hardware.profile}: {hardware.vcpus} CPU, {hardware.memory_mib} MiB memory, {hardware.disk_gib} GiB disk",
        ),
        ("runs on", f"{emulated}, {'vsock' if hardware.vsock else 'virtio-serial'}"),
        ("memory of its own", await asyncio.to_thread(_own_memory, machine.qemu_pid)),
    ]
    travel = notebook.travel
    names = await asyncio.to_thread(travel.names)
    rows.append(("snapshots", f"{len(names)} (%snapshot shows them)" if names else "none yet"))
    rows.append(("autocheckpoint", _checkpoints(notebook)))
    limits = describe(notebook.limits)
    return [*rows, ("cell timeout", limits["timeout"]), ("output of a cell", limits["output"])]


def _checkpoints(notebook: Notebook) -> str:
    state = "on" if notebook.checkpoints else "off"
    costs = notebook.checkpoint_costs
    if not costs:
        return state
    return f"{state}; the last took {costs[-1]:.2f} s, the last {len(costs)} {sum(costs) / len(costs):.2f} s on average"


async def _info(notebook: Notebook) -> Rows:
    connection = notebook.lease.connection
    system, disks, network = [await connection.call(method) for method in ("system", "disks", "network")]
    rows: Rows = []
    if isinstance(system, dict):
        total, free = system.get("memory_total"), system.get("memory_available")
        rows += [
            (
                "system",
                f"{_short(system.get('os'))}, Linux {_short(system.get('kernel'))}, {_short(system.get('machine'))}",
            ),
            ("host name", _short(system.get("hostname"))),
            ("CPUs, load", f"{_short(system.get('cpus'))}, {_short(system.get('load'))}"),
            ("memory", f"{_mib(free)} of {_mib(total)} free"),
            ("up for", f"{_short(system.get('uptime_s'))} s"),
        ]
    for disk in disks[:20] if isinstance(disks, list) else ():
        if isinstance(disk, dict):
            where = f"{_short(disk.get('device'))} on {_short(disk.get('mount'))}"
            rows.append(("disk", f"{where}: {_mib(disk.get('free'))} of {_mib(disk.get('size'))} free"))
    for card in network[:20] if isinstance(network, list) else ():
        if isinstance(card, dict):
            rows.append(("network", f"{_short(card.get('name'))}: {_short(card.get('addresses'))}"))
    return rows


def _show(cell: Cell, rows: Rows) -> None:
    width = max(len(name) for name, _ in rows)
    text = "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
    left = 'style="text-align:left"'
    table = "".join(
        f"<tr><th {left}>{html.escape(name)}</th><td {left}>{html.escape(value)}</td></tr>" for name, value in rows
    )
    cell.display({"text/plain": text, "text/html": f"<table>{table}</table>"})


def _short(value: Any) -> str:
    """Return what a guest says about itself, bounded."""
    if isinstance(value, list):
        return ", ".join(map(_short, value[:8]))
    return str(round(value, 1) if isinstance(value, float) else value)[:120]


def _mib(value: Any) -> str:
    return f"{value / 1024**2:.0f} MiB" if isinstance(value, int | float) else "?"


def _own_memory(pid: int) -> str:
    """Return the host memory that a QEMU does not share with others."""
    private = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Private_"):
                private += int(line.split()[1])
    except OSError:
        return "cannot be seen by this user"
    return f"{private / 1024:.0f} MiB"


def _number(value: str, what: str) -> int:
    if not value.isascii() or not value.isdecimal():
        raise UsageError(f"{value[:40]!r} is no number.", hint=f"Write {what} 2, for example.")
    return int(value)


def _seconds(value: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,3})?", value) or not float(value):
        raise UsageError(f"{value[:40]!r} is no number of seconds.", hint="Write %vm timeout 60, or %vm timeout off.")
    return float(value)


def _size(value: str) -> int:
    match = re.fullmatch(r"([0-9]{1,12})([KMG]?)B?", value.upper())
    if not match or not int(match[1]):
        raise UsageError(f"{value[:40]!r} is no size.", hint="Write %vm output 10M, or %vm output off.")
    return int(match[1]) * SIZES[match[2]]


MAGICS = (VmMagic(), PoolMagic())
