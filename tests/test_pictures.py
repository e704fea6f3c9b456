"""Cases to look at: planes to scale and the right way round, errors by kind, and a budget."""

import base64
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedscan.ledger import Overlay
from fedscan.report import overlays


def one_case(shape: tuple[int, ...] = (10, 12, 6), spacing: tuple[float, ...] = (1.0, 2.0, 4.0)) -> Overlay:
    """Made with axes (x, y, z) = (right, front, top); a record holds (z, y, x)."""
    reference, prediction = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    reference[2:6, 3:7, 2:4] = 1
    prediction[4:8, 3:7, 2:4] = 1
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return Overlay("A", "c", "worst", 0.5, image.T, reference.T, prediction.T, spacing[::-1])


def decoded(svg: str, kind: str) -> list[np.ndarray]:
    found = re.findall(rf'<image class="{kind}"[^>]*base64,([^"]*)"', svg)
    return [np.asarray(Image.open(BytesIO(base64.b64decode(data)))) for data in found]


def test_planes_are_to_scale_and_turned_as_on_a_workstation() -> None:
    svg = str(overlays.draw(one_case(), {"a": 1}).svg)
    sizes = re.findall(r'<image class="base" width="([\d.]+)" height="([\d.]+)"', svg)
    # axes of 10 x 1, 12 x 2 and 6 x 4 mm: axial right-front, coronal right-top, sagittal front-top
    assert [(float(w), float(h)) for w, h in sizes] == [(10, 24), (10, 24), (24, 24)]
    axial = decoded(svg, "base")[0]
    assert axial.shape == (12, 10)
    assert axial[0, 0] > axial[0, -1]  # values grow to the right and the front: the front right is at the top left
    assert axial[0, 0] > axial[-1, 0]


def test_errors_are_missed_or_extra_where_the_masks_differ() -> None:
    svg = str(overlays.draw(one_case(), {"a": 1}).svg)
    axial = decoded(svg, "err v0")[0]  # rows run from the front, columns from the right
    expected = np.zeros((12, 10), np.uint8)
    expected[5:9, 6:8] = overlays.MISSED  # first axis 2 and 3
    expected[5:9, 2:4] = overlays.EXTRA  # first axis 6 and 7
    np.testing.assert_array_equal(axial, expected)


def test_confusion_of_two_structures_has_its_own_colour_and_views() -> None:
    case = one_case()
    other = np.where(case.reference == 1, 2, 0).astype(np.uint8)
    svg = str(overlays.draw(replace(case, prediction=other), {"a": 1, "b": 2}).svg)
    assert set(np.unique(decoded(svg, "err v0")[0])) == {0, overlays.CONFUSED}
    assert set(np.unique(decoded(svg, "err v1")[0])) == {0, overlays.MISSED}
    assert set(np.unique(decoded(svg, "err v2")[0])) == {0, overlays.EXTRA}


def test_an_outline_runs_around_its_mask_in_mm() -> None:
    svg = str(overlays.draw(one_case(), {"a": 1}).svg)
    (path, *_) = re.findall(r'<path class="ref v0 v1" d="([^"]*)"', svg)
    points = np.array([[float(v) for v in point.split()] for point in re.findall(r"[\d.]+ [\d.]+", path)])
    # columns 4 to 7 from the right, rows 5 to 8 from the front of 2 mm: outer edges at 4..8 and 10..18 mm
    np.testing.assert_allclose([points.min(0), points.max(0)], [[4, 10], [8, 18]], atol=0.01)


def test_a_plane_goes_where_every_structure_shows() -> None:
    mask = np.zeros((8, 8, 8), np.uint8)
    mask[:, :, 1:] = 1
    mask[3:5, 3:5, 6] = 2  # small, so the largest cross-section of all labels together would miss it
    assert overlays._slices(mask, {"a": 1, "b": 2})[2] == 6


def test_a_flat_image_is_drawn_as_it_lies() -> None:
    flat = one_case()
    flat = replace(flat, image=flat.image[0].T, reference=flat.reference[2].T, prediction=flat.prediction[2].T)
    svg = str(overlays.draw(replace(flat, spacing=(1.0, 2.0)), {"a": 1}).svg)
    (drawn,) = decoded(svg, "base")
    assert drawn.shape == (10, 12)
    assert drawn[0, 0] < drawn[-1, -1]
    with pytest.raises(ValueError, match="same axes"):
        overlays.draw(replace(flat, spacing=(1.0,)), {"a": 1})


def test_many_large_cases_still_fit_and_the_worst_stay() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(96, 96, 96)).astype(np.float32)
    big = [replace(one_case((96, 96, 96)), image=noise, rank=rank) for rank in ("best", "median", "worst")]
    kept, left_out = overlays.pictures(big, {"a": 1}, budget=50_000)
    assert [p.rank for p in kept] == ["worst"]
    assert [o.rank for o in left_out] == ["best", "median"]
    assert len(overlays.pictures(big, {"a": 1})[0]) == 3


def test_the_axial_plane_of_a_prepared_scan_is_axial(tmp_path: Path) -> None:
    """From a file with known directions through preprocessing to the picture: the first plane is cut across z."""
    import nibabel

    from fedscan.data.preprocess import Recipe, compute
    from fedscan.data.records import Case

    voxels = np.zeros((12, 10, 8), np.float32)  # x to the right, y to the front, z to the top
    voxels[6:, :, 5] = 100.0  # the right half of one axial slice
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "scan.nii.gz")
    case = Case("c", "s", "A", {"t1": tmp_path / "scan.nii.gz"}, None)
    image = compute(case, Recipe(("t1",), grid=(8, 10, 12), normalise="none"))[0][0]
    mask = (image > 50).astype(np.uint8)
    svg = str(overlays.draw(Overlay("A", "c", "best", 1.0, image, mask, mask, (1.0, 1.0, 1.0)), {"a": 1}).svg)
    axial = decoded(svg, "base")[0]
    assert axial.shape == (10, 12)
    assert axial[:, :6].min() > axial[:, 6:].max()  # the patient's right is at the picture's left
