"""How commands show amounts, times and tables to people. Standard library only; rich is imported by the function that needs it."""

import time
from collections.abc import Sequence
from datetime import datetime


def mib(size: int | None) -> str:
    """Return bytes as whole MiB; a dash where they are not known."""
    return "-" if size is None else f"{size / 1024**2:.0f}"


def duration(seconds: float | None) -> str:
    """Return a time span with its two largest units, such as "2 h 5 min"; a dash where it is not known."""
    if seconds is None:
        return "-"
    whole = int(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    while len(parts) > 1 and parts[0][0] == 0:
        parts = parts[1:]
    return " ".join(f"{number} {unit}" for number, unit in parts[:2] if number or parts[0][1] == unit)


def local_time(moment: str | float) -> str:
    """Return an ISO 8601 time, or seconds since the epoch, in local time."""
    try:
        seconds = datetime.fromisoformat(moment).timestamp() if isinstance(moment, str) else moment
    except ValueError:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows below their headings; text from outside is not taken for markup. Nothing is cut where the output is no terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = 10_000
    console.print(table)


def print_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in fields)
    for name, value in fields:
        print(f"{name:<{width}}  {value}")
