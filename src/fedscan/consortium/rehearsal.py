"""How often a method asks, how many steps stand behind an answer, and who sees it: found by playing it.

What a page says of a method may be out of date; what its code does is not. So its rounds are run here with a network of
a hundred numbers and images of noise, by the questions and steps of the real study. Where a method takes answers as
they come, the hospital that is looked at is always the first: no other order asks it more often.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedscan.method import Absent, Message, Question, Replies, Tree, published
from fedscan.respond import respond
from fedscan.schema import Weights
from fedscan.site import Batch, Rows, Splits, seed_of
from fedscan.step import Step
from fedscan.study import Study, Turn
from fedscan.wire import pack

ROUNDS = 2  # the second is with what the first has left behind
CASES = 500  # beyond these, more steps are not counted: no policy asks for as many


class Small(nn.Module):
    """A network with a convolution, a norm layer with running statistics, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 1, H, W) to logits (B, 2)."""
        logits: Tensor = self.head(self.norm(self.convolution(x)).relu().mean((2, 3)))
        return logits


class Noise:
    """A task of two classes of noise; its networks have the roles of the real task's."""

    def __init__(self, roles: Sequence[str]) -> None:
        self.networks: Mapping[str, Callable[[], nn.Module]] = dict.fromkeys(roles, Small)

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The logits (B, 2)."""
        return {"logits": model(batch.x)}

    def loss(self, out: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(out["logits"], batch.y)

    def scores(self, model: nn.Module, split: Any, site: str, final: bool) -> Rows:
        """None: nothing is scored here."""
        return []

    def quality(self, model: nn.Module, split: Any) -> dict[str, float | None]:
        """The same for every model."""
        return {"dice": 0.5, "hd95": 1.0}

    def diversity(self, split: Any) -> float:
        """Both classes are as many."""
        return 1.0


class Images:
    """So many images of 4 x 4 numbers of noise, of two classes; others for each site."""

    def __init__(self, count: int, site: str) -> None:
        self.names: Sequence[str] = [f"case {i}" for i in range(count)]
        self.subjects: Sequence[str] = self.names
        self.x = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed_of(site)))
        self.y = torch.arange(count) % 2

    def __len__(self) -> int:
        return len(self.y)

    def batches(self, size: int, order: torch.Generator, augment: torch.Generator) -> Iterator[Batch]:
        """One epoch, in order."""
        for i in range(0, len(self), size):
            yield Batch(self.x[i : i + size], self.y[i : i + size])

    def case(self, i: int) -> tuple[Batch, Any]:
        """One image."""
        return Batch(self.x[i : i + 1], self.y[i : i + 1]), None


@dataclass
class Table:
    """Sites around one table: keeps the promise of ``Sites``, without engine or journal, and counts who is asked."""

    study: Study
    who: str  # whose steps are looked at
    counts: Counter[tuple[int, str, str]] = field(default_factory=Counter)  # by round, site and question
    steps: dict[str, int] = field(default_factory=dict)  # the fewest that an answer has reported, by question
    said: dict[str, set[tuple[str, str]]] = field(default_factory=dict)  # by digest: which sites to which question
    passed: set[str] = field(default_factory=set)  # questions whose answers went to other sites as they came
    open: set[str] = field(default_factory=set)  # questions that were put without waiting
    round: int = 0

    def __post_init__(self) -> None:
        self.names, self.slots = self.study.names, self.study.slots()
        self.memory: dict[str, dict[str, Any]] = {name: {} for name in self.names}
        self.started: list[tuple[str, Tree]] = []

    def ask(self, question: Question, message: Message, *, to: Sequence[str] | None = None, need: int = 1) -> Replies:
        return self.ask_each(question, dict.fromkeys(self.names if to is None else to, message), need=need)

    def ask_each(self, question: Question, messages: Mapping[str, Message], *, need: int = 1) -> Replies:
        made = {name: self.answer(question, name, messages[name]) for name in sorted(messages)}
        return Replies({name: partial(dict, reply) for name, reply in made.items()}, resident=True)

    def answer(self, question: Question, name: str, message: Message) -> Tree:
        self.look(name, message)
        turn = Turn(self.round, self.counts.total(), name)
        self.counts[self.round, name, question.name] += 1
        reply, self.memory[name], _ = respond(
            self.study, self.slots, turn, question.name, message, self.memory[name], lambda: bytes(32)
        )
        for digest in digests(reply):
            self.said.setdefault(digest, set()).add((name, question.name))
        if name == self.who and isinstance(steps := reply.get("steps"), int):
            self.steps[question.name] = min(steps, self.steps.get(question.name, steps))
        return reply

    def look(self, name: str, message: Message) -> None:
        """Notes whose answers a message to ``name`` holds, other than its own."""
        for digest in digests(message):
            of = self.said.get(digest, set())
            if name not in {site for site, _ in of}:
                self.passed |= {question for _, question in of}

    def start(self, question: Question, messages: Mapping[str, Message]) -> None:
        self.open.add(question.name)
        self.started += [(name, self.answer(question, name, messages[name])) for name in sorted(messages)]

    def next(self) -> tuple[str, Tree]:
        if not self.started:
            raise Absent(self.names, "next")
        first = next((i for i, (name, _) in enumerate(self.started) if name == self.who), 0)
        return self.started.pop(first)

    @property
    def busy(self) -> tuple[str, ...]:
        return tuple(sorted({name for name, _ in self.started}))

    def random(self, label: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.round, label))

    def once(self, label: str, make: Callable[[], Tree]) -> Tree:
        return make()


@dataclass(frozen=True)
class Played:
    """What a rehearsal has shown.

    times    how often a round asks one site a question at most, by the question's name;  last: how often it is asked
             once more, after the last round;  open: questions whose number depends on who answers first
    steps    the fewest optimiser steps behind an answer, by question; those that report none are not in it
    own      whether sites have models of their own, which are scored at all others at the end
    passed   questions whose answers are sent to other sites as they came, arrays and all
    """

    times: Mapping[str, int]
    steps: Mapping[str, int]
    own: bool
    passed: frozenset[str]
    last: Mapping[str, int] = field(default_factory=dict)
    open: frozenset[str] = frozenset()


def rehearse(study: Study, who: str, cases: int) -> Played:
    """Plays two rounds of the study's method where ``who`` has so many training cases, and counts what is asked.

    Raises whatever the method raises on a task of two classes of noise.
    """
    step: Step = replace(study.step, compile=False, precision="float32", lr=1e-3)
    splits = {}
    for name in study.names:
        few = Images(2, name)
        splits[name] = Splits(Images(max(1, min(cases, CASES)), name) if name == who else few, few, few)
    task = Noise(list(study.task.networks))
    small = Study(task, study.method, study.names, splits.__getitem__, step, rounds=ROUNDS, every=0)
    table, state = Table(small, who), small.start()
    for table.round in range(1, ROUNDS + 1):
        state = study.method.round(table, state)
    own, table.round = "for" in state, ROUNDS + 1
    if study.method.closing:
        state = study.method.closing(table, state)
    for name in study.names:  # what is published is sent to be scored; of models of their own, to everybody else too
        for other in study.names if own else (name,):
            table.look(name, published(state, other))
    times: Counter[str] = Counter()
    last: Counter[str] = Counter()
    for (round, _, question), count in table.counts.items():
        found = times if round <= ROUNDS else last
        found[question] = max(found[question], count)
    return Played(dict(times), dict(table.steps), own, frozenset(table.passed), dict(last), frozenset(table.open))


def digests(tree: Any) -> Iterator[str]:
    """The SHA-256 of each set of weights and each tensor in a message or an answer."""
    if isinstance(tree, Weights | Tensor):
        yield pack({"": tree}).digest
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from digests(value)
