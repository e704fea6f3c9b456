"""Hospitals that have joined a study in this process, with real keys, policies, approvals and scans of their own."""

import csv
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedscan.consortium import approval, catalogue, joining, member, serving
from fedscan.consortium.proposals import office
from fedscan.engines.desk import Desk
from fedscan.engines.doors import Door, Doors
from fedscan.studyfile import StudyFile, load
from hospitals import consortium
from tinystudy import STUDY, write_scans

SITES = ("east", "west")


@dataclass
class Hospitals:
    """Hospitals of a consortium in a folder, each with scans of its own, and a study that all have agreed to."""

    folder: Path
    method: str = "fedavg"
    more: str = "epochs = 5\n"

    def __post_init__(self) -> None:
        self.homes = consortium(self.folder, *SITES, now=datetime.now(UTC))
        whole = write_scans(self.folder / "all", cases=10)
        text = STUDY.format(method=self.method, more=self.more).replace('cases = "scans"\n', 'sequences = ["t1"]\n')
        (self.folder / "study.toml").write_text(text)
        for name in SITES:
            scans = self.folder / f"{name}-scans"
            scans.mkdir()
            rows = list(csv.reader((whole / "cases.csv").open()))
            mine = [row for row in rows if row[2] in (name, "site")]
            for row in mine[1:]:
                for file in row[3:]:
                    shutil.copy(whole / file, scans / file)
            with (scans / "cases.csv").open("w", newline="") as table:
                csv.writer(table).writerows(mine)
            home = self.folder / name
            member.put(home / "policy.toml", "[answers]\nleast_cases = 5\n")
            catalogue.register(name, scans, home, datetime.now(UTC))

    def approve(self, name: str) -> None:
        at = office(self.folder / name)
        found = at.proposal(self.file)
        approval.decide(at.home, found.asks, at.policy, found.refused, who=name)

    @property
    def file(self) -> StudyFile:
        return load(self.folder / "study.toml")

    @contextmanager
    def there(self, *names: str) -> Iterator[dict[str, Desk]]:
        """These hospitals have joined."""
        desks, doors = {}, []
        for name in names:
            at = office(self.folder / name)
            ready = joining.ready(at, self.file, at.proposal(self.file).asks, self.folder / "cache")
            desks[name] = desk = joining.desk(at, ready)
            doors.append(opened(desk, self.folder / name))
        try:
            yield desks
        finally:
            for door in doors:
                door.close()

    def table(self, **options: object) -> serving.Table:
        carrier = Doors({name: self.folder / name for name in SITES})
        return serving.Table(member.read(self.folder / "charite"), carrier, **options)  # type: ignore[arg-type]


def opened(desk: Desk, folder: Path) -> Door:
    return Door(folder, lambda header, body: desk.handle(body))
