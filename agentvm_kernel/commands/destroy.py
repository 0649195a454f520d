"""`agentvm destroy`: end machines by force and delete their files. Imports nothing heavy before it runs."""

import argparse

NAME = "destroy"
HELP = "end machines by force and delete their files, whoever uses them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="name of a machine")
    parser.add_argument("--all", action="store_true", help="all machines of this user")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def execute(options: argparse.Namespace) -> int:
    """Destroy the machines; none is touched when one of the names is wrong."""
    import json

    from agentvm_kernel.errors import ConfigError, UnknownMachineError
    from agentvm_kernel.hypervisor import inventory
    from agentvm_kernel.hypervisor.connection import Hypervisor
    from agentvm_kernel.hypervisor.reap import remove_machine
    from agentvm_kernel.sandbox import pool
    from agentvm_kernel.sandbox.settings import load_settings

    if bool(options.names) == options.all:
        raise ConfigError("Which machines?", hint="Give names, or --all. `agentvm list` shows them.")
    machines = {machine.name: machine for machine in inventory.list_machines(load_settings().uri)}
    if unknown := [name for name in options.names if name not in machines]:
        raise UnknownMachineError(f"There is no machine {unknown[0][:80]!r}.", hint="`agentvm list` shows all.")
    doomed = list(machines.values()) if options.all else [machines[name] for name in dict.fromkeys(options.names)]
    for machine in doomed:
        for marker in pool.ready_machines():
            if marker.parent.name == machine.name:
                pool.claim_marker(marker)  # so that no notebook takes it now
        with Hypervisor(machine.uri) as hypervisor:
            remove_machine(hypervisor, machine.name)
        if not options.json:
            used = f", which process {machine.owner_pid} was using" if machine.in_use else ""
            print(f"Destroyed {machine.name}{used}.")
    if options.json:
        print(json.dumps([machine.name for machine in doomed]))
    elif not doomed:
        print("There are no machines.")
    return 0
