"""A hospital takes part in a study: its cases read, its desk set up, each question held to what it has agreed to."""

import hmac
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from fedscan import __version__
from fedscan.consortium import approval, catalogue
from fedscan.consortium.approval import Decision
from fedscan.consortium.asks import Asks
from fedscan.consortium.asks import taking_part as taking_part
from fedscan.consortium.catalogue import DIGITS
from fedscan.consortium.identity import now_or
from fedscan.consortium.policy import MB, Policy, answers_at, read_policy, refusals
from fedscan.consortium.proposals import POLICY, Office
from fedscan.consortium.sealing import KeySeal
from fedscan.data.manifest import read_manifest
from fedscan.data.records import Manifest
from fedscan.engines import alone
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
# Whatever stands in quotes with a slash in it, blanks too, and each word with one.
PATHS = re.compile(r"""(?<!\w)(['"])[^'"]*[/\\][^'"]*\1|[^\s'":()]*[/\\][^\s'":(),;]*""")


class Guard:
    """Whether a question is answered now: under the signed yes and the policy as they are at that moment.

    ``held`` is what the study asks of the cases that are really used, to which the policy is held.
    """

    def __init__(
        self, office: Office, asks: Asks, held: Asks, clock: Callable[[], datetime] = lambda: now_or(None)
    ) -> None:
        self.office, self.asks, self.held, self.clock = office, asks, held, clock

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
        return self._yes(now)[0]

    def since(self) -> float:
        """When the yes was signed, in seconds since 1970."""
        return self._yes(self.clock())[1].when.timestamp()

    def _yes(self, now: datetime) -> tuple[Policy, Decision]:
        home = self.office.home
        policy = read_policy(home.folder / POLICY)
        refused = refusals(policy, self.held, self.held.cases)
        stands = approval.standing(home, self.asks, policy, refused, now)
        if stands.state != "approved" or stands.decision is None:
            raise Refused(f"{home.name} does not agree to this study: it is {stands.state}")
        return policy, stands.decision


@dataclass(frozen=True)
class Ready:
    """What a hospital has made ready for a study: the study on its own cases, and how they are called outside.

    asks   what the study asks by the catalogue, to which a yes is given;  held: by the cases that are really used
    """

    file: StudyFile
    study: Study
    cases: Cases
    asks: Asks
    held: Asks
    names: Mapping[str, str]  # of cases and patients: what is said outside in place of each
    private: frozenset[str]  # what no sentence may hold

    @property
    def limits(self) -> dict[str, int]:
        """How many answers to each question leave in a run at most, as the yes says."""
        return {q.name: q.times * q.rounds + q.last for q in self.asks.questions}


def last_agreed(office: Office) -> StudyFile:
    """The study that was approved last. Raises Problem where none was."""
    found = approval.last_approved(office.home, now=office.now)
    if found is None:
        raise Problem(f"{office.home.name} has agreed to no study yet: look at one with `fedscan site study`.")
    return office.study(found.study)


def ready(office: Office, file: StudyFile, asks: Asks, cache: Path | None = None, tell: Tell = silent) -> Ready:
    """Reads the hospital's cases for a study.

    Raises Problem where they are not as they were registered, or fewer are used than the policy asks for.
    """
    name, known = office.home.name, office.catalogue
    cases = read_cases(file.on(Path(known.folder)), cache, tell, site=name)
    held = held_to(office, file, cases)
    secret, scans = catalogue.secret_of(office.home.folder), read_manifest(Path(known.folder))
    ids = {item.case: item.id for item in known.items}
    used = [case for kept in cases.of[name].values() for case in kept]
    hold_registered(ids, [case.name for case in used], scans, secret)
    codes = {case.name: outside(ids[case.name], asks.hash, secret) for case in used}
    patients = {case.subject: outside(f"subject:{case.subject}", asks.hash, secret) for case in used}
    of = {name: {part: tuple(replace(c, name=codes[c.name], subject=patients[c.subject]) for c in kept)
                 for part, kept in cases.of[name].items()}}  # fmt: skip
    study = replace(build(file, replace(cases, of=of)), names=asks.sites)
    return Ready(file, study, cases, asks, held, {**patients, **codes}, private(office, scans))


def held_to(office: Office, file: StudyFile, cases: Cases) -> Asks:
    """What a study asks of the cases that are really used. Raises Problem where the policy refuses any of that."""
    (row,) = cases.rows
    held = office.asks(file, row.used, row.train)
    if refused := refusals(office.policy, held, row.used):
        raise Problem(f"{row.used} of your {row.expected} cases are used, {row.train} of them to train, and so the "
                      f"policy refuses this study: {refused[0]}")  # fmt: skip
    return held


