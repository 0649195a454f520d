"""Examines the host: one small check for each thing that agentvm needs, each with the one command that mends it.

A check returns a Row and never raises for what it looks at. Imports the standard library only; libvirt is imported by the check that needs
it, so that a host without libvirt-python gets a row, not a traceback.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from agentvm_kernel.errors import AgentVMError, ConfigError

if TYPE_CHECKING:
    from agentvm_kernel.sandbox.settings import SandboxSettings

Status = Literal["ok", "warn", "fail"]

CHECK_TIMEOUT_S = 20.0
LOW_SPACE_BYTES = 4 * 1024**3
BUILD_TOOLS = {"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "qemu-img": "qemu-utils", "setpriv": "util-linux"}


@dataclass(frozen=True, slots=True)
class Row:
    """What one check found.

    Attributes:
        name: what was checked.
        status: ok; warn (it works, but slower or with less); fail (machines cannot run).
        detail: what was found.
        mend: the command that mends it, empty where nothing needs mending.
    """

    name: str
    status: Status
    detail: str
    mend: str = ""


def examine() -> list[Row]:
    """Run all checks and return their rows in a fixed order."""
    from agentvm_kernel.sandbox.settings import SandboxSettings, load_settings

    rows = [check_python()]
    try:
        settings = load_settings()
        rows.append(Row("settings", "ok", f"profile {settings.profile}, image {settings.image}"))
    except AgentVMError as error:
        settings = SandboxSettings()
        rows.append(Row("settings", "fail", str(error), "correct the setting named here"))
    checks: dict[str, Callable[[], Row]] = {
        "QEMU": check_qemu,
        "libvirt": partial(check_libvirt, settings),
        "accelerator": check_accelerator,
        "/dev/kvm for QEMU": partial(check_qemu_user, settings),
        "vsock": check_vsock,
        "freeze and thaw": partial(check_mechanism, settings),
        "orphans": check_orphans,
        "folders": check_folders,
        "disk space": check_space,
        "guest image": partial(check_image, settings),
        "template": partial(check_template, settings),
        "image tools": check_build_tools,
        "kernelspec": check_kernelspec,
    }
    return [*rows, *(_limited(name, check) for name, check in checks.items())]


def check_python() -> Row:
    """The Python that runs this; an older one than 3.11 could not even install it."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Row("Python", "ok", f"{version} ({sys.executable})")


def check_qemu() -> Row:
    """The QEMU binary, found as a shell would find it."""
    name = "qemu-system-x86_64"
    path = shutil.which(name)
    if path is None:
        return Row("QEMU", "fail", f"{name} is not on the PATH", "apt-get install qemu-system-x86")
    result = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=False)
    if result.returncode != 0:
        return Row(
            "QEMU",
            "fail",
            f"{path} does not run: {_last(result.stderr)}",
            "apt-get install --reinstall qemu-system-x86",
        )
    version = result.stdout.partition("\n")[0].removeprefix("QEMU emulator version ")
    return Row("QEMU", "ok", f"{version} ({path})")


def check_libvirt(settings: "SandboxSettings") -> Row:
    """libvirt answers at the URI that kernels use, and it finds a QEMU."""
    try:
        from agentvm_kernel.hypervisor.connection import Hypervisor
    except ImportError as error:
        return Row("libvirt", "fail", f"libvirt-python cannot be imported: {error}", "pip install libvirt-python")
    try:
        with Hypervisor(settings.uri) as hypervisor:
            number = hypervisor.connection().getLibVersion()
            version = f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
            qemu = ".".join(map(str, hypervisor.qemu_version))
            return Row("libvirt", "ok", f"{version} at {hypervisor.uri}, starts QEMU {qemu}")
    except AgentVMError as error:
        system = os.geteuid() == 0 and settings.uri in (None, "qemu:///system")
        mend = _daemon_command() if system else error.hint
        return Row("libvirt", "fail", error.message, mend)


def check_accelerator() -> Row:
    """KVM really runs guests here, or machines are emulated."""
    from agentvm_kernel.hypervisor import accelerator

    try:
        chosen = accelerator.choose()
    except AgentVMError as error:
        return Row("accelerator", "fail", error.message, f"unset {accelerator.VARIABLE}")
    if chosen.kind == "kvm":
        return Row("accelerator", "ok", chosen.reason)
    group = accelerator.KVM_DEVICE.exists() and not os.access(accelerator.KVM_DEVICE, os.R_OK | os.W_OK)
    return Row("accelerator", "warn", chosen.reason, "sudo usermod -aG kvm $USER, then log in again" if group else "")


