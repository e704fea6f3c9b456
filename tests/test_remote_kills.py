"""Killed anywhere: a study between hospitals comes to the same bits, whoever ends at whatever moment."""

import errno
import itertools
import os
import random
import resource
import shutil
import signal
import sqlite3
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from between import TALK, Between, Straight
from contract import BENCHES, study_of
from fedscan import wire
from fedscan.averaging import averaging
from fedscan.engines import remote
from fedscan.engines.desk import Desk
from fedscan.engines.doors import Door, Doors, Lost, Manner
from fedscan.engines.local import Local
from fedscan.engines.remote import Remote, SiteFailed
from fedscan.memory import Receipt
from fedscan.method import Absent, Method, Sites, State, messages
from fedscan.methods.registry import get
from fedscan.recorded import Answer
from fedscan.run import run
from fedscan.step import Step
from fedscan.study import Study, Turn
from test_remote import record
from test_resume import PLANS, Killed, gossiping
from toy import same
from toy import study as toy_study
from unsigned import Unsigned

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
COORDINATOR = "coordinator"
Trouble = Callable[[str, dict[str, Any]], None]  # is given the site and the header of a request, and may raise Lost
Point = tuple[str, str, int]  # who, at which event, the how many-th of that name


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.001, 0.01))


class Ended(Exception):
    """What the coordinator's main thread is woken with when its process was killed in another thread."""


class Life:
    """One process of one member: once it is killed, whatever it still tries is its end."""

    def __init__(self, who: str, fates: "Fates") -> None:
        self.who, self.fates, self.dead = who, fates, False
        self.last: Callable[[], None] = lambda: None

    def __call__(self, event: str) -> None:
        if not self.dead and self.fates.strike(self.who, event):
            self.dead = True
            self.last()
        if self.dead:
            raise Killed(f"{self.who}: {event}")


class Fates:
    """Counts what happens to each member, and says where its process is killed."""

    def __init__(self, *points: Point) -> None:
        self.points, self.struck = set(points), 0
        self.seen = Counter[tuple[str, str]]()
        self.log: list[Point] = []
        self._lock = threading.Lock()

    def strike(self, who: str, event: str) -> bool:
        with self._lock:
            self.seen[who, event] += 1
            point = (who, event, self.seen[who, event])
            self.log.append(point)
            struck = point in self.points
            self.struck += struck
            return struck


class Mortal(Between):
    """A consortium whose members are processes that the fates can kill: threads that end, and take all with them."""

    manner = Manner()

    def __init__(self, study: Study, folder: Path, fates: Fates, **options: Any) -> None:
        self.fates, self.lives = fates, dict[str, Life]()
        self.trouble: Trouble = lambda site, header: None
        self.engines: list[Remote] = []
        super().__init__(study, folder, **options)

    def restart(self, name: str) -> None:
        self.lives[name] = Life(name, self.fates)
        settings = {**self.options, "event": self.lives[name]}
        self.desks[name] = Desk(self.study, name, self.folder / name, TALK, Unsigned(name), **settings)

    def buried(self, name: str) -> None:
        """Waits until a killed site's thread has ended, and starts the site again."""
        for found in self.desks[name]._runs.values():
            if found.job:
                assert found.job.done.wait(20)
        self.restart(name)

    def call(self, site: str, request: bytes, seconds: float) -> bytes:
        """The carrier: a request to a site that is killed meanwhile is lost; for the next it is there again."""
        coordinator = self.coordinator
        coordinator("calls")
        self.trouble(site, header_of(request))
        life, there = self.lives[site], self.desks[site]
        try:
            life("hears")
            said = there.handle(request)
            life("says")
        except BaseException as e:
            if not life.dead:
                raise
            self.buried(site)
            raise Lost("the site was killed") from e
        coordinator("is told")
        return said

    def once(self, resume: bool, **options: Any) -> dict[str, Any]:
        """One process of the coordinator."""
        life = self.coordinator = Life(COORDINATOR, self.fates)

        def engine(study: Study, folder: Path) -> Remote:
            made = self.engine(self, event=life, **options)(study, folder)
            assert isinstance(made, Remote)

            def last() -> None:
                made._closing.set()
                for done in made._done.values():
                    done.put(Ended())

            life.last = last
            return made

        before = set(threading.enumerate())
        try:
            return run(self.study, self.folder / "run", engine=engine, resume=resume, commit_seconds=0.0, event=life)
        finally:
            for thread in set(threading.enumerate()) - before:
                if "_serve" in thread.name:  # it may still write an answer down
                    thread.join(20)

    def live(self, **options: Any) -> dict[str, Any]:
        """The last state, however many processes of the coordinator it takes."""
        resume = False
        while True:
            try:
                return self.once(resume, **options)
            except (Killed, Ended):
                resume = True


