"""A network's card: what it is, who described it, how it is built, and which options it takes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from inspect import signature
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from torch import nn

from fedscan.plugins import OWN, Origin

Builder = Callable[..., nn.Module]
_GIVEN = (
    "channels",
    "classes",
    "dims",
)  # what a study's data say; everything else in a builder's signature is an option
_WORDS = {int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class ModelCard:
    """One network: its name, its source, and ``build(channels, classes, dims=3, **options)`` which makes it.

    ``options`` maps each option to its default, ``kinds`` to its annotation, and ``presets`` each preset's name to the
    options that it sets. ``origin`` is the package it comes from.
    """

    name: str
    summary: str
    paper: str
    url: str
    build: Builder
    options: Mapping[str, Any]
    kinds: Mapping[str, Any]
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    origin: Origin = OWN

    def resolve(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All options with their values: the defaults, then the preset's, then those given.

        Raises ``ValueError``, in one sentence that names what is allowed, for an unknown option, preset or value.
        """
        given = dict(options)
        preset = given.pop("preset", None)
        if preset is not None and preset not in self.presets:
            raise ValueError(refusal(f"preset of model {self.name!r}", preset, self.presets))
        for option in given:
            if option not in self.options:
                raise ValueError(refusal(f"option of model {self.name!r}", option, [*self.options, "preset"]))
        resolved = {**self.options, **(self.presets[preset] if preset is not None else {}), **given}
        for option, value in resolved.items():
            if not _fits(value, self.kinds[option]):
                raise ValueError(f"{option!r} of model {self.name!r} must be {self.allowed(option)}, not {value!r}.")
        return resolved

    def allowed(self, option: str) -> str:
        """What an option may be, in words."""
        return _words(self.kinds[option])


def model(
    name: str, *, summary: str, paper: str, url: str = "", presets: Mapping[str, Mapping[str, Any]]
) -> Callable[[Builder], ModelCard]:
    """Turns a builder into its card; the options, their defaults and what they may be are read from its signature.

    Options are annotated ``int``, ``float``, ``bool``, ``Sequence[...]`` of these, a union, or ``Literal[...]``.
    """

    def card(build: Builder) -> ModelCard:
        found = {k: p for k, p in signature(build, eval_str=True).parameters.items() if k not in _GIVEN}
        defaults = {k: p.default for k, p in found.items()}
        return ModelCard(
            name, summary, paper, url, build, defaults, {k: p.annotation for k, p in found.items()}, presets
        )

    return card


def refusal(what: str, got: object, allowed: Iterable[object]) -> str:
    """One sentence: ``got`` is no ``what``, perhaps another was meant, and these are allowed."""
    names = [str(a) for a in allowed]
    near = get_close_matches(str(got), names, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return f"{got!r} is no {what}: {meant}allowed: {', '.join(names)}."


def _fits(value: object, kind: Any) -> bool:
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in inside
    if origin is UnionType:
        return any(_fits(value, k) for k in inside)
    if origin is Sequence:
        return isinstance(value, list | tuple) and all(_fits(v, inside[0]) for v in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def _words(kind: Any) -> str:
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(repr(value) for value in inside)
    if origin is UnionType:
        return " or ".join(_words(k) for k in inside)
    return f"a list whose entries are each {_words(inside[0])}" if origin is Sequence else _WORDS[kind]
