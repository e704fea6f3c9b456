"""Score rows to what the page says: who gained, who is harmed, scores by structure, trained where tested where."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedscan.ledger import Record, ScoreRow
from fedscan.report.figures import Arrow, Curve
from fedscan.report.words import MEANINGS, NAMES, Cell, estimate, interval, number, plural
from fedscan.statistics import Detection, Summary, by_site, detection, macro, micro, worst

MARGIN = 0.02  # a change of Dice below this is no clear change
HELPED, UNCLEAR, HARMED, UNKNOWN = "helped", "no clear change", "harmed", "cannot be said"

RULE = (
    f"Each patient's Dice in the federation is compared with the same patient's Dice of the hospital's own model. A "
    f"hospital is harmed where the mean difference is below −{MARGIN} and its 95 % interval excludes 0; helped where "
    f"it is above +{MARGIN} and the interval excludes 0; otherwise there is no clear change. Of one patient nothing "
    f"can be said. A harmed hospital should keep its own model, or a personalised one."
)
COUNTING = (
    "A patient's Dice is the mean over its structures. Intervals are 95 % intervals of the mean over patients "
    "(Student's t, cut to the values that a score can have); for the mean of hospitals, over hospitals. “Mean of "
    "hospitals” counts every hospital the same (macro), “mean of patients” counts every patient the same (micro). A "
    "score that is undefined, because a structure is in neither outline, is counted and left out: it is never taken "
    "as 0 or 1."
)
OWN = {"local-only": "Trained alone", "centralised": "All data pooled"}  # columns that are no federation
ADVICE = "It should keep its own model, or a personalised one."


@dataclass(frozen=True)
class Gain:
    """What federation did for one hospital. ``difference`` is federated minus alone, over the same patients."""

    site: str
    verdict: str
    text: str
    alone: Summary | None
    federated: Summary | None
    pooled: Summary | None
    difference: Summary | None
    advice: str = ADVICE

    @property
    def css(self) -> str:
        """The class of the row: helped, harmed or nothing."""
        return self.verdict if self.verdict in (HELPED, HARMED) else ""


@dataclass(frozen=True)
class Row:
    """A named row of cells."""

    name: str
    cells: Sequence[Cell | None]
    about: str = ""
    css: str = ""


@dataclass(frozen=True)
class Headline:
    """One column per way of training; rows for hospitals, and the three ways to sum them up."""

    columns: Sequence[str]
    sites: Sequence[Row]
    sums: Sequence[Row]


@dataclass(frozen=True)
class Group:
    """The scores of one structure: a row per hospital and the mean of hospitals."""

    label: str
    sites: Sequence[Row]
    macro: Sequence[Cell | None]


@dataclass(frozen=True)
class Scores:
    """Scores by structure, with the meaning of every column, and whether each structure was found where it is."""

    metrics: Sequence[str]
    groups: Sequence[Group]
    meanings: Sequence[tuple[str, str]]
    found: Mapping[str, Detection]  # none of a structure whose masks were not measured


@dataclass(frozen=True)
class Heat:
    """One cell of the heat map: its text, how deep its blue is, and what stands behind it."""

    text: str
    alpha: float
    css: str
    support: str


@dataclass(frozen=True)
class Cross:
    """Models (rows) by hospitals (columns)."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Heat]]]


def final(rows: Iterable[ScoreRow]) -> list[ScoreRow]:
    """The test scores of the last round that has any."""
    tests = [row for row in rows if row.split == "test"]
    last = max((row.round for row in tests), default=0)
    return [row for row in tests if row.round == last]


def home(rows: Iterable[ScoreRow]) -> list[ScoreRow]:
    """The scores of the model that each site would use: the one trained there, else the one that all share."""
    kept = list(rows)
    own = {row.tested_at for row in kept if row.trained_at == row.tested_at}
    sites = {row.tested_at for row in kept}
    return [
        row
        for row in kept
        if row.trained_at == row.tested_at or (row.tested_at not in own and row.trained_at not in sites)
    ]


def differences(a: Iterable[ScoreRow], b: Iterable[ScoreRow], metric: str = "dice") -> list[ScoreRow]:
    """Rows of a - b by site, case and label; None, and so undefined, where one of the two is missing or undefined.

    Rounded to 12 digits, so that 0.78 - 0.80 is no worse than -0.02.
    """
    one, two = ({(r.tested_at, r.case, r.label): r for r in rows if r.metric == metric} for rows in (a, b))
    found = []
    for key, row in sorted((one | two).items()):
        x, y = (side[key].value if key in side else None for side in (one, two))
        found.append(replace(row, value=None if x is None or y is None else round(x - y, 12)))
    return found


def judge(difference: Summary | None) -> str:
    """Helped, harmed, no clear change, or cannot be said, by the rule that the page prints (``RULE``)."""
    if difference is None or difference.mean is None or difference.low is None or difference.high is None:
        return UNKNOWN
    if difference.mean > MARGIN and difference.low > 0:
        return HELPED
    if difference.mean < -MARGIN and difference.high < 0:
        return HARMED
    return UNCLEAR


