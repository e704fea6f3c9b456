"""What may leave in an answer, and how large it is at most: from the spec that the answer will be held to."""

from dataclasses import dataclass
from typing import Any

import torch

from fedscan import wire
from fedscan.schema import Kind, Schema, Weights
from fedscan.spec import LETTER, Array, Blob, Choice, Group, Leaves, Maybe, Number, Spec, Table, Text

DIGITS = 26  # letters of a number at most, with its comma
OTHERS = 64  # plain numbers beside what is declared, see ``Group``
NAMED = LETTER * 64 + 6  # bytes of the name of such a number at most
PADDING = 8


@dataclass(frozen=True)
class Part:
    """One entry of an answer: its name, what it is in words, and its bytes on the wire at most."""

    name: str
    what: str
    nbytes: int


def parts(group: Group, letters: int) -> tuple[Part, ...]:
    """The entries that an answer may hold; texts in tables have at most so many ``letters`` on the wire."""
    found = [Part(name, described(spec), nbytes(spec, letters)) for name, spec in group.entries.items()]
    if group.others is not None:
        most = OTHERS * (NAMED + nbytes(group.others, letters))
        found.append(Part("", f"up to {OTHERS} plain numbers, such as the loss and the count of steps", most))
    return tuple(found)


def most(group: Group, letters: int = LETTER * 200) -> int:
    """The bytes on the wire, at most, of a message or an answer that fits ``group``."""
    extra: list[int] = []
    return wire.pack({"": filled(group, extra, letters)}).nbytes + sum(extra) + PADDING


def nbytes(spec: Spec, letters: int) -> int:
    """The bytes on the wire, at most, of one entry without its name."""
    extra: list[int] = []
    empty = wire.pack({"": 0}).nbytes
    return max(0, wire.pack({"": filled(spec, extra, letters)}).nbytes - empty) + sum(extra)


def filled(spec: Spec, extra: list[int], letters: int) -> Any:
    """The largest tree that fits a spec, its tensors without memory; ``extra`` gets the bytes of what is not in it."""
    match spec:
        case Maybe(inner):
            return filled(inner, extra, letters)
        case Leaves(schema):
            made = {k: torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") for k, leaf in schema.items()}
            return Weights(made, {k: leaf.kind for k, leaf in schema.items()})
        case Blob(limit):
            return torch.empty(limit, dtype=torch.uint8, device="meta")
        case Array(shape, dtype, limit):
            return torch.empty([limit if n < 0 else n for n in shape], dtype=dtype, device="meta")
        case Text(limit):
            extra.append(LETTER * limit)
            return ""
        case Choice(words):
            return max(words, key=len)
        case Table():
            extra.append(spec.limit * (sum(in_row(column, letters) for column in spec.columns.values()) + 3))
            return []
        case Group(entries, others):
            if others is not None:
                extra.append(OTHERS * (NAMED + nbytes(others, letters)))
            return {name: filled(entry, extra, letters) for name, entry in entries.items()}
    extra.append(DIGITS)
    return 0


def in_row(spec: Spec, letters: int) -> int:
    """The bytes of one entry of a row at most: its text within the letters, escaped quotes and a comma."""
    return min(letters, LETTER * spec.limit) + 5 if isinstance(spec, Text) else nbytes(spec, letters)


def described(spec: Spec) -> str:
    """What a spec admits, in words for people."""
    match spec:
        case Maybe(inner):
            return f"perhaps {described(inner)}"
        case Leaves(schema):
            return leaves(schema)
        case Blob(limit):
            return f"a network's leaves in coded form, at most {limit:,} bytes"
        case Array(shape):
            return f"an array of {' x '.join('any' if n < 0 else str(n) for n in shape) or 'one'} numbers"
        case Text():
            return "a text"
        case Choice(words):
            return f"one of the words {', '.join(words)}"
        case Table():
            return f"a table of up to {spec.limit:,} rows of {', '.join(spec.columns)}"
        case Group(entries):
            return "; ".join(f"{name}: {described(entry)}" for name, entry in entries.items())
    return "a whole number" if isinstance(spec, Number) and spec.whole else "a number"


def leaves(schema: Schema) -> str:
    """Leaves by kind, and how many numbers they hold: "12 parameters (1,234 numbers) and 4 statistics (64 numbers)"."""
    said = []
    for kind in Kind:
        of = [leaf.numel for leaf in schema.values() if leaf.kind is kind]
        if of:
            said.append(f"{len(of):,} {kind}{'' if len(of) == 1 else 's'} ({sum(of):,} numbers)")
    return " and ".join(said) or "no leaf"
