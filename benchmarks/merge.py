"""How fast updates become one: `python benchmarks/merge.py [--sites 20] [--floats 30000000] [--threads 2]`.

Prints one JSON line. ``resident`` is `trees.mean` over all updates, ``streaming`` is `trees.Fold` over updates that
arrive one at a time (here: that lie ready), ``read`` is a plain torch sum over the same memory: the limit. Small models
stand in milliseconds, large ones in GB of input per second; each is a median with its least and most.
"""

import argparse
import json
from functools import partial

import torch

from fedscan.schema import Weights
from fedscan.trees import Fold, mean
from timing import seconds, spread


def model(floats: int, leaves: int, seed: int) -> Weights:
    """A model of ``floats`` random float32 in leaves of ever-growing size, as a U-Net's are."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [max(1, round(2 * floats * (i + 1) / leaves / (leaves + 1))) for i in range(leaves)]
    sizes[-1] += floats - sum(sizes)
    return Weights({f"leaf{i:03d}": torch.randn(n, generator=generator) for i, n in enumerate(sizes)})


def stream(trees: list[Weights], shares: list[float]) -> Weights:
    """What the server does with replies: fold each as it comes."""
    fold = Fold(trees[0].schema)
    for tree, share in zip(trees, shares, strict=True):
        fold.add(tree, share)
    return fold.result()


def main() -> None:
    """Measures the large model and the small ones, and prints one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("sites", 20), ("floats", 30_000_000), ("leaves", 60), ("threads", 2), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trees = [model(args.floats, args.leaves, seed) for seed in range(args.sites)]
    shares = [50.0 + 7 * k for k in range(args.sites)]
    gigabytes = 4 * args.floats * args.sites / 1e9
    found: dict[str, object] = vars(args) | {"torch": torch.__version__}
    for name, run in (
        ("read", lambda: [v.sum() for t in trees for v in t.values()]),
        ("resident", lambda: mean(trees, shares)),
        ("streaming", lambda: stream(trees, shares)),
    ):
        found[f"{name}_gb_per_s"] = spread([gigabytes / s for s in seconds(run, args.repeats)], 1)
    for name, floats, leaves in (("cnn", 20_000, 6), ("unet", 486_000, 60)):
        for sites in (4, 10):
            few, parts = [model(floats, leaves, seed) for seed in range(sites)], [50.0 + 7 * k for k in range(sites)]
            for way, merge in (("resident", mean), ("streaming", stream)):
                taken = [1000 * s for s in seconds(partial(merge, few, parts), 50)]
                found[f"{name}_{sites}_sites_{way}_ms"] = spread(taken)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
