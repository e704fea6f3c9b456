"""Sites that are elsewhere: the engine over a carrier that may lose, repeat, delay and reorder what it carries.

For each site one thread asks, and asks again until there is an answer. A deadline is a lease: it is renewed whenever
the site shows progress, so a big hospital is not dropped while it works, and a dead one costs no more than one lease.
What becomes of an answer is for the run to decide and to record; here nothing is decided.
"""

import hashlib
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedscan import wire
from fedscan.engines import envelope
from fedscan.engines.doors import Barred, Came, Carrier, Data, Lost
from fedscan.engines.envelope import ANSWER, EPOCH, MOST_PART, REQUEST, Seal, Talk
from fedscan.engines.incoming import LACKS
from fedscan.engines.outgoing import Outgoing
from fedscan.memory import Base, Event, digest_of, nothing
from fedscan.recorded import Answer, Letter
from fedscan.spec import Refused
from fedscan.study import Study, Turn

LEASE = 600.0  # seconds without any progress after which a site is absent
SLACK = 20.0  # seconds more in which what was said has to come through
LEAST_PART = 4 << 20  # bytes that a line brings within those seconds; a slower one brings nothing large
LAST = 5.0  # seconds for what is said when the lease has all but run out
MOST_SECONDS = 1e9  # that an answer may be said to have taken
PROVEN = ("turn", "question", "asked", "ledger")  # what a site signs of the request, with its answer
MOST_PROOF = 16 << 10  # bytes of a signed header
LATER = 30.0  # seconds before a site that answers at other times is asked again
PAUSES = (0.05, 2.0)  # seconds before what was lost is asked for again: at first, and at most
Said = tuple[dict[str, Any], memoryview, str]  # header, body, and the header as it was signed
Tell = Callable[[str, str], None]  # site, and what it is waited for, in a sentence


def nobody(site: str, sentence: str) -> None:
    """Tells nobody."""


class SiteFailed(RuntimeError):
    """A site ended in an error, and would again. What went wrong stands in its own log."""


