"""Requests and certificates (X.509): the consortium's root signs that a key belongs to a name, in a role, for a time.

In a certificate the subject holds the consortium (O), the role (OU) and the name (CN); the name stands again as its
only alternative name, where TLS looks for it. A member can sign and speak TLS with it, and can admit nobody.
"""

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

from fedscan.consortium.keys import fingerprint, hold_p256, refusing
from fedscan.spec import Refused

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import Certificate, Name

Role = Literal["site", "coordinator", "reader"]
ROLES: tuple[Role, ...] = get_args(Role)
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
TOLERANCE = timedelta(minutes=10)  # by which clocks of honest machines may differ
ROOT_DAYS = 3650
PARSED_LATE = (
    "subject",
    "issuer",
    "extensions",
    "signature_hash_algorithm",
    "not_valid_before_utc",
    "not_valid_after_utc",
)


@dataclass(frozen=True)
class Identity:
    """Who has shown a certificate: a name and a role in a consortium, until when; fingerprints are SHA-256 in hex."""

    name: str
    role: Role
    consortium: str
    certificate: str
    key: str
    serial: str
    until: datetime


@dataclass(frozen=True)
class Request:
    """What a future member asks for, and the key that it holds."""

    name: str
    role: Role
    public: Any

    @property
    def key(self) -> str:
        """The key's fingerprint."""
        return fingerprint(self.public)


def well_named(name: str, what: str = "a name") -> str:
    """The name as it is. Raises ValueError where it could be mistaken for another, on a disk or on a screen."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name[:80]!r} cannot be {what}: use up to 63 small letters (a-z), digits and hyphens, as in 'hospital-a'"
        )
    return name


def in_role(role: str) -> Role:
    """The role as it is. Raises ValueError for one that does not exist."""
    if role not in ROLES:
        raise ValueError(f"there is no role {role[:60]!r}; roles are {', '.join(ROLES)}")
    return role


def now_or(now: datetime | None) -> datetime:
    """The time that is given, or that of this machine's clock, in whole seconds of UTC."""
    return (now or datetime.now(UTC)).astimezone(UTC).replace(microsecond=0)


def request(name: str, role: Role, key: "EllipticCurvePrivateKey") -> str:
    """A request to be admitted (a CSR, PEM), signed with the key that it asks a certificate for; it holds no secret."""
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256

    subject = named(OU=in_role(role), CN=well_named(name))
    return pem(x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, SHA256()))


def read_request(text: str, what: str = "the request") -> Request:
    """What a request asks for. Raises Refused unless it is signed with its own key, a P-256 one, and well named."""
    from cryptography import x509

    with refusing(f"{what} is not a request as `fedscan site init` writes it"):
        found = x509.load_pem_x509_csr(text.encode("ascii"))
        asked = subject_of(found.subject, "OU", "CN")
        hold_p256(found.public_key(), what)
        sound = found.is_signature_valid and algorithm(found) == "sha256"
    if not sound:
        raise Refused(f"{what} is not signed with the key that it asks a certificate for: it was changed on its way")
    try:
        return Request(well_named(asked["CN"]), in_role(asked["OU"]), found.public_key())
    except ValueError as e:
        raise Refused(f"{what}: {e}") from e


def make_root(consortium: str, key: "EllipticCurvePrivateKey", now: datetime | None = None) -> str:
    """The root certificate of a consortium (PEM), signed with its own key; it admits members and no other roots."""
    subject, start = named(O=well_named(consortium, "a consortium's name"), OU="root"), now_or(now)
    return issued(subject, subject, key.public_key(), key, start, start + timedelta(days=ROOT_DAYS), ())


def admitted(asked: Request, root: str, key: "EllipticCurvePrivateKey", until: datetime, now: datetime | None) -> str:
    """The certificate (PEM) by which the root says who holds a key; a copy of nothing but the request's name and role.

    Raises ValueError where it would outlive the root.
    """
    by, start = read_root(root), now_or(now)
    if until > by.not_valid_after_utc:
        raise ValueError(f"the root of the consortium ends on {day(by.not_valid_after_utc)}: choose fewer --days")
    subject = named(O=subject_of(by.subject, "O", "OU")["O"], OU=asked.role, CN=asked.name)
    uses = ("client", "server") if asked.role == "coordinator" else ("client",)
    return issued(subject, by.subject, asked.public, key, start, until, uses)


