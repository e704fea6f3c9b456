"""A consortium, and one to be lied to: certificates of every wrong kind, which fedscan's own code would not make."""

import base64
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from fedscan.consortium import coordinator, identity, member, roster
from fedscan.consortium.checks import Member
from fedscan.consortium.coordinator import Admission
from fedscan.consortium.keys import fingerprint
from fedscan.consortium.member import Home

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def private() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def text_of(thing: Any) -> str:
    return str(thing.public_bytes(Encoding.PEM).decode())


@dataclass
class World:
    """A root, and the lines of its roster, by certificate."""

    key: ec.EllipticCurvePrivateKey = field(default_factory=private)
    name: str = "glioma"
    members: dict[str, Member] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root = identity.make_root(self.name, self.key, NOW - 30 * DAY)

    def show(
        self, name: str = "a", role: str = "site", *, sans: tuple[str, ...] | None = None, key: Any = None,
        signer: Any = None, issuer: x509.Name | None = None, start: datetime = NOW - DAY, end: datetime = NOW + DAY,
        listed: bool = True, ca: bool = False, **line: Any,
    ) -> str:  # fmt: skip
        """A certificate (PEM), good but for what is said; on the roster unless ``listed`` is False."""
        subject = identity.named(O=self.name, OU=role, CN=name)
        own = key or private()
        by = x509.load_pem_x509_certificate(self.root.encode()).subject
        builder = x509.CertificateBuilder(issuer or by, subject, own.public_key(), 77, start, end)
        builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
        names = [x509.DNSName(n) for n in ((name,) if sans is None else sans)]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        made = text_of(builder.sign(signer or self.key, hashes.SHA256()))
        if listed:
            self.enrol(made, name, role, **line)
        return made

    def enrol(self, certificate: str, name: str = "a", role: str = "site", **line: Any) -> None:
        """Puts a certificate on the roster, as if the root had meant it."""
        found = x509.load_pem_x509_certificate(certificate.encode())
        mark, key = identity.digest(found), fingerprint(found.public_key())
        facts = {"name": name, "role": role, "certificate": mark, "key": key, "serial": f"{found.serial_number:x}"}
        self.members[mark] = Member(**{**facts, "admitted": NOW - DAY, "until": NOW + DAY, **line})


def sha1(certificate: str, signer: ec.EllipticCurvePrivateKey) -> str:
    """The same certificate, signed over SHA-1: by hand, for no library does it any more."""
    sha256_with, sha1_with = bytes.fromhex("300a06082a8648ce3d040302"), bytes.fromhex("300906072a8648ce3d0401")
    whole = x509.load_pem_x509_certificate(certificate.encode())
    inside = next(parts(whole.tbs_certificate_bytes))[1]
    tbs = der(0x30, b"".join(sha1_with if piece == sha256_with else piece for piece, _ in parts(inside)))
    signature = signer.sign(tbs, ec.ECDSA(hashes.SHA1()))
    made = der(0x30, tbs + sha1_with + der(0x03, b"\0" + signature))
    return text_of(x509.load_der_x509_certificate(made))


def der(tag: int, body: bytes) -> bytes:
    """One value in DER."""
    n = len(body)
    size = bytes([n]) if n < 128 else bytes([0x80 + (n.bit_length() + 7) // 8]) + n.to_bytes((n.bit_length() + 7) // 8)
    return bytes([tag]) + size + body


def parts(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Every value in DER that stands here, whole and without its head."""
    at = 0
    while at < len(data):
        n, head = data[at + 1], 2
        if n >= 128:
            head += n - 128
            n = int.from_bytes(data[at + 2 : at + head])
        yield data[at : at + head + n], data[at + head : at + head + n]
        at += head + n


def mangled(pem: str, r: random.Random) -> str:
    """A certificate or a request with some bytes of its DER changed, lost or added; the text around it is proper."""
    first, *lines, last = pem.splitlines()
    data = bytearray(base64.b64decode("".join(lines)))
    for _ in range(r.choice((1, 1, 2, 5))):
        at, n = r.randrange(len(data)), r.randrange(1, 9)
        match r.choice(("change", "change", "lose", "add")):
            case "change":
                data[at] ^= r.randrange(1, 256)
            case "lose":
                del data[at : at + n]
            case _:
                data[at:at] = r.randbytes(n)
    body = base64.b64encode(data).decode()
    return "\n".join([first, *(body[i : i + 64] for i in range(0, len(body), 64)), last, ""])


def loaded(pem: bytes) -> Any:
    """The private key in a PEM text."""
    return load_pem_private_key(pem, None)


class Place:
    """A consortium and its members' folders, at a fixed time."""

    def __init__(self, root: Path, name: str = "glioma") -> None:
        self.root, self.folder = root, root / "c"
        coordinator.found(name, self.folder, NOW)

    def ask(self, name: str, role: str = "site", at: str | None = None) -> Home:
        return member.begin(name, role, self.root / "homes" / (at or name))

    def admit(self, home: Home, **more: Any) -> Admission:
        return coordinator.admit(self.folder, home.folder / "request.csr", **{"role": home.role, "now": NOW, **more})

    def join(self, name: str) -> Home:
        home = self.ask(name)
        member.take_kit(home, self.admit(home).kit, now=NOW)
        return member.read(home.folder)

    def roster(self) -> roster.Roster:
        return coordinator.read(self.folder)
