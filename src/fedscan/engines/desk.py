"""A site's end of the conversation: requests in, answers out, each turn computed once and kept on the site's disk.

A turn that was answered is answered again from there; what was lost on its way is only asked for again. Computing runs
beside the conversation, so that a request for what is not ready yet is answered at once: it is being worked on.
"""

import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedscan import wire
from fedscan.engines import envelope
from fedscan.engines.doors import Came, Data, Manner, room
from fedscan.engines.envelope import ANSWER, EPOCH, MOST_PART, REQUEST, Seal, Talk
from fedscan.engines.heads import Heads
from fedscan.engines.incoming import Incoming
from fedscan.engines.limits import Limits, hold_round, hold_test
from fedscan.engines.local import Computed, Local, put_down
from fedscan.engines.workers import Sealed
from fedscan.memory import Damaged, Event, Receipt, nothing
from fedscan.recorded import Answer, Letter
from fedscan.site import Splits
from fedscan.spec import Refused, Spec, brief
from fedscan.study import Study, Turn

LONGEST_WAIT = 60.0  # seconds that a request may be kept waiting
AFRESH = ("unable", "answered")  # a disk may have room by now; an answer is looked at where it lies
OVERTAKEN = 8  # requests back that one may come late
MOST_RUNS = 64  # of one study that a process of a site takes part in
Permit = Callable[[str, int], str]  # question and bytes of its message -> why it is not answered now, or ""


def anything(question: str, nbytes: int) -> str:
    """Permits whatever the study asks."""
    return ""


@dataclass
class Job:
    """One turn that is worked on, and what became of it."""

    key: tuple[int, int]  # round and call
    asked: str
    first: int  # beats of the desk when it was begun for the first time
    computed: tuple[Answer, Computed | None] | None = None  # and not on the disk yet
    done: threading.Event = field(default_factory=threading.Event)
    told: dict[str, Any] = field(default_factory=dict)


class Desk:
    """One site of one study, over any carrier. ``handle`` may be called from several threads.

    ``about`` is what the site says of itself when it is greeted; ``facts`` names its cases, and a run goes on only with
    those that it began with. ``permit`` is asked before a question is answered, and may refuse it by a Refused;
    ``limits`` is how many turns of each question are answered in one run, and ``runs`` how many runs of the study are
    begun here after the moment ``since`` (seconds since 1970), that of the yes; any number if None. ``hide`` takes out
    of a sentence what must not leave; ``log`` is told what happened, in full, and keeps it here.
    """

    def __init__(
        self, study: Study, name: str, folder: Path, talk: Talk, seal: Seal, *,
        about: Callable[[], Mapping[str, Any]] = dict, facts: str = "", permit: Permit = anything, most: int = 1 << 40,
        limits: Mapping[str, int] | None = None, runs: int | None = None,
        since: Callable[[], float] = float, hide: Callable[[str], str] = str, log: Callable[[str], None] = nothing,
        durable: bool = True, event: Event = nothing,
    ) -> None:  # fmt: skip
        self.name, self.folder, self.talk, self.seal = name, folder, talk, seal
        self.facts, self.ended = facts, threading.Event()
        self.life = secrets.token_hex(8)  # who has a copy of the folder has another
        self.about, self.permit, self.hide, self.log = about, permit, hide, log
        self.event, self.durable, self.most = event, durable, most
        self.limits, self.runs, self.since = limits, runs, since
        self.beats, self.again = 0, 0  # batches and cases that were worked on; those still to come once more
        self.computing = threading.Lock()  # one turn at a time: the default generators are the process's
        self.study = replace(study, data=self._beating(study))
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()

    def _beating(self, study: Study) -> Callable[[str], Splits]:
        return lambda name: Splits(*(Beating(split, self._beat) for split in study.data(name)))

    def _beat(self) -> None:
        if self.again:
            self.again -= 1
        else:
            self.beats += 1

    def handle(self, request: Came) -> Came:
        """What the site says to a request. Whatever is wrong with it is said in one sentence, and nothing is done."""
        body: Data
        run, body = "", b""
        try:
            header, data = envelope.opened(REQUEST, request, self.talk, self.talk.coordinator, self.seal)
            run = run_of(header)
            told, body = self._run(run).act(header, data)
        except Refused as e:
            self.log(f"not heard: {envelope.plain(e)}")
            told = {"status": "unheard", "why": self.hide(str(e))}
        except Exception as e:  # a full disk, or a fault here: what is wrong in full is said only here
            self.log(f"could not do what was asked: {type(e).__name__}: {envelope.plain(e)}")
            what = (isinstance(e, OSError) and e.strerror) or type(e).__name__
            told = {"status": "unable", "why": f"{self.name} could not do what it was asked ({what}): its log says why"}
        if "why" in told:
            told["why"] = envelope.plain(told["why"])
        talk = replace(self.talk, run=run)
        told = {**told, "of": envelope.mark(request), "life": self.life}
        return envelope.sealed(ANSWER, told, body, talk, self.talk.coordinator, self.seal)

    def takes(self, question: str) -> Spec | None:
        """What a question's message holds, where it says so. Raises Refused for a question that is not the study's."""
        if question not in self.study.questions:
            names = ", ".join(self.study.questions)
            raise Refused(f"{self.name} does not answer {brief(question)}; it answers {names}")
        takes = self.study.questions[question].takes
        return None if takes is None else takes(self.study.terms)

    def _run(self, run: str) -> "Run":
        with self._lock:
            if run not in self._runs:
                if len(self._runs) >= MOST_RUNS:
                    raise Refused(f"{self.name} takes part in {MOST_RUNS} runs already: start it again")
                self._runs[run] = Run(self, self.folder / run)
            return self._runs[run]

    def end(self) -> None:
        """Nothing is waited for any more, unless a run is open that this process was asked something in."""
        with self._lock:
            if not any(run.open for run in self._runs.values()):
                self.ended.set()

    def begin(self, path: Path, whole: bool) -> None:
        """Writes, where ``whole``, the file that begins a run. Raises Refused where none may be begun any more."""
        study = f"{self.talk.study}\n".encode()
        with self._lock:
            others, since = self.folder.glob(f"*/{path.name}"), self.since()
            begun = sum(o.read_bytes().startswith(study) and o.stat().st_mtime >= since for o in others)
            if self.runs is not None and begun >= self.runs:
                raise Refused(f"{self.name} has taken part in this study already; another run needs a new yes")
            if whole:
                data = study + self.facts.encode()
                wire.replace_file(path, lambda file: file.write(data), durable=self.durable)


