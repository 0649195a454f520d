"""What a domain of ours carries in its libvirt metadata: who owns it and what it is.

Standard library only: the kernel process imports it.
"""

import os
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

NAMESPACE = "urn:agentvm:machine:1"
PREFIX = "agentvm"
ElementTree.register_namespace(PREFIX, NAMESPACE)


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, told apart from a later one with the same id.

    Attributes:
        pid: process id.
        start: its start time in clock ticks since boot, field 22 of /proc/PID/stat (proc(5)).
    """

    pid: int
    start: int

    @classmethod
    def current(cls) -> "Owner":
        """Return this process."""
        return cls(os.getpid(), _start_time(os.getpid()) or 0)

    def alive(self) -> bool:
        """Return whether the process still runs (a zombie does not)."""
        return _start_time(self.pid) == self.start


@dataclass(frozen=True, slots=True)
class Tags:
    """The metadata of one machine.

    Attributes:
        owner: process that leases the machine; when it is gone, the machine is reaped.
        folder: where the machine's files are.
        lease: id of the lease, empty when nobody leases it.
        template: id of the snapshot that it was thawed from, empty after a cold boot.
        state: what it is used as: "booting", "leased", "preparing" (for the pool), "pooled", "template".
        profile: name of its resource profile.
        created: UTC, ISO 8601.
    """

    owner: Owner
    folder: Path
    lease: str = ""
    template: str = ""
    state: str = "booting"
    profile: str = ""
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def to_element(self) -> ElementTree.Element:
        """Return the element for <metadata>."""
        attributes = {
            "owner-pid": str(self.owner.pid),
            "owner-start": str(self.owner.start),
            "folder": str(self.folder),
            "lease": self.lease,
            "template": self.template,
            "state": self.state,
            "profile": self.profile,
            "created": self.created,
        }
        return ElementTree.Element(f"{{{NAMESPACE}}}machine", attributes)

    def to_xml(self, *, namespaced: bool = True) -> str:
        """Return the element as text; libvirt's setMetadata wants it without the namespace and adds that itself."""
        element = self.to_element()
        if not namespaced:
            element.tag = "machine"
        return ElementTree.tostring(element, encoding="unicode")

    @classmethod
    def from_xml(cls, text: str) -> "Tags":
        """Read what `to_xml` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            attributes = ElementTree.fromstring(text).attrib  # noqa: S314 (from libvirt, which parsed it before)
            return cls(
                owner=Owner(int(attributes["owner-pid"]), int(attributes["owner-start"])),
                folder=Path(attributes["folder"]),
                **{key: attributes[key] for key in ("lease", "template", "state", "profile", "created")},
            )
        except (ElementTree.ParseError, KeyError) as error:
            raise ValueError(f"not the metadata of a machine of ours: {text[:200]!r}") from error


def _start_time(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The second field is the name in parentheses, which may contain anything; the third is the state.
    state, *fields = text[text.rindex(")") + 2 :].split()
    return None if state in ("Z", "X") else int(fields[18])
