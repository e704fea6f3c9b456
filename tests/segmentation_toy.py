"""A toy 3D segmentation: two labels in 8 x 8 x 8 volumes, a shift per site, batch or instance norm."""

from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from fedscan.method import Method
from fedscan.site import Splits
from fedscan.step import Step
from fedscan.study import Study
from fedscan.tasks.segmentation import Segmentation
from toy import NAMES, Tensors

Norm = Literal["batch", "instance"]
CASES = {"amsterdam": 8, "bergen": 4, "cairo": 6}


class Net3d(nn.Module):
    """Two convolutions and a head, with norm layers whose names give nothing away."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        layer = nn.BatchNorm3d if norm == "batch" else partial(nn.InstanceNorm3d, affine=True)
        self.conv1, self.first = nn.Conv3d(1, 4, 3, padding=1), layer(4)
        self.conv2, self.second = nn.Conv3d(4, 4, 3, padding=1), layer(4)
        self.head = nn.Conv3d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.conv1(x)).relu()
        return self.head(self.second(self.conv2(x)).relu())


def data(name: str) -> Splits:
    """A cube of label 1 and a smaller one of label 2 at a place of their own in each case, brighter than the rest."""
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    shift = {"amsterdam": 0.0, "bergen": 0.3, "cairo": -0.3}.get(name, 0.0)

    def tensors(n: int, part: str) -> Tensors:
        y = torch.zeros(n, 8, 8, 8, dtype=torch.long)
        for i in range(n):
            a, b, c = torch.randint(0, 4, (3,), generator=g).tolist()
            y[i, a : a + 5, b : b + 5, c : c + 5] = 1
            y[i, a + 1 : a + 3, b + 1 : b + 4, c + 1 : c + 4] = 2
        x = torch.tensor([0.0, 1.0, 2.0])[y] + 0.3 * torch.randn(y.shape, generator=g) + shift
        return Tensors(x[:, None], y, f"{name}-{part}")

    return Splits(tensors(CASES.get(name, 6), "train"), tensors(2, "validation"), tensors(2, "test"))


def study(method: Method, names: tuple[str, ...] = NAMES, norm: Norm = "batch", **changes: Any) -> Study:
    """The toy study: two rounds of one epoch of plain SGD, no validation between."""
    task = Segmentation({"model": partial(Net3d, norm)}, {"organ": 1, "lesion": 2}, 3)
    settings: dict[str, Any] = {"step": Step(lr=0.1, batch=2), "rounds": 2, "every": 0, "data": data, **changes}
    return Study(task, method, names, settings.pop("data"), **settings)
