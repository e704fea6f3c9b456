"""No name of a patient crosses (T24): 200 are planted wherever a hospital has one, and looked for in all that left."""

import base64
import csv
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import nibabel
import pytest

from fedscan.consortium import catalogue, serving
from fedscan.consortium.status import Log
from fedscan.engines import remote
from fedscan.engines.doors import Doors
from fedscan.engines.local import Local
from fedscan.engines.remote import SiteFailed
from fedscan.launch import How
from fedscan.ledger import read_record
from fedscan.recorded import Answer, Letter
from joined import SITES, Hospitals

STEM = "QuxDoeJane"  # in every canary, so that a part of one is found, too
numbers = count()


def canary() -> str:
    return f"{STEM}{next(numbers):03d}"


def forms() -> Iterator[bytes]:
    """How the stem may be written: plain, backwards, in wide letters, as hexadecimal digits, in base64 at any place."""
    text = STEM.lower().encode()
    yield from (text, text[::-1], text.decode().encode("utf-16-le"), STEM.encode().hex().encode())
    for skip in range(3):
        encoded = base64.b64encode(bytes(skip) + STEM.encode())
        yield encoded[(0, 2, 3)[skip] : -4].lower()


def tells(data: bytes) -> bool:
    """Whether anything of a canary is in the data."""
    found = data.lower()
    return any(form in found for form in forms())


def plant(scans: Path) -> dict[str, list[str]]:
    """Gives a hospital's files canaries for names, folders, headers and columns; returns them by where they are."""
    head, *rows = csv.reader((scans / "cases.csv").open())
    planted: dict[str, list[str]] = {}

    def new(where: str) -> str:
        planted.setdefault(where, []).append(canary())
        return planted[where][-1]

    for row in rows:
        row[0], row[1] = new("case"), f"Müller {new('patient')}"
        folder = scans / f"ward {new('folder')}"
        folder.mkdir()
        for column in (3, 4):
            image = nibabel.load(scans / row[column])
            header: Any = image.header
            header["descrip"], header["db_name"] = new("header"), new("header")
            header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", new("header").encode()))
            path = folder / f"{new('file')}.nii"
            nibabel.save(image, path)
            (scans / row[column]).unlink()
            row[column] = str(path.relative_to(scans))
        row.append(new("column"))
    with (scans / "cases.csv").open("w", newline="") as table:
        csv.writer(table).writerows([[*head, "remark"], *rows])
    return planted


def mishaps(planted: dict[str, dict[str, list[str]]], monkeypatch: pytest.MonkeyPatch) -> None:
    """At each hospital all kinds of errors speak of patients: 9 of its disk, a refusal, and a fault that ends the run.

    What the method refuses speaks of cases, patients and files; errors of the system of other patients, too.
    """
    answer, tried = Local.answer, {name: count() for name in SITES}

    def fails(local: Local, letter: Letter) -> Answer:
        site = letter.turn.site
        known = planted[site]
        said = f"{known['case'][0]}, Müller {known['patient'][1]}: {known['folder'][2]}/{known['file'][3]}.nii"
        if letter.turn.round == 2 and letter.question == "learn":
            return Answer(letter.turn, refused=f"the outline of {said} is empty")
        n = next(tried[site]) if letter.turn.round == 1 else 99
        if n < 10:
            known.setdefault("error", []).append(other := canary())
            kind = OSError if n < 9 else KeyError
            raise kind(f"{said} and {other}")
        return answer(local, letter)

    monkeypatch.setattr(Local, "answer", fails)


class Tapped(Doors):
    """Keeps every byte that passes between coordinator and hospitals."""

    def __init__(self, folder: Path) -> None:
        super().__init__({name: folder / name for name in SITES})
        self.passed: list[bytes] = []

    def call(self, site: str, request: Any, seconds: float) -> Any:
        self.passed.append(bytes(request))
        said = super().call(site, request, seconds)
        self.passed.append(bytes(said))
        return said


def kept(folder: Path) -> Iterator[tuple[str, bytes]]:
    """All that lies in a folder: names and contents of files, of a journal each value by itself."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        yield str(path), str(path.relative_to(folder)).encode() + b"\n" + path.read_bytes()
        if path.suffix == ".sqlite":
            with closing(sqlite3.connect(path)) as db:
                for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                    for row in db.execute(f'SELECT * FROM "{table}"'):
                        yield f"{path} {table}", b"\n".join(v if type(v) is bytes else str(v).encode() for v in row)


def test_200_canaries_do_not_cross(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "GREETING", 0.05)
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.05))
    hospitals = Hospitals(tmp_path)
    planted = {name: plant(tmp_path / f"{name}-scans") for name in SITES}
    for name in SITES:
        catalogue.register(name, tmp_path / f"{name}-scans", tmp_path / name, datetime.now(UTC))
        hospitals.approve(name)
    mishaps(planted, monkeypatch)
    tap, said = Tapped(tmp_path), []
    with hospitals.there(*SITES) as desks:
        for name, desk in desks.items():
            desk.log = Log(tmp_path / name / "join.log", json=True)
        home = hospitals.table().home
        for starts in range(3):  # each hospital's fault ends the run once
            try:
                serving.serve(hospitals.file, tmp_path / "run", serving.Table(home, tap, how=How(starts > 0)))
                break
            except SiteFailed as e:
                said.append(str(e))
    turns = read_record(tmp_path / "run").turns
    assert {(t.site, t.question, t.status) for t in turns if t.status != "answered"} == {
        (name, "learn", "refused") for name in SITES
    }
    everywhere = [one for name in SITES for those in planted[name].values() for one in those]
    assert len(set(everywhere)) == len(everywhere) >= 200
    for name in SITES:  # each of them is known at its hospital, in the form in which it is looked for
        mine = b"".join(data for folder in (name, f"{name}-scans") for _, data in kept(tmp_path / folder))
        assert not [one for those in planted[name].values() for one in those if one.encode() not in mine]
    assert said
    assert len(tap.passed) > 40
    assert not [one for one in said if tells(one.encode())]
    assert not [data[:200] for data in tap.passed if tells(data)]
    assert not [where for where, data in kept(tmp_path / "run") if tells(data)]
    assert not [where for where, data in kept(tmp_path / "charite") if tells(data)]


@pytest.mark.parametrize("before", range(3))
def test_a_canary_is_noticed_however_it_is_written(before: int) -> None:
    name = canary()
    for written in (name, name.upper(), name[::-1], name.encode().hex().upper()):
        assert tells(b"x" * before + written.encode() + b"y")
    assert tells(b"x" * before + name.encode("utf-16-be"))
    assert tells(base64.b64encode(b"x" * before + name.encode() + b"y"))
    assert not tells(b"x" * before + STEM[1:].encode())
