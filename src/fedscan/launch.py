"""A study file carried out in a folder: cases read, the run recorded, its model, overlays and report written."""

import errno
import json
import os
import platform
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fedscan import wire
from fedscan.disk import room_in
from fedscan.engines.local import Local
from fedscan.engines.workers import Workers
from fedscan.journal import Journal
from fedscan.ledger import opened, read_record, read_turns
from fedscan.method import State
from fedscan.parts.share import what_travels
from fedscan.recorded import Engine
from fedscan.run import Problem, Watch, run
from fedscan.schema import Weights
from fedscan.spec import carries_weights
from fedscan.study import Study
from fedscan.studyfile import Cases, StudyFile, build, devices, read_cases, try_out
from fedscan.studyfile.cases import Tell, cache_folder, fingerprint, silent
from fedscan.studyfile.file import NOT_HASHED
from fedscan.studyfile.labels import classes_of, flat, structures

CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)  # a folder that will never take a file
DATA = ("cases.csv", "dataset.json")  # what stands at the top of a folder of scans
PACKAGES = ("fedscan", "torch", "monai", "numpy", "scipy", "nibabel")


def nobody(what: str, value: Any) -> None:
    """Watches nothing."""


@dataclass(frozen=True)
class How:
    """How a run is carried out; none of it changes its numbers.

    strict    every message through its bytes;  workers: processes that answer for the sites
    numerics  whether a run may go on under other threads, device, torch or mode than it began with
    report    whether a report is written at the end
    """

    resume: bool = False
    strict: bool = False
    workers: int = 1
    numerics: bool = False
    report: bool = True
    cache: Path | None = None
    command: str = ""
    watch: Watch = nobody
    tell: Tell = silent


def launch(file: StudyFile, folder: Path, how: How = How(), cases: Cases | None = None) -> Path:
    """Runs a study in ``folder`` to its end and returns the path of its report.

    The folder then holds study.toml, study.json, journal.sqlite, model.safetensors (or models/, where sites have their
    own), overlays and report.html. Baselines that the study names run in ``folder/baselines``.

    Raises Problem where the folder holds another run, or file and data do not fit; Absent where the study stops when a
    site is missing; DiskFull. What is in the folder by then is not lost: with ``resume`` the run goes on.
    """
    free(folder, how.resume)
    others = ready(file)
    cases = cases or prepared(file, how)
    study = build(file, cases)
    with writing(folder, "--out"):
        describe(file, cases, study, folder, how)
        for other in others:
            baseline(other, cases, folder / "baselines" / other.method, how)
        begin(file, study, how)
        carry_out(study, folder, how)
        keep(study, folder)
    return report(folder, how.tell) if how.report else folder


def prepared(file: StudyFile, how: How) -> Cases:
    """The cases of a study, read and put into the cache. Raises as ``read_cases`` and ``writing`` do."""
    with writing(how.cache or cache_folder(), "--cache"):
        return read_cases(file, how.cache, how.tell)


@contextmanager
def writing(folder: Path, option: str) -> Iterator[None]:
    """Raises DiskFull as ``room_in`` does, and Problem, naming ``option``, where ``folder`` may not be written into."""
    try:
        with room_in(folder):
            yield
    except OSError as e:
        at, here = Path(str(e.filename or "")).absolute(), folder.absolute()
        if e.errno not in CLOSED or not e.filename or not (at.is_relative_to(here) or here.is_relative_to(at)):
            raise
        why = (e.strerror or "closed").lower()
        raise Problem(f"nothing can be written into {folder} ({why}); choose another folder with {option}") from e


