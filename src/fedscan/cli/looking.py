"""Commands that show what there is: methods, models, tasks, the state of data, the record of a run."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fedscan.cli import common

COUNTS = ("expected", "used", "left_out", "reasons")  # of a hospital's cases
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def methods(json: JSON = False) -> None:
    """List the methods."""
    from fedscan.methods.registry import methods as registry

    found = registry()
    if json:
        common.print_json([method(entry) for entry in found.values()])
        return
    rows = [(name, e.card.family, e.card.year, e.card.differs) for name, e in found.items()]
    common.print_table(("name", "family", "year", "what differs"), rows)
    print("\nfedscan show NAME tells more.")


def method(entry: Any) -> dict[str, Any]:
    """A method's card as plain data."""
    from fedscan.studyfile.places import words

    card = entry.card
    names = ("name", "title", "family", "paper", "year", "url", "equation", "differs", "travels", "privacy",
             "normalisation", "moments", "model", "needs", "pooled")  # fmt: skip
    options = {name: {"default": default, "allowed": words(kind)} for name, (kind, default) in entry.options.items()}
    return {**{name: getattr(card, name) for name in names}, "package": entry.package, "hyperparameters": options}


def show(name: Annotated[str, typer.Argument(metavar="METHOD")], json: JSON = False) -> None:
    """Show a method: paper, equation, what differs, what travels, its hyperparameters."""
    from fedscan.methods.registry import get

    entry = get(name)
    told = method(entry)
    if json:
        common.print_json(told)
        return
    options = told.pop("hyperparameters")
    print(f"{told.pop('title')}\n")
    for key, value in told.items():
        if value not in ("", None, False):
            print(f"{key:<14}{value}")
    if reduction := entry.card.reduces:
        settings = ", ".join(f"{k} = {v}" for k, v in {**reduction.own, **reduction.step}.items())
        alone = "with one site" if reduction.alone else ""
        print(f"{'is':<14}{reduction.to} " + (f"where {settings} {alone}" if settings else alone).rstrip())
    if options:
        print("\n[method]")
        for key, option in options.items():
            default = "" if option["default"] is None else f" = {option['default']}"
            print(f"  {key}{default}  ({option['allowed']})")


def models(json: JSON = False) -> None:
    """List the networks, with their options and presets."""
    from fedscan.models.registry import models as registry

    found = registry()
    if json:
        common.print_json([
            {"name": c.name, "summary": c.summary, "paper": c.paper, "url": c.url, "presets": c.presets,
             "options": {k: {"default": v, "allowed": c.allowed(k)} for k, v in c.options.items()}}
            for c in found.values()
        ])  # fmt: skip
        return
    rows = [(c.name, ", ".join(c.presets), ", ".join(c.options), c.summary) for c in found.values()]
    common.print_table(("name", "presets", "options", "what it is"), rows)


def tasks(json: JSON = False) -> None:
    """List the tasks, with the settings of their loss."""
    from fedscan.studyfile.sections import TABLES, of_task
    from fedscan.tasks.registry import tasks as registry

    found: list[dict[str, Any]] = []
    for name, card in registry().items():
        form = TABLES["task"] if name == "segmentation" else of_task(card)
        options = {k: f.default for k, f in form.model_fields.items() if k not in ("kind", "labels")}
        about = " ".join((card.make.__doc__ or "").strip().partition("\n\n")[0].split())
        found.append({"name": name, "summary": about, "package": card.origin.package, "options": options})
    if json:
        common.print_json(found)
        return
    rows = [
        (t["name"], t["package"], ", ".join(f"{k} = {v}" for k, v in t["options"].items()), t["summary"]) for t in found
    ]
    common.print_table(("name", "package", "options", "what it is"), rows)


