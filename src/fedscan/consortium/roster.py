"""The roster: the list of a consortium's members, signed by its root, whose version only rises.

Nobody is served whose certificate is not on it. A member that is revoked stays on it, with the day and the reason.
"""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedscan.consortium import identity, signed
from fedscan.consortium.checks import Member
from fedscan.consortium.identity import Role, consortium_of, day, in_role, well_named
from fedscan.consortium.keys import refusing
from fedscan.spec import Refused

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

KIND = "roster"
LONGEST = 200  # characters of a reason


@dataclass(frozen=True)
class Roster:
    """The members of a consortium as its root (PEM) lists them; ``version`` starts at 1 and only rises."""

    root: str
    consortium: str
    version: int
    written: datetime
    lines: tuple[Member, ...] = ()

    @cached_property
    def members(self) -> Mapping[str, Member]:
        """Every line by its certificate's fingerprint: what ``checks.checked`` and ``signed.verified`` ask for."""
        return {member.certificate: member for member in self.lines}

    def holder(self, name: str, now: datetime) -> Member | None:
        """The member of this name that is neither revoked nor past its time."""
        return next((m for m in self.lines if m.name == name and m.revoked is None and m.until > now), None)

    def names(self, role: Role, now: datetime | None = None) -> list[str]:
        """The members of a role, by name, that are neither revoked nor past their time."""
        now = identity.now_or(now)
        return sorted(m.name for m in self.lines if m.role == role and m.revoked is None and m.until > now)


def first(root: str, now: datetime | None = None) -> Roster:
    """The roster of a new consortium: nobody yet."""
    return Roster(root, consortium_of(root), 1, identity.now_or(now))


def with_member(roster: Roster, member: Member, now: datetime) -> Roster:
    """The next version, with a member more. Raises ValueError for a name that is taken, or a key that was revoked."""
    if held := roster.holder(member.name, now):
        raise ValueError(
            f"{member.name!r} was admitted on {day(held.admitted)} as {held.role} with another key or role: choose "
            f"another name, or revoke that one first"
        )
    for line in roster.lines:
        if line.key != member.key:
            continue
        if line.revoked is not None:
            raise ValueError(f"this key was revoked on {day(line.revoked)} ({line.why}): a new one has to be made")
        if line.name != member.name:
            raise ValueError(f"this key is that of {line.name!r}: a member has one key, and nobody else has it")
    return replace(roster, version=roster.version + 1, written=now, lines=(*roster.lines, member))


def without(roster: Roster, name: str, why: str, now: datetime) -> Roster:
    """The next version, in which a member is revoked. Raises ValueError where nobody of that name could be."""
    held = roster.holder(name, now)
    if held is None:
        names = [m.name for m in roster.lines if m.revoked is None]
        known = f"{', '.join(names) or 'nobody'} {'are' if len(names) > 1 else 'is'}"
        raise ValueError(f"{name[:80]!r} is not a member of {roster.consortium!r} that could be revoked; {known}")
    lines = tuple(replace(m, revoked=now, why=reason(why)) if m is held else m for m in roster.lines)
    return replace(roster, version=roster.version + 1, written=now, lines=lines)


def reason(why: str) -> str:
    """A reason on one line, in Unicode's form NFC. Raises ValueError where it is empty or too long."""
    text = unicodedata.normalize("NFC", " ".join(why.split()))
    if not 0 < len(text) <= LONGEST or not text.isprintable():
        raise ValueError(f"--why takes a reason of 1 to {LONGEST} characters, for the record")
    return text


def sealed(roster: Roster, key: "EllipticCurvePrivateKey") -> dict[str, Any]:
    """The roster as a document that the root has signed."""
    document = {
        "kind": KIND,
        "consortium": roster.consortium,
        "version": roster.version,
        "written": roster.written.isoformat(),
        "members": entries(roster),
    }
    return signed.sign(document, key, roster.root)


def entries(roster: Roster) -> list[dict[str, Any]]:
    """The lines of a roster as JSON has them; moments are text (ISO 8601)."""
    return [{name: told(value) for name, value in vars(member).items()} for member in roster.lines]


def told(value: Any) -> Any:
    """A value of a line as JSON has it."""
    return value.isoformat() if isinstance(value, datetime) else value


def read(path: Path, root: str) -> Roster:
    """The roster in a file, if the root (PEM) signed it. Raises Refused, naming the file."""
    return opened(signed.read(path), root, path.name)


def opened(document: Mapping[str, Any], root: str, what: str = "the roster") -> Roster:
    """The roster that a document is, if the root (PEM) signed it. Raises Refused with one sentence."""
    try:
        signed.verified_by_root(document, KIND, root)
    except Refused as e:
        raise Refused(f"{what}: {e}") from e
    with refusing(f"{what} is signed by the root, and is not a roster that this version of fedscan can read"):
        lines = tuple(line(entry) for entry in document["members"])
        whole = {"kind", "consortium", "version", "written", "members", "signer", "signature"}
        if set(document) != whole or type(document["version"]) is not int or document["version"] < 1:
            raise ValueError("not a roster")
        if document["consortium"] != consortium_of(root) or len({m.certificate for m in lines}) != len(lines):
            raise ValueError("not of this consortium, or a line stands in it twice")
        return Roster(root, document["consortium"], document["version"], moment(document["written"]), lines)


def line(entry: Mapping[str, Any]) -> Member:
    """One line of a roster. Raises an error of some kind for what is none."""
    if set(entry) != {field.name for field in fields(Member)}:
        raise ValueError("not a member")
    texts = {name: str(entry[name]) for name in ("certificate", "key", "serial", "why")}
    revoked = None if entry["revoked"] is None else moment(entry["revoked"])
    if texts["why"] != ("" if revoked is None else reason(texts["why"])):
        raise ValueError("a reason that is none")
    return Member(
        name=well_named(entry["name"]), role=in_role(entry["role"]), **texts,
        admitted=moment(entry["admitted"]), until=moment(entry["until"]), revoked=revoked,
    )  # fmt: skip


def moment(text: str) -> datetime:
    """A moment in UTC, from its text."""
    found = datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError("a moment without its time zone")
    return found.astimezone(UTC)


def hold_newer(new: Roster, old: Roster | None, what: str = "this roster") -> None:
    """Raises Refused for a roster that is older than the one that is here, or another of the same version."""
    if old is None:
        return
    if new.version < old.version:
        raise Refused(
            f"{what} is version {new.version} of {day(new.written)}, and version {old.version} of {day(old.written)} "
            "is here already: an older roster could bring back who was revoked; ask for the newest one"
        )
    if new.version == old.version and new != old:
        raise Refused(
            f"{what} and the one that is here are both version {new.version}, and differ: the root has signed two "
            "lists; ask the coordinator which holds, before you trust either"
        )
