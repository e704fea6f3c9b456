"""Reads a set of scans from `cases.csv` or from a folder of any known layout, and writes it in the common form."""

from pathlib import Path

from fedscan.data import readers, table
from fedscan.data.records import Case, Manifest

__all__ = ["Case", "Manifest", "read_manifest", "write_manifest"]


def read_manifest(path: str | Path, outside: bool = False) -> Manifest:
    """The cases that a table (.csv) or a folder of a known layout lists; no image is opened.

    `outside` permits paths in a table (of a folder: its `cases.csv`) that are absolute or lead out. Raises ValueError
    that names file, line and column of a fault, or the layouts that were looked for in an unknown folder.
    """
    path = Path(path)
    if path.is_dir():
        return table.read_table(path / "cases.csv", outside=True) if outside else readers.detect(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a folder of scans or a table such as cases.csv was meant.")
    if path.suffix.lower() != ".csv":
        raise ValueError(f"{path} is not a table; a .csv file or a folder of scans was meant.")
    return table.read_table(path, outside)


def write_manifest(manifest: Manifest, path: str | Path, outside: bool = False) -> Path:
    """Writes `manifest` as a table (`cases.csv` where `path` is a folder) with its labels in the .json beside it.

    Paths are written relative to the table; `outside` permits files elsewhere (absolute paths), otherwise ValueError.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "cases.csv"
    if path.suffix.lower() != ".csv":
        raise ValueError(f"{path}: a table is written as a .csv file or into an existing folder.")
    return table.write_table(manifest, path, outside)
