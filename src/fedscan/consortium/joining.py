"""A hospital takes part in a study: its cases read, its desk set up, each question held to what it has agreed to."""

import hmac
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from fedscan import __version__
from fedscan.consortium import approval, catalogue
from fedscan.consortium.asks import Asks
from fedscan.consortium.catalogue import DIGITS
from fedscan.consortium.identity import now_or
from fedscan.consortium.policy import MB, Policy, answers_at, read_policy, refusals
from fedscan.consortium.proposals import POLICY, Office
from fedscan.consortium.sealing import KeySeal
from fedscan.engines.desk import Desk
from fedscan.engines.envelope import Talk
from fedscan.memory import Event, nothing
from fedscan.run import Problem
from fedscan.spec import Refused
from fedscan.study import Study
from fedscan.studyfile import Cases, StudyFile, build, read_cases
from fedscan.studyfile.cases import Tell, silent
from fedscan.studyfile.file import digest

RUNS = "runs"  # below the hospital's folder: what it remembers of each run


class Guard:
    """Whether a question is answered now: under the signed yes and the policy as they are at that moment."""

    def __init__(self, office: Office, asks: Asks, clock: Callable[[], datetime] = lambda: now_or(None)) -> None:
        self.office, self.asks, self.clock = office, asks, clock
        self._looked: tuple[Any, ...] = ()

    def __call__(self, question: str, nbytes: int) -> str:
        """Why the question is not answered now, or "". Raises Refused where the hospital does not agree (any more)."""
        now, name = self.clock(), self.office.home.name
        policy = self.agreed(now)
        most = policy.leaves.largest_message_mb
        if nbytes > most * MB:
            raise Refused(f"the policy of {name} takes {most:g} MB at once, and a message has {nbytes / MB:.1f} MB")
        if not answers_at(policy, now.astimezone()):
            return f"{name} answers {' and '.join(policy.answers.windows)} (its time)"
        return ""

    def agreed(self, now: datetime) -> Policy:
        """The policy. Raises Refused unless a signed yes to exactly this, under exactly it, holds at this moment."""
        home = self.office.home
        policy = read_policy(home.folder / POLICY)
        refused = refusals(policy, self.asks, self.asks.cases)
        stands = approval.standing(home, self.asks, policy, refused, now)
        if stands.state != "approved":
            raise Refused(f"{home.name} does not agree to this study: it is {stands.state}")
        return policy


@dataclass(frozen=True)
class Ready:
    """What a hospital has made ready for a study: the study on its own cases, and how they are called outside."""

    file: StudyFile
    study: Study
    cases: Cases
    asks: Asks
    names: Mapping[str, str]  # of cases and patients: what is said outside in place of each


def taking_part(file: StudyFile, members: list[str]) -> tuple[str, ...]:
    """The hospitals of a study: those that it names, else all members. Raises Problem for one that is none."""
    for name in file.data.sites or ():
        if name not in members:
            raise file.places.wrong(
                ("data", "sites"), name, f"a hospital on the roster ({', '.join(members)})", members
            )
    return tuple(sorted(file.data.sites or members))


def last_agreed(office: Office) -> StudyFile:
    """The study that was approved last. Raises Problem where none was."""
    found = approval.last_approved(office.home, now=office.now)
    if found is None:
        raise Problem(f"{office.home.name} has agreed to no study yet: look at one with `fedscan site study`.")
    return office.study(found.study)


def ready(office: Office, file: StudyFile, asks: Asks, cache: Path | None = None, tell: Tell = silent) -> Ready:
    """Reads the hospital's cases for a study. Raises Problem where they are not as they were registered."""
    name, known = office.home.name, office.catalogue
    cases = read_cases(file.on(Path(known.folder)), cache, tell, site=name)
    secret = catalogue.secret_of(office.home.folder)
    ids = {item.case: item.id[:DIGITS] for item in known.items}
    used = [case for kept in cases.of[name].values() for case in kept]
    if strange := [case.name for case in used if case.name not in ids]:
        raise Problem(f"{len(strange)} cases, such as {strange[0]!r}, are not registered: register your scans again, "
                      "with `fedscan site data`.")  # fmt: skip
    names = {**{case.subject: outside(case.subject, secret) for case in used}, **ids}
    of = {name: {part: tuple(replace(c, name=ids[c.name], subject=names[c.subject]) for c in kept)
                 for part, kept in cases.of[name].items()}}  # fmt: skip
    mine = build(file, replace(cases, of=of))
    study = replace(mine, names=asks.sites)
    return Ready(file, study, cases, asks, names)


def outside(subject: str, secret: bytes) -> str:
    """How a patient is called outside: a code that only the hospital can trace back."""
    return hmac.new(secret, f"subject:{subject}".encode(), sha256).hexdigest()[:DIGITS]


def desk(
    office: Office, found: Ready, log: Callable[[str], None] = nothing, event: Event = nothing, durable: bool = True
) -> Desk:
    """The hospital's end of the conversation about a study that it has agreed to. Raises Refused where it has not."""
    home, guard = office.home, Guard(office, found.asks)
    guard.agreed(now_or(None))
    said = told(found)

    def about() -> dict[str, Any]:
        guard.agreed(now_or(None))
        return said

    most = int(office.policy.leaves.largest_message_mb * MB)
    talk = Talk(found.asks.hash, "", found.asks.coordinator)
    hidden = Hidden([*found.names, str(home.folder.absolute()), office.catalogue.folder])
    return Desk(
        found.study, home.name, home.folder / RUNS, talk, KeySeal(home, "coordinator"), about=about,
        facts=digest(said["splits"]), permit=guard, most=most, hide=hidden, log=log, event=event, durable=durable,
    )  # fmt: skip


def told(found: Ready) -> dict[str, Any]:
    """What a hospital says of itself before the first round: counts, the cases' codes by split, its numerics.

    ``agreed`` is what its yes says of each question: the bytes of an answer, and how many answers, at most.
    """
    (row,) = (row for row in found.cases.rows)
    splits = {part: [found.names[case.name] for case in kept] for part, kept in found.cases.of[row.name].items()}
    agreed = {q.name: [q.up, q.times * q.rounds + q.last] for q in found.asks.questions}
    return {
        "agreed": agreed, "numerics": found.file.numerics(), "fedscan": __version__, "splits": splits,
        "expected": row.expected, "used": row.used, "left_out": len(row.left_out),
    }  # fmt: skip


def hold_alone(folder: Path) -> IO[str]:
    """Keeps other processes of this hospital out until what is returned is closed. Raises Problem where one is in."""
    import fcntl

    file = (folder / "join.lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise Problem(f"another `fedscan join` is at work in {folder}: one at a time answers for a hospital.") from None
    return file


class Hidden:
    """Takes out of a sentence what must not leave: the names of cases and patients, and where files lie."""

    def __init__(self, names: list[str]) -> None:
        longest_first = sorted({name for name in names if name}, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._paths = re.compile(r"(?:/[^\s/:'\"]+){2,}/?")

    def __call__(self, text: str) -> str:
        return self._paths.sub("…", self._names.sub("…", text))
