"""Who trains, who tests, and at which simulated hospital a subject is: always by subject, fixed by a seed."""

import hashlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedscan.data.records import Case
from fedscan.data.skew import WAYS, whole

SPLITS = ("train", "validation", "test")


def generator(seed: int, *labels: str | int) -> np.random.Generator:
    """A NumPy generator fixed by a seed and what it is for: its state is a SHA-256 of both, never Python's hash."""
    digest = hashlib.sha256("\x1f".join(map(str, (seed, *labels))).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def split(cases: Iterable[Case], fractions: Sequence[float] = (0.7, 0.1, 0.2), seed: int = 0) -> dict[str, str]:
    """Gives each case "train", "validation" or "test", by subject, at each site on its own in the same fractions.

    At every site each split with a fraction above 0 has at least one subject; the others follow the fractions as
    closely as whole subjects can. Depends on the seed and the names of site and subjects only. Raises ValueError for
    fractions that do not sum to 1 and for a site with fewer subjects than splits.
    """
    shares = np.asarray(fractions, dtype=float)
    if shares.shape != (3,) or not (shares >= 0).all() or shares[0] <= 0 or abs(shares.sum() - 1) > 1e-6:
        raise ValueError(
            f"fractions = {tuple(fractions)}: three parts (train, validation, test) that sum to 1, with some training, "
            "were meant."
        )
    cases = list(cases)
    wanted = [name for name, share in zip(SPLITS, shares, strict=True) if share > 0]
    of_subject: dict[str, str] = {}
    for site, subjects in _subjects_by_site(cases).items():
        if len(subjects) < len(wanted):
            raise ValueError(
                f"Site {site!r} has {len(subjects)} subject(s), too few for one in each of {', '.join(wanted)}; "
                "leave the site out or join it with another."
            )
        rng = generator(seed, "split", site)
        order = rng.permutation(len(subjects))
        sizes = whole(len(subjects), shares, (shares > 0).astype(int), start=int(rng.integers(3)))
        names = np.repeat(SPLITS, sizes)
        of_subject |= {subjects[place]: str(name) for place, name in zip(order, names, strict=True)}
    return {case.name: of_subject[case.subject] for case in sorted(cases, key=lambda case: case.name)}


def partition(
    cases: Iterable[Case], how: str = "true", sites: int | None = None, seed: int = 0, **options: Any
) -> tuple[Case, ...]:
    """Returns the cases, in their order, at the sites of a simulated federation; no subject is ever at two sites.

    `how` is "true" (as they are), "dirichlet" (label skew: `classes`, `alpha`), "quantity" (`law`, `alpha` or
    `exponent`), "intensity" or "lesion-size" (neighbours in `values` share a site); all take `minimum`, the least
    number of subjects per site. `sites` is their number; they are named site-1 and so on, and the former name is kept
    as `extra["true_site"]`. Raises ValueError for whatever cannot be done.
    """
    cases = tuple(cases)
    by_site = _subjects_by_site(cases)
    if how == "true":
        if options or sites not in (None, len(by_site)):
            asked = f"{sites} sites" if sites not in (None, len(by_site)) else f"option {next(iter(options))!r}"
            raise ValueError(f"The true sites are {len(by_site)} and take no option; {asked} cannot be had.")
        return cases
    if how not in WAYS:
        raise ValueError(f"how = {how!r}: one of 'true', {', '.join(map(repr, WAYS))} was meant.")
    way = WAYS[how]
    _options_fit(how, way, options)
    subjects = sorted({case.subject for case in cases})
    least = options.get("minimum", 1)
    if type(sites) is not int or type(least) is not int or sites < 1 or least < 1:
        raise ValueError(f"sites = {sites!r}, minimum = {least!r}: whole numbers from 1 were meant.")
    if sites * least > len(subjects):
        raise ValueError(f"{sites} sites of at least {least} subject(s) need more than the {len(subjects)} there are.")
    place_of = way(subjects, sites, generator(seed, "partition", how), **options)
    width = len(str(sites))
    return tuple(
        replace(
            case,
            site=f"site-{place_of[case.subject] + 1:0{width}d}",
            extra={"true_site": case.site, **case.extra},
        )
        for case in cases
    )


def _subjects_by_site(cases: Iterable[Case]) -> dict[str, list[str]]:
    """Sorted subjects of each site, sites sorted; ValueError where there is no case or a subject is at two sites."""
    site_of: dict[str, str] = {}
    for case in cases:
        if site_of.setdefault(case.subject, case.site) != case.site:
            raise ValueError(f"Subject {case.subject!r} is at two sites, {site_of[case.subject]!r} and {case.site!r}.")
    if not site_of:
        raise ValueError("There is no case to divide.")
    by_site: dict[str, list[str]] = defaultdict(list)
    for subject, site in sorted(site_of.items(), key=lambda pair: pair[::-1]):
        by_site[site].append(subject)
    return dict(by_site)


def _options_fit(how: str, way: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raises ValueError unless every option is one that `way` has, and those without a default are given."""
    known = {name: p for name, p in inspect.signature(way).parameters.items() if p.kind is p.KEYWORD_ONLY}
    strange = sorted(options.keys() - known.keys())
    if strange:
        raise ValueError(f"Partition {how!r} has no option {strange[0]!r}; it has {', '.join(known)}.")
    lacking = [
        name for name, parameter in known.items() if parameter.default is parameter.empty and name not in options
    ]
    if lacking:
        raise ValueError(f"Partition {how!r} needs {lacking[0]!r}: a value for every subject.")
