"""The round that most methods share: send, train, gather, weigh, merge, step."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypedDict

import torch
from torch import nn

from fedscan import trees
from fedscan.method import (
    Holds,
    Message,
    Method,
    Privacy,
    Question,
    Replies,
    Sites,
    State,
    Terms,
    Tree,
    answer,
    messages,
    receive,
)
from fedscan.parts.channel import Channel, whole
from fedscan.parts.pick import Pick, everyone
from fedscan.parts.share import Share, everything
from fedscan.parts.step import ServerStep, take
from fedscan.parts.weigh import Weigh, by_cases, with_shares
from fedscan.schema import Schema, Weights, schema_of, weights_of
from fedscan.site import Site, copy_of, fit
from fedscan.spec import Cases, Leaves, Maybe, Number, Refused, Spec

NOTHING: Mapping[str, Spec] = MappingProxyType({})
Train = Callable[[Site, nn.Module, Message], Tree]
Merge = Callable[[Iterable[Weights], Sequence[float]], Weights]  # updates in name order, and their shares


def plain_train(site: Site, model: nn.Module, message: Message) -> Tree:
    """The study's local epochs on the site's own cases."""
    return fit(site, model, memory=message.get("optimizer"))


def mean(updates: Iterable[Weights], shares: Sequence[float]) -> Weights:
    """The weighted mean. A list is read once, block by block; anything else is folded one by one, to the same bits."""
    if isinstance(updates, list):
        return trees.mean(updates, shares)
    fold: trees.Fold | None = None
    for update, share in zip(updates, shares, strict=True):
        fold = fold or trees.Fold(update.schema)
        fold.add(update, share)
    if fold is None:
        raise ValueError("there is no update to merge")
    return fold.result()


def median(updates: Iterable[Weights], shares: Sequence[float]) -> Weights:
    """The median of every entry; the shares do not count. Needs all updates at once."""
    return trees.median(list(updates))


class Updates(Mapping[str, Mapping[str, Any]]):
    """Replies whose "update" is decoded when it is looked at, and not kept."""

    def __init__(self, replies: Replies, channel: Channel, schema: Schema) -> None:
        self.replies, self.channel, self.schema = replies, channel, schema

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        return _Update(self.replies[name], self.channel, self.schema)

    def __iter__(self) -> Iterator[str]:
        return iter(self.replies)

    def __len__(self) -> int:
        return len(self.replies)


class _Update(dict[str, Any]):
    def __init__(self, reply: Tree, channel: Channel, schema: Schema) -> None:
        super().__init__(reply)
        self.channel, self.schema = channel, schema

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return self.channel.decode(value, self.schema) if name == "update" else value


class Parts(TypedDict, total=False):
    """The parts of ``averaging`` that a method passes on, so that methods combine without a class for each pair."""

    pick: Pick
    share: Share
    channel: Channel
    down: Channel
    weigh: Weigh
    merge: Merge
    step: ServerStep
    use: Callable[[Site, Message], nn.Module]


def of_parameter(moment: str) -> str:
    """The parameter whose moment has this name."""
    return moment.split("/", 1)[1]


def leaving(report: Tree, travels: frozenset[str]) -> Tree:
    """The report with the moments of those parameters only that travel."""
    if "optimizer" not in report:
        return report
    moments: Weights = report["optimizer"]
    return {**report, "optimizer": moments.only(k for k in moments if of_parameter(k) in travels)}


def update_spec(
    share: Share, channel: Channel, reports: Mapping[str, Spec], moments: bool = True
) -> Callable[[Terms], dict[str, Spec]]:
    """What an answer with an update holds: the coded leaves that travel, the cases, and what training reports."""

    def gives(terms: Terms) -> dict[str, Spec]:
        travels = share(terms.model)
        schema = {k: leaf for k, leaf in schema_of(terms.model).items() if k in travels}
        entries: dict[str, Spec] = {"update": channel.gives(schema), "cases": Cases(), **reports}
        every = terms.step.moments_schema(terms.model) if moments else {}
        if some := {k: leaf for k, leaf in every.items() if of_parameter(k) in travels}:
            entries["optimizer"] = Leaves(some)  # of every site: one that left them out would keep all from averaging
        return entries

    return gives


def model_spec(share: Share, down: Channel) -> Holds:
    """What a message with the model holds: the leaves that travel or, coded, what changed since a version."""

    def takes(terms: Terms) -> dict[str, Spec]:
        travels = share(terms.model)
        schema = {k: leaf for k, leaf in schema_of(terms.model).items() if k in travels}
        if down is whole:
            return {"weights": Leaves(schema)}
        version = Number(low=0, whole=True)
        return {"weights": Maybe(Leaves(schema)), "change": Maybe(down.gives(schema)), "version": version}

    return takes


def averaging(
    train: Train = plain_train,
    *,
    pick: Pick = everyone,
    share: Share = everything,
    channel: Channel = whole,
    down: Channel = whole,
    weigh: Weigh = by_cases,
    merge: Merge = mean,
    step: ServerStep = take,
    use: Callable[[Site, Message], nn.Module] = receive,
    reports: Mapping[str, Spec] = NOTHING,
    privacy: Privacy = "weights",
    moments: bool = True,
    takes: Mapping[str, Spec] = NOTHING,
) -> Method:
    """FedAvg, and with one part exchanged, some forty of its descendants.

    train    what a site does with the model it received; returns what it reports
    pick     which sites take part
    share    which leaves travel; the rest stay at the site
    channel  what happens to an update on its way up
    down     what happens to the model on its way down: a coded change where the site holds the last one, else the whole
    weigh    how much each update counts
    merge    how updates become one
    step     what the server does with the merged update
    use      what a site predicts with
    reports  what else ``train`` reports than numbers of any size;  privacy: the most telling class of data in that
    moments  whether ``train`` reports the optimiser's moments where the study has them averaged, as ``fit`` does
    takes    what else than the model and numbers the round sends to ``train``
    """

    model_in = model_spec(share, down)
    learn = learning(train, share, channel, down, reports, takes, privacy, moments)

    def init(model: nn.Module, names: tuple[str, ...]) -> State:
        weights = copy_of(model).only(share(model))
        return {"weights": weights} if down is whole else {"weights": weights, "version": 0}

    def round(sites: Sites, state: State) -> State:
        chosen, before = pick(sites.names, sites.random("pick")), state
        sent = {"optimizer": state["optimizer"]} if "optimizer" in state else {}
        replies = sites.ask_each(learn, messages(state, chosen, **sent))
        state = caught_up(state)
        updates = Updates(replies, channel, state["weights"].schema)
        shares = weigh(updates, state)
        each = (updates[name]["update"] for name in updates)
        merged = merge(list(each) if replies.resident else each, [shares[name] for name in updates])
        if all("optimizer" in reply for reply in replies.values()):
            after = (reply["optimizer"] for reply in replies.values())
            state = {**state, "optimizer": mean(after, [shares[name] for name in replies])}
        state = step(with_shares(state, shares), merged)
        return state if down is whole else with_news(before, state, replies, down, sites.random("down"))

    def predictor(site: Site, message: Message) -> nn.Module:
        return use(site, {**message, "weights": arrived(site, message, down)})

    return Method(init, round, answers=(learn,), use=use if down is whole else predictor, publishes=model_in)


def learning(
    train: Train,
    share: Share,
    channel: Channel,
    down: Channel,
    reports: Mapping[str, Spec],
    takes: Mapping[str, Spec],
    privacy: Privacy,
    moments: bool,
) -> Question:
    """The question of ``averaging``: train the model that came, and send what changed of it, coded."""
    model_in, update_out = model_spec(share, down), update_spec(share, channel, reports, moments)

    def learn_takes(terms: Terms) -> dict[str, Spec]:
        back = {k: Maybe(spec) for k, spec in update_out(terms).items() if k == "optimizer"}
        return {**model_in(terms), **back, **takes}

    @answer(privacy, update_out, learn_takes)
    def learn(site: Site, message: Message) -> Tree:
        x = arrived(site, message, down)
        model = receive(site, {**message, "weights": x})
        report = train(site, model, message)
        after, travels = weights_of(model), share(model)
        if len(travels) < len(after):
            site.state["own"] = copy_of(model).only(after.keys() - travels)
        update = trees.sub(after, x)
        sent, rest = channel.encode(update, site.state.get("rest"), site.stream("channel"))
        if rest is not None:
            site.state["rest"] = rest
        return {**leaving(report, travels), "cases": site.cases, "update": sent}

    return learn


def caught_up(state: State) -> State:
    """The state with the server's exact weights: those that are published, and what coding has held back of them."""
    return {**state, "weights": trees.add(state["weights"], state["behind"])} if "behind" in state else state


