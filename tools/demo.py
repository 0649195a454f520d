"""Runs the quickstart notebook in a machine and prints what that proves. `make demo` calls it."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "quickstart.ipynb"


def main() -> int:
    """Run it, then read the proof out of the executed notebook."""
    OUT.parent.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "agentvm_kernel.cli",
        "run",
        str(ROOT / "notebooks" / "quickstart.ipynb"),
        "-o",
        str(OUT),
    ]
    done = subprocess.run([*command, "-p", "who=the reader", "--input", "Ada"], check=False)
    if done.returncode != 0:
        return done.returncode
    cells = {cell.id: cell for cell in nbformat.read(OUT, as_version=4).cells}
    guest = dict(
        line.split(None, 2)[1:] if line.startswith("host") else line.split(None, 1)
        for line in text(cells["where"]).splitlines()
    )
    print()
    print(f"               {'in the notebook':28} on this computer")
    print(f"  host name    {guest['name']:28} {platform.node()}")
    print(f"  Linux kernel {guest['kernel']:28} {platform.release()}")
    print()
    for what, proof in (
        ("a pandas table", "text/html" in data(cells["table"])),
        ("a matplotlib picture", "image/png" in data(cells["picture"])),
        ("a widget, moved by code", "stands at 7" in text(cells["widget-set"])),
        ("input() answered", "Hello, Ada!" in text(cells["question"])),
    ):
        print(f"  {'yes' if proof else 'NO '}  {what}")
        if not proof:
            return 1
    print(f"\nThe executed notebook: {OUT}")
    return 0


def text(cell: Any) -> str:
    """What a cell printed."""
    return "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")


def data(cell: Any) -> dict[str, Any]:
    """All formats of what a cell showed."""
    return {kind: value for output in cell.outputs for kind, value in output.get("data", {}).items()}


if __name__ == "__main__":
    raise SystemExit(main())
