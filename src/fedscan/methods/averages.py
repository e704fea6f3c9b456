"""FedAvg and its nearest kin: one part of the round exchanged, or none."""

import math
from collections.abc import Mapping
from typing import Literal, Unpack

import torch
from torch import nn

from fedscan.averaging import Parts, averaging, median
from fedscan.method import Message, Method, Tree
from fedscan.methods.card import Reduction, card
from fedscan.methods.kinds import Decay, Fraction, NotNegative, Portion, Positive
from fedscan.parts.extra import pull_to
from fedscan.parts.norms import own_or_measured
from fedscan.parts.share import NORMS, without
from fedscan.parts.step import adaptive, momentum
from fedscan.parts.weigh import by_cases, equally
from fedscan.parts.work import Unit, Work, allotted
from fedscan.site import Site, fit
from fedscan.spec import Number, Refused
from fedscan.step import Step

BATCH = (nn.modules.batchnorm._BatchNorm,)


@card(
    "fedavg",
    title="Federated averaging",
    family="averaging",
    paper="McMahan, Moore, Ramage, Hampson & Agüera y Arcas, AISTATS 2017, algorithm 1",
    year=2017,
    url="https://arxiv.org/abs/1602.05629",
    equation="x <- x + sum_k (n_k / n) (x_k - x)",
    differs="It is the method that the others are compared with.",
)
def fedavg(weights: Literal["cases", "equal"] = "cases", **rest: Unpack[Parts]) -> Method:
    """x <- x + sum_k (n_k / n) (x_k - x) over the sites that took part. McMahan et al., AISTATS 2017, algorithm 1.

    weights  a site counts by its training cases, or all count the same
    """
    return averaging(**Parts(weigh=by_cases if weights == "cases" else equally) | rest)


def full_gradient(site: Site, model: nn.Module, message: Message) -> Tree:
    """One plain gradient step on the mean loss of all the site's training cases, batch by batch."""
    step, device, n = site.step, site.slots.device, site.cases
    optimizer = Step(weight_decay=step.weight_decay).optimizer(model, site.lr)
    model.train()
    model.zero_grad(set_to_none=True)  # of an answer that was refused half-way
    total = torch.zeros((), device=device)
    for batch in site.batches(1):
        with step.autocast(device):
            loss = site.task.loss(site.task.outputs(model, batch), batch) * (len(batch.y) / n)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()  # no .item() here: it would make a GPU wait for every batch
    if not math.isfinite(mean := float(total)):
        raise Refused(f"the training loss at {site.name} was not finite in round {site.round}")
    step.take(optimizer, model, 1, None)
    return {"loss": mean, "steps": 1}


@card(
    "fedsgd",
    title="Federated gradient descent",
    family="averaging",
    paper="McMahan, Moore, Ramage, Hampson & Agüera y Arcas, AISTATS 2017, section 2",
    year=2017,
    url="https://arxiv.org/abs/1602.05629",
    equation="x <- x - eta sum_k (n_k / n) grad F_k(x)",
    differs="Each site takes one plain step on the gradient over all its cases, whatever optimiser the study names.",
    travels="weights down, eta times the gradient up: 4P bytes each way",
    reduces=Reduction("fedavg", step={"epochs": 1, "batch": 1_000_000, "optimiser": "sgd", "momentum": 0.0}),
)
def fedsgd(**rest: Unpack[Parts]) -> Method:
    """x <- x - eta sum_k (n_k / n) grad F_k(x). McMahan et al., AISTATS 2017, section 2."""
    return averaging(full_gradient, moments=False, **rest)


@card(
    "fedprox",
    title="FedProx",
    family="averaging",
    paper="Li, Sahu, Zaheer, Sanjabi, Talwalkar & Smith, MLSys 2020, equation 2",
    year=2020,
    url="https://arxiv.org/abs/1812.06127",
    equation="min_w F_k(w) + mu/2 ||w - x||^2 at each site, as far as each gets",
    differs="A site's loss grows with the squared distance of its model from the one it received; a slow site may "
    "hand in a part of its work.",
    reduces=Reduction("fedavg", own={"mu": 0.0}),
)
def fedprox(
    mu: NotNegative = 0.01,
    stragglers: Portion = 0.0,
    work: Mapping[str, Fraction] | None = None,
    unit: Unit = "epochs",
    late: Literal["kept", "dropped"] = "kept",
    **rest: Unpack[Parts],
) -> Method:
    """Adds mu/2 ||w - x||^2 over the parameters to each site's loss. Li et al., MLSys 2020, equation 2.

    What a site has after a part of its work is the paper's gamma-inexact solution; gamma itself is not measured.

    stragglers  the share of a round's sites that do a part of their work, drawn anew; section 5.2 has 0, 0.5 and 0.9
    work        the part of the study's local epochs that these sites do, every round; 1 is all
    unit        a part is rounded up to whole epochs, as in the paper, or to batches
    late        what stragglers did is kept, or they are left out, as the paper's FedAvg (with mu = 0) does
    """
    plan = Work(stragglers, work or {}, unit, late)

    def train(site: Site, model: nn.Module, message: Message) -> Tree:
        x = {name: p.detach().clone() for name, p in model.named_parameters()}
        if plan.whole:
            return fit(site, model, extra=pull_to(x, mu), memory=message.get("optimizer"))
        batches, done = plan.batches(site, message.get("work", 1.0))
        return {
            **fit(site, model, batches=batches, extra=pull_to(x, mu), memory=message.get("optimizer")),
            "work": done,
        }

    reports = {} if plan.whole else {"work": Number(0, 1)}
    return allotted(averaging(train, reports=reports, **rest), plan)


