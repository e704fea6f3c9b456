"""A member's folder: its key, its certificate, the root that it believes and the roster. The key never leaves it."""

import tomllib
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fedscan import wire
from fedscan.consortium import checks, identity, keys, kit, roster
from fedscan.consortium.identity import Identity, Role, in_role, well_named
from fedscan.consortium.keys import fingerprint, spoken
from fedscan.consortium.roster import Roster
from fedscan.spec import Refused

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

FILE, KEY, REQUEST = "site.toml", "key.pem", "request.csr"
CERTIFICATE, ROOT, ROSTER = "certificate.pem", "root.pem", "roster.json"


@dataclass(frozen=True)
class Home:
    """A member's folder. What lies in it is read, and checked, when it is asked for.

    Raises ValueError (Refused) for what is missing, was changed, or may be read by others.
    """

    folder: Path
    name: str
    role: Role

    @cached_property
    def key(self) -> "EllipticCurvePrivateKey":
        """The private key."""
        return keys.read_key(self.folder / KEY)

    @cached_property
    def root(self) -> str:
        """The certificate (PEM) of the consortium's root, in which this member believes."""
        found = self.text(ROOT)
        identity.read_root(found, ROOT)
        return found

    @cached_property
    def certificate(self) -> str:
        """This member's certificate (PEM)."""
        return self.text(CERTIFICATE)

    @cached_property
    def roster(self) -> Roster:
        """The newest roster that was imported."""
        self.text(ROSTER)
        return roster.read(self.folder / ROSTER, self.root)

    @property
    def consortium(self) -> str:
        """The name of the consortium."""
        return identity.consortium_of(self.root)

    def identity(self, now: datetime | None = None) -> Identity:
        """Who this member is, by its certificate, the root and the roster. Raises Refused where it is one no more."""
        return checks.checked(self.certificate, self.root, self.roster.members, self.role, self.name, now)

    def text(self, name: str) -> str:
        """The text of a file that came with the kit."""
        path = self.folder / name
        if not path.exists():
            raise ValueError(
                f"{self.folder} has no {name} yet: send {REQUEST} to the coordinator, and import the kit that comes "
                "back with `fedscan site import`"
            )
        return path.read_text(encoding="ascii", errors="replace")


def begin(name: str, role: str, folder: Path) -> Home:
    """Makes a member's folder, with a private key that stays in it and the request to be sent to the coordinator.

    Raises ValueError where the name cannot be one, or the folder holds anything.
    """
    well_named(name, "a member's name")
    home = Home(folder, name, in_role(role))
    keys.make_folder(folder)
    key = keys.make_key(folder / KEY)
    put(folder / REQUEST, identity.request(name, home.role, key))
    describe(home)
    return home


def read(folder: Path) -> Home:
    """The member's folder that lies here. Raises ValueError where none does."""
    path = folder / FILE
    if not path.exists():
        raise ValueError(f"{folder} is not a member's folder: make one with `fedscan site init NAME --folder {folder}`")
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
        return Home(folder, well_named(told["name"]), in_role(told["role"]))
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} does not say who is at home here ({e}): take it from a copy") from e


def take_kit(home: Home, folder: Path, root: str | None = None, now: datetime | None = None) -> Roster:
    """Takes over root, certificate and roster from the kit in ``folder``, if every byte of it is the root's.

    ``root`` is the fingerprint of the root's key, as the coordinator gave it by another way than the kit's. Raises
    Refused, naming the file, for anything that was changed, is not this member's, or is older than what is here.
    """
    found = kit.read(folder)
    hold_root(home, found.root, root)
    who = checks.checked(found.certificate, found.root, found.roster.members, home.role, home.name, now)
    if who.key != fingerprint(home.key.public_key()):
        raise Refused(f"{CERTIFICATE} is for another key than {home.folder / KEY}: send the {REQUEST} of this folder")
    roster.hold_newer(found.roster, current(home), ROSTER)
    put(home.folder / ROOT, found.root)
    put(home.folder / CERTIFICATE, found.certificate)
    put(home.folder / ROSTER, found.roster_text)
    describe(home, found.roster.consortium)
    return found.roster


def take_roster(home: Home, path: Path, root: str | None = None, now: datetime | None = None) -> Roster:
    """Takes over a newer roster. Raises Refused where it is not the root's, or older than the one that is here.

    ``root`` is as in ``take_kit``. A roster that revokes this member is taken over too, and then said by Refused.
    """
    hold_root(home, home.root, root)
    found = roster.read(path, home.root)
    roster.hold_newer(found, current(home), path.name)
    put(home.folder / ROSTER, path.read_text(encoding="ascii"))
    checks.checked(home.certificate, home.root, found.members, home.role, home.name, now)
    return found


def hold_root(home: Home, root: str, told: str | None) -> None:
    """Raises Refused for another root than the one that was told, or that this member believes in already."""
    mark = fingerprint(identity.read_root(root, ROOT).public_key())
    if told is not None and keys.unspoken(told) != mark:
        raise Refused(
            f"{ROOT} has the fingerprint {spoken(mark)}, not the one that you were told: import nothing of it"
        )
    if (home.folder / ROOT).exists() and home.root != root:
        raise Refused(
            f"{ROOT} is that of another root than the one that {home.folder} believes in: ask the coordinator"
        )


def current(home: Home) -> Roster | None:
    """The roster that is here, if there is one."""
    return home.roster if (home.folder / ROSTER).exists() else None


def describe(home: Home, consortium: str | None = None) -> None:
    """Writes who is at home here."""
    lines = [
        f'name = "{home.name}"',
        f'role = "{home.role}"',
        *([f'consortium = "{consortium}"'] if consortium else []),
    ]
    put(home.folder / FILE, "\n".join(lines) + "\n")


def put(path: Path, text: str) -> None:
    """Writes a text, whole or not at all, and past a power cut."""
    wire.replace_file(path, lambda file: file.write(text.encode()), durable=True)