def free(folder: Path, resume: bool) -> None:
    """Raises Problem where the folder cannot be one, holds scans, or a run that is not to be gone on with."""
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        raise Problem(f"{folder} cannot be made, because {above} is a file; choose another folder with --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise Problem(f"nothing can be written into {above}; choose another folder with --out")
    if scans := [name for name in DATA if (folder / name).exists()]:
        raise Problem(f"{folder} holds scans ({scans[0]}), and no run beside them; choose another folder with --out")
    if (folder / "journal.sqlite").exists() and not resume:
        raise Problem(
            f"{folder} already holds a run; add --resume to go on with it, or choose another folder with --out"
        )


def ready(file: StudyFile) -> list[StudyFile]:
    """The study by each of its baselines. Raises Problem for what would fail later, whatever the cases are."""
    numerics(file)
    others = [file.by(name) for name in file.run.baselines if name != file.method]
    try_out(file)
    return others


def carry_out(study: Study, folder: Path, how: How) -> State:
    """The run itself, from where it stands, and how long it took."""
    with closing(opened(folder)) as db:
        how.watch("earlier", read_turns(db))
    begun = time.monotonic()
    try:
        return run(study, folder, resume=True, engine=lambda s, f: engine(s, f, how), watch=how.watch)
    finally:
        add_seconds(folder, time.monotonic() - begun)


def engine(study: Study, folder: Path, how: How) -> Engine:
    """Who carries the questions: this process, or several."""
    if how.workers > 1:
        return Workers(study, folder, how.workers)
    return Local(study, folder, strict=how.strict)


def baseline(file: StudyFile, cases: Cases, folder: Path, how: How) -> None:
    """Runs the same study by another method, without a report."""
    study = build(file, cases)
    describe(file, cases, study, folder, replace(how, resume=True))
    begin(file, study, how)
    carry_out(study, folder, how)


def begin(file: StudyFile, study: Study, how: How) -> None:
    """Says what is about to run, and which leaves travel."""
    how.watch("method", file.method)
    how.watch("travels", travels(file, study))


def numerics(file: StudyFile) -> None:
    """Makes the numbers repeatable on a GPU, where the study asks for it. Raises Problem where there is none."""
    exact = file.run.mode == "exact"
    if not devices.is_there(file.device):
        raise file.places.wrong(("run", "device"), file.device, devices.allowed())
    if file.device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(exact)
        torch.backends.cudnn.benchmark = not exact


def describe(file: StudyFile, cases: Cases, study: Study, folder: Path, how: How) -> None:
    """Writes into the folder what the run is of. Raises Problem where a run of something else is there."""
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder)
    try:
        meta = journal.meta()
        known = meta if "study" in meta else {}  # a run between hospitals has a name before it has a study
        facts = cases.facts()
        if known:
            hold_to(file, facts, known, folder, how)
        notes = [*cases.notes, *noted(file, known)]
        told = {
            "study": file.resolved(), "plain_hash": plain_hash(file), "numerics": file.numerics(), "facts": facts,
            "sites": [asdict(row) for row in cases.rows], "labels": named(cases), "versions": versions(),
            "weighty": [n for n, q in study.questions.items() if carries_weights(q.gives(study.terms).entries)],
            "names": list(study.names), "notes": notes, "travels": travels(file, study), "command": how.command,
        }  # fmt: skip
        if known:
            told["command"] = known.get("command", how.command)
        texts = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in told.items()}
        journal.set_meta(study_hash=study.hash, **texts)
        journal.commit()
    finally:
        journal.close()
    tree = {**file.resolved(), "numerics": file.numerics(), "hash": file.hash}
    files = {"study.json": json.dumps(tree, indent=1, sort_keys=True, ensure_ascii=False) + "\n"}
    for name, text in (files | ({"study.toml": file.text} if file.text else {})).items():
        wire.replace_file(folder / name, lambda out, text=text: out.write(text.encode()))  # type: ignore[misc]


def hold_to(file: StudyFile, facts: dict[str, Any], known: dict[str, str], folder: Path, how: How) -> None:
    """Raises Problem unless the folder's run is of the same study, the same numerics and the same cases."""
    hold_to_study(file, known, folder, how)
    if fingerprint(json.loads(known["facts"])) != fingerprint(facts):
        raise Problem(f"the cases have changed since the run in {folder} began: give the same data, or another --out")


def suits(file: StudyFile, folder: Path, how: How) -> None:
    """Raises Problem where the folder's run, if there is one, is of another study or numerics; looks at no case."""
    if (folder / "journal.sqlite").exists():
        with closing(Journal(folder)) as journal:
            known = journal.meta()
        if known:
            hold_to_study(file, known, folder, how)


def hold_to_study(file: StudyFile, known: dict[str, str], folder: Path, how: How) -> None:
    """Raises Problem unless the folder's run is of the same study and the same numerics."""
    if known.get("plain_hash") != plain_hash(file):
        changed = difference(json.loads(known["study"]), file.resolved())
        raise Problem(f"the run in {folder} is of another study ({changed}): give that study, or choose another --out")
    before, now = json.loads(known["numerics"]), file.numerics()
    if before != now and not how.numerics:
        unlike = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
        text = ", ".join(f"{key} was {before.get(key, 'unknown')} and is {now.get(key, 'unknown')}" for key in unlike)
        raise Problem(f"the run in {folder} would go on with other numerics ({text}); add --other-numerics to allow it")


