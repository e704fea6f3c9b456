"""A study file: read, checked, every default filled in, and hashed."""

import copy
import hashlib
import json
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedscan import __version__
from fedscan.data.augment import Augmentation, Intensity
from fedscan.run import Problem
from fedscan.step import Step
from fedscan.studyfile.devices import auto
from fedscan.studyfile.places import Path_, Places, checked, lines_of
from fedscan.studyfile.sections import TABLES, Data, Partition, Run, Scores, Table, Top, of_options, of_task

FREE = ("method", "methods", "model")  # tables whose keys depend on a name in them
# What is not part of a study's hash: where its data lie, what it is compared with, and what stands in its numerics.
NOT_HASHED = {("data", "cases"), ("run", "baselines"), ("run", "device"), ("run", "threads"), ("run", "mode")}
NEWER = {("scores", "penalty"): None}  # what a study without the key means by it: hashed only where it says otherwise


@dataclass(frozen=True)
class StudyFile:
    """A study as its file says it, checked, with every default filled in."""

    path: Path
    text: str
    top: Top
    tables: Mapping[str, Any]  # by dotted name
    method: str
    method_options: Mapping[str, Any]
    model: str
    model_options: Mapping[str, Any]
    step: Step
    augmentation: Augmentation | None
    places: Places = field(compare=False)
    raw: Mapping[str, Any] = field(compare=False)

    def by(self, method: str) -> "StudyFile":
        """The same study and network by another method, with the hyperparameters that [methods.NAME] gives it.

        Raises Problem for a method that does not exist or does not suit the study.
        """
        raw = {**self.raw, "model": {"name": self.model, **self.model_options}}
        raw["method"] = {"name": method, **raw.get("methods", {}).get(method, {})}
        return read(raw, self.places, "", None)

    def on(self, cases: Path) -> "StudyFile":
        """The same study on the cases in another folder."""
        data = self.data.model_copy(update={"cases": str(cases)})
        places = replace(self.places, given=self.places.given | {("data", "cases")})
        return replace(self, tables={**self.tables, "data": data}, places=places)

    @property
    def data(self) -> Data:
        """Which scans, and how they become arrays."""
        found: Data = self.tables["data"]
        return found

    @property
    def partition(self) -> Partition:
        """At which sites the cases are."""
        found: Partition = self.tables["data.partition"]
        return found

    @property
    def run(self) -> Run:
        """How the study is run."""
        found: Run = self.tables["run"]
        return found

    @property
    def scores(self) -> Scores:
        """How masks are scored."""
        found: Scores = self.tables["scores"]
        return found

    @property
    def rounds(self) -> int:
        """How many rounds the study has."""
        return int(self.tables["train"].rounds)

    @property
    def name(self) -> str:
        """The study's name; that of its file where it has none."""
        return self.top.name or self.path.stem

    @property
    def folder(self) -> str:
        """The study's name as that of one folder: what would lead elsewhere, or hide it, becomes a dash."""
        plain = "".join("-" if c in "/\\" or not c.isprintable() else c for c in self.name.strip())
        return f"-{plain[1:]}" if plain.startswith(".") else plain or "study"

    @property
    def source(self) -> str:
        """Where the scans are: "demo", or a path that is absolute or relative to the working directory."""
        cases = self.data.cases
        if cases in ("", "demo") or ("data", "cases") in self.places.given:
            return cases
        return str(self.path.parent / cases)

    @property
    def data_seed(self) -> int:
        """Decides who trains and who tests, and at which simulated site a subject is."""
        return self.top.seed if self.data.seed is None else self.data.seed

    @property
    def device(self) -> str:
        """The device to train on, "auto" resolved."""
        return auto() if self.run.device == "auto" else self.run.device

    def resolved(self) -> dict[str, Any]:
        """The whole study as plain data, every default filled in; ``again`` makes the same study of it."""
        tree: dict[str, Any] = {**self.top.model_dump(mode="json"), "name": self.name}
        for name, table in self.tables.items():
            *above, last = name.split(".")
            place = tree
            for step in above:
                place = place[step]
            place[last] = table.model_dump(mode="json")
        tree["method"] = {"name": self.method, **self.method_options}
        tree["model"] = {"name": self.model, **self.model_options}
        found: dict[str, Any] = json.loads(json.dumps(tree))
        return found

    def numerics(self) -> dict[str, Any]:
        """What else decides the last bits: threads, kind of device, versions of torch and fedscan, and the mode."""
        import torch

        run = self.run
        return {"threads": run.threads, "device": self.device.split(":")[0], "torch": torch.__version__,
                "fedscan": __version__, "mode": run.mode}  # fmt: skip

    def canonical(self) -> dict[str, Any]:
        """What is hashed: the resolved study without where things lie, its plug-ins, and the numerics."""
        tree = self.resolved()
        same = {(table, key) for (table, key), meant in NEWER.items() if tree[table][key] == meant}
        for table, key in NOT_HASHED | same:
            del tree[table][key]
        return {"study": tree, "plugins": self.plugins(), "numerics": self.numerics()}

    def plugins(self) -> dict[str, Any]:
        """Package, version and source hash of a method, model or task that another package brings."""
        from fedscan.methods.registry import get
        from fedscan.models.registry import models
        from fedscan.plugins import OWN, Origin
        from fedscan.tasks.registry import tasks

        entry = get(self.method)
        origins = {
            "method": Origin(entry.package, entry.version, entry.digest),
            "model": models()[self.model].origin,
            "task": tasks()[self.tables["task"].kind].origin,
        }
        return {
            what: {"package": origin.package, "version": origin.version, "sha256": origin.digest}
            for what, origin in origins.items()
            if origin.package != OWN.package
        }

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical study: equal for studies that mean the same, however they are written."""
        return digest(self.canonical())


def digest(tree: Any) -> str:
    """SHA-256 of a tree's canonical JSON: keys sorted, no blanks, text as UTF-8."""
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def load(path: str | Path, overrides: Sequence[str] = (), data: str | Path | None = None) -> StudyFile:
    """Reads a study file; ``overrides`` are "table.key=value", ``data`` replaces [data] cases.

    Raises Problem, in one sentence with file and line, for whatever does not fit.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        why = "is not UTF-8 text" if isinstance(e, UnicodeDecodeError) else (e.strerror or str(e)).lower()
        raise Problem(f"{path}: {why}; a study file (TOML) was meant.") from e
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        said = str(e)
        sentence, _, at = said.rpartition(" (at ")
        where = at.rstrip(")") if sentence else "end"
        raise Problem(f"{path}, {where}: this is not TOML: {sentence or said}.") from e
    given = set()
    file_method = raw["method"].get("name") if isinstance(raw.get("method"), dict) else None
    for override in overrides:
        given.add(override_one(raw, override))
    if data is not None:
        put(raw, ("data", "cases"), "demo" if str(data) == "demo" else str(Path(data)), "--data")
        given.add(("data", "cases"))
    places = Places(path, lines_of(text), frozenset(given))
    return read(raw, places, text, file_method)


def again(resolved: Mapping[str, Any], path: Path) -> StudyFile:
    """The study that ``StudyFile.resolved`` described."""
    return read(json.loads(json.dumps(resolved)), Places(path), "", None)


def override_one(raw: dict[str, Any], override: str) -> Path_:
    """Puts "table.key=value" into the raw study; the value is TOML, and text where it is not. Returns the key."""
    key, equals, value = override.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise Problem(f"--set {override}: table.key=value was meant, such as --set train.rounds=3.")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError as e:
        parsed = value.strip()
        if parsed.startswith("["):
            meant = f": --set {shlex.quote(f'{key}={listed(parsed)}')}" if listed(parsed) else "."
            raise Problem(f"--set {override}: no list in TOML; a shell takes quotes away, so in quotes{meant}") from e
    put(raw, path, parsed, f"--set {override}")
    return path


def listed(text: str) -> str:
    """The list that a text was meant for, with its words in quotes again, as a shell had taken them away.

    Empty for lists in a list, of which too much is lost.
    """
    if "[" in text[1:]:
        return ""
    items = [item.strip(" \"'") for item in text.strip("[] ").split(",")]
    number = re.compile(r"[-+]?\d[\d.]*(e[-+]?\d+)?|true|false")
    found = [item if number.fullmatch(item) else json.dumps(item, ensure_ascii=False) for item in items if item]
    return f"[{', '.join(found)}]"


def put(raw: dict[str, Any], path: Path_, value: Any, where: str) -> None:
    """Sets a key in nested tables; Problem where something above it is no table."""
    for n, step in enumerate(path[:-1], 1):
        raw = raw.setdefault(step, {})
        if not isinstance(raw, dict):
            raise Problem(f"{where}: {'.'.join(path[:n])} is a value, and has no keys.")
    raw[path[-1]] = value


def read(raw: dict[str, Any], places: Places, text: str, file_method: str | None) -> StudyFile:
    """The study that a tree of tables describes. Raises Problem for the first thing that does not fit."""
    whole, raw = raw, copy.deepcopy(raw)
    nested = {name: cut(raw, name) for name in sorted(TABLES, key=lambda n: -n.count("."))}
    free = {name: raw.pop(name, {}) for name in FREE}
    for name, table in free.items():
        if not isinstance(table, dict):
            raise places.wrong((name,), table, f"a table, [{name}],")
    elsewhere = {key: name for name, model in reversed(TABLES.items()) for key in model.model_fields}
    known = [*Top.model_fields, *dict.fromkeys(n.split(".")[0] for n in TABLES), *FREE]
    for key in raw:
        if key not in Top.model_fields:
            raise places.unknown((key,), known, elsewhere)
    top = checked(Top, raw, (), places)
    forms = {**TABLES, "task": task_form(nested["task"], places)}
    tables: dict[str, Any] = {
        name: checked(form, {} if nested[name] is None else nested[name], tuple(name.split(".")), places, elsewhere)
        for name, form in forms.items()
    }
    entry, options = read_method(free["method"], free["methods"], places, file_method)
    if not tables["data"].fractions[1] and entry.card.validates(options):
        raise Problem(
            f"{places.of(('data', 'fractions'))}: {entry.card.name} weighs hospitals by their validation cases, and "
            "data.fractions leaves none: give validation, the second of the three, a part above 0."
        )
    baselines(tables["run"].baselines, places)
    model, model_options = read_model(free["model"], tables["data"], places, entry.card.model or "unet")
    tables["train"], step = read_step(tables["train"], entry.card, places)
    return StudyFile(
        places.file, text, top, tables, entry.card.name, options, model, model_options, step,
        augmentation(tables, places), places, whole,
    )  # fmt: skip


def task_form(table: Any, places: Places) -> type[Table]:
    """What may stand in [task]: of segmentation, or of the task of an installed package that ``kind`` names."""
    kind = table.get("kind", "segmentation") if isinstance(table, dict) else "segmentation"
    if kind == "segmentation":
        return TABLES["task"]
    from fedscan.tasks.registry import tasks

    cards = tasks()
    if not isinstance(kind, str) or kind not in cards:
        raise places.wrong(("task", "kind"), kind, f"one of {', '.join(cards)}", cards)
    return of_task(cards[kind])


def cut(raw: dict[str, Any], name: str) -> Any:
    """Takes a table out of the raw study; None where it is not there."""
    *above, last = name.split(".")
    place: Any = raw
    for step in above:
        place = place.get(step) if isinstance(place, dict) else None
    return place.pop(last, None) if isinstance(place, dict) else None


def baselines(names: Sequence[str], places: Places) -> None:
    """Raises Problem for a baseline that no method is."""
    from fedscan.methods.registry import methods

    for name in names:
        if name not in methods():
            allowed = f"a method ({', '.join(sorted(methods()))})"
            raise places.wrong(("run", "baselines"), name, allowed, methods())


def read_step(train: Any, card: Any, places: Places) -> tuple[Any, Step]:
    """How local steps are taken, with the card's rule for the optimiser's moments where the study names none."""
    if "moments" not in train.model_fields_set:
        train = train.model_copy(update={"moments": card.moments})
    step = Step(**train.model_dump(exclude={"rounds"}))
    try:
        card.admits(step)
    except ValueError as e:
        raise Problem(f"{places.of(('train',))}: [train] does not suit {card.name}: {str(e).rstrip('.')}.") from e
    return train, step


def augmentation(tables: Mapping[str, Table], places: Places) -> Augmentation | None:
    """How training cases are changed at random; None where they are not."""
    from torch import Generator

    if not tables["data"].augment:  # type: ignore[attr-defined]
        return None
    at = ("data", "augmentation")
    try:
        intensity = Intensity(**tables["data.augmentation.intensity"].model_dump())
        made = Augmentation(**tables["data.augmentation"].model_dump(), intensity=intensity)
        made.draw((8, 8, 8), 1, Generator())  # so that an axis that scans lack is found now, not in round 1
        return made
    except ValueError as e:
        raise Problem(f"{places.of(at)}: [data.augmentation]: {e}") from e


def read_method(
    table: Mapping[str, Any], others: Mapping[str, Any], places: Places, file_method: str | None
) -> tuple[Any, dict[str, Any]]:
    """The method's entry in the registry, and all its hyperparameters.

    Where the command line has chosen another method than the file, the file's hyperparameters are not its own: those
    of [methods.NAME] hold, and what the command line says.
    """
    from fedscan.methods.registry import methods

    entries = methods()
    for other, hyperparameters in others.items():
        if other not in entries:
            raise places.unknown(("methods", other), sorted(entries), {})
        checked(of_options(entries[other].options), hyperparameters, ("methods", other), places)
    name = table.get("name", "fedavg")
    if name not in entries:
        raise places.wrong(("method", "name"), name, f"one of {', '.join(sorted(entries))}", entries)
    own = {k: v for k, v in table.items() if k != "name"}
    if name != (file_method or name):
        chosen = {path[1] for path in places.given if path[0] == "method" and len(path) > 1}
        own = {**others.get(name, {}), **{k: v for k, v in own.items() if k in chosen}}
    options = checked(of_options(entries[name].options), own, ("method",), places).model_dump(mode="json")
    try:
        entries[name].make(options)
    except ValueError as e:
        key = next((k for k in own if k in re.split(r"\W+", str(e))), "name")
        raise Problem(f"{places.of(('method', key))}: {str(e).rstrip('.')}.") from e
    return entries[name], options


def read_model(table: Mapping[str, Any], data: Any, places: Places, default: str) -> tuple[str, dict[str, Any]]:
    """The network's name and all its options: its defaults, its preset's, the study's grid, and what the file says."""
    from fedscan.models.registry import models

    cards = models()
    name = table.get("name", default)
    if name not in cards:
        raise places.wrong(("model", "name"), name, f"one of {', '.join(sorted(cards))}", cards)
    card, given = cards[name], {k: v for k, v in table.items() if k != "name"}
    for key, value in given.items():
        if key not in card.options and key != "preset":
            raise places.unknown(("model", key), ["name", "preset", *card.options], {})
        if key == "preset" and value not in card.presets:
            raise places.wrong(("model", key), value, f"one of {', '.join(card.presets)}", card.presets)
    size = data.patch or data.grid
    if "grid" in card.options and "grid" not in given and size:
        given["grid"] = list(size)
    try:
        return name, json.loads(json.dumps(card.resolve(given)))
    except ValueError as e:
        key = next((k for k in given if repr(k) in str(e)), "name")
        raise Problem(f"{places.of(('model', key))}: {str(e).rstrip('.')}.") from e