def gains(record: Record) -> list[Gain]:
    """What the federation did for each hospital, in the record's order; empty without a local-only comparison."""
    if "local-only" not in record.comparisons or record.method == "local-only":
        return []
    ours, alone = home(final(record.scores)), home(final(record.comparisons["local-only"]))
    pooled = home(final(record.comparisons.get("centralised", ())))
    tables = [by_site(rows, "dice") for rows in (alone, ours, pooled, differences(ours, alone))]
    found = []
    for site in record.sites:
        before, after, best, change = (table.get(site.name) for table in tables)
        verdict = judge(change)
        found.append(Gain(site.name, verdict, _sentence(before, after, change, verdict), before, after, best, change))
    return found


def _sentence(before: Summary | None, after: Summary | None, change: Summary | None, verdict: str) -> str:
    """A verdict in words, with its numbers."""
    if not (before and after and change) or change.mean is None:
        return "There is no test case that both models scored."
    span = interval(change, signed=True).strip("[]").replace(", ", " to ")
    text = (
        f"Dice {number(before.mean)} alone, {number(after.mean)} federated: "
        f"{number(change.mean, signed=True)}{f' (95 % interval {span})' if span else ''}, "
        f"{plural(change.subjects, 'patient')}."
    )
    if change.undefined:
        text += f" {plural(change.undefined, 'score')} of {change.total} undefined and left out."
    if verdict == UNKNOWN:
        return f"{text} Of one patient nothing can be said."
    if verdict == UNCLEAR and abs(change.mean) > MARGIN:
        return f"{text} The interval includes 0, so this may be chance."
    return text


def headline(record: Record, found: Sequence[Gain]) -> Headline:
    """Dice of every way of training, by hospital and in sum, and the gain where there is training alone to compare."""
    ways: dict[str, list[ScoreRow]] = {}
    others = {name: home(final(rows)) for name, rows in record.comparisons.items() if name != record.method}
    if alone := others.pop("local-only", []):
        ways["Trained alone"] = alone
    ways[OWN.get(record.method, f"Federated ({record.method})")] = ours = home(final(record.scores))
    for name in sorted(others):
        ways[OWN.get(name, name)] = others[name]
    change = differences(ours, alone) if alone else []
    tables = [by_site(rows, "dice") for rows in ways.values()]
    verdicts = {gain.site: gain for gain in found}
    sites = []
    for site in record.sites:
        cells = [estimate(table.get(site.name), unit="scores") for table in tables]
        gain = verdicts.get(site.name)
        if found:
            cells.append(estimate(gain.difference if gain else None, signed=True, unit="pairs"))
        sites.append(Row(site.name, cells, css=gain.css if gain else ""))
    return Headline(list(ways), sites, _sums(list(ways.values()), change if found else None))


def _sums(ways: Sequence[Sequence[ScoreRow]], change: Sequence[ScoreRow] | None) -> list[Row]:
    """Macro, micro and worst site of every column; None: there is no column of gains."""
    macros = [*(estimate(macro(rows, "dice"), unit="hospitals") for rows in ways)]
    micros = [*(estimate(micro(rows, "dice"), unit="scores") for rows in ways)]
    if change is not None:
        macros.append(estimate(macro(change, "dice"), signed=True, unit="hospitals"))
        micros.append(estimate(micro(change, "dice"), signed=True, unit="pairs"))
    worsts: list[Cell | None] = []
    for rows, signed in (*((rows, False) for rows in ways), *([] if change is None else [(change, True)])):
        found = worst(rows, "dice")
        cell = estimate(found[1], signed=signed) if found else None
        worsts.append(Cell(cell.text, cell.interval, found[0]) if cell and found else None)
    return [
        Row("Mean of hospitals", macros, "macro: every hospital counts the same"),
        Row("Mean of patients", micros, "micro: every patient counts the same"),
        Row("Worst hospital", worsts, "lowest of each column"),
    ]


def arrows(record: Record, found: Sequence[Gain]) -> list[Arrow]:
    """The rows of the gain chart: every hospital, then the mean of hospitals."""
    rows = [
        Arrow(g.site, _mean(g.alone), _mean(g.federated), _mean(g.pooled), g.verdict, _gain(g.difference))
        for g in found
    ]
    ways = [record.comparisons.get("local-only", ()), record.scores, record.comparisons.get("centralised", ())]
    alone, ours, pooled = (macro(home(final(rows)), "dice") for rows in ways)
    change = macro(differences(home(final(record.scores)), home(final(ways[0]))), "dice")
    mean = Arrow("Mean of hospitals", alone.mean, ours.mean, pooled.mean, "mean", _gain(change))
    return [*rows, mean] if len(rows) > 1 else rows


