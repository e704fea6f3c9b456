"""What the four hospitals of ``hospitals.py`` do, whoever asks them: an epoch of the workload, and a note of it.

Imported in the environments of fedscan, NVFlare and Flower alike, so it needs torch, NumPy and MONAI only.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import workload

SITES = 4
NOTES = "HOSPITALS_NOTES"  # names the file that all processes of a run add their notes to


def note(**told: Any) -> None:
    """Adds a line to the run's notes, with the time (seconds since 1970)."""
    line = json.dumps({"at": time.time(), **told}) + "\n"
    handle = os.open(os.environ[NOTES], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(handle, line.encode())
    os.close(handle)


def notes(path: Path) -> list[dict[str, Any]]:
    """All notes of a run."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Net(nn.Module):
    """The workload's network as a class, which NVFlare makes at its server by name."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.net = workload.make_model(case)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the network."""
        out: torch.Tensor = self.net(x)
        return out


class Hospital:
    """A hospital of a peer: network and data, and an epoch as bare as it can be written."""

    def __init__(self, case: str, site: int) -> None:
        torch.set_num_threads(1)
        self.case, self.site, self.net = case, site, Net(case)
        self.data, self.loss_of = workload.site_data(case, site), workload.loss_function(case)

    def epoch(self, weights: dict[str, Any], round: int) -> dict[str, torch.Tensor]:
        """Trains the weights for an epoch; rounds count from 0. Returns them as they are then."""
        self.net.load_state_dict({name: torch.as_tensor(np.asarray(leaf)) for name, leaf in weights.items()})
        note(what="epoch begins", site=self.site, round=round)
        loss = workload.train(self.case, self.net, self.data, self.site, round, self.loss_of)
        note(what="epoch ends", site=self.site, round=round, loss=loss)
        return self.net.state_dict()
