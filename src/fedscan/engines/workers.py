"""Sites shared out over worker processes on this machine, each of one thread: the same bits for any number of them.

Workers are forked once, from a parent that has imported everything. Messages and answers pass through files of the
run's folder, as they would through a site's disk; the pipes carry short JSON only.
"""

import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import torch

from fedscan import wire
from fedscan.engines.local import Local
from fedscan.memory import Base, SiteDisk
from fedscan.recorded import Answer, Letter
from fedscan.spec import Refused
from fedscan.study import Study, Turn
from fedscan.wire import Parcel


class WorkerDied(RuntimeError):
    """A worker process ended before it answered. Nothing is lost: the run can be resumed."""


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
        self._waiting: deque[Letter] = deque()
        self._early: list[Answer] = []  # answers to started questions that nobody has asked for yet
        self._at: dict[int, Letter] = {}  # what each busy worker works on
        self._pipes: list[Connection[Any, Any]] = []
        self._pids: list[int] = []
        self._started: dict[Turn, float] = {}
        self._written: set[str] = set()
        for _ in range(number):
            self._fork()

    def _fork(self) -> None:
        here, there = Pipe()
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
                work(there, Local(self.study, self.folder, durable=self.durable))
                status = 0
            finally:
                os._exit(status)
        there.close()
        self._pipes.append(here)
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
            slip = {
                "turn": letter.turn, "question": letter.question, "base": letter.base, "again": letter.again,
                "message": str(self._post(letter.parcel)), "digest": letter.parcel.digest,
            }  # fmt: skip
            pipe.send_bytes(json.dumps(slip).encode())

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
        letter = self._at.pop(busy[pipe])
        try:
            slip = json.loads(pipe.recv_bytes())
        except (EOFError, OSError) as e:
            raise WorkerDied(
                f"the worker that answered for {letter.turn.site} in round {letter.turn.round} died "
                "(out of memory, or killed); nothing is lost: go on with --resume, with fewer workers if it was memory"
            ) from e
        if "error" in slip:
            raise RuntimeError(f"{letter.turn.site}, round {letter.turn.round}, {letter.question}: {slip['error']}")
        self._hand_out()
        file = Path(slip.pop("file")) if slip["file"] else slip.pop("file") or None
        return Answer(**{**slip, "turn": Turn(*slip["turn"]), "file": file})

    def keep(self, answers: Sequence[Answer], whole: bool) -> None:
        """Nothing to do: workers keep every turn before they answer."""

    def settle(self, needed: Callable[[str], Sequence[Base]]) -> None:
        for site in self._written:
            self.disks[site].settle(needed(site))
        self._written.clear()
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


def work(pipe: "Connection[Any, Any]", desk: Local) -> None:
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
                Turn(*slip["turn"]), slip["question"], message, Sealed(slip["digest"]),
                base and (base[0], base[1]), again=slip["again"],
            )  # fmt: skip
            answer = desk.answer(letter)
            desk.keep([answer], whole=True)
            reply = {**asdict(answer), "reply": None, "file": str(answer.file or "")}
        except Refused as e:
            reply = {"error": str(e)}
        except Exception as e:  # a fault of a method or of a file: the parent stops the run and says which
            reply = {"error": f"{type(e).__name__}: {e}"}
        pipe.send_bytes(json.dumps(reply).encode())


class Sealed(Parcel):
    """A message that has been read: only its digest is still needed."""

    def __init__(self, digest: str) -> None:
        super().__init__(b"", ())
        self.__dict__["digest"] = digest
