"""What the tests of commands share: how one ended, and what is asked of it."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file


class Said(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Said]


def refused(said: Said, sentence: str, code: int = 2) -> None:
    """One sentence on stderr, no traceback."""
    assert said.code == code
    assert sentence in said.err
    assert "Traceback" not in said.err
    assert said.err.strip().splitlines()[-1].startswith("fedscan: ")


def same_model(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same bits."""
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x)
