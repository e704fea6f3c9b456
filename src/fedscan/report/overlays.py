"""A case to look at: three planes as one SVG picture, with outlines and errors as layers that the page switches."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from fedscan.ledger import Overlay

# Volumes are drawn with axes (x, y, z): to the right, the front and the top. A record holds (D, H, W) = (z, y, x).
PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))  # and the axis that each cuts
MISSED, EXTRA, CONFUSED = 1, 2, 3
COLOURS = {MISSED: (86, 180, 233), EXTRA: (230, 159, 0), CONFUSED: (204, 121, 167)}  # Okabe and Ito's palette
GAP = 0.04  # between planes, as a part of the picture's height


@dataclass(frozen=True)
class Picture:
    """An overlay as the page shows it. ``svg`` holds layers of class ``ref``, ``pred``, ``err`` and ``v0``..``vn``."""

    site: str
    case: str
    rank: str
    dice: float | None
    spacing: tuple[float, ...]
    svg: Markup


def pictures(
    overlays: Sequence[Overlay], labels: Mapping[str, int], budget: int = 3_000_000
) -> tuple[list[Picture], list[Overlay]]:
    """Overlays to pictures that take at most ``budget`` characters together, smaller where they must be.

    Returns the pictures and the overlays left out because even the smallest would not fit: best and median cases first.
    """
    for edge in (320, 200, 128):
        made = _within(overlays, labels, edge, budget)
        if len(made) == len(overlays):
            return [made[i] for i in range(len(overlays))], []
    rank = {"worst": 0, "median": 1}
    order = sorted(range(len(overlays)), key=lambda i: rank.get(overlays[i].rank, 2))
    made = _within([overlays[i] for i in order], labels, edge, budget)
    kept = {order[i]: picture for i, picture in made.items()}
    return [kept[i] for i in sorted(kept)], [o for i, o in enumerate(overlays) if i not in kept]


def _within(overlays: Sequence[Overlay], labels: Mapping[str, int], edge: int, budget: int) -> dict[int, Picture]:
    """Pictures of the first overlays, by their place, until the budget of characters is spent."""
    made: dict[int, Picture] = {}
    for i, overlay in enumerate(overlays):
        picture = draw(overlay, labels, edge)
        budget -= len(picture.svg)
        if budget < 0:
            break
        made[i] = picture
    return made


def draw(overlay: Overlay, labels: Mapping[str, int], edge: int = 320) -> Picture:
    """Image and two masks (D, H, W), or (H, W), to one SVG of three planes, or one, side by side and to scale in mm.

    ``edge`` is the largest number of pixels along a side of a plane. Raises ValueError where the shapes differ.
    """
    (image, reference, prediction), spacing = _volumes(overlay)
    window, shape = _window(image), image.shape
    at = _slices(reference if reference.any() else prediction, labels)
    planes = [(name, axis) for name, axis in PLANES if shape[axis] == 1] or PLANES  # a single slice has one plane
    sizes = [_size(shape, spacing, axis) for _, axis in planes]
    height = max(h for h, _ in sizes)
    gap, caption = GAP * height, 0.09 * height
    width = sum(w for _, w in sizes) + gap * (len(sizes) - 1)
    parts, x = [], 0.0
    for (plane, axis), (h, w) in zip(planes, sizes, strict=True):
        cut = [_plane(volume, axis, at[axis]) for volume in (image, reference, prediction)]
        parts.append(f'<g transform="translate({x:.1f} {(height - h) / 2:.1f})">')
        parts += [_image(_grey(cut[0], window), w, h, edge), *_layers(cut[1], cut[2], labels, w, h), "</g>"]
        parts.append(f'<text x="{x + w / 2:.1f}" y="{height + 0.75 * caption:.1f}">{plane}</text>')
        x += w + gap
    title = (
        f"{overlay.rank} case {overlay.case} at {overlay.site}: {', '.join(name for name, _ in planes)}, with outlines"
    )
    box = f'viewBox="0 0 {width:.1f} {height + caption:.1f}" style="--mm:{height / 200:.3f}px"'
    svg = f'<svg class="scan" role="img" aria-label="{escape(title)}" {box}>{"".join(parts)}</svg>'
    return Picture(overlay.site, overlay.case, overlay.rank, overlay.dice, overlay.spacing, Markup(svg))


def _volumes(overlay: Overlay) -> tuple[list[NDArray[Any]], tuple[float, ...]]:
    """Image, reference and prediction as volumes with three axes, and mm along each. An image (H, W) is one slice."""
    arrays: list[NDArray[Any]] = [overlay.image, overlay.reference, overlay.prediction]
    shape, spacing = overlay.image.shape, tuple(overlay.spacing)
    if len(shape) not in (2, 3) or any(a.shape != shape for a in arrays) or len(spacing) != len(shape):
        raise ValueError(
            f"overlay of case {overlay.case} at {overlay.site}: image {shape}, reference {arrays[1].shape}, prediction "
            f"{arrays[2].shape} and spacing {spacing} must have the same axes, (D, H, W) or (H, W)"
        )
    if len(shape) == 2:  # drawn as it lies: the plane turns it back
        return [a[::-1, ::-1].T[..., None] for a in arrays], (*spacing[::-1], 1.0)
    return [a.T for a in arrays], spacing[::-1]


def _slices(mask: NDArray[np.uint8], labels: Mapping[str, int]) -> list[int]:
    """Where to cut each axis: the slice that shows most of every label, each label counting the same."""
    found = [mask == number for number in labels.values() if (mask == number).any()]
    if not found:
        return [n // 2 for n in mask.shape]
    at = []
    for axis in range(3):
        other = tuple(a for a in range(3) if a != axis)
        areas = [m.sum(axis=other) for m in found]
        at.append(int(np.argmax(sum(area / area.max() for area in areas))))
    return at


def _size(shape: tuple[int, ...], spacing: tuple[float, ...], axis: int) -> tuple[float, float]:
    """Height and width of a plane in mm."""
    columns, rows = (a for a in range(3) if a != axis)
    return shape[rows] * spacing[rows], shape[columns] * spacing[columns]


def _plane(volume: NDArray[Any], axis: int, k: int) -> NDArray[Any]:
    """Slice ``k`` of ``axis`` as a radiologist sees it: top or front up, the patient's right, or front, at the left."""
    return np.ascontiguousarray(np.take(volume, k, axis=axis).T[::-1, ::-1])


