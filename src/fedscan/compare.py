"""Several methods on one study, several seeds each: run what is not there yet, then one table of differences."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedscan.launch import How, describe, free, launch, models_of, prepared, ready, report, suits, writing
from fedscan.ledger import Record, ScoreRow, opened, read_record
from fedscan.live import Show
from fedscan.report.comparison import distance, mean_sent, pooled_seeds
from fedscan.report.page import write_comparison
from fedscan.report.tables import final, home
from fedscan.report.values import of_runs, write_scores
from fedscan.report.warnings import warnings
from fedscan.report.words import interval, number
from fedscan.run import Problem
from fedscan.statistics import by_site, holm, macro, paired, within, worst
from fedscan.studyfile import Cases, StudyFile, build, load

Runs = dict[str, list[Record]]


def compare(
    study: Path,
    methods: Sequence[str],
    seeds: int,
    out: Path,
    overrides: Sequence[str] = (),
    data: Path | None = None,
    how: How = How(resume=True),  # noqa: B008
) -> tuple[Path, Runs]:
    """Runs every method with every seed in ``out/<method>/<seed>``, going on where it stood; finished runs stay.

    The seeds are those from the study's own on; [data] seed keeps one split for all of them. Returns the path of the
    comparison page and the records by method, in the order of ``methods``: the first is what others are held to.
    Raises Problem for a method that does not exist or does not suit the study, before anything is run.
    """
    if not methods or len(set(methods)) < len(methods):
        raise Problem(f"--methods {','.join(methods)}: one or more methods, each once, were meant")
    free(out, resume=True)
    if (out / "journal.sqlite").exists():
        raise Problem(f"{out} holds a single run, and no comparison beside it; choose another folder with --out")
    first = load(study, overrides, data).top.seed
    plan = {
        (name, seed): load(study, (*overrides, f"method.name={name}", f"seed={seed}"), data)
        for seed in range(first, first + seeds)
        for name in methods
    }
    for name in methods:
        ready(plan[name, first])
        if not plan[name, first].data.fractions[2]:
            raise Problem("data.fractions leaves no test cases, and methods are compared on those")
    for (name, seed), file in plan.items():
        suits(file, out / name / str(seed), how)
    cases: dict[int, Cases] = {}
    for (name, seed), file in plan.items():
        if seed not in cases:
            cases[seed] = prepared(file, how)
        one(file, out / name / str(seed), cases[seed], how)
    runs: Runs = {name: [] for name in methods}
    for name, seed in plan:
        folder = out / name / str(seed)
        report(folder, how.tell, {other: out / other / str(seed) for other in methods if other != name})
        runs[name].append(read_record(folder))
    with writing(out, "--out"):
        write_scores(of_runs(runs), out)
        return write_comparison(runs, out), runs


def one(file: StudyFile, folder: Path, cases: Cases, how: How) -> None:
    """One run of the comparison; a finished one of the same study is left as it is."""
    how = replace(how, resume=True, report=False)
    if finished(folder):
        with writing(folder, "--out"):
            describe(file, cases, build(file, cases), folder, how)  # refuses another study
        return
    with Show(cases.rows, file.rounds, title=f"{file.method}, seed {file.top.seed}") as show:
        launch(file, folder, replace(how, watch=show), cases)


def finished(folder: Path) -> bool:
    """Whether a run has come to its end, and its model is written, which comes last."""
    if not models_of(folder):
        return False
    with closing(opened(folder)) as db:
        head = db.execute("SELECT finished FROM head").fetchone()
    return bool(head and head[0])


def figures(runs: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """The comparison as numbers, a row per method; differences are to the first, p is corrected after Holm.

    Intervals are cut to the values that a score can have, as on the page; bytes are None for what is no federation.
    """
    rows = {name: pooled_seeds(of) for name, of in runs.items()}
    reference = next(iter(rows.values()))
    tests = {name: paired(rows[name], reference, "dice") for name in list(rows)[1:]}
    corrected = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    metric = distance(runs)
    made = []
    for name, scores in rows.items():
        low = worst(scores, "dice")
        made.append({
            "name": name,
            "seeds": len(runs[name]),
            "dice": asdict(within(macro(scores, "dice"), "dice")),
            "worst_site": {"site": low[0], **asdict(within(low[1], "dice"))} if low else None,
            metric: asdict(within(macro(scores, metric), metric)),
            "bytes_up_per_round": mean_sent(runs[name]),
            "difference": {**asdict(tests[name]), "p_holm": corrected[name]} if name in tests else None,
            "warnings": [text for record in runs[name] for text in warnings(record)],
        })  # fmt: skip
    return made


def site_dice(record: Record) -> dict[str, list[ScoreRow]]:
    """Final test scores by method: the run's own, then its baselines'; of the model that each site would use."""
    ours = {record.method: home(final(record.scores))}
    return ours | {name: home(final(rows)) for name, rows in record.comparisons.items()}


def site_figures(record: Record) -> list[dict[str, Any]]:
    """A run's mean test Dice by site and method, as numbers."""
    tables = {name: by_site(rows, "dice") for name, rows in site_dice(record).items()}
    return [
        {"name": site.name, "test": site.test}
        | {
            "dice": {
                name: asdict(within(table[site.name], "dice")) for name, table in tables.items() if site.name in table
            }
        }
        for site in record.sites
    ]


def site_table(record: Record) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """Columns and rows of a run's test Dice by site, beside the baselines that it has."""
    ours = site_dice(record)
    tables = {name: by_site(rows, "dice") for name, rows in ours.items()}
    rows: list[tuple[object, ...]] = []
    for site in record.sites:
        found = [table.get(site.name) for table in tables.values()]
        rows.append((site.name, site.test, *("–" if s is None else f"{number(s.mean)} {interval(s)}" for s in found)))
    totals = [macro(scores, "dice") for scores in ours.values()]
    rows.append(("mean of sites", sum(s.test for s in record.sites), *(number(s.mean) for s in totals)))
    return ("site", "test cases", *(f"Dice {name}" for name in ours)), rows
