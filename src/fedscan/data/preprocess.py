"""A case's files to arrays that a network can read, kept on disk under the hash of what they were made from.

Orientation, axis order, spacing and affine are those of `grids.py`: (D, H, W), closest to RAS+, in mm.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedscan.data import cache as store
from fedscan.data import grids
from fedscan.data.grids import Grid
from fedscan.data.records import Case

VERSION = 1  # of what `compute` makes: raise it with every change there, and every cache is made anew
Scheme = Literal["zscore", "zscore-foreground", "ct", "none"]
Interpolation = Literal["per-label", "nearest"]


@dataclass(frozen=True)
class Recipe:
    """How a scan becomes an array: resampled, clipped, normalised, in this order.

    sequences   the channels, in order; a case without one gets a zero channel
    grid        (D, H, W) voxels that fill the scan's box, trilinear whatever the spacing (FedSegNet: 128 cubed)
    spacing     mm along (D, H, W), instead of a grid; "native" (as None) leaves the scan's own voxels. Trilinear,
                but by nnU-Net's rule for thick slices (spacings more than 3:1) cubic within and nearest across them
    normalise   "zscore" over all voxels of the volume, "zscore-foreground" over those that are not 0 (0 stays 0),
                "ct" (x - ct_mean) / ct_sd, by default the middle and half the width of the window; "none"
    ct_window   values are clipped to (low, high) before normalising, whatever the scheme
    labels      the class of each value in the label file, such as {1: 1, 2: 2, 4: 3}; 0 is 0 where nothing else is
                said; empty: values are classes
    label_interpolation  "per-label" (each mask trilinear, at least 0.5) or "nearest"
    dtype       of the images on disk; "float16" halves them, batches are float32 either way
    """

    sequences: tuple[str, ...]
    grid: tuple[int, int, int] | None = None
    spacing: tuple[float, float, float] | Literal["native"] | None = None
    normalise: Scheme = "zscore"
    ct_window: tuple[float, float] | None = None
    ct_mean: float | None = None
    ct_sd: float | None = None
    labels: Mapping[int, int] = field(default_factory=dict, hash=False)
    label_interpolation: Interpolation = "per-label"
    dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        """Raises ValueError, in one sentence, for a recipe that cannot be followed."""
        spaced = self.spacing not in (None, "native")
        low, high = self.ct_window or (0.0, 1.0)
        refused = {
            "sequences must name at least one sequence, each once": not self.sequences
            or len(set(self.sequences)) < len(self.sequences),
            "grid and spacing exclude each other: choose one": self.grid is not None and spaced,
            "grid must be three whole numbers above 0": self.grid is not None and not _three_positive(self.grid),
            'spacing must be three lengths above 0 in mm, or "native"': spaced and not _three_positive(self.spacing),
            f"normalise must be one of {', '.join(get_args(Scheme))}": self.normalise not in get_args(Scheme),
            f"label_interpolation must be one of {', '.join(get_args(Interpolation))}": self.label_interpolation
            not in get_args(Interpolation),
            "dtype must be float32 or float16": self.dtype not in ("float32", "float16"),
            'normalise = "ct" needs ct_window = (low, high)': self.normalise == "ct" and self.ct_window is None,
            "ct_window must be (low, high) with low < high": not low < high,
            "ct_mean and ct_sd go together, and ct_sd must be above 0": (self.ct_mean is None) != (self.ct_sd is None)
            or (self.ct_sd is not None and self.ct_sd <= 0),
            "labels must give classes from 0 to 255": not all(0 <= c <= 255 for c in self.labels.values()),
        }
        for sentence, true in refused.items():
            if true:
                raise ValueError(f"Recipe: {sentence}.")

    @property
    def classes(self) -> dict[int, int]:
        """The class of each value that a label file may hold."""
        return {0: 0, **self.labels} if self.labels else {v: v for v in range(256)}

    def target(self, native: Grid) -> tuple[Grid, int | None]:
        """The grid that a scan on ``native`` is resampled to, and its thick axis (None where slices may be mixed)."""
        if self.grid is not None:
            d, h, w = self.grid
            return native.resized((d, h, w)), None
        if self.spacing is None or self.spacing == "native":
            return native, None
        new = native.spaced(self.spacing)
        return new, grids.thick_axis(native.spacing, self.spacing)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A case ready for training: its arrays are read from disk as they are used, and cannot be written to.

    image (C, D, H, W) in the recipe's dtype, label (D, H, W) uint8 or None; ``present`` says which channels are real;
    ``spacing`` in mm along (D, H, W) and ``affine`` from (d, h, w, 1) to RAS+ mm are those of this grid.
    """

    name: str
    subject: str
    site: str
    image: NDArray[Any]
    label: NDArray[Any] | None
    present: tuple[bool, ...]
    spacing: tuple[float, ...]
    affine: NDArray[np.float64]


