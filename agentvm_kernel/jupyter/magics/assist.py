"""Tab and Shift-Tab on the line of a host magic; everything else is the guest's to complete and to explain."""

import re
from collections.abc import Mapping
from typing import Any

from agentvm_kernel.jupyter.magics.arguments import HostMagic
from agentvm_kernel.jupyter.magics.notebook import Notebook

_MAGIC_LINE = re.compile(r"[ \t]*\??[ \t]*%{1,2}(\w+)\??(?=\s|$)")
_TAKES_TEXT = ("-d", "--description", "--keep")


def complete(magics: Mapping[str, HostMagic], notebook: Notebook, code: str, cursor: int) -> dict[str, Any] | None:
    """Return the content of a complete_reply; None where the cursor is not among the words of a host magic.

    Args:
        magics: by name.
        notebook: whose snapshots are offered.
        code: the cell.
        cursor: in characters from its beginning.
    """
    cursor = min(max(cursor, 0), len(code))
    line = code[code.rfind("\n", 0, cursor) + 1 : cursor]
    match = _MAGIC_LINE.match(line)
    magic = magics.get(match[1]) if match else None
    if match is None or magic is None or match.end() == len(line):
        return None
    typed = line[match.end() :]
    current = re.split(r"\s", typed)[-1]
    before = typed[: len(typed) - len(current)].split()
    offered: list[str] = []
    if not (before and before[-1] in _TAKES_TEXT):
        offered = [*dict.fromkeys(magic.words(notebook, before)), *magic.options().option_names()]
    matches = [word for word in offered if word.startswith(current) and word not in before]
    start = cursor - len(current)
    types = [
        {"start": start, "end": cursor, "text": word, "type": "param" if word.startswith("-") else "magic"}
        for word in matches
    ]
    return {
        "status": "ok",
        "matches": matches,
        "cursor_start": start,
        "cursor_end": cursor,
        "metadata": {"_jupyter_types_experimental": types},
    }


def inspect(magics: Mapping[str, HostMagic], code: str, cursor: int) -> dict[str, Any] | None:
    """Return the content of an inspect_reply; None where the cursor is not on the line of a host magic."""
    cursor = min(max(cursor, 0), len(code))
    match = _MAGIC_LINE.match(code[code.rfind("\n", 0, cursor) + 1 :].partition("\n")[0])
    magic = magics.get(match[1]) if match else None
    if magic is None:
        return None
    return {"status": "ok", "found": True, "data": {"text/plain": magic.help()}, "metadata": {}}
