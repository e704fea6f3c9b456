"""Says what is wrong with a study's text in one sentence: the file, the line, what was meant, what is allowed."""

import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fedscan.run import Problem

Path_ = tuple[str, ...]
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Places:
    """A study's file, the line of each of its keys, and the keys that the command line has set."""

    file: Path
    lines: Mapping[Path_, int] = field(default_factory=dict)
    given: frozenset[Path_] = frozenset()  # by --set

    def of(self, path: Path_) -> str:
        """Where a key stands, or the nearest table around it: "study.toml, line 12"."""
        for n in range(len(path), 0, -1):
            if path[:n] in self.given:
                return f"--set {'.'.join(path[:n])}"
            if path[:n] in self.lines:
                return f"{self.file}, line {self.lines[path[:n]]}"
        return str(self.file)

    def wrong(self, path: Path_, value: Any, allowed: str, near: Iterable[str] = ()) -> Problem:
        """A value that cannot be used, with what may stand there."""
        meant = meant_by(value, near)
        return Problem(f"{self.of(path)}: {'.'.join(path)} = {shown(value)}, but {allowed} belongs there{meant}.")

    def unknown(self, path: Path_, known: Sequence[str], elsewhere: Mapping[str, str]) -> Problem:
        """A key that does not exist, with those that do and perhaps the table where it would belong."""
        *above, key = path
        table = f"[{'.'.join(above)}] has" if above else "a study has, outside its tables,"
        meant = f" (it belongs in [{elsewhere[key]}])" if key in elsewhere else meant_by(key, known)
        return Problem(f"{self.of(path)}: {table} no key {key!r}{meant}; known keys: {', '.join(known)}.")


def lines_of(text: str) -> dict[Path_, int]:
    """The line (from 1) at which each table and each key of a valid TOML text begins.

    A statement is the shortest run of lines that is TOML by itself, so tomllib decides what belongs to it.
    """
    found: dict[Path_, int] = {}
    table: Path_ = ()
    waiting, start = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        if not waiting:
            start = number
        waiting += line + "\n"
        try:
            statement = tomllib.loads(waiting)
        except tomllib.TOMLDecodeError:
            continue
        if waiting.lstrip().startswith("["):
            table = max(keys_of(statement), key=len)
            found.setdefault(table, start)
        else:
            for path in keys_of(statement):
                found.setdefault(table + path, start)
        waiting = ""
    return found


def keys_of(tree: Any, above: Path_ = ()) -> Iterator[Path_]:
    """The paths of all keys in nested tables."""
    if isinstance(tree, list):
        for entry in tree:
            yield from keys_of(entry, above)
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield (*above, key)
            yield from keys_of(value, (*above, key))


def checked(model: type[M], table: Any, at: Path_, places: Places, elsewhere: Mapping[str, str] = {}) -> M:
    """A table of the study as ``model`` describes it. Raises Problem for the first key or value that does not fit."""
    if not isinstance(table, Mapping):
        raise places.wrong(at, table, f"a table, [{'.'.join(at)}],")
    for key in table:
        if key not in model.model_fields:
            raise places.unknown((*at, key), list(model.model_fields), elsewhere)
    try:
        return model.model_validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as e:
        error = e.errors()[0]
    loc = error["loc"]
    if not loc:
        raise Problem(f"{places.of(at)}: {sentence(error)}.")
    key = str(loc[0])
    kind = model.model_fields[key]
    if error["type"] == "missing" and len(loc) == 1:
        raise Problem(f"{places.of(at)}: [{'.'.join(at)}] lacks {key!r}, {words(kind)}.")
    if error["type"] == "value_error":
        raise Problem(f"{places.of((*at, key))}: {'.'.join((*at, key))} = {shown(table[key])}: {sentence(error)}.")
    inner = [str(step) for step in loc[1:2] if isinstance(table[key], Mapping) and step in table[key]]
    raise places.wrong((*at, key, *inner), table[key][inner[0]] if inner else table[key], words(kind), choices(kind))


def sentence(error: Mapping[str, Any]) -> str:
    """What a validator of ours said, without pydantic's words before it."""
    return str(error.get("ctx", {}).get("error", error["msg"])).rstrip(".")


def shown(value: Any) -> str:
    """A value as TOML writes it, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def meant_by(got: Any, known: Iterable[str]) -> str:
    """ " (was 'x' meant?)", where one of the known words is close."""
    near = get_close_matches(str(got), list(known), 1)
    return f" (was {near[0]!r} meant?)" if near else ""


def choices(kind: Any) -> list[str]:
    """The words that an annotation admits."""
    if isinstance(kind, FieldInfo):
        kind = kind.annotation
    if get_origin(kind) is Literal:
        return [v for v in get_args(kind) if isinstance(v, str)]
    return [v for inner in get_args(kind) for v in choices(inner)]


def words(kind: Any, limits: Sequence[Any] = ()) -> str:
    """What an annotation admits, in words: "a number above 0", 'one of "sgd", "adam"'."""
    if isinstance(kind, FieldInfo):
        if kind.description:
            return kind.description
        return words(kind.annotation, kind.metadata)
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return words(
            inside[0], [limit for i in inside[1:] for limit in (i.metadata if hasattr(i, "metadata") else [i])]
        )
    if origin is Literal:
        return ("one of " if len(inside) > 1 else "") + ", ".join(json.dumps(v) for v in inside)
    if origin in (UnionType, Union):
        return " or ".join(words(k, limits) for k in inside if k is not NoneType)
    if origin is tuple and Ellipsis not in inside:
        return f"a list of {len(inside)}, each {words(inside[0])},"
    if origin in (tuple, list, Sequence) or getattr(origin, "__name__", "") == "Sequence":
        return f"a list, each {words(inside[0])},"
    if origin is not None and issubclass(origin, Mapping):
        if get_origin(inside[0]) is Literal:
            return "{ " + ", ".join(f"{key} = {words(inside[1])}" for key in get_args(inside[0])) + " }"
        return f"for each name {words(inside[1])}"
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return plain.get(kind, "something else") + ranged(limits)


def ranged(limits: Sequence[Any]) -> str:
    """The limits of a number, in words."""
    said = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    found = [
        f"{word} {getattr(limit, name)}" for limit in limits for name, word in said.items() if hasattr(limit, name)
    ]
    return " " + " and ".join(found) if found else ""
