"""The workload as a plug-in of fedscan: its network, its loss, and FedAvg that takes the batches in its order."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

import workload
from fedscan.averaging import averaging
from fedscan.method import Message, Method, Tree
from fedscan.methods.card import card
from fedscan.models.card import model
from fedscan.site import Batch, Site, fit
from fedscan.tasks.registry import task
from fedscan.tasks.segmentation import Segmentation
from hospitals_work import note

Case = Literal["unet", "cnn"]


class Flat(nn.Module):
    """A network for images, given volumes of one slice."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1, 1, 28, 28) to (B, 10)."""
        out: torch.Tensor = self.net(x[:, 0])
        return out


@model("workload", summary="The network of the workload.", paper="none", presets={})
def network(channels: int, classes: int, dims: int = 3, *, case: Case = "unet") -> nn.Module:
    """The network with its weights at the start."""
    made = workload.make_model(case)
    return Flat(made) if case == "cnn" else made


class Workload(Segmentation):
    """The loss of the workload."""

    case: str = "unet"

    def loss(self, out: Any, batch: Batch) -> torch.Tensor:
        """The loss; the class of an image is written in each of its voxels, and counts from 1 there."""
        y = batch.y.long()
        y = y[:, 0, 0, 0] - 1 if self.case == "cnn" else y.unsqueeze(1)
        return workload.loss_function(self.case)(out["logits"], y)


@task("workload")
def work(
    networks: Any, labels: Any, classes: int, window: Any, tolerance: Any, hd95: str, case: Case = "unet"
) -> Workload:
    """The task with the workload's loss."""
    made = Workload(networks, labels, classes, {}, window, tolerance, hd95)
    made.case = case
    return made


def in_order(site: Site) -> Iterator[Batch]:
    """An epoch of the hospital's cases in the order that every engine takes."""
    cases = [site.train.case(i)[0] for i in range(len(site.train))]
    x, y = torch.cat([case.x for case in cases]), torch.cat([case.y for case in cases])
    order = torch.from_numpy(np.random.default_rng((site.round - 1) * 1000 + number(site)).permutation(len(x)))
    for at in range(0, len(x), site.step.batch):
        j = order[at : at + site.step.batch]
        yield Batch(x[j], y[j])


def number(site: Site) -> int:
    """Which hospital it is, from 0."""
    return int(site.name.removeprefix("h"))


@card(
    "workload",
    title="FedAvg in the workload's order",
    family="averaging",
    paper="McMahan et al., AISTATS 2017, algorithm 1",
    year=2017,
    url="https://arxiv.org/abs/1602.05629",
    equation="x <- x + sum_k (n_k / n) (x_k - x)",
    differs="The order of the batches is that of the workload.",
)
def method() -> Method:
    """Federated averaging."""

    def train(site: Site, model: nn.Module, message: Message) -> Tree:
        if not isinstance(site.task, Workload):  # a rehearsal, before the hospital agrees
            return fit(site, model, batches=in_order(site))
        note(what="epoch begins", site=number(site), round=site.round - 1)
        found = fit(site, model, batches=in_order(site))
        note(what="epoch ends", site=number(site), round=site.round - 1, loss=found["loss"])
        return found

    return averaging(train)
