"""A guest of a hundred bytes: machines can be tested without a guest image, and under emulation they are up in half a second.

It is a "Linux kernel" as QEMU's -kernel understands it (https://docs.kernel.org/arch/x86/boot.html, protocol 2.01) that consists of
real-mode setup code only. It prints a line on the serial port, then either counts at physical address COUNTER, with a copy at MIRROR in
another page, until the ACPI power button is pressed, and switches off; or, as a panicking kernel does, resets the machine.
"""

import re
import struct
import subprocess
import time
from pathlib import Path

from agentvm_kernel.hypervisor.machine import Machine
from agentvm_kernel.image.store import Image

COUNTER = 0x10000
MIRROR = 0x11000
GREETING = "toy guest is up"

# .code16; assembled from:
#     cli; mov %cs,%ax; mov %ax,%ds; mov %ax,%es; mov %ax,%ss; mov $0xff00,%sp
#     mov $msg,%si                                 ; print msg
# 1:  lodsb; test %al,%al; jz 2f; mov $0x3f8,%dx; outb %al,%dx; jmp 1b
# 2:  mov $0x602,%dx; mov $0x100,%ax; outw %ax,%dx ; PM1_EN: the power button
#     mov $0x1000,%ax; mov %ax,%es
# spin: cmpb $0,action; jne act
#     incl %es:0; mov %es:0,%eax; mov %eax,%es:0x1000
#     mov $0x600,%dx; inw %dx,%ax; test $0x100,%ax; jz spin   ; PM1_STS
# off: mov $0x604,%dx; mov $0x2000,%ax; outw %ax,%dx; jmp off  ; PM1_CNT: S5
# act: mov $0xcf9,%dx; mov $6,%al; outb %al,%dx; jmp act       ; reset
_CODE = bytes.fromhex(
    "fa8cc88ed88ec08ed0bc00ffbed800ac84c07406baf803eeebf5ba0206b80001efb800108ec0803ed7000075222666ff0600002666a100002666a300"
    "10ba0006eda9000174e0ba0406b80020efebf7baf90cb006eeebf8"
)


def toy_kernel(*, panic: bool = False, deaf: bool = False) -> bytes:
    """Return the kernel image."""
    sector = bytearray(1024 + 512)
    sector[0x1F1] = 1  # setup_sects
    sector[0x1FE:0x200] = b"\x55\xaa"
    sector[0x200:0x202] = b"\xeb\x7e"  # jump to the code at 0x280
    sector[0x202:0x206] = b"HdrS"
    sector[0x206:0x208] = struct.pack("<H", 0x201)
    message = b"Kernel panic - not syncing: toy\n" if panic else GREETING.encode() + b"\n"
    # mov $0x100,%ax before writing PM1_EN: a deaf guest writes 0.
    code = _CODE.replace(b"\xb8\x00\x01\xef", b"\xb8\x00\x00\xef") if deaf else _CODE
    code += (b"\x01" if panic else b"\x00") + message + b"\x00"
    sector[0x280 : 0x280 + len(code)] = code
    return bytes(sector)


def toy_image(folder: Path, **options: bool) -> Image:
    """Return an image that boots the toy kernel from an empty disk of 64 MiB."""
    folder.mkdir(parents=True)
    folder.parent.chmod(0o711)  # QEMU's user has to pass through
    (folder / "vmlinuz").write_bytes(toy_kernel(**options))
    (folder / "initramfs").write_bytes(b"")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "root.qcow2", "64M"], check=True)
    return Image(
        digest="0" * 64, name="toy", folder=folder, disk=folder / "root.qcow2", kernel=folder / "vmlinuz",
        initramfs=folder / "initramfs", python_version="3.11", preload=(), created=0.0, size=0,
    )  # fmt: skip


def counter(machine: Machine, address: int = COUNTER) -> int:
    """Read a word of the guest's memory."""
    text = machine.qmp("human-monitor-command", command_line=f"xp /1wd {address:#x}")
    match = re.search(r":\s+(-?\d+)", text)
    assert match, text
    return int(match[1])


def wait_until_counting(machine: Machine, timeout_s: float = 20.0) -> int:
    """Wait for the guest to be in its loop. Nothing tells the host of it, so the memory is looked at again and again."""
    deadline = time.monotonic() + timeout_s
    first = None
    while time.monotonic() < deadline:
        if GREETING in machine.console_tail():
            now = counter(machine)
            if first is not None and now != first:
                return now
            first = now
        time.sleep(0.02)
    raise AssertionError(f"the toy guest does not count; console: {machine.console_tail()!r}")
