"""What fedscan adds to the bare training loop: seconds a warm round, seconds a command, memory. One thread a process.

    python benchmarks/overhead.py --case unet --runs 5        all engines in turn, ratios within each turn
    python benchmarks/overhead.py --case unet --one fedscan   one engine, in this process

bare       the local epochs, one model, no averaging: the limit of one process
fedavg     the cheapest FedAvg loop that can be written
fork2      two forked processes, half of the sites each, no averaging between: the limit of two
fedscan    the whole of fedscan, journal on, evaluation off; fedscan2 with two workers
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


def bare(case: str, averaged: bool) -> tuple[list[float], float]:
    """Seconds a round, and the last round's mean loss."""
    size, model, loss_of = CASES[case], workload.make_model(case), workload.loss_function(case)
    data = {s: workload.site_data(case, s) for s in range(size.sites)}
    seconds, losses = [], []
    x = {k: v.clone() for k, v in model.state_dict().items()}
    for r in range(size.rounds):
        begun = time.perf_counter()
        losses, total = [], {k: torch.zeros_like(v) for k, v in x.items()}
        for s in size.chosen(r):
            if averaged:
                model.load_state_dict(x)
            losses.append(workload.train(case, model, data[s], s, r, loss_of))
            if averaged:
                for k, v in model.state_dict().items():
                    total[k] += v / size.sampled
        x = total if averaged else x
        seconds.append(time.perf_counter() - begun)
    return seconds, statistics.mean(losses)


def fork2(case: str) -> tuple[list[float], float]:
    """Two forked processes that train half of each round's sites and wait for each other at its end."""
    size, model, loss_of = CASES[case], workload.make_model(case), workload.loss_function(case)
    data = {s: workload.site_data(case, s) for s in range(size.sites)}
    torch.optim.SGD(model.parameters(), lr=0.1)
    pipes = []
    for half in range(2):
        (down_r, down_w), (up_r, up_w) = os.pipe(), os.pipe()
        if os.fork() == 0:
            os.close(down_w)
            while order := os.read(down_r, 1):
                r = order[0] - 1
                losses = [workload.train(case, model, data[s], s, r, loss_of) for s in size.chosen(r)[half::2]]
                os.write(up_w, f"{sum(losses):.9f}".ljust(20).encode())
            os._exit(0)
        os.close(down_r)
        pipes.append((down_w, up_r))
    seconds, loss = [], 0.0
    for r in range(size.rounds):
        begun = time.perf_counter()
        for down, _ in pipes:
            os.write(down, bytes([r + 1]))
        loss = sum(float(os.read(up, 20)) for _, up in pipes) / size.sampled
        seconds.append(time.perf_counter() - begun)
    for down, _ in pipes:
        os.close(down)
    return seconds, loss


def fedscan(case: str, workers: int, folder: Path) -> tuple[list[float], float]:
    """The same work as a fedscan study."""
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

    engine: Callable[..., Any] = (lambda s, f: Workers(s, f, workers)) if workers else Local
    study.__dict__["evaluate"] = method.answers[0]  # evaluation is off: the test at the end is not part of the work
    import fedscan.run as loop

    loop.evaluate = lambda *a: []  # type: ignore[assignment]
    run(study, folder, engine=engine, watch=watch)
    return seconds, statistics.mean(losses[size.rounds])


def one(case: str, engine: str) -> dict[str, Any]:
    """Runs one engine in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if engine == "fork2":
            seconds, loss = fork2(case)
        elif engine.startswith("fedscan"):
            seconds, loss = fedscan(case, int(engine[7:] or 0), Path(folder) / "run")
        else:
            seconds, loss = bare(case, averaged=engine == "fedavg")
    return {"warm": statistics.median(seconds[1:]), "rounds": seconds, "loss": loss}


def measured(case: str, engine: str) -> dict[str, Any]:
    """Runs one engine in a process of its own; adds its wall seconds and its peak memory in MB."""
    begun = time.perf_counter()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 1)
        os.execv(sys.executable, [sys.executable, __file__, "--case", case, "--one", engine])
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
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.case, args.one)))
        return
    turns = []
    for i in range(args.runs):
        turns.append({engine: measured(args.case, engine) for engine in ENGINES})
        print(f"run {i + 1} of {args.runs}", file=sys.stderr)
    limit = {"bare": "bare", "fedavg": "bare", "fedscan": "bare", "fork2": "fork2", "fedscan2": "fork2"}
    for engine in ENGINES:
        row: dict[str, Any] = {"case": args.case, "engine": engine, "loss": round(turns[0][engine]["loss"], 6)}
        for figure in ("warm", "wall", "peak_mb"):
            values = [t[engine][figure] for t in turns]
            ratios = [t[engine][figure] / t[limit[engine]][figure] for t in turns]
            row[figure] = round(statistics.median(values), 4)
            row[f"{figure}_ratio"] = [round(f(ratios), 3) for f in (min, statistics.median, max)]
        print(json.dumps(row))


if __name__ == "__main__":
    main()
