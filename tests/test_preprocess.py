"""From files to arrays: orientation, resampling, normalising, the cache, and the way back to the scan's own grid."""

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fedscan.data import cache as store
from fedscan.data import grids
from fedscan.data.manifest import Case
from fedscan.data.preprocess import Recipe, compute, normalise, prepare, restore
from nifti import forbid
from shared import shared

TURN = np.array([[0.8, -0.36, 0.48], [0.6, 0.48, -0.64], [0.0, 0.8, 0.6]])  # a rotation: its columns are orthonormal
OBLIQUE = np.eye(4)
OBLIQUE[:3] = np.c_[TURN @ np.diag([1.5, 0.9, 2.2]), [-31.0, 12.5, 7.0]]
LEFT = OBLIQUE @ np.diag([-1.0, 1, 1, 1])  # left-handed: its determinant is negative
SWAPPED = LEFT[:, [1, 2, 0, 3]]  # and with other axes first
AFFINES = {"plain": np.diag([1.0, 1, 1, 1]), "oblique": OBLIQUE, "left-handed": LEFT, "swapped": SWAPPED}


def save(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path


def made(folder: Path, affine: np.ndarray | None = None, shape: tuple[int, ...] = (8, 9, 10), **files: object) -> Case:
    """A case with one sequence "t1" of noise and a label map, as (x, y, z) files."""
    g = np.random.default_rng(0)
    image = files.get("image", g.normal(100, 20, shape).astype(np.float32))
    label = files.get("label", g.integers(0, 3, shape).astype(np.uint8))
    images = {"t1": save(folder / "t1.nii.gz", np.asarray(image), affine)}
    return Case("a", "A", "s", images, save(folder / "label.nii.gz", np.asarray(label), affine))


def test_memory_is_z_y_x_of_the_closest_canonical_orientation(tmp_path: Path) -> None:
    for name, affine in AFFINES.items():
        voxels = np.random.default_rng(1).normal(size=(5, 6, 7)).astype(np.float32)
        image = nib.load(save(tmp_path / f"{name}.nii.gz", voxels, affine))
        canonical = nib.as_closest_canonical(image)
        grid = grids.grid_of(image)
        assert np.array_equal(grids.to_memory(image), canonical.get_fdata(dtype=np.float32).transpose(2, 1, 0)), name
        assert grid.shape == canonical.shape[::-1]
        assert grid.spacing == pytest.approx(nib.affines.voxel_sizes(canonical.affine)[::-1])
        for d, h, w in ((0, 0, 0), (3, 1, 2)):
            np.testing.assert_allclose(grid.affine @ [d, h, w, 1], canonical.affine @ [w, h, d, 1])
        assert np.array_equal(grids.to_file(grids.to_memory(image), affine), voxels)


def test_a_resized_grid_fills_the_same_box() -> None:
    grid = grids.Grid((4, 6, 8), OBLIQUE).resized((8, 3, 8))
    assert grid.spacing == pytest.approx((0.75, 1.8, 2.2))
    corner = np.array([-0.5, -0.5, -0.5, 1])  # the outer face, not the first centre
    np.testing.assert_allclose(grid.affine @ corner, OBLIQUE @ corner)
    far = grid.affine @ [7.5, 2.5, 7.5, 1]
    np.testing.assert_allclose(far, OBLIQUE @ [3.5, 5.5, 7.5, 1])
    near = grids.Grid((10, 10, 10), np.eye(4)).spaced((3.0, 1.0, 0.5))
    assert near.shape == (3, 10, 20)
    assert near.spacing == pytest.approx((10 / 3, 1, 0.5))  # as near as whole voxels come


@pytest.mark.parametrize("shape", [(7, 24, 9), (24, 6, 5)])
def test_trilinear_is_exact_on_a_ramp(shape: tuple[int, int, int]) -> None:
    old = (12, 12, 10)
    coefficients = np.array([2.0, -1.0, 0.5])
    ramp = np.tensordot(coefficients, np.indices(old), 1).astype(np.float32)
    got = grids.resample(ramp, shape)
    where = [(np.arange(m) + 0.5) * n / m - 0.5 for n, m in zip(old, shape, strict=True)]
    where = [np.clip(p, 0, n - 1) for p, n in zip(where, old, strict=True)]  # beyond the border its value goes on
    expected = sum(c * p for c, p in zip(coefficients, np.meshgrid(*where, indexing="ij"), strict=True))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_nearest_takes_the_voxel_that_holds_the_point() -> None:
    row = np.arange(5).reshape(5, 1, 1)
    assert grids.resample(row, (2, 1, 1), order=0).ravel().tolist() == [1, 3]  # points 1.25 and 3.75 of faces 0 to 5
    assert grids.resample(row, (10, 1, 1), order=0).ravel().tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert grids.resample(row, (5, 1, 1)) is row


def test_per_label_takes_each_label_where_its_own_mask_reaches_a_half() -> None:
    # points of 4 voxels in 3: -0.5 + (i + 0.5) * 3 / 4 = -0.125, 0.625, 1.375, 2.125
    labels = np.array([1, 2, 0], dtype=np.uint8).reshape(3, 1, 1)
    # masks there: label 1 [1, .375, 0, 0], label 2 [0, .625, .625, 0], background [0, 0, .375, 1]
    assert grids.resample_labels(labels, (4, 1, 1)).ravel().tolist() == [1, 2, 2, 0]
    # 1, 2, 3 meeting: at a third each nobody reaches a half
    corner = np.array([[1, 2], [3, 4]], dtype=np.uint8).reshape(1, 2, 2)
    assert grids.resample_labels(corner, (1, 1, 1)).ravel().tolist() == [0]
    assert grids.resample_labels(corner, (1, 1, 1), "nearest").ravel().tolist() == [4]
    # two labels that share a point evenly: the later one wins
    assert grids.resample_labels(np.array([[[1, 2]]], dtype=np.uint8), (1, 1, 1)).item() == 2


def test_slices_are_not_mixed_where_they_are_thick() -> None:
    assert grids.thick_axis((5, 1, 1), (1, 1, 1)) == 0
    assert grids.thick_axis((3, 1, 1), (1, 1, 1)) is None  # 3 is not more than 3
    assert grids.thick_axis((1, 1, 1), (1, 1, 4)) == 2
    assert grids.thick_axis((5, 5, 1), (1, 1, 1)) is None  # two coarse axes are no slices
    volume = np.zeros((4, 6, 6), dtype=np.float32)
    volume += np.array([0, 10, 20, 30])[:, None, None]
    up = grids.resample(volume, (8, 9, 9), order=3, thick=0)
    assert sorted(set(np.round(up.ravel(), 3).tolist())) == [0, 10, 20, 30]
    assert up[:, 0, 0].round(3).tolist() == [0, 0, 10, 10, 20, 20, 30, 30]
    square = np.tile((np.arange(12.0) ** 2).reshape(1, 12, 1), (2, 1, 3)).astype(np.float32)
    cubic = grids.resample(square, (2, 24, 3), order=3, thick=0)[0, :, 0]
    place = (np.arange(24) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(cubic[8:-8], place[8:-8] ** 2, atol=0.02)  # linear would be off by 0.1875
    recipe = Recipe(("t1",), spacing=(1.0, 1.0, 1.0))
    assert recipe.target(grids.Grid((4, 9, 9), np.diag([5.0, 1, 1, 1])))[1] == 0


def test_normalising_by_hand() -> None:
    x = np.array([0, 2, 4, 6], dtype=np.float32)
    inside = x != 0
    whole = normalise(x, inside, Recipe(("t1",)))  # mean 3, sd sqrt(5)
    np.testing.assert_allclose(whole, (np.array([0, 2, 4, 6]) - 3) / np.sqrt(5), rtol=1e-6)
    fore = normalise(x, inside, Recipe(("t1",), normalise="zscore-foreground"))  # mean 4, sd sqrt(8 / 3); 0 stays
    np.testing.assert_allclose(fore, [0, -2 / np.sqrt(8 / 3), 0, 2 / np.sqrt(8 / 3)], rtol=1e-6)
    hu = np.array([-1000, -100, 50, 300], dtype=np.float32)
    window = Recipe(("ct",), normalise="ct", ct_window=(-150.0, 250.0))
    np.testing.assert_allclose(normalise(hu, hu != 0, window), [-1, -0.75, 0, 1])
    given = Recipe(("ct",), normalise="ct", ct_window=(-150.0, 250.0), ct_mean=100.0, ct_sd=50.0)
    np.testing.assert_allclose(normalise(hu, hu != 0, given), [-5, -4, -1, 3])
    clipped = Recipe(("ct",), normalise="none", ct_window=(-150.0, 250.0))
    np.testing.assert_allclose(normalise(hu, hu != 0, clipped), [-150, -100, 50, 250])
    with pytest.raises(ValueError, match="same value"):
        normalise(np.full(4, 7.0, dtype=np.float32), np.ones(4, dtype=bool), Recipe(("t1",)))


def test_a_missing_sequence_is_a_zero_channel_that_is_not_present(tmp_path: Path) -> None:
    case = made(tmp_path)
    case = Case("a", "A", "s", {**case.images, "t2": None}, case.label)
    found = prepare(case, Recipe(("t2", "t1"), grid=(4, 4, 4)), tmp_path / "cache")
    assert found.present == (False, True)
    assert found.image.shape == (2, 4, 4, 4)
    assert not found.image[0].any()
    assert float(found.image[1].mean()) == pytest.approx(0, abs=1e-6)
    assert float(found.image[1].std()) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="none of the sequences"):
        compute(case, Recipe(("t2",)))


def test_labels_are_mapped_and_unknown_values_refused(tmp_path: Path) -> None:
    label = np.zeros((4, 4, 4), dtype=np.uint8)
    label[1] = 4
    label[2] = 2
    case = made(tmp_path, shape=(4, 4, 4), label=label)
    found = prepare(case, Recipe(("t1",), labels={2: 1, 4: 2}), tmp_path / "cache")
    assert found.label is not None
    assert found.label[0, 0].tolist() == [0, 2, 1, 0]  # x runs along the last axis
    with pytest.raises(ValueError, match=r"'a'.* holds 4"):
        prepare(case, Recipe(("t1",), labels={2: 1}), tmp_path / "cache")
    back = restore(np.asarray(found.label), case.images["t1"], Recipe(("t1",), labels={2: 1, 4: 2}))  # type: ignore[arg-type]
    assert np.array_equal(np.asarray(back.dataobj), label)
    half = made(tmp_path, shape=(4, 4, 4), label=label / 8)
    with pytest.raises(ValueError, match="no label"):
        compute(half, Recipe(("t1",)))


def test_damaged_and_ill_fitting_files_are_refused_with_the_case_and_the_reason(tmp_path: Path) -> None:
    good = made(tmp_path)
    path = good.images["t1"]
    assert path is not None
    shifted = save(tmp_path / "far.nii.gz", np.zeros((8, 9, 10), dtype=np.uint8), np.diag([1, 1, 1.2, 1]))
    with pytest.raises(ValueError, match=r"'a'.*'label' lies on another grid .* lies up to 1.8 mm apart\)"):
        compute(Case("a", "A", "s", good.images, shifted), Recipe(("t1",)))
    moved = np.eye(4)
    moved[:2, 3] = 3, 4  # mm
    two = [save(tmp_path / f"two{i}.nii", np.eye(4, dtype=np.uint8)[None], at) for i, at in enumerate((None, moved))]
    with pytest.raises(ValueError, match=r"'t2' lies on another grid .*\(the same voxel lies up to 5 mm apart\):"):
        compute(Case("a", "A", "s", dict(zip(("t1", "t2"), two, strict=True))), Recipe(("t1", "t2")))
    other = save(tmp_path / "other.nii", np.eye(5, dtype=np.uint8)[None], np.eye(4))
    with pytest.raises(ValueError, match=r"'t2'.*\(shape \(5, 5, 1\) against \(4, 4, 1\), spacing 1 x 1 x 1 against"):
        compute(Case("a", "A", "s", {"t1": two[0], "t2": other}), Recipe(("t1", "t2")))
    holes = np.ones((8, 9, 10), dtype=np.float32)
    holes[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        compute(made(tmp_path, image=holes), Recipe(("t1",)))
    with pytest.raises(ValueError, match=r"'t1'.*same value"):
        compute(made(tmp_path, image=np.ones((8, 9, 10), dtype=np.float32)), Recipe(("t1",)))
    big = np.random.default_rng(0).normal(0, 1e6, (8, 9, 10)).astype(np.float32)
    with pytest.raises(ValueError, match="too large for float16"):
        compute(made(tmp_path, image=big), Recipe(("t1",), normalise="none", dtype="float16"))
    made(tmp_path)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"'a'.*damaged"):
        prepare(good, Recipe(("t1",)), tmp_path / "cache")
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"'a'.*cannot be read"):
        prepare(good, Recipe(("t1",)), tmp_path / "cache")
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        prepare(good, Recipe(("t1",)), tmp_path / "cache")


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = made(tmp_path)
    forbid(monkeypatch, str(case.images["t1"]))
    with pytest.raises(ValueError, match=r"^Case 'a': .*t1.* cannot be opened: permission denied\.$"):
        compute(case, Recipe(("t1",)))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sequences": ()}, "at least one"),
        ({"grid": (4, 4, 4), "spacing": (1.0, 1.0, 1.0)}, "exclude"),
        ({"grid": (4, 4)}, "three whole numbers"),
        ({"spacing": (1.0, 0.0, 1.0)}, "above 0"),
        ({"normalise": "minmax"}, "zscore-foreground"),
        ({"normalise": "ct"}, "needs ct_window"),
        ({"ct_window": (5.0, 5.0)}, "low < high"),
        ({"ct_mean": 5.0}, "go together"),
        ({"labels": {1: 300}}, "0 to 255"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Recipe(**{"sequences": ("t1",), **wrong})  # type: ignore[arg-type]


def test_arrays_are_memory_maps_in_the_recipes_dtype(tmp_path: Path) -> None:
    case = made(tmp_path)
    for dtype in ("float32", "float16"):
        found = prepare(case, Recipe(("t1",), dtype=dtype), tmp_path / "cache")  # type: ignore[arg-type]
        assert isinstance(found.image, np.memmap)
        assert isinstance(found.label, np.memmap)
        assert found.image.dtype == dtype
        assert not found.image.flags.writeable
    assert found.label.dtype == np.uint8


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cases that are really computed from now on."""
    from fedscan.data import preprocess

    done: list[str] = []
    monkeypatch.setattr(preprocess, "compute", lambda case, recipe: done.append(case.name) or compute(case, recipe))
    return done


def entries(cache: Path) -> list[Path]:
    return [p.parent for p in cache.glob("*/entry.json")]


def test_the_cache_is_hit_by_content_and_missed_by_any_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, case, cache, recipe = counted(monkeypatch), made(tmp_path), tmp_path / "cache", Recipe(("t1",))
    first = prepare(case, recipe, cache)
    second = prepare(case, recipe, cache)
    assert len(done) == 1
    assert np.array_equal(first.image, second.image)
    moved = tmp_path / "elsewhere.nii.gz"
    image, label = case.images["t1"], case.label
    assert image is not None
    assert label is not None
    moved.write_bytes(image.read_bytes())
    other = prepare(Case("b", "B", "t", {"t1": moved}, label), recipe, cache)  # same bytes elsewhere: same entry
    assert len(done) == 1
    assert (other.name, other.subject, other.site) == ("b", "B", "t")
    prepare(case, Recipe(("t1",), grid=(4, 4, 4)), cache)
    prepare(Case("a", "A", "s", case.images, None), recipe, cache)
    assert len(done) == 3
    changed = np.asarray(nib.load(image).dataobj).copy()
    changed[0, 0, 0] += 1
    save(image, changed)
    assert not np.array_equal(prepare(case, recipe, cache).image, first.image)
    assert len(done) == 4
    assert len(entries(cache)) == 4
    assert not list(cache.glob(".*"))


def test_files_that_are_known_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, cache = made(tmp_path), tmp_path / "cache"
    prepare(case, Recipe(("t1",)), cache)
    read: list[Path] = []
    real = store._digest
    monkeypatch.setattr(store, "_digest", lambda path: read.append(path) or real(path))
    prepare(case, Recipe(("t1",)), cache)
    assert read == []
    prepare(case, Recipe(("t1",)), cache, verify=True)
    assert sorted(p.name for p in read) == ["image.npy", "label.npy"]


def damage(entry: Path, how: str) -> None:
    image, record = entry / "image.npy", entry / "entry.json"
    data = bytearray(image.read_bytes())
    if how.startswith("truncated"):
        time = image.stat().st_mtime_ns
        image.write_bytes(data[:-5])
        if how == "truncated unseen":
            os.utime(image, ns=(time, time))
    elif how == "flipped":
        data[-1] ^= 1
        image.write_bytes(data)
    elif how == "gone":
        image.unlink()
    elif how == "no record":
        record.unlink()
    elif how == "half a record":
        record.write_bytes(record.read_bytes()[:-9])
    else:
        text = json.loads(record.read_text())
        text["arrays"]["image"]["sha256"] = "0" * 64
        record.write_text(json.dumps(text))


HOWS = ("truncated", "truncated unseen", "flipped", "gone", "no record", "half a record", "wrong hash")


@pytest.mark.parametrize("how", HOWS)
def test_a_damaged_entry_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    done, case, cache = counted(monkeypatch), made(tmp_path), tmp_path / "cache"
    sound = np.array(prepare(case, Recipe(("t1",)), cache).image)
    damage(entries(cache)[0], how)
    again = prepare(case, Recipe(("t1",)), cache)
    assert len(done) == 2
    assert np.array_equal(again.image, sound)
    prepare(case, Recipe(("t1",)), cache, verify=True)
    assert len(done) == 2
    assert not list(cache.glob(".*"))


def test_an_entry_whose_times_changed_is_hashed_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, case, cache = counted(monkeypatch), made(tmp_path), tmp_path / "cache"
    prepare(case, Recipe(("t1",)), cache)
    os.utime(entries(cache)[0] / "image.npy", ns=(1, 1))  # as when a cache is copied
    read: list[Path] = []
    real = store._digest
    monkeypatch.setattr(store, "_digest", lambda path: read.append(path) or real(path))
    prepare(case, Recipe(("t1",)), cache)
    prepare(case, Recipe(("t1",)), cache)
    assert [p.name for p in read] == ["image.npy"]
    assert len(done) == 1


def blob(native: grids.Grid, centre: np.ndarray, radius: float) -> np.ndarray:
    """A ball of ``radius`` mm about a point in space, as (D, H, W) on a grid."""
    place = np.tensordot(native.affine, np.stack([*np.indices(native.shape), np.ones(native.shape)]), 1)[:3]
    inside = np.linalg.norm(place - centre[:, None, None, None], axis=0) <= radius
    return inside.astype(np.uint8)


def centre_of(image: nib.Nifti1Image) -> np.ndarray:
    """The centre of a segmentation's voxels in world coordinates, by its own affine."""
    voxels = np.argwhere(np.asarray(image.dataobj) > 0)
    return (image.affine @ np.r_[voxels.mean(0), 1])[:3]


ROUTES = {
    "native": {},
    "grid": {"grid": (20, 18, 22)},
    "spacing": {"spacing": (1.2, 1.2, 1.2)},
    "thick": {"spacing": (7.0, 1.0, 1.0)},
    "nearest": {"grid": (40, 36, 30), "label_interpolation": "nearest"},
}


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_a_landmark_comes_back_to_the_same_world_coordinate(
    tmp_path: Path, route: dict[str, object], affine: np.ndarray
) -> None:
    shape = (30, 34, 26)
    centre = (affine @ [16.2, 15.7, 12.4, 1])[:3]
    path = save(tmp_path / "scan.nii.gz", np.random.default_rng(0).normal(size=shape).astype(np.float32), affine)
    native = grids.grid_of(nib.load(path))
    label = grids.to_file(blob(native, centre, 9.0), affine)
    case = Case("a", "A", "s", {"t1": path}, save(tmp_path / "label.nii.gz", label, affine))
    recipe = Recipe(("t1",), **route)  # type: ignore[arg-type]
    found = prepare(case, recipe, tmp_path / "cache")
    assert found.label is not None
    prepared = np.argwhere(found.label > 0).mean(0)
    slack = 0.15 * max(*native.spacing, *found.spacing)
    np.testing.assert_allclose((found.affine @ [*prepared, 1])[:3], centre, atol=slack)
    for segmentation in (np.asarray(found.label), np.stack([found.label == 0, found.label == 1]).astype(np.float32)):
        back = restore(segmentation, path, recipe)
        assert back.shape == shape
        np.testing.assert_allclose(back.affine, affine, atol=1e-6)
        np.testing.assert_allclose(centre_of(back), centre, atol=slack)
        nib.save(back, tmp_path / "back.nii.gz")
        again = nib.load(tmp_path / "back.nii.gz")
        np.testing.assert_allclose(again.affine, affine, atol=1e-5)
        assert again.get_data_dtype() == np.uint8
        if not route:
            assert np.array_equal(np.asarray(again.dataobj), label)


def test_a_segmentation_of_another_shape_or_class_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path).images["t1"]
    assert path is not None
    with pytest.raises(ValueError, match="this scan gives"):
        restore(np.zeros((8, 9, 10), dtype=np.uint8), path, Recipe(("t1",)))  # (x, y, z) where (D, H, W) was meant
    with pytest.raises(ValueError, match="holds 7"):
        restore(np.full((10, 9, 8), 7, dtype=np.uint8), path, Recipe(("t1",), labels={1: 1}))


