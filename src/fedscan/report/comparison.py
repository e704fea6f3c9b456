"""Runs of several methods on one study to one table: scores, bytes, and the paired difference to the first method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedscan.ledger import Record, ScoreRow
from fedscan.report.figures import Dot
from fedscan.report.tables import final, home
from fedscan.report.turns import UNSENT, per_round
from fedscan.report.words import Cell, estimate, interval, number, plural, size
from fedscan.statistics import Comparison, by_site, holm, macro, paired, within, worst
from fedscan.tasks.metrics import HD95

Runs = Mapping[str, Record | Sequence[Record]]  # a method's run, or its runs with several seeds


@dataclass(frozen=True)
class Line:
    """One method's row of the table."""

    name: str
    seeds: int
    dice: Cell | None
    worst: Cell | None
    hd95: Cell | None
    traffic: str
    difference: str
    p: str
    about: str


def seeds(runs: Record | Sequence[Record]) -> list[Record]:
    """A method's runs as a list. Raises ValueError where there is none."""
    found = [runs] if isinstance(runs, Record) else list(runs)
    if not found:
        raise ValueError("a method without a run cannot be compared; leave it out, or run it first")
    return found


def pooled_seeds(runs: Sequence[Record]) -> list[ScoreRow]:
    """Final test scores with each case's value averaged over the seeds that tested it; None if any of them is None."""
    places: dict[tuple[str, str, str, str], list[ScoreRow]] = {}
    for record in runs:
        for row in home(final(record.scores)):
            places.setdefault((row.tested_at, row.case, row.label, row.metric), []).append(row)
    pooled = []
    for rows in places.values():
        values = [row.value for row in rows if row.value is not None]
        mean = sum(values) / len(values) if len(values) == len(rows) else None
        pooled.append(replace(rows[0], value=mean, round=0, trained_at="federation"))
    return pooled


def lines(runs: Runs) -> tuple[list[Line], list[Dot]]:
    """Rows of the table and of the chart. The first method is what the others are compared with (Holm over the others).

    Raises ValueError where there is no method, or a method has no test score.
    """
    if not runs:
        raise ValueError("nothing to compare: give at least one method with its run")
    records = {name: seeds(of_method) for name, of_method in runs.items()}
    rows = {name: pooled_seeds(of_method) for name, of_method in records.items()}
    if empty := [name for name in rows if not any(row.metric == "dice" for row in rows[name])]:
        raise ValueError(f"no test Dice in the runs of {', '.join(empty)}: let them finish, or leave them out")
    first, *others = rows
    tests = {name: paired(rows[name], rows[first], "dice") for name in others}
    corrected = dict(zip(others, holm([tests[name].p for name in others]), strict=True))
    hd95 = distance(records)
    made = [_line(name, records[name], rows[name], hd95, tests.get(name), corrected.get(name)) for name in rows]
    return made, [_dot(name, rows[name]) for name in rows]


def distance(runs: Runs) -> str:
    """Which definition of HD95 the runs of one study have: a name of ``words.NAMES``."""
    scored = {row.metric for of_method in runs.values() for record in seeds(of_method) for row in record.scores}
    return next((metric for metric in HD95 if metric in scored), "hd95")


def _line(
    name: str, runs: Sequence[Record], rows: Sequence[ScoreRow], hd95: str, test: Comparison | None, p: float | None
) -> Line:
    lowest = worst(rows, "dice")
    cell = estimate(lowest[1]) if lowest else None
    return Line(
        name=name,
        seeds=len(runs),
        dice=estimate(macro(rows, "dice"), unit="hospitals"),
        worst=Cell(cell.text, cell.interval, lowest[0]) if cell and lowest else None,
        hd95=_distance(rows, hd95),
        traffic="–" if (sent := mean_sent(runs)) is None else size(sent),
        difference=_difference(test),
        p="" if test is None else "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
        about="" if test is None else f"{plural(test.n, 'patient')}; {test.test}{_gaps(test)}",
    )


def mean_sent(runs: Sequence[Record]) -> float | None:
    """Bytes that a hospital sent per round, over a method's runs; None where none would be, outside a simulation."""
    found = [sent for record in runs if (sent := per_round(record)) is not None]
    return sum(found) / len(found) if found else None


def unsent(made: Sequence[Line]) -> str:
    """What is to be said of rows without bytes; nothing where there are none."""
    return UNSENT if any(line.traffic == "–" for line in made) else ""


def _distance(rows: Sequence[ScoreRow], metric: str) -> Cell | None:
    """Macro HD95 with the support of single scores, because a missing structure has no distance."""
    of_metric = [row for row in rows if row.metric == metric]
    cell = estimate(macro(of_metric, metric), metric)
    used = sum(row.value is not None for row in of_metric)
    return cell and Cell(cell.text, cell.interval, f"{used}/{len(of_metric)} scores", used < len(of_metric))


def _difference(test: Comparison | None) -> str:
    if test is None:
        return "compared with"
    return f"{number(test.difference, signed=True)} {interval(test, signed=True)}".strip()


def _gaps(test: Comparison) -> str:
    gaps = [f"{n} {word}" for n, word in ((test.undefined, "undefined"), (test.unmatched, "unmatched")) if n]
    return f"; scores left out: {', '.join(gaps)}" if gaps else ""


def _dot(name: str, rows: Sequence[ScoreRow]) -> Dot:
    total = within(macro(rows, "dice"), "dice")
    if total.mean is None:
        raise ValueError(f"every test Dice of {name} is undefined, so it cannot be compared")
    hospitals = [s.mean for s in by_site(rows, "dice").values() if s.mean is not None]
    return Dot(name, total.mean, total.low, total.high, hospitals)
