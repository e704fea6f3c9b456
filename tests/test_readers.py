"""Folders as their publishers lay them out, and the real ones, become lists of cases."""

import json
from collections import Counter
from pathlib import Path

import pytest

from fedscan.data.check import check
from fedscan.data.manifest import read_manifest, write_manifest
from fedscan.data.readers import detect
from fedscan.data.records import IGNORE, Manifest
from nifti import image, label, write
from shared import shared


def fill(root: Path, *names: str, values: tuple[int, ...] = (1,)) -> None:
    """Writes an image under each name; a label map where the name says so."""
    for number, name in enumerate(names):
        marks = ("labelsTr", "seg", "_gt")
        write(root / name, label(*values) if any(mark in name for mark in marks) else image(number))


def describe(root: Path, **facts: object) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(facts))


def files(manifest: Manifest) -> dict[str, tuple[str | None, ...]]:
    """Paths below the root by case: the images in order of the sequences, then the label."""
    return {
        case.name: tuple(
            path and path.relative_to(manifest.root).as_posix() for path in (*case.images.values(), case.label)
        )
        for case in manifest.cases
    }


def good(manifest: Manifest) -> Manifest:
    """The same manifest: its files pass the check, and it reads back from the common form."""
    assert check(manifest, need_label=False).left_out == ()
    written = read_manifest(write_manifest(manifest, manifest.root))
    assert (written.cases, written.labels, written.intensity) == (manifest.cases, manifest.labels, manifest.intensity)
    return manifest


def test_nnunet_raw_second_form(tmp_path):
    describe(
        tmp_path,
        channel_names={"0": "T1", "1": "FLAIR"},
        labels={"background": 0, "oedema": 1, "core": 2, "ignore": 3},
        numTraining=2,
        file_ending=".nii.gz",
    )
    fill(tmp_path, "imagesTr/x_a_0000.nii.gz", "imagesTr/x_a_0001.nii.gz", "imagesTr/x_b_0001.nii.gz")
    fill(tmp_path, "labelsTr/x_a.nii.gz", "labelsTr/x_b.nii.gz", "imagesTs/x_c_0000.nii.gz")
    (tmp_path / "imagesTr/._x_a_0000.nii.gz").write_bytes(b"left by a Mac")
    manifest = detect(tmp_path)
    assert manifest.layout == "nnunet"
    assert manifest.labels == {"oedema": 1, "core": 2, IGNORE: 3}
    assert (manifest.sequences, manifest.intensity) == (("t1", "flair"), "mri")
    assert files(manifest) == {
        "x_a": ("imagesTr/x_a_0000.nii.gz", "imagesTr/x_a_0001.nii.gz", "labelsTr/x_a.nii.gz"),
        "x_b": (None, "imagesTr/x_b_0001.nii.gz", "labelsTr/x_b.nii.gz"),
    }
    good(manifest)


def test_nnunet_first_form_is_told_from_msd_by_its_files(tmp_path):
    facts = {
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver"},
        "training": [{"image": "./imagesTr/c_1.nii.gz", "label": "./labelsTr/c_1.nii.gz"}],
    }
    describe(tmp_path / "nnunet", **facts)
    fill(tmp_path / "nnunet", "imagesTr/c_1_0000.nii.gz", "labelsTr/c_1.nii.gz")
    describe(tmp_path / "msd", **facts)
    fill(tmp_path / "msd", "imagesTr/c_1.nii.gz", "labelsTr/c_1.nii.gz")
    nnunet, msd = good(detect(tmp_path / "nnunet")), good(detect(tmp_path / "msd"))
    assert (nnunet.layout, msd.layout) == ("nnunet", "msd")
    assert files(nnunet) == {"c_1": ("imagesTr/c_1_0000.nii.gz", "labelsTr/c_1.nii.gz")}
    assert files(msd) == {"c_1": ("imagesTr/c_1.nii.gz", "labelsTr/c_1.nii.gz")}
    assert nnunet.labels == msd.labels == {"liver": 1}
    assert nnunet.intensity == msd.intensity == "ct"


