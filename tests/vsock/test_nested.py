"""The primary transport for real: an outer guest with vhost_vsock runs an inner guest, and the host's code there talks AF_VSOCK to it.

Hosts that run these tests may have no /dev/vhost-vsock, so the host is a guest. The outer guest is an ordinary kernel of ours with an image
that has QEMU in it; everything that the inner machine needs travels in through a cell.
"""

import base64
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from queue import Empty

import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import KernelManager

from agentvm_kernel.image import initramfs
from agentvm_kernel.image.build import build_image
from agentvm_kernel.image.spec import load_spec

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(2700)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outer() -> Iterator[BlockingKernelClient]:
    image = build_image(load_spec(Path(__file__).with_name("vsock-host.toml")))
    manager = KernelManager()
    manager._kernel_spec = KernelSpec(
        argv=[sys.executable, "-m", "agentvm_kernel", "-f", "{connection_file}"], language="python"
    )
    manager.start_kernel(env={**os.environ, "AGENTVM_IMAGE": image.digest})
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run(client: BlockingKernelClient, code: str, timeout_s: float) -> str:
    """Run a cell and return what it printed."""
    shown: list[str] = []

    def on_output(message: dict[str, dict[str, str]]) -> None:
        content = message["content"]
        shown.append(content.get("text", "") or "\n".join(content.get("traceback", [])))

    try:
        reply = client.execute_interactive(code, timeout=timeout_s, output_hook=on_output)
    except (TimeoutError, Empty):
        pytest.fail(f"no reply within {timeout_s} s; until then: {''.join(shown)}")
    assert reply["content"]["status"] == "ok", "".join(shown)
    return "".join(shown)


def archive() -> str:
    """What the inner machine and its host need, as a tar in base64."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name in (
            "agentvm_kernel/__init__.py",
            "agentvm_kernel/errors.py",
            "agentvm_kernel/log.py",
            "agentvm_kernel/hypervisor/__init__.py",
            "agentvm_kernel/hypervisor/qcow2.py",
            "agentvm_kernel/transport",
        ):
            tar.add(ROOT / name, name, filter=lambda entry: None if "__pycache__" in entry.name else entry)
        tar.add(
            ROOT / "guest_runtime", "guest_runtime", filter=lambda entry: None if "__pycache__" in entry.name else entry
        )
        tar.add(Path(__file__).with_name("inside.py"), "inside.py")
        image = build_image(load_spec(Path(__file__).with_name("vsock-host.toml")))
        initrd = initramfs.machine_initrd(image, {"kernel": False}, b"s" * 32)
        entry = tarfile.TarInfo("initrd")
        entry.size = len(initrd)
        tar.addfile(entry, io.BytesIO(initrd))
    return base64.b64encode(out.getvalue()).decode()


def test_loopback_vsock_in_a_guest(outer: BlockingKernelClient) -> None:
    code = """
import socket, subprocess
subprocess.run(["sudo", "modprobe", "vsock_loopback"], check=True)
with socket.socket(socket.AF_VSOCK) as probe:
    probe.settimeout(10)
    probe.connect((1, 5005))  # VMADDR_CID_LOCAL: the machine's own agent
    print("connected")
"""
    assert "connected" in run(outer, code, 300)


def test_a_machine_reached_over_vhost_vsock_and_again_when_it_was_frozen_and_thawed_under_another_cid(
    outer: BlockingKernelClient,
) -> None:
    unpack = f"""
import base64, io, tarfile, pathlib
folder = pathlib.Path.home() / "nested"
tarfile.open(fileobj=io.BytesIO(base64.b64decode({archive()!r}))).extractall(folder)
print(sorted(path.name for path in folder.iterdir()))
"""
    print(run(outer, unpack, 300))
    code = """
import subprocess
done = subprocess.run(["sudo", "env", "PYTHONPATH=" + str(folder), "/opt/notebook/bin/python3", str(folder / "inside.py")],
                      capture_output=True, text=True)
print(done.stdout, done.stderr)
assert done.returncode == 0
"""
    shown = run(outer, code, 2400)
    seen = json.loads(next(line for line in shown.splitlines() if line.startswith("{")))
    print(seen)
    assert seen["vsock_available"] is True
    assert seen["ready"]["runtime"]
    assert str(seen["wrong_secret"]).startswith("refused")
    # Thawed, not booted again: the same agent process, on another CID.
    assert seen["thawed_ready"]["pid"] == seen["ready"]["pid"]
    assert seen["thawed_ready"]["running_s"] > seen["ready"]["running_s"]
    assert seen["awake"] == {"entropy": True, "time": True}
    assert str(seen["old_cid"]).startswith("silent")
