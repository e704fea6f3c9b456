"""The studies of real scans load, mean what their page says, and their results become its tables."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedscan.ledger import read_record
from fedscan.studyfile import build
from shared import shared
from tinystudy import write_scans

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The modules of benchmarks/ that make the table."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import science
    import science_rows
    import science_table
    import spoil

    yield type("Modules", (), {"run": science, "rows": science_rows, "table": science_table, "spoil": spoil})
    sys.path.remove(str(ROOT / "benchmarks"))


def line(row: str, seed: int, dice: dict[str, float], corrupt: str = "") -> dict[str, Any]:
    """A line of results: two patients, one each at hospitals a and b."""
    cases = {"ab"[i]: {case: [f"s{case}", {"x": value}]} for i, (case, value) in enumerate(dice.items())}
    rest = {"lr": 0.001, "hd95": {"mean": 2.0}, "mb_up": 1.0, "mb_down": 4.0, "steps": 10, "seconds": 120.0}
    return {"row": row, "seed": seed, "corrupt": corrupt, "cases": cases, "shares": {"a": 0.25, "b": 0.75}, **rest}


@pytest.mark.parametrize("study", ["hippocampus", "glioma"])
def test_every_row_of_a_study_loads_and_is_another_study(study: str, bench: Any) -> None:
    path = ROOT / "studies" / f"{study}.toml"
    files = {row.name: bench.run.load(path, row.of(study)) for row in bench.rows.ROWS}
    assert len({file.hash for file in files.values()}) == len(files)
    assert bench.run.load(path).hash == files["fedsegnet"].hash  # the study as its file says it
    assert all(file.source == "" for file in files.values())  # no path of any machine
    work = {(f.rounds, f.step.epochs, f.step.batch, f.step.optimiser, f.step.schedule) for f in files.values()}
    assert len(work) == 1
    assert len({(file.data_seed, tuple(file.data.fractions)) for file in files.values()}) == 1  # one split for all
    models = {name: file.model for name, file in files.items()}
    assert models["fedsegnet"] == models["fedsegnet-no-adaptive"] == models["local-only"] == "fedsegnet"
    assert models["federated-unet"] == models["fedsegnet-no-transformer"] == models["centralised-unet"] == "unet"
    assert models["traditional-fl"] == "cnn"
    assert models["centralised-swin-unetr"] == "swin-unetr"
    assert files["fedsegnet"].method_options["bits"] == 8
    assert files["fedsegnet-float32"].method_options["bits"] == 32
    assert files["fedsegnet-sparse"].method_options["fraction"] == 0.1


def test_the_last_line_of_a_row_counts(tmp_path: Path, bench: Any) -> None:
    lines = [line("fedsegnet", 0, {"1": 0.1, "2": 0.1}), line("fedsegnet", 0, {"1": 0.8, "2": 0.6})]
    (tmp_path / "hippocampus.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert bench.rows.read_results(tmp_path / "hippocampus.jsonl") == lines[1:]
    assert bench.rows.read_results(tmp_path / "glioma.jsonl") == []


def test_results_become_the_table(tmp_path: Path, bench: Any) -> None:
    lines = [
        line("fedsegnet", 0, {"1": 0.9, "2": 0.5}),
        line("fedsegnet", 1, {"1": 0.7, "2": 0.7}),
        line("federated-unet", 0, {"1": 0.8, "2": 0.5}),  # against seed 0 alone: -0.1 and 0
        line("fedsegnet", 0, {"1": 0.5, "2": 0.4}, "swap:float-v2"),
    ]
    lines[3]["shares"]["float-v2"] = 0.125
    (tmp_path / "hippocampus.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    head, rows = bench.table.main_table("hippocampus", bench.table.by_row(lines))
    cells = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["row"] for row in cells] == [row.title for row in bench.rows.ROWS]
    assert cells[0]["seeds"] == "2"
    assert cells[0]["macro Dice [95 %]"].startswith("0.700 [")  # (0.8 + 0.6) / 2
    assert cells[0]["worst hospital"] == "0.600 (b)"
    assert cells[0]["difference from FedSegNet, by patient [95 %]"] == "–"
    assert cells[1]["difference from FedSegNet, by patient [95 %]"].startswith("−0.050 [")
    assert cells[1]["p (Holm)"] == "1.000"
    assert cells[1]["MB up + down per round"] == "1.00 + 4.00"
    assert cells[2]["seeds"] == "not measured"
    page = bench.table.filled(bench.table.PAGE.read_text(encoding="utf-8"), tmp_path)
    assert bench.table.filled(page, tmp_path) == page
    assert "| FedSegNet | 2 | 0.001 | 0.700 [" in page
    assert "| exchanged with each other at float-v2, training | 0.450 [" in page


def test_the_page_has_the_tables_of_the_results(bench: Any) -> None:
    page = bench.table.PAGE.read_text(encoding="utf-8")
    assert page == bench.table.filled(page, bench.rows.RESULTS), "run `python benchmarks/science.py --table`"


def test_labels_are_spoilt_as_said(bench: Any) -> None:
    label = np.zeros((9, 9, 9), np.uint8)
    label[4, 4, 4:6] = 1, 2
    grown = bench.spoil.changed("dilate", label, label)
    assert grown[4, 4, 2] == 1
    assert grown[4, 4, 7] == 2
    assert grown[4, 4, 1] == grown[4, 4, 8] == 0
    assert grown[2, 4, 4] == 1
    assert np.array_equal(bench.spoil.changed("swap", label, label), np.array([0, 2, 1], np.uint8)[label])
    assert bench.spoil.changed("shuffle", label, np.ones((3, 4, 5), np.uint8)).shape == label.shape


def test_one_hospital_s_training_labels_are_spoilt(tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSCAN_CACHE", str(tmp_path / "cache"))
    data = write_scans(tmp_path / "scans")
    study = tmp_path / "study.toml"
    study.write_text("[data]\nfractions = [0.6, 0.2, 0.2]\n[task]\nlabels = {ball = 1}\n")
    file = bench.run.load(study, (), data)
    spoilt = bench.spoil.spoil(data, file, "swap:east", tmp_path / "spoilt")
    before, after = (bench.spoil.read_manifest(folder) for folder in (data, spoilt))
    train = bench.run.read_cases(file).facts()["splits"]["east"]["train"]
    assert len(train) == 3
    wrong = [
        a.name
        for a, b in zip(before.cases, after.cases, strict=True)
        if not np.array_equal(bench.spoil.array(a), bench.spoil.array(b))
    ]
    assert wrong == sorted(train)
    assert bench.run.read_cases(bench.run.load(study, (), spoilt)).facts()["splits"]["east"]["train"] == train
    with pytest.raises(bench.run.Problem, match="dilate, swap, shuffle"):
        bench.spoil.spoil(data, file, "erase:east", tmp_path / "no")
    with pytest.raises(bench.run.Problem, match="east, west"):
        bench.spoil.spoil(data, file, "swap:north", tmp_path / "no")


def test_an_interval_holds_only_what_a_dice_can_be(bench: Any) -> None:
    wide = bench.table.Summary(0.574, -0.115, 1.033, 5, 5, 0, 28)
    assert bench.table.span(wide) == "0.574 [0.000, 1.000]"
    test = bench.table.Comparison(-0.199, -1.505, 0.006, 0.079, 28, "exact", 0, 0)
    assert bench.table.span(test, signed=True) == "−0.199 [−1.000, +0.006]"
    assert bench.table.span(bench.table.Summary(0.5, None, None, 1, 1, 0, 1)) == "0.50"


def test_what_exchanges_nothing_has_no_bytes(bench: Any) -> None:
    cases = {"A": {f"c{k}": (f"s{k}", {"a": 0.5 + k / 10}) for k in range(3)}}
    line = {"cases": cases, "hd95": {"mean": 1.0}, "lr": 0.01, "mb_up": 1.5, "mb_down": 2.5, "steps": 7, "seconds": 60}
    for row in bench.rows.ROWS:
        cells = bench.table.measured(row, [line], None, None)
        assert ("–" if row.alone else "1.50 + 2.50") == cells[7], row.name
    assert {row.name for row in bench.rows.ROWS if row.alone} >= {"local-only", "centralised-unet"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("study", "sites", "train"),
    [("hippocampus", ("8bit", "float-v1", "float-v2", "float-v3", "large"), 101), ("glioma", ("CS", "DU", "HT"), 34)],
)
def test_every_row_fits_the_real_scans(
    study: str, sites: tuple[str, ...], train: int, tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSCAN_CACHE", str(tmp_path))
    data = shared(bench.rows.FOLDERS[study])
    path = ROOT / "studies" / f"{study}.toml"
    cases = bench.run.read_cases(bench.run.load(path, (), data))
    assert cases.sites == sites
    assert sum(len(of["train"]) for of in cases.of.values()) == train
    assert all(len(of[name]) >= 2 for of in cases.of.values() for name in of)
    patients = [{name: {p.subject for p in of[name]} for name in of} for of in cases.of.values()]
    assert all(not of["test"] & (of["train"] | of["validation"]) for of in patients)
    for row in bench.rows.ROWS:  # the network takes the grid, or this raises
        made = build(bench.run.load(path, row.of(study), data), cases)
        assert made.names == (("pooled",) if row.name.startswith("centralised") else sites)


@pytest.mark.slow
def test_a_row_on_real_scans_from_scans_to_the_results(
    tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSCAN_CACHE", str(tmp_path / "cache"))
    data = shared("hippocampus")
    small = ["data.grid=[16,16,16]", 'data.sites=["large"]', "train.rounds=2", "model.preset=tiny"]
    command = ["--study", "hippocampus", "--data", str(data), "--out", str(tmp_path / "out")]
    command += ["--results", str(tmp_path / "results"), "--rows", "fedsegnet", *(f"--set={s}" for s in small)]
    bench.run.main([*command, "--minutes", "0"])
    assert not (tmp_path / "results").exists()  # stopped at once, and nothing is called done
    bench.run.main(command)
    found = bench.rows.read_results(tmp_path / "results" / "hippocampus.jsonl")
    assert [(each["row"], each["seed"], each["rounds"], each["steps"]) for each in found] == [("fedsegnet", 0, 2, 14)]
    (one,) = found
    assert set(one["tuned"]) == {"0.003", "0.01"}
    assert one["lr"] == float(max(one["tuned"], key=lambda rate: one["tuned"][rate]))
    scored = {path.name: {row.split for row in read_record(path).scores} for path in tmp_path.glob("out/*/*/0-*")}
    assert scored.pop(f"0-{one['lr']:g}") == {"validation", "test"}
    assert list(scored.values()) == [{"validation"}]  # the rate that was not chosen never saw the test cases
    assert 0 <= one["dice"]["macro"]["mean"] <= 1
    assert one["dice"]["macro"]["subjects"] == len({subject for subject, _ in one["cases"]["large"].values()})
    assert 0 < one["mb_up"] < one["mb_down"] / 3  # 8 bits against 32
    assert one["shares"] == {"large": 1.0}
    bench.run.main(command)  # nothing to do
    assert bench.rows.read_results(tmp_path / "results" / "hippocampus.jsonl") == found
    assert (tmp_path / "results" / "hippocampus.jsonl").read_text().count("\n") == 1
