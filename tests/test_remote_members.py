"""Members who turn on the others: they spoil their own part of a study, in sentences, and nothing else."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import echo
from between import TALK, Between, Straight
from fedscan import wire
from fedscan.engines import desk as desks
from fedscan.engines import envelope, remote
from fedscan.engines.desk import Desk
from fedscan.engines.doors import Barred, Manner
from fedscan.engines.envelope import ANSWER, EPOCH
from fedscan.engines.remote import SiteFailed
from fedscan.method import Message
from fedscan.run import run
from fedscan.site import Site
from fedscan.spec import Refused
from hostile import HEX, SITE, Speaker, Tap, Told, letter_of, one_desk, opened, question, smaller_parts, traces
from toy import same
from unsigned import Unsigned

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.001, 0.01))


# -- a member that turns on the others: the coordinator --------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"turn": [-1, 0]}, "unheard", "turn"),
        ({"turn": [True, False]}, "unheard", "turn"),
        ({"turn": ["../x", 0]}, "unheard", "turn"),
        ({"turn": [1.0, 0]}, "unheard", "turn"),
        ({"base": [0, -1]}, "unheard", "turn"),
        ({"base": "1.0"}, "unheard", "turn"),
        ({"base": [7, 7]}, "failed", "its own log"),
        ({"past": 5, "keep": ["../x"]}, "unheard", "turn"),
        ({"question": "os.system"}, "refused", "does not answer 'os.system'; it answers echo, evaluate"),
        ({"question": "x" * 90_000}, "refused", "does not answer"),
        ({"asked": HEX}, "refused", "not what its digest says"),
        ({"nbytes": 1 << 39}, "refused", "not what its digest says"),
        ({"nbytes": -1}, "refused", "size"),
        ({"nbytes": 1e308}, "refused", "size"),
        ({"nbytes": True}, "refused", "size"),
        ({"travels": 1 << 50}, "refused", "not described"),
        ({"travels": 1}, "need", ""),
        ({"recipe": [1 << 39], "nbytes": 1 << 39}, "refused", "recipe"),
        ({"recipe": [0] * 9_000, "nbytes": 1 << 39}, "refused", "not what its digest says"),
        ({"recipe": [-1]}, "refused", "recipe"),
        ({"recipe": [{"a": 1}]}, "refused", "recipe"),
        ({"recipe": [HEX]}, "need", ""),
        ({"recipe": "all"}, "refused", "not described"),
        ({"payload": "../../key", "travels": 1}, "refused", "64 hexadecimal"),
        ({"wait": "for ever"}, "unheard", "kind"),
        ({"wait": None}, "unheard", "kind"),
        ({"wait": -1e308}, ("working", "answered"), ""),
        ({"number": -1}, "unheard", "newer"),
        ({"number": True}, "unheard", "newer"),
        ({"number": "2"}, "unheard", "newer"),
        ({"act": ["ask"]}, "unheard", "kind"),
        ({"act": "eval"}, "unheard", "kind"),
    ],
)
def test_absurd_questions_are_refused_in_a_sentence(changes: Any, status: Any, words: str, tmp_path: Path) -> None:
    desk = one_desk(tmp_path)
    header, body = question(echo.study().start()["weights"])
    told, _ = Speaker(desk).say({**header, **changes}, body)
    assert told["status"] in status
    assert words in told.get("why", "")
    speaker = Speaker(desk, number=3 * EPOCH)
    while (whole := speaker.say({**header, "turn": [2, 0]}, body)[0])["status"] == "working":
        pass  # on what was asked before
    assert whole["status"] == "answered"


def test_a_site_takes_part_in_a_bounded_number_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desks, "MOST_RUNS", 3)
    desk = one_desk(tmp_path)
    desk.talk = replace(TALK, run="")
    for i in range(5):
        told, _ = Speaker(desk, talk=replace(TALK, run=f"{i:032x}")).say({"act": "hello"})
        assert told["status"] == ("ready" if i < 3 else "unheard")
    assert len(list((tmp_path / SITE).iterdir())) == 3


def test_parts_of_many_payloads_take_the_disk_of_one(tmp_path: Path) -> None:
    desk = one_desk(tmp_path, most=1_000)
    speaker = Speaker(desk)
    for i in range(20):
        said = {"act": "part", "payload": f"{i:064x}", "at": 0, "total": 1_000}
        assert speaker.say(said, bytes(900))[0]["have"] == 900
    assert sum(len(data) for name, data in traces(tmp_path).items() if "incoming" in name) == 900
    for wrong in ({"total": 1_001}, {"at": -1}, {"at": 999}, {"payload": "../key"}, {"total": 5}):
        told, _ = speaker.say({"act": "part", "payload": HEX, "at": 0, "total": 1_000, **wrong}, bytes(900))
        assert told["status"] == "unheard", wrong


def test_a_full_disk_is_a_sentence_and_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = one_desk(tmp_path)
    speaker, (header, body) = Speaker(desk), question(echo.study().start()["weights"])

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "/srv/patients/doe/scan.nii")

    with monkeypatch.context() as m:
        m.setattr(wire, "replace_file", full)
        told, _ = speaker.say(header, body)
        assert told["status"] == "unable"
        assert "No space left on device" in told["why"]
        assert "patients" not in told["why"]
    assert speaker.say(header, body)[0]["status"] == "answered"


def test_no_canary_crosses(tmp_path: Path) -> None:
    """Names of patients in whatever goes wrong at a site stay there (T24)."""
    canary, kinds = "DOE^JANE^19551231", iter((ValueError, RuntimeError, OSError, KeyError, Refused, MemoryError))

    def fails(site: Site, message: Message) -> Any:
        raise next(kinds)(f"/data/{canary}/t1.nii cannot be read: {canary}")

    log: list[str] = []
    between = Between(
        echo.study((SITE,), reply=fails), tmp_path, hide=lambda text: text.replace(canary, "…"), log=log.append
    )
    speaker, weights = Speaker(between.desks[SITE]), echo.study().start()["weights"]
    for call in range(6):
        request = speaker.sealed(*question(weights, (1, call)))
        said = between.desks[SITE].handle(request)
        assert opened(between.desks[SITE], said)[0]["status"] in ("failed", "refused", "unable")
        assert canary.encode() not in said
        assert b"DOE" not in said
    assert sum(canary in line for line in log) == 6


# -- a member that turns on the others: a site -----------------------------------------------------------------------


class Lying(Tap):
    """A site that answers whatever it likes: ``lie`` has the header and the body of the true answer."""

    def __init__(self, desks: dict[str, Desk], site: str, lie: Callable[[dict[str, Any], bytes], Told]) -> None:
        super().__init__(desks)
        self.site, self.lie, self.asked = site, lie, 0

    def call(self, site: str, request: bytes, seconds: float) -> bytes:
        said = super().call(site, request, seconds)
        if site != self.site:
            return said
        self.asked += 1
        header, body = opened(self.desks[site], said)
        header, body = self.lie(header, body)
        return envelope.sealed(ANSWER, header, body, TALK, "coordinator", Unsigned(site))


def alone(study: Any, folder: Path, lie: Callable[[dict[str, Any], bytes], Told], **options: Any) -> Any:
    """What becomes of one question to a site that lies, how often it was asked, and what was said of it."""
    between = Between(study, folder)
    carrier, said = Lying(between.desks, SITE, lie), []
    engine = between.engine(carrier, **{"lease": 0.2, "tell": lambda site, text: said.append(text), **options})
    made = engine(study, folder / "run")
    try:
        made.send([letter_of(study)])
        return made.receive(False), carrier.asked, said
    finally:
        made.close()


def always(**changes: Any) -> Callable[[dict[str, Any], bytes], Told]:
    return lambda header, body: ({**header, **changes}, body)


@pytest.mark.parametrize(
    "lie",
    [
        always(nbytes=-1), always(nbytes="9"), always(nbytes=None), always(nbytes=12), always(nbytes=1_000_000),
        always(answered=HEX), always(answered=None), always(seconds=-1), always(seconds="1"), always(seconds=1e308),
        always(seconds=2**63), always(changed=1), always(changed=None), always(status="fine"),
        always(status=["answered"]), always(status=None), always(of=HEX), lambda header, body: (header, body + b"more"),
        lambda header, body: (header, body[:-1]), lambda header, body: (header, b""),
    ],
)  # fmt: skip
def test_an_answer_that_is_not_what_it_says_is_not_taken(lie: Any, tmp_path: Path) -> None:
    answer, _, said = alone(echo.study((SITE,)), tmp_path, lie)
    assert answer.absent
    assert answer.absent.isprintable()
    assert all(text.isprintable() for text in said)
    assert not list((tmp_path / "run" / "answers").glob("*.safetensors"))


def test_an_answer_larger_than_asked_for_is_refused_before_it_comes(tmp_path: Path) -> None:
    answer, asked, _ = alone(echo.study((SITE,)), tmp_path, always(nbytes=1 << 39), most=lambda question: 1 << 20)
    assert "at most 1048576 are taken" in answer.refused
    assert asked < 30


@pytest.mark.parametrize("what", ["lacks", "parts", "", None])
def test_a_site_that_only_ever_needs_more_is_absent_after_its_lease(what: Any, tmp_path: Path) -> None:
    lie = always(status="need", what=what, have=0)
    answer, asked, _ = alone(echo.study((SITE,)), tmp_path, lie, lease=0.5)
    assert "no progress for 0.5 s" in answer.absent
    assert asked < 200


def test_a_site_that_needs_the_parts_of_a_large_message_for_ever_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller_parts(monkeypatch, 4_000)
    lie = always(status="need", what="parts", have=0)
    answer, _, _ = alone(echo.study((SITE,)), tmp_path, lie, lease=0.5)
    assert "no progress for 0.5 s" in answer.absent


def test_a_site_that_beats_for_ever_is_waited_for_as_long_as_the_coordinator_wants(tmp_path: Path) -> None:
    beats = iter(range(1 << 30))

    def beat(header: dict[str, Any], body: bytes) -> Told:
        return {**header, "status": "working", "beats": next(beats)}, b""

    answer, asked, said = alone(echo.study((SITE,)), tmp_path, beat, lease=0.3, longest=1.0)
    assert "the longest that any site is waited for" in answer.absent
    assert asked < 400, "it is asked again and again without a pause"
    assert said[0].startswith("works on echo (until ")


def test_what_a_site_says_reaches_no_terminal_as_it_is(tmp_path: Path) -> None:
    lie = always(status="refused", why="no\x1b[2J\r\nadmitted: all\u202e" + "x" * 5_000)
    answer, _, _ = alone(echo.study((SITE,)), tmp_path, lie)
    assert answer.refused.isprintable()
    assert len(answer.refused) <= 500
    with pytest.raises(SiteFailed) as failed:
        alone(echo.study((SITE,)), tmp_path / "b", always(status="failed", why=["\x1b"]))
    assert str(failed.value).isprintable()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_site_that_sends_what_is_not_finite_is_left_out(value: float, tmp_path: Path) -> None:
    """T8: the round goes on with the others, and its result is theirs."""

    def spoilt(site: Site, message: Message) -> Any:
        weights = {k: v.clone() for k, v in message["weights"].items()}
        weights["body.3"][7] = value
        return {"weights": type(message["weights"])(weights, message["weights"].kinds), "asked": 1}

    between = Between(echo.study(drift=0.5), tmp_path)
    between.desks["bergen"].study = echo.study(reply=spoilt)
    between.desks["bergen"] = Desk(echo.study(reply=spoilt), "bergen", tmp_path / "b", TALK, Unsigned("bergen"))
    watched: list[Any] = []
    state = between.run(run_with={"watch": lambda what, told: watched.append((what, told))})
    rows = [row for what, row in watched if what == "turn" and row.question == "echo" and row.turn.site == "bergen"]
    assert {row.status for row in rows} == {"refused"}
    assert "leaf 'body.3' is not finite" in rows[0].why
    assert same(state, run(echo.study((SITE,), drift=0.5), tmp_path / "alone"))


def test_an_answer_that_is_ready_stays_once_the_yes_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether none of it has left, or its first part."""
    smaller_parts(monkeypatch, 10_000)
    undone = False

    def permit(question: str, nbytes: int) -> str:
        if undone:
            raise Refused("the yes was undone")
        return ""

    desk = one_desk(tmp_path, size=5_000, permit=permit)
    speaker, (header, body) = Speaker(desk), question(desk.study.start()["weights"])
    for at in range(0, len(body), 10_000):
        total = {"act": "part", "payload": header["payload"], "at": at, "total": len(body)}
        speaker.say(total, body[at : at + 10_000])
    told, _ = speaker.say({**header, "part": 10_000})
    assert told["status"] == "answered"
    fetch = {"act": "fetch", "turn": [1, 0], "answered": told["answered"], "at": 0, "part": 10_000}
    assert len(speaker.say(fetch)[1]) == 10_000
    undone = True
    for asked in ({**fetch, "at": 10_000}, header):
        told, left = speaker.say(asked)
        assert (told["status"], told["why"], left) == ("refused", "the yes was undone", b"")


