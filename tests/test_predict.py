"""Which scans make a case, and which test cases are worth a look."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

from fedscan.launch import How, launch, numerics
from fedscan.ledger import Overlay, ScoreRow, read_overlays
from fedscan.predict import case_of, device_of, mean_dice, overlay_of, predict, ranked, save
from fedscan.run import Problem
from fedscan.studyfile import load
from tinystudy import write_study


def row(site: str, case: str, value: float | None, trained_at: str = "federation", metric: str = "dice") -> ScoreRow:
    return ScoreRow(3, "test", trained_at, site, case, case, "ball", metric, value)


def scan(path: Path, *shape: int) -> str:
    nibabel.save(nibabel.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)), path)
    return str(path)


def test_scans_make_a_case(tmp_path: Path) -> None:
    t1, t2 = (scan(tmp_path / name, 4, 4, 4) for name in ("a.nii", "b.nii"))
    both = scan(tmp_path / "c.nii", 4, 4, 4, 2)
    assert case_of([t1, t2], ["t1", "t2"]).images == {"t1": Path(t1), "t2": Path(t2)}
    assert case_of([f"t2={t2}"], ["t1", "t2"]).images == {"t1": None, "t2": Path(t2)}
    whole = case_of([both], ["t1", "t2"])
    assert whole.open("t2").shape == (4, 4, 4)
    for scans, sentence in (
        ([t1, t1, t1], r"3 scans for a model that reads t1, t2: give both in this order, or those you have by name"),
        ([t1], r"1 scan for a model that reads t1, t2: give both in this order, .* by name \(t1=FILE\)"),
        ([f"={t1}"], f"^={t1}: SEQUENCE=FILE was meant, such as t1={t1}$"),
        (["t1="], "^t1=: SEQUENCE=FILE was meant, such as t1=FILE$"),
        ([f"t1={t1}", t2], "b.nii has no SEQUENCE= before it: name every scan, or none"),
        ([f"t3={t1}"], "t3 is no sequence of the study; it reads t1, t2"),
        ([f"t1={t1}", f"t1={t2}"], "t1 was given twice"),
        ([str(tmp_path), t2], "is a folder; a NIfTI file was meant"),
        ([str(tmp_path / "none.nii"), t2], "does not exist"),
    ):
        with pytest.raises(Problem, match=sentence):
            case_of(scans, ["t1", "t2"])
    with pytest.raises(Problem, match="2 scans for a model that reads t1: give that one"):
        case_of([t1, t2], ["t1"])
    with pytest.raises(Problem, match="the study requires t2 of every patient, which was not given: t2=FILE"):
        case_of([f"t1={t1}"], ["t1", "t2"], ["t2"])
    assert case_of([f"t2={t2}"], ["t1", "t2"], ["t2"]).present == ("t2",)
    assert case_of([both], ["t1", "t2"], ["t1", "t2"]).present == ("t1", "t2")
    odd = scan(tmp_path / "a=b.nii", 4, 4, 4)
    assert case_of([odd, t2], ["t1", "t2"]).images["t1"] == Path(odd)


def test_a_device_is_one_that_the_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predicting goes on elsewhere than training did; a device that was asked for by name must be there."""
    file = load(write_study(tmp_path))

    def machine(gpus: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    machine(0)
    assert [device_of(None, was) for was in ("cpu", "cuda", "cuda:1")] == ["cpu"] * 3
    assert device_of("auto", "cuda") == "cpu"
    for name in ("cuda", "cuda:0", "mps", "tpu", "cuda:-1", "cuda:x"):
        with pytest.raises(Problem, match=rf"--device {name}: .* on this machine \(cpu, or auto\) was meant"):
            device_of(name, "cpu")
    with pytest.raises(Problem, match=r'run.device = "cuda", but a device that .* \(cpu, or auto\) belongs there'):
        numerics(load(file.path, ["run.device=cuda"]))
    machine(1)
    assert [device_of(None, was) for was in ("cpu", "cuda", "cuda:0", "cuda:1")] == ["cpu", "cuda", "cuda:0", "cuda"]
    assert (device_of("cuda:0", "cpu"), device_of("auto", "cpu")) == ("cuda:0", "cuda")
    with pytest.raises(Problem, match=r"--device cuda:7: .* \(cpu, cuda:0, or auto\) was meant"):
        device_of("cuda:7", "cpu")
    with pytest.raises(Problem, match=r'run.device = "cuda:7", but a device that .* \(cpu, cuda:0, or auto\)'):
        numerics(load(file.path, ["run.device=cuda:7"]))


def test_mean_dice_is_of_the_model_that_the_site_uses() -> None:
    rows = [row("a", "1", 0.5), row("a", "1", 0.7), row("a", "2", None), row("a", "2", 3.0, metric="hd95")]
    assert mean_dice(rows) == {("a", "1"): pytest.approx(0.6), ("a", "2"): None}
    assert mean_dice([row("a", "1", 0.5, "a"), row("a", "1", 0.1, "b")]) == {("a", "1"): 0.5}


def test_best_median_and_worst() -> None:
    assert ranked({"a": 0.1, "b": 0.9, "c": 0.5, "d": 0.4, "e": None}) == [
        ("best", "b"),
        ("median", "d"),
        ("worst", "a"),
    ]
    assert ranked({"a": 0.1, "b": 0.9}) == [("best", "b"), ("median", "a")]
    assert ranked({"a": 0.1}) == [("best", "a")]
    assert ranked({"a": None}) == []


def test_overlays_are_kept_as_plain_arrays(tmp_path: Path) -> None:
    image = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    mask = (image > 3).astype(np.uint8)
    kept = Overlay("east", "c 1", "best", None, image, mask, 1 - mask, (1.0, 2.0, 3.0))
    save(kept, tmp_path / "east.best.npz")
    (back,) = read_overlays(tmp_path)
    assert (back.site, back.case, back.rank, back.dice, back.spacing) == ("east", "c 1", "best", None, (1.0, 2.0, 3.0))
    assert np.array_equal(back.image, image)
    assert np.array_equal(back.prediction, 1 - mask)


def test_what_is_ignored_is_shown_as_background() -> None:
    label = np.array([[[0, 1, 255, 255]]], np.uint8)
    found = np.array([[[0, 1, 1, 0]]], np.uint8)
    case = SimpleNamespace(
        name="c", label=label, image=np.arange(4.0).reshape(1, 1, 1, 4), present=(True,), spacing=(1.0, 1.0, 1.0)
    )
    test = SimpleNamespace(case=lambda i: (SimpleNamespace(x=None), case))
    for ignored, shown in ((255, ([0, 1, 0, 0], [0, 1, 0, 0])), (None, ([0, 1, 255, 255], [0, 1, 1, 0]))):
        task = SimpleNamespace(predict=lambda model, x: found[None], ignored=ignored)
        study: Any = SimpleNamespace(task=task)
        made = overlay_of(study, nn.Identity(), test, 0, "east", "best", 1.0)
        assert (made.reference.ravel().tolist(), made.prediction.ravel().tolist()) == shown
    assert label[0, 0, 2] == 255, "the case itself stays as it is"


def test_where_layers_stay_at_sites_one_must_be_named(tmp_path: Path) -> None:
    """The first site's norm layers are not what a stranger's scan is meant to be segmented with, unasked."""
    file = load(write_study(tmp_path, "fedbn"), ["train.rounds=1"])
    launch(file, tmp_path / "run", How(report=False, cache=tmp_path / "cache"))
    scans = [str(tmp_path / "scans" / "east0_t1.nii")]
    with pytest.raises(Problem, match="choose one with --site: east, west"):
        predict(tmp_path / "run", scans, tmp_path / "seg.nii")
    assert predict(tmp_path / "run", scans, tmp_path / "seg.nii", site="west").exists()


def test_where_all_share_one_model_a_site_is_refused(tmp_path: Path) -> None:
    """Whoever names a hospital believes that its model is another than the next one's."""
    launch(load(write_study(tmp_path), ["train.rounds=1"]), tmp_path / "run", How(report=False, cache=tmp_path / "c"))
    scans, out = [str(tmp_path / "scans" / "east0_t1.nii")], tmp_path / "seg.nii"
    with pytest.raises(Problem, match="--site east: all sites predict with the same model here; leave --site out"):
        predict(tmp_path / "run", scans, out, site="east")
    assert not out.exists()
    assert predict(tmp_path / "run", scans, out).exists()
