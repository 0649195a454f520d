"""Run by test_hypervisor_session.py as a normal user: everything that machines go through, under the user's own libvirt.

Prints one line of JSON with what was seen. It knows nothing of pytest, which that user may not be able to read.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from toy_guest import counter, toy_image, wait_until_counting

from agentvm_kernel.hypervisor import mechanism
from agentvm_kernel.hypervisor.boot import boot_machine
from agentvm_kernel.hypervisor.connection import Hypervisor
from agentvm_kernel.hypervisor.files import machines_dir, sockets_dir
from agentvm_kernel.hypervisor.freeze import freeze_live, freeze_template
from agentvm_kernel.hypervisor.garbage import delete
from agentvm_kernel.hypervisor.reap import reap
from agentvm_kernel.hypervisor.snapshot import list_all
from agentvm_kernel.hypervisor.thaw import thaw


def main() -> None:
    seen: dict[str, object] = {"user": os.geteuid()}
    with Hypervisor() as hypervisor:
        seen["uri"], seen["way"] = hypervisor.uri, mechanism.choose(hypervisor).kind
        image = toy_image(Path(tempfile.mkdtemp()) / "image")
        machine = boot_machine(hypervisor, image, "light", template=True)
        wait_until_counting(machine)
        seen["qemu_user"] = os.stat(f"/proc/{machine.qemu_pid}").st_uid
        template = freeze_template(machine)
        began = time.monotonic()
        first, second = thaw(hypervisor, template), thaw(hypervisor, template)
        seen["two_thaws_s"] = round(time.monotonic() - began, 2)
        start = counter(first)
        seen["same_start"] = start == counter(second) > 0
        first.resume()
        while counter(first) == start:
            pass
        live = freeze_live(first, name="live")
        seen["pause_s"] = round(live.pause_s, 3)
        again = thaw(hypervisor, live)
        seen["went_on"] = start < counter(again) <= counter(first)
        seen["second_stood_still"] = counter(second) == start
        for each in (first, second, again):
            each.destroy()
        delete(live)
        delete(template)
        reap(hypervisor)
        seen["left"] = [path.name for folder in (machines_dir(), sockets_dir()) for path in folder.iterdir()]
        seen["left"] += [snapshot.id for snapshot in list_all()] + [domain.name() for domain in hypervisor.domains()]
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main()
