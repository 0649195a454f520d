"""Runs inside the outer guest: starts an inner machine with a vhost-vsock device, talks to it over AF_VSOCK, freezes it, thaws it under
another CID and talks to that.

Prints one line of JSON with what was seen. The transport and the runtime are the product's own code, unpacked beside this script; there is
no libvirt here, so QEMU is given the commands that `hypervisor.freeze` and `hypervisor.thaw` give it.
"""

import asyncio
import base64
import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from agentvm_kernel.errors import AgentVMError, AuthenticationError, ConnectionClosed
from agentvm_kernel.hypervisor import qcow2
from agentvm_kernel.transport import host
from agentvm_kernel.transport.address import VsockAddress
from agentvm_kernel.transport.connection import open_connection

FOLDER = Path(__file__).parent
CID, THAWED_CID = 42, 43
PORT = 5005
SECRET = b"s" * 32
MEMORY_MIB = 320
MEMORY = Path("/dev/shm/inner")
OVERLAY = FOLDER / "overlay.qcow2"
SERIAL = FOLDER / "serial.log"
BOOT_S = 1500
"""Emulation in emulation, on a host that does other things as well."""


class Inner:
    """One QEMU with the inner machine in it.

    Args:
        cid: of its vsock.
        shared: it writes to the memory file; otherwise its writes are its own.
        arguments: further ones for QEMU.
    """

    def __init__(self, cid: int, *, shared: bool, arguments: list[str]) -> None:
        self.address = VsockAddress(cid, PORT)
        monitor = FOLDER / f"monitor-{cid}"
        memory = f"memory-backend-file,id=memory,mem-path={MEMORY},size={MEMORY_MIB}M,share={'on' if shared else 'off'}"
        self.process = subprocess.Popen(
            [
                "qemu-system-x86_64", "-accel", "tcg", "-object", memory, "-machine", "q35,memory-backend=memory",
                "-m", str(MEMORY_MIB), "-nodefaults", "-display", "none", "-no-reboot",
                "-chardev", f"file,id=serial,path={SERIAL},append=on", "-serial", "chardev:serial",
                "-qmp", f"unix:{monitor},server=on,wait=off",
                "-drive", f"file={OVERLAY},if=virtio,format=qcow2,cache=unsafe",
                "-device", f"vhost-vsock-pci,guest-cid={cid}", *arguments,
            ]
        )  # fmt: skip
        self._monitor = self._connect(monitor)
        self.qmp("qmp_capabilities")

    def _connect(self, path: Path) -> Any:
        deadline = time.monotonic() + 120
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(path))
                break
            except OSError:
                connection.close()
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise
                time.sleep(0.1)
        stream = connection.makefile("rw", buffering=1)
        stream.readline()  # the greeting
        return stream

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a command of QEMU's monitor."""
        self._monitor.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        while True:
            reply = json.loads(self._monitor.readline())
            if "error" in reply:
                raise RuntimeError(f"{command}: {reply['error']['desc']}")
            if "return" in reply:
                return reply["return"]

    def end(self) -> None:
        """Kill it, if it still runs."""
        self.process.kill()
        self.process.wait()


def make_overlay() -> None:
    """The inner machine boots from the outer's own disk, which it sees as it is now."""
    os.sync()
    with open("/dev/vda", "rb") as disk:
        size = disk.seek(0, os.SEEK_END)
    # The product's overlays are on qcow2 images only.
    qcow2.virtual_size = lambda _: size
    qcow2.create_overlay(OVERLAY, Path("/dev/vda"))
    with open(OVERLAY, "r+b") as image:
        image.seek(qcow2.HEADER.size)
        image.write(struct.pack(">II8s", qcow2.BACKING_FORMAT, 3, b"raw"))


