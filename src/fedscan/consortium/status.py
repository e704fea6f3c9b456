"""How a run between hospitals stands: told in one place, from which folder, screen, log and measuring have it."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedscan import wire
from fedscan.engines import alone
from fedscan.engines.desk import Desk
from fedscan.engines.doors import Came
from fedscan.engines.envelope import signed_part
from fedscan.engines.remote import Lease

STATUS, LOCK = "status.json", "serve.lock"
QUIET = 45.0  # seconds without a byte, after which a connection is gone: engines notice one that died within 30
DOES = {  # how a sentence about a hospital begins, and what the hospital does then
    "not heard of yet": "waited for", "is waited for": "waited for",
    "is there": "answering", "works on": "answering", "answered": "answering", "refused": "answering",
    "answers later": "away",
    "is absent": "absent", "absent": "absent",
}  # fmt: skip
SPEAKS = ("is there", "works on", "answered", "refused", "answers later")  # what only who was heard can cause
COUNTS = {"answered": "answers", "refused": "refusals", "absent": "absences"}


class Status:
    """What is waited for, from whom and until when, as ``fedscan status`` reads it from the run's folder.

    ``told`` holds it as plain data, and ``leases`` the lease of each hospital that is asked at this moment.
    """

    def __init__(self, folder: Path, names: Sequence[str], rounds: int, show: Callable[[str, str], None]) -> None:
        self.folder, self.show, self._lock, self._written = folder, show, threading.Lock(), 0.0
        self.leases: Mapping[str, Lease] = {}
        self.told: dict[str, Any] = {"pid": os.getpid(), "state": "begins", "round": 0, "rounds": rounds, "sites": {}}
        for name in names:
            self.told["sites"][name] = {
                "state": "not heard of yet", "since": time.time(), "does": "waited for", "heard": None,
                "answers": 0, "refusals": 0, "absences": 0, "bytes_down": 0, "bytes_up": 0,
            }  # fmt: skip

    def __enter__(self) -> "Status":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        by_hand = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.run(state="stopped" if by_hand else "failed" if kind else "ended")

    def site(self, name: str, sentence: str) -> None:
        """Notes what a hospital does, or what is waited for."""
        with self._lock:
            known, now = self.told["sites"][name], time.time()
            if sentence.split(" (")[0] != known["state"].split(" (")[0]:
                self.show(name, sentence)
                known["since"] = now
            known["state"] = sentence
            known["does"] = next(does for begins, does in DOES.items() if sentence.startswith(begins))
            if sentence.startswith(SPEAKS):
                known["heard"] = now
            self._write(now=False)

    def turn(self, row: Any) -> None:
        """Notes what became of a question."""
        self.count([(row.turn.site, row)])
        self.site(row.turn.site, f"{row.status} {row.question}" + (f": {row.why}" if row.why else ""))

    def count(self, rows: Iterable[tuple[str, Any]]) -> None:
        """Adds what became of questions, each with the name of who was asked."""
        with self._lock:
            for name, row in rows:
                known = self.told["sites"][name]
                known[COUNTS[row.status]] += 1
                known["bytes_down"] += row.bytes_down
                known["bytes_up"] += row.bytes_up

    def run(self, **told: Any) -> None:
        """Notes how the run stands."""
        with self._lock:
            self.told.update(told)
            self._write(now=True)

    def _write(self, now: bool) -> None:
        if now or time.monotonic() > self._written + 1.0:
            self._written = time.monotonic()
            text = json.dumps(self.told, indent=1).encode()
            wire.replace_file(self.folder / STATUS, lambda file: file.write(text))


def standing(run: Path) -> dict[str, Any]:
    """What the coordinator has written last about a run, and whether it is still at work.

    Raises ValueError where the folder holds no run between hospitals.
    """
    path = run / STATUS
    if not path.exists():
        raise ValueError(f"{run} holds no run between hospitals: give the folder that `fedscan serve` works in")
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {**told, "alive": told["state"] != "ended" and alone.held(run / LOCK)}


class Log:
    """What happens at a hospital: a line on the screen, and a line of JSON in a file that only its owner reads."""

    def __init__(self, path: Path, json: bool) -> None:
        self.path, self.json = path, json
        path.touch(0o600)

    def __call__(self, sentence: str) -> None:
        now = time.time()
        line = json.dumps({"time": round(now, 3), "event": sentence}, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line if self.json else f"{time.strftime('%H:%M:%S', time.localtime(now))} {sentence}", flush=True)


class Reached:
    """Says in a hospital's log that the coordinator is not reached, and that it is again, once each time.

    ``silence`` is told the seconds since the hospital's engine heard its other end; None where it has not yet.
    """

    def __init__(self, who: str, log: Callable[[str], None], silence: Callable[[], float | None]) -> None:
        self.who, self.log, self.silence = who, log, silence
        self.since, self.lost = time.monotonic(), False

    def look(self) -> None:
        """Looks how it is now."""
        mine, known = time.monotonic() - self.since, self.silence()
        silent = mine if known is None else min(mine, known)  # what was heard before the start does not count
        lost = silent > QUIET
        if lost and not self.lost:
            self.log(f"{self.who} is not reached, for {silent:.0f} s: it is tried again until it is there, or Ctrl-C")
        elif self.lost and not lost:
            self.log(f"{self.who} is reached")
        self.lost = lost


class Tally:
    """Counts what comes to a hospital's desk and what leaves it, by the sealed bytes themselves; thread-safe.

    left      bytes of answers that were handed over, again too where they were lost, by their most telling class
    came      bytes of all that came;  unheard: how much of it was nobody's who may ask, or old, and was not heard
    heard     when the coordinator was last heard, in seconds since 1970; None where it was not yet
    """

    def __init__(self, desk: Desk) -> None:
        self.desk, self._lock = desk, threading.Lock()
        self.left = {question.privacy: 0 for question in desk.study.questions.values()}
        self.came, self.unheard = 0, 0
        self.heard: float | None = None
        self._turns: dict[str, set[tuple[Any, ...]]] = {"answered": set(), "refused": set()}

    @property
    def answers(self) -> int:
        """How many questions were answered."""
        return len(self._turns["answered"])

    @property
    def refusals(self) -> int:
        """How many questions were refused."""
        return len(self._turns["refused"])

    def handle(self, request: Came) -> Came:
        """What the desk says to a request."""
        said = self.desk.handle(request)
        with self._lock:
            self._count(request, said)
        return said

    def _count(self, request: Came, said: Came) -> None:
        self.came += len(request)
        told = wire.loads(signed_part(said))
        if told["status"] == "unheard":
            self.unheard += 1
            return
        self.heard, body = time.time(), len(said) - 4 - int.from_bytes(said[:4], "big")
        if told["status"] in self._turns and "turn" in told:  # a part of a message may be refused, too
            self._turns[told["status"]].add((told["run"], *told["turn"]))
        if told["status"] in ("answered", "part"):
            self.left[self.desk.study.questions[told["question"]].privacy] += body