def _window(image: NDArray[np.float32]) -> tuple[float, float]:
    """The 1st and the 99.5th percentile of the finite values, of 100,000 of them where there are more."""
    values = image.ravel()[:: max(1, image.size // 100_000)]
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, (1, 99.5)) if finite.size else (0.0, 1.0)
    return float(low), float(high)


def _grey(plane: NDArray[np.float32], window: tuple[float, float]) -> NDArray[np.uint8]:
    """Intensities to 0..255 over the window; what is not finite is black or white."""
    low, high = window
    scaled = (np.nan_to_num(plane, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-12)
    return np.asarray(np.clip(255 * scaled, 0, 255), np.uint8)


def _layers(
    reference: NDArray[np.uint8], prediction: NDArray[np.uint8], labels: Mapping[str, int], w: float, h: float
) -> Iterator[str]:
    """Errors and outlines of one plane: view 0 holds all labels, view n the n-th label alone."""
    known = list(labels.values())
    every = np.zeros(reference.shape, np.uint8)
    every[np.isin(reference, known) & ~np.isin(prediction, known)] = MISSED
    every[np.isin(prediction, known) & ~np.isin(reference, known)] = EXTRA
    every[np.isin(prediction, known) & np.isin(reference, known) & (prediction != reference)] = CONFUSED
    yield _errors(every, "v0", w, h)
    for n, number in enumerate(known, start=1):
        ref, pred = reference == number, prediction == number
        if len(known) > 1:
            yield _errors(np.where(ref & ~pred, MISSED, np.where(pred & ~ref, EXTRA, 0)), f"v{n}", w, h)
        for name, mask in (("ref", ref), ("pred", pred)):
            if path := _outline(mask, w, h):
                yield f'<path class="{name} v0 v{n}" d="{path}"/>'


def _outline(mask: NDArray[np.bool_], w: float, h: float) -> str:
    """The border of a mask as an SVG path in mm; empty where the mask is empty."""
    from contourpy import contour_generator

    if not mask.any():
        return ""
    rows, columns = mask.shape
    lines = contour_generator(z=np.pad(mask, 1).astype(float)).lines(0.5)
    step = np.array([w / columns, h / rows])
    return "".join(
        "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (np.asarray(line)[:-1] - 0.5) * step) + "Z" for line in lines
    )


def _errors(kind: NDArray[np.integer], view: str, w: float, h: float) -> str:
    """Error classes (rows, columns) as a picture with clear background; nothing where there are none."""
    from PIL import Image

    if not kind.any():
        return ""
    image = Image.fromarray(kind.astype(np.uint8), mode="P")
    image.putpalette([0, 0, 0, *(v for key in sorted(COLOURS) for v in COLOURS[key])])
    stream = BytesIO()
    image.save(stream, "PNG", transparency=0, optimize=True)
    return _embed(stream.getvalue(), f"err {view}", w, h)


def _image(plane: NDArray[np.uint8], w: float, h: float, edge: int) -> str:
    """A grey plane (rows, columns) as a PNG of at most ``edge`` pixels along a side, stretched to w x h mm."""
    from PIL import Image

    image = Image.fromarray(plane)
    image.thumbnail((edge, edge))
    stream = BytesIO()
    image.save(stream, "PNG", optimize=True)
    return _embed(stream.getvalue(), "base", w, h)


def _embed(png: bytes, kind: str, w: float, h: float) -> str:
    data = base64.b64encode(png).decode()
    return (
        f'<image class="{kind}" width="{w:.1f}" height="{h:.1f}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{data}"/>'
    )
