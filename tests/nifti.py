"""Writes small NIfTI files, so that tests can lay out folders as their publishers do."""

from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import ArrayLike


def write(path: Path, voxels: ArrayLike, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Path:
    """Saves `voxels` at `path` with an affine of that spacing (mm) and makes its folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.asarray(voxels), np.diag([*spacing, 1.0])), path)
    return path


def image(seed: int = 0, shape: tuple[int, ...] = (4, 5, 6)) -> np.ndarray:
    """Random float32 voxels between 0 and 1."""
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def label(*values: int, shape: tuple[int, ...] = (4, 5, 6)) -> np.ndarray:
    """A uint8 label map with one voxel of each of `values`, the rest 0."""
    voxels = np.zeros(shape, np.uint8)
    voxels.flat[: len(values)] = values
    return voxels
