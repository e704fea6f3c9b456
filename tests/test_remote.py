"""The engine over a carrier: the same bits as in one process, whatever the carrier does to what it carries."""

import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from between import Bad, Between, Straight
from contract import BENCHES, study_of
from fedscan.engines import remote
from fedscan.engines.local import Replay
from fedscan.method import State
from fedscan.methods.registry import get
from fedscan.run import run
from fedscan.study import Turn
from test_resume import PLANS, Killed
from toy import same

METHODS = (  # of different shapes
    "fedavg", "scaffold", "fedbn", "fedavg-compressed", "cwt", "fedsegnet", "local-only", "fedadam", "ensemble",
    "traditional-fl", "braintorrent",
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


def all_killed(between: Between, kill: Callable[[str], None]) -> State:
    """The last state of a run whose coordinator ``kill`` ends, and with it all hospitals: only disks are left of them.

    Before and after, the carrier loses and repeats.
    """
    with pytest.raises(Killed):
        between.run(Bad(between.desks, 1), run_with={"event": kill})
    for name in between.study.names:
        between.restart(name)
    return between.run(Bad(between.desks, 2), resume=True)


def order_in(folder: Path) -> list[Turn]:
    """The started turns in the order in which their answers came."""
    with closing(sqlite3.connect(folder / "journal.sqlite")) as db:
        found = db.execute("SELECT turn FROM arrived ORDER BY round, position").fetchall()
    return [Turn(*json.loads(turn)) for (turn,) in found]


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


class Slow(Straight):
    """Sites answer with delays of their own."""

    def call(self, site: str, request: bytes, seconds: float) -> bytes:
        time.sleep({"amsterdam": 0.15, "bergen": 0.02}.get(site, 0.07))
        return super().call(site, request, seconds)


@pytest.mark.parametrize("plan", ["async", "buffered", "fedasync"])
def test_one_process_replays_the_order_in_which_answers_really_came(plan: str, tmp_path: Path) -> None:
    study = replace(PLANS[plan](), silent={})
    between = Between(study, tmp_path)
    there = between.run(Slow(between.desks))
    order = order_in(tmp_path / "run")
    assert len({turn.site for turn in order}) > 1
    here = run(study, tmp_path / "local", engine=lambda s, f: Replay(s, f, order))
    assert same(there, here)
    assert record(tmp_path / "run") == record(tmp_path / "local")
    with pytest.raises(ValueError, match=r"which is not under way|ends here"):
        run(study, tmp_path / "other", engine=lambda s, f: Replay(s, f, [Turn(9, 9, "bergen"), *order]))


def test_a_site_outside_its_hours_is_waited_for_whatever_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "LATER", 0.1)
    asked: list[str] = []

    def permit(question: str, nbytes: int) -> str:
        asked.append(question)
        return "bergen answers Mon-Fri 18:00-06:00" if len(asked) < 15 else ""

    study = replace(study_of(get("scaffold"), BENCHES["2D"]), absent="skip")
    between = Between(study, tmp_path)
    between.options["permit"] = permit
    between.restart("bergen")
    told: list[tuple[str, str]] = []
    there = between.run(lease=1.0, tell=lambda site, sentence: told.append((site, sentence)))
    assert told.count(("bergen", "answers later: bergen answers Mon-Fri 18:00-06:00")) == 14
    assert same(there, run(study, tmp_path / "local"))
