"""Score rows as numbers with support: means with intervals, paired tests, and hospitals taken together.

An undefined score (None) is never averaged and always counted. Scores of one subject are averaged first, because they
are not independent; a subject belongs to its site, so that two hospitals may use one name. Values stay at the precision
they have; nothing here needs the scans.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedscan.ledger import ScoreRow
from fedscan.tasks.metrics import HD95, RANGES, SIZES

HIGHER_IS_BETTER = ("dice", "iou", "nsd", "precision", "recall")
NORMAL_95 = 1.959963984540054  # the 97.5th percentile of the standard normal distribution
MEDIAN_NEEDS = 50  # subjects; the usual bootstraps of a median fail below (André et al., MICCAI BRIDGE 2025)
EXACT_UP_TO = 50  # pairs; 2^50 sign patterns are still whole numbers in a float64

Unit = tuple[str, str]  # (site, subject)


@dataclass(frozen=True)
class Summary:
    """A mean with its 95 % interval and its support; None where too few are defined (1 for a mean, 2 for an interval).

    ``used``, ``total`` and ``undefined`` count scores, and in ``macro`` sites. ``subjects`` are those with a score.
    """

    mean: float | None
    low: float | None
    high: float | None
    used: int
    total: int
    undefined: int
    subjects: int

    def __str__(self) -> str:
        return f"{_shown(self.mean, self.low, self.high)} (n {self.used} / {self.total}, {self.undefined} undefined)"


@dataclass(frozen=True)
class Comparison:
    """The paired difference a - b over ``n`` subjects, with its 95 % bootstrap interval and the p value of ``test``."""

    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    n: int  # subjects
    test: str  # the name of the test as it was done, for the table
    undefined: int  # pairs of scores left out because one or both are undefined
    unmatched: int  # scores that only one of the two methods has

    def __str__(self) -> str:
        shown = _shown(self.difference, self.low, self.high)
        return f"{shown} (n {self.n}, {self.undefined} undefined, {self.unmatched} unmatched; {self.test})"


Estimate = TypeVar("Estimate", bound=Summary | Comparison)


@dataclass(frozen=True)
class SiteDifference:
    """What a site shares for ``random_effects``: subjects, and the mean and sample variance of their differences."""

    n: int
    mean: float | None
    variance: float | None  # None below two subjects


@dataclass(frozen=True)
class Combined:
    """One effect of all sites, with its 95 % interval, and how far the sites differ from each other."""

    effect: float | None
    low: float | None
    high: float | None
    p: float | None
    tau2: float  # variance of the effect between sites
    q: float  # Cochran's Q
    i2: float  # the share of the spread that chance does not explain, 0 to 1
    sites: int
    left_out: tuple[tuple[str, str], ...]  # (site, reason)


@dataclass(frozen=True)
class Detection:
    """Cases by whether the label is there at all: in both masks, the prediction only, the reference only, or none."""

    tp: int
    fp: int
    fn: int
    tn: int


def summarise(rows: Iterable[ScoreRow]) -> Summary:
    """Averages the rows of one metric within subjects, then over them, with the t interval of that mean.

    Rows may be of several labels, cases and sites, but of one metric, and each (site, case, label) once: ValueError.
    """
    checked = _checked(rows)
    means = _subject_means(checked)
    mean, low, high = _t_interval(list(means.values()))
    used = sum(row.value is not None for row in checked)
    return Summary(mean, low, high, used, len(checked), len(checked) - used, len(means))


def within(estimate: Estimate, metric: str, difference: bool = False) -> Estimate:
    """Cuts the interval of a mean (or of a ``difference`` of two) to the values that it can have, for showing.

    The true mean lies in both, so the shorter interval covers it as often. An unknown metric has no limits.
    """
    if estimate.low is None or estimate.high is None:
        return estimate
    least, most = RANGES.get(metric, (-math.inf, math.inf))
    if difference:
        least, most = least - most, most - least
    return replace(estimate, low=max(estimate.low, least), high=min(estimate.high, most))


def by_site(rows: Iterable[ScoreRow], metric: str) -> dict[str, Summary]:
    """Summarises one metric of each site where it was tested, in the order of their names."""
    groups: dict[str, list[ScoreRow]] = defaultdict(list)
    for row in rows:
        if row.metric == metric:
            groups[row.tested_at].append(row)
    return {site: summarise(groups[site]) for site in sorted(groups)}


def micro(rows: Iterable[ScoreRow], metric: str) -> Summary:
    """Averages one metric over all subjects, whatever their site: a large hospital counts for more."""
    return summarise(row for row in rows if row.metric == metric)


def macro(rows: Iterable[ScoreRow], metric: str) -> Summary:
    """Averages the means of the sites: every hospital counts the same. The counts and the t interval are of sites."""
    sites = by_site(rows, metric).values()
    means = [site.mean for site in sites if site.mean is not None]
    subjects = sum(site.subjects for site in sites)
    return Summary(*_t_interval(means), len(means), len(sites), len(sites) - len(means), subjects)


def worst(rows: Iterable[ScoreRow], metric: str) -> tuple[str, Summary] | None:
    """Finds the site with the worst mean: lowest, but highest for a distance, farthest from 0 for a volume error.

    None where no site has a mean. Raises ValueError for a metric without better or worse, as a volume.
    """
    summaries = by_site(rows, metric)
    badness = {site: _badness(metric, s.mean) for site, s in summaries.items() if s.mean is not None}
    if not badness:
        return None
    site = max(badness, key=lambda name: badness[name])
    return site, summaries[site]


def median(rows: Iterable[ScoreRow]) -> Summary:
    """Takes the median over subjects of one metric (as ``mean``), with the interval of its order statistics.

    The interval runs between two subjects' values and needs no assumption. Raises ValueError below 50 subjects.
    """
    from scipy.stats import binom

    checked = _checked(rows)
    values = np.sort(list(_subject_means(checked).values()))
    n = len(values)
    if n < MEDIAN_NEEDS:
        raise ValueError(
            f"An interval of a median needs {MEDIAN_NEEDS} subjects or more to be trusted, here are {n}; give the mean."
        )
    rank = int(binom.ppf(0.025, n, 0.5))  # P(fewer than `rank` values lie below the median) < 2.5 %
    used = sum(row.value is not None for row in checked)
    interval = float(np.median(values)), float(values[rank - 1]), float(values[n - rank])
    return Summary(*interval, used, len(checked), len(checked) - used, n)


def detection(rows: Iterable[ScoreRow]) -> dict[str, Detection]:
    """Counts for each label how often prediction and reference have it, from the rows of the masks' sizes."""
    sizes: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    names = {name: side for mine, theirs, _ in SIZES.values() for name, side in ((mine, "p"), (theirs, "r"))}
    kept = [row for row in rows if row.metric in names]
    for metric in names:
        _checked(row for row in kept if row.metric == metric)
    for row in kept:
        if row.value is not None:
            sizes[row.label, row.tested_at, row.case][names[row.metric]] = row.value
    counts: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for (label, site, case), size in sizes.items():
        if len(size) < 2:
            raise ValueError(f"Case {case} of {site} has the size of one mask of '{label}' only; both are needed.")
        counts[label].append((size["p"] > 0, size["r"] > 0))
    kinds = ((True, True), (True, False), (False, True), (False, False))
    return {label: Detection(*(seen.count(kind) for kind in kinds)) for label, seen in sorted(counts.items())}


