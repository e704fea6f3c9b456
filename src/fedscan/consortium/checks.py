"""Whether a certificate is that of a member of the consortium, and of which: each that is not, with a sentence."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fedscan.consortium import identity
from fedscan.consortium.identity import ROLES, TOLERANCE, Identity, Role, day, subject_of
from fedscan.consortium.keys import fingerprint, hold_p256, refusing
from fedscan.spec import Refused

if TYPE_CHECKING:
    from cryptography.x509 import Certificate


@dataclass(frozen=True)
class Member:
    """A line of the roster: who was admitted, with which certificate and key (SHA-256 in hex), and whether revoked."""

    name: str
    role: Role
    certificate: str
    key: str
    serial: str
    admitted: datetime
    until: datetime
    revoked: datetime | None = None
    why: str = ""


def checked(
    certificate: str,
    root: str,
    members: Mapping[str, Member],
    role: Role | None = None,
    name: str | None = None,
    now: datetime | None = None,
) -> Identity:
    """Who shows this certificate (PEM), if its root (PEM) and the roster's members (by certificate) say that it is so.

    ``role`` and ``name`` are those that the certificate should be of; None admits any. ``now`` is the time to hold it
    to (default: this machine's clock), with 10 minutes forgiven. Raises Refused with one sentence.
    """
    if not certificate.strip():
        raise Refused("no certificate was shown, and nobody is served without one")
    shown, by = identity.read_certificate(certificate), identity.read_root(root)
    said = f"the certificate of {called(shown)}"
    hold_p256(shown.public_key(), said)
    if identity.algorithm(shown) != "sha256":
        raise Refused(f"{said} is signed with {identity.algorithm(shown).upper()}; only SHA-256 is taken")
    hold_signed(shown, by, said)
    hold_time(shown, said, identity.now_or(now))
    with refusing(f"{said} is not of the form that a consortium's root gives"):
        found = subject_of(shown.subject, "O", "OU", "CN")
        alternatives, authority = names_in(shown), may_admit(shown)
    if authority:
        raise Refused(f"{said} is that of an authority, which could admit others: only the root does that")
    if alternatives != [found["CN"]]:
        others = ", ".join(repr(n[:60]) for n in alternatives[:9]) or "none"
        raise Refused(f"{said} gives other names than this one for TLS: {others}")
    if name is not None and found["CN"] != name:
        raise Refused(f"{said} was shown where {name!r} was expected")
    if role is not None and found["OU"] != role:
        raise Refused(f"{said} is for the role {found['OU'][:60]!r}, and {role!r} is needed here")
    return on_roster(shown, found, members, said)


def hold_signed(shown: "Certificate", root: "Certificate", said: str) -> None:
    """Raises Refused where it is not the consortium's root that signed a certificate."""
    if shown == root:
        raise Refused("the root's own certificate was shown: it admits members and is none")
    consortium = subject_of(root.subject, "O", "OU")["O"]
    if shown.issuer == shown.subject:
        raise Refused(f"{said} is self-signed; the root of the consortium {consortium!r} has to sign it")
    if shown.issuer != root.subject:
        issuer = shown.issuer.rfc4514_string()[:80]
        raise Refused(f"{said} was signed by {issuer!r}, not by the root of the consortium {consortium!r}")
    with refusing(f"{said} names the root of {consortium!r} as its signer, and the signature is not that root's"):
        shown.verify_directly_issued_by(root)


def hold_time(shown: "Certificate", said: str, now: datetime) -> None:
    """Raises Refused outside a certificate's time, 10 minutes forgiven."""
    clock = f"and this machine's clock says {day(now)}: check the clock"
    if now < shown.not_valid_before_utc - TOLERANCE:
        raise Refused(f"{said} begins on {day(shown.not_valid_before_utc)}, {clock}")
    if now > shown.not_valid_after_utc + TOLERANCE:
        raise Refused(f"{said} ended on {day(shown.not_valid_after_utc)}, {clock}, or have it renewed")


def on_roster(shown: "Certificate", found: Mapping[str, str], members: Mapping[str, Member], said: str) -> Identity:
    """The member that holds this certificate. Raises Refused where the roster has no such member, or not any more."""
    mark, serial = identity.digest(shown), f"{shown.serial_number:x}"
    member = members.get(mark)
    if member is None:
        another = any(m.name == found["CN"] and m.revoked is None for m in members.values())
        more = ", which has another one for that name" if another else ""
        raise Refused(f"{said} is not on the roster{more}: have a newer roster sent, or be admitted")
    if (member.name, member.role, member.serial) != (found["CN"], found["OU"], serial):
        raise Refused(f"{said} and its line on the roster do not agree: have the roster sent again")
    if member.revoked is not None:
        raise Refused(f"{said} was revoked on {day(member.revoked)}: {member.why}")
    key = fingerprint(shown.public_key())
    end = shown.not_valid_after_utc.astimezone(UTC)
    return Identity(member.name, member.role, found["O"], mark, key, serial, end)


def called(shown: "Certificate") -> str:
    """What a certificate calls its holder, in quotes, shortened."""
    from cryptography.x509.oid import NameOID

    try:
        found = shown.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return repr(str(found[0].value)[:60]) if found else repr(shown.subject.rfc4514_string()[:60])
    except ValueError:
        return "a name that cannot be read"


def names_in(shown: "Certificate") -> list[str]:
    """All alternative names of a certificate."""
    from cryptography import x509

    value = extension(shown, x509.SubjectAlternativeName)
    return [] if value is None else [str(name.value) for name in value]


def may_admit(shown: "Certificate") -> bool:
    """Whether a certificate says that its holder may sign others."""
    from cryptography import x509

    value = extension(shown, x509.BasicConstraints)
    return value is not None and bool(value.ca)


def extension(shown: "Certificate", kind: Any) -> Any:
    """An extension of a certificate, or None."""
    from cryptography import x509

    try:
        return shown.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


__all__ = ["ROLES", "Identity", "Member", "Role", "checked"]
