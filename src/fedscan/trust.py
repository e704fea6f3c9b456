"""What a run holds its sites and its own state to, beyond the form that a spec can check."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fedscan.journal import Journal, Row
from fedscan.memory import Base
from fedscan.method import State
from fedscan.recorded import Answer, Engine, Letter
from fedscan.schema import Weights
from fedscan.spec import Cases, Group, Refused, brief, finite
from fedscan.study import Study, Turn


class Held:
    """An engine whose answers are held to what the study knows of each site and to what the site has said before."""

    def __init__(self, study: Study, engine: Engine, journal: Journal) -> None:
        self.study, self.engine, self.names = study, engine, engine.names
        self._asked: dict[Turn, Letter] = {}
        self._said: dict[tuple[str, str, str], float] = {}  # by site, question and entry
        self._gives = {name: question.gives(study.terms) for name, question in study.questions.items()}
        self._counts = {name: entries_of_cases(spec) for name, spec in self._gives.items()}
        for row in journal.rows("status = 'answered'") if journal.head is not None else ():
            self.remember(row)

    def send(self, letters: Sequence[Letter]) -> None:
        """Puts letters on their way."""
        self._asked.update({letter.turn: letter for letter in letters})
        self.engine.send(letters)

    def receive(self, started: bool) -> Answer:
        """The next answer; refused, with a sentence, where it contradicts the study or the site's own past."""
        answer = self.engine.receive(started)
        letter = self._asked.pop(answer.turn)
        if answer.absent or answer.refused:
            return answer
        try:
            self._check(letter, answer)
        except Refused as e:
            return replace(answer, reply=None, file=None, refused=str(e))
        return answer

    def _check(self, letter: Letter, answer: Answer) -> None:
        site, question = letter.turn.site, letter.question
        if question != "evaluate" and not self._counts[question]:
            return
        reply = answer.read(self._gives[question])
        if question == "evaluate":
            rows_of(self.study, site, str(letter.message["split"]), reply)
        for entry in self._counts[question]:
            said = reply.get(entry)
            if type(said) is not int:
                continue  # the spec has a sentence for it
            known = self.study.counts.get(site, {}).get("train")
            before = self._said.get((site, question, entry)) if known is None else known
            if before is not None and said != before:
                whose = "it said before" if known is None else "the study knows of"
                raise Refused(f"the answer of {site} to {question} counts {brief(said)} cases where {whose} {before:g}")

    def remember(self, row: Row) -> None:
        """Holds a site, from now on, to the counts of an answer that was accepted."""
        for entry in self._counts.get(row.question, ()) if row.status == "answered" else ():
            if row.numbers and entry in row.numbers:
                self._said.setdefault((row.turn.site, row.question, entry), row.numbers[entry])

    def keep(self, answers: Sequence[Answer], whole: bool) -> None:
        """Puts the new memories of these turns on the sites' disks."""
        self.engine.keep(answers, whole)

    def settle(self, needed: Callable[[str], Sequence[Base]]) -> None:
        """Every site may drop the turns that are not ``needed`` of it."""
        self.engine.settle(needed)

    def close(self) -> None:
        """Ends what the engine began."""
        self.engine.close()


def entries_of_cases(gives: Group) -> tuple[str, ...]:
    """The entries of an answer in which a site says how many training cases it has."""
    return tuple(name for name, spec in gives.entries.items() if isinstance(spec, Cases))


def rows_of(study: Study, site: str, split: str, answer: Mapping[str, Any]) -> None:
    """Raises Refused where a site scores more cases than it has, or cases of a site that it does not stand for."""
    try:
        cases = {case for case, *_ in answer["rows"]}
        origins = {origin for _, _, origin, *_ in answer["rows"]}
    except (KeyError, TypeError, ValueError):
        return  # the spec has a sentence for it
    known = study.counts.get(site, {}).get(split)
    if known is not None and len(cases) > known:
        raise Refused(f"the answer of {site} to evaluate scores {len(cases)} {split} cases; it has {known}")
    strange = origins - set(study.origins[site]) if site in study.origins else ()
    for origin in strange:
        raise Refused(f"the answer of {site} to evaluate scores cases of {brief(origin)}, which is none of its sites")


def unsound(state: State, model: nn.Module) -> str:
    """What is wrong with a state, naming the leaf; empty where all numbers are finite and every variance has a root.

    One pass over the tensors. ``model`` tells which leaves are running variances, by the type of their layer, which
    adds a little before it takes the root: rounding may leave a variance that much below zero.
    """
    for name, found in numbers(state):
        if not (finite(found) if isinstance(found, Tensor) else math.isfinite(found)):
            return f"{name} is not finite"
    added = variances(model)
    for weights in models(state):
        for name in added.keys() & weights.keys():
            if (least := float(weights[name].min())) + added[name] <= 0:
                return f"leaf {name!r} is a running variance of {least:g}, of which a layer takes the root"
    return ""


def variances(model: nn.Module) -> dict[str, float]:
    """The names of the running variances of normalisation layers, and what each layer adds before taking the root."""
    return {
        f"{place}.running_var".lstrip("."): layer.eps
        for place, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, _NormBase) and layer.running_var is not None
    }


def models(state: State) -> Iterator[Weights]:
    """The models that a state publishes."""
    for tree in (state.get("weights"), state.get("for")):
        if isinstance(tree, Weights):
            yield tree
        elif isinstance(tree, Mapping):
            yield from (weights for weights in tree.values() if isinstance(weights, Weights))


def numbers(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor | float]]:
    """The floating tensors that hold anything, and the floating numbers, of a tree, each with where it stands."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            where = f"leaf {name!r} of {path}" if isinstance(tree, Weights) else f"{path}/{name}".lstrip("/")
            yield from numbers(value, where)
    elif isinstance(tree, float) or (isinstance(tree, Tensor) and tree.is_floating_point() and tree.numel()):
        yield path, tree
