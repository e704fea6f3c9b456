"""The common form of a set of scans: a row per case in `cases.csv`, and their labels in `cases.json`."""

import csv
import difflib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from fedscan.data.records import Case, Manifest

FIXED = ("case", "subject", "site", "label")
IMAGE_ENDINGS = (".nii.gz", ".nii")
INTENSITIES = ("ct", "mri")


def is_image(text: str) -> bool:
    """Whether a file name ends as a NIfTI image does."""
    return text.lower().endswith(IMAGE_ENDINGS)


def below(root: Path, text: str, where: str, outside: bool = False) -> Path:
    """`text` as a path below `root`; ValueError, beginning with `where`, if it leaves `root` and `outside` is false."""
    if not is_image(text):
        raise ValueError(f"{where}: {text!r} is not an image file; a path that ends in .nii or .nii.gz was meant.")
    normal = os.path.normpath(text)
    if not outside and (os.path.isabs(normal) or normal.split(os.sep)[0] == os.pardir):
        raise ValueError(
            f"{where}: {text!r} leads out of {root}; a path relative to that folder and below it was meant: "
            "put the file, or a symbolic link to it, there."
        )
    return root / normal


def read_table(path: Path, outside: bool = False) -> Manifest:
    """Reads `cases.csv` (case, subject, site, one column per sequence, label, extra columns), paths relative to it.

    A sequence column stands before `label`, or anywhere if it names images; an empty cell is a missing sequence or
    label. Files are not opened here. Raises ValueError with file, line and column for whatever does not fit.
    """
    lines = _lines(path)
    header = _header(path, lines[0][1])
    _names_fit(path, header)
    rows = [(number, _row(path, number, header, cells)) for number, cells in lines[1:]]
    sequences = _sequence_columns(path, header, [row for _, row in rows])
    first: dict[str, int] = {}
    cases = []
    for number, row in rows:
        case = _case(path, number, row, sequences, outside)
        if case.name in first:
            _refuse(path, number, "case", f"{case.name!r} stands on line {first[case.name]} already; a new name")
        first[case.name] = number
        cases.append(case)
    labels, intensity = _read_facts(path.with_suffix(".json"))
    return Manifest(path.parent, sequences, tuple(cases), labels, intensity)


def write_table(manifest: Manifest, path: Path, outside: bool = False) -> Path:
    """Writes `manifest` as `path` (a .csv) and its labels and intensity kind as the .json beside it; returns `path`.

    Raises ValueError where a file does not lie below the folder of `path`, unless `outside` (then it is absolute).
    """
    extras = list(dict.fromkeys(name for case in manifest.cases for name in case.extra))
    clash = sorted({*extras} & {*FIXED, *manifest.sequences})
    if clash:
        raise ValueError(f"{path}: extra column {clash[0]!r} has the name of a fixed or a sequence column.")
    home = path.parent.absolute()

    def cell(file: Path | None) -> str:
        if file is None:
            return ""
        absolute = Path(os.path.normpath(file.absolute()))
        if absolute.is_relative_to(home):
            return absolute.relative_to(home).as_posix()
        if outside:
            return absolute.as_posix()
        raise ValueError(
            f"{path}: {file} does not lie below {home}, as files of a table must: write {manifest.root / path.name}."
        )

    table = [["case", "subject", "site", *manifest.sequences, "label", *extras]]
    table += [
        [case.name, case.subject, case.site]
        + [cell(case.images.get(name)) for name in manifest.sequences]
        + [cell(case.label)]
        + [case.extra.get(name, "") for name in extras]
        for case in manifest.cases
    ]
    facts = {"labels": dict(manifest.labels), "intensity": manifest.intensity}
    path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    draft = path.with_suffix(".csv.partial")  # a table that is cut short would be one of fewer cases
    with draft.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
    return draft.replace(path)


def columns(path: Path) -> list[str]:
    """The names in the first line of a .csv file, without blanks around them."""
    return [name.strip() for name in _lines(path, limit=1)[0][1]]


def rows(path: Path, needed: Iterable[str]) -> list[tuple[int, dict[str, str]]]:
    """Line numbers and rows of a .csv file as dicts; ValueError where a column of `needed` or a cell is missing."""
    lines = _lines(path)
    header = _header(path, lines[0][1], needed)
    found = [(number, _row(path, number, header, cells)) for number, cells in lines[1:]]
    for number, row in found:
        for name in needed:
            if not row[name]:
                _refuse(path, number, name, "the cell is empty; a value")
    return found


