"""Splits and partitions: by subject, fixed by the seed, whatever the order of the cases."""

import hashlib
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan.data.partition import SPLITS, generator, partition, split
from fedscan.data.readers import detect
from fedscan.data.records import Case
from fedscan.data.signature import dominant_label, foreground_intensity, label_volumes, lesion_volume, quantiles
from nifti import label, write
from shared import shared

WAYS = ("dirichlet", "quantity", "intensity", "lesion-size")


def people(*numbers: int, exams: int = 2) -> list[Case]:
    """So many subjects at site 0, 1, ..., each with 1 to `exams` cases."""
    return [
        Case(f"c{site}-{person}-{exam}", f"p{site}-{person}", f"h{site}", {})
        for site, number in enumerate(numbers)
        for person in range(number)
        for exam in range(1 + person % exams)
    ]


def subjects(cases: list[Case]) -> list[str]:
    return sorted({case.subject for case in cases})


def options(how: str, cases: list[Case]) -> dict[str, object]:
    if how == "dirichlet":
        return {"classes": {name: place % 3 for place, name in enumerate(subjects(cases))}}
    if how == "quantity":
        return {}
    return {"values": {name: float(place * 7 % 11) for place, name in enumerate(subjects(cases))}}


def sizes(cases: tuple[Case, ...]) -> list[int]:
    """Subjects per site, in the order of the sites' names."""
    return [count for _, count in sorted(Counter({case.subject: case.site for case in cases}.values()).items())]


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.integers(3, 30), min_size=1, max_size=4),
    train=st.floats(0.1, 0.8),
    seed=st.integers(0, 2**70),
    order=st.randoms(use_true_random=False),
)
def test_no_subject_is_in_two_splits(numbers, train, seed, order):
    cases = people(*numbers)
    fractions = (train, (1 - train) / 3, 2 * (1 - train) / 3)
    found = split(cases, fractions, seed)
    assert found.keys() == {case.name for case in cases}
    for name in subjects(cases):
        assert len({found[case.name] for case in cases if case.subject == name}) == 1
    for site in {case.site for case in cases}:
        assert {found[case.name] for case in cases if case.site == site} == set(SPLITS)
    order.shuffle(cases)
    assert list(split(cases, fractions, seed).items()) == list(found.items())


def test_a_split_has_the_numbers_it_should():
    cases = people(20, 10, 3, exams=1)
    found = split(cases, (0.7, 0.1, 0.2), seed=4)
    by_site = Counter((case.site, found[case.name]) for case in cases)
    assert [by_site["h0", name] for name in SPLITS] == [14, 2, 4]
    assert [by_site["h1", name] for name in SPLITS] == [7, 1, 2]
    assert [by_site["h2", name] for name in SPLITS] == [1, 1, 1]
    assert split(cases, (1, 0, 0)) == dict.fromkeys(sorted(found), "train")
    assert set(split(cases, (0.5, 0, 0.5)).values()) == {"train", "test"}


def test_a_split_is_drawn_anew_for_each_seed_and_alone_for_each_site():
    cases = people(20, 20)
    assert split(cases, seed=1) != split(cases, seed=2)
    alone = split([case for case in cases if case.site == "h1"], seed=1)
    assert alone.items() <= split(cases, seed=1).items()


def test_the_seed_is_a_sha256_and_not_the_hash_of_this_process():
    state = int(hashlib.sha256(b"3\x1fsplit\x1fh0").hexdigest(), 16)
    expected = np.random.default_rng(state).permutation(50)
    assert (generator(3, "split", "h0").permutation(50) == expected).all()
    assert (generator(3, "split", "h1").permutation(50) != expected).any()


@pytest.mark.parametrize(
    "fractions", [(0.5, 0.5), (0.5, 0.2, 0.2), (0, 0.5, 0.5), (1.2, -0.1, -0.1), (float("nan"),) * 3]
)
def test_wrong_fractions_are_refused(fractions):
    with pytest.raises(ValueError, match="fractions ="):
        split(people(5), fractions)


def test_a_site_too_small_to_split_is_named():
    with pytest.raises(ValueError, match=r"Site 'h1' has 2 subject\(s\), too few for one in each of train, val"):
        split(people(5, 2))
    with pytest.raises(ValueError, match="no case"):
        split([])


def test_a_subject_at_two_sites_is_refused():
    cases = [Case("a", "p", "n", {}), Case("b", "p", "s", {})]
    for divide in (split, partition):
        with pytest.raises(ValueError, match="'p' is at two sites"):
            divide(cases)


