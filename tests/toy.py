"""A toy two-class image task with a shift per site. Small enough for a laptop, real enough to have batch norm."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedscan.method import Method
from fedscan.run import run
from fedscan.site import Batch, Splits
from fedscan.step import Step
from fedscan.study import Study

NAMES = ("amsterdam", "bergen", "cairo")


class Net(nn.Module):
    """A small convolutional network; its norm layers have names that give nothing away."""

    def __init__(self) -> None:
        super().__init__()
        c = 8
        self.conv1, self.first = nn.Conv2d(1, c, 3, padding=1), nn.BatchNorm2d(c)
        self.conv2, self.down = nn.Conv2d(c, c, 3, padding=1), nn.Sequential(nn.Conv2d(c, c, 1), nn.BatchNorm2d(c))
        self.head = nn.Linear(c, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.conv1(x)).relu()
        return self.head((self.conv2(x) + self.down(x)).relu().mean((2, 3)))


class Tensors:
    """A split in memory."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, site: str) -> None:
        self.x, self.y = x, y
        self.names = [f"{site}-{i}" for i in range(len(x))]
        self.subjects = self.names

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, size: int, order: torch.Generator, augment: torch.Generator) -> Iterator[Batch]:
        for i in torch.randperm(len(self.x), generator=order).split(size):
            yield Batch(self.x[i], self.y[i])

    def case(self, i: int) -> tuple[Batch, Any]:
        return Batch(self.x[i : i + 1], self.y[i : i + 1]), None


class Toy:
    """Two classes of 8 x 8 images."""

    def __init__(self) -> None:
        self.networks = {"model": Net}

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        return {"logits": model(batch.x)}

    def loss(self, out: Any, batch: Batch) -> torch.Tensor:
        return nn.functional.cross_entropy(out["logits"], batch.y)

    @torch.no_grad()
    def scores(self, model: nn.Module, split: Tensors, site: str, final: bool) -> list[list[Any]]:
        right = (model(split.x).argmax(1) == split.y).float()
        return [[c, c, site, "class", "accuracy", float(r)] for c, r in zip(split.names, right, strict=True)]

    @torch.no_grad()
    def quality(self, model: nn.Module, split: Tensors) -> dict[str, float | None]:
        return {"dice": float((model(split.x).argmax(1) == split.y).float().mean()), "hd95": None}

    def diversity(self, split: Tensors) -> float:
        p = split.y.float().mean()
        return float(-(p * p.log2() + (1 - p) * (1 - p).log2()))


def data(name: str) -> Splits:
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    shift = {"amsterdam": 0.0, "bergen": 0.5, "cairo": -0.5}.get(name, 0.0)

    def tensors(n: int, part: str) -> Tensors:
        y = torch.randint(0, 2, (n,), generator=g)
        x = torch.randn(n, 1, 8, 8, generator=g) * 0.7
        x[:, :, 2:6, 2:6] += (y * 2.0 - 1)[:, None, None, None] * 1.5
        return Tensors(x + shift, y, f"{name}-{part}")

    n = {"amsterdam": 64, "bergen": 48, "cairo": 80}.get(name, 64)
    return Splits(tensors(n, "train"), tensors(16, "validation"), tensors(16, "test"))


def study(method: Method, names: tuple[str, ...] = NAMES, **changes: Any) -> Study:
    settings: dict[str, Any] = {"step": Step(lr=0.1, batch=16), "rounds": 2, "every": 0, **changes}
    return Study(Toy(), method, names, data, **settings)


def same(x: Any, y: Any) -> bool:
    """Whether two trees are equal, bit for bit."""
    if isinstance(x, dict):
        return isinstance(y, dict) and x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
    if isinstance(x, torch.Tensor):
        return torch.equal(x, y)
    return bool(x == y)


def play(method: Method, folder: Path, **changes: Any) -> dict[str, Any]:
    """The last state of a run of the toy study."""
    return run(study(method, **changes), folder)
