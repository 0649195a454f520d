"""The command `agentvm`. Imports next to nothing, so that its help comes at once; commands import what they need when they run.

A new command is a module in `commands/` and a line in COMMANDS.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Protocol

from agentvm_kernel import __version__
from agentvm_kernel.commands import (
    destroy,
    doctor,
    image,
    install,
    logs,
    pool,
    run,
    snapshot,
    status,
    template,
    version,
)
from agentvm_kernel.commands import list as list_command
from agentvm_kernel.errors import AgentVMError

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130


class Command(Protocol):
    """A module of `commands/`."""

    NAME: str
    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""

    def execute(self, options: argparse.Namespace) -> int:
        """Run the command and return the exit code."""


COMMANDS: tuple[Command, ...] = (
    run,
    install,
    list_command,
    status,
    logs,
    destroy,
    snapshot,
    image,
    template,
    pool,
    doctor,
    version,
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("-v", "--verbose", action="store_true", help="log what is being done")
    common.add_argument("--debug", action="store_true", help="log everything, and show tracebacks of errors")
    top = argparse.ArgumentParser(
        prog="agentvm",
        description="A Jupyter kernel whose cells run in a virtual machine, and what belongs to it.",
        epilog="`agentvm COMMAND --help` tells more. Something does not work? `agentvm doctor`.",
        parents=[common],
    )
    top.add_argument("--version", action="version", version=f"agentvm {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(
            command.NAME, help=command.HELP, description=_sentence(command.HELP), parents=[common]
        )
        command.add_arguments(sub)
        sub.set_defaults(execute=command.execute)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `agentvm`; return its exit code: 0, 1 for an error, 2 for wrong usage, 130 for ctrl-C."""
    options = parser().parse_args(arguments)
    debug = getattr(options, "debug", False)
    if debug or getattr(options, "verbose", False):
        from agentvm_kernel import log

        log.configure(level="debug" if debug else "info")
    try:
        code: int = options.execute(options)
        sys.stdout.flush()
        return code
    except AgentVMError as error:
        if debug:
            raise
        say_error(error.message, error.hint)
        return EXIT_ERROR
    except KeyboardInterrupt:
        say_error("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as `agentvm … | head` does; Python must not try to flush once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except Exception as error:
        if debug:
            raise
        say_error(f"internal error, {type(error).__name__}: {error}", "`agentvm --debug …` shows where.")
        return EXIT_ERROR


def say_error(message: str, hint: str = "") -> None:
    """Print an error for people on standard error."""
    print(f"agentvm: {message}", file=sys.stderr)
    for line in hint.splitlines():
        print(f"         {line}", file=sys.stderr)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


if __name__ == "__main__":
    raise SystemExit(main())
