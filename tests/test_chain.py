"""A settled record cannot be changed unnoticed: a thousand changes are made to copies of one, and each is found."""

import random
import shutil
import sqlite3
from pathlib import Path

import pytest

from altered import CHANGES, ROWS, copied
from fedscan.averaging import averaging
from fedscan.chain import verified
from fedscan.run import run
from test_resume import PLANS, Killed, drawing, study

TIMES = 1000


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


def test_a_thousand_changes_are_found(records: list[Path]) -> None:
    draw = random.Random(0)
    for record in records:
        assert look(record) == ""
    for n in range(TIMES):
        db = copied(records[n % len(records)])
        what = draw.choice(CHANGES)(db, draw)
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
    for table in (*ROWS, "seals"):
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