def check_name(path: Path, line: int, column: str, text: str) -> str:
    """Returns `text`; ValueError where it could not be the name of a file or a folder later."""
    if not text or text in (".", "..") or not text.isprintable() or any(mark in text for mark in '/\\:*?"<>|'):
        _refuse(path, line, column, f"{text!r} cannot be a name; letters, digits, blanks, '_', '-' or '.'")
    return text


def _refuse(path: Path, line: int, column: str, said: str) -> NoReturn:
    raise ValueError(f"{path}, line {line}, column {column!r}: {said} was meant.")


def _lines(path: Path, limit: int | None = None) -> list[tuple[int, list[str]]]:
    """Line numbers and cells of the lines that are not empty."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            found = []
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    found.append((reader.line_num, cells))
                if limit is not None and len(found) == limit:
                    break
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a table of comma-separated text (UTF-8): {error}.") from error
    if not found:
        raise ValueError(f"{path} is empty; a first line with the columns {', '.join(FIXED)} was meant.")
    return found


def _header(path: Path, cells: list[str], needed: Iterable[str] = FIXED) -> list[str]:
    header = [cell.strip() for cell in cells]
    for number, name in enumerate(header, 1):
        if not name or header.index(name) != number - 1:
            fault = f"the name {name!r} is used twice" if name else "the name is empty"
            raise ValueError(f"{path}, line 1, column {number}: {fault}; every column needs a name of its own.")
    for name in needed:
        if name not in header:
            near = difflib.get_close_matches(name, header, 1)
            hint = f"; was {near[0]!r} meant as {name!r}" if near else ""
            hint = "; the separator must be a comma, not ';'" if len(header) == 1 and ";" in header[0] else hint
            raise ValueError(f"{path}, line 1: column {name!r} is missing (found: {', '.join(header)}){hint}.")
    return header


def _names_fit(path: Path, header: list[str]) -> None:
    for name in header:
        check_name(path, 1, name, name)


def _row(path: Path, line: int, header: list[str], cells: list[str]) -> dict[str, str]:
    if len(cells) != len(header):
        raise ValueError(
            f"{path}, line {line}: {len(cells)} cells where the first line names {len(header)} columns; "
            "one cell per column was meant (an empty one for a missing sequence)."
        )
    return {name: cell.strip() for name, cell in zip(header, cells, strict=True)}


def _sequence_columns(path: Path, header: list[str], found: list[dict[str, str]]) -> tuple[str, ...]:
    """Names of the columns that hold images: those before `label`, and later ones in which a cell names an image."""
    end = header.index("label")
    names = [
        name
        for place, name in enumerate(header)
        if name not in FIXED and (place < end or any(is_image(row[name]) for row in found))
    ]
    if not names:
        raise ValueError(f"{path}, line 1: no sequence column; one column per sequence, before 'label', was meant.")
    return tuple(names)


def _case(path: Path, line: int, row: dict[str, str], sequences: tuple[str, ...], outside: bool) -> Case:
    name, subject, site = (check_name(path, line, column, row[column]) for column in FIXED[:3])

    def image(column: str) -> Path | None:
        where = f"{path}, line {line}, column {column!r}"
        if row[column] and not is_image(row[column]):
            raise ValueError(
                f"{where}: {row[column]!r} is not an image file; a path that ends in .nii or .nii.gz was meant, or an "
                "empty cell (columns that hold something else stand after 'label')."
            )
        return below(path.parent, row[column], where, outside) if row[column] else None

    images = {column: image(column) for column in sequences}
    extra = {column: text for column, text in row.items() if column not in FIXED and column not in sequences and text}
    return Case(name, subject, site, images, image("label"), extra)


def _read_facts(path: Path) -> tuple[dict[str, int], str | None]:
    """Labels and intensity kind from the .json beside a table; none where there is no such file."""
    if not path.is_file():
        return {}, None
    facts = read_json(path)
    labels, intensity = facts.get("labels", {}), facts.get("intensity")
    whole = isinstance(labels, dict) and all(type(value) is int and value > 0 for value in labels.values())
    if not whole or (intensity is not None and intensity not in INTENSITIES):
        raise ValueError(
            f'{path}: {{"labels": {{"NAME": WHOLE NUMBER ABOVE 0}}, "intensity": "ct", "mri" or null}} was meant.'
        )
    return dict(labels), intensity


def read_json(path: Path) -> dict[str, Any]:
    """The object in a .json file; ValueError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a JSON object was meant, not a {type(found).__name__}.")
    return found