def header_of(request: bytes) -> Any:
    """What a request says, but for its body."""
    return wire.loads(request[4 : 4 + int.from_bytes(request[:4], "big")])


class Replayed(Local):
    """The engine of simulations, in which started answers arrive in the order in which they arrived elsewhere."""

    def __init__(self, study: Study, folder: Path, order: Iterator[Turn]) -> None:
        super().__init__(study, folder)
        self.order = order

    def receive(self, started: bool) -> Answer:
        if not started:
            return super().receive(started)
        turn = next(self.order)
        (found,) = (entry for entry in self._started if entry[-1].turn == turn)
        self._started.remove(found)
        return self.answer(found[-1])


def arrivals(folder: Path) -> Iterator[Turn]:
    """The started turns of a run, in the order in which they arrived."""
    with closing(sqlite3.connect(folder / "journal.sqlite")) as db:
        found = db.execute("SELECT turn FROM arrived ORDER BY round, position").fetchall()
    return iter([Turn(*wire.loads(text)) for (text,) in found])


def told_twice(log: list[Point]) -> list[Point]:
    """What was computed by a site that had kept its answer."""
    kept, again = set(), []
    for who, event, _ in log:
        if event.startswith("site turn kept "):
            r, c = event.removeprefix("site turn kept (").rstrip(")").split(", ")
            kept.add(f"computed {r}.{c}.{who}")
        elif event in kept:
            again.append((who, event, 0))
    return again


def held(between: Mortal, state: dict[str, Any], where: Path) -> None:
    """Holds a run to the same study in one process."""
    local = run(between.study, where, engine=lambda s, f: Replayed(s, f, arrivals(between.folder / "run")))
    assert same(state, local)
    assert record(between.folder / "run") == record(where)
    assert told_twice(between.fates.log) == []


def plan_of(name: str) -> Study:
    if name in PLANS:
        return replace(PLANS[name](), silent={})
    return study_of(get(name), BENCHES["2D"], names=("amsterdam", "bergen"), step=Step(lr=0.1, batch=80))


@pytest.mark.parametrize("name", ["scaffold", "fedavg-compressed", "async"])
def test_killed_at_each_event_several_times_in_a_run(name: str, tmp_path: Path) -> None:
    """Every event of a whole run kills in one of six runs, each of which goes on to the same bits and records."""
    whole = Mortal(plan_of(name), tmp_path / "whole", Fates())
    held(whole, whole.live(), tmp_path / "local")
    struck = 0
    for k in range(6):
        between = Mortal(plan_of(name), tmp_path / str(k), Fates(*whole.fates.log[k::6]))
        held(between, between.live(), tmp_path / f"local {k}")
        struck += between.fates.struck
    assert struck >= 40


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scaffold", "fedavg-compressed", "fedsegnet", "async", "buffered"])
def test_killed_once_at_each_event(name: str, tmp_path: Path) -> None:
    whole = Mortal(plan_of(name), tmp_path / "whole", Fates())
    held(whole, whole.live(), tmp_path / "local")
    for k, point in enumerate(whole.fates.log):
        between = Mortal(plan_of(name), tmp_path / str(k), Fates(point))
        held(between, between.live(), tmp_path / f"local {k}")
        shutil.rmtree(tmp_path / str(k))
        shutil.rmtree(tmp_path / f"local {k}")


# -- leases ----------------------------------------------------------------------------------------------------------


class Clock:
    """Stands in for the module ``time``: for each thread the seconds that its calls were told to take."""

    def __init__(self) -> None:
        self._mine = threading.local()
        self.spent: dict[str, float] = defaultdict(float)  # by the site that a thread is for
        self.strftime, self.localtime, self.time = time.strftime, time.localtime, time.time

    def monotonic(self) -> float:
        return getattr(self._mine, "now", 0.0)

    def take(self, seconds: float, site: str = "") -> None:
        self._mine.now = self.monotonic() + seconds
        self.spent[site] += seconds


