"""From a study file and its cases to the ``Study`` that a run carries out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any

import torch

from fedscan.data.records import IGNORE, IGNORED
from fedscan.data.volumes import VolumeSplit
from fedscan.run import Problem
from fedscan.site import Splits, Task
from fedscan.study import Study
from fedscan.studyfile.cases import Cases
from fedscan.studyfile.file import StudyFile
from fedscan.studyfile.labels import Labels, classes_of, flat, structures
from fedscan.studyfile.pooling import POOLED, EqualSteps, pooled
from fedscan.tasks.registry import tasks

KEEP = 4 << 30  # bytes of all sites' splits that may stay in memory; a larger one is read from disk each time


def build(file: StudyFile, cases: Cases) -> Study:
    """The study on these cases. Raises Problem where file and cases do not fit, or the network cannot be built."""
    from fedscan.methods.registry import get

    entry = get(file.method)
    names = (POOLED,) if entry.card.pooled else cases.sites
    check_names(file, names, cases)
    of: Mapping[str, Any] = {POOLED: pooled(cases.of)} if entry.card.pooled else cases.of
    sizes = [len(splits["train"]) for splits in cases.of.values()] if entry.card.pooled else None
    study = Study(
        task=task_of(file, cases.sequences, cases.labels),
        method=entry.make(file.method_options),
        names=names,
        data=partial(splits_of, file, of, sizes),
        step=replace(file.step, epochs=1) if sizes else file.step,  # pooled, an epoch is all that a round has
        rounds=file.rounds,
        seed=file.top.seed,
        every=file.run.every,
        absent=file.run.absent,
        silent=file.run.silent,
        seconds={**{name: max(1.0, len(of[name]["train"])) for name in names}, **file.run.seconds},
        counts={name: {split: len(kept) for split, kept in of[name].items()} for name in names},
        origins={POOLED: cases.sites} if entry.card.pooled else {},
        device=file.device,
        threads=file.run.threads,
        name=file.name,
        method_name=file.method,
        resolved=file.resolved(),
        hash=file.hash,
    )
    every = [p.image.shape[1:] for splits in cases.of.values() for kept in splits.values() for p in kept]
    try_out(file, len(cases.sequences), sorted(set(every)))
    return study


def try_out(file: StudyFile, channels: int = 0, shapes: Sequence[tuple[int, ...]] = ()) -> None:
    """Sends shapes without numbers through the network, so that what does not fit is found before any work is done.

    Where the ``channels`` are not known yet, they are those that the file names, or one; ``shapes`` are those of the
    cases. Raises Problem for options that make no network, and for a grid, patch or case that it does not take.
    """
    from fedscan.models.registry import build as build_model

    channels = channels or len(file.data.sequences or ("one",))
    size = file.data.patch or file.data.grid
    if size is None and len(shapes) > 1 and file.step.batch > 1:
        raise Problem(
            f"{file.places.of(('data',))}: the cases have {len(shapes)} sizes, such as {shapes[0]} and {shapes[-1]}, "
            "which do not lie side by side: set a grid or a patch in [data], or batch = 1 in [train]."
        )
    at: tuple[str, ...] = ("model",)
    try:
        with torch.random.fork_rng(devices=[]):  # not every network can be made without numbers
            model = build_model(file.model, channels, 2, 3, **file.model_options).to("meta")
        with torch.device("meta"), torch.no_grad():
            at = ("data", "patch" if file.data.patch else "grid")
            for shape in [size] if size else shapes:
                model(torch.empty(2, channels, *shape))
    except ValueError as e:
        raise Problem(f"{file.places.of(at)}: {'.'.join(at)}: {str(e).rstrip('.')}.") from e


def splits_of(
    file: StudyFile, of: Mapping[str, Mapping[str, Sequence[Any]]], sizes: Sequence[int] | None, site: str
) -> Splits:
    """One site's three splits; only training cases are cut into patches and augmented.

    ``sizes`` are the training cases of the sites that were pooled; as many steps are taken as they would take.
    """

    def volumes(name: str) -> Any:
        train = name == "train"
        return VolumeSplit(
            of[site][name], file.data.patch if train else None, file.augmentation if train else None,
            file.device, file.data.foreground, KEEP // (3 * len(of)),
        )  # fmt: skip

    train = EqualSteps(volumes("train"), sizes, file.step) if sizes else volumes("train")
    return Splits(train, volumes("validation"), volumes("test"))


def task_of(file: StudyFile, sequences: Sequence[str], labels: Labels) -> Task:
    """What is learned: the network for these channels and labels, the loss and the scores."""
    from fedscan.models.registry import build as build_model

    class_of = classes_of(labels)
    learned = structures(labels)
    known = {k: class_of[v] if isinstance(v, int) else tuple(class_of[i] for i in v) for k, v in learned.items()}
    for name in file.scores.tolerance:
        if name not in known:
            raise file.places.wrong(("scores", "tolerance"), name, f"a label ({', '.join(known)})", known)
    classes = len(flat(learned)) + 1
    network = partial(build_model, file.model, len(sequences), classes, 3, **file.model_options)
    options = file.tables["task"].model_dump(exclude={"kind", "labels"})
    make = tasks()[file.tables["task"].kind].make
    takes, kind = signature(make).parameters, file.tables["task"].kind
    if file.scores.penalty:
        if "penalty" not in takes:
            what = f"nothing, as the task {kind!r} knows no penalty,"
            raise file.places.wrong(("scores", "penalty"), file.scores.penalty, what)
        options["penalty"] = file.scores.penalty
    if IGNORE in labels:
        if "ignored" not in takes:
            raise Problem(f"the data have the label {IGNORE!r}, and the task {kind!r} cannot leave voxels out.")
        options["ignored"] = IGNORED
    made: Task = make(
        {"model": network}, known, classes, file.data.patch, dict(file.scores.tolerance), file.scores.hd95, **options
    )
    return made


def check_names(file: StudyFile, names: Sequence[str], cases: Cases) -> None:
    """Raises Problem for a setting of a site that does not exist."""
    known = {*names, *cases.sites}
    for key in ("silent", "seconds"):
        for name in getattr(file.run, key):
            if name not in known:
                allowed = f"a site ({', '.join(cases.sites)})"
                raise file.places.wrong(("run", key, name), name, allowed, known)
