"""What a hospital registers, what of it may be shown outside, and the commands by which it agrees, end to end."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from commands import Command
from fedscan.consortium import catalogue
from fedscan.consortium.catalogue import Catalogue, Item, identifier, read, register, secret_of, shown
from fedscan.consortium.member import Home
from fedscan.consortium.policy import Policy
from fedscan.data.manifest import read_manifest
from fedscan.run import Problem
from fedscan.spec import Refused
from hospitals import NOW, consortium
from tinystudy import STUDY, write_scans

torch.set_num_threads(1)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Seven cases of "east", of which one cannot be read."""
    folder = write_scans(tmp_path / "scans", ("east",), 7, side=8)
    (folder / "east3_t1.nii").write_bytes(b"not a scan")
    return folder


def test_it_says_what_there_is_and_what_is_left_out(scans: Path, tmp_path: Path) -> None:
    made = register("east", scans, tmp_path, NOW)
    assert read(tmp_path) == made
    assert (len(made.items), len(made.used), made.sequences) == (7, 6, ("t1",))
    assert made.spacing == (1.0, 1.0, 2.0)
    assert made.found == {"1": 6}
    assert [(one.case, one.code) for one in made.left_out] == [("east3", "unreadable")]
    assert made.letters == len(r'"\"0123456789abcdef\""')  # of a code, which is what a case is called outside
    assert (tmp_path / catalogue.SECRET).stat().st_mode & 0o777 == 0o600


def test_an_identifier_is_of_the_content_and_of_this_hospital(scans: Path, tmp_path: Path) -> None:
    made = register("east", scans, tmp_path, NOW)
    assert len({one.id for one in made.items}) == 7
    assert [one.id for one in register("east", scans, tmp_path, NOW).items] == [one.id for one in made.items]
    case, secret = read_manifest(scans).cases[0], secret_of(tmp_path)
    assert identifier(case, secret) == made.items[0].id
    assert identifier(replace(case, name="other", subject="other"), secret) == made.items[0].id
    assert identifier(case, bytes(32)) != made.items[0].id
    assert identifier(replace(case, label=None), secret) != made.items[0].id
    path = case.images["t1"]
    assert path is not None
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert identifier(case, secret) != made.items[0].id


def test_the_key_of_the_identifiers_is_the_hospitals_alone(tmp_path: Path) -> None:
    secret = secret_of(tmp_path)
    assert secret == secret_of(tmp_path)
    assert len(secret) == 32
    (tmp_path / catalogue.SECRET).chmod(0o640)
    with pytest.raises(Refused, match="may be read by others"):
        secret_of(tmp_path)
    (tmp_path / catalogue.SECRET).chmod(0o600)
    (tmp_path / catalogue.SECRET).write_bytes(b"short")
    with pytest.raises(Refused, match="is damaged"):
        secret_of(tmp_path)


def test_where_no_case_can_be_used_nothing_is_registered(scans: Path, tmp_path: Path) -> None:
    register("east", scans, tmp_path, NOW)
    before = (tmp_path / "catalogue.json").read_bytes()
    for path in scans.glob("*_t1.nii"):
        path.unlink()
    with pytest.raises(Problem, match=r"none of \d+ cases can be used, so nothing is registered: .+ check` lists them"):
        register("east", scans, tmp_path, NOW)
    assert (tmp_path / "catalogue.json").read_bytes() == before


def test_scans_of_other_hospitals_are_not_registered(tmp_path: Path) -> None:
    both = write_scans(tmp_path / "both", ("east", "west"), 1, side=8)
    with pytest.raises(Problem, match=r"of 2 hospitals \(east, west\); register those of 'east' only"):
        register("east", both, tmp_path, NOW)
    west = write_scans(tmp_path / "west", ("west",), 1, side=8)
    with pytest.raises(Problem, match="the cases are of 'west', and this folder is that of 'east'"):
        register("east", west, tmp_path, NOW)
    with pytest.raises(Problem, match=r"has no catalogue\.json yet"):
        read(tmp_path)
    (tmp_path / catalogue.FILE).write_text('{"items": 3}')
    with pytest.raises(Refused, match="is not a catalogue"):
        read(tmp_path)