def test_nnunet_lists_files_where_it_likes_and_regions_overlap(tmp_path):
    describe(
        tmp_path,
        channel_names={"0": "CT", "1": "PET"},
        file_ending=".nii.gz",
        labels={"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3},
        dataset={"p": {"images": ["raw/ct.nii.gz", "raw/pet.nii.gz"], "label": "raw/seg.nii.gz"}},
    )
    fill(tmp_path, "raw/ct.nii.gz", "raw/pet.nii.gz", "raw/seg.nii.gz")
    manifest = good(detect(tmp_path))
    assert files(manifest) == {"p": ("raw/ct.nii.gz", "raw/pet.nii.gz", "raw/seg.nii.gz")}
    assert manifest.labels == {"label 1": 1, "label 2": 2, "enhancing": 3}
    assert manifest.intensity is None


def test_a_label_without_image_is_a_case_for_the_check(tmp_path):
    describe(tmp_path, channel_names={"0": "T2"}, labels={"background": 0, "a": 1}, file_ending=".nii.gz")
    fill(tmp_path, "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "labelsTr/lost.nii.gz")
    (case, reason), *rest = check(detect(tmp_path), limit=0.5).left_out
    assert (case.name, reason.code, rest) == ("lost", "no-image", [])


def test_msd_with_a_fourth_axis_has_one_sequence_per_volume(tmp_path):
    describe(
        tmp_path,
        name="BRATS",
        modality={"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        labels={"0": "background", "1": "edema"},
        training=[{"image": "./imagesTr/BRATS_001.nii.gz", "label": "./labelsTr/BRATS_001.nii.gz"}],
        test=["./imagesTs/BRATS_002.nii.gz"],
    )
    voxels = image(3, (4, 5, 6, 4))
    write(tmp_path / "imagesTr/BRATS_001.nii.gz", voxels)
    fill(tmp_path, "labelsTr/BRATS_001.nii.gz")
    manifest = good(detect(tmp_path))
    assert manifest.sequences == ("flair", "t1w", "t1gd", "t2w")
    assert (manifest.cases[0].open("t1gd").get_fdata(dtype="float32") == voxels[..., 2]).all()


def test_brats_2021(tmp_path):
    ends = ("t1", "t1ce", "t2", "flair", "seg")
    fill(tmp_path, *(f"BraTS2021_00000/BraTS2021_00000_{end}.nii.gz" for end in ends), values=(1, 2, 4))
    fill(tmp_path, "BraTS2021_00621/BraTS2021_00621_flair.nii.gz", "BraTS2021_00621/BraTS2021_00621_seg.nii.gz")
    manifest = good(detect(tmp_path))
    names = [f"BraTS2021_00000/BraTS2021_00000_{end}.nii.gz" for end in ends]
    assert files(manifest)["BraTS2021_00000"] == tuple(names)
    assert manifest.cases[1].present == ("flair",)
    assert manifest.sequences == ("t1", "t1ce", "t2", "flair")
    assert manifest.labels == {"necrotic core": 1, "oedema": 2, "enhancing tumour": 4}
    assert [case.subject for case in manifest.cases] == ["BraTS2021_00000", "BraTS2021_00621"]


def test_brats_2023_knows_two_examinations_of_one_person(tmp_path):
    ends = ("t1n", "t1c", "t2w", "t2f", "seg")
    for case in ("BraTS-GLI-00005-000", "BraTS-GLI-00005-001", "BraTS-GLI-00006-000"):
        fill(tmp_path, *(f"{case}/{case}-{end}.nii.gz" for end in ends), values=(1, 2, 3))
    (tmp_path / "BraTS-GLI-00007-000").mkdir()
    manifest = detect(tmp_path)
    names = [f"BraTS-GLI-00005-000/BraTS-GLI-00005-000-{end}.nii.gz" for end in ends]
    assert files(manifest)["BraTS-GLI-00005-000"] == tuple(names)
    assert manifest.sequences == ("t1", "t1ce", "t2", "flair")
    assert manifest.labels["enhancing tumour"] == 3
    assert Counter(case.subject for case in manifest.cases)["BraTS-GLI-00005"] == 2
    left = check(manifest, limit=1).left_out
    assert [(case.name, reason.code) for case, reason in left] == [("BraTS-GLI-00007-000", "no-image")]


def test_the_two_brats_forms_do_not_mix(tmp_path):
    fill(tmp_path, "a/a_t1ce.nii.gz", "b/b-t1c.nii.gz")
    with pytest.raises(ValueError, match="mixes BraTS names"):
        detect(tmp_path)


@pytest.mark.parametrize("below", ["", "Training Batch 1/"])
def test_lits(tmp_path, below):
    fill(tmp_path, *(f"{below}{kind}-{n}.nii" for kind in ("volume", "segmentation") for n in (2, 10)), values=(1, 2))
    manifest = good(detect(tmp_path))
    assert files(manifest) == {
        f"volume-{n}": (f"{below}volume-{n}.nii", f"{below}segmentation-{n}.nii") for n in (2, 10)
    }
    assert [case.name for case in manifest.cases] == ["volume-2", "volume-10"]
    assert (manifest.labels, manifest.intensity) == ({"liver": 1, "tumour": 2}, "ct")


def test_lits_twice_the_same_volume_is_refused(tmp_path):
    fill(tmp_path, "volume-2.nii", "volume-2.nii.gz")
    with pytest.raises(ValueError, match="same image of one case"):
        detect(tmp_path)


@pytest.mark.parametrize("below", ["", "training/"])
def test_acdc_keeps_the_frames_of_a_patient_together(tmp_path, below):
    for patient in ("patient001", "patient002"):
        home = f"{below}{patient}/{patient}"
        fill(tmp_path, *(f"{home}_frame{n}{end}.nii.gz" for n in ("01", "12") for end in ("", "_gt")), values=(1, 2, 3))
        write(tmp_path / f"{home}_4d.nii.gz", image(0, (4, 5, 6, 3)))
        info = "ED: 1\nES: 12\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n"
        (tmp_path / below / patient / "Info.cfg").write_text(info)
    manifest = good(detect(tmp_path))
    home = f"{below}patient001/patient001"
    assert files(manifest)["patient001_frame12"] == (f"{home}_frame12.nii.gz", f"{home}_frame12_gt.nii.gz")
    assert [case.subject for case in manifest.cases] == ["patient001"] * 2 + ["patient002"] * 2
    assert [case.extra["phase"] for case in manifest.cases] == ["ED", "ES"] * 2
    assert {case.extra["group"] for case in manifest.cases} == {"DCM"}
    assert {case.extra.get("part") for case in manifest.cases} == {below.rstrip("/") or None}
    assert manifest.labels == {"right ventricle": 1, "myocardium": 2, "left ventricle": 3}


def test_ixi_sites_are_the_hospitals_in_the_names(tmp_path):
    fill(tmp_path, "IXI012-HH-1211_T1.nii.gz", "IXI012-HH-1211_T2.nii.gz", "IXI002-Guys-0828_T1.nii.gz")
    manifest = good(detect(tmp_path))
    assert [(case.name, case.site, case.present) for case in manifest.cases] == [
        ("IXI002", "Guys", ("t1",)),
        ("IXI012", "HH", ("t1", "t2")),
    ]


def test_an_unknown_folder_is_told_what_was_looked_for_and_seen(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"cases\.csv.*hippocampus.*lgg.*nnunet.*msd.*brats.*lits.*acdc.*ixi"
    ) as caught:
        read_manifest(tmp_path)
    assert "saw a.png, pictures/" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_of_two_layouts_is_refused_unless_a_table_speaks_for_it(tmp_path):
    fill(tmp_path, "volume-1.nii", "segmentation-1.nii", "a/a_t1ce.nii.gz")
    with pytest.raises(ValueError, match="fits brats and lits at once"):
        detect(tmp_path)
    (tmp_path / "cases.csv").write_text("case,subject,site,ct,label\nv,v,n,volume-1.nii,segmentation-1.nii\n")
    assert detect(tmp_path).layout == "cases.csv"


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"channel_names": ["T1"], "labels": {}}, "'channel_names'"),
        ({"channel_names": {"1": "T1"}, "labels": {}}, "'channel_names'"),
        ({"channel_names": {"0": "T1"}, "labels": {}, "file_ending": ".png"}, r"'file_ending': '\.png'"),
        ({"channel_names": {"0": "T1"}}, "'labels'"),
        ({"channel_names": {"0": "T1"}, "labels": {"a": "one"}}, "'labels': 'a'"),
        ({"modality": {"0": "MRI"}, "labels": {}, "training": ["imagesTr/a.nii.gz"]}, "training entry 0"),
        ({"modality": {"0": "MRI"}, "labels": {}, "training": [{"image": "../a.nii.gz"}]}, "leads out of"),
        (
            {"channel_names": {"0": "T1"}, "labels": {}, "dataset": {"a": {"images": ["/etc/a.nii"]}}},
            "dataset entry 'a'.*leads out of",
        ),
        ({"channel_names": {"0": "T1"}, "labels": {}, "dataset": {"a": {"images": []}}}, "dataset entry 'a'.*1 PATHS"),
    ],
)
def test_a_wrong_description_is_named(tmp_path, facts, said):
    describe(tmp_path, **facts)
    fill(tmp_path, "imagesTr/a_0000.nii.gz" if "channel_names" in facts else "imagesTr/a.nii.gz")
    with pytest.raises(ValueError, match=said):
        detect(tmp_path)


