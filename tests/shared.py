"""Where the real images are. A test that needs them says so and skips where they are missing."""

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("FEDSCAN_SHARED", Path(__file__).parents[1] / ".." / "shared")).resolve()


def shared(*parts: str) -> Path:
    """The folder or file of real images below FEDSCAN_SHARED; skips the calling test where it does not exist."""
    path = ROOT.joinpath("data", *parts)
    if not path.exists():
        pytest.skip(f"real images not found: {path} (set FEDSCAN_SHARED)")
    return path
