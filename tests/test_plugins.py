"""What installed packages bring is chosen by a study's file, runs, and stands in the study's hash."""

import hashlib
import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from fedscan import plugins
from fedscan.run import Problem, run
from fedscan.studyfile import again, build, load, read_cases
from tinystudy import write_study

torch.set_num_threads(1)

SOURCE = '''
from torch import nn

from fedscan.models.card import model
from fedscan.tasks.registry import task
from fedscan.tasks.segmentation import Segmentation


@model("thin", summary="One convolution.", paper="none", presets={})
def thin(channels: int, classes: int, dims: int = 3, *, kernel: int = 1):
    """Images to logits."""
    return nn.Conv3d(channels, classes, kernel, padding=kernel // 2)


class Sharper(Segmentation):
    """Cross-entropy on logits that are made larger first."""

    factor = 1.0

    def loss(self, out, batch):
        return nn.functional.cross_entropy(out["logits"] * self.factor, batch.y.long())


@task("sharper")
def sharper(networks, labels, classes, window, tolerance, hd95, factor: float = 2.0):
    """Segmentation by another loss."""
    made = Sharper(networks, labels, classes, {}, window, tolerance, hd95)
    made.factor = factor
    return made
'''
STUDY = 'model.name="thin"', "model.kernel=3", "task.kind=sharper", "task.factor=3.0"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that an installed package could bring, with a network and a task."""
    path = tmp_path / "fedscan_theirs.py"
    path.write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fedscan_theirs", raising=False)
    points = [
        EntryPoint(f, f"fedscan_theirs:{f}", g) for f, g in (("thin", "fedscan.models"), ("sharper", "fedscan.tasks"))
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: [p for p in points if p.group == group])
    return path


def plain(study: Path) -> list[str]:
    """The study without the network's preset, which is not theirs."""
    study.write_text(study.read_text().replace('preset = "tiny"\n', ""))
    return list(STUDY)


def test_a_study_runs_with_the_model_and_the_task_of_a_package(package: Path, tmp_path: Path) -> None:
    path = write_study(tmp_path)
    file = load(path, plain(path))
    study = build(file, read_cases(file, tmp_path / "cache"))
    assert type(study.task).__name__ == "Sharper"
    assert study.task.factor == 3.0  # type: ignore[attr-defined]
    state = run(study, tmp_path / "run")
    assert state["weights"]["weight"].shape == (2, 1, 3, 3, 3)
    assert again(file.resolved(), tmp_path / "study.json").hash == file.hash


def test_the_tasks_of_packages_are_listed(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedscan.cli.looking import tasks

    tasks(json=True)
    own, theirs = json.loads(capsys.readouterr().out)
    assert (own["name"], own["package"], own["options"]["lam"]) == ("segmentation", "fedscan", 0.5)
    assert theirs == {
        "name": "sharper",
        "summary": "Segmentation by another loss.",
        "package": "unknown",  # the module of this test belongs to no distribution
        "options": {"factor": 2.0},
    }
    tasks()
    assert "sharper       unknown  factor = 2.0" in capsys.readouterr().out


def test_what_a_package_brings_is_in_the_hash(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_study(tmp_path)
    file = load(path, plain(path))
    sha = hashlib.sha256(package.read_bytes()).hexdigest()
    brought = {"package": "unknown", "version": "", "sha256": sha}
    assert file.plugins() == {"model": brought, "task": brought}
    before = file.hash
    package.write_text(SOURCE + "# changed\n")
    monkeypatch.delitem(sys.modules, "fedscan_theirs")
    assert load(path, list(STUDY)).hash != before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "task.kind=sharp",
            "task.kind = \"sharp\", but one of segmentation, sharper belongs there (was 'sharper' meant?)",
        ),
        ("task.factr=1.0", "[task] has no key 'factr' (was 'factor' meant?); known keys: factor, kind, labels"),
        ("task.factor=much", 'task.factor = "much", but a number belongs there'),
        ("model.kernel=1.5", "'kernel' of model 'thin' must be a whole number"),
    ],
)
def test_mistakes_in_what_a_package_brings_are_named(package: Path, tmp_path: Path, change: str, said: str) -> None:
    path = write_study(tmp_path)
    with pytest.raises(Problem) as e:
        load(path, [*plain(path), change])
    assert said in str(e.value)
