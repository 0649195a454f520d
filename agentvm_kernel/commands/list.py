"""`agentvm list`: the machines of this user. Imports nothing heavy before it runs."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentvm_kernel.hypervisor.inventory import MachineInfo

NAME = "list"
HELP = "list the machines: what each is used as, by whom, and what it takes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def execute(options: argparse.Namespace) -> int:
    """Print all machines, oldest first."""
    from agentvm_kernel.commands._text import duration, mib, print_table
    from agentvm_kernel.hypervisor import inventory
    from agentvm_kernel.sandbox.settings import load_settings

    machines = inventory.list_machines(load_settings().uri)
    if options.json:
        print(inventory.as_json(machines))
        return 0
    if not machines:
        print("There are no machines.")
        return 0
    print_table(
        ("Name", "State", "Use", "Owner", "Profile", "Up", "MiB", "Disk MiB", "Template"),
        [
            (
                machine.name,
                machine.state,
                machine.use,
                owner(machine),
                machine.profile,
                duration(machine.uptime_s),
                mib(machine.pss_bytes),
                mib(machine.disk_bytes),
                machine.template[:8],
            )
            for machine in machines
        ],
    )
    return 0


def owner(machine: "MachineInfo") -> str:
    """Return who has a machine, in a word or two."""
    if machine.use == "ready":
        return "the pool"
    return f"process {machine.owner_pid}" if machine.owner_alive else "nobody"
