"""The coordinator's folder: the consortium's root, its roster, and who is admitted and revoked with them."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from fedscan.consortium import identity, keys, kit, roster, signed
from fedscan.consortium.checks import Member
from fedscan.consortium.identity import Request, digest, in_role, well_named
from fedscan.consortium.keys import fingerprint, spoken
from fedscan.consortium.member import put
from fedscan.consortium.roster import Roster
from fedscan.spec import Refused

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

FILE, ROOT, KEY, ROSTER = "consortium.toml", "root.pem", "root.key", "roster.json"
MOST_DAYS = identity.ROOT_DAYS
MOST_BYTES = 1 << 16  # of a request


@dataclass(frozen=True)
class Admission:
    """A member that was admitted, now or before (``again``), and the folder of its kit."""

    member: Member
    kit: Path
    again: bool


def found(name: str, folder: Path, now: datetime | None = None) -> str:
    """Makes a consortium: its root's key, which stays in this folder, its root and an empty roster; returns the root.

    Raises ValueError where the name cannot be one, or the folder holds anything.
    """
    well_named(name, "a consortium's name")
    keys.make_folder(folder)
    key = keys.make_key(folder / KEY)
    root = identity.make_root(name, key, now)
    put(folder / ROOT, root)
    signed.write(folder / ROSTER, roster.sealed(roster.first(root, now), key))
    put(folder / FILE, f'name = "{name}"\n')
    return root


def read(folder: Path) -> Roster:
    """The roster of the coordinator's, or of a member's, folder. Raises ValueError where there is none."""
    for name in (ROOT, ROSTER):
        if not (folder / name).exists():
            raise ValueError(
                f"{folder} holds no {name}: name the folder that `fedscan consortium init` made, or a member's that "
                "has imported its kit"
            )
    return roster.read(folder / ROSTER, (folder / ROOT).read_text(encoding="ascii", errors="replace"))


def admit(
    folder: Path, request: Path, role: str = "site", days: int = 730,
    name: str | None = None, key: str | None = None, now: datetime | None = None,
) -> Admission:  # fmt: skip
    """Admits who made a request: signs its certificate, puts it on the roster, and writes its kit.

    ``role`` is the one to admit it in; ``name`` and ``key`` (its fingerprint) those that it should ask with, where they
    are known. A request that was admitted before gives its kit again, with the newest roster. Raises ValueError.
    """
    now = identity.now_or(now)
    asked = read_request(request, in_role(role), name, key)
    with locked(folder):
        listed = read(folder)
        signer = root_key(folder, listed.root)
        held = listed.holder(asked.name, now)
        again = held is not None and (held.key, held.role) == (asked.key, asked.role)
        path = folder / "members" / f"{asked.name}.pem"
        if held is None or not again:
            if not 1 <= days <= MOST_DAYS:
                raise ValueError(f"--days takes 1 to {MOST_DAYS}")
            until = now + timedelta(days=days)
            certificate = identity.admitted(asked, listed.root, signer, until, now)
            held = entry(asked, certificate, now)
            listed = roster.with_member(listed, held, now)
            path.parent.mkdir(exist_ok=True)
            put(path, certificate)  # worth nothing until the roster names it
            signed.write(folder / ROSTER, roster.sealed(listed, signer))
        certificate = path.read_text(encoding="ascii")
        if digest(identity.read_certificate(certificate, path.name)) != held.certificate:
            raise Refused(f"{path} is not the certificate that the roster names: take it from a copy")
        parcel = folder / "kits" / asked.name
        kit.write(parcel, held, certificate, listed.root, (folder / ROSTER).read_bytes(), signer, now)
    return Admission(held, parcel, again)


def revoke(folder: Path, name: str, why: str, now: datetime | None = None) -> Roster:
    """Revokes a member, with the reason, and returns the next roster; every member has to import it.

    Raises ValueError where nobody of that name is a member.
    """
    now = identity.now_or(now)
    with locked(folder):
        listed = read(folder)
        signer = root_key(folder, listed.root)
        listed = roster.without(listed, name, why, now)
        signed.write(folder / ROSTER, roster.sealed(listed, signer))
    return listed


def read_request(path: Path, role: str, name: str | None, key: str | None) -> Request:
    """The request in a file. Raises Refused where it asks for another role, name or key than is to be admitted."""
    if path.stat().st_size > MOST_BYTES:
        raise Refused(f"{path} is not a request as `fedscan site init` writes it")
    asked = identity.read_request(path.read_text(encoding="ascii", errors="replace"), str(path))
    if asked.role != role:
        raise Refused(f"{path} asks for the role {asked.role!r}, and {role!r} was to be admitted: see --role")
    if name is not None and asked.name != name:
        raise Refused(f"{path} asks for the name {asked.name!r}, and {name[:80]!r} was to be admitted")
    if key is not None and keys.unspoken(key) != asked.key:
        raise Refused(f"{path} holds the key {spoken(asked.key)}, not the one that you were told: admit nobody with it")
    return asked


def entry(asked: Request, certificate: str, now: datetime) -> Member:
    """The line of the roster for a certificate that was just signed."""
    shown = identity.read_certificate(certificate)
    return Member(
        asked.name, asked.role, digest(shown), asked.key, f"{shown.serial_number:x}", now, shown.not_valid_after_utc
    )


def root_key(folder: Path, root: str) -> "EllipticCurvePrivateKey":
    """The root's private key. Raises ValueError where it does not lie here, Refused where it is not the root's."""
    if not (folder / KEY).exists():
        raise ValueError(f"{folder} holds no {KEY}: only the coordinator's own folder can change who is a member")
    key = keys.read_key(folder / KEY)
    if fingerprint(key.public_key()) != fingerprint(identity.read_root(root).public_key()):
        raise Refused(f"{folder / KEY} is not the key of {ROOT}: take both from the same copy")
    return key


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time change the roster: two that did would sign two lists of one version."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
