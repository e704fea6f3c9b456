"""Every score of every case as one table, for a statistician's own tools."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path

from fedscan import wire
from fedscan.ledger import Record, ScoreRow

COLUMNS = ("method", "seed", *(field.name for field in fields(ScoreRow)))


def of_run(record: Record) -> Iterator[tuple[object, ...]]:
    """The rows of a run, then the test scores of the methods that it is compared with."""
    for method, scores in ((record.method, record.scores), *record.comparisons.items()):
        for row in scores:
            yield method, record.seed, *astuple(row)


def of_runs(runs: Mapping[str, Sequence[Record]]) -> Iterator[tuple[object, ...]]:
    """The rows of several methods' runs, each method's own."""
    for method, records in runs.items():
        for record in records:
            for row in record.scores:
                yield method, record.seed, *astuple(row)


def write_scores(rows: Iterator[tuple[object, ...]], folder: Path) -> Path:
    """Writes ``folder/scores.csv``, whole or not at all, and returns its path; an undefined value is an empty field.

    Values stand there with all the digits that they have, in the units of ``tasks.metrics``.
    """
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "scores.csv"
    wire.replace_file(path, lambda file: file.write(text.getvalue().encode("utf-8", errors="replace")))
    return path
