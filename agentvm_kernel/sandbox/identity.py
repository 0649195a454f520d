"""Gives machines identities of their own, fail closed: what a machine does not confirm, it is not used with (HAZARDS 1-4, 6).

The kernel process imports this module.
"""

import base64
import os
import time
import uuid
from typing import Any

from agentvm_kernel.errors import MachineLost
from agentvm_kernel.hypervisor.machine import Machine
from agentvm_kernel.transport.connection import GuestConnection

RENEW_TIMEOUT_S = 20.0


async def renew_identity(
    connection: GuestConnection, machine: Machine, *, reseed: bool, hostname: str = ""
) -> dict[str, Any]:
    """Give the machine an identity of its own and wait until it has confirmed every part of it.

    Args:
        connection: authenticated with the machine's current secret.
        machine: whose secret is replaced by a new one.
        reseed: also reseed `random` and `numpy.random` in the kernel process (not for a user's own restored machine).
        hostname: what the machine shall call itself; empty takes its name.

    Raises:
        MachineLost: the machine did not confirm; it must not be handed out (HAZARDS 1-4, 6).
    """
    secret = os.urandom(32)
    wanted = {
        "entropy": base64.b64encode(os.urandom(256)).decode(),
        "time_ns": time.time_ns(),
        "hostname": hostname or machine.name,
        "machine_id": uuid.uuid4().hex,
        "secret": base64.b64encode(secret).decode(),
        "reseed": reseed,
    }
    confirmed: dict[str, Any] = await connection.call("renew", wanted, timeout_s=RENEW_TIMEOUT_S)
    parts = ["entropy", "time", "hostname", "machine_id", "boot_id", "secret"]
    if reseed:
        parts += ["reseed", "connections"]
    missing = [part for part in parts if confirmed.get(part) is not True]
    if missing:
        raise MachineLost(
            f"Machine {machine.name} did not confirm its new identity ({', '.join(missing)}).",
            hint="It was discarded; run the cell again to get another one.",
        )
    machine.secret = secret
    return confirmed


async def wake(connection: GuestConnection, machine: Machine) -> None:
    """Set the clock of a machine of ours right after a pause, and mix fresh entropy into its generator.

    Raises:
        MachineLost: it did not confirm.
    """
    fresh = {"entropy": base64.b64encode(os.urandom(64)).decode(), "time_ns": time.time_ns()}
    confirmed = await connection.call("wake", fresh, timeout_s=RENEW_TIMEOUT_S)
    if confirmed != {"entropy": True, "time": True}:
        raise MachineLost(f"Machine {machine.name} did not confirm that its clock is right.")
