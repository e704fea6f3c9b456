"""What a study will ask of a hospital, and what will leave it: read from the code that asks and answers, not told.

Classes of data and the form of answers come from the questions themselves, sizes from the network's own schema, and how
often a question is asked from a rehearsal of the method.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedscan import __version__
from fedscan.consortium.leaving import Part, most, parts
from fedscan.consortium.rehearsal import Played, rehearse
from fedscan.method import PRIVACY, Privacy, published
from fedscan.method import Question as Code
from fedscan.run import Problem
from fedscan.schema import Schema, Weights
from fedscan.spec import LETTER, carries_weights
from fedscan.study import Study
from fedscan.studyfile.building import build
from fedscan.studyfile.cases import Cases, recipe_of
from fedscan.studyfile.file import StudyFile, digest
from fedscan.studyfile.labels import Labels
from fedscan.wire import pack

NAME = LETTER * 200  # bytes of the longest name that a table of scores may hold


@dataclass(frozen=True)
class Hospital:
    """What a hospital knows of its own cases, and what a study has to be read against.

    cases      how many can be used;  letters: bytes of the longest name of a case, a patient or the hospital, escaped
    sequences, labels   what the cases have, for a study that names neither
    """

    name: str
    cases: int
    sequences: tuple[str, ...] = ()
    labels: Labels | None = None
    letters: int = NAME


@dataclass(frozen=True)
class Question:
    """What is asked under one name.

    privacy   the most telling class of data in an answer;  leaves: what an answer holds;  weights: whether that can be
              a network's weights, coded or not
    up        bytes of an answer at most;  down: bytes of a message at most, or where ``declared`` is not so, about
    times     how often a round asks at most;  rounds: in how many rounds;  last: how often once more, at the end;
              open: whether the number depends on which hospital answers first
    steps     optimiser steps behind an answer; None: not known
    passed    whether answers are sent to other hospitals as they came
    """

    name: str
    privacy: Privacy
    leaves: tuple[Part, ...]
    weights: bool
    up: int
    down: int
    declared: bool
    times: int
    rounds: int
    last: int = 0
    steps: int | None = None
    passed: bool = False
    open: bool = False


@dataclass(frozen=True)
class Asks:
    """All that a study asks of one hospital.

    hash        SHA-256 of the whole study as it was resolved, see ``hash_of``
    settings    the study's values by dotted name, so that two studies can be compared
    version     of fedscan: its code decides what is sent
    """

    study: str
    hash: str
    coordinator: str
    hospital: str
    sites: tuple[str, ...]
    task: str
    labels: tuple[str, ...]
    method: str
    title: str
    travels: str
    model: str
    privacy: Privacy
    rounds: int
    cases: int
    questions: tuple[Question, ...]
    settings: Mapping[str, Any]
    version: str = __version__

    @property
    def round_up(self) -> int:
        """Bytes that may leave in one round at most."""
        return sum(q.up * q.times for q in self.questions)

    @property
    def round_down(self) -> int:
        """Bytes that may come in one round, at most where every question declares what it takes."""
        return sum(q.down * q.times for q in self.questions)

    def plain(self) -> dict[str, Any]:
        """All of it as plain data; ``read`` makes it again."""
        return asdict(self)


def read(tree: Mapping[str, Any]) -> Asks:
    """What ``Asks.plain`` gave. Raises ValueError where something is missing or unknown."""
    try:
        questions = tuple(
            Question(**{**q, "leaves": tuple(Part(**part) for part in q["leaves"])}) for q in tree["questions"]
        )
        return Asks(**{**tree, "questions": questions, "sites": tuple(tree["sites"]), "labels": tuple(tree["labels"])})
    except (KeyError, TypeError) as e:
        raise ValueError(f"what a study asks cannot be read ({e}): fedscan {__version__} writes it otherwise") from e


def hash_of(file: StudyFile) -> str:
    """SHA-256 of the whole resolved study: equal however it is written, and another for every other value.

    Unlike the hash of a run, it holds the baselines and where the data lie, and is the same on every machine.
    """
    return digest({"study": file.resolved(), "plugins": file.plugins()})


def asks_of(
    file: StudyFile, hospital: Hospital, sites: Sequence[str], coordinator: str, trained: int | None = None
) -> Asks:
    """What the study asks of this hospital, among ``sites``.

    ``trained`` is how many of its cases train; None: the study's fraction of them. Raises Problem for a study that
    cannot be carried out between hospitals, or does not fit the hospital's cases.
    """
    hold_between(file)
    names = tuple(sorted({*sites, hospital.name}))
    study = on_paper(file, hospital, names)
    if trained is None:
        trained = int(hospital.cases * file.data.fractions[0])
    try:
        played = rehearse(study, hospital.name, max(1, trained))
    except Exception as e:  # whatever a method raises, an installed package's too
        raise Problem(f"{file.path}: how often {file.method!r} asks cannot be found out, for it failed ({e}).") from e
    from fedscan.methods.registry import get

    card = get(file.method).card
    questions = tuple(asked(file, study, question, played, hospital) for question in study.questions.values())
    told = max((q.privacy for q in questions), key=PRIVACY.index)
    labels = tuple(getattr(study.task, "labels", ()) or ())
    return Asks(
        file.name, hash_of(file), coordinator, hospital.name, names, file.tables["task"].kind, labels, file.method,
        card.title, card.travels, file.model, told, file.rounds, hospital.cases, questions,
        dict(flattened(file.resolved())),
    )  # fmt: skip


def taking_part(file: StudyFile, members: Sequence[str]) -> tuple[str, ...]:
    """The hospitals of a study: those that it names, else all members. Raises Problem for one that is none."""
    for name in file.data.sites or ():
        if name not in members:
            raise file.places.wrong(
                ("data", "sites"), name, f"a hospital on the roster ({', '.join(members)})", members
            )
    return tuple(sorted(file.data.sites or members))


def hold_between(file: StudyFile) -> None:
    """Raises Problem for what one machine can simulate and hospitals cannot do: deal cases, pool them, be silent.

    Also for a study without a name: it would be known by that of its file, and be another at each hospital.
    """
    from fedscan.methods.registry import get

    where, how = file.places.of, file.partition.how
    if not file.top.name:
        raise Problem(f"{file.path}: a study between hospitals has a name, whatever its file is called: say "
                      'name = "..." in its first line.')  # fmt: skip
    if how != "true":
        raise Problem(f"{where(('data', 'partition', 'how'))}: cases are dealt to simulated sites ({how!r}), and those "
                      'of hospitals stay where they are: leave [data.partition] out.')  # fmt: skip
    for at, name in (("method", file.method), *(("run", name) for name in file.run.baselines)):
        if get(name).card.pooled:
            raise Problem(f"{where((at,))}: {name!r} pools all hospitals' scans at one place, and these "
                          "do not leave: leave it out.")  # fmt: skip
    if others := [name for name in file.run.baselines if name != file.method]:
        raise Problem(f"{where(('run', 'baselines'))}: {', '.join(others)} would be further studies on your cases; "
                      "each has to be asked for by itself: leave baselines out.")  # fmt: skip
    for key in ("silent", "seconds"):
        if getattr(file.run, key):
            raise Problem(f"{where(('run', key))}: run.{key} simulates hospitals, and these are real: leave it out.")


def on_paper(file: StudyFile, hospital: Hospital, names: Sequence[str]) -> Study:
    """The study as it will be, without any scan: networks, questions, and the hospital's number of cases."""
    named = file.tables["task"].labels
    labels: Labels = dict(named or hospital.labels or {})
    sequences = tuple(file.data.sequences or hospital.sequences)
    for what, known, key in (("sequences", sequences, "[data] sequences"), ("labels", labels, "[task] labels")):
        if not known:
            raise Problem(f"{file.path}: neither the study ({key}) nor your cases say which {what} there are.")
    lacking = [name for name in sequences if hospital.sequences and name not in hospital.sequences]
    if lacking:
        raise Problem(f"{file.places.of(('data', 'sequences'))}: your cases have no sequence {lacking[0]!r}; they have "
                      f"{', '.join(hospital.sequences)}.")  # fmt: skip
    none: Mapping[str, tuple[Any, ...]] = {"train": (), "validation": (), "test": ()}
    study = build(file, Cases(sequences, labels, recipe_of(file, sequences, labels), dict.fromkeys(names, none), ()))
    return replace(study, counts={name: {"test": hospital.cases} for name in names})


