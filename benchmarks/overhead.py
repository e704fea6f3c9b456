"""What fedscan adds to the bare training loop: seconds a warm round, seconds a command, memory. One thread a process.

    python benchmarks/overhead.py --case unet --runs 5        all engines in turn
    python benchmarks/overhead.py --case unet --one fedscan   one engine, in this process

bare       the local epochs, one model, no averaging: the limit of one process
fedavg     the cheapest FedAvg loop that can be written
fork2      two forked processes, half of the sites each, no averaging between: the limit of two
fedscan    the whole of fedscan, journal on, evaluation off; fedscan2 with two workers

Seconds of a command and memory are of a process for each engine, and their ratios of two such processes in one turn.
A round is timed against one of its limit that runs right after it, in the same process (--paired): a machine that is
slower for a while is so for both.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import workload
from workload import CASES

ENGINES = ("bare", "fedavg", "fedscan", "fork2", "fedscan2")


class Bare:
    """The bare loop; where ``averaged``, the cheapest FedAvg."""

    def __init__(self, case: str, averaged: bool = False) -> None:
        self.case, self.averaged = case, averaged
        self.size, self.model, self.loss_of = CASES[case], workload.make_model(case), workload.loss_function(case)
        self.data = {s: workload.site_data(case, s) for s in range(self.size.sites)}
        self.x = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.loss = 0.0

    def round(self, r: int) -> float:
        """One round; returns its seconds."""
        begun, losses = time.perf_counter(), []
        total = {k: torch.zeros_like(v) for k, v in self.x.items()}
        for s in self.size.chosen(r):
            if self.averaged:
                self.model.load_state_dict(self.x)
            losses.append(workload.train(self.case, self.model, self.data[s], s, r, self.loss_of))
            if self.averaged:
                for k, v in self.model.state_dict().items():
                    total[k] += v / self.size.sampled
        self.x = total if self.averaged else self.x
        self.loss = statistics.mean(losses)
        return time.perf_counter() - begun

    def close(self) -> None:
        """Nothing is open."""


class Fork2(Bare):
    """Two forked processes that train half of each round's sites and wait for each other at its end."""

    def __init__(self, case: str) -> None:
        super().__init__(case)
        torch.optim.SGD(self.model.parameters(), lr=0.1)  # imports what every optimiser needs, once, before the fork
        self.pipes = []
        for half in range(2):
            (down_r, down_w), (up_r, up_w) = os.pipe(), os.pipe()
            if os.fork() == 0:
                os.close(down_w)
                while order := os.read(down_r, 1):
                    chosen = self.size.chosen(r := order[0] - 1)[half::2]
                    losses = [workload.train(case, self.model, self.data[s], s, r, self.loss_of) for s in chosen]
                    os.write(up_w, f"{sum(losses):.9f}".ljust(20).encode())
                os._exit(0)
            os.close(down_r)
            self.pipes.append((down_w, up_r))

    def round(self, r: int) -> float:
        """One round; returns its seconds."""
        begun = time.perf_counter()
        for down, _ in self.pipes:
            os.write(down, bytes([r + 1]))
        self.loss = sum(float(os.read(up, 20)) for _, up in self.pipes) / self.size.sampled
        return time.perf_counter() - begun

    def close(self) -> None:
        """Ends the two."""
        for down, _ in self.pipes:
            os.close(down)


