"""What a run shows: a line per round without a terminal, a table of sites on one; bytes and Dice are counted right."""

import io
from typing import Any

import pytest
from rich.console import Console

from fedscan.journal import Row
from fedscan.ledger import ScoreRow, SiteRow, TurnRow
from fedscan.live import Show, dice_of
from fedscan.study import Turn

SITES = (SiteRow("east", 10, 9, 6, 1, 2, "3 T, [thin] slices"), SiteRow("west", 5, 5, 3, 1, 1))


def show(terminal: bool) -> tuple[Show, io.StringIO]:
    out = io.StringIO()
    return Show(SITES, 3, Console(file=out, force_terminal=terminal, width=120, color_system=None), "balls"), out


def turn(site: str, round: int = 1, status: str = "answered", why: str = "", loss: float | None = 0.5) -> Row:
    numbers = {} if loss is None else {"loss": loss}
    return Row(Turn(round, 0, site), "learn", "weights", "", 3000, 0.0, None, 0.0, status, "", 2000, 1.0, why, numbers)


def score(site: str, value: float | None, trained_at: str = "federation", metric: str = "dice") -> ScoreRow:
    return ScoreRow(1, "validation", trained_at, site, "c", "c", "ball", metric, value)


def play(watch: Show, method: str = "fedavg") -> None:
    watch("method", method)
    watch("round", 1)
    watch("turn", turn("east"))
    watch("turn", turn("west", status="refused", why="not finite", loss=None))
    watch("scores", [score("east", 0.5), score("east", 0.7), score("west", 0.2), score("west", None)])


@pytest.mark.parametrize("terminal", [False, True])
def test_what_travels_is_said_at_the_start(terminal: bool) -> None:
    watch, out = show(terminal)
    with watch:
        watch("method", "fedbn")
        watch("travels", "4 parameters travel; [2] stay at each site.")
    assert "  4 parameters travel; [2] stay at each site." in out.getvalue()


def test_lines_without_a_terminal() -> None:
    watch, out = show(terminal=False)
    with watch:
        play(watch)
        watch("skipped", "round 2 was skipped: no answer")
        watch("scores", [ScoreRow(4, "test", "federation", "east", "c", "c", "ball", "dice", 0.25)])
    assert out.getvalue().splitlines() == [
        "fedavg:",
        "  round 1: west refused: not finite",
        "  round 1/3  loss 0.5000  Dice 0.400 (east 0.600, west 0.200)  6.00 kB down, 4.00 kB up",
        "round 2 was skipped: no answer",
        "  test  Dice 0.250 (east 0.250)  6.00 kB down, 4.00 kB up",
    ]


def test_bytes_go_on_from_where_a_resumed_run_stood() -> None:
    watch, out = show(terminal=False)
    with watch:
        watch("method", "fedavg")
        watch("earlier", [TurnRow(1, 0, "east", "learn", "weights", "answered", 1.0, 1000, 500, 0.0, "", "")])
        watch("round", 2)
        watch("turn", turn("east", 2))
        watch("scores", [score("east", 0.5)])
    assert out.getvalue().splitlines()[-1].endswith("4.00 kB down, 2.50 kB up")


def test_the_table_on_a_terminal() -> None:
    watch, out = show(terminal=True)
    with watch:
        play(watch, "local-only")
        play(watch)
    text = out.getvalue()
    last = text[text.rindex("balls") :]
    for part in ("3 T, [thin] slices", "Dice alone", "0.600", "3.00 kB", "refused: not finite", "round 1/3", "fedavg"):
        assert part in last
    assert "round 1/3  loss" not in text  # no lines beside the table


@pytest.mark.parametrize("trained_at", ["federation", "pooled", "east"])
def test_dice_is_of_the_model_that_the_site_uses(trained_at: str) -> None:
    rows: Any = [score("east", 0.8, trained_at), score("east", 0.1, "west"), score("east", 9.0, trained_at, "hd95")]
    assert dice_of(rows) == {"east": 0.8}
    assert dice_of([score("east", None)]) == {}


@pytest.mark.parametrize(
    ("sentence", "red"),
    [
        ("is there, and agrees", False),
        ("works on learn (until 14:00:00)", False),
        ("is waited for: nobody is there yet", True),
        ("is absent: no progress for 600 s", True),
    ],
)
def test_only_what_is_amiss_at_a_hospital_is_red(sentence: str, red: bool) -> None:
    out = io.StringIO()
    watch = Show([], 3, Console(file=out, force_terminal=True, width=120, color_system="standard"), "balls")
    with watch:
        watch.waiting("west", sentence)
    assert (f"\x1b[31m{sentence}" in out.getvalue()) == red
    assert sentence in out.getvalue()
