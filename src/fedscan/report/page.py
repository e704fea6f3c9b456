"""A run's record to one HTML file that needs nothing else: no script, no font, no picture from outside."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedscan.ledger import Record
from fedscan.report import comparison, figures, overlays, tables, turns
from fedscan.report.warnings import of_runs, warnings
from fedscan.report.words import NAMES, duration, listed, number, plural, size
from fedscan.statistics import by_site, macro, worst

SECTIONS = (
    "Gain per hospital",
    "Learning curves",
    "Trained where, tested where",
    "Cases to look at",
    "Scores per structure",
    "What left each hospital",
    "Who took part",
    "Cases",
    "Make this again",
)


def write_report(record: Record, folder: Path) -> Path:
    """Writes ``folder/report.html`` for one run and returns its path; makes the folder where it is missing."""
    found = tables.gains(record)
    shown = tables.curves(record)
    context = {
        "r": record,
        "sections": SECTIONS,
        "lead": _lead(record),
        "notes": [*record.notes, *warnings(record)],
        "unsent": turns.UNSENT if record.method in tables.OWN else "",
        "gains": found,
        "tiles": _tiles(record, found),
        "rule": tables.RULE,
        "counting": tables.COUNTING,
        "pooled": "centralised" in record.comparisons,
        "headline": tables.headline(record, found),
        "arrows": _arrows(record, found),
        "curves": shown
        and figures.curves(*shown, "Dice", "Learning curves: validation Dice by round, for all hospitals"),
        "cross": tables.cross(record),
        "viewer": _viewer(record),
        "scores": tables.scores(record),
        "privacy": turns.privacy(record),
        "traffic": turns.traffic(record),
        "taking": turns.taking(record),
        "case_totals": _case_totals(record),
        "left_out": [(site.name, *reason) for site in record.sites for reason in site.left_out],
        "unnamed": record.between and any(site.expected > site.used for site in record.sites),
        "reproduce": _reproduce(record),
        "study": list(_flat(record.study)),
    }
    return _write("report.html.j2", context, folder, "report.html")


def write_comparison(records: comparison.Runs, folder: Path) -> Path:
    """Writes ``folder/comparison.html`` for the runs of several methods, one or several seeds each; returns its path.

    The first method is what the others are compared with. Raises ValueError where a method has no test score.
    """
    made, dots = comparison.lines(records)
    runs = {name: comparison.seeds(of_method) for name, of_method in records.items()}
    first = next(iter(runs.values()))[0]
    title = f"{first.name}: mean Dice of {len(dots)} methods with 95 % intervals"
    context = {
        "name": first.name,
        "notes": [
            *dict.fromkeys(note for of in runs.values() for record in of for note in record.notes),
            *of_runs(runs),
        ],
        "lead": f"{plural(len(made), 'method')} on the same test cases of {plural(len(first.sites), 'hospital')}.",
        "lines": made,
        "hd95": NAMES[comparison.distance(runs)],
        "unsent": comparison.unsent(made),
        "forest": figures.forest(dots, title, "Dice (mean of hospitals)"),
        "counting": tables.COUNTING,
        "runs": [(name, record) for name, of_method in runs.items() for record in of_method],
    }
    return _write("comparison.html.j2", context, folder, "comparison.html")


def _write(template: str, context: Mapping[str, Any], folder: Path, name: str) -> Path:
    """Fills a template, every value escaped, and writes it whole or not at all."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from fedscan import __version__

    loader = PackageLoader("fedscan.report", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    text = environment.get_template(template).render(version=__version__, **context)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    draft = path.with_suffix(".part")
    draft.write_text(text, encoding="utf-8", errors="replace")
    return draft.replace(path)


def _lead(record: Record) -> str:
    """What was done, in one or two sentences."""
    used = sum(site.used for site in record.sites)
    tests = sum(site.test for site in record.sites)
    hospitals, rounds = plural(len(record.sites), "hospital"), plural(record.rounds, "round")
    how = {
        "local-only": f"{hospitals} trained a model each, without exchanging anything",
        "centralised": f"One model was trained on the cases of {hospitals}, put together in one place",
    }.get(record.method, f"{hospitals} trained one model together in {rounds} of {record.method}")
    return (
        f"{how}, to outline {listed(list(record.labels))} in {plural(used, 'scan')}. Every model on this page was "
        f"scored once, at the end, on {plural(tests, 'test case')} kept aside for this."
    )


def _tiles(record: Record, found: Sequence[tables.Gain]) -> Iterator[dict[str, Any]]:
    """The four numbers to take away."""
    ours = tables.home(tables.final(record.scores))
    alone = tables.home(tables.final(record.comparisons.get("local-only", ())))
    mean, before = macro(ours, "dice"), macro(alone, "dice")
    about = f"{number(before.mean)} trained alone" if before.mean is not None else "no comparison with training alone"
    yield {"label": "Mean Dice of hospitals", "value": number(mean.mean), "about": about, "bad": False}
    if lowest := worst(ours, "dice"):
        own = by_site(alone, "dice").get(lowest[0])
        about = f"{lowest[0]}{f', {number(own.mean)} alone' if own else ''}"
        yield {"label": "Worst hospital's Dice", "value": number(lowest[1].mean), "about": about, "bad": False}
    if found:
        counts = {
            word: sum(g.verdict == word for g in found)
            for word in (tables.HELPED, tables.UNCLEAR, tables.HARMED, tables.UNKNOWN)
        }
        rest = [
            (counts[tables.HARMED], "harmed"),
            (counts[tables.UNCLEAR], "without clear change"),
            (counts[tables.UNKNOWN], "of whom nothing can be said"),
        ]
        about = ", ".join(f"{n} {word}" for n, word in rest if n) or "none harmed"
        value = f"{counts[tables.HELPED]} of {len(found)}"
        yield {"label": "Hospitals helped", "value": value, "about": about, "bad": counts[tables.HARMED] > 0}
    if record.turns:
        sent = turns.per_round(record)
        value, about = ("–", "no federation") if sent is None else (size(sent), "on average, after compression")
        yield {"label": "Sent per hospital and round", "value": value, "about": about, "bad": False}


def _arrows(record: Record, found: Sequence[tables.Gain]) -> Any:
    rows = tables.arrows(record, found) if found else []
    if not any(row.alone is not None or row.federated is not None for row in rows):
        return None
    text = "; ".join(f"{row.name}: {number(row.alone)} alone, {number(row.federated)} federated" for row in rows)
    return figures.arrows(rows, f"Dice of each hospital alone and in the federation. {text}", "Dice")


def _viewer(record: Record) -> dict[str, Any] | None:
    """Pictures by hospital, in the record's order, best first."""
    if not record.overlays:
        return None
    made, left_out = overlays.pictures(record.overlays, record.labels)
    order = {"best": 0, "median": 1, "worst": 2}
    names = list(dict.fromkeys([*(site.name for site in record.sites), *(p.site for p in made)]))
    sites = []
    for name in names:
        mine = sorted((p for p in made if p.site == name), key=lambda p: order.get(p.rank, 3))
        if mine:
            sites.append({"name": name, "pictures": [_picture(p) for p in mine]})
    return {"labels": list(record.labels), "sites": sites, "left_out": len(left_out)}


def _picture(picture: overlays.Picture) -> dict[str, Any]:
    dice = "undefined" if picture.dice is None else number(picture.dice)
    spacing = " × ".join(f"{mm:.3g}" for mm in picture.spacing) + " mm"
    return {"rank": picture.rank, "dice": dice, "case": picture.case, "spacing": spacing, "svg": picture.svg}


def _case_totals(record: Record) -> list[int]:
    counts = [(s.expected, s.used, s.train, s.validation, s.test, s.expected - s.used) for s in record.sites]
    return [sum(column) for column in zip(*counts, strict=True)] if counts else [0] * 6


def _reproduce(record: Record) -> Iterator[tuple[str, str]]:
    yield "Method", record.method
    yield "Seed", str(record.seed)
    yield "Rounds", str(record.rounds)
    yield "Hash of the study", record.study_hash
    if record.seal:
        yield "Seal of the record", record.seal
    yield "Time taken", duration(record.seconds)
    for name, version in record.versions.items():
        yield f"Version of {name}", version


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """A nested study as rows of dotted keys and values."""
    if isinstance(value, Mapping) and value:
        for name, below in value.items():
            yield from _flat(below, f"{key}.{name}" if key else str(name))
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
