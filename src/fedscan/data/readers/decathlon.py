"""Folders that a `dataset.json` describes: the Medical Segmentation Decathlon (MSD) and nnU-Net's raw form of it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedscan.data.records import SINGLE_SITE, Case, Manifest
from fedscan.data.table import IMAGE_ENDINGS, below, is_image, read_json

MR_WORDS = set("mri mr t1 t1w t1n t1c t1ce t1gd t2 t2w t2f flair pd adc dwi dce swi".split())  # noqa: SIM905


def is_nnunet(folder: Path) -> bool:
    """Whether the folder is nnU-Net's: its keys, or images with a channel number where the list has none."""
    if not (folder / "dataset.json").is_file():
        return False
    facts = read_json(folder / "dataset.json")
    if "channel_names" in facts or "file_ending" in facts:
        return True
    return "modality" in facts and not _listed_exist(folder, facts) and _numbered(folder / "imagesTr")


def is_msd(folder: Path) -> bool:
    """Whether the folder is MSD's: a list of training images in `dataset.json`, and not nnU-Net's keys."""
    if not (folder / "dataset.json").is_file() or is_nnunet(folder):
        return False
    return isinstance(read_json(folder / "dataset.json").get("training"), list)


def nnunet(folder: Path) -> Manifest:
    """nnU-Net raw: imagesTr/CASE_0000.nii.gz (one per channel) and labelsTr/CASE.nii.gz; one site, subject = case.

    Both versions of `dataset.json` are read. A channel without a file is a missing sequence; a label without any image
    is a case too, for the check to report. Where the file lists its images under "dataset", that list holds. Test
    folders (imagesTs) are not read.
    """
    source = folder / "dataset.json"
    facts = read_json(source)
    ending = facts.get("file_ending", ".nii.gz")
    if ending not in IMAGE_ENDINGS:
        raise ValueError(f"{source}, 'file_ending': {ending!r} is not read here; .nii.gz or .nii was meant.")
    sequences = _sequences(source, facts, "channel_names" if "channel_names" in facts else "modality")
    listed = facts.get("dataset")
    if listed is not None:
        cases = _listed_nnunet(source, listed, sequences)
    else:
        found = _channels(folder / "imagesTr")
        labels = {stem(path): path for path in images_in(folder / "labelsTr")}
        over = [f"{name}_{max(files):04d}" for name, files in found.items() if max(files) >= len(sequences)]
        if over:
            raise ValueError(f"{source} names {len(sequences)} channel(s), but imagesTr has {over[0]}.")
        cases = []
        for name in sorted(found.keys() | labels.keys()):
            images = {sequence: found.get(name, {}).get(index) for index, sequence in enumerate(sequences)}
            cases.append(Case(name, name, SINGLE_SITE, images, labels.get(name)))
    return Manifest(folder, sequences, tuple(cases), _labels(source, facts), _intensity(sequences), "nnunet")


def msd(folder: Path) -> Manifest:
    """MSD: the "training" list of `dataset.json`; one site, subject = case; a 4D image holds all its sequences.

    MSD does not say who a case is. In its Task04 (hippocampus) files 2k-1 and 2k are very likely the two sides of one
    person: write the table, and give such cases one subject.
    """
    source = folder / "dataset.json"
    facts = read_json(source)
    sequences = _sequences(source, facts, "modality")
    cases = []
    for number, entry in enumerate(facts["training"]):
        where = f"{source}, training entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise ValueError(f'{where}: {{"image": PATH, "label": PATH}} was meant, not {entry!r}.')
        image = below(folder, entry["image"], where)
        label = below(folder, entry["label"], where) if isinstance(entry.get("label"), str) else None
        name = stem(image)
        cases.append(Case(name, name, SINGLE_SITE, dict.fromkeys(sequences, image), label))
    return Manifest(folder, sequences, tuple(cases), _labels(source, facts), _intensity(sequences), "msd")


