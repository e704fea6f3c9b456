"""A round is deterministic code over recorded inputs: no clock, no entropy, no global generator at the server."""

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toy
from fedscan.averaging import averaging
from fedscan.method import Message, Method, Question, Replies, Sites, State, Tree
from fedscan.methods.registry import methods
from fedscan.parts.around import Around
from fedscan.run import run

torch.set_num_threads(1)

CLOCKS = [(time, name) for name in ("time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "process_time")]
ENTROPY = [(os, "urandom"), (os, "getrandom"), (random, "_urandom"), (torch, "seed")]


class Touched(Exception):
    """A round touched what it must not."""


class Guard:
    """While it is up, clocks and entropy raise, and when it goes down the global generators must be where they were."""

    def __init__(self) -> None:
        self.real = {(module, name): getattr(module, name) for module, name in CLOCKS + ENTROPY}
        self.up = False
        self.times = 0

    def raise_it(self) -> None:
        assert not self.up
        for module, name in self.real:
            setattr(module, name, forbidden(f"{module.__name__}.{name}"))
        self.generators = generators()
        self.up = True
        self.times += 1

    def lower(self) -> None:
        assert self.up
        self.up = False
        for (module, name), real in self.real.items():
            setattr(module, name, real)

    def check(self) -> None:
        for name, state in generators().items():
            if state != self.generators[name]:
                raise Touched(f"a round draws from {name}")

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The code of a round."""
        self.raise_it()
        try:
            yield
            self.check()
        finally:
            if self.up:
                self.lower()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """What a round asks of others: the clock and the sites' generators are their affair."""
        self.check()
        self.lower()
        try:
            yield
        finally:
            self.raise_it()


def forbidden(name: str) -> Callable[..., Any]:
    def touch(*args: Any, **more: Any) -> Any:
        raise Touched(f"a round calls {name}")

    return touch


def generators() -> dict[str, Any]:
    """Where the global generators stand."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "random": random.getstate(),
        "numpy.random": (kind, keys.tobytes(), rest),  # type: ignore[union-attr]
        "torch's default generator": torch.get_rng_state().numpy().tobytes(),
    }


class Guarded(Around):
    """Sites, with the guard down while they work."""

    def __init__(self, sites: Sites, guard: Guard) -> None:
        super().__init__(sites)
        self.guard = guard

    def ask_each(self, question: Question, messages: Mapping[str, Message], *, need: int = 1) -> Replies:
        with self.guard.outside():
            return super().ask_each(question, messages, need=need)

    def start(self, question: Question, messages: Mapping[str, Message]) -> None:
        with self.guard.outside():
            super().start(question, messages)

    def next(self) -> tuple[str, Tree]:
        with self.guard.outside():
            return super().next()

    def once(self, label: str, make: Callable[[], Tree]) -> Tree:
        def guarded() -> Tree:
            with self.guard.inside():
                return make()

        with self.guard.outside():
            return super().once(label, guarded)


def guarded(method: Method, guard: Guard) -> Method:
    def round(sites: Sites, state: State) -> State:
        with guard.inside():
            return method.round(Guarded(sites, guard), state)

    return replace(method, round=round)


def play(method: Method, folder: Path, **changes: Any) -> Guard:
    guard = Guard()
    run(toy.study(guarded(method, guard), **changes), folder)
    return guard


@pytest.mark.parametrize("name", methods())
def test_rounds_touch_no_clock_and_no_chance(name: str, tmp_path: Path) -> None:
    entry = methods()[name]
    step = replace(toy.study(averaging()).step, moments=entry.card.moments, batch=80)
    guard = play(entry.make(), tmp_path, step=step)
    assert guard.times >= 2


# looked up when they are called, as a method would
FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "clock": (lambda: time.time(), "time.time"),
    "stopwatch": (lambda: time.perf_counter(), "time.perf_counter"),
    "entropy": (lambda: os.urandom(4), "os.urandom"),
    "unseeded": (lambda: random.SystemRandom().random(), "random._urandom"),
    "random": (random.random, "draws from random"),
    "shuffle": (lambda: random.shuffle([1, 2, 3]), "draws from random"),
    "numpy": (lambda: np.random.rand(), "draws from numpy.random"),
    "torch": (lambda: torch.rand(1), "draws from torch's default generator"),
    "permutation": (lambda: torch.randperm(3), "draws from torch's default generator"),
    "dropout": (lambda: torch.nn.functional.dropout(torch.ones(3)), "draws from torch's default generator"),
    "seed": (lambda: torch.manual_seed(torch.initial_seed() + 1), "draws from torch's default generator"),
    "seed of time": (lambda: torch.seed(), "torch.seed"),
}


@pytest.mark.parametrize("when", ["before", "after", "once"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_guard_catches_planted_faults(fault: str, when: str, tmp_path: Path) -> None:
    """Also where the fault lies between two questions, or in heavy work at the server."""
    cause, said = FAULTS[fault]
    base = averaging()

    def touch() -> Tree:
        cause()
        return {"n": 1}

    def round(sites: Sites, state: State) -> State:
        if when == "before":
            touch()
        if when == "once":
            sites.once("heavy", touch)
        state = base.round(sites, state)
        if when == "after":
            touch()
        return state

    with pytest.raises(Touched, match=said):
        play(replace(base, round=round), tmp_path, rounds=1)
    time.time()  # and it is gone afterwards
    os.urandom(1)


def test_sites_may_use_what_rounds_may_not(tmp_path: Path) -> None:
    """Seconds are measured and default generators seeded at the sites, inside a guarded round."""
    base = averaging(train=lambda site, model, message: {"seen": float(torch.rand(1)), "at": time.time()})
    guard = play(base, tmp_path, rounds=1)
    assert not guard.up


def test_the_servers_generator_depends_on_round_and_label_only(tmp_path: Path) -> None:
    drawn: list[tuple[float, float, float]] = []
    base = averaging()

    def round(sites: Sites, state: State) -> State:
        drawn.append(tuple(float(torch.rand(1, generator=sites.random(x))) for x in ("a", "b", "a")))  # type: ignore[arg-type]
        return base.round(sites, state)

    play(replace(base, round=round), tmp_path / "one")
    torch.rand(5)
    play(replace(base, round=round), tmp_path / "two")
    (a1, b1, again), (a2, *_) = drawn[:2]
    assert a1 == again
    assert len({a1, b1, a2}) == 3
    assert drawn[2:] == drawn[:2]
