"""How much each update counts: one non-negative number per site. They are normalised where they are used."""

from collections.abc import Callable, Mapping
from typing import Any

Updates = Mapping[str, Mapping[str, Any]]  # a site's reply by name; its "update" is decoded when it is looked at
Weigh = Callable[[Updates, Mapping[str, Any]], dict[str, float]]


def by_cases(updates: Updates, state: Mapping[str, Any]) -> dict[str, float]:
    """n_k: each update counts by the training cases behind it."""
    return {name: float(u["cases"]) for name, u in updates.items()}


def equally(updates: Updates, state: Mapping[str, Any]) -> dict[str, float]:
    """1 for every site."""
    return dict.fromkeys(updates, 1.0)
