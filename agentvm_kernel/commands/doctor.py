"""`agentvm doctor`: what this host lacks, and the commands that mend it. Imports nothing heavy before it runs."""

import argparse

NAME = "doctor"
HELP = "find out what this host lacks for running machines"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def execute(options: argparse.Namespace) -> int:
    """Print what was found; 1 when machines cannot run."""
    from agentvm_kernel.doctor import as_json, examine

    rows = examine()
    failed = any(row.status == "fail" for row in rows)
    if options.json:
        print(as_json(rows))
        return int(failed)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(Text(row.status, style=styles[row.status]), Text(row.name), Text(row.detail))
    console = Console(highlight=False)
    console.print(table)
    # Commands stand by themselves, so that they can be copied whole.
    for row in rows:
        if row.mend and row.status != "ok":
            console.print(Text(f"\nTo mend {row.name}:"), Text(f"  {row.mend}"), sep="\n", soft_wrap=True)
    console.print(f"\n{'Machines cannot run on this host yet.' if failed else 'Machines can run on this host.'}")
    return int(failed)