def unsuited(intensity: str | None, scheme: Scheme) -> str:
    """Says that a scheme does not suit what scans measure ("ct", "mri", None: unknown); "" where it does."""
    if intensity == "ct" and scheme in ("zscore", "zscore-foreground"):
        return (
            f'The scans are CT, in Hounsfield units, and normalise = "{scheme}" scales each by its own mean, so that a '
            'unit means something else in every scan: set normalise = "ct" and ct_window = [low, high] in [data].'
        )
    if intensity == "mri" and scheme == "ct":
        return (
            'The scans are MRI, whose intensities have no unit, and normalise = "ct" scales all of them alike: set '
            'normalise = "zscore" or "zscore-foreground" in [data].'
        )
    return ""


def prepare(case: Case, recipe: Recipe, cache: Path, verify: bool = False) -> Prepared:
    """The case as ``recipe`` says, from ``cache`` where it is there and sound, else computed and put there.

    An entry is named by the SHA-256 of the bytes of the files, of the recipe and of `VERSION`, and is put in place by
    one rename, so that a process that dies leaves no half entry. Files whose path, size and time of change are known
    are not hashed again. Of an entry, sizes and times are checked; contents too where a time differs, or always with
    ``verify``. An entry that fails is made anew.

    Raises ValueError where a file is missing, unreadable or does not fit the others.
    """
    entry = Path(cache) / _key(case, recipe, Path(cache))
    found = store.read(entry, verify)
    if found is None:
        image, label, present, grid = compute(case, recipe)
        arrays = {"image": image} if label is None else {"image": image, "label": label}
        found = store.write(entry, arrays, {"present": present, "affine": grid.affine.tolist()})
    kept, note = found
    affine = np.asarray(note["affine"], dtype=np.float64)
    _, d, h, w = kept["image"].shape
    spacing = Grid((d, h, w), affine).spacing
    present = tuple(note["present"])
    return Prepared(case.name, case.subject, case.site, kept["image"], kept.get("label"), present, spacing, affine)


def compute(case: Case, recipe: Recipe) -> tuple[NDArray[Any], NDArray[np.uint8] | None, tuple[bool, ...], Grid]:
    """Image (C, D, H, W), label (D, H, W) or None, which sequences are there, and the grid; no cache is touched."""
    files = {s: _open(case, s) for s in recipe.sequences if case.images.get(s) is not None}
    if not files:
        raise ValueError(f"Case {case.name!r} has none of the sequences {', '.join(recipe.sequences)}.")
    native = grids.grid_of(next(iter(files.values())))
    target, thick = recipe.target(native)
    image = np.zeros((len(recipe.sequences), *target.shape), dtype=recipe.dtype)
    for channel, sequence in enumerate(recipe.sequences):
        if sequence in files:
            voxels = _voxels(case, sequence, files[sequence], native).astype(np.float32)
            order = 1 if thick is None else 3
            foreground = grids.resample(voxels != 0, target.shape, order=0)
            try:
                volume = normalise(grids.resample(voxels, target.shape, order, thick), foreground, recipe)
            except ValueError as e:
                raise ValueError(f"Case {case.name!r}, sequence {sequence!r}: {e}.") from e
            with np.errstate(over="ignore"):  # said below, in a sentence
                image[channel] = volume
    if not np.isfinite(image).all():
        raise ValueError(f"Case {case.name!r}: values are too large for {recipe.dtype}; normalise, or use float32.")
    label = None
    if case.label is not None:
        raw = _voxels(case, "label", _open(case, "label"), native)
        label = grids.resample_labels(_classes(case, raw, recipe), target.shape, recipe.label_interpolation, thick)
    return image, label, tuple(s in files for s in recipe.sequences), target


