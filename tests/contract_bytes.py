"""What every method's card promises of the bytes that travel, as functions like those of ``contract``."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from contract import Bench, Desk, study_of
from fedscan import wire
from fedscan.method import Message, State, Tree, published
from fedscan.methods.registry import Entry
from fedscan.schema import Weights


def leaf_bytes(tree: Tree | Message) -> int:
    """The bytes of a tree's leaves on the wire, without the names and numbers in its header."""
    parcel = wire.pack(tree)
    return parcel.nbytes - len(parcel.header)


def bytes_said(entry: Entry[Any], state: State, options: Mapping[str, Any]) -> tuple[int, int]:
    """The bytes down and up by the card, of the leaves that are published."""
    some = published({**state, "news": {}}, "cairo")["weights"]
    schema = (some if isinstance(some, Weights) else some["cairo"]).schema
    return entry.card.down(schema, options), entry.card.up(schema, options)


def frame(expected: int) -> int:
    """What zstd adds where there is nothing to gain."""
    return expected // 256 + 32


def check_bytes(entry: Entry[Any], bench: Bench) -> None:
    """Messages and answers take the bytes of the card's formulas, coded answers no more; names and numbers apart."""
    options = entry.resolve({})
    desk = Desk(study_of(entry, bench, rounds=2 if entry.card.several else 1))
    down, up = bytes_said(entry, desk.play(), options)
    for asked in desk.asked:
        leaves = leaf_bytes(asked.reply)
        assert leaves <= up + frame(up), f"{leaves} bytes up, and the card says {up}"
        if options.get("bits", 32) == 32 and options.get("fraction", 1) == 1:
            assert leaves in ((0, up) if entry.card.several else (up,)), f"{leaves} bytes up, and the card says {up}"
        leaves = leaf_bytes(asked.message)
        models = round(leaves / down) if entry.card.several else 1
        assert abs(leaves - models * down) <= 0.01 * down, f"{leaves} bytes down, and the card says {down}"
        assert len(wire.pack(asked.reply).header) < 400 + 200 * len(desk.study.travelling) * 2
    if "bits" in options:
        check_coded_bytes(entry, bench)


class Noise:
    """A task whose gradients are even noise, the same for every batch: in 8 bits, nothing can be packed further."""

    def __init__(self, task: Any) -> None:
        self.task, self.networks = task, task.networks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def outputs(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        push = [(p * (2 * torch.rand(p.shape, generator=draw) - 1)).sum() for p in model.parameters()]
        return {**self.task.outputs(model, batch), "push": torch.stack(push).sum()}

    def loss(self, out: Mapping[str, Tensor], batch: Any) -> Tensor:
        return out["push"]


def check_coded_bytes(entry: Entry[Any], bench: Bench) -> None:
    """Noise in 8 bits takes, both ways, what the card says: no more, and no more than 1 % less."""
    options = entry.resolve({"fraction": 1.0, "bits": 8, "down_fraction": 1.0, "down_bits": 8})
    study = study_of(entry, bench, options)
    desk = Desk(replace(study, task=Noise(study.task)))
    down, up = bytes_said(entry, desk.play(), options)
    changes = [asked.message for asked in desk.asked if "change" in asked.message]
    assert len(changes) == len(desk.names), "sites that hold the first round's model are sent its change"
    sizes = [(leaf_bytes(asked.reply), up) for asked in desk.asked] + [(leaf_bytes(m), down) for m in changes]
    for leaves, said in sizes:
        assert 0.99 * said <= leaves <= said + frame(said), f"{leaves} bytes of noise, and the card says {said}"
