"""What a segmentation network is trained on: soft Dice and cross-entropy together."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def dice_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    lam: float = 0.5,
    *,
    denominator: Literal["squared", "linear"] = "squared",
    smooth: float = 1e-5,
    include_background: bool = True,
    batch_dice: bool = False,
    ignored: int | None = None,
) -> Tensor:
    """The loss lam * Dice + (1 - lam) * CE of the logits against the labels (FedSegNet eq. 11; its lam is 0.5).

    Shapes: ``logits`` (B, K, *grid), ``labels`` (B, *grid) of any integer type with values 0 to K - 1; the result has
    no axes. ``lam=1`` is Dice alone (section 6.6 of the paper), ``lam=0`` cross-entropy alone, which is the mean over
    all voxels. ``denominator`` is that of ``soft_dice``; the paper has both.

    The Dice part is averaged over the classes, the background (class 0) among them unless ``include_background`` is
    false, and over the images, each with a Dice of its own; with ``batch_dice`` the images of the batch count as one
    large image, which is steadier where a class is missing from many of them.

    Voxels whose label is ``ignored`` are in no sum and no mean, and have no gradient; where all are, the loss is 0 but
    for rounding.

    Raises ``ValueError`` where the shapes do not fit. To raise for a label that is not a class, the step would have to
    wait for the GPU, so such a label makes the loss and its gradient NaN; ``check_labels`` names it when data are read.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be between 0 (cross-entropy alone) and 1 (Dice alone), not {lam}.")
    if denominator not in ("squared", "linear"):
        raise ValueError(f"The Dice denominator is 'squared' or 'linear', not {denominator!r}.")
    _check_shapes(logits, labels)
    precise = torch.promote_types(logits.dtype, torch.float32)  # sums over millions of voxels need more than 16 bits
    log_p = F.log_softmax(logits.flatten(2).to(precise), 1)  # (B, K, N)
    classes = torch.arange(log_p.shape[1], device=labels.device).to(labels.dtype)
    # Masks in float32: masks of one byte save memory in an eager step, but take three times as long on a CPU. A gather,
    # or torch's own cross-entropy, would not have the same bits every time on a GPU.
    truth = (labels.flatten(1).unsqueeze(1) == classes[:, None]).to(precise)  # (B, K, N)
    judged = None if ignored is None else (labels.flatten(1) != ignored).to(precise)  # (B, N)
    loss = log_p.new_zeros(())
    if lam > 0:
        p = log_p.exp() if judged is None else log_p.exp() * judged.unsqueeze(1)
        dice = soft_dice(p, truth, denominator, smooth, batch_dice)
        loss = loss + lam * (1 - dice[:, 0 if include_background else 1 :].mean())
    if lam < 1:
        voxels = labels.numel() if judged is None else judged.sum().clamp_min(1)
        loss = loss - (1 - lam) * (truth * log_p).sum() / voxels
    return loss * torch.where((truth.sum(1) == (1 if judged is None else judged)).all(), 1.0, torch.nan)


def soft_dice(
    p: Tensor, truth: Tensor, denominator: str = "squared", smooth: float = 1e-5, batch: bool = False
) -> Tensor:
    """Dice of the probabilities ``p`` (B, K, N) with the masks ``truth`` (B, K, N), as numbers 0 and 1: (B, K).

    (2 sum p g + smooth) / (sum p^2 + sum g^2 + smooth) with the denominator "squared" (FedSegNet, eqs 6 and 12), and
    sum p + sum g there with "linear" (eq. 15). A class that is nowhere, and predicted nowhere, has a Dice of 1. With
    ``batch`` the sums run over the images too, and the result is (1, K).
    """
    overlap = (truth * p).sum(-1)
    size = (p.square() if denominator == "squared" else p).sum(-1) + truth.sum(-1)
    if batch:
        overlap, size = overlap.sum(0, keepdim=True), size.sum(0, keepdim=True)
    return (2 * overlap + smooth) / (size + smooth)


def check_labels(labels: Tensor, classes: int) -> None:
    """Raises ``ValueError`` where ``labels`` (any shape) holds anything but whole numbers from 0 to ``classes - 1``."""
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"Labels must be whole numbers, one per voxel, not {labels.dtype}: convert the label images.")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"Labels must lie between 0 and {classes - 1} for {classes} classes, but go from {int(labels.min())} to "
            f"{int(labels.max())}: map them to classes, or give the study more of them."
        )


def _check_shapes(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim < 3 or logits.shape[1] < 2:
        raise ValueError(f"Logits must be (batch, classes, *grid) with 2 or more classes, not {tuple(logits.shape)}.")
    if labels.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"Labels must be (batch, *grid) for logits (batch, classes, *grid), but are {tuple(labels.shape)} for "
            f"{tuple(logits.shape)}: the grids of image and label must be the same."
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"Labels must be whole numbers, one per voxel, not {labels.dtype}.")