def normalise(volume: NDArray[Any], foreground: NDArray[np.bool_], recipe: Recipe) -> NDArray[Any]:
    """Clips and scales one volume as the recipe says: ``(x - mean) / sd`` (FedSegNet, eq. 8, for "zscore").

    Mean and standard deviation (of the population) are taken over all voxels, or over ``foreground``, outside of which
    "zscore-foreground" gives 0. Raises ValueError where all those voxels have the same value.
    """
    if recipe.ct_window is not None:
        volume = volume.clip(*recipe.ct_window)
    if recipe.normalise == "none":
        return volume
    if recipe.normalise == "ct":
        low, high = recipe.ct_window or (-1.0, 1.0)
        mean = (low + high) / 2 if recipe.ct_mean is None else recipe.ct_mean
        sd = (high - low) / 2 if recipe.ct_sd is None else recipe.ct_sd
    else:
        inside = volume[foreground] if recipe.normalise == "zscore-foreground" else volume
        mean, sd = (
            (float(inside.mean(dtype=np.float64)), float(inside.std(dtype=np.float64))) if inside.size else (0, 0)
        )
        if sd <= 1e-6 * max(1.0, abs(mean)):
            raise ValueError("all voxels have the same value, so there is no standard deviation to divide by")
    scaled = (volume - np.float32(mean)) / np.float32(sd)
    return np.where(foreground, scaled, np.float32(0)) if recipe.normalise == "zscore-foreground" else scaled


def restore(segmentation: NDArray[Any], scan: Path, recipe: Recipe) -> Any:
    """A segmentation of the prepared grid as a nibabel image on the scan's own voxels, axes and affine.

    ``segmentation`` is (D, H, W) whole numbers (classes), or (K, D, H, W) probabilities, of which the most likely class
    after trilinear resampling is taken. Classes are treated so too, unless the recipe says "nearest". Class k becomes
    the lowest file value that ``recipe.labels`` maps to k. Raises ValueError where the shape is not that of the scan
    prepared by this recipe, or where a class has no value.
    """
    import nibabel as nib

    image: Any = nib.load(scan)
    if image.ndim == 4:
        image = image.slicer[..., 0]
    native = grids.grid_of(image)
    target, thick = recipe.target(native)
    if segmentation.ndim not in (3, 4) or segmentation.shape[-3:] != target.shape:
        raise ValueError(f"{scan}: the segmentation has shape {segmentation.shape}; this scan gives {target.shape}.")
    if segmentation.ndim == 4:
        classes = grids.most_likely(segmentation, native.shape, thick)
    elif recipe.label_interpolation == "nearest" or target.shape == native.shape:
        classes = grids.resample(segmentation, native.shape, order=0)
    else:
        found = np.unique(segmentation)
        masks = (segmentation == c for c in found)
        classes = found[grids.most_likely(masks, native.shape, thick)]
    out = nib.Nifti1Image(grids.to_file(_values(classes, recipe, scan), image.affine), image.affine)
    out.header.set_xyzt_units("mm")
    for place in ("sform", "qform"):
        code = int(image.header[f"{place}_code"]) if isinstance(image, nib.Nifti1Image) else 0
        getattr(out, f"set_{place}")(image.affine, code or 2)
    return out


