"""Grids of voxels: scans turned to one orientation, resampled, and turned back to where they were.

Axis order, everywhere in fedscan's memory: spatial axes are (D, H, W) of the closest canonical orientation (RAS+), so D
runs from inferior to superior, H from posterior to anterior, W from left to right. nibabel's arrays are (x, y, z); the
axes are reversed here and nowhere else. Spacings are mm along (D, H, W), and an affine takes (d, h, w, 1) to RAS+ mm.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, int, int]
THICK = 3.0  # nnU-Net: above this ratio of largest to smallest spacing, slices are not mixed
REVERSED = np.eye(4)[[2, 1, 0, 3]]  # (d, h, w, 1) to (x, y, z, 1)


@dataclass(frozen=True, eq=False)
class Grid:
    """Where voxels lie: ``shape`` (D, H, W), and ``affine`` (4, 4) from (d, h, w, 1) to RAS+ mm."""

    shape: Shape
    affine: NDArray[np.float64]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """The size of a voxel in mm along (D, H, W)."""
        d, h, w = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return d, h, w

    def resized(self, shape: Shape) -> "Grid":
        """The grid of ``shape`` voxels that fills the same box: outer faces, not outer centres, stay where they are."""
        ratio = np.asarray(self.shape) / np.asarray(shape)
        step = np.diag([*ratio, 1.0])
        step[:3, 3] = (ratio - 1) / 2
        return Grid(shape, self.affine @ step)

    def spaced(self, spacing: tuple[float, ...]) -> "Grid":
        """The grid whose voxels come nearest to ``spacing`` mm while a whole number of them fills the same box."""
        d, h, w = (max(1, round(n * own / new)) for n, own, new in zip(self.shape, self.spacing, spacing, strict=True))
        return self.resized((d, h, w))

    def differs(self, other: "Grid") -> bool:
        """Whether the two have other sizes, or any corner lies more than a tenth of a voxel apart."""
        return self.shape != other.shape or self.apart(other) > 0.1 * min(self.spacing)

    def apart(self, other: "Grid") -> float:
        """How far, in mm, two grids of one shape put the same voxel at most: a corner, as affine maps are linear."""
        corners = np.array(np.meshgrid(*((0, n - 1) for n in self.shape), [1], indexing="ij")).reshape(4, -1)
        return float(np.linalg.norm(((self.affine - other.affine) @ corners)[:3], axis=0).max())


def grid_of(image: Any) -> Grid:
    """The grid a nibabel image has after it was turned to its closest canonical orientation; reads no voxel.

    Raises ValueError where the image is not 3D or its affine does not place three axes in space.
    """
    import nibabel as nib

    shape, affine = tuple(image.shape), np.asarray(image.affine, dtype=np.float64)
    if len(shape) < 3 or any(n != 1 for n in shape[3:]) or 0 in shape:
        raise ValueError(f"the image has shape {shape}; one 3D volume was expected")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise ValueError(f"the image's affine does not place three axes in space: {affine.tolist()}")
    turn = nib.io_orientation(affine)
    sizes = [0, 0, 0]
    for axis, (to, _) in enumerate(turn):
        sizes[int(to)] = shape[axis]
    w, h, d = sizes
    return Grid((d, h, w), affine @ nib.orientations.inv_ornt_aff(turn, shape[:3]) @ REVERSED)


def to_memory(image: Any) -> NDArray[Any]:
    """The voxels of a 3D nibabel image as (D, H, W), what ``nibabel.as_closest_canonical`` gives with axes reversed."""
    import nibabel as nib

    voxels = np.asanyarray(image.dataobj)
    voxels = voxels.reshape(voxels.shape[:3])
    turned: NDArray[Any] = nib.apply_orientation(voxels, nib.io_orientation(image.affine))
    return turned.transpose(2, 1, 0)


def to_file(volume: NDArray[Any], affine: NDArray[Any]) -> NDArray[Any]:
    """A volume (D, H, W) in the axis order and directions of the file whose affine is given: undoes ``to_memory``."""
    import nibabel as nib

    back = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], nib.io_orientation(affine))
    turned: NDArray[Any] = nib.apply_orientation(volume.transpose(2, 1, 0), back)
    return turned


def thick_axis(spacing: tuple[float, ...], wanted: tuple[float, ...]) -> int | None:
    """The one axis along which slices are not mixed (nnU-Net's rule), or None.

    It is the axis of the largest spacing where the scan's spacing, or else the wanted one, is more than ``THICK`` times
    coarser there than along its finest axis, and no second axis is as coarse.
    """
    for mm in (spacing, wanted):
        if max(mm) > THICK * min(mm):
            coarse = [axis for axis, size in enumerate(mm) if np.isclose(size, max(mm))]
            return coarse[0] if len(coarse) == 1 else None
    return None


def resample(volume: NDArray[Any], shape: Shape, order: int = 1, thick: int | None = None) -> NDArray[Any]:
    """A volume (D, H, W) on ``shape`` voxels that fill the same box; outside it the nearest value goes on.

    ``order`` is that of the spline (1 trilinear, 3 cubic, 0 nearest). With a ``thick`` axis the splines run within
    slices and every new slice is the nearest old one. The same shape gives the same bits.
    """
    from scipy import ndimage

    for axis in range(3) if order == 0 else [thick] if thick is not None else []:
        index = (2 * np.arange(shape[axis]) + 1) * volume.shape[axis] // (2 * shape[axis])
        volume = volume if shape[axis] == volume.shape[axis] else volume.take(index, axis)
    if volume.shape == tuple(shape):
        return volume
    if thick is None:
        factors = [new / old for new, old in zip(shape, volume.shape, strict=True)]
        zoomed: NDArray[Any] = ndimage.zoom(volume, factors, order=order, mode="nearest", grid_mode=True)
        return zoomed
    slices = np.moveaxis(volume, thick, 0)
    within = [n for axis, n in enumerate(shape) if axis != thick]
    factors = [new / old for new, old in zip(within, slices.shape[1:], strict=True)]
    done = [ndimage.zoom(s, factors, order=order, mode="nearest", grid_mode=True) for s in slices]
    return np.moveaxis(np.stack(done), 0, thick)


def resample_labels(
    labels: NDArray[np.uint8], shape: Shape, how: str = "per-label", thick: int | None = None
) -> NDArray[np.uint8]:
    """A label map (D, H, W) on ``shape`` voxels: the nearest label, or each label on its own.

    "per-label" resamples every label's mask trilinearly and takes it where it reaches 0.5 (later labels win ties;
    where no label reaches it there is background), which keeps surfaces smooth where "nearest" makes steps.
    """
    if how == "nearest" or labels.shape == tuple(shape):
        return resample(labels, shape, order=0)
    out = np.zeros(shape, dtype=np.uint8)
    for label in np.flatnonzero(np.bincount(labels.ravel())).tolist():
        out[resample((labels == label).astype(np.float32), shape, 1, thick) >= 0.5] = label
    return out


def most_likely(probabilities: Iterable[NDArray[Any]], shape: Shape, thick: int | None = None) -> NDArray[np.uint8]:
    """The label whose trilinearly resampled probability is largest, from K times (D, H, W) to ``shape``.

    Labels are taken in turn, so that only two of them are in memory at the new size; of equals the first wins.
    """
    best = np.full(shape, -np.inf, dtype=np.float32)
    out = np.zeros(shape, dtype=np.uint8)
    for label, mask in enumerate(probabilities):
        here = resample(mask.astype(np.float32), shape, 1, thick)
        larger = here > best
        out[larger] = label
        np.copyto(best, here, where=larger)
    return out
