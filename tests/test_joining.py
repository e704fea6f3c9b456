"""A hospital joins with what it has agreed to: its real cases, under its policy, and nothing of them in a sentence."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from commands import Command
from fedscan.consortium import catalogue, coordinator, joining, member
from fedscan.consortium.asks import hash_of
from fedscan.consortium.joining import Hidden, Ready, ready
from fedscan.consortium.proposals import office
from fedscan.run import Problem
from fedscan.studyfile import load
from joined import Hospitals

Rows = list[list[str]]


@pytest.fixture
def hospitals(tmp_path: Path) -> Hospitals:
    return Hospitals(tmp_path)


def joined(hospitals: Hospitals, name: str = "east") -> Ready:
    at = office(hospitals.folder / name)
    return ready(at, hospitals.file, at.proposal(hospitals.file).asks, hospitals.folder / "cache")


def say(hospitals: Hospitals, old: str, new: str) -> None:
    """Changes the study's file."""
    path = hospitals.folder / "study.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def register(hospitals: Hospitals, change: Callable[[Rows], None]) -> None:
    """Changes the table of the cases of east, and registers them again."""
    scans = hospitals.folder / "east-scans"
    rows = list(csv.reader((scans / "cases.csv").open()))
    change(rows)
    with (scans / "cases.csv").open("w", newline="") as table:
        csv.writer(table).writerows(rows)
    catalogue.register("east", scans, hospitals.folder / "east", datetime.now(UTC))


def test_cases_without_what_the_study_requires_do_not_count(hospitals: Hospitals, tmp_path: Path) -> None:
    scans = tmp_path / "east-scans"

    def flair_of_four(rows: Rows) -> None:
        rows[0].insert(4, "flair")
        for i, row in enumerate(rows[1:]):
            row.insert(4, f"flair{i}.nii" if i < 4 else "")
            shutil.copy(scans / row[3], scans / f"flair{i}.nii")

    register(hospitals, flair_of_four)
    say(hospitals, "[data]\n", '[data]\nrequire = ["flair"]\nleft_out_limit = 1.0\n')
    found = office(tmp_path / "east").proposal(hospitals.file)
    assert found.asks.cases == 4
    assert "You have 4 cases that can be used, and the policy asks for at least 5." in found.refused


def test_kept_studies_are_listed_though_one_fits_no_more(
    hospitals: Hospitals, tmp_path: Path, fedscan: Command
) -> None:
    """One names a hospital that has left since, one was changed on the disk, and one is as it was."""
    at = office(tmp_path / "east")
    at.keep(hospitals.file)
    named, other = (load(tmp_path / "study.toml", [setting]) for setting in ("data.sites=['east', 'west']", "seed=9"))
    at.keep(named)
    changed = tmp_path / "east" / "studies" / f"{at.keep(other)}.json"
    changed.write_text(changed.read_text().replace('"seed": 9', '"seed": 8'))
    coordinator.revoke(tmp_path / "root", "west", "it left")
    member.take_roster(member.read(tmp_path / "east"), tmp_path / "root" / "roster.json")
    rows = json.loads(fedscan("site", "approvals", "--folder", "east", "--json").out)
    found = {one["hash"]: one for one in rows}
    assert {mark: one["state"] for mark, one in found.items()} == {
        hash_of(hospitals.file): "proposed", hash_of(named): "unfit", hash_of(other): "unfit",
    }  # fmt: skip
    assert "west" in found[hash_of(named)]["why"]
    assert "was changed after it was kept" in found[hash_of(other)]["why"]
    assert all(set(one) == set(rows[0]) for one in rows)
    assert len(fedscan("site", "approvals", "--folder", "east").out.splitlines()) == 5


def test_the_policy_is_held_to_the_cases_that_train(hospitals: Hospitals, tmp_path: Path) -> None:
    """A patient is never divided: by the catalogue 6 of 10 cases train, here 3, since one of 6 cases validates."""

    def one_patient_of_six(rows: Rows) -> None:
        for row in rows[1:7]:
            row[1] = "east-many"

    register(hospitals, one_patient_of_six)
    say(hospitals, "seed = 1", "seed = 4")
    member.put(tmp_path / "east/policy.toml", "[answers]\nleast_cases = 5\nleast_steps = 12\n")
    assert office(tmp_path / "east").proposal(hospitals.file).refused == []  # 3 batches of 2, 5 times: 15 steps
    with pytest.raises(Problem, match=r"10 of your 10 cases are used, 3 of them to train.* 10 optimiser steps"):
        joined(hospitals)


