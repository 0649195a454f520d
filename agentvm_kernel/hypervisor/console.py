"""What guests write to their serial consoles, made safe to show: a hostile guest may write anything there.

libvirt's virtlogd begins a new file when one is full (virtlogd.conf(5)), so whoever follows a console has to notice that. Standard library
only: the kernel process imports this module.
"""

import codecs
import os
from pathlib import Path

TAIL_BYTES = 65536
BLOCK = 65536


def clean(text: str) -> str:
    """Return the text without what could move a terminal's cursor, change its colours or turn its writing direction round."""
    return "".join(character for character in text if character in "\n\t" or character.isprintable())


def tail(path: Path, lines: int) -> str:
    """Return the last lines of a console, clean; empty where nothing was written yet.

    Args:
        path: of the serial log.
        lines: how many at most; no more than TAIL_BYTES are looked at.
    """
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            text = file.read(TAIL_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(clean(text).splitlines()[-lines:])


class Reader:
    """Reads a console from its beginning, as it grows.

    Args:
        path: of the serial log.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self) -> str:
        """Return what has come since the last call, clean; empty when there is nothing new."""
        if data := self._file.read(BLOCK):
            return clean(self._decoder.decode(data))
        if self._replaced():
            self._file.close()
            self._file = open(self._path, "rb", buffering=0)  # noqa: SIM115
            return clean(self._decoder.decode(self._file.read(BLOCK)))
        return ""

    def _replaced(self) -> bool:
        try:
            return self._path.stat().st_ino != os.fstat(self._file.fileno()).st_ino
        except FileNotFoundError:
            return False  # the machine is being removed
