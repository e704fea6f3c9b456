"""What happens at a site when a question arrives, over any engine."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from fedscan.method import Message, Question, Tree, published
from fedscan.schema import Weights
from fedscan.site import GENERATORS, Site, Slots, Splits, seed_of
from fedscan.spec import Refused
from fedscan.study import Study, Turn


def respond(
    study: Study,
    slots: Slots,
    turn: Turn,
    question: str,
    message: Message,
    state: dict[str, Any],
    key: Callable[[], bytes],
) -> tuple[Tree, dict[str, Any], float]:
    """What happens at a site when a question arrives, over any engine: reply, new memory, seconds.

    ``state`` is not changed. Raises Refused for a question that is not on the study's list.
    """
    if question not in study.questions:
        raise Refused(f"{turn.site} does not answer {question!r}; it answers {', '.join(study.questions)}")
    site = Site(
        turn.site, study.task, without_test(study.splits(turn.site)), study.step, slots, apart(state),
        study.seed, turn.round, study.rounds, turn.call, key,
    )  # fmt: skip
    study.check_asked(turn.site, question, message)
    begun, versions = time.perf_counter(), [t._version for t in tensors(state)]
    with seeded(seed_of(study.seed, *turn, "default"), slots.device):
        reply = answered(study, site, study.questions[question], message)
    if versions != [t._version for t in tensors(state)]:
        raise RuntimeError(f"{question} changed a tensor of its memory in place: put a new one into site.state")
    taken = slots.pointers()
    reply, memory = settled(reply, taken), settled(site.state, taken)
    return reply, memory, time.perf_counter() - begun


class Withheld:
    """Stands in a site's splits for its test cases. Whatever is asked of it raises RuntimeError with a sentence."""

    def _refuse(self) -> NoReturn:
        raise RuntimeError("a method asked a site for its test cases: they are scored by the study, once, at the end")

    names = subjects = property(_refuse)

    def __len__(self) -> NoReturn:
        self._refuse()

    def batches(self, *_: Any) -> NoReturn:
        """Refuses."""
        self._refuse()

    def case(self, i: int) -> NoReturn:
        """Refuses."""
        self._refuse()


def without_test(splits: Splits) -> Splits:
    """The splits that a method is handed."""
    return splits._replace(test=Withheld())


class Received(dict[str, Any]):
    """A message at a site. What it does not hold is refused in a sentence that begins with ``asked``."""

    def __init__(self, message: Message, asked: str) -> None:
        super().__init__(message)
        self.asked = asked

    def __missing__(self, key: str) -> NoReturn:
        raise Refused(f"{self.asked} by a message that lacks {key!r}")


def answered(study: Study, site: Site, question: Question, message: Message) -> Tree:
    """The site's reply. A fault is the message's, and Refused, where nobody has vouched for that message.

    Where the question declares what it takes, or the message is as the study begins, a fault is the method's own.
    """
    asked = f"{site.name} was asked {question.name!r}"
    try:
        return question(site, Received(message, asked))
    except (Refused, torch.OutOfMemoryError):
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        if question.takes is None and (why := unlike(study, site.name, message)):
            raise Refused(f"{asked} by a message that {why}, and failed at it ({type(e).__name__})") from e
        raise


def unlike(study: Study, name: str, message: Message) -> str:
    """What a message lacks, or holds that is not as the study begins; empty where it is as that."""
    state = study.start()
    first = published(state, name)
    known = {**state, **first, "split": ""}
    for entry in first:
        if entry not in message:
            return f"lacks {entry!r}"
    odd = (entry for entry in message if entry not in known or not alike(message[entry], known[entry]))
    return next((f"holds {entry[:80]!r} as the study does not know it" for entry in odd), "")


def alike(value: Any, known: Any) -> bool:
    """Whether two entries are of one form: leaves of the same names, shapes and dtypes, or values of one type."""
    if isinstance(known, Weights):
        return isinstance(value, Weights) and value.schema == known.schema
    if isinstance(known, Mapping):
        return (
            isinstance(value, Mapping)
            and value.keys() == known.keys()
            and all(alike(value[k], known[k]) for k in known)
        )
    return type(value) is type(known)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The default generators, seeded inside and as they were outside."""
    with GENERATORS:  # not while another thread draws the study's first model
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        with GENERATORS:
            torch.set_rng_state(before)


def apart(tree: Any) -> Any:
    """The tree with mappings and lists of its own; its tensors are shared, and must not be written to."""
    if isinstance(tree, Weights):
        return tree
    if isinstance(tree, dict):
        return {k: apart(v) for k, v in tree.items()}
    return [apart(v) for v in tree] if isinstance(tree, list) else tree


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of a tree, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors(value)


def unchanged(after: Any, before: Any) -> bool:
    """Whether two trees hold the same tensors (the very same ones) and equal values."""
    if isinstance(after, dict) and isinstance(before, dict):
        return after.keys() == before.keys() and all(unchanged(after[k], before[k]) for k in after)
    if isinstance(after, Tensor) or isinstance(before, Tensor):
        return after is before
    return type(after) is type(before) and bool(after == before)


def settled(tree: Any, taken: set[int]) -> Any:
    """The tree with its tensors on the processor and out of the slots, which the next answer overwrites.

    What needs no change is handed back as the same object, so that an unchanged memory can be told from a changed one.
    """
    if isinstance(tree, Weights | dict):
        new = {k: settled(v, taken) for k, v in tree.items()}
        if all(new[k] is tree[k] for k in new):
            return tree
        return Weights(new, tree.kinds) if isinstance(tree, Weights) else new
    if isinstance(tree, Tensor):
        if tree.device.type == "cpu" and not tree.requires_grad and tree.data_ptr() not in taken:
            return tree
        return tree.detach().cpu().clone() if tree.data_ptr() in taken else tree.detach().cpu()
    return tree
