"""`agentvm pool`: machines kept ready, so that a notebook need not wait for one. Imports nothing heavy before it runs."""

import argparse
from typing import Any

NAME = "pool"
HELP = "show and change the pool of ready machines"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    status = actions.add_parser("status", help="show the pool", description="Show what the pool should be and is.")
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(act=_status)
    resize = actions.add_parser("resize", help="change the pool", description="Change what the pool should be.")
    resize.add_argument("minimum", type=int, metavar="N", help="machines to keep ready; 0 for none")
    resize.add_argument("--maximum", type=int, metavar="N", help="most machines at once, in use or ready; 0: no limit")
    resize.add_argument("--ttl", type=float, dest="ttl_s", metavar="S", help="replace ready machines after S seconds")
    resize.add_argument("--profile", help="their resource profile")
    resize.add_argument("--image", help="name or digest of their guest image")
    resize.set_defaults(act=_resize)
    run = actions.add_parser(
        "run",
        help="keep the pool until interrupted",
        description="Keep the pool filled until interrupted. Without this, kernels start a keeper when one is needed.",
    )
    run.set_defaults(act=_run)
    drain = actions.add_parser(
        "drain", help="empty the pool", description="Remove all ready machines and keep none from now on."
    )
    drain.set_defaults(act=_drain)


def execute(options: argparse.Namespace) -> int:
    """Do what was asked for."""
    code: int = options.act(options)
    return code


def _status(options: argparse.Namespace) -> int:
    from agentvm_kernel.sandbox import pool

    status = pool.status()
    if options.json:
        import json
        from dataclasses import asdict

        print(json.dumps(asdict(status), indent=2))
    else:
        print(pool.as_text(status))
    return 0


def _resize(options: argparse.Namespace) -> int:
    from agentvm_kernel.image import store
    from agentvm_kernel.sandbox import pool

    changes: dict[str, Any] = {
        name: value
        for name in ("minimum", "maximum", "ttl_s", "profile", "image")
        if (value := getattr(options, name)) is not None
    }
    store.find(changes.get("image") or pool.load_config().image)
    config = pool.configure(**changes)
    pool.ensure_keeper()
    print(f"The pool is to keep {config.minimum} machines ready. `agentvm pool status` shows how far it is.")
    return 0


def _run(options: argparse.Namespace) -> int:
    import asyncio

    from agentvm_kernel import log
    from agentvm_kernel.cli import say_error
    from agentvm_kernel.sandbox.keeper import Keeper

    log.configure(level="info")
    if not asyncio.run(Keeper(linger_s=None).run()):
        say_error("another process keeps the pool.", "`agentvm pool status` shows which.")
        return 1
    return 0


def _drain(options: argparse.Namespace) -> int:
    import asyncio

    from agentvm_kernel.sandbox.keeper import drain

    print(f"Removed {asyncio.run(drain())} ready machines; none will be kept.")
    return 0