class Slow(Straight):
    """A carrier to sites of which one is lost, or takes its time, as ``trouble`` says: it is given each request."""

    def __init__(self, desks: dict[str, Desk], trouble: Trouble) -> None:
        super().__init__(desks)
        self.trouble = trouble

    def call(self, site: str, request: bytes, seconds: float) -> bytes:
        self.trouble(site, header_of(request))
        return super().call(site, request, seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(remote, "time", made)
    return made


LEASE = 60.0
IMPATIENT: Any = {"lease": LEASE, "patience": 0.002}


def without_why(folder: Path) -> list[tuple[Any, ...]]:
    """What a run recorded, but for the sentences of those who were absent."""
    return [row[:10] + row[11:] if "absent" in row else row for row in record(folder)]


def held_to_silence(study: Study, state: dict[str, Any], silent: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Holds a run to the same study in one process, in which those who were absent are silent."""
    assert same(state, run(replace(study, silent=silent), folder / "local"))
    assert without_why(folder / "run") == without_why(folder / "local")


class Stopping:
    """Training cases that come when they may."""

    def __init__(self, split: Any, wait: Callable[[], None]) -> None:
        self._split, self._wait = split, wait

    def __getattr__(self, name: str) -> Any:
        return getattr(self._split, name)

    def __len__(self) -> int:
        return len(self._split)

    def batches(self, *args: Any) -> Iterator[Any]:
        for batch in self._split.batches(*args):
            self._wait()
            yield batch


def stopping(study: Study, name: str, wait: Callable[[], None]) -> Study:
    """The study, in which one site's training waits before each batch."""

    def data(of: str) -> Any:
        splits = study.data(of)
        return splits._replace(train=Stopping(splits.train, wait)) if of == name else splits

    return replace(study, data=data)


class Steps:
    """A site whose every batch takes two requests, and each of these a third of the lease."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.polls, self._wanted, self._asked = clock, 0, 0, threading.Condition()

    def batch(self) -> None:
        with self._asked:
            self._wanted = 2
            assert self._asked.wait_for(lambda: not self._wanted, 20)

    def poll(self, site: str, header: dict[str, Any]) -> None:
        with self._asked:
            if self._wanted:
                self._wanted, self.polls = self._wanted - 1, self.polls + 1
                self.clock.take(LEASE / 3)
                self._asked.notify()


def test_a_site_that_works_for_many_leases_is_not_dropped(tmp_path: Path, clock: Clock) -> None:
    study, steps = study_of(get("scaffold"), BENCHES["2D"], names=("cairo",)), Steps(clock)
    between = Between(stopping(study, "cairo", steps.batch), tmp_path)
    state = between.run(Slow(between.desks, steps.poll), **IMPATIENT)
    assert steps.polls == 2 * 5 * 2  # rounds, batches, requests: more than three leases in a round
    held_to_silence(study, state, {}, tmp_path)


def test_a_site_that_hangs_is_absent_and_its_late_answer_leaves_no_trace(tmp_path: Path, clock: Clock) -> None:
    """It hangs in round 1, keeps its late answer and its control variate, and goes on in round 2 from neither."""
    goes_on, late = threading.Event(), list[Receipt | None]()

    def batch() -> None:
        assert goes_on.wait(20)

    def trouble(site: str, header: dict[str, Any]) -> None:
        if site == "bergen" and not goes_on.is_set():
            clock.take(LEASE / 4, "bergen")

    def closed(event: str) -> None:
        if event == "closed 1.0":
            goes_on.set()
            (found,) = between.desks["bergen"]._runs.values()
            assert found.job
            assert found.job.done.wait(20)
            late.append(found.disk.receipt((1, 0)))

    study = study_of(get("scaffold"), BENCHES["2D"])
    between = Between(stopping(study, "bergen", batch), tmp_path)
    state = between.run(Slow(between.desks, trouble), run_with={"event": closed}, **IMPATIENT)
    assert late[0]
    assert late[0].changed
    assert LEASE <= clock.spent["bergen"] <= 1.5 * LEASE
    held_to_silence(study, state, {"bergen": (1,)}, tmp_path)
    assert absent_because(tmp_path / "run") == ["no progress for 60 s"]
    assert not (tmp_path / "bergen" / TALK.run / "sites" / "bergen" / "turns" / "1.0").exists()


def absent_because(folder: Path) -> list[str]:
    """The sentences of those who were absent."""
    return [row[10] for row in record(folder) if "absent" in row]


def test_a_dead_site_costs_a_round_one_lease_however_often_it_is_asked(tmp_path: Path, clock: Clock) -> None:
    """In rounds 1 and 2, with a question and a validation each, one site is dead."""
    calls = Counter[tuple[int, ...]]()

    def trouble(site: str, header: dict[str, Any]) -> None:
        if site == "cairo" and header["turn"][0] < 3:
            calls[tuple(header["turn"])] += 1
            clock.take(LEASE / 10, "cairo")
            raise Lost("nobody is there yet")

    study = study_of(get("fedavg"), BENCHES["2D"], rounds=3, every=1)
    between = Between(study, tmp_path)
    state = between.run(Slow(between.desks, trouble), **IMPATIENT)
    assert calls == {(1, 0): 10, (1, 1): 1, (2, 0): 10, (2, 1): 1}
    held_to_silence(study, state, {"cairo": (1, 2)}, tmp_path)
    assert set(absent_because(tmp_path / "run")) == {"no progress for 60 s: nobody is there yet"}


def asking_twice() -> Method:
    """Asks the same of all sites twice a round, and averages what they say the second time."""
    base = averaging()

    def round(sites: Sites, state: State) -> State:
        sites.ask_each(base.answers[0], messages(state, sites.names), need=0)
        return base.round(sites, state)

    return Method(base.init, round, base.answers)


def test_who_was_absent_is_granted_another_lease_once_it_shows_progress(tmp_path: Path, clock: Clock) -> None:
    """It was lost when round 1 asked first, and works for long on what the round asks next."""
    steps = Steps(clock)

    def trouble(site: str, header: dict[str, Any]) -> None:
        if header["turn"] == [1, 0]:
            clock.take(LEASE / 3)
            raise Lost("nobody is there yet")
        steps.poll(site, header)

    study = toy_study(asking_twice(), names=("cairo",), rounds=1)
    between = Between(stopping(study, "cairo", steps.batch), tmp_path)
    between.run(Slow(between.desks, trouble), **IMPATIENT)
    assert [row[7] for row in record(tmp_path / "run")[:3]] == ["absent", "answered", "answered"]
    assert steps.polls == 5 * 2


def dead(n: int, at: Callable[[tuple[int, ...]], bool], clock: Clock) -> Trouble:
    """Loses the first ``n`` requests to cairo of these turns, each of which takes half a lease."""
    left = iter(range(n))

    def trouble(site: str, header: dict[str, Any]) -> None:
        if site == "cairo" and at(tuple(header["turn"])) and next(left, None) is not None:
            clock.take(LEASE / 2)
            raise Lost("nobody is there yet")

    return trouble


def test_who_is_absent_is_waited_for_where_the_study_says_so(tmp_path: Path, clock: Clock) -> None:
    study = study_of(get("scaffold"), BENCHES["2D"], absent="wait")
    between = Between(study, tmp_path)
    told: list[str] = []
    carrier = Slow(between.desks, dead(7, lambda turn: True, clock))
    state = between.run(carrier, tell=lambda site, sentence: told.append(sentence), **IMPATIENT)
    held_to_silence(study, state, {}, tmp_path)
    assert told.count("is absent: no progress for 60 s: nobody is there yet") == 3


def test_a_run_stops_at_who_is_absent_and_goes_on_once_all_are_there(tmp_path: Path, clock: Clock) -> None:
    study = study_of(get("scaffold"), BENCHES["2D"], absent="stop")
    between = Mortal(study, tmp_path, Fates())
    between.trouble = dead(2, lambda turn: turn[0] == 2, clock)
    with pytest.raises(Absent, match="cairo"):
        between.once(resume=False, **IMPATIENT)
    held_to_silence(study, between.once(resume=True, **IMPATIENT), {}, tmp_path)


def test_a_round_without_its_quorum_is_skipped(tmp_path: Path, clock: Clock) -> None:
    """All have to answer, and one does not in round 2: nobody remembers anything of that round."""
    study = replace(PLANS["skipped"](), silent={})
    between = Between(study, tmp_path)
    state = between.run(Slow(between.desks, dead(99, lambda turn: turn[0] == 2, clock)), **IMPATIENT)
    held_to_silence(study, state, {"cairo": (2,)}, tmp_path)


def test_a_started_question_of_a_settled_round_outlives_its_sites_process(tmp_path: Path, clock: Clock) -> None:
    """It reaches the site only when its round is settled, and the site is killed while it works on it."""
    computed = "computed 1.0.cairo"

    def trouble(site: str, header: dict[str, Any]) -> None:
        early = site == "cairo" and header["turn"] == [1, 0] and header.get("past", 0) < 1
        waits = between.fates.seen["cairo", computed] < 2 and clock.spent["cairo"] < LEASE
        others = site != "cairo" and header["turn"] == [2, 0] and waits
        if site == "cairo" and between.fates.seen["cairo", computed]:
            clock.take(LEASE / 20, "cairo")
        if early or others:
            raise Lost("nobody is there")

    study = toy_study(gossiping(), names=("amsterdam", "cairo"), rounds=3, step=Step(lr=0.1, batch=80))
    between = Mortal(study, tmp_path, Fates(("cairo", computed, 1)))
    between.trouble = trouble
    held(between, between.live(lease=LEASE), tmp_path / "local")
    assert between.fates.seen["cairo", computed] == 2


# -- full disks ------------------------------------------------------------------------------------------------------


class FullDisk:
    """No file under ``folder`` can be written where ``full`` says so, which is given the path."""

    def __init__(self, folder: Path, full: Callable[[Path], bool], patch: pytest.MonkeyPatch) -> None:
        whole = Path.open

        def opened(path: Path, mode: str = "r", *args: Any, **settings: Any) -> Any:
            if mode not in ("r", "rb") and path.is_relative_to(folder) and full(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return whole(path, mode, *args, **settings)

        patch.setattr(Path, "open", opened)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages and answers of the toy go in parts."""
    for carrier in (Straight, Mortal, Doors):
        monkeypatch.setattr(carrier, "manner", Manner(part=2000))


def full_for_a_while(folder: Path, full: Callable[[Path], bool], patch: pytest.MonkeyPatch) -> list[str]:
    """Holds a run with a site whose disk is full now and then to the same study in one process.

    Nothing is computed twice, for all that cannot be written. Returns what was said while sites were waited for.
    """
    study, told = plan_of("scaffold"), list[str]()
    between = Mortal(study, folder, Fates())
    with patch.context() as patched:
        FullDisk(folder / "bergen", full, patched)
        state = between.live(tell=lambda site, sentence: told.append(sentence))
    held(between, state, folder / "local")
    assert max(n for (_, event), n in between.fates.seen.items() if event.startswith("computed")) == 1
    return told


@pytest.mark.usefixtures("small_parts")
def test_a_full_disk_is_waited_for_whatever_was_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever file it is, it can be written when it is tried for the third time."""
    tried = Counter[Path]()

    def full(path: Path) -> bool:
        tried[path] += 1
        return tried[path] < 3

    told = full_for_a_while(tmp_path, full, monkeypatch)
    assert len(tried) >= 15
    assert sum("(No space left on device)" in sentence for sentence in told) == 2 * len(tried)


@pytest.mark.slow
@pytest.mark.usefixtures("small_parts")
def test_a_full_disk_is_waited_for_from_each_write_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times in a row nothing can be written."""
    writes = 0

    def counted(path: Path) -> bool:
        nonlocal writes
        writes += 1
        return False

    def full_from(first: int) -> Callable[[Path], bool]:
        left = iter([False] * first + [True] * 3)
        return lambda path: next(left, False)

    full_for_a_while(tmp_path / "whole", counted, monkeypatch)
    assert writes > 20
    for first in range(writes):
        told = full_for_a_while(tmp_path / str(first), full_from(first), monkeypatch)
        assert sum("(No space left on device)" in sentence for sentence in told) == 3
        shutil.rmtree(tmp_path / str(first))


def test_a_site_whose_disk_stays_full_is_absent_and_back_in_the_next_round(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(get("scaffold"), BENCHES["2D"])
    between, full = Between(study, tmp_path), True
    FullDisk(tmp_path / "bergen", lambda path: full, monkeypatch)

    def trouble(site: str, header: dict[str, Any]) -> None:
        nonlocal full
        if site == "bergen":
            full = header["turn"][0] == 1
            clock.take(LEASE / 4)

    state = between.run(Slow(between.desks, trouble), lease=LEASE)
    held_to_silence(study, state, {"bergen": (1,)}, tmp_path)
    (why,) = absent_because(tmp_path / "run")
    assert why.startswith("no progress for 60 s: bergen c")
    assert "(No space left on device)" in why
    assert str(tmp_path) not in why


def test_scans_that_cannot_be_read_are_no_progress_when_they_are_tried_again(tmp_path: Path, clock: Clock) -> None:
    """A site whose archive is away works up to the same case, time and again: it is absent after its lease."""
    back, polled, tried = threading.Event(), threading.Semaphore(0), 0

    def batch() -> None:
        nonlocal tried
        if back.is_set():
            return
        tried += 1
        assert polled.acquire(timeout=20)
        if tried % 3 == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "/archive/case-3.nii.gz")

    def trouble(site: str, header: dict[str, Any]) -> None:
        if site == "bergen" and header["turn"][0] == 1 and tried < 60:
            clock.take(LEASE / 40)
        elif site == "bergen":
            back.set()
        if site == "bergen":
            polled.release()

    study = study_of(get("scaffold"), BENCHES["2D"])
    between = Between(stopping(study, "bergen", batch), tmp_path)
    state = between.run(Slow(between.desks, trouble), **IMPATIENT)
    assert 3 <= tried < 60
    held_to_silence(study, state, {"bergen": (1,)}, tmp_path)
    assert all(str(why).startswith("no progress for 60 s") for why in absent_because(tmp_path / "run"))


# -- what else is asked again ----------------------------------------------------------------------------------------


def test_an_answer_that_was_damaged_on_the_disk_is_computed_again(tmp_path: Path) -> None:
    """A bit of an answer flips after it was kept and before it came through."""
    study = study_of(get("scaffold"), BENCHES["2D"], names=("amsterdam", "bergen"))

    def kept(event: str) -> None:
        if event == "site turn kept (2, 0)" and not hurt:
            path = tmp_path / "bergen" / TALK.run / "sites" / "bergen" / "turns" / "2.0" / "answer.safetensors"
            if path.exists():
                hurt.append(path.read_bytes())
                path.write_bytes(hurt[0][:-1] + bytes([hurt[0][-1] ^ 1]))

    hurt: list[bytes] = []
    state = Between(study, tmp_path, event=kept).run()
    assert hurt
    held_to_silence(study, state, {}, tmp_path)


def test_what_failed_at_a_site_is_tried_again_once_the_run_goes_on(tmp_path: Path) -> None:
    study, mended = study_of(get("scaffold"), BENCHES["2D"]), threading.Event()

    def batch() -> None:
        if not mended.is_set():
            raise ZeroDivisionError

    between = Mortal(stopping(study, "bergen", batch), tmp_path, Fates())
    for resume in (False, True):
        with pytest.raises(SiteFailed, match=r"learn in round 1 failed at bergen \(ZeroDivisionError\): its own log"):
            between.once(resume)
    mended.set()
    held_to_silence(study, between.once(resume=True), {}, tmp_path)


# -- processes -------------------------------------------------------------------------------------------------------

Hook = Callable[[str], None]
Fate = tuple[str, int]  # the how many-th event that begins so kills the process


class Processes:
    """Each member a process that was forked from this one, with doors between them. The killed are started again.

    ``fates`` are those of a member's first, second, ... process, none where there are no more; ``limit`` is the size of
    the largest file that the first process of bergen can write at first.
    """

    def __init__(self, study: Study, folder: Path, fates: Mapping[str, Sequence[Fate]], limit: int = 0) -> None:
        self.study, self.folder, self.limit = study, folder, limit
        self.expected = run(study, folder / "local")  # first, so that all is imported before this process is forked
        self.fates = {who: iter(fates.get(who, ())) for who in (*study.names, COORDINATOR)}
        self.epochs, self.killed, self.pids = itertools.count(1), Counter[str](), dict[str, int]()

    def start(self, who: str) -> None:
        """A new process of a member."""
        fate, epoch, parent = next(self.fates[who], ("", 0)), next(self.epochs), os.getpid()
        self.pids[who] = os.fork()
        if self.pids[who]:
            return
        try:
            threading.Thread(target=orphaned, args=(parent,), daemon=True).start()
            if who == COORDINATOR:
                self.coordinate(epoch, killing(fate))
            else:
                self.take_part(who, killing(fate))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def take_part(self, name: str, hook: Hook) -> None:
        """The process of a site, until it is killed."""
        study = stopping(self.study, name, lambda: hook("batch"))
        room, full = resource.getrlimit(resource.RLIMIT_FSIZE), Counter[str]()

        def log(sentence: str) -> None:
            full["times"] += "File too large" in sentence
            if full["times"] == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, room)
                (self.folder / "was full").touch()

        there = Desk(study, name, self.folder / name, TALK, Unsigned(name), durable=False, event=hook, log=log)

        def handled(header: dict[str, Any], request: bytes) -> bytes:
            hook(f"hears {header_of(request)['act']}")
            said = there.handle(request)
            hook(f"says {header_of(said)['status']}")
            return said

        Door(self.folder / name, handled)
        if self.limit and name == "bergen" and not (self.folder / "was full").exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, room[1]))
        threading.Event().wait()

    def coordinate(self, epoch: int, hook: Hook) -> None:
        """A process of the coordinator, until it is killed or the run is at its end."""
        doors = Doors({name: self.folder / name for name in self.study.names})

        def engine(study: Study, folder: Path) -> Remote:
            seal = Unsigned(COORDINATOR)
            return Remote(study, folder, doors, TALK, seal, epoch, patience=1.0, durable=False, event=hook)

        state = run(self.study, self.folder / "run", engine=engine, resume=True, commit_seconds=0.0, event=hook)
        (self.folder / "digest").write_text(wire.pack(state).digest)

    def live(self, strike: Callable[[], None] = lambda: None) -> None:
        """From the start of all to the end of the run."""
        for name in self.study.names:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        try:
            for who in self.fates:
                self.start(who)
            while True:
                strike()
                for who, pid in list(self.pids.items()):
                    gone, status = os.waitpid(pid, os.WNOHANG)
                    if gone and not status:
                        del self.pids[who]
                        assert who == COORDINATOR
                        return
                    if gone:
                        assert os.WTERMSIG(status) == signal.SIGKILL, f"{who} ended by itself"
                        self.killed[who] += 1
                        self.start(who)
                time.sleep(0.002)
        finally:
            for pid in self.pids.values():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def held(self) -> None:
        """Holds the run to the same study in one process."""
        assert (self.folder / "digest").read_text() == wire.pack(self.expected).digest
        assert record(self.folder / "run") == record(self.folder / "local")


