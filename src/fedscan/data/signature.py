"""One number or class per subject, computed from the files: what partitions by label, intensity or lesion size use."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from statistics import fmean

import numpy as np

from fedscan.data.records import Case


def lesion_volume(cases: Iterable[Case], labels: Collection[int] | None = None) -> dict[str, float]:
    """Mean volume in mm cubed of the given label values (all above 0 if None), over the labelled cases of a subject."""

    def volume(case: Case) -> float:
        return sum(size for value, size in label_volumes(case).items() if labels is None or value in labels)

    return _by_subject((case for case in cases if case.label is not None), volume)


def foreground_intensity(cases: Iterable[Case], sequence: str) -> dict[str, float]:
    """Mean intensity of the voxels above their image's own mean (so not of air), over the cases that have `sequence`.

    This threshold serves MRI and CT alike, and needs no label. Units: those of the file.
    """

    def mean(case: Case) -> float:
        voxels = np.asarray(case.open(sequence).dataobj, dtype=np.float64)
        above = voxels[voxels > voxels.mean()]
        return float(above.mean()) if above.size else float(voxels.mean())

    return _by_subject((case for case in cases if case.images.get(sequence) is not None), mean)


def dominant_label(cases: Iterable[Case], labels: Collection[int] | None = None) -> dict[str, int]:
    """The label value with the largest volume over a subject's labelled cases (0: nothing labelled).

    Of the given values; of all above 0 if None.
    """
    total: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for case in cases:
        if case.label is not None:
            for value, size in label_volumes(case).items():
                if labels is None or value in labels:
                    total[case.subject][value] += size
            total[case.subject][0] = 0.0
    return {subject: max(sizes, key=lambda value: (sizes[value], -value)) for subject, sizes in sorted(total.items())}


def quantiles(values: Mapping[str, float], parts: int) -> dict[str, int]:
    """The place of each subject's value, from 0 (lowest) to `parts` - 1, in parts of equal numbers of subjects."""
    if not 1 <= parts <= len(values):
        raise ValueError(f"{len(values)} subjects cannot be cut into {parts} parts.")
    order = sorted(values, key=lambda subject: (values[subject], subject))
    return {subject: place * parts // len(order) for place, subject in enumerate(order)}


def label_volumes(case: Case) -> dict[int, float]:
    """Volume in mm cubed of each label value above 0 that occurs in the case's label map."""
    image = case.open("label")
    values, counts = np.unique(np.asarray(image.dataobj), return_counts=True)
    voxel = abs(float(np.linalg.det(image.affine[:3, :3])))
    return {int(value): int(count) * voxel for value, count in zip(values, counts, strict=True) if value > 0}


def _by_subject(cases: Iterable[Case], number: Callable[[Case], float]) -> dict[str, float]:
    found: dict[str, list[float]] = defaultdict(list)
    for case in sorted(cases, key=lambda case: case.name):
        found[case.subject].append(number(case))
    return {subject: fmean(numbers) for subject, numbers in sorted(found.items())}
