"""Resource profiles: how big a machine is. Imports pydantic, so only the cold path may import it."""

from pydantic import BaseModel, ConfigDict, Field

from agentvm_kernel.errors import ConfigError


class Profile(BaseModel):
    """What one machine may use."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,31}$", description="Name that users choose it by.")
    vcpus: int = Field(ge=1, le=64, description="Virtual CPUs.")
    memory_mib: int = Field(ge=128, le=1 << 20, multiple_of=2, description="Memory of the guest, in MiB.")
    disk_gib: int = Field(ge=1, le=16384, description="Size of the disk as the guest sees it, in GiB.")
    cpu_quota_percent: int = Field(
        ge=1, description="Host CPU time that it may use, in percent of one CPU (where cgroups allow)."
    )


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(name="light", vcpus=1, memory_mib=512, disk_gib=8, cpu_quota_percent=100),
        Profile(name="standard", vcpus=2, memory_mib=1024, disk_gib=16, cpu_quota_percent=200),
        Profile(name="intensive", vcpus=4, memory_mib=4096, disk_gib=32, cpu_quota_percent=400),
    )
}


def get_profile(name: str) -> Profile:
    """Return the profile of this name.

    Raises:
        ConfigError: there is none; the hint names those that exist.
    """
    try:
        return PROFILES[name]
    except KeyError:
        raise ConfigError(f"There is no profile {name!r}.", hint=f"Choose one of: {', '.join(PROFILES)}.") from None
