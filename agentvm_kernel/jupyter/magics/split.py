"""Cuts a cell at its host magics: what comes between them runs in the guest, in order.

IPython's own input transformer finds the magics and `ast` tells which of them are statements of their own at the top level. Anything
else that looks like one (in a string, a comment, a loop, a function, an assignment, another magic's argument) stays part of the guest's
code, where a magic of the same name explains itself (see guest_runtime.kernel_launcher). Imports IPython, so it is imported only for
cells that mention a host magic.
"""

import ast
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from IPython.core.inputtransformer2 import TRANSFORM_LOOP_LIMIT, TransformerManager

from agentvm_kernel.jupyter.magics.names import CELL_MAGICS, HOST_MAGICS, LINE_MAGICS

Transform = Callable[[list[str]], list[str]]
HELP = ("pinfo", "pinfo2")
ALREADY_RUN = "# What stands above has run.\n"


@dataclass(frozen=True)
class Code:
    """Lines for the guest, as the user wrote them.

    Attributes:
        text: the lines, after as many others as there are above them in the cell: tracebacks count lines.
    """

    text: str


@dataclass(frozen=True)
class HostMagic:
    """One magic for the host.

    Attributes:
        name: such as "snapshot".
        line: the rest of its line.
        body: of a cell magic, the lines below.
        source: as the user wrote it.
        wants_help: it was written with a question mark.
    """

    name: str
    line: str
    source: str
    body: str | None = None
    wants_help: bool = False


Part = Code | HostMagic


def split(cell: str) -> list[Part]:
    """Return the parts of a cell in order; nothing when the whole cell is for the guest as it stands.

    Lines without any code are left out. A cell that is no valid Python is for the guest: it says so best.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the guest gives them, where the user sees them
            source, origins, transformed = _transform(cell)
            statements = ast.parse("".join(transformed)).body
    except (SyntaxError, ValueError, RecursionError, RuntimeError):
        return []
    found: list[tuple[int, int, HostMagic]] = []
    numbered = _numbered(transformed)
    for statement in statements:
        start = origins[numbered[statement.lineno - 1][0]][0]
        end = origins[numbered[(statement.end_lineno or statement.lineno) - 1][1]][1]
        magic = _host_magic(statement, "".join(source[start:end]))
        if magic is not None:
            found.append((start, end, magic))
    if not found:
        return []
    parts: list[Part] = []
    done = 0
    for start, end, magic in found:
        parts += _code(source, done, start)
        parts.append(magic)
        done = end
    return parts + _code(source, done, len(source))


def _transform(cell: str) -> tuple[list[str], list[tuple[int, int]], list[str]]:
    """Return the cell's lines (without prompts and common indentation), for each transformed line which of those it came from, and the
    transformed lines.
    """
    manager = TransformerManager()  # type: ignore[no-untyped-call]
    lines = (cell if cell.endswith("\n") else cell + "\n").splitlines(keepends=True)
    for clean in cast(list[Transform], manager.cleanup_transforms):
        lines = clean(lines)
    source = lines
    origins = [(number, number + 1) for number in range(len(lines))]
    for transform in cast(list[Transform], manager.line_transforms):
        lines = transform(lines)
    if len(lines) != len(source):
        # A cell magic: all in one line.
        return source, [(0, len(source))] * len(lines), lines
    for _ in range(TRANSFORM_LOOP_LIMIT):
        changed, after = manager.do_one_token_transform(lines)  # type: ignore[no-untyped-call]
        if not changed:
            return source, origins, after
        # Some lines have become one; those before and after them are as they were.
        first = next(
            (at for at, (old, new) in enumerate(zip(lines, after, strict=False)) if old != new), len(after) - 1
        )
        last = len(lines) - (len(after) - first - 1)
        origins[first:last] = [(origins[first][0], origins[last - 1][1])]
        lines = after
    raise RuntimeError("a cell that IPython does not finish transforming")


def _numbered(lines: list[str]) -> list[tuple[int, int]]:
    """Return for each line as Python counts them the first and last of `lines` in it: IPython also splits at form feeds."""
    numbered, first = [], 0
    for number, line in enumerate(lines):
        if line.endswith(("\n", "\r")):
            numbered.append((first, number))
            first = number + 1
    return [*numbered, (first, len(lines) - 1)]


def _host_magic(statement: ast.stmt, source: str) -> HostMagic | None:
    """Return the magic that this statement is, None when it is something else."""
    # A call that somebody wrote out may share its line with other code.
    if not source.lstrip().startswith(("%", "?")) or not isinstance(statement, ast.Expr):
        return None
    match statement.value:
        case ast.Call(
            func=ast.Attribute(value=ast.Call(func=ast.Name(id="get_ipython")), attr=attribute), args=arguments
        ):
            texts = [argument.value for argument in arguments if isinstance(argument, ast.Constant)]
        case _:
            return None
    match (attribute, texts):
        case ("run_line_magic", [str(help_magic), str(target)]) if help_magic in HELP and target.startswith("%"):
            name = target.strip().lstrip("%")
            return HostMagic(name, "", source, wants_help=True) if name in HOST_MAGICS else None
        case ("run_line_magic", [str(name), str(line)]) if name in LINE_MAGICS | CELL_MAGICS:
            return HostMagic(name, line, source)
        case ("run_cell_magic", [str(name), str(line), str(body)]) if name in LINE_MAGICS | CELL_MAGICS:
            return HostMagic(name, line, source, body)
    return None


def _code(source: list[str], start: int, end: int) -> list[Part]:
    lines = source[start:end]
    if not any(line.strip() and not line.lstrip().startswith("#") for line in lines):
        return []
    above = [ALREADY_RUN, *["\n"] * (start - 1)] if start else []
    return [Code("".join(above + lines))]
