"""A method's card: what the paper says, what travels, what it reduces to; and the hyperparameters, read from code."""

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Generic, Literal, ParamSpec

from fedscan.method import Method, Privacy
from fedscan.methods.kinds import Clients
from fedscan.parts.pick import some
from fedscan.schema import Kind, Schema
from fedscan.step import Moments, Step

Family = Literal[
    "averaging", "control variates", "travelling", "peer to peer", "asynchronous", "reference", "fedsegnet"
]
Bytes = Callable[[Schema, Mapping[str, Any]], int]  # (the leaves that travel, the hyperparameters) -> bytes a message
P = ParamSpec("P")
CLIENTS = (
    "clients"  # sites per round; methods that take the parts of ``averaging`` get it from a study file as ``pick``
)


def dense(schema: Schema, options: Mapping[str, Any]) -> int:
    """4P: every leaf as it is."""
    return sum(leaf.nbytes for leaf in schema.values())


def learned(schema: Schema) -> Schema:
    """The parameters of a schema."""
    return {k: leaf for k, leaf in schema.items() if leaf.kind is Kind.PARAMETER}


def never(options: Mapping[str, Any]) -> bool:
    """Whatever the hyperparameters, no."""
    return False


def any_step(step: Step) -> None:
    """Admits every way of taking local steps."""


def moments_stay(why: str, instead: str = '"reset" or "kept"') -> Callable[[Step], None]:
    """What refuses, with a ValueError, a study that lets the optimiser's moments leave a site; ``why`` it has to."""

    def hold(step: Step) -> None:
        if step.moments not in ("reset", "kept"):
            raise ValueError(f'{why}: set moments = {instead}, not "{step.moments}"')

    return hold


@dataclass(frozen=True)
class Reduction:
    """When a method is another one, bit for bit.

    to    the other method;  its: the other's hyperparameters
    own   this method's hyperparameters, at which they do nothing
    step  what the study's ``Step`` must say, for both
    alone whether this holds for a single site only
    """

    to: str
    own: Mapping[str, Any] = field(default_factory=dict)
    its: Mapping[str, Any] = field(default_factory=dict)
    step: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False


@dataclass(frozen=True)
class Card:
    """What is to be known of a method before it is used.

    equation       the paper's own, in plain letters
    differs        what it does otherwise than FedAvg, in one sentence
    travels        what goes up and down per site and round, with the bytes before coding; P is the number of leaves'
                   entries, 4P their bytes;  up: the same formula, for the tests and the report;  down: that of what a
                   site is sent to train with, once it holds a model and without the optimiser's moments
    several        a message may hold several models or none, and an answer none: up and down are then of one model
    privacy        the most telling class of data that leaves a site
    normalisation  what becomes of normalisation layers
    moments        what becomes of the optimiser's moments after a round, where the study does not say
    model          the network it is published with, where the study names none
    reduces        when it is another method, bit for bit
    needs          what it asks of a site beside training cases;  validates: whether, with these hyperparameters, sites
                   are weighed by their validation cases, so that a study without any is refused
    admits         raises ValueError, in one sentence, for a ``Step`` it cannot work with
    pooled         not a method over sites: the study is rewritten to one site that holds all cases
    """

    name: str
    title: str
    family: Family
    paper: str
    year: int
    url: str
    equation: str
    differs: str
    travels: str = "weights down, their change up: 4P bytes each way"
    up: Bytes = dense
    down: Bytes = dense
    several: bool = False
    privacy: Privacy = "weights"
    normalisation: str = "parameters, running statistics and counters travel; statistics are averaged like parameters"
    moments: Moments = "reset"
    model: str | None = None
    reduces: Reduction | None = None
    needs: str = "training cases with labels"
    validates: Callable[[Mapping[str, Any]], bool] = never
    admits: Callable[[Step], None] = any_step
    pooled: bool = False


@dataclass(frozen=True)
class Entry(Generic[P]):
    """A method in the registry: its card and the function that makes it. Called, it makes the method."""

    card: Card
    function: Callable[P, Method]
    package: str = "fedscan"  # the installed distribution it comes from, its version and the SHA-256 of its source
    version: str = ""
    digest: str = ""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Method:
        return self.function(*args, **kwargs)

    def make(self, options: Mapping[str, Any] | None = None) -> Method:
        """The method with these hyperparameters, as a study file names them. ValueError as in ``resolve``."""
        resolved = self.resolve(options or {})
        make: Callable[..., Method] = self.function
        if CLIENTS not in inspect.signature(make).parameters:
            clients = resolved.pop(CLIENTS, None)
            resolved |= {} if clients is None else {"pick": some(clients)}
        return make(**resolved)

    def resolve(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All hyperparameters with their values: the defaults, and those given.

        ValueError, in one sentence that names what is allowed, for an unknown name or a value out of range.
        """
        for name in options:
            if name not in self.options:
                raise ValueError(refusal(f"hyperparameter of {self.card.name!r}", name, self.options))
        resolved = {name: options.get(name, default) for name, (_, default) in self.options.items()}
        return {name: self._checked(name, value) for name, value in resolved.items()}

    @cached_property
    def options(self) -> dict[str, tuple[Any, Any]]:
        """Every hyperparameter's annotation and default, from the function's signature."""
        hints = typing.get_type_hints(self.function, include_extras=True)
        found: dict[str, tuple[Any, Any]] = {}
        for name, parameter in inspect.signature(self.function).parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                found[CLIENTS] = (Clients, None)
            else:
                found[name] = (hints[name], parameter.default)
        return found

    def _checked(self, name: str, value: Any) -> Any:
        from pydantic import TypeAdapter, ValidationError  # slow to import

        try:
            return TypeAdapter(self.options[name][0]).validate_python(value, strict=True)
        except ValidationError as e:
            why = "; ".join(dict.fromkeys(error["msg"] for error in e.errors()))
            raise ValueError(f"{name} of method {self.card.name!r} cannot be {value!r}: {why}") from None

    def variant(self, **changes: Any) -> "Entry[P]":
        """The same method under another card: that of this one, with these changes."""
        return replace(self, card=replace(self.card, **changes))


def card(name: str, **facts: Any) -> Callable[[Callable[P, Method]], Entry[P]]:
    """Puts a card on a function that makes a method. The rest of the fields are those of ``Card``."""
    return lambda function: Entry(Card(name, **facts), function)


def refusal(what: str, got: object, allowed: Iterable[str]) -> str:
    """One sentence: ``got`` is no ``what``, perhaps another was meant, and these are allowed."""
    names = list(allowed)
    near = get_close_matches(str(got), names, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return f"{got!r} is no {what}: {meant}allowed: {', '.join(names) or 'none'}"
