"""A disk that is full at any write of a run: one sentence, nothing corrupt, and once there is room the same bits."""

import errno
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedscan import wire
from fedscan.cli.common import said
from fedscan.data import cache as store
from fedscan.data.manifest import read_manifest, write_manifest
from fedscan.disk import DiskFull, full, room_in
from fedscan.engines.workers import WorkerFailed
from fedscan.launch import How, launch, prepared, report
from fedscan.ledger import read_record
from fedscan.studyfile import Cases, StudyFile, load
from tinystudy import write_scans, write_study

torch.set_num_threads(1)

# Runs the study once as it should be, then with the largest file that may be written lowered, then goes on without
# that limit. Prints a line of JSON for each limit.
LIMITED = """
import contextlib, io, json, os, resource, shlex, signal, sys
import torch
from fedscan.cli import main

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
torch.set_num_threads(1)

def go(*words, limit=resource.RLIM_INFINITY):
    said = io.StringIO()
    sys.argv = ["fedscan", "run", "study.toml", *words]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as e:
            code = e.code
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return code, said.getvalue()

assert go("--out", "whole", "--cache", "cache") == (0, go("--out", "again", "--cache", "cache")[1])
for cache, limit in json.loads(sys.argv[1]):
    words = "--out", str(limit), "--cache", cache
    code, said = go(*words, limit=limit)
    again = shlex.split(said.splitlines()[-1].partition("goes on with: ")[2])[3:]  # what it was told to give
    print(json.dumps([cache, limit, code, said.splitlines()[-1], *go(*again)]), flush=True)
"""


class Whole(NamedTuple):
    """A study, and a run of it for which there was room."""

    file: StudyFile
    how: How
    cases: Cases
    folder: Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    file = load(write_study(folder, "fedbn"), ["train.rounds=1", "train.batch=3"])
    how = How(cache=folder / "cache", report=False)
    cases = prepared(file, how)
    launch(file, folder / "run", how, cases)
    return Whole(file, how, cases, folder / "run")


def same_end(a: Path, b: Path) -> bool:
    """Whether two runs have the same model, scores and answers, bit for bit."""
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    one, two = read_record(a), read_record(b)
    answers = [[(t.round, t.call, t.site, t.digest_up, t.bytes_up) for t in r.turns] for r in (one, two)]
    pictures = [[(o.case, o.rank, o.prediction.tobytes()) for o in r.overlays] for r in (one, two)]
    equal = x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x)
    return equal and one.scores == two.scores and answers[0] == answers[1] and pictures[0] == pictures[1]


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """The cache at its first array; the journal when it is made, when it grows; the state, which is the largest."""
    write_study(tmp_path, "fedbn", "[run]\nbaselines = []\n")
    limits = [("new", 10_000), ("cache", 0), ("cache", 20_000), ("cache", 80_000)]
    words = [sys.executable, "-c", LIMITED.replace("sys.argv[1]", repr(json.dumps(limits)))]
    made = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=110)
    assert made.returncode == 0, made.stderr
    lines = [json.loads(line) for line in made.stdout.splitlines()]
    assert [tuple(line[:2]) for line in lines] == limits
    for cache, limit, code, sentence, resumed, told in lines:
        where = cache if cache == "new" else limit
        assert code == 3, sentence
        assert sentence.startswith(f"fedscan: nothing more can be written into {where} ("), sentence
        command = f"fedscan run study.toml --out {limit} --cache {cache}" + " --resume" * (cache != "new")
        assert sentence.endswith(f"): free space there; nothing is lost, and the run goes on with: {command}"), sentence
        assert resumed == 0, told
        assert same_end(tmp_path / str(limit), tmp_path / "whole")


class Filling:
    """Stands for ``wire.put_file`` on a disk that is full from the ``at``-th file on, in the middle of that file."""

    def __init__(self, at: int, number: int) -> None:
        self.at, self.number, self.files = at, number, [Path()]
        self.real = wire.put_file

    def __call__(self, path: Path, write: Callable[[BinaryIO], object], *, durable: bool = False) -> None:
        if len(self.files) > self.at:
            raise OSError(self.number, "it takes no more")
        self.files.append(path)
        self.real(path, write, durable=durable)
        if len(self.files) > self.at:
            path.write_bytes(path.read_bytes()[:-1])
            raise OSError(self.number, "it takes no more")


def outcome(file: StudyFile, folder: Path, how: How, cases: Cases) -> str:
    """ "ended", or "full" where the sentence is as it should be."""
    with suppress(DiskFull):
        launch(file, folder, how, cases)
        return "ended"
    said = f"nothing more can be written into {folder} (it takes no more): free space there; nothing is lost"
    with pytest.raises(DiskFull, match=f"^{re.escape(said)}$"):
        launch(file, folder, replace(how, resume=True), cases)  # the disk is still full
    return "full"