@settings(max_examples=80, deadline=None)
@given(
    how=st.sampled_from(WAYS),
    numbers=st.lists(st.integers(2, 20), min_size=1, max_size=3),
    sites=st.integers(1, 12),
    minimum=st.integers(1, 3),
    seed=st.integers(0, 99),
    order=st.randoms(use_true_random=False),
)
def test_no_subject_is_at_two_sites(how, numbers, sites, minimum, seed, order):
    cases = people(*numbers)
    chosen = options(how, cases) | {"minimum": minimum}
    if sites * minimum > len(subjects(cases)):
        with pytest.raises(ValueError, match="need more than"):
            partition(cases, how, sites, seed, **chosen)
        return
    found = partition(cases, how, sites, seed, **chosen)
    assert [case.name for case in found] == [case.name for case in cases]
    assert [case.extra["true_site"] for case in found] == [case.site for case in cases]
    assert len({case.subject: case.site for case in found}.items()) == len({(c.subject, c.site) for c in found})
    assert len(sizes(found)) == sites
    assert min(sizes(found)) >= minimum
    order.shuffle(cases)
    again = partition(cases, how, sites, seed, **chosen)
    assert {case.name: case.site for case in again} == {case.name: case.site for case in found}


def skew(alpha: float, seed: int) -> float:
    """Mean over sites of the share of their commonest class, 4 classes of 50 subjects at 5 sites."""
    cases = people(200, exams=1)
    classes = {name: place % 4 for place, name in enumerate(subjects(cases))}
    found = partition(cases, "dirichlet", 5, seed, classes=classes, alpha=alpha, minimum=5)
    tables = [Counter(classes[case.subject] for case in found if case.site == f"site-{k}") for k in range(1, 6)]
    return float(np.mean([max(table.values()) / table.total() for table in tables]))


def test_a_large_alpha_is_uniform_and_a_small_one_skewed():
    assert skew(float("inf"), 0) == pytest.approx(0.25)
    assert all(skew(1e6, seed) < 0.30 for seed in range(5))
    assert all(skew(0.05, seed) > 0.60 for seed in range(5))
    assert np.mean([skew(0.3, seed) for seed in range(5)]) < np.mean([skew(0.05, seed) for seed in range(5)])


@pytest.mark.parametrize("how", ["dirichlet", "quantity"])
def test_every_site_has_the_least_number_of_subjects(how):
    cases = people(20)
    for seed in range(20):
        found = partition(cases, how, 5, seed, alpha=0.1, minimum=3, **options(how, cases))
        assert min(sizes(found)) >= 3
        assert sum(sizes(found)) == 20


@pytest.mark.parametrize("alpha", [1e-300, 1e-9, 1e12, 1e308])
def test_an_extreme_alpha_still_deals_everyone(alpha):
    cases = people(20)
    found = partition(cases, "dirichlet", 4, **options("dirichlet", cases), alpha=alpha)  # type: ignore[arg-type]
    assert sum(sizes(found)) == 20
    assert sum(sizes(partition(cases, "quantity", 4, alpha=alpha))) == 20


def test_quantity_follows_its_law():
    cases = people(60, exams=1)
    # By hand: shares 1, 1/2, 1/3 of 60 - 3 = 57 are 31.09, 15.55, 10.36, so 31, 16, 10 and one more each.
    assert sizes(partition(cases, "quantity", 3, law="power", exponent=1.0)) == [32, 17, 11]
    assert sizes(partition(cases, "quantity", 3, law="power", exponent=0)) == [20, 20, 20]
    assert sizes(partition(cases, "quantity", 3, alpha=float("inf"))) == [20, 20, 20]
    drawn = sizes(partition(cases, "quantity", 3, seed=1, alpha=0.2))
    assert drawn != sizes(partition(cases, "quantity", 3, seed=2, alpha=0.2))
    assert max(drawn) > 30


def test_neighbours_in_value_share_a_site():
    cases = people(7, exams=1)
    values = dict(zip(subjects(cases), (5.0, 1.0, 9.0, 1.0, 3.0, 7.0, 8.0), strict=True))
    site_of = {case.subject: case.site for case in partition(cases, "intensity", 3, values=values)}
    assert [site_of[f"p0-{n}"][-1] for n in (1, 3, 4, 0, 5, 6, 2)] == ["1", "1", "1", "2", "2", "3", "3"]
    assert site_of == {case.subject: case.site for case in partition(cases, "lesion-size", 3, seed=9, values=values)}


def test_names_of_many_sites_sort_by_number():
    cases = people(12, exams=1)
    assert {case.site for case in partition(cases, "quantity", 12)} == {f"site-{k:02d}" for k in range(1, 13)}


def test_true_sites_stay(tmp_path):
    cases = people(3, 4)
    assert partition(cases) == partition(cases, "true", 2) == tuple(cases)


