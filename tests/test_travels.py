"""What travels is said at the start of a run, counted on the network itself, and in its record."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import Command
from fedscan.launch import How, launch
from fedscan.ledger import read_record
from fedscan.studyfile import load, read_cases
from tinystudy import write_scans, write_study

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("method", "norm", "said"),
    [
        # Three levels down and two up, two blocks each: 10 convolutions and 10 norms of scale and shift; the head.
        # 27 (1*4 + 4*4 + 4*8 + 8*8 + 8*16 + 16*16 + 24*8 + 8*8 + 12*4 + 4*4) and 4*2 + 2 of the head are 22,150
        # numbers; the norms have 80 channels with a scale and a shift, and a mean, a variance and 10 counters.
        (
            "fedavg",
            "instance",
            "32 arrays of weights travel (22,310 numbers), and nothing of the network stays at the sites.",
        ),
        ("fedavg", "batch", "32 arrays of weights and 20 running statistics and 10 counters travel (22,480 numbers)"),
        (
            "fedbn",
            "batch",
            "12 arrays of weights travel (22,150 numbers); 20 arrays of weights and 20 running statistics and 10 "
            "counters stay at each site, 50 of them of normalisation layers.",
        ),
        ("local-only", "instance", "Nothing is shared; a model travels only so that it can be scored"),
    ],
)
def test_it_is_said_before_the_first_round(tmp_path: Path, method: str, norm: str, said: str) -> None:
    heard: list[tuple[str, Any]] = []
    file = load(write_study(tmp_path, method), [f"model.norm={norm}", "train.rounds=1"])
    launch(file, tmp_path / "run", How(report=False, cache=tmp_path / "cache", watch=lambda *e: heard.append(e)))
    kinds = [what for what, _ in heard]
    assert kinds.index("travels") < kinds.index("round")
    assert dict(heard)["travels"].startswith(said)


def test_weights_are_said_to_leave_with_what_is_more_telling(fedscan: Command, tmp_path: Path) -> None:
    """FedSegNet's ``learn`` is of the class "statistics" and holds weights; those who judge send scores only."""
    file = load(write_study(tmp_path, "fedsegnet"), ["method.aggregation=cross-scored", "train.rounds=1"])
    launch(file, tmp_path / "run", How(report=False, cache=tmp_path / "cache"))
    rows = json.loads(fedscan("ledger", "run", "--by", "question", "--json").out)
    assert {row["question"]: row["privacy"] for row in rows} == {
        "learn": ["statistics", "weights"], "judge": ["statistics"], "evaluate": ["statistics"],
    }  # fmt: skip
    assert "statistics, weights" in fedscan("ledger", "run").out
    assert read_record(tmp_path / "run").weighty == ("learn",)


@pytest.mark.parametrize(("method", "sites", "said"), [
    ("fedavg", ("east",), True), ("local-only", ("east",), False), ("fedavg", ("east", "west"), False),
])  # fmt: skip
def test_one_hospital_is_no_federation(tmp_path: Path, method: str, sites: tuple[str, ...], said: bool) -> None:
    write_scans(tmp_path / "scans", sites, 5, side=8)
    study = load(write_study(tmp_path, method), ["data.grid=[8, 8, 8]"])
    notes = read_cases(study, tmp_path / "cache").notes
    assert any("so nothing is federated here" in note for note in notes) == said
