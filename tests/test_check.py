"""Planted faults of every kind are found and named; what only looks like a fault is let through."""

import gzip
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedscan.data.check import TooManyLeftOutError, check
from fedscan.data.records import Case, Manifest
from nifti import forbid, image, label, write

SHAPE = (4, 5, 6)


def good_case(root: Path, name: str = "good", site: str = "n") -> Case:
    images = {key: write(root / f"{name}_{key}.nii.gz", image(seed)) for seed, key in enumerate(("t1", "t2"))}
    return Case(name, name, site, images, write(root / f"{name}_label.nii.gz", label(1, 1, 2)))


def verdict(case: Case, **options: object) -> tuple[str, str]:
    """Code and sentence with which the case is left out; ("", "") if it is used."""
    manifest = Manifest(Path("root"), ("t1", "t2"), (case,), {"core": 1, "rim": 2})
    try:
        check(manifest, limit=1.0, **options)  # type: ignore[arg-type]
    except TooManyLeftOutError as error:
        (_, reason) = error.catalogue.left_out[0]
        assert reason.sentence.endswith(".")
        assert "\n" not in reason.sentence
        return reason.code, reason.sentence
    return "", ""


def test_a_good_case_is_used(tmp_path):
    assert verdict(good_case(tmp_path), require=("t1", "t2")) == ("", "")


def damaged(root: Path, fault: str) -> Case:
    """A good case with one fault planted in it."""
    case = good_case(root)
    t1, target = case.images["t1"], case.label
    assert t1 is not None
    assert target is not None
    voxels = image(0)
    match fault:
        case "nan":
            voxels[1, 2, 3] = np.nan
            write(t1, voxels)
        case "inf":
            voxels[1, 2, 3] = -np.inf
            write(t1, voxels)
        case "constant":
            write(t1, np.full(SHAPE, 7, np.int16))
        case "4d":
            write(t1, image(0, (*SHAPE, 3)))
        case "2d":
            write(t1, image(0, SHAPE[:2]))
        case "rgb":
            write(t1, np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]))
        case "grid":
            write(t1, image(0, (4, 5, 7)))
        case "grid affine":
            write(t1, voxels, (1, 1, 1.5))
        case "label shape":
            write(target, label(1, shape=(5, 5, 6)))
        case "label affine":
            write(target, label(1), (1, 1, 1.001))
        case "half label":
            write(target, label(1) * np.float32(0.5))
        case "nan label":
            write(target, np.where(label(1) > 0, np.nan, 0).astype(np.float32))
        case "strange label":
            write(target, label(1, 4))
        case "negative label":
            write(target, label(1).astype(np.int16) * -1)
        case "singular":
            singular = nibabel.Nifti1Image(voxels, None)
            singular.header.set_sform(np.diag([1.0, 0.0, 1.0, 1.0]), 1)
            nibabel.save(singular, t1)
            assert np.linalg.det(nibabel.load(t1).affine) == 0
        case "truncated":
            t1.write_bytes(t1.read_bytes()[:-40])
        case "one byte":
            raw = bytearray(write(t1, image(0, (16, 16, 16))).read_bytes())
            raw[-6] ^= 1  # within the checksum: all voxels can be read
            t1.write_bytes(raw)
        case "garbage":
            t1.write_bytes(b"this is no image")
        case "bare":
            t1.write_bytes(gzip.decompress(t1.read_bytes()))
        case "gone":
            t1.unlink()
        case "folder":
            t1.unlink()
            t1.mkdir()
        case "label gone":
            target.unlink()
    return case


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("nan", "nan", "t1 has 1 voxels that are NaN or infinite, of 120"),
        ("inf", "nan", "1 voxels"),
        ("constant", "empty", "every voxel of t1 is 7"),
        ("4d", "dimensions", "t1 is 4D (4 x 5 x 6 x 3 voxels) where 1 3D"),
        ("2d", "dimensions", "t1 is 2D"),
        ("rgb", "dimensions", "numbers were meant"),
        ("grid", "grid", "t2 (good_t2.nii.gz) has 4 x 5 x 6 voxels, but t1 (good_t1.nii.gz) has 4 x 5 x 7"),
        ("grid affine", "grid", "lie up to 2.5 mm apart"),
        ("label shape", "shape", "label (good_label.nii.gz) has 5 x 5 x 6 voxels, but t1 (good_t1.nii.gz) has 4 x 5 x"),
        ("label affine", "affine", "lie up to 0.005 mm apart by their affines (limit 0.001)"),
        ("half label", "labels", "1 voxels whose label is not a whole number, such as 0.5"),
        ("nan label", "labels", "such as nan"),
        ("strange label", "labels", "has label 4, which is not one of: 1 core, 2 rim"),
        ("negative label", "labels", "has label -1"),
        ("singular", "singular", "good_t1.nii.gz: the affine of the header is singular"),
        ("truncated", "unreadable", "good_t1.nii.gz cannot be read to its end"),
        ("one byte", "unreadable", "CRC"),
        ("garbage", "unreadable", "good_t1.nii.gz"),
        ("bare", "unreadable", "good_t1.nii.gz"),
        ("gone", "file", "good_t1.nii.gz does not exist"),
        ("folder", "file", "good_t1.nii.gz does not exist"),
        ("label gone", "file", "good_label.nii.gz does not exist"),
    ],
)
def test_a_planted_fault_is_found(tmp_path, fault, code, said):
    found, sentence = verdict(damaged(tmp_path, fault))
    assert found == code
    assert said in sentence


