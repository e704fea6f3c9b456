"""What travels is said at the start of a run, counted on the network itself."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedscan.launch import How, launch
from fedscan.studyfile import load
from tinystudy import write_study

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("method", "norm", "said"),
    [
        # Three levels down and two up, two blocks each: 10 convolutions and 10 norms of scale and shift; the head.
        ("fedavg", "instance", "32 parameters travel (20 of normalisation layers); nothing stays at each site."),
        ("fedavg", "batch", "32 parameters and 20 statistics and 10 counters travel (50 of normalisation layers);"),
        (
            "fedbn",
            "batch",
            "12 parameters travel (0 of normalisation layers); 20 parameters and 20 statistics and 10 counters "
            "(50 of them of normalisation layers) stay at each site.",
        ),
    ],
)
def test_it_is_said_before_the_first_round(tmp_path: Path, method: str, norm: str, said: str) -> None:
    heard: list[tuple[str, Any]] = []
    file = load(write_study(tmp_path, method), [f"model.norm={norm}", "train.rounds=1"])
    launch(file, tmp_path / "run", How(report=False, cache=tmp_path / "cache", watch=lambda *e: heard.append(e)))
    kinds = [what for what, _ in heard]
    assert kinds.index("travels") < kinds.index("round")
    assert dict(heard)["travels"].startswith(said)
