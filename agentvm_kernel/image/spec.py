"""What a guest image is made of, read from TOML. Imports pydantic."""

import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from agentvm_kernel.errors import ImageError

DEFAULT = "default"

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
# https://www.debian.org/doc/debian-policy/ch-controlfields.html#source
Package = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9+.-]+$", max_length=128)]
# A requirement by name (PEP 508), never an option, a path or a URL: those would not be the same tomorrow.
_REQUIREMENT = r"^[A-Za-z0-9][A-Za-z0-9._-]*(\[[A-Za-z0-9._, -]+\])?[A-Za-z0-9.,<>=!~* ]*$"
Requirement = Annotated[str, StringConstraints(pattern=_REQUIREMENT, max_length=200)]
Module = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$", max_length=128)]


class ImageSpec(BaseModel):
    """A guest image, declared. The same spec gives the same digest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name = Field(description="What commands call the image.")
    suite: Name = Field(default="bookworm", description="Debian release.")
    kernel: Package = Field(default="linux-image-cloud-amd64", description="Debian package of the Linux kernel.")
    packages: tuple[Package, ...] = Field(default=(), description="Debian packages; python3 is always there.")
    requirements: tuple[Requirement, ...] = Field(
        default=("ipykernel>=7", "pip"), description="Python packages, wheels only."
    )
    preload: tuple[Module, ...] = Field(default=(), description="Modules imported before the Python kernel is ready.")
    disk_gib: int = Field(default=8, ge=1, le=256, description="Size of the root file system, in GiB.")


def load_spec(source: str | Path = DEFAULT) -> ImageSpec:
    """Read a spec.

    Args:
        source: a TOML file, or the name of a spec that is shipped.

    Raises:
        ImageError: no such file, not TOML, or not a valid spec.
    """
    shipped = resources.files(__package__)
    if re.fullmatch(r"[a-z-]+", str(source)) and (entry := shipped / f"{source}.toml").is_file():
        text = entry.read_text()
    else:
        try:
            text = Path(source).read_text()
        except (OSError, UnicodeDecodeError) as error:
            names = sorted(item.name.removesuffix(".toml") for item in shipped.iterdir() if item.name.endswith(".toml"))
            raise ImageError(
                f"Cannot read the image spec {str(source)!r}: {getattr(error, 'strerror', None) or error}.",
                hint=f"Name a TOML file or one of the shipped specs: {', '.join(names)}.",
            ) from error
    try:
        return ImageSpec.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ImageError(f"The image spec {source} is not valid TOML: {error}.") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'spec'}: {e['msg']}" for e in error.errors())
        raise ImageError(f"The image spec {source} is not valid: {problems}.") from error
