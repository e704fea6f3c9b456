"""The common form of a set of scans: read, written, and refused with file, line and column."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedscan.data.check import check
from fedscan.data.manifest import Case, Manifest, read_manifest, write_manifest
from nifti import image, label, write

GOOD = """case,subject,site,t1,flair,label,split,age
a1,a,north,img/a1_t1.nii.gz,img/a1_fl.nii,lab/a1.nii.gz,train,61
a2,a,north,img/a2_t1.nii.gz,,,train,

b1,b,south,,img/b1_fl.nii.gz,lab/b1.nii.gz,test,70
"""


def table(folder: Path, text: str) -> Path:
    path = folder / "cases.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_cell_of_the_table_finds_its_place(tmp_path):
    manifest = read_manifest(table(tmp_path, GOOD))
    assert manifest.sequences == ("t1", "flair")
    assert manifest.sites == ("north", "south")
    first, second, third = manifest.cases
    assert first == Case(
        "a1",
        "a",
        "north",
        {"t1": tmp_path / "img/a1_t1.nii.gz", "flair": tmp_path / "img/a1_fl.nii"},
        tmp_path / "lab/a1.nii.gz",
        {"split": "train", "age": "61"},
    )
    assert second.images["flair"] is None
    assert second.label is None
    assert second.extra == {"split": "train"}
    assert third.present == ("flair",)
    assert read_manifest(tmp_path) == manifest
    assert len({*manifest.cases}) == 3


def test_what_is_written_reads_back(tmp_path):
    manifest = replace(read_manifest(table(tmp_path, GOOD)), labels={"liver": 1, "tumour": 2}, intensity="ct")
    before = (tmp_path / "cases.csv").read_text()
    assert write_manifest(manifest, tmp_path) == tmp_path / "cases.csv"
    assert (tmp_path / "cases.csv").read_text() == before.replace("\n\n", "\n")
    assert read_manifest(tmp_path) == manifest


def test_the_advice_for_a_file_elsewhere_can_be_followed(tmp_path):
    """What the sentence says is what helps: a link below the folder is read, and no option of the code is named."""
    write(tmp_path / "elsewhere" / "a.nii", image())
    (tmp_path / "study").mkdir()
    head = "case,subject,site,t1,label\n"
    with pytest.raises(ValueError, match=r"put the file, or a symbolic link to it, there\.$") as caught:
        read_manifest(table(tmp_path / "study", head + "a,a,n,../elsewhere/a.nii,\n"))
    assert "True" not in str(caught.value)
    (tmp_path / "study" / "a.nii").symlink_to(tmp_path / "elsewhere" / "a.nii")
    manifest = read_manifest(table(tmp_path / "study", head + "a,a,n,a.nii,\n"))
    found = check(manifest, need_label=False)
    assert [case.name for case in found.used] == ["a"]


def test_a_table_written_elsewhere_needs_leave(tmp_path):
    manifest = read_manifest(table(tmp_path, GOOD))
    (tmp_path / "study").mkdir()
    with pytest.raises(ValueError, match="does not lie below"):
        write_manifest(manifest, tmp_path / "study")
    path = write_manifest(manifest, tmp_path / "study", outside=True)
    with pytest.raises(ValueError, match=r"line 2, column 't1': .* leads out of"):
        read_manifest(path)
    assert read_manifest(path, outside=True).cases == manifest.cases
    assert read_manifest(path.parent, outside=True).cases == manifest.cases


HEAD = "case,subject,site,t1,label\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"is empty"),
        (HEAD, r"no case was found"),
        ("case,subjet,site,t1,label\n", r"line 1: column 'subject' is missing .*'subjet' meant as 'subject'"),
        ("case;subject;site;t1;label\n", r"separator must be a comma"),
        ("case,subject,site,t1,t1,label\n", r"line 1, column 5: the name 't1' is used twice"),
        ("case,subject,site,,label\n", r"line 1, column 4: the name is empty"),
        ("case,subject,site,label\na,a,n,l.nii\n", r"no sequence column"),
        (HEAD + "a,a,n,a.nii\n", r"line 2: 4 cells where the first line names 5"),
        (HEAD + "a,a,n,a.nii,,\n", r"line 2: 6 cells"),
        (HEAD + ",a,n,a.nii,\n", r"line 2, column 'case': '' cannot be a name"),
        (HEAD + "a,,n,a.nii,\n", r"line 2, column 'subject'"),
        (HEAD + "a,a,../n,a.nii,\n", r"line 2, column 'site': '../n' cannot be a name"),
        (HEAD + "a,a,n,a.png,\n", r"line 2, column 't1': 'a.png' is not an image file"),
        (HEAD + "a,a,n,a.nii,a.txt\n", r"line 2, column 'label': 'a.txt' is not an image file"),
        (HEAD + "a,a,n,a.nii,\nb,b,n,../b.nii,\n", r"line 3, column 't1': '../b.nii' leads out of"),
        (HEAD + "a,a,n,x/../../b.nii,\n", r"line 2, column 't1': .* leads out of"),
        (HEAD + "a,a,n,/etc/b.nii,\n", r"line 2, column 't1': '/etc/b.nii' leads out of"),
        (HEAD + "a,a,n,a.nii,/b.nii\n", r"line 2, column 'label': '/b.nii' leads out of"),
        (HEAD + "a,a,n,a.nii,\nb,b,n,b.nii,\na,c,n,c.nii,\n", r"line 4, column 'case': 'a' stands on line 2"),
        (HEAD + "a,p,n,a.nii,\nb,p,s,b.nii,\n", r"subject 'p' stands at two sites, 'n' and 's'"),
        (HEAD + 'a,a,n,"a.nii,\n', r"cannot be read as a table"),
        ("case,subject,site,age,t1,label\na,a,n,61,a.nii,\n", r"column 'age': '61' is not an image .*after 'label'"),
    ],
)
def test_a_fault_is_named_with_its_place(tmp_path, text, said):
    path = table(tmp_path, text)
    with pytest.raises(ValueError, match=said) as caught:
        read_manifest(path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_text_is_refused(tmp_path):
    (tmp_path / "cases.csv").write_bytes(b"\xff\xfe\x00\x01,\x80")
    with pytest.raises(ValueError, match="cannot be read as a table"):
        read_manifest(tmp_path / "cases.csv")
    with pytest.raises(ValueError, match="does not exist"):
        read_manifest(tmp_path / "nothing")
    (tmp_path / "cases.txt").write_text(GOOD)
    with pytest.raises(ValueError, match="is not a table"):
        read_manifest(tmp_path / "cases.txt")


@pytest.mark.parametrize("text", ["[]", "{", '{"labels": {"a": 0}}', '{"labels": {"a": "1"}}', '{"intensity": "pet"}'])
def test_wrong_facts_beside_the_table_are_refused(tmp_path, text):
    table(tmp_path, GOOD)
    (tmp_path / "cases.json").write_text(text)
    with pytest.raises(ValueError, match=r"cases\.json"):
        read_manifest(tmp_path)


def test_a_byte_order_mark_and_blanks_do_no_harm(tmp_path):
    (tmp_path / "cases.csv").write_bytes(b"\xef\xbb\xbf" + GOOD.replace(",", " , ").replace("\n", "\r\n").encode())
    assert read_manifest(tmp_path).cases == read_manifest(table(tmp_path, GOOD)).cases


def test_a_path_that_turns_back_inside_its_folder_is_fine(tmp_path):
    path = table(tmp_path, HEAD + "a,a,n,x/../a.nii,\n")
    assert read_manifest(path).cases[0].images["t1"] == tmp_path / "a.nii"


def test_a_column_after_label_that_names_images_is_a_sequence(tmp_path):
    path = table(tmp_path, "case,subject,site,label,t1,split\na,a,n,,a.nii,train\n")
    assert read_manifest(path).sequences == ("t1",)
    assert read_manifest(path).cases[0].extra == {"split": "train"}


def test_open_gives_one_volume_also_of_a_shared_file(tmp_path):
    voxels = image(1, (4, 5, 6, 2))
    both = write(tmp_path / "both.nii.gz", voxels, (1, 2, 3))
    case = Case("a", "a", "n", {"t1": both, "t2": both, "pd": None}, write(tmp_path / "l.nii", label(1)))
    assert (case.open("t2").get_fdata() == voxels[..., 1]).all()
    assert case.open("t2").header.get_zooms() == (1, 2, 3)
    assert case.open("label").get_fdata().sum() == 1
    with pytest.raises(ValueError, match="has no 'pd': it has t1, t2"):
        case.open("pd")
    with pytest.raises(ValueError, match=r"is 4D \(4 x 5 x 6 x 2 voxels\) where 1 3D"):
        replace(case, images={"t1": both}).open("t1")


def test_a_manifest_without_case_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no case"):
        Manifest(tmp_path, ("t1",), ())
