"""Messages and answers in many parts: gone on with where they stood, noticed where damaged, and by hash where known."""

import random
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import echo
from between import Between, Straight
from fedscan import wire
from fedscan.engines import desk as desks
from fedscan.engines import remote
from fedscan.engines.doors import Lost, Manner
from fedscan.engines.envelope import REQUEST, mark
from fedscan.engines.incoming import LACKS, PARTS, Incoming
from fedscan.engines.outgoing import Outgoing
from fedscan.engines.remote import Remote
from fedscan.recorded import Answer, Letter
from fedscan.run import run
from fedscan.schema import Weights
from fedscan.study import Study, Turn
from hostile import SITE, Speaker, Tap, flipped, letter_of, one_desk, opened, parted, question, smaller_parts
from toy import same

torch.set_num_threads(1)
PART = 1_000
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.001, 0.01))
    smaller_parts(monkeypatch, PART)


class Killed(BaseException):
    """The process is gone."""


class Counting(Tap):
    """Counts the bytes of parts that it brings down and up; ``cut`` is called before each of them."""

    def __init__(self, between: Between, cut: Any = lambda acts, request: request) -> None:
        super().__init__(between.desks)
        self.down_bytes, self.up_bytes, self.acts, self.cut = 0, 0, [], cut

    def call(self, site: str, request: bytes, seconds: float) -> bytes:
        header, body = parted(request)
        assert header["kind"] == REQUEST
        self.acts.append(header["act"])
        request = self.cut(self.acts, request)
        said = super().call(site, request, seconds)
        self.down_bytes += len(body)
        self.up_bytes += len(parted(said)[1])
        assert max(len(body), len(parted(said)[1])) <= PART
        return said


def asked(engine: Remote, study: Study) -> Answer:
    """What comes of one large question."""
    try:
        return engine._answer(letter_of(study))
    finally:
        engine.close()


@pytest.fixture
def study() -> Study:
    """A message, and an answer, of some 33 parts."""
    return echo.study((SITE,))


def sizes(study: Study, folder: Path) -> tuple[int, int]:
    """Bytes of the message and of its answer."""
    between = Between(study, folder)
    answer = asked(between.engine()(study, folder / "run"), study)
    return letter_of(study).parcel.nbytes, answer.nbytes


class Reordering(Counting):
    """Keeps each part for a while that is drawn anew, so that the next may overtake it."""

    manner = Manner(part=PART, flight=3)

    def call(self, site: str, request: bytes, seconds: float) -> bytes:
        if parted(request)[0]["act"] in ("part", "fetch"):
            time.sleep(random.Random(hash(request)).uniform(0.0, 0.004))
        return super().call(site, request, seconds)


@pytest.mark.parametrize("way", [Counting, Reordering])
def test_a_run_in_many_parts_gives_the_same_bits(way: type[Counting], tmp_path: Path) -> None:
    """Also where parts overtake each other."""
    study = echo.study(drift=0.5)
    between = Between(study, tmp_path)
    carrier = way(between)
    assert same(between.run(carrier), run(study, tmp_path / "local"))
    assert min(carrier.acts.count("part"), carrier.acts.count("fetch")) > 100


@pytest.mark.parametrize("act", ["part", "fetch"])
@pytest.mark.parametrize("who", ["site", "coordinator"])
def test_with_several_parts_under_way_few_travel_twice(
    act: str, who: str, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Straight, "manner", Manner(part=PART, flight=2))
    down, up = sizes(study, tmp_path / "whole")
    between, once = Between(study, tmp_path), list[str]()

    def cut(acts: list[str], request: bytes) -> bytes:
        if acts.count(act) >= 10 and acts[-1] == act and not once:
            once.append(act)
            if who == "coordinator":
                raise Killed
            between.restart(SITE)
        return request

    carrier = Counting(between, cut)
    if who == "coordinator":
        with pytest.raises(Killed):
            asked(between.engine(carrier)(study, tmp_path / "run"), study)
    answer = asked(between.engine(carrier)(study, tmp_path / "run"), study)
    assert same(answer.read(), {"weights": study.start()["weights"], "asked": 1})
    assert down <= carrier.down_bytes <= down + 4 * PART
    assert up <= carrier.up_bytes <= up + 4 * PART


