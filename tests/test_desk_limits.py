"""A yes is one to so many answers, in the study's rounds, of one run: a coordinator that asks more gets a sentence."""

import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import echo
from between import TALK, Between
from fedscan import wire
from fedscan.engines.desk import Desk
from fedscan.engines.envelope import EPOCH
from fedscan.engines.limits import Limits
from fedscan.memory import Damaged
from fedscan.method import Message
from fedscan.site import Site
from fedscan.spec import Refused
from hostile import SITE, Speaker, one_desk, question, traces

torch.set_num_threads(1)
WEIGHTS = echo.study().start()["weights"]  # of a study of 3 rounds


def asked(
    speaker: Speaker, turn: tuple[int, int], split: str = "", drift: float = 0.0, **other: Any
) -> Mapping[str, Any]:
    """What is said, once the site does not work any more, to an echo or, with a split, to a question for scores."""
    weights = type(WEIGHTS)({k: v + drift for k, v in WEIGHTS.items()}, WEIGHTS.kinds)
    header, body = question(weights, turn, **other)
    if split:
        parcel = wire.pack({"weights": weights, "split": split})
        sizes = {"nbytes": parcel.nbytes, "travels": parcel.nbytes, "asked": parcel.digest, "payload": parcel.digest}
        header, body = {**header, **sizes, "question": "evaluate"}, bytes(parcel)
    while (told := speaker.say(header, body)[0])["status"] == "working":
        pass
    return told


def run_of(i: int) -> Any:
    return replace(TALK, run=f"{i:032x}")


def any_run(folder: Path, **options: Any) -> Desk:
    desk = one_desk(folder, **options)
    desk.talk = replace(TALK, run="")
    return desk


def test_a_site_is_asked_in_the_rounds_of_the_study_only(tmp_path: Path) -> None:
    speaker = Speaker(one_desk(tmp_path))
    assert asked(speaker, (1, 0))["status"] == asked(speaker, (3, 0))["status"] == "answered"
    for round in (0, 4, 5, 10**6):
        told = asked(speaker, (round, 7))
        assert told["status"] == "refused"
        assert told["why"] == f"amsterdam was asked in round {round}, and echo is asked in rounds 1 to 3 of this study"


def test_the_test_cases_are_scored_after_the_last_round_only(tmp_path: Path) -> None:
    speaker = Speaker(one_desk(tmp_path))
    for round in (1, 3):
        assert asked(speaker, (round, 0), "validation")["status"] == "answered"
        told = asked(speaker, (round, 1), "test")
        assert (told["status"], "score its test cases in round" in told["why"]) == ("refused", True)
    assert asked(speaker, (4, 0), "test")["status"] == asked(speaker, (4, 1), "test", 1.0)["status"] == "answered"
    assert asked(speaker, (5, 0), "test")["status"] == "refused"


def test_a_question_is_answered_as_often_as_agreed_also_after_a_restart(tmp_path: Path) -> None:
    """A turn whose answer was lost counts once; what was settled still counts."""
    between = Between(echo.study((SITE,)), tmp_path, limits={"echo": 2, "evaluate": 1})
    speaker = Speaker(between.desks[SITE])
    for _ in range(2):
        assert asked(speaker, (1, 0))["status"] == "answered"
    assert asked(speaker, (2, 0), past=1, keep=[])["status"] == "answered"
    between.restart(SITE)
    speaker = Speaker(between.desks[SITE], number=2 * EPOCH)
    assert asked(speaker, (2, 0))["status"] == "answered"
    told = asked(speaker, (3, 0), past=2, keep=[])
    assert (told["status"], told["why"]) == (
        "refused", "amsterdam has answered echo as often as it agreed to, 2 times in one run"
    )  # fmt: skip
    assert asked(speaker, (3, 1), "validation")["status"] == "answered"
    assert asked(speaker, (4, 0), "test")["status"] == "refused"


def test_what_was_refused_may_be_asked_again_and_does_not_count(tmp_path: Path) -> None:
    wrong = 2

    def refuses(site: Site, message: Message) -> Any:
        nonlocal wrong
        wrong -= 1
        if wrong >= 0:
            raise Refused("not this time")
        return echo.back(site, message)

    between = Between(echo.study((SITE,), reply=refuses), tmp_path, limits={"echo": 1})
    speaker = Speaker(between.desks[SITE])
    assert [asked(speaker, (1, 0), drift=i)["status"] for i in range(3)] == ["refused", "refused", "answered"]
    assert asked(speaker, (2, 0))["status"] == "refused"


