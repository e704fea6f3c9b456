"""The coordinator carries out a study between hospitals: waits until all agree, asks, records, and writes the report.

Nothing of a hospital's scans is here: what the coordinator knows of them are the counts and codes that each hospital
says of itself, and the answers that its policy let out.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedscan import launch, wire
from fedscan.chain import last_seal
from fedscan.consortium.asks import hash_of, hold_between
from fedscan.consortium.countersigned import keep_end, keep_members
from fedscan.consortium.joining import taking_part
from fedscan.consortium.leaving import most
from fedscan.consortium.member import Home
from fedscan.consortium.sealing import KeySeal
from fedscan.consortium.status import LOCK, Status
from fedscan.disk import room_in
from fedscan.engines import alone
from fedscan.engines.doors import Barred, Came, Carrier, Lost, Manner
from fedscan.engines.envelope import Talk
from fedscan.engines.remote import LEASE, Line, Remote
from fedscan.heap import return_freed
from fedscan.journal import Journal
from fedscan.launch import How
from fedscan.ledger import SiteRow, opened, read_turns
from fedscan.method import State, published
from fedscan.run import Problem, run
from fedscan.spec import Refused
from fedscan.study import Study
from fedscan.studyfile import Cases, StudyFile, build
from fedscan.studyfile.cases import recipe_of

JOURNAL = "journal.sqlite"
AT_WORK = "another `fedscan serve` is at work on the run in {}: wait for it, or choose another --out"
THREE_DAYS = 259_200.0  # seconds for one answer at most, whatever progress a hospital shows: a weekend, and more
GREETING = 2.0  # seconds between two greetings of a hospital that is not ready
FAREWELL = 15.0  # seconds for telling all hospitals that nothing more is asked
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Reported(Cases):
    """The cases of a study as the hospitals speak of them: how many, and a code for each."""

    splits: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What the hospitals add to the study: which of their cases, by code, is in which split."""
        found = super().facts()
        return {**found, "splits": {name: self.splits[name] for name in sorted(self.splits)}}


@dataclass(frozen=True)
class Members:
    """Brings requests to those only who are on the coordinator's roster at that moment."""

    carrier: Carrier
    seal: KeySeal

    @property
    def manner(self) -> Manner:
        """How the carrier carries best."""
        return self.carrier.manner

    def call(self, site: str, request: Came, seconds: float) -> Came:
        """What the site said to the request. Raises Barred where it is no member any more, Lost where nothing came."""
        try:
            members = self.seal.roster.names("site")
        except Refused as e:
            raise Lost(str(e)) from e
        if site not in members:
            raise Barred(f"{site} is not on the roster any more, so it is not asked")
        return self.carrier.call(site, request, seconds)


@dataclass(frozen=True)
class Table:
    """Where a study between hospitals is carried out: who asks, over what, and how long a hospital is waited for.

    ``hold`` raises ValueError for a study whose largest message has too many bytes for the carrier; ``watch`` is given
    how the run stands, before its first hospital is greeted.
    """

    home: Home
    carrier: Carrier
    lease: float = LEASE
    longest: float = THREE_DAYS
    how: How = field(default_factory=How)
    show: Callable[[str, str], None] = lambda site, sentence: None
    hold: Callable[[int], None] = lambda nbytes: None
    watch: Callable[[Status], None] = lambda status: None


def serve(file: StudyFile, folder: Path, table: Table) -> Path:
    """Carries out a study between the hospitals of a consortium, in ``folder``, and returns the path of its report.

    It begins once every hospital of the study is there and has agreed to exactly this study. Raises as
    ``launch.launch``, and ValueError where another process is at work in ``folder``; with ``table.how.resume`` the run
    goes on between the hospitals that it began with, also without those who are not there or are no members any more.
    """
    home, how = table.home, table.how
    if home.role != "coordinator":
        raise Problem(f"{home.folder} is the folder of a {home.role}: a study comes from the coordinator's.")
    hold_between(file)
    hold_named(file)
    return_freed()
    members = home.roster.names("site")
    if alone.held(folder / LOCK):  # said before the journal, which that process holds, is opened
        raise ValueError(AT_WORK.format(folder))
    launch.free(folder, how.resume)
    cases = known(file, folder)
    names = tuple(row.name for row in cases.rows) if cases else taking_part(file, members)
    launch.ready(file)
    seal = KeySeal(home, "site")
    table = replace(table, carrier=Members(table.carrier, seal))
    with launch.writing(folder, "--out"), room_in(folder), alone.hold(folder / LOCK, AT_WORK.format(folder)):
        talk, epoch = begun(file, folder, home)
        with Status(folder, names, file.rounds, table.show) as status:
            table.watch(status)
            lines = {name: Line(name, table.carrier, talk, seal, epoch) for name in names}
            cases = cases or gathered(file, greeted(lines, status, file), folder)
            study = replace(build(file, cases), names=names, counts=counts(cases))
            table.hold(largest(study))
            launch.describe(file, cases, study, folder, how)
            launch.begin(file, study, how)
            launch.save_models(carried_out(study, folder, table, seal, talk, epoch + 1, status), folder)
    return launch.report(folder, how.tell) if how.report else folder


