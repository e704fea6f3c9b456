"""What happens to an update on its way: made small at one end, made whole at the other.

A channel remembers what coding lost (error feedback): ``encode`` is given that rest, adds it, and returns the new one.
The decoder is given the schema that both sides know and believes no size in the message.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedscan import trees
from fedscan.compress import Codec
from fedscan.schema import Schema, Weights
from fedscan.spec import Blob, Leaves, Refused, Spec

Rest = Weights | None
Above = Mapping[Literal["above"], float]  # a threshold: what is larger travels


@dataclass(frozen=True)
class Channel:
    """Two ends and what passes between them.

    encode  (update, rest, generator) -> (what travels, new rest or None)
    decode  (what travelled, schema) -> update
    gives   (schema) -> the spec of what travels
    """

    encode: Callable[[Weights, Rest, torch.Generator], tuple[Any, Rest]]
    decode: Callable[[Any, Schema], Weights]
    gives: Callable[[Schema], Spec]


def _as_it_is(update: Weights, rest: Rest, draw: torch.Generator) -> tuple[Any, Rest]:
    return update, None


whole = Channel(_as_it_is, lambda sent, schema: sent, Leaves)
"""The update as it is, in its own precision."""


@dataclass(frozen=True)
class Coded(Blob):
    """Bytes that decode to finite leaves of the schema. What does not is refused before a method sees it."""

    decode: Callable[[Tensor], Weights]

    def check(self, value: Any, where: str) -> None:
        super().check(value, where)
        try:
            self.decode(value)
        except ValueError as e:
            raise Refused(f"{where} cannot be decoded: {e}") from e


def codec(fraction: float | Above, bits: int) -> Codec:
    """The codec of these settings: the largest entries up to a fraction, or all ``{"above": threshold}``."""
    return Codec(bits=bits, threshold=fraction["above"]) if isinstance(fraction, Mapping) else Codec(fraction, bits)


def sparse(fraction: float | Above = 0.1, bits: int = 8, feedback: bool = True) -> Channel:
    """The largest ``fraction`` of each parameter's entries, quantised to ``bits`` (8, 16 or 32).

    With ``{"above": threshold}`` for a fraction, all entries of a larger magnitude, be they many or none.

    With feedback, what sparsifying and quantising lost is kept at the sender and added to its next update, and values
    are rounded to the nearest step; without, they are rounded at random, so that the mean is right. Running statistics
    and counters travel whole: the next round measures them anew, so a rest would count twice.
    """
    if fraction == 1 and bits == 32:
        return whole
    made = codec(fraction, bits)

    def encode(update: Weights, rest: Rest, draw: torch.Generator) -> tuple[Any, Rest]:
        try:
            blob, lost = made.encode(update, rest, rng=None if feedback else draw)
        except ValueError as e:
            raise Refused(f"the update cannot be sent: {e}") from e
        return blob, lost if feedback else None

    def gives(schema: Schema) -> Spec:
        most = made.bound(schema)
        return Coded(most + most // 256 + 512, lambda blob: made.decode(blob, schema))  # zstd's own worst case

    return Channel(encode, made.decode, gives)


def after(change: Callable[[Weights], Weights], channel: Channel) -> Channel:
    """Applies ``change`` (clipping, noise) to the update before ``channel`` codes it. It is not undone."""

    def encode(update: Weights, rest: Rest, draw: torch.Generator) -> tuple[Any, Rest]:
        return channel.encode(change(update), rest, draw)

    return Channel(encode, channel.decode, channel.gives)


def clipped(limit: float) -> Callable[[Weights], Weights]:
    """Scales an update down to the norm ``limit`` (over all its parameters) where it is longer."""

    def change(update: Weights) -> Weights:
        length = trees.norm(update)
        return update if length <= limit else trees.scale(update, limit / length)

    return change