@pytest.mark.slow
def test_full_at_every_file_of_a_run(whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, how, cases, run = whole
    written: list[str] = []
    for at in range(1, 100):
        folder = tmp_path / str(at)
        filling = Filling(at, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)[at % 3])
        with monkeypatch.context() as patch:
            patch.setattr(wire, "put_file", filling)
            if outcome(file, folder, how, cases) == "ended":
                break
        written.append(str(filling.files[-1].relative_to(folder)))
        launch(file, folder, replace(how, resume=True), cases)
        assert same_end(folder, run), f"full at {written[-1]}"
    kinds = {name.partition("/")[0].removesuffix(".partial") for name in written}
    assert kinds == {"study.json", "study.toml", "state", "sites", "overlays", "model.safetensors"}


@pytest.mark.parametrize("at", [pytest.param("first", marks=pytest.mark.slow), "last"])
def test_a_journal_that_cannot_grow(whole: Whole, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's own word for a full disk, where the tables are made and at the last page of the run."""
    file, how, cases, run = whole
    connect = sqlite3.connect
    with closing(connect(run / "journal.sqlite")) as db:
        (last,) = db.execute("PRAGMA page_count").fetchone()
    pages = 3 if at == "first" else last - 1

    def tight(*given: Any, **options: Any) -> sqlite3.Connection:
        db: sqlite3.Connection = connect(*given, **options)
        db.execute(f"PRAGMA max_page_count = {pages}")
        return db

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", tight)
        with pytest.raises(DiskFull, match=rf"into {tmp_path} \(database or disk is full\)"):
            launch(file, tmp_path, how, cases)
    launch(file, tmp_path, replace(how, resume=True), cases)
    assert same_end(tmp_path, run)


def test_a_report_that_does_not_fit_leaves_the_one_before(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole.folder, tmp_path / "run")
    page = report(tmp_path / "run")
    before = page.read_bytes()

    def short(self: Path, text: str, **_: Any) -> int:
        self.write_bytes(text[: len(text) // 2].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", short)
        with pytest.raises(DiskFull, match=r"run \(no space left on device\)"):
            report(tmp_path / "run")
    assert page.read_bytes() == before


def test_a_table_of_cases_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short, it would be read as a table of fewer cases."""
    manifest = read_manifest(write_scans(tmp_path / "scans"))
    (tmp_path / "scans" / "cases.csv").unlink()

    class Writer:
        def __init__(self, file: Any, **_: Any) -> None:
            self.file = file

        def writerows(self, rows: list[list[str]]) -> None:
            self.file.write(",".join(rows[0]) + "\n")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("csv.writer", Writer)
    with pytest.raises(OSError, match="No space"):
        write_manifest(manifest, tmp_path / "scans")
    assert not (tmp_path / "scans" / "cases.csv").exists()


def test_what_says_that_a_disk_is_full_and_what_does_not(tmp_path: Path) -> None:
    assert full(OSError(errno.ENOSPC, "No space left on device")) == "no space left on device"
    assert full(OSError("4096 requested and 1024 written")) == "4096 requested and 1024 written"
    worker = WorkerFailed("east, round 2: OSError: [Errno 28] No space left on device: '/a'", ["OSError"])
    assert full(worker) == "no space left on device"
    last = sqlite3.OperationalError("unable to open database file")  # as tidying up may end
    last.__context__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert full(last) == "disk quota exceeded"
    others = (PermissionError(13, "Permission denied", "/a"), OSError("odd"), ValueError("[Errno 28] x"))
    for other in (*others, RuntimeError("[Errno 2] No such file"), sqlite3.OperationalError("database is locked")):
        assert full(other) == ""
        with pytest.raises(type(other)), room_in(tmp_path):
            raise other
    with pytest.raises(DiskFull, match="into inner"), room_in(Path("outer")), room_in(Path("inner")):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_the_advice_fits_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    error = DiskFull("nothing more can be written into x (full): free space there; nothing is lost")
    for given, more, again in (
        ("run s.toml", ("--resume",), "run s.toml --resume"),
        ("run s.toml --resume", ("--resume",), "run s.toml --resume"),
        ("run s.toml", (), "run s.toml"),  # full before the run began: there is nothing to go on with
        ("demo", (), "demo"),
    ):
        error.again = more
        monkeypatch.setattr(sys, "argv", ["fedscan", *given.split()])
        assert said(error) == (3, f"{error}, and the run goes on with: fedscan {again}")


def test_a_cache_that_is_full_keeps_no_half_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(path: Path, array: Any, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(f"{array.size} requested and 4 written")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", short)
        with pytest.raises(DiskFull, match=r"into .* requested and 4 written"), room_in(tmp_path):
            store.write(tmp_path / "entry", {"image": np.arange(9.0)}, {})
    assert list(tmp_path.iterdir()) == []
    arrays, _ = store.write(tmp_path / "entry", {"image": np.arange(9.0)}, {})
    assert np.array_equal(arrays["image"], np.arange(9.0))