def test_a_line_that_is_too_slow_for_its_parts_gets_smaller_ones(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways; and larger ones are tried again with the next message."""
    monkeypatch.setattr(remote, "LEAST_PART", 100)
    between, widest = Between(study, tmp_path), list[int]()

    class Slow(Tap):
        manner = Manner(part=64_000)

        def call(self, site: str, request: bytes, seconds: float) -> bytes:
            said = super().call(site, request, seconds)
            size = max(len(parted(request)[1]), len(parted(said)[1]))
            widest.append(size)
            if size > 9_000:
                raise Lost("it took too long")
            return said

    engine = between.engine(Slow(between.desks))(study, tmp_path / "run")
    answer = engine._answer(letter_of(study))
    engine.close()
    assert same(answer.read()["weights"], study.start()["weights"])
    assert engine.lines[SITE].part == 8_000
    assert max(widest) > 30_000
    assert sum(size > 9_000 for size in widest) < 8
    engine.lines[SITE].refresh()
    assert engine.lines[SITE].part == 16_000


def test_a_message_is_not_sent_again_to_who_works_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fits into one request, and the site is asked several times before it has its answer."""
    monkeypatch.setattr(Straight, "manner", Manner())
    go = threading.Event()

    def reply(site: Any, message: Any) -> Any:
        assert go.wait(20)
        return echo.back(site, message)

    study = echo.study((SITE,), reply=reply)

    class Late(Counting):
        def call(self, site: str, request: bytes, seconds: float) -> bytes:
            if len(self.acts) == 4:
                go.set()
            said = Tap.call(self, site, request, seconds)
            self.acts.append(parted(request)[0]["act"])
            self.down_bytes += len(parted(request)[1])
            return said

    between = Between(study, tmp_path)
    carrier = Late(between)
    answer = asked(between.engine(carrier, patience=0.01)(study, tmp_path / "run"), study)
    assert same(answer.read()["weights"], study.start()["weights"])
    assert set(carrier.acts) == {"ask"}
    assert len(carrier.acts) >= 5
    assert carrier.down_bytes == letter_of(study).parcel.nbytes


def test_a_part_that_was_overtaken_is_heard_once(tmp_path: Path) -> None:
    """A question, an end or a greeting that comes late is not heard; nor what is older than some requests."""
    desk = one_desk(tmp_path)
    speaker = Speaker(desk)
    part = {"act": "part", "payload": "0" * 64, "at": 0, "total": 100}
    late = speaker.sealed(part, bytes(10))
    question_, greeting = speaker.sealed(*question(desk.study.start()["weights"])), speaker.sealed({"act": "hello"})
    assert speaker.say({"act": "hello"})[0]["status"] == "ready"
    for old in (question_, greeting):
        assert "not newer" in opened(desk, desk.handle(old))[0]["why"]
    assert opened(desk, desk.handle(late))[0] == {**opened(desk, desk.handle(speaker.sealed(part)))[0]} | {
        "of": mark(late)
    }
    assert "not newer" in opened(desk, desk.handle(late))[0]["why"]
    late = speaker.sealed(part, bytes(10))
    for _ in range(desks.OVERTAKEN + 1):
        speaker.say(part)
    assert "not newer" in opened(desk, desk.handle(late))[0]["why"]


@pytest.mark.parametrize("part", [0, -1, True, 1.5, "9", None, [1]])
def test_a_coordinator_cannot_ask_for_parts_that_are_none(part: Any, tmp_path: Path) -> None:
    desk = one_desk(tmp_path)
    header, body = question(desk.study.start()["weights"], part=part)
    assert Speaker(desk).say(header, body)[0]["status"] == "unheard"


def test_a_part_is_no_larger_than_a_site_sends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much the coordinator says that it takes."""
    monkeypatch.setattr(desks, "MOST_PART", 5_000)
    desk = one_desk(tmp_path)
    speaker = Speaker(desk)
    told, body = speaker.say(*question(desk.study.start()["weights"], part=1 << 62))
    assert (told["status"], body) == ("answered", b"")
    fetch = {"act": "fetch", "turn": [1, 0], "answered": told["answered"], "at": 0, "part": 1 << 62}
    assert len(speaker.say(fetch)[1]) == 5_000


@pytest.mark.parametrize("act", ["part", "fetch"])
@pytest.mark.parametrize("who", ["site", "coordinator"])
def test_it_goes_on_from_where_it_stood_when_either_restarts(act: str, who: str, study: Study, tmp_path: Path) -> None:
    """Of the bytes of a message and of its answer, none travels twice but those that were under way."""
    down, up = sizes(study, tmp_path / "whole")
    between = Between(study, tmp_path)

    def cut(acts: list[str], request: bytes) -> bytes:
        if acts.count(act) == 10 and acts[-1] == act and not once:
            once.append(act)
            if who == "coordinator":
                raise Killed
            between.restart(SITE)
        return request

    once: list[str] = []
    carrier = Counting(between, cut)
    if who == "coordinator":
        with pytest.raises(Killed):
            asked(between.engine(carrier)(study, tmp_path / "run"), study)
    answer = asked(between.engine(carrier)(study, tmp_path / "run"), study)
    assert once == [act]
    assert same(answer.read(), {"weights": study.start()["weights"], "asked": 1})
    assert (carrier.down_bytes, carrier.up_bytes) == (down, up)


def test_a_part_that_is_damaged_on_its_way_is_sent_again(study: Study, tmp_path: Path) -> None:
    down, up = sizes(study, tmp_path / "whole")
    between = Between(study, tmp_path)

    def cut(acts: list[str], request: bytes) -> bytes:
        damaged = acts[-1] == "part" and acts.count("part") in (5, 9)
        return flipped(request, 8 * len(request) - 1) if damaged else request

    carrier = Counting(between, cut)
    answer = asked(between.engine(carrier)(study, tmp_path / "run"), study)
    assert same(answer.read()["weights"], study.start()["weights"])
    assert (carrier.down_bytes, carrier.up_bytes) == (down + 2 * PART, up)


@pytest.mark.parametrize("where", ["site", "coordinator"])
def test_what_a_disk_did_not_keep_is_noticed_and_comes_again(where: str, study: Study, tmp_path: Path) -> None:
    """A bit of the parts that came so far changes on the disk of either side."""
    down, up = sizes(study, tmp_path / "whole")
    between, once = Between(study, tmp_path), []

    def cut(acts: list[str], request: bytes) -> bytes:
        act = "part" if where == "site" else "fetch"
        if acts.count(act) == 10 and not once:
            once.append(act)
            pattern = "*/*/incoming/*" if where == "site" else "run/answers/*.partial"
            (path,) = tmp_path.glob(pattern)
            path.write_bytes(flipped(path.read_bytes(), 999))
        return request

    carrier = Counting(between, cut)
    answer = asked(between.engine(carrier)(study, tmp_path / "run"), study)
    assert once
    assert same(answer.read()["weights"], study.start()["weights"])
    twice = (2 * down, up) if where == "site" else (down, 2 * up)
    assert (carrier.down_bytes, carrier.up_bytes) == twice


def test_a_whole_message_that_a_disk_did_not_keep_comes_again_after_a_restart(study: Study, tmp_path: Path) -> None:
    down, _ = sizes(study, tmp_path / "whole")
    between, once = Between(study, tmp_path), []

    def cut(acts: list[str], request: bytes) -> bytes:
        if acts[-1] == "ask" and "part" in acts and not once:
            once.append("damaged")
            (path,) = tmp_path.glob("*/*/incoming/*")
            assert path.stat().st_size == down
            path.write_bytes(flipped(path.read_bytes(), 999))
            between.restart(SITE)
        return request

    carrier = Counting(between, cut)
    answer = asked(between.engine(carrier)(study, tmp_path / "run"), study)
    assert same(answer.read()["weights"], study.start()["weights"])
    assert carrier.down_bytes == 2 * down


def bytes_of_rounds(between: Between, restart: bool) -> tuple[dict[int, int], Any]:
    """Bytes that went down in each round, in which the same weights are sent, and the last state."""
    moved: dict[int, int] = {}

    def watch(what: str, value: Any) -> None:
        if restart and (what, value) == ("round", 3):
            between.restart(SITE)

    now = [0]

    class Weighing(Tap):
        def down(self, site: str, request: bytes) -> bytes:
            header, body = parted(request)
            now[0] = header.get("turn", now)[0]
            moved[now[0]] = moved.get(now[0], 0) + len(body)
            return request

    return moved, between.run(Weighing(between.desks), run_with={"watch": watch})


@pytest.mark.parametrize("part", [PART, 1 << 20])
@pytest.mark.parametrize("restart", [False, True])
def test_weights_that_a_site_has_travel_by_their_hash(
    part: int, restart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of echoes is what was sent, so it is known from round 2 on; a site that was restarted needs it whole."""
    smaller_parts(monkeypatch, part)
    study = echo.study((SITE,))
    here = run(study, tmp_path / "local")
    moved, state = bytes_of_rounds(Between(study, tmp_path), restart)
    weights = sum(t.numel() * t.element_size() for t in here["weights"].values())
    assert same(state, here)
    with closing(sqlite3.connect(tmp_path / "run" / "journal.sqlite")) as db:
        recorded = dict(db.execute("SELECT round, bytes_down FROM turns WHERE question = 'echo'"))
    assert moved[1] == recorded[1] > weights
    assert moved[2] == recorded[2] - 32 < 1_000
    assert moved[3] == (moved[2] + moved[1] if restart else moved[2])
    assert recorded[3] == (recorded[1] if restart else recorded[2])


def pieces(parcel: wire.Parcel, known: set[str]) -> tuple[Outgoing, dict[str, Any]]:
    letter = Letter(Turn(1, 0, SITE), "echo", {}, parcel, None, known=frozenset(known))
    out = Outgoing(letter)
    return out, out.header


@pytest.mark.parametrize("seed", range(6))
def test_a_message_is_put_together_from_what_is_held_and_what_comes_in_parts(seed: int, tmp_path: Path) -> None:
    """Known weights of several sizes and dtypes between others that are not, in any order, the header first."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)

    def some() -> Any:
        n = r.choice((1_100, 3_001))
        one = torch.randn(n, generator=g)
        return r.choice((one, Weights({"a": one.half(), "b": torch.randint(0, 99, (n,), generator=g)})))

    first = {name: some() for name in "abcdef"}
    second = {name: first[name] if r.random() < 0.5 else some() for name in r.sample("abcdef", 6)} | {"n": seed}
    incoming = Incoming(tmp_path / "in", 1 << 20)
    before, after = wire.pack(first), wire.pack(second)
    _, header = pieces(before, set())
    assert incoming.message({**header, "travels": before.nbytes}, memoryview(bytes(before))) is not PARTS
    out, header = pieces(after, set(before.blobs))
    large = out.travels > PART
    body = memoryview(b"" if large else out.part(0, PART))
    if large:
        assert incoming.message(header, body) == PARTS
        at = 0
        while at < header["travels"]:
            at = incoming.put(header["payload"], at, header["travels"], memoryview(out.part(at, PART)))
    found = incoming.message(header, body)
    assert same(found, second)
    assert bytes(wire.pack(found)) == bytes(after)
    fresh = Incoming(tmp_path / "fresh", 1 << 20)
    if set(before.blobs) & set(after.blobs):
        assert fresh.message(header, body) == LACKS


STUCK = """
import sys, threading
from pathlib import Path
import echo
from between import TALK, Unsigned
from fedscan import wire
from fedscan.engines.doors import Manner
from fedscan.engines.remote import Remote
from fedscan.recorded import Letter
from fedscan.study import Turn

class Stuck:
    manner, asked = Manner(part=64), threading.Event()

    def call(self, site, request, seconds):
        self.asked.set()
        threading.Event().wait(120)

study, carrier = echo.study(("site",)), Stuck()
engine = Remote(study, Path(sys.argv[1]), carrier, TALK, Unsigned("coordinator"), 1)
line = engine.lines["site"]
threading.Thread(target=lambda: list(line.flow([({"act": "part"}, b"")])), daemon=True).start()
carrier.asked.wait()
engine.close()
"""


def test_a_process_that_is_to_end_does_not_wait_for_a_part_that_is_under_way(tmp_path: Path) -> None:
    told = [sys.executable, "-c", STUCK, str(tmp_path)]
    subprocess.run(told, check=True, timeout=60, cwd=Path(__file__).parent)
