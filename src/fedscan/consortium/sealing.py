"""A member's seal on what it says between hospitals: signed with its key, held to the newest roster that is here."""

from collections.abc import Mapping
from typing import Any

from fedscan.consortium import checks, member, roster, signed
from fedscan.consortium.identity import Identity, Role
from fedscan.consortium.keys import refusing
from fedscan.consortium.member import Home
from fedscan.consortium.roster import Roster


class KeySeal:
    """Signs for the member whose folder ``home`` is, and believes only members that have the role ``theirs``.

    A roster that is imported while this is in use holds from the next message on: who is revoked is not heard again.
    """

    def __init__(self, home: Home, theirs: Role) -> None:
        self.home, self.name, self.theirs = home, home.name, theirs
        home.identity()  # who is no member any more is told so now, and who has no key, or another's
        signed.sign({"kind": "trial"}, home.key, home.certificate)
        self._roster: tuple[int, Roster] | None = None

    def sign(self, header: Mapping[str, Any]) -> bytes:
        """The header as a signed document."""
        return signed.canonical(signed.sign(header, self.home.key, self.home.certificate))

    def signer(self, data: bytes, kind: str) -> tuple[str, Mapping[str, Any]]:
        """Who signed a header of this kind, and the header. Raises Refused with one sentence."""
        with refusing(f"what came is not a signed {kind}, or was changed on its way"):
            document = signed.parsed(bytes(data) + b"\n", f"the header of a {kind}")
        found = self._verified(document, kind)
        return found.name, {k: v for k, v in document.items() if k not in ("signer", "signature")}

    def _verified(self, document: Mapping[str, Any], kind: str) -> Identity:
        return signed.verified(document, kind, self.home.root, self.roster.members, self.theirs)

    @property
    def roster(self) -> Roster:
        """The roster in the member's folder, read again where the file has changed."""
        path = self.home.folder / member.ROSTER
        changed = path.stat().st_mtime_ns
        if self._roster is None or self._roster[0] != changed:
            found = roster.read(path, self.home.root)
            if self._roster is not None:
                roster.hold_newer(found, self._roster[1])
            checks.checked(self.home.certificate, self.home.root, found.members, self.home.role, self.home.name)
            self._roster = (changed, found)
        return self._roster[1]
