"""The demo over seeds: seconds, and Dice of the federation against each hospital alone.

    python benchmarks/demo.py --seeds 3
    python benchmarks/demo.py --seeds 1 --hard-site

A seed whose folder (under --out) holds a finished demo is read, not run again; its seconds are those it took.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fedscan import statistics as scores
from fedscan.ledger import read_record


def play(folder: Path, seed: int, hard_site: bool) -> float | None:
    """Runs the demo as a user does, and returns its seconds; None where it was there."""
    if (folder / "report.html").exists():
        return None
    begun = time.perf_counter()
    words = [sys.executable, "-c", "from fedscan.cli import main; main()", "demo", "--seed", str(seed)]
    subprocess.run([*words, "--out", str(folder), *["--hard-site"] * hard_site], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def figures(folder: Path) -> dict[str, Any]:
    """Test Dice per hospital, federated and alone, and their macro means."""
    record = read_record(folder)
    ours = [s for s in record.scores if s.split == "test" and s.trained_at == "federation"]
    alone = [s for s in record.comparisons["local-only"] if s.trained_at == s.tested_at]
    federated, local = (
        {site: found.mean or 0.0 for site, found in scores.by_site(rows, "dice").items()} for rows in (ours, alone)
    )
    return {
        "macro": round(statistics.mean(federated.values()), 4),
        "macro_local": round(statistics.mean(local.values()), 4),
        "gains": {site: round(federated[site] - local[site], 4) for site in federated},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hard-site", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-demo"))
    args = parser.parse_args()
    for seed in range(args.seeds):
        folder = args.out / (f"hard-{seed}" if args.hard_site else str(seed))
        seconds = play(folder, seed, args.hard_site)
        print(json.dumps({"seed": seed, "seconds": seconds and round(seconds, 1), **figures(folder)}), flush=True)


if __name__ == "__main__":
    main()
