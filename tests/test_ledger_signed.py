"""A record between hospitals cannot be quietly changed, not even by who wrote it: that needs the hospitals' keys."""

import json
import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from altered import CHANGES, ROWS, copied
from fedscan import chain
from fedscan.consortium import coordinator, countersigned, identity, member, serving, signed
from fedscan.consortium.asks import hash_of
from fedscan.consortium.catalogue import read as catalogue_of
from fedscan.consortium.catalogue import secret_of
from fedscan.consortium.joining import outside
from fedscan.consortium.keys import fingerprint
from fedscan.launch import How
from joined import SITES, Hospitals

torch.set_num_threads(1)
TIMES = 1000
LAST = 3  # two rounds, and the test
DIGITS = 16  # of a case's code


@dataclass
class Carried:
    """A study that was carried out between two hospitals, and the folder of its run."""

    hospitals: Hospitals
    run: Path

    @property
    def root(self) -> str:
        return fingerprint(identity.read_root(self.hospitals.homes["east"].root).public_key())

    def shown(self, site: str) -> list[str]:
        """The seals that a hospital has kept."""
        (path,) = (self.hospitals.folder / site / "runs").glob("*/heads.jsonl")
        return [json.loads(line)["seal"] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Carried]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "GREETING", 0.05)
        hospitals = Hospitals(tmp_path_factory.mktemp("hospitals"))
        for name in SITES:
            hospitals.approve(name)
        run = hospitals.folder / "run"
        with hospitals.there(*SITES):
            serving.serve(hospitals.file, run, hospitals.table(how=How(report=False)))
        yield Carried(hospitals, run)


@pytest.fixture
def db(carried: Carried) -> Iterator[sqlite3.Connection]:
    """A copy of the record, to be changed."""
    with closing(copied(carried.run / "journal.sqlite")) as db:
        yield db


@pytest.fixture
def folder(carried: Carried, tmp_path: Path) -> Path:
    """A copy of what lies beside the record, to be changed."""
    for name in (member.ROOT, member.ROSTER, countersigned.END):
        shutil.copy(carried.run / name, tmp_path / name)
    return tmp_path


def fault(folder: Path, db: sqlite3.Connection, root: str = "", kept: str = "") -> str:
    """What is found, first in the chain and then in the signatures."""
    return chain.verified(db, kept).fault or countersigned.verified(folder, db, root).fault


def seal_anew(db: sqlite3.Connection, finished: bool = True) -> None:
    """Seals every round again over what now stands there, as the coordinator's own program would."""
    rounds = db.execute("SELECT round, entries FROM seals ORDER BY round").fetchall()
    db.execute("DELETE FROM seals")
    for round, text in rounds:
        content = json.loads(text)
        chain.seal(db, round, content["state"], content["finished"] and finished)
    state = json.loads(rounds[-1][1])["state"]
    db.execute("REPLACE INTO head VALUES (1, ?, ?, ?)", (rounds[-1][0], state, int(finished)))


# -- an honest record ------------------------------------------------------------------------------------------------


def test_an_honest_record_is_signed_from_its_first_answer_to_its_end(carried: Carried, db: sqlite3.Connection) -> None:
    assert chain.verified(db).fault == ""
    found = countersigned.verified(carried.run, db, carried.root)
    assert found.fault == ""
    assert found.answers == {"east": 5, "west": 5}  # learn and evaluate in two rounds, and the test
    assert (found.ends, found.ahead, found.root) == (SITES, 0, carried.root)
    members = {m.name: m.key for m in carried.hospitals.homes["east"].roster.lines}
    assert found.keys == {name: members[name] for name in SITES}


def test_a_hospital_has_kept_every_seal(carried: Carried, db: sqlite3.Connection) -> None:
    seals = [seal for (seal,) in db.execute("SELECT seal FROM seals ORDER BY round")]
    assert len(seals) == LAST + 1
    assert carried.shown("east") == carried.shown("west") == seals


