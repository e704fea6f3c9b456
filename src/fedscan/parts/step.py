"""What the server does with the merged update: new state from old. Only parameters get momentum or adaptive rates."""

from collections.abc import Callable
from typing import Any, Literal

import torch

from fedscan import trees
from fedscan.schema import Kind, Weights

State = dict[str, Any]
ServerStep = Callable[[State, Weights], State]


def take(state: State, merged: Weights) -> State:
    """x <- x + Delta: the merged update as it is."""
    return {**state, "weights": trees.add(state["weights"], merged)}


def moved(state: State, merged: Weights, parameters: Weights) -> State:
    """The state after ``parameters`` are added in place of the merged ones; all else is taken as it is."""
    return take(state, Weights({**merged, **parameters}, merged.kinds))


def rate(eta: float = 1.0) -> ServerStep:
    """x <- x + eta Delta. Statistics and counters are taken as they are."""

    def step(state: State, merged: Weights) -> State:
        return moved(state, merged, trees.scale(merged.of(Kind.PARAMETER), eta))

    return step


def momentum(eta: float = 1.0, beta: float = 0.9, dampening: float = 0.0) -> ServerStep:
    """v <- beta v + (1 - dampening) Delta, x <- x + eta v (FedAvgM). Hsu, Qi & Brown, 2019, sec. 4.3."""

    def step(state: State, merged: Weights) -> State:
        delta = trees.scale(merged.of(Kind.PARAMETER), 1 - dampening)
        v = trees.add(trees.scale(state["momentum"], beta), delta) if "momentum" in state else delta
        return {**moved(state, merged, trees.scale(v, eta)), "momentum": v}

    return step


def adaptive(
    rule: Literal["adagrad", "adam", "yogi"], eta: float, beta1: float, beta2: float, tau: float
) -> ServerStep:
    """m <- beta1 m + (1-beta1) Delta, v by ``rule``, x <- x + eta m / (sqrt(v) + tau). Reddi et al., 2021, alg. 2.

    v starts at tau squared, as algorithm 2 asks (v_{-1} >= tau^2); there is no bias correction in the paper.
    """

    def second(v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        if rule == "adagrad":
            return v + square
        if rule == "adam":
            return beta2 * v + (1 - beta2) * square
        return v - (1 - beta2) * square * torch.sign(v - square)

    def step(state: State, merged: Weights) -> State:
        delta = merged.of(Kind.PARAMETER)
        m = state.get("m") or trees.zeros(delta)
        v = state.get("v") or Weights({k: torch.full_like(d, tau**2) for k, d in delta.items()})
        m = Weights({k: beta1 * m[k] + (1 - beta1) * d for k, d in delta.items()})
        v = Weights({k: second(v[k], d.square()) for k, d in delta.items()})
        move = Weights({k: eta * m[k] / (v[k].sqrt() + tau) for k in delta})
        return {**moved(state, merged, move), "m": m, "v": v}

    return step
