"""The chain of a record: every round is sealed by a hash over its rows and over the seal before.

Whoever changes, removes, adds or swaps a settled row breaks the seal of its round and of all that follow, and is found
by reading the record alone. A record that was cut at a round's end, or made anew from its beginning, has a sound chain
of its own: it is found by comparing its last seal with one that was kept elsewhere, such as in the report.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TABLE = "CREATE TABLE IF NOT EXISTS seals (round INTEGER PRIMARY KEY, entries TEXT, seal TEXT) WITHOUT ROWID;"
COLUMNS = (
    "round", "call", "site", "question", "privacy", "asked", "bytes_down", "asked_at", "base", "due", "status",
    "answered", "bytes_up", "seconds", "why", "numbers",
)  # fmt: skip
TURN = ", ".join(f"turns.{column}" for column in COLUMNS)
SAME = """turns.round = json_extract(arrived.turn, '$[0]') AND turns.call = json_extract(arrived.turn, '$[1]')
  AND turns.site = json_extract(arrived.turn, '$[2]')"""
# What a round decides: its own questions, and the answers to earlier ones that arrived in it. What is still under way
# is sealed in the round in which it arrives, or with the end of the run.
TURNS = f"""SELECT {TURN} FROM turns WHERE round = :round AND due = 0 UNION ALL
  SELECT {TURN} FROM arrived JOIN turns ON {SAME} WHERE arrived.round = :round"""
UNDER_WAY = f"""SELECT {TURN} FROM turns WHERE due > 0 AND NOT EXISTS (SELECT 1 FROM arrived WHERE {SAME})"""
# What the sites have signed of these turns; also of one that is not there.
PROOFS = f"""SELECT proofs.* FROM proofs LEFT JOIN turns USING (round, call, site)
  WHERE round = :round AND ifnull(due, 0) = 0 UNION ALL SELECT proofs.* FROM arrived JOIN turns ON {SAME}
  JOIN proofs USING (round, call, site) WHERE arrived.round = :round"""
QUERIES = {
    "turn": TURNS,
    "signed answer": PROOFS,
    "closed call": "SELECT * FROM closed WHERE round = :round",
    "arrival": "SELECT * FROM arrived WHERE round = :round",
    "result": "SELECT * FROM once WHERE round = :round",
    "score": "SELECT * FROM scores WHERE round = :round",
}
ABOUT = {  # what no resumed run may change, in the record's words and in people's
    "study_hash": "study", "study": "study", "names": "sites", "labels": "labels", "facts": "cases (facts)",
    "sites": "sites",
}  # fmt: skip
KEYS = {"closed call": 2, "arrival": 2, "result": 2, "score": 8}  # how many columns name a row; of the others, 3
FIRST = ""  # what stands in place of a seal before the first


def entries_of(db: sqlite3.Connection, round: int, finished: bool) -> Iterator[tuple[str, str]]:
    """What a round settled: the name of each row, and its SHA-256."""
    for kind, query in {**QUERIES, **({"unanswered turn": UNDER_WAY} if finished else {})}.items():
        if kind == "signed answer" and not has(db, "proofs"):
            continue
        for row in db.execute(query, {"round": round}):
            named = [str(v) for v in row[: KEYS.get(kind, 3)]]
            yield f"{kind} {' '.join(named)}", digest(list(row))


def digest(tree: Any) -> str:
    """SHA-256 of a tree's JSON."""
    return hashlib.sha256(json.dumps(tree, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()


def seal_of(before: str, study: str, round: int, state: str, finished: bool, entries: dict[str, str]) -> str:
    """The seal of a round: over the seal before, the study and its cases, the state's SHA-256, and what it settled."""
    return digest([before, study, round, state, finished, sorted(entries.items())])


def about(db: sqlite3.Connection) -> dict[str, str | None]:
    """What a record says that it is of (its study, its sites, the identifiers of their cases): nothing changes it."""
    found = dict(db.execute("SELECT key, value FROM meta"))
    return {key: found.get(key) for key in ABOUT}


def seal(db: sqlite3.Connection, round: int, state: str, finished: bool) -> None:
    """Seals a round whose rows are all written, in the transaction that moves HEAD."""
    entries = dict(entries_of(db, round, finished))
    steady = {key: digest(value) for key, value in about(db).items()}
    mark = seal_of(last_seal(db), digest(steady), round, state, finished, entries)
    content = {"state": state, "finished": finished, "about": steady, "entries": entries}
    db.execute("INSERT INTO seals VALUES (?, ?, ?)", (round, json.dumps(content), mark))


def has(db: sqlite3.Connection, table: str) -> bool:
    """Whether a record has a table; those of older versions have no seals, or no proofs."""
    return db.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone() is not None


def last_seal(db: sqlite3.Connection) -> str:
    """The seal of the last round, which stands for all before it; empty where there is none."""
    found = db.execute("SELECT seal FROM seals ORDER BY round DESC LIMIT 1").fetchone() if has(db, "seals") else None
    return found[0] if found else FIRST


@dataclass(frozen=True)
class Verdict:
    """What reading a record again found: its last seal, how many rounds and rows it covers, and the first fault."""

    seal: str
    rounds: int
    rows: int
    fault: str = ""


def verified(db: sqlite3.Connection, kept: str = "") -> Verdict:
    """Reads a record again, row by row. ``kept`` is a seal that was noted before: it has to be one of the record's.

    The fault is one sentence that names the first row or round that is not as it was sealed; empty where all is sound.
    """
    if not has(db, "seals"):
        return Verdict("", 0, 0, "it has no seals: it was written by an older version, or they were removed")
    try:
        return read_again(db, kept)
    except sqlite3.OperationalError as e:
        return Verdict("", 0, 0, f"an entry cannot be read ({e})")


def read_again(db: sqlite3.Connection, kept: str) -> Verdict:
    """Round after round, up to the first fault."""
    rounds = db.execute("SELECT round, entries, seal FROM seals ORDER BY round").fetchall()
    before, now, rows = FIRST, about(db), 0
    for place, (round, text, mark) in enumerate(rounds):
        if round != place:
            return Verdict(before, place, rows, f"the seal of round {place} is missing")
        try:
            content = json.loads(text)
            sealed, state, finished = dict(content["entries"]), content["state"], content["finished"]
            told = dict(content["about"]) if "about" in content else now  # older versions sealed it as it stands
        except (ValueError, TypeError, KeyError):
            return Verdict(before, place, rows, f"the seal of round {round} cannot be read")
        for key in ABOUT if told is not now else ():
            if told.get(key) != digest(now[key]):
                fault = f"what the record says of its {ABOUT[key]} was changed after round {round} was sealed"
                return Verdict(before, place, rows, fault)
        if fault := compared(sealed, list(entries_of(db, round, finished)), round):
            return Verdict(before, place, rows, fault)
        if mark != seal_of(before, digest(told), round, state, finished, sealed):
            return Verdict(before, place, rows, f"the seal of round {round} does not fit what it seals")
        before, rows = mark, rows + len(sealed)
    return Verdict(before, len(rounds), rows, rest(db, rounds, kept))


def compared(sealed: dict[str, str], found: list[tuple[str, str]], round: int) -> str:
    """The first difference between what was sealed of a round and what is there."""
    left = dict(sealed)
    for name, mark in found:
        if name not in left:
            return f"the {name} was added after round {round} was sealed, or stands there twice"
        if left.pop(name) != mark:
            return f"the {name} was changed after round {round} was sealed"
    return f"the {min(left)} was removed after round {round} was sealed" if left else ""


def rest(db: sqlite3.Connection, rounds: list[tuple[int, str, str]], kept: str) -> str:
    """What no single round shows: HEAD, rows of rounds that were never sealed, and a seal that was kept elsewhere."""
    head = db.execute("SELECT round, digest, finished FROM head").fetchone()
    if not rounds or head is None:
        return "" if not rounds and head is None and not kept else "the record has lost its head or its seals"
    last, content = rounds[-1][0], json.loads(rounds[-1][1])
    if tuple(head) != (last, content["state"], int(content["finished"])):
        return f"the head of the record is not that of round {last}, which was sealed last"
    for table in ("turns", "closed", "arrived", "once", "scores", *(("proofs",) if has(db, "proofs") else ())):
        # A round in progress has rows after HEAD, but no scores; once the run is finished, there are none at all.
        most = last if table == "scores" or head[2] else last + 1
        odd = db.execute(f"SELECT round FROM {table} WHERE round < 0 OR round > ?", (most,)).fetchone()
        if odd:
            return f"a row of round {odd[0]} stands in {table}, and round {last} was sealed last"
    if kept and kept not in {mark for *_, mark in rounds}:
        return f"the record has no seal {kept[:12]}: it was cut, or made anew"
    return ""