def hold_registered(ids: Mapping[str, str], used: Sequence[str], scans: Manifest, secret: bytes) -> None:
    """Raises Problem where cases are not registered, or hold something else than when they were."""
    found = {case.name: case for case in scans.cases}
    for what, those in (
        ("are not registered", [name for name in used if name not in ids]),
        ("hold other scans than when they were registered",
         [name for name in used if name in ids and catalogue.identifier(found[name], secret) != ids[name]]),
    ):  # fmt: skip
        if those:
            raise Problem(f"{len(those)} cases, such as {those[0]!r}, {what}: register your scans again, with "
                          "`fedscan site data`.")  # fmt: skip


def outside(what: str, study: str, secret: bytes) -> str:
    """How a case or a patient is called outside, in one study: a code that only the hospital can trace back."""
    return hmac.new(secret, f"{study}:{what}".encode(), sha256).hexdigest()[:DIGITS]


def desk(
    office: Office, found: Ready, log: Callable[[str], None] = nothing, event: Event = nothing, durable: bool = True
) -> Desk:
    """The hospital's end of the conversation about a study that it has agreed to. Raises Refused where it has not."""
    home, guard = office.home, Guard(office, found.asks, found.held)
    guard.agreed(now_or(None))
    said = told(found)

    def about() -> dict[str, Any]:
        guard.agreed(now_or(None))
        return said

    most = int(office.policy.leaves.largest_message_mb * MB)
    talk = Talk(found.asks.hash, "", found.asks.coordinator)
    facts = digest({"splits": said["splits"], "files": {name: [*files] for name, files in found.cases.files.items()}})
    return Desk(
        found.study, home.name, home.folder / RUNS, talk, KeySeal(home, "coordinator"), about=about,
        facts=facts, permit=guard, most=most, limits=found.limits, runs=1, since=guard.since,
        hide=Hidden(found.private), log=log, event=event, durable=durable,
    )  # fmt: skip


def told(found: Ready) -> dict[str, Any]:
    """What a hospital says of itself before the first round: counts, the cases' codes by split, its numerics.

    ``agreed`` is what its yes says of each question: the bytes of an answer, and how many answers, at most.
    """
    (row,) = (row for row in found.cases.rows)
    splits = {part: [found.names[case.name] for case in kept] for part, kept in found.cases.of[row.name].items()}
    agreed = {q.name: [q.up, found.limits[q.name]] for q in found.asks.questions}
    return {
        "agreed": agreed, "numerics": found.file.numerics(), "fedscan": __version__, "splits": splits,
        "expected": row.expected, "used": row.used, "left_out": len(row.left_out),
    }  # fmt: skip


def hold_alone(folder: Path) -> IO[str]:
    """Keeps other processes of this hospital out until what is returned is closed. Raises ValueError where one is."""
    taken = f"another `fedscan join` is at work in {folder}: one at a time answers for a hospital."
    return alone.hold(folder / "join.lock", taken)


class Hidden:
    """Takes out of a sentence what must not leave: the names of cases and patients, and where files lie.

    Names count however their letters are written, and inside of words; those of 1 to 3 letters as whole words only.
    """

    def __init__(self, names: Iterable[str]) -> None:
        longest_first = sorted({normal(name) for name in names if name}, key=len, reverse=True)
        words = [re.escape(name) if len(name) > 3 else rf"(?<!\w){re.escape(name)}(?!\w)" for name in longest_first]
        self._names = re.compile("|".join(words) or r"(?!)", re.IGNORECASE)

    def __call__(self, text: str) -> str:
        return PATHS.sub("…", self._names.sub("…", normal(text)))


def normal(text: str) -> str:
    """A text in the one form of its letters in which texts are compared."""
    return unicodedata.normalize("NFC", text)


def private(office: Office, scans: Manifest) -> frozenset[str]:
    """What no sentence may hold: the names of all cases, patients and files, used or not, and of the folders."""
    known = office.catalogue
    paths = [path for case in scans.cases for path in (*case.images.values(), case.label) if path]
    below = [path.relative_to(scans.root) for path in paths if path.is_relative_to(scans.root)]
    folders = [office.home.folder.absolute(), office.home.folder.resolve(), Path(known.folder)]
    people = [name for item in known.items for name in (item.case, item.subject)]
    return frozenset([*people, *map(str, (*paths, *below, *folders)), *(path.name for path in paths)])
