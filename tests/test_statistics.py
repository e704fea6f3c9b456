"""Means, intervals and tests of score rows, with numbers worked out by hand."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from fedscan.ledger import ScoreRow
from fedscan.statistics import (
    Comparison,
    Detection,
    SiteDifference,
    Summary,
    by_site,
    detection,
    holm,
    macro,
    median,
    micro,
    paired,
    paired_by_site,
    random_effects,
    site_differences,
    summarise,
    within,
    worst,
)

T1, T2 = 12.706204736, 4.30265273  # the 97.5th percentile of Student's t with 1 and with 2 degrees of freedom


def row(value, site="A", subject="s1", case=None, label="tumour", metric="dice", **more):
    fields = {"round": 3, "split": "test", "trained_at": "federation", **more}
    return ScoreRow(
        tested_at=site, case=case or subject, subject=subject, label=label, metric=metric, value=value, **fields
    )


def rows(site, values, metric="dice"):
    return [row(value, site, f"s{number}", metric=metric) for number, value in enumerate(values)]


def close(x):
    return pytest.approx(x, rel=1e-6, abs=1e-9)


# --- means


def test_the_interval_of_a_mean_is_that_of_student():
    found = summarise(rows("A", [1.0, 2.0, 3.0]))
    half = T2 * 1.0 / np.sqrt(3)
    assert found == Summary(close(2.0), close(2 - half), close(2 + half), 3, 3, 0, 3)


def test_an_undefined_score_is_counted_and_never_averaged():
    found = summarise(rows("A", [0.8, None, 0.6]))
    assert found == Summary(close(0.7), close(0.7 - T1 * 0.1), close(0.7 + T1 * 0.1), 2, 3, 1, 2)
    assert str(found) == "0.700 [-0.571, 1.971] (n 2 / 3, 1 undefined)"


@pytest.mark.parametrize(
    ("metric", "values", "low", "high"),
    [
        ("dice", [0.8, 0.6], 0.0, 1.0),  # 0.7 -+ 12.7 * 0.1
        ("dice", [0.5, 0.6, 0.7], 0.6 - T2 * 0.1 / 3**0.5, 0.6 + T2 * 0.1 / 3**0.5),  # 0.35 to 0.85: nothing to cut
        ("nsd", [0.9, 1.0, 0.8], 0.9 - T2 * 0.1 / 3**0.5, 1.0),
        ("hd95", [1.0, 3.0], 0.0, 2.0 + T1),
        ("volume_error", [-0.9, -0.7], -1.0, -0.8 + T1 * 0.1),
        ("volume_ml", [1.0, 3.0], 0.0, 2.0 + T1),
        ("accuracy", [0.8, 0.6], 0.7 - T1 * 0.1, 0.7 + T1 * 0.1),  # of somebody's own task: no range is known
    ],
)
def test_a_shown_interval_ends_where_the_score_does(metric, values, low, high):
    whole = summarise(rows("A", values, metric))
    assert within(whole, metric) == replace(whole, low=close(low), high=close(high))


def test_the_interval_of_a_difference_ends_at_one_both_ways():
    """Of 0.2 and -0.4, the mean is -0.1 and the half width 12.7 * 0.3; a difference below 0 is not cut at 0."""
    wide, narrow = summarise(rows("A", [0.2, -0.4])), summarise(rows("A", [-0.1, -0.12]))
    found = within(wide, "dice", difference=True)
    assert (found.low, found.high) == (-1.0, 1.0)
    found = within(narrow, "dice", difference=True)
    assert (found.low, found.high) == (close(-0.11 - T1 * 0.01), close(-0.11 + T1 * 0.01))
    alone = summarise(rows("A", [0.4]))
    assert within(alone, "dice") == alone


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], Summary(None, None, None, 0, 0, 0, 0)),
        ([None], Summary(None, None, None, 0, 1, 1, 0)),
        ([0.4], Summary(0.4, None, None, 1, 1, 0, 1)),
    ],
)
def test_too_few_scores_for_a_mean_or_an_interval(values, expected):
    assert summarise(rows("A", values)) == expected


def test_nothing_defined_is_printed_as_such():
    assert str(summarise(rows("A", [None, None]))) == "undefined (n 0 / 2, 2 undefined)"


def test_scores_of_one_subject_are_averaged_first():
    scores = [row(0.5, subject="x", case="x1"), row(0.7, subject="x", case="x2"), row(0.8, subject="y")]
    found = summarise(scores)
    assert (found.mean, found.used, found.subjects) == (close(0.7), 3, 2)
    assert found.high == close(0.7 + T1 * 0.1)


def test_labels_of_one_case_are_no_new_subjects():
    found = summarise([row(0.5, label="a"), row(0.9, label="b"), row(None, label="c")])
    assert found == Summary(close(0.7), None, None, 2, 3, 1, 1)


def test_one_name_at_two_hospitals_is_two_subjects():
    assert summarise([row(0.2, "A", "x"), row(0.4, "B", "x")]).subjects == 2


def test_macro_counts_hospitals_and_micro_counts_subjects():
    scores = rows("A", [0.9, 0.9, 0.9]) + rows("B", [0.5]) + rows("C", [None]) + rows("A", [7.0], "hd95")
    assert {site: s.mean for site, s in by_site(scores, "dice").items()} == {"A": close(0.9), "B": 0.5, "C": None}
    assert micro(scores, "dice").mean == close(0.8)
    half = T1 * 0.2  # the means 0.9 and 0.5 have the standard error 0.2
    assert macro(scores, "dice") == Summary(close(0.7), close(0.7 - half), close(0.7 + half), 2, 3, 1, 4)


def test_the_worst_site_is_lowest_in_dice_highest_in_distance_and_farthest_from_no_volume_error():
    values = {
        "A": {"dice": 0.9, "hd95": 3.0, "volume_error": 0.1},
        "B": {"dice": 0.5, "hd95": 2.0, "volume_error": -0.4},
    }
    scores = [row(v, site, metric=m) for site, of_site in values.items() for m, v in of_site.items()]
    scores += [row(None, "C", metric=m) for m in values["A"]]
    found = {metric: worst(scores, metric) for metric in values["A"]}
    assert {m: site for m, (site, _) in found.items()} == {"dice": "B", "hd95": "A", "volume_error": "B"}
    assert found["dice"][1].mean == 0.5
    assert worst(rows("C", [None]), "dice") is None
    with pytest.raises(ValueError, match="'volume_ml' has no better or worse"):
        worst([row(3.0, metric="volume_ml")], "volume_ml")


def test_a_median_needs_fifty_subjects():
    values = [float(v) for v in range(1, 51)]
    found = median(rows("A", [*values, None]))
    assert found == Summary(25.5, 18.0, 33.0, 50, 51, 1, 50)  # ranks 18 and 33: 96.7 % of the sign test's distribution
    with pytest.raises(ValueError, match="needs 50 subjects or more to be trusted, here are 49"):
        median(rows("A", values[1:]))


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        ([row(0.1), row(2.0, metric="hd95")], "One mean of dice and hd95 says nothing"),
        (
            [row(0.1), row(0.2, trained_at="B")],
            r"A has dice of 'tumour' twice \(round 3 trained at federation; round 3",
        ),
        ([row(0.1)] * 2, "twice"),
        ([row(float("nan"))], "dice nan; undefined is None"),
        ([row(float("inf"), metric="hd95")], "hd95 inf; undefined is None"),
    ],
)
def test_rows_that_cannot_be_averaged_are_refused(scores, sentence):
    with pytest.raises(ValueError, match=sentence):
        summarise(scores)


def test_detection_counts_cases_by_who_sees_the_label():
    sizes = {"c1": (2.0, 1.0), "c2": (0.5, 0.0), "c3": (0.0, 3.0), "c4": (0.0, 0.0), "c5": (0.0, 0.0)}
    scores = [
        row(value, subject=case, metric=metric)
        for case, pair in sizes.items()
        for metric, value in zip(("volume_ml", "reference_ml"), pair, strict=True)
    ]
    scores += [row(0.0, label="flat", metric="area_cm2"), row(2.0, label="flat", metric="reference_cm2"), row(0.4)]
    assert detection(scores) == {"flat": Detection(0, 0, 1, 0), "tumour": Detection(1, 1, 1, 2)}
    with pytest.raises(ValueError, match="Case c1 of A has the size of one mask of 'tumour' only"):
        detection(scores[:1])


# --- two methods


def test_a_comparison_is_paired_by_case():
    a = rows("A", [0.9, 0.5, 0.7, 0.9]) + rows("B", [0.6])
    b = rows("A", [0.8, 0.3, 0.4, 0.5]) + rows("B", [0.1])
    found = paired(a[::-1], b, "dice")
    assert found.difference == close(0.3)
    assert (found.n, found.undefined, found.unmatched) == (5, 0, 0)
    assert (found.p, found.test) == (2 / 32, "Wilcoxon signed rank, exact")  # all five the same way: 2 of 32 patterns
    assert found.low is not None
    assert 0.1 <= found.low < 0.3 < found.high <= 0.5


def test_swapping_the_methods_turns_the_sign():
    rng = np.random.default_rng(4)
    a, b = (rows("A", rng.random(9)) + rows("B", rng.random(7)) for _ in range(2))
    one, other = paired(a, b, "dice"), paired(b, a, "dice")
    assert (one.difference, one.low, one.high, one.p) == (
        close(-other.difference), close(-other.high), close(-other.low), close(other.p),
    )  # fmt: skip


def test_scores_without_a_partner_and_undefined_scores_are_counted():
    a = rows("A", [0.5, None, 0.7, 0.9]) + rows("C", [0.1])
    b = rows("A", [0.4, 0.6, None])
    found = paired(a, b, "dice")
    assert (found.difference, found.n, found.undefined, found.unmatched) == (close(0.1), 1, 2, 2)
    assert (found.low, found.p) == (None, 1.0)
    nothing = paired(a, rows("D", [0.3]), "dice")
    assert nothing == Comparison(None, None, None, None, 0, "no pairs", 0, 6)
    assert str(nothing) == "undefined (n 0, 0 undefined, 6 unmatched; no pairs)"


def test_a_subject_with_many_cases_counts_once():
    a = [row(0.9, subject="x", case="x1"), row(0.7, subject="x", case="x2"), row(0.5, subject="y")]
    b = [row(0.4, subject="x", case="x1"), row(0.4, subject="x", case="x2"), row(0.5, subject="y")]
    found = paired(a, b, "dice")
    assert (found.difference, found.n) == (close(0.2), 2)  # x: (0.5 + 0.3) / 2, y: 0
    assert found.test == "Wilcoxon signed rank, exact, zeros dropped: 1"


def test_a_case_of_two_subjects_is_refused():
    with pytest.raises(ValueError, match="Case c of A is of subject x and of y"):
        paired([row(0.1, subject="x", case="c")], [row(0.1, subject="y", case="c")], "dice")


def test_each_site_is_compared_by_itself():
    a = rows("A", [0.5, 0.6]) + rows("B", [0.9])
    b = rows("A", [0.4, 0.3]) + rows("C", [0.2])
    found = paired_by_site(iter(a), iter(b), "dice")
    assert {site: (c.difference, c.n, c.unmatched) for site, c in found.items()} == {
        "A": (close(0.2), 2, 0),
        "B": (None, 0, 1),
        "C": (None, 0, 1),
    }


# --- Wilcoxon's signed rank


def signed_rank(*differences):
    base = [float(number) for number in range(len(differences))]
    shifted = [b + d for b, d in zip(base, differences, strict=True)]
    return paired(rows("A", shifted), rows("A", base), "dice", draws=2)


def by_enumeration(ranks, differences):
    """Two-sided p over all sign patterns of the ranks: twice the share with a sum at most the smaller one seen."""
    positive = sum(r for r, d in zip(ranks, differences, strict=True) if d > 0)
    smaller = min(positive, sum(ranks) - positive)
    sums = [
        sum(r for r, s in zip(ranks, signs, strict=True) if s) for signs in itertools.product((0, 1), repeat=len(ranks))
    ]
    return min(1.0, 2 * sum(s <= smaller for s in sums) / len(sums))


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ((1, 2, 3, 4, 5), 2 / 32),
        ((-1, 2, 3, 4, 5), 4 / 32),  # sums 0 and 1: two patterns, twice
        ((1, 1, 1), 2 / 8),  # three tied ranks of 2
        ((1, 1, -1), 1.0),
        ((1, 1, -2, 4), by_enumeration((1.5, 1.5, 3, 4), (1, 1, -2, 4))),
        ((0, 0, 3, 5), 2 / 4),
    ],
)
def test_the_exact_test_by_hand(differences, p):
    assert signed_rank(*differences).p == close(p)


def test_the_exact_test_is_scipys_where_nothing_is_tied():
    from scipy.stats import wilcoxon

    rng = np.random.default_rng(0)
    for n in (6, 20, 50):
        differences = np.round(rng.normal(0.3, 1, n), 6)
        assert len(set(np.abs(differences))) == n
        found = signed_rank(*differences)
        assert (found.p, found.test) == (
            close(wilcoxon(differences, method="exact").pvalue),
            "Wilcoxon signed rank, exact",
        )


def test_more_than_fifty_pairs_use_the_approximation_and_say_so():
    from scipy.stats import wilcoxon

    differences = np.round(np.random.default_rng(1).normal(0.3, 1, 60), 6)
    found = signed_rank(*differences)
    assert found.p == close(wilcoxon(differences).pvalue)
    assert found.test == "Wilcoxon signed rank, normal approximation"


def test_equal_methods_differ_by_nothing():
    found = signed_rank(0, 0, 0)
    assert (found.difference, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)
    assert found.test == "Wilcoxon signed rank, all differences are zero"


def test_rounding_does_not_break_a_tie():
    a, b = rows("A", [0.8, 0.9, 0.3]), rows("A", [0.7, 0.8, 0.4])  # 0.1, 0.1 and -0.1, but for the last bits
    assert paired(a, b, "dice").p == 1.0


# --- the bootstrap over hospitals


def against_zero(*sites):
    a = [r for name, values in zip("ABCDE", sites, strict=False) for r in rows(name, values)]
    return a, [row(0.0, r.tested_at, r.subject) for r in a]


def test_the_bootstrap_draws_hospitals_first():
    # Inside a hospital nothing varies, so only the draw of hospitals does: 0.1, 0.2 or 0.3, the outer ones at 25 %.
    found = paired(*against_zero([0.1] * 9, [0.3] * 9), "dice")
    assert (found.low, found.high) == (close(0.1), close(0.3))


def test_the_bootstrap_draws_subjects_of_a_hospital():
    found = paired(*against_zero([0.0, 1.0]), "dice")  # 0, 0.5 or 1, the outer ones at 25 %
    assert (found.low, found.high) == (0.0, 1.0)


def test_the_bootstrap_agrees_with_one_written_as_a_loop():
    rng = np.random.default_rng(7)
    sites = [rng.normal(mean, 0.1, n) for mean, n in ((0.0, 4), (0.1, 12), (0.2, 7), (0.3, 1))]
    found = paired(*against_zero(*sites), "dice", seed=1, draws=20000)
    means = []
    for _ in range(5000):
        drawn = [sites[s] for s in rng.integers(4, size=4)]
        means.append(np.concatenate([rng.choice(values, len(values)) for values in drawn]).mean())
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.01)
    assert found.high == pytest.approx(high, abs=0.01)


def test_the_bootstrap_depends_on_its_seed_and_not_on_the_order_of_the_rows():
    a, b = against_zero(*np.random.default_rng(2).normal(size=(3, 8)))
    assert paired(a, b, "dice", seed=3) == paired(a[::-1], b, "dice", seed=3)
    assert paired(a, b, "dice", seed=3) != paired(a, b, "dice", seed=4)


# --- many tests, many hospitals


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == [close(0.03), close(0.06), close(0.06), close(0.02)]
    assert holm([0.5, None, 0.6, 0.01]) == [1.0, None, 1.0, close(0.03)]
    assert holm([]) == []


def test_site_differences_are_three_numbers():
    found = site_differences(*against_zero([0.1, 0.3], [0.5], [None]), "dice")
    assert found == {"A": SiteDifference(2, close(0.2), close(0.02)), "B": SiteDifference(1, 0.5, None)}


def test_random_effects_of_two_equally_sure_sites_by_hand():
    # Squared errors 0.01 each: w = 100, 100; Q = 2; tau2 = (2 - 1) / (200 - 20000 / 200) = 0.01; error = 0.1; z = 2.
    found = random_effects({"A": SiteDifference(4, 0.1, 0.04), "B": SiteDifference(9, 0.3, 0.09)})
    assert (found.effect, found.tau2, found.q, found.i2) == (close(0.2), close(0.01), close(2.0), close(0.5))
    assert (found.low, found.high) == (close(0.2 - 0.1959963985), close(0.2 + 0.1959963985))
    assert (found.p, found.sites, found.left_out) == (close(0.0455002639), 2, ())


def test_random_effects_of_two_unequally_sure_sites_by_hand():
    # w = 10, 5: fixed effect 1/3; Q = 10/9 + 20/9; tau2 = (10/3 - 1) / (15 - 125/15) = 0.35; 1/0.45 and 1/0.55.
    found = random_effects({"A": SiteDifference(1, 0.0, 0.1), "B": SiteDifference(5, 1.0, 1.0)})
    assert (found.q, found.tau2) == (close(10 / 3), close(0.35))
    assert found.effect == close(0.45)
    assert found.high - found.effect == close(1.959963985 * np.sqrt(0.45 * 0.55))


def test_sites_that_agree_are_weighed_by_their_precision_alone():
    found = random_effects({"A": SiteDifference(10, 0.2, 0.1), "B": SiteDifference(30, 0.21, 0.1)})
    assert (found.tau2, found.i2) == (0.0, 0.0)
    assert found.effect == close((100 * 0.2 + 300 * 0.21) / 400)


def test_sites_without_a_variance_are_left_out_by_name():
    sites = {"A": SiteDifference(1, 0.2, None), "B": SiteDifference(3, 0.0, 0.0), "C": SiteDifference(4, 0.1, 0.04)}
    found = random_effects(sites)
    assert (found.effect, found.sites, found.high) == (close(0.1), 1, close(0.1 + 0.1959963985))
    assert found.left_out == (("A", "too few subjects for a variance (1)"), ("B", "all its differences are equal"))
    assert random_effects({"A": sites["A"]}).effect is None
