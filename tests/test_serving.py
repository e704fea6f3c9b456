"""A study between hospitals goes on only as it was begun, by one process, which alone is what ``stop`` ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from commands import Command, refused
from fedscan.cli.between import stop as tell_to_stop
from fedscan.consortium import coordinator, member, serving
from fedscan.consortium.carriers import hold_size, to_sites
from fedscan.consortium.status import LOCK, standing
from fedscan.engines import alone, flower, kept
from fedscan.engines.doors import Door
from fedscan.journal import Journal
from fedscan.launch import How, difference
from fedscan.ledger import read_record
from fedscan.run import Problem
from fedscan.studyfile import load
from joined import SITES, Hospitals

HOLDS = """import sys, time
from pathlib import Path
from fedscan.engines import alone
kept = alone.hold(Path(sys.argv[1]), "taken")
print("held", flush=True)
time.sleep(600)
"""


class Stopped(Exception):
    pass


def in_round_two(what: str, value: Any) -> None:
    if what == "turn" and value.turn.round == 2:
        raise Stopped


@pytest.fixture
def hospitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hospitals:
    monkeypatch.setattr(serving, "GREETING", 0.05)
    made = Hospitals(tmp_path)
    for name in SITES:
        made.approve(name)
    return made


def stopped(hospitals: Hospitals, run: Path) -> None:
    with pytest.raises(Stopped):
        serving.serve(hospitals.file, run, hospitals.table(how=How(watch=in_round_two)))


def renewed(folder: Path) -> None:
    member.take_roster(member.read(folder / "charite"), folder / "root/roster.json")


def test_a_hospital_that_came_later_is_not_asked_in_a_run_that_goes_on(hospitals: Hospitals, tmp_path: Path) -> None:
    with hospitals.there(*SITES):
        stopped(hospitals, tmp_path / "run")
        member.begin("north", "site", tmp_path / "north")
        coordinator.admit(tmp_path / "root", tmp_path / "north/request.csr", "site", now=datetime.now(UTC))
        renewed(tmp_path)
        serving.serve(hospitals.file, tmp_path / "run", hospitals.table(how=How(resume=True)))
    record = read_record(tmp_path / "run")
    assert {turn.site for turn in record.turns} == set(SITES)
    assert {turn.status for turn in record.turns} == {"answered"}


def test_a_hospital_that_was_revoked_is_absent_and_is_sent_nothing(hospitals: Hospitals, tmp_path: Path) -> None:
    with hospitals.there(*SITES) as desks:
        stopped(hospitals, tmp_path / "run")
        coordinator.revoke(tmp_path / "root", "west", "left us")
        renewed(tmp_path)
        sent: list[str] = []
        desks["west"].handle = lambda body: sent.append("west") or b""  # type: ignore
        hour = hospitals.table(lease=3600.0, how=How(resume=True))  # of which nothing is waited
        serving.serve(hospitals.file, tmp_path / "run", hour)
    west = [turn for turn in read_record(tmp_path / "run").turns if turn.site == "west" and turn.round >= 2]
    assert {turn.status for turn in west} == {"absent"}
    assert "west is not on the roster any more, so it is not asked" in west[0].why
    assert sent == []


@pytest.mark.parametrize("changed", ["data.cases=elsewhere", "run.device=auto", "train.rounds=9"])
def test_another_study_does_not_go_on_with_a_run(hospitals: Hospitals, tmp_path: Path, changed: str) -> None:
    run = tmp_path / "run"
    serving.begun(hospitals.file, run, member.read(tmp_path / "charite"))
    before = held(run)
    with pytest.raises(Problem, match="was begun with another study than this one, and to that one hospitals"):
        serving.serve(load(tmp_path / "study.toml", [changed]), run, hospitals.table(how=How(resume=True)))
    assert held(run) == before


def held(run: Path) -> dict[str, str]:
    with closing(Journal(run)) as journal:
        return dict(journal.meta())


def test_what_was_changed_is_named_once_the_run_has_a_study(hospitals: Hospitals, tmp_path: Path) -> None:
    """Where scans lie is no part of a study on one machine, and is part of what hospitals agree to."""
    assert difference({"a": 1, "data": {"cases": ""}}, {"a": 1, "data": {"cases": "b"}}) == ""
    run, home = tmp_path / "run", member.read(tmp_path / "charite")
    serving.begun(hospitals.file, run, home)
    with closing(Journal(run)) as journal:
        journal.set_meta(study=json.dumps(hospitals.file.resolved()))
        journal.commit()
    with pytest.raises(Problem, match=r'than this one \(data.cases was "" and is "b"\), and to that one hospitals'):
        serving.begun(load(tmp_path / "study.toml", ["data.cases=b"]), run, home)


def test_one_process_at_a_time_works_on_a_run_and_in_an_engines_folder(hospitals: Hospitals, tmp_path: Path) -> None:
    run, engine, home = tmp_path / "run", tmp_path / "charite/nvflare", member.read(tmp_path / "charite")
    with alone.hold(run / LOCK, ""), pytest.raises(ValueError, match="another `fedscan serve` is at work on"):
        serving.serve(hospitals.file, run, hospitals.table())
    assert not (run / "journal.sqlite").exists()
    (run / "journal.sqlite").write_bytes(b"nobody may look into it yet")
    with alone.hold(run / LOCK, ""), pytest.raises(ValueError, match="another `fedscan serve` is at work on"):
        serving.serve(hospitals.file, run, hospitals.table())
    with (
        alone.hold(engine / "serve.lock", ""),
        pytest.raises(ValueError, match="another `fedscan serve` reaches hospitals over nvflare from"),
        to_sites("nvflare", home, engine, None, "127.0.0.1:1"),
    ):
        pass


def test_stop_ends_who_holds_the_run_and_nobody_else(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path / "serve.lock")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        told = {"pid": stranger.pid, "state": "asks", "round": 1, "sites": {}}
        (tmp_path / "status.json").write_text(json.dumps(told))
        assert standing(tmp_path)["alive"]
        tell_to_stop(tmp_path)
        assert holder.wait(60) == -signal.SIGTERM
        assert not standing(tmp_path)["alive"]
        with pytest.raises(ValueError, match="it stands still"):
            tell_to_stop(tmp_path)
        assert stranger.poll() is None
    finally:
        for process in (stranger, holder):
            process.kill()
            process.communicate()


class Engine(kept.Kept):
    """An engine's process that holds the lock of its folder and sleeps."""

    fails: Callable[[], object] = staticmethod(lambda: None)

    def command(self) -> list[str]:
        self.fails()
        return [sys.executable, "-c", HOLDS, str(self.folder / kept.LOCK)]

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def port(self) -> int:
        return 0


