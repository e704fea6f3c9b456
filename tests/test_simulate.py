"""The simulated hospitals: the same bits for a seed, plausible patients, and scanners that differ as they say."""

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from fedscan.data import simulate as sim
from fedscan.data.manifest import read_manifest
from fedscan.data.simulate import FIVE, GRID, HARD, SPACING, Hospital, Scanner, hospitals, simulate, write_hospitals

CLEAN = Scanner(gamma=1.0, bias=0.0, noise=0.0)


def scan(scanner: Scanner, number: int = 1) -> NDArray[np.float32]:
    """The scan, with white matter near 1, that a scanner makes of one and the same patient."""
    return simulate(replace(FIVE[0], scanner=scanner), number, 0)[0] / scanner.units


def dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def test_same_seed_same_bits_whatever_came_before() -> None:
    first = simulate(FIVE[1], 3, 5)
    simulate(FIVE[2], 0, 5)
    again = simulate(FIVE[1], 3, 5)
    assert first[0].tobytes() == again[0].tobytes()
    assert first[1].tobytes() == again[1].tobytes()


@pytest.mark.parametrize("other", [(FIVE[1], 3, 6), (FIVE[1], 4, 5), (replace(FIVE[1], name="Oak"), 3, 5)])
def test_seed_number_and_hospital_each_make_another_person(other: tuple[Hospital, int, int]) -> None:
    labels, others = simulate(FIVE[1], 3, 5)[1], simulate(*other)[1]
    assert dice(labels == 2, others == 2) < 0.9


@pytest.mark.parametrize("hospital", hospitals(hard_site=True), ids=lambda hospital: hospital.name)
def test_every_hospital_gives_plausible_cases(hospital: Hospital) -> None:
    image, labels, spacing = simulate(hospital, 1, 0)
    assert image.shape == labels.shape == GRID
    assert all(side % 8 == 0 for side in GRID)
    assert (image.dtype, labels.dtype, spacing) == (np.float32, np.uint8, (SPACING,) * 3)
    assert np.isfinite(image).all()
    assert np.array_equal(image, image.round())
    assert 0 <= image.min() < image.max() < 2**15
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    litres = np.bincount(labels.ravel(), minlength=4) * SPACING**3 / 1e6
    assert 0.6 < litres[1] < 1.5  # grey matter
    assert 0.3 < litres[2] < 0.9  # white matter
    assert 0.001 < litres[3] < 0.12  # lesions
    edge = np.ones(GRID, bool)
    edge[1:-1, 1:-1, :-1] = False
    assert not labels[edge].any()  # the head fits into the picture


@pytest.mark.parametrize(("prevalence", "ill"), [(0.0, 0), (0.3, 3), (0.7, 7), (1.0, 10)])
def test_share_of_cases_with_lesions_is_the_prevalence(prevalence: float, ill: int) -> None:
    hospital = replace(FIVE[0], prevalence=prevalence)
    assert sum((simulate(hospital, number, 0)[1] == 3).any() for number in range(10)) == ill


def test_lesions_are_darker_than_white_matter_and_lie_in_the_brain() -> None:
    for number in (1, 2, 3):
        image, labels, _ = simulate(replace(FIVE[0], scanner=CLEAN), number, 0)
        assert np.median(image[labels == 3]) < 0.7 * np.median(image[labels == 2])
        assert (image[labels == 3] > 0).all()


def test_noise_is_as_strong_as_the_scanner_says() -> None:
    clean = scan(CLEAN)
    white = clean > 0.8
    for noise in (0.02, 0.05):
        assert np.std((scan(replace(CLEAN, noise=noise)) - clean)[white]) == pytest.approx(noise, rel=0.1)


def test_bias_is_a_smooth_field_as_strong_as_the_scanner_says() -> None:
    clean = scan(CLEAN)
    brain = clean > 0.5
    field = np.log(scan(replace(CLEAN, bias=0.3))[brain] / clean[brain])
    assert 0.1 < np.ptp(field) < 0.6
    full = np.zeros(GRID)
    full[brain] = field
    weight = gaussian_filter(brain.astype(float), 1)
    near = gaussian_filter(full, 1)[brain] / weight[brain]
    assert np.std(near - field) < 0.1 * np.std(field)


def roughness(image: NDArray[np.float32], axis: int) -> float:
    return float(np.abs(np.diff(image[8:-8, 8:-8, 8:-8], 2, axis=axis)).mean())


def surface(mask: NDArray[np.bool_]) -> int:
    return sum(int(np.diff(mask, axis=axis).sum()) for axis in range(3))


