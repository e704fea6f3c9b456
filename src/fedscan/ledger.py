"""The record of a run, read back as plain rows: who was asked what, what travelled, what was scored.

Everything that shows a run (report, tables, audit) reads a ``Record`` and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TurnRow:
    """One question to one site, and what became of it. Bytes are those of the wire, after coding."""

    round: int
    call: int
    site: str
    question: str
    privacy: str  # the class of what left the site: weights, statistics, prototypes, features, predictions, images
    status: str  # "answered", "refused" or "absent"
    seconds: float
    bytes_down: int
    bytes_up: int
    asked_at: float  # seconds since 1970
    digest_down: str  # SHA-256 of the question
    digest_up: str  # SHA-256 of the answer, "" where there was none
    why: str = ""  # for a refused or absent turn, one sentence
    numbers: Mapping[str, float] = field(default_factory=dict)  # what the site reported: loss, cases, weight, ...


@dataclass(frozen=True)
class ScoreRow:
    """One metric of one label of one case. ``value`` is None where the metric is undefined (never NaN)."""

    round: int
    split: str  # "validation" or "test"
    trained_at: str  # "federation", "pooled", or the name of the one site that trained the model
    tested_at: str
    case: str
    subject: str
    label: str
    metric: str
    value: float | None


@dataclass(frozen=True)
class SiteRow:
    """What a site has: cases expected and used, how they are split, and why cases were left out."""

    name: str
    expected: int
    used: int
    train: int
    validation: int
    test: int
    about: str = ""  # the scanner or the hospital, in a few words
    left_out: tuple[tuple[str, str], ...] = ()  # (case, reason)


@dataclass(frozen=True)
class Overlay:
    """One test case to look at. Arrays are (D, H, W); ``image`` is float, the two masks are label numbers."""

    site: str
    case: str
    rank: str  # "best", "median" or "worst" of its site by mean Dice
    dice: float | None
    image: NDArray[np.float32]
    reference: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    spacing: tuple[float, ...]  # mm


@dataclass(frozen=True)
class Record:
    """All that is known of one run. ``comparisons`` holds final test scores of other methods on the same study."""

    name: str
    method: str
    study: Mapping[str, Any]  # the resolved study
    study_hash: str
    seed: int
    rounds: int
    labels: Mapping[str, int]  # foreground label names and numbers
    sites: tuple[SiteRow, ...]
    turns: tuple[TurnRow, ...]
    scores: tuple[ScoreRow, ...]
    comparisons: Mapping[str, tuple[ScoreRow, ...]]  # "local-only", "centralised", ...
    overlays: tuple[Overlay, ...]
    versions: Mapping[str, str]
    command: str  # reproduces the run
    seconds: float
    notes: tuple[str, ...] = ()  # what a reader must know first: simulated scanners, a site that was silent, ...
    travels: str = ""  # which leaves travel and which stay at home, in one sentence
