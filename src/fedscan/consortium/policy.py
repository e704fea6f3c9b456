"""What a hospital allows, in its own file ``policy.toml``: read, checked, explained, and held against what is asked."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from fedscan.consortium.asks import Asks, Question
from fedscan.method import PRIVACY, Privacy
from fedscan.run import Problem
from fedscan.studyfile.file import digest
from fedscan.studyfile.places import Places, checked, lines_of, meant_by
from fedscan.studyfile.sections import Table, Whole

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
WINDOW = re.compile(r"(\w{3})(?:-(\w{3}))? (\d\d):(\d\d)-(\d\d):(\d\d)")
MB = 1_000_000

DEFAULT = """\
# What this hospital allows a study to ask of it. What stands here is what holds where a line is left out.
# A study that asks for more is refused, and an approval holds for the policy under which it was given: whoever
# changes a value here has to approve again.

[answers]
questions = "all"          # or a list of method:question, such as ["fedavg:learn", "*:evaluate"]; * is every method
coordinators = "all"       # or a list of the coordinators that may ask; all are those of the consortium
least_cases = 20           # cases that can be used; with fewer, no study is answered
least_steps = 10           # optimiser steps behind an answer that carries weights: one step tells most of a scan
windows = []               # when questions are answered, as in ["Mon-Fri 18:00-06:00", "Sat 00:00-24:00"]; []: always

[leaves]
most_telling = "statistics"  # what may leave at most: nothing < weights < statistics < prototypes < features
                             # < predictions < images. Scores of single cases, which every study asks, are statistics
to_other_hospitals = false # whether your answers may be passed on to other hospitals as they came
largest_message_mb = 500   # of one question or one answer, in megabytes (1,000,000 bytes)
smallest_group = 5         # patients behind a number that is shown outside; may be raised, and not be below 5
"""


class Answers(Table):
    """Whom this hospital answers, what, and when."""

    questions: Literal["all"] | tuple[str, ...] = "all"
    coordinators: Literal["all"] | tuple[str, ...] = "all"
    least_cases: Whole = 20
    least_steps: Whole = 10
    windows: tuple[str, ...] = ()

    @field_validator("questions")
    @classmethod
    def _named(cls, questions: Literal["all"] | tuple[str, ...]) -> Literal["all"] | tuple[str, ...]:
        for name in () if questions == "all" else questions:
            if not re.fullmatch(r"[^:]+:[^:]+", name):
                raise ValueError(f'{name!r} is no question; method:question was meant, such as "fedavg:learn"')
        return questions

    @field_validator("windows")
    @classmethod
    def _readable(cls, windows: tuple[str, ...]) -> tuple[str, ...]:
        for text in windows:
            window(text)
        return windows


class Leaves(Table):
    """What may leave this hospital, by class and by size, and how small a group a number may tell of."""

    most_telling: Privacy = "statistics"
    to_other_hospitals: bool = False
    largest_message_mb: Annotated[float, Field(gt=0)] = 500
    smallest_group: Annotated[int, Field(ge=5)] = 5


class Policy(Table):
    """A hospital's whole policy."""

    answers: Answers = Answers()
    leaves: Leaves = Leaves()

    @property
    def hash(self) -> str:
        """SHA-256 of all values, defaults too: comments, order and line ends do not change it."""
        return digest(self.model_dump(mode="json"))


@dataclass(frozen=True)
class Window:
    """A time of the week: days from 0 (Monday) on, and minutes of the day; ``end`` before ``begin``: next day."""

    days: frozenset[int]
    begin: int
    end: int

    def holds(self, now: datetime) -> bool:
        """Whether ``now`` lies in it."""
        minute = now.hour * 60 + now.minute
        if self.begin < self.end:
            return now.weekday() in self.days and self.begin <= minute < self.end
        yesterday = (now - timedelta(days=1)).weekday()
        return (now.weekday() in self.days and minute >= self.begin) or (yesterday in self.days and minute < self.end)


def window(text: str) -> Window:
    """The time of the week that "Mon-Fri 18:00-06:00" says. ValueError where it says none."""
    found = WINDOW.fullmatch(text)
    meant = f'{text!r} is no time of the week; "Mon-Fri 18:00-06:00" was meant'
    if not found or any(day not in DAYS for day in found.group(1, 2) if day):
        raise ValueError(meant)
    first, last = DAYS.index(found[1]), DAYS.index(found[2] or found[1])
    begin, end = (int(found[i]) * 60 + int(found[i + 1]) for i in (3, 5))
    if begin >= 1440 or end > 1440 or begin == end or int(found[4]) > 59 or int(found[6]) > 59:
        raise ValueError(meant)
    return Window(frozenset((first + n) % 7 for n in range((last - first) % 7 + 1)), begin, end)


