"""A hospital's side of the conversation: its cases, its task, its networks and its private memory."""

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fedscan.schema import Weights, weights_of
from fedscan.secret import Secret
from fedscan.spec import Refused
from fedscan.step import Step

GENERATORS = threading.RLock()  # held while the default generator, which a process's threads share, is seeded


class Batch(NamedTuple):
    """Cases side by side, on the device they are trained on."""

    x: Tensor  # images (B, C, *spatial), float32; a missing sequence is a zero channel
    y: Tensor  # labels (B, *spatial) or classes (B,), whole numbers
    present: Tensor | None = None  # (B, C) bool, False where a sequence is missing


class Split(Protocol):
    """One of a site's three sets of cases: train, validation or test."""

    names: Sequence[str]
    subjects: Sequence[str]

    def __len__(self) -> int: ...

    def batches(self, size: int, order: torch.Generator, augment: torch.Generator) -> Iterator[Batch]:
        """One epoch in an order drawn from ``order``, augmented with parameters drawn from ``augment``."""
        ...

    def case(self, i: int) -> tuple[Batch, Any]:
        """Case ``i`` whole, not augmented, as a batch of one; and what is known of it (spacing in mm, ...)."""
        ...


class Splits(NamedTuple):
    """What a site has. Methods see train and validation; test is scored once, at the end."""

    train: Split
    validation: Split
    test: Split


Outputs = Mapping[str, Tensor]  # what one forward pass gave: "logits", and "features" where a network has them
Rows = list[list[Any]]  # case, subject, site, label, metric, value (None where undefined)


class Task(Protocol):
    """What is learned. Knows nothing of federation: the same object trains on pooled data.

    A task may also have ``labels``, the names of what it scores, and ``ranges``, the least and largest value of each
    metric: what sites report is then held to them.
    """

    networks: Mapping[str, Callable[[], nn.Module]]  # by role; "model" is the one that predicts

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs: ...
    def loss(self, out: Outputs, batch: Batch) -> Tensor: ...
    def scores(self, model: nn.Module, split: Split, site: str, final: bool) -> Rows:
        """The metrics of every label of every case: all of them at the end, else those that curves are drawn of.

        ``site`` names cases that do not know where they come from.
        """
        ...

    def quality(self, model: nn.Module, split: Split) -> dict[str, float | None]:
        """A few means over a split, cheap enough for every round ("dice", "hd95"); None where undefined."""
        ...

    def diversity(self, split: Split) -> float:
        """How evenly the classes are spread over a split, from 0 (one class) to 1."""
        ...


class Slots:
    """The networks of one worker process: built once, loaded in place, so that nothing is recompiled per answer."""

    def __init__(self, task: Task, step: Step, device: torch.device, seed: int = 0) -> None:
        self.task, self.step, self.device, self.seed = task, step, device, seed
        self._models: dict[tuple[str, str], nn.Module] = {}
        self._first: dict[str, Weights] = {}

    def model(self, slot: str = "model", network: str = "model") -> nn.Module:
        """The network in ``slot``. Its weights are whatever was last loaded, so load before use."""
        if (slot, network) not in self._models:
            model = first_model(self.task, self.seed, network).to(self.device)
            self._models[slot, network] = self.step.prepared(model)
        return self._models[slot, network]

    def first(self, network: str = "model") -> Weights:
        """The weights with which the study begins, the same at the server and at every site."""
        if network not in self._first:
            self._first[network] = weights_of(first_model(self.task, self.seed, network).to(self.device))
        return self._first[network]

    def pointers(self) -> set[int]:
        """Where the slots' tensors lie in memory; whatever lies there too must be copied before it is kept."""
        return {t.data_ptr() for m in self._models.values() for t in (*m.parameters(), *m.buffers())}


@dataclass
class Site:
    """One hospital while it answers one question.

    ``state`` never leaves the site and is the only thing that survives from one answer to the next, over any engine:
    whatever a method wants to remember goes in there, as weights, tensors, numbers and text.
    """

    name: str
    task: Task
    splits: Splits
    step: Step
    slots: Slots
    state: dict[str, Any] = field(default_factory=dict)
    seed: int = 0  # of the study
    round: int = 0
    rounds: int = 1
    call: int = 0
    key: Callable[[], bytes] = bytes  # reads the site's own secret from its disk
    _secrets: dict[str, Secret] = field(default_factory=dict, init=False, repr=False)

    @property
    def train(self) -> Split:
        return self.splits.train

    @property
    def validation(self) -> Split:
        return self.splits.validation

    @property
    def cases(self) -> int:
        """How many training cases the site has."""
        return len(self.splits.train)

    @property
    def lr(self) -> float:
        """The learning rate of this round, after the study's schedule."""
        return self.step.rate(self.round, self.rounds)

    def stream(self, name: str) -> torch.Generator:
        """A CPU generator for this site, round and call, of its own for each ``name``; the same on every engine."""
        return torch.Generator().manual_seed(seed_of(self.seed, self.name, self.round, self.call, name))

    @cached_property
    def order(self) -> torch.Generator:
        """Draws the order of the batches, and nothing else."""
        return self.stream("order")

    @cached_property
    def augmentation(self) -> torch.Generator:
        """Draws the augmentation of the cases, and nothing else."""
        return self.stream("augmentation")

    def secret(self, name: str) -> Secret:
        """Numbers that the server cannot guess, for noise, masks and keys; of their own for each ``name`` and answer.

        They come from a secret on the site's disk. Asked for again in one answer, the stream goes on.
        """
        if name not in self._secrets:
            self._secrets[name] = Secret(self.key(), self.name, self.round, self.call, name)
        return self._secrets[name]

    def batches(self, epochs: int | None = None) -> Iterator[Batch]:
        """The site's training cases in batches, ``epochs`` times over (default: the study's local epochs)."""
        for _ in range(self.step.epochs if epochs is None else epochs):
            yield from self.train.batches(self.step.batch, self.order, self.augmentation)

    def model(self, slot: str = "model", network: str = "model") -> nn.Module:
        """A network to work with. Its weights are arbitrary until they are loaded."""
        return self.slots.model(slot, network)

    def recall(self, name: str, otherwise: nn.Module) -> nn.Module:
        """The model kept under ``name``, or a copy of ``otherwise`` the first time, in a slot of its own."""
        model = self.model(name)
        load(model, self.state.get(name) or weights_of(otherwise))
        return model

    def keep(self, name: str, model: nn.Module) -> None:
        """Remember the model under ``name`` for later answers."""
        self.state[name] = copy_of(model)


