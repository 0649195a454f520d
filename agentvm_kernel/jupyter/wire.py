"""The Jupyter messaging wire format: signed multipart messages, as in the specification
(https://jupyter-client.readthedocs.io/en/stable/messaging.html#the-wire-protocol).

    [identity…, b"<IDS|MSG>", signature, header, parent_header, metadata, content, buffer…]

The signature is the hex HMAC over the four JSON parts; buffers are not covered. This is our own code because importing
`jupyter_client.session` costs more than starting a machine from the pool does; the tests compare it with that class.
Imports the standard library only.
"""

import hmac
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeAlias

from agentvm_kernel.errors import AgentVMError

DELIMITER = b"<IDS|MSG>"
PROTOCOL_VERSION = "5.4"
EMPTY = b"{}"
MAX_JSON_DEPTH = 100
_REMEMBERED_SIGNATURES = 65536

Buffer: TypeAlias = bytes | memoryview


class WireError(AgentVMError):
    """Bytes that are not a valid, correctly signed Jupyter message."""


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_scan = json.JSONDecoder(parse_constant=_refuse_constant).decode
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def parse_json(data: Buffer, *, max_bytes: int) -> dict[str, Any]:
    """Parse one JSON object from bytes that nobody vouches for.

    Args:
        data: UTF-8 text; bytes that are not are replaced, as jupyter_client does.
        max_bytes: longest text accepted.

    Raises:
        WireError: too long, not an object, nested deeper than MAX_JSON_DEPTH, or not JSON (NaN and Infinity are not).
    """
    if len(data) > max_bytes:
        raise WireError(f"A message part of {len(data)} bytes is longer than {max_bytes}.")
    text = str(data, "utf-8", "replace")
    try:
        value = _scan(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"A message part is not valid JSON: {error}") from error
    if type(value) is not dict:
        raise WireError(f"A message part is a JSON {type(value).__name__}, not an object.")
    # Counting brackets is far quicker than walking, and few messages have enough of them to be too deep.
    if text.count("{") + text.count("[") > MAX_JSON_DEPTH and _depth_exceeds(value, MAX_JSON_DEPTH):
        raise WireError(f"A message part is nested deeper than {MAX_JSON_DEPTH}.")
    return value


def _depth_exceeds(value: Any, limit: int) -> bool:
    level: list[Any] = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            for child in (item.values() if type(item) is dict else item)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return False
    return True


def pack_json(value: Any) -> bytes:
    """Encode a JSON value as UTF-8; lone surrogates become question marks."""
    return _encode(value).encode("utf-8", "replace")


def timestamp() -> str:
    """Return the time now in the form that message headers use."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


@dataclass(slots=True)
class ClientMessage:
    """One message from a client, its signature checked.

    `parts` are header, parent_header, metadata, content and buffers as they came: they can be passed on without
    encoding again.
    """

    identities: list[bytes]
    header: dict[str, Any]
    parts: list[Buffer]

    @property
    def msg_id(self) -> str:
        """The client's id for this message."""
        return str(self.header["msg_id"])

    @property
    def msg_type(self) -> str:
        """The message's type, `execute_request` for one."""
        return str(self.header["msg_type"])

    def content(self) -> dict[str, Any]:
        """Parse the content. Raises WireError."""
        return parse_json(self.parts[3], max_bytes=len(self.parts[3]))

    def parent(self) -> dict[str, Any]:
        """Parse the parent header. Raises WireError."""
        return parse_json(self.parts[1], max_bytes=len(self.parts[1]))


class Session:
    """Signs and checks the messages of one connection file.

    Args:
        key: shared secret; empty turns signing off, as the specification allows.
        signature_scheme: `hmac-` and the name of a hash in hashlib.

    Raises:
        WireError: the scheme is unknown.
    """

    def __init__(self, key: bytes, signature_scheme: str = "hmac-sha256") -> None:
        self.id = os.urandom(16).hex()
        self.username = os.environ.get("USER", "username")
        self._count = 0
        self._seen: dict[bytes, None] = {}
        self._auth: hmac.HMAC | None = None
        prefix, _, digest = signature_scheme.partition("-")
        if prefix != "hmac":
            raise WireError(f"Unknown signature scheme {signature_scheme!r}.", hint="Only hmac-… is known.")
        if key:
            try:
                self._auth = hmac.new(key, digestmod=digest)
            except ValueError as error:
                raise WireError(f"Unknown signature scheme {signature_scheme!r}.") from error

    def header(self, msg_type: str, date: str = "") -> dict[str, Any]:
        """Return a header for a new message of ours, made at `date`; now, if that is empty."""
        self._count += 1
        return {
            "msg_id": f"{self.id}_{self._count}",
            "msg_type": msg_type,
            "username": self.username,
            "session": self.id,
            "date": date or timestamp(),
            "version": PROTOCOL_VERSION,
        }

    def serialize(
        self,
        header: dict[str, Any],
        parent: Buffer,
        metadata: dict[str, Any],
        content: dict[str, Any],
        *,
        identities: Iterable[bytes] = (),
        buffers: Iterable[Buffer] = (),
    ) -> list[Buffer]:
        """Return the frames of a signed message.

        Args:
            header: the message's own header, from `header()`.
            parent: the parent's header as JSON, as it came from the client; EMPTY for none.
            metadata: a JSON object.
            content: a JSON object.
            identities: routing prefix; on iopub the topic.
            buffers: binary parts, sent as they are.
        """
        signed = (pack_json(header), parent, pack_json(metadata) if metadata else EMPTY, pack_json(content))
        return [*identities, DELIMITER, self._sign(signed), *signed, *buffers]

    def deserialize(self, frames: Sequence[bytes]) -> ClientMessage:
        """Check and split a message from a client.

        Raises:
            WireError: no delimiter, too few parts, a wrong or replayed signature, or a header that is not one.
        """
        try:
            split = frames.index(DELIMITER)
        except ValueError:
            raise WireError("A message without delimiter.") from None
        if len(frames) < split + 6:
            raise WireError("A message without header, parent header, metadata and content.")
        signature, *parts = frames[split + 1 :]
        if self._auth is not None:
            if signature in self._seen:
                raise WireError("A replayed message: its signature was seen before.")
            if not hmac.compare_digest(signature, self._sign(parts[:4])):
                raise WireError("A message with a wrong signature.")
            self._seen[signature] = None
            if len(self._seen) > _REMEMBERED_SIGNATURES:
                del self._seen[next(iter(self._seen))]
        header = parse_json(parts[0], max_bytes=len(parts[0]))
        if not isinstance(header.get("msg_id"), str) or not isinstance(header.get("msg_type"), str):
            raise WireError("A message header without msg_id or msg_type.")
        return ClientMessage(identities=list(frames[:split]), header=header, parts=list(parts))

    def _sign(self, parts: Iterable[Buffer]) -> bytes:
        if self._auth is None:
            return b""
        auth = self._auth.copy()
        for part in parts:
            auth.update(part)
        return auth.hexdigest().encode("ascii")
