"""From a run's folder to segmentations: its model at a site, new scans, and the test cases that are worth a look."""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedscan import wire
from fedscan.data.preprocess import compute, restore
from fedscan.data.records import Case
from fedscan.ledger import Overlay, ScoreRow, opened, read_scores
from fedscan.memory import SiteDisk, read_sound
from fedscan.method import published
from fedscan.report.words import plural
from fedscan.run import Problem
from fedscan.site import Site, Splits
from fedscan.study import Study
from fedscan.studyfile import again, devices, task_of
from fedscan.studyfile.cases import recipe_of
from fedscan.studyfile.file import StudyFile


class Run:
    """A run that has ended, or stands at the end of a round: its study, its state and its sites' memories."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with closing(opened(folder)) as db:
            self.meta: dict[str, str] = dict(db.execute("SELECT key, value FROM meta"))
            self.bases = {site: (r, c) for site, r, c in db.execute("SELECT site, round, call FROM bases")}
            head = db.execute("SELECT round, digest FROM head").fetchone()
            self.scores: tuple[ScoreRow, ...] = read_scores(db, self.meta)
        if not head or not head[0]:
            raise Problem(f"the run in {folder} has not ended a round yet; go on with --resume")
        state = folder / "state" / f"{head[0]}.safetensors"
        try:
            self.state = read_sound(state, head[1])
        except (OSError, ValueError) as e:
            raise Problem(f"the run in {folder} is damaged: {state} cannot be read ({str(e).rstrip('.')})") from e
        self.facts = json.loads(self.meta["facts"])
        self.names: list[str] = json.loads(self.meta["names"])
        self.file: StudyFile = again(json.loads(self.meta["study"]), folder / "study.json")

    def study(self, device: str | None = None) -> Study:
        """The study without its cases: enough to predict with."""
        from fedscan.methods.registry import get

        labels = self.facts["labels"]
        method = get(self.file.method).make(self.file.method_options)
        return Study(
            task_of(self.file, self.facts["sequences"], labels), method, tuple(self.names), nobody, self.file.step,
            seed=self.file.top.seed, rounds=self.file.rounds, device=device or self.file.device,
        )  # fmt: skip

    def model(self, study: Study, name: str) -> nn.Module:
        """What site ``name`` predicts with: what is published, put together with what the site remembers."""
        memory = SiteDisk(self.folder / "sites" / name).recall(self.bases.get(name))
        empty: Any = ()
        site = Site(name, study.task, Splits(empty, empty, empty), study.step, study.slots(), memory, study.seed)
        return study.method.use(site, published(self.state, name)).eval()


def nobody(name: str) -> Splits:
    """No cases: a study that only predicts reads none."""
    raise Problem(f"this study was opened to predict, and does not read the cases of {name}")


def predict(
    folder: Path, scans: Sequence[str], out: Path, *, site: str | None = None, device: str | None = None
) -> Path:
    """Segments one patient's scans with the model of the run in ``folder``, and writes the label map to ``out``.

    ``scans`` are NIfTI files, one for each sequence of the study in its order, or one 4D file that holds them all, or
    "sequence=file" where some are missing. The label map lies on the voxels and the affine of the first scan, in the
    values of the label files.
    ``site`` chooses whose model, where sites have their own, and is refused elsewhere. ``device`` is that of the run,
    where nothing is said and this machine has it; else what "auto" stands for. Raises Problem or ValueError for what
    does not fit.
    """
    if not out.name.endswith((".nii", ".nii.gz")):
        raise Problem(f"-o {out}: a name that ends in .nii or .nii.gz was meant")
    if out.is_dir():
        raise Problem(f"-o {out} is a folder; the name of a file to write was meant")
    run = Run(folder)
    study = run.study(device_of(device, run.file.device))
    case = case_of(scans, run.facts["sequences"], run.file.data.require)
    if any(path is not None and out.exists() and out.samefile(path) for path in case.images.values()):
        raise Problem(f"-o {out} is the scan itself, which would be lost; choose another name")
    recipe = replace(recipe_of(run.file, run.facts["sequences"], run.facts["labels"]), dtype="float32")
    image, _, _, _ = compute(case, recipe)
    model = run.model(study, chosen(run, study, site))
    task: Any = study.task
    found = task.predict(model, torch.from_numpy(np.ascontiguousarray(image))[None].to(study.device))[0]
    first = next(path for path in case.images.values() if path is not None)
    made = restore(found, first, recipe)
    import nibabel

    out.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(made, out)
    return out


def chosen(run: Run, study: Study, site: str | None) -> str:
    """Whose model is used. Where every site has its own, or a part of its own, one must be named, and else none."""
    if site is not None and site not in run.names:
        raise Problem(f"--site {site}: the run has the sites {', '.join(run.names)}")
    own = "for" in run.state or study.travelling < study.terms.model.state_dict().keys()
    if site is None and own and len(run.names) > 1:
        raise Problem(f"every site has layers of its own here; choose one with --site: {', '.join(run.names)}")
    if site is not None and not own:
        raise Problem(f"--site {site}: all sites predict with the same model here; leave --site out")
    return site or run.names[0]


def device_of(given: str | None, recorded: str) -> str:
    """The device to predict on: the one given, or that of the run where this machine has it, or what there is."""
    if given is None:
        return recorded if devices.is_there(recorded) else devices.auto()
    if given != "auto" and not devices.is_there(given):
        raise Problem(f"--device {given}: {devices.allowed()} was meant")
    return devices.auto() if given == "auto" else given


def case_of(scans: Sequence[str], sequences: Sequence[str], require: Sequence[str] = ()) -> Case:
    """A case without a label from file names, or from "sequence=file" for some sequences, all of ``require`` there."""
    named = [scan.partition("=") for scan in scans]
    by_name = [bool(equals) and not Path(scan).exists() for scan, (_, equals, _) in zip(scans, named, strict=True)]
    if any(by_name):
        if not all(by_name):
            raise Problem(f"{scans[by_name.index(False)]} has no SEQUENCE= before it: name every scan, or none")
        images = by_sequence([(name, path) for name, _, path in named], sequences)
    elif len(scans) == 1:  # of several sequences: its volumes are read in their order
        images = dict.fromkeys(sequences, Path(scans[0]))
    elif len(scans) == len(sequences):
        images = {name: Path(scan) for name, scan in zip(sequences, scans, strict=True)}
    else:
        raise too_few(scans, sequences)
    for path in images.values():
        if path is not None and path.is_dir():
            raise Problem(f"{path} is a folder; a NIfTI file was meant")
        if path is not None and not path.is_file():
            raise Problem(f"{path} does not exist; a NIfTI file was meant")
    if len(scans) == 1 < len(sequences) and not any(by_name) and volumes(Path(scans[0])) == 1:
        raise too_few(scans, sequences)
    if lacking := [name for name in require if name in sequences and images[name] is None]:
        names = ", ".join(lacking)
        raise Problem(f"the study requires {names} of every patient, which was not given: {lacking[0]}=FILE")
    return Case("scan", "scan", "here", images)


def by_sequence(named: Sequence[tuple[str, str]], sequences: Sequence[str]) -> dict[str, Path | None]:
    """The file of each sequence that was named; Problem for a name that is no sequence, or stands twice."""
    for name, path in named:
        if not name or not path:
            raise Problem(f"{name}={path}: SEQUENCE=FILE was meant, such as {sequences[0]}={path or 'FILE'}")
        if name not in sequences:
            raise Problem(f"{name} is no sequence of the study; it reads {', '.join(sequences)}")
        if sum(name == other for other, _ in named) > 1:
            raise Problem(f"{name} was given twice; one file for each sequence was meant")
    return dict.fromkeys(sequences) | {name: Path(path) for name, path in named}


def too_few(scans: Sequence[str], sequences: Sequence[str]) -> Problem:
    """Says how many scans belong where another number was given."""
    every = "both" if len(sequences) == 2 else f"all {len(sequences)}"
    what = f"{every} in this order, or those you have by name ({sequences[0]}=FILE)" if sequences[1:] else "that one"
    return Problem(f"{plural(len(scans), 'scan')} for a model that reads {', '.join(sequences)}: give {what}")


def volumes(path: Path) -> int:
    """How many 3D volumes a file holds; 0 where it cannot be read, which is said when its voxels are."""
    import nibabel

    try:
        shape = nibabel.load(path).shape
    except Exception:  # nibabel raises many kinds for a damaged file
        return 0
    return int(np.prod(shape[3:]))


def keep_overlays(study: Study, folder: Path) -> list[Path]:
    """Predicts each site's best, median and worst test case by mean Dice, and keeps them in ``folder/overlays``."""
    run = Run(folder)
    by_case = mean_dice(run.scores)
    kept = []
    (folder / "overlays").mkdir(exist_ok=True)
    for name in study.names:
        test: Any = study.splits(name).test
        place = {p.name: i for i, p in enumerate(test.prepared)}
        model = run.model(study, name)
        for site in sorted({p.site for p in test.prepared}):
            mine = {c: d for (s, c), d in by_case.items() if s == site and c in place}
            for rank, case in ranked(mine):
                overlay = overlay_of(study, model, test, place[case], site, rank, mine[case])
                kept.append(save(overlay, folder / "overlays" / f"{site}.{rank}.npz"))
    return kept


