"""Sites whose answers are written beforehand, so that a round's arithmetic can be worked out by hand."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fedscan.method import Message, Method, Question, Replies, State, Tree
from fedscan.schema import Kind, Weights

KINDS = {"w": Kind.PARAMETER, "var": Kind.STATISTIC, "n": Kind.COUNTER}
Reply = Mapping[str, Any]


def leaves(w: Sequence[float], var: float = 0.0, n: int = 0) -> Weights:
    """A model of two parameters, one running variance and one counter."""
    x = {"w": torch.tensor(w, dtype=torch.float32), "var": torch.tensor([float(var)]), "n": torch.tensor(n)}
    return Weights(x, KINDS)


class Canned:
    """Sites whose answers are written beforehand: one list per site, one answer per question; None for silence."""

    def __init__(self, answers: Mapping[str, Sequence[Reply | None]]) -> None:
        self.names = tuple(sorted(answers))
        self.answers = {name: list(replies) for name, replies in answers.items()}
        self.asked: list[tuple[str, Message]] = []

    def ask(self, question: Question, message: Message, *, to: Sequence[str] | None = None, need: int = 1) -> Replies:
        return self.ask_each(question, dict.fromkeys(self.names if to is None else to, message), need=need)

    def ask_each(self, question: Question, messages: Mapping[str, Message], *, need: int = 1) -> Replies:
        self.asked += messages.items()
        said = {name: self.answers[name].pop(0) for name in messages}
        replies: dict[str, Callable[[], Tree]] = {n: partial(dict, r) for n, r in said.items() if r is not None}
        return Replies(replies, [n for n in said if said[n] is None], resident=True)

    def random(self, label: str) -> torch.Generator:
        return torch.Generator().manual_seed(0)


def update(w: Sequence[float], cases: int = 1, **more: Any) -> Reply:
    return {"update": leaves(w, more.pop("var", 0.0), more.pop("n", 0)), "cases": cases, **more}


def rounds(method: Method, *replies: Mapping[str, Reply | None], start: State | None = None) -> State:
    """The state after rounds in which the sites said this."""
    sites = Canned({name: [r[name] for r in replies] for name in replies[0]})
    state = start or {"weights": leaves([1.0, -1.0], 1.0, 10)}
    for _ in replies:
        state = method.round(sites, state)
    return state


def w(state: State) -> list[float]:
    return [float(x) for x in state["weights"]["w"]]
