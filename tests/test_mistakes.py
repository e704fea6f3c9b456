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
from fedscan.launch import writing
from fedscan.ledger import read_record
from tinystudy import write_scans, write_study

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
    refused(fedscan("run", "study.toml"), "Nothing is lost; when the sites are back, go on with: fedscan", code=3)


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


def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, a case that is read is a fault: what is refused must be refused before."""

    def read(*_: Any) -> None:
        raise AssertionError("cases were read")

    monkeypatch.setattr("fedscan.launch.read_cases", read)
    monkeypatch.setattr("fedscan.demo.write_hospitals", read)


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.startswith("journal.sqlite-")}


def test_nothing_is_gone_on_with_where_there_is_nothing(fedscan: Command, done: Path, tmp_path: Path) -> None:
    """A mistyped folder must not begin a new run that looks like the old one."""
    refused(fedscan("run", done / "study.toml", "--out", "rnu", "--resume"), "rnu holds no run to go on with")
    assert not (tmp_path / "rnu").exists()


def test_a_stop_before_the_record_is_gone_on_with_as_it_began(
    fedscan: Command, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedscan.launch.read_cases", stop)
        said = fedscan("run", done / "study.toml", "--out", "here")
    assert (said.code, said.err.rstrip().endswith("--out here")) == (130, True), said.err


def test_another_study_is_refused_before_a_case_is_read(
    fedscan: Command, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The method by its name, and not by a hyperparameter that the other has not."""
    unread(monkeypatch)
    before = files_of(done / "run")
    resume = ("run", done / "study.toml", "--out", done / "run", "--resume")
    sentence = 'is of another study (method.name was "fedavg" and is "fedprox")'
    refused(fedscan(*resume, "--set", "method.name=fedprox"), sentence)
    refused(fedscan(*resume, "--set", "run.threads=2"), "(threads was 1 and is 2)")
    refused(fedscan("demo", "--out", done / "run"), f"the run in {done / 'run'} is of another study")
    Path("c").mkdir()
    Path("c/fedavg").mkdir()
    shutil.copytree(done / "run", "c/fedavg/2")
    words = ("compare", done / "study.toml", "--methods", "fedprox,fedavg", "--seeds", "2", "--out", "c")
    refused(fedscan(*words), "the run in c/fedavg/2 is of another study (seed was 1 and is 2)")
    torch.set_num_threads(1)
    assert files_of(done / "run") == before
    assert not Path("c/fedprox").exists()


def test_runs_comparisons_and_scans_have_a_folder_each(
    fedscan: Command, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unread(monkeypatch)
    before = files_of(done)
    compare = ("compare", done / "study.toml", "--methods", "fedavg", "--out")
    refused(fedscan(*compare, done / "run"), "holds a single run, and no comparison beside it; choose another folder")
    sentence = "holds scans (cases.csv), and no run beside them; choose another folder with --out"
    refused(fedscan(*compare, done / "scans"), sentence)
    refused(fedscan("run", done / "study.toml", "--out", done / "scans"), sentence)
    Path("decathlon").mkdir()
    Path("decathlon/dataset.json").write_text("{}")
    refused(fedscan("run", done / "study.toml", "--out", "decathlon"), "holds scans (dataset.json)")
    Path("file").write_text("")
    refused(fedscan("demo", "--out", "file"), "file cannot be made, because file is a file; choose another folder")
    assert files_of(done) == before


def test_a_demo_of_other_hospitals_is_another_demo(
    fedscan: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedscan.data.simulate import hospitals

    unread(monkeypatch)
    write_scans(tmp_path / "d" / "hospitals", sites=tuple(hospital.name for hospital in hospitals()))
    refused(fedscan("demo", "--out", "d", "--hard-site"), "d holds the demo with other hospitals; choose another")
    with pytest.raises(AssertionError, match="cases were read"):
        fedscan("demo", "--out", "d")


def test_what_may_not_be_written_names_the_option_to_change(
    fedscan: Command, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("")
    sentence = "nothing can be written into file (not a directory); choose another folder with --cache"
    refused(fedscan("run", done / "study.toml", "--out", "here", "--cache", "file"), sentence)
    sentence = "nothing can be written into file (file exists); choose another folder with --out"
    refused(fedscan("report", done / "run", "--out", "file"), sentence)

    def denied(path: Path, *_: Any) -> None:
        raise PermissionError(13, "Permission denied", f"{path}.partial")

    monkeypatch.setattr("fedscan.wire.replace_file", denied)
    refused(fedscan("report", done / "run"), f"nothing can be written into {done / 'run'} (permission denied); choose")


def test_a_fault_elsewhere_is_not_put_down_to_the_folder(tmp_path: Path) -> None:
    for error in (PermissionError(13, "Permission denied", "/elsewhere/x"), PermissionError(13, "x"), OSError("odd")):
        with pytest.raises(type(error)) as e, writing(tmp_path, "--out"):
            raise error
        assert e.value is error
