"""The engine over a carrier: the same bits as in one process, whatever the carrier does to what it carries."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from between import Bad, Between
from contract import BENCHES, study_of
from fedscan.engines import remote
from fedscan.methods.registry import get
from fedscan.run import run
from toy import same

METHODS = (  # of different shapes
    "fedavg", "scaffold", "fedbn", "fedavg-compressed", "cwt", "fedsegnet", "local-only", "fedadam", "ensemble",
    "traditional-fl",
)  # fmt: skip


def record(folder: Path) -> list[tuple[Any, ...]]:
    """What a run recorded, but for times and places."""
    with closing(sqlite3.connect(folder / "journal.sqlite")) as db:
        turns = db.execute(
            "SELECT round, call, site, question, asked, bytes_down, base, status, answered, bytes_up, why, numbers "
            "FROM turns ORDER BY round, call, site"
        ).fetchall()
        scores = db.execute("SELECT * FROM scores ORDER BY 1, 2, 3, 4, 5, 6, 7, 8").fetchall()
    assert turns
    return [*turns, *scores]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_the_same_bits_over_a_carrier(name: str, tmp_path: Path) -> None:
    study = study_of(get(name), BENCHES["3D batch"], every=1)
    between = Between(study, tmp_path)
    there = between.run()
    here = run(study, tmp_path / "local")
    assert same(there, here)
    assert record(tmp_path / "run") == record(tmp_path / "local")


@pytest.mark.parametrize("seed", range(3))
def test_a_carrier_that_loses_repeats_and_replays_changes_nothing(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.001, 0.01))
    study = study_of(get("scaffold"), BENCHES["2D"], every=1)
    between = Between(study, tmp_path)
    carrier = Bad(between.desks, seed)
    assert same(between.run(carrier), run(study, tmp_path / "local"))
    assert record(tmp_path / "run") == record(tmp_path / "local")
