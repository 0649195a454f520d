"""Runs inside the outer guest: starts an inner machine with a vhost-vsock device and talks to it over AF_VSOCK.

Prints one line of JSON with what was seen. The transport and the runtime are the product's own code, unpacked beside this script.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from agentvm_kernel.errors import AuthenticationError
from agentvm_kernel.transport import host
from agentvm_kernel.transport.address import VsockAddress
from agentvm_kernel.transport.connection import open_connection

CID = 42
PORT = 5005
SECRET = b"s" * 32


async def talk() -> dict[str, object]:
    seen: dict[str, object] = {"vsock_available": host.vsock_available()}
    began = time.monotonic()
    connection = await open_connection(VsockAddress(CID, PORT), SECRET, timeout_s=700)
    seen["connected_s"] = round(time.monotonic() - began, 1)
    seen["ready"] = connection.ready
    pings = []
    for _ in range(20):
        began = time.monotonic()
        await connection.call("ping", timeout_s=30)
        pings.append(time.monotonic() - began)
    seen["ping_ms"] = round(sorted(pings)[len(pings) // 2] * 1000, 1)
    seen["hostname"] = (await connection.call("system", timeout_s=30))["kernel"]
    await connection.close()
    try:
        await open_connection(VsockAddress(CID, PORT), b"wrong" * 8, timeout_s=60)
        seen["wrong_secret"] = "accepted"
    except AuthenticationError as error:
        seen["wrong_secret"] = f"refused: {error}"
    began = time.monotonic()
    connection = await open_connection(VsockAddress(CID, PORT), SECRET, timeout_s=60)
    seen["reconnected_ms"] = round((time.monotonic() - began) * 1000, 1)
    await connection.call("shutdown", timeout_s=30)
    seen["closed"] = await asyncio.wait_for(connection.closed, 60)
    return seen


def main() -> None:
    folder = Path(__file__).parent
    subprocess.run(["modprobe", "vhost_vsock"], check=True)
    kernel = max(Path("/boot").glob("vmlinuz-*"))
    # The inner machine boots from the outer's own disk, which it sees as it is now and changes only in memory.
    os.sync()
    log = folder / "serial.log"
    qemu = subprocess.Popen(
        [
            "qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-m", "320", "-nodefaults",
            "-display", "none", "-no-reboot", "-kernel", str(kernel), "-initrd", str(folder / "initrd"),
            "-append", "console=ttyS0 panic=-1 mitigations=off no_timer_check lpj=4000000 random.trust_cpu=on", "-serial", f"file:{log}",
            "-drive", "file=/dev/vda,if=virtio,format=raw,snapshot=on", "-device", f"vhost-vsock-pci,guest-cid={CID}",
        ]
    )  # fmt: skip
    try:
        print(json.dumps(asyncio.run(talk())))
        qemu.wait(60)
    except Exception:
        print(log.read_text()[-3000:] if log.exists() else "no serial log", file=sys.stderr)
        raise
    finally:
        qemu.kill()
        qemu.wait()


if __name__ == "__main__":
    main()