def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder in a known layout, or a table of cases.")],
    require: Annotated[list[str] | None, typer.Option(metavar="SEQUENCE", help="Every case must have it.")] = None,
    limit: Annotated[float, typer.Option(min=0, max=1, help="The share of cases that may be unusable.")] = 0.1,
    labels: Annotated[bool, typer.Option("--labels/--no-labels", help="Whether every case needs a label.")] = True,
    study: Annotated[
        Path | None, typer.Option(metavar="STUDY.toml", help="Look for the sequences and labels of this study.")
    ] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="CASES.csv", help="Write the cases as a table, to put hospitals into.")
    ] = None,
    json: JSON = False,
) -> None:
    """Open every file of every case, and say which cases can be used and why others cannot."""
    from fedscan.data.check import TooManyLeftOutError
    from fedscan.data.check import check as look
    from fedscan.data.manifest import read_manifest
    from fedscan.data.preprocess import unsuited
    from fedscan.report.words import plural

    manifest = read_manifest(folder)
    next_ = table_of(manifest, write) if write else ""
    scheme: Any = "zscore"
    if study:
        manifest, scheme = as_read_by(study, folder, manifest)
    failed = None
    try:
        found = look(manifest, require or (), limit, labels)
    except TooManyLeftOutError as e:
        found, failed = e.catalogue, e
    left = [{"case": c.name, "site": c.site, "code": r.code, "why": r.sentence} for c, r in found.left_out]
    odd = unsuited(manifest.intensity, scheme)
    warnings = [*found.warnings, *([odd] if odd else [])]
    names = {value: name for name, value in manifest.labels.items()}
    values: list[Any] = [{"value": v, "name": names.get(v), "cases": n} for v, n in found.values.items()]
    if json:
        facts = {"layout": manifest.layout, "sequences": manifest.sequences, "labels": manifest.labels}
        sites = [vars(row) for row in found.sites]
        common.print_json({**facts, "label_values": values, "sites": sites, "left_out": left, "warnings": warnings})
    else:
        print(f"{manifest.layout}: {found.expected} cases, {len(found.used)} usable\n")
        rows = [
            (r.site, r.expected, r.used, r.subjects, r.labelled, several(r.sequences), by_axis(r.spacing))
            for r in found.sites
        ]
        common.print_table(("site", "cases", "usable", "subjects", "labelled", "sequences", "mm (x, y, z)"), rows)
        if values:
            said = (f"{v['value']} ({v['name'] or 'no name'}) in {plural(v['cases'], 'case')}" for v in values)
            print(f"\nlabel values: {', '.join(said)}")
        for case in left:
            print(f"left out: {case['case']} of {case['site']}: {case['why']}")
        for warning in warnings:
            print(f"warning: {warning}")
        print(next_, end="")
    if failed:
        raise failed


def table_of(manifest: Any, path: Path) -> str:
    """Writes the cases as a table that does not exist yet, and returns what to do with it."""
    from fedscan.data.manifest import write_manifest
    from fedscan.report.words import plural

    path = path / "cases.csv" if path.is_dir() else path
    for file in (path, path.with_suffix(".json")):
        if file.exists():
            raise ValueError(f"{file} exists already, and is not written over: give --write another name.")
    write_manifest(manifest, path)
    sites = ", ".join(repr(site) for site in manifest.sites)
    return (
        f"\n{path} lists {plural(len(manifest.cases), 'case')}, and {path.with_suffix('.json').name} their labels. Now "
        f"put each case's hospital into the column site (it holds {sites}), and give all cases of one person the same "
        f"name in the column subject; then name the table as cases in the study's [data], or with --data {path}.\n"
    )


def as_read_by(study: Path, folder: Path, manifest: Any) -> Any:
    """The manifest with the sequences and the labels that a study names, where it names any; and how it normalises."""
    from dataclasses import replace

    from fedscan.studyfile import load
    from fedscan.studyfile.labels import flat, labels_of

    file = load(study, (), folder)
    labels = flat(labels_of(file, manifest)) if file.tables["task"].labels else manifest.labels
    read = replace(manifest, sequences=file.data.sequences or manifest.sequences, labels=labels)
    return read, file.data.normalise


def several(counts: dict[str, int]) -> str:
    """Counts by name: "t1 12, flair 9"."""
    return ", ".join(f"{name} {n}" for name, n in counts.items())


def by_axis(spacing: tuple[float, ...]) -> str:
    """A spacing in mm: "1 x 1 x 3"."""
    return " x ".join("?" if mm != mm else f"{mm:.3g}" for mm in spacing)


