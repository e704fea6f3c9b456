"""Sites shared out over worker processes on this machine, each of one thread: the same bits for any number of them.

Workers are forked once, from a parent that has imported everything. The pipes carry short JSON. An answer lies in its
worker's tray, a piece of shared memory, and the parent puts it on the site's disk when the run says so; messages, and
answers for which a tray is too small, pass through files of the run's folder, as they would through a site's disk.
"""

import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from mmap import mmap
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import torch

from fedscan import wire
from fedscan.engines.local import Computed, Local, put_down
from fedscan.memory import Base, Damaged, Receipt, SiteDisk
from fedscan.recorded import Answer, Letter
from fedscan.study import Study, Turn
from fedscan.wire import Parcel

TRAY_BYTES = 4 << 20  # an answer and a memory up to this size take the tray: files would cost more than they carry


class WorkerDied(RuntimeError):
    """A worker process ended before it answered. Nothing is lost: the run can be resumed."""


class WorkerFailed(RuntimeError):
    """An answer ended in an error in a worker. ``kinds`` are the names of its class and of those it inherits from."""

    def __init__(self, text: str, kinds: Sequence[str]) -> None:
        super().__init__(text)
        self.kinds = tuple(kinds)


class Workers:
    """The engine of simulations on several cores. ``number`` forked processes answer for all sites."""

    def __init__(self, study: Study, folder: Path, number: int, *, durable: bool = False) -> None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise RuntimeError("worker processes cannot be forked once a GPU is in use: start them first")
        torch.set_num_threads(study.threads)
        torch.optim.SGD([torch.zeros(1)])  # imports what every optimiser needs, once, before the fork
        self.study, self.names, self.folder, self.durable = study, study.names, folder, durable
        self.disks = {n: SiteDisk(folder / "sites" / n, durable=durable) for n in study.names}
        self._outbox: dict[str, Path] = {}  # what lies in the outbox, by digest
        for left in (folder / "outbox").glob("*"):  # by a run that was killed
            left.unlink()
        self._waiting: deque[Letter] = deque()
        self._early: list[Answer] = []  # answers to started questions that nobody has asked for yet
        self._at: dict[int, Letter] = {}  # what each busy worker works on
        self._pipes: list[Connection[Any, Any]] = []
        self._trays: list[mmap] = []
        self._pids: list[int] = []
        self._started: dict[Turn, float] = {}
        self._computed: dict[Turn, tuple[Answer, Computed]] = {}  # and not yet on disk
        self._written: set[str] = set()
        for _ in range(number):
            self._fork()

    def _fork(self) -> None:
        here, there = Pipe()
        tray = mmap(-1, TRAY_BYTES)  # what the worker writes there, this process sees
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            here.close()
            for pipe in self._pipes:  # a sibling's pipe kept open would hide that its parent has gone
                pipe.close()
            status = 1
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                work(there, tray, Local(self.study, self.folder, durable=self.durable))
                status = 0
            finally:
                os._exit(status)
        there.close()
        self._pipes.append(here)
        self._trays.append(tray)
        self._pids.append(pid)

    def send(self, letters: Sequence[Letter]) -> None:
        self._waiting.extend(letters)
        self._started.update({x.turn: x.due for x in letters if x.started})
        self._hand_out()

    def _hand_out(self) -> None:
        """Gives each idle worker the next letter; no two letters of one site are worked on at once."""
        for i, pipe in enumerate(self._pipes):
            if i in self._at:
                continue
            busy = {letter.turn.site for letter in self._at.values()}
            letter = next((x for x in self._waiting if x.turn.site not in busy), None)
            if letter is None:
                return
            self._waiting.remove(letter)
            self._at[i] = letter
            self._put_down_base(letter)
            slip = {
                "turn": letter.turn, "question": letter.question, "base": letter.base, "again": letter.again,
                "message": str(self._post(letter.parcel)), "digest": letter.parcel.digest,
            }  # fmt: skip
            pipe.send_bytes(json.dumps(slip).encode())

    def _put_down_base(self, letter: Letter) -> None:
        """The memory that a letter starts from goes to disk, where any worker finds it."""
        if letter.base and (turn := Turn(*letter.base, letter.turn.site)) in self._computed:
            answer, computed = self._computed.pop(turn)
            put_down(self.disks[turn.site], answer, *computed, whole=True)

    def _post(self, parcel: Parcel) -> Path:
        """The file of a message; the same message to many sites is one file."""
        if parcel.digest not in self._outbox:
            path = self.folder / "outbox" / f"{parcel.digest}.safetensors"
            path.parent.mkdir(exist_ok=True)
            wire.write_file(path, parcel)
            self._outbox[parcel.digest] = path
        return self._outbox[parcel.digest]

    def receive(self, started: bool) -> Answer:
        while True:
            ready = self._due() if started else None
            if ready is not None:
                return ready
            answer = self._next_answer()
            self._written.add(answer.turn.site)
            if answer.turn not in self._started:
                return answer
            self._early.append(answer)

    def _due(self) -> Answer | None:
        """The started answer that is due first, once it has come: the simulated order, whoever was faster here."""
        first = min(self._started, key=lambda turn: (self._started[turn], turn.site, turn.call))
        for answer in self._early:
            if answer.turn == first:
                self._early.remove(answer)
                del self._started[first]
                return answer
        return None

    def _next_answer(self) -> Answer:
        busy = {self._pipes[i]: i for i in self._at}
        pipe = wait(list(busy))[0]
        assert isinstance(pipe, Connection)
        worker = busy[pipe]
        letter = self._at.pop(worker)
        try:
            slip = json.loads(pipe.recv_bytes())
        except (EOFError, OSError) as e:
            raise WorkerDied(
                f"the worker that answered for {letter.turn.site} in round {letter.turn.round} died "
                "(killed, or out of memory, of which fewer workers take less)"
            ) from e
        if "error" in slip:
            raise WorkerFailed(slip["error"], slip["kinds"])
        parts = taken(self._trays[worker], slip.pop("sizes"))  # before the next letter: its answer comes to lie there
        self._hand_out()
        file = Path(slip.pop("file")) if slip["file"] else slip.pop("file") or None
        answer = Answer(**{**slip, "turn": Turn(*slip["turn"]), "file": file})
        if parts:
            answer.reply = wire.unpack(parts[0])
            memory = wire.unpack(parts[1]) if answer.changed else {}
            receipt = Receipt(letter.parcel.digest, answer.digest, answer.nbytes, answer.seconds, answer.changed)
            self._computed[answer.turn] = (answer, Computed(Sealed(parts[0], answer.digest), memory, receipt))
        return answer

    def keep(self, answers: Sequence[Answer], whole: bool) -> None:
        """Writes the turns that came in a tray; of the others, workers kept every one before they answered."""
        for answer in answers:
            if answer.file is None and answer.turn in self._computed:
                put_down(self.disks[answer.turn.site], answer, *self._computed[answer.turn][1], whole=whole)
        early = {answer.turn for answer in self._early}
        self._computed = {turn: computed for turn, computed in self._computed.items() if turn in early}

    def settle(self, needed: Callable[[str], Sequence[Base]]) -> None:
        busy = {letter.turn.site for letter in self._at.values()}  # a worker writes there: after its answer, then
        for site in self._written - busy:
            self.disks[site].settle(needed(site))
        self._written &= busy
        waiting = {x.parcel.digest for x in (*self._waiting, *self._at.values())}
        for digest in self._outbox.keys() - waiting:
            self._outbox.pop(digest).unlink(missing_ok=True)

    def close(self) -> None:
        """Ends the workers."""
        for pipe in self._pipes:
            pipe.close()
        for i, pid in enumerate(self._pids):
            if i in self._at:
                os.kill(pid, signal.SIGTERM)  # it works on a turn nobody waits for any more
            os.waitpid(pid, 0)
        self._pids.clear()