def asked(file: StudyFile, study: Study, code: Code, played: Played, hospital: Hospital) -> Question:
    """What a question of the study asks, how large and how often."""
    gives, letters = code.gives(study.terms), longest(study, hospital)
    up, down = most(gives, letters), sent(file, study, code)
    about = Question(
        code.name, code.privacy, parts(gives, letters), carries_weights(gives.entries), up, down,
        code.takes is not None, played.times.get(code.name, 0), file.rounds, steps=played.steps.get(code.name),
        passed=code.name in played.passed, last=played.last.get(code.name, 0), open=code.name in played.open,
    )  # fmt: skip
    if code.name != study.evaluate.name:
        return about
    due = [n for n in range(1, file.rounds + 1) if study.every and (n % study.every == 0 or n == file.rounds)]
    return replace(about, times=bool(due) * 1, rounds=len(due), last=len(study.names) if played.own else 1)


def longest(study: Study, hospital: Hospital) -> int:
    """The bytes of the longest text in a table of scores: a name at the hospital, a label or a metric."""
    labels, ranges = getattr(study.task, "labels", None), getattr(study.task, "ranges", None)
    if not labels or not ranges:
        return NAME
    return max(hospital.letters, *(len(json.dumps(json.dumps(name))) for name in (*labels, *ranges)))


def sent(file: StudyFile, study: Study, code: Code) -> int:
    """The bytes of a message: at most those of what the question takes, or about what the method's card says."""
    if code.takes is not None:
        return most(code.takes(study.terms))
    from fedscan.methods.registry import get

    message = published(study.start(), study.names[0])
    if code.name == study.evaluate.name:
        return pack(message).nbytes
    some = message["weights"]
    schema: Schema = (some if isinstance(some, Weights) else next(iter(some.values()))).schema
    return get(file.method).card.down(schema, file.method_options)


def flattened(tree: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """The values of nested tables by dotted name, in order of their names."""
    found: list[tuple[str, Any]] = []
    for key in sorted(tree):
        value = tree[key]
        if isinstance(value, Mapping) and value:
            found += flattened(value, f"{above}{key}.")
        else:
            found.append((f"{above}{key}", value))
    return found


def mark(asks: Asks) -> str:
    """SHA-256 of all that is asked: what an approval is given for."""
    return digest(asks.plain())
