"""A record is held to what hospitals have signed: each answer proves its row, and countersigns the rounds before it.

When it is greeted, a hospital signs what it agreed to, and the codes of its cases. With an answer, it signs the last
seal of the record that it was shown. So whoever changes a round that is past and seals all anew would need the keys of
all hospitals that have answered since; at the end they sign the last seal.
"""

import json
import sqlite3
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedscan import wire
from fedscan.chain import has
from fedscan.consortium import identity, member, roster, signed
from fedscan.consortium.keys import fingerprint, refusing, unspoken
from fedscan.consortium.member import Home
from fedscan.engines.envelope import ANSWER, plain
from fedscan.spec import Refused
from fedscan.studyfile.file import digest

END = "countersigned.json"
COLUMNS = ("round", "call", "site", "question", "asked", "status", "answered", "bytes_up", "seconds", "why",
           "asked_at", "due", "document")  # fmt: skip
ROWS = f"SELECT {', '.join(COLUMNS)} FROM turns LEFT JOIN proofs USING (round, call, site)"


@dataclass(frozen=True)
class Countersigned:
    """Whose signatures stand under a record, how many, and the first fault; nobody's, where none was between hospitals.

    ``root`` and ``keys`` are fingerprints; ``ends`` are those who have signed the last seal; ``ahead`` is how many
    rounds at the record's end nobody has countersigned yet.
    """

    root: str = ""
    answers: Mapping[str, int] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    ends: tuple[str, ...] = ()
    ahead: int = 0
    fault: str = ""


def keep_members(home: Home, folder: Path) -> None:
    """Copies the root and the roster, by which signatures are verified, into the run's folder."""
    for name in (member.ROOT, member.ROSTER):
        text = home.text(name)
        wire.replace_file(folder / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]


def keep_end(folder: Path, seal: str, proofs: Mapping[str, str]) -> None:
    """Keeps what hospitals have signed of the record's last seal, beside what others have signed of the same."""
    path, before = folder / END, {}
    with suppress(OSError, ValueError, TypeError, KeyError):  # none yet, or none that could be used
        told = wire.loads(path.read_bytes())
        before = dict(told["signed"]) if told["seal"] == seal else {}
    text = json.dumps({"seal": seal, "signed": {**before, **proofs}}, indent=1, sort_keys=True).encode()
    wire.replace_file(path, lambda file: file.write(text), durable=True)


def verified(folder: Path, db: sqlite3.Connection, root: str = "") -> Countersigned:
    """Holds the record ``db`` of the run in ``folder``, whose chain is sound, to what hospitals have signed.

    ``root`` is the fingerprint of the consortium's root as it was told by another way: then it has to be that one's.
    """
    meta = dict(db.execute("SELECT key, value FROM meta"))
    proofs = has(db, "proofs") and db.execute("SELECT 1 FROM proofs").fetchone()
    if not (proofs or "run" in meta or (folder / member.ROSTER).exists()):
        return Countersigned(fault="no hospital has signed it" if root else "")
    try:
        if not has(db, "proofs") or "run" not in meta or "plugins" not in meta:
            raise Refused("it is of hospitals, and says not of which run, or holds none of their signatures")
        return Witness(folder, db, meta, root).verdict()
    except Refused as e:
        return Countersigned(fault=str(e))