def work(pipe: "Connection[Any, Any]", tray: mmap, desk: Local) -> None:
    """What a worker does: answers letters until the pipe is closed. A message to many sites is read once."""
    digest, message = "", {}
    while True:
        try:
            slip = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            if slip["digest"] != digest:
                digest, message = slip["digest"], wire.read_file(Path(slip["message"]))
            base = slip["base"]
            letter = Letter(
                Turn(*slip["turn"]), slip["question"], message, Sealed(b"", slip["digest"]),
                base and (base[0], base[1]), again=slip["again"],
            )  # fmt: skip
            answer = desk.answer(letter)
            sizes = laid(tray, desk, answer)
            reply = {**vars(answer), "reply": None, "file": str(answer.file or ""), "sizes": sizes}
        except Exception as e:  # a fault of a method or of a file: the parent stops the run and says which
            kinds = [kind.__name__ for kind in type(e).__mro__]
            where = f"{slip['turn'][2]}, round {slip['turn'][0]}, {slip['question']}"
            plain = "ValueError" in kinds or isinstance(e, Damaged)  # a sentence for users, the same in any process
            text = str(e) if plain else f"{where}: {type(e).__name__}: {e}"
            reply = {"error": text, "kinds": kinds}
        pipe.send_bytes(json.dumps(reply).encode())


def laid(tray: mmap, desk: Local, answer: Answer) -> list[int]:
    """Lays an answer, and a memory that changed, in the tray, and returns their sizes.

    What has no room there is kept on the site's disk, and there are no sizes.
    """
    computed = desk.hand_over(answer.turn)
    if computed is None:
        return []
    parcels = [computed.parcel, *([wire.pack(computed.memory)] if computed.receipt.changed else [])]
    sizes = [parcel.nbytes for parcel in parcels]
    if sum(sizes) > len(tray):
        put_down(desk.disks[answer.turn.site], answer, *computed, whole=True)
        return []
    tray.seek(0)
    for parcel in parcels:
        for chunk in parcel.chunks():
            tray.write(chunk)
    return sizes


def taken(tray: mmap, sizes: Sequence[int]) -> list[bytearray]:
    """Copies what was laid in a tray, one piece after another."""
    with memoryview(tray) as view:
        return [bytearray(view[end - size : end]) for size, end in zip(sizes, accumulate(sizes), strict=True)]


class Sealed(Parcel):
    """A message that was packed elsewhere: its bytes, where they are still needed, and its digest."""

    def __init__(self, data: bytes | bytearray, digest: str) -> None:
        super().__init__(data, ())  # type: ignore[arg-type]  # it is only written
        self.__dict__["digest"] = digest