def test_images_that_the_description_does_not_cover_are_named(tmp_path):
    describe(tmp_path, channel_names={"0": "T1"}, labels={"a": 1})
    fill(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz")
    with pytest.raises(ValueError, match=r"1 channel\(s\), but imagesTr has a_0001"):
        detect(tmp_path)
    (tmp_path / "imagesTr/a_0001.nii.gz").rename(tmp_path / "imagesTr/b.nii.gz")
    with pytest.raises(ValueError, match=r"b\.nii\.gz has no channel number"):
        detect(tmp_path)


def hippocampus_table(root: Path, subjects: list[tuple[str, str, int]]) -> None:
    lines = [f"{name}_{side},{name},{group},{size},{size}" for name, group, size in subjects for side in "lr"]
    (root / "cases.csv").write_text(
        "\n".join(["case,subject_group,intensity_group,voxels_label1,voxels_label2", *lines])
    )


def test_hippocampus_cuts_the_largest_group_by_volume(tmp_path):
    sizes = {f"f{n}": 100 - n for n in range(6)}
    hippocampus_table(tmp_path, [("b", "8bit", 5), ("l", "large", 900), *((s, "float", v) for s, v in sizes.items())])
    site_of = {case.subject: case.site for case in detect(tmp_path).cases}
    thirds = {"f5": 1, "f4": 1, "f3": 2, "f2": 2, "f1": 3, "f0": 3}
    assert site_of == {"b": "8bit", "l": "large"} | {name: f"float-v{third}" for name, third in thirds.items()}


def test_hippocampus_faults_name_their_line(tmp_path):
    hippocampus_table(tmp_path, [("a", "8bit", 5)])
    text = (tmp_path / "cases.csv").read_text()
    (tmp_path / "cases.csv").write_text(text.replace("a_r,a,8bit", "a_r,a,large"))
    with pytest.raises(ValueError, match="line 3: subject 'a' has two intensity groups"):
        detect(tmp_path)
    (tmp_path / "cases.csv").write_text(text.replace("a_r,a,8bit,5", "a_r,a,8bit,many"))
    with pytest.raises(ValueError, match="line 3, column 'voxels_label1': 'many'"):
        detect(tmp_path)


def test_the_real_hippocampus_folder_has_five_sites():
    manifest = detect(shared("hippocampus"))
    catalogue = check(manifest)
    assert (len(catalogue.used), len(catalogue.left_out)) == (167, 0)
    assert {row.site: row.subjects for row in catalogue.sites} == {
        "8bit": 22,
        "float-v1": 23,
        "float-v2": 23,
        "float-v3": 22,
        "large": 15,
    }
    assert len({case.subject for case in manifest.cases}) == 105
    rows = [row.volumes["anterior"] + row.volumes["posterior"] for row in catalogue.sites if row.site[-2:-1] == "v"]
    assert rows == sorted(rows)
    assert all(row.spacing == (1, 1, 1) for row in catalogue.sites)


def test_the_real_glioma_folder_has_three_hospitals_and_missing_sequences():
    manifest = detect(shared("lgg_multisite"))
    catalogue = check(manifest)
    assert catalogue.left_out == ()
    assert {row.site: (row.used, row.sequences) for row in catalogue.sites} == {
        "CS": (11, {"pre": 11, "flair": 11, "post": 11}),
        "DU": (26, {"pre": 26, "flair": 26, "post": 23}),
        "HT": (20, {"pre": 17, "flair": 20, "post": 17}),
    }
    demanding = check(manifest, require=("pre", "post"), limit=6)
    assert [reason.code for _, reason in demanding.left_out] == ["missing-sequence"] * 6
    assert manifest.cases[0].extra["grade"] == "2.0"