def stem(path: Path) -> str:
    """The name of an image file without its ending (.nii.gz as one)."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def _channels(folder: Path) -> dict[str, dict[int, Path]]:
    """Files CASE_0000.nii(.gz) of a folder, by case and channel number, in the order of names."""
    found: dict[str, dict[int, Path]] = {}
    for path in images_in(folder):
        match = re.fullmatch(r"(.+)_(\d{4})", stem(path))
        if not match:
            raise ValueError(f"{path} has no channel number; CASE_0000.nii.gz was meant.")
        found.setdefault(match[1], {})[int(match[2])] = path
    return found


def images_in(folder: Path) -> list[Path]:
    """NIfTI files of a folder by name, without the hidden ones that some systems leave beside them."""
    return sorted(path for path in folder.glob("*.nii*") if is_image(path.name) and path.name[0] != ".")


def _numbered(folder: Path) -> bool:
    """Whether any image of a folder ends in a channel number of four digits."""
    return any(re.fullmatch(r".+_\d{4}", stem(path)) for path in images_in(folder))


def _listed_exist(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Whether any image of the training list lies where the list says (nnU-Net's first form lists names, not files)."""
    listed = facts.get("training")
    entries = [entry.get("image") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    return any(isinstance(image, str) and (folder / image).is_file() for image in entries)


def _listed_nnunet(source: Path, listed: Any, sequences: tuple[str, ...]) -> list[Case]:
    cases = []
    for name, entry in sorted(listed.items()) if isinstance(listed, dict) else []:
        where = f"{source}, dataset entry {name!r}"
        files = entry.get("images") if isinstance(entry, dict) else None
        if not isinstance(files, list) or len(files) != len(sequences):
            raise ValueError(f'{where}: {{"images": [{len(sequences)} PATHS], "label": PATH}} was meant.')
        images = {key: below(source.parent, str(file), where) for key, file in zip(sequences, files, strict=True)}
        label = below(source.parent, str(entry["label"]), where) if entry.get("label") else None
        cases.append(Case(name, name, SINGLE_SITE, images, label))
    return cases


def _sequences(source: Path, facts: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Lower-case names of the channels, which the file numbers from "0"."""
    named = facts.get(key)
    if not isinstance(named, dict) or sorted(named) != sorted(str(index) for index in range(len(named))) or not named:
        raise ValueError(f'{source}, {key!r}: an object such as {{"0": "T1", "1": "FLAIR"}} was meant, not {named!r}.')
    names = [str(named[str(index)]).strip().lower() for index in range(len(named))]
    if len(set(names)) < len(names):
        names = [f"{name}-{index}" for index, name in enumerate(names)]
    return tuple(names)


def _labels(source: Path, facts: Mapping[str, Any]) -> dict[str, int]:
    """Foreground labels from {"1": NAME} (MSD, nnU-Net 1) or {NAME: 1} (nnU-Net 2).

    Regions ({NAME: [1, 2]}) overlap, so their values are named one by one: by a region of just
    that value, or by number.
    """
    named = facts.get("labels")
    if not isinstance(named, dict):
        raise ValueError(f'{source}, \'labels\': an object such as {{"background": 0, "tumour": 1}} was meant.')
    found: dict[int, str] = {}
    for key, value in named.items():
        numbers, name = ([key], value) if isinstance(value, str) else (value, key)
        numbers = numbers if isinstance(numbers, list) else [numbers]
        if not all(re.fullmatch(r"\d+", str(number)) for number in numbers):
            raise ValueError(f"{source}, 'labels': {key!r}: {value!r} has no whole number; a name and its value meant.")
        for number in map(int, numbers):
            if len(numbers) == 1:
                found[number] = name
            else:
                found.setdefault(number, f"label {number}")
    return {name: number for number, name in sorted(found.items()) if number > 0}


def _intensity(sequences: tuple[str, ...]) -> str | None:
    words = {re.split(r"[^a-z0-9]", name)[0] for name in sequences}
    return "ct" if words == {"ct"} else "mri" if words <= MR_WORDS else None