class Run:
    """One run at a site: what it remembers of it, and the turn that is worked on."""

    def __init__(self, desk: Desk, folder: Path) -> None:
        self.desk, self.folder = desk, folder
        folder.mkdir(parents=True, exist_ok=True)
        names = (desk.name,)
        self.local = Local(desk.study, folder, names=names, durable=desk.durable, event=desk.event)
        self.disk = self.local.disks[desk.name]
        self.incoming = Incoming(folder / "incoming", desk.most)
        self.heads = Heads(folder / "heads.jsonl", desk.durable)
        self.epoch, self.past, self.kept = self._marks()
        self.number = self.epoch * EPOCH
        self.overtaken: set[int] = set()  # numbers before it that have not come, and yet may
        self.limits = Limits(folder / "answered.json", desk.limits, desk.durable)
        self.job: Job | None = None
        self._said: tuple[object, ...] = ()  # what was logged last of what may be asked again and again
        self.open = False  # asked something by now, and not at its end
        self.lock = threading.Lock()

    # -- requests ----------------------------------------------------------------------------------------------------

    def act(self, header: Mapping[str, Any], body: memoryview) -> tuple[dict[str, Any], Data]:
        """Does what a request says, if it is newer than all before. Raises Refused for what is malformed."""
        with self.lock:
            self._hold_number(header)
            self._hold_begun(header)
            match header:
                case {"act": "hello"}:
                    about = self.desk.about()
                    self._log(f"greeted by {self.desk.talk.coordinator}, for run {self.folder.name}")
                    return {"status": "ready", **about}, b""
                case {"act": "part", "payload": str(payload), "at": int(at), "total": int(total)}:
                    if stays := self._stays("a part of a message", "not taken", total):
                        return stays, b""
                    return {"status": "have", "have": self.incoming.put(payload, at, total, body)}, b""
                case {"act": "fetch", "turn": turn, "answered": str(answered), "at": int(at)}:
                    return self._fetch(turn_of(turn), answered, at, part_of(header))
                case {"act": "end", "why": str(why), "over": bool(over)}:
                    self.heads.keep(header.get("ledger", ""))
                    self.desk.log(envelope.plain(why))
                    if over:
                        self._end()
                    return vouched({"status": "ended"}, header), b""
                case {"act": "ask", "wait": int() | float() as wait}:
                    self.heads.keep(header.get("ledger", ""))
                    self.open = not self.over
                    self._settle(header)
                    job = self._ask(header, body)
                case _:
                    raise Refused("a request of a kind that this version does not know")
        if isinstance(job, dict):
            return self._with_answer(job, header)
        job.done.wait(min(wait, LONGEST_WAIT))
        if not job.done.is_set() or [*job.key] != header["turn"] or job.asked != header["asked"]:
            return {"status": "working", "beats": self.desk.beats}, b""  # maybe on what was asked before
        return self._with_answer(job.told, header)

    def _ask(self, header: Mapping[str, Any], body: memoryview) -> Job | dict[str, Any]:
        """The work on a turn, begun if it has to be, or what there is to say of it at once.

        While a site still works on what was asked before, that is the work to wait for.
        """
        match header:
            case {"turn": turn, "question": str(question), "asked": str(asked), "base": base}:
                key, base = turn_of(turn), None if base is None else turn_of(base)
            case _:
                raise Refused("a question without its turn, its base or the digest of its message")
        if self.job and (self.job.key, self.job.asked) == (key, asked) and self.job.told.get("status") not in AFRESH:
            return self.job
        known = self.disk.receipt(key)
        if known and self.disk.sound(key, known):
            if (known.asked, known.question) != (asked, question):
                why = f"{self.desk.name} was asked something else in round {key[0]}, call {key[1]}"
                self._log(f"{question[:60]} in round {key[0]}: {why}", key)
                return refusal(why)
            return answered(key, known)
        if key[0] <= self.past and key not in self.kept:
            raise Refused(f"round {key[0]}, call {key[1]} was settled: an old question was played again")
        if self.job and not self.job.done.is_set():
            return self.job
        where = f"{question[:60]} in round {key[0]}"
        try:
            takes = self.desk.takes(question)
            hold_round(self.desk.study, self.desk.name, key[0], question)
            self.limits.hold(self.desk.name, question, key)
            if why := self.desk.permit(question, size_of(header)):
                self._log(f"{where}: not now: {why}", key)
                return {"status": "later", "why": self.desk.hide(why)}
            message = self.incoming.message(header, body, takes)
            if not isinstance(message, str):
                hold_test(self.desk.study, self.desk.name, key[0], question, message)
        except Refused as e:
            self._log(f"{where}: {e}", key)
            return refusal(self.desk.hide(str(e)))
        if isinstance(message, str):
            return {"status": "need", "what": message, "have": self.incoming.have(str(header["payload"]))}
        return self._begin(Letter(Turn(*key, self.desk.name), question, message, Sealed(b"", asked), base))

    def _begin(self, letter: Letter) -> Job:
        key, asked, before, beats = letter.turn[:2], letter.parcel.digest, self.job, self.desk.beats
        again = before if before and (before.key, before.asked) == (key, asked) else None
        self.job = job = Job(key, asked, again.first if again else beats, again.computed if again else None)
        self.desk.again = beats - job.first  # what is done once more is no progress
        threading.Thread(target=self._work, args=(job, letter), daemon=True).start()
        return job

    def _work(self, job: Job, letter: Letter) -> None:
        """Computes a turn and puts it on the disk, whole, before anybody is told of it."""
        turn, where = letter.turn, f"{letter.question} in round {letter.turn.round}"
        try:
            if job.computed is None:
                with self.desk.computing:
                    job.computed = self.local.answer(letter), self.local.hand_over(turn)
            answer, computed = job.computed
            if answer.refused:
                job.told = refusal(self.desk.hide(answer.refused))
            else:
                assert computed is not None
                self.limits.count(letter.question, job.key)
                put_down(self.disk, answer, *computed, whole=True)
                job.told = answered(job.key, computed.receipt)
            job.computed = None
            if self.over:
                self._clear()  # the run has ended without it
            self.desk.log(f"{where}: {answer.refused or 'answered'}")
        except OSError as e:
            self.desk.log(f"{where}: {e}")
            what = e.strerror or type(e).__name__
            job.told = {"status": "unable", "why": f"{turn.site} cannot use its disk ({what}): its log says why"}
        except Exception as e:  # a fault of a method or of the site's own files: said in full only here
            self.desk.log(f"{where}: {type(e).__name__}: {e}")
            what = "its memory is damaged" if isinstance(e, Damaged) else type(e).__name__
            job.told = {"status": "failed", "why": f"{where} failed at {turn.site} ({what}): its own log says why"}
        finally:
            job.done.set()

    def _with_answer(self, told: dict[str, Any], header: Mapping[str, Any]) -> tuple[dict[str, Any], Data]:
        """What is said of an answer, and the answer itself where it is small; neither, where it must not leave."""
        stays = self._withheld(told["question"], told["turn"]) if told["status"] == "answered" else {}
        told = vouched(stays or told, header)
        if told["status"] != "answered" or told["nbytes"] > part_of(header):
            return told, b""
        return told, self.disk.answer(tuple(told["turn"])).read_bytes()

    def _withheld(self, question: str, turn: Sequence[int]) -> dict[str, Any]:
        """What is said where an answer that is ready must not leave (any more)."""
        return self._stays(f"{question} in round {turn[0]}", "answered, and not handed over", 0, question)

    def _stays(self, what: str, how: str, nbytes: int, question: str = "") -> dict[str, Any]:
        """What is said where nothing may come or leave: a yes may be undone at any moment."""
        try:
            why, told = self.desk.permit(question, nbytes), "later"
        except Refused as e:
            why, told = str(e), "refused"
        if not why:
            return {}
        self._log(f"{what}: {how}: {why}")
        return {"status": told, "why": self.desk.hide(why)}

    def _log(self, text: str, turn: Sequence[int] = ()) -> None:
        """Tells the hospital what was not answered, and who greets it: once, however often it is asked again."""
        if (said := (text, *turn)) != self._said:
            self._said = said
            self.desk.log(envelope.plain(text))

    def _fetch(self, turn: tuple[int, int], digest: str, at: int, part: int) -> tuple[dict[str, Any], Data]:
        """A part of an answer that is on the disk."""
        known = self.disk.receipt(turn)
        if known is None or known.answered != digest or not 0 <= at <= known.nbytes:
            raise Refused(f"there is no answer of round {turn[0]}, call {turn[1]} with that digest here")
        if stays := self._withheld(known.question, turn):
            return stays, b""
        found = room(min(part, known.nbytes - at))
        with self.disk.answer(turn).open("rb", buffering=0) as file:
            file.seek(at)
            data = memoryview(found)[: file.readinto(found)]
        return {"status": "part", "at": at, "question": known.question}, data

    # -- what is past ------------------------------------------------------------------------------------------------

    def _settle(self, header: Mapping[str, Any]) -> None:
        """Drops the turns of rounds that the coordinator has settled; a round is settled once, and never unsettled."""
        match header:
            case {"past": int(past), "keep": [*keep]} if past > self.past:
                kept = set(map(turn_of, keep))
            case _:
                return
        if self.job and not self.job.done.is_set():
            return  # its turn is not on the disk yet: after it, then
        self._mark(self.epoch, past, kept)
        self.disk.settle(kept)
        self.incoming.drop()

    @property
    def over(self) -> bool:
        """Whether the study has come to its end in this run: then all its rounds are settled, and the test too."""
        return self.past > self.desk.study.rounds

    def _end(self) -> None:
        """Ends this run for good, and with it the desk's work unless another run is open."""
        if not self.over:
            self._mark(self.epoch, self.desk.study.rounds + 1, set())
        self.open = False
        self._clear()
        self.desk.end()

    def _clear(self) -> None:
        """Drops answers and what came in parts; receipts, memories and the seals that were shown stay."""
        for path in self.disk.folder.glob("turns/*/answer.safetensors"):
            path.unlink(missing_ok=True)
        self.incoming.drop()

    def _hold_number(self, header: Mapping[str, Any]) -> None:
        """Raises Refused unless a request is newer than every one before it, also before a restart of this process.

        Of the parts of what is large several are under way at once: one that was overtaken by the next is heard, once.
        """
        number = header.get("number")
        late = number in self.overtaken and header.get("act") in ("part", "fetch")
        if type(number) is not int or (number <= self.number and not late):
            raise Refused("a request that is not newer than the last one: it was played again, or came late")
        if number // EPOCH > self.epoch:
            self._mark(number // EPOCH, self.past, self.kept)
            if self.job and self.job.told.get("status") == "failed":
                self.job = None  # what failed may have been mended before the coordinator was started again
        self.overtaken |= set(range(max(self.number + 1, number - OVERTAKEN), number))
        self.number = max(self.number, number)
        self.overtaken = {n for n in self.overtaken if self.number - OVERTAKEN <= n != number}

    def _hold_begun(self, header: Mapping[str, Any]) -> None:
        """Begins a run with its first question. Raises Refused where it may not, or was begun with other cases."""
        path, act = self.folder / "begun", header.get("act")
        if path.exists():
            if path.read_bytes() != f"{self.desk.talk.study}\n{self.desk.facts}".encode():
                raise Refused(
                    f"the cases of {self.desk.name} have changed since this run began: put them back, and join again"
                )
        elif act != "end":
            self.desk.begin(path, whole=act == "ask")

    def _marks(self) -> tuple[int, int, set[tuple[int, int]]]:
        path = self.folder / "marks.json"
        if not path.exists():
            return 0, -1, set()
        try:
            told = wire.loads(path.read_bytes())
            return int(told["epoch"]), int(told["past"]), set(map(turn_of, told["kept"]))
        except (ValueError, TypeError, KeyError) as e:
            raise Damaged(f"{path} is damaged: restore it from a copy, or have a new run begun") from e

    def _mark(self, epoch: int, past: int, kept: set[tuple[int, int]]) -> None:
        text = wire.dumps({"epoch": epoch, "past": past, "kept": sorted(kept)}).encode()
        wire.replace_file(self.folder / "marks.json", lambda file: file.write(text), durable=self.desk.durable)
        self.epoch, self.past, self.kept = epoch, past, kept


class Beating:
    """A split that tells when a batch or a case of it is worked on."""

    def __init__(self, split: Any, beat: Callable[[], None]) -> None:
        self._split, self._beat = split, beat

    def __getattr__(self, name: str) -> Any:
        return getattr(self._split, name)

    def __len__(self) -> int:
        return len(self._split)

    def batches(self, *args: Any) -> Iterator[Any]:
        """The batches of the split."""
        for batch in self._split.batches(*args):
            self._beat()
            yield batch

    def case(self, i: int) -> Any:
        """Case ``i`` of the split."""
        self._beat()
        return self._split.case(i)


def refusal(why: str) -> dict[str, Any]:
    """What is said of a question that is refused."""
    return {"status": "refused", "why": why}


def answered(turn: Sequence[int], receipt: Receipt) -> dict[str, Any]:
    """What is said of a turn that is answered."""
    return {
        "status": "answered", "turn": list(turn), "question": receipt.question, "asked": receipt.asked,
        "answered": receipt.answered, "nbytes": receipt.nbytes, "seconds": receipt.seconds, "changed": receipt.changed,
    }  # fmt: skip


def vouched(told: dict[str, Any], header: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of a turn, or of the end, with the seal of the record that was shown with the request.

    All of it is signed: so it proves the turn's row in the record, and countersigns the rounds up to that seal.
    """
    if told["status"] == "refused":
        asked = {key: str(header[key])[:200] for key in ("question", "asked")}
        told = {**told, "turn": header["turn"], **asked}
    elif told["status"] not in ("answered", "ended"):
        return told
    return {**told, "ledger": header.get("ledger", "")}


def run_of(header: Mapping[str, Any]) -> str:
    """The run that a request is of. Raises Refused for what can name none."""
    run = header.get("run")
    if not isinstance(run, str) or len(run) != 32 or set(run) - set("0123456789abcdef"):
        raise Refused("a run is named by 32 hexadecimal digits")
    return run


def turn_of(turn: object) -> tuple[int, int]:
    """Round and call, as they came. Raises Refused for what is no turn."""
    match turn:
        case [int(round), int(call)] if type(round) is type(call) is int and min(round, call) >= 0:
            return round, call
    raise Refused("a turn is two whole numbers, of its round and its call")


def part_of(header: Mapping[str, Any]) -> int:
    """The bytes of an answer that the coordinator takes at once."""
    part = header.get("part", Manner.part)
    if type(part) is not int or part < 1:
        raise Refused("a request that says of no number how many bytes are taken at once")
    return min(part, MOST_PART)


def size_of(header: Mapping[str, Any]) -> int:
    """The bytes of the message that a request speaks of."""
    size = header.get("nbytes")
    if type(size) is not int or size < 0:
        raise Refused("a question without the size of its message")
    return size