def test_a_real_left_handed_scan_goes_there_and_back(tmp_path: Path) -> None:
    path = sorted(shared("ixi_t1_2mm").glob("*.nii.gz"))[0]
    image = nib.load(path)
    assert np.linalg.det(image.affine[:3, :3]) < 0  # as stored; RAS+ is right-handed
    native = grids.grid_of(image)
    centre = (native.affine @ [50, 60, 20, 1])[:3]  # well off the middle, in the left half of the head
    truth = blob(native, centre, 15.0)
    label = save(tmp_path / "label.nii.gz", grids.to_file(truth, image.affine), image.affine)
    recipe = Recipe(("t1",), grid=(64, 64, 64))
    found = prepare(Case("ixi", "ixi", "s", {"t1": path}, label), recipe, tmp_path / "cache")
    assert found.image.shape == (1, 64, 64, 64)
    assert found.spacing == pytest.approx([n * s / 64 for n, s in zip(native.shape, native.spacing, strict=True)])
    assert np.linalg.det(found.affine[:3, :3]) < 0  # (D, H, W) is (z, y, x): the reversal turns the sign of RAS+
    back = restore(np.asarray(found.label), path, recipe)
    assert back.shape == image.shape
    np.testing.assert_allclose(back.affine, image.affine, atol=1e-5)
    np.testing.assert_allclose(centre_of(back), centre, atol=0.6)
    again = grids.to_memory(back)
    assert 2 * (again & truth).sum() / (again.sum() + truth.sum()) > 0.94
    where = np.argwhere(grids.to_memory(image) > 120).mean(0)  # tissue: its middle lies where RAS+ says
    assert abs((native.affine @ [*where, 1])[0]) < 15


