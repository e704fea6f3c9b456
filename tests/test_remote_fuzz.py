"""10,000 messages that nobody would send: each is refused in a sentence, and none imports, executes or takes memory."""

import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
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
from fedscan.engines.doors import Lost
from fedscan.engines.envelope import EPOCH
from fedscan.engines.remote import Line, Remote, SiteFailed
from fedscan.recorded import Answer, Letter
from fedscan.spec import Refused
from hostile import HEX, SITE, Speaker, letter_of, one_desk, opened, parted, question
from unsigned import Unsigned

torch.set_num_threads(1)
ABSURD: tuple[Any, ...] = (
    -1, 0, 1, True, False, None, "", "x" * 3_000, 2**63, 2**64 - 1, -(2**63), 1e308, -0.0, 5e-324, [], {}, [[[[[]]]]],
    "../../etc/passwd", "\0", "\u202e\x1b[2J", "e\u0301", "\ud800", [1, 2, 3], [True, False], {"a": {"b": []}}, HEX,
    "g" * 64, [-1, 0], [0, 2**63], [1e3, 0], [HEX] * 99, [2**62, 2**62],
)  # fmt: skip


WATCHED = ("import", "exec", "compile", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
           "marshal.loads", "pickle.find_class", "socket.connect", "ctypes.dlopen", "code.__new__")  # fmt: skip
hooked: list[Any] = []
alarms: list[str] = []
allowed: list[str] = []  # folders in which files may be opened; empty while nothing is watched


def alarm(event: str, args: tuple[Any, ...]) -> None:
    if not allowed:
        return
    if event in WATCHED or (event == "open" and not str(args[0]).startswith(tuple(allowed))):
        alarms.append(f"{event} {str(args)[:200]}")


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Nothing is imported, executed or opened outside, and memory grows by no more than 50 MB, once it is called."""
    status = Path("/proc/self/status")
    if alarm not in hooked:  # such a hook stays for good
        sys.addaudithook(alarm)
        hooked.append(alarm)

    def memory(name: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1])

    begun: list[int] = []

    def begin() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        begun.append(memory("VmRSS"))
        allowed.append(str(tmp_path))

    yield begin
    allowed.clear()
    assert begun
    heard = [*alarms]
    alarms.clear()
    assert not heard, heard[:5]
    grown = (memory("VmHWM") - begun[0]) / 1024
    assert grown < 50, f"memory grew by {grown:.0f} MB"


def raw(header: Any, body: bytes) -> bytes:
    """An envelope without regard to what JSON allows."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(4, "big") + text + body


def battered(data: bytes, r: random.Random) -> bytes:
    """Some bytes changed, lost, added or doubled."""
    out = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 8))):
        at, n = r.randrange(len(out) or 1), r.randrange(1, 64)
        match r.choice(("flip", "flip", "lose", "add", "double", "cut")):
            case "flip" if out:
                out[at % len(out)] ^= r.randrange(1, 256)
            case "lose":
                del out[at : at + n]
            case "add":
                out[at:at] = r.randbytes(n)
            case "double":
                out[at:at] = out[at : at + n]
            case "cut" if r.random() < 0.3:
                del out[at:]
    return bytes(out)


BOMBS = (
    b"[" * 100_000, b'{"a":' * 20_000, b'{"a":NaN}', b'{"a":1,"a":2}', b'{"a":1e999}', b"\x80\x04\x95", b"\xff" * 64,
    b'{"__metadata__":{"message":"' + b"[" * 90_000 + b'"}}', b"9" * 5_000, b'"\\ud800"', b"{}", b"null", b"",
)  # fmt: skip


def bombed(r: random.Random) -> bytes:
    """A message whose header promises what it does not hold, or holds too much."""
    text = r.choice(BOMBS)
    length = r.choice((len(text), len(text), 2**60, 2**64 - 1, 0))
    return length.to_bytes(8, "little") + text + bytes(r.choice((0, 8, 4096)))


def mutated(data: bytes, r: random.Random, number: int | None, others: list[dict[str, Any]]) -> bytes:
    """What becomes of an envelope in the hands of somebody with a key and no shame."""
    header, body = parted(data)
    if number is not None:
        header["number"] = number
    if number is not None and "turn" in header:
        header["turn"] = [r.randrange(1, 30), r.randrange(3)]
    kind = r.random()
    if kind < 0.15:
        return battered(raw(header, body), r)
    if kind < 0.18:
        text = r.choice(BOMBS)
        return r.choice((len(text), len(text) + 9, 2**32 - 1)).to_bytes(4, "big") + text + body
    if kind < 0.5:  # another body, for which the header vouches
        body = bombed(r) if r.random() < 0.3 else battered(body or b"{}", r)
        digest = hashlib.sha256(body).hexdigest()
        header["body"] = digest
        names = {"asked": digest, "payload": digest, "answered": digest, "nbytes": len(body), "travels": len(body)}
        header.update({k: v for k, v in names.items() if k in header})
        return raw(header, body)
    other = r.choice(others)
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        name = r.choice([k for k in {**header, **other} if k not in ("kind", "past", "number")])
        match r.random():
            case x if x < 0.7:
                header[name] = r.choice((*ABSURD, float("nan"), float("inf"), r.randrange(1, 9)))
            case x if x < 0.85:
                header.pop(name, None)
            case _:
                header[name] = other.get(name)
    return raw(header, body)


