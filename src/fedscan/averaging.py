"""The round that most methods share: send, train, gather, weigh, merge, step."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypedDict

import torch
from torch import nn

from fedscan import trees
from fedscan.method import Message, Method, Privacy, Replies, Sites, State, Terms, Tree, answer, receive
from fedscan.parts.channel import Channel, whole
from fedscan.parts.pick import Pick, everyone
from fedscan.parts.share import Share, everything
from fedscan.parts.step import ServerStep, take
from fedscan.parts.weigh import Weigh, by_cases
from fedscan.schema import Schema, Weights, schema_of, weights_of
from fedscan.site import Site, copy_of, fit
from fedscan.spec import Leaves, Maybe, Number, Refused, Spec

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


def update_spec(share: Share, channel: Channel, reports: Mapping[str, Spec]) -> Callable[[Terms], dict[str, Spec]]:
    """What an answer with an update holds: the coded leaves that travel, the cases, and what training reports."""

    def gives(terms: Terms) -> dict[str, Spec]:
        travels = share(terms.model)
        schema = {k: leaf for k, leaf in schema_of(terms.model).items() if k in travels}
        entries: dict[str, Spec] = {"update": channel.gives(schema), "cases": Number(low=1, whole=True), **reports}
        moments = terms.step.moments_schema(terms.model)
        if some := {k: leaf for k, leaf in moments.items() if of_parameter(k) in travels}:
            entries["optimizer"] = Maybe(Leaves(some))
        return entries

    return gives


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
    """

    @answer(privacy, update_spec(share, channel, reports))
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

    def init(model: nn.Module, names: tuple[str, ...]) -> State:
        return {"weights": copy_of(model).only(share(model))}

    def round(sites: Sites, state: State) -> State:
        chosen = pick(sites.names, sites.random("pick"))
        messages, state = outgoing(state, chosen, down, sites.random("down"))
        replies = sites.ask_each(learn, messages)
        state = arrivals(state, replies)
        updates = Updates(replies, channel, state["weights"].schema)
        shares = weigh(updates, state)
        each = (updates[name]["update"] for name in updates)
        merged = merge(list(each) if replies.resident else each, [shares[name] for name in updates])
        if all("optimizer" in reply for reply in replies.values()):
            moments = (reply["optimizer"] for reply in replies.values())
            state = {**state, "optimizer": mean(moments, [shares[name] for name in replies])}
        total = sum(shares.values())
        return step({**state, "shares": {name: s / total for name, s in shares.items()}}, merged)

    return Method(init=init, round=round, answers=(learn,), use=use)


def outgoing(
    state: State, names: Sequence[str], down: Channel, draw: torch.Generator
) -> tuple[dict[str, Message], State]:
    """The message for each site, and the state in which they were sent.

    With a coding channel the server keeps ``base``, the model that up-to-date sites hold: those get the coded change,
    the others the whole. What coding loses is in the next change by itself, since that is taken from ``base``.
    """
    extras = {"optimizer": state["optimizer"]} if "optimizer" in state else {}
    if down is whole:
        message = {"weights": state["weights"], **extras}  # one object, so that it is made ready once
        return dict.fromkeys(names, message), state
    version, held = state.get("version", 0), state.get("held", {})
    if "base" not in state:
        base, change = state["weights"], None
    else:
        change, _ = down.encode(trees.sub(state["weights"], state["base"]), None, draw)
        base = trees.add(state["base"], down.decode(change, state["base"].schema))
    all_of_it = {"weights": base, "version": version + 1, **extras}
    only_change = {"change": change, "version": version + 1, **extras}
    messages: dict[str, Message] = {
        n: only_change if change is not None and held.get(n) == version else all_of_it for n in names
    }
    return messages, {**state, "base": base, "version": version + 1}


def arrivals(state: State, replies: Replies) -> State:
    """The state after the replies: a site that answered holds this version, one that is missing may not."""
    if "version" not in state:
        return state
    held = {n: v for n, v in state.get("held", {}).items() if n not in replies.missing}
    return {**state, "held": {**held, **dict.fromkeys(replies, state["version"])}}


def arrived(site: Site, message: Message, down: Channel) -> Weights:
    """The weights a site holds after a message: the whole that was sent, or its last with the change added."""
    if "change" in message:
        if site.state.get("version") != message["version"] - 1:
            raise Refused(f"{site.name} does not hold the model that a change was sent for; it needs the whole")
        base: Weights = site.state["base"]
        x = trees.add(base, down.decode(message["change"], base.schema))
    else:
        x = message["weights"]
    if "version" not in message:
        return x
    site.state["base"], site.state["version"] = x, message["version"]
    return x