def mean_dice(scores: Sequence[ScoreRow]) -> dict[tuple[str, str], float | None]:
    """Mean Dice over labels of each (site, case) of the final test, of the model that the site uses."""
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    seen: dict[tuple[str, str], float | None] = {}
    for row in scores:
        if row.split == "test" and row.metric == "dice" and row.trained_at in (row.tested_at, "federation", "pooled"):
            seen[row.tested_at, row.case] = None
            if row.value is not None:
                values[row.tested_at, row.case].append(row.value)
    return {key: statistics.fmean(values[key]) if values[key] else None for key in seen}


def ranked(dice: Mapping[str, float | None]) -> list[tuple[str, str]]:
    """The best, the median and the worst case of those that have a Dice; fewer where there are fewer."""
    order = sorted((d, case) for case, d in dice.items() if d is not None)
    places = {"best": len(order) - 1, "median": (len(order) - 1) // 2, "worst": 0}
    found: dict[int, str] = {}
    for rank, place in places.items():
        if order:
            found.setdefault(place, rank)
    return [(rank, order[place][1]) for place, rank in found.items()]


def overlay_of(study: Study, model: nn.Module, test: Any, i: int, site: str, rank: str, dice: float | None) -> Overlay:
    """One test case with its prediction."""
    batch, prepared = test.case(i)
    task: Any = study.task
    found = task.predict(model, batch.x)[0]
    shown = next(c for c, there in enumerate(prepared.present) if there)
    image = np.asarray(prepared.image[shown], dtype=np.float32)
    image = np.where(image == 0, image.min(), image)  # what a z-score of the foreground left at 0 is shown black
    reference = np.array(prepared.label, np.uint8)
    if (ignored := getattr(task, "ignored", None)) is not None:  # what is shown is what is scored
        found = np.where(reference == ignored, np.uint8(0), found)
        reference[reference == ignored] = 0
    return Overlay(site, prepared.name, rank, dice, image, reference, found, prepared.spacing)


def save(overlay: Overlay, path: Path) -> Path:
    """Keeps an overlay as plain arrays; the image in half precision."""
    about = {"site": overlay.site, "case": overlay.case, "rank": overlay.rank, "dice": overlay.dice,
             "spacing": overlay.spacing}  # fmt: skip
    image = overlay.image.astype(np.float16).astype(np.float32)
    wire.replace_file(
        path,
        lambda file: np.savez_compressed(
            file, about=np.array(json.dumps(about)), image=image,
            reference=overlay.reference, prediction=overlay.prediction,
        ),
    )  # fmt: skip
    return path
