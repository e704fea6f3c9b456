"""All sites' cases at one site, and as many optimiser steps as the sites would take together."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Generator

from fedscan.site import Batch, Split
from fedscan.step import Step

POOLED = "pooled"  # the one site of a centralised study
T = TypeVar("T")


def pooled(of: Mapping[str, Mapping[str, Sequence[T]]]) -> dict[str, tuple[T, ...]]:
    """All sites' cases by split, sites in name order; each case still knows its own site."""
    names = ("train", "validation", "test")
    return {name: tuple(case for site in sorted(of) for case in of[site][name]) for name in names}


class EqualSteps:
    """Training cases of which one epoch is a whole round: as many batches as all sites' local epochs have.

    A site's epoch ends with a smaller batch where its cases do not divide, so pooled epochs alone would be fewer
    steps. What is lacking comes from further passes over the cases, in an order of their own.
    """

    def __init__(self, split: Split, sizes: Sequence[int], step: Step) -> None:
        self.split, self.sizes, self.step = split, tuple(sizes), step
        self.names, self.subjects = split.names, split.subjects

    def __len__(self) -> int:
        return len(self.split)

    def case(self, i: int) -> tuple[Batch, Any]:
        """Case ``i`` whole, not augmented."""
        return self.split.case(i)

    def batches(self, size: int, order: Generator, augment: Generator) -> Iterator[Batch]:
        """The batches of one round, ``size`` cases each but for the last of a pass."""
        left = sum(steps_of(n, size, self.step) for n in self.sizes) * self.step.accumulate
        while left:
            for batch in self.split.batches(size, order, augment):
                yield batch
                left -= 1
                if not left:
                    return


def steps_of(cases: int, batch: int, step: Step) -> int:
    """How many optimiser steps a site of so many training cases takes in a round."""
    return math.ceil(step.epochs * math.ceil(cases / batch) / step.accumulate)
