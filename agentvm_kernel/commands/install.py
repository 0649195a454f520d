"""`agentvm install`: make the kernel known to Jupyter. Imports nothing heavy before it runs."""

import argparse

NAME = "install"
HELP = "register the kernel with Jupyter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--user", action="store_true", help="for this user")
    where.add_argument("--sys-prefix", action="store_true", help="in this Python environment only")
    where.add_argument(
        "--prefix", metavar="PATH", help="under PATH, such as /usr/local, for every Jupyter that looks there"
    )
    parser.add_argument("--name", default="agentvm", help="name of the kernelspec (default: %(default)s)")
    parser.add_argument(
        "--display-name", default="Python 3 (agentvm)", help="what launchers show (default: %(default)s)"
    )


def execute(options: argparse.Namespace) -> int:
    """Install the kernelspec and say where."""
    from agentvm_kernel.errors import ConfigError, HostError
    from agentvm_kernel.jupyter import kernelspec

    try:
        folder = kernelspec.install(
            user=options.user,
            sys_prefix=options.sys_prefix,
            prefix=options.prefix,
            name=options.name,
            display_name=options.display_name,
        )
    except OSError as error:
        raise HostError(
            f"The kernelspec cannot be written: {error}.", hint="--user needs no rights that you do not have."
        ) from error
    except ValueError as error:
        raise ConfigError(f"The kernelspec cannot be installed: {error}") from error
    print(f"Registered the kernel {options.display_name!r} in {folder}")
    return 0
