"""The table of the FedSegNet paper on real scans: one row a method, each tuned alike, kept as it ends.

    python benchmarks/science.py --study hippocampus --seeds 0,1,2     rows that are missing, the most telling first
    python benchmarks/science.py --study glioma --seeds 0 --minutes 60  stops in time; the same command goes on
    python benchmarks/science.py --study hippocampus --rows fedsegnet,fedsegnet-no-adaptive --corrupt shuffle:float-v2
    python benchmarks/science.py --table                               writes docs/science.md from studies/results

A row is first tuned: a run with the first seed for each learning rate of ``RATES``, stopped before its test; the mean
validation Dice of the hospitals after the last round decides. Only the run that is chosen is then tested, once, and the
other seeds take its rate. A finished row is a line of ``studies/results/STUDY.jsonl``; runs lie below ``--out`` and go
on where they were stopped.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedscan.launch import How, baseline
from fedscan.ledger import Record, ScoreRow, opened, read_record
from fedscan.predict import Run
from fedscan.report.tables import home
from fedscan.run import Problem
from fedscan.statistics import Summary, by_site, macro, micro, worst
from fedscan.studyfile import Cases, StudyFile, load, read_cases
from science_rows import BY_NAME, FOLDERS, RESULTS, ROOT, Row, read_results
from spoil import CORRUPTIONS, spoil

RATES = (0.003, 0.01)
TUNED_WITH = 0  # the seed


class OutOfTime(Exception):
    """The minutes that were given are over; what is on disk is gone on with next time."""


class Validated(Exception):
    """The last round of a run is validated, and its test is not begun."""


@dataclass(frozen=True)
class Bench:
    """What all rows of a study share: its file, its cases (``corrupt``: with the labels of one hospital spoilt)."""

    study: str
    path: Path
    data: Path
    out: Path
    results: Path
    corrupt: str
    cases: Cases
    until: float  # of time.monotonic()
    extra: tuple[str, ...] = ()  # settings for all rows, for a trial

    def file(self, row: Row, *settings: str) -> StudyFile:
        """The study as the row has it."""
        return load(self.path, (*row.of(self.study), *self.extra, *settings), self.data)

    def watch(self, label: str, until: int | None) -> Any:
        """Tells rounds, stops in time, and before the test where a run is to stop after round ``until``."""
        now = 0

        def watch(what: str, value: Any) -> None:
            nonlocal now
            if what == "round":
                now = value
                print(f"{time.strftime('%H:%M:%S')} {label}: round {value}", flush=True)
            if what == "scores" and now == until:
                raise Validated
            if time.monotonic() > self.until:
                raise OutOfTime

        return watch


def carried_out(bench: Bench, row: Row, seed: int, rate: float, test: bool) -> tuple[Record, Path]:
    """The record of a row's run and its folder: begun, gone on with, or only read where it is as far as it should be.

    Without ``test`` it ends with the validation after its last round.
    """
    file = bench.file(row, f"train.lr={rate}", f"seed={seed}")
    name = "-".join(filter(None, (bench.study, bench.corrupt.replace(":", "-"))))
    folder = bench.out / name / row.name / f"{seed}-{rate:g}"
    if stands(folder) < file.rounds + test:
        watch = bench.watch(f"{row.name} at {rate:g}, seed {seed}", None if test else file.rounds)
        with suppress(Validated):
            baseline(file, bench.cases, folder, How(watch=watch))
    return read_record(folder), folder


def stands(folder: Path) -> int:
    """The last round that is settled of the run in a folder, the test being one after the last; -1 for none."""
    if not (folder / "journal.sqlite").exists():
        return -1
    try:
        with closing(opened(folder)) as db:
            head = db.execute("SELECT round FROM head").fetchone()
    except ValueError:  # stopped before it began
        return -1
    return int(head[0]) if head else -1


def tune(bench: Bench, row: Row) -> dict[str, float]:
    """The hospitals' mean validation Dice after the last round, by learning rate; what is known is not run again.

    Where labels are spoilt, rows keep the rate that was found with sound ones: nobody could tune anew on them.
    """
    for line in read_results(bench.results):
        if line["row"] == row.name and line["corrupt"] in ("", bench.corrupt):
            return dict(line["tuned"])
    found = {}
    for rate in RATES:
        record, _ = carried_out(bench, row, TUNED_WITH, rate, test=False)
        last = [r for r in record.scores if r.split == "validation" and r.round == record.rounds]
        found[f"{rate:g}"] = round(macro(home(last), "dice").mean or 0.0, 5)
    return found


def carry_out(bench: Bench, row: Row, seed: int) -> dict[str, Any]:
    """Tunes the row, runs it with a seed, and returns its line of results."""
    tuned = tune(bench, row)
    rate = float(max(tuned, key=lambda key: tuned[key]))
    record, folder = carried_out(bench, row, seed, rate, test=True)
    known = {"study": bench.study, "row": row.name, "seed": seed, "corrupt": bench.corrupt}
    found = {"settings": [*row.of(bench.study), *bench.extra], "lr": rate, "tuned": tuned}
    return {**known, **found, **measured(record), "shares": shares(folder)}


def shares(folder: Path) -> dict[str, float]:
    """How much each hospital counted in the last round; nothing where no model was averaged."""
    return {name: round(float(share), 4) for name, share in Run(folder).state.get("shares", {}).items()}


def measured(record: Record) -> dict[str, Any]:
    """What is kept of a finished run: scores with intervals, every case's Dice, bytes, steps, time, versions."""
    rows = home([row for row in record.scores if row.split == "test"])
    low = worst(rows, "dice")
    assert low is not None
    train = [t for t in record.turns if 1 <= t.round <= record.rounds and t.question != "evaluate"]
    return {
        "rounds": record.rounds,
        "steps": int(sum(t.numbers.get("steps", 0) for t in train)),
        "dice": {
            "macro": shown(macro(rows, "dice")),
            "micro": shown(micro(rows, "dice")),
            "worst": {"site": low[0], **shown(low[1])},
        },
        "dice_by_site": {site: shown(summary) for site, summary in by_site(rows, "dice").items()},
        "hd95": shown(macro(rows, "hd95")),
        "mb_up": round(sum(t.bytes_up for t in train) / record.rounds / 1e6, 4),
        # Of round 1, in which no hospital has the model yet; later it may have come with the validation before.
        "mb_down": round(sum(t.bytes_down for t in train if t.round == 1) / 1e6, 4),
        "reported_dice": reported(record),
        "seconds": round(record.seconds, 1),
        "hash": record.study_hash,
        "versions": dict(record.versions),
        "cases": case_values(rows),
    }


