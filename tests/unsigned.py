"""A seal that anybody could make: for tests of what stands above signatures. Hospitals never have it."""

from collections.abc import Mapping
from typing import Any

from fedscan import wire
from fedscan.spec import Refused


class Unsigned:
    """Signs nothing, and believes the header."""

    def __init__(self, name: str) -> None:
        self.name = name

    def sign(self, header: Mapping[str, Any]) -> bytes:
        return wire.dumps(dict(header)).encode()

    def signer(self, data: bytes, kind: str) -> tuple[str, Mapping[str, Any]]:
        header = wire.loads(bytes(data))
        if not isinstance(header, dict) or header.get("kind") != kind:
            raise Refused(f"this is no {kind}")
        return str(header.get("from")), header
