"""The one workload that every engine is measured on, and the bare training loop that is the limit.

unet  4 sites x 16 volumes 1x32x32x32, 2 classes, MONAI UNet (486,296 parameters), batch 4, 5 rounds, all sites
cnn   100 sites x 64 images 1x28x28, 10 classes, small CNN, batch 16, 20 rounds, 10 sites a round

Plain FedAvg ends at a training loss of 0.8365 in the unet case, whatever runs it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class Case:
    """Sizes of one workload."""

    sites: int
    per: int
    rounds: int
    sampled: int
    batch: int
    lr: float = 0.05

    def chosen(self, round: int) -> list[int]:
        """The sites of a round, counted from 0."""
        if self.sampled == self.sites:
            return list(range(self.sites))
        drawn = np.random.default_rng(7 + round).choice(self.sites, self.sampled, replace=False)
        return sorted(drawn.tolist())


CASES = {"unet": Case(4, 16, 5, 4, 4), "cnn": Case(100, 64, 20, 10, 16)}


def site_data(case: str, site: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of one site, always the same."""
    g, per = np.random.default_rng(1000 + site), CASES[case].per
    if case == "cnn":
        y = g.integers(0, 10, per)
        x = g.normal(0, 1, (per, 1, 28, 28)).astype(np.float32)
        x[np.arange(per), 0, y * 2, :] += 2
        return torch.from_numpy(x), torch.from_numpy(y).to(torch.int64)
    zz, yy, xx = np.mgrid[:32, :32, :32]
    x, y = np.empty((per, 1, 32, 32, 32), np.float32), np.zeros((per, 1, 32, 32, 32), np.uint8)
    for i in range(per):
        c, r = g.uniform(10, 22, 3), g.uniform(4, 9)
        m = ((zz - c[0]) ** 2 + (yy - c[1]) ** 2 + (xx - c[2]) ** 2) < r * r
        y[i, 0] = m
        x[i, 0] = m + g.normal(0, 0.5 + 0.1 * site, m.shape)
    return torch.from_numpy(x), torch.from_numpy(y).to(torch.int64)


def make_model(case: str) -> nn.Module:
    """The network, with the weights that every engine starts from."""
    torch.manual_seed(0)
    if case == "cnn":
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 49, 10),
        )  # fmt: skip
    from monai.networks.nets import UNet

    return UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(16, 32, 64, 128), strides=(2, 2, 2))


def loss_function(case: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The loss of a batch of outputs and labels."""
    if case == "cnn":
        return nn.CrossEntropyLoss()
    from monai.losses import DiceCELoss

    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = DiceCELoss(to_onehot_y=True, softmax=True)
    return loss


def batches(case: str, data: tuple[torch.Tensor, torch.Tensor], site: int, round: int) -> Iterator[Any]:
    """One epoch of a site in the order that every engine uses; rounds count from 0."""
    x, y = data
    order = torch.from_numpy(np.random.default_rng(round * 1000 + site).permutation(len(x)))
    for j in order.split(CASES[case].batch):
        yield x[j], y[j]


def train(case: str, model: nn.Module, data: Any, site: int, round: int, loss_of: Any) -> float:
    """One local epoch, as bare as it can be written; returns the mean loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=CASES[case].lr)
    model.train()
    total = steps = 0.0
    for x, y in batches(case, data, site, round):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model(x), y)
        loss.backward()
        optimizer.step()
        total, steps = total + loss.item(), steps + 1
    return total / steps