def shown(summary: Summary) -> dict[str, Any]:
    """A mean with its interval and support, rounded."""
    values = {key: getattr(summary, key) for key in ("mean", "low", "high")}
    rounded = {key: None if value is None else round(value, 5) for key, value in values.items()}
    return {**rounded, "used": summary.used, "total": summary.total, "subjects": summary.subjects}


def reported(record: Record) -> dict[str, list[float]]:
    """The validation Dice that hospitals reported of their own models, round by round, where the method asks for it."""
    found: dict[str, list[float]] = {}
    for turn in record.turns:
        if turn.question != "evaluate" and "dice" in turn.numbers:
            found.setdefault(turn.site, []).append(round(turn.numbers["dice"], 4))
    return found


def case_values(rows: Sequence[ScoreRow]) -> dict[str, dict[str, list[Any]]]:
    """By site and case: the subject, and the Dice of each label."""
    found: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        if row.metric == "dice":
            values = found.setdefault(row.tested_at, {}).setdefault(row.case, [row.subject, {}])[1]
            values[row.label] = None if row.value is None else round(row.value, 5)
    return found


# -- the command -----------------------------------------------------------------------------------------------------


def data_folder(study: str) -> Path:
    """Where the scans of a study are, below FEDSCAN_SHARED (``../shared`` of the repository)."""
    shared = Path(os.environ.get("FEDSCAN_SHARED", ROOT / ".." / "shared"))
    return shared.resolve() / "data" / FOLDERS[study]


def prepared(args: argparse.Namespace) -> Bench:
    """The study's file and cases, with one hospital's labels spoilt where that is asked for."""
    path, data, out = ROOT / "studies" / f"{args.study}.toml", args.data or data_folder(args.study), args.out
    os.environ.setdefault("FEDSCAN_CACHE", str(out / "cache"))
    extra = tuple(args.set or ())
    if args.corrupt:
        data = spoil(
            data, load(path, extra, data), args.corrupt, out / f"{args.study}-{args.corrupt}".replace(":", "-")
        )
    until = time.monotonic() + 60 * args.minutes
    results = args.results / f"{args.study}.jsonl"
    cases = read_cases(load(path, extra, data))
    return Bench(args.study, path, data, out, results, args.corrupt, cases, until, extra)


def run(bench: Bench, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Every row with the first seed, then with the next; what has a line of results is passed over."""
    for seed in seeds:
        for row in (BY_NAME[name] for name in names):
            done = {(line["row"], line["seed"], line["corrupt"]) for line in read_results(bench.results)}
            if (row.name, seed, bench.corrupt) in done or (row.first and seed != seeds[0]):
                continue
            line = carry_out(bench, row, seed)
            bench.results.parent.mkdir(parents=True, exist_ok=True)
            with bench.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n")
            print(f"{row.name}, seed {seed}: Dice {line['dice']['macro']['mean']}, {line['seconds']} s", flush=True)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=FOLDERS, default="hippocampus")
    parser.add_argument("--rows", default=",".join(BY_NAME), help="some of: %(default)s")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--minutes", type=float, default=8 * 60, help="when these are over, stop; default %(default)s")
    parser.add_argument("--data", type=Path, help="the scans; default FEDSCAN_SHARED/data/...")
    parser.add_argument("--out", type=Path, default=Path("runs/science"), help="default %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default studies/results")
    parser.add_argument("--corrupt", default="", metavar="KIND[+]:SITE", help=", ".join(CORRUPTIONS) + "; + validation")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="for a trial: give --results as well")
    parser.add_argument("--table", action="store_true", help="only write docs/science.md from the results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs rows, or writes the table."""
    import torch

    import science_table

    args = arguments(argv)
    names = [name for name in args.rows.split(",") if name]
    if unknown := [name for name in names if name not in BY_NAME]:
        raise SystemExit(f"--rows {unknown[0]}: one of {', '.join(BY_NAME)} was meant.")
    if args.table:
        print(science_table.write(args.results))
        return
    torch.set_num_threads(1)
    try:
        run(prepared(args), names, [int(seed) for seed in args.seeds.split(",")])
    except Problem as e:
        raise SystemExit(str(e)) from e
    except (OutOfTime, KeyboardInterrupt):
        print("stopped in time; the same command goes on", flush=True)


if __name__ == "__main__":
    main()