def with_news(before: State, after: State, replies: Replies, down: Channel, draw: torch.Generator) -> State:
    """The state that publishes a coded change of the weights: ``after`` has the exact ones, which sites never see.

    What coding loses stays in ``behind`` and so is in the next change. Sites that answered hold the version
    ``before`` and are sent the change; the others are sent the whole. Scores and saved models are of what sites hold.
    """
    change, _ = down.encode(trees.sub(after["weights"], before["weights"]), None, draw)
    weights = trees.add(before["weights"], down.decode(change, before["weights"].schema))
    return {
        **after,
        "weights": weights,
        "behind": trees.sub(after["weights"], weights),
        "news": {"change": change, "to": list(replies)},
        "version": before.get("version", 0) + 1,
    }


def arrived(site: Site, message: Message, down: Channel) -> Weights:
    """The weights a site holds after a message: the whole that was sent, or its last with the change added, once."""
    if "version" not in message:
        whole_of_it: Weights = message["weights"]
        return whole_of_it
    version, known = message["version"], site.state.get("version")
    if known == version:  # it came before, to be scored
        held: Weights = site.state["base"]
        return held
    if "change" in message:
        if known != version - 1:
            raise Refused(f"{site.name} does not hold the model that a change was sent for; it needs the whole")
        base: Weights = site.state["base"]
        x = trees.add(base, down.decode(message["change"], base.schema))
    elif "weights" in message:
        x = message["weights"]
    else:
        raise Refused(f"{site.name} was sent version {version} of the model, and neither weights nor a change")
    site.state["base"], site.state["version"] = x, version
    return x
