"""Fixtures that several test files use."""

import signal
import sys
from pathlib import Path

import pytest

from commands import Command, Said
from tinystudy import write_study


def pytest_configure() -> None:
    """Lets Ctrl-C reach what tests start: in the background of a script it is ignored, by all children too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def fedscan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in an empty folder."""
    from fedscan.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSCAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEDSCAN_DEBUG", raising=False)

    def call(*words: object) -> Said:
        arguments = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", ["fedscan", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            main()
        printed = capsys.readouterr()
        return Said(int(e.value.code or 0), printed.out, printed.err)

    return call


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study, its scans, and a finished run with a baseline under ``run``."""
    from fedscan.launch import How, launch
    from fedscan.studyfile import load

    folder = tmp_path_factory.mktemp("done")
    file = load(write_study(folder, more='[run]\nbaselines = ["local-only"]\n'))
    launch(file, folder / "run", How(cache=folder / "cache", command="fedscan run study.toml"))
    return folder
