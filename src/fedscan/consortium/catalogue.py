"""What a hospital registers of its data folder: counts, sequences, spacing, label volumes, and what is left out.

The catalogue stays at the hospital. What may be shown outside is made of it by ``shown``, without any number that tells
of fewer patients than the policy's smallest group. Each case has an identifier by which a study's record can name it:
a hash of its content under a key of the hospital's own, so that nobody else can tell which scan it is, or guess it.
"""

import hashlib
import hmac
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fedscan import wire
from fedscan.consortium.keys import OTHERS, refusing
from fedscan.data.check import TooManyLeftOutError, check
from fedscan.data.manifest import read_manifest
from fedscan.data.records import SINGLE_SITE, Case
from fedscan.run import Problem
from fedscan.spec import Refused

FILE, SECRET = "catalogue.json", "catalogue.key"
DIGITS = 16  # of an identifier, by which a case or a patient is called outside: enough to tell those of a study apart


@dataclass(frozen=True)
class Item:
    """One case: its identifier, and what only the hospital knows: the names of case and patient, what it has.

    code, why   why it is left out; empty where it is used
    """

    id: str
    case: str
    subject: str
    sequences: tuple[str, ...]
    labelled: bool
    code: str = ""
    why: str = ""


@dataclass(frozen=True)
class Catalogue:
    """A data folder as it was registered.

    spacing   the median over used cases, in mm by axis;  volumes: the median of each label's volume, in mm cubed
    found     in how many used cases each label value is
    """

    site: str
    folder: str
    made: str
    layout: str
    sequences: tuple[str, ...]
    labels: Mapping[str, int]
    spacing: tuple[float | None, ...]
    volumes: Mapping[str, float | None]
    found: Mapping[str, int]
    items: tuple[Item, ...]
    warnings: tuple[str, ...] = field(default=())

    @property
    def used(self) -> tuple[Item, ...]:
        """The cases that can be used."""
        return tuple(item for item in self.items if not item.code)

    @property
    def left_out(self) -> tuple[Item, ...]:
        """The quarantine list: cases that cannot be used, each with its reason."""
        return tuple(item for item in self.items if item.code)

    @property
    def letters(self) -> int:
        """The bytes of the longest name that stands in a table of scores, escaped as on the wire.

        Cases and patients are named outside by codes, whatever they are called here.
        """
        return max(len(json.dumps(json.dumps(name))) for name in (self.site, "0" * DIGITS))


def register(site: str, scans: Path, folder: Path, now: datetime) -> Catalogue:
    """Opens every file of every case below ``scans``, and writes the catalogue into the hospital's ``folder``.

    Raises Problem where the scans are of more than one hospital, or no case of them can be used: then nothing is
    written. ValueError for what cannot be read as scans.
    """
    manifest = read_manifest(scans)
    if len(manifest.sites) > 1:
        raise Problem(f"{scans}: the cases are of {len(manifest.sites)} hospitals ({', '.join(manifest.sites[:5])}); "
                      f"register those of {site!r} only, in a table of their own.")  # fmt: skip
    if manifest.sites[0] not in (site, SINGLE_SITE):
        raise Problem(f"{scans}: the cases are of {manifest.sites[0]!r}, and this folder is that of {site!r}: give "
                      "them that name in the column site.")  # fmt: skip
    try:
        found = check(manifest, limit=1.0)
    except TooManyLeftOutError as e:
        found = e.catalogue
    if not found.used:
        case, why = found.left_out[0]
        raise Problem(f"{scans}: none of {found.expected} cases can be used, so nothing is registered: {case.name}: "
                      f"{why.sentence} (`fedscan check` lists them all)")  # fmt: skip
    row, secret = found.sites[0], secret_of(folder)
    items = [item(case, secret) for case in found.used]
    items += [item(case, secret, reason.code, reason.sentence) for case, reason in found.left_out]
    catalogue = Catalogue(
        site, str(scans.resolve()), now.isoformat(timespec="seconds"), manifest.layout, manifest.sequences,
        dict(manifest.labels), tuple(known(mm) for mm in row.spacing), {k: known(v) for k, v in row.volumes.items()},
        {str(value): count for value, count in found.values.items()}, tuple(items), found.warnings,
    )  # fmt: skip
    data = json.dumps(asdict(catalogue), indent=1, ensure_ascii=False, allow_nan=False).encode()
    wire.replace_file(folder / FILE, lambda file: file.write(data + b"\n"), durable=True)
    return catalogue


