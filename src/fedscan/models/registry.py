"""The table of all networks, fedscan's own and those of installed packages, and the one way to build one.

A package adds networks by an entry point of the group "fedscan.models" that names a builder decorated with ``@model``.
"""

from dataclasses import replace
from typing import Any

from torch import nn

from fedscan.models.card import ModelCard, refusal
from fedscan.models.fedsegnet import fedsegnet
from fedscan.models.monai_nets import swin_unetr, unetr
from fedscan.models.unet import cnn, unet
from fedscan.plugins import loaded, offered, origin_of

__all__ = ["ModelCard", "build", "models"]

GROUP = "fedscan.models"
_CARDS = {card.name: card for card in (fedsegnet, unet, cnn, unetr, swin_unetr)}


def models() -> dict[str, ModelCard]:
    """Every network's card by name, fedscan's own first.

    ValueError where two packages bring the same name, or an entry point is not a builder with a card.
    """
    found = dict(_CARDS)
    for point in offered(GROUP):
        card = loaded(point)
        if not isinstance(card, ModelCard):
            raise ValueError(
                f"the entry point {point.value!r} of group {GROUP!r} is not a builder decorated with @model"
            )
        if card.name in found:
            raise ValueError(f"two packages bring a model {card.name!r}: {found[card.name].origin.package} and another")
        found[card.name] = replace(card, origin=origin_of(point, card.build))
    return found


def build(name: str, channels: int, classes: int, dims: int = 3, **options: Any) -> nn.Module:
    """Makes the network ``name``: images (B, channels, *grid) to logits (B, classes, *grid), ``dims`` axes in a grid.

    ``options`` are those on the card, and ``preset`` names a set of them; an option given beside a preset wins.
    Initial weights are drawn from torch's default generator, which the caller seeds.

    Raises ``ValueError``, in one sentence that names what is allowed, for a wrong name, option or value.
    """
    cards = _CARDS if name in _CARDS else models()
    if name not in cards:
        raise ValueError(refusal("model", name, cards))
    for what, value in (("channels", channels), ("classes", classes)):
        if value < 1:
            raise ValueError(f"Model {name!r} needs at least 1 of {what}, not {value}.")
    if dims not in (2, 3):
        raise ValueError(f"Model {name!r} takes images of 2 or 3 axes (dims), not {dims}.")
    card = cards[name]
    return card.build(channels, classes, dims, **card.resolve(options))
