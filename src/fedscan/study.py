"""A study: one task, one method, some sites. The server and every site build it alike, from the same file."""

import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch

from fedscan.method import Message, Method, Question, State, Terms, Tree, answer, published
from fedscan.schema import Weights, schema_of
from fedscan.site import Site, Slots, Splits, Task, first_model
from fedscan.spec import Choice, Number, Refused, Spec, Table, Text, brief, form
from fedscan.step import Step

COLUMNS: Mapping[str, Spec] = {
    "case": Text(), "subject": Text(), "site": Text(), "label": Text(), "metric": Text(), "value": Number(optional=True)
}  # fmt: skip

SPLIT = Choice(("validation", "test"))


@dataclass(frozen=True)
class Scores(Table):
    """Scores of cases: each metric of each label of a case once, and each case of one subject and one site.

    labels   those that the task scores;  ranges: the least and largest value of each metric; None: not known
    """

    columns: Mapping[str, Spec] = field(default_factory=lambda: COLUMNS)
    labels: Collection[str] | None = None
    ranges: Mapping[str, tuple[float, float]] | None = None

    def check(self, value: Any, where: str) -> None:
        """Raises Refused for the first row that does not fit."""
        super().check(value, where)
        seen: set[tuple[str, str, str]] = set()
        whose: dict[str, tuple[str, str]] = {}
        for i, (case, subject, site, label, metric, score) in enumerate(value):
            row = f"{where}: row {i}"
            if self.labels is not None and label not in self.labels:
                raise Refused(f"{row} scores {brief(label)}, and the labels are {', '.join(self.labels)}")
            if self.ranges is not None and metric not in self.ranges:
                raise Refused(f"{row} holds {brief(metric)}, and the metrics are {', '.join(self.ranges)}")
            low, high = (self.ranges or {}).get(metric, (-math.inf, math.inf))
            Number(low, high, optional=True).check(score, f"{row}: {metric}")
            if (case, label, metric) in seen:
                raise Refused(f"{row} gives {metric} of {brief(label)} in case {brief(case)} again")
            seen.add((case, label, metric))
            if whose.setdefault(case, (subject, site)) != (subject, site):
                raise Refused(f"{row} gives case {brief(case)} to another subject or site than before")


class Turn(NamedTuple):
    """Who answers what: one question to one site, the ``call``-th of its round."""

    round: int
    call: int
    site: str

    def __str__(self) -> str:
        return f"{self.round}.{self.call}.{self.site}"


