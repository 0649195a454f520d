"""`agentvm logs`: what a machine wrote to its console. Imports nothing heavy before it runs."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentvm_kernel.hypervisor.console import Reader
    from agentvm_kernel.hypervisor.inventory import MachineInfo

NAME = "logs"
HELP = "show what a machine wrote to its console"

LOOK_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", metavar="NAME", help="name of the machine")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the machine ends, or ctrl-C")


def execute(options: argparse.Namespace) -> int:
    """Print the console, without control characters: the guest may write anything there."""
    from agentvm_kernel.errors import MachineError
    from agentvm_kernel.hypervisor import inventory
    from agentvm_kernel.hypervisor.console import Reader
    from agentvm_kernel.hypervisor.files import MachineFiles
    from agentvm_kernel.sandbox.settings import load_settings

    info = inventory.find(options.name, load_settings().uri)
    try:
        reader = Reader(MachineFiles.of(info.name).serial_log)
    except OSError as error:
        raise MachineError(f"The console of machine {info.name} cannot be read: {error.strerror}.") from error
    with reader:
        if not options.follow:
            _print_new(reader)
            return 0
        try:
            _follow(info, reader)
        except KeyboardInterrupt:
            print()
    return 0


def _follow(info: "MachineInfo", reader: "Reader") -> None:
    import sys

    from agentvm_kernel.errors import UnknownMachineError
    from agentvm_kernel.hypervisor.connection import Hypervisor
    from agentvm_kernel.hypervisor.machine import Machine

    with Hypervisor(info.uri) as hypervisor:
        try:
            machine = Machine.attach(hypervisor, info.name)
        except UnknownMachineError:
            ended = f"machine {info.name} has ended"
        else:
            _print_new(reader)
            while not (ended := machine.wait_stopped_reason(LOOK_S)):
                _print_new(reader)
    _print_new(reader)
    print(f"agentvm: {ended}", file=sys.stderr)


def _print_new(reader: "Reader") -> None:
    while text := reader.read():
        print(text, end="", flush=True)