def of(patients: int, with_flair: int, left_out: int = 0, cases_each: int = 1, lesions: int = 0) -> Catalogue:
    items = [
        Item(f"{p}.{c}", f"case {p}.{c}", f"patient {p}", ("t1", "flair") if p < with_flair else ("t1",), True)
        for p in range(patients)
        for c in range(cases_each)
    ]
    items += [Item(f"q{i}", f"q{i}", f"q{i}", ("t1",), True, "nan", "It has NaN.") for i in range(left_out)]
    return Catalogue(
        "east", "/scans", "", "cases.csv", ("t1", "flair"), {"lesion": 1}, (1.0, 1.0, 2.345), {"lesion": 1234.5},
        {"1": lesions}, tuple(items),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("patients", "flair", "left_out", "said"),
    [
        (20, 12, 0, {"patients": 20, "patients_by_sequence": {"t1": 20, "flair": 12}, "left_out": 0}),
        (20, 5, 5, {"patients_by_sequence": {"t1": 20, "flair": 5}, "left_out": 5}),
        (20, 4, 4, {"patients_by_sequence": {"t1": 20, "flair": None}, "left_out": None}),
        (20, 16, 1, {"patients_by_sequence": {"t1": 20, "flair": None}, "left_out": None}),  # 4 have none
        (20, 0, 0, {"patients_by_sequence": {"t1": 20, "flair": 0}}),
        (4, 4, 0, {"patients": None, "cases": None, "patients_by_sequence": {"t1": None, "flair": None},
                   "spacing_mm": None, "volumes_mm3": {"lesion": None}, "patients_labelled": None}),
    ],
)  # fmt: skip
def test_small_groups_are_withheld(patients: int, flair: int, left_out: int, said: dict[str, object]) -> None:
    outside = shown(of(patients, flair, left_out), 5)
    assert {key: outside[key] for key in said} == said


def test_no_number_shown_outside_tells_of_a_small_group() -> None:
    """Whatever is shown, and whatever can be had by subtracting two of it, is of 0 or of at least k patients."""
    for k in (5, 8):
        for patients in range(25):
            for flair in range(patients + 1):
                outside = shown(of(patients, flair, left_out=patients % 7), k)
                numbers = [outside["patients"], outside["left_out"], *outside["patients_by_sequence"].values()]
                given = [n for n in numbers if n is not None]
                assert all(n == 0 or n >= k for n in given), (patients, flair)
                total = outside["patients"]
                if total is not None:
                    parts = [n for n in outside["patients_by_sequence"].values() if n is not None]
                    assert all(total - n == 0 or total - n >= k for n in parts)
                assert "case" not in json.dumps(outside).replace('"cases"', "")


def test_medians_are_of_enough_patients_and_not_exact() -> None:
    assert shown(of(20, 0, lesions=20), 5)["volumes_mm3"] == {"lesion": 1200.0}
    assert shown(of(20, 0, lesions=20), 5)["spacing_mm"] == [1.0, 1.0, 2.3]
    assert shown(of(20, 0, lesions=4), 5)["volumes_mm3"] == {"lesion": None}
    # 12 maps with a lesion among 40 cases of 20 patients may be of as few as 6 patients; fewer are not vouched for
    assert shown(of(20, 0, cases_each=2, lesions=25), 5)["volumes_mm3"] == {"lesion": 1200.0}
    assert shown(of(20, 0, cases_each=2, lesions=24), 5)["volumes_mm3"] == {"lesion": None}


# -- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def east(tmp_path: Path) -> Home:
    """A hospital in a consortium, with twelve scans beside it, and a study."""
    write_scans(tmp_path / "scans", ("east",), 12, side=16)
    (tmp_path / "study.toml").write_text(STUDY.format(method="fedavg", more=""))
    homes = consortium(tmp_path / "homes", "east", "west", now=datetime.now(UTC))
    shutil.move(homes["east"].folder, tmp_path / "east")
    return replace(homes["east"], folder=tmp_path / "east")


