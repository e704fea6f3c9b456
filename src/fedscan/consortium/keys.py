"""Private keys: made where they stay, read by their owner only, and never sent.

ECDSA over the curve P-256 (FIPS 186-5): the same key signs documents and serves in TLS.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedscan.spec import Refused

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

OTHERS = 0o077  # what a group and all others may do


@contextmanager
def refusing(sentence: str) -> Iterator[None]:
    """Turns whatever a parser of keys or certificates raises into Refused with this sentence."""
    try:
        yield
    except Refused:
        raise
    except Exception as e:  # parsers of hostile bytes raise many kinds, of several modules
        raise Refused(sentence) from e


def make_folder(folder: Path) -> None:
    """Makes a folder that only its owner may enter. Raises ValueError where it exists and holds anything."""
    if folder.is_dir() and any(folder.iterdir()):
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:3])
        raise ValueError(f"{folder} holds {held} already, and nothing is written over: choose another --folder")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)


def make_key(path: Path) -> "EllipticCurvePrivateKey":
    """Makes a private key and writes it into a file that only its owner may read (mode 0600), whole or not at all.

    Raises ValueError where the file exists: a key is never written over.
    """
    from cryptography.hazmat.primitives import serialization as coding
    from cryptography.hazmat.primitives.asymmetric import ec

    if path.exists():
        raise ValueError(f"{path} exists already, and a key is never written over: choose another --folder")
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(coding.Encoding.PEM, coding.PrivateFormat.PKCS8, coding.NoEncryption())
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # private from its first byte on
    with os.fdopen(handle, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(handle)
    partial.rename(path)
    return key


def read_key(path: Path) -> "EllipticCurvePrivateKey":
    """The private key in a file. Raises Refused where others may read the file or enter its folder."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    for place, mode in ((path.parent, "700"), (path, "600")):
        found = place.stat()
        if found.st_mode & OTHERS:
            raise Refused(
                f"{place} may be used by others (mode {found.st_mode & 0o777:o}), and a private key is its owner's "
                f"alone: give it mode {mode} (chmod {mode}), and make a new key if others may have read this one"
            )
        if found.st_uid != os.getuid():
            raise Refused(f"{place} belongs to another user of this machine: a private key is read by its owner only")
    with refusing(f"{path} is not a private key as fedscan writes it: take it from a copy, or make a new one"):
        key: Any = load_pem_private_key(path.read_bytes(), None)
        hold_p256(key.public_key(), str(path))
    return key  # type: ignore[no-any-return]


def hold_p256(public: Any, what: str) -> None:
    """Raises Refused for a public key of any kind but ECDSA over P-256."""
    from cryptography.hazmat.primitives.asymmetric import ec

    if isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, ec.SECP256R1):
        return
    kind = type(public).__name__.removeprefix("_").removesuffix("PublicKey")
    size = f" of {public.key_size} bits" if hasattr(public, "key_size") else ""
    raise Refused(f"{what} holds a key of the kind {kind}{size}; only ECDSA over P-256 is taken: make a new key")


def fingerprint(public: Any) -> str:
    """SHA-256 of a public key (its SubjectPublicKeyInfo in DER), in hexadecimal: to be compared by telephone."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def spoken(digits: str) -> str:
    """A fingerprint in groups of four, as people compare it."""
    return " ".join(digits[i : i + 4] for i in range(0, len(digits), 4))


def unspoken(text: str) -> str:
    """A fingerprint as people give it, without spaces, colons and capitals. Raises ValueError where it is none."""
    digits = "".join(text.split()).replace(":", "").lower()
    if len(digits) != 64 or set(digits) - set("0123456789abcdef"):
        raise ValueError(f"{text[:80]!r} is not a fingerprint: 64 digits of 0-9 and a-f, spaces and colons as you like")
    return digits