def test_a_certificate_that_ends_after_the_study_changes_nothing(
    carried: Carried, db: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = datetime.now(UTC) + timedelta(days=5000)
    monkeypatch.setattr(identity, "now_or", lambda now: now or later)
    assert fault(carried.run, db) == ""


def test_a_hospital_that_was_revoked_later_has_signed_all_the_same(
    carried: Carried, db: sqlite3.Connection, folder: Path, tmp_path: Path
) -> None:
    for when, sentence in ((timedelta(hours=1), ""), (timedelta(hours=-1), "the turn 1 0 west: ")):
        root = shutil.copytree(carried.hospitals.folder / "root", tmp_path / f"root {when}")
        coordinator.revoke(root, "west", "the key was lost", datetime.now(UTC) + when)
        shutil.copy(root / member.ROSTER, folder / member.ROSTER)
        found = fault(folder, db)
        assert found.startswith(sentence)
        assert ("was revoked" in found) == bool(sentence)


def test_the_end_is_signed_when_hospitals_are_there_again(carried: Carried, tmp_path: Path) -> None:
    run = shutil.copytree(carried.run, tmp_path / "run")
    (run / countersigned.END).unlink()
    with closing(sqlite3.connect(run / "journal.sqlite")) as db:
        assert fault(run, db).startswith("no hospital has countersigned its last round, 3")
    with carried.hospitals.there("west"):
        how = How(resume=True, report=False)
        serving.serve(carried.hospitals.file, run, carried.hospitals.table(how=how))
    with closing(sqlite3.connect(run / "journal.sqlite")) as db:
        assert fault(run, db) == ""
        assert "west" in countersigned.verified(run, db).ends


# -- changed by somebody who has the file ----------------------------------------------------------------------------


def test_a_thousand_changes_are_found(carried: Carried) -> None:
    draw = random.Random(0)
    for n in range(TIMES):
        with closing(copied(carried.run / "journal.sqlite")) as db:
            what = draw.choice(CHANGES)(db, draw)
            assert fault(carried.run, db), f"change {n} was not found: {what}"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("UPDATE turns SET bytes_up = bytes_up + 1 WHERE round = 2", "the turn 2 0 east was changed after round 2"),
        ("UPDATE scores SET value = value + 1e-9 WHERE round = 1", "the score 1 validation federation east "),
        ("DELETE FROM scores WHERE round = 3 AND tested_at = 'west'", "the score 3 test federation west "),
        ("UPDATE proofs SET document = replace(document, 'learn', 'yearn')", "the signed answer 1 0 east was changed"),
        (
            "DELETE FROM proofs WHERE round = 2 AND site = 'west'",
            "the signed answer 2 0 west was removed after round 2",
        ),
        ("UPDATE seals SET seal = replace(seal, 'a', 'b') WHERE round = 1", "the seal of round 1 does not fit"),
        ("DELETE FROM seals WHERE round = 1", "the seal of round 1 is missing"),
        ("DROP TABLE proofs", "the signed answer 1 0 east was removed after round 1"),
    ],
)
def test_the_first_that_was_changed_is_named(
    carried: Carried, db: sqlite3.Connection, change: str, sentence: str
) -> None:
    db.execute(change)
    assert fault(carried.run, db).startswith(sentence)


def test_every_case_that_was_used_has_its_identifier_in_the_chain(carried: Carried, db: sqlite3.Connection) -> None:
    (text,) = db.execute("SELECT value FROM meta WHERE key = 'facts'").fetchone()
    splits = json.loads(text)["splits"]
    for name in SITES:
        home, study = carried.hospitals.folder / name, hash_of(carried.hospitals.file)
        known = {outside(item.id, study, secret_of(home)) for item in catalogue_of(home).items}
        codes = [code for part in splits[name].values() for code in part]
        assert len(codes) == 10
        assert set(codes) == known
        for code in codes:
            other = f"{int(code, 16) ^ 1:0{DIGITS}x}"
            db.execute("UPDATE meta SET value = ? WHERE key = 'facts'", (text.replace(code, other),))
            assert (
                fault(carried.run, db)
                == "what the record says of its cases (facts) was changed after round 0 was sealed"
            )
    seal_anew(db)
    assert fault(carried.run, db).startswith("round 0 was sealed anew")