@pytest.mark.parametrize(
    ("how", "sites", "more", "said"),
    [
        ("true", 3, {}, "true sites are 2 .*3 sites cannot"),
        ("true", None, {"alpha": 1}, "'alpha' cannot"),
        ("dirichlet skew", 2, {}, "how = 'dirichlet skew': one of 'true', 'dirichlet'"),
        ("quantity", None, {}, "sites = None"),
        ("quantity", 0, {}, "sites = 0"),
        ("quantity", 2, {"minimum": 0}, "minimum = 0"),
        ("quantity", 2, {"alfa": 1}, "no option 'alfa'; it has law, alpha, exponent, minimum"),
        ("quantity", 8, {}, "8 sites of at least 1 .* more than the 7"),
        ("quantity", 2, {"alpha": 0}, "alpha = 0"),
        ("quantity", 2, {"law": "zipf"}, "law = 'zipf'"),
        ("quantity", 2, {"law": "power", "exponent": -1}, "exponent = -1"),
        ("dirichlet", 2, {}, "'dirichlet' needs 'classes'"),
        ("dirichlet", 2, {"classes": {"p0-0": 1}}, "classes has nothing for 6 subject"),
        ("dirichlet", 2, {"classes": dict.fromkeys(subjects(people(3, 4)), 0), "alpha": float("nan")}, "alpha = nan"),
        ("intensity", 2, {"values": {"p0-0": 1}}, "values has nothing for 6 subject.*'p0-1'"),
        ("intensity", 2, {"values": dict.fromkeys(subjects(people(3, 4)), float("nan"))}, "subject 'p0-0' is nan"),
    ],
)
def test_what_cannot_be_done_is_refused(how, sites, more, said):
    with pytest.raises(ValueError, match=said):
        partition(people(3, 4), how, sites, **more)


def written(root: Path, name: str, subject: str, voxels: np.ndarray, target: np.ndarray | None) -> Case:
    image = write(root / f"{name}.nii", voxels, (1, 1, 2))
    return Case(
        name, subject, "n", {"t1": image}, None if target is None else write(root / f"{name}_l.nii", target, (1, 1, 2))
    )


def test_signatures_by_hand(tmp_path):
    half = np.zeros((2, 2, 2), np.float32)
    half[0] = [[4, 6], [4, 6]]  # four voxels above the mean of 2.5, themselves 5 in the mean
    cases = [
        written(tmp_path, "a1", "a", half, label(1, 2, 2, shape=(2, 2, 2))),
        written(tmp_path, "a2", "a", half * 3, label(1, 1, 1, 2, shape=(2, 2, 2))),
        written(tmp_path, "b1", "b", half, label(shape=(2, 2, 2))),
        written(tmp_path, "c1", "c", half, None),
    ]
    assert label_volumes(cases[0]) == {1: 2.0, 2: 4.0}
    assert lesion_volume(cases) == {"a": 7.0, "b": 0.0}
    assert lesion_volume(cases, [2]) == {"a": 3.0, "b": 0.0}
    assert dominant_label(cases) == {"a": 1, "b": 0}
    assert foreground_intensity(cases, "t1") == {"a": 10.0, "b": 5.0, "c": 5.0}
    assert quantiles({"a": 3.0, "b": 1.0, "c": 2.0, "d": 2.0}, 2) == {"b": 0, "c": 0, "d": 1, "a": 1}
    with pytest.raises(ValueError, match="2 subjects cannot be cut into 3"):
        quantiles({"a": 1.0, "b": 2.0}, 3)


def test_real_gliomas_by_lesion_size():
    manifest = detect(shared("lgg_multisite"))
    volumes = lesion_volume(manifest.cases, manifest.labels.values())
    first = manifest.cases[0]
    assert volumes[first.subject] == float(first.extra["tumour_voxels_128"])
    found = list(partition(manifest.cases, "lesion-size", 4, values=volumes))
    random.Random(0).shuffle(found)
    largest = [max(volumes[case.subject] for case in found if case.site == f"site-{k}") for k in range(1, 5)]
    assert largest == sorted(largest)
    assert Counter(case.site for case in found) == {"site-1": 15, "site-2": 14, "site-3": 14, "site-4": 14}


def test_real_hippocampi_are_split_by_pair():
    cases = detect(shared("hippocampus")).cases
    found = split(cases, (0.6, 0.2, 0.2), seed=7)
    by_subject = {(case.subject, found[case.name]) for case in cases}
    assert len(by_subject) == 105
    counts = Counter(name for _, name in by_subject)
    assert counts["train"] == 63  # 0.6 of 22, 23, 23, 22 and 15, each to the nearest
    assert abs(counts["validation"] - counts["test"]) <= 4  # at four sites one of the two has the odd subject
