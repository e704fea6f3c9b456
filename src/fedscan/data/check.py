"""Checks a manifest: which cases can be used, which cannot and why, and what each site has."""

import math
import statistics
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from fedscan.data.examine import TOLERANCE, Facts, Fault, Reason, examine
from fedscan.data.records import IGNORE, Case, Manifest

__all__ = ["Catalogue", "Reason", "SiteRow", "TooManyLeftOutError", "check"]


@dataclass(frozen=True)
class SiteRow:
    """What one site has: counts before and after the check, sequences among used cases, spacing and label volumes.

    `spacing` is the median over used cases, in mm by axis; `volumes` the median of each label's volume per labelled
    case, in mm cubed. NaN where no case was used.
    """

    site: str
    expected: int
    used: int
    subjects: int
    labelled: int
    sequences: dict[str, int]
    spacing: tuple[float, ...]
    volumes: dict[str, float]


@dataclass(frozen=True)
class Catalogue:
    """The outcome of a check: cases to use, cases left out with their reasons, and a row per site (sorted).

    `values` says in how many of the used cases each label value above 0 is found. `warnings` are sentences on what is
    declared and in no case that can be used, a label or a sequence, and on label values that nothing names.
    """

    used: tuple[Case, ...]
    left_out: tuple[tuple[Case, Reason], ...]
    sites: tuple[SiteRow, ...]
    warnings: tuple[str, ...] = ()
    values: Mapping[int, int] = field(default_factory=dict, hash=False)

    @property
    def expected(self) -> int:
        """The number of cases the manifest lists."""
        return len(self.used) + len(self.left_out)


class TooManyLeftOutError(ValueError):
    """More cases cannot be used than the study allows; `catalogue` says which and why."""

    def __init__(self, sentence: str, catalogue: Catalogue) -> None:
        """Keeps the catalogue beside the sentence."""
        super().__init__(sentence)
        self.catalogue = catalogue


def check(
    manifest: Manifest,
    require: Collection[str] = (),
    limit: float = 0.1,
    need_label: bool = True,
    tolerance: float = TOLERANCE,
) -> Catalogue:
    """Opens every file of every case and parts those that can be used from those that cannot, each with a reason.

    `require` names sequences that every case must have; `limit` is how much may be left out, as a fraction of the
    cases (float) or a number of them (int); `tolerance` is in mm. One case is in memory at a time. Raises
    TooManyLeftOutError (a ValueError that has the catalogue) beyond the limit or where no case is left, and ValueError
    for an unknown sequence in `require`.
    """
    unknown = sorted(set(require) - set(manifest.sequences))
    if unknown:
        raise ValueError(f"Sequence {unknown[0]!r} is required, but the cases have {', '.join(manifest.sequences)}.")
    allowed = _allowed(limit, len(manifest.cases))
    facts: dict[str, Facts] = {}
    left_out = []
    for case in manifest.cases:
        try:
            facts[case.name] = examine(case, manifest.labels, require, need_label, tolerance)
        except Fault as fault:
            left_out.append((case, fault.reason))
    used = tuple(case for case in manifest.cases if case.name in facts)
    rows = tuple(_site_row(manifest, site, facts) for site in manifest.sites)
    values = _values(facts)
    warnings = (*_unseen_sequences(manifest, used), *_unseen(manifest, facts), *_unnamed(manifest, values))
    catalogue = Catalogue(used, tuple(left_out), rows, warnings, values)
    if len(left_out) > allowed or not used:
        case, reason = left_out[0]
        raise TooManyLeftOutError(
            f"{manifest.root}: {len(left_out)} of {catalogue.expected} cases cannot be used, where the study allows "
            f"{allowed}; the first is {case.name!r} ({str(reason).rstrip('.')}).",
            catalogue,
        )
    return catalogue


def _allowed(limit: float, cases: int) -> int:
    """The number of cases that may be left out: `limit` itself if it is an int, else that fraction, rounded down."""
    if isinstance(limit, bool) or not math.isfinite(limit) or limit < 0 or (isinstance(limit, float) and limit > 1):
        raise ValueError(f"limit = {limit!r}: a fraction from 0.0 to 1.0, or a whole number of cases, was meant.")
    return limit if isinstance(limit, int) else math.floor(limit * cases + 1e-9)


def _unseen_sequences(manifest: Manifest, used: Collection[Case]) -> list[str]:
    """A warning for each declared sequence that no used case has."""
    return [
        f"Sequence {name!r} is in none of the {len(used)} cases that can be used: a study that reads it gets zeros."
        for name in manifest.sequences
        if used and all(case.images.get(name) is None for case in used)
    ]


def _unseen(manifest: Manifest, facts: Mapping[str, Facts]) -> list[str]:
    """A warning for each declared label that no label map has, where there is any."""
    volumes = [found.volumes for found in facts.values() if found.volumes is not None]
    return [
        f"Label {name!r} (value {value}) is in none of the {len(volumes)} label maps that can be used: is the value "
        "right? A model cannot learn it, and its scores would be undefined or 0."
        for name, value in manifest.labels.items()
        if name != IGNORE and volumes and not any(found.get(value) for found in volumes)
    ]


def _values(facts: Mapping[str, Facts]) -> dict[int, int]:
    """How many label maps hold each value above 0, by value."""
    found = Counter(value for of in facts.values() for value, size in (of.volumes or {}).items() if size)
    return dict(sorted(found.items()))


def _unnamed(manifest: Manifest, values: Mapping[int, int]) -> list[str]:
    """A warning where label maps hold values and nothing says what any value means."""
    if manifest.labels or not values:
        return []
    found = ", ".join(map(str, values))
    return [f"Nothing says what the label values {found} mean: name them in [task] labels of the study."]


def _site_row(manifest: Manifest, site: str, facts: Mapping[str, Facts]) -> SiteRow:
    """The row of one site, over its used cases."""
    cases = [case for case in manifest.cases if case.site == site]
    used = [case for case in cases if case.name in facts]
    spacings = [facts[case.name].spacing for case in used] or [(math.nan,) * 3]
    volumes = [found for case in used if (found := facts[case.name].volumes) is not None]
    values = sorted({value for found in volumes for value in found})
    sizes = {value: statistics.median(found.get(value, 0.0) for found in volumes) for value in values}
    names = manifest.labels or {str(value): value for value in values}
    return SiteRow(
        site=site,
        expected=len(cases),
        used=len(used),
        subjects=len({case.subject for case in used}),
        labelled=len(volumes),
        sequences={name: sum(case.images.get(name) is not None for case in used) for name in manifest.sequences},
        spacing=tuple(statistics.median(along) for along in zip(*spacings, strict=True)),
        volumes={name: sizes.get(value, math.nan) for name, value in names.items()},
    )
