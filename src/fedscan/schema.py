"""What a tensor is: every leaf of a model has a name, a shape, a dtype and a kind.

Share, channel, merge, step and wire decide by kind, never by name. A running variance that is given momentum turns
negative and a mean of counters is not a counter, so the three kinds are told apart here, once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class Kind(StrEnum):
    """What a leaf holds, and so what may be done to it."""

    PARAMETER = "parameter"  # learned by gradient
    STATISTIC = "statistic"  # measured from data: a running mean or variance
    COUNTER = "counter"  # a whole number of something, such as batches seen


@dataclass(frozen=True)
class Leaf:
    """One tensor's place in a schema."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind

    @property
    def numel(self) -> int:
        """How many entries the leaf has."""
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def nbytes(self) -> int:
        """How many bytes the leaf takes, uncompressed."""
        return self.numel * self.dtype.itemsize


Schema = dict[str, Leaf]


class Weights(dict[str, Tensor]):
    """A model's leaves by name, each with its kind.

    A plain mapping of names to tensors that knows the ``kinds`` of its leaves. Names without a kind are parameters
    where they are floating and counters where they are not.
    """

    __slots__ = ("kinds",)

    def __init__(self, leaves: Mapping[str, Tensor], kinds: Mapping[str, Kind] | None = None) -> None:
        super().__init__(leaves)
        kinds = kinds or {}
        self.kinds: dict[str, Kind] = {k: kinds.get(k) or default_kind(v) for k, v in leaves.items()}

    def only(self, names: Iterable[str]) -> "Weights":
        """The same leaves (not copied), restricted to ``names``, in this mapping's order."""
        wanted = set(names)
        return Weights({k: v for k, v in self.items() if k in wanted}, self.kinds)

    def of(self, *kinds: Kind) -> "Weights":
        """The same leaves (not copied), restricted to ``kinds``."""
        return self.only(k for k in self if self.kinds[k] in kinds)

    @property
    def schema(self) -> Schema:
        """Name, shape, dtype and kind of every leaf."""
        return {k: Leaf(tuple(v.shape), v.dtype, self.kinds[k]) for k, v in self.items()}


def default_kind(leaf: Tensor) -> Kind:
    """The kind of a leaf nobody has named: floating leaves are learned, whole numbers are counted."""
    return Kind.PARAMETER if leaf.is_floating_point() or leaf.is_complex() else Kind.COUNTER


def kinds_of(model: nn.Module) -> dict[str, Kind]:
    """The kind of every entry of ``model.state_dict()``, found by what it is and not by what it is called."""
    return _kinds(model, model.state_dict(keep_vars=True))


_FOUND: WeakKeyDictionary[nn.Module, dict[str, Kind]] = WeakKeyDictionary()  # a walk per answer would cost as a step


def _kinds(model: nn.Module, leaves: Mapping[str, Tensor]) -> dict[str, Kind]:
    found = _FOUND.get(model)
    if found is None or found.keys() != leaves.keys():
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        measured = {name: Kind.STATISTIC if v.is_floating_point() else Kind.COUNTER for name, v in leaves.items()}
        found = _FOUND[model] = {k: Kind.PARAMETER if k in parameters else measured[k] for k in leaves}
    return found


def weights_of(model: nn.Module) -> Weights:
    """The model's own leaves (views, not copies), with their kinds."""
    leaves = model.state_dict()
    return Weights(leaves, _kinds(model, leaves))


def schema_of(model: nn.Module) -> Schema:
    """Name, shape, dtype and kind of every leaf of ``model``."""
    return weights_of(model).schema