class Witness:
    """One record, the members of its consortium, and what was found of their signatures so far."""

    def __init__(self, folder: Path, db: sqlite3.Connection, meta: Mapping[str, str], root: str) -> None:
        self.folder, self.db, self.meta, self.run = folder, db, meta, meta["run"]
        with refusing("the study that it names cannot be read"):
            self.study = digest({"study": json.loads(meta["study"]), "plugins": json.loads(meta["plugins"])})
        with refusing(f"{folder} has no {member.ROOT} and {member.ROSTER} of the consortium, or they were changed"):
            self.root = (folder / member.ROOT).read_text(encoding="ascii")
            self.roster = roster.read(folder / member.ROSTER, self.root)
        self.mark = fingerprint(identity.read_root(self.root).public_key())
        if root and unspoken(root) != self.mark:
            raise Refused("the root of its consortium is another than the one that you were told")
        self.seals: dict[int, str] = dict(db.execute("SELECT round, seal FROM seals"))
        self.rounds = {seal: round for round, seal in self.seals.items()}
        self.arrived = {tuple(json.loads(turn)): at for at, turn in db.execute("SELECT round, turn FROM arrived")}
        self.covered, self.last = -1, 0.0  # round up to which there is a signature; when the last question was asked
        self.answers: Counter[str] = Counter()
        self.keys: dict[str, str] = {}

    def verdict(self) -> Countersigned:
        """All rows in the order in which they were sealed, then the end. Raises Refused at the first fault."""
        stray = "SELECT round, call, site FROM proofs EXCEPT SELECT round, call, site FROM turns"
        for turn in self.db.execute(stray):
            raise Refused(f"an answer of turn {' '.join(map(str, turn))} is signed, and there is no such turn")
        found = [(self.arrived.get(row[:3], row[0]), *row) for row in self.db.execute(ROWS)]
        for sealed, *values in sorted(found, key=lambda row: row[:4]):
            row = dict(zip(COLUMNS, values, strict=True))
            self.last = max(self.last, row["asked_at"])
            self.row(sealed, row)
        self.greetings()
        ends = self.end()
        head, finished = self.db.execute("SELECT round, finished FROM head").fetchone() or (-1, 0)
        if finished and not ends:
            raise Refused(
                f"no hospital has countersigned its last round, {head}: have them join, and ask them again with "
                "`fedscan serve ... --resume`"
            )
        return Countersigned(self.mark, dict(self.answers), self.keys, ends, head - self.covered)

    def row(self, sealed: int, row: Mapping[str, Any]) -> None:
        """Holds a row to what its hospital has signed."""
        site, text = row["site"], row["document"]
        name = f"the turn {row['round']} {row['call']} {site}"
        if text is None:
            if row["status"] == "answered":
                raise Refused(f"{name} is said to be answered, and {site} has signed no answer")
            return
        told = self.opened(text, site, row["asked_at"], name)
        status = told.get("status")
        said = {"turn": [row["round"], row["call"]], "question": row["question"], "asked": row["asked"]}
        if status == "answered" and row["status"] in ("answered", "refused"):  # for the coordinator may refuse it
            said |= {"answered": row["answered"], "nbytes": row["bytes_up"], "seconds": row["seconds"]}
        elif status != "refused" or row["status"] != "refused" or plain(told.get("why")) != row["why"]:
            raise Refused(f"{name} is {row['status']}, and {site} has signed something else")
        for key, value in said.items():
            if told.get(key) != value:
                raise Refused(f"{name} has another entry {key!r} than {site} has signed")
        self.countersigns(site, told.get("ledger"), row["round"], sealed, bool(row["due"]))
        self.answers[site] += 1

    def countersigns(self, site: str, ledger: object, asked: int, sealed: int, started: bool) -> None:
        """Holds the round before an answer, or that before it arrived, to the seal that its hospital was shown."""
        rounds = range(asked - 1, sealed if started else asked)
        shown = self.rounds.get(ledger, -1) if isinstance(ledger, str) else -1
        if shown not in rounds:
            raise Refused(
                f"round {rounds[0]} was sealed anew, or others were shown another record: {site} has countersigned "
                f"the seal {str(ledger)[:12]} in round {asked}, and here it is {self.seals.get(rounds[0], '')[:12]}"
            )
        self.covered = max(self.covered, shown)

    def greetings(self) -> None:
        """Holds what the hospitals are said to have agreed to, and which cases they have, to what each has signed."""
        with refusing("what hospitals have said of themselves cannot be read"):
            agreed, signed, facts = (dict(json.loads(self.meta[key])) for key in ("agreed", "greeted", "facts"))
            splits = dict(facts["splits"])
        if not agreed.keys() == signed.keys() == splits.keys():
            raise Refused("not every hospital of it has signed what it agreed to, or another one has")
        for site, text in signed.items():
            told = self.opened(text, site, 0.0, f"what {site} is said to have agreed to")
            if (told.get("agreed"), told.get("splits")) != (agreed[site], splits[site]):
                raise Refused(f"{site} has signed that it agreed to something else, or has other cases")

    def end(self) -> tuple[str, ...]:
        """Who has signed the last seal, when the coordinator stopped."""
        path = self.folder / END
        if not path.exists():
            return ()
        with refusing(f"{END} cannot be read"):
            found = wire.loads(path.read_bytes())
            seal, documents = str(found["seal"]), dict(found["signed"])
        if seal not in self.rounds:
            raise Refused(f"it has no seal {seal[:12]}, with which it once ended ({END}): it was cut, or made anew")
        for site, text in documents.items():
            told = self.opened(text, site, self.last, f"the end that {str(site)[:60]} is said to have signed")
            if (told.get("status"), told.get("ledger")) != ("ended", seal):
                raise Refused(f"{site} has signed another end than {END} says")
        if documents:
            self.covered = max(self.covered, self.rounds[seal])
        return tuple(sorted(documents)) if self.rounds[seal] == max(self.seals) else ()

    def opened(self, text: object, site: str, asked_at: float, what: str) -> Mapping[str, Any]:
        """What a hospital has signed. Raises Refused unless it was this one, a member when it was asked, of this run.

        Its certificate may have been made since, but it had neither ended nor been revoked when the question was asked.
        """
        with refusing(f"{what}: what stands there is no signed answer"):
            document = signed.parsed(str(text).encode() + b"\n", "it")
            certificate = identity.read_certificate(signed.taken_from(document, ANSWER))
            when = max(datetime.fromtimestamp(asked_at, UTC), certificate.not_valid_before_utc)
        members = {
            key: replace(m, revoked=None, why="") if m.revoked and m.revoked > when else m
            for key, m in self.roster.members.items()
        }
        try:
            who = signed.verified(document, ANSWER, self.root, members, "site", site, when)
        except Refused as e:
            raise Refused(f"{what}: {e}") from e
        if (document.get("run"), document.get("study")) != (self.run, self.study):
            raise Refused(f"{what}: it was signed in another run, or for another study")
        self.keys[site] = who.key
        return document
