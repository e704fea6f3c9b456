"""Which sites take part in a round."""

from collections.abc import Callable, Sequence

import torch

Pick = Callable[[Sequence[str], torch.Generator], Sequence[str]]


def everyone(names: Sequence[str], draw: torch.Generator) -> Sequence[str]:
    """All sites, every round."""
    return names


def some(number: int) -> Pick:
    """``number`` sites, drawn anew each round without replacement."""

    def pick(names: Sequence[str], draw: torch.Generator) -> Sequence[str]:
        if number >= len(names):
            return names
        return sorted(names[i] for i in torch.randperm(len(names), generator=draw)[:number].tolist())

    return pick