async def talk(inner: Inner, seen: dict[str, object]) -> None:
    """All that a host does with a machine over vsock, up to the clean boundary at which it is frozen."""
    began = time.monotonic()
    connection = await open_connection(inner.address, SECRET, timeout_s=BOOT_S)
    seen["connected_s"] = round(time.monotonic() - began, 1)
    seen["ready"] = connection.ready
    pings = []
    for _ in range(20):
        began = time.monotonic()
        await connection.call("ping", timeout_s=30)
        pings.append(time.monotonic() - began)
    seen["ping_ms"] = round(sorted(pings)[len(pings) // 2] * 1000, 1)
    seen["kernel"] = (await connection.call("system", timeout_s=30))["kernel"]
    await connection.close()
    try:
        await open_connection(inner.address, b"wrong" * 8, timeout_s=60)
        seen["wrong_secret"] = "accepted"
    except AuthenticationError as error:
        seen["wrong_secret"] = f"refused: {error}"
    began = time.monotonic()
    connection = await open_connection(inner.address, SECRET, timeout_s=60)
    seen["reconnected_ms"] = round((time.monotonic() - began) * 1000, 1)
    await connection.close()


def freeze(inner: Inner, seen: dict[str, object]) -> Path:
    """Save the devices' state beside the memory file, and end the machine."""
    state = FOLDER / "state"
    began = time.monotonic()
    inner.qmp("stop")
    inner.qmp("xen-save-devices-state", filename=str(state), live=False)
    seen["frozen_s"] = round(time.monotonic() - began, 2)
    inner.qmp("quit")
    inner.process.wait(60)
    return state


def thaw(state: Path, seen: dict[str, object]) -> Inner:
    """Start a machine that maps the memory privately and loads the state; it is paused."""
    began = time.monotonic()
    incoming = FOLDER / "incoming"
    arguments = ["-S", "-global", "migration.send-configuration=off", "-incoming", "defer"]
    inner = Inner(THAWED_CID, shared=False, arguments=arguments)
    try:
        inner.qmp("migrate-incoming", uri=f"unix:{incoming}")
        with socket.socket(socket.AF_UNIX) as feed:
            feed.connect(str(incoming))
            feed.sendall(state.read_bytes())
        while (status := inner.qmp("query-migrate").get("status")) != "completed":
            if status == "failed" or inner.process.poll() is not None:
                raise RuntimeError(f"QEMU did not load the state: {status}")
            time.sleep(0.02)
    except BaseException:
        inner.end()
        raise
    seen["loaded_s"] = round(time.monotonic() - began, 2)
    return inner


async def talk_again(inner: Inner, seen: dict[str, object]) -> None:
    """Connect to the thawed machine at once: its guest has yet to handle the reset of its vsock, which ends connections."""
    began = time.monotonic()
    inner.qmp("cont")
    attempts = 0
    while True:
        attempts += 1
        connection = await open_connection(inner.address, SECRET, timeout_s=120)
        try:
            seen["awake"] = await connection.call("wake", _fresh(), timeout_s=60)
            for _ in range(20):
                await connection.call("ping", timeout_s=30)
            break
        except ConnectionClosed:
            if attempts > 5:
                raise
    seen["thawed_s"] = round(time.monotonic() - began, 2)
    seen["attempts"] = attempts
    seen["thawed_ready"] = connection.ready
    try:
        await open_connection(VsockAddress(CID, PORT), SECRET, timeout_s=2)
        seen["old_cid"] = "answers"
    except AgentVMError as error:
        seen["old_cid"] = f"silent: {error}"
    await connection.call("shutdown", timeout_s=30)
    seen["closed"] = await asyncio.wait_for(connection.closed, 120)


def _fresh() -> dict[str, Any]:
    return {"entropy": base64.b64encode(os.urandom(64)).decode(), "time_ns": time.time_ns()}


def main() -> None:
    """Do it all."""
    subprocess.run(["modprobe", "vhost_vsock"], check=True)
    seen: dict[str, object] = {"vsock_available": host.vsock_available()}
    make_overlay()
    MEMORY.touch(mode=0o600)
    os.truncate(MEMORY, MEMORY_MIB << 20)
    kernel = max(Path("/boot").glob("vmlinuz-*"))
    cmdline = "console=ttyS0 panic=-1 mitigations=off no_timer_check lpj=4000000 random.trust_cpu=on"
    boot = ["-kernel", str(kernel), "-initrd", str(FOLDER / "initrd"), "-append", cmdline]
    inner = Inner(CID, shared=True, arguments=boot)
    try:
        asyncio.run(talk(inner, seen))
        state = freeze(inner, seen)
        inner = thaw(state, seen)
        asyncio.run(talk_again(inner, seen))
        inner.process.wait(300)
        print(json.dumps(seen))
    except BaseException:
        print(seen, file=sys.stderr)
        print(SERIAL.read_text(errors="replace")[-3000:] if SERIAL.exists() else "no serial log", file=sys.stderr)
        raise
    finally:
        inner.end()
        MEMORY.unlink()


if __name__ == "__main__":
    main()
