"""Peak memory of a run against the bare loop, and from 4 to 64 sites. Each engine runs in a process of its own.

    python benchmarks/memory.py

With 30 million parameters, fedscan should need the bare loop's memory and two models more (the server's and the sum);
with 16 times the sites, no more than a fifth more.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

MILLIONS = {"large": 30, "small": 0.5}


def make_model(size: str) -> nn.Module:
    """A plain network of ten equal layers with as many million parameters as ``size`` says."""
    side = round((MILLIONS[size] * 1e5) ** 0.5)
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(side, side) for _ in range(10)))


def peak_mb() -> float:
    """The process's largest resident memory so far, in MB (10^6 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def bare(size: str, sites: int) -> None:
    """Two rounds of the local loop, one step per site, and nothing else."""
    model = make_model(size)
    x = torch.randn(8, model[0].in_features)  # type: ignore[union-attr, arg-type]
    for _ in range(2 * sites):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        optimizer.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        optimizer.step()


def fedscan(size: str, sites: int) -> None:
    """The same work as a study of two rounds."""
    import fedscan.run as loop
    from fedscan.averaging import averaging
    from fedscan.run import run
    from fedscan.site import Batch, Splits, fit
    from fedscan.step import Step
    from fedscan.study import Study

    class Task:
        networks = {"model": lambda: make_model(size)}  # noqa: RUF012

        def outputs(self, model: Any, batch: Batch) -> dict[str, torch.Tensor]:
            return {"logits": model(batch.x)}

        def loss(self, out: Any, batch: Batch) -> torch.Tensor:
            return out["logits"].square().mean()

    def train(site: Any, model: Any, message: Any) -> dict[str, Any]:
        x = torch.randn(8, model[0].in_features)
        return fit(site, model, batches=[Batch(x, x)])

    names = tuple(f"{i:02}" for i in range(sites))
    cases: Any = [0]
    task: Any = Task()
    study = Study(task, averaging(train), names, lambda name: Splits(cases, cases, cases), Step(), rounds=2, every=0)
    loop.evaluate = lambda *a: []  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        run(study, Path(folder) / "run")


def measured(engine: str, size: str, sites: int) -> float:
    """Peak MB of one engine in a process of its own."""
    words = [sys.executable, __file__, "--one", engine, "--size", size, "--sites", str(sites)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", choices=("bare", "fedscan"))
    parser.add_argument("--size", choices=MILLIONS, default="large")
    parser.add_argument("--sites", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        {"bare": bare, "fedscan": fedscan}[args.one](args.size, args.sites)
        print(json.dumps(peak_mb()))
        return
    model = sum(p.numel() for p in make_model("large").parameters()) * 4 / 1e6
    limit, ours = measured("bare", "large", 4), measured("fedscan", "large", 4)
    row: dict[str, Any] = {
        "figure": "30 million parameters, 4 sites",
        "bare_mb": round(limit),
        "fedscan_mb": round(ours),
    }
    print(json.dumps({**row, "models_more": round((ours - limit) / model, 2)}))
    few, many = measured("fedscan", "small", 4), measured("fedscan", "small", 64)
    row = {"figure": f"4 to 64 sites, {MILLIONS['small']} million parameters"}
    print(json.dumps({**row, "few_mb": round(few), "many_mb": round(many), "ratio": round(many / few, 3)}))


if __name__ == "__main__":
    main()