def test_what_may_not_be_read_or_does_not_fit_in_memory_is_not_called_damaged(tmp_path, monkeypatch):
    case = good_case(tmp_path)
    forbid(monkeypatch, str(case.images["t2"]))
    code, sentence = verdict(case)
    assert code == "unreadable"
    assert sentence == f"{case.images['t2']} cannot be opened: permission denied."

    def full(path):
        raise MemoryError

    monkeypatch.setattr("nibabel.load", full)
    with pytest.raises(MemoryError):
        verdict(case)


def test_a_truncated_file_without_compression_is_found(tmp_path):
    case = good_case(tmp_path)
    plain = write(tmp_path / "plain.nii", image(0))
    plain.write_bytes(plain.read_bytes()[:-8])
    assert verdict(replace(case, images={"t1": plain}))[0] == "unreadable"


def test_what_is_missing(tmp_path):
    case = good_case(tmp_path)
    half = replace(case, images={"t1": case.images["t1"], "t2": None})
    assert verdict(half) == ("", "")
    assert verdict(half, require=["t2"])[0] == "missing-sequence"
    assert verdict(replace(case, images={"t1": None, "t2": None}))[0] == "no-image"
    assert verdict(replace(case, label=None))[0] == "no-label"
    assert verdict(replace(case, label=None), need_label=False) == ("", "")


def test_what_only_looks_like_a_fault_is_let_through(tmp_path):
    case = good_case(tmp_path)
    assert case.label is not None
    write(case.label, label(1, 2).astype(np.float64))
    assert verdict(case) == ("", "")
    write(case.label, label(1, 2), (1, 1, 1.0001))
    assert verdict(case) == ("", "")
    write(case.label, label())
    assert verdict(case) == ("", "")
    write(case.label, label(1)[..., None])
    assert verdict(case) == ("", "")


