"""Random changes to training cases: drawn per case on the CPU, then applied to a batch wherever it lies.

What is drawn (`Augmentation.draw`) and what is done (`augment`) are kept apart: the same parameters give the same
batch, and a case's parameters do not depend on the cases beside it. Works on 2D and 3D; axes are those of the batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

FOLDS = 0.4  # a cubic B-spline displacement stays one-to-one below this share of its lattice (Choi and Lee, 2000)


@dataclass(frozen=True)
class Intensity:
    """How far brightness and contrast may go, per channel, in a normalised image (its standard deviation is about 1).

    gamma       range of the exponent that bends values between the channel's minimum and maximum; drawn in logarithms
    contrast    range of the factor that spreads values about the channel's mean
    brightness  largest value added or taken away
    noise       largest standard deviation of white Gaussian noise
    """

    gamma: tuple[float, float] = (0.7, 1.5)
    contrast: tuple[float, float] = (0.75, 1.25)
    brightness: float = 0.1
    noise: float = 0.1

    def __post_init__(self) -> None:
        """Raises ValueError for ranges that are empty, and factors that are not above 0."""
        for name, (low, high) in {"gamma": self.gamma, "contrast": self.contrast}.items():
            if not 0 < low <= high:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high, not {(low, high)}.")
        if self.brightness < 0 or self.noise < 0:
            raise ValueError("brightness and noise must not be below 0.")

    def draw(self, channels: int, generator: Generator) -> Tensor:
        """Gamma, contrast, brightness and noise of one case, as (4, channels)."""
        low, high = self.gamma
        u = torch.rand(4, channels, generator=generator, dtype=torch.float64)
        gamma = torch.exp(math.log(low) + u[0] * math.log(high / low))
        contrast = self.contrast[0] + u[1] * (self.contrast[1] - self.contrast[0])
        return torch.stack([gamma, contrast, (2 * u[2] - 1) * self.brightness, u[3] * self.noise])


@dataclass(frozen=True, eq=False)
class Parameters:
    """What is done to one case; the default is nothing.

    warp       (ndim, *lattice): where in the image, in voxels, a cubic B-spline's control points look; None: no warp
    flips      axes that are turned about, 0 being the first spatial axis
    intensity  (4, channels): gamma, contrast, brightness, noise; None: as it is
    seed       of the noise, which is drawn on the batch's device
    """

    warp: Tensor | None = None
    flips: tuple[int, ...] = ()
    intensity: Tensor | None = None
    seed: int = 0


@dataclass(frozen=True)
class Augmentation:
    """How far a training case may be changed (FedSegNet: rotation up to 30 degrees, elastic, flips, shift, scale).

    rotate       largest angle in degrees, one for all axes or one per axis (3D: about D, H and W); a turn is rigid in
                 mm where the spacing is known
    elastic      (lattice, magnitude) in voxels: control points ``lattice`` apart are moved by up to ``magnitude`` along
                 each axis, with a cubic B-spline between them; None: no elastic deformation
    flip         axes that may be mirrored; -1 is the last, left and right of a scan in our orientation
    shift        largest translation, as a share of each edge
    scale        range of the factor by which a case is enlarged
    probability  of a warp (rotation, elastic, shift and scale at once), of each flip, of a change of intensity
    """

    rotate: float | tuple[float, ...] = 30.0
    elastic: tuple[float, float] | None = (16.0, 3.0)
    flip: tuple[int, ...] = (-1,)
    shift: float = 0.05
    scale: tuple[float, float] = (0.9, 1.1)
    intensity: Intensity | None = Intensity()
    probability: float = 0.5

    def __post_init__(self) -> None:
        """Raises ValueError for a range that is empty or a deformation that would fold the image onto itself."""
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be (low, high) with 0 < low <= high, not {self.scale}.")
        if self.elastic is not None and not 0 <= self.elastic[1] <= FOLDS * self.elastic[0]:
            step, magnitude = self.elastic
            raise ValueError(
                f"elastic = ({step:g}, {magnitude:g}) could fold the image onto itself: control points {step:g} voxels "
                f"apart may move by up to {FOLDS * step:g} voxels."
            )
        if not 0 <= self.probability <= 1 or self.shift < 0:
            raise ValueError("probability must lie between 0 and 1, and shift must not be below 0.")

    def draw(
        self, shape: tuple[int, ...], channels: int, generator: Generator, spacing: tuple[float, ...] | None = None
    ) -> Parameters:
        """The parameters of one case of ``shape`` (spatial axes only); ``spacing`` in mm makes turns rigid.

        As many numbers are drawn whatever comes out, so that a later case's parameters do not depend on this one's.
        """
        ndim = len(shape)
        limits = self.rotate if isinstance(self.rotate, tuple) else (self.rotate,) * (1 if ndim == 2 else 3)
        if len(limits) != (1 if ndim == 2 else 3):
            raise ValueError(
                f"rotate gives {len(limits)} angles; an image with {ndim} axes has {1 if ndim == 2 else 3}."
            )
        if any(not -ndim <= axis < ndim for axis in self.flip):
            raise ValueError(f"flip names an axis of {self.flip} that an image with {ndim} axes does not have.")

        def uniform(*size: int) -> Tensor:
            return torch.rand(*size, generator=generator, dtype=torch.float64)

        happens = (uniform(2 + len(self.flip)) < self.probability).tolist()
        angles = [(2 * u - 1) * limit for u, limit in zip(uniform(len(limits)).tolist(), limits, strict=True)]
        scale = self.scale[0] + float(uniform(1)) * (self.scale[1] - self.scale[0])
        shift = [(2 * u - 1) * self.shift * n for u, n in zip(uniform(ndim).tolist(), shape, strict=True)]
        warp = lattice(shape, self.elastic[0] if self.elastic else None)
        moved = (2 * uniform(*warp.shape) - 1) * self.elastic[1] if self.elastic else 0.0
        warp = affine(warp, shape, angles, scale, shift, spacing) + moved
        intensity = self.intensity.draw(channels, generator) if self.intensity else None
        seed = int(torch.randint(2**62, (1,), generator=generator))
        flips = tuple(axis % ndim for axis, turned in zip(self.flip, happens[2:], strict=True) if turned)
        return Parameters(warp if happens[0] else None, flips, intensity if happens[1] else None, seed)


def lattice(shape: tuple[int, ...], step: float | None = None) -> Tensor:
    """Control points at least ``step`` voxels apart (None: one span), each at its own place: (ndim, *lattice).

    A cubic B-spline gives back every linear function of its control points, so these say "look where you are". Along an
    edge of n voxels s spans of n / s voxels have s + 3 points, the first one span before the edge's outer face.
    """
    axes = []
    for n in shape:
        spans = max(1, int(n / (step or n)))
        axes.append((torch.arange(spans + 3, dtype=torch.float64) - 1) * n / spans - 0.5)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def affine(
    points: Tensor,
    shape: tuple[int, ...],
    angles: Sequence[float],
    scale: float = 1.0,
    shift: Sequence[float] | None = None,
    spacing: Sequence[float] | None = None,
) -> Tensor:
    """Where ``points`` (ndim, ...), in voxels, come from when the image is turned, enlarged and then shifted.

    Turning is about the image's centre, in degrees: in 2D from axis 0 to axis 1; in 3D first about W (D to H), then
    about H (W to D), then about D (H to W). ``shift`` is in voxels.
    """
    ndim = len(shape)
    planes = [(0, 1)] if ndim == 2 else [(1, 2), (2, 0), (0, 1)]
    turn = torch.eye(ndim, dtype=torch.float64)
    for (a, b), angle in zip(planes, angles, strict=True):
        one = torch.eye(ndim, dtype=torch.float64)
        one[a, a] = one[b, b] = math.cos(math.radians(angle))
        one[b, a] = math.sin(math.radians(angle))
        one[a, b] = -one[b, a]
        turn = turn @ one
    mm = torch.tensor(spacing or (1.0,) * ndim, dtype=torch.float64)
    back = turn.T * mm / mm[:, None] / scale  # S^-1 R^-1 S / scale: in mm a turn is rigid
    centre = (torch.tensor(shape, dtype=torch.float64) - 1) / 2
    moved = centre + torch.tensor(shift or (0.0,) * ndim, dtype=torch.float64)
    column = (-1, *(1,) * (points.dim() - 1))
    return torch.einsum("ij,j...->i...", back, points - moved.reshape(column)) + centre.reshape(column)


@torch.no_grad()
def augment(
    x: Tensor, y: Tensor, parameters: Sequence[Parameters], present: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Images (B, C, *spatial) and labels (B, *spatial), changed as one set of parameters per case says.

    Image and label look at the same places, X_def(v) = X(v + eps(v)) (FedSegNet, eq. 9): images bilinearly, labels at
    the nearest voxel; beyond the border its value goes on. Flips are exact; a case whose parameters say nothing keeps
    its bits. ``present`` (B, C) keeps absent channels at 0. Neither input is changed.
    """
    if len(parameters) != len(x) or y.shape != (x.shape[0], *x.shape[2:]):
        raise ValueError(
            f"{len(parameters)} parameters and labels {tuple(y.shape)} do not fit images {tuple(x.shape)}."
        )
    warps = {i: p.warp for i, p in enumerate(parameters) if p.warp is not None}
    if warps:
        with torch.autocast(x.device.type, enabled=False):
            grid = _sampling(list(warps.values()), x)
        x = _change(x, list(warps), partial(_sample, grid=grid))
        y = _change(y, list(warps), partial(_sample_labels, grid=grid))
    for axis in sorted({a for p in parameters for a in p.flips}):
        turned = [i for i, p in enumerate(parameters) if axis in p.flips]
        x = _change(x, turned, partial(torch.flip, dims=(axis + 2,)))
        y = _change(y, turned, partial(torch.flip, dims=(axis + 1,)))
    bent = [i for i, p in enumerate(parameters) if p.intensity is not None]
    if bent:
        here = x.new_ones(x.shape[:2], dtype=torch.bool) if present is None else present
        x = _change(x, bent, partial(_bend, parameters=[parameters[i] for i in bent], present=_rows(here, bent)))
    return x, y


