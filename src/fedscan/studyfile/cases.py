"""From scans on disk to every site's prepared cases: read, checked, dealt to sites, split, resampled, cached."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedscan.data.cache import hash_of
from fedscan.data.check import Catalogue, check
from fedscan.data.manifest import read_manifest
from fedscan.data.partition import SPLITS, partition, split
from fedscan.data.preprocess import Prepared, Recipe, prepare, unsuited
from fedscan.data.records import SINGLE_SITE, Case, Manifest
from fedscan.ledger import SiteRow
from fedscan.run import Problem
from fedscan.studyfile.file import StudyFile, digest
from fedscan.studyfile.labels import Labels, classes_of, flat, labels_of, structures, unread

RESERVED = {"federation", "pooled"}  # in the record, who trained a model that is no single site's
UNSCALED = 'These files do not say how large a voxel is: read every "mm" here as voxels of the original scan.'
ALONE = (
    "All cases are of one hospital, so nothing is federated here: name the hospitals in the column site of the table "
    "of cases, or deal the patients to simulated ones with [data.partition]."
)
Tell = Callable[[str, int, int], None]  # what is being done, how many are done, out of how many


def silent(what: str, done: int, total: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Cases:
    """What a study is run on.

    sequences  the channels, in order;  labels: the values in label files, or several for a region, by name
    of         each site's prepared cases by split, sites in name order
    rows       expected, used and left-out cases of each site
    notes      what a reader of the results must know first
    files      the SHA-256 of each file that a case is read from: its sequences and its labels, None where it lacks one
    """

    sequences: tuple[str, ...]
    labels: Labels
    recipe: Recipe
    of: Mapping[str, Mapping[str, tuple[Prepared, ...]]]
    rows: tuple[SiteRow, ...]
    notes: tuple[str, ...] = ()
    files: Mapping[str, Sequence[str | None]] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, sorted."""
        return tuple(sorted(self.of))

    def facts(self) -> dict[str, Any]:
        """What the data add to the study: channels, labels, which case is in which split of which site, every file."""
        splits = {
            site: {name: [case.name for case in cases] for name, cases in self.of[site].items()} for site in self.sites
        }
        labels = {k: v if isinstance(v, int) else list(v) for k, v in self.labels.items()}
        files = {name: list(self.files[name]) for name in sorted(self.files)}
        return {"sequences": list(self.sequences), "labels": labels, "splits": splits, "files": files}


@dataclass
class _Left:
    """Cases left out, with the reason, as they are found."""

    reasons: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # by site

    def add(self, case: Case, why: object) -> None:
        self.reasons.setdefault(case.site, []).append((case.name, str(why)))


