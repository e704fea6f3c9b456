"""A tiny study on disk: two hospitals of a few 16-voxel volumes with a bright ball, and its study file."""

from pathlib import Path

import nibabel
import numpy as np

STUDY = """\
name = "balls"
seed = 1

[data]
cases = "scans"
grid = [16, 16, 16]
fractions = [0.6, 0.2, 0.2]
augment = false

[task]
labels = {{ball = 1}}

[model]
name = "unet"
preset = "tiny"

[method]
name = "{method}"

[train]
rounds = 2
optimiser = "adam"
lr = 0.01
batch = 2
{more}"""


def write_scans(folder: Path, sites: tuple[str, ...] = ("east", "west"), cases: int = 5, side: int = 16) -> Path:
    """Writes ``cases.csv`` and its NIfTI files: one sequence "t1", a ball of label 1, brighter by site."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["case,subject,site,t1,label"]
    axes = np.indices((side, side, side))
    for k, site in enumerate(sites):
        for i in range(cases):
            rng = np.random.default_rng([k, i])
            centre = side / 2 + rng.uniform(-2, 2, 3)
            ball = ((axes - centre[:, None, None, None]) ** 2).sum(0) < (side / 4) ** 2
            image = rng.normal(0, 0.2, ball.shape) + (2 + k) * ball
            for what, array in (("t1", image.astype(np.float32)), ("label", ball.astype(np.uint8))):
                nibabel.save(
                    nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), folder / f"{site}{i}_{what}.nii"
                )
            rows.append(f"{site}{i},{site}{i},{site},{site}{i}_t1.nii,{site}{i}_label.nii")
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")
    return folder


def write_study(folder: Path, method: str = "fedavg", more: str = "") -> Path:
    """Writes the scans and the study beside them; returns the study's path."""
    if not (folder / "scans").exists():
        write_scans(folder / "scans")
    path = folder / "study.toml"
    path.write_text(STUDY.format(method=method, more=more))
    return path