def orphaned(parent: int) -> None:
    """Ends this process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def killing(fate: Fate) -> Hook:
    """Kills this process for good at an event."""
    name, left = fate[0], iter(range(fate[1] - 1))

    def hook(event: str) -> None:
        if name and event.startswith(name) and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


@pytest.mark.usefixtures("small_parts")
def test_processes_that_are_killed_for_good(tmp_path: Path) -> None:
    """While they compute, while a message or an answer comes over in parts, while they write; all in one run."""
    fates = {
        "amsterdam": [("hears part", 2), ("site turn written", 1), ("says answered", 1), ("batch", 4)],
        "bergen": [("batch", 2), ("hears fetch", 2), ("says part", 1), ("site memory written", 1), ("hears ask", 2)],
        COORDINATOR: [("head moved 0", 1), ("taken", 1), ("answered", 1), ("about to commit", 1), ("closed 1", 1),
                      ("state written 1", 1), ("committed", 2), ("taken", 2), ("past dropped 2", 1)],
    }  # fmt: skip
    study = study_of(get("scaffold"), BENCHES["2D"], names=("amsterdam", "bergen"), every=1)
    processes = Processes(study, tmp_path, fates)
    processes.live()
    processes.held()
    assert processes.killed == {who: len(each) for who, each in fates.items()}


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_processes_that_are_killed_at_any_time(seed: int, tmp_path: Path) -> None:
    draw, at = random.Random(seed), 0.0

    def strike() -> None:
        nonlocal at
        if time.monotonic() > at and sum(processes.killed.values()) < 20:
            os.kill(processes.pids[draw.choice(sorted(processes.pids))], signal.SIGKILL)
            at = time.monotonic() + draw.uniform(0.02, 0.4)

    processes = Processes(study_of(get("scaffold"), BENCHES["2D"], rounds=4, every=1), tmp_path, {})
    processes.live(strike)
    processes.held()


@pytest.mark.usefixtures("small_parts")
def test_a_process_that_can_write_no_larger_file_goes_on_once_it_can(tmp_path: Path) -> None:
    """The system's own limit: a write ends in the middle of a file."""
    processes = Processes(plan_of("scaffold"), tmp_path, {}, limit=3000)
    processes.live()
    processes.held()
    assert (tmp_path / "was full").exists()
