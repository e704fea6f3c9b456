"""How much each update counts: one non-negative number per site. They are normalised where they are used."""

import math
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


def last_shares(state: Mapping[str, Any], shares: Mapping[str, float]) -> dict[str, float]:
    """What sites counted for when they last answered, to be held against ``shares``, which sum to 1 over a round.

    Shares of rounds in which others answered stand on another scale. They are brought to this round's by the sites in
    both; where there is none, nothing can be said of the last ones, and they are forgotten.
    """
    last, unheard = state.get("shares", {}), state.get("unheard", {})
    known = {**unheard, **last}
    if last.keys() == shares.keys():
        return known
    both = known.keys() & shares.keys()
    then = math.fsum(known[name] for name in both)
    scale = math.fsum(shares[name] for name in both) / then if then > 0 else 0.0
    return {name: share * scale for name, share in known.items()} if scale else {}


def with_shares(state: Mapping[str, Any], shares: Mapping[str, float]) -> dict[str, Any]:
    """The state with a round's "shares", parts of 1, and "unheard": on the same scale, those of sites not in it."""
    total = sum(shares.values())
    now = {name: s / total for name, s in shares.items()}
    unheard = {name: s for name, s in last_shares(state, now).items() if name not in now}
    rest = {key: value for key, value in state.items() if key != "unheard"}
    return {**rest, "shares": now, **({"unheard": unheard} if unheard else {})}
