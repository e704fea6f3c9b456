"""A hospital's policy: what it refuses, when it answers, and that every mistake in the file is named by its line."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from fedscan.consortium.asks import Asks, Question
from fedscan.consortium.leaving import Part
from fedscan.consortium.policy import DEFAULT, Policy, answers_at, explained, read_policy, refusals, window
from fedscan.run import Problem

LEARN = Question("learn", "weights", (Part("update", "weights", 10),), True, 4_000_000, 4_000_000, True, 1, 5, steps=30)
SCORE = Question("evaluate", "statistics", (Part("rows", "a table", 10),), False, 50_000, 4_000_000, True, 1, 5, last=1)
ASKS = Asks(
    "balls", "a" * 64, "charite", "east", ("east", "west"), "segmentation", ("ball",), "fedavg", "FedAvg", "weights",
    "unet", "statistics", 5, 40, (LEARN, SCORE), {},
)  # fmt: skip


def written(folder: Path, text: str) -> Policy:
    (folder / "policy.toml").write_text(text)
    return read_policy(folder / "policy.toml")


def test_the_default_that_is_written_is_the_default_that_holds(tmp_path: Path) -> None:
    assert written(tmp_path, DEFAULT) == written(tmp_path, "") == Policy()
    assert refusals(Policy(), ASKS, 40) == []


@pytest.mark.parametrize(
    ("text", "asks", "cases", "said"),
    [
        ("", ASKS, 19, "You have 19 cases that can be used, and the policy asks for at least 20."),
        ('[answers]\ncoordinators = ["lyon"]', ASKS, 40, "comes from 'charite', and the policy answers lyon only."),
        ("[answers]\ncoordinators = []", ASKS, 40, "the policy answers nobody only."),
        ('[answers]\nquestions = ["fedavg:learn"]', ASKS, 40, "The question fedavg:evaluate is not among those"),
        ('[answers]\nquestions = ["scaffold:learn", "*:evaluate"]', ASKS, 40, "The question fedavg:learn is not among"),
        ('[leaves]\nmost_telling = "weights"', ASKS, 40, "Statistics would leave with 'evaluate', and the policy lets"),
        (
            "",
            replace(ASKS, questions=(replace(LEARN, passed=True),)),
            40,
            "to 'learn' would be passed on to other hosp",
        ),
        ("[answers]\nleast_steps = 31", ASKS, 40, "30 optimiser steps stand behind an answer to 'learn', and the"),
        ("", replace(ASKS, questions=(replace(LEARN, steps=None),)), 40, "behind an answer to 'learn' is not known"),
        ("[leaves]\nlargest_message_mb = 3.9", replace(ASKS, questions=(replace(LEARN, down=0),)), 40, "An answer to"),
        ("[leaves]\nlargest_message_mb = 3.9", replace(ASKS, questions=(replace(LEARN, up=0),)), 40, "A message with"),
    ],
)
def test_what_the_policy_does_not_allow_is_refused_in_one_sentence(
    tmp_path: Path, text: str, asks: Asks, cases: int, said: str
) -> None:
    found = refusals(written(tmp_path, text), asks, cases)
    assert len(found) == 1
    assert said in found[0]
    assert found[0].endswith(".")


def test_classes_are_ordered_and_only_the_more_telling_are_refused() -> None:
    order = ("weights", "statistics", "prototypes", "features", "predictions", "images")
    for i, allowed in enumerate(order):
        policy = Policy.model_validate({"leaves": {"most_telling": allowed}})
        for j, asked in enumerate(order):
            asks = replace(ASKS, questions=(replace(SCORE, privacy=asked),))  # type: ignore[arg-type]
            assert bool(refusals(policy, asks, 40)) is (j > i), (allowed, asked)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[answers]\nleast_case = 3", "line 2: [answers] has no key 'least_case' (was 'least_cases' meant?); known"),
        ("\n\n[leaves]\nmost_telling = 'wights'", "line 4: leaves.most_telling = \"wights\", but one of"),
        ("[answers]\nleast_cases = true", "line 2: answers.least_cases = true, but a whole number of at least 1"),
        ("[answers]\nleast_cases = 0", "line 2: answers.least_cases = 0, but a whole number of at least 1"),
        ("[leaves]\nsmallest_group = 4", "line 2: leaves.smallest_group = 4, but a whole number of at least 5 belongs"),
        ("[leaves]\nlargest_message_mb = inf", "line 2: leaves.largest_message_mb"),
        ('[answers]\nquestions = ["learn"]', "'learn' is no question; method:question was meant"),
        ('[answers]\nwindows = ["Mon 25:00-26:00"]', "'Mon 25:00-26:00' is no time of the week"),
        ("[leave]\n", "line 1: a policy has no 'leave' (was 'leaves' meant?); it has [answers], [leaves]."),
        ("answers = 3\n", "line 1: answers = 3, but a table, [answers], belongs there"),
        ("[answers", "this is not TOML"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(Problem) as raised:
        written(tmp_path, text)
    assert str(raised.value).startswith(str(tmp_path / "policy.toml"))
    assert said in str(raised.value)


def test_the_hash_is_of_the_values_alone(tmp_path: Path) -> None:
    base = written(tmp_path, DEFAULT).hash
    assert written(tmp_path, DEFAULT.replace("\n", "\r\n")).hash == base
    assert written(tmp_path, "# none\n[leaves]\nsmallest_group = 5\n[answers]\nleast_cases = 20\n").hash == base
    for changed in (
        "least_cases = 21",
        "least_steps = 9",
        'questions = ["*:evaluate"]',
        'windows = ["Sun 01:00-02:00"]',
    ):
        assert written(tmp_path, f"[answers]\n{changed}\n").hash != base
    for changed in ("smallest_group = 6", "largest_message_mb = 500.1", 'most_telling = "weights"'):
        assert written(tmp_path, f"[leaves]\n{changed}\n").hash != base


@pytest.mark.parametrize(
    ("text", "when", "holds"),
    [
        ("Mon-Fri 18:00-06:00", "2026-03-02 18:00", True),  # a Monday
        ("Mon-Fri 18:00-06:00", "2026-03-02 17:59", False),
        ("Mon-Fri 18:00-06:00", "2026-03-03 05:59", True),
        ("Mon-Fri 18:00-06:00", "2026-03-02 05:00", False),  # of Sunday's night, which is none
        ("Mon-Fri 18:00-06:00", "2026-03-07 05:00", True),  # Saturday morning, of Friday's night
        ("Mon-Fri 18:00-06:00", "2026-03-07 19:00", False),
        ("Sat-Mon 00:00-24:00", "2026-03-08 23:59", True),  # days run on over Sunday
        ("Sat-Mon 00:00-24:00", "2026-03-03 00:00", False),
        ("Sun 10:00-12:00", "2026-03-08 12:00", False),
    ],
)
def test_times_of_the_week(text: str, when: str, holds: bool) -> None:
    now = datetime.fromisoformat(when)
    assert window(text).holds(now) is holds
    policy = Policy.model_validate({"answers": {"windows": (text,)}})
    assert answers_at(policy, now) is holds
    assert answers_at(Policy(), now)


@pytest.mark.parametrize("text", ["", "Mon", "Mon 9:00-10:00", "Moo 09:00-10:00", "Mon 09:00-09:00", "Mon 09:60-10:00",
                                  "Mon 24:00-01:00", "Mon-Fri 18:00–06:00"])  # fmt: skip
def test_what_is_no_time_of_the_week(text: str) -> None:
    with pytest.raises(ValueError, match="is no time of the week"):
        window(text)


def test_it_is_explained() -> None:
    said = " ".join(explained(Policy()))
    assert "statistics; prototypes, features, predictions, images stay" in said
    assert "at least 5 patients" in said