def test_an_answer_that_was_counted_and_lost_by_a_kill_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "answered.json"
    Limits(path, {"echo": 1}, False).count("echo", (1, 0))
    Limits(path, {"echo": 1}, False).hold(SITE, "echo", (1, 0))
    with pytest.raises(Refused, match="1 times in one run"):
        Limits(path, {"echo": 1}, False).hold(SITE, "echo", (1, 1))
    for data in (b"{", b"[1]", b'{"echo": [1]}'):
        path.write_bytes(data)
        with pytest.raises(Damaged, match=r"answered\.json is damaged"):
            Limits(path, {"echo": 1}, False)


def test_a_study_goes_through_with_exactly_what_was_agreed(tmp_path: Path) -> None:
    between = Between(echo.study(), tmp_path, limits={"echo": 3, "evaluate": 4}, runs=1)
    watched: list[Any] = []
    between.run(run_with={"watch": lambda what, told: watched.append((what, told))})
    assert {row.status for what, row in watched if what == "turn"} == {"answered"}


def test_another_run_needs_a_new_yes(tmp_path: Path) -> None:
    """A run is begun by its first question, and not by a greeting; one of another study is none of this."""
    desk = any_run(tmp_path, runs=1)
    first, second = (Speaker(desk, talk=run_of(i)) for i in range(2))
    assert first.say({"act": "hello"})[0]["status"] == second.say({"act": "hello"})[0]["status"] == "ready"
    assert asked(first, (1, 0))["status"] == "answered"
    for header in ({"act": "hello"}, {"act": "part", "payload": "0" * 64, "at": 0, "total": 9}, question(WEIGHTS)[0]):
        told, _ = second.say(header, b"" if header["act"] == "hello" else bytes(9))
        assert told["status"] == "unheard"
        assert told["why"] == "amsterdam has taken part in this study already; another run needs a new yes"
    again = any_run(tmp_path, runs=1)
    assert asked(Speaker(again, talk=run_of(0), number=2 * EPOCH), (2, 0))["status"] == "answered"
    newer = any_run(tmp_path, runs=1, since=lambda: time.time() - 0.001)
    assert asked(Speaker(newer, talk=run_of(1), number=3 * EPOCH), (1, 0))["status"] == "answered"
    assert asked(Speaker(again, talk=run_of(1), number=2 * EPOCH), (1, 0))["status"] == "unheard"
    agreed_again = any_run(tmp_path, runs=2)
    assert asked(Speaker(agreed_again, talk=run_of(1), number=3 * EPOCH), (1, 0))["status"] == "answered"
    other = any_run(tmp_path, runs=1)
    other.talk = replace(TALK, study="b" * 64, run="")
    third = Speaker(other, talk=replace(run_of(2), study="b" * 64))
    assert asked(third, (1, 0))["status"] == "answered"


def test_cases_may_change_until_the_first_question(tmp_path: Path) -> None:
    assert Speaker(one_desk(tmp_path, facts="before")).say({"act": "hello"})[0]["status"] == "ready"
    desk = one_desk(tmp_path, facts="after")
    assert asked(Speaker(desk, number=2 * EPOCH), (1, 0))["status"] == "answered"
    kept = traces(tmp_path)
    told, _ = Speaker(one_desk(tmp_path, facts="before"), number=2 * EPOCH).say({"act": "hello"})
    assert told["status"] == "unheard"
    assert "the cases of amsterdam have changed since this run began" in told["why"]
    assert set(kept) == set(traces(tmp_path))


def end(speaker: Speaker, over: bool = True) -> None:
    assert speaker.say({"act": "end", "over": over, "why": "it is over", "ledger": ""})[0]["status"] == "ended"


def test_a_site_goes_on_while_a_run_that_asked_it_something_is_open(tmp_path: Path) -> None:
    desk = any_run(tmp_path)
    first, second, third = (Speaker(desk, talk=run_of(i)) for i in range(3))
    for speaker in (first, second):
        assert asked(speaker, (1, 0))["status"] == "answered"
    assert third.say({"act": "hello"})[0]["status"] == "ready"
    end(third)
    end(first)
    assert not desk.ended.is_set()
    assert asked(first, (2, 0))["status"] == "unheard", "a run that has ended is not opened again"
    end(second, over=False)
    assert not desk.ended.is_set()
    end(second)
    assert desk.ended.is_set()


