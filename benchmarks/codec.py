"""How fast an update becomes few bytes and back: `python benchmarks/codec.py [--fraction 0.01] [--bits 8]`.

Prints one JSON line: GB of float32 input per second of ``encode`` with error feedback (into the old residual's memory
and into new memory), of ``decode`` (into the caller's memory and into new memory), of a plain torch sum over the same
memory (the limit), and how many times smaller the message is; each a median over the calls after the first, with its
least and most. The update has heavy tails (Student's t, 3 degrees of freedom) and a scale per leaf.
"""

import argparse
import json

import numpy as np
import torch

from fedscan.compress import Codec
from fedscan.schema import Weights
from timing import seconds, spread


def update(floats: int, leaves: int, seed: int) -> Weights:
    """An update of ``floats`` float32 with heavy tails, in leaves of ever-growing size and of many scales."""
    rng = np.random.default_rng(seed)
    sizes = [max(1, round(2 * floats * (i + 1) / leaves / (leaves + 1))) for i in range(leaves)]
    sizes[-1] += floats - sum(sizes)
    scales = np.exp(rng.normal(-6, 1.5, leaves))
    pairs = zip(sizes, scales, strict=True)
    tails = [(rng.standard_t(3, n).astype(np.float32) * np.float32(s)) for n, s in pairs]
    return Weights({f"leaf{i:03d}": torch.from_numpy(v) for i, v in enumerate(tails)})


def main() -> None:
    """Measures one codec on one large update, and prints one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("floats", 30_000_000), ("leaves", 60), ("bits", 8), ("threads", 2), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--fraction", type=float, default=0.01)
    parser.add_argument("--random", action="store_true", help="round at random")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    new, codec = update(args.floats, args.leaves, seed=0), Codec(args.fraction, args.bits)
    rng = np.random.default_rng(0) if args.random else None
    message, residual = codec.encode(new, rng=rng)
    other = codec.decode(message, new.schema)
    steady = []

    def encode() -> None:
        steady.append(len(codec.encode(new, residual, rng=rng, out=residual)[0]))

    found: dict[str, object] = vars(args) | {"torch": torch.__version__}
    for name, run in (
        ("read", lambda: [v.sum() for v in new.values()]),
        ("encode", encode),
        ("encode_new_memory", lambda: codec.encode(new, residual, rng=rng)),
        ("decode", lambda: codec.decode(message, new.schema, out=other)),
        ("decode_new_memory", lambda: codec.decode(message, new.schema)),
    ):
        found[f"{name}_gb_per_s"] = spread([4 * args.floats / s / 1e9 for s in seconds(run, args.repeats)], 2)
    found["bytes_before_entropy_coding_at_most"] = codec.bound(new.schema)
    found["times_smaller_first"] = round(4 * args.floats / len(message), 1)
    found["times_smaller"] = spread([4 * args.floats / n for n in steady], 2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