def largest(study: Study) -> int:
    """The bytes of the largest message of a study: what is published, or an answer at most."""
    answers = (most(question.gives(study.terms)) for question in study.questions.values())
    return max(wire.pack(published(study.start(), study.names[0])).nbytes, *answers)


def hold_named(file: StudyFile) -> None:
    """Raises Problem where a study leaves to the data what all hospitals have to read alike."""
    for what, named, where in (
        ("sequences", file.data.sequences, ("data", "sequences")),
        ("labels", file.tables["task"].labels, ("task", "labels")),
    ):
        if not named:
            raise Problem(f"{file.path}: a study between hospitals names its {what} itself ({'.'.join(where)}): "
                          "the coordinator cannot look at the scans to find out.")  # fmt: skip


def begun(file: StudyFile, folder: Path, home: Home) -> tuple[Talk, int]:
    """By what this run is known, and the first of three numbers that no earlier start of it has used.

    Raises Problem where the run was begun with a study that differs in anything: to that one hospitals have agreed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark = hash_of(file)
    with closing(Journal(folder, durable=True)) as journal:
        meta = journal.meta()
        if meta.get("asked", mark) != mark:
            changed = launch.difference(json.loads(meta["study"]), file.resolved(), ()) if "study" in meta else ""
            told = f" ({changed})" if changed else ""
            raise Problem(f"the run in {folder} was begun with another study than this one{told}, and to that one "
                          "hospitals have agreed: give it again as it was, or choose another --out.")  # fmt: skip
        name, epoch = meta.get("run", os.urandom(16).hex()), int(meta.get("epoch", "-2")) + 3
        journal.set_meta(run=name, epoch=str(epoch), plugins=json.dumps(file.plugins()), asked=mark)
        journal.commit()
    keep_members(home, folder)
    return Talk(mark, name, home.name), epoch


def greeted(lines: Mapping[str, Line], status: Status, file: StudyFile) -> dict[str, Mapping[str, Any]]:
    """What each hospital says of itself, once all are there and agree; until then they are greeted again and again.

    Under ``signed`` is the same as it has signed it.
    """
    said: dict[str, Mapping[str, Any]] = {}

    def greet(name: str) -> None:
        try:
            told, _, proof = lines[name].say({"act": "hello"})
            said[name] = {**fitting(name, told, file), "signed": proof}
            status.site(name, "is there, and agrees")
        except Lost as e:
            status.site(name, f"is waited for: {e}")

    while waiting := [name for name in lines if name not in said]:
        status.run(state="waits for " + ", ".join(waiting))
        with ThreadPoolExecutor(len(waiting)) as pool:  # at once: one that is far away keeps nobody waiting
            list(pool.map(greet, waiting))
        if len(said) < len(lines):
            time.sleep(GREETING)
    return said


def fitting(name: str, told: Mapping[str, Any], file: StudyFile) -> Mapping[str, Any]:
    """What a hospital said, if it is what hospitals say. Raises Lost, and it is greeted again, where it is not."""
    match told:
        case {"numerics": dict(numerics), "splits": {"train": [*_], "validation": [*_], "test": [*_], **rest},
              "expected": int(), "used": int(), "left_out": int(), "agreed": dict(agreed)} if (
                  not rest and all(map(sizes, agreed.values()))):  # fmt: skip
            codes = [code for part in SPLITS for code in told["splits"][part]]
        case _:
            raise Lost(f"{name} says of itself what this version cannot read")
    if any(not isinstance(code, str) or len(code) > 64 for code in codes) or len(set(codes)) != len(codes):
        raise Lost(f"{name} says of itself what this version cannot read")
    mine = file.numerics()
    unlike = [key for key in ("torch", "threads", "mode") if numerics.get(key) != mine[key]]
    if unlike:
        theirs = ", ".join(f"{key} {str(numerics.get(key))[:40]} and not {mine[key]}" for key in unlike)
        raise Lost(f"{name} computes with {theirs}: the numbers of a study come from one version, so install it there")
    return told


def sizes(found: object) -> bool:
    """Whether this is what a yes says of a question: the bytes of an answer and the number of answers, at most."""
    return isinstance(found, list) and len(found) == 2 and all(type(n) is int and 0 <= n < 1 << 62 for n in found)


def gathered(file: StudyFile, said: Mapping[str, Mapping[str, Any]], folder: Path) -> Reported:
    """The cases of the study, as the hospitals speak of them; what they have agreed to goes into the record."""
    with closing(Journal(folder, durable=True)) as journal:
        for key, of in (("agreed", "agreed"), ("greeted", "signed")):
            journal.set_meta(**{key: json.dumps({name: told[of] for name, told in sorted(said.items())})})
        journal.commit()
    rows = []
    for name in sorted(said):
        n = [len(said[name]["splits"][part]) for part in SPLITS]
        rows.append(SiteRow(name, int(said[name]["expected"]), sum(n), n[0], n[1], n[2]))
    return reported(file, rows, {name: told["splits"] for name, told in said.items()})


def reported(file: StudyFile, rows: Sequence[SiteRow], splits: Mapping[str, Any]) -> Reported:
    """Cases without scans."""
    labels, sequences = dict(file.tables["task"].labels), tuple(file.data.sequences or ())
    none: Mapping[str, tuple[Any, ...]] = dict.fromkeys(SPLITS, ())
    of = {row.name: none for row in rows}
    return Reported(sequences, labels, recipe_of(file, sequences, labels), of, tuple(rows), splits=splits)


def known(file: StudyFile, folder: Path) -> Reported | None:
    """The cases of the run that lies in the folder, if it has begun."""
    if not (folder / JOURNAL).exists():
        return None
    with closing(Journal(folder)) as journal:
        meta = journal.meta()
    if "facts" not in meta:
        return None
    rows = [SiteRow(**{**row, "left_out": ()}) for row in json.loads(meta["sites"])]
    return reported(file, rows, json.loads(meta["facts"])["splits"])


def counts(cases: Reported) -> dict[str, dict[str, int]]:
    """How many cases each hospital has, by split: what it is held to from then on."""
    return {name: {part: len(codes) for part, codes in splits.items()} for name, splits in cases.splits.items()}


def carried_out(
    study: Study, folder: Path, table: Table, seal: KeySeal, talk: Talk, epoch: int, status: Status
) -> State:
    """The rounds, from where the run stands to its end; then the hospitals are told that it is over."""

    def engine(study: Study, folder: Path) -> Remote:
        limits = {name: most(question.gives(study.terms)) for name, question in study.questions.items()}
        remote = Remote(
            study, folder, table.carrier, talk, seal, epoch, most=limits.__getitem__, lease=table.lease,
            longest=table.longest, tell=status.site, ledger=lambda: head_of(folder),
        )  # fmt: skip
        status.leases = remote.leases
        return remote

    def watch(what: str, value: Any) -> None:
        if what == "earlier":
            status.count((row.site, row) for row in value)
        elif what == "round":
            status.run(state="asks", round=value)
        elif what == "turn":
            status.turn(value)
        table.how.watch(what, value)

    with closing(opened(folder)) as db:
        watch("earlier", read_turns(db))
    began, over = time.monotonic(), False
    try:
        state = run(study, folder, resume=True, engine=engine, durable=True, commit_seconds=0.0, watch=watch)
        over = True
        return state
    finally:
        launch.add_seconds(folder, time.monotonic() - began)
        lines = {name: Line(name, table.carrier, talk, seal, epoch + 1) for name in study.names}
        head = head_of(folder)
        if (signed := farewell(lines, over, head)) and head:
            keep_members(table.home, folder)
            keep_end(folder, head, signed)


def head_of(folder: Path) -> str:
    """The last seal of the record in a run's folder."""
    with closing(opened(folder)) as db:
        return last_seal(db)


def farewell(lines: Mapping[str, Line], over: bool, head: str) -> dict[str, str]:
    """Tells the hospitals that nothing more is asked, for now or for good; who is not there is not waited for.

    Returns what they have signed of the record's last seal.
    """
    why = "the study has come to its end" if over else "the coordinator has stopped, and may go on later"
    signed: dict[str, str] = {}

    def tell(line: Line) -> None:
        with suppress(Lost):
            told, _, proof = line.say({"act": "end", "over": over, "why": why, "ledger": head})
            if (told.get("status"), told.get("ledger")) == ("ended", head):
                signed[line.site] = proof

    threads = [threading.Thread(target=tell, args=(line,), daemon=True) for line in lines.values()]
    for thread in threads:
        thread.start()
    until = time.monotonic() + FAREWELL
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return dict(signed)
