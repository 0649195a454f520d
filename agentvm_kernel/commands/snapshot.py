"""`agentvm snapshot`: show, open, keep, pass on and delete snapshots of machines. Imports nothing heavy before it runs."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentvm_kernel.hypervisor.snapshot import Snapshot

NAME = "snapshot"
HELP = "show, restore, export and delete snapshots of machines"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser(
        "list",
        help="show all snapshots",
        description="Show the snapshots of all notebooks as a tree each, and those that were exported.",
    )
    listing.add_argument("--json", action="store_true", help="print JSON for programs")
    listing.set_defaults(act=_list)
    restore = actions.add_parser(
        "restore",
        help="start a kernel in the state of a snapshot",
        description="Start a kernel in the state of a snapshot and say how to connect to it; ctrl-\\ ends it. "
        "A notebook is run from a snapshot by `agentvm run NOTEBOOK --from NAME`.",
    )
    restore.add_argument("name", help="name or id of a snapshot")
    restore.set_defaults(act=_restore)
    delete = actions.add_parser(
        "delete", help="delete snapshots", description="Delete snapshots; those that came after them stay whole."
    )
    delete.add_argument("names", nargs="+", metavar="NAME", help="name or id of a snapshot")
    delete.add_argument("--json", action="store_true", help="print JSON for programs")
    delete.set_defaults(act=_delete)
    export = actions.add_parser(
        "export",
        help="keep a snapshot for good",
        description="Keep a snapshot beyond its notebook's end, for all notebooks; with -o also write it to a file.",
    )
    export.add_argument("name", help="name or id of a snapshot")
    export.add_argument("-o", "--output", metavar="FILE", help="write it to this file, for `agentvm snapshot import`")
    export.add_argument("--json", action="store_true", help="print JSON for programs")
    export.set_defaults(act=_export)
    importing = actions.add_parser(
        "import",
        help="add a snapshot from a file",
        description="Check a file that `agentvm snapshot export -o` wrote, and add its snapshot.",
    )
    importing.add_argument("file", help="what `agentvm snapshot export -o` wrote")
    importing.add_argument("--name", help="call it so instead")
    importing.add_argument("--json", action="store_true", help="print JSON for programs")
    importing.set_defaults(act=_import)


def execute(options: argparse.Namespace) -> int:
    """Do what was asked for."""
    code: int = options.act(options)
    return code


def _list(options: argparse.Namespace) -> int:
    from agentvm_kernel.hypervisor.snapshot import list_all
    from agentvm_kernel.sandbox import snapshot_store

    named = [one for one in list_all() if one.name]
    if options.json:
        _print_json([_as_json(one) for one in named])
    elif not named:
        print("There are no snapshots. A notebook makes one with: %snapshot NAME")
    else:
        print(snapshot_store.as_text(named, here=""))
    return 0


def _restore(options: argparse.Namespace) -> int:
    import os
    import sys

    from agentvm_kernel.sandbox import snapshot_store

    snapshot = snapshot_store.find_any(options.name)
    os.environ[snapshot_store.START_FROM] = snapshot.id
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "agentvm_kernel"])  # noqa: S606 (that is what it is for)


def _delete(options: argparse.Namespace) -> int:
    from agentvm_kernel.hypervisor import garbage
    from agentvm_kernel.sandbox import snapshot_store

    doomed = [snapshot_store.find_any(name) for name in dict.fromkeys(options.names)]
    for snapshot in doomed:
        garbage.remove(snapshot)
        if not options.json:
            print(f"Deleted {snapshot.name or snapshot.id}.")
    if options.json:
        _print_json([one.id for one in doomed])
    return 0


def _export(options: argparse.Namespace) -> int:
    from pathlib import Path

    from agentvm_kernel.sandbox import snapshot_store

    snapshot = snapshot_store.export(snapshot_store.find_any(options.name))
    written: dict[str, Any] = {}
    if options.output:
        from agentvm_kernel.hypervisor import archive
        from agentvm_kernel.hypervisor.connection import Hypervisor
        from agentvm_kernel.sandbox.settings import load_settings

        path = Path(options.output)
        with Hypervisor(load_settings().uri) as hypervisor:
            written = {"file": str(path), "bytes": archive.write(hypervisor, snapshot, path)}
    if options.json:
        _print_json(_as_json(snapshot) | written)
    else:
        print(f"{snapshot.name} is kept. Start from it with: agentvm run NOTEBOOK --from {snapshot.name}")
        if written:
            print(
                f"Wrote {written['file']}, {written['bytes'] / 1024**2:.1f} MiB. It holds all that was in the machine."
            )
    return 0


def _import(options: argparse.Namespace) -> int:
    from pathlib import Path

    from agentvm_kernel.hypervisor import archive
    from agentvm_kernel.hypervisor.connection import Hypervisor
    from agentvm_kernel.sandbox import snapshot_store
    from agentvm_kernel.sandbox.settings import load_settings

    if options.name is not None:
        snapshot_store.require_name(options.name)
    with Hypervisor(load_settings().uri) as hypervisor:
        snapshot = archive.read(
            hypervisor, Path(options.file), check_name=snapshot_store.require_importable, name=options.name
        )
    if options.json:
        _print_json(_as_json(snapshot))
    else:
        print(f"Added {snapshot.name}. Start from it with: agentvm run NOTEBOOK --from {snapshot.name}")
    return 0


def _as_json(snapshot: "Snapshot") -> dict[str, Any]:
    return {
        "id": snapshot.id,
        "name": snapshot.name,
        "description": snapshot.description,
        "after": snapshot.after,
        "session": snapshot.session,
        "created": snapshot.created,
        "bytes": snapshot.size(),
        "automatic": snapshot.automatic,
        "exported": snapshot.exported,
        "profile": snapshot.hardware.profile,
    }


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=2))