# -- who is no member any more ---------------------------------------------------------------------------------------


class Barring(Tap):
    """Knows for so many calls that a site may not be asked."""

    left = 2

    def down(self, site: str, request: bytes) -> bytes:
        if site == SITE and self.left:
            self.left -= 1
            raise Barred(f"{SITE} is not on the roster any more")
        return request


@pytest.mark.parametrize("absent", ["skip", "wait"])
def test_who_is_barred_is_absent_at_once_and_looked_for_again_where_a_study_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str
) -> None:
    """With a lease of an hour, of which nothing is waited."""
    monkeypatch.setattr(remote, "LATER", 0.01)
    study = echo.study(absent=absent, drift=0.5)
    between = Between(study, tmp_path)
    tap, rows = Barring(between.desks), list[Any]()
    state = between.run(
        tap, lease=3600.0, run_with={"watch": lambda what, row: rows.append(row) if what == "turn" else 0}
    )
    told = [(row.turn.round, row.status, row.why) for row in rows if row.turn.site == SITE and row.question == "echo"]
    gone = "" if absent == "wait" else f"{SITE} is not on the roster any more"
    assert told[0] == (1, "absent" if gone else "answered", gone)
    assert {status for *_, status, _ in told[2:]} == {"answered"}
    if absent == "wait":
        assert same(state, run(study, tmp_path / "local"))
    assert tap.left == 0


