"""`agentvm image`: build, list and remove guest images. Imports nothing heavy before it runs."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentvm_kernel.image.build import OnProgress
    from agentvm_kernel.image.spec import ImageSpec
    from agentvm_kernel.image.store import Image

NAME = "image"
HELP = "build, list and remove guest images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser(
        "build", help="build an image unless it is there", description="Build a guest image; needs root."
    )
    build.add_argument(
        "spec", nargs="?", default="default", help="a TOML file or a shipped spec (default: %(default)s)"
    )
    build.set_defaults(act=_build)
    listing = actions.add_parser(
        "list", help="list the images on this host", description="List the images, newest first."
    )
    listing.set_defaults(act=_list)
    remove = actions.add_parser("remove", help="delete an image", description="Delete an image.")
    remove.add_argument("image", help="name or beginning of the digest (8 digits at least)")
    remove.set_defaults(act=_remove)


def execute(options: argparse.Namespace) -> int:
    """Do what was asked for."""
    code: int = options.act(options)
    return code


def _build(options: argparse.Namespace) -> int:
    from agentvm_kernel.image import store
    from agentvm_kernel.image.build import image_digest
    from agentvm_kernel.image.spec import load_spec

    spec = load_spec(options.spec)
    if (ready := store.with_digest(image_digest(spec))) is not None:
        print(f"The image {_title(ready)} is there already.")
        return 0
    image = _build_with_progress(spec)
    print(f"Built the image {_title(image)} in {image.folder}, {_mib(image)} MiB.")
    return 0


def _build_with_progress(spec: "ImageSpec") -> "Image":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column

    from agentvm_kernel.image.build import build_image

    console = Console(stderr=True)
    if not console.is_terminal:
        return build_image(spec, on_progress=_stage_lines())
    detail = TextColumn(
        "{task.fields[detail]}",
        markup=False,
        style="dim",
        table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
    )
    stage = TextColumn("{task.description}", table_column=Column(min_width=15))
    columns = (stage, BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), detail)
    with Progress(*columns, console=console, transient=True, expand=True) as progress:
        task = progress.add_task("Image", total=1.0, detail="")

        def on_progress(stage: str, done: float, detail: str) -> None:
            progress.update(task, description=stage, completed=done, detail=detail)

        return build_image(spec, on_progress=on_progress)


def _stage_lines() -> "OnProgress":
    """Return a progress function for logs: a line for each stage."""
    import sys
    import time

    began = time.monotonic()
    last = ""

    def on_progress(stage: str, done: float, detail: str) -> None:
        nonlocal last
        if stage != last:
            last = stage
            print(f"image: {time.monotonic() - began:4.0f} s {done:4.0%} {stage}", file=sys.stderr, flush=True)

    return on_progress


def _list(options: argparse.Namespace) -> int:
    import time

    from rich.console import Console
    from rich.table import Table

    from agentvm_kernel.image import store

    images = store.list_images()
    if not images:
        print("There are no images yet. Build one with: agentvm image build")
        return 0
    in_use = _digests_in_use()
    table = Table("Name", "Digest", "Python", "MiB", "Built", "In use", box=None, pad_edge=False)
    for image in images:
        built = time.strftime("%Y-%m-%d %H:%M", time.localtime(image.created))
        used = "yes" if image.digest in in_use else ""
        table.add_row(image.name, image.digest[:12], image.python_version, _mib(image), built, used)
    Console().print(table)
    return 0


def _remove(options: argparse.Namespace) -> int:
    from agentvm_kernel.image import store

    image = store.remove(options.image, in_use=_digests_in_use())
    print(f"Removed the image {_title(image)}.")
    return 0


def _digests_in_use() -> set[str]:
    """Return the digests of images that some machine's or snapshot's disk rests on."""
    from agentvm_kernel.errors import SnapshotError
    from agentvm_kernel.hypervisor.qcow2 import backing_file
    from agentvm_kernel.paths import state_dir

    digests = set()
    for layer in state_dir().glob("*/*/*.qcow2"):
        try:
            backing = backing_file(layer)
        except (OSError, SnapshotError):  # removed meanwhile, or not a disk of ours
            continue
        if backing is not None:
            digests.add(backing.parent.name)
    return digests


def _title(image: "Image") -> str:
    return f"{image.name} ({image.digest[:12]})"


def _mib(image: "Image") -> str:
    return f"{image.size / 1024**2:.0f}"
