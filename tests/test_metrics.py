"""The scores of a case: golden tables of four libraries, rules for empty masks, MONAI on random masks, invariances."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter

from fedscan.tasks.metrics import case_scores, mean_over_labels

torch.set_num_threads(1)
ONE = {"it": 1}


def score(prediction, reference, spacing=None, **options):
    return case_scores(prediction, reference, ONE, spacing or (1.0,) * np.ndim(reference), **options)["it"]


def cube_and_island(cube, island, gap, size=96, corner=8):
    """A cube as the reference; the prediction has it too, and a smaller cube ``gap`` voxels further on every axis."""
    reference = np.zeros((size,) * 3, dtype=np.uint8)
    reference[(slice(corner, corner + cube),) * 3] = 1
    prediction = reference.copy()
    prediction[(slice(corner + gap, corner + gap + island),) * 3] = 1
    return prediction, reference


def masks(seed, shape, density):
    rng = np.random.default_rng(seed)
    return ((rng.random(shape) < density).astype(np.int16) for _ in range(2))


# --- golden tables: MONAI 1.6.1 (ours), MedPy 0.5.2 (pooled), DeepMind surface-distance 0.1 (area), in mm


@pytest.mark.parametrize(("name", "expected"), [("hd95", 33.734), ("hd95_pooled", 33.030), ("hd95_area", 33.556)])
def test_a_far_island(name, expected):
    assert score(*cube_and_island(10, 6, 25), hd95=name)[name] == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(("name", "expected"), [("hd95", 67.432), ("hd95_pooled", 64.065), ("hd95_area", 65.552)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_far_island_on_a_grid_of_1_1_3_mm(name, expected, axis):
    spacing = [1.0, 1.0, 1.0]
    spacing[axis] = 3.0
    assert score(*cube_and_island(10, 6, 25), tuple(spacing), hd95=name)[name] == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(("name", "expected"), [("hd95", 52.335), ("hd95_pooled", 0.0), ("hd95_area", 52.326)])
def test_an_island_that_the_pooled_percentile_does_not_see(name, expected):
    assert score(*cube_and_island(30, 10, 55), hd95=name)[name] == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("name", ["hd95", "hd95_pooled", "hd95_area"])
def test_a_smooth_shape_shifted_by_a_voxel_is_one_mm_off(name):
    field = gaussian_filter(np.random.default_rng(0).normal(size=(40, 40, 40)), 5)
    reference = (field > np.quantile(field, 0.8)).astype(np.uint8)
    reference[:2] = reference[-2:] = 0
    assert score(np.roll(reference, 1, axis=0), reference, hd95=name)[name] == pytest.approx(1.0)


def test_the_penalty_of_brats_is_the_diagonal_of_its_images():
    reference = np.zeros((240, 240, 155), dtype=np.uint8)
    reference[100, 100, 100] = 1
    assert score(np.zeros_like(reference), reference, penalty="image_diagonal")["hd95"] == pytest.approx(
        373.13, abs=5e-3
    )


# --- empty masks

EMPTY, FULL = np.zeros((4, 4, 4), dtype=int), np.ones((4, 4, 4), dtype=int)
EMPTY_TABLE = {  # both empty, reference empty, prediction empty; volumes are 64 voxels of 2 x 3 x 4 mm = 1.536 ml
    "dice": (None, 0.0, 0.0),
    "iou": (None, 0.0, 0.0),
    "precision": (None, 0.0, None),
    "recall": (None, None, 0.0),
    "volume_error": (None, None, -1.0),
    "hd95": (None, None, None),
    "nsd": (None, 0.0, 0.0),
    "volume_ml": (0.0, 1.536, 0.0),
    "reference_ml": (0.0, 0.0, 1.536),
}


@pytest.mark.parametrize("metric", EMPTY_TABLE)
def test_empty_masks(metric):
    pairs = ((EMPTY, EMPTY), (FULL, EMPTY), (EMPTY, FULL))
    found = [score(p, r, (2.0, 3.0, 4.0), tolerance={"it": 1.0})[metric] for p, r in pairs]
    assert found == [None if x is None else pytest.approx(x) for x in EMPTY_TABLE[metric]]


@pytest.mark.parametrize("name", ["hd95", "hd95_pooled", "hd95_area"])
def test_the_penalty_is_for_one_empty_mask_only(name):
    spacing, diagonal = (3.0, 4.0, 12.0), 4 * 13.0  # 3-4-12 is 13 along the diagonal
    found = [
        score(p, r, spacing, hd95=name, penalty="image_diagonal")[name]
        for p, r in ((EMPTY, EMPTY), (FULL, EMPTY), (EMPTY, FULL), (FULL, FULL))
    ]
    assert found == [None, pytest.approx(diagonal), pytest.approx(diagonal), 0.0]


# --- by hand


def test_overlap_by_hand():
    reference, prediction = np.zeros((1, 4, 5), dtype=int), np.zeros((1, 4, 5), dtype=int)
    reference[0, 0, :4] = 1  # 4 voxels
    prediction[0, 0, 1:] = 1  # 4 voxels, 3 of them right
    prediction[0, 2, :2] = 1  # 2 more
    found = score(prediction, reference, (5.0, 1.0, 2.0))
    assert found == {
        "dice": pytest.approx(6 / 10),
        "iou": pytest.approx(3 / 7),
        "precision": pytest.approx(3 / 6),
        "recall": pytest.approx(3 / 4),
        "volume_error": pytest.approx(0.5),
        "volume_ml": pytest.approx(0.06),
        "reference_ml": pytest.approx(0.04),
        "hd95": pytest.approx(
            np.percentile([0, 0, 0, 2, 2, 2], 95)
        ),  # of the two lines; the other way it is 0, 0, 0, 2
    }


def test_surface_dice_counts_the_surface_voxels_within_the_tolerance():
    reference, prediction = np.zeros((3, 9), dtype=int), np.zeros((3, 9), dtype=int)
    reference[1, 0:4] = 1
    prediction[1, 2:8] = 1  # distances to the reference 0 0 1 2 3 4; back 2 1 0 0
    nsd = {mm: score(prediction, reference, (1.0, 1.0), tolerance={"it": mm})["nsd"] for mm in (0.0, 1.0, 2.0, 4.0)}
    assert nsd == {0.0: 0.4, 1.0: 0.6, 2.0: 0.8, 4.0: 1.0}


@pytest.mark.parametrize(("voxels", "mm"), [(3, 0.1), (2, 0.6), (7, 0.7), (3, 1.1)])
def test_a_distance_equal_to_the_tolerance_is_within_it_whatever_the_rounding(voxels, mm):
    reference, prediction = np.zeros((1, 40), dtype=int), np.zeros((1, 40), dtype=int)
    reference[0, 17] = prediction[0, 17 + voxels] = 1
    assert score(prediction, reference, (mm, mm), tolerance={"it": round(voxels * mm, 6)})["nsd"] == 1.0


def test_regions_of_several_numbers_overlap_as_in_brats():
    reference = np.array([[[0, 1, 2, 4, 4]]])
    prediction = np.array([[[0, 1, 1, 4, 0]]])
    labels = {"whole": (1, 2, 4), "core": [1, 4], "enhancing": 4, "edema": np.int64(2)}
    found = case_scores(prediction, reference, labels, (1, 1, 1), metrics=["dice"])
    expected = {"whole": 6 / 7, "core": 4 / 6, "enhancing": 2 / 3, "edema": 0.0}
    assert found == {name: {"dice": pytest.approx(dice)} for name, dice in expected.items()}


def test_ignored_voxels_belong_to_no_mask():
    """By hand: of 6 voxels in a row 2 are ignored; P holds 3 of the others, R 2, and 2 are common."""
    reference = np.array([[1, 1, 0, 0, 255, 255]])
    prediction = np.array([[1, 1, 1, 0, 1, 1]])
    scores = case_scores(prediction, reference, {"a": 1}, (1, 1), ignored=255)["a"]
    assert scores["dice"] == pytest.approx(4 / 5)
    assert scores["iou"] == pytest.approx(2 / 3)
    assert scores["precision"] == pytest.approx(2 / 3)
    assert (scores["recall"], scores["volume_error"]) == (1.0, 0.5)
    assert (scores["area_cm2"], scores["reference_cm2"]) == (pytest.approx(0.03), pytest.approx(0.02))
    assert scores["hd95"] == pytest.approx(np.percentile([0, 0, 1], 95)), "the two far voxels are not in P"
    assert case_scores(prediction, reference, {"a": 1}, (1, 1))["a"]["dice"] == pytest.approx(4 / 7)
    only = np.where(reference == 255, 255, 0)
    assert case_scores(np.where(only, 1, 0), only, {"a": 1}, (1, 1), ignored=255)["a"]["dice"] is None


def test_surface_dice_is_given_only_where_a_tolerance_is():
    labels = {"a": 1, "b": 2}
    found = case_scores(FULL, FULL, labels, (1, 1, 1), tolerance={"b": 1.0})
    assert ("nsd" in found["a"], "nsd" in found["b"]) == (False, True)


def test_areas_stand_for_volumes_in_2d():
    found = score(FULL[0], EMPTY[0], (5.0, 10.0))
    assert (found["area_cm2"], found["reference_cm2"]) == (pytest.approx(8.0), 0.0)


def test_types_of_maps_give_the_same_scores():
    prediction, reference = masks(3, (6, 7, 8), 0.3)
    expected = score(prediction, reference)
    for kind in (np.uint8, np.int64, bool):
        assert score(prediction.astype(kind), reference.astype(kind)) == expected
    assert score(torch.from_numpy(prediction), torch.from_numpy(reference)) == expected


# --- against MONAI, and against a distance transform of the whole image

shapes = st.one_of(st.tuples(*[st.integers(1, 9)] * 2), st.tuples(*[st.integers(1, 8)] * 3))
mm = st.sampled_from([0.3, 0.6, 1.0, 1.7, 3.0])
densities = st.sampled_from([0.02, 0.2, 0.5, 0.9])
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=500, deadline=None)
@given(seed=seeds, shape=shapes, density=densities, data=st.data())
def test_random_masks_score_as_in_monai(seed, shape, density, data):
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

    prediction, reference = masks(seed, shape, density)
    spacing = data.draw(st.tuples(*[mm] * len(shape)))
    tolerance = data.draw(st.sampled_from([0.0, 0.6, 1.0, 1.8, 2.5]))
    ours = score(prediction, reference, spacing, tolerance={"it": tolerance})
    p, r = (torch.from_numpy(np.stack([m == 0, m == 1]).astype(np.float32))[None] for m in (prediction, reference))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns of empty masks
        theirs = {
            "dice": compute_dice(p, r, include_background=False, ignore_empty=False),
            "hd95": compute_hausdorff_distance(p, r, percentile=95, spacing=spacing),
            "nsd": compute_surface_dice(p, r, [tolerance], spacing=spacing),
        }
    if not prediction.any() and not reference.any():
        theirs["dice"] = torch.tensor(torch.nan)  # MONAI: 1 for two empty masks, or NaN also where one is
    for name, tensor in theirs.items():
        value = tensor.item() if np.isfinite(tensor.item()) else None  # MONAI: inf or NaN for an empty mask
        assert ours[name] == (None if value is None else pytest.approx(value, rel=1e-5, abs=1e-5)), name


@settings(max_examples=100, deadline=None)
@given(seed=seeds, shape=shapes, density=densities, data=st.data())
def test_distances_are_those_of_a_distance_transform(seed, shape, density, data):
    prediction, reference = masks(seed, shape, density)
    spacing = data.draw(st.tuples(*[mm] * len(shape)))
    if not (prediction.any() and reference.any()):
        return
    p, r = (m.astype(bool) & ~binary_erosion(m) for m in (prediction, reference))
    there, back = distance_transform_edt(~r, spacing)[p], distance_transform_edt(~p, spacing)[r]
    pooled = np.percentile(np.concatenate([there, back]), 95)
    assert score(prediction, reference, spacing)["hd95"] == pytest.approx(
        max(np.percentile(there, 95), np.percentile(back, 95))
    )
    assert score(prediction, reference, spacing, hd95="hd95_pooled")["hd95_pooled"] == pytest.approx(pooled)


# --- invariances

SYMMETRIC = ("dice", "iou", "hd95", "nsd")


def close(a, b, names=None):
    for name in names or a:
        assert a[name] == (None if b[name] is None else pytest.approx(b[name], rel=1e-9, abs=1e-9)), name


@settings(max_examples=60, deadline=None)
@given(seed=seeds, shape=st.tuples(*[st.integers(2, 7)] * 3), density=densities, data=st.data())
def test_scores_do_not_depend_on_how_the_scan_lies(seed, shape, density, data):
    prediction, reference = masks(seed, shape, density)
    spacing = data.draw(st.tuples(*[mm] * 3))
    options = {"tolerance": {"it": 1.0}}
    before = score(prediction, reference, spacing, **options)
    close(score(reference, prediction, spacing, **options), before, SYMMETRIC)
    close(score(np.flip(prediction, (0, 2)), np.flip(reference, (0, 2)), spacing, **options), before)
    order = data.draw(st.permutations(range(3)))
    moved = [spacing[axis] for axis in order]
    close(score(prediction.transpose(order), reference.transpose(order), moved, **options), before)
    pads = data.draw(st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 3))
    close(score(np.pad(prediction, pads), np.pad(reference, pads), spacing, **options), before)


def test_precision_and_recall_change_places_with_the_masks():
    prediction, reference = masks(1, (6, 6, 6), 0.4)
    one, other = score(prediction, reference), score(reference, prediction)
    assert (one["precision"], one["recall"]) == (other["recall"], other["precision"])


def test_distances_grow_with_the_voxels():
    prediction, reference = masks(5, (8, 8, 8), 0.05)
    for name in ("hd95", "hd95_pooled", "hd95_area"):
        small, large = (score(prediction, reference, (s, s, s), hd95=name)[name] for s in (1.0, 2.5))
        assert large == pytest.approx(2.5 * small)


# --- means over labels, and bad input


def test_mean_over_labels_weighs_labels_equally_and_counts_the_undefined():
    cases = [
        {"a": {"dice": 0.5}, "b": {"dice": None}, "c": {"dice": None}},
        {"a": {"dice": 0.7}, "b": {"dice": 0.2}, "c": {"dice": None}},
    ]
    assert mean_over_labels(cases, "dice") == (pytest.approx((0.6 + 0.2) / 2), 3, 6)
    assert mean_over_labels([{"c": {"dice": None}}], "dice") == (None, 0, 1)
    with pytest.raises(ValueError, match="No case has the metric 'nsd'"):
        mean_over_labels(cases, "nsd")


def test_fedsegnet_gets_the_diagonal_for_an_empty_prediction():
    labels = {"a": 1, "b": 2}
    scores = [case_scores(EMPTY, FULL, labels, (3, 4, 12), penalty="image_diagonal", metrics=("dice", "hd95"))]
    assert mean_over_labels(scores, "hd95") == (pytest.approx(52.0), 1, 2)
    assert mean_over_labels(scores, "dice") == (0.0, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prediction": np.zeros((4, 4, 3), dtype=int)}, r"shape \(4, 4, 3\), the reference \(4, 4, 4\)"),
        ({"prediction": np.zeros((4, 4, 4))}, "The prediction holds float64"),
        ({"reference": np.zeros((4, 4, 4), dtype=np.float32)}, "The reference holds float32"),
        ({"spacing": (1.0, 1.0)}, "one positive number of mm per axis"),
        ({"spacing": (1.0, 0.0, 1.0)}, "one positive number of mm per axis"),
        ({"spacing": (1.0, float("nan"), 1.0)}, "one positive number of mm per axis"),
        ({"labels": {}}, "at least one label"),
        ({"labels": {"it": ()}}, "each its number or numbers"),
        ({"tolerance": {"other": 1.0}}, "'other' not among the labels 'it'"),
        ({"tolerance": {"it": -1.0}}, "'it' must be a number of mm of 0 or more"),
        ({"hd95": "hd100"}, "'hd100' is no definition of HD95 here; choose 'hd95', 'hd95_area', 'hd95_pooled'"),
        ({"penalty": "373"}, "leave it out, or choose 'image_diagonal'"),
        ({"metrics": ["dice", "assd"]}, "'assd' not known here; choose from dice, iou"),
        ({"metrics": ["hd95"], "hd95": "hd95_pooled"}, "'hd95' not known here"),
    ],
)
def test_bad_input_is_refused_by_a_sentence(arguments, sentence):
    good = {"prediction": EMPTY, "reference": FULL, "labels": ONE, "spacing": (1.0, 1.0, 1.0)}
    with pytest.raises(ValueError, match=sentence):
        case_scores(**(good | arguments))


def test_maps_of_one_or_four_axes_are_refused():
    with pytest.raises(ValueError, match="2 or 3 axes"):
        case_scores(np.zeros(4, dtype=int), np.zeros(4, dtype=int), ONE, (1.0,))