def test_thick_slices_blur_along_the_axis_only() -> None:
    clean, thick = scan(CLEAN), scan(replace(CLEAN, slice_mm=2 * SPACING))
    assert roughness(thick, 2) < 0.5 * roughness(clean, 2)
    assert roughness(thick, 0) > 0.7 * roughness(clean, 0)


def test_slices_of_the_grid_are_the_grid_and_a_constant_stays_one() -> None:
    for matrix in sim._slices(SPACING):
        np.testing.assert_allclose(matrix, np.eye(GRID[2]), atol=1e-12)
    cut, join = sim._slices(2 * SPACING)
    np.testing.assert_allclose(cut[:, 0], [0.5, 0.5] + [0] * (GRID[2] - 2))
    np.testing.assert_allclose(np.ones(GRID[2]) @ cut @ join, 1)


def test_readers_differ_on_the_same_patient() -> None:
    usual = replace(FIVE[0], generous_mm=0.0, smooth_mm=0.0)
    tight, true, wide = (simulate(replace(usual, generous_mm=mm), 1, 0)[1] for mm in (-1.0, 0.0, 1.0))
    volumes = [int((labels == 3).sum()) for labels in (tight, true, wide)]
    assert volumes[0] < volumes[1] < volumes[2] < 2 * volumes[0]
    smoothed = simulate(replace(usual, smooth_mm=4.0), 1, 0)[1]
    assert surface(smoothed == 2) < 0.95 * surface(true == 2)


def test_hard_site_is_inverted_and_the_others_are_not() -> None:
    t1, _, _, brain = sim.individual(sim._stream(0, HARD.name, 0, "anatomy"))
    kept = brain > 0
    hard = simulate(HARD, 0, 0)[0][kept]
    assert np.corrcoef(hard, t1[kept])[0, 1] < -0.7
    same = simulate(replace(HARD, scanner=FIVE[0].scanner), 0, 0)[0][kept]
    assert np.corrcoef(same, t1[kept])[0, 1] > 0.7
    assert HARD not in hospitals()
    assert hospitals(hard_site=True)[-1] is HARD


def test_number_of_hospitals_is_checked() -> None:
    assert [hospital.name for hospital in hospitals(2)] == ["Alder", "Birch"]
    with pytest.raises(ValueError, match="1 to 5 simulated hospitals, not 6"):
        hospitals(6)


def test_manifest_and_files_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim, "FIVE", tuple(replace(hospital, cases=2) for hospital in FIVE))
    monkeypatch.setattr(sim, "HARD", replace(HARD, cases=1))
    path = write_hospitals(tmp_path, seed=3, hard_site=True)
    assert path.read_text(encoding="utf-8").splitlines()[0] == "case,subject,site,t1,label"
    manifest = read_manifest(path)
    assert len(manifest.cases) == 11
    assert manifest.labels == {"grey matter": 1, "white matter": 2, "lesion": 3}
    case = manifest.cases[3]
    assert case.site == "Birch"
    image, labels, _ = simulate(FIVE[1], 1, 3)
    stored = [case.open(what) for what in ("t1", "label")]
    assert np.array_equal(stored[0].get_fdata(), image)
    assert np.array_equal(np.asanyarray(stored[1].dataobj), labels)
    assert stored[0].header.get_zooms() == stored[1].header.get_zooms() == (SPACING,) * 3
    assert nibabel.aff2axcodes(stored[0].affine) == ("R", "A", "S")
    about = json.loads((tmp_path / "hospitals.json").read_text(encoding="utf-8"))
    assert [entry["name"] for entry in about["hospitals"]] == ["Alder", "Birch", "Cedar", "Elm", "Fir", "Hazel"]
    assert all(entry["description"] for entry in about["hospitals"])
    assert "simulated" in about["about"]


def test_template_is_small_and_carries_its_notices() -> None:
    assets = files("fedscan.data") / "assets"
    assert len((assets / "mni152_2009a_sym_3mm.npz").read_bytes()) < 250_000
    notice = " ".join((assets / "NOTICE.txt").read_text(encoding="utf-8").split())
    assert "Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre" in notice
    assert "Permission to use, copy, modify, and distribute this software and its documentation for any" in notice
    assert "Copyright (c) The nilearn developers." in notice
    assert "Redistributions in binary form" in notice
    t1, grey, white, brain = sim._template()
    assert t1.shape == (50, 62, 53)
    litres = [float(part.sum()) * 0.027e-3 for part in (grey > 0.5, white > 0.5, brain)]
    # The 1 mm originals hold 1.08, 0.63 and 1.89 litres.
    np.testing.assert_allclose(litres, [1.08, 0.63, 1.89], rtol=0.08)
    middle = t1.shape[0] // 2
    assert np.corrcoef(t1[:middle].ravel(), t1[::-1][:middle].ravel())[0, 1] > 0.99  # left is right: symmetric
