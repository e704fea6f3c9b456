"""The kit that a new member imports: root, certificate, roster and a page to read, each byte signed by the root.

It holds no secret: a certificate is of use only to who holds the key, and the key was made where it stays.
"""

import hashlib
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fedscan.consortium import identity, roster, signed
from fedscan.consortium.checks import Member
from fedscan.consortium.roster import Roster
from fedscan.spec import Refused

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

LIST, KIND = "kit.json", "kit"
FILES = ("README.txt", "certificate.pem", "root.pem", "roster.json")
README = """This is the kit of {name} ({role}) in the consortium {consortium}.

At {name}, beside the folder in which `fedscan site init` made the key and the request:

    fedscan site import KIT --folder FOLDER

where KIT is the folder of this file. It prints the fingerprint of the consortium's root. Compare it with the
coordinator by telephone, on a number that you have from elsewhere than from here.

Nothing in this kit is secret, and every byte of it is signed.
"""


@dataclass(frozen=True)
class Kit:
    """A kit whose every byte has been checked: root and certificate (PEM), and the roster, also as it was signed."""

    root: str
    certificate: str
    roster: Roster
    roster_text: str


def write(
    folder: Path, member: Member, certificate: str, root: str, listed: bytes,
    key: "EllipticCurvePrivateKey", now: datetime,
) -> None:  # fmt: skip
    """Writes the kit of a member into ``folder``, instead of one that may lie there; it appears whole or not at all.

    ``listed`` is the roster as it was signed and written.
    """
    about = {"name": member.name, "role": member.role, "consortium": identity.consortium_of(root)}
    texts = {
        "README.txt": README.format(**about).encode(),
        "certificate.pem": certificate.encode(),
        "root.pem": root.encode(),
        "roster.json": listed,
    }
    files = {name: hashlib.sha256(data).hexdigest() for name, data in texts.items()}
    document = signed.sign({"kind": KIND, **about, "written": now.isoformat(), "files": files}, key, root)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, data in texts.items():
        (partial / name).write_bytes(data)
    signed.write(partial / LIST, document)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def read(folder: Path) -> Kit:
    """The kit in a folder. Raises Refused, naming the file, where a byte of it is not as the root signed it.

    Whether the root is the right one, the kit cannot say: its fingerprint has to be compared by another way.
    """
    data = {name: content(folder / name) for name in (LIST, *FILES)}
    root = data["root.pem"].decode("ascii", "replace")
    identity.read_root(root, "root.pem")
    listed = signed.parsed(data[LIST], LIST)
    try:
        signed.verified_by_root(listed, KIND, root)
    except Refused as e:
        raise Refused(f"{LIST}: {e}") from e
    files = listed.get("files")
    if not isinstance(files, dict) or set(files) != set(FILES):
        raise Refused(f"{LIST} does not list the files of a kit: {', '.join(FILES)}")
    for name in FILES:
        if hashlib.sha256(data[name]).hexdigest() != files[name]:
            raise Refused(f"{name} is not as the root of the consortium signed it: have the kit sent again")
    members = roster.opened(signed.parsed(data["roster.json"], "roster.json"), root, "roster.json")
    return Kit(root, data["certificate.pem"].decode("ascii"), members, data["roster.json"].decode("ascii"))


def content(path: Path) -> bytes:
    """The bytes of a file of a kit. Raises Refused where it is missing, no plain file, or far too large."""
    if path.is_symlink() or not path.is_file():
        raise Refused(f"{path.name} is missing from the kit in {path.parent}: have the kit sent again")
    if path.stat().st_size > signed.MOST_BYTES:
        raise Refused(f"{path.name} has more than {signed.MOST_BYTES} bytes, too many for a file of a kit")
    return path.read_bytes()
