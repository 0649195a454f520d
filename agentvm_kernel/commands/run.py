"""`agentvm run`: execute a notebook in a machine, without a browser. Imports nothing heavy before it runs."""

import argparse
import math

NAME = "run"
HELP = "execute a notebook in a virtual machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("notebook", help="the notebook to execute; it is not changed unless OUT is the same file")
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="executed notebook (default: NAME.out.ipynb beside NAME.ipynb)"
    )
    parser.add_argument(
        "-p",
        "--parameter",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="set a variable after the cell tagged `parameters`; VALUE is a Python literal or JSON, else a string (repeatable)",
    )
    parser.add_argument(
        "--timeout", metavar="S", type=_seconds, help="seconds that one cell may take (default: no limit)"
    )
    parser.add_argument("--allow-errors", action="store_true", help="go on after a cell that failed")
    parser.add_argument(
        "--input", metavar="TEXT", action="append", default=[], help="answer to input(), in order (repeatable)"
    )
    parser.add_argument("--profile", metavar="P", help="size of the machine: light, standard or intensive")
    parser.add_argument(
        "--from", dest="start_from", metavar="SNAPSHOT", help="start in the state of this snapshot (name or id)"
    )
    parser.add_argument("--kernel", metavar="NAME", help="use this installed kernel instead of a machine")


def execute(options: argparse.Namespace) -> int:
    """Execute the notebook; 0 when every cell succeeded."""
    from agentvm_kernel.run import RunOptions, run_notebook

    return run_notebook(
        RunOptions(
            notebook=options.notebook,
            output=options.output,
            parameters=options.parameter,
            timeout_s=options.timeout,
            allow_errors=options.allow_errors,
            answers=options.input,
            profile=options.profile,
            kernel=options.kernel,
            start_from=options.start_from,
            verbose=getattr(options, "verbose", False) or getattr(options, "debug", False),
        )
    )


def _seconds(text: str) -> float:
    seconds = float(text)
    if not (math.isfinite(seconds) and seconds > 0):
        raise argparse.ArgumentTypeError("must be a positive number of seconds")
    return seconds