def check_qemu_user(settings: "SandboxSettings") -> Row:
    """QEMU's user may open /dev/kvm; where it may not, libvirt needs a minute and more for each machine."""
    name = "/dev/kvm for QEMU"
    from agentvm_kernel.hypervisor import accelerator

    if not accelerator.KVM_DEVICE.exists():
        return Row(name, "ok", f"there is no {accelerator.KVM_DEVICE}, so nothing depends on its mode")
    try:
        from agentvm_kernel.hypervisor.connection import Hypervisor

        with Hypervisor(settings.uri) as hypervisor:
            user = hypervisor.dac_user
    except (ImportError, AgentVMError):
        return Row(name, "warn", "not known as long as libvirt does not answer")
    if user is None:
        return Row(name, "ok", "QEMU runs as yourself")
    problem = accelerator.qemu_user_problem(*user)
    if problem:
        slow = f"{problem}: defining a machine takes more than a minute"
        return Row(name, "fail", slow, f"chgrp kvm {accelerator.KVM_DEVICE} && chmod 660 {accelerator.KVM_DEVICE}")
    return Row(name, "ok", "QEMU's user may open it")


def check_vsock() -> Row:
    """Machines can be reached over virtio-vsock; without it they are over a virtio-serial port."""
    from agentvm_kernel.transport.host import vsock_problem

    if problem := vsock_problem():
        return Row("vsock", "warn", f"{problem}; a virtio-serial port is used instead", "modprobe vhost_vsock")
    return Row("vsock", "ok", "virtio-vsock is used")


def check_mechanism(settings: "SandboxSettings") -> Row:
    """How machines are frozen and thawed: tried now with an empty one, since what was remembered may be out of date."""
    name = "freeze and thaw"
    try:
        from agentvm_kernel.hypervisor import mechanism
        from agentvm_kernel.hypervisor.connection import Hypervisor

        forced = os.environ.get(mechanism.VARIABLE, "auto") not in ("", "auto")
        with Hypervisor(settings.uri) as hypervisor:
            found = mechanism.choose(hypervisor) if forced else mechanism.probe(hypervisor)
    except ConfigError as error:
        return Row(name, "fail", error.message, f"unset {mechanism.VARIABLE}")
    except (ImportError, AgentVMError):
        return Row(name, "warn", "not known as long as libvirt does not answer")
    if found.kind == "pass-through":
        return Row(name, "ok", f"pass-through: {found.reason}")
    mend = f"unset {mechanism.VARIABLE}" if forced else ""
    return Row(name, "warn", f"internal snapshots (several times slower): {found.reason}", mend)


def check_orphans() -> Row:
    """Processes whose parent has gone are reaped at once: libvirt waits for that when it ends a machine."""
    read, write = os.pipe()
    # A child that leaves a grandchild behind and ends; whoever adopts the grandchild must reap it.
    script = f"import os\nif os.fork() == 0:\n    os.write({write}, str(os.getpid()).encode())\n"
    with os.fdopen(read) as pipe:
        subprocess.run([sys.executable, "-S", "-c", script], pass_fds=[write], timeout=CHECK_TIMEOUT_S, check=True)
        os.close(write)
        orphan = Path("/proc") / pipe.read()
    gone = threading.Event()
    for _ in range(20):
        if not orphan.exists():
            return Row("orphans", "ok", "ended processes are reaped at once")
        gone.wait(0.025)
    mend = "setsid tini -s -- libvirtd &   (instead of plain libvirtd)"
    if _libvirtd_under_tini():
        return Row("orphans", "ok", "this system's first process reaps late, but libvirtd runs under tini")
    return Row("orphans", "warn", "this system's first process reaps late; destroying machines takes seconds", mend)


def check_folders() -> Row:
    """The folders for images, machines and sockets can be used, by QEMU's user too."""
    from agentvm_kernel import paths

    for folder_of in (paths.cache_dir, paths.state_dir, paths.run_dir):
        try:
            folder = folder_of()
        except OSError as error:
            return Row("folders", "fail", f"{error.filename}: {error.strerror}", f"mkdir -p {error.filename}")
        if not os.access(folder, os.W_OK | os.X_OK):
            return Row("folders", "fail", f"{folder} cannot be written", f"sudo chown $USER {folder}")
        closed = next(
            (part for part in (folder, *folder.parents) if os.geteuid() == 0 and not part.stat().st_mode & 1), None
        )
        if closed is not None:
            return Row("folders", "fail", f"QEMU's user may not pass through {closed}", f"chmod o+x {closed}")
    return Row("folders", "ok", f"{paths.cache_dir()}, {paths.state_dir()}, {paths.run_dir()}")