def _mean(summary: Summary | None) -> float | None:
    return summary.mean if summary else None


def _gain(change: Summary | None) -> str:
    if change is None or change.mean is None:
        return "no pair"
    return f"{number(change.mean, signed=True)} {interval(change, signed=True)}".strip()


def curves(record: Record) -> tuple[Curve, list[Curve]] | None:
    """Validation Dice by round: the mean of hospitals, and each hospital with its missed rounds. None without any."""
    rounds: dict[int, list[ScoreRow]] = {}
    for row in record.scores:
        if row.split == "validation" and row.metric == "dice":
            rounds.setdefault(row.round, []).append(row)
    at = sorted(rounds)
    homes = {r: home(rounds[r]) for r in at}
    means = [(r, mean) for r in at if (mean := macro(homes[r], "dice").mean) is not None]
    if not means:
        return None
    tables = {r: by_site(homes[r], "dice") for r in at}
    sites = []
    for site in record.sites:
        points = [(r, s.mean) for r in at if (s := tables[r].get(site.name)) and s.mean is not None]
        missed = {
            kind: sorted({t.round for t in record.turns if t.site == site.name and t.status == kind})
            for kind in ("absent", "refused")
        }
        sites.append(Curve(site.name, [r for r, _ in points], [v for _, v in points], **missed))
    return Curve("Mean of hospitals", [r for r, _ in means], [v for _, v in means]), sites


def cross(record: Record) -> Cross:
    """Mean Dice of every model at every hospital: each hospital's own, the federation's, the pooled and any other."""
    names = [site.name for site in record.sites]
    models: dict[str, list[ScoreRow]] = {}
    others = {name: rows for name, rows in record.comparisons.items() if name != record.method}
    sources = [("local-only", others.pop("local-only", ())), (record.method, record.scores), *others.items()]
    for source, rows in sources:
        for row in final(rows):
            models.setdefault(_model(source, row.trained_at, record), []).append(row)
    tables = {name: (rows[0].trained_at, by_site(rows, "dice")) for name, rows in models.items()}
    means = [s.mean for _, table in tables.values() for s in table.values() if s.mean is not None]
    low, high = min(means, default=0.0), max(means, default=1.0)
    rows_ = []
    for name, (trained_at, table) in tables.items():
        cells = [_heat(table.get(site), low, high, trained_at == site) for site in names]
        average = macro([row for row in models[name] if row.tested_at in names], "dice")
        rows_.append((name, [*cells, _heat(average, low, high, False)]))
    return Cross([*names, "Mean"], rows_)


def _model(source: str, trained_at: str, record: Record) -> str:
    """What a row of the table is called."""
    if source == "local-only":
        return f"{trained_at} alone"
    if source == "centralised":
        return "All data pooled"
    if source != record.method:
        return source
    return f"Federation ({source})" if trained_at == "federation" else f"{trained_at} ({source})"


def _heat(summary: Summary | None, low: float, high: float, at_home: bool) -> Heat:
    if summary is None or summary.mean is None:
        return Heat("–", 0.0, "", "no score")
    alpha = 0.04 + 0.86 * (summary.mean - low) / max(high - low, 1e-9)
    css = " ".join(name for name, on in (("hi", alpha > 0.68), ("home", at_home)) if on)
    return Heat(number(summary.mean), round(alpha, 2), css, f"{summary.used} of {summary.total} scores used")


def scores(record: Record) -> Scores:
    """Every metric of every structure at every hospital, of the model that each hospital would use."""
    tested = home(final(record.scores))
    rows = [row for row in tested if row.metric in NAMES]
    metrics = [name for name in NAMES if any(row.metric == name for row in rows)]
    labels = [*record.labels, *sorted({row.label for row in rows} - set(record.labels))]
    groups = []
    for label in labels:
        of_label = {m: [row for row in rows if row.label == label and row.metric == m] for m in metrics}
        if not any(of_label.values()):
            continue
        tables = {m: by_site(of_label[m], m) for m in metrics}
        sites = [Row(s.name, [estimate(tables[m].get(s.name), m) for m in metrics]) for s in record.sites]
        mean = [_macro(of_label[m], m) for m in metrics]
        groups.append(Group(label, sites, mean))
    counts = detection(tested)
    found = {label: counts[label] for label in labels if label in counts}
    return Scores([NAMES[m] for m in metrics], groups, [(NAMES[m], MEANINGS[m]) for m in metrics], found)


def _macro(rows: Sequence[ScoreRow], metric: str) -> Cell | None:
    """The mean of hospitals with the support of single cases, so that an undefined score shows here too."""
    cell, cases = estimate(macro(rows, metric), metric), micro(rows, metric)
    if cell is None:
        return None
    support = f"{'' if cell.text else 'undefined, '}{cases.used}/{cases.total}"
    return Cell(cell.text, cell.interval, support, cases.undefined > 0)
