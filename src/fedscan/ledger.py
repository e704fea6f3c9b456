"""The record of a run, read back as plain rows: who was asked what, what travelled, what was scored.

Everything that shows a run (report, tables, audit) reads a ``Record`` and nothing else.
"""

import json
import sqlite3
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fedscan import chain

WEIGHTY = ("learn", "train_on")  # in a record that does not say which answers hold weights
Agreed = Mapping[str, tuple[int, int]]  # by question: bytes of an answer, and answers in the whole study, at most


@dataclass(frozen=True)
class TurnRow:
    """One question to one site, and what became of it. Bytes are those of the wire, after coding."""

    round: int
    call: int
    site: str
    question: str
    privacy: str  # the class of what left the site: weights, statistics, prototypes, features, predictions, images
    status: str  # "answered", "refused" or "absent"
    seconds: float
    bytes_down: int
    bytes_up: int
    asked_at: float  # seconds since 1970
    digest_down: str  # SHA-256 of the question
    digest_up: str  # SHA-256 of the answer, "" where there was none
    why: str = ""  # for a refused or absent turn, one sentence
    numbers: Mapping[str, float] = field(default_factory=dict)  # what the site reported: loss, cases, weight, ...


@dataclass(frozen=True)
class ScoreRow:
    """One metric of one label of one case. ``value`` is None where the metric is undefined (never NaN)."""

    round: int
    split: str  # "validation" or "test"
    trained_at: str  # "federation", "pooled", or the name of the one site that trained the model
    tested_at: str
    case: str
    subject: str
    label: str
    metric: str
    value: float | None


@dataclass(frozen=True)
class SiteRow:
    """What a site has: cases expected and used, how they are split, and why cases were left out."""

    name: str
    expected: int
    used: int
    train: int
    validation: int
    test: int
    about: str = ""  # the scanner or the hospital, in a few words
    left_out: tuple[tuple[str, str], ...] = ()  # (case, reason)


@dataclass(frozen=True)
class Overlay:
    """One test case to look at. ``image`` is float, the two masks are label numbers.

    Arrays are (D, H, W): to the top, to the front, to the patient's right.
    """

    site: str
    case: str
    rank: str  # "best", "median" or "worst" of its site by mean Dice
    dice: float | None
    image: NDArray[np.float32]
    reference: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    spacing: tuple[float, ...]  # mm


@dataclass(frozen=True)
class Record:
    """All that is known of one run. ``comparisons`` holds final test scores of other methods on the same study."""

    name: str
    method: str
    study: Mapping[str, Any]  # the resolved study
    study_hash: str
    seed: int
    rounds: int
    labels: Mapping[str, int]  # foreground label names and numbers
    sites: tuple[SiteRow, ...]
    turns: tuple[TurnRow, ...]
    scores: tuple[ScoreRow, ...]
    comparisons: Mapping[str, tuple[ScoreRow, ...]]  # "local-only", "centralised", ...
    overlays: tuple[Overlay, ...]
    versions: Mapping[str, str]
    command: str  # reproduces the run
    seconds: float
    notes: tuple[str, ...] = ()  # what a reader must know first: simulated scanners, a site that was silent, ...
    travels: str = ""  # which leaves travel and which stay at home, in one sentence
    weighty: tuple[str, ...] = WEIGHTY  # the questions whose answers hold weights, whatever more telling is in them
    seal: str = ""  # of the last round: it stands for all that is recorded up to there
    between: bool = False  # whether it was carried out between hospitals, whose cases stayed where they are
    agreed: Mapping[str, Agreed] = field(default_factory=dict)  # by hospital: what its yes says would leave at most


def read_record(folder: Path, beside: Mapping[str, Path] | None = None) -> Record:
    """The record of the run in ``folder``, as far as it is settled.

    Other methods on the same study are read for comparison from ``folder/baselines/<method>``, and from the folders
    of ``beside`` by method. Raises ValueError where a folder holds no run.
    """
    compared = {path.parent.name: path.parent for path in sorted(folder.glob("baselines/*/journal.sqlite"))}
    with closing(opened(folder)) as db:
        meta = dict(db.execute("SELECT key, value FROM meta"))
        head = (db.execute("SELECT round FROM head").fetchone() or (0,))[0]
        turns = read_turns(db)
        scores = read_scores(db, meta)
        seal = chain.last_seal(db)
    study, agreed = json.loads(meta["study"]), json.loads(meta.get("agreed", "{}"))
    return Record(
        name=study["name"],
        method=study["method"]["name"],
        study=study,
        study_hash=meta["study_hash"],
        seed=study["seed"],
        rounds=min(head, study["train"]["rounds"]),
        labels=json.loads(meta["labels"]),
        sites=tuple(
            SiteRow(**{**row, "left_out": tuple(map(tuple, row["left_out"]))}) for row in json.loads(meta["sites"])
        ),
        turns=turns,
        scores=scores,
        comparisons={name: final_scores(path) for name, path in {**compared, **(beside or {})}.items()},
        overlays=read_overlays(folder / "overlays"),
        versions=json.loads(meta["versions"]),
        command=meta["command"],
        seconds=float(meta.get("seconds", 0)),
        notes=tuple(json.loads(meta["notes"])),
        travels=meta["travels"],
        weighty=read_weighty(meta),
        seal=seal,
        between="run" in meta,
        agreed={site: {q: (most, times) for q, (most, times) in of.items()} for site, of in agreed.items()},
    )