# -- changed by the coordinator, who can seal all anew ---------------------------------------------------------------


@pytest.mark.parametrize("times", [50, pytest.param(TIMES, marks=pytest.mark.slow)])
def test_changes_that_are_sealed_anew_are_found(carried: Carried, tmp_path: Path, times: int) -> None:
    """With all that hospitals have signed still there, or without what they signed at the end."""
    draw, bare, sound, record = random.Random(times), tmp_path, 0, carried.run / "journal.sqlite"
    for name in (member.ROOT, member.ROSTER):
        shutil.copy(carried.run / name, bare / name)
    kept = carried.shown("west")[-1]
    for n in range(times):
        with closing(copied(record)) as db:
            what, finished = draw.choice(CHANGES)(db, draw), draw.random() < 0.5
            try:
                seal_anew(db, finished)
            except (ValueError, TypeError, KeyError, IndexError, sqlite3.Error):
                continue  # the change was to a seal, and nothing can be sealed any more
            if chain.last_seal(db) == kept:
                continue  # it was to what is made anew with the seals
            sound += chain.verified(db).fault == ""
            assert fault(carried.run, db), f"change {n} was not found: {what}"
            assert fault(bare, db) or not finished, f"change {n} was not found without the end: {what}"
            assert fault(bare, db, kept=kept), f"change {n} was not found by a seal that west has kept: {what}"
    assert sound > times / 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            "UPDATE turns SET bytes_up = 1 WHERE round = 2 AND site = 'west'",
            "the turn 2 0 west has another entry 'nbytes'",
        ),
        ("UPDATE turns SET question = 'judge' WHERE round = 1", "the turn 1 0 east has another entry 'question'"),
        ("UPDATE turns SET asked = answered WHERE round = 1", "the turn 1 0 east has another entry 'asked'"),
        ("UPDATE turns SET answered = asked WHERE round = 3", "the turn 3 0 east has another entry 'answered'"),
        ("UPDATE turns SET status = 'absent' WHERE round = 2", "the turn 2 0 east is absent, and east has signed"),
        ("UPDATE scores SET value = 1 WHERE round = 1", "round 1 was sealed anew"),
        ("UPDATE scores SET value = 1 WHERE round = 2", "round 2 was sealed anew"),
        ("UPDATE scores SET value = 1 WHERE round = 3", "it has no seal "),
        (
            "DELETE FROM proofs WHERE round = 1 AND site = 'west'",
            "the turn 1 0 west is said to be answered, and west has",
        ),
        (
            "UPDATE meta SET value = replace(value, 'balls', 'cubes') WHERE key = 'study'",
            "the turn 1 0 east: it was signed",
        ),
        ("UPDATE meta SET value = '00' WHERE key = 'run'", "the turn 1 0 east: it was signed in another run"),
        ("UPDATE meta SET value = replace(value, '[', '[1') WHERE key = 'agreed'", "east has signed that it agreed to"),
        ("UPDATE meta SET value = '{}' WHERE key = 'greeted'", "not every hospital of it has signed what it agreed to"),
        ("DELETE FROM meta WHERE key = 'greeted'", "what hospitals have said of themselves cannot be read"),
        (
            "UPDATE meta SET value = replace(replace(replace(value, 'east', '?'), 'west', 'east'), '?', 'west')"
            " WHERE key = 'greeted'",
            "what west is said to have agreed to: the certificate of 'east'",
        ),
    ],
)
def test_the_first_that_was_sealed_anew_is_named(
    carried: Carried, db: sqlite3.Connection, change: str, sentence: str
) -> None:
    db.execute(change)
    seal_anew(db)
    assert chain.verified(db).fault == ""
    assert countersigned.verified(carried.run, db).fault.startswith(sentence)


