"""The table of all networks, and the one way to build one."""

from typing import Any

from torch import nn

from fedscan.models.card import ModelCard, refusal
from fedscan.models.fedsegnet import fedsegnet
from fedscan.models.monai_nets import swin_unetr, unetr
from fedscan.models.unet import cnn, unet

__all__ = ["ModelCard", "build", "models"]

_CARDS = {card.name: card for card in (fedsegnet, unet, cnn, unetr, swin_unetr)}


def models() -> dict[str, ModelCard]:
    """Every network's card by name."""
    return dict(_CARDS)


def build(name: str, channels: int, classes: int, dims: int = 3, **options: Any) -> nn.Module:
    """Makes the network ``name``: images (B, channels, *grid) to logits (B, classes, *grid), ``dims`` axes in a grid.

    ``options`` are those on the card, and ``preset`` names a set of them; an option given beside a preset wins.
    Initial weights are drawn from torch's default generator, which the caller seeds.

    Raises ``ValueError``, in one sentence that names what is allowed, for a wrong name, option or value.
    """
    if name not in _CARDS:
        raise ValueError(refusal("model", name, _CARDS))
    for what, value in (("channels", channels), ("classes", classes)):
        if value < 1:
            raise ValueError(f"Model {name!r} needs at least 1 of {what}, not {value}.")
    if dims not in (2, 3):
        raise ValueError(f"Model {name!r} takes images of 2 or 3 axes (dims), not {dims}.")
    card = _CARDS[name]
    return card.build(channels, classes, dims, **card.resolve(options))
