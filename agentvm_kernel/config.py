"""What the owner of a host and its users can set, validated.

Read from /etc/agentvm/config.toml (the host's owner), then ~/.config/agentvm/config.toml (the user; AGENTVM_CONFIG names
another file), then the environment; the later wins, except for `[limits]`: a user's file can narrow the owner's limits,
never widen them, and the environment has none. Imports pydantic, so the kernel process loads this module only where
there is something to read (see `sandbox.settings`).
"""

import os
import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentvm_kernel.errors import ConfigError
from agentvm_kernel.paths import OWNER_CONFIG, user_config
from agentvm_kernel.sandbox.settings import CellLimits, IdlePolicy, SandboxSettings

ENVIRONMENT = {
    "AGENTVM_URI": "uri",
    "AGENTVM_IMAGE": "image",
    "AGENTVM_PROFILE": "profile",
    "AGENTVM_BOOT_TIMEOUT": "boot_timeout_s",
    "AGENTVM_IDLE_PAUSE": "idle_pause_s",
    "AGENTVM_IDLE_CULL": "idle_cull_s",
    "AGENTVM_CELL_TIMEOUT": "cell_timeout_s",
    "AGENTVM_OUTPUT_CAP": "output_cap_bytes",
}

ProfileName = Literal["light", "standard", "intensive"]


Number = TypeVar("Number", int, float)


def _least(one: Number | None, other: Number | None) -> Number | None:
    """Return the smaller of two limits, of which None is none."""
    return min((limit for limit in (one, other) if limit is not None), default=None)


class Limits(BaseModel):
    """What no user, notebook or magic of this host may exceed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    profiles: frozenset[ProfileName] = Field(
        default=frozenset({"light", "standard", "intensive"}), min_length=1, description="Profiles that may be used."
    )
    max_memory_mib: int | None = Field(default=None, gt=0, description="Most memory that one machine may have, in MiB.")
    max_pool: int = Field(default=16, ge=0, description="Most machines that may be kept ready.")
    max_forks: int = Field(
        default=16, ge=0, le=64, description="Most copies of a machine that a cell may run in at once."
    )
    max_cell_timeout_s: float | None = Field(default=None, gt=0, description="Longest cell timeout that may be set.")
    max_output_bytes: int | None = Field(default=None, gt=0, description="Most output of one cell that may be shown.")

    def narrowed(self, other: "Limits") -> "Limits":
        """Return what both these limits and `other` allow."""
        return Limits(
            profiles=self.profiles & other.profiles,
            max_memory_mib=_least(self.max_memory_mib, other.max_memory_mib),
            max_pool=min(self.max_pool, other.max_pool),
            max_forks=min(self.max_forks, other.max_forks),
            max_cell_timeout_s=_least(self.max_cell_timeout_s, other.max_cell_timeout_s),
            max_output_bytes=_least(self.max_output_bytes, other.max_output_bytes),
        )


class Config(BaseModel):
    """Every setting, with its default."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_min_length=1)

    uri: str | None = Field(
        default=None, description="libvirt URI; without it qemu:///system for root, qemu:///session for others."
    )
    image: str = Field(default="default", description="Name or digest of the guest image.")
    profile: str = Field(default="standard", description="Size of the machine.")
    boot_timeout_s: float = Field(
        default=300.0, gt=0, le=3600, description="Seconds within which a machine must answer."
    )
    acquire_timeout_s: float = Field(
        default=60.0, ge=0, le=3600, description="Seconds to wait for a machine where the pool's maximum is reached."
    )
    idle_pause_s: float = Field(
        default=1800.0, ge=0, description="Seconds after which a machine that nobody uses is paused; 0 never."
    )
    idle_cull_s: float = Field(
        default=0.0, ge=0, description="Seconds after which a paused machine is given back; 0 never."
    )
    cell_timeout_s: float = Field(
        default=0.0, ge=0, description="Seconds after which a running cell is interrupted; 0 never."
    )
    output_cap_bytes: int = Field(
        default=0, ge=0, description="So many bytes of one cell's output are shown; 0 is no limit."
    )
    limits: Limits = Limits()

    def sandbox_settings(self) -> SandboxSettings:
        """Return the settings of one sandbox.

        Raises:
            ConfigError: there is no such profile, it is not allowed here or has more memory than a machine may have.
        """
        self.check_profile(self.profile)
        return SandboxSettings(
            profile=self.profile,
            image=self.image,
            uri=self.uri,
            boot_timeout_s=self.boot_timeout_s,
            acquire_timeout_s=self.acquire_timeout_s,
            idle=IdlePolicy(pause_s=self.idle_pause_s, cull_s=self.idle_cull_s),
            cells=self._cell_limits(),
            max_forks=self.limits.max_forks,
        )

    def _cell_limits(self) -> CellLimits:
        longest, most = self.limits.max_cell_timeout_s or 0.0, self.limits.max_output_bytes or 0
        return CellLimits(
            # 0 is no limit, which is more than any.
            timeout_s=min(self.cell_timeout_s or longest, longest or self.cell_timeout_s),
            output_bytes=min(self.output_cap_bytes or most, most or self.output_cap_bytes),
            max_timeout_s=longest,
            max_output_bytes=most,
        )

    def check_profile(self, name: str) -> None:
        """Make sure that a profile exists and may be used.

        Raises:
            ConfigError: there is none of this name, it is not allowed here or has more memory than a machine may have.
        """
        from agentvm_kernel.hypervisor.profiles import get_profile

        memory = get_profile(name).memory_mib
        if name not in self.limits.profiles:
            raise ConfigError(
                f"Profile {name!r} is not allowed on this host.",
                hint=f"Choose one of: {', '.join(sorted(self.limits.profiles))}.",
            )
        if self.limits.max_memory_mib is not None and memory > self.limits.max_memory_mib:
            raise ConfigError(
                f"Profile {name!r} has {memory} MiB of memory; this host allows {self.limits.max_memory_mib} MiB.",
                hint="Choose a smaller profile.",
            )


def load_config(**overrides: Any) -> Config:
    """Read the files and the environment.

    Args:
        overrides: settings that win over both; None does not.

    Raises:
        ConfigError: a file cannot be read or parsed, or holds something that is not a setting.
    """
    owner = _read(OWNER_CONFIG) if OWNER_CONFIG.exists() else {}
    user_file = user_config()
    user = _read(user_file) if user_file.exists() or "AGENTVM_CONFIG" in os.environ else {}
    environment = {field: os.environ[name] for name, field in ENVIRONMENT.items() if os.environ.get(name)}
    try:
        limits = Limits.model_validate(owner.pop("limits", {})).narrowed(Limits.model_validate(user.pop("limits", {})))
        chosen = {field: value for field, value in overrides.items() if value is not None}
        return Config.model_validate({**owner, **user, **environment, **chosen, "limits": limits})
    except ValidationError as error:
        variables = {field: name for name, field in ENVIRONMENT.items() if field in environment}
        problems = "; ".join(
            f"{variables.get(where, where)}: {problem['msg']}"
            for problem in error.errors()
            if (where := ".".join(map(str, problem["loc"])))
        )
        raise ConfigError(
            f"A setting is not valid: {problems}.", hint=f"Settings come from {OWNER_CONFIG} and {user_file}."
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration {path} is not valid TOML: {error}.") from error
