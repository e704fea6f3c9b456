"""A consortium on one machine: founded, joined by real processes, its study carried out, and gone on with."""

import os
import time
from pathlib import Path

import pytest

from fedscan.consortium import demo
from fedscan.ledger import read_record
from fedscan.run import Problem

TINY = """
name = "consortium-demo"
[data]
sequences = ["t1"]
grid = [32, 40, 32]
fractions = [0.4, 0.2, 0.4]
augment = false
[task]
labels = { "grey matter" = 1, "white matter" = 2, "lesion" = 3 }
[model]
name = "unet"
preset = "tiny"
[train]
optimiser = "adam"
lr = 0.01
batch = 2
rounds = 1
"""


@pytest.mark.slow
def test_the_demo_of_a_consortium_runs_in_real_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "study", lambda seed: f"seed = {seed}\n{TINY}")
    page = demo.demo(tmp_path / "demo", sites=2, engine="loopback")
    assert page.exists()
    assert "fedscan consortium demo --sites 2 --engine loopback" in page.read_text()
    record = read_record(tmp_path / "demo" / "run")
    assert {(turn.site, turn.question, turn.status) for turn in record.turns} == {
        (site, question, "answered") for site in ("alder", "birch") for question in ("learn", "evaluate")
    }
    keys = [path for path in (tmp_path / "demo").rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]
    assert sorted(path.parent.name for path in keys) == ["alder", "birch", "desk", "root"]
    time.sleep(0.5)
    assert not [pid for pid in os.listdir("/proc") if pid.isdecimal() and str(tmp_path) in command(pid)]
    with pytest.raises(Problem, match="holds the demo with other hospitals"):
        demo.demo(tmp_path / "demo", sites=3, engine="loopback")


def test_a_folder_of_something_else_is_no_demo(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("name = 'mine'\n")
    with pytest.raises(Problem, match="holds something else, or a demo that was stopped while it began: delete it, or"):
        demo.demo(tmp_path, sites=3, engine="loopback")


def command(pid: str) -> str:
    try:
        return Path("/proc", pid, "cmdline").read_text()
    except OSError:
        return ""