def check_space() -> Row:
    """Enough disk space for images and for what machines write."""
    from agentvm_kernel import paths

    free, folder = min((shutil.disk_usage(folder).free, folder) for folder in (paths.cache_dir(), paths.state_dir()))
    detail = f"{free / 1024**3:.1f} GiB free in {folder}"
    if free < LOW_SPACE_BYTES:
        return Row("disk space", "warn", detail, f"df -h {folder}")
    return Row("disk space", "ok", detail)


def check_image(settings: "SandboxSettings") -> Row:
    """The guest image that machines boot from is there."""
    from agentvm_kernel.image import store

    try:
        image = store.find(settings.image)
    except AgentVMError as error:
        sudo = "" if os.geteuid() == 0 else "sudo "
        return Row("guest image", "fail", error.message, f"{sudo}{Path(sys.prefix) / 'bin/agentvm'} image build")
    return Row(
        "guest image", "ok", f"{image.name} ({image.digest[:12]}), Python {image.python_version}, {image.folder}"
    )


def check_template(settings: "SandboxSettings") -> Row:
    """The template that machines are thawed from is there; without it the first notebook waits for it to be built."""
    mend = f"{Path(sys.prefix) / 'bin/agentvm'} template build"
    try:
        from agentvm_kernel.hypervisor.connection import Hypervisor
        from agentvm_kernel.image import store
        from agentvm_kernel.sandbox import templates

        image = store.find(settings.image)
        with Hypervisor(settings.uri) as hypervisor:
            template = templates.find(hypervisor, image, settings.profile)
    except (ImportError, AgentVMError):
        return Row("template", "warn", "not known as long as libvirt does not answer or the guest image is missing")
    if template is None:
        return Row("template", "warn", f"none for {image.name}, {settings.profile}: the first cell waits for it", mend)
    return Row("template", "ok", f"{template.id} ({image.name}, {settings.profile})")


def check_build_tools() -> Row:
    """The tools that build guest images; needed only to build one."""
    missing = sorted({package for tool, package in BUILD_TOOLS.items() if shutil.which(tool) is None})
    if missing:
        return Row("image tools", "warn", f"missing: {', '.join(missing)}", f"apt-get install {' '.join(missing)}")
    return Row("image tools", "ok", ", ".join(BUILD_TOOLS))


def check_kernelspec() -> Row:
    """Jupyter knows the kernel, and the Python that it names exists."""
    from jupyter_client.kernelspec import KernelSpecManager

    mend = f"{Path(sys.prefix) / 'bin/agentvm'} install --sys-prefix"
    for name, folder in KernelSpecManager().find_kernel_specs().items():
        try:
            argv = json.loads((Path(folder) / "kernel.json").read_text())["argv"]
        except (OSError, ValueError, KeyError):
            continue
        if "agentvm_kernel" not in argv:
            continue
        if shutil.which(argv[0]) is None:
            return Row("kernelspec", "warn", f"{folder} names {argv[0]}, which is gone", mend)
        return Row("kernelspec", "ok", f"{name} in {folder}")
    return Row("kernelspec", "warn", "Jupyter does not know the kernel; only agentvm run works", mend)


def _limited(name: str, check: Callable[[], Row]) -> Row:
    """Run a check in a thread that may hang: libvirt can, and doctor is what one runs then."""
    rows: list[Row] = []

    def run() -> None:
        try:
            rows.append(check())
        except Exception as error:
            rows.append(Row(name, "fail", f"the check itself failed, {type(error).__name__}: {error}"))

    thread = threading.Thread(target=run, name=f"doctor {name}", daemon=True)
    thread.start()
    thread.join(CHECK_TIMEOUT_S)
    if not rows:
        return Row(
            name, "fail", f"no answer within {CHECK_TIMEOUT_S:g} s", _daemon_command() if name == "libvirt" else ""
        )
    return rows[0]


def _daemon_command() -> str:
    if Path("/run/systemd/system").is_dir():
        return "systemctl restart libvirtd"
    return "setsid tini -s -- libvirtd </dev/null >/var/log/libvirtd.log 2>&1 &"


def _libvirtd_under_tini() -> bool:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
            if "(libvirtd)" in text:
                parent = text.rpartition(")")[2].split()[1]
                return Path(f"/proc/{parent}/comm").read_text().strip() == "tini"
        except OSError:
            continue
    return False


def _last(text: str) -> str:
    lines: Sequence[str] = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def as_json(rows: Sequence[Row]) -> str:
    """Return the rows for programs."""
    return json.dumps([asdict(row) for row in rows], indent=1)
