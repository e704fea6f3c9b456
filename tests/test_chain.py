"""A settled record cannot be changed unnoticed: a thousand changes are made to copies of one, and each is found."""

import math
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from fedscan.averaging import averaging
from fedscan.chain import COLUMNS, verified
from fedscan.run import run
from test_resume import PLANS, Killed, drawing, study

CHANGES = 1000
SEALED = {
    "turns": COLUMNS,
    "closed": ("round", "call", "missing"),
    "arrived": ("round", "position", "turn"),
    "once": ("round", "label", "file"),
    "scores": ("round", "split", "trained_at", "tested_at", '"case"', "subject", "label", "metric", "value"),
    "seals": ("entries", "seal"),
    "head": ("round", "digest", "finished"),
}
Change = Callable[[sqlite3.Connection, random.Random], str]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Records with scores, silent sites, answers that arrive in later rounds, and heavy work at the server."""
    folder = tmp_path_factory.mktemp("records")
    for name in ("memory", "async"):
        run(PLANS[name](), folder / name)
    run(study(drawing(), rounds=2), folder / "once")
    return [folder / name / "journal.sqlite" for name in ("memory", "async", "once")]


def look(path: Path, kept: str = "") -> str:
    """The fault that is found in a record."""
    db = sqlite3.connect(path)
    try:
        return verified(db, kept).fault
    finally:
        db.close()


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
    table, count, row = some_table(db, draw, ("turns", "scores", "closed"))
    keys = {"turns": 3, "scores": 8, "closed": 2}[table]
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
    table, _, row = some_table(db, draw, ("turns", "scores", "closed"))
    new = list(values(db, table)[row])
    new[{"turns": 1, "scores": 4, "closed": 1}[table]] = 77
    put(db, table, [*values(db, table), tuple(new)])
    return f"a new row of {table}"


def cut(db: sqlite3.Connection, draw: random.Random) -> str:
    """The last rounds are removed, of the rows or of the seals."""
    last = db.execute("SELECT MAX(round) FROM seals").fetchone()[0]
    start = draw.randint(1, last)
    for table in draw.choice([("turns", "closed", "arrived", "once", "scores"), ("seals",), ("seals", "scores")]):
        db.execute(f"DELETE FROM {table} WHERE round >= ?", (start,))
    return f"all from round {start}"


def test_a_thousand_changes_are_found(records: list[Path]) -> None:
    draw = random.Random(0)
    for record in records:
        assert look(record) == ""
    for n in range(CHANGES):
        db = sqlite3.connect(":memory:")
        with closing(sqlite3.connect(records[n % len(records)])) as record:
            record.backup(db)
        what = draw.choice([edit, edit, edit, delete, swap, add, cut])(db, draw)
        assert verified(db).fault, f"change {n} was not found: {what}"
        db.close()


def test_the_first_row_that_was_changed_is_named(records: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy.sqlite"
    shutil.copyfile(records[0], copy)
    db = sqlite3.connect(copy)
    db.execute("UPDATE turns SET bytes_up = bytes_up + 1 WHERE site = 'cairo' AND round >= 1")
    db.commit()
    db.close()
    assert look(copy) == "the turn 1 0 cairo was changed after round 1 was sealed"


def test_a_record_that_was_cut_whole_or_forked_is_found_by_a_seal_that_was_kept(tmp_path: Path) -> None:
    """Whoever can write the file can cut it at a round's end, or make it anew: only what was noted elsewhere tells."""
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        run(study(averaging()), folder)
    one, another = (folder / "journal.sqlite" for folder in folders)
    db = sqlite3.connect(one)
    kept = verified(db).seal
    rounds = db.execute("SELECT MAX(round) FROM seals").fetchone()[0]
    assert look(one, kept) == ""
    assert look(another) == ""
    assert look(another, kept) == f"the record has no seal {kept[:12]}: it was cut, or made anew"
    for table in ("turns", "closed", "arrived", "once", "scores", "seals"):
        db.execute(f"DELETE FROM {table} WHERE round = ?", (rounds,))
    before = db.execute("SELECT json_extract(entries, '$.state') FROM seals WHERE round = ?", (rounds - 1,)).fetchone()
    db.execute("UPDATE head SET round = ?, digest = ?, finished = 0", (rounds - 1, before[0]))
    db.commit()
    db.close()
    assert look(one) == ""
    assert "it was cut, or made anew" in look(one, kept)


def test_a_run_that_is_stopped_and_gone_on_with_has_a_sound_chain(tmp_path: Path) -> None:
    def kill(event: str) -> None:
        if event == "closed 2.0":
            raise Killed(event)

    with pytest.raises(Killed):
        run(PLANS["memory"](), tmp_path, commit_seconds=0.0, event=kill)
    assert look(tmp_path / "journal.sqlite") == ""
    run(PLANS["memory"](), tmp_path, resume=True)
    assert look(tmp_path / "journal.sqlite") == ""