class Line:
    """The coordinator's end of the conversation with one site: requests sealed, what comes back held to them."""

    def __init__(self, site: str, carrier: Carrier, talk: Talk, seal: Seal, epoch: int) -> None:
        self.site, self.carrier, self.talk, self.seal = site, carrier, talk, seal
        self._any_run = replace(talk, run="")  # an answer names its request, and so the run
        self._number = epoch * EPOCH
        self.part = min(carrier.manner.part, MOST_PART)
        self._life, self._since = "", 0  # the site's process, and the last request by when it was first heard
        self._former: dict[str, int] = {}  # those before it, and the last request that each may yet have answered
        self._twice, self._lock = "", threading.Lock()

    def say(self, header: Mapping[str, Any], body: Data = b"", wait: float = 0.0, most: float = math.inf) -> Said:
        """What the site says, which may take it ``wait`` seconds, and ``most`` with the way there and back: the
        header, the body, and the header as the site signed it.

        Raises Lost, with a sentence, where nothing comes, or nothing that can be believed, and Barred as the carrier.
        """
        return self._brought(self._sealed(header, body, wait), min(wait + SLACK, most))

    def flow(self, things: Iterable[tuple[Mapping[str, Any], Data]]) -> Generator[tuple[dict[str, Any], memoryview]]:
        """What the site says to one thing after another, in their order; several are under way at once.

        Raises Lost as ``say`` does; what was under way then has come to its end too.
        """
        flight, under = self.carrier.manner.flight, deque[Future[Said]]()
        ready: queue.SimpleQueue[tuple[Came, Future[Said]] | None] = queue.SimpleQueue()
        for _ in range(flight):  # daemons: a process that is to end does not wait for what is under way, as for a pool
            threading.Thread(target=self._bring, args=(ready,), daemon=True).start()
        try:
            for header, body in things:
                under.append(Future())
                ready.put((self._sealed(header, body), under[-1]))
                if len(under) == flight:
                    yield under.popleft().result()[:2]
            while under:
                yield under.popleft().result()[:2]
        finally:
            for _ in range(flight):
                ready.put(None)
            wait(under)

    def _bring(self, ready: "queue.SimpleQueue[tuple[Came, Future[Said]] | None]") -> None:
        while (thing := ready.get()) is not None:
            request, said = thing
            try:
                said.set_result(self._brought(request, SLACK))
            except BaseException as e:  # it is raised where the result is waited for
                said.set_exception(e)
            del thing, request, said  # parts are large

    def refresh(self) -> None:
        """Tries larger parts again, where smaller ones had to do."""
        self.part = min(2 * self.part, self.carrier.manner.part, MOST_PART)

    def _sealed(self, header: Mapping[str, Any], body: Data, wait: float = 0.0) -> Came:
        self._number += 1
        whole = {**header, "number": self._number, "wait": wait}
        return envelope.sealed(REQUEST, whole, body, self.talk, self.site, self.seal)

    def _brought(self, request: Came, seconds: float) -> Said:
        number = self._number
        if self._twice:
            raise Barred(self._twice)
        try:
            data = self.carrier.call(self.site, request, seconds)
        except Barred:
            raise
        except Lost as e:
            self.part = max(self.part // 2, min(self.part, LEAST_PART))  # maybe it was too large for its time
            raise Lost(envelope.plain(e)) from e  # whoever carries it has signed nothing
        try:
            told, out = envelope.opened(ANSWER, data, self._any_run, self.site, self.seal)
        except Refused as e:
            raise Lost(envelope.plain(e)) from e
        if told.get("of") != envelope.mark(request):
            raise Lost(f"{self.site} answered another request")
        self._hold_life(str(told.get("life"))[:32], number)
        match told.get("status"):
            case "unheard":
                raise Lost(f"{self.site} does not take the request: {envelope.plain(told.get('why'))}")
            case "unable":
                raise Lost(envelope.plain(told.get("why")))
        return told, out, envelope.signed_part(data)

    def _hold_life(self, life: str, number: int) -> None:
        """Raises Barred, from now on, where one process of the site was followed by another and yet answers again.

        One that was started anew has another life than the one before, which answers what it was asked by then at most.
        """
        with self._lock:
            if number > self._former.get(life, number):
                self._twice = (
                    f"two processes answer as {self.site}, by turns: its folder was copied, so end one of them, have "
                    "the certificate revoked and a new one given if the copy is not yours, and serve again"
                )
                raise Barred(self._twice)
            if life in self._former or life == self._life or number <= self._since:
                return  # the last of these was under way when the one that is heard now was first heard
            if self._life:
                self._former[self._life] = self._number
            self._life, self._since = life, self._number


class Remote:
    """The engine of studies between hospitals, for one process of the coordinator.

    ``epoch`` has to be larger than that of every earlier start of the same run; ``most`` says how many bytes an answer
    to a question may have; ``longest`` is how many seconds a site is waited for, whatever progress it shows;
    ``ledger`` tells the last seal of the record, which each site countersigns with its answer.
    """

    def __init__(
        self, study: Study, folder: Path, carrier: Carrier, talk: Talk, seal: Seal, epoch: int, *,
        most: Callable[[str], int] = lambda question: 1 << 40, lease: float = LEASE, patience: float | None = None,
        longest: float = math.inf, durable: bool = True, tell: Tell = nobody, event: Event = nothing,
        ledger: Callable[[], str] = str,
    ) -> None:  # fmt: skip
        self.study, self.names, self.folder, self.most = study, study.names, folder, most
        patience = carrier.manner.patience if patience is None else patience
        self.lease, self.patience = lease, min(patience, lease / 4)  # so that progress is seen in time
        self.longest, self.durable, self.tell, self.event = longest, durable, tell, event
        self.lines = {name: Line(name, carrier, talk, seal, epoch) for name in study.names}
        (folder / "answers").mkdir(parents=True, exist_ok=True)
        self._letters: dict[str, queue.Queue[Letter | None]] = {name: queue.Queue() for name in study.names}
        self._done: dict[bool, queue.Queue[Answer | Exception]] = {True: queue.Queue(), False: queue.Queue()}
        self._settled: dict[str, Mapping[str, Any]] = {name: {} for name in study.names}
        self.leases: dict[str, Lease] = {}  # of the sites that are asked now
        self._spent: dict[str, tuple[int, Lease]] = {}  # of sites that were absent: in which round
        self._round = 0
        self._ledger, self._head = ledger, ""
        self._closing = threading.Event()
        for name in study.names:
            threading.Thread(target=self._serve, args=(name,), daemon=True).start()

    # -- the promise of an engine ------------------------------------------------------------------------------------

    def send(self, letters: Sequence[Letter]) -> None:
        """Puts letters on their way."""
        self._head = self._ledger()
        for letter in letters:
            self._round = max(self._round, letter.turn.round)
            self._letters[letter.turn.site].put(letter)

    def receive(self, started: bool) -> Answer:
        """The next answer, in the order in which they really came."""
        answer = self._done[started].get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def keep(self, answers: Sequence[Answer], whole: bool) -> None:
        """Sites kept their memories, and answers are files, before anybody was told: only their names may be lost."""
        if self.durable:
            wire.sync_folder(self.folder / "answers")

    def settle(self, needed: Callable[[str], Sequence[Base]]) -> None:
        """Drops the answers of what is past, and has the sites told with the next question what they may drop."""
        waited_for = set()
        for name in self.names:
            kept = [base for base in needed(name) if base is not None]
            self._settled[name] = {"past": self._round, "keep": [list(base) for base in kept]}
            waited_for |= {self._file(Turn(*base, name)).name for base in kept}
        for path in (self.folder / "answers").iterdir():
            if path.name.removesuffix(".partial") not in waited_for:
                path.unlink()

    def close(self) -> None:
        """Asks nobody any more. What sites work on is theirs, and is asked for when the run goes on."""
        self._closing.set()
        for letters in self._letters.values():
            letters.put(None)

    # -- one site ----------------------------------------------------------------------------------------------------

    def _serve(self, site: str) -> None:
        """Brings one letter after another to a site, until the engine is closed."""
        while (letter := self._letters[site].get()) is not None and not self._closing.is_set():
            found: Answer | Exception
            try:
                found = self._answer(letter)
            except Exception as e:  # it is raised where the answer is waited for
                found = e
            self.leases.pop(site, None)
            self._done[letter.started].put(found)
            del letter, found  # models are large, and freed by a daemon at the end of the process they abort it

    def _answer(self, letter: Letter) -> Answer:
        """What a site answers, however often it has to be asked; absent once its lease has run out."""
        site, line = letter.turn.site, self.lines[letter.turn.site]
        out, lease, pause, whole = Outgoing(letter), self._lease(letter), 0.0, True
        self.leases[site] = lease
        line.refresh()
        while not self._closing.is_set():
            asked, wait, why = time.monotonic(), min(self.patience, lease.left), ""
            try:
                request = {**out.header, **self._settled[site], "ledger": self._head, "part": line.part}
                sent = out.part(0, out.travels) if whole and out.travels <= line.part else b""
                told, body, proof = line.say(request, sent, wait, max(lease.left, LAST))
                match told.get("status"):
                    case "answered":
                        hold_proof(site, told, request, proof)
                        taken = self._taken(letter, told, body, request["part"], lease)
                        return replace(taken, proof=proof, whole=out.whole)
                    case "refused":
                        hold_proof(site, told, request, proof)
                        why = envelope.plain(told.get("why"))
                        return Answer(letter.turn, refused=why, changed=False, proof=proof, whole=out.whole)
                    case "failed":
                        raise SiteFailed(envelope.plain(told.get("why")))
                    case "need":
                        self._send_parts(line, out, told, bool(sent), lease)
                        asked, whole = -math.inf, True
                    case "working":
                        whole = False  # it has the message: not again, then
                        lease.progress(told.get("beats"))
                        self.tell(site, f"works on {letter.question}{lease.told()}")
                    case "later":
                        whole = False
                        lease.rest()
                        self.tell(site, f"answers later: {envelope.plain(told.get('why'))}")
                        self._closing.wait(LATER)
                    case _:
                        raise Lost(envelope.plain(told.get("why")))
            except Barred as e:
                self.tell(site, f"is absent: {e}")
                self._closing.wait(LATER if letter.again else 0.0)  # where a study waits for it all the same
                return Answer(letter.turn, absent=str(e))
            except Lost as e:
                why = f": {e}"
                self.tell(site, f"is waited for{why}{lease.told()}")
            if over := lease.over:
                self._spent[site] = (letter.turn.round, lease)
                self.tell(site, f"is absent: {over}{why}")
                return Answer(letter.turn, absent=f"{over}{why}"[:500])
            soon = time.monotonic() < asked + wait / 2  # not for a request that was kept as long as agreed
            pause = min(max(2 * pause, PAUSES[0]), PAUSES[1]) if soon else 0.0
            self._closing.wait(min(pause, lease.left))
        return Answer(letter.turn, absent="the run was stopped")

    def _lease(self, letter: Letter) -> "Lease":
        """A new lease; but what a site was absent with in this round is not granted twice, unless it shows progress."""
        round, spent = self._spent.pop(letter.turn.site, (0, None))
        return spent if spent and round == letter.turn.round and not letter.again else Lease(self.lease, self.longest)

    def _send_parts(self, line: Line, out: Outgoing, told: Mapping[str, Any], sent: bool, lease: "Lease") -> None:
        """Sends what a site still needs of a message, part by part; what is small goes with the question itself.

        Raises Lost where nothing is left to send: all of it was ``sent`` with the question.
        """
        have = told.get("have")
        if told.get("what") == LACKS and out.header["recipe"]:
            out.send_whole()
            have = 0
        elif sent or type(have) is not int or not 0 <= have < out.travels:
            raise Lost(f"{line.site} says that it lacks what it was sent")
        payload, total = out.header["payload"], out.travels
        if total <= line.part:
            return

        def parts(at: int) -> Iterator[tuple[Mapping[str, Any], Data]]:
            while at < total and not self._closing.is_set() and not lease.over:
                data = out.part(at, line.part)
                yield {"act": "part", "payload": payload, "at": at, "total": total}, data
                at += len(data)

        while type(have) is int and 0 <= have < total and not self._closing.is_set() and not lease.over:
            with closing(line.flow(parts(have))) as flow:
                for said, _ in flow:
                    before, have = have, said.get("have")
                    lease.further(payload, have)
                    if type(have) is not int or have <= before:
                        break  # it was not taken: on from where it stands

    def _taken(self, letter: Letter, told: Mapping[str, Any], body: memoryview, part: int, lease: "Lease") -> Answer:
        """An answer as a file of the run's folder. Raises Lost for what is not what the site says that it is."""
        match told:
            case {"answered": str(digest), "nbytes": int(size), "seconds": int() | float() as seconds,
                  "changed": bool(changed)} if size >= len(body) and 0 <= seconds <= MOST_SECONDS:  # fmt: skip
                pass
            case _:
                raise Lost(f"{letter.turn.site} describes its answer as nobody does")
        if size > (most := self.most(letter.question)):
            why = f"the answer of {letter.turn.site} to {letter.question} has {size} bytes; at most {most} are taken"
            return Answer(letter.turn, refused=why, changed=False)
        path = self._file(letter.turn)
        if size <= part:
            if len(body) != size or hashlib.sha256(body).hexdigest() != digest:
                raise Lost(f"the answer of {letter.turn.site} is not what its digest says")
            wire.put_file(path, lambda file: file.write(body), durable=self.durable)
        else:
            self._fetch(letter, digest, size, path, lease)
        self.event(f"taken {letter.turn}")
        return Answer(letter.turn, None, path, "", "", digest, size, float(seconds), changed)

    def _fetch(self, letter: Letter, digest: str, size: int, path: Path, lease: "Lease") -> None:
        """Fetches a large answer part by part, going on where an earlier attempt ended."""
        line, partial = self.lines[letter.turn.site], path.with_name(path.name + ".partial")
        turn = [letter.turn.round, letter.turn.call]
        with partial.open("ab") as file:

            def parts(at: int) -> Iterator[tuple[Mapping[str, Any], Data]]:
                while at < size:
                    part = min(line.part, size - at)
                    yield {"act": "fetch", "turn": turn, "answered": digest, "at": at, "part": part}, b""
                    at += part

            with closing(line.flow(parts(file.tell()))) as flow:
                for told, body in flow:
                    at = file.tell()
                    if told.get("at") != at or not 0 < len(body) <= min(MOST_PART, size - at):
                        raise Lost(f"{letter.turn.site} sent {len(body)} bytes of an answer where some were to come")
                    file.write(body)
                    lease.further("answer", at + len(body))
                    if lease.over:
                        raise Lost(f"{letter.turn.site} sends its answer too slowly")
            if self.durable:
                file.flush()
                os.fsync(file.fileno())
        if digest_of(partial) != digest:
            partial.unlink()
            raise Lost(f"the answer of {letter.turn.site} is not what its digest says")
        partial.rename(path)

    def _file(self, turn: Turn) -> Path:
        return self.folder / "answers" / f"{turn}.safetensors"


def hold_proof(site: str, told: Mapping[str, Any], request: Mapping[str, Any], proof: str) -> None:
    """Raises Lost unless what a site has signed can stand in the record: it names what it answers."""
    if any(told.get(key) != request[key] for key in PROVEN) or len(proof) > MOST_PROOF:
        raise Lost(f"{site} does not sign what it was asked, but something else")


class Lease:
    """How long a site is still waited for: ``seconds`` after its last progress, and no longer than ``longest``."""

    def __init__(self, seconds: float, longest: float = math.inf) -> None:
        self.seconds, self.longest, self._since = seconds, longest, time.monotonic()
        self._end = self._since + longest
        self._seen: object = None
        self._moved: dict[str, int] = {}

    def rest(self) -> None:
        """Renews the lease of a site that has said when it will answer."""
        self._since = time.monotonic()

    def progress(self, seen: object) -> None:
        """Renews the lease if what is seen is not what was seen before."""
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()

    def further(self, what: str, moved: object) -> None:
        """Renews the lease if more bytes of something have come over than ever before."""
        if isinstance(moved, int) and moved > self._moved.get(what, 0):
            self._moved[what], self._since = moved, time.monotonic()

    @property
    def left(self) -> float:
        """Seconds until it has run out; never less than 0."""
        return max(0.0, min(self._since + self.seconds, self._end) - time.monotonic())

    @property
    def over(self) -> str:
        """Why the site is not waited for any more; empty while it is."""
        if self.left > 0:
            return ""
        if time.monotonic() >= self._end:
            return f"no answer within {self.longest:g} s, the longest that any site is waited for"
        return f"no progress for {self.seconds:g} s"

    def told(self) -> str:
        """Until when, in words."""
        return f" (until {time.strftime('%H:%M:%S', time.localtime(time.time() + self.left))})"
