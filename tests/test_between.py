"""A study between hospitals, with real keys, policies and approvals: the same numbers as on one machine."""

import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from fedscan import launch
from fedscan.consortium import approval, joining, serving
from fedscan.consortium.proposals import office
from fedscan.launch import How
from fedscan.ledger import read_record
from fedscan.studyfile import load
from joined import SITES, Hospitals


def held(path: Path) -> bytes:
    """What a file holds; of a journal its rows, for in its bytes "west" may stand before a code that begins by "2"."""
    if path.suffix != ".sqlite":
        return path.read_bytes()
    with closing(sqlite3.connect(path)) as db:
        return "\n".join(db.iterdump()).encode()


@pytest.fixture
def hospitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hospitals:
    monkeypatch.setattr(serving, "GREETING", 0.05)
    return Hospitals(tmp_path)


def test_a_study_between_hospitals_gives_the_numbers_of_one_machine(hospitals: Hospitals, tmp_path: Path) -> None:
    for name in SITES:
        hospitals.approve(name)
    with hospitals.there(*SITES) as desks:
        page = serving.serve(hospitals.file, tmp_path / "run", hospitals.table())
        assert all(desk.ended.wait(5) for desk in desks.values())
    said = page.read_text()
    for sentence in ("more often, than its signed approval says", "stayed at the hospitals", "left under codes"):
        assert sentence in said
    here = tmp_path / "local"
    launch.launch(load(tmp_path / "study.toml", (), tmp_path / "all"), here, How(cache=tmp_path / "cache"))
    assert (tmp_path / "run/model.safetensors").read_bytes() == (here / "model.safetensors").read_bytes()
    there, local = read_record(tmp_path / "run"), read_record(here)
    asked = office(tmp_path / "west").proposal(hospitals.file).asks.questions
    assert there.agreed["west"] == {q.name: (q.up, q.times * q.rounds + q.last) for q in asked}
    assert (there.between, local.between, local.agreed) == (True, False, {})
    known = [(s.tested_at, s.split, s.label, s.metric, s.value) for s in there.scores]
    assert known == [(s.tested_at, s.split, s.label, s.metric, s.value) for s in local.scores]
    cases = {score.case for score in local.scores}
    assert cases
    assert not cases & {score.case for score in there.scores}
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file() and not path.name.startswith("journal.sqlite-"):
            assert not [case for case in cases if case.encode() in held(path)], path


def test_nothing_begins_before_every_hospital_has_agreed(hospitals: Hospitals, tmp_path: Path) -> None:
    hospitals.approve("east")
    at = office(tmp_path / "west")
    ready = joining.ready(at, hospitals.file, at.proposal(hospitals.file).asks, tmp_path / "cache")
    with pytest.raises(ValueError, match="west does not agree to this study: it is proposed"):
        joining.desk(at, ready)
    waited: list[tuple[str, str]] = []
    with hospitals.there("east"):
        table = hospitals.table(show=lambda site, sentence: waited.append((site, sentence)))
        thread = threading.Thread(target=serving.serve, args=(hospitals.file, tmp_path / "run", table), daemon=True)
        thread.start()
        heard = {("east", "is there, and agrees"), ("west", "is waited for: nobody is there yet")}
        until = time.monotonic() + 60
        while not heard <= set(waited) and time.monotonic() < until:
            time.sleep(0.05)
        assert thread.is_alive()
        assert heard <= set(waited)
        assert not (tmp_path / "run/study.json").exists()
        hospitals.approve("west")
        with hospitals.there("west"):
            thread.join(120)
        assert not thread.is_alive()
        assert (tmp_path / "run/report.html").exists()


def test_a_yes_that_is_undone_is_undone_for_the_next_question(hospitals: Hospitals, tmp_path: Path) -> None:
    for name in SITES:
        hospitals.approve(name)
    with hospitals.there(*SITES):
        at = office(tmp_path / "west")

        def watch(what: str, value: object) -> None:
            if what == "round" and value == 2:
                approval.reject(at.home, at.proposal(hospitals.file).asks, at.policy, "second thoughts", who="west")

        serving.serve(hospitals.file, tmp_path / "run", hospitals.table(how=How(watch=watch)))
    turns = read_record(tmp_path / "run").turns
    assert {turn.status for turn in turns if turn.site == "east"} == {"answered"}
    refused = [turn for turn in turns if turn.site == "west" and turn.status == "refused"]
    assert {turn.round for turn in refused} == {2, 3}
    assert all("west does not agree to this study: it is rejected" in turn.why for turn in refused)