def requests_to(desk: Desk) -> list[bytes]:
    """An honest request of each kind."""
    speaker, weights = Speaker(desk), echo.study().start()["weights"]
    ask, body = question(weights, (3, 1), past=1, keep=[[1, 0]])
    known = list(wire.pack({"weights": weights}).blobs)
    head = wire.pack({"weights": weights}).header
    slim = {
        **ask,
        "recipe": [len(head), *known],
        "travels": len(head),
        "payload": hashlib.sha256(head).hexdigest(),
    }
    return [
        speaker.sealed(ask, body), speaker.sealed(slim, head), speaker.sealed({**ask, "travels": 1}, b""),
        speaker.sealed({"act": "part", "payload": HEX, "at": 0, "total": 100}, bytes(50)),
        speaker.sealed({"act": "fetch", "turn": [1, 0], "answered": HEX, "at": 0}),
        speaker.sealed({"act": "hello"}), speaker.sealed({"act": "end", "why": "enough", "over": False}),
    ]  # fmt: skip


def test_5000_requests_that_nobody_would_send(tmp_path: Path, watched: Callable[[], None]) -> None:
    """Over a seal that signs nothing, so that each comes as far as those of a coordinator with a key."""
    r, number = random.Random(5), 2 * EPOCH
    weights = echo.study().start()["weights"]
    log: list[str] = []
    statuses = Counter[str]()
    for block in range(10):
        desk = one_desk(tmp_path / str(block), log=log.append, most=1 << 22)
        assert Speaker(desk).say(*question(weights))[0]["status"] == "answered"
        kinds = requests_to(desk)
        headers = [parted(data)[0] | {"wait": 0.0} for data in kinds]
        kinds = [raw(header, parted(data)[1]) for header, data in zip(headers, kinds, strict=True)]
        if block == 0:
            for data in kinds:
                desk.handle(data)  # whatever is imported by first use
            watched()
        for _ in range(500):
            number += 1
            told, body = opened(desk, desk.handle(mutated(r.choice(kinds), r, number, headers)))
            statuses[told["status"]] += 1
            assert len(body) <= desks.MOST_PART
    assert "unable" not in statuses, [line for line in log if "could not" in line][:3]
    assert {"unheard", "refused", "need", "answered"} <= statuses.keys(), statuses
    assert min(statuses[k] for k in ("unheard", "refused")) > 400, statuses
    assert all(line.isprintable() for line in log)


def test_5000_answers_that_nobody_would_send(
    tmp_path: Path, watched: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is lost, refused or, where nothing of it was touched that counts, the true one."""
    study, r = echo.study((SITE,), size=400), random.Random(6)
    letter = letter_of(study)
    between = Between(study, tmp_path)
    spec, outcomes = study.questions["echo"].gives(study.terms), Counter[str]()
    between.engine()(study, tmp_path / "warm")._answer(letter).read(spec)
    honest, body = Speaker(between.desks[SITE], number=2 * EPOCH).say(*question(letter.message["weights"]))
    assert honest["status"] == "answered"
    statuses = [
        {"status": "need", "what": "lacks", "have": 0}, {"status": "working", "beats": 3},
        {"status": "refused", "why": "no"}, {"status": "failed", "why": "no"}, {"status": "unable", "why": "no"},
        {"status": "unheard", "why": "no"}, {"status": "part", "at": 0},
    ]  # fmt: skip

    class Mutating(Straight):
        def call(self, site: str, request: bytes, seconds: float) -> bytes:
            header = honest | {"of": envelope.mark(request)} | (r.choice(statuses) if r.random() < 0.3 else {})
            return mutated(raw(header, body), r, None, statuses)

    engine = between.engine(Mutating(between.desks), lease=0.0, most=lambda question: 1 << 20)(study, tmp_path / "run")
    assert isinstance(engine, Remote)
    monkeypatch.setattr(Line, "_hold_life", lambda *_: None)  # one changed life would end it all
    try:
        watched()
        for i in range(5_000):
            engine.lease = 0.002 if i % 25 == 0 else 0.0
            outcomes[outcome(engine, letter, spec)] += 1
    finally:
        engine.close()
    assert min(outcomes[k] for k in ("absent", "refused", "failed", "taken")) > 10, outcomes


def outcome(engine: Remote, letter: Letter, spec: Any) -> str:
    """What became of a question; anything but these is a fault."""
    try:
        answer: Answer = engine._answer(letter)
    except SiteFailed:
        return "failed"
    if why := answer.absent or answer.refused:
        assert why.isprintable()
        assert len(why) <= 500
        return "absent" if answer.absent else "refused"
    try:
        spec.check(answer.read(spec), "the answer")
    except Refused:
        return "refused"
    return "taken"


def test_lost_is_all_that_a_line_raises(tmp_path: Path) -> None:
    between, r = Between(echo.study((SITE,)), tmp_path), random.Random(7)
    line = remote.Line(SITE, Straight({SITE: between.desks[SITE]}), TALK, Unsigned("coordinator"), 1)
    line.say({"act": "hello"})

    class Noise:
        def call(self, site: str, request: bytes, seconds: float) -> bytes:
            return r.randbytes(r.choice((0, 1, 4, 50, 3_000)))

    line.carrier = Noise()
    for _ in range(200):
        with pytest.raises(Lost):
            line.say({"act": "hello"})
