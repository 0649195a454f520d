"""Methods that change the machine itself; only for an agent that runs as root in a machine of its own.

Standard library only, no subprocesses: `renew` is on the path of every start.
"""

import base64
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guest_runtime import identity
from guest_runtime.rpc import INVALID_PARAMS, Method, RpcError
from guest_runtime.wire import Channel

if TYPE_CHECKING:
    from guest_runtime.agent import Agent

SECRET = Path("/run/agentvm/secret")


class Powers:
    """The methods, for one agent."""

    def __init__(self, agent: "Agent") -> None:
        self._agent = agent

    def methods(self) -> dict[str, Method]:
        """Return them by name."""
        return {
            "renew": Method(self.renew, slow=True),
            "wake": Method(self.wake, slow=True),
            "shutdown": Method(self.shutdown),
            "reboot": Method(self.reboot),
        }

    def renew(
        self, entropy: str, time_ns: int, hostname: str, machine_id: str, secret: str, reseed: bool
    ) -> dict[str, bool]:
        """Give the machine a new identity; answer only when every part of it holds.

        Args:
            entropy: 64 bytes or more from the host's generator, in base64.
            time_ns: the host's wall clock, in nanoseconds since the epoch.
            hostname: one label of a host name.
            machine_id: 32 hexadecimal digits.
            secret: what a host has to know from the next connection on; 32 bytes or more, in base64.
            reseed: this is a clone and not its owner's own machine: also reseed `random` and `numpy.random` in the Python kernel, and
                drop the TCP connections that it has inherited.

        Raises:
            Exception: something could not be renewed. The machine must not be used then.
        """
        seed = _decode(entropy, "entropy", 64)
        new_secret = _decode(secret, "secret", 32)
        # The first half is for the kernel alone: what Python is seeded with can be read by the user's code.
        half = len(seed) // 2
        identity.reseed_kernel(seed[:half])
        with self._agent.kernel.reseeding(seed[half:], clone=reseed):
            identity.set_clock(time_ns)
            identity.set_hostname(hostname)
            identity.set_machine_id(machine_id)
            identity.renew_boot_id()
            if reseed:
                identity.drop_connections()
        # For an agent that is started again, too.
        identity.replace(SECRET, new_secret, 0o600)
        self._agent.set_secret(new_secret)
        confirmed = dict.fromkeys(("entropy", "time", "hostname", "machine_id", "boot_id", "secret"), True)
        return confirmed | {"reseed": reseed, "connections": reseed}

    def wake(self, entropy: str, time_ns: int, secret: str = "") -> dict[str, bool]:
        """Go on after a pause, or where a snapshot was taken; whose machine it is has not changed.

        Args:
            entropy: 32 bytes or more from the host's generator, in base64; 64 with a secret.
            time_ns: the host's wall clock, in nanoseconds since the epoch.
            secret: after a restore, what a host has to know from the next connection on, as for `renew`; the generators in the Python
                kernel that no user can seed are reseeded then. Empty leaves both as they are.
        """
        new_secret = _decode(secret, "secret", 32) if secret else b""
        seed = _decode(entropy, "entropy", 64 if new_secret else 32)
        half = len(seed) // 2
        identity.reseed_kernel(seed[:half])
        if not new_secret:
            identity.set_clock(time_ns)
        else:
            # What was drawn after the snapshot was taken must not be drawn again, such as keys and nonces of TLS.
            with self._agent.kernel.reseeding(seed[half:], clone=False):
                identity.set_clock(time_ns)
            identity.replace(SECRET, new_secret, 0o600)
            self._agent.set_secret(new_secret)
        return {"entropy": True, "time": True, "secret": bool(new_secret)}

    def shutdown(self) -> dict[str, Any]:
        """Switch the machine off cleanly; PID 1 does it, once the host has our answer."""
        return self._signal_init(signal.SIGTERM)

    def reboot(self) -> dict[str, Any]:
        """Restart the machine cleanly; PID 1 does it, once the host has our answer."""
        return self._signal_init(signal.SIGINT)

    def _signal_init(self, signum: signal.Signals) -> dict[str, Any]:
        self._agent.when_sent(Channel.RPC, lambda: os.kill(1, signum))
        return {}


def _decode(text: str, name: str, least: int) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise RpcError(f"{name} is not base64: {error}", code=INVALID_PARAMS) from error
    if len(data) < least:
        raise RpcError(f"{name} has fewer than {least} bytes", code=INVALID_PARAMS)
    return data