def _rows(x: Tensor, rows: list[int]) -> Tensor:
    """Some cases of a batch. (A list as an index would travel to a GPU, and make it wait.)"""
    return x if len(rows) == len(x) else torch.stack([x[i] for i in rows])


def _change(x: Tensor, rows: list[int], change: Callable[[Tensor], Tensor]) -> Tensor:
    """A batch in which some cases are changed and the others keep their bits; ``x`` itself is left as it is."""
    changed = change(_rows(x, rows))
    if len(rows) == len(x):
        return changed
    out = x.clone()
    for row, i in enumerate(rows):
        out[i] = changed[row]
    return out


def _sampling(warps: list[Tensor], x: Tensor) -> Tensor:
    """Where each voxel looks, for ``grid_sample``: (B, *spatial, ndim) in its units, last axis first."""
    shape = x.shape[2:]
    size = torch.tensor(shape, dtype=torch.float64).reshape(-1, *(1,) * len(shape))
    points = _sent(torch.stack([((2 * warp + 1) / size - 1).flip(0) for warp in warps]), x)
    for axis, n in enumerate(shape, start=2):
        spline = _spline(n, points.shape[axis], x.device)
        points = (points.movedim(axis, -1) @ spline).movedim(-1, axis)
    return points.movedim(1, -1)


