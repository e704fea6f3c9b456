"""Deals subjects to simulated hospitals of unlike labels, sizes, intensities or lesions."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def by_dirichlet(
    subjects: Sequence[str],
    sites: int,
    rng: np.random.Generator,
    *,
    classes: Mapping[str, str | int],
    alpha: float = 0.5,
    minimum: int = 1,
) -> dict[str, int]:
    """Deals each class's subjects to the sites in proportions drawn from Dir(alpha) (Li et al., ICDE 2022, NIID-Bench).

    `classes` gives each subject's class (dominant label, or quantile of a volume); a small `alpha` makes sites of few
    classes, infinity makes them alike. A site below `minimum` takes subjects from the largest, of its commonest class.
    """
    _complete("classes", classes, subjects)
    _positive("alpha", alpha)
    places: dict[str, int] = {}
    for label in sorted({str(classes[subject]) for subject in subjects}):
        members = _shuffled([subject for subject in subjects if str(classes[subject]) == label], rng)
        sizes = whole(len(members), _dirichlet(alpha, sites, rng), start=int(rng.integers(sites)))
        places |= dict(zip(members, np.repeat(range(sites), sizes).tolist(), strict=True))
    while True:
        counts = Counter(places.values())
        short = next((site for site in range(sites) if counts[site] < minimum), None)
        if short is None:
            return places
        largest = max(range(sites), key=lambda site: (counts[site], -site))
        held = [subject for subject in sorted(places) if places[subject] == largest]
        commonest, _ = Counter(str(classes[subject]) for subject in held).most_common(1)[0]
        places[next(subject for subject in held if str(classes[subject]) == commonest)] = short


def by_quantity(
    subjects: Sequence[str],
    sites: int,
    rng: np.random.Generator,
    *,
    law: str = "dirichlet",
    alpha: float = 0.5,
    exponent: float = 1.0,
    minimum: int = 1,
) -> dict[str, int]:
    """Deals subjects at random to sites of unequal size: shares from Dir(alpha), or k^-exponent for site k ("power").

    Every site has `minimum` subjects first; the rest follow the shares.
    """
    if law not in ("dirichlet", "power"):
        raise ValueError(f"law = {law!r}: 'dirichlet' or 'power' was meant.")
    if law == "dirichlet":
        _positive("alpha", alpha)
        shares = _dirichlet(alpha, sites, rng)
    else:
        if not (math.isfinite(exponent) and exponent >= 0):
            raise ValueError(f"exponent = {exponent!r}: a number from 0 (equal sites) was meant.")
        shares = np.arange(1, sites + 1, dtype=float) ** -exponent
    sizes = minimum + whole(len(subjects) - minimum * sites, shares)
    return dict(zip(_shuffled(subjects, rng), np.repeat(range(sites), sizes).tolist(), strict=True))


def by_value(
    subjects: Sequence[str],
    sites: int,
    rng: np.random.Generator,
    *,
    values: Mapping[str, float],
    minimum: int = 1,
) -> dict[str, int]:
    """Sorts subjects by a number of theirs and cuts the row into sites of equal size, the lowest values at site 1.

    The seed plays no part. `values` may be the mean intensity or the lesion volume of each subject (`signature`).
    """
    _complete("values", values, subjects)
    if any(not math.isfinite(values[subject]) for subject in subjects):
        bad = next(subject for subject in subjects if not math.isfinite(values[subject]))
        raise ValueError(f"The value of subject {bad!r} is {values[bad]}; a number was meant.")
    order = sorted(subjects, key=lambda subject: (values[subject], subject))
    return {subject: place * sites // len(order) for place, subject in enumerate(order)}


WAYS: dict[str, Callable[..., dict[str, int]]] = {
    "dirichlet": by_dirichlet,
    "quantity": by_quantity,
    "intensity": by_value,
    "lesion-size": by_value,
}


def whole(total: int, shares: Any, least: Any = 0, start: int = 0) -> Any:
    """Whole numbers that sum to `total` in the proportions of `shares`, by largest remainder, none below `least`.

    Equal remainders are served from index `start` on, so that ties need not always favour the first.
    """
    shares = np.asarray(shares, dtype=float)
    exact = total * shares / shares.sum()
    sizes = np.floor(exact + 1e-9).astype(int)
    rest = exact - sizes
    turn = (np.arange(len(shares)) - start) % len(shares)
    order = np.lexsort((turn, -np.round(rest, 9)))
    sizes[order[: total - sizes.sum()]] += 1
    least = np.broadcast_to(least, sizes.shape)
    while (sizes < least).any():
        sizes[np.argmax(sizes - least)] -= 1
        sizes[np.argmax(least - sizes)] += 1
    return sizes


def _dirichlet(alpha: float, sites: int, rng: np.random.Generator) -> Any:
    """Shares of `sites` from Dir(alpha), equal for a boundless alpha."""
    if alpha > 1e9:  # nothing to draw, and NumPy's sum would overflow
        return np.full(sites, 1 / sites)
    return rng.dirichlet(np.full(sites, alpha))


def _shuffled(subjects: Sequence[str], rng: np.random.Generator) -> list[str]:
    return [subjects[place] for place in rng.permutation(len(subjects))]


def _complete(name: str, given: Mapping[str, Any], subjects: Sequence[str]) -> None:
    missing = [subject for subject in subjects if subject not in given]
    if missing:
        raise ValueError(f"{name} has nothing for {len(missing)} subject(s), first {missing[0]!r}.")


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} = {value!r}: a number above 0 was meant.")
