"""One hospital's labels made wrong, to see what a method makes of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedscan.data.manifest import read_manifest, write_manifest
from fedscan.data.records import Case
from fedscan.run import Problem
from fedscan.studyfile import StudyFile, read_cases

GROWTH = 2  # voxels by which "dilate" grows the structures
CORRUPTIONS = ("dilate", "swap", "shuffle")


def spoil(data: Path, file: StudyFile, corrupt: str, folder: Path) -> Path:
    """A copy of the cases in ``folder`` in which one hospital's training labels are wrong; returns it.

    ``corrupt`` is "KIND:SITE", or "KIND+:SITE" where its validation labels are wrong too. "dilate": structures grown
    by 2 voxels; "swap": labels 1 and 2 exchanged (of one label: structure and background); "shuffle": every case has
    the label map of another patient's. Images are links; labels of other hospitals and of all test cases stay.
    """
    import nibabel

    kind, _, site = corrupt.partition(":")
    wanted = ("train", "validation") if kind.endswith("+") else ("train",)
    kind = kind.removesuffix("+")
    if kind not in CORRUPTIONS:
        raise Problem(f"--corrupt {corrupt}: one of {', '.join(CORRUPTIONS)} was meant, such as dilate:SITE.")
    manifest = read_manifest(data)
    if site not in manifest.sites:
        raise Problem(f"--corrupt {corrupt}: a site was meant after the colon ({', '.join(manifest.sites)}).")
    splits = read_cases(file).facts()["splits"][site]
    spoilt = sorted(name for split in wanted for name in splits[split])
    folder.mkdir(parents=True, exist_ok=True)
    by_name = {case.name: case for case in manifest.cases}
    cases = []
    for case in manifest.cases:
        images = {k: path and link(path, folder / f"{case.name}_{k}{ending(path)}") for k, path in case.images.items()}
        assert case.label is not None
        label = folder / f"{case.name}_label{ending(case.label)}"
        if case.name in spoilt:
            other = by_name[spoilt[(spoilt.index(case.name) + len(spoilt) // 2) % len(spoilt)]]
            image = case.open("label")
            wrong = changed(kind, array(case), array(other))
            nibabel.save(nibabel.Nifti1Image(wrong, image.affine), label)
        else:
            link(case.label, label)
        cases.append(replace(case, images=images, label=label))
    write_manifest(replace(manifest, root=folder, cases=tuple(cases)), folder)
    return folder


def ending(path: Path) -> str:
    """The ending of an image's name, by which it is read."""
    return ".nii.gz" if path.name.lower().endswith(".gz") else ".nii"


def link(path: Path, to: Path) -> Path:
    """A link to a file, under another name."""
    if not to.is_symlink():
        to.symlink_to(path.resolve())
    return to


def array(case: Case) -> NDArray[np.uint8]:
    """A case's label map."""
    return np.asarray(case.open("label").dataobj).astype(np.uint8)


def changed(kind: str, label: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A wrong label map of the same shape."""
    from scipy.ndimage import distance_transform_edt, zoom

    if kind == "dilate":
        distance, nearest = distance_transform_edt(label == 0, return_indices=True)
        return np.where(distance <= GROWTH, label[tuple(nearest)], 0).astype(np.uint8)
    if kind == "swap":
        places = np.array([0, 2, 1] if label.max() > 1 else [1, 0], np.uint8)
        return places[label]
    factors = [a / b for a, b in zip(label.shape, other.shape, strict=True)]
    found: NDArray[np.uint8] = zoom(other, factors, order=0)
    return found
