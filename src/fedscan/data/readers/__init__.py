"""From a folder as its publisher made it to a manifest: the layout is decided by what lies there, never guessed."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fedscan.data.readers import challenges, decathlon, tables
from fedscan.data.records import Manifest


class Layout(NamedTuple):
    """What a layout looks like, in words; whether a folder has it; and its cases."""

    signs: str
    fits: Callable[[Path], bool]
    read: Callable[[Path], Manifest]


# A folder with a cases.csv is one of TABLES, whatever else lies there: the table speaks for it.
TABLES = {
    "cases.csv": Layout("cases.csv with case, subject, site, sequences, label", tables.is_common, tables.common),
    "hippocampus": Layout(
        "cases.csv with intensity_group, images/, labels/", tables.is_hippocampus, tables.hippocampus
    ),
    "lgg": Layout("cases.csv with has_pre, CASE/flair.nii.gz", tables.is_glioma, tables.glioma),
}
FOLDERS = {
    "nnunet": Layout("dataset.json, imagesTr/CASE_0000.nii.gz, labelsTr/", decathlon.is_nnunet, decathlon.nnunet),
    "msd": Layout("dataset.json with a training list", decathlon.is_msd, decathlon.msd),
    "brats": Layout("NAME/NAME_t1ce.nii.gz or NAME/NAME-t1c.nii.gz", challenges.is_brats, challenges.brats),
    "lits": Layout("volume-N.nii, segmentation-N.nii", challenges.is_lits, challenges.lits),
    "acdc": Layout("patientN/patientN_frameM.nii.gz", challenges.is_acdc, challenges.acdc),
    "ixi": Layout("IXIn-SITE-m_T1.nii.gz", challenges.is_ixi, challenges.ixi),
}


def detect(folder: str | Path) -> Manifest:
    """The manifest of a folder in any known layout, which is found by content; no image is opened.

    Raises ValueError where the folder fits no layout, or more than one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    layouts = TABLES if (folder / "cases.csv").is_file() else FOLDERS
    fitting = [name for name, layout in layouts.items() if layout.fits(folder)]
    if len(fitting) == 1:
        return layouts[fitting[0]].read(folder)
    if fitting:
        raise ValueError(f"{folder} fits {' and '.join(fitting)} at once; keep one layout per folder.")
    looked = "; ".join(f"{name} ({layout.signs})" for name, layout in (TABLES | FOLDERS).items())
    raise ValueError(f"{folder} has no known layout: looked for {looked}; saw {_seen(folder)}.")


def _seen(folder: Path, most: int = 6) -> str:
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "an empty folder"
