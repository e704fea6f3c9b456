"""A study that trains nothing: each site sends back the weights that it was sent, and counts how often it was asked."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import toy
from fedscan.averaging import mean
from fedscan.method import Message, Method, Sites, State, Terms, Tree, answer, just_weights
from fedscan.schema import schema_of
from fedscan.site import Site
from fedscan.spec import Leaves, Number, Spec
from fedscan.study import Study

NAMES = ("amsterdam", "bergen")
Reply = Callable[[Site, Message], Tree]


class Flat(nn.Module):
    """Weights in leaves of one size, and nothing to do with them."""

    def __init__(self, leaves: int, size: int) -> None:
        super().__init__()
        self.body = nn.ParameterList(torch.randn(size) for _ in range(leaves))


def holds(terms: Terms) -> dict[str, Spec]:
    """A message, or an answer: the weights."""
    return {"weights": Leaves(schema_of(terms.model))}


def gives(terms: Terms) -> dict[str, Spec]:
    """An answer: the weights, and how often the site was asked."""
    return {**holds(terms), "asked": Number(0, 1_000, whole=True)}


def back(site: Site, message: Message) -> Tree:
    """What was sent."""
    site.state["asked"] = site.state.get("asked", 0) + 1
    return {"weights": message["weights"], "asked": site.state["asked"]}


def method(reply: Reply = back, drift: float = 0.0) -> Method:
    """Asks all sites for an echo, round by round; the mean of the echoes, moved by ``drift``, is what comes next."""

    @answer("weights", gives, holds)
    def echo(site: Site, message: Message) -> Tree:
        return reply(site, message)

    def round(sites: Sites, state: State) -> State:
        replies = sites.ask(echo, {"weights": state["weights"]})
        merged = mean((replies[name]["weights"] for name in replies), [1 / len(replies)] * len(replies))
        if drift:
            merged = type(merged)({k: v + drift for k, v in merged.items()}, merged.kinds)
        return {"weights": merged}

    return Method(just_weights, round, (echo,), use=lambda site, message: nn.Identity())


class Unscored(toy.Toy):
    """A task with a network of this size, and no scores."""

    def __init__(self, leaves: int, size: int) -> None:
        self.networks = {"model": lambda: Flat(leaves, size)}

    def scores(self, *_: Any) -> list[list[Any]]:
        return []


def study(
    names: tuple[str, ...] = NAMES, leaves: int = 4, size: int = 2_000, reply: Reply = back, drift: float = 0.0,
    **changes: Any,
) -> Study:  # fmt: skip
    """The study. It scores nothing."""
    plan = toy.study(method(reply, drift), names, **{"rounds": 3, **changes})
    return replace(plan, task=Unscored(leaves, size))
