"""The table of all tasks: segmentation, and what installed packages bring.

A package adds a task by an entry point of the group "fedscan.tasks" that names a function decorated with ``@task``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fedscan.plugins import OWN, Origin, loaded, offered, origin_of
from fedscan.tasks.segmentation import Segmentation

GROUP = "fedscan.tasks"
# What a task is made from, by the study and its data; all else in its function's signature is for [task] to set.
GIVEN = ("networks", "labels", "classes", "window", "tolerance", "hd95", "penalty", "ignored")


@dataclass(frozen=True)
class TaskCard:
    """A task's name, the function that makes it, and the package it comes from.

    ``make(networks, labels, classes, window, tolerance, hd95, **options)`` gives a ``fedscan.site.Task``; what these
    are is said in ``Segmentation``. A study that is to segment new scans needs a task with ``predict`` as well. A task
    may take ``penalty`` and ``ignored`` too; a study that needs one of them is refused by a task that does not.
    """

    name: str
    make: Callable[..., Any]
    origin: Origin = OWN


def task(name: str) -> Callable[[Callable[..., Any]], TaskCard]:
    """Turns a function that makes a task into its card; ``[task] kind = name`` then chooses it."""
    return lambda make: TaskCard(name, make)


@task("segmentation")
def segmentation(
    networks: Mapping[str, Callable[[], nn.Module]],
    labels: Mapping[str, int | Sequence[int]],
    classes: int,
    window: tuple[int, ...] | None,
    tolerance: Mapping[str, float],
    hd95: str,
    penalty: str | None = None,
    ignored: int | None = None,
    **loss: Any,
) -> Segmentation:
    """Every voxel gets a class: Dice and cross-entropy, scored by Dice, HD95 and volumes per label.

    ``loss`` are options of ``dice_cross_entropy``.
    """
    return Segmentation(networks, labels, classes, loss, window, tolerance, hd95, penalty, ignored)


def tasks() -> dict[str, TaskCard]:
    """Every task by name, fedscan's own first.

    ValueError where two packages bring the same name, or an entry point is not a function with a card.
    """
    found = {segmentation.name: segmentation}
    for point in offered(GROUP):
        card = loaded(point)
        if not isinstance(card, TaskCard):
            raise ValueError(
                f"the entry point {point.value!r} of group {GROUP!r} is not a function decorated with @task"
            )
        if card.name in found:
            raise ValueError(f"two packages bring a task {card.name!r}: {found[card.name].origin.package} and another")
        found[card.name] = replace(card, origin=origin_of(point, card.make))
    return found