def noted(file: StudyFile, known: dict[str, str]) -> list[str]:
    """What a reader must know of how the run was made."""
    notes = [f"{name} was silent in some rounds: this was simulated." for name in file.run.silent]
    if file.scores.penalty:
        notes.append("HD95 counts as the diagonal of the image where one of the two masks is empty: the study says so.")
    if known:
        notes += [n for n in json.loads(known["notes"]) if n.startswith("Resumed under")]
        before, now = json.loads(known["numerics"]), file.numerics()
        if before != now:
            notes.append(f"Resumed under other numerics: {before} became {now}.")
    return notes


def plain_hash(file: StudyFile) -> str:
    """The study's hash without its numerics."""
    return fingerprint({k: v for k, v in file.canonical().items() if k != "numerics"})


def difference(a: Any, b: Any, besides: Collection[tuple[str, str]] = NOT_HASHED, path: str = "") -> str:
    """The first key, ``besides`` these, at which two studies differ, and how; a name before what goes with it."""
    for key in sorted({*a, *b}, key=lambda key: (key != "name", key)):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            if found := difference(x, y, besides, f"{path}{key}."):
                return found
        elif x != y and (*path.split(".")[:-1], key) not in besides:
            return f"{path}{key} was {json.dumps(x)} and is {json.dumps(y)}"
    return ""


def named(cases: Cases) -> dict[str, int]:
    """A name for each class, from 1 on."""
    classes = classes_of(cases.labels)
    return {name: classes[value] for name, value in flat(structures(cases.labels)).items()}


def versions() -> dict[str, str]:
    """Versions of python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def travels(file: StudyFile, study: Study) -> str:
    """Which arrays travel and which stay, counted on what the server would publish; of what is no federation, why."""
    from fedscan.methods.registry import get
    from fedscan.report.tables import OWN

    card, names = get(file.method).card, study.travelling
    return card.differs if file.method in OWN else what_travels(study.terms.model, lambda model: names)


def add_seconds(folder: Path, seconds: float) -> None:
    """Adds to the time that the run has taken."""
    journal = Journal(folder)
    try:
        before = float(journal.meta().get("seconds", 0))
        journal.set_meta(seconds=str(before + seconds))
        journal.commit()
    finally:
        journal.close()


def keep(study: Study, folder: Path) -> None:
    """Writes the cases to look at and then the model of a run that has ended."""
    from fedscan.predict import Run, keep_overlays

    keep_overlays(study, folder)
    save_models(Run(folder).state, folder)


def report(
    folder: Path, tell: Tell = silent, beside: Mapping[str, Path] | None = None, out: Path | None = None
) -> Path:
    """Writes the report of the run in ``folder``, and scores.csv beside it, there or into ``out``; returns its path.

    ``beside`` as in ``read_record``. Raises as ``writing`` does.
    """
    from fedscan.report.page import write_report
    from fedscan.report.values import of_run, write_scores

    tell("writing the report", 0, 1)
    record = read_record(folder, beside)
    with writing(out or folder, "--out"):
        write_scores(of_run(record), out or folder)
        path = write_report(record, out or folder)
    tell("writing the report", 1, 1)
    return path


def save_models(state: State, folder: Path) -> list[Path]:
    """Writes what is published: model.safetensors, or models/<site>.safetensors where there are several."""
    several = state.get("for")
    if several is None and not isinstance(state["weights"], Weights):
        several = state["weights"]
    if several is None:
        return [save_model(state["weights"], folder / "model.safetensors")]
    (folder / "models").mkdir(exist_ok=True)
    return [save_model(weights, folder / "models" / f"{name}.safetensors") for name, weights in several.items()]


def save_model(weights: Weights, path: Path) -> Path:
    """Writes one model's leaves as a plain safetensors file."""
    from safetensors.torch import save

    data = save({name: leaf.detach().cpu().contiguous() for name, leaf in weights.items()})
    wire.replace_file(path, lambda file: file.write(data))
    return path


def models_of(folder: Path) -> Sequence[Path]:
    """Where the run's models lie."""
    one = folder / "model.safetensors"
    return [one] if one.exists() else sorted((folder / "models").glob("*.safetensors"))
