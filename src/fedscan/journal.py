"""The journal of a run: HEAD (the state at the end of a round), the round in progress, and the settled rows.

A run's folder holds ``journal.sqlite`` and ``state/<round>.safetensors``. The ledger is the settled rows of the same
store: the turns of rounds up to HEAD. One transaction moves HEAD and adds a round's rows, so a round is there whole
or not at all; within a round, answers become rows as they are accepted.
"""

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedscan import chain, wire
from fedscan.ledger import ScoreRow
from fedscan.memory import Base, Damaged, Event, nothing, read_sound
from fedscan.study import Turn

TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS head (one INTEGER PRIMARY KEY CHECK (one = 1), round INTEGER, digest TEXT, finished INTEGER);
CREATE TABLE IF NOT EXISTS turns (
  round INTEGER, call INTEGER, site TEXT, question TEXT, privacy TEXT, asked TEXT, bytes_down INTEGER, asked_at REAL,
  base TEXT, due REAL, status TEXT, answered TEXT, bytes_up INTEGER, seconds REAL, why TEXT, numbers TEXT, file TEXT,
  PRIMARY KEY (round, call, site)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS files ON turns (file) WHERE file != '';
CREATE TABLE IF NOT EXISTS closed (round INTEGER, call INTEGER, missing TEXT, PRIMARY KEY (round, call)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS arrived (
  round INTEGER, position INTEGER, turn TEXT, PRIMARY KEY (round, position)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS once (round INTEGER, label TEXT, file TEXT, PRIMARY KEY (round, label)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS bases (site TEXT PRIMARY KEY, round INTEGER, call INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS held (site TEXT PRIMARY KEY, blobs TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS proofs (
  round INTEGER, call INTEGER, site TEXT, document TEXT, PRIMARY KEY (round, call, site)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scores (
  round INTEGER, split TEXT, trained_at TEXT, tested_at TEXT, "case" TEXT, subject TEXT, label TEXT, metric TEXT,
  value REAL);
"""


@dataclass
class Row:
    """One turn in the journal. ``status`` is "open" until it is answered, refused or absent."""

    turn: Turn
    question: str
    privacy: str
    asked: str
    bytes_down: int
    asked_at: float
    base: Base
    due: float = 0.0
    status: str = "open"
    answered: str = ""
    bytes_up: int = 0
    seconds: float = 0.0
    why: str = ""
    numbers: Mapping[str, float] | None = None
    file: str = ""  # where the answer lies, relative to the run's folder

    def values(self) -> tuple[Any, ...]:
        return (
            *self.turn, self.question, self.privacy, self.asked, self.bytes_down, self.asked_at,
            json.dumps(self.base), self.due, self.status, self.answered, self.bytes_up, self.seconds, self.why,
            json.dumps(self.numbers or {}), self.file,
        )  # fmt: skip

    @staticmethod
    def of(v: Sequence[Any]) -> "Row":
        base = json.loads(v[8])
        question, privacy, asked, bytes_down, asked_at = v[3:8]
        due, status, answered, bytes_up, seconds, why = v[9:15]
        return Row(
            Turn(*v[:3]), question, privacy, asked, bytes_down, asked_at, base and (base[0], base[1]),
            due, status, answered, bytes_up, seconds, why, json.loads(v[15]), v[16],
        )  # fmt: skip


class Journal:
    """The one writer of a run's folder. Nothing is on the disk for good before ``commit``."""

    def __init__(self, folder: Path, *, durable: bool = False, event: Event = nothing) -> None:
        (folder / "state").mkdir(parents=True, exist_ok=True)
        self.folder, self.durable, self.event = folder, durable, event
        self.db = sqlite3.connect(folder / "journal.sqlite", isolation_level=None)
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
        if not (chain.has(self.db, "seals") and chain.has(self.db, "proofs")):
            self.db.executescript(TABLES + chain.TABLE)
        self.db.execute("BEGIN IMMEDIATE")
        head = self.db.execute("SELECT round, finished FROM head").fetchone()
        self.head: int | None = head[0] if head else None
        self.finished = bool(head and head[1])
        self.unsaved: dict[Turn, Row] = {}
        self._unsaved_held: dict[str, list[str]] = {}

    def close(self) -> None:
        """Gives up what is not committed."""
        self.db.close()

    # -- what the run is ---------------------------------------------------------------------------------------------

    def meta(self) -> dict[str, str]:
        return dict(self.db.execute("SELECT key, value FROM meta"))

    def set_meta(self, **values: str) -> None:
        self.db.executemany("REPLACE INTO meta VALUES (?, ?)", values.items())

    def state(self) -> dict[str, Any]:
        """The state at HEAD. Raises Damaged, naming the file, where it is missing or is not what was written."""
        path = self._state_file(self.head)
        (digest,) = self.db.execute("SELECT digest FROM head").fetchone()
        try:
            return read_sound(path, digest)
        except (OSError, ValueError) as e:
            why = "is missing" if isinstance(e, FileNotFoundError) else f"cannot be used ({e})"
            raise Damaged(
                f"the server's state after round {self.head}, {path}, {why}: put that file back from a copy and go on, "
                "or begin a new run in another folder"
            ) from e

    def _state_file(self, round: int | None) -> Path:
        return self.folder / "state" / f"{round}.safetensors"

    # -- the round in progress ---------------------------------------------------------------------------------------

    def row(self, turn: Turn) -> Row | None:
        if turn in self.unsaved:
            return self.unsaved[turn]
        v = self.db.execute("SELECT * FROM turns WHERE round = ? AND call = ? AND site = ?", turn).fetchone()
        return Row.of(v) if v else None

    def rows(self, where: str = "1", *values: Any) -> list[Row]:
        """Turns in the order of round, call and site."""
        self._write()
        return [Row.of(v) for v in self.db.execute(f"SELECT * FROM turns WHERE {where}", values)]

    def put(self, row: Row) -> None:
        """Adds or replaces a turn's row; on the disk with the next commit."""
        self.unsaved[row.turn] = row

    def put_proof(self, turn: Turn, document: str) -> None:
        """Keeps what a site has signed of a turn, or drops what it had signed before; good with the next commit."""
        if document:
            self.db.execute("REPLACE INTO proofs VALUES (?, ?, ?, ?)", (*turn, document))
        else:
            self.db.execute("DELETE FROM proofs WHERE round = ? AND call = ? AND site = ?", turn)

    def closed(self, round: int, call: int) -> tuple[str, ...] | None:
        """Who was missing when a call was closed; None while it is open."""
        v = self.db.execute("SELECT missing FROM closed WHERE round = ? AND call = ?", (round, call)).fetchone()
        return tuple(json.loads(v[0])) if v else None

    def close_call(self, round: int, call: int, missing: Sequence[str]) -> None:
        self.db.execute("INSERT INTO closed VALUES (?, ?, ?)", (round, call, json.dumps(missing)))
        self.event(f"closed {round}.{call}")

    def arrival(self, round: int, position: int) -> Turn | None:
        """Which started turn arrived as the ``position``-th of a round, where that is decided."""
        v = self.db.execute("SELECT turn FROM arrived WHERE round = ? AND position = ?", (round, position)).fetchone()
        return Turn(*json.loads(v[0])) if v else None

    def arrive(self, round: int, position: int, turn: Turn) -> None:
        self.db.execute("INSERT INTO arrived VALUES (?, ?, ?)", (round, position, json.dumps(turn)))
        self.event(f"arrived {turn}")

    def arrived(self, head: int) -> set[Turn]:
        """The started turns that were handed to a round up to ``head``."""
        found = self.db.execute("SELECT turn FROM arrived WHERE round <= ?", (head,))
        return {Turn(*json.loads(v)) for (v,) in found}

    def once(self, round: int, label: str) -> Path | None:
        v = self.db.execute("SELECT file FROM once WHERE round = ? AND label = ?", (round, label)).fetchone()
        return self.folder / v[0] if v else None

    def put_once(self, round: int, label: str, file: str) -> None:
        self.db.execute("INSERT INTO once VALUES (?, ?, ?)", (round, label, file))

    def base(self, site: str) -> Base:
        """The last turn of a site that the server accepted."""
        v = self.db.execute("SELECT round, call FROM bases WHERE site = ?", (site,)).fetchone()
        return (v[0], v[1]) if v else None

    def set_base(self, turn: Turn) -> None:
        self.db.execute("REPLACE INTO bases VALUES (?, ?, ?)", (turn.site, turn.round, turn.call))

    def restore_base(self, site: str, base: Base) -> None:
        """Goes back to an earlier turn of a site, or to none."""
        if base is None:
            self.db.execute("DELETE FROM bases WHERE site = ?", (site,))
        else:
            self.set_base(Turn(*base, site))

    def held(self, site: str) -> list[str]:
        """The weights, by SHA-256, that a site has from the last message it answered."""
        if site in self._unsaved_held:
            return self._unsaved_held[site]
        v = self.db.execute("SELECT blobs FROM held WHERE site = ?", (site,)).fetchone()
        return list(json.loads(v[0])) if v else []

    def set_held(self, site: str, blobs: Iterable[str]) -> None:
        self._unsaved_held[site] = list(blobs)

    def _write(self) -> None:
        if self.unsaved:
            rows = [row.values() for row in self.unsaved.values()]
            self.db.executemany(f"REPLACE INTO turns VALUES ({','.join('?' * 17)})", rows)
            self.unsaved.clear()
        if self._unsaved_held:
            held = [(site, json.dumps(blobs)) for site, blobs in self._unsaved_held.items()]
            self.db.executemany("REPLACE INTO held VALUES (?, ?)", held)
            self._unsaved_held.clear()

    def commit(self) -> None:
        """Makes all rows so far survive a kill (and a power cut, where durable)."""
        self._write()
        self.event("about to commit")
        self.db.execute("COMMIT")
        self.db.execute("BEGIN IMMEDIATE")
        self.event("committed")

    # -- the end of a round ------------------------------------------------------------------------------------------

    def end_round(
        self, round: int, state: Mapping[str, Any], scores: Iterable[ScoreRow] = (), finished: bool = False
    ) -> None:
        """Moves HEAD to ``round``: the state's file first, then one transaction; then what is past is dropped."""
        parcel = wire.pack(state)
        wire.write_file(self._state_file(round), parcel, durable=self.durable)
        self.event(f"state written {round}")
        self._write()
        self.db.executemany(
            "INSERT INTO scores VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (s.round, s.split, s.trained_at, s.tested_at, s.case, s.subject, s.label, s.metric, s.value)
                for s in scores
            ],
        )
        self.db.execute("UPDATE turns SET file = '' WHERE file != ''")
        self.db.execute("REPLACE INTO head VALUES (1, ?, ?, ?)", (round, parcel.digest, int(finished)))
        chain.seal(self.db, round, parcel.digest, finished)
        self.commit()
        self.head, self.finished = round, finished
        self.event(f"head moved {round}")
        for path in (self.folder / "state").iterdir():
            if path != self._state_file(round):
                path.unlink()
        self.event(f"past dropped {round}")
