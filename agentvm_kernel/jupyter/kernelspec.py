"""The kernelspec: how Jupyter finds and starts this kernel. Loads jupyter_client only when something is installed."""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

RESOURCES = Path(__file__).parent / "resources"


def kernel_dict(display_name: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Return the content of kernel.json.

    Args:
        display_name: what launchers show.
        env: variables for the kernel process, AGENTVM_… settings for one.
    """
    return {
        "argv": [sys.executable, "-m", "agentvm_kernel", "-f", "{connection_file}"],
        "display_name": display_name,
        "language": "python",
        # A signal would reach this process only; the message is passed on to the guest.
        "interrupt_mode": "message",
        "kernel_protocol_version": "5.5",
        "metadata": {"debugger": True, "supported_encryption": ["curve"]},
        "env": env or {},
    }


def write(folder: Path, display_name: str, env: dict[str, str] | None = None) -> None:
    """Write kernel.json and the logos to a new folder."""
    shutil.copytree(RESOURCES, folder)
    (folder / "kernel.json").write_text(json.dumps(kernel_dict(display_name, env), indent=1), encoding="utf-8")


def install(
    user: bool = False,
    sys_prefix: bool = False,
    prefix: str | None = None,
    name: str = "agentvm",
    display_name: str = "Python 3 (agentvm)",
    env: dict[str, str] | None = None,
) -> Path:
    """Install the kernelspec where Jupyter looks for it, replacing an older one of this name.

    Args:
        user: for this user only.
        sys_prefix: into the environment of the running Python.
        prefix: into this prefix; with none of the three, for all users of the machine.
        name: folder of the kernelspec; clients call the kernel by it.
        display_name: what launchers show.
        env: variables for the kernel process.

    Returns:
        The folder of the installed kernelspec.

    Raises:
        OSError: the place cannot be written.
        ValueError: `name` is not a valid kernel name.
    """
    from jupyter_client.kernelspec import KernelSpecManager

    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "kernel"  # the name may be anything until Jupyter has checked it
        write(source, display_name, env)
        target = KernelSpecManager().install_kernel_spec(
            str(source), kernel_name=name, user=user, prefix=sys.prefix if sys_prefix else prefix
        )
    return Path(target)
