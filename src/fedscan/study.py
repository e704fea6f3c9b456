"""A study: one task, one method, some sites. The server and every site build it alike, from the same file."""

import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

from fedscan.method import Message, Method, Question, State, Terms, Tree, answer, published
from fedscan.schema import Weights
from fedscan.site import Site, Slots, Splits, Task, first_model, seed_of
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
        return Terms(networks["model"], self.step, networks)

    @cached_property
    def travelling(self) -> frozenset[str]:
        """The names of the leaves that the server publishes, and so sends; all others never leave their site."""
        weights = published(self.start(), self.names[0])["weights"]
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

    def unlike(self, name: str, message: Message) -> str:
        """What a message lacks, or holds that is not as the study begins; empty where it is as that."""
        state = self.start()
        first = published(state, name)
        known = {**state, **first, "split": ""}
        for entry in first:
            if entry not in message:
                return f"lacks {entry!r}"
        odd = (entry for entry in message if entry not in known or not alike(message[entry], known[entry]))
        return next((f"holds {entry[:80]!r} as the study does not know it" for entry in odd), "")

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


def respond(
    study: Study,
    slots: Slots,
    turn: Turn,
    question: str,
    message: Message,
    state: dict[str, Any],
    key: Callable[[], bytes],
) -> tuple[Tree, dict[str, Any], float]:
    """What happens at a site when a question arrives, over any engine: reply, new memory, seconds.

    ``state`` is not changed. Raises Refused for a question that is not on the study's list.
    """
    if question not in study.questions:
        raise Refused(f"{turn.site} does not answer {question!r}; it answers {', '.join(study.questions)}")
    site = Site(
        turn.site, study.task, without_test(study.splits(turn.site)), study.step, slots, apart(state),
        study.seed, turn.round, study.rounds, turn.call, key,
    )  # fmt: skip
    study.check_asked(turn.site, question, message)
    begun, versions = time.perf_counter(), [t._version for t in tensors(state)]
    with seeded(seed_of(study.seed, *turn, "default"), slots.device):
        reply = answered(study, site, study.questions[question], message)
    if versions != [t._version for t in tensors(state)]:
        raise RuntimeError(f"{question} changed a tensor of its memory in place: put a new one into site.state")
    taken = slots.pointers()
    reply, memory = settled(reply, taken), settled(site.state, taken)
    return reply, memory, time.perf_counter() - begun


class Withheld:
    """Stands in a site's splits for its test cases. Whatever is asked of it raises RuntimeError with a sentence."""

    def _refuse(self) -> NoReturn:
        raise RuntimeError("a method asked a site for its test cases: they are scored by the study, once, at the end")

    names = subjects = property(_refuse)

    def __len__(self) -> NoReturn:
        self._refuse()

    def batches(self, *_: Any) -> NoReturn:
        """Refuses."""
        self._refuse()

    def case(self, i: int) -> NoReturn:
        """Refuses."""
        self._refuse()


def without_test(splits: Splits) -> Splits:
    """The splits that a method is handed."""
    return splits._replace(test=Withheld())


class Received(dict[str, Any]):
    """A message at a site. What it does not hold is refused in a sentence that begins with ``asked``."""

    def __init__(self, message: Message, asked: str) -> None:
        super().__init__(message)
        self.asked = asked

    def __missing__(self, key: str) -> NoReturn:
        raise Refused(f"{self.asked} by a message that lacks {key!r}")


def answered(study: Study, site: Site, question: Question, message: Message) -> Tree:
    """The site's reply. A fault is the message's, and Refused, where nobody has vouched for that message.

    Where the question declares what it takes, or the message is as the study begins, a fault is the method's own.
    """
    asked = f"{site.name} was asked {question.name!r}"
    try:
        return question(site, Received(message, asked))
    except Refused:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        if question.takes is None and (why := study.unlike(site.name, message)):
            raise Refused(f"{asked} by a message that {why}, and failed at it ({type(e).__name__}: {e})"[:400]) from e
        raise


def alike(value: Any, known: Any) -> bool:
    """Whether two entries are of one form: leaves of the same names, shapes and dtypes, or values of one type."""
    if isinstance(known, Weights):
        return isinstance(value, Weights) and value.schema == known.schema
    if isinstance(known, Mapping):
        return (
            isinstance(value, Mapping)
            and value.keys() == known.keys()
            and all(alike(value[k], known[k]) for k in known)
        )
    return type(value) is type(known)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The default generators, seeded inside and as they were outside."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def apart(tree: Any) -> Any:
    """The tree with mappings and lists of its own; its tensors are shared, and must not be written to."""
    if isinstance(tree, Weights):
        return tree
    if isinstance(tree, dict):
        return {k: apart(v) for k, v in tree.items()}
    return [apart(v) for v in tree] if isinstance(tree, list) else tree


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of a tree, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors(value)


def unchanged(after: Any, before: Any) -> bool:
    """Whether two trees hold the same tensors (the very same ones) and equal values."""
    if isinstance(after, dict) and isinstance(before, dict):
        return after.keys() == before.keys() and all(unchanged(after[k], before[k]) for k in after)
    if isinstance(after, Tensor) or isinstance(before, Tensor):
        return after is before
    return type(after) is type(before) and bool(after == before)


def settled(tree: Any, taken: set[int]) -> Any:
    """The tree with its tensors on the processor and out of the slots, which the next answer overwrites.

    What needs no change is handed back as the same object, so that an unchanged memory can be told from a changed one.
    """
    if isinstance(tree, Weights | dict):
        new = {k: settled(v, taken) for k, v in tree.items()}
        if all(new[k] is tree[k] for k in new):
            return tree
        return Weights(new, tree.kinds) if isinstance(tree, Weights) else new
    if isinstance(tree, Tensor):
        if tree.device.type == "cpu" and not tree.requires_grad and tree.data_ptr() not in taken:
            return tree
        return tree.detach().cpu().clone() if tree.data_ptr() in taken else tree.detach().cpu()
    return tree


def numbers_of(tree: Tree) -> dict[str, float]:
    """The numbers that a reply reports, for the ledger."""
    return {k: v for k, v in tree.items() if isinstance(v, int | float) and not isinstance(v, bool)}