def fedscan(case: str, workers: int, folder: Path, after: Callable[[int], Any]) -> tuple[list[float], float]:
    """The same work as a fedscan study; ``after`` is called with the number of each round when its time is taken."""
    from fedscan.averaging import averaging
    from fedscan.engines.local import Local
    from fedscan.engines.workers import Workers
    from fedscan.run import run
    from fedscan.site import Batch, Splits, fit
    from fedscan.step import Step
    from fedscan.study import Study

    size, loss_of = CASES[case], workload.loss_function(case)
    names = tuple(f"{s:03}" for s in range(size.sites))
    data = {n: workload.site_data(case, int(n)) for n in names}
    now = [0]

    class Task:
        networks = {"model": lambda: workload.make_model(case)}  # noqa: RUF012

        def outputs(self, model: Any, batch: Batch) -> dict[str, torch.Tensor]:
            return {"logits": model(batch.x)}

        def loss(self, out: Any, batch: Batch) -> torch.Tensor:
            return loss_of(out["logits"], batch.y)

    class Cases(list[int]):
        """Only their number is asked for: the batches come in the workload's order."""

    def train(site: Any, model: Any, message: Any) -> dict[str, Any]:
        order = workload.batches(case, data[site.name], int(site.name), site.round - 1)
        return fit(site, model, batches=(Batch(x, y) for x, y in order))

    cases: Any = Cases(range(size.per))
    method = averaging(train, pick=lambda all_names, draw: [names[s] for s in size.chosen(now[0])])
    study = Study(
        Task(), method, names, lambda name: Splits(cases, cases, cases), Step(lr=size.lr, batch=size.batch),
        rounds=size.rounds, every=0,
    )  # type: ignore[arg-type]  # fmt: skip
    seconds: list[float] = []
    losses: dict[int, list[float]] = {}
    begun = [0.0]

    def watch(what: str, value: Any) -> None:
        if what == "round":
            now[0], begun[0] = value - 1, time.perf_counter()
        if what == "turn" and value.question == "learn":
            losses.setdefault(value.turn.round, []).append(value.numbers["loss"])
        if what == "scores" and len(seconds) < size.rounds:
            seconds.append(time.perf_counter() - begun[0])
            after(now[0])

    engine: Callable[..., Any] = (lambda s, f: Workers(s, f, workers)) if workers else Local
    study.__dict__["evaluate"] = method.answers[0]  # evaluation is off: the test at the end is not part of the work
    import fedscan.run as loop

    loop.evaluate = lambda *a: []  # type: ignore[assignment]
    run(study, folder, engine=engine, watch=watch)
    return seconds, statistics.mean(losses[size.rounds])


LIMITS: dict[str, Callable[[str], Bare]] = {"fedavg": Bare, "fedscan": Bare, "fedscan2": Fork2}


def one(case: str, engine: str, paired: bool) -> dict[str, Any]:
    """Runs one engine in this process; ``paired``, with a round of its limit after each of its own."""
    torch.set_num_threads(1)
    limit = LIMITS[engine](case) if paired else None
    beside: list[float] = []

    def after(r: int) -> None:
        if limit:
            beside.append(limit.round(r))

    if engine.startswith("fedscan"):
        with tempfile.TemporaryDirectory() as folder:
            seconds, loss = fedscan(case, int(engine[7:] or 0), Path(folder) / "run", after)
    else:
        loop = Fork2(case) if engine == "fork2" else Bare(case, averaged=engine == "fedavg")
        seconds = []
        for r in range(CASES[case].rounds):
            seconds.append(loop.round(r))
            after(r)
        loss = loop.loss
        loop.close()
    if limit:
        limit.close()
    ratios = [mine / its for mine, its in zip(seconds[1:], beside[1:], strict=False)]
    return {"warm": statistics.median(seconds[1:]), "ratio": statistics.median(ratios) if ratios else 1.0, "loss": loss}


def measured(case: str, engine: str, *more: str) -> dict[str, Any]:
    """Runs one engine in a process of its own; adds its wall seconds and its peak memory in MB."""
    begun = time.perf_counter()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 1)
        os.execv(sys.executable, [sys.executable, __file__, "--case", case, "--one", engine, *more])
    os.close(write)
    with os.fdopen(read) as file:
        result = json.loads(file.read().splitlines()[-1])
    _, _, usage = os.wait4(pid, 0)
    return {**result, "wall": time.perf_counter() - begun, "peak_mb": usage.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="unet")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--one", choices=ENGINES)
    parser.add_argument("--paired", action="store_true", help="with --one: beside its limit")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.case, args.one, args.paired)))
        return
    turns, pairs = [], []
    for i in range(args.runs):
        turns.append({engine: measured(args.case, engine) for engine in ENGINES})
        pairs.append({engine: measured(args.case, engine, "--paired")["ratio"] for engine in LIMITS})
        print(f"run {i + 1} of {args.runs}", file=sys.stderr)
    limit = {"fork2": "fork2", "fedscan2": "fork2"}
    for engine in ENGINES:
        row: dict[str, Any] = {"case": args.case, "engine": engine, "loss": round(turns[0][engine]["loss"], 6)}
        row["warm"] = round(statistics.median(t[engine]["warm"] for t in turns), 4)
        if engine in LIMITS:
            row["warm_ratio"] = spread([p[engine] for p in pairs])
        for figure in ("wall", "peak_mb"):
            row[figure] = round(statistics.median(t[engine][figure] for t in turns), 4)
            row[f"{figure}_ratio"] = spread([t[engine][figure] / t[limit.get(engine, "bare")][figure] for t in turns])
        print(json.dumps(row))


def spread(values: list[float]) -> list[float]:
    """Least, median and most."""
    return [round(f(values), 3) for f in (min, statistics.median, max)]


if __name__ == "__main__":
    main()
