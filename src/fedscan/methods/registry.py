"""The table of all methods: fedscan's own, and those of installed packages.

A package adds methods by an entry point of the group "fedscan.methods" that names a function decorated with
``@card``. Nothing is imported because a message or a study's file says so: only installed packages are looked at.
"""

from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

from fedscan.methods import alone, asynchronous, averages, peers, scaffold, segnet, travelling
from fedscan.methods.card import Card, Entry, Reduction, card, refusal
from fedscan.plugins import loaded, offered, origin_of

__all__ = ["Card", "Entry", "Reduction", "card", "get", "methods"]

GROUP = "fedscan.methods"
FAMILIES = (averages, scaffold, travelling, peers, asynchronous, alone, segnet)


def methods() -> dict[str, Entry[Any]]:
    """Every method's entry by name, fedscan's own first.

    ValueError where two packages bring the same name, or an entry point is not a method with a card.
    """
    own = [v for family in FAMILIES for v in vars(family).values() if isinstance(v, Entry)]
    found: dict[str, Entry[Any]] = {}
    for entry in [*own, *(plug_in(point) for point in offered(GROUP))]:
        name = entry.card.name
        if name in found and found[name] is not entry:
            raise ValueError(f"two packages bring a method {name!r}: {found[name].package} and {entry.package}")
        found[name] = entry
    return found


def get(name: str) -> Entry[Any]:
    """The entry of the method ``name``. ValueError, naming what there is, for a name that no method has."""
    found = methods()
    if name not in found:
        raise ValueError(refusal("method", name, found))
    return found[name]


def plug_in(point: EntryPoint) -> Entry[Any]:
    """The method that an installed package offers, with where it comes from and the SHA-256 of its source."""
    entry = loaded(point)
    if not isinstance(entry, Entry):
        raise ValueError(f"the entry point {point.value!r} of group {GROUP!r} is not a function decorated with @card")
    return replace(entry, **origin_of(point, entry.function)._asdict())
