"""The results of ``science.py`` as the tables of docs/science.md."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedscan.ledger import ScoreRow
from fedscan.report.words import number
from fedscan.statistics import Comparison, Summary, by_site, holm, macro, paired, within, worst
from science_rows import CONDITIONS, ROOT, ROWS, Row, read_results

PAGE = ROOT / "docs" / "science.md"
UNIT = {"hippocampus": "mm", "glioma": "voxels"}
Lines = Mapping[str, Sequence[dict[str, Any]]]  # the lines of each row, one a seed
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def score_rows(lines: Iterable[dict[str, Any]]) -> list[ScoreRow]:
    """Every test case's Dice, averaged over the lines (seeds); None where one of them is undefined."""
    values: dict[tuple[str, str, str, str], list[float | None]] = {}
    for line in lines:
        for site, cases in line["cases"].items():
            for case, (subject, dice) in cases.items():
                for label, value in dice.items():
                    values.setdefault((site, case, subject, label), []).append(value)
    return [
        ScoreRow(0, "test", "federation", site, case, subject, label, "dice", mean(found))
        for (site, case, subject, label), found in values.items()
    ]


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def difference(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> Comparison:
    """The paired difference a - b, over the seeds that both have."""
    seeds = {line["seed"] for line in a} & {line["seed"] for line in b}
    one, two = (score_rows(line for line in lines if line["seed"] in seeds) for lines in (a, b))
    return paired(one, two, "dice")


def by_row(results: Iterable[dict[str, Any]], corrupt: str = "") -> Lines:
    """The lines of each row under one condition."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in results:
        if line["corrupt"] == corrupt:
            found.setdefault(line["row"], []).append(line)
    return found


def span(of: Summary | Comparison, signed: bool = False) -> str:
    """A mean Dice, or a difference of two, with its 95 % interval, within the values that it can have."""
    of = within(of, "dice", difference=signed)
    middle = of.difference if isinstance(of, Comparison) else of.mean
    if of.low is None or of.high is None:
        return number(middle, signed=signed)
    low, high = (f"{value:+.3f}" if signed else f"{value:.3f}" for value in (of.low, of.high))
    text = f"{middle:+.3f}" if signed else f"{middle:.3f}"
    return f"{text} [{low}, {high}]".replace("-", "−")


def p_text(p: float | None) -> str:
    """A p value as tables have it."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def main_table(study: str, lines: Lines) -> Table:
    """A row for every row of the paper's table and ours; what has not been run is not measured."""
    reference = lines.get(ROWS[0].name)
    others = [row.name for row in ROWS[1:] if row.name in lines and reference]
    tests = {name: difference(lines[name], reference) for name in others if reference}
    corrected = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    head = (
        "row", "seeds", "rate", "macro Dice [95 %]", "worst hospital", f"HD95, {UNIT[study]}",
        "difference from FedSegNet, by patient [95 %]", "p (Holm)", "MB up + down per round", "steps", "minutes",
        "paper's Dice",
    )  # fmt: skip
    rows = []
    for row in ROWS:
        if row.name in lines:
            middle = measured(row, lines[row.name], tests.get(row.name), corrected.get(row.name))
        else:
            middle = ["not measured", *[""] * (len(head) - 3)]
        rows.append([row.title, *middle, row.paper])
    return head, rows


def measured(row: Row, lines: Sequence[dict[str, Any]], test: Comparison | None, p: float | None) -> list[str]:
    """The middle cells of a row that has been run."""
    rows = score_rows(lines)
    low = worst(rows, "dice")
    assert low is not None
    hd95 = mean([line["hd95"]["mean"] for line in lines])
    rates = sorted({f"{line['lr']:g}" for line in lines})
    return [
        str(len(lines)),
        ", ".join(rates),
        span(macro(rows, "dice")),
        f"{low[1].mean:.3f} ({low[0]})",
        "–" if hd95 is None else f"{hd95:.2f}",
        "–" if test is None else span(test, signed=True),
        "–" if test is None else p_text(p),
        "–" if row.alone else f"{mean_of(lines, 'mb_up'):.2f} + {mean_of(lines, 'mb_down'):.2f}",
        f"{mean_of(lines, 'steps'):.0f}",
        f"{mean_of(lines, 'seconds') / 60:.0f}",
    ]


def mean_of(lines: Sequence[dict[str, Any]], key: str) -> float:
    """The mean of a number over seeds."""
    return float(sum(line[key] for line in lines) / len(lines))


def site_table(lines: Lines) -> Table:
    """Test Dice of every row at every hospital, with the number of patients."""
    measured = [(row, by_site(score_rows(lines[row.name]), "dice")) for row in ROWS if row.name in lines]
    subjects = {site: summary.subjects for _, sites in measured for site, summary in sites.items()}
    rows = [[row.title, *(span(sites[site]) for site in subjects)] for row, sites in measured]
    return ("row", *(f"{site} ({n} patients)" for site, n in subjects.items())), rows


def condition_table(study: str, results: Sequence[dict[str, Any]]) -> Table:
    """With and without adaptive weights, on labels as they are and with those of one hospital spoilt."""
    done = {line["corrupt"] for line in results} - {*CONDITIONS[study]}
    head = ("labels", "FedSegNet", "– without adaptive weights", "adaptive − not [95 %]", "p",
            "share of that hospital: adaptive, by cases")  # fmt: skip
    rows = []
    for corrupt in (*CONDITIONS[study], *sorted(done)):
        lines = by_row(results, corrupt)
        a, b = lines.get("fedsegnet"), lines.get("fedsegnet-no-adaptive")
        dice = [span(macro(score_rows(of), "dice")) if of else "not measured" for of in (a, b)]
        test = difference(a, b) if a and b else None
        site = corrupt.partition(":")[2]
        counted = ", ".join(f"{mean([line['shares'][site] for line in of]):.3f}" for of in (a, b) if of and site)
        rows.append(
            [words(corrupt), *dice, *((span(test, signed=True), p_text(test.p)) if test else ("", "")), counted]
        )
    return head, rows


def words(corrupt: str) -> str:
    """A condition in words."""
    kind, _, site = corrupt.partition(":")
    where = f"{site}, training{' and validation' if kind.endswith('+') else ''}"
    told = {
        "": "as they are",
        "dilate": f"grown by 2 voxels at {where}",
        "swap": f"exchanged with each other at {where}",
        "shuffle": f"those of another patient at {where}",
    }
    return told[kind.removesuffix("+")]


def markdown(table: Table) -> str:
    """A table as Markdown."""
    head, rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def filled(page: str, folder: Path) -> str:
    """The page with what stands between its markers written anew from the results in ``folder``."""
    for study in CONDITIONS:
        results = read_results(folder / f"{study}.jsonl")
        lines = by_row(results)
        tables = {"rows": main_table(study, lines), "sites": site_table(lines)}
        if CONDITIONS[study]:
            tables["labels"] = condition_table(study, results)
        for name, table in tables.items():
            mark = f"{study}-{name}"
            text = markdown(table) if table[1] else "Not measured.\n"
            begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
            before, found, after = page.partition(begin)
            _, closed, after = after.partition(end)
            if not found or not closed:
                raise ValueError(f"{PAGE} lacks the markers {begin.strip()} and {end}.")
            page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def write(folder: Path) -> str:
    """Writes the tables into docs/science.md and returns them."""
    page = filled(PAGE.read_text(encoding="utf-8"), folder)
    PAGE.write_text(page, encoding="utf-8")
    return "\n".join(re.findall(r"(?:^\|.*\|\n)+", page, re.M))
