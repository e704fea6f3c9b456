"""Nobody gets in: what was changed, misdirected or played again leaves no trace, and the run comes to the same bits."""

import random
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import echo
from between import TALK, Between
from contract import BENCHES, study_of
from fedscan.consortium import coordinator, member
from fedscan.consortium.member import Home
from fedscan.consortium.sealing import KeySeal
from fedscan.engines import envelope, remote
from fedscan.engines.envelope import ANSWER, EPOCH, REQUEST
from fedscan.methods.registry import get
from fedscan.run import run
from fedscan.spec import Refused
from hostile import SITE, Seals, Speaker, Tap, flipped, one_desk, opened, question, traces
from toy import same
from unsigned import Unsigned

torch.set_num_threads(1)
SITES = echo.NAMES


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.001, 0.01))


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Home]:
    """The members of a consortium, with keys of their own."""
    place = tmp_path_factory.mktemp("consortium")
    coordinator.found("glioma", place / "c")
    roles = {"coordinator": "coordinator", "second": "coordinator", **dict.fromkeys((*SITES, "cairo"), "site")}
    begun = {name: member.begin(name, role, place / name) for name, role in roles.items()}
    for _ in range(2):  # the second time with a roster that names all of them
        kits = {n: coordinator.admit(place / "c", h.folder / "request.csr", h.role).kit for n, h in begun.items()}
    for name, home in begun.items():
        member.take_kit(home, kits[name])
    return {name: member.read(home.folder) for name, home in begun.items()}


@pytest.fixture(params=["unsigned", "keys"])
def seals(request: pytest.FixtureRequest, homes: dict[str, Home]) -> Seals:
    """Without signatures, for what stands above them, and with those of the members."""
    return Unsigned if request.param == "unsigned" else keys(homes)


def keys(homes: Mapping[str, Home]) -> Seals:
    return lambda name: KeySeal(homes[name], "site" if homes[name].role == "coordinator" else "coordinator")


# -- changed on the way (T6) -----------------------------------------------------------------------------------------


def test_each_of_1000_flipped_bits_is_refused(homes: dict[str, Home], tmp_path: Path) -> None:
    """In a request at the site and in an answer at the coordinator; the ones that were not changed go through."""
    study = echo.study((SITE,), size=40)
    between = Between(study, tmp_path, keys(homes))
    tap, r = Tap(between.desks), random.Random(1)
    between.run(tap)
    request = next(data for _, data in tap.requests if b'"act":"ask"' in data)
    said = next(data for _, data in tap.answers if b'"status":"answered"' in data)
    events: list[str] = []
    fresh = one_desk(tmp_path / "fresh", keys(homes), 40, event=events.append)
    for bit in r.sample(range(8 * len(request)), 500):
        told, _ = opened(fresh, fresh.handle(flipped(request, bit)))
        assert told["status"] == "unheard", bit
    assert not events
    assert traces(tmp_path / "fresh" / SITE) == {}
    assert opened(fresh, fresh.handle(request))[0]["status"] == "answered"
    seal = keys(homes)("coordinator")
    for bit in r.sample(range(8 * len(said)), 500):
        with pytest.raises(Refused) as refused:
            envelope.opened(ANSWER, flipped(said, bit), TALK, SITE, seal)
        assert str(refused.value).isprintable()
    envelope.opened(ANSWER, said, TALK, SITE, seal)


class Flipping(Tap):
    """Flips a bit of every third request and of every third answer: of the body only, if nobody signs."""

    bodies_only = True

    def down(self, site: str, request: bytes) -> bytes:
        return self.flip(request, len(self.requests))

    def up(self, site: str, said: bytes) -> bytes:
        return self.flip(said, len(self.answers) + 1)

    def flip(self, data: bytes, turn: int) -> bytes:
        start = 4 + int.from_bytes(data[:4], "big") if self.bodies_only else 0
        if turn % 3 or start == len(data):
            return data
        return flipped(data, random.Random(turn).randrange(8 * start, 8 * len(data)))