def test_a_hospital_agrees_and_changes_its_mind(fedscan: Command, east: Home, tmp_path: Path) -> None:
    at = ("--folder", "east")
    said = fedscan("site", "study", "study.toml", *at)
    assert (said.code, "has no catalogue.json yet: register your scans first" in said.err) == (2, True)
    said = fedscan("site", "data", "scans", *at)
    assert (said.code, "12 cases, 12 usable" in said.out, "t1 12" in said.out) == (0, True, True)
    said = fedscan("site", "study", "study.toml", *at)
    assert (said.code, "has no policy.toml yet" in said.err) == (2, True)
    said = fedscan("site", "policy", *at)
    assert (said.code, "policy.toml is new: read it" in said.out) == (0, True)

    said = fedscan("site", "study", "study.toml", *at)
    assert said.code == 0, said.err
    assert "charite asks east to take part, together with west." in said.out
    assert (
        "Your policy refuses:\n- You have 12 cases that can be used, and the policy asks for at least 20." in said.out
    )
    said = fedscan("site", "approve", "study.toml", *at)
    assert (said.code, "the policy refuses this study: You have 12 cases" in said.err) == (2, True)

    text = (tmp_path / "east" / "policy.toml").read_text()
    changed = text.replace("least_cases = 20", "least_cases = 5").replace("least_steps = 10", "least_steps = 2")
    (tmp_path / "east" / "policy.toml").write_text(changed)
    told = json.loads(fedscan("site", "study", "study.toml", *at, "--json").out)
    assert (told["state"], told["refused"], told["compared_with"]) == ("proposed", [], None)
    mark = told["asks"]["hash"]
    said = fedscan("site", "approve", mark[:12], *at, "--until", "2126-03-31", "--who", "Dr. B")
    assert said.code == 0, said.err
    assert "approved" in fedscan("site", "approvals", *at).out
    assert "by Dr. B on" in fedscan("site", "approvals", *at).out

    (tmp_path / "study.toml").write_text(STUDY.format(method="fedavg", more="").replace("rounds = 2", "rounds = 14"))
    said = fedscan("site", "study", "study.toml", *at)
    assert "It is proposed: nobody has decided on it." in said.out
    assert f"Compared with 'balls', {mark[:12]}, which was approved last:\n- 12 more rounds" in said.out
    assert fedscan("site", "reject", "study.toml", *at, "--why", "too long").code == 0
    states = [one["state"] for one in json.loads(fedscan("site", "approvals", *at, "--json").out)]
    assert sorted(states) == ["approved", "rejected"]

    (tmp_path / "east" / "policy.toml").write_text(changed + "\n# only a comment\n")
    states = [one["state"] for one in json.loads(fedscan("site", "approvals", *at, "--json").out)]
    assert sorted(states) == ["approved", "rejected"]
    (tmp_path / "east" / "policy.toml").write_text(changed.replace("least_cases = 5", "least_cases = 4"))
    said = fedscan("site", "approvals", *at)
    assert "the policy is another than when it was approved" in said.out


def test_a_kept_study_that_was_changed_is_refused(fedscan: Command, east: Home, tmp_path: Path) -> None:
    at = ("--folder", "east")
    assert fedscan("site", "data", "scans", *at).code == 0
    assert fedscan("site", "policy", *at).code == 0
    mark = json.loads(fedscan("site", "study", "study.toml", *at, "--json").out)["asks"]["hash"]
    path = tmp_path / "east" / "studies" / f"{mark}.json"
    path.write_text(path.read_text().replace('"rounds": 2', '"rounds": 3'))
    for command in (("approve", mark), ("reject", mark, "--why", "no"), ("study", mark)):
        said = fedscan("site", *command, *at)
        assert (said.code, "was changed after it was kept" in said.err) == (2, True), said
    path.write_text("[]")
    assert fedscan("site", "approve", mark, *at).code == 2
    said = fedscan("site", "approve", "0" * 64, *at)
    assert (said.code, "no studies are kept under" in said.err) == (2, True)
    said = fedscan("site", "study", "gone.toml", *at)
    assert (said.code, "gone.toml" in said.err) == (2, True)
    said = fedscan("site", "policy", "--folder", "nowhere")
    assert (said.code, "is not a member's folder" in said.err) == (2, True)


def test_the_commands_of_the_page_do_what_it_says(fedscan: Command, tmp_path: Path) -> None:
    docs = Path(__file__).parents[1] / "docs"
    members, agreed = ((docs / name).read_text(encoding="utf-8") for name in ("members.md", "agreeing.md"))
    told = members[: members.index("## Who can be what")] + agreed
    lines = [x for block in re.findall(r"^```sh\n(.*?)^```", told, re.S | re.M) for x in block.splitlines()]
    write_scans(tmp_path / "scans", ("hospital-a",), 30, side=8)
    study = STUDY.format(method="fedavg", more="epochs = 2\n").replace("[16, 16, 16]", "[8, 8, 8]")
    (tmp_path / "study.toml").write_text(study)
    said = [fedscan(*shlex.split(line.replace("2027", "2127"))[1:]) for line in lines]
    assert [(s.code, s.err) for s in said] == [(0, "")] * 13
    assert "desk asks hospital-a to take part" in said[-3].out
    assert "approved  by hospital-a on" in said[-1].out
    for key in re.findall(r"^\| `(\w+\.\w+)` \|", agreed, re.M)[:9]:
        table, name = key.split(".")
        assert name in Policy().model_dump()[table], key
