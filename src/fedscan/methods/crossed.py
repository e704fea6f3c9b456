"""Models scored where they were not trained: a site that is weighed by its quality cannot flatter itself."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from fedscan import trees
from fedscan.averaging import arrived
from fedscan.method import Holds, Message, Method, Question, Replies, Sites, State, Terms, Tree, answer, receive
from fedscan.parts.around import Around
from fedscan.parts.channel import Channel, whole
from fedscan.site import Site
from fedscan.spec import Number, Refused, Spec

Quality = Mapping[str, float | None]  # "dice" and "hd95"
QUALITY = {"dice": Number(0, 1, optional=True), "hd95": Number(0, optional=True)}


def judging(channel: Channel, down: Channel, takes: Holds | None = None) -> Question:
    """The question that a site is asked of a model which another has trained."""

    @answer("statistics", lambda terms: QUALITY, takes)
    def judge(site: Site, message: Message) -> Tree:
        if "version" in message and site.state.get("version") != message["version"]:
            raise Refused(f"{site.name} does not hold the model that the change to be judged belongs to")
        x = arrived(site, message, down)
        try:
            model = receive(site, {"weights": trees.add(x, channel.decode(message["update"], x.schema))})
        except ValueError as e:
            raise Refused(f"the change that {site.name} was to judge does not fit: {e}") from e
        found = site.task.quality(model.eval(), site.validation)
        return {"dice": found["dice"], "hd95": found["hd95"]}

    return judge


class _Judged(Around):
    """Sites whose answers to ``learn`` come with what the other sites found of their models."""

    def __init__(self, sites: Sites, state: State, learn: Question, judge: Question) -> None:
        super().__init__(sites)
        self.state, self.learn, self.judge = state, learn, judge

    def ask_each(self, question: Question, messages: Mapping[str, Message], *, need: int = 1) -> Replies:
        replies = super().ask_each(question, messages, need=need)
        if question is not self.learn:
            return replies
        found = verdicts({name: self._of(name, replies) for name in replies})
        each = {name: partial(_with, replies, name, found[name]) for name in replies}
        return Replies(each, replies.missing, replies.resident)

    def _of(self, name: str, replies: Replies) -> list[Quality]:
        """What each other site of the round found of the model of ``name``; those that do not answer are left out."""
        held = {key: self.state[key] for key in ("version" if "version" in self.state else "weights",)}
        message = {**held, "update": replies[name]["update"]}
        judges = [other for other in replies if other != name]
        said = self.sites.ask(self.judge, message, to=judges, need=0)
        return [said[judge] for judge in said]


def _with(replies: Replies, name: str, found: Quality) -> dict[str, Any]:
    return {**replies[name], **found}


def verdicts(said: Mapping[str, Sequence[Quality]]) -> dict[str, Quality]:
    """By site, the middle of what others found; a site that nobody could judge takes the middle of the judged."""
    found = {name: middle(each) for name, each in said.items()}
    usual = middle(list(found.values()))
    return {name: usual if q["dice"] is None else q for name, q in found.items()}


def middle(said: Sequence[Quality]) -> Quality:
    """The median Dice, and the median HD95 (mm), of those with a valid Dice; no distance counts as infinite."""
    dice = [q["dice"] for q in said if q["dice"] is not None]
    if not dice:
        return {"dice": None, "hd95": None}
    far = median(math.inf if q["hd95"] is None else q["hd95"] for q in said if q["dice"] is not None)
    return {"dice": median(dice), "hd95": far if math.isfinite(far) else None}


def cross_scored(method: Method, channel: Channel = whole, down: Channel = whole) -> Method:
    """``method``, an ``averaging`` with these channels, whose updates are scored by the round's other sites.

    After ``learn``, one update after the other goes, as it came, to all sites that answered but its own; each adds it
    to the model it holds and reports Dice and HD95 on its validation cases. The medians are put into the reply as
    "dice" and "hd95", for ``weigh``. So each site receives m - 1 updates more, of m sites, and sees what the others
    send. The message does not name whose update it is.
    """
    learn = method.answers[0]
    holds = method.publishes

    def takes(terms: Terms) -> dict[str, Spec]:
        assert holds is not None
        return {**holds(terms), "update": learn.gives(terms).entries["update"]}

    judge = judging(channel, down, takes if holds else None)

    def round(sites: Sites, state: State) -> State:
        return method.round(_Judged(sites, state, learn, judge), state)

    return replace(method, round=round, answers=(*method.answers, judge))
