"""Simulated hospitals for `fedscan demo`: real average anatomy; simulated individuals, lesions, scanners and readers.

The anatomy is the MNI152 template (assets/NOTICE.txt). Volumes are (D, H, W) = (32, 40, 32) voxels of 5 mm, axes right,
anterior, superior, the brain cut out. Labels: 0 rest, 1 grey matter, 2 white matter, 3 lesion.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedscan.data.manifest import Case, Manifest, write_manifest

Array = NDArray[np.float32]
Labels = NDArray[np.uint8]

GRID = (32, 40, 32)
SPACING = 5.0  # mm, every axis
LABELS = {"grey matter": 1, "white matter": 2, "lesion": 3}
HONESTY = "Anatomy: MNI152 average template. Individuals, lesions, scanners and readers are simulated."
TEMPLATE_MM = 3.0
# The template is larger than most heads, and an individual must fit into the grid.
MEAN_SIZE, SIZE_SPREAD = 0.94, 0.08
GAMMA_SPREAD = 0.2  # between scans of one scanner, as a share


@dataclass(frozen=True)
class Scanner:
    """How a hospital's scanner turns tissue into grey values.

    `gamma` bends the contrast; `bias` is the largest deviation of the receive field from 1; `noise` the Rician standard
    deviation as a share of full scale; `slice_mm` the axial slice thickness; `units` the grey value of full scale.
    """

    gamma: float = 1.0
    bias: float = 0.1
    noise: float = 0.02
    slice_mm: float = SPACING
    units: int = 1000
    inverted: bool = False


@dataclass(frozen=True)
class Hospital:
    """One simulated hospital: what it is, in a sentence, its scanner, and its patients and reader.

    `prevalence` is the share of cases with lesions, `lesion_mm` the range of their radii. The reader draws every
    outline `generous_mm` outside the true one (inside if negative), after smoothing it over `smooth_mm`.
    """

    name: str
    description: str
    scanner: Scanner
    cases: int
    prevalence: float = 1.0
    lesion_mm: tuple[float, float] = (11.0, 17.0)
    generous_mm: float = 0.0
    smooth_mm: float = 0.0


FIVE = (
    Hospital("Alder", "3 T, little noise; traces closely", Scanner(0.95, 0.3, 0.025, 5, 1200), 12),
    Hospital(
        "Birch",
        "1.5 T, noisy images, flat contrast; traces generously",
        Scanner(0.8, 0.3, 0.07, 5, 600),
        10,
        generous_mm=0.3,
    ),
    Hospital(
        "Cedar",
        "1.5 T, strong bias field; traces tightly",
        Scanner(1.1, 0.55, 0.04, 5, 900),
        10,
        generous_mm=-0.3,
    ),
    Hospital(
        "Elm",
        "3 T, 10 mm slices; smooths its outlines",
        Scanner(1.0, 0.35, 0.03, 10, 2000),
        10,
        smooth_mm=2.0,
    ),
    Hospital(
        "Fir",
        "3 T, hard contrast, some noise; large lesions",
        Scanner(1.3, 0.35, 0.045, 5, 400),
        8,
        lesion_mm=(13.0, 20.0),
    ),
)
HARD = Hospital(
    "Hazel",
    "inverted contrast: fluid and lesions bright, white matter dark",
    Scanner(1.0, 0.3, 0.04, 5, 800, inverted=True),
    10,
)


def hospitals(sites: int = 5, hard_site: bool = False) -> tuple[Hospital, ...]:
    """The first `sites` (1 to 5) of the five hospitals, and Hazel, whose contrast is inverted, if `hard_site`."""
    if not 1 <= sites <= len(FIVE):
        raise ValueError(f"There are 1 to {len(FIVE)} simulated hospitals, not {sites}.")
    return FIVE[:sites] + (HARD,) * hard_site


def simulate(hospital: Hospital, number: int, seed: int) -> tuple[Array, Labels, tuple[float, float, float]]:
    """The scan, the labels and the spacing (mm) of case `number` (from 0) of a hospital: the same bits for a seed.

    The image (32, 40, 32) holds whole numbers in float32, 0 outside the brain; the labels are uint8, of the same shape.
    Patient and scanner have random streams of their own, so another scanner sees the same patient.
    """
    t1, grey, white, brain = individual(_stream(seed, hospital.name, number, "anatomy"))
    # Spread the cases without lesions evenly, so that a site of any size has its share.
    ill = int((number + 1) * hospital.prevalence + 1e-9) > int(number * hospital.prevalence + 1e-9)
    depth = np.full(GRID, -np.inf, np.float32)
    if ill:
        t1, depth = with_lesions(t1, grey, white, hospital.lesion_mm, _stream(seed, hospital.name, number, "lesions"))
    image = acquire(t1, brain, hospital.scanner, _stream(seed, hospital.name, number, "scanner"))
    return image, trace(grey, white, depth, hospital), (SPACING,) * 3


def individual(rng: np.random.Generator) -> tuple[Array, Array, Array, Array]:
    """T1 (0 to 1), grey and white probability and brain (0 or 1) of one person, each (32, 40, 32).

    The template is scaled by 8 % to each side, turned by up to 4 degrees and bent by a smooth field of 6 to 12 mm and a
    finer one of 3 mm, for the folds.
    """
    from scipy.ndimage import map_coordinates
    from scipy.spatial.transform import Rotation

    size = MEAN_SIZE * (1 + rng.uniform(-SIZE_SPREAD, SIZE_SPREAD, 3))
    turn = Rotation.from_euler("xyz", rng.uniform(-4, 4, 3), degrees=True).as_matrix()
    mm = np.einsum("ij,jxyz->ixyz", np.diag(1 / size) @ turn, _millimetres())
    for control, peak in (((5, 6, 5), rng.uniform(6, 12)), ((14, 16, 14), 3.0)):
        bend = np.stack([_smooth(rng, control) for _ in range(3)])
        mm = mm + bend * (peak / np.sqrt((bend**2).sum(0)).max())
    template = _template()
    middle = (np.array(template.shape[1:]) - 1).reshape(3, 1, 1, 1) / 2
    t1, grey, white, brain = (
        map_coordinates(channel, mm / TEMPLATE_MM + middle, order=1, output=np.float32) for channel in template
    )
    # People differ in how bright their tissues are, too.
    t1 = t1 + rng.normal(0, 0.015) * grey + rng.normal(0, 0.015) * white
    return t1, grey, white, (brain > 0.5).astype(np.float32)


def with_lesions(
    t1: Array, grey: Array, white: Array, radius_mm: tuple[float, float], rng: np.random.Generator
) -> tuple[Array, Array]:
    """The T1 with one to three dark, irregular lesions in its white matter, and how deep in them each voxel lies.

    Both (32, 40, 32); depth in mm, 0 on the true outline, negative outside.
    """
    centres = np.argwhere(white > 0.8)
    depth = np.full(GRID, -np.inf)
    for _ in range(rng.integers(1, 4)):
        radius = rng.uniform(*radius_mm)
        axes = rng.dirichlet((12, 12, 12)) * 3
        offset = _millimetres() - _millimetres()[(slice(None), *rng.choice(centres))].reshape(3, 1, 1, 1)
        distance = np.sqrt((offset**2 / axes.reshape(3, 1, 1, 1) ** 2).sum(0))
        depth = np.maximum(depth, radius - distance + 0.2 * radius * _smooth(rng, (11, 13, 11)))
    # A lesion may reach the cortex, but stops at fluid.
    depth = np.minimum(depth, SPACING * (white + 0.6 * grey - 0.5) / 0.2).astype(np.float32)
    share = np.clip(0.5 + depth / SPACING, 0, 1)
    return (t1 * (1 - share) + rng.uniform(0.25, 0.4) * share).astype(np.float32), depth


def acquire(t1: Array, brain: Array, scanner: Scanner, rng: np.random.Generator) -> Array:
    """The scan (32, 40, 32) that a scanner makes of a T1 (0 to 1): contrast, bias, slices, Rician noise, units."""
    contrast = 1.05 - 0.9 * t1 if scanner.inverted else t1
    field = _smooth(rng, (3, 3, 3))
    gamma = scanner.gamma * np.exp(rng.normal(0, GAMMA_SPREAD))  # no two scans have quite the same settings
    seen = brain * np.clip(contrast, 0, None) ** gamma * np.exp(scanner.bias * field / np.abs(field).max())
    cut, join = _slices(scanner.slice_mm)
    sliced = seen @ cut
    real, imaginary = rng.normal(0, scanner.noise, (2, *sliced.shape))
    noisy = np.hypot(sliced + real, imaginary) @ join
    scan: Array = np.round(noisy * brain * scanner.units).astype(np.float32)
    return scan


def trace(grey: Array, white: Array, depth: Array, hospital: Hospital) -> Labels:
    """The labels (32, 40, 32) that a hospital's reader draws, from tissue probabilities and depth in lesions (mm)."""
    from scipy.ndimage import gaussian_filter

    lesion = np.clip(0.5 + (depth + hospital.generous_mm) / SPACING, 0, 1)
    grey, white, lesion = (gaussian_filter(p, hospital.smooth_mm / SPACING) for p in (grey, white, lesion))
    labels = np.zeros(GRID, np.uint8)
    labels[grey + white > 0.5] = 1
    # Across a border the difference of two probabilities changes by 2 over about 12 mm.
    labels[(labels == 1) & (white - grey > -hospital.generous_mm / 6)] = 2
    labels[lesion > 0.5] = 3
    return labels


