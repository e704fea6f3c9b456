"""FedAvg with faults that only a new process can see: something is kept, or taken, where a resumed run lacks it."""

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from contract import faulty
from fedscan import trees
from fedscan.averaging import averaging, plain_train
from fedscan.method import Message, Method, Question, Replies, Sites, State, Tree
from fedscan.methods.registry import Entry, get
from fedscan.schema import Weights
from fedscan.site import Site, copy_of

LAST: dict[str, Weights] = {}  # emptied when a run begins, and so never seen by one that follows in this process


def in_a_closure(method: Method) -> Method:
    """The mean of all models so far, which are kept in a list, as classes keep them in an attribute."""
    seen: list[Weights] = []

    def round(sites: Sites, state: State) -> State:
        state = method.round(sites, state)
        seen.append(state["weights"])
        return {**state, "weights": trees.mean(seen, [1.0] * len(seen))}

    return replace(method, round=round)


def in_a_global(method: Method) -> Method:
    """A tenth of the round before is added again: momentum whose buffer is a variable of the module."""

    def init(model: nn.Module, names: tuple[str, ...]) -> State:
        LAST.clear()
        return method.init(model, names)

    def round(sites: Sites, state: State) -> State:
        after = method.round(sites, state)
        before: Weights = LAST["server"] if "server" in LAST else state["weights"]
        LAST["server"] = state["weights"]
        return {**after, "weights": trees.add(after["weights"], trees.sub(state["weights"], before), 0.1)}

    return replace(method, init=init, round=round)


def at_a_site(method: Method) -> Method:
    """A site returns to half of the model it had last, and remembers it in a variable instead of ``site.state``."""

    def train(site: Site, model: nn.Module, message: Message) -> Tree:
        if site.round == 1:
            LAST.pop(site.name, None)
        report = plain_train(site, model, message)
        if site.name in LAST:
            for name, p in model.named_parameters():
                p.data.lerp_(LAST[site.name][name], 0.5)
        LAST[site.name] = copy_of(model)
        return report

    return averaging(train)


def by_hash(method: Method) -> Method:
    """Sites weigh by the hash of their name, which is another in every interpreter."""
    return averaging(weigh=lambda updates, state: {name: 1.0 + hash(name) % 97 for name in updates})


def needs_all(method: Method) -> Method:
    """A round that does nothing unless every site answers."""

    class All:
        def __init__(self, sites: Sites) -> None:
            self.sites, self.names = sites, sites.names

        def ask_each(self, question: Question, messages: Mapping[str, Message], *, need: int = 1) -> Replies:
            return self.sites.ask_each(question, messages, need=len(self.names))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sites, name)

    return replace(method, round=lambda sites, state: method.round(All(sites), state))


def dies(folder: Path) -> str:
    """Ends the process that calls it."""
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def planted(change: Callable[[Method], Method]) -> Entry[Any]:
    return faulty(get("fedavg"), change)


closure, module, site, hashes, impatient = (
    planted(change) for change in (in_a_closure, in_a_global, at_a_site, by_hash, needs_all)
)