def read(folder: Path) -> Catalogue:
    """The catalogue in a hospital's folder. Raises Problem where there is none, and Refused where it is damaged."""
    path = folder / FILE
    if not path.exists():
        raise Problem(f"{folder} has no {FILE} yet: register your scans first, with `fedscan site data`.")
    with refusing(f"{path} is not a catalogue as this version writes it: register your scans again"):
        tree = json.loads(path.read_text(encoding="utf-8"))
        items = tuple(Item(**{**item, "sequences": tuple(item["sequences"])}) for item in tree["items"])
        lists = {key: tuple(tree[key]) for key in ("sequences", "spacing", "warnings")}
        return Catalogue(**{**tree, **lists, "items": items})


def known(value: float) -> float | None:
    """A number, or None where it is not defined."""
    return value if math.isfinite(value) else None


def item(case: Case, secret: bytes, code: str = "", why: str = "") -> Item:
    """A case as it stands in the catalogue."""
    return Item(identifier(case, secret), case.name, case.subject, case.present, case.label is not None, code, why)


def identifier(case: Case, secret: bytes) -> str:
    """HMAC-SHA256 under the hospital's key of what a case holds: its sequences' names and files, and its label map.

    The same content has the same identifier whatever it is called; a file that cannot be read counts as its name.
    """
    mac = hmac.new(secret, digestmod=hashlib.sha256)
    for what, path in (*case.images.items(), ("label", case.label)):
        mac.update(f"{len(what)}:{what}:".encode())
        mac.update(b"-" if path is None else content(path))
    return mac.hexdigest()


def content(path: Path) -> bytes:
    """SHA-256 of a file's bytes; of its name, where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return hashlib.sha256(b"unreadable " + path.name.encode()).digest()


def secret_of(folder: Path) -> bytes:
    """The 32 bytes under which identifiers are made, drawn the first time; nobody but the owner may read the file.

    Raises Refused where others may, or the file is damaged.
    """
    path = folder / SECRET
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if path.stat().st_mode & OTHERS:
            raise Refused(f"{path} may be read by others: give it mode 600 (chmod 600 {path.name})") from None
        if len(found := path.read_bytes()) != 32:
            raise Refused(
                f"{path} is damaged: take it from a copy, or delete it and register your scans again"
            ) from None
        return found
    with os.fdopen(handle, "wb") as file:
        file.write(os.urandom(32))
    return path.read_bytes()


def shown(catalogue: Catalogue, smallest: int) -> dict[str, Any]:
    """What may be shown outside: no number that tells of fewer than ``smallest`` patients, and none to subtract it by.

    A withheld number is None. Medians have two digits, for an exact one is that of some patient.
    """
    patients = {one.subject for one in catalogue.used}
    total = len(patients)

    def group(some: Iterable[str]) -> int | None:
        inside = len(set(some) & patients)
        small = any(0 < n < smallest for n in (inside, total - inside))
        return None if small or total < smallest else inside

    quarantined = {one.subject for one in catalogue.left_out}
    enough = total >= smallest
    return {
        "site": catalogue.site,
        "patients": total if enough or not total else None,
        "cases": len(catalogue.used) if enough or not total else None,
        "left_out": None if 0 < len(quarantined) < smallest else len(catalogue.left_out),
        "patients_by_sequence": {
            name: group(one.subject for one in catalogue.used if name in one.sequences) for name in catalogue.sequences
        },
        "patients_labelled": group(one.subject for one in catalogue.used if one.labelled),
        "spacing_mm": [rounded(mm) for mm in catalogue.spacing] if enough else None,
        "volumes_mm3": {
            name: rounded(volume) if enough and patients_with(catalogue, name) >= smallest else None
            for name, volume in catalogue.volumes.items()
        },
        "smallest_group": smallest,
    }


def patients_with(catalogue: Catalogue, label: str) -> int:
    """At least how many patients' label maps a median volume is of: of a patient with several cases, one may count."""
    several = len(catalogue.used) - len({one.subject for one in catalogue.used})
    having = catalogue.found.get(str(catalogue.labels.get(label, label)), 0)
    return max(0, having - several)


def rounded(value: float | None) -> float | None:
    """A number with two digits."""
    return None if value is None else float(f"{value:.2g}")