def _values(classes: NDArray[Any], recipe: Recipe, scan: Path) -> NDArray[Any]:
    """Classes as the values of label files: uint8, or int16 where they need it."""
    value = {c: v for v, c in sorted(recipe.classes.items(), reverse=True)}
    found = np.unique(classes).tolist()
    for c in found:
        if c not in value:
            raise ValueError(f"{scan}: the segmentation holds {c}, none of the recipe's classes {sorted(value)}.")
    small = min(value.values()) >= 0 and max(value.values()) <= 255
    out = np.zeros(classes.shape, dtype=np.uint8 if small else np.int16)
    for c in found:
        out[classes == c] = value[c]
    return out


def _key(case: Case, recipe: Recipe, cache: Path) -> str:
    """The SHA-256 of all that an entry is made from; where a file holds several sequences, with the volume's place."""
    sources: dict[str, Any] = {}
    for sequence in recipe.sequences:
        path = case.images.get(sequence)
        place = case.sharing(sequence).index(sequence) if path is not None else 0
        sources[sequence] = None if path is None else [store.hash_of(path, cache), place]
    sources[""] = None if case.label is None else store.hash_of(case.label, cache)
    steps = {**asdict(recipe), "labels": sorted(recipe.labels.items())}
    return hashlib.sha256(store.canonical([VERSION, steps, sources])).hexdigest()


def _three_positive(values: Any) -> bool:
    return len(values) == 3 and all(v > 0 for v in values)


def _open(case: Case, what: str) -> Any:
    path = case.label if what == "label" else case.images[what]
    try:
        return case.open(what)
    except (ValueError, MemoryError):
        raise
    except Exception as e:  # nibabel and gzip raise many kinds for one thing: this file is no image
        raise ValueError(f"Case {case.name!r}: {path} cannot be read as an image ({e}).") from e


def _voxels(case: Case, what: str, image: Any, native: Grid) -> NDArray[Any]:
    """The voxels of one file as (D, H, W), after checking that they lie on the case's grid and are all numbers."""
    grid = grids.grid_of(image)
    if grid.differs(native):
        how = f"shape {grid.shape} against {native.shape}, spacing {_mm(grid)} against {_mm(native)} mm"
        if grid.shape == native.shape:
            how = f"the same voxel lies up to {grid.apart(native):.3g} mm apart"
        raise ValueError(
            f"Case {case.name!r}: {what!r} lies on another grid than the case's first sequence ({how}): bring both "
            "onto one grid first."
        )
    try:
        voxels = grids.to_memory(image)
    except MemoryError:  # no fault of the file
        raise
    except Exception as e:
        path = case.label if what == "label" else case.images[what]
        raise ValueError(f"Case {case.name!r}: {path} is damaged ({e}).") from e
    if not np.isfinite(voxels).all():
        raise ValueError(f"Case {case.name!r}: {what!r} holds voxels that are not finite numbers.")
    return voxels


def _mm(grid: Grid) -> str:
    return " x ".join(f"{s:.3g}" for s in grid.spacing)


def _classes(case: Case, raw: NDArray[Any], recipe: Recipe) -> NDArray[np.uint8]:
    """File values as classes; raises ValueError for a value that is no whole number or that no class has."""
    values = np.unique(raw)
    if (values != np.round(values)).any():
        raise ValueError(f"Case {case.name!r}: the label map holds {values[values != np.round(values)][0]}, no label.")
    mapping = recipe.classes
    for value in values.tolist():
        if value not in mapping:
            known = sorted(mapping) if recipe.labels else "0 to 255"
            raise ValueError(f"Case {case.name!r}: the label map holds {value:g}; known values are {known}.")
    out = np.zeros(raw.shape, dtype=np.uint8)
    for value in values.tolist():
        out[raw == value] = mapping[int(value)]
    return out
