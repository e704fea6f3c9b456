"""UNETR and Swin UNETR as MONAI has them, cut into the same stages as our own networks.

MONAI's modules do the work; here they are only put in order, so that split learning can cut them, and so that nothing
travels which is not learned.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from fedscan.models.blocks import Norm, SegmentationNet
from fedscan.models.card import model

_PATCH = 16  # voxels per token and axis in UNETR


class UnetrEncoder(nn.Module):
    """MONAI's ViT and the blocks on its layers 3, 6 and 9: images to five feature maps, the deepest last."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.vit = net.vit
        self.image = net.encoder1
        self.hidden = nn.ModuleList([net.encoder2, net.encoder3, net.encoder4])
        for block in self.vit.blocks:  # MONAI makes these for cross-attention, which UNETR has not: they never learn
            block.cross_attn, block.norm_cross_attn = nn.Identity(), nn.Identity()

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, channels, *grid) to feature maps at 1, 1/2, 1/4, 1/8 and 1/16 of the grid."""
        tokens = [side // _PATCH for side in images.shape[2:]]
        last, layers = self.vit(images)
        deep = [x.transpose(1, 2).unflatten(2, tokens) for x in (layers[3], layers[6], layers[9], last)]
        return [self.image(images), *(block(x) for block, x in zip(self.hidden, deep, strict=False)), deep[-1]]


class SwinEncoder(nn.Module):
    """MONAI's Swin transformer and the blocks on its outputs: images to six feature maps, the deepest last."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.swin = net.swinViT
        self.image = net.encoder1
        self.hidden = nn.ModuleList([net.encoder2, net.encoder3, net.encoder4, nn.Identity(), net.encoder10])

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, channels, *grid) to feature maps at 1, 1/2, 1/4, 1/8, 1/16 and 1/32 of the grid."""
        deep = self.swin(images, True)
        return [self.image(images), *(block(x) for block, x in zip(self.hidden, deep, strict=True))]


class UpDecoder(nn.Module):
    """MONAI's up-sampling blocks, the deepest first, each joined to the skip of its level."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, features: list[Tensor]) -> Tensor:
        """The features, deepest last, to (B, C, *grid)."""
        *skips, x = features
        for block in self.blocks:
            x = block(x, skips.pop())
        return x


def _norm_name(norm: Norm, width: int) -> tuple[str, dict[str, Any]]:
    return (norm, {"num_groups": math.gcd(8, width)} if norm == "group" else {"affine": True})


@model(
    "unetr",
    summary="UNETR (MONAI): a vision transformer as encoder, 2D or 3D, one grid only",
    paper="Hatamizadeh et al. 2022, UNETR: Transformers for 3D Medical Image Segmentation",
    url="https://arxiv.org/abs/2103.10504",
    presets={
        "paper": {},
        "small": {"feature_size": 8, "hidden_size": 96, "mlp_size": 384, "heads": 6, "grid": 32},
        "tiny": {"feature_size": 4, "hidden_size": 32, "mlp_size": 64, "heads": 4, "grid": 32},
    },
)
def unetr(
    channels: int,
    classes: int,
    dims: int = 3,
    *,
    feature_size: int = 16,
    hidden_size: int = 768,
    mlp_size: int = 3072,
    heads: int = 12,
    dropout: float = 0.0,
    norm: Norm = "instance",
    grid: int | Sequence[int] = 128,
) -> SegmentationNet:
    """UNETR for images of ``grid`` voxels and no others; tokens are patches of 16 voxels along each axis.

    Raises ``ValueError`` for a grid that 16 does not divide or heads that do not divide ``hidden_size``.
    """
    sides = (grid,) * dims if isinstance(grid, int) else tuple(grid)
    if len(sides) != dims or any(side < _PATCH or side % _PATCH for side in sides):
        raise ValueError(f"grid must be {dims} sides, each divisible by {_PATCH}, or one such number, not {grid}.")
    if heads < 1 or hidden_size % heads:
        raise ValueError(f"heads must divide hidden_size {hidden_size}, which {heads} does not.")
    from monai.networks.nets import UNETR as MonaiUNETR

    net = MonaiUNETR(
        in_channels=channels,
        out_channels=classes,
        img_size=sides,
        feature_size=feature_size,
        hidden_size=hidden_size,
        mlp_dim=mlp_size,
        num_heads=heads,
        dropout_rate=dropout,
        norm_name=_norm_name(norm, feature_size),
        spatial_dims=dims,
    )
    decoder = UpDecoder([net.decoder5, net.decoder4, net.decoder3, net.decoder2])
    stages = {"encoder": UnetrEncoder(net), "decoder": decoder, "head": net.out}
    return SegmentationNet(stages, channels=channels, dims=dims, step=_PATCH, exact=sides)


@model(
    "swin-unetr",
    summary="Swin UNETR (MONAI): attention in shifted windows as encoder, 2D or 3D",
    paper="Hatamizadeh et al. 2022, Swin UNETR: Swin Transformers for Semantic Segmentation of Brain Tumors in MRI",
    url="https://arxiv.org/abs/2201.01266",
    presets={
        "paper": {},
        "small": {"feature_size": 12, "heads": (1, 2, 4, 8), "window": 4, "norm": "group"},
        "tiny": {"feature_size": 12, "depths": (1, 1, 1, 1), "heads": (1, 2, 4, 8), "window": 2, "norm": "group"},
    },
)
def swin_unetr(
    channels: int,
    classes: int,
    dims: int = 3,
    *,
    feature_size: int = 48,
    depths: Sequence[int] = (2, 2, 2, 2),
    heads: Sequence[int] = (3, 6, 12, 24),
    window: int = 7,
    dropout: float = 0.0,
    norm: Norm = "instance",
) -> SegmentationNet:
    """Swin UNETR for any grid that 32 divides; ``depths`` and ``heads`` are those of its four levels.

    A grid of a single step (32 cubed) needs ``norm`` "group", or "batch" and more than one image. Raises ``ValueError``
    for a ``feature_size`` that 12 does not divide, or for depths or heads that are not four.
    """
    if feature_size < 12 or feature_size % 12:
        raise ValueError(f"feature_size must be divisible by 12, not {feature_size}.")
    if len(depths) != 4 or len(heads) != 4:
        raise ValueError(f"depths and heads must be four numbers each, not {tuple(depths)} and {tuple(heads)}.")
    if any(h < 1 or feature_size * 2**level % h for level, h in enumerate(heads)):
        widths = [feature_size * 2**level for level in range(4)]
        raise ValueError(f"heads must divide the widths {widths} of the four levels, which {tuple(heads)} do not.")
    from monai.networks.nets import SwinUNETR

    net = SwinUNETR(
        in_channels=channels,
        out_channels=classes,
        feature_size=feature_size,
        depths=tuple(depths),
        num_heads=tuple(heads),
        window_size=window,
        drop_rate=dropout,
        norm_name=_norm_name(norm, feature_size),
        spatial_dims=dims,
    )
    _forget_positions(net)
    decoder = UpDecoder([net.decoder5, net.decoder4, net.decoder3, net.decoder2, net.decoder1])
    stages = {"encoder": SwinEncoder(net), "decoder": decoder, "head": net.out}
    return SegmentationNet(stages, channels=channels, dims=dims, step=32, several=norm == "instance")


def _forget_positions(net: nn.Module) -> None:
    """Takes the tables of relative positions out of the state: they follow from the window and would only travel."""
    for part in net.modules():
        table = getattr(part, "relative_position_index", None)
        if isinstance(table, Tensor):
            part.register_buffer("relative_position_index", table, persistent=False)
