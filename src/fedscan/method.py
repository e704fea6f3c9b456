"""A method: what the server remembers, what one round says, and what sites will answer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn

from fedscan.schema import Weights
from fedscan.site import Site, copy_of, load
from fedscan.spec import Group, Number, Spec
from fedscan.step import Step

Message = Mapping[str, Any]  # what travels: names to weights, tensors, numbers, text, or mappings of those
State = dict[str, Any]  # what the server remembers; state["weights"] is what it would publish today
Tree = dict[str, Any]

PRIVACY = ("nothing", "weights", "statistics", "prototypes", "features", "predictions", "images")
Privacy = Literal["nothing", "weights", "statistics", "prototypes", "features", "predictions", "images"]


class Absent(Exception):
    """Fewer sites answered than a round needs. ``sites`` did not; the study says what happens then."""

    def __init__(self, sites: Sequence[str], question: str) -> None:
        super().__init__(f"no answer to {question!r} from {', '.join(sites)}")
        self.sites = tuple(sites)


@dataclass(frozen=True)
class Terms:
    """What both sides know before a question is put: the networks' structure by role, and how local steps are taken.

    ``model`` is the network of the role "model", which predicts; ``names`` are the sites.
    """

    model: nn.Module
    step: Step
    networks: Mapping[str, nn.Module] = field(default_factory=dict)
    names: tuple[str, ...] = ()


Holds = Callable[[Terms], Mapping[str, Spec]]  # what a message or an answer holds, by name


@dataclass(frozen=True)
class Question:
    """Something a site answers: a plain function of the site and a message, and what its answer may hold.

    name     the name under which it is asked
    privacy  the most telling class of data in the answer, from weights up to images
    gives    what the answer holds, made from the terms of the study; anything else is refused
    takes    what the message holds, made alike: a site refuses another, without a look at the values of its weights
    """

    name: str
    privacy: Privacy
    gives: Callable[[Terms], Group]
    reply: Callable[[Site, Message], Tree]
    takes: Callable[[Terms], Group] | None = None

    def __call__(self, site: Site, message: Message) -> Tree:
        return self.reply(site, message)


def answer(
    privacy: Privacy, gives: Holds = lambda terms: {}, takes: Holds | None = None
) -> Callable[[Callable[[Site, Message], Tree]], Question]:
    """Makes a function of a site and a message into a question that sites answer.

    Beside what it ``gives``, an answer may report up to 64 numbers (a loss, a count of steps) under names of its own,
    and beside what it ``takes``, a message may hold as many.
    """

    def group(holds: Holds) -> Callable[[Terms], Group]:
        return lambda terms: Group(holds(terms), others=Number(optional=True))

    def declare(reply: Callable[[Site, Message], Tree]) -> Question:
        return Question(reply.__name__, privacy, group(gives), reply, None if takes is None else group(takes))

    return declare


class Replies(Mapping[str, Tree]):
    """Replies by site, in name order. Sites that did not answer are in ``missing``.

    A reply that lies on disk is mapped anew at each access, so a round that takes them one by one holds one.
    ``resident`` says that all lie in memory.
    """

    def __init__(self, replies: Mapping[str, Callable[[], Tree]], missing: Sequence[str] = (), resident: bool = False):
        self._replies = {name: replies[name] for name in sorted(replies)}
        self.missing, self.resident = tuple(missing), resident

    def __getitem__(self, name: str) -> Tree:
        return self._replies[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._replies)

    def __len__(self) -> int:
        return len(self._replies)


@runtime_checkable
class Sites(Protocol):
    """All that a round sees of the world. Whoever keeps this promise can carry any method.

    ``need`` is how many sites must answer; with fewer, Absent is raised and the study says what becomes of the round.
    A method that can go on without anyone asks with ``need=0`` and looks who replied.
    """

    names: tuple[str, ...]

    def ask(self, question: Question, message: Message, *, to: Sequence[str] | None = None, need: int = 1) -> Replies:
        """Put one question to many sites (all, where ``to`` is not given) and wait for the answers."""
        ...

    def ask_each(self, question: Question, messages: Mapping[str, Message], *, need: int = 1) -> Replies:
        """The same question, with a different message for each site."""
        ...

    def start(self, question: Question, messages: Mapping[str, Message]) -> None:
        """Put a question and do not wait. For methods without rounds of their own."""
        ...

    def next(self) -> tuple[str, Tree]:
        """The next answer to arrive of those started, and whose it is."""
        ...

    @property
    def busy(self) -> tuple[str, ...]:
        """Sites that were asked with ``start`` and have not answered."""
        ...

    def random(self, label: str) -> torch.Generator:
        """A generator for the server, the same whenever this round is run."""
        ...

    def once(self, label: str, make: Callable[[], Tree]) -> Tree:
        """Heavy work at the server, done once; its result is recorded, and read back when a round is resumed."""
        ...


def receive(site: Site, message: Message) -> nn.Module:
    """The model a site holds after a message: what was sent, its own leaves, and the study's first for the rest."""
    return load(site.model(), message["weights"], site.state.get("own", {}), otherwise=site.slots.first)


@dataclass(frozen=True)
class Method:
    """Four plain functions. ``round`` runs at the server, ``answers`` and ``use`` at the sites.

    init     (model, site names) -> state: the server's memory before round 1, from the freshly drawn model
    round    (sites, state) -> state: one turn of the talk
    answers  the questions a site answers; it answers no others
    use      (site, message) -> model: how a site turns what is published into what it predicts with
    publishes  (terms) -> what a message with what is published holds, where sites are to check it
    closing    (sites, state) -> state: after the last round, once; for models that lie at their sites until then

    ``state["weights"]`` is published to all sites; with ``state["for"][site]``, each site gets its own, and one
    that is not in it is sent none, for its model lies there. Sites named in ``state["news"]["to"]`` hold what was
    published before, and are sent the coded ``change`` since then.
    """

    init: Callable[[nn.Module, tuple[str, ...]], State]
    round: Callable[[Sites, State], State]
    answers: tuple[Question, ...]
    use: Callable[[Site, Message], nn.Module] = receive
    publishes: Holds | None = None
    closing: Callable[[Sites, State], State] | None = None


def published(state: State, name: str) -> Message:
    """What the server would send to site ``name`` to predict with: the model, or what changed since the one it has."""
    if name in state.get("news", {}).get("to", ()):
        return {"change": state["news"]["change"], "version": state["version"]}
    if "for" in state and name not in state["for"]:
        return {}
    weights = state["for"][name] if "for" in state else state["weights"]
    return {"weights": weights, "version": state["version"]} if "version" in state else {"weights": weights}


def messages(state: State, names: Sequence[str], **more: Any) -> dict[str, Message]:
    """What is published to each site, with ``more``; who is sent the same gets one object, so it is made ready once."""
    if "for" in state:
        return {name: {**published(state, name), **more} for name in names}
    up_to_date = set(state.get("news", {}).get("to", ()))
    made: dict[bool, Message] = {}
    return {n: made.setdefault(n in up_to_date, {**published(state, n), **more}) for n in names}


def just_weights(model: nn.Module, names: tuple[str, ...]) -> State:
    """A server that remembers the model and nothing else."""
    return {"weights": copy_of(model)}


__all__ = ["Absent", "Message", "Method", "Question", "Replies", "Sites", "State", "Terms", "Tree", "Weights", "answer"]