def paired(
    a_rows: Iterable[ScoreRow], b_rows: Iterable[ScoreRow], metric: str, seed: int = 0, draws: int = 2000
) -> Comparison:
    """Compares two methods on the same cases: the mean over subjects of a - b, with an interval and a test.

    Rows are matched by (site, case, label) and averaged within subject. The test is Wilcoxon's signed rank. The
    interval is of a bootstrap that draws sites, then subjects of a site, so that it speaks of other hospitals too, as
    far as a few hospitals can. Raises ValueError where a case stands twice, or has two subjects.
    """
    sites, undefined, unmatched = _differences(a_rows, b_rows, metric)
    values = np.array([value for subjects in sites.values() for value in subjects.values()])
    if not len(values):
        return Comparison(None, None, None, None, 0, "no pairs", undefined, unmatched)
    p, test = _signed_rank(values)
    low, high = _bootstrap([np.array(list(s.values())) for s in sites.values()], seed, draws)
    return Comparison(float(values.mean()), low, high, p, len(values), test, undefined, unmatched)


def paired_by_site(
    a_rows: Iterable[ScoreRow], b_rows: Iterable[ScoreRow], metric: str, seed: int = 0, draws: int = 2000
) -> dict[str, Comparison]:
    """Compares two methods as ``paired`` does, at each site by itself."""
    a, b = list(a_rows), list(b_rows)
    names = sorted({row.tested_at for row in (*a, *b) if row.metric == metric})
    return {
        name: paired(
            [row for row in a if row.tested_at == name],
            [row for row in b if row.tested_at == name],
            metric,
            seed,
            draws,
        )
        for name in names
    }


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Corrects p values for being many (Holm, 1979), in their order; None, a test that was not done, does not count."""
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for done, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - done)))
        corrected[place] = largest
    return corrected


def site_differences(a_rows: Iterable[ScoreRow], b_rows: Iterable[ScoreRow], metric: str) -> dict[str, SiteDifference]:
    """Reduces the paired differences a - b of each site to number, mean and variance over its subjects."""
    sites, _, _ = _differences(a_rows, b_rows, metric)
    reduced = {}
    for name, subjects in sites.items():
        values = np.array(list(subjects.values()))
        variance = float(values.var(ddof=1)) if len(values) > 1 else None
        reduced[name] = SiteDifference(len(values), float(values.mean()), variance)
    return reduced


def random_effects(sites: Mapping[str, SiteDifference]) -> Combined:
    """Combines the mean differences of sites whose true differences may vary (DerSimonian and Laird, 1986).

    It needs three numbers of each site, no case. A site without a variance, or with none but 0, has no weight: it is
    left out by name. With few sites the interval, which is of a normal distribution, is on the narrow side.
    """
    left_out, effects, weights = [], [], []
    for name, site in sorted(sites.items()):
        if site.mean is None or site.variance is None:
            left_out.append((name, f"too few subjects for a variance ({site.n})"))
        elif site.variance <= 0:
            left_out.append((name, "all its differences are equal"))
        else:
            effects.append(site.mean)
            weights.append(site.n / site.variance)
    if not effects:
        return Combined(None, None, None, None, 0.0, 0.0, 0.0, 0, tuple(left_out))
    y, w = np.array(effects), np.array(weights)
    k = len(y)
    q = float((w * (y - np.average(y, weights=w)) ** 2).sum())
    spread = float(w.sum() - (w**2).sum() / w.sum())
    tau2 = max(0.0, (q - (k - 1)) / spread) if k > 1 else 0.0
    both = 1 / (1 / w + tau2)  # the inverse of the variance within and between sites
    effect, error = float(np.average(y, weights=both)), float(both.sum() ** -0.5)
    p = math.erfc(abs(effect) / error / math.sqrt(2))
    i2 = max(0.0, (q - (k - 1)) / q) if q > 0 else 0.0
    return Combined(effect, effect - NORMAL_95 * error, effect + NORMAL_95 * error, p, tau2, q, i2, k, tuple(left_out))


def _checked(rows: Iterable[ScoreRow]) -> list[ScoreRow]:
    """Lists the rows; refuses two metrics, a score that stands twice, and a value that is no number."""
    checked = list(rows)
    if len(metrics := sorted({row.metric for row in checked})) > 1:
        raise ValueError(f"One mean of {' and '.join(metrics)} says nothing; choose the rows of one metric.")
    seen: dict[tuple[str, str, str], ScoreRow] = {}
    for row in checked:
        key = (row.tested_at, row.case, row.label)
        if key in seen:
            first, second = (f"round {r.round} trained at {r.trained_at}" for r in (seen[key], row))
            raise ValueError(
                f"Case {row.case} of {row.tested_at} has {row.metric} of '{row.label}' twice ({first}; {second}); "
                f"choose the rows of one model first."
            )
        seen[key] = row
        if row.value is not None and not math.isfinite(row.value):
            raise ValueError(f"Case {row.case} of {row.tested_at} has {row.metric} {row.value}; undefined is None.")
    return checked


def _subject_means(rows: Iterable[ScoreRow]) -> dict[Unit, float]:
    """Averages the defined values of each subject; one with none is not in the result. Sorted by site and subject."""
    values: dict[Unit, list[float]] = defaultdict(list)
    for row in rows:
        if row.value is not None:
            values[row.tested_at, row.subject].append(row.value)
    return {unit: math.fsum(values[unit]) / len(values[unit]) for unit in sorted(values)}


def _t_interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Takes the mean of independent values, and its 95 % interval by Student's t from two values on."""
    if not values:
        return None, None, None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None, None
    from scipy.special import stdtrit

    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(stdtrit(len(values) - 1, 0.975)) * error
    return mean, mean - half, mean + half


