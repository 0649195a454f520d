"""What a sandbox is made of. A plain dataclass, since the kernel process reads it before anything heavy is imported."""

import os
from dataclasses import dataclass, replace
from typing import Any

from agentvm_kernel.paths import OWNER_CONFIG, user_config


@dataclass(frozen=True)
class IdlePolicy:
    """What becomes of a machine that nobody uses.

    Attributes:
        pause_s: seconds without a request after which it is paused; 0 never.
        cull_s: seconds after that in which it is given back; 0 never.
    """

    pause_s: float = 0.0
    cull_s: float = 0.0


@dataclass(frozen=True)
class CellLimits:
    """What one cell may use up.

    Attributes:
        timeout_s: seconds after which a running cell is interrupted; 0 never.
        output_bytes: so much output of one cell is shown; 0 is no limit.
        max_timeout_s: most that a notebook may set as `timeout_s`; 0 is no limit.
        max_output_bytes: most that a notebook may set as `output_bytes`; 0 is no limit.
    """

    timeout_s: float = 0.0
    output_bytes: int = 0
    max_timeout_s: float = 0.0
    max_output_bytes: int = 0


@dataclass(frozen=True)
class SandboxSettings:
    """Settings of one sandbox.

    Attributes:
        profile: resource profile: light, standard or intensive.
        image: name or digest of the guest image.
        uri: libvirt URI; None chooses by user (see `hypervisor.connection`).
        boot_timeout_s: seconds within which a machine must answer.
        acquire_timeout_s: seconds to wait for a machine where the pool's maximum is reached.
        idle: what becomes of a machine that nobody uses.
        cells: what one cell may use up.
        max_forks: most copies of a machine that a cell may run in at once.
    """

    profile: str = "standard"
    image: str = "default"
    uri: str | None = None
    boot_timeout_s: float = 300.0
    acquire_timeout_s: float = 60.0
    idle: IdlePolicy = IdlePolicy(pause_s=1800.0)
    cells: CellLimits = CellLimits()
    max_forks: int = 16


def load_settings(**overrides: Any) -> SandboxSettings:
    """Settings from the configuration file and the environment, then `overrides` that are not None.

    Raises:
        ConfigError: the file or a variable holds something invalid.
    """
    settings = SandboxSettings()
    variables = (
        "AGENTVM_URI",
        "AGENTVM_ACCEL",
        "AGENTVM_IMAGE",
        "AGENTVM_PROFILE",
        "AGENTVM_BOOT_TIMEOUT",
        "AGENTVM_IDLE_PAUSE",
        "AGENTVM_IDLE_CULL",
        "AGENTVM_CELL_TIMEOUT",
        "AGENTVM_OUTPUT_CAP",
        "AGENTVM_CONFIG",
    )
    if OWNER_CONFIG.exists() or user_config().exists() or any(name in os.environ for name in variables):
        # pydantic is loaded only where there is something to validate.
        from agentvm_kernel.config import load_config

        settings = load_config().sandbox_settings()
    return replace(settings, **{name: value for name, value in overrides.items() if value is not None})