@dataclass(frozen=True)
class Study:
    """Everything that decides a run's numbers.

    data     from a site's name to its splits; called where the site's work is done
    absent   what to do where too few sites answer: "skip" the round, "wait", or "stop"
    every    validate after every so many rounds; 0 for never
    silent   simulated silence: the rounds in which a site does not answer
    seconds  simulated seconds a site takes to answer a question put with ``start``; decides the order of arrival
    counts   how many cases a site has in each split, where this is known beforehand
    origins  whose cases a site has that pools those of others
    """

    task: Task
    method: Method
    names: tuple[str, ...]
    data: Callable[[str], Splits]
    step: Step = field(default_factory=Step)
    rounds: int = 1
    seed: int = 0
    every: int = 1
    absent: Literal["skip", "wait", "stop"] = "skip"
    silent: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    origins: Mapping[str, Collection[str]] = field(default_factory=dict)
    device: str = "cpu"
    threads: int = 1
    name: str = "study"
    method_name: str = "method"
    resolved: Mapping[str, Any] = field(default_factory=dict)  # the study as its file says it, defaults filled in
    hash: str = ""  # SHA-256 of the canonical form of ``resolved`` and of the numerics

    @cached_property
    def identity(self) -> str:
        """What its run is known by: the hash of its file or, where there is none, of the plain facts it is made of."""
        times = (sorted(self.silent.items()), sorted(self.seconds.items()))
        facts = (self.name, self.method_name, self.names, self.step, self.rounds, self.seed, self.every, self.absent,
                 self.threads, times, sorted(self.questions))  # fmt: skip
        return self.hash or hashlib.sha256(repr(facts).encode()).hexdigest()

    @cached_property
    def terms(self) -> Terms:
        """The networks' structure without their numbers, and the policy for local steps."""
        roles = self.task.networks  # not made on "meta": some networks compute while they are
        networks = {role: first_model(self.task, self.seed, role).to("meta") for role in roles}
        return Terms(networks["model"], self.step, networks, self.names)

    @cached_property
    def travelling(self) -> frozenset[str]:
        """The names of the leaves that the server publishes, and so sends; all others never leave their site."""
        weights = published(self.start(), self.names[0]).get("weights")
        if weights is None:  # models lie at their sites, and go from one to the other whole
            return frozenset(schema_of(self.terms.model))
        return frozenset(weights if isinstance(weights, Weights) else next(iter(weights.values())))

    def __post_init__(self) -> None:
        """Raises ValueError where two questions have one name: a site could not tell which of them it is asked."""
        names = [question.name for question in self.method.answers]
        for name in names:
            if name == "evaluate":
                raise ValueError("a question of the method is named 'evaluate', as that of the study: rename it")
            if names.count(name) > 1:
                raise ValueError(f"two questions of the method are named {name!r}: give each a name of its own")

    @cached_property
    def questions(self) -> dict[str, Question]:
        """All that a site answers, by the name under which it is asked."""
        return {q.name: q for q in (*self.method.answers, self.evaluate)}

    @cached_property
    def evaluate(self) -> Question:
        """Scores what was published on the site's validation or test cases.

        The test cases are taken from the study: no method is handed them, not even to make its model for this.
        """

        labels, ranges = getattr(self.task, "labels", None), getattr(self.task, "ranges", None)
        rows = Scores(labels=labels, ranges=ranges)
        if labels and ranges and all(name in self.counts for name in self.names):
            most = max(max(self.counts[name].values()) for name in self.names)
            rows = replace(rows, limit=most * len(labels) * len(ranges))

        holds = self.method.publishes

        def takes(terms: Terms) -> dict[str, Spec]:
            return {**(holds(terms) if holds else {}), "split": SPLIT}

        @answer("statistics", lambda terms: {"rows": rows}, takes if holds else None)
        def evaluate(site: Site, message: Message) -> Tree:
            SPLIT.check(message["split"], f"the split on which {site.name} was asked to score")
            model = self.method.use(site, message).eval()
            final = message["split"] == "test"
            split = self.splits(site.name).test if final else site.validation
            return {"rows": site.task.scores(model, split, site.name, final)}

        return evaluate

    def check_asked(self, name: str, question: str, message: Message) -> None:
        """Raises Refused for a message that is not what the question takes, where that is declared."""
        if question not in self._takes:
            takes = self.questions[question].takes
            self._takes[question] = None if takes is None else form(takes(self.terms))
        spec = self._takes[question]
        if spec is not None:
            spec.check(message, f"what {name} was sent with {question!r}")

    @cached_property
    def _takes(self) -> dict[str, Spec | None]:
        return {}

    def start(self) -> State:
        """The server's memory before round 1."""
        return self.method.init(first_model(self.task, self.seed), self.names)

    def splits(self, name: str) -> Splits:
        """The site's cases, loaded once per process."""
        if name not in self._loaded:
            self._loaded[name] = self.data(name)
        return self._loaded[name]

    @cached_property
    def _loaded(self) -> dict[str, Splits]:
        return {}

    def slots(self) -> Slots:
        """Networks for one process to work with."""
        return Slots(self.task, self.step, torch.device(self.device), self.seed)


def numbers_of(tree: Tree) -> dict[str, float]:
    """The numbers that a reply reports, for the ledger."""
    return {k: v for k, v in tree.items() if isinstance(v, int | float) and not isinstance(v, bool)}
