"""What the networks are made of: convolution blocks, a pool and a resize whose gradients have the same bits every time,
and a network as named stages."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["instance", "batch", "group"]

_CONV: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
_NORM: dict[str, dict[int, Callable[..., nn.Module]]] = {
    "instance": {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
    "batch": {2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
}
_POOL = {2: F.max_pool2d, 3: F.max_pool3d}


class SegmentationNet(nn.Module):
    """A network as a chain of named stages, each a module that takes what the one before it gives.

    Split learning cuts the chain between two stages. What passes there is a list of tensors, the deepest last, or
    after the decoder a tensor.

    ``channels`` and ``dims`` are those of the images (B, channels, *grid); each side of the grid must be divisible by
    ``step``, ``several`` says that a grid must hold more than one step, and ``exact`` is the only grid taken.
    """

    def __init__(
        self,
        stages: dict[str, nn.Module],
        *,
        channels: int,
        dims: int,
        step: int,
        several: bool = False,
        exact: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        for name, stage in stages.items():
            self.add_module(name, stage)
        self.channels, self.dims, self.step, self.several, self.exact = channels, dims, step, several, exact

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, *grid) to logits (B, classes, *grid); raises ``ValueError`` for another shape."""
        self.check(images.shape)
        x = images
        for stage in self.children():
            x = stage(x)
        return x

    def stages(self) -> dict[str, nn.Module]:
        """The stages by name, in order; called one after another they are the forward pass."""
        return dict(self.named_children())

    def check(self, shape: Sequence[int]) -> None:
        """Raises ``ValueError`` where images of this ``shape`` cannot be taken, and says what could be."""
        axes = " x ".join("DHW"[-self.dims :])
        if len(shape) != self.dims + 2 or shape[1] != self.channels:
            raise ValueError(
                f"The network takes images of shape (batch, {self.channels}, {axes}), not {tuple(shape)}: "
                "the study's channels and dims must fit its images."
            )
        grid = tuple(shape[2:])
        if any(side % self.step for side in grid):
            raise ValueError(
                f"Each side of the grid {grid} must be divisible by {self.step}: resample or pad the images, "
                "or choose a network with fewer levels."
            )
        if self.several and all(side == self.step for side in grid):
            raise ValueError(
                f"The grid {grid} leaves a single voxel at the deepest level, which instance norm cannot take: "
                "use a larger grid or norm='group'."
            )
        if self.exact and grid != self.exact:
            raise ValueError(f"The network was built for the grid {self.exact} and takes no other, not {grid}.")


def conv_block(inside: int, outside: int, dims: int, norm: Norm) -> nn.Sequential:
    """Two convolutions of kernel 3, each followed by ``norm`` and LeakyReLU: (B, inside, *grid) to (B, outside, *grid).

    No convolution has a bias: the norm behind it would take it away again, and it would travel for nothing.
    """
    layers: list[nn.Module] = []
    for width in (inside, outside):
        layers += [_CONV[dims](width, outside, 3, padding=1, bias=False), norm_layer(norm, outside, dims)]
        layers += [nn.LeakyReLU(0.01, inplace=True)]
    return nn.Sequential(*layers)


def norm_layer(norm: Norm, width: int, dims: int) -> nn.Module:
    """The normalisation of ``width`` channels, with a learned scale and shift; group norm has up to 8 groups."""
    if norm == "group":
        return nn.GroupNorm(math.gcd(8, width), width)
    return _NORM[norm][dims](width, affine=True)


class Encoder(nn.Module):
    """Images to features: a block at each of ``widths``, with a max-pool of 2 before all but the first."""

    def __init__(self, channels: int, widths: Sequence[int], dims: int, norm: Norm, skips: bool = True) -> None:
        super().__init__()
        pairs = pairwise([channels, *widths])
        self.blocks = nn.ModuleList(conv_block(i, o, dims, norm) for i, o in pairs)
        self.skips = skips

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, channels, *grid) to the features of every level, or of the deepest alone where there are no skips."""
        features = [self.blocks[0](images)]
        for block in self.blocks[1:]:
            features.append(block(max_pool(features[-1])))
        return features if self.skips else features[-1:]


class Decoder(nn.Module):
    """Features to the full grid: up-sample by 2, join the skip where there is one, and a block, at each level."""

    def __init__(self, widths: Sequence[int], dims: int, norm: Norm, skips: bool = True) -> None:
        super().__init__()
        pairs = pairwise(reversed(widths))
        self.blocks = nn.ModuleList(conv_block(deep + skips * up, up, dims, norm) for deep, up in pairs)

    def forward(self, features: list[Tensor]) -> Tensor:
        """The features, deepest last, to (B, widths[0], *grid)."""
        *skips, x = features
        for block in self.blocks:
            x = resize(x, [2 * side for side in x.shape[2:]])
            x = block(torch.cat([x, skips.pop()], 1) if skips else x)
        return x


def head(width: int, classes: int, dims: int) -> nn.Module:
    """Features to logits: a convolution of kernel 1."""
    return _CONV[dims](width, classes, 1)


def max_pool(x: Tensor) -> Tensor:
    """The largest of every 2^d voxels: (B, C, *grid) to (B, C, *grid / 2); of equal voxels the first gets the gradient.

    torch's own pool is three times as fast on a CPU, but on a GPU it refuses when deterministic algorithms are asked
    for. The other form has the same values and the same gradients, ties included, so the two can be mixed.
    """
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return pairwise_max(x)
    return _POOL[x.ndim - 2](x, 2)


def pairwise_max(x: Tensor) -> Tensor:
    """``max_pool`` by comparing neighbours along one axis after the other, the last axis first."""
    for axis in range(x.ndim - 1, 1, -1):
        first, second = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :]).unbind(axis + 1)
        x = torch.where(first < second, second, first)
    return x


def resize(x: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, C, *old) to (B, C, *grid) by linear interpolation along each axis, as ``F.interpolate`` does it.

    The gradient of ``F.interpolate`` differs from run to run on a GPU. Interpolation is linear, so it is a matrix
    per axis, and a product of matrices has the same bits every time. One thread, 16 channels, 32^3 to 64^3, forward and
    backward: 16 ms so, 44 ms by ``F.interpolate``, 39 ms by a transposed convolution, 20 ms by adding shifted copies.
    """
    for axis in range(x.ndim - 1, 1, -1):
        old, new = x.shape[axis], grid[axis - 2]
        if old == new:
            continue
        unit = torch.eye(old, dtype=x.dtype, device=x.device)
        matrix = F.interpolate(unit[None], size=new, mode="linear", align_corners=False)[0]  # (old, new)
        # The axes behind this one are done, so they count as one axis of columns.
        product = x @ matrix if axis == x.ndim - 1 else matrix.T @ x.flatten(axis + 1)
        x = product.reshape(*x.shape[:axis], new, *x.shape[axis + 1 :])
    return x
