"""`agentvm status`: everything about one machine. Imports nothing heavy before it runs."""

import argparse

NAME = "status"
HELP = "show one machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", metavar="NAME", help="name of the machine")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def execute(options: argparse.Namespace) -> int:
    """Print what is known of the machine."""
    import json
    from dataclasses import asdict

    from agentvm_kernel.commands._text import duration, local_time, mib, print_fields
    from agentvm_kernel.commands.list import owner
    from agentvm_kernel.hypervisor import inventory
    from agentvm_kernel.sandbox.settings import load_settings

    machine = inventory.find(options.name, load_settings().uri)
    if options.json:
        print(json.dumps(asdict(machine), indent=1))
        return 0
    accelerator = {"kvm": "KVM", "tcg": "software emulation"}.get(machine.accelerator, "-")
    print_fields(
        (
            ("Machine", machine.name),
            ("State", machine.state),
            ("Use", machine.use or "-"),
            ("Owner", owner(machine)),
            (
                "Profile",
                f"{machine.profile}: {machine.vcpus} vCPU, {machine.memory_mib} MiB, {machine.disk_gib} GiB disk",
            ),
            ("Runs with", accelerator),
            ("Created", local_time(machine.created)),
            ("Up", duration(machine.uptime_s)),
            ("CPU time", "-" if machine.cpu_s is None else f"{machine.cpu_s:.1f} s"),
            ("Memory", f"{mib(machine.pss_bytes)} MiB of the host"),
            ("Disk", f"{mib(machine.disk_bytes)} MiB of the host"),
            ("Image", machine.image[:12] or "-"),
            ("Template", machine.template or "-"),
            ("QEMU", f"process {machine.qemu_pid}" if machine.qemu_pid else "-"),
            ("libvirt", machine.uri),
            ("Files", machine.folder),
        )
    )
    return 0
