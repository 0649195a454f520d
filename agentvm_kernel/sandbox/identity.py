"""Gives machines identities of their own, fail closed: what a machine does not confirm, it is not used with (HAZARDS 1-4, 6).

The kernel process imports this module.
"""

import base64
import os
import time
import uuid
from typing import Any

from agentvm_kernel.errors import AuthenticationError, ConnectionClosed, MachineLost
from agentvm_kernel.hypervisor.machine import Machine
from agentvm_kernel.log import get_logger
from agentvm_kernel.transport.connection import GuestConnection, open_connection

log = get_logger(__name__)

RENEW_TIMEOUT_S = 20.0
CONNECTIONS = 3
RECONNECT_S = 5.0


async def connect_thawed(machine: Machine, *, reseed: bool, timeout_s: float) -> GuestConnection:
    """Connect to a machine that was thawed and runs, and give it an identity of its own (see `renew_identity`), or its clock (see `wake`).

    A guest with a vsock learns a moment after it resumed that it was moved, and then ends all connections, those made meanwhile as well
    (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, virtio 1.2, 5.10.6.6). So a connection that is lost here is made anew; if that happened after the
    guest had taken its new secret, with that.

    Args:
        machine: resumed after a thaw.
        reseed: it is a clone; False for a user's own restored machine: its random numbers, names and connections go on as they were.
        timeout_s: for the first connection.

    Raises:
        AgentVMError: it does not answer or confirm; it must not be handed out.
    """
    secret = os.urandom(32)
    proof = machine.secret
    for left in reversed(range(CONNECTIONS)):
        try:
            connection = await open_connection(machine.address, proof, timeout_s=timeout_s)
        except AuthenticationError:
            if left == CONNECTIONS - 1 or proof == secret or not left:
                raise
            proof = secret
            continue
        try:
            if reseed:
                await renew_identity(connection, machine, secret=secret)
            else:
                await wake(connection, machine, secret=secret)
            return connection
        except BaseException as error:
            await connection.close()
            if not isinstance(error, ConnectionClosed) or not left:
                raise
            timeout_s = min(timeout_s, RECONNECT_S)  # it was there just now
            log.info("connection_reset_after_thaw", machine=machine.name, reason=str(error))
    raise AssertionError("the last attempt returns or raises")


async def renew_identity(
    connection: GuestConnection, machine: Machine, *, secret: bytes | None = None
) -> dict[str, Any]:
    """Give the machine an identity of its own and wait until it has confirmed every part of it.

    Args:
        connection: authenticated with the machine's current secret.
        machine: whose secret is replaced by a new one.
        secret: its new one; None makes one up.

    Raises:
        MachineLost: the machine did not confirm; it must not be handed out (HAZARDS 1-4, 6).
    """
    secret = secret or os.urandom(32)
    wanted = {
        "entropy": base64.b64encode(os.urandom(256)).decode(),
        "time_ns": time.time_ns(),
        "hostname": machine.name,
        "machine_id": uuid.uuid4().hex,
        "secret": base64.b64encode(secret).decode(),
        "reseed": True,
    }
    confirmed: dict[str, Any] = await connection.call("renew", wanted, timeout_s=RENEW_TIMEOUT_S)
    parts = ("entropy", "time", "hostname", "machine_id", "boot_id", "secret", "reseed", "connections")
    missing = [part for part in parts if confirmed.get(part) is not True]
    if missing:
        raise MachineLost(
            f"Machine {machine.name} did not confirm its new identity ({', '.join(missing)}).",
            hint="It was discarded; run the cell again to get another one.",
        )
    machine.secret = secret
    return confirmed


async def wake(connection: GuestConnection, machine: Machine, *, secret: bytes | None = None) -> None:
    """Set the clock of a machine of ours right after a pause or a restore, and mix fresh entropy into its generator.

    Args:
        connection: authenticated with the machine's current secret.
        machine: that goes on.
        secret: a new one; None leaves it as it is.

    Raises:
        MachineLost: it did not confirm.
    """
    fresh: dict[str, Any] = {"entropy": base64.b64encode(os.urandom(64)).decode(), "time_ns": time.time_ns()}
    if secret is not None:
        fresh["secret"] = base64.b64encode(secret).decode()
    confirmed = await connection.call("wake", fresh, timeout_s=RENEW_TIMEOUT_S)
    if confirmed != {"entropy": True, "time": True, "secret": secret is not None}:
        raise MachineLost(f"Machine {machine.name} did not confirm that its clock is right.")
    if secret is not None:
        machine.secret = secret