def opened(folder: Path) -> sqlite3.Connection:
    """A run's journal, for reading only. Raises ValueError where there is none."""
    path = (folder / "journal.sqlite").absolute()
    if not path.exists():
        raise ValueError(f"{folder} holds no run; give the folder that `fedscan run` named at its end")
    db, begun = _opened(path, "mode=ro")
    wal = Path(f"{path}-wal")
    if isinstance(begun, sqlite3.OperationalError) and not (wal.exists() and wal.stat().st_size):
        db, begun = _opened(path, "immutable=1")  # a folder that cannot be written to, and where nobody writes
    if isinstance(begun, sqlite3.DatabaseError) and "no such table" not in str(begun):
        db.close()
        raise ValueError(f"{path} cannot be read ({begun}): take it from a copy, or run the study again") from begun
    if begun is not True:
        db.close()
        raise ValueError(f"the run in {folder} has not begun: `fedscan run` or `fedscan serve` starts it")
    return db


def _opened(path: Path, how: str) -> tuple[sqlite3.Connection, bool | sqlite3.DatabaseError]:
    """A connection, and whether the journal names a study, or what went wrong in looking."""
    db = sqlite3.connect(f"{path.as_uri()}?{how}", uri=True)
    try:
        return db, bool(db.execute("SELECT 1 FROM meta WHERE key = 'study'").fetchone())
    except sqlite3.DatabaseError as e:
        return db, e


def read_turns(db: sqlite3.Connection) -> tuple[TurnRow, ...]:
    """The turns of settled rounds, in the order of round, call and site."""
    rows = db.execute(
        "SELECT round, call, site, question, privacy, status, seconds, bytes_down, bytes_up, asked_at, asked, answered,"
        " why, numbers FROM turns WHERE round <= (SELECT round FROM head) AND status != 'open'"
        " ORDER BY round, call, site"
    )
    return tuple(TurnRow(*(*row[:-1], json.loads(row[-1]))) for row in rows)


def read_weighty(meta: Mapping[str, str]) -> tuple[str, ...]:
    """The questions whose answers may hold weights, as they were declared."""
    return tuple(json.loads(meta["weighty"])) if "weighty" in meta else WEIGHTY


def classes(turn: TurnRow, weighty: Collection[str]) -> tuple[str, ...]:
    """All classes of data in an answer: weights, where its question is one of ``weighty``, and the most telling."""
    return ("weights", turn.privacy) if turn.question in weighty and turn.privacy != "weights" else (turn.privacy,)


def read_scores(db: sqlite3.Connection, meta: Mapping[str, str]) -> tuple[ScoreRow, ...]:
    """All scores; the model of a study with one pooled site was trained on pooled cases."""
    pooled = json.loads(meta["names"]) == ["pooled"]
    rows = [ScoreRow(*row) for row in db.execute("SELECT * FROM scores ORDER BY rowid")]
    return tuple(replace(row, trained_at="pooled") if pooled else row for row in rows)


def final_scores(folder: Path) -> tuple[ScoreRow, ...]:
    """The test scores of the run in ``folder``; none where it has not come to its end."""
    with closing(opened(folder)) as db:
        meta = dict(db.execute("SELECT key, value FROM meta"))
        return tuple(row for row in read_scores(db, meta) if row.split == "test")


def read_overlays(folder: Path) -> tuple[Overlay, ...]:
    """The cases to look at, that ``fedscan.predict.keep_overlays`` put into ``folder``."""
    found = []
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                arrays = {name: file[name] for name in ("image", "reference", "prediction")}
        except (OSError, ValueError, KeyError, TypeError, BadZipFile) as e:
            raise ValueError(f"{path} is damaged: delete it, and the report will do without that picture") from e
        found.append(Overlay(**{**about, "spacing": tuple(about["spacing"])}, **arrays))
    return tuple(found)