def test_answers_and_messages_do_not_outlive_a_run_and_the_evidence_does(tmp_path: Path) -> None:
    desk = one_desk(tmp_path)
    speaker = Speaker(desk)
    assert asked(speaker, (1, 0), ledger="a" * 64)["status"] == "answered"
    assert asked(speaker, (4, 0), "test")["status"] == "answered"
    speaker.say({"act": "part", "payload": "0" * 64, "at": 0, "total": 1_000}, bytes(900))
    names = [Path(name).name for name in traces(tmp_path)]
    assert (names.count("answer.safetensors"), names.count("0" * 64)) == (2, 1)
    end(speaker)
    left = [Path(name).name for name in traces(tmp_path)]
    assert (left.count("answer.safetensors"), left.count("0" * 64), left.count("receipt.json")) == (0, 0, 2)
    assert {"heads.jsonl", "marks.json", "memory.json", "begun"} <= set(left)
    for turn, split in (((1, 0), ""), ((1, 1), ""), ((4, 0), "test"), ((4, 1), "test")):
        assert asked(speaker, turn, split)["status"] == "unheard"
    assert [Path(name).name for name in traces(tmp_path)] == left


def test_an_answer_that_is_ready_after_the_end_of_its_run_is_not_kept(tmp_path: Path) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def slow(site: Site, message: Message) -> Any:
        begun.set()
        assert goes_on.wait(10)
        return echo.back(site, message)

    desk = Between(echo.study((SITE,), reply=slow), tmp_path).desks[SITE]
    speaker = Speaker(desk)
    header, body = question(WEIGHTS, wait=0.0)
    assert speaker.say(header, body)[0]["status"] == "working"
    assert begun.wait(10)
    end(speaker)
    job = desk._runs[TALK.run].job
    assert job is not None
    goes_on.set()
    assert job.done.wait(10)
    assert "answer.safetensors" not in {Path(name).name for name in traces(tmp_path)}


def test_parts_are_held_to_the_yes_and_the_policy_before_they_take_room(tmp_path: Path) -> None:
    def permit(question: str, nbytes: int) -> str:
        if nbytes > 500:
            raise Refused("the policy takes 500 bytes")
        return "not at night"

    speaker = Speaker(one_desk(tmp_path, permit=permit))
    for total, status, why in ((501, "refused", "the policy takes 500 bytes"), (500, "later", "not at night")):
        told, _ = speaker.say({"act": "part", "payload": "0" * 64, "at": 0, "total": total}, bytes(100))
        assert (told["status"], told["why"]) == (status, why)
    assert not [name for name in traces(tmp_path) if "incoming" in name]


def test_the_log_says_once_what_was_asked_and_what_did_not_leave(tmp_path: Path) -> None:
    log: list[str] = []
    why: str | Refused = ""

    def permit(question: str, nbytes: int) -> str:
        if isinstance(why, Refused):
            raise why
        return why

    desk = one_desk(tmp_path, log=log.append, permit=permit, hide=lambda text: "…")
    speaker = Speaker(desk)

    def logged(turn: tuple[int, int], **other: Any) -> list[str]:
        log.clear()
        for _ in range(3):
            assert asked(speaker, turn, **other).get("why", "…") == "…", "names and paths stay here"
        return log

    for _ in range(3):
        speaker.say({"act": "hello"})
    assert log == [f"greeted by coordinator, for run {TALK.run}"]
    assert logged((1, 0)) == ["echo in round 1: answered"]
    assert logged((1, 1), question="mail") == [
        "mail in round 1: amsterdam does not answer 'mail'; it answers echo, evaluate"
    ]
    assert logged((9, 0)) == [
        "echo in round 9: amsterdam was asked in round 9, and echo is asked in rounds 1 to 3 of this study"
    ]
    why = "amsterdam answers at night"
    assert logged((2, 0)) == ["echo in round 2: not now: amsterdam answers at night"]
    assert logged((2, 1)) == ["echo in round 2: not now: amsterdam answers at night"], "another turn is said again"
    assert logged((1, 0)) == ["echo in round 1: answered, and not handed over: amsterdam answers at night"]
    why = Refused("the yes was undone")
    assert logged((2, 0)) == ["echo in round 2: the yes was undone"]
    assert logged((1, 0)) == ["echo in round 1: answered, and not handed over: the yes was undone"]
    log.clear()
    for _ in range(2):
        speaker.say({"act": "part", "payload": "0" * 64, "at": 0, "total": 9}, bytes(9))
    assert log == ["a part of a message: not taken: the yes was undone"]
