"""The studies that lie before a hospital: kept in its folder as they were read, and how each of them stands."""

import json
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from fedscan import wire
from fedscan.consortium import approval, catalogue, member
from fedscan.consortium.approval import Decision, Standing
from fedscan.consortium.asks import Asks, Hospital, asks_of, hash_of, taking_part
from fedscan.consortium.catalogue import Catalogue
from fedscan.consortium.identity import Role, now_or
from fedscan.consortium.keys import refusing
from fedscan.consortium.member import Home
from fedscan.consortium.policy import Policy, read_policy, refusals
from fedscan.consortium.words import difference
from fedscan.run import Problem
from fedscan.spec import Refused
from fedscan.studyfile.file import StudyFile, again, load

POLICY, STUDIES = "policy.toml", "studies"


@dataclass(frozen=True)
class Proposal:
    """A study before a hospital: what it asks, what the policy refuses, how it stands, and the last yes to another."""

    asks: Asks
    refused: list[str]
    standing: Standing
    last: Decision | None

    @property
    def compared(self) -> list[str]:
        """How it asks otherwise than the study that was approved last."""
        return difference(self.last.asks, self.asks) if self.last else []


@dataclass(frozen=True)
class Office:
    """A hospital's folder with what its decisions need: who it is, its policy, its cases, and the consortium."""

    home: Home
    now: datetime

    @cached_property
    def policy(self) -> Policy:
        """The policy. Raises Problem where there is none yet."""
        path = self.home.folder / POLICY
        if not path.exists():
            raise Problem(f"{self.home.folder} has no {POLICY} yet: write one with `fedscan site policy`, and read it.")
        return read_policy(path)

    @cached_property
    def catalogue(self) -> Catalogue:
        """The cases that are registered."""
        return catalogue.read(self.home.folder)

    def members(self, role: Role) -> list[str]:
        """The names of the consortium's members of a role, as they are today."""
        return self.home.roster.names(role, self.now)

    def coordinator(self) -> str:
        """Who asks: the coordinator on the roster. Raises Problem unless there is one."""
        found = self.members("coordinator")
        if len(found) != 1:
            who = f"{len(found)} coordinators ({', '.join(found)})" if found else "no coordinator"
            raise Problem(f"the roster of {self.home.consortium!r} has {who}, and a study comes from one: have "
                          "the roster mended and sent, and import it.")  # fmt: skip
        return found[0]

    def proposal(self, file: StudyFile) -> Proposal:
        """A study as it lies before this hospital. Raises as ``asks`` does, and for what its folder lacks."""
        self.home.identity(self.now)
        required = set(file.data.require)
        asks = self.asks(file, sum(required <= set(item.sequences) for item in self.catalogue.used))
        refused = refusals(self.policy, asks, asks.cases)
        stands = approval.standing(self.home, asks, self.policy, refused, self.now)
        return Proposal(asks, refused, stands, approval.last_approved(self.home, asks.hash, self.now))

    def asks(self, file: StudyFile, cases: int, trained: int | None = None) -> Asks:
        """What a study asks of so many cases, of which ``trained`` train.

        Raises as ``asks_of`` does, and Problem where this hospital is not among those of the study.
        """
        names, known = taking_part(file, self.members("site")), self.catalogue
        if self.home.name not in names:
            raise Problem(f"{file.places.of(('data', 'sites'))}: this study is one of {', '.join(names)}, and nothing "
                          f"is asked of {self.home.name}.")  # fmt: skip
        hospital = Hospital(self.home.name, cases, known.sequences, known.labels or None, known.letters)
        return asks_of(file, hospital, names, self.coordinator(), trained)

    def keep(self, file: StudyFile) -> str:
        """Keeps a study as it was resolved, and returns its hash, under which it can be named from then on."""
        mark = hash_of(file)
        folder = self.home.folder / STUDIES
        folder.mkdir(mode=0o700, exist_ok=True)
        data = json.dumps(file.resolved(), indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        wire.replace_file(folder / f"{mark}.json", lambda out: out.write(data), durable=True)
        return mark

    def study(self, named: str) -> StudyFile:
        """The study in a file, or the one that is kept under a hash or its first 8 digits or more.

        Raises Problem where there is none, and Refused where the one that is kept is not that of the hash any more.
        """
        digits = set(named) <= set("0123456789abcdef") and len(named) >= 8
        if not digits or Path(named).exists():
            return load(named)
        found = [path for path in self.kept() if path.stem.startswith(named)]
        if len(found) != 1:
            raise Problem(f"{len(found) or 'no'} studies are kept under {named!r} in {self.home.folder / STUDIES}: "
                          "look at the study first, with `fedscan site study STUDY.toml`.")  # fmt: skip
        return opened(found[0])

    def kept(self) -> list[Path]:
        """The files of the studies that are kept."""
        return sorted((self.home.folder / STUDIES).glob("*.json"))


def office(folder: Path, now: datetime | None = None) -> Office:
    """The hospital whose folder this is. Raises ValueError where there is none, or it is no hospital's."""
    home = member.read(folder)
    if home.role != "site":
        raise Problem(f"{folder} is the folder of a {home.role}: only a hospital decides on studies, and joins them.")
    return Office(home, now_or(now))


def opened(path: Path) -> StudyFile:
    """The study that is kept in a file. Raises Refused where it is not that of the hash in the file's name."""
    wrong = f"{path} was changed after it was kept: look at the study again, with `fedscan site study STUDY.toml`"
    with refusing(wrong):
        tree: Any = json.loads(path.read_text(encoding="utf-8"))
        file = again(tree, path)
        if hash_of(file) != path.stem:
            raise Refused(wrong)
    return file
