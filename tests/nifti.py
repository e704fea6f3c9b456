"""Writes small NIfTI files, so that tests can lay out folders as their publishers do."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import ArrayLike


def write(path: Path, voxels: ArrayLike, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Path:
    """Saves `voxels` at `path` with an affine of that spacing (mm) and makes its folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.asarray(voxels), np.diag([*spacing, 1.0])), path)
    return path


def forbid(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Refuses to open a file, as the system does without permission; to an administrator it forbids nothing."""
    really = Path.open

    def opened(self: Path, *how: Any, **more: Any) -> Any:
        if str(self) == path:
            raise PermissionError(13, "Permission denied", path)
        return really(self, *how, **more)

    monkeypatch.setattr(Path, "open", opened)


def image(seed: int = 0, shape: tuple[int, ...] = (4, 5, 6)) -> np.ndarray:
    """Random float32 voxels between 0 and 1."""
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def label(*values: int, shape: tuple[int, ...] = (4, 5, 6)) -> np.ndarray:
    """A uint8 label map with one voxel of each of `values`, the rest 0."""
    voxels = np.zeros(shape, np.uint8)
    voxels.flat[: len(values)] = values
    return voxels
