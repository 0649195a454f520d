"""The guest runtime, as it is put into machines. Standard library only: the kernel process imports this module first of all."""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import guest_runtime


@lru_cache(maxsize=1)
def runtime_digest() -> str:
    """Return the SHA-256 of what a machine runs beside its image: the guest runtime. Templates depend on it."""
    digest = hashlib.sha256()
    for name, data in runtime_files():
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def runtime_files() -> Iterator[tuple[str, bytes]]:
    """Yield its files, by name."""
    for path in sorted(Path(guest_runtime.__file__).parent.glob("*.py")):
        yield path.name, path.read_bytes()
