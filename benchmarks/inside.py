"""The host's end of `inside_probe.py`: has a guest measure its own ipykernel from inside."""

import json
import time
from pathlib import Path

from benchmarks.kernels import Kernel

PROBE = Path(__file__).with_name("inside_probe.py")
FOLDER = "/tmp/agentvm-bench"
WAIT_S = 120.0


class Inside:
    """The probe in a guest.

    Args:
        guest: a kernel of ours.
    """

    def __init__(self, guest: Kernel) -> None:
        self._guest = guest
        self._number = 0
        self._expected_s = 1.0
        guest.ask(
            "import os, subprocess, sys\n"
            "from ipykernel.connect import get_connection_file\n"
            f"os.makedirs({FOLDER!r})\n"
            f"open({FOLDER + '/probe.py'!r}, 'w').write({PROBE.read_text()!r})\n"
            f"_probe = subprocess.Popen([sys.executable, {FOLDER + '/probe.py'!r}, get_connection_file(), {FOLDER!r}],"
            f" stdin=subprocess.PIPE, stderr=open({FOLDER + '/log'!r}, 'w'), text=True)"
        )

    def cells(self, code: str, count: int) -> list[float]:
        """Seconds that each of `count` cells took."""
        return self._measure(code, count, 0)

    def printed(self, code: str, size: int) -> float:
        """MB/s of a cell that prints `size` characters."""
        return self._measure(code, 1, size)[0]

    def _measure(self, code: str, count: int, size: int) -> list[float]:
        self._number += 1
        request = json.dumps([self._number, code, count, size])
        self._guest.ask(f"_probe.stdin.write({request + chr(10)!r}); _probe.stdin.flush()")
        answer = f"{FOLDER}/{self._number}"
        look = (
            f"print(open({answer!r}).read() if os.path.exists({answer!r}) else '')\n"
            f"if _probe.poll() is not None: raise RuntimeError(open({FOLDER + '/log'!r}).read()[-1000:])"
        )
        began = time.monotonic()
        # Looking disturbs what is measured, so it begins when that should be over.
        pause = self._expected_s
        while time.monotonic() - began < WAIT_S:
            time.sleep(pause)
            if text := self._guest.ask(look)[1].strip():
                self._expected_s = max(0.3, min(1.1 * (time.monotonic() - began), 20.0) - 0.3)
                times: list[float] = json.loads(text)
                return times
            pause = 0.5
        raise TimeoutError(f"the probe in the guest did not answer within {WAIT_S:g} s")
