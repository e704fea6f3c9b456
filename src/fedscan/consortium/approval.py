"""A hospital's signed yes or no to one study, as it was read, under one policy.

An approval holds for exactly what was signed: the study's hash, all that it asks and the policy's hash. Whatever of
these is another, stricter or looser, brings the study back to proposed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from fedscan.consortium import signed
from fedscan.consortium.asks import Asks, mark, read
from fedscan.consortium.identity import TOLERANCE, day, now_or
from fedscan.consortium.keys import refusing
from fedscan.consortium.member import Home
from fedscan.consortium.policy import Policy
from fedscan.consortium.roster import moment, reason
from fedscan.spec import Refused

FOLDER, KIND = "approvals", "approval"
ENTRIES = {"kind", "site", "answer", "why", "study", "policy", "mark", "asks", "when", "until", "who"}
State = Literal["proposed", "approved", "rejected", "expired"]


@dataclass(frozen=True)
class Decision:
    """What a hospital has signed, once its signature was found to hold.

    study, policy, mark   SHA-256 of the study, of the policy, and of all that is asked
    """

    answer: Literal["approved", "rejected"]
    study: str
    policy: str
    mark: str
    asks: Asks
    when: datetime
    until: datetime | None
    who: str
    why: str


@dataclass(frozen=True)
class Standing:
    """How a study stands at a hospital, and why in a sentence; ``decision`` is what was signed, if that holds."""

    state: State
    why: str
    decision: Decision | None = None


def decide(
    home: Home, asks: Asks, policy: Policy, refused: Sequence[str], *, who: str,
    until: datetime | None = None, now: datetime | None = None,
) -> Path:  # fmt: skip
    """Signs a yes to a study with the hospital's key, and returns the file.

    ``refused`` is what the policy does not allow: a study of which anything is refused cannot be approved. Raises
    Refused then, and where the hospital is no member any more; ValueError for an end that is past.
    """
    at = now_or(now)
    if refused:
        raise Refused(f"the policy refuses this study: {refused[0]} Change the policy, if that is right, or the study.")
    if until is not None and until <= at:
        raise ValueError(f"the approval would have ended on {day(until)}, before it began: give a later --until")
    return put(home, asks, policy, "approved", who, at, until=until)


def reject(home: Home, asks: Asks, policy: Policy, why: str, *, who: str, now: datetime | None = None) -> Path:
    """Signs a no to a study, with its reason, and returns the file."""
    return put(home, asks, policy, "rejected", who, now_or(now), why=reason(why))


def put(
    home: Home, asks: Asks, policy: Policy, answer: str, who: str, at: datetime, *,
    until: datetime | None = None, why: str = "",
) -> Path:  # fmt: skip
    """Writes a signed decision, instead of an earlier one on the same study."""
    if home.role != "site":
        raise Refused(f"{home.name} is a {home.role} of the consortium, and only a site is asked")
    home.identity(at)
    document = {
        "kind": KIND, "site": home.name, "answer": answer, "why": why, "study": asks.hash, "policy": policy.hash,
        "mark": mark(asks), "asks": asks.plain(), "when": at.isoformat(),
        "until": None if until is None else until.isoformat(), "who": named(who),
    }  # fmt: skip
    path = file_of(home, asks.hash)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    signed.write(path, signed.sign(document, home.key, home.certificate))
    return path


def named(who: str) -> str:
    """Who decides, on one line. Raises ValueError for what cannot stand in a record."""
    text = " ".join(who.split())
    if not 0 < len(text) <= 100 or not text.isprintable():
        raise ValueError("--who takes a name of 1 to 100 characters, which stands in the record")
    return text


def file_of(home: Home, study: str) -> Path:
    """Where the decision on a study lies. ValueError where ``study`` is no hash."""
    if len(study) != 64 or set(study) - set("0123456789abcdef"):
        raise ValueError(f"{study[:80]!r} is not the hash of a study")
    return home.folder / FOLDER / f"{study}.json"


def standing(
    home: Home, asks: Asks, policy: Policy, refused: Sequence[str] = (), now: datetime | None = None
) -> Standing:
    """How a study stands here: approved only where a signed yes is to this study, asking this, under this policy.

    ``refused`` is what the policy does not allow today. Never raises for what lies in the file: a decision that cannot
    be relied upon is none.
    """
    path, at = file_of(home, asks.hash), now_or(now)
    if not path.exists():
        return Standing("proposed", "nobody has decided on it")
    try:
        found = decision_in(path, home, at)
    except Refused as e:
        return Standing("proposed", f"what was signed cannot be relied upon: {e}")
    if found.study != asks.hash:
        return Standing("proposed", "what was signed is of another study")
    if found.answer == "rejected":
        return Standing("rejected", found.why, found)
    return approved(found, asks, policy, refused, at)


def approved(found: Decision, asks: Asks, policy: Policy, refused: Sequence[str], at: datetime) -> Standing:
    """How a study stands that was approved once."""
    if found.mark != mark(asks):
        return Standing("proposed", "it would ask otherwise than was approved", found)
    if found.policy != policy.hash:
        return Standing("proposed", "the policy is another than when it was approved", found)
    if refused:
        return Standing("proposed", f"the policy refuses it: {refused[0]}", found)
    if found.when > at + TOLERANCE:
        return Standing("proposed", f"it was approved on {day(found.when)}, which is to come: check the clock", found)
    if found.until is not None and at >= found.until:
        return Standing("expired", f"the approval ended on {day(found.until)}", found)
    until = f" until {day(found.until)}" if found.until else ""
    return Standing("approved", f"by {found.who} on {day(found.when)}{until}", found)


def decision_in(path: Path, home: Home, now: datetime | None = None) -> Decision:
    """The decision in a file. Raises Refused unless this hospital signed it, whole and as its own."""
    root, members = home.root, home.roster.members
    with refusing(f"{path.name} is not a decision as fedscan writes it, or was changed"):
        document = signed.read(path)
        signed.verified(document, KIND, root, members, "site", home.name, now)
        return opened(document, home.name)


def opened(document: dict[str, Any], site: str) -> Decision:
    """The decision that a verified document is. Raises Refused where it is not one, or does not agree with itself."""
    if set(document) != {*ENTRIES, "signer", "signature"} or document["site"] != site:
        raise Refused(f"it is not a decision of {site!r} as this version of fedscan signs it")
    try:
        asks = read(document["asks"])
        until = None if document["until"] is None else moment(document["until"])
        found = Decision(document["answer"], document["study"], document["policy"], document["mark"], asks,
                         moment(document["when"]), until, str(document["who"]), str(document["why"]))  # fmt: skip
    except (ValueError, TypeError, KeyError) as e:
        raise Refused(f"it is not a decision as this version of fedscan signs it ({e})") from e
    if found.answer not in ("approved", "rejected") or found.asks.hash != found.study or mark(asks) != found.mark:
        raise Refused("it does not agree with itself")
    return found


def last_approved(home: Home, besides: str = "", now: datetime | None = None) -> Decision | None:
    """The yes that was signed last, to any study but ``besides``: what a new study is compared with."""
    found = []
    for path in sorted((home.folder / FOLDER).glob("*.json")):
        try:
            one = decision_in(path, home, now)
        except Refused:
            continue
        if one.answer == "approved" and one.study != besides and path == file_of(home, one.study):
            found.append(one)
    return max(found, key=lambda one: (one.when, one.study), default=None)


def end_of(text: str) -> datetime:
    """The end of the day that "2027-03-31" names, in UTC. ValueError for what is no day."""
    try:
        return moment(f"{datetime.strptime(text, '%Y-%m-%d').date()}T00:00:00+00:00") + timedelta(days=1)
    except (ValueError, OverflowError) as e:  # the last day of the last year has no next one
        raise ValueError(f"--until {text}: a day was meant, such as 2027-03-31") from e
