"""Hospitals in this process, for tests: desks, a carrier that can be made as bad as wanted, and a coordinator."""

import itertools
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedscan.engines.desk import Desk
from fedscan.engines.doors import Lost, Manner
from fedscan.engines.envelope import Seal, Talk
from fedscan.engines.remote import Remote
from fedscan.run import run
from fedscan.study import Study
from unsigned import Unsigned

TALK = Talk("a" * 64, "0" * 32, "coordinator")


class Straight:
    """Brings every request to its desk and the answer back."""

    manner = Manner()

    def __init__(self, desks: dict[str, Desk]) -> None:
        self.desks, self.calls = desks, 0

    def call(self, site: str, request: bytes, seconds: float) -> bytes:
        self.calls += 1
        return self.desks[site].handle(request)


class Bad(Straight):
    """Loses requests and answers, repeats both, and brings old ones again; drawn from a seed."""

    def __init__(self, desks: dict[str, Desk], seed: int, share: float = 0.3) -> None:
        super().__init__(desks)
        self.random, self.share, self.lock = random.Random(seed), share, threading.Lock()
        self.old: dict[str, list[bytes]] = {}

    def call(self, site: str, request: bytes, seconds: float) -> bytes:
        with self.lock:
            lost, twice, late, back = (self.random.random() < self.share for _ in range(4))
            old = self.random.choice(self.old.setdefault(site, [request]))
            self.old[site].append(request)
        if late:
            self.desks[site].handle(old)  # an earlier request comes once more
        if lost:
            raise Lost("lost on its way")
        said = super().call(site, request, seconds)
        if twice:
            said = super().call(site, request, seconds)
        if back:
            raise Lost("lost on its way back")
        return said


class Between:
    """A consortium in a folder: one desk for each site, made again by ``restart``."""

    def __init__(self, study: Study, folder: Path, seal: Callable[[str], Seal] = Unsigned, **options: Any) -> None:
        self.study, self.folder, self.seal, self.options = study, folder, seal, {"durable": False, **options}
        self.desks: dict[str, Desk] = {}
        self.epochs = itertools.count(1)
        for name in study.names:
            self.restart(name)

    def restart(self, name: str) -> None:
        """A new process at a site: nothing but its disk is left, on which the old one has ended what it was writing."""
        for old in list(self.desks[name]._runs.values()) if name in self.desks else ():
            if old.job:
                old.job.done.wait(10.0)
        self.desks[name] = Desk(self.study, name, self.folder / name, TALK, self.seal(name), **self.options)

    def engine(self, carrier: Any = None, **options: Any) -> Callable[[Study, Path], Remote]:
        """What makes the coordinator's engine."""
        settings = {"durable": False, "patience": 5.0, "lease": 60.0, **options}
        return lambda study, folder: Remote(
            study,
            folder,
            carrier or Straight(self.desks),
            TALK,
            self.seal("coordinator"),
            next(self.epochs),
            **settings,
        )

    def run(self, carrier: Any = None, resume: bool = False, run_with: Any = None, **options: Any) -> dict[str, Any]:
        """The last state of a run over the carrier."""
        return run(
            self.study, self.folder / "run", engine=self.engine(carrier, **options), resume=resume, **(run_with or {})
        )
