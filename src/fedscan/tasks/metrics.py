"""Scores of a segmented case: overlap, surface distance and volume, with one rule for empty masks.

Libraries disagree on HD95 and on empty masks, so the rule is written here once and stands in every table:

- A surface is the foreground voxels with a face neighbour in the background; the image border counts as background.
- ``hd95`` is the larger of the two directed 95th percentiles of the distances between voxel centres in mm, linearly
  interpolated (MONAI's). By name only: ``hd95_pooled``, one percentile over both directions together (MedPy's), and
  ``hd95_area``, percentiles weighted by the area of a surface shifted by half a voxel (DeepMind's).
- Both masks empty: Dice, IoU and surface Dice are undefined, and ``statistics.detection`` counts a true negative.
  One mask empty: they are 0, and every HD95 is undefined.
- Undefined is None. It is never a number, and never averaged.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Mask = NDArray[np.bool_]
Scores = dict[str, dict[str, float | None]]

HD95 = ("hd95", "hd95_pooled", "hd95_area")
OVERLAP = ("dice", "iou", "precision", "recall", "volume_error")
# The least and the largest value of every metric; None, for undefined, aside.
RANGES = {
    **dict.fromkeys(("dice", "iou", "precision", "recall", "nsd"), (0.0, 1.0)),
    **dict.fromkeys((*HD95, "volume_ml", "reference_ml", "area_cm2", "reference_cm2"), (0.0, math.inf)),
    "volume_error": (-1.0, math.inf),
}
# The size of the prediction and of the reference, by the number of axes: their names, and how many mm^n one unit has.
SIZES = {3: ("volume_ml", "reference_ml", 1000.0), 2: ("area_cm2", "reference_cm2", 100.0)}


class Mean(NamedTuple):
    """A mean with its support. ``value`` is None where no score was defined."""

    value: float | None
    used: int  # scores that were defined
    total: int


def case_scores(
    prediction: ArrayLike,
    reference: ArrayLike,
    labels: Mapping[str, int | Sequence[int]],
    spacing: Sequence[float],
    tolerance: Mapping[str, float] | None = None,
    hd95: str = "hd95",
    penalty: str | None = None,
    metrics: Sequence[str] | None = None,
    ignored: int | None = None,
) -> Scores:
    """Scores a label map against its reference: {label: {metric: value, or None where it is undefined}}.

    ``prediction`` and ``reference`` are integer maps of equal shape, (D, H, W) or (H, W); ``spacing`` is mm per axis.
    ``labels`` maps a label's name to its number, or to the numbers of a region (whole tumour: 1, 2 and 3).
    ``tolerance`` is in mm per label; only a label that has one gets surface Dice (``nsd``, over surface voxels).
    ``hd95`` names the definition, and is the metric's name in the result. ``penalty="image_diagonal"`` scores HD95 as
    the diagonal in mm of the whole image where exactly one mask is empty, for rankings. ``metrics`` limits the work.
    Voxels of the reference that hold ``ignored`` belong to no mask, neither to the reference's nor to the prediction's.

    Also given: dice, iou, precision, recall, volume_error = (|P| - |R|) / |R|, and the size of both masks (volume_ml
    and reference_ml; area_cm2 and reference_cm2 in 2D). Raises ValueError where an argument does not fit.
    """
    predicted, true = np.asarray(prediction), np.asarray(reference)
    _check_maps(predicted, true, spacing)
    tolerance = tolerance or {}
    _check_options(labels, tolerance, hd95, penalty)
    known = (*OVERLAP, hd95, "nsd", *SIZES[true.ndim][:2])
    wanted = known if metrics is None else tuple(metrics)
    if unknown := set(wanted) - set(known):
        raise ValueError(f"metrics: {_listed(unknown)} not known here; choose from {', '.join(known)}.")
    penalised = float(np.linalg.norm(np.multiply(true.shape, spacing))) if penalty else None

    judged = None if ignored is None else true != ignored
    scores: Scores = {}
    for name, numbers in labels.items():
        p, r = np.isin(predicted, numbers), np.isin(true, numbers)
        if judged is not None:
            p, r = p & judged, r & judged
        found = _overlap(p, r, spacing)
        if hd95 in wanted or ("nsd" in wanted and name in tolerance):
            found |= _surface_scores(p, r, spacing, tolerance.get(name), hd95, penalised)
        scores[name] = {metric: found[metric] for metric in wanted if metric in found}
    return scores


def mean_over_labels(cases: Iterable[Scores], metric: str) -> Mean:
    """Averages one metric of many cases: the mean over labels of each label's mean over its defined cases.

    A rare label counts as much as a common one; a label that is undefined in every case is left out of the mean, and
    counted. Raises ValueError where no case has this metric.
    """
    values: dict[str, list[float | None]] = {}
    for case in cases:
        for label, scores in case.items():
            if metric in scores:
                values.setdefault(label, []).append(scores[metric])
    if not values:
        raise ValueError(f"No case has the metric '{metric}', so it has no mean; give case_scores this metric.")
    defined = [[v for v in of_label if v is not None] for of_label in values.values()]
    means = [sum(of_label) / len(of_label) for of_label in defined if of_label]
    used, total = sum(map(len, defined)), sum(map(len, values.values()))
    return Mean(sum(means) / len(means) if means else None, used, total)


def _overlap(p: Mask, r: Mask, spacing: Sequence[float]) -> dict[str, float | None]:
    """Counts voxels of the prediction ``p``, the reference ``r`` and of both, and makes the overlap scores of them."""
    predicted, true, common = (int(np.count_nonzero(m)) for m in (p, r, p & r))
    mine, theirs, unit = SIZES[p.ndim]
    voxel = float(np.prod(spacing)) / unit
    return {
        "dice": _ratio(2 * common, predicted + true),
        "iou": _ratio(common, predicted + true - common),
        "precision": _ratio(common, predicted),
        "recall": _ratio(common, true),
        "volume_error": _ratio(predicted - true, true),
        mine: predicted * voxel,
        theirs: true * voxel,
    }


def _surface_scores(
    p: Mask, r: Mask, spacing: Sequence[float], tolerance: float | None, hd95: str, penalised: float | None
) -> dict[str, float | None]:
    """Scores the distances between the surfaces of ``p`` and ``r``: HD95 in mm, and NSD where there is a tolerance."""
    window = _box(p | r)
    p, r = p[window], r[window]
    if not (p.any() and r.any()):
        one_empty = bool(p.any() or r.any())
        hd, nsd = (penalised, 0.0) if one_empty else (None, None)
        return {hd95: hd} if tolerance is None else {hd95: hd, "nsd": nsd}
    there, back = _distances(_surface(p), _surface(r), spacing)
    scores: dict[str, float | None] = {}
    if hd95 == "hd95_area":
        scores[hd95] = _hd95_area(p, r, spacing)
    else:
        sides = [np.concatenate([there, back])] if hd95 == "hd95_pooled" else [there, back]
        scores[hd95] = max(float(np.percentile(side, 95)) for side in sides)
    if tolerance is not None:
        # The slack keeps a distance that equals the tolerance inside it: 3 voxels of 0.1 mm are 0.30000000000000004 mm.
        within = sum(int(np.count_nonzero(side <= tolerance * (1 + 1e-6))) for side in (there, back))
        scores["nsd"] = within / (there.size + back.size)
    return scores


def _surface(mask: Mask) -> Mask:
    """Keeps the voxels of ``mask`` with a background voxel across a face; beyond the array is background."""
    padded, core = np.pad(mask, 1), mask.copy()
    for axis in range(mask.ndim):
        for side in (slice(None, -2), slice(2, None)):
            core &= padded[tuple(side if a == axis else slice(1, -1) for a in range(mask.ndim))]
    return mask & ~core


def _distances(a: Mask, b: Mask, spacing: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Measures every voxel of ``a`` to its nearest in ``b``, and back, in mm.

    A search tree over the surface voxels alone takes a fifth of the time of a distance transform of the whole box.
    """
    from scipy.spatial import KDTree

    here, there = (np.argwhere(mask) * np.asarray(spacing, dtype=np.float64) for mask in (a, b))
    return KDTree(there, leafsize=32).query(here)[0], KDTree(here, leafsize=32).query(there)[0]


