"""Commands that carry out studies, and what is made of a run afterwards."""

from pathlib import Path
from typing import Annotated

import typer

from fedscan.cli import common

STUDY = Annotated[Path, typer.Argument(metavar="STUDY.toml", help="The study file.")]
RUN = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
DATA = Annotated[Path | None, typer.Option("--data", metavar="DIR", help='Folder or table of cases, or "demo".')]
SET = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: train.rounds=3.")]
OUT = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where the run lies (default: runs/NAME).")]
DEVICE = Annotated[str | None, typer.Option(help='"cpu", "cuda", "cuda:N" or "auto".')]
STRICT = Annotated[bool, typer.Option("--strict", help="Send every message through its bytes, as between hospitals.")]
WORKERS = Annotated[int, typer.Option(min=1, max=256, help="Processes that answer for the sites; same numbers.")]
CACHE = Annotated[Path | None, typer.Option(envvar="FEDSCAN_CACHE", help="Where prepared scans are kept.")]
NUMERICS = Annotated[bool, typer.Option("--other-numerics", help="Go on under another torch, device or threads.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def demo(
    out: OUT = None,
    hard_site: Annotated[bool, typer.Option("--hard-site", help="Add a hospital with inverted contrast.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Other patients, another order.")] = 0,
) -> None:
    """Five simulated hospitals segment 3D brain scans; nothing is downloaded."""
    from fedscan.demo import demo as play

    folder = out or Path("runs/demo")
    try:
        page = play(folder, hard_site=hard_site, seed=seed)
    except KeyboardInterrupt:
        raise typer.Exit(common.interrupted()) from None
    ended(folder, page, json=False)


def run(
    study: STUDY,
    data: DATA = None,
    set_: SET = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that lies in the folder.")] = False,
    strict: STRICT = False,
    device: DEVICE = None,
    workers: WORKERS = 1,
    out: OUT = None,
    cache: CACHE = None,
    other_numerics: NUMERICS = False,
    json: JSON = False,
) -> None:
    """Run a study; the folder then holds its record, its model and its report."""
    from fedscan.launch import How, free, launch, prepared, ready, suits
    from fedscan.live import Show
    from fedscan.studyfile import load

    file = load(study, settings(set_, device), data)
    folder = out or Path("runs") / file.folder
    free(folder, resume)
    if resume and not resuming(folder):
        raise ValueError(f"{folder} holds no run to go on with: leave out --resume, or name the run's folder by --out")
    ready(file)
    try:
        suits(file, folder, How(numerics=other_numerics))
        cases = prepared(file, How(cache=cache, tell=common.progress))
        left_out(cases.rows)
        for note in cases.notes:
            common.complain(f"note: {note}")
        with Show(cases.rows, file.rounds, title=file.name) as show:
            how = How(
                resume, strict, workers, other_numerics,
                cache=cache, command=common.rerun(), watch=show, tell=common.quiet_while(show),
            )  # fmt: skip
            page = launch(file, folder, how, cases)
    except KeyboardInterrupt:
        raise typer.Exit(common.interrupted(*resuming(folder))) from None
    except Exception as e:
        e.again = resuming(folder)  # type: ignore[attr-defined]
        raise
    ended(folder, page, json)


def resuming(folder: Path) -> tuple[str, ...]:
    """What a run needs to be gone on with: nothing where it was stopped before its record had begun."""
    return ("--resume",) if (folder / "journal.sqlite").exists() else ()


def settings(given: list[str] | None, device: str | None) -> list[str]:
    """The settings of the command line as "table.key=value"."""
    return [*(given or []), *([f"run.device={device}"] if device else [])]


def left_out(rows: object) -> None:
    """Says which cases are left out, and why."""
    for row in rows:  # type: ignore[attr-defined]
        for case, why in row.left_out:
            common.complain(f"left out: case {case} of {row.name}: {why}")


def ended(folder: Path, page: Path, json: bool) -> None:
    """The scores of a run that has come to its end, and where its things lie."""
    from fedscan.compare import site_figures, site_table
    from fedscan.launch import models_of
    from fedscan.ledger import read_record
    from fedscan.report.warnings import warnings

    record, models = read_record(folder), models_of(folder)
    model = models[0] if len(models) == 1 else folder / "models"
    places = {"report": page, "scores": page.with_name("scores.csv"), "model": model}
    places["ledger"] = folder / "journal.sqlite"
    if json:
        facts = {"name": record.name, "hash": record.study_hash, "warnings": list(warnings(record))}
        common.print_json({**facts, "sites": site_figures(record), **places})
        return
    common.print_table(*site_table(record))
    common.print_warnings(warnings(record))
    print()
    common.where(**places)


def compare(
    study: STUDY,
    methods: Annotated[str, typer.Option(metavar="A,B,C", help="The methods; the first is what others are held to.")],
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs per method.")] = 1,
    data: DATA = None,
    set_: SET = None,
    strict: STRICT = False,
    device: DEVICE = None,
    workers: WORKERS = 1,
    out: OUT = None,
    cache: CACHE = None,
    other_numerics: NUMERICS = False,
    json: JSON = False,
) -> None:
    """Run several methods on one study, and compare them; goes on where it stood."""
    from fedscan.compare import compare as carry_out
    from fedscan.compare import figures
    from fedscan.launch import How
    from fedscan.report.comparison import distance, lines, unsent
    from fedscan.report.warnings import of_runs
    from fedscan.report.words import NAMES
    from fedscan.studyfile import load

    names = [name.strip() for name in methods.split(",") if name.strip()]
    folder = out or Path("runs") / f"{load(study, settings(set_, device), data).folder}-comparison"
    how = How(True, strict, workers, other_numerics, cache=cache, command=common.rerun(), tell=common.progress)
    try:
        page, runs = carry_out(study, names, seeds, folder, settings(set_, device), data, how)
    except KeyboardInterrupt:
        raise typer.Exit(common.interrupted()) from None
    if json:
        common.print_json(figures(runs))
        return
    made = lines(runs)[0]
    shown = [
        (
            line.name,
            line.seeds,
            cell(line.dice),
            cell(line.worst),
            cell(line.hd95),
            line.traffic,
            line.difference,
            line.p,
        )
        for line in made
    ]
    hd95 = NAMES[distance(runs)]
    columns = ("method", "seeds", "Dice [95 % CI]", "worst site", hd95, "up per round", "difference", "p (Holm)")
    common.print_table(columns, shown)
    common.print_warnings(of_runs(runs))
    print(f"\n{said}\n" if (said := unsent(made)) else "")
    common.where(page=page, scores=page.with_name("scores.csv"))


def cell(value: object) -> str:
    """A cell of the comparison as text."""
    parts = [getattr(value, name, "") for name in ("text", "interval", "support")]
    return " ".join(part for part in parts if part) or "–"


def predict(
    run: RUN,
    scans: Annotated[list[str], typer.Argument(metavar="SCAN...", help="One file per sequence, or SEQUENCE=FILE.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="SEG", help="The label map to write (.nii.gz).")],
    site: Annotated[str | None, typer.Option(help="Whose model, where sites have their own.")] = None,
    device: DEVICE = None,
) -> None:
    """Segment a scan with the model of a run, on the scan's own grid."""
    from fedscan.predict import predict as segment

    common.where(labels=segment(run, scans, out, site=site, device=device))


def report(
    run: RUN,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where it is written (default: the run).")] = None,
) -> None:
    """Write the report and the scores of a run again, as far as the run has come."""
    from fedscan.launch import report as write

    page = write(run, out=out)
    common.where(report=page, scores=page.with_name("scores.csv"))
