"""The two baselines that share FedSegNet's blocks: the U-Net, and the same without skip connections."""

from collections.abc import Sequence

from fedscan.models.blocks import Norm, SegmentationNet
from fedscan.models.card import model
from fedscan.models.fedsegnet import PRESETS, encoder_decoder

_WIDTHS = {name: {k: v for k, v in options.items() if k == "widths"} for name, options in PRESETS.items()}


@model(
    "unet",
    summary="U-Net, 2D or 3D: FedSegNet without its transformer",
    paper="Çiçek et al. 2016, 3D U-Net: Learning Dense Volumetric Segmentation from Sparse Annotation",
    url="https://arxiv.org/abs/1606.06650",
    presets=_WIDTHS,
)
def unet(
    channels: int,
    classes: int,
    dims: int = 3,
    *,
    widths: Sequence[int] = (16, 32, 64, 128, 256),
    norm: Norm = "instance",
) -> SegmentationNet:
    """The U-Net with ``widths`` channels per level: the "Federated U-Net" and "U-Net" of FedSegNet's tables."""
    return encoder_decoder(channels, classes, dims, widths, norm)


@model(
    "cnn",
    summary="Convolutional encoder and decoder without skip connections, 2D or 3D",
    paper="Fareed et al. 2025, FedSegNet, table 1, row Traditional FL",
    presets=_WIDTHS,
)
def cnn(
    channels: int,
    classes: int,
    dims: int = 3,
    *,
    widths: Sequence[int] = (16, 32, 64, 128, 256),
    norm: Norm = "instance",
) -> SegmentationNet:
    """The U-Net's blocks with nothing but the deepest features handed to the decoder: "CNN" in FedSegNet's table 1."""
    return encoder_decoder(channels, classes, dims, widths, norm, skips=False)