def first_model(task: Task, seed: int, network: str = "model") -> nn.Module:
    """The network as the study begins with it: drawn from the study's seed, leaving the default generator alone."""
    with GENERATORS, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "first", network))
        return task.networks[network]()


def seed_of(*parts: object) -> int:
    """A seed from what it is for, the same on every machine. (Python's own hash differs from run to run.)"""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")


def copy_of(model: nn.Module) -> Weights:
    """The model's leaves, copied, with their kinds."""
    leaves = weights_of(model)
    return Weights({k: v.clone() for k, v in leaves.items()}, leaves.kinds)


@torch.no_grad()
def load(
    model: nn.Module, *layers: Mapping[str, Tensor], otherwise: Callable[[], Mapping[str, Tensor]] | None = None
) -> nn.Module:
    """Writes leaves into the model in place; later layers win, and ``otherwise`` gives what no layer names.

    Raises ValueError naming a leaf that is missing, unknown or of another shape.
    """
    own = model.state_dict()
    new: dict[str, Tensor] = {}
    for layer in layers:
        new.update(layer)
    if otherwise and len(new) < len(own):
        new = {**otherwise(), **new}
    for name in own.keys() ^ new.keys():
        raise ValueError(f"the weights {'lack the' if name in own else 'hold an unknown'} leaf {name!r}")
    for name, leaf in own.items():
        if leaf.shape != new[name].shape:
            raise ValueError(f"leaf {name!r} has shape {tuple(new[name].shape)}; the model has {tuple(leaf.shape)}")
    torch._foreach_copy_(list(own.values()), [new[name] for name in own])
    return model


Extra = Callable[[nn.Module, Batch, Outputs], Tensor]


def fit(
    site: Site,
    model: nn.Module,
    *,
    batches: Iterable[Batch] | None = None,
    epochs: int | None = None,
    extra: Extra | None = None,
    correct: Callable[[nn.Module], None] | None = None,
    memory: Weights | None = None,
) -> dict[str, Any]:
    """The one local training loop. Trains ``model`` in place on the site's cases, as the study's ``Step`` says.

    batches  other batches than the site's own (pseudo-labels, replayed or restyled cases)
    epochs   other than the study's local epochs
    extra    a term added to the task's loss (FedProx, MOON, distillation); it is given the one forward pass
    correct  edits the gradients before the step (SCAFFOLD, Mime)
    memory   the optimiser's moments to start from, where the study lets them travel

    Returns the mean loss and the number of optimiser steps.
    """
    step, task = site.step, site.task
    optimizer = step.optimizer(model, site.lr, memory if memory is not None else site.state.get("optimizer"))
    optimizer.zero_grad(set_to_none=True)  # a slot may hold gradients of an answer that was given up
    model.train()
    total = torch.zeros((), device=site.slots.device)
    seen = steps = waiting = 0
    for batch in site.batches(epochs) if batches is None else batches:
        with step.autocast(site.slots.device):
            out = task.outputs(model, batch)  # the only forward pass: a second one would move batch norm twice
            cost = task.loss(out, batch)
            if extra:
                cost = cost + extra(model, batch, out)
        cost.backward()  # type: ignore[no-untyped-call]
        total += cost.detach()  # no .item() here: it would make a GPU wait for every step
        seen, waiting = seen + 1, waiting + 1
        if waiting == step.accumulate:
            step.take(optimizer, model, waiting, correct)
            steps, waiting = steps + 1, 0
    if waiting:
        step.take(optimizer, model, waiting, correct)
        steps += 1
    if not steps:
        raise ValueError(f"site {site.name} has no training batch")
    loss = float(total) / seen
    if not math.isfinite(loss):
        raise Refused(
            f"the training loss at {site.name} was not finite in round {site.round}: lower the learning rate, "
            "or look for images or labels that are out of range there"
        )
    if step.moments == "kept":
        site.state["optimizer"] = step.moments_of(optimizer, model)
    report: dict[str, Any] = {"loss": loss, "steps": steps}
    if step.moments in ("averaged", "travels") and (moments := step.moments_of(optimizer, model)):
        report["optimizer"] = moments  # plain SGD has none
    return report
