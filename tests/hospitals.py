"""A consortium of three folders: its coordinator's, and those of hospitals that have imported their kits."""

from datetime import UTC, datetime
from pathlib import Path

from fedscan.consortium import coordinator, member
from fedscan.consortium.member import Home

NOW = datetime(2026, 3, 2, 9, 0, tzinfo=UTC)  # a Monday


def consortium(folder: Path, *sites: str, now: datetime = NOW) -> dict[str, Home]:
    """The members' folders by name, each with the newest roster; "charite" is the coordinator."""
    folder.mkdir(parents=True, exist_ok=True)
    root = folder / "root"
    coordinator.found("testnet", root, now)
    for name, role in (*((name, "site") for name in sites), ("charite", "coordinator")):
        home = member.begin(name, role, folder / name)
        kit = coordinator.admit(root, folder / name / "request.csr", role, now=now).kit
        member.take_kit(home, kit, now=now)
    found = {name: member.read(folder / name) for name in (*sites, "charite")}
    for home in found.values():
        member.take_roster(home, root / "roster.json", now=now)
    return {name: member.read(folder / name) for name in found}