def issued(
    subject: "Name", issuer: "Name", public: Any, key: "EllipticCurvePrivateKey", start: datetime, end: datetime,
    uses: tuple[str, ...],
) -> str:  # fmt: skip
    """A certificate (PEM): of a member where it has ``uses`` in TLS, else of a root. It starts a tolerance early,
    for TLS itself forgives no clock."""
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.x509.oid import ExtendedKeyUsageOID as Use

    root = not uses
    others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    usage = dict.fromkeys((*others, "encipher_only", "decipher_only"), False)
    builder = (
        x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number(), start - TOLERANCE, end)
        .add_extension(x509.BasicConstraints(ca=root, path_length=0 if root else None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=root, crl_sign=root, **usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    if not root:
        name = subject_of(subject, "O", "OU", "CN")["CN"]
        oids = [{"client": Use.CLIENT_AUTH, "server": Use.SERVER_AUTH}[use] for use in uses]
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(oids), critical=False)
    return pem(builder.sign(key, SHA256()))


def read_certificate(text: str, what: str = "the certificate") -> "Certificate":
    """The one certificate in a PEM text, which holds not a character more. Raises Refused for anything else."""
    from cryptography import x509

    with refusing(f"{what} is not a certificate, or was changed: ask for it again"):
        found = x509.load_pem_x509_certificate(text.encode("ascii"))
        if pem(found) != text:
            raise ValueError("other text stands around it")
        for part in PARSED_LATE:
            getattr(found, part)
        found.public_key()
    return found


def read_root(text: str, what: str = "the root") -> "Certificate":
    """A consortium's root certificate. Raises Refused unless it is whole: signed with its own key, P-256, SHA-256."""
    try:
        return _root(text)
    except Refused as e:
        raise Refused(f"{what} is not the root of a consortium, or was changed: ask for it again") from e


@lru_cache(maxsize=8)  # it is asked for with every certificate and every document
def _root(text: str) -> "Certificate":
    found = read_certificate(text)
    with refusing("it does not sign itself"):
        hold_p256(found.public_key(), "it")
        found.verify_directly_issued_by(found)
        subject = subject_of(found.subject, "O", "OU")
        well_named(subject["O"], "a consortium's name")
        if algorithm(found) == "sha256" and subject["OU"] == "root":
            return found
    raise Refused("it is signed otherwise, or for another purpose")


def consortium_of(root: str) -> str:
    """The name of the consortium whose root this is."""
    return subject_of(read_root(root).subject, "O", "OU")["O"]


def digest(certificate: "Certificate") -> str:
    """SHA-256 of a certificate (DER), in hexadecimal."""
    from cryptography.hazmat.primitives.serialization import Encoding

    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


def pem(thing: Any) -> str:
    """A certificate or a request as text."""
    from cryptography.hazmat.primitives.serialization import Encoding

    return str(thing.public_bytes(Encoding.PEM).decode("ascii"))


def algorithm(thing: Any) -> str:
    """The hash under a signature: "sha256"."""
    found = thing.signature_hash_algorithm
    return found.name if found else "none"


def named(**parts: str) -> "Name":
    """A subject of these parts (O, OU, CN), in this order."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID as Oid

    oids = {"O": Oid.ORGANIZATION_NAME, "OU": Oid.ORGANIZATIONAL_UNIT_NAME, "CN": Oid.COMMON_NAME}
    return x509.Name([x509.NameAttribute(oids[part], text) for part, text in parts.items()])


def subject_of(name: "Name", *parts: str) -> dict[str, str]:
    """The parts of a subject. Raises Refused unless it has these, in this order, and no others."""
    found = [(a.rfc4514_attribute_name, a.value) for a in name]
    if [part for part, _ in found] != list(parts) or not all(isinstance(value, str) for _, value in found):
        raise Refused(f"a subject {name.rfc4514_string()[:80]!r} is not of the form {', '.join(parts)}")
    return {part: str(value) for part, value in found}


def day(moment: datetime) -> str:
    """A moment for people: "2026-03-01 12:00 UTC"."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
