"""Make the 3 mm copy of the MNI152 template that `fedscan demo` starts from, out of nilearn's package.

    pip install nilearn==0.14.1
    python benchmarks/make_mni_asset.py

The output is the same to the byte each time. Licence and changes: src/fedscan/data/assets/NOTICE.txt.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

ASSET = Path(__file__).parents[1] / "src/fedscan/data/assets/mni152_2009a_sym_3mm.npz"
CHANNELS = ("t1", "gm", "wm")
MM = 3
# Voxels of the 1 mm grid that hold all of the brain, in whole blocks of 3 mm.
CORNER, END = (24, 24, 0), (174, 210, 159)


def coarse(volume: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The mean of each 3 x 3 x 3 block of a 1 mm volume (X, Y, Z), rounded, as uint8 (X/3, Y/3, Z/3)."""
    kept = volume[tuple(slice(low, high) for low, high in zip(CORNER, END, strict=True))]
    if kept.sum(dtype=np.int64) != volume.sum(dtype=np.int64):
        raise ValueError("The crop leaves out part of the brain: widen CORNER and END.")
    x, y, z = (side // MM for side in kept.shape)
    means: NDArray[np.float64] = kept.reshape(x, MM, y, MM, z, MM).mean(axis=(1, 3, 5))
    return means.round().astype(np.uint8)


def folder_of_nilearn() -> Path:
    """The folder in which the installed nilearn keeps its template."""
    found = find_spec("nilearn")
    if found is None or found.origin is None:
        raise SystemExit("nilearn is not installed: pip install nilearn==0.14.1, or give --folder.")
    return Path(found.origin).parent / "datasets" / "data"


def main() -> None:
    """Write the asset and say its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the three mni_icbm152_*.nii.gz files lie")
    parser.add_argument("--out", type=Path, default=ASSET)
    chosen = parser.parse_args()
    folder = chosen.folder or folder_of_nilearn()
    images = [nibabel.load(folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz") for name in CHANNELS]
    t1, grey, white = (coarse(np.asanyarray(image.dataobj)) for image in images)
    # The centre of the first block lies one voxel in from its corner.
    first = images[0].affine @ [*(corner + (MM - 1) / 2 for corner in CORNER), 1]
    affine = np.diag([MM, MM, MM, 1.0])
    affine[:, 3] = first
    np.savez_compressed(chosen.out, affine=affine, t1=t1, grey=grey, white=white)
    print(f"{chosen.out}: {t1.shape} voxels of {MM} mm, {chosen.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
