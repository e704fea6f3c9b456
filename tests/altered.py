"""Ways to tamper with a record: each takes its journal and a source of chance, and says what it changed."""

import math
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from fedscan.chain import COLUMNS

SEALED = {
    "turns": COLUMNS,
    "closed": ("round", "call", "missing"),
    "arrived": ("round", "position", "turn"),
    "once": ("round", "label", "file"),
    "scores": ("round", "split", "trained_at", "tested_at", '"case"', "subject", "label", "metric", "value"),
    "proofs": ("round", "call", "site", "document"),
    "seals": ("entries", "seal"),
    "head": ("round", "digest", "finished"),
}
KEYS = {"turns": 3, "scores": 8, "closed": 2, "proofs": 3}  # how many columns name a row
ROWS = ("turns", "closed", "arrived", "once", "scores", "proofs")
Change = Callable[[sqlite3.Connection, random.Random], str]


def some_table(
    db: sqlite3.Connection, draw: random.Random, of: tuple[str, ...] = tuple(SEALED)
) -> tuple[str, int, int]:
    """A table that has rows, how many, and which row is meant."""
    counts = {table: db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] for table in of}
    table = draw.choice([table for table, count in counts.items() if count])
    return table, counts[table], draw.randrange(counts[table])


def values(db: sqlite3.Connection, table: str) -> list[tuple[object, ...]]:
    return db.execute(f"SELECT * FROM {table}").fetchall()


def put(db: sqlite3.Connection, table: str, rows: list[tuple[object, ...]]) -> None:
    """Writes a table anew; with its keys, as somebody would who edits the file."""
    db.execute(f"DELETE FROM {table}")
    if rows:
        db.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({','.join('?' * len(rows[0]))})", rows)


def other(value: object, draw: random.Random) -> object:
    """Another value of the same type; of a number, one that is hard to see."""
    if value is None:
        return 0.5
    if isinstance(value, float):
        return math.nextafter(value, draw.choice([-math.inf, math.inf]))
    if isinstance(value, int):
        return value + draw.choice([1, 2, 1000])
    text = str(value)
    at = draw.randrange(len(text)) if text else 0
    return text[:at] + draw.choice([c for c in "xyz" if c != text[at]]) + text[at + 1 :] if text else "x"


def edit(db: sqlite3.Connection, draw: random.Random) -> str:
    table, _, row = some_table(db, draw)
    names = [d[0] for d in db.execute(f"SELECT * FROM {table}").description]
    column = draw.choice([c.strip('"') for c in SEALED[table]])
    rows, at = values(db, table), names.index(column)
    changed = list(rows[row])
    changed[at] = other(changed[at], draw)
    rows[row] = tuple(changed)
    put(db, table, rows)
    return f"{column} of {table}"


def delete(db: sqlite3.Connection, draw: random.Random) -> str:
    table, _, row = some_table(db, draw)
    rows = values(db, table)
    del rows[row]
    put(db, table, rows)
    return f"a row of {table}"


def swap(db: sqlite3.Connection, draw: random.Random) -> str:
    """What two rows say is exchanged; their keys stay."""
    table, count, row = some_table(db, draw, tuple(KEYS))
    keys = KEYS[table]
    rows = values(db, table)
    unlike = [i for i in range(count) if rows[i][keys:] != rows[row][keys:]]
    if table == "turns":  # where the answer lies is not sealed: it is dropped with the round
        unlike = [i for i in unlike if rows[i][keys:-1] != rows[row][keys:-1]]
    if not unlike:
        return delete(db, draw)
    i = draw.choice(unlike)
    rows[i], rows[row] = rows[i][:keys] + rows[row][keys:], rows[row][:keys] + rows[i][keys:]
    put(db, table, rows)
    return f"two rows of {table}"


def add(db: sqlite3.Connection, draw: random.Random) -> str:
    table, _, row = some_table(db, draw, tuple(KEYS))
    new = list(values(db, table)[row])
    new[4 if table == "scores" else 1] = 77
    put(db, table, [*values(db, table), tuple(new)])
    return f"a new row of {table}"


def cut(db: sqlite3.Connection, draw: random.Random) -> str:
    """The last rounds are removed, of the rows or of the seals."""
    last = db.execute("SELECT MAX(round) FROM seals").fetchone()[0]
    start = draw.randint(1, last)
    for table in draw.choice([ROWS, ("seals",), ("seals", "scores")]):
        db.execute(f"DELETE FROM {table} WHERE round >= ?", (start,))
    return f"all from round {start}"


CHANGES: tuple[Change, ...] = (edit, edit, edit, delete, swap, add, cut)


def copied(path: Path) -> sqlite3.Connection:
    """A record in memory."""
    db = sqlite3.connect(":memory:")
    with closing(sqlite3.connect(path)) as record:
        record.backup(db)
    return db
