"""How much of the study's local work each site does in a round: slow sites hand in what they have, or are left out."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

import torch

from fedscan.method import Absent, Message, Method, Question, Replies, Sites, State
from fedscan.parts.around import Around
from fedscan.site import Batch, Site

Unit = Literal["epochs", "batches"]
NEARLY = 1e-9  # a share is a float: 0.07 of 100 is 7 batches, not 8


@dataclass(frozen=True)
class Work:
    """Which sites do less in a round, and how much. Li et al., MLSys 2020, section 5.2.

    stragglers  the share of the round's sites that are late, drawn anew each round; of half a site, none. Each does a
                part of its work that is drawn evenly, above 0 and up to all
    given       the part of the work that these sites do in every round; they are not drawn
    unit        parts are rounded up to whole epochs, or to batches
    late        whether a straggler's part is kept, or the straggler left out, as FedAvg does in the paper
    """

    stragglers: float = 0.0
    given: Mapping[str, float] = field(default_factory=dict)
    unit: Unit = "epochs"
    late: Literal["kept", "dropped"] = "kept"

    @property
    def whole(self) -> bool:
        """Whether every site does all of its work."""
        return not self.stragglers and not self.given

    def parts(self, names: Sequence[str], draw: torch.Generator) -> dict[str, float]:
        """The part of its work, above 0 and up to 1, that each of these sites does which may not do all of it."""
        free = sorted(set(names) - set(self.given))
        many = math.ceil(self.stragglers * len(free) - 0.5)
        late = [free[i] for i in torch.randperm(len(free), generator=draw)[:many].tolist()]
        drawn = 1 - torch.rand(many, generator=draw, dtype=torch.float64)
        return {name: self.given[name] for name in names if name in self.given} | dict(
            zip(late, drawn.tolist(), strict=True)
        )

    def batches(self, site: Site, part: float) -> tuple[Iterator[Batch], float]:
        """The site's batches of a round up to this part of the study's local epochs; and the part after rounding up."""
        epochs, each = site.step.epochs, math.ceil(site.cases / site.step.batch)
        if self.unit == "epochs":
            whole = math.ceil(part * epochs - NEARLY)
            return site.batches(whole), whole / epochs
        some = math.ceil(part * epochs * each - NEARLY)
        return islice(site.batches(), some), some / (epochs * each)


class _Allotted(Around):
    """Sites that are told what part of their work to do."""

    def __init__(self, sites: Sites, work: Work) -> None:
        super().__init__(sites)
        self.work = work

    def ask_each(self, question: Question, messages: Mapping[str, Message], *, need: int = 1) -> Replies:
        parts = self.work.parts(list(messages), self.random("stragglers"))
        if self.work.late == "dropped":
            messages = {name: m for name, m in messages.items() if name not in parts or name in self.work.given}
            if not messages:
                raise Absent(tuple(sorted(parts)), question.name)
        told = {name: {**m, "work": parts[name]} if name in parts else m for name, m in messages.items()}
        return super().ask_each(question, told, need=need)


def allotted(method: Method, work: Work) -> Method:
    """``method``, whose sites are sent with every question what part of their work to do, where it is not all.

    The message's "work" is a number above 0 and up to 1. A round of which every site is dropped is one without an
    answer. ValueError, when the study begins, for a given site that does not exist.
    """
    if work.whole:
        return method

    def init(model: torch.nn.Module, names: tuple[str, ...]) -> State:
        for name in work.given:
            if name not in names:
                raise ValueError(f"work is given for {name!r}, which is no site of the study: {', '.join(names)}")
        return method.init(model, names)

    return replace(method, init=init, round=lambda sites, state: method.round(_Allotted(sites, work), state))
