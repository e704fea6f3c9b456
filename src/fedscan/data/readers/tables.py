"""Folders whose `cases.csv` lists the cases: the common form, and two public sets with tables of their own."""

from collections import defaultdict
from pathlib import Path
from statistics import fmean

from fedscan.data.records import Case, Manifest
from fedscan.data.table import check_name, columns, read_table, rows

HIPPOCAMPUS = ("case", "subject_group", "intensity_group", "voxels_label1", "voxels_label2")
GLIOMA = ("case", "patient", "site", "has_pre", "has_post")


def is_hippocampus(folder: Path) -> bool:
    """Whether `cases.csv` has the columns of the hippocampus set."""
    return set(HIPPOCAMPUS) <= set(columns(folder / "cases.csv"))


def is_glioma(folder: Path) -> bool:
    """Whether `cases.csv` has the columns of the lower-grade glioma set."""
    return set(GLIOMA) <= set(columns(folder / "cases.csv"))


def is_common(folder: Path) -> bool:
    """Whether `cases.csv` is meant as the common form: whatever is not one of the other tables."""
    return not is_hippocampus(folder) and not is_glioma(folder)


def common(folder: Path) -> Manifest:
    """The common form, from the `cases.csv` of a folder."""
    return read_table(folder / "cases.csv")


def hippocampus(folder: Path) -> Manifest:
    """Hippocampus set (MSD Task04): images/CASE.nii.gz, labels/CASE.nii.gz; T1; the subject is the left-right pair.

    Five sites, by subject: the three ways in which intensities were stored (8bit, float, large: a natural difference
    between scanners or exports), of which the one with most subjects is cut into three by anatomy, that is by thirds
    of the mean labelled volume (voxels of 1 mm cubed), named GROUP-v1 (smallest) to GROUP-v3. With the public
    set this is 8bit, large, float-v1, float-v2, float-v3. No image is opened: the table has the volumes.
    """
    source = folder / "cases.csv"
    table = rows(source, HIPPOCAMPUS)
    volumes: dict[str, list[float]] = defaultdict(list)
    group_of: dict[str, str] = {}
    for line, row in table:
        subject, group = row["subject_group"], check_name(source, line, "intensity_group", row["intensity_group"])
        if group_of.setdefault(subject, group) != group:
            raise ValueError(f"{source}, line {line}: subject {subject!r} has two intensity groups; one was meant.")
        volumes[subject].append(sum(_number(source, line, row, name) for name in HIPPOCAMPUS[3:]))
    site_of = _five_sites(group_of, {subject: fmean(found) for subject, found in volumes.items()})
    cases = []
    for line, row in table:
        name = check_name(source, line, "case", row["case"])
        image, label = (folder / part / f"{name}.nii.gz" for part in ("images", "labels"))
        subject = row["subject_group"]
        extra = {"intensity_group": row["intensity_group"]}
        cases.append(Case(name, subject, site_of[subject], {"t1": image}, label, extra))
    return Manifest(folder, ("t1",), tuple(cases), {"anterior": 1, "posterior": 2}, "mri", "hippocampus")


def glioma(folder: Path) -> Manifest:
    """Lower-grade glioma set: CASE/{pre,flair,post,mask}.nii.gz; the site is the hospital's code (tissue source site).

    `pre` and `post` are T1 before and after contrast; where the table says 0 the sequence was not acquired. Header
    affines are the identity, as the true spacing is unknown: sizes are voxels. Label: 1 tumour.
    """
    source = folder / "cases.csv"
    cases = []
    for line, row in rows(source, GLIOMA):
        name = check_name(source, line, "case", row["case"])
        images: dict[str, Path | None] = {"pre": None, "flair": folder / name / "flair.nii.gz", "post": None}
        for sequence in ("pre", "post"):
            if _number(source, line, row, f"has_{sequence}"):
                images[sequence] = folder / name / f"{sequence}.nii.gz"
        extra = {key: text for key, text in row.items() if key not in GLIOMA and text}
        cases.append(Case(name, row["patient"], row["site"], images, folder / name / "mask.nii.gz", extra))
    return Manifest(folder, ("pre", "flair", "post"), tuple(cases), {"tumour": 1}, "mri", "lgg")


def _five_sites(group_of: dict[str, str], volume_of: dict[str, float]) -> dict[str, str]:
    """The site of each subject: its group, and for the largest group (first by name if equal) its third by volume."""
    members: dict[str, list[str]] = defaultdict(list)
    for subject, group in sorted(group_of.items()):
        members[group].append(subject)
    largest = min(members, key=lambda group: (-len(members[group]), group))
    by_volume = sorted(members[largest], key=lambda subject: (volume_of[subject], subject))
    thirds = {subject: f"{largest}-v{3 * place // len(by_volume) + 1}" for place, subject in enumerate(by_volume)}
    return group_of | thirds


def _number(path: Path, line: int, row: dict[str, str], column: str) -> float:
    try:
        return float(row[column])
    except ValueError:
        raise ValueError(f"{path}, line {line}, column {column!r}: {row[column]!r} where a number was meant.") from None
