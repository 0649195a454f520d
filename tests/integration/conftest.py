"""A libvirt for the tests, with state and run folders of their own, and a toy machine."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from toy_guest import toy_image

from agentvm_kernel.hypervisor.boot import boot_machine
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.machine import Machine
from agentvm_kernel.hypervisor.reap import reap
from agentvm_kernel.image.store import Image


@pytest.fixture(scope="session")
def guest_folder() -> Iterator[Path]:
    """A folder that QEMU's user may pass through, with a short path: sockets are below it."""
    folder = Path(tempfile.mkdtemp(prefix="agentvm-t", dir="/var/tmp"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def own_folders(guest_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep machines and sockets of the tests apart from the user's."""
    monkeypatch.setenv("AGENTVM_STATE_DIR", str(guest_folder / "state"))
    monkeypatch.setenv("AGENTVM_RUN_DIR", str(guest_folder / "run"))


@pytest.fixture
def hypervisor(own_folders: None) -> Iterator[Hypervisor]:
    """The libvirt of AGENTVM_URI; skips where none answers. Nothing of the tests may be left behind."""
    connection = Hypervisor()
    try:
        connection.connection()
    except Exception as error:
        pytest.skip(f"no libvirt: {error}")
    with connection:
        yield connection
        reap(connection)
        folder = Path(os.environ["AGENTVM_STATE_DIR"]) / "machines"
        left = [path.name for path in folder.iterdir()] if folder.exists() else []
    assert not left, f"machines were left behind: {left}"


@pytest.fixture
def toy(guest_folder: Path) -> Callable[..., Image]:
    """Make an image that boots the toy guest; `toy(panic=True)` one that panics."""
    return lambda **options: toy_image(Path(tempfile.mkdtemp(dir=guest_folder)) / "image", **options)


@pytest.fixture
def machine(hypervisor: Hypervisor, toy: Callable[..., Image]) -> Iterator[Machine]:
    """A running toy machine."""
    machine = boot_machine(hypervisor, toy(), "light")
    yield machine
    machine.destroy()