def answers_at(policy: Policy, now: datetime) -> bool:
    """Whether questions are answered at this local time."""
    windows = policy.answers.windows
    return not windows or any(window(text).holds(now) for text in windows)


def read_policy(path: Path) -> Policy:
    """The policy in a file. Raises Problem, in one sentence with file and line, for whatever does not fit."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise Problem(f"{path}: this is not TOML: {e}.") from e
    except UnicodeDecodeError as e:
        raise Problem(f"{path}: this is not UTF-8 text; a policy (TOML) was meant.") from e
    places, tables = Places(path, lines_of(text)), Policy.model_fields
    for key in raw:
        if key not in tables:
            known = ", ".join(f"[{name}]" for name in tables)
            raise Problem(f"{places.of((key,))}: a policy has no {key!r}{meant_by(key, tables)}; it has {known}.")
    answers = checked(Answers, raw.get("answers", {}), ("answers",), places)
    return Policy(answers=answers, leaves=checked(Leaves, raw.get("leaves", {}), ("leaves",), places))


def refusals(policy: Policy, asks: Asks, cases: int) -> list[str]:
    """What of the asked this policy does not allow, each in a plain sentence; empty where it allows all of it.

    ``cases`` are those of the hospital that can be used.
    """
    rules = policy.answers
    found = []
    if rules.coordinators != "all" and asks.coordinator not in rules.coordinators:
        who = ", ".join(rules.coordinators) or "nobody"
        found.append(f"The study comes from {asks.coordinator!r}, and the policy answers {who} only.")
    if cases < rules.least_cases:
        found.append(f"You have {cases} cases that can be used, and the policy asks for at least {rules.least_cases}.")
    for question in asks.questions:
        found += of_question(policy, asks.method, question)
    return found


def of_question(policy: Policy, method: str, question: Question) -> list[str]:
    """What of one question the policy does not allow."""
    rules, leaves, name = policy.answers, policy.leaves, question.name
    found, allowed = [], rules.questions
    if allowed != "all" and not {f"{method}:{name}", f"*:{name}"} & set(allowed):
        found.append(f"The question {method}:{name} is not among those that the policy answers.")
    if PRIVACY.index(question.privacy) > PRIVACY.index(leaves.most_telling):
        found.append(f"{question.privacy.capitalize()} would leave with {name!r}, and the policy lets no more leave "
                     f"than {leaves.most_telling}.")  # fmt: skip
    if question.passed and not leaves.to_other_hospitals:
        found.append(f"Your answers to {name!r} would be passed on to other hospitals as they came, and the policy "
                     "does not allow that.")  # fmt: skip
    if question.weights and rules.least_steps > 1:
        if question.steps is None:
            found.append(f"How many optimiser steps stand behind an answer to {name!r} is not known, and the policy "
                         f"asks for at least {rules.least_steps}.")  # fmt: skip
        elif question.steps < rules.least_steps:
            found.append(f"With your cases {question.steps} optimiser steps stand behind an answer to {name!r}, and "
                         f"the policy asks for at least {rules.least_steps}.")  # fmt: skip
    most = leaves.largest_message_mb * MB
    for what, nbytes in (("An answer to", question.up), ("A message with", question.down)):
        if nbytes > most:
            found.append(f"{what} {name!r} may have {nbytes / MB:.1f} MB, and the policy allows "
                         f"{leaves.largest_message_mb:g} MB.")  # fmt: skip
    return found


def explained(policy: Policy) -> list[str]:
    """The policy in plain sentences."""
    rules, leaves = policy.answers, policy.leaves

    def those(of: Literal["all"] | Sequence[str], every: str) -> str:
        return every if of == "all" else ", ".join(of) or "none"

    kept = PRIVACY[PRIVACY.index(leaves.most_telling) + 1 :]
    stays = f"; {', '.join(kept)} stay" if kept else ""
    return [
        f"Questions answered: {those(rules.questions, 'all that a study which you approve may ask')}.",
        f"Coordinators answered: {those(rules.coordinators, 'those of the consortium')}.",
        f"At least {rules.least_cases} cases, and {rules.least_steps} optimiser steps behind an answer with weights.",
        f"Answers are given {' and '.join(rules.windows) if rules.windows else 'at any time'}.",
        f"What may leave at most: {leaves.most_telling}{stays}.",
        f"Your answers may {'' if leaves.to_other_hospitals else 'not '}be passed on to other hospitals as they came.",
        f"A message or an answer has at most {leaves.largest_message_mb:g} MB.",
        f"A number that is shown outside tells of at least {leaves.smallest_group} patients.",
    ]
