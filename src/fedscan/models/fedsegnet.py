"""FedSegNet's network: a U-Net with a transformer at its deepest level, which the paper draws but does not size.

The paper gives no width, depth, heads or parameter count. The preset ``paper`` has the sizes that come nearest to its
megabytes: with 4 channels, 4 classes and the 128-cubed grid, 5,886,852 parameters in the convolutions, 789,760 in each
of 2 transformer layers and 131,072 in the positions: 7,597,444 in all. Three sites a round, float32 both ways, are then
141 MB for the U-Net (the paper: 140), and with 8 bits up 114 MB for FedSegNet (the paper: 120).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedscan.models.blocks import Decoder, Encoder, Norm, SegmentationNet, head, resize
from fedscan.models.card import model

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {},
    "small": {"widths": (8, 16, 32, 64), "heads": 4, "grid": 32},
    "tiny": {"widths": (4, 8, 16), "layers": 1, "heads": 2, "grid": 16},
}


class Attention(nn.Module):
    """Lets every token look at every token: softmax(QK^T / sqrt(d_k)) V (FedSegNet, eqs 3 and 10)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, C) to tokens (B, N, C)."""
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, d_k)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """One pre-norm transformer layer: attention, then an MLP of four times the width, each added to what came in."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        # Dropout stands behind each branch and not on the attention weights, where it would rule out the fused kernels.
        self.attend = nn.Sequential(nn.LayerNorm(width), Attention(width, heads), nn.Dropout(dropout))
        self.think = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, C) to tokens (B, N, C)."""
        tokens = tokens + self.attend(tokens)
        out: Tensor = tokens + self.think(tokens)
        return out


class Transformer(nn.Module):
    """Features (B, C, *grid) to features of the same shape, each voxel having looked at all.

    The position of a voxel is learned, for the ``grid`` of training; on another grid it is interpolated.
    """

    def __init__(self, width: int, grid: Sequence[int], layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(1, width, *grid))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.layers = nn.Sequential(*(Layer(width, heads, dropout) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *grid) to (B, C, *grid)."""
        tokens = (x + resize(self.position, x.shape[2:])).flatten(2).transpose(1, 2)  # (B, N, C)
        out: Tensor = self.layers(tokens)
        return out.transpose(1, 2).reshape(x.shape)


class Bottleneck(nn.Module):
    """Puts ``inner`` on the deepest features and hands the skips on as they are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """The features of all levels, deepest last, to the same with the deepest changed."""
        return [*features[:-1], self.inner(features[-1])]


def encoder_decoder(
    channels: int,
    classes: int,
    dims: int,
    widths: Sequence[int],
    norm: Norm,
    skips: bool = True,
    bottleneck: nn.Module | None = None,
) -> SegmentationNet:
    """The network that FedSegNet, its U-Net and the plain CNN share; without a ``bottleneck`` features pass unchanged.

    Raises ``ValueError`` for widths that make no network.
    """
    if len(widths) < 2 or any(width < 1 for width in widths):
        raise ValueError(f"widths must be two or more positive channel counts, one per level, not {tuple(widths)}.")
    stages = {
        "encoder": Encoder(channels, widths, dims, norm, skips),
        "bottleneck": Bottleneck(bottleneck or nn.Identity()),
        "decoder": Decoder(widths, dims, norm, skips),
        "head": head(widths[0], classes, dims),
    }
    step = 2 ** (len(widths) - 1)
    return SegmentationNet(stages, channels=channels, dims=dims, step=step, several=norm == "instance")


@model(
    "fedsegnet",
    summary="U-Net with a transformer at the deepest level, 2D or 3D",
    paper="Fareed et al. 2025, FedSegNet: A Federated Learning Framework for 3D Medical Image Segmentation",
    presets=PRESETS,
)
def fedsegnet(
    channels: int,
    classes: int,
    dims: int = 3,
    *,
    widths: Sequence[int] = (16, 32, 64, 128, 256),
    norm: Norm = "instance",
    transformer: bool = True,
    layers: int = 2,
    heads: int = 8,
    dropout: float = 0.1,
    grid: int | Sequence[int] = 128,
) -> SegmentationNet:
    """FedSegNet: ``widths`` are the channels per level, ``grid`` is the one of training, in voxels per axis.

    ``transformer=False`` leaves the transformer out, which gives the Federated U-Net of the paper. Raises
    ``ValueError`` for a grid that the levels do not divide, heads that do not divide the deepest width, or a dropout
    outside 0 to 1.
    """
    if not transformer:
        return encoder_decoder(channels, classes, dims, widths, norm)
    sides = (grid,) * dims if isinstance(grid, int) else tuple(grid)
    step = 2 ** (len(widths) - 1)
    if len(sides) != dims or any(side < step or side % step for side in sides):
        raise ValueError(
            f"grid must be {dims} sides, each divisible by {step} for {len(widths)} widths, or one such number for "
            f"all, not {grid}."
        )
    if layers < 1 or heads < 1 or widths[-1] % heads:
        raise ValueError(
            f"The transformer needs 1 or more layers and heads that divide the deepest width {widths[-1]}, "
            f"not layers={layers}, heads={heads}."
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}.")
    inner = Transformer(widths[-1], [side // step for side in sides], layers, heads, dropout)
    return encoder_decoder(channels, classes, dims, widths, norm, bottleneck=inner)