def _differences(
    a_rows: Iterable[ScoreRow], b_rows: Iterable[ScoreRow], metric: str
) -> tuple[dict[str, dict[str, float]], int, int]:
    """Matches two methods' rows: {site: {subject: mean a - b}}, the undefined pairs, the scores without partner."""
    a, b = (
        {(row.tested_at, row.case, row.label): row for row in _checked(r for r in rows if r.metric == metric)}
        for rows in (a_rows, b_rows)
    )
    values: dict[Unit, list[float]] = defaultdict(list)
    undefined = 0
    for key in sorted(a.keys() & b.keys()):
        one, two = a[key], b[key]
        if one.subject != two.subject:
            raise ValueError(f"Case {one.case} of {key[0]} is of subject {one.subject} and of {two.subject}; which?")
        if one.value is None or two.value is None:
            undefined += 1
        else:
            values[one.tested_at, one.subject].append(one.value - two.value)
    sites: dict[str, dict[str, float]] = defaultdict(dict)
    for site, subject in sorted(values):
        # Rounded, so that 0.8 - 0.7 and 0.9 - 0.8 are the same difference to a test on ranks.
        sites[site][subject] = round(math.fsum(values[site, subject]) / len(values[site, subject]), 12)
    return dict(sites), undefined, len(a.keys() ^ b.keys())