def test_flipped_bits_are_asked_for_again(seals: Seals, tmp_path: Path) -> None:
    study = echo.study(drift=0.5)
    between = Between(study, tmp_path, seals)
    tap = Flipping(between.desks)
    tap.bodies_only = seals is Unsigned
    said: list[str] = []
    assert same(between.run(tap, tell=lambda site, text: said.append(text)), run(study, tmp_path / "local"))
    assert any("changed" in text for text in said)
    assert all(text.isprintable() for text in said)


# -- to another, or by another ---------------------------------------------------------------------------------------


def test_what_is_not_for_this_site_study_and_version_is_refused_by_name(
    seals: Seals, homes: dict[str, Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = one_desk(tmp_path, seals)
    desk.talk = replace(TALK, run="")
    good, header = Speaker(desk, seals("coordinator")), {"act": "hello"}

    def refused(speaker: Speaker, words: str, to: str = "") -> None:
        told, body = speaker.say(header, to=to)
        assert told["status"] == "unheard"
        assert words in told["why"], told["why"]
        assert body == b""

    refused(good, "'bergen'", to="bergen")
    refused(Speaker(desk, seals("coordinator"), replace(TALK, study="b" * 64)), "study bbbbbbbbbbbb")
    refused(Speaker(desk, seals("second")), "second")
    refused(Speaker(desk, seals("bergen")), "bergen" if seals is Unsigned else "coordinator")
    for run_id in ("", "../../../etc", "0" * 31, "G" * 32, "０" * 32):
        refused(Speaker(desk, seals("coordinator"), replace(TALK, run=run_id)), "32 hexadecimal")
    with monkeypatch.context() as m:
        m.setattr(envelope, "__version__", "99.0")
        request = good.sealed(header)
    told, _ = opened(desk, desk.handle(request))
    assert "99.0" in told["why"]
    assert envelope.__version__ in told["why"]
    answer = envelope.sealed(ANSWER, {"status": "ready"}, b"", TALK, "coordinator", seals(SITE))
    with pytest.raises(Refused, match="to 'coordinator'"):
        envelope.opened(REQUEST.replace(REQUEST, ANSWER), answer, TALK, "bergen", seals("coordinator"))
    told, _ = opened(desk, desk.handle(answer))  # an answer that is given for a request
    assert told["status"] == "unheard"
    assert good.say(header)[0]["status"] == "ready"


def test_a_coordinator_hears_what_a_site_of_another_version_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both versions are named at once; the run waits no longer than its lease (T39)."""
    study = echo.study((SITE,), absent="skip", rounds=1)
    between = Between(study, tmp_path)

    class Older(Tap):
        def call(self, site: str, request: bytes, seconds: float) -> bytes:
            with monkeypatch.context() as m:
                m.setattr(envelope, "__version__", "0.0.1")
                return super().call(site, request, seconds)

    said: list[str] = []
    between.run(Older(between.desks), lease=0.3, tell=lambda site, text: said.append(text))
    assert "0.0.1" in said[0]
    assert envelope.__version__ in said[0]
    assert any("is absent" in text for text in said)


def test_who_is_revoked_is_not_heard_from_the_next_message_on(homes: dict[str, Home], tmp_path: Path) -> None:
    place = homes["second"].folder.parent
    desk = one_desk(tmp_path, keys(homes))
    desk.talk = replace(TALK, coordinator="second")
    speaker = Speaker(desk, keys(homes)("second"), desk.talk)
    assert speaker.say({"act": "hello"})[0]["status"] == "ready"
    coordinator.revoke(place / "c", "second", "left the study")
    member.take_roster(homes[SITE], place / "c" / "roster.json")
    told, _ = speaker.say({"act": "hello"})
    assert told["status"] == "unheard"
    assert "revoked" in told["why"]


# -- played again, and out of order (T5) -----------------------------------------------------------------------------


def scaffold() -> Any:
    """A study whose sites remember something from round to round."""
    return study_of(get("scaffold"), BENCHES["2D"], rounds=3)


def test_requests_played_again_after_a_run_change_nothing(seals: Seals, tmp_path: Path) -> None:
    """At the site that they were for, also after its restart, and at another: no answer is computed a second time."""
    study = echo.study(drift=0.5) if seals is not Unsigned else scaffold()
    events: list[str] = []
    between = Between(study, tmp_path, seals, event=events.append)
    tap = Tap(between.desks)
    between.run(tap)
    turns = [event for event in events if event.startswith("computed")]
    assert len(turns) == len(set(turns))
    kept = {site: traces(tmp_path / site) for site in study.names}
    assert all(kept.values())
    for again in ("as it was", "restarted"):
        if again == "restarted":
            for site in study.names:
                between.restart(site)
        for site, request in tap.requests:
            for other in study.names:
                told, _ = opened(between.desks[other], between.desks[other].handle(request))
                assert told["status"] in (
                    "unheard",
                    "answered" if again == "restarted" and site == other else "unheard",
                )
        assert {site: traces(tmp_path / site) for site in study.names} == kept
    assert [event for event in events if event.startswith("computed")] == turns


@pytest.mark.parametrize("seed", range(2))
def test_requests_played_in_any_order_during_a_run_change_nothing(seed: int, tmp_path: Path) -> None:
    study, r, events = scaffold(), random.Random(seed), []
    between = Between(study, tmp_path, event=events.append)

    class Replaying(Tap):
        def down(self, site: str, request: bytes) -> bytes:
            for _, old in r.sample(self.requests, min(4, len(self.requests))):
                for name in study.names:
                    if old != request:
                        self.desks[name].handle(old)
            return request

    assert same(between.run(Replaying(between.desks)), run(study, tmp_path / "local"))
    turns = [event for event in events if event.startswith("computed")]
    assert len(turns) == len(set(turns)) == sum(1 for _ in turns)


def test_an_answer_given_for_another_is_not_believed(seals: Seals, tmp_path: Path) -> None:
    """One of an earlier turn, and one of another site."""
    study = echo.study(drift=0.5)
    between = Between(study, tmp_path, seals)

    class Swapping(Tap):
        swaps = 0

        def up(self, site: str, said: bytes) -> bytes:
            others = [data for name, data in self.answers if data != said and (name == site) == self.swaps % 2]
            if self.swaps > 30 or not others:
                return said
            self.swaps += 1
            return others[-1]

    said: list[str] = []
    assert same(
        between.run(Swapping(between.desks), tell=lambda site, text: said.append(text)), run(study, tmp_path / "local")
    )
    assert any("answered another request" in text for text in said)
    assert any("as one by" in text for text in said)


def test_a_question_kept_open_survives_both_restarts(tmp_path: Path) -> None:
    """A started question of a settled round, which its site never saw, is still answered when all have restarted."""
    desk = one_desk(tmp_path)
    speaker = Speaker(desk)
    weights = echo.study().start()["weights"]
    header, body = question(weights, (1, 0))
    assert speaker.say(header, body)[0]["status"] == "answered"
    header, body = question(weights, (2, 0), past=1, keep=[[1, 0], [1, 5]])
    assert speaker.say(header, body)[0]["status"] == "answered"
    again = Speaker(one_desk(tmp_path), number=2 * EPOCH)
    header, body = question(weights, (1, 5))
    assert again.say(header, body)[0]["status"] == "answered"
    told, _ = again.say(*question(weights, (1, 6)))
    assert told["status"] == "unheard"
    assert "settled" in told["why"]


def test_a_clock_that_jumps_by_hours_changes_nothing(
    seals: Seals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, r, now = echo.study(drift=0.5), random.Random(3), time.time
    here = run(study, tmp_path / "local")
    between = Between(study, tmp_path, seals)
    monkeypatch.setattr(time, "time", lambda: now() + r.choice((-7200, 0, 7200)))
    assert same(between.run(), here)