def test_an_engine_that_cannot_be_started_for_a_while_is_started_then(tmp_path: Path) -> None:
    calls: list[int] = []

    def fails() -> None:
        calls.append(0)
        if len(calls) == 2:  # the first is asked before the watch begins
            raise OSError("no more processes")

    engine = Engine(tmp_path)
    engine.fails = fails
    with engine:
        end = time.monotonic() + 60
        while not alone.held(tmp_path / kept.LOCK):
            assert time.monotonic() < end, "it was never started"
            time.sleep(0.05)
    assert "it could not be started: no more processes" in (tmp_path / kept.SAID).read_text()
    assert not engine.running()


def test_a_lock_that_another_holds_is_not_blanked_nor_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "LAST", 0.1)
    engine = Engine(tmp_path)
    with alone.hold(tmp_path / kept.LOCK, "", text=""):  # and has not said who it is
        engine.stop(0.1)
        with pytest.raises(ValueError, match="nobody holds"):
            engine.pid()
    assert "it could not be ended" in (tmp_path / kept.SAID).read_text()
    with alone.hold(tmp_path / kept.LOCK, ""):
        process = engine._started()
        assert alone.holder(tmp_path / kept.LOCK) == os.getpid()
        process.kill()
        process.wait()


def test_a_study_in_which_nothing_was_learned_ends_with_code_3(
    hospitals: Hospitals, tmp_path: Path, fedscan: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Door] = []

    class Noted(Door):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            opened.append(self)

    monkeypatch.setattr("joined.Door", Noted)

    def leave(what: str, value: Any) -> None:
        if what == "method":
            for door in opened:
                door.close()

    with hospitals.there(*SITES):
        table = hospitals.table(lease=0.2, how=How(watch=leave))
        serving.serve(hospitals.file, tmp_path / "run", table)
    words = ["serve", "study.toml", "--folder", "charite", "--engine", "loopback", "--sites", ".", "--out", "run"]
    said = fedscan(*words, "--resume")
    assert said.code == 3, said
    assert "no round closed with an answer, so nothing was learned" in said.err
    refused(fedscan(*words), "run already holds a run")


def test_a_study_that_its_carrier_cannot_bring_is_refused_before_its_first_round(
    hospitals: Hospitals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower, "MOST", 10_000)
    told: list[int] = []

    def hold(nbytes: int) -> None:
        told.append(nbytes)
        hold_size("flower", nbytes)

    with hospitals.there(*SITES), pytest.raises(ValueError, match=r"largest message of this study has .* nvflare"):
        serving.serve(hospitals.file, tmp_path / "run", hospitals.table(hold=hold))
    assert 90_000 < told[0] < 2_000_000  # some 22,000 numbers of four bytes, or a table of scores
    assert not (tmp_path / "run/study.json").exists()