def test_the_policy_is_held_to_the_cases_that_are_used(hospitals: Hospitals, tmp_path: Path) -> None:
    asks = office(tmp_path / "east").proposal(hospitals.file).asks
    member.put(tmp_path / "east/policy.toml", "[answers]\nleast_cases = 11\n")
    with pytest.raises(Problem, match="the policy refuses this study: You have 10 cases that can be used"):
        ready(office(tmp_path / "east"), hospitals.file, asks, tmp_path / "cache")


def test_other_scans_under_the_names_of_registered_ones_are_found(hospitals: Hospitals, tmp_path: Path) -> None:
    joined(hospitals)
    for what in ("t1", "label"):
        shutil.copy(tmp_path / f"all/west3_{what}.nii", tmp_path / f"east-scans/east3_{what}.nii")
    with pytest.raises(Problem, match="1 cases, such as 'east3', hold other scans than when they were registered"):
        joined(hospitals)


def test_a_run_goes_on_only_with_the_same_files(hospitals: Hospitals, tmp_path: Path) -> None:
    hospitals.approve("east")
    found, at = joined(hospitals), office(tmp_path / "east")
    facts = joining.desk(at, found).facts
    assert joining.desk(at, joined(hospitals)).facts == facts
    other = replace(found, cases=replace(found.cases, files={**found.cases.files, "east3": ["0" * 64, None]}))
    assert joining.desk(at, other).facts != facts


def test_only_the_hospitals_that_a_study_names_are_asked(hospitals: Hospitals, tmp_path: Path) -> None:
    say(hospitals, "[data]\n", '[data]\nsites = ["east"]\n')
    assert office(tmp_path / "east").proposal(hospitals.file).asks.sites == ("east",)
    with pytest.raises(Problem, match="one of east, and nothing is asked of west"):
        office(tmp_path / "west").proposal(hospitals.file)


def test_a_case_has_other_codes_in_another_study(hospitals: Hospitals) -> None:
    first = joined(hospitals)
    assert joined(hospitals).names == first.names
    say(hospitals, 'name = "balls"', 'name = "spheres"')
    second = joined(hospitals)
    assert first.names.keys() == second.names.keys()
    assert not set(first.names.values()) & set(second.names.values())
    assert {len(code) for code in (*first.names.values(), *second.names.values())} == {16}


def test_what_must_not_leave_is_taken_out_of_a_sentence(hospitals: Hospitals, tmp_path: Path) -> None:
    """Canaries: used and left-out cases, patients, files in folders with blanks, in quotes or not, in any letters."""
    scans = tmp_path / "east-scans"
    (scans / "Canary Ward").mkdir()
    shutil.copy(scans / "east0_t1.nii", scans / "Canary Ward/Canary Scan.nii")

    def left_out(rows: Rows) -> None:
        rows.append(["Canary One", "Canary Müller", "east", "Canary Ward/Canary Scan.nii", ""])

    register(hospitals, left_out)
    say(hospitals, "[data]\n", "[data]\nleft_out_limit = 1.0\n")
    found = joined(hospitals)
    assert "Canary One" not in found.names  # it has no label, and is not used
    hide = Hidden(found.private)
    for canary in (
        "CANARY ONE", "canary müller", "Canary Mu\u0308ller", "Canary Scan.nii", "canary ward/canary scan.nii",
        str(scans / "Canary Ward/Canary Scan.nii"), "east3", "EAST3_T1.NII", "x_east3_y", str(tmp_path / "east"),
        "'/mnt/canary disk/canary x.nii'", '"canary disk/x.nii"', "'C:\\canary disk\\x'", "canary/x.nii", "C:\\canary",
        "../canary", "/canary",
    ):  # fmt: skip
        said = hide(f"learn in round 2 failed at {canary}: no such file")
        assert said.startswith("learn in round 2 failed at ")
        assert said.endswith(": no such file")
        assert not [part for part in ("canary", "east3", "mnt", "disk", "x.nii") if part in said.lower()], said
    assert hide("round 2: east does not agree to this study") == "round 2: east does not agree to this study"
    assert Hidden(["1", "A"])("A 1, 12 and a learner") == "… …, 12 and … learner"
    assert Hidden([])("as it is") == "as it is"
