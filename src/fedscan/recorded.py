"""Sites above any engine: every question and answer is a row before the round sees it, so a round can be run again.

An engine only carries: it is given letters and hands back what came. All that a run decides is decided here, once,
and recorded: what fits and what is refused, who is missing, in which order answers arrived. To resume, the round is
called again; what was recorded comes from disk and only the rest goes out.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from fedscan import wire
from fedscan.heap import give_back, release_freed
from fedscan.journal import Journal, Row
from fedscan.memory import Base, Damaged, read_sound
from fedscan.method import Absent, Message, Question, Replies, State, Tree
from fedscan.site import seed_of
from fedscan.spec import Group, Refused
from fedscan.study import Study, Turn, numbers_of
from fedscan.wire import Parcel

COMMIT_SECONDS = 5.0  # of site work that may be computed again after a kill
COMMIT_BYTES = 64 << 20  # of answers held in memory before they go to disk


class Diverged(RuntimeError):
    """A round that is run again would say something else than it said."""


@dataclass(frozen=True)
class Letter:
    """One question on its way to one site."""

    turn: Turn
    question: str
    message: Message
    parcel: Parcel
    base: Base
    started: bool = False  # asked with ``start``: nobody waits for it
    again: bool = False  # asked before, without an answer that was accepted
    due: float = 0.0  # in a simulation, when a started question is answered
    known: frozenset[str] = frozenset()  # SHA-256 of weights in the message that the site has from an earlier one


@dataclass
class Answer:
    """What came back: a reply in memory or in a file, or why there is none."""

    turn: Turn
    reply: Tree | None = None
    file: Path | None = None
    refused: str = ""
    absent: str = ""
    digest: str = ""
    nbytes: int = 0
    seconds: float = 0.0
    changed: bool = True  # whether the site's memory did
    proof: str = ""  # what the site has signed of it, where sites sign
    whole: bool = False  # whether all of the message travelled, because the site had not what it was believed to have

    def read(self, spec: Group | None = None) -> Tree:
        """The reply, from memory or mapped from its file, which may announce no more than ``spec`` has room for."""
        if self.reply is not None:
            return self.reply
        assert self.file is not None
        return wire.read_file(self.file, spec)


class Engine(Protocol):
    """Carries letters to sites and answers back. Decides nothing."""

    names: tuple[str, ...]

    def send(self, letters: Sequence[Letter]) -> None:
        """Puts letters on their way."""
        ...

    def receive(self, started: bool) -> Answer:
        """The next answer: of those started, or of those waited for."""
        ...

    def keep(self, answers: Sequence[Answer], whole: bool) -> None:
        """Puts the new memories of these turns on the sites' disks and, where ``whole``, the answers too."""
        ...

    def settle(self, needed: Callable[[str], Sequence[Base]]) -> None:
        """Every site may drop the turns that are not ``needed`` of it."""
        ...

    def close(self) -> None: ...