def test_a_record_that_was_cut_is_found_by_what_hospitals_hold(
    carried: Carried, db: sqlite3.Connection, folder: Path
) -> None:
    for table in (*ROWS, "seals"):
        db.execute(f"DELETE FROM {table} WHERE round >= 2")
    (text,) = db.execute("SELECT entries FROM seals WHERE round = 1").fetchone()
    db.execute("REPLACE INTO head VALUES (1, 1, ?, 0)", (json.loads(text)["state"],))
    assert chain.verified(db).fault == ""
    assert "it was cut, or made anew" in fault(folder, db)
    (folder / countersigned.END).unlink()
    assert countersigned.verified(folder, db).ahead == 1
    assert "it was cut, or made anew" in fault(folder, db, kept=carried.shown("east")[-1])


def test_a_record_that_claims_to_be_of_one_machine_is_found_where_a_root_was_told(
    carried: Carried, db: sqlite3.Connection, tmp_path: Path
) -> None:
    db.execute("DELETE FROM proofs")
    db.execute("DELETE FROM meta WHERE key IN ('run', 'plugins')")
    seal_anew(db)
    assert fault(tmp_path, db) == ""
    assert fault(tmp_path, db, carried.root) == "no hospital has signed it"
    assert fault(carried.run, db).startswith("it is of hospitals")


# -- with a key too many ---------------------------------------------------------------------------------------------


def resigned(db: sqlite3.Connection, carried: Carried, site: str, by: str, round: int, **other: Any) -> None:
    """Puts what ``by`` signs in the place of what a hospital has signed in a round, and seals all anew."""
    rows = db.execute("SELECT call, document FROM proofs WHERE round = ? AND site = ?", (round, site)).fetchall()
    home = carried.hospitals.homes[by]
    for call, text in rows:
        told = {key: value for key, value in json.loads(text).items() if key not in ("signer", "signature")}
        new = signed.canonical(signed.sign({**told, **other}, home.key, home.certificate)).decode()
        db.execute("UPDATE proofs SET document = ? WHERE (round, call, site) = (?, ?, ?)", (new, round, call, site))
    assert rows


def test_no_other_member_can_sign_for_a_hospital(carried: Carried, db: sqlite3.Connection) -> None:
    for by in ("west", "charite"):
        resigned(db, carried, "east", by, 1)
        seal_anew(db)
        assert fault(carried.run, db).startswith(f"the turn 1 0 east: the certificate of {by!r}")


def test_a_coordinator_that_shows_two_hospitals_two_records_is_found(carried: Carried, db: sqlite3.Connection) -> None:
    """West was shown another seal of round 1, and signed it in good faith."""
    resigned(db, carried, "west", "west", 2, ledger="f" * 64)
    seal_anew(db)
    assert fault(carried.run, db).startswith("round 1 was sealed anew, or others were shown another record: west")


def test_another_root_is_not_the_one_that_was_told(carried: Carried, db: sqlite3.Connection) -> None:
    assert "another than the one that you were told" in fault(carried.run, db, "0" * 64)
    assert fault(carried.run, db, " ".join(carried.root[i : i + 4] for i in range(0, 64, 4)).upper()) == ""


@pytest.mark.parametrize("name", [member.ROOT, member.ROSTER, countersigned.END])
def test_a_file_beside_the_record_that_was_changed_is_found(
    carried: Carried, db: sqlite3.Connection, folder: Path, name: str
) -> None:
    draw, data = random.Random(2), bytearray((folder / name).read_bytes())
    for _ in range(30):
        at, bit = draw.randrange(len(data)), 1 << draw.randrange(7)
        if data[at] in b" \n" or data[at] ^ bit in b" \n":
            continue  # between the words
        (folder / name).write_bytes(bytes([*data[:at], data[at] ^ bit, *data[at + 1 :]]))
        assert fault(folder, db), f"byte {at} of {name}, {data[at]:c} as {data[at] ^ bit:c}"
    (folder / name).unlink()
    assert fault(folder, db)