def test_an_oblique_pair_agrees_only_in_its_own_frame(tmp_path):
    turn = np.eye(4)
    turn[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    case = good_case(tmp_path)
    nibabel.save(nibabel.Nifti1Image(image(0), turn), tmp_path / "t.nii.gz")
    nibabel.save(nibabel.Nifti1Image(label(1), turn), tmp_path / "l.nii.gz")
    oblique = replace(case, images={"t1": tmp_path / "t.nii.gz"}, label=tmp_path / "l.nii.gz")
    assert verdict(oblique) == ("", "")
    # By hand: the far corner (3, 4) lies at (0.8*3 - 0.6*4, 0.6*3 + 0.8*4) = (0, 5), that is sqrt(10) mm from (3, 4).
    code, sentence = verdict(replace(oblique, label=case.label))
    assert code == "affine"
    assert "up to 3.162 mm apart" in sentence


def several(root: Path, bad: int, of: int) -> Manifest:
    cases = [good_case(root, f"c{number:02d}", site=("n", "s")[number % 2]) for number in range(of)]
    for case in cases[:bad]:
        assert case.label is not None
        case.label.unlink()
    return Manifest(root, ("t1", "t2"), tuple(cases), {"core": 1, "rim": 2})


def test_the_limit_is_a_fraction_or_a_number(tmp_path):
    manifest = several(tmp_path, bad=2, of=10)
    for limit in (0.2, 2, 1.0):
        catalogue = check(manifest, limit=limit)
        assert [case.name for case, _ in catalogue.left_out] == ["c00", "c01"]
        assert (len(catalogue.used), catalogue.expected) == (8, 10)
    for limit in (0.19, 0.0, 1):
        with pytest.raises(ValueError, match=r"2 of 10 cases cannot be used, where the study allows [01]; .*'c00'"):
            check(manifest, limit=limit)
    for limit in (-1, 1.5, float("nan"), True):
        with pytest.raises(ValueError, match="limit ="):
            check(manifest, limit=limit)
    with pytest.raises(ValueError, match="'pd' is required, but the cases have t1, t2"):
        check(manifest, require=["pd"])


def test_no_case_left_is_an_error_whatever_the_limit(tmp_path):
    with pytest.raises(TooManyLeftOutError, match="2 of 2"):
        check(several(tmp_path, bad=2, of=2), limit=1.0)


def test_what_is_declared_and_in_no_case_is_warned_of(tmp_path):
    """Labels 1 and 2 are in the maps, 4 is nowhere; "t2" is only in a case that cannot be used."""
    whole = [good_case(tmp_path, "a"), good_case(tmp_path, "b")]
    good = [Case(c.name, c.subject, c.site, {"t1": c.images["t1"], "t2": None}, c.label) for c in whole]
    lost = Case("c", "c", "n", {"t1": tmp_path / "none.nii", "t2": whole[0].images["t2"]}, whole[0].label)
    labels = {"core": 1, "rim": 2, "oedema": 4}
    found = check(Manifest(tmp_path, ("t1", "t2"), (*good, lost), labels), limit=1)
    assert len(found.warnings) == 2
    assert found.warnings[0].startswith("Sequence 't2' is in none of the 2 cases that can be used:")
    assert found.warnings[1].startswith("Label 'oedema' (value 4) is in none of the 2 label maps that can be used:")
    one = write(tmp_path / "four.nii", label(4))
    rare = Case("d", "d", "n", whole[0].images, one)
    there = Manifest(tmp_path, ("t1", "t2"), (*good, rare), labels)
    assert check(there).warnings == (), "once is enough, though the median volume is 0"
    unlabelled = [Case(c.name, c.subject, c.site, c.images) for c in good]
    silent = check(Manifest(tmp_path, ("t1",), tuple(unlabelled), labels), need_label=False)
    assert silent.warnings == (), "without any label map, nothing is to be said of labels"


def test_label_values_are_counted_by_case(tmp_path):
    """By hand: 1 is in a and b, 2 in a alone, 7 in c; d cannot be used."""
    cases = []
    for name, values in (("a", (1, 1, 2)), ("b", (1,)), ("c", (7,)), ("d", (9,))):
        t1 = write(tmp_path / f"{name}.nii", image(0))
        cases.append(Case(name, name, "n", {"t1": t1}, write(tmp_path / f"{name}_l.nii", label(*values))))
    (tmp_path / "d.nii").write_bytes(b"")
    found = check(Manifest(tmp_path, ("t1",), tuple(cases)), limit=1)
    assert found.values == {1: 2, 2: 1, 7: 1}
    assert found.warnings == (
        "Nothing says what the label values 1, 2, 7 mean: name them in [task] labels of the study.",
    )
    named = check(Manifest(tmp_path, ("t1",), tuple(cases[:2]), {"core": 1, "rim": 2}))
    assert (named.values, named.warnings) == ({1: 2, 2: 1}, ())


def test_the_row_of_a_site(tmp_path):
    spacing = (1.0, 2.0, 3.0)
    cases = []
    for name, values in (("a", (1, 1)), ("b", (1, 1, 1, 1, 2)), ("c", (1, 1, 1))):
        t1 = write(tmp_path / f"{name}.nii", image(0), spacing)
        target = write(tmp_path / f"{name}_l.nii", label(*values), spacing)
        cases.append(Case(name, "ab" if name in "ab" else name, "n", {"t1": t1, "t2": None}, target))
    cases.append(Case("d", "d", "n", {"t1": tmp_path / "none.nii", "t2": None}))
    (row,) = check(Manifest(tmp_path, ("t1", "t2"), tuple(cases), {"core": 1, "rim": 2}), limit=1).sites
    assert (row.site, row.expected, row.used, row.subjects, row.labelled) == ("n", 4, 3, 2, 3)
    assert row.sequences == {"t1": 3, "t2": 0}
    assert row.spacing == spacing
    assert row.volumes == {"core": 18.0, "rim": 0.0}  # medians of 12, 24, 18 and of 0, 6, 0 mm cubed


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 347), value=st.integers(0, 255))
def test_a_changed_header_byte_never_breaks_the_check(tmp_path, place, value):
    case = good_case(tmp_path)
    plain = write(tmp_path / "plain.nii", image(0))
    raw = bytearray(plain.read_bytes())
    raw[place] = value
    plain.write_bytes(raw)
    verdict(replace(case, images={"t1": plain}))