def _signed_rank(differences: NDArray[np.float64]) -> tuple[float, str]:
    """Tests whether differences are symmetric about 0 (Wilcoxon, 1945); zeros are dropped. Gives p and the test's name.

    Up to 50 differences the distribution is counted out, ties and all (scipy's exact method holds without ties only);
    above, scipy's normal approximation.
    """
    from scipy.stats import rankdata, wilcoxon

    d = differences[differences != 0]
    zeros = f", zeros dropped: {len(differences) - len(d)}" if len(d) < len(differences) else ""
    if not len(d):
        return 1.0, "Wilcoxon signed rank, all differences are zero"
    if len(d) > EXACT_UP_TO:
        return float(wilcoxon(d).pvalue), f"Wilcoxon signed rank, normal approximation{zeros}"
    ranks = np.rint(2 * rankdata(np.abs(d))).astype(int)  # doubled, because tied ranks are halves
    ways = np.zeros(ranks.sum() + 1)  # ways[s]: the sign patterns whose positive ranks add up to s
    ways[0] = 1
    for rank in ranks:
        ways[rank:] = ways[rank:] + ways[:-rank]
    smaller = min(ranks[d > 0].sum(), ranks[d < 0].sum())
    return min(1.0, 2 * float(ways[: smaller + 1].sum()) / 2.0 ** len(d)), f"Wilcoxon signed rank, exact{zeros}"


def _bootstrap(sites: Sequence[NDArray[np.float64]], seed: int, draws: int) -> tuple[float | None, float | None]:
    """Draws sites, then subjects of each drawn site, ``draws`` times: the middle 95 % of the means over subjects."""
    if sum(map(len, sites)) < 2:
        return None, None
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(sites), size=(draws, len(sites)))
    totals, counts = np.zeros(draws), np.zeros(draws)
    for number, values in enumerate(sites):
        draw, _ = np.nonzero(chosen == number)
        resampled = values[rng.integers(len(values), size=(len(draw), len(values)))]
        np.add.at(totals, draw, resampled.sum(axis=1))
        np.add.at(counts, draw, len(values))
    low, high = np.quantile(totals / counts, [0.025, 0.975])
    return float(low), float(high)


def _badness(metric: str, mean: float) -> float:
    """Turns a mean into a number that is larger the worse it is."""
    if metric in HIGHER_IS_BETTER:
        return -mean
    if metric in (*HD95, "volume_error"):
        return abs(mean)
    raise ValueError(f"'{metric}' has no better or worse, so no worst site; choose a score such as dice or hd95.")


def _shown(middle: float | None, low: float | None, high: float | None) -> str:
    if middle is None:
        return "undefined"
    return f"{middle:.3f}" if low is None or high is None else f"{middle:.3f} [{low:.3f}, {high:.3f}]"