def ledger(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    by: Annotated[Literal["site", "round", "question"], typer.Option(help="One line for each of these.")] = "site",
    json: JSON = False,
) -> None:
    """Show what was asked, what was answered, and what travelled; by site, how many cases were used, too."""
    from contextlib import closing
    from json import loads

    from fedscan.ledger import classes, opened, read_turns, read_weighty
    from fedscan.report.words import size

    with closing(opened(run)) as db:
        turns = read_turns(db)
        meta = dict(db.execute("SELECT key, value FROM meta WHERE key IN ('study', 'sites', 'weighty')"))
    rounds, weighty = loads(meta["study"])["train"]["rounds"], read_weighty(meta)
    cases = {row["name"]: case_counts(row) for row in loads(meta["sites"])} if by == "site" else {}
    groups: dict[Any, list[Any]] = {name: [] for name in cases}
    for turn in turns:
        groups.setdefault(getattr(turn, by), []).append(turn)
    rows = [
        {
            by: key,
            **(cases.get(key, dict.fromkeys(COUNTS)) if by == "site" else {}),
            **{s: sum(t.status == s for t in of) for s in ("answered", "refused", "absent")},
            "bytes_down": sum(t.bytes_down for t in of),
            "bytes_up": sum(t.bytes_up for t in of),
            "seconds": round(sum(t.seconds for t in of), 3),
            "privacy": sorted({c for t in of if t.status == "answered" for c in classes(t, weighty)}),
        }
        for key, of in sorted(groups.items())
    ]
    if json:
        common.print_json(rows)
        return

    def line(r: dict[str, Any]) -> list[object]:
        key = f"{r[by]} (test)" if by == "round" and r[by] > rounds else r[by]
        sent = [r["answered"], r["refused"], r["absent"], size(r["bytes_down"]), size(r["bytes_up"]), r["seconds"]]
        return [key, *("–" if r[c] is None else r[c] for c in counts), *sent, ", ".join(r["privacy"])]

    counts = COUNTS[:3] if by == "site" else ()
    heads = (by, *(c.replace("_", " ") for c in counts), "answered", "refused", "absent", "down", "up", "seconds")
    common.print_table((*heads, "what left"), [line(row) for row in rows])


def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    seal: Annotated[
        str, typer.Option(metavar="SEAL", help="A seal that was noted before: of the report, or shown to a hospital.")
    ] = "",
    root: Annotated[
        str, typer.Option(metavar="FINGERPRINT", help="The root of the consortium, as you were told by telephone.")
    ] = "",
    json: JSON = False,
) -> None:
    """Check that a record is as it was written, row by row, and that hospitals have signed their part of it."""
    import re
    from contextlib import closing
    from dataclasses import asdict

    from fedscan.chain import verified
    from fedscan.consortium import countersigned
    from fedscan.ledger import opened
    from fedscan.run import Problem

    if seal and not re.fullmatch("[0-9a-f]{64}", seal):
        raise Problem(f"--seal {seal}: a seal is 64 hexadecimal digits; copy it whole from the report, or from what "
                      "was shown to a hospital.")  # fmt: skip
    with closing(opened(run)) as db:
        chain = verified(db, seal)
        hospitals = countersigned.Countersigned() if chain.fault else countersigned.verified(run, db, root)
    if json:
        common.print_json({**asdict(chain), "hospitals": asdict(hospitals)})
    if chain.fault:
        raise Problem(f"the record in {run} is not as it was sealed: {chain.fault}")
    if hospitals.fault:
        raise Problem(f"the record in {run} is not what the hospitals have signed: {hospitals.fault}")
    if not json:
        print(f"{chain.rows} rows of {chain.rounds} rounds are as they were sealed.")
        signatures(hospitals, bool(root))
        common.where(seal=chain.seal)


def signatures(found: Any, told: bool) -> None:
    """Says whose signatures stand under a record, and by which root's word they are whose; that may have been told."""
    from fedscan.consortium.keys import spoken
    from fedscan.report.words import plural

    if not found.root:
        print("It was made on one machine: no hospital has signed it.\n")
        return
    print(f"{plural(sum(found.answers.values()), 'answer')} and the seals of earlier rounds are signed by hospitals:\n")
    rows = [
        (name, found.answers.get(name, 0), "yes" if name in found.ends else "not yet", key[:16])
        for name, key in sorted(found.keys.items())
    ]
    common.print_table(("hospital", "answers signed", "last seal signed", "by its key"), rows)
    if found.ahead:
        print(f"\nNobody has signed the last {plural(found.ahead, 'round')} yet.")
    if not told:
        print(
            "\nThe consortium's root says whose these keys are. Compare its fingerprint with the one you were told:"
            f"\n  {spoken(found.root)}"
        )
    print()


def case_counts(row: dict[str, Any]) -> dict[str, Any]:
    """A hospital's cases: expected, used, how many are left out, and each of those with its reason."""
    why = [{"case": case, "why": reason} for case, reason in row["left_out"]]
    return dict(zip(COUNTS, (row["expected"], row["used"], row["expected"] - row["used"], why), strict=True))
