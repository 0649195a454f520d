"""The names of the host magics, and a quick look whether a cell may hold one. Standard library only: every kernel start imports this."""

import re

LINE_MAGICS = frozenset({"snapshot", "restore", "undo", "vm", "pool"})
CELL_MAGICS = frozenset({"fork"})
HOST_MAGICS = LINE_MAGICS | CELL_MAGICS

_MENTION = re.compile(r"%(?:" + "|".join(sorted(HOST_MAGICS)) + r")(?!\w)")


def mentions(code: str) -> bool:
    """Return whether a cell's text contains the name of a host magic after a percent sign; only then is it worth splitting."""
    return "%" in code and _MENTION.search(code) is not None