@card(
    "fedbn",
    title="FedBN",
    family="averaging",
    paper="Li, Jiang, Zhang, Kamp & Dou, ICLR 2021",
    year=2021,
    url="https://arxiv.org/abs/2102.07623",
    equation="x <- x + sum_k (n_k / n) (x_k - x), without normalisation layers",
    differs="Normalisation layers, parameters and statistics, stay at their site.",
    travels="weights without normalisation layers down, their change up: 4P' bytes each way",
    normalisation="stays at each site; a site that has not trained predicts with statistics of its training images, "
    "measured anew without labels, and with scales and shifts as the study begins with them",
)
def fedbn(norms: Literal["all", "batch"] = "all", **rest: Unpack[Parts]) -> Method:
    """Normalisation layers stay at their site, found by their type. Li et al., ICLR 2021.

    norms  all normalisation layers, or only batch normalisation, of which the paper speaks
    """
    layers = NORMS if norms == "all" else BATCH
    return averaging(**Parts(share=without(*layers), use=own_or_measured(layers)) | rest)


@card(
    "fedavgm",
    title="FedAvg with server momentum",
    family="averaging",
    paper="Hsu, Qi & Brown, 2019, section 4.3",
    year=2019,
    url="https://arxiv.org/abs/1909.06335",
    equation="v <- beta v + (1 - dampening) Delta;  x <- x + eta v",
    differs="The server moves by a running sum of the merged updates.",
    reduces=Reduction("fedavg", own={"eta": 1.0, "beta": 0.0}),
)
def fedavgm(eta: Positive = 1.0, beta: Decay = 0.9, dampening: Portion = 0.0, **rest: Unpack[Parts]) -> Method:
    """v <- beta v + (1 - dampening) Delta, x <- x + eta v; parameters only. Hsu, Qi & Brown, 2019, section 4.3."""
    return averaging(**Parts(step=momentum(eta, beta, dampening)) | rest)


REDDI = {
    "family": "averaging",
    "paper": "Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar & McMahan, ICLR 2021, algorithm 2",
    "year": 2021,
    "url": "https://arxiv.org/abs/2003.00295",
}


@card(
    "fedadam",
    title="FedAdam",
    equation="m <- b1 m + (1-b1) D;  v <- b2 v + (1-b2) D^2;  x <- x + eta m / (sqrt v + tau)",
    differs="The server takes an Adam step on the merged update.",
    **REDDI,
)
def fedadam(
    eta: Positive = 0.01, beta1: Decay = 0.9, beta2: Decay = 0.99, tau: Positive = 1e-3, **rest: Unpack[Parts]
) -> Method:
    """An Adam step at the server, without bias correction; parameters only. Reddi et al., ICLR 2021, algorithm 2."""
    return averaging(**Parts(step=adaptive("adam", eta, beta1, beta2, tau)) | rest)


@card(
    "fedyogi",
    title="FedYogi",
    equation="m <- b1 m + (1-b1) D;  v <- v - (1-b2) D^2 sign(v - D^2);  x <- x + eta m / (sqrt v + tau)",
    differs="As FedAdam, with a second moment that moves by steps of the size of D^2.",
    **REDDI,
)
def fedyogi(
    eta: Positive = 0.01, beta1: Decay = 0.9, beta2: Decay = 0.99, tau: Positive = 1e-3, **rest: Unpack[Parts]
) -> Method:
    """A Yogi step at the server; parameters only. Reddi et al., ICLR 2021, algorithm 2."""
    return averaging(**Parts(step=adaptive("yogi", eta, beta1, beta2, tau)) | rest)


@card(
    "fedadagrad",
    title="FedAdagrad",
    equation="m <- b1 m + (1-b1) D;  v <- v + D^2;  x <- x + eta m / (sqrt v + tau)",
    differs="As FedAdam, with a second moment that only grows.",
    **REDDI,
)
def fedadagrad(eta: Positive = 0.01, beta1: Decay = 0.0, tau: Positive = 1e-3, **rest: Unpack[Parts]) -> Method:
    """An Adagrad step at the server; parameters only. Reddi et al., ICLR 2021, algorithm 2 (beta1 = 0 there)."""
    return averaging(**Parts(step=adaptive("adagrad", eta, beta1, 0.0, tau)) | rest)


@card(
    "comed",
    title="Coordinate-wise median",
    family="averaging",
    paper="Yin, Chen, Kannan & Bartlett, ICML 2018, algorithm 1, option I",
    year=2018,
    url="https://arxiv.org/abs/1803.01498",
    equation="x_j <- x_j + median_k (x_k - x)_j",
    differs="Every entry moves by the median of the sites' changes, whatever their cases.",
    normalisation="parameters and running statistics take the median, counters the largest",
    reduces=Reduction("fedavg", alone=True),
)
def comed(**rest: Unpack[Parts]) -> Method:
    """x_j <- x_j + median_k (x_k - x)_j; of an even number, the mean of the middle two. Yin et al., ICML 2018."""
    return averaging(**Parts(merge=median) | rest)
