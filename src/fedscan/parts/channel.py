"""What happens to an update on its way: made small at one end, made whole at the other.

A channel remembers what coding lost (error feedback): ``encode`` is given that rest, adds it, and returns the new one.
The decoder is given the schema that both sides know and believes no size in the message.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fedscan import compress, trees
from fedscan.schema import Schema, Weights
from fedscan.spec import Blob, Leaves, Spec

Rest = Weights | None


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


def sparse(fraction: float = 0.1, bits: int = 8, feedback: bool = True) -> Channel:
    """The largest ``fraction`` of each parameter's entries, quantised to ``bits`` (8, 16 or 32).

    With feedback, what sparsifying and quantising lost is kept at the sender and added to its next update. Running
    statistics and counters travel whole: the next round measures them anew, so a rest would count twice.
    """

    def encode(update: Weights, rest: Rest, draw: torch.Generator) -> tuple[Any, Rest]:
        blob, lost = compress.encode(update, rest, fraction=fraction, bits=bits, generator=draw)
        return blob, lost if feedback else None

    return Channel(encode, compress.decode, lambda schema: Blob(compress.bound(schema, fraction, bits)))


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