def _hd95_area(p: Mask, r: Mask, spacing: Sequence[float]) -> float:
    """Takes HD95 over surface elements weighted by their area in mm^2 (length in mm in 2D), with MONAI's elements."""
    from monai.metrics.utils import get_mask_edges

    edge_p, edge_r, area_p, area_r = (np.asarray(x) for x in get_mask_edges(p, r, spacing=tuple(spacing)))
    percentiles = []
    for distances, areas in zip(_distances(edge_p, edge_r, spacing), (area_p[edge_p], area_r[edge_r]), strict=True):
        order = np.argsort(distances)
        covered = np.cumsum(areas[order], dtype=np.float64)
        place = int(np.searchsorted(covered / covered[-1], 0.95))
        percentiles.append(float(distances[order][min(place, len(order) - 1)]))
    return max(percentiles)


def _box(mask: Mask) -> tuple[slice, ...]:
    """Finds the bounding box of the true voxels; an empty box where there are none."""
    window = []
    for axis in range(mask.ndim):
        hits = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        window.append(slice(hits[0], hits[-1] + 1) if hits.size else slice(0, 0))
    return tuple(window)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _listed(names: Iterable[object]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(map(str, names)))


def _check_maps(predicted: NDArray[Any], true: NDArray[Any], spacing: Sequence[float]) -> None:
    if predicted.shape != true.shape:
        raise ValueError(
            f"The prediction has shape {predicted.shape}, the reference {true.shape}; bring both onto one grid first."
        )
    if true.ndim not in SIZES or not true.size:
        raise ValueError(f"Label maps have 2 or 3 axes and some voxels, these have shape {true.shape}.")
    for what, array in (("prediction", predicted), ("reference", true)):
        if array.dtype.kind not in "iub":
            raise ValueError(f"The {what} holds {array.dtype}, a label map holds whole numbers; take the argmax first.")
    if len(spacing) != true.ndim or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing: one positive number of mm per axis is needed ({true.ndim}), not {tuple(spacing)}.")


def _check_options(
    labels: Mapping[str, int | Sequence[int]], tolerance: Mapping[str, float], hd95: str, penalty: str | None
) -> None:
    if not labels or any(np.size(numbers) == 0 for numbers in labels.values()):
        raise ValueError(f"labels: give at least one label, and each its number or numbers, not {dict(labels)}.")
    if unknown := set(tolerance) - set(labels):
        raise ValueError(f"tolerance: {_listed(unknown)} not among the labels {_listed(labels)}.")
    if wrong := [name for name, mm in tolerance.items() if not (np.isfinite(mm) and mm >= 0)]:
        raise ValueError(f"tolerance: {_listed(wrong)} must be a number of mm of 0 or more.")
    if hd95 not in HD95:
        raise ValueError(f"hd95: '{hd95}' is no definition of HD95 here; choose {_listed(HD95)}.")
    if penalty not in (None, "image_diagonal"):
        raise ValueError(f"penalty: '{penalty}' is not known; leave it out, or choose 'image_diagonal'.")
