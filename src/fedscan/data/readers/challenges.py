"""Folders of public challenges, known by the names of their files: BraTS, LiTS, ACDC, and the IXI collection."""

import re
from collections.abc import Iterator
from pathlib import Path

from fedscan.data.readers.decathlon import images_in, stem
from fedscan.data.records import SINGLE_SITE, Case, Manifest

# BraTS to 2021 (NAME_t1ce) and from 2023 (NAME-t1c) under one set of sequence names.
BRATS = {"t1": "t1", "t1ce": "t1ce", "t2": "t2", "flair": "flair"}
BRATS_2023 = {"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair"}
LITS = re.compile(r"(volume|segmentation)-(\d+)\.nii(?:\.gz)?")
ACDC = re.compile(r"((patient\d+)_frame(\d+))(_gt)?\.nii(?:\.gz)?")
IXI = re.compile(r"(IXI\d+)-([A-Za-z]+)-\d+[_-](T1|T2|PD)\.nii(?:\.gz)?")


def is_brats(folder: Path) -> bool:
    """Whether a subfolder holds the contrast-enhanced image under its own name, in either naming."""
    return any({"_t1ce", "-t1c"} & _endings(case).keys() for case in _folders(folder))


def brats(folder: Path) -> Manifest:
    """BraTS: NAME/NAME_{t1,t1ce,t2,flair,seg} (to 2021) or NAME/NAME-{t1n,t1c,t2w,t2f,seg} (from 2023); one site.

    From 2023 a name ends in the number of the examination (BraTS-GLI-00005-101), so the subject is what stands before.
    Labels: 1 necrotic core, 2 oedema, and the enhancing tumour as 4 (to 2021) or 3 (from 2023).
    """
    cases, modern = [], set()
    for case in _folders(folder):
        endings = _endings(case)
        old = {name: endings.get(f"_{ending}") for ending, name in BRATS.items()}
        new = {name: endings.get(f"-{ending}") for ending, name in BRATS_2023.items()}
        modern |= {recent for recent, images in ((False, old), (True, new)) if any(images.values())}
        images = new if any(new.values()) else old
        if any(images.values()) or case.name.startswith("BraTS"):
            exam = re.fullmatch(r"(BraTS-.+)-\d{3}", case.name)
            label = endings.get("-seg", endings.get("_seg"))
            cases.append(Case(case.name, exam[1] if exam else case.name, SINGLE_SITE, images, label))
    if len(modern) > 1:
        raise ValueError(f"{folder} mixes BraTS names of 2021 (_t1ce) and 2023 (-t1c), whose labels differ; part them.")
    labels = {"necrotic core": 1, "oedema": 2, "enhancing tumour": 3 if True in modern else 4}
    return Manifest(folder, tuple(BRATS.values()), tuple(cases), labels, "mri", "brats")


def is_lits(folder: Path) -> bool:
    """Whether the folder, or one below it, holds a volume-N.nii."""
    return any(match[1] == "volume" for _, match in _matching(folder, LITS))


def lits(folder: Path) -> Manifest:
    """LiTS: volume-N.nii and segmentation-N.nii, here or one folder below; CT; one site; labels 1 liver, 2 tumour."""
    found: dict[int, dict[str, Path]] = {}
    for path, match in _matching(folder, LITS):
        _add(found.setdefault(int(match[2]), {}), match[1], path)
    cases = [
        Case(f"volume-{n}", f"volume-{n}", SINGLE_SITE, {"ct": files.get("volume")}, files.get("segmentation"))
        for n, files in sorted(found.items())
    ]
    return Manifest(folder, ("ct",), tuple(cases), {"liver": 1, "tumour": 2}, "ct", "lits")


def is_acdc(folder: Path) -> bool:
    """Whether the folder's subfolders, or those one level below, hold a patientN_frameM image."""
    return next(_frames(folder), None) is not None


def acdc(folder: Path) -> Manifest:
    """ACDC: patientN/patientN_frameM.nii.gz with _gt; cine MRI; one site; the subject is the patient, not the frame.

    `extra` has the diagnosis (`group`) and the phase (ED or ES) from Info.cfg, and the publisher's `part` (training,
    testing) where the patients lie in such folders. Labels: 1 right ventricle, 2 myocardium, 3 left ventricle.
    """
    found: dict[str, dict[str, Path]] = {}
    for path, match in _frames(folder):
        _add(found.setdefault(match[1], {}), "label" if match[4] else "cine", path)
    cases = []
    for name, files in sorted(found.items()):
        home = next(iter(files.values())).parent
        info = _info(home / "Info.cfg")
        patient, frame = name.split("_frame")
        phase = next((phase for phase in ("ED", "ES") if info.get(phase) == str(int(frame))), "")
        part = home.parent.name if home.parent != folder else ""
        extra = {key: text for key, text in (("group", info.get("Group")), ("phase", phase), ("part", part)) if text}
        cases.append(Case(name, patient, SINGLE_SITE, {"cine": files.get("cine")}, files.get("label"), extra))
    labels = {"right ventricle": 1, "myocardium": 2, "left ventricle": 3}
    return Manifest(folder, ("cine",), tuple(cases), labels, "mri", "acdc")


def is_ixi(folder: Path) -> bool:
    """Whether the folder, or one below it, holds IXI's images."""
    return next(_matching(folder, IXI), None) is not None


def ixi(folder: Path) -> Manifest:
    """IXI: IXI012-HH-1211_T1.nii.gz, here or one folder below; the site is the hospital in the name; no labels."""
    found: dict[tuple[str, str], dict[str, Path]] = {}
    for path, match in _matching(folder, IXI):
        _add(found.setdefault((match[1], match[2]), {}), match[3].lower(), path)
    sequences = tuple(name for name in ("t1", "t2", "pd") if any(name in files for files in found.values()))
    cases = [
        Case(name, name, site, {sequence: files.get(sequence) for sequence in sequences})
        for (name, site), files in sorted(found.items())
    ]
    return Manifest(folder, sequences, tuple(cases), {}, "mri", "ixi")


def _add(files: dict[str, Path], what: str, path: Path) -> None:
    """Notes a file of a case; ValueError where the case has one of that kind already (.nii beside .nii.gz, say)."""
    if files.setdefault(what, path) != path:
        raise ValueError(f"{files[what]} and {path} are the same image of one case; keep one.")


def _endings(case: Path) -> dict[str, Path]:
    """Images of a folder that begin with its name, by the rest of theirs: {"_t1": path, "_seg": path}."""
    return {stem(path)[len(case.name) :]: path for path in images_in(case) if path.name.startswith(case.name)}


def _frames(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    """ACDC's frames and their labels, of patients in this folder or in a folder (training, testing) of it."""
    for place in [folder, *_folders(folder)]:
        for patient in _folders(place):
            for path in images_in(patient):
                match = ACDC.fullmatch(path.name)
                if match:
                    yield path, match


def _matching(folder: Path, pattern: re.Pattern[str]) -> Iterator[tuple[Path, re.Match[str]]]:
    """Images of a folder and of the folders in it whose whole name fits `pattern`, in the order of names."""
    for place in [folder, *_folders(folder)]:
        for path in images_in(place):
            match = pattern.fullmatch(path.name)
            if match:
                yield path, match


def _folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _info(path: Path) -> dict[str, str]:
    """The `KEY: value` lines of ACDC's Info.cfg; empty where there is none."""
    if not path.is_file():
        return {}
    pairs = (
        line.split(":", 1) for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if ":" in line
    )
    return {key.strip(): value.strip() for key, value in pairs}
