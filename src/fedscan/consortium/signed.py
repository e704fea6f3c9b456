"""Documents that only their signer can have written: canonical JSON under a signature (ECDSA P-256 with SHA-256).

A document is a mapping with a ``kind``, so that one that was signed for one purpose serves no other. The signature is
over everything else in it, the signer's certificate included.
"""

import re
import unicodedata
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedscan import wire
from fedscan.consortium import identity
from fedscan.consortium.checks import Member, checked
from fedscan.consortium.identity import Identity, Role
from fedscan.consortium.keys import refusing
from fedscan.spec import Refused

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

PURPOSE = b"fedscan signed document 1\n"  # no other use of the key signs bytes that begin so
MOST_BYTES = 16 << 20
LONE = re.compile("[\ud800-\udfff]")  # halves of characters, which are no Unicode by themselves


def canonical(document: Mapping[str, Any]) -> bytes:
    """The one text of a document: JSON with sorted keys, without spaces, in ASCII.

    Raises TypeError or ValueError for what has no such text: a number that is not finite or has more than 64 bits,
    text that is not in Unicode's form NFC (two texts that look the same would differ), a key that is not text.
    """
    return wire.dumps(settled(document, "the document", 0)).encode("ascii")


def settled(node: Any, path: str, depth: int) -> Any:
    """A tree whose keys are sorted and whose texts and numbers have one form."""
    if depth > wire.DEPTH_LIMIT:
        raise TypeError(f"{path[:80]}: what is nested deeper than {wire.DEPTH_LIMIT} cannot be signed")
    if isinstance(node, Mapping):
        for key in node:
            if not isinstance(key, str):
                raise TypeError(f"{path}: {key!r} cannot be a key of a signed document, which are text")
            hold_nfc(key, path)
        return {key: settled(node[key], f"{path}/{key}", depth + 1) for key in sorted(node)}
    if isinstance(node, list | tuple):
        return [settled(value, path, depth + 1) for value in node]
    if isinstance(node, str):
        hold_nfc(node, path)
    return wire.plain(node, path)


def hold_nfc(text: str, path: str) -> None:
    """Raises ValueError for text that is not in Unicode's form NFC, or is no Unicode at all."""
    if not (text.isascii() or (unicodedata.is_normalized("NFC", text) and not LONE.search(text))):
        raise ValueError(f"{path[:80]}: the text {text[:60]!r} is not in Unicode's form NFC and cannot be signed")


def sign(document: Mapping[str, Any], key: "EllipticCurvePrivateKey", certificate: str) -> dict[str, Any]:
    """The document with ``signer`` (the certificate, PEM) and ``signature`` (r and s, 128 hexadecimal digits).

    Raises ValueError where it has no ``kind``, is signed already, or the certificate is of another key.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
    from cryptography.hazmat.primitives.hashes import SHA256

    if not isinstance(document.get("kind"), str):
        raise ValueError("a document that is signed says by its 'kind' what it is")
    if taken := {"signature", "signer"} & set(document):
        raise ValueError(f"the document holds {', '.join(sorted(taken))} already")
    if identity.read_certificate(certificate).public_key() != key.public_key():
        raise ValueError("the certificate is not that of the key that should sign")
    whole = {**document, "signer": certificate}
    r, s = decode_dss_signature(key.sign(PURPOSE + canonical(whole), ec.ECDSA(SHA256())))
    return {**whole, "signature": f"{r:064x}{s:064x}"}


def verified(
    document: Mapping[str, Any],
    kind: str,
    root: str,
    members: Mapping[str, Member],
    role: Role | None = None,
    name: str | None = None,
    now: datetime | None = None,
) -> Identity:
    """Who signed this document of this kind. Raises Refused with one sentence unless a member did, in this role.

    ``root``, ``members``, ``role``, ``name`` and ``now`` are as in ``checks.checked``, to which the signer is held.
    """
    signer = taken_from(document, kind)
    found = checked(signer, root, members, role, name, now)
    hold_signature(document, signer, f"{found.name!r}")
    return found


def verified_by_root(document: Mapping[str, Any], kind: str, root: str) -> None:
    """Raises Refused with one sentence unless the consortium's root itself signed this document of this kind."""
    signer = taken_from(document, kind)
    identity.read_root(root)
    if signer != root:
        raise Refused(f"the {kind} is not signed by the root of the consortium")
    hold_signature(document, signer, "the consortium's root")


def taken_from(document: Mapping[str, Any], kind: str) -> str:
    """The signer's certificate of a document of this kind."""
    if document.get("kind") != kind:
        raise Refused(f"this is not a signed {kind}; its kind is {str(document.get('kind'))[:60]!r}")
    signer = document.get("signer")
    if not isinstance(signer, str) or not isinstance(document.get("signature"), str):
        raise Refused(f"the {kind} is not signed")
    return signer


def hold_signature(document: Mapping[str, Any], signer: str, who: str) -> None:
    """Raises Refused where the signature is not that of the signer's key over the rest of the document."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
    from cryptography.hazmat.primitives.hashes import SHA256

    digits = str(document["signature"])
    wrong = f"the {str(document['kind'])[:60]} was changed after {who} signed it, or {who} did not sign it"
    if len(digits) != 128 or set(digits) - set("0123456789abcdef"):
        raise Refused(wrong)
    rest = {key: value for key, value in document.items() if key != "signature"}
    signature = encode_dss_signature(int(digits[:64], 16), int(digits[64:], 16))
    public: Any = identity.read_certificate(signer).public_key()
    with refusing(wrong):
        public.verify(signature, PURPOSE + canonical(rest), ec.ECDSA(SHA256()))


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a document as its canonical text and an end of line: whole or not at all, and past a power cut."""
    text = canonical(document) + b"\n"
    wire.replace_file(path, lambda file: file.write(text), durable=True)


def read(path: Path) -> dict[str, Any]:
    """The document in a file, not verified yet. Raises Refused, naming the file, unless it is as ``write`` left it."""
    if path.stat().st_size > MOST_BYTES:
        raise Refused(f"{path.name} has more than {MOST_BYTES} bytes, too many for a signed document")
    return parsed(path.read_bytes(), path.name)


def parsed(data: bytes, what: str) -> dict[str, Any]:
    """The document in these bytes, not verified yet. Raises Refused unless they are its canonical text."""
    try:
        found = wire.loads(data)
        if isinstance(found, dict) and canonical(found) + b"\n" == data:
            return found
    except (ValueError, TypeError):  # what is wrong with it in detail helps nobody: it was not changed by hand
        pass
    raise Refused(f"{what} is not a signed document as fedscan writes it, or was changed: have it sent again")
