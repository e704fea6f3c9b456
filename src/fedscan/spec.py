"""What an answer may hold. A site's reply, or a message, that does not fit is refused by a sentence.

``Refused`` is the one exception for what another party sent. A spec is a mapping of names to the kinds below; the
receiver makes it from its own study, so that no size in a message is ever believed.
"""

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedscan.schema import Schema, Weights


class Refused(ValueError):
    """What was sent does not fit what was asked. The text is one sentence, fit to be shown to people."""


@dataclass(frozen=True)
class Number:
    """A finite number between ``low`` and ``high``; None only where ``optional``."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    optional: bool = False

    def check(self, value: Any, where: str) -> None:
        if value is None and self.optional:
            return
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            raise Refused(f"{where} should be a {'whole ' if self.whole else ''}number, not {brief(value)}")
        if value != value or abs(value) > sys.float_info.max:  # a whole number may be too large for a float
            raise Refused(f"{where} is not finite")
        if not self.low <= value <= self.high:
            raise Refused(f"{where} is {brief(value)}, outside {self.low} to {self.high}")


@dataclass(frozen=True)
class Cases(Number):
    """How many training cases a site has. A run holds it to what the study knows, else to what the site said first."""

    low: float = 1
    high: float = 1_000_000
    whole: bool = True


@dataclass(frozen=True)
class Text:
    """Text of at most ``limit`` characters, all of them printable, so that it can go into any table and terminal."""

    limit: int = 200

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, str) or len(value) > self.limit or not value.isprintable():
            raise Refused(f"{where} should be text of at most {self.limit} printable characters, not {brief(value)}")


@dataclass(frozen=True)
class Choice:
    """One of these words."""

    words: tuple[str, ...]

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, str) or value not in self.words:
            raise Refused(f"{where} should be one of {', '.join(self.words)}, not {brief(value)}")


@dataclass(frozen=True)
class Leaves:
    """Weights with exactly these names, shapes, dtypes and kinds, all finite unless ``values`` are not looked at."""

    schema: Schema
    values: bool = True

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, Weights):
            raise Refused(f"{where} should be weights, not {brief(value)}")
        if value.keys() != self.schema.keys():
            odd = sorted(value.keys() ^ self.schema.keys())[0]
            raise Refused(f"{where} {'holds an unknown' if odd in value else 'lacks the'} leaf {odd[:80]!r}")
        for name, leaf in self.schema.items():
            got = value[name]
            if tuple(got.shape) != leaf.shape or got.dtype != leaf.dtype or value.kinds[name] != leaf.kind:
                raise Refused(
                    f"{where}: leaf {name!r} is {tuple(got.shape)} {got.dtype} {value.kinds[name]}, "
                    f"and should be {leaf.shape} {leaf.dtype} {leaf.kind}"
                )
            if self.values and not finite(got):
                raise Refused(f"{where}: leaf {name!r} is not finite")


@dataclass(frozen=True)
class Blob:
    """Bytes: a flat uint8 tensor of at most ``limit`` entries."""

    limit: int

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.ndim != 1:
            raise Refused(f"{where} should be bytes, not {brief(value)}")
        if value.numel() > self.limit:
            raise Refused(f"{where} has {value.numel()} bytes; at most {self.limit} were expected")


@dataclass(frozen=True)
class Array:
    """A finite tensor of this dtype and shape; -1 in the shape admits up to ``limit`` entries there."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    limit: int = 4096

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, Tensor) or value.dtype != self.dtype or value.ndim != len(self.shape):
            raise Refused(f"{where} should be a {self.dtype} tensor of shape {self.shape}, not {brief(value)}")
        for got, want in zip(value.shape, self.shape, strict=True):
            if (want >= 0 and got != want) or got > max(want, self.limit):
                raise Refused(f"{where} has shape {tuple(value.shape)}, and should have {self.shape}")
        if not finite(value):
            raise Refused(f"{where} is not finite")


@dataclass(frozen=True)
class Table:
    """A list of rows; each row has one entry per column, and fits it."""

    columns: Mapping[str, "Spec"]
    limit: int = 1_000_000

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) > self.limit:
            raise Refused(f"{where} should be a table of at most {self.limit} rows, not {brief(value)}")
        for i, row in enumerate(value):
            if not isinstance(row, list) or len(row) != len(self.columns):
                raise Refused(f"{where}: row {i} should have the entries {', '.join(self.columns)}")
            for (column, spec), entry in zip(self.columns.items(), row, strict=True):
                spec.check(entry, f"{where}: {column} of row {i}")


@dataclass(frozen=True)
class Maybe:
    """An entry that may be absent."""

    spec: "Spec"

    def check(self, value: Any, where: str) -> None:
        self.spec.check(value, where)


