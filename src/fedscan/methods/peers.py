"""Models that stay with the sites that train them, and are asked for by each other."""

from collections.abc import Sequence

from torch import nn

from fedscan import trees
from fedscan.method import Message, Method, Sites, State, Terms, Tree, answer, receive
from fedscan.methods.card import Reduction, card, moments_stay
from fedscan.methods.kinds import Clients
from fedscan.methods.travelling import drawn
from fedscan.schema import schema_of
from fedscan.site import Site, fit, load
from fedscan.spec import Cases, Group, Leaves, Maybe, Number, Spec

VERSION = Number(low=0, whole=True)  # how often a site's model has been trained


def known_spec(terms: Terms) -> dict[str, Spec]:
    """A version of each peer."""
    return {"seen": Group({name: Maybe(VERSION) for name in terms.names})}


def model_spec(terms: Terms) -> dict[str, Spec]:
    """What is published: a whole model or, where it lies at the site already, nothing."""
    return {"weights": Maybe(Leaves(schema_of(terms.model)))}


def given_spec(terms: Terms) -> dict[str, Spec]:
    """What a peer gives: its version and cases and, where it is newer than the one known, its model."""
    return {"version": VERSION, "cases": Cases(), **model_spec(terms)}


def gifts_spec(terms: Terms) -> dict[str, Spec]:
    """The newer models of some peers, each with its version and cases."""
    gift = Group({"version": VERSION, "cases": Cases(), "weights": Leaves(schema_of(terms.model))})
    return {"gifts": Group({name: Maybe(gift) for name in terms.names})}


@answer("nothing", known_spec, lambda terms: {})
def known(site: Site, message: Message) -> Tree:
    """The site's version vector: the version of each peer's model that it has merged last; 0 where it is not in it."""
    return {"seen": site.state.get("seen", {})}


@answer("weights", given_spec, lambda terms: {"seen": VERSION})
def give(site: Site, message: Message) -> Tree:
    """The site's version and cases, and its model only where that is newer than the version ``seen``.

    With the model goes the number of optimiser steps of its last training, which a hospital's policy may ask for.
    """
    version = site.state.get("version", 0)
    newer = version > message["seen"]
    model = {"weights": site.state["model"], "steps": site.state["steps"]} if newer else {}
    return {"version": version, "cases": site.cases, **model}


@answer("weights", lambda terms: {"version": Number(low=1, whole=True), "merged": VERSION}, gifts_spec)
def wake(site: Site, message: Message) -> Tree:
    """Merges the gifts with the site's own model by cases, trains that on its cases, and keeps it as a new version.

    A model that was never trained is not merged: neither as a gift, for it has no newer version, nor as the own one.
    """
    gifts, version = message["gifts"], site.state.get("version", 0)
    parts = {name: (gift["weights"], gift["cases"]) for name, gift in gifts.items()}
    if version:
        parts[site.name] = (site.state["model"], site.cases)
    models, cases = zip(*(parts[name] for name in sorted(parts)), strict=True) if parts else ((), ())
    model = load(site.model(), trees.mean(models, cases) if parts else site.slots.first())
    report = fit(site, model)
    site.keep("model", model)
    site.state["version"], site.state["steps"] = version + 1, report["steps"]
    site.state["seen"] = {**site.state.get("seen", {}), **{name: gift["version"] for name, gift in gifts.items()}}
    return {**report, "version": version + 1, "merged": len(gifts)}


def woken(sites: Sites, name: str) -> None:
    """One turn of algorithm 1: ``name`` says what it knows, its peers give what is newer, it merges and trains.

    Who does not answer is left out: as a peer it gives nothing, as the one who wakes it sleeps on.
    """
    gifts = {}
    if others := [other for other in sites.names if other != name]:
        vector = sites.ask(known, {}, to=[name], need=0)
        if name not in vector:
            return
        seen = vector[name]["seen"]
        replies = sites.ask_each(give, {other: {"seen": seen.get(other, 0)} for other in others}, need=0)
        gifts = {peer: gift(reply) for peer, reply in replies.items() if "weights" in reply}
    sites.ask(wake, {"gifts": gifts}, to=[name], need=0)


def gift(reply: Tree) -> Message:
    """What of a peer's answer goes to the one that merges."""
    return {key: reply[key] for key in ("version", "cases", "weights")}


def gathered(sites: Sites, state: State) -> State:
    """The state with the model of every site that answers and has trained, as it is at the end of the study."""
    replies = sites.ask(give, {"seen": 0}, need=0)
    return {**state, "for": {name: reply["weights"] for name, reply in replies.items() if "weights" in reply}}


def own(site: Site, message: Message) -> nn.Module:
    """The model that was sent, a peer's perhaps; else the site's own, or the study's first before it has trained."""
    if "weights" in message:
        return receive(site, message)
    return load(site.model(), site.state.get("model") or site.slots.first())


def begin(model: nn.Module, names: Sequence[str]) -> State:
    """No model is at the server: ``for`` is empty until the end."""
    return {"for": {}, "rounds": 0}


@card(
    "braintorrent",
    title="BrainTorrent",
    family="peer to peer",
    paper="Roy, Siddiqui, Pölsterl, Navab & Wachinger, 2019, algorithm 1",
    year=2019,
    url="https://arxiv.org/abs/1905.06731",
    equation="x_i <- train_i((n_i x_i + sum_j n_j x_j) / (n_i + sum_j n_j)), over the peers j with v_j > v_i[j]",
    differs="There is no global model: a random site gathers those models that are newer than the ones it has merged, "
    "merges them with its own and trains; the coordinator only carries.",
    travels="each newer model once to each site that wakes: 4P bytes up from its owner to the coordinator and 4P down "
    "to the one that wakes; a model that is known does not travel; at the end each site's model, 4P up, to be saved "
    "and scored at the others",
    several=True,
    normalisation="parameters, running statistics and counters travel and are merged; each site has those of its own "
    "model",
    admits=moments_stay("peers hand on models and no moments"),
    reduces=Reduction("local-only", alone=True),
)
def braintorrent(wakes: Clients = None) -> Method:
    """A random site gathers the models newer than those it has merged, merges, trains. Roy et al., 2019, algorithm 1.

    Round 1 is the paper's start: every site trains the study's first model once. In each later round, sites wake one
    after another in an order that the server draws. The paper draws one client at a time, which is ``wakes = 1``; by
    default every site wakes once a round, so that a round has the local work of a round of federated averaging, and
    studies of so many rounds can be compared. For how long a client trains after a merge is the study's: its epochs.

    Each site keeps its model, how often that was trained, and a vector of the versions that it has merged. A peer with
    nothing newer sends no weights. A site that does not answer gives nothing and does not wake, and the others go on;
    what it has missed it is given later. A site that has never trained (it was silent in round 1) does not merge the
    model that it was given to begin with: of this the paper says nothing.

    The peers talk by way of the coordinator, for hospitals open no door to each other. It draws who wakes, where the
    paper leaves open how that is agreed on; it sees the models that it carries and keeps none, until after the last
    round the sites' models are gathered, to be saved and scored. There is no encryption from peer to peer.

    wakes  how many sites wake in a round, each at most once; all, where nothing is said
    """

    def round(sites: Sites, state: State) -> State:
        if not state["rounds"]:
            sites.ask(wake, {"gifts": {}})
        else:
            for name in drawn(sites.names, sites.random("wakes"))[:wakes]:
                woken(sites, name)
        return {**state, "for": {}, "rounds": state["rounds"] + 1}

    return Method(begin, round, answers=(known, give, wake), use=own, publishes=model_spec, closing=gathered)
