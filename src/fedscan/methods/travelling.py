"""Models that travel from site to site."""

from collections.abc import Sequence
from typing import Literal

import torch

from fedscan.method import Message, Method, Sites, State, Terms, Tree, answer, just_weights, receive
from fedscan.methods.card import Reduction, card
from fedscan.schema import schema_of, weights_of
from fedscan.site import Site, fit
from fedscan.spec import Leaves, Maybe, Spec


def trained_spec(terms: Terms) -> dict[str, Spec]:
    """A whole model and, where the study lets them travel, the optimiser's moments."""
    entries: dict[str, Spec] = {"weights": Leaves(schema_of(terms.model))}
    if moments := terms.step.moments_schema(terms.model):
        entries["optimizer"] = Maybe(Leaves(moments))
    return entries


@answer("weights", trained_spec, trained_spec)
def train_on(site: Site, message: Message) -> Tree:
    """Trains the model that arrived for the study's local epochs, and hands it on."""
    model = receive(site, message)
    report = fit(site, model, memory=message.get("optimizer"))
    return {**report, "weights": weights_of(model)}


def baggage(reply: Tree) -> Message:
    """What of a ``train_on`` answer the next site is sent."""
    return {key: reply[key] for key in ("weights", "optimizer") if key in reply}


def drawn(names: Sequence[str], draw: torch.Generator, last: str | None = None) -> list[str]:
    """The names in an order drawn at random, drawn again for as long as ``last`` comes first, if it is not alone."""
    while True:
        stops = [names[i] for i in torch.randperm(len(names), generator=draw).tolist()]
        if stops[0] != last or len(stops) == 1:
            return stops


@card(
    "cwt",
    title="Cyclic weight transfer",
    family="travelling",
    paper="Chang, Balachandar, Lam, Yi, Brown, Beers, Rosen, Rubin & Kalpathy-Cramer, JAMIA 2018",
    year=2018,
    url="https://doi.org/10.1093/jamia/ocy017",
    equation="x <- train_K(... train_2(train_1(x)))",
    differs="One model visits the sites in turn and is trained at each; nothing is averaged, and neither the steps nor "
    "the loss are matched to a site's share of the cases, as Balachandar et al., JAMIA 2020, do.",
    travels="the model, to each site and back: 4P bytes each way; with travelling moments their bytes too",
    normalisation="travels with the model: statistics are those of the sites visited last",
    reduces=Reduction("local-only", alone=True),
)
def cwt(order: Literal["fixed", "random", "random-no-repeat"] = "fixed") -> Method:
    """x <- train_K(... train_1(x)): one model visits the sites in turn. Chang et al., JAMIA 2018.

    A site that does not answer is passed over.

    order  in which sites are visited: their own, drawn anew each round, or drawn so that no round begins at the site
           where the model was last trained
    """

    def round(sites: Sites, state: State) -> State:
        stops = list(sites.names)
        if order != "fixed":
            stops = drawn(stops, sites.random("order"), state.get("last"))
        luggage: Message = {key: state[key] for key in ("weights", "optimizer") if key in state}
        last: Message = {}
        for name in stops:
            replies = sites.ask(train_on, luggage, to=[name], need=0)
            if name in replies:
                luggage = baggage(replies[name])
                last = {"last": name} if order == "random-no-repeat" else {}
        return {**state, **luggage, **last}

    return Method(just_weights, round, answers=(train_on,))