class Turns(Straight):
    """Brings each request to the machine that is next."""

    def __init__(self, machines: dict[str, Between], order: str) -> None:
        self.machines, self.order = machines, iter(order)

    def call(self, site: str, request: bytes, seconds: float) -> bytes:
        return self.machines[next(self.order)].desks[site].handle(request)


@pytest.mark.parametrize(
    ("order", "held"), [("aaab", 0), ("abbb", 0), ("aba", 1), ("aabba", 1), ("abca", 1), ("abc", 0)]
)
def test_one_key_on_two_machines_is_noticed_and_held(order: str, held: int, tmp_path: Path) -> None:
    """A hospital's folder was copied, and both answer: neither is heard any more. One that moved is (T1)."""
    machines = {name: Between(echo.study((SITE,)), tmp_path / name) for name in "abc"}
    line = remote.Line(SITE, Turns(machines, order), TALK, Unsigned("coordinator"), 1)
    for _ in order[: len(order) - held]:
        line.say({"act": "hello"})
    for _ in range(2 * held):
        with pytest.raises(Barred, match="two processes answer as"):
            line.say({"act": "hello"})


def test_what_was_under_way_to_a_process_that_was_started_anew_is_no_second_machine(tmp_path: Path) -> None:
    old, new = (Between(echo.study((SITE,)), tmp_path / name).desks[SITE] for name in "ab")
    asked, answered = threading.Event(), threading.Event()

    class Late:
        manner = Manner()

        def call(self, site: str, request: bytes, seconds: float) -> bytes:
            if threading.current_thread() is not threading.main_thread():
                said = old.handle(request)
                asked.set()
                assert answered.wait(20)
                return said
            return new.handle(request)

    line = remote.Line(SITE, Late(), TALK, Unsigned("coordinator"), 1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(line.say, {"act": "hello"})
        assert asked.wait(20)
        line.say({"act": "hello"})
        answered.set()
        assert first.result()[0]["status"] == "ready"
    line.say({"act": "hello"})