class Recorded:
    """Keeps the promise of ``Sites`` over an engine and a journal. One object serves one run in one process."""

    def __init__(
        self, study: Study, engine: Engine, journal: Journal, *, commit_seconds: float = COMMIT_SECONDS
    ) -> None:
        self.study, self.engine, self.journal, self.names = study, engine, journal, study.names
        self.commit_seconds = commit_seconds
        self.round = 0
        self.notice: Callable[[Row], None] = lambda row: None
        self._specs: dict[str, Group] = {}
        self._open: dict[Turn, Row] = {}  # started and not yet arrived
        self._messages: dict[Turn, Parcel] = {}
        self._clock = 0.0  # simulated time: when the last started question was answered
        self._nothing_pending()
        self._restart()

    def _nothing_pending(self) -> None:
        self._pending: list[Answer] = []  # accepted, and lost by a kill
        self._seconds, self._bytes = 0.0, 0

    # -- rounds ------------------------------------------------------------------------------------------------------

    def begin(self, round: int) -> None:
        """Starts (or starts again) a round: the first call is 0, the first arrival is 0."""
        self.round, self._call, self._position = round, 0, 0
        self._asked: dict[int, set[str]] = {}  # whom each call asked when the round was begun before
        for row in self.journal.rows("round = ?", round):
            self._asked.setdefault(row.turn.call, set()).add(row.turn.site)

    def skip(self) -> None:
        """Gives up what sites remember of this round: they go on from where they stood when it began, as the server.

        Answers to started questions keep theirs: they were not asked by this round alone.
        """
        if any(call >= self._call for call in self._asked):
            return  # it was done before a kill, and sites have answered since
        first: dict[str, Row] = {}
        for row in self.journal.rows("round = ? AND due = 0", self.round):
            first.setdefault(row.turn.site, row)
        for site, row in first.items():
            self.journal.restore_base(site, row.base)
        self._pending = [a for a in self._pending if (r := self.journal.row(a.turn)) and r.due]

    def end(self, state: State, scores: Sequence[Any] = (), finished: bool = False) -> None:
        """Ends the round: accepted memories to disk, HEAD moved, then what is past is dropped."""
        if unsaid := [call for call in self._asked if call >= self._call]:
            raise self._diverged(min(unsaid), "is not asked any more")
        self.engine.keep(self._pending, whole=False)
        for row in self._open.values():
            self._keep_message(row)
        self.journal.end_round(self.round, state, scores, finished)
        self._nothing_pending()
        self._drop_messages()
        self.engine.settle(self._needed)

    def commit(self) -> None:
        """Makes every answer so far survive a kill."""
        self.engine.keep(self._pending, whole=True)
        for answer in self._pending:
            row = self.journal.row(answer.turn)
            assert row is not None
            assert answer.file is not None
            row.file = str(answer.file.relative_to(self.journal.folder))
            self.journal.put(row)
        self.journal.commit()
        self._nothing_pending()
        release_freed()  # the answers, which are on disk now

    def _needed(self, site: str) -> list[Base]:
        """The turns of a site that may still be started from, or whose answer has not arrived."""
        waited_for = [row for row in self._open.values() if row.turn.site == site]
        bases = [row.base for row in waited_for]
        return [self.journal.base(site), *bases, *((row.turn.round, row.turn.call) for row in waited_for)]

    # -- questions and answers ---------------------------------------------------------------------------------------

    def ask(self, question: Question, message: Message, *, to: Sequence[str] | None = None, need: int = 1) -> Replies:
        """Puts one question to many sites and waits."""
        return self.ask_each(question, dict.fromkeys(self.names if to is None else to, message), need=need)

    def ask_each(self, question: Question, messages: Mapping[str, Message], *, need: int = 1) -> Replies:
        """Puts a question with a message for each site, and waits until the call is closed.

        Raises Absent where fewer than ``need`` answered, or anyone is missing and the study says stop.
        """
        call = self._call
        self._call += 1
        rows, letters = self._letters(question, messages, call)
        missing = self.journal.closed(self.round, call)
        replies: dict[str, Callable[[], Tree]] = {}
        waiting = {}
        for name, row in rows.items():
            if row.status == "answered":
                replies[name] = self._from_disk(row)
            elif missing is None and (row.status == "open" or self.study.absent == "stop"):
                waiting[name] = replace(letters[name], again=row.status != "open")
        resident = not replies
        self.engine.send(list(waiting.values()))
        while waiting:
            answer = self.engine.receive(started=False)
            row = rows[answer.turn.site]
            if answer.absent and self.study.absent == "wait":
                self.engine.send([replace(waiting[answer.turn.site], again=True)])
                continue
            letter = waiting.pop(answer.turn.site)
            if self._accept(row, answer, question, letter.parcel):
                replies[answer.turn.site] = answer.read
            resident = not self._commit_if_due() and resident
        if missing is None:
            missing = tuple(sorted(set(messages) - set(replies)))
            if missing and self.study.absent == "stop":
                self.commit()  # the call stays open: when the run is resumed, the missing are asked again
                raise Absent(missing, question.name)
            self.journal.close_call(self.round, call, missing)
        if len(replies) < need:
            raise Absent(missing, question.name)
        return Replies(replies, missing, resident)

    def start(self, question: Question, messages: Mapping[str, Message]) -> None:
        """Puts a question and does not wait."""
        call = self._call
        self._call += 1
        rows, letters = self._letters(question, messages, call)
        for name, row in rows.items():
            self._open[row.turn], self._messages[row.turn] = row, letters[name].parcel
            if row.status == "open":
                row.due = row.due or self._clock + self.study.seconds.get(name, 1.0)
                self.journal.put(row)
                self.engine.send([replace(letters[name], started=True, due=row.due)])

    def next(self) -> tuple[str, Tree]:
        """The next answer to arrive of those started; one that is refused or absent is passed over.

        Raises Absent where none is under way.
        """
        while self._open:
            turn = self.journal.arrival(self.round, self._position)
            row = self.journal.row(turn) if turn else None
            if turn is None or row is None or row.status == "open":
                answer = self.engine.receive(started=True)
                turn, row = answer.turn, self._open[answer.turn]
                question = self.study.questions[row.question]
                read: Callable[[], Tree] | None = (
                    answer.read if self._accept(row, answer, question, self._messages[turn]) else None
                )
                self.journal.arrive(self.round, self._position, turn)
                self._commit_if_due()
            else:
                read = self._from_disk(row) if row.status == "answered" else None
            self._position += 1
            self._clock = max(self._clock, row.due)
            self._open.pop(turn, None)
            self._messages.pop(turn, None)
            if read is not None:
                return turn.site, read()
        raise Absent(self.names, "next")

    @property
    def busy(self) -> tuple[str, ...]:
        """Sites that were asked with ``start`` and have not answered."""
        return tuple(sorted(turn.site for turn in self._open))

    def random(self, label: str) -> torch.Generator:
        """A generator for the server, keyed by study, round and label."""
        return torch.Generator().manual_seed(seed_of(self.study.seed, "server", self.round, label))

    def once(self, label: str, make: Callable[[], Tree]) -> Tree:
        """The result of ``make``, computed once per round and label, and recorded."""
        path = self.journal.once(self.round, label)
        if path is None:
            parcel = wire.pack(make())
            path = self.journal.folder / "state" / f"once.{parcel.digest}.safetensors"
            wire.write_file(path, parcel, durable=self.journal.durable)
            self.journal.put_once(self.round, label, str(path.relative_to(self.journal.folder)))
            self.commit()
        return wire.read_file(path)

    # -- within ------------------------------------------------------------------------------------------------------

    def _letters(
        self, question: Question, messages: Mapping[str, Message], call: int
    ) -> tuple[dict[str, Row], dict[str, Letter]]:
        """A row and a letter for each site, in name order; rows that are in the journal are held to what they said."""
        rows, letters, parcels = {}, {}, {}
        now, asked = time.time(), self._asked.get(call, set(messages))
        if asked != set(messages):
            raise self._diverged(call, f"would now be asked of {', '.join(sorted(messages)) or 'nobody'}")
        for name in sorted(messages):
            turn, message = Turn(self.round, call, name), messages[name]
            if id(message) not in parcels:
                parcels[id(message)] = wire.pack(message)
            parcel = parcels[id(message)]
            known = self._known(name, parcel)
            row = self.journal.row(turn)
            if row is None:
                base, down = self.journal.base(name), parcel.nbytes - sum(parcel.blobs[d] - 32 for d in known)
                row = Row(turn, question.name, question.privacy, parcel.digest, down, now, base)
                self.journal.put(row)
            elif (row.asked, row.question) != (parcel.digest, question.name):
                raise self._diverged(call, f"({question.name}) would now say something else to {name}")
            rows[name] = row
            letters[name] = Letter(turn, question.name, message, parcel, row.base, known=known)
        return rows, letters

    def _diverged(self, call: int, what: str) -> Diverged:
        return Diverged(
            f"round {self.round}, call {call} {what}: it was begun by another version of the study or of the method; "
            "go on with that one, or begin a new run"
        )

    def _known(self, site: str, parcel: Parcel) -> frozenset[str]:
        """Weights of a message that a site has from the last one it answered: they go by their hash."""
        return frozenset(parcel.blobs.keys() & set(self.journal.held(site))) if parcel.blobs else frozenset()

    def _accept(self, row: Row, answer: Answer, question: Question, parcel: Parcel) -> bool:
        """Decides what becomes of an answer, and writes it into its row. True where the round will see it."""
        again = bool(row.why)  # refused or absent before
        row.seconds, row.answered, row.bytes_up, row.why = answer.seconds, answer.digest, answer.nbytes, ""
        if answer.whole:
            row.bytes_down = parcel.nbytes
        if answer.absent or answer.refused:
            row.status, row.why = ("absent", answer.absent) if answer.absent else ("refused", answer.refused)
        else:
            if answer.file is not None:
                give_back(parcel.leaves)  # beside what came, what was sent need not lie in memory too
            try:
                spec = self._spec(question)
                tree = answer.read(spec)
                spec.check(tree, f"the answer of {row.turn.site} to {question.name}")
                row.status, row.numbers = "answered", numbers_of(tree)
                if answer.changed:
                    self.journal.set_base(row.turn)
                if blobs := parcel.blobs:
                    self.journal.set_held(row.turn.site, blobs)
                self._pending.append(answer)
            except Refused as e:
                row.status, row.why = "refused", str(e)
        self.journal.put(row)
        if answer.proof or again:
            self.journal.put_proof(row.turn, answer.proof)
        self.journal.event(f"answered {row.turn}")
        self.notice(row)
        self._seconds += answer.seconds
        self._bytes += answer.nbytes
        return row.status == "answered"

    def _spec(self, question: Question) -> Group:
        if question.name not in self._specs:
            self._specs[question.name] = question.gives(self.study.terms)
        return self._specs[question.name]

    def _commit_if_due(self) -> bool:
        due = self._seconds >= self.commit_seconds or self._bytes >= COMMIT_BYTES
        if due:
            self.commit()
        return due

    def _from_disk(self, row: Row) -> Callable[[], Tree]:
        path = self.journal.folder / row.file

        def read() -> Tree:
            try:
                return read_sound(path, row.answered, self._spec(self.study.questions[row.question]))
            except (OSError, ValueError) as e:
                raise Damaged(
                    f"the answer of {row.turn.site} in round {row.turn.round}, {path}, cannot be used ({e}): put that "
                    "file back from a copy and go on, or begin a new run in another folder"
                ) from e

        return read

    # -- started questions, which outlive their round ----------------------------------------------------------------

    def _message_file(self, turn: Turn) -> Path:
        return self.journal.folder / "asks" / f"{turn}.safetensors"

    def _keep_message(self, row: Row) -> None:
        path = self._message_file(row.turn)
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            wire.write_file(path, self._messages[row.turn], durable=self.journal.durable)

    def _drop_messages(self) -> None:
        """Drops the kept messages of started questions that have arrived for good."""
        kept = {self._message_file(turn) for turn in self._open}
        for path in (self.journal.folder / "asks").glob("*.safetensors"):
            if path not in kept:
                path.unlink()

    def _restart(self) -> None:
        """Sends again, after a resume, what was started in a settled round and has not arrived."""
        head = -1 if self.journal.head is None else self.journal.head
        arrived = self.journal.arrived(head)
        for row in self.journal.rows("round <= ? AND due > 0", head):
            if row.turn in arrived:
                self._clock = max(self._clock, row.due)
                continue
            message = wire.read_file(self._message_file(row.turn))
            self._messages[row.turn] = parcel = wire.pack(message)
            self._open[row.turn] = row
            if row.status == "open":  # else it arrived in the round that is run again, and its answer is on disk
                letter = Letter(row.turn, row.question, message, parcel, row.base, started=True, due=row.due)
                self.engine.send([letter])