@dataclass(frozen=True)
class Group:
    """A mapping with these entries; where ``others`` is given, up to 64 further ones that fit it."""

    entries: Mapping[str, "Spec"]
    others: "Spec | None" = None

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping) or isinstance(value, Weights):
            raise Refused(f"{where} should have the entries {', '.join(self.entries)}, not be {brief(value)}")
        for name, spec in self.entries.items():
            if name in value:
                spec.check(value[name], f"{where}: {name}")
            elif not isinstance(spec, Maybe):
                raise Refused(f"{where} lacks {name!r}")
        rest = [name for name in value if name not in self.entries]
        if rest and self.others is None:
            raise Refused(f"{where} holds {rest[0][:80]!r}, which was not asked for")
        if len(rest) > 64:
            raise Refused(f"{where} holds {len(rest)} further entries; at most 64 are allowed")
        for name in rest:
            assert self.others is not None
            Text(64).check(name, f"{where}: the name of an entry")
            self.others.check(value[name], f"{where}: {name}")


Spec = Number | Text | Choice | Leaves | Blob | Array | Table | Maybe | Group


def form(spec: Spec) -> Spec:
    """The spec without a look at the values of weights and bytes: names, shapes, dtypes and sizes only."""
    match spec:
        case Maybe(inner):
            return Maybe(form(inner))
        case Leaves(schema):
            return Leaves(schema, values=False)
        case Blob(limit):
            return Blob(limit)
        case Group(entries, others):
            return Group({name: form(entry) for name, entry in entries.items()}, others)
    return spec


class Room(NamedTuple):
    """How much the header of a message may hold: entries (values, lists and mappings), and bytes."""

    nodes: int
    nbytes: int

    def times(self, count: int) -> "Room":
        """The room of so many."""
        return Room(self.nodes * count, self.nbytes * count)

    def at_most(self, other: "Room") -> "Room":
        """The smaller of two rooms."""
        return Room(min(self.nodes, other.nodes), min(self.nbytes, other.nbytes))


LETTER = 14  # bytes of a letter at most, once it is escaped and escaped again
LEAF = Room(20, 400)  # a tensor of up to eight axes is described by these, beside its name


def room(spec: Spec, path: int = 0) -> Room:
    """The room that the header of what fits ``spec`` takes at most; names of leaves stand below ``path`` letters."""
    match spec:
        case Maybe(inner):
            return room(inner, path)
        case Leaves(schema):
            return total(Room(LEAF.nodes + len(k), LEAF.nbytes + LETTER * (path + len(k) + 2)) for k in schema)
        case Blob() | Array():
            return Room(LEAF.nodes, LEAF.nbytes + LETTER * (path + 1))
        case Text():
            return Room(2, LETTER * spec.limit)
        case Choice(words):
            return Room(2, LETTER * max(map(len, words)))
        case Table():
            return total([*(room(column) for column in spec.columns.values()), Room(2, 4)]).times(spec.limit)
        case Group():
            named = [Room(2 + len(k), 8 + LETTER * len(k)) for k in spec.entries]
            held = [room(entry, path + len(k) + 1) for k, entry in spec.entries.items()]
            if spec.others is not None:
                held.append(total([room(spec.others, path + 65), Room(66, LETTER * 64)]).times(64))
            return total([Room(20, 200), *named, *held])
    return Room(2, 64)


def total(rooms: Iterable[Room]) -> Room:
    """The sum of rooms."""
    nodes, nbytes = 4, 64
    for one in rooms:
        nodes, nbytes = nodes + one.nodes, nbytes + one.nbytes
    return Room(nodes, nbytes)


def carries_weights(specs: Mapping[str, Spec] | Iterable[Spec]) -> bool:
    """Whether what fits these specs may hold a network's weights, or arrays made of them, coded or not."""
    some = specs.values() if isinstance(specs, Mapping) else specs
    for spec in some:
        match spec:
            case Leaves() | Blob() | Array():
                return True
            case Maybe(inner) if carries_weights([inner]):
                return True
            case Group(entries) if carries_weights(entries):
                return True
    return False


def finite(x: Tensor) -> bool:
    """Whether every entry is finite. One pass: the sum is finite unless an entry is not, or the sum overflows."""
    if not x.is_floating_point():
        return True
    return math.isfinite(x.sum().item()) or bool(torch.isfinite(x).all())


def brief(value: Any) -> str:
    """What something is, in a few words, however large or hostile it is."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping | list):
        return f"a {type(value).__name__.lower()} of {len(value)}"
    if isinstance(value, int) and abs(value) > 10**40:
        return "a very large number"
    return repr(value[:40] if isinstance(value, str) else value)[:40]
