"""qemu:///session: a normal user's machines, without root and without any set-up. Needs root, to make a user for it."""

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="needs QEMU"),
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("useradd"), reason="needs root, to make a user"),
]
ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PACKAGES = (
    *("libvirt", "libvirtmod", "libvirt_qemu", "libvirtmod_qemu"),
    *("pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"),
)


@pytest.fixture
def user() -> Iterator[str]:
    """A normal user of this computer, gone with all that it started when the test ends."""
    name = f"agentvm-{secrets.token_hex(4)}"
    subprocess.run(["useradd", "--create-home", "--shell", "/bin/sh", name], check=True)
    try:
        if subprocess.run(["getent", "group", "kvm"], stdout=subprocess.DEVNULL, check=False).returncode == 0:
            subprocess.run(["usermod", "--append", "--groups", "kvm", name], check=True)
        yield name
    finally:
        end_processes(int(subprocess.run(["id", "-u", name], check=True, capture_output=True).stdout))
        subprocess.run(["userdel", "--force", "--remove", name], check=True, capture_output=True)


def end_processes(uid: int) -> None:
    """End what this user runs: its libvirtd, and whatever a failed test left behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 10
        while pids := processes_of(uid):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)


def processes_of(uid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # A zombie waits for the system's first process, not for us.
            zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if folder.stat().st_uid == uid and not zombie:
                found.append(int(folder.name))
    return found


@pytest.fixture
def readable(guest_folder: Path) -> Iterator[Path]:
    """A copy of the code, and of the packages that it needs, where any user may read it."""
    folder = guest_folder / "code"
    folder.mkdir(mode=0o755)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("agentvm_kernel", "guest_runtime"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("as_user.py", "toy_guest.py"):
        shutil.copy(HERE / name, folder)
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        origin = Path(spec.origin)
        if origin.name == "__init__.py":
            shutil.copytree(origin.parent, folder / name, ignore=ignore)
        else:
            shutil.copy(origin, folder)
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
    yield folder
    shutil.rmtree(folder)


def as_user(name: str, *command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a command as that user, in an environment like after a login."""
    variables = [f"{key}={value}" for key, value in environment.items()]
    change = ["setpriv", f"--reuid={name}", f"--regid={name}", "--init-groups", "--reset-env"]
    return subprocess.run(
        [*change, "env", "-C", "/", *variables, *command], capture_output=True, text=True, timeout=240, check=False
    )


def python_for(name: str) -> str:
    """Return an interpreter of our version that the user may run; the tests' own may lie in a folder that is root's."""
    for candidate in (sys.executable, f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}"):
        if as_user(name, candidate, "-c", "").returncode == 0:
            return candidate
    pytest.skip(f"no Python {sys.version_info[0]}.{sys.version_info[1]} that every user may run")


@pytest.mark.parametrize("way", ["auto", "internal"])
def test_a_normal_user_freezes_and_thaws_machines_of_their_own(user: str, readable: Path, way: str) -> None:
    environment = {"PYTHONPATH": str(readable), "AGENTVM_FREEZE": way}
    done = as_user(user, python_for(user), str(readable / "as_user.py"), **environment)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    print(seen)
    assert seen["uri"] == "qemu:///session"
    assert seen["qemu_user"] == seen["user"] != 0
    assert seen["way"] == ("internal" if way == "internal" else "pass-through")
    assert seen["same_start"]
    assert seen["went_on"]
    assert seen["second_stood_still"]
    assert seen["left"] == []