@lru_cache(maxsize=64)
def _spline(n: int, points: int, device: torch.device) -> Tensor:
    """The weight of each of ``points`` control points of a uniform cubic B-spline in each of n voxels: (points, n)."""
    spans = points - 3
    place = (torch.arange(n, dtype=torch.float64) + 0.5) * spans / n
    first = place.long().clamp(max=spans - 1)
    t = place - first
    weights = torch.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, 3 * (t - t**2) * t + 3 * t + 1, t**3], 1) / 6
    matrix = torch.zeros(n, points, dtype=torch.float64)
    matrix.scatter_(1, first[:, None] + torch.arange(4), weights)
    return matrix.T.contiguous().to(device, torch.float32)


def _sample(x: Tensor, grid: Tensor, mode: str = "bilinear") -> Tensor:
    return F.grid_sample(x, grid, mode=mode, padding_mode="border", align_corners=False)


def _sample_labels(y: Tensor, grid: Tensor) -> Tensor:
    return _sample(y[:, None].to(grid.dtype), grid, "nearest")[:, 0].to(y.dtype)


def _bend(x: Tensor, parameters: list[Parameters], present: Tensor) -> Tensor:
    """Gamma, contrast and brightness, then noise; absent channels stay as they are."""
    drawn = torch.stack([p.intensity for p in parameters if p.intensity is not None])
    ones = (1,) * (x.dim() - 2)
    gamma, contrast, brightness, noise = _sent(drawn, x).reshape(*drawn.shape, *ones).unbind(1)
    space = tuple(range(2, x.dim()))
    low, high = x.amin(space, keepdim=True), x.amax(space, keepdim=True)
    span = (high - low).clamp_min(torch.finfo(x.dtype).tiny)
    bent = ((x - low) / span).clamp_(0, 1).pow_(gamma).mul_(span).add_(low)
    mean = bent.mean(space, keepdim=True)
    bent = bent.mul_(contrast).add_(mean * (1 - contrast) + brightness)
    for row, p in enumerate(parameters):
        own = Generator(x.device).manual_seed(p.seed)
        bent[row].addcmul_(torch.randn(x.shape[1:], generator=own, device=x.device, dtype=x.dtype), noise[row])
    return torch.where(present.reshape(*present.shape, *ones), bent, x)


def _sent(t: Tensor, x: Tensor) -> Tensor:
    """A small tensor of the CPU as float32 on the device of ``x``, without waiting for it."""
    t = t.to(torch.float32)
    return t.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else t.to(x.device)