def cache_folder() -> Path:
    """Where prepared scans are kept: $FEDSCAN_CACHE, else fedscan in the user's cache folder."""
    if named := os.environ.get("FEDSCAN_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedscan"


def read_cases(file: StudyFile, cache: Path | None = None, tell: Tell = silent, site: str = "") -> Cases:
    """Every site's cases, ready for training; what cannot be used is left out with its reason, up to a limit.

    Where these are the scans of one hospital of several, ``site`` is its name, and they have no other.
    Raises Problem or ValueError, in one sentence, where the data do not suit the study.
    """
    cache = cache or cache_folder()
    manifest, notes, about = listed(file, cache, site)
    labels = labels_of(file, manifest)
    manifest = replace(manifest, labels=flat(labels) if file.tables["task"].labels else manifest.labels)
    sequences = file.data.sequences or manifest.sequences
    for key, names in (("sequences", sequences), ("require", file.data.require)):
        for name in names:
            if name not in manifest.sequences:
                known = ", ".join(manifest.sequences)
                raise file.places.wrong(
                    ("data", key), name, f"a sequence that the cases have ({known})", manifest.sequences
                )
    if len(set(sequences)) < len(sequences):
        raise file.places.wrong(("data", "sequences"), list(sequences), "each sequence once")
    for name in RESERVED.intersection(manifest.sites):
        raise Problem(f"a site is called {name!r}, which means something else in the record: give it another name.")
    recipe = recipe_of(file, sequences, labels)
    tell("checking cases", 0, len(manifest.cases))
    catalogue = check(manifest, file.data.require, file.data.left_out_limit)
    left = _Left()
    for case, reason in catalogue.left_out:
        left.add(case, reason.sentence)
    ready: dict[str, Prepared] = {}
    for number, case in enumerate(catalogue.used):
        tell("preparing cases", number, len(catalogue.used))
        try:
            ready[case.name] = prepare(case, recipe, cache / "cases")
        except ValueError as e:
            left.add(case, e)
    tell("preparing cases", len(catalogue.used), len(catalogue.used))
    hold_to_limit(file, catalogue, len(ready), left)
    notes += tuple(note for note in (unsuited(manifest.intensity, recipe.normalise), unread(labels)) if note)
    kept = dealt(file, [case for case in catalogue.used if case.name in ready], sequences, labels)
    files = {case.name: hashes(case, sequences, cache / "cases") for case in kept}
    return replace(divided(file, kept, ready, left, manifest, (sequences, labels, recipe), notes, about), files=files)


def hashes(case: Case, sequences: Sequence[str], cache: Path) -> list[str | None]:
    """The SHA-256 of the files that a case is read from; noted in the cache when the case was prepared."""
    paths = [*(case.images.get(sequence) for sequence in sequences), case.label]
    return [None if path is None else hash_of(path, cache) for path in paths]


def listed(file: StudyFile, cache: Path, site: str = "") -> tuple[Manifest, tuple[str, ...], dict[str, str]]:
    """The manifest of the sites that take part, notes on the data, and a few words on each site."""
    source = file.source
    if not source:
        raise Problem(f'{file.path}: no data; say cases = "FOLDER" in [data], or give --data FOLDER.')
    path = hospitals(file.data_seed, cache) if source == "demo" else Path(source)
    manifest = read_manifest(path)
    if site:
        if set(manifest.sites) - {site, SINGLE_SITE}:
            raise Problem(f"{path}: some cases are of {manifest.sites[0]!r}, and this is {site!r}.")
        manifest = replace(manifest, cases=tuple(replace(c, site=site) for c in manifest.cases))
    elif file.data.sites is not None:
        for name in file.data.sites:
            if name not in manifest.sites:
                known = ", ".join(manifest.sites)
                raise file.places.wrong(("data", "sites"), name, f"a site of the data ({known})", manifest.sites)
        manifest = replace(manifest, cases=tuple(c for c in manifest.cases if c.site in file.data.sites))
    described = manifest.root / "hospitals.json"
    if not described.is_file():
        return manifest, (UNSCALED,) if manifest.layout in ("hippocampus", "lgg") else (), {}
    told = json.loads(described.read_text(encoding="utf-8"))
    about = {h["name"]: h["description"] for h in told["hospitals"]}
    labels = manifest.labels or {name: int(value) for value, name in told["labels"].items()}
    return replace(manifest, labels=labels), (told["about"],), about


def hospitals(seed: int, cache: Path) -> Path:
    """The folder of the simulated hospitals for a seed, made the first time."""
    from fedscan.data.simulate import write_hospitals

    folder = cache / "hospitals" / str(seed)
    if not (folder / "cases.csv").exists():
        partial = folder.with_name(f".{folder.name}.{os.getpid()}")
        partial.mkdir(parents=True, exist_ok=True)
        write_hospitals(partial, seed)
        try:
            partial.rename(folder)
        except OSError:  # another process was first, and made the same
            shutil.rmtree(partial)
    return folder


def recipe_of(file: StudyFile, sequences: Sequence[str], labels: Labels) -> Recipe:
    """How scans become arrays; label values are numbered as classes from 1 in their order."""
    d = file.data
    try:
        return Recipe(
            tuple(sequences), d.grid, d.spacing, d.normalise, d.ct_window, d.ct_mean, d.ct_sd,
            classes_of(labels), d.label_interpolation, d.dtype,
        )  # fmt: skip
    except ValueError as e:
        raise Problem(f"{file.places.of(('data',))}: [data]: {str(e).removeprefix('Recipe: ')}") from e


def hold_to_limit(file: StudyFile, catalogue: Catalogue, ready: int, left: _Left) -> None:
    """Raises Problem where more cases fell out than the study allows."""
    limit, total = file.data.left_out_limit, catalogue.expected
    allowed = limit if isinstance(limit, int) else int(limit * total + 1e-9)
    if total - ready > allowed or not ready:
        name, why = next(reason for reasons in left.reasons.values() for reason in reasons)
        raise Problem(
            f"{total - ready} of {total} cases cannot be used, where the study allows {allowed}; "
            f"one is {name!r} ({why.rstrip('.')})."
        )


def dealt(file: StudyFile, cases: Sequence[Case], sequences: Sequence[str], labels: Labels) -> tuple[Case, ...]:
    """The cases at the sites that the study's partition gives them; what is ignored counts as no label there."""
    p, seed = file.partition, file.data_seed
    if p.how == "true":
        return tuple(cases)
    from fedscan.data import signature

    assert p.sites is not None  # the file was refused otherwise
    options: dict[str, Any] = {"minimum": p.minimum}
    learned = tuple(flat(structures(labels)).values())
    if p.how == "dirichlet":
        volumes = p.by == "volume" and signature.quantiles(signature.lesion_volume(cases, p.labels or learned), 3)
        options |= {"alpha": p.alpha, "classes": volumes or signature.dominant_label(cases, learned)}
    elif p.how == "quantity":
        options |= {"law": p.law, "alpha": p.alpha, "exponent": p.exponent}
    elif p.how == "intensity":
        options["values"] = signature.foreground_intensity(cases, p.sequence or sequences[0])
    else:
        options["values"] = signature.lesion_volume(cases, p.labels or learned)
    hold_for_all(file, cases, options)
    return partition(cases, p.how, p.sites, seed, **options)


def hold_for_all(file: StudyFile, cases: Sequence[Case], options: Mapping[str, Any]) -> None:
    """Raises Problem where a subject lacks what sites are dealt by, or no case has any of it."""
    p, at = file.partition, file.places.of(("data", "partition"))
    values = options.get("values", options.get("classes"))
    missing = sorted({case.subject for case in cases} - values.keys()) if values is not None else []
    if missing:
        what = f"sequence {p.sequence!r}" if p.sequence else "what it is dealt by"
        raise Problem(
            f"{at}: {len(missing)} subjects lack {what}, such as {missing[0]!r}: they cannot be dealt to sites."
        )
    if p.labels and p.how == "lesion-size" and not any(options["values"].values()):
        raise Problem(
            f"{at}: no case has any of the labels {', '.join(map(str, p.labels))}: sites cannot be dealt by it."
        )


def divided(
    file: StudyFile,
    kept: Sequence[Case],
    ready: Mapping[str, Prepared],
    left: _Left,
    manifest: Manifest,
    read_as: tuple[tuple[str, ...], Labels, Recipe],
    notes: tuple[str, ...],
    about: Mapping[str, str],
) -> Cases:
    """The cases in their sites' three splits, with a row for each site."""
    from fedscan.methods.registry import get

    part = split(kept, file.data.fractions, file.data_seed)
    of: dict[str, dict[str, tuple[Prepared, ...]]] = {}
    for site in sorted({case.site for case in kept}):
        mine = [replace(ready[c.name], site=site) for c in kept if c.site == site]
        of[site] = {name: tuple(p for p in mine if part[p.name] == name) for name in SPLITS}
    rows = []
    for site, splits in of.items():
        n = [len(splits[name]) for name in SPLITS]
        lost = tuple(left.reasons.get(site, ()))
        rows.append(SiteRow(site, sum(n) + len(lost), sum(n), n[0], n[1], n[2], about.get(site, ""), lost))
    if len(of) == 1 and get(file.method).card.family != "reference":
        notes += (ALONE,)
    if file.partition.how != "true":
        notes += (f"The sites are simulated: cases were dealt to them by {file.partition.how}.",)
    strangers = [(site, reason) for site, reasons in left.reasons.items() if site not in of for reason in reasons]
    notes += tuple(f"Case {name} of {site} was left out: {why}" for site, (name, why) in strangers)
    return Cases(*read_as, of, tuple(rows), notes)


def fingerprint(facts: Mapping[str, Any]) -> str:
    """SHA-256 of what the data add to a study; a run goes on only with the same."""
    return digest(facts)
