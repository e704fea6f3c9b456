"""What commands refuse, and how they stop: one sentence that says what to do, and nothing is lost."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commands import Command, refused, same_model
from fedscan.ledger import read_record
from tinystudy import write_study

torch.set_num_threads(1)


def test_mistakes_are_one_sentence(fedscan: Command, tmp_path: Path) -> None:
    write_study(tmp_path)
    for words, sentence in (
        (("run", "none.toml"), "none.toml: no such file"),
        (("run", "study.toml", "--data", "none"), "none does not exist"),
        (("run", "study.toml", "--data", "."), "has no known layout"),
        (("run", "study.toml", "--set", "train.rouns=1"), "--set train.rouns: [train] has no key 'rouns'"),
        (("run", "study.toml", "--device", "tpu"), 'run.device = "tpu"'),
        (("run", "study.toml", "--device", "mps"), 'run.device = "mps", but a device that torch finds'),
        (("run", "study.toml", "--set", "model.widths=[4]"), "widths must be two or more"),
        (("run", "study.toml", "--set", "data.grid=[16, 16, 18]"), "--set data.grid: data.grid: "),
        (("run", "study.toml", "--out", "study.toml"), "study.toml cannot be made, because study.toml is a file"),
        (("run", "study.toml", "--out", "study.toml/a/b"), "is a file; choose another folder with --out"),
        (("compare", "study.toml", "--methods", "fedavg", "--set", "data.fractions=[0.8, 0.2, 0]"), "no test cases"),
        (("show", "fedavh"), "did you mean 'fedavg'"),
        (("ledger", "none"), "none holds no run"),
        (("report", "."), "holds no run"),
        (("predict", ".", "x.nii", "-o", "y.nii"), "holds no run"),
        (("data", "check", "none"), "none does not exist"),
    ):
        said = fedscan(*words)
        refused(said, sentence)
        assert "cases:" not in said.err, "no case was read, for nothing that a case decides"
    assert fedscan("run").code == 2
    assert fedscan("ledger", "x", "--by", "day").code == 2


def test_a_damaged_record_is_said(fedscan: Command, done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "run", "hurt")
    next(Path("hurt/overlays").iterdir()).write_bytes(b"nothing")
    refused(fedscan("report", "hurt"), "is damaged: delete it, and the report will do without that picture")
    for journal in Path("hurt").glob("journal.sqlite*"):
        journal.write_bytes(b"x" * 4096 if journal.suffix == ".sqlite" else b"")
    for words in (("report", "hurt"), ("ledger", "hurt"), ("predict", "hurt", "x.nii", "-o", "y.nii")):
        refused(fedscan(*words), "hurt/journal.sqlite cannot be read (file is not a database)")
    run = ("run", done / "study.toml", "--out", "hurt", "--resume", "--cache", done / "cache")
    refused(fedscan(*run), "the run's journal is damaged (file is not a database)")
    Path("hurt/journal.sqlite").write_bytes(b"")
    refused(fedscan("ledger", "hurt"), "the run in hurt has not begun")


def test_a_run_is_read_where_nothing_can_be_written(fedscan: Command, done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "run", "share", ignore=shutil.ignore_patterns("*-wal", "*-shm"))
    Path("share/journal.sqlite-shm").mkdir()  # so that SQLite cannot make its own, as on a read-only disk
    assert "east" in fedscan("ledger", "share").out
    assert fedscan("predict", "share", done / "scans" / "west0_t1.nii", "-o", "seg.nii").code == 0


def test_a_study_name_leads_nowhere_else(fedscan: Command, done: Path, tmp_path: Path) -> None:
    words = ("run", done / "study.toml", "--cache", done / "cache", "--set", "run.baselines=[]")
    said = fedscan(*words, "--set", "train.rounds=1", "--set", "name=../up")
    assert (said.code, "report  runs/-.-up/report.html" in said.out) == (0, True), said
    assert not (tmp_path / "up").exists()


def test_errors_of_the_system_are_sentences() -> None:
    from fedscan.cli.common import said
    from fedscan.engines.workers import WorkerDied

    assert said(PermissionError(13, "Permission denied", "/a/b")) == (2, "/a/b: permission denied")
    assert said(OSError(28, "No space left on device", "/a")) == (2, "/a: no space left on device")
    assert said(OSError("odd")) == (2, "odd")
    for allocate in (np.zeros, torch.empty):
        with pytest.raises((MemoryError, RuntimeError)) as e:
            allocate((10**6, 10**6, 10**5))
        code, sentence = said(e.value)
        assert (code, sentence.partition(": ")[2]) == (
            3,
            "lower train.batch, data.patch or data.grid. Nothing is lost.",
        )
    assert said(WorkerDied("a worker died"))[0] == 3


def test_a_grid_that_no_memory_holds(fedscan: Command, tmp_path: Path) -> None:
    write_study(tmp_path)
    words = ("run", "study.toml", "--set", "data.grid=[80000, 80000, 80000]")
    refused(fedscan(*words), "memory is full: lower train.batch, data.patch or data.grid", 3)


def test_too_many_unusable_cases(fedscan: Command, tmp_path: Path) -> None:
    write_study(tmp_path)
    for i in range(3):
        (tmp_path / "scans" / f"east{i}_t1.nii").write_bytes(b"no image")
    refused(fedscan("run", "study.toml"), "3 of 10 cases cannot be used")
    said = fedscan("data", "check", "scans")
    refused(said, "3 of 10 cases cannot be used")
    assert "left out: east1 of east" in said.out


def test_a_missing_site_stops_a_study_that_says_so(fedscan: Command, tmp_path: Path) -> None:
    write_study(tmp_path, more='[run]\nabsent = "stop"\nsilent = {east = [1]}\n')
    refused(fedscan("run", "study.toml"), "Nothing is lost; go on with --resume when the sites are back", code=3)


def test_other_numerics_need_a_flag(fedscan: Command, done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "run", tmp_path / "run")
    words = ("run", done / "study.toml", "--out", "run", "--resume", "--cache", done / "cache")
    refused(fedscan(*words, "--set", "run.threads=2"), "(threads was 1 and is 2); add --other-numerics to allow it")
    assert fedscan(*words, "--set", "run.threads=2", "--other-numerics").code == 0
    assert any("Resumed under other numerics" in note for note in read_record(tmp_path / "run").notes)
    torch.set_num_threads(1)


def test_a_polite_end_is_told_as_ctrl_c_is(tmp_path: Path) -> None:
    """SIGTERM, which batch systems send: one sentence, exit code 130, and the run can be gone on with."""
    script = (
        "import os, signal, sys\n"
        "from fedscan.cli import common, main\n"
        "import fedscan.launch as launch\n"
        "launch.carry_out = lambda *a: os.kill(os.getpid(), signal.SIGTERM)\n"
        "main(sys.argv[1:])\n"
    )
    study = write_study(tmp_path)
    words = [sys.executable, "-c", script, "run", str(study), "--out", str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 130, done.stderr
    assert "Nothing is lost" in done.stderr
    assert "Traceback" not in done.stderr


def test_stopped_and_gone_on_with(fedscan: Command, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedscan.live import Show

    seen = Show.__call__

    def interrupt(self: Show, what: str, value: Any) -> None:
        seen(self, what, value)
        if what == "turn" and value.turn == (2, 0, "east"):
            raise KeyboardInterrupt

    words = ("run", done / "study.toml", "--out", "here", "--cache", done / "cache", "--set", "run.baselines=[]")
    with monkeypatch.context() as patch:
        patch.setattr(Show, "__call__", interrupt)
        said = fedscan(*words)
    assert said.code == 130
    assert "Nothing is lost" in said.err
    assert said.err.rstrip().endswith("--resume")
    command = shlex.split(said.err.strip().splitlines()[-1])
    assert fedscan(*command[1:]).code == 0
    assert same_model(done / "run", Path("here"))
