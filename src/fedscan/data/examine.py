"""Opens the files of one case and says the first thing that is wrong with them, or what the case is."""

import gzip
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedscan.data.records import Case, channel, may_read, why

TOLERANCE = 1e-3  # mm: the largest distance between the places of one voxel in two files that are meant to agree


class Reason(NamedTuple):
    """Why a case cannot be used: a short code for tables, and one sentence.

    Codes: no-image, missing-sequence, no-label, file (does not exist), unreadable (damaged), dimensions (not 3D),
    singular (affine), nan, empty (constant), grid (sequences differ), shape and affine (label and image differ),
    labels (values).
    """

    code: str
    sentence: str

    def __str__(self) -> str:
        """The code and the sentence, as printed."""
        return f"{self.code}: {self.sentence}"


class Fault(Exception):
    """Carries the reason out of whichever step finds it."""

    def __init__(self, code: str, sentence: str) -> None:
        """Makes the reason from its code and sentence."""
        super().__init__(sentence)
        self.reason = Reason(code, sentence)


@dataclass(frozen=True)
class Facts:
    """What a good case is: voxel size in mm and label volumes in mm cubed by label value (None: no label)."""

    spacing: tuple[float, float, float]
    volumes: dict[int, float] | None


class _Grid(NamedTuple):
    """Where the voxels of a file lie: its name in a sentence, its shape (three axes) and its 4 x 4 affine in mm."""

    what: str
    shape: tuple[int, ...]
    affine: NDArray[np.float64]


def examine(
    case: Case,
    labels: Mapping[str, int],
    require: Collection[str] = (),
    need_label: bool = True,
    tolerance: float = TOLERANCE,
) -> Facts:
    """Reads every voxel of a case, one file at a time, and returns its facts; raises Fault with what is wrong first.

    `labels` are the allowed foreground values by name (none: any whole number from 0); `require` names sequences the
    case must have; `tolerance` is in mm.
    """
    if not case.present:
        raise Fault("no-image", "The case has no image in any sequence.")
    for name in require:
        if case.images.get(name) is None:
            raise Fault("missing-sequence", f"The study needs sequence {name!r}, which the case does not have.")
    if case.label is None and need_label:
        raise Fault("no-label", "The case has no label map.")
    first: _Grid | None = None
    for path in dict.fromkeys(path for path in case.images.values() if path is not None):
        names = [name for name in case.present if case.images[name] == path]
        voxels, affine = _read(path, names)
        for name in names:
            index = channel(voxels.shape, name, names)
            _image_fits(path, name, voxels if index is None else voxels[..., index])
        grid = _Grid(f"{names[0]} ({path.name})", voxels.shape[:3], affine)
        first = first or grid
        _same_grid(grid, first, ("grid", "grid"), tolerance)
    assert first is not None
    spacing = tuple(float(size) for size in np.linalg.norm(first.affine[:3, :3], axis=0))
    volumes = None
    if case.label is not None:
        voxels, affine = _read(case.label, ["label"])
        _same_grid(_Grid(f"label ({case.label.name})", voxels.shape, affine), first, ("shape", "affine"), tolerance)
        voxel = abs(float(np.linalg.det(first.affine[:3, :3])))
        volumes = {value: count * voxel for value, count in _label_counts(case.label, voxels, labels).items()}
    return Facts((spacing[0], spacing[1], spacing[2]), volumes)


def _read(path: Path, names: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """All voxels and the affine of the file that `names` share, read to its last byte so that damage is found."""
    import nibabel

    try:
        if not path.is_file():
            raise Fault("file", f"{path} does not exist.")
        may_read(path)
    except OSError as error:
        raise Fault("unreadable", f"{path} cannot be opened: {why(error)}.") from error
    try:
        image = nibabel.load(path)
        if path.suffix.lower() == ".gz":
            with gzip.open(path) as stream:
                image = type(image).from_stream(stream)
                voxels = np.asanyarray(image.dataobj)
                while stream.read(1 << 20):  # the checksum stands behind the last voxel
                    pass
        else:
            voxels = np.asanyarray(image.dataobj)
    except MemoryError:  # no fault of the file
        raise
    except Exception as error:  # a damaged header or stream leads nibabel to errors of many kinds
        said = " ".join(str(error).split()) or type(error).__name__
        raise Fault("unreadable", f"{path} cannot be read to its end: {said.rstrip('.')}.") from error
    try:
        channel(voxels.shape, names[0], names)
    except ValueError as error:
        raise Fault("dimensions", f"{path}: {error}.") from error
    if voxels.ndim == 4 and names[0] == "label":
        voxels = voxels[..., 0]
    if 0 in voxels.shape or voxels.dtype.kind not in "biuf":
        raise Fault("dimensions", f"{path} has {_by(voxels.shape)} voxels of type {voxels.dtype}; numbers were meant.")
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise Fault("singular", f"{path}: the affine of the header is singular, so voxels have no place or size.")
    return voxels, affine


def _image_fits(path: Path, name: str, voxels: NDArray[Any]) -> None:
    """Raises Fault where an image has a voxel that is no number, or no two that differ."""
    bad = voxels.size - int(np.isfinite(voxels).sum())
    if bad:
        raise Fault("nan", f"{path}: {name} has {bad} voxels that are NaN or infinite, of {voxels.size}.")
    low = voxels.min()
    if low == voxels.max():
        raise Fault("empty", f"{path}: every voxel of {name} is {low:g}, so there is no image.")


def _same_grid(grid: _Grid, other: _Grid, codes: tuple[str, str], tolerance: float) -> None:
    """Raises Fault unless both have one shape and no corner voxel lies further apart than `tolerance` mm."""
    if grid.shape != other.shape:
        raise Fault(codes[0], f"{grid.what} has {_by(grid.shape)} voxels, but {other.what} has {_by(other.shape)}.")
    ends = np.array(np.meshgrid(*((0, size - 1) for size in grid.shape), [1], indexing="ij")).reshape(4, -1)
    apart = float(np.linalg.norm(((grid.affine - other.affine) @ ends)[:3], axis=0).max())
    if apart > tolerance:
        sentence = (
            f"{grid.what} and {other.what} lie up to {apart:.4g} mm apart by their affines (limit {tolerance:g})."
        )
        raise Fault(codes[1], sentence)


def _label_counts(path: Path, voxels: NDArray[Any], labels: Mapping[str, int]) -> dict[int, int]:
    """Voxels of each label value: of those in `labels`, or of those found where none are named."""
    if voxels.dtype.kind == "f":
        broken = voxels[~np.isfinite(voxels) | (voxels != np.rint(voxels))]
        if broken.size:
            some = f"{broken.size} voxels whose label is not a whole number, such as {broken[0]:g}"
            raise Fault("labels", f"{path} has {some}.")
    values = sorted(labels.values()) if labels else [int(value) for value in np.unique(voxels) if value > 0]
    counts = {value: int((voxels == value).sum()) for value in values}
    if sum(counts.values()) + int((voxels == 0).sum()) < voxels.size:
        strange = sorted({int(value) for value in np.unique(voxels)} - {0, *values})
        named = ", ".join(f"{value} {name}" for name, value in labels.items()) or "whole numbers from 0"
        raise Fault("labels", f"{path} has label {', '.join(map(str, strange[:5]))}, which is not one of: {named}.")
    return counts


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