def test_a_real_hippocampus_keeps_its_labels(tmp_path: Path) -> None:
    folder = shared("hippocampus")
    name = "hippocampus_003.nii.gz"
    case = Case("h3", "pair002", "float", {"t1": folder / "images" / name}, folder / "labels" / name)
    found = prepare(case, Recipe(("t1",)), tmp_path / "cache")
    assert found.label is not None
    assert found.image.shape == (1, 35, 52, 34)  # the file is 34 x 52 x 35
    assert np.bincount(found.label.ravel()).tolist() == [58527, 1550, 1803]
    assert float(found.image.mean(dtype=np.float64)) == pytest.approx(0, abs=1e-5)
    assert float(found.image.std(dtype=np.float64)) == pytest.approx(1, abs=1e-5)
    grid = prepare(case, Recipe(("t1",), grid=(32, 48, 32)), tmp_path / "cache")
    assert grid.label is not None
    volume = np.bincount(grid.label.ravel()) * np.prod(grid.spacing)
    assert volume[1:] == pytest.approx([1550, 1803], rel=0.04)  # in mm3, though there are fewer voxels


def test_a_real_glioma_without_its_post_sequence(tmp_path: Path) -> None:
    folder = shared("lgg_multisite")
    where = sorted(p for p in folder.iterdir() if p.is_dir() and not (p / "post.nii.gz").exists())[0]
    names = ("pre", "flair", "post")
    images = {n: where / f"{n}.nii.gz" if (where / f"{n}.nii.gz").exists() else None for n in names}
    found = prepare(Case(where.name, where.name, "s", images, where / "mask.nii.gz"), Recipe(names), tmp_path / "c")
    assert found.present == tuple(images[n] is not None for n in names)
    assert not found.present[2]
    assert found.present[1]
    assert not found.image[2].any()
    assert found.image[1].std() == pytest.approx(1, abs=1e-3)
    assert found.label is not None
    assert found.label.max() == 1
