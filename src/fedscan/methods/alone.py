"""What federation is compared with: every site by itself, all of them as an ensemble, and pooled cases."""

import torch
from torch import Tensor, nn

from fedscan.averaging import averaging
from fedscan.method import Message, Method, Replies, Sites, State
from fedscan.methods.card import Reduction, card, moments_stay
from fedscan.methods.travelling import train_on
from fedscan.schema import Weights
from fedscan.site import Site, copy_of, load

ALONE = "sites that train alone share no moments"


def each_alone(sites: Sites, models: dict[str, Weights]) -> dict[str, Weights]:
    """Every site's model after its own local epochs; of a site that did not answer, the model it had."""
    replies: Replies = sites.ask_each(train_on, {name: {"weights": models[name]} for name in sites.names})
    return {name: replies[name]["weights"] if name in replies else models[name] for name in sites.names}


@card(
    "local-only",
    title="Every site alone",
    family="reference",
    paper="no paper; the baseline of almost every table",
    year=2017,
    url="",
    equation="x_k <- train_k(x_k)",
    differs="Nothing is shared; a model travels only so that it can be scored at the other sites.",
    travels="a site's own model, down and up: 4P bytes each way; no site is sent another's but for scores",
    normalisation="stays with each site's own model",
    moments="kept",
    admits=moments_stay(ALONE, '"kept"'),
    reduces=Reduction("cwt", alone=True),
)
def local_only() -> Method:
    """x_k <- train_k(x_k): each site trains its own model on its own cases."""

    def init(model: nn.Module, names: tuple[str, ...]) -> State:
        first = copy_of(model)
        return {"for": dict.fromkeys(names, first)}

    def round(sites: Sites, state: State) -> State:
        return {**state, "for": each_alone(sites, state["for"])}

    return Method(init, round, answers=(train_on,))


class Ensemble(nn.Module):
    """The mean of its members' probabilities, as log-probabilities, so that their softmax is that mean."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Images (B, C, *grid) to log-probabilities (B, classes, ...)."""
        total = torch.stack([member(*inputs).float().softmax(1) for member in self.members]).mean(0)
        return total.clamp_min(torch.finfo(total.dtype).tiny).log()


@card(
    "ensemble",
    title="Ensemble of local models",
    family="reference",
    paper="no paper; a baseline of Li et al., Medical Image Analysis 2020, among others",
    year=2020,
    url="https://arxiv.org/abs/2001.05647",
    equation="p(y | v) = mean_k softmax(f(v; x_k))",
    differs="Every site trains alone, and all their models vote.",
    travels="a site's own model down and up while training, 4P bytes each way; K models, 4KP bytes, to predict with",
    normalisation="stays with each member",
    moments="kept",
    admits=moments_stay(ALONE, '"kept"'),
)
def ensemble() -> Method:
    """p(y | v) = mean_k softmax(f(v; x_k)): sites train alone, and predict with the mean probability of all models."""

    def init(model: nn.Module, names: tuple[str, ...]) -> State:
        first = copy_of(model)
        return {"weights": dict.fromkeys(names, first)}

    def round(sites: Sites, state: State) -> State:
        return {**state, "weights": each_alone(sites, state["weights"])}

    def use(site: Site, message: Message) -> nn.Module:
        members = sorted(message["weights"].items())
        return Ensemble([load(site.model(f"member{i}"), weights) for i, (_, weights) in enumerate(members)])

    return Method(init, round, answers=(train_on,), use=use)


@card(
    "centralised",
    title="Pooled cases",
    family="reference",
    paper="no paper; what could be had if scans were allowed to leave",
    year=2017,
    url="",
    equation="x <- train(x) on the union of all sites' cases",
    differs="All cases lie at one site: the study is rewritten so, with as many optimiser steps.",
    travels="nothing, since there is one site",
    moments="kept",
    reduces=Reduction("fedavg"),
    pooled=True,
)
def centralised() -> Method:
    """x <- train(x): plain training, once the study has been rewritten to one pooled site."""
    return averaging()
