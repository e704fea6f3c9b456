"""FedSegNet at 4 x 128 cubed on a GPU: volumes a second of fedscan's own loop against the bare compiled step.

    python benchmarks/gpu.py                      the paper's preset, batch 4, bfloat16, compiled
    python benchmarks/gpu.py --side 32 --device cpu --preset tiny --steps 4      a trial without a GPU

The bare step has its batch on the device already. fedscan's loop reads cases from a memory map, augments them on the
device and trains by ``fit``, as a study does.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedscan.data.augment import Augmentation
from fedscan.data.preprocess import Prepared
from fedscan.data.volumes import VolumeSplit
from fedscan.models.registry import build
from fedscan.site import Site, Slots, Splits, fit
from fedscan.step import Step
from fedscan.tasks.losses import dice_cross_entropy
from fedscan.tasks.segmentation import Segmentation

CHANNELS, CLASSES = 4, 4


def cases(folder: Path, number: int, side: int) -> list[Prepared]:
    """Prepared cases of noise, on disk as the cache keeps them."""
    made, rng = [], np.random.default_rng(0)
    for i in range(number):
        np.save(folder / f"x{i}.npy", rng.standard_normal((CHANNELS, side, side, side), dtype=np.float32))
        np.save(folder / f"y{i}.npy", rng.integers(0, CLASSES, (side, side, side), dtype=np.uint8))
        image, label = (np.load(folder / f"{k}{i}.npy", mmap_mode="r") for k in "xy")
        made.append(Prepared(f"{i}", f"{i}", "a", image, label, (True,) * CHANNELS, (1.0, 1.0, 1.0), np.eye(4)))
    return made


def wait(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def bare(model: Any, side: int, batch: int, steps: int, device: torch.device, step: Step) -> list[float]:
    """Volumes a second of each of ``steps`` steps on one batch that stays where it is."""
    optimizer = step.optimizer(model, step.lr)
    x = torch.randn(batch, CHANNELS, side, side, side, device=device)
    y = torch.randint(0, CLASSES, (batch, side, side, side), device=device, dtype=torch.uint8)
    rates = []
    for _ in range(steps):
        wait(device)
        begun = time.perf_counter()
        with step.autocast(device):
            loss = dice_cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(device)
        rates.append(batch / (time.perf_counter() - begun))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    args = parser.parse_args()
    device = torch.device(args.device)
    step = Step("adam", 1e-4, batch=args.batch, precision="bfloat16", compile=not args.eager)
    grid = (args.side,) * 3

    def network() -> Any:
        return build("fedsegnet", CHANNELS, CLASSES, 3, preset=args.preset, grid=grid)

    task = Segmentation({"model": network}, {"a": 1, "b": 2, "c": 3}, CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        split = VolumeSplit(cases(Path(folder), 4 * args.batch, args.side), None, Augmentation(), device, keep=8 << 30)
        splits = Splits(split, split, split)
        slots = Slots(task, step, device)
        site = Site("a", task, splits, step, slots)
        model = site.model()
        bare(model, args.side, args.batch, 5, device, step)  # compiles
        fit(site, model, epochs=1)
        limit = bare(model, args.side, args.batch, args.steps, device, step)
        rates = []
        for _ in range(max(1, args.steps // 4)):
            wait(device)
            begun = time.perf_counter()
            fit(site, model, epochs=1)
            wait(device)
            rates.append(len(split) / (time.perf_counter() - begun))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    row = {"device": name, "bare": round(statistics.median(limit), 2), "fedscan": round(statistics.median(rates), 2)}
    print(json.dumps({**row, "ratio": round(row["fedscan"] / row["bare"], 3), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
