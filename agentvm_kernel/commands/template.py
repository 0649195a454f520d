"""`agentvm template`: build, list and remove the frozen machines that others are thawed from. Imports nothing heavy before it runs."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentvm_kernel.hypervisor.connection import Hypervisor
    from agentvm_kernel.hypervisor.snapshot import Snapshot

NAME = "template"
HELP = "build, list and remove templates, the frozen machines that others are thawed from"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    which = argparse.ArgumentParser(add_help=False)
    which.add_argument("--image", help="name of the guest image, or the beginning of its digest")
    which.add_argument("--profile", metavar="P", help="size of the machine: light, standard or intensive")
    which.add_argument("--json", action="store_true", help="print JSON for programs")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser(
        "build",
        parents=[which],
        help="build a template unless it is there",
        description="Build the template for an image and a profile unless it is there; the first notebook does so otherwise.",
    )
    build.set_defaults(act=_build)
    listing = actions.add_parser(
        "list", parents=[which], help="list the templates", description="List the templates, oldest first."
    )
    listing.set_defaults(act=_list)
    remove = actions.add_parser(
        "remove",
        parents=[which],
        help="delete templates",
        description="Delete the templates that are named, of an image, of a profile, or no longer usable. Snapshots stay whole.",
    )
    remove.add_argument("templates", nargs="*", metavar="ID", help="id of a template, or its beginning")
    remove.add_argument(
        "--unusable", action="store_true", help="those that no more machines are thawed from, and no machine rests on"
    )
    remove.set_defaults(act=_remove)


def execute(options: argparse.Namespace) -> int:
    """Do what was asked for."""
    code: int = options.act(options)
    return code


def _build(options: argparse.Namespace) -> int:
    import asyncio
    import sys

    from agentvm_kernel.config import load_config
    from agentvm_kernel.hypervisor.connection import Hypervisor
    from agentvm_kernel.image import store
    from agentvm_kernel.sandbox import templates
    from agentvm_kernel.sandbox.settings import load_settings

    settings = load_settings(image=options.image, profile=options.profile)
    load_config().check_profile(settings.profile)
    image = store.find(settings.image)

    def say(text: str) -> None:
        print(f"template: {text}", file=sys.stderr, flush=True)

    with Hypervisor(settings.uri) as hypervisor:
        there = templates.find(hypervisor, image, settings.profile)
        template = asyncio.run(
            templates.ensure(hypervisor, image, settings.profile, timeout_s=settings.boot_timeout_s, on_progress=say)
        )
        if options.json:
            _print_json(_described(hypervisor, template))
        elif there == template:
            print(f"The template {_title(template)} is there already.")
        else:
            print(f"Built the template {_title(template)}, {template.size() / 1024**2:.0f} MiB.")
    return 0


def _list(options: argparse.Namespace) -> int:
    from agentvm_kernel.commands._text import local_time, mib, print_table
    from agentvm_kernel.hypervisor.connection import Hypervisor
    from agentvm_kernel.sandbox.settings import load_settings

    with Hypervisor(load_settings().uri) as hypervisor:
        found = [_described(hypervisor, template) for template in _chosen(options)]
    if options.json:
        _print_json(found)
        return 0
    if not found:
        print("There are no templates here. Build one with: agentvm template build")
        return 0
    print_table(
        ("Template", "Image", "Profile", "Built", "MiB", "Machines", "Snapshots", "Usable"),
        [
            (
                one["id"],
                one["image_name"] or one["image"][:12],
                one["profile"],
                local_time(one["created"]),
                mib(one["size_bytes"]),
                str(len(one["machines"])),
                str(one["snapshots"]),
                f"no: {'; '.join(one['obstacles'])}" if one["obstacles"] else "yes",
            )
            for one in found
        ],
    )
    return 0


def _remove(options: argparse.Namespace) -> int:
    from agentvm_kernel.errors import ConfigError
    from agentvm_kernel.hypervisor.connection import Hypervisor
    from agentvm_kernel.hypervisor.garbage import delete
    from agentvm_kernel.sandbox.settings import load_settings

    if not (options.templates or options.image or options.profile or options.unusable):
        raise ConfigError("Which templates?", hint="Give ids, --image, --profile or --unusable.")
    removed = []
    with Hypervisor(load_settings().uri) as hypervisor:
        for template in _chosen(options, options.templates):
            if options.unusable and not _unusable(_described(hypervisor, template)):
                continue
            delete(template)
            removed.append(template.id)
            if not options.json:
                print(f"Removed the template {_title(template)}.")
    if options.json:
        _print_json(removed)
    elif not removed:
        print("There are no such templates.")
    return 0


def _unusable(described: dict[str, Any]) -> bool:
    return bool(described["obstacles"]) and not described["machines"]


def _chosen(options: argparse.Namespace, ids: "list[str] | tuple[()]" = ()) -> "list[Snapshot]":
    """Return the templates that the options ask for.

    Raises:
        SnapshotError: there is none with one of the ids, or several.
        ConfigError: there is no such profile.
    """
    from agentvm_kernel.errors import SnapshotError
    from agentvm_kernel.hypervisor.profiles import get_profile
    from agentvm_kernel.hypervisor.snapshot import list_all
    from agentvm_kernel.image import store

    found = [snapshot for snapshot in list_all() if snapshot.is_template]
    if ids:
        named = {}
        for wanted in ids:
            matching = [template for template in found if template.id.startswith(wanted)] if wanted else []
            if len(matching) != 1:
                number = "no" if not matching else "more than one"
                raise SnapshotError(
                    f"There is {number} template {wanted[:80]!r}.", hint="`agentvm template list` shows all."
                )
            named[matching[0].id] = matching[0]
        found = list(named.values())
    if options.profile:
        profile = get_profile(options.profile).name
        found = [template for template in found if template.hardware.profile == profile]
    if options.image:
        # An image that has been removed still has its digest.
        digests = {image.digest for image in store.list_images() if image.name == options.image}
        prefix = options.image if len(options.image) >= 8 else None
        found = [
            template
            for template in found
            if template.hardware.image in digests or (prefix and template.hardware.image.startswith(prefix))
        ]
    return found


def _described(hypervisor: "Hypervisor", template: "Snapshot") -> dict[str, Any]:
    from agentvm_kernel.hypervisor.garbage import machines_of
    from agentvm_kernel.hypervisor.snapshot import list_all
    from agentvm_kernel.image import store
    from agentvm_kernel.sandbox import templates

    image = store.with_digest(template.hardware.image)
    obstacles = templates.obstacles(hypervisor, template)
    if image is None:
        obstacles = ["its guest image was removed", *obstacles]
    return {
        "id": template.id,
        "image": template.hardware.image,
        "image_name": image.name if image else None,
        "profile": template.hardware.profile,
        "accelerator": template.hardware.accelerator,
        "qemu": template.qemu,
        "created": template.created,
        "size_bytes": template.size(),
        "machines": machines_of(template),
        "snapshots": sum(1 for snapshot in list_all() if snapshot.parent == template.id),
        "obstacles": obstacles,
    }


def _title(template: "Snapshot") -> str:
    return f"{template.id} ({template.hardware.profile})"


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=1))