def write_hospitals(folder: Path, seed: int, hard_site: bool = False) -> Path:
    """Write every case as NIfTI, `hospitals.json` and the table `cases.csv`; give the path of the table.

    The table lists case, subject, site, t1 and label; `hospitals.json` says of each hospital what `Hospital` holds.
    """
    import nibabel

    chosen = hospitals(hard_site=hard_site)
    affine = np.diag([SPACING, SPACING, SPACING, 1.0])
    affine[:3, 3] = [-(side - 1) / 2 * SPACING for side in GRID]
    cases = []
    for hospital in chosen:
        (folder / hospital.name).mkdir(parents=True, exist_ok=True)
        for number in range(hospital.cases):
            name = f"{hospital.name}-{number:02d}"
            image, labels, _ = simulate(hospital, number, seed)
            t1, label = (folder / hospital.name / f"{name}_{kind}.nii.gz" for kind in ("t1", "label"))
            nibabel.save(nibabel.Nifti1Image(image.astype(np.int16), affine), t1)
            nibabel.save(nibabel.Nifti1Image(labels, affine), label)
            cases.append(Case(name, name, hospital.name, {"t1": t1}, label))
    about = {"about": HONESTY, "seed": seed, "hospitals": [asdict(hospital) for hospital in chosen]}
    (folder / "hospitals.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return write_manifest(Manifest(folder, ("t1",), tuple(cases), LABELS, "mri"), folder / "cases.csv")


def _stream(seed: int, *names: str | int) -> np.random.Generator:
    """A random stream of its own for a seed and names: neither order of calls nor machine matters."""
    key = sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return np.random.default_rng(int.from_bytes(key[:16], "big"))


@cache
def _template() -> Array:
    """T1, grey, white and brain of the template, 0 to 1, (4, 50, 62, 53) at 3 mm."""
    with (
        as_file(files("fedscan.data") / "assets" / "mni152_2009a_sym_3mm.npz") as path,
        np.load(path, allow_pickle=False) as stored,
    ):
        t1, grey, white = (stored[name].astype(np.float32) / 255 for name in ("t1", "grey", "white"))
    return np.stack([t1, grey, white, (t1 > 0).astype(np.float32)])


@cache
def _millimetres() -> NDArray[np.float64]:
    """The position of each voxel of the grid from its middle, in mm, (3, 32, 40, 32)."""
    axes = [(np.arange(side) - (side - 1) / 2) * SPACING for side in GRID]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


@cache
def _spline(points: int, side: int) -> NDArray[np.float64]:
    """The (side, points) matrix that draws a cubic spline through `points` values spread over `side` voxels."""
    from scipy.interpolate import make_interp_spline

    degree = min(3, points - 1)
    drawn = make_interp_spline(np.linspace(0, 1, points), np.eye(points), k=degree)(np.linspace(0, 1, side))
    return np.asarray(drawn)


def _smooth(rng: np.random.Generator, control: Sequence[int]) -> NDArray[np.float64]:
    """A smooth random field (32, 40, 32): splines through a coarse grid of standard normal numbers."""
    field: NDArray[np.float64] = rng.standard_normal(tuple(control))
    for side in GRID:  # each turn uses up the first axis and adds the drawn one at the end
        field = np.tensordot(field, _spline(field.shape[0], side), axes=(0, 1))
    return field


@cache
def _slices(thickness: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Matrices from 32 voxels along the axis to slices of `thickness` mm (means), and back (linear)."""
    side = GRID[2]
    edges = np.arange(side + 1) * SPACING
    count = int(np.ceil(edges[-1] / thickness))
    low = np.arange(count) * thickness - (count * thickness - edges[-1]) / 2
    overlap = np.minimum(edges[1:, None], low + thickness) - np.maximum(edges[:-1, None], low)
    cut = np.clip(overlap, 0, None) / thickness
    middles, voxels = low + thickness / 2, edges[:-1] + SPACING / 2
    join = np.stack([np.interp(voxels, middles, row) for row in np.eye(count)])
    return cut, join
