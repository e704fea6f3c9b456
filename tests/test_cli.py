"""The commands, end to end on a tiny study: what they write, say and refuse, and that nothing is lost."""

import csv
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from commands import Command, refused, same_model
from fedscan.ledger import read_record
from fedscan.report.values import of_runs, write_scores
from fedscan.studyfile import load, read_cases
from nifti import image, label, write
from shared import shared
from tinystudy import write_study

torch.set_num_threads(1)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom fedscan.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit as e:\n"
        "    heavy = {'torch', 'pydantic', 'monai', 'numpy', 'rich', 'scipy', 'nibabel'} & set(sys.modules)\n"
        "    sys.exit(f'imported: {heavy}' if heavy or e.code else 0)\n"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    for command in (
        "demo",
        "run",
        "compare",
        "predict",
        "report",
        "methods",
        "show",
        "models",
        "tasks",
        "ledger",
        "data",
    ):
        assert f"  {command} " in made.stdout


def test_run_writes_record_model_and_report(fedscan: Command, tmp_path: Path) -> None:
    write_study(tmp_path, more="[scores]\ntolerance = {ball = 2.0}\n")
    said = fedscan("run", "study.toml", "--set", "train.rounds=1", "--out", "here")
    assert said.code == 0, said.err
    assert "round 1/1" in said.err
    assert "report  here/report.html" in said.out
    assert "model   here/model.safetensors" in said.out
    for name in ("study.toml", "study.json", "journal.sqlite", "model.safetensors", "report.html"):
        assert (tmp_path / "here" / name).stat().st_size > 0
    told = json.loads((tmp_path / "here" / "study.json").read_text())
    assert (told["train"]["rounds"], told["train"]["batch"]) == (1, 2)
    record = read_record(tmp_path / "here")
    assert record.study_hash == told["hash"]
    assert record.command == "fedscan run study.toml --set train.rounds=1 --out here"
    assert {s.metric for s in record.scores if s.split == "test"} >= {"dice", "hd95", "nsd"}
    assert {s.metric for s in record.scores if s.split == "validation"} == {"dice"}
    refused(fedscan("run", "study.toml", "--out", "here"), "already holds a run; add --resume")
    refused(fedscan("run", "study.toml", "--out", "here", "--resume"), "another study (train.rounds was 1 and is 2)")
    shutil.copy(tmp_path / "scans" / "east0_t1.nii", tmp_path / "scans" / "east1_t1.nii")
    (tmp_path / "scans" / "east2_t1.nii").unlink()
    again = fedscan("run", "study.toml", "--set", "train.rounds=1", "--out", "here", "--resume")
    refused(again, "the cases have changed since the run in here began")


def test_the_record_of_a_run(done: Path) -> None:
    record = read_record(done / "run")
    assert (record.name, record.method, record.seed, record.rounds) == ("balls", "fedavg", 1, 2)
    assert record.labels == {"ball": 1}
    assert [(s.name, s.expected, s.used, s.train, s.validation, s.test) for s in record.sites] == [
        ("east", 5, 5, 3, 1, 1),
        ("west", 5, 5, 3, 1, 1),
    ]
    asked = [(t.round, t.site, t.question) for t in record.turns]
    assert asked == [
        (r, site, question)
        for r, questions in ((1, ("learn", "evaluate")), (2, ("learn", "evaluate")), (3, ("evaluate",)))
        for question in questions
        for site in ("east", "west")
    ]
    assert all(t.status == "answered" and t.bytes_up > 0 and t.numbers.get("loss", 1) > 0 for t in record.turns)
    assert {t.privacy for t in record.turns} == {"weights", "statistics"}
    assert set(record.comparisons) == {"local-only"}
    assert {(s.trained_at, s.tested_at) for s in record.comparisons["local-only"]} == {
        (a, b) for a in ("east", "west") for b in ("east", "west")
    }
    assert [(o.site, o.rank, o.image.shape) for o in record.overlays] == [
        ("east", "best", (16, 16, 16)),
        ("west", "best", (16, 16, 16)),
    ]
    east = record.overlays[0]
    dice = 2 * ((east.prediction == 1) & (east.reference == 1)).sum() / (east.prediction.sum() + east.reference.sum())
    assert dice == pytest.approx(east.dice)
    assert east.spacing == (2.0, 1.0, 1.0)
    assert "32 arrays of weights travel (22,310 numbers), and nothing of the network stays" in record.travels
    assert record.versions["torch"] == torch.__version__.split("+")[0] or "+" in record.versions["torch"]


def test_unsettled_rows_are_not_in_the_record(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "run", tmp_path / "run")
    import sqlite3

    db = sqlite3.connect(tmp_path / "run" / "journal.sqlite")
    db.execute("UPDATE head SET round = 1")
    db.commit()
    db.close()
    assert {t.round for t in read_record(tmp_path / "run").turns} == {1}
    with pytest.raises(ValueError, match="holds no run"):
        read_record(tmp_path)


def test_other_ways_to_carry_it_out_give_the_same_bits(fedscan: Command, done: Path) -> None:
    study = done / "study.toml"
    for name, words in (("strict", ["--strict"]), ("workers", ["--workers", 2])):
        said = fedscan("run", study, "--out", name, "--cache", done / "cache", "--set", "run.baselines=[]", *words)
        assert said.code == 0, said.err
        assert same_model(done / "run", Path(name))


@pytest.mark.parametrize("turned", [False, True])
def test_predict_on_the_scans_own_grid(fedscan: Command, done: Path, tmp_path: Path, turned: bool) -> None:
    source = nibabel.load(done / "scans" / "west0_t1.nii")
    affine, voxels = source.affine, source.get_fdata()[:, :, :12]
    if turned:  # left-handed, axes in another order
        voxels, affine = (
            voxels.transpose(2, 0, 1)[::-1],
            np.array([[0, -1.0, 0, 9], [0, 0, 1, 5], [2, 0, 0, 7], [0, 0, 0, 1]]),
        )
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(voxels, np.float32), affine), tmp_path / "scan.nii.gz")
    assert fedscan("predict", done / "run", "scan.nii.gz", "-o", "out/seg.nii.gz").code == 0
    made = nibabel.load(tmp_path / "out" / "seg.nii.gz")
    assert made.shape == voxels.shape
    assert np.allclose(made.affine, affine)
    assert set(np.unique(made.get_fdata())) <= {0, 1}
    for words, sentence in (
        (("none.nii", "-o", "x.nii"), "none.nii does not exist"),
        (("scan.nii.gz", "-o", "x.png"), "ends in .nii or .nii.gz"),
        (("scan.nii.gz", "scan.nii.gz", "-o", "x.nii"), "2 scans for a model that reads t1: give that one"),
        (("scan.nii.gz", "-o", "x.nii", "--device", "cuda:99"), "--device cuda:99: a device that torch finds on this"),
        (("scan.nii.gz", "-o", "scan.nii.gz"), "is the scan itself, which would be lost"),
        (("scan.nii.gz", "-o", "out/../scan.nii.gz"), "is the scan itself, which would be lost"),
        (("scan.nii.gz", "-o", "x.nii", "--site", "north"), "the run has the sites east, west"),
    ):
        refused(fedscan("predict", done / "run", *words), sentence)
    assert nibabel.load(tmp_path / "scan.nii.gz").get_data_dtype() == np.float32
    shutil.copytree(done / "run", "hurt")
    for state in Path("hurt/state").iterdir():
        state.write_bytes(state.read_bytes()[:100])
    refused(fedscan("predict", "hurt", "scan.nii.gz", "-o", "x.nii"), "the run in hurt is damaged: hurt/state/3")


def test_predict_with_a_site_of_its_own(fedscan: Command, done: Path) -> None:
    run, scan = done / "run" / "baselines" / "local-only", done / "scans" / "west0_t1.nii"
    refused(fedscan("predict", run, scan, "-o", "x.nii"), "choose one with --site: east, west")
    for site in ("east", "west"):
        assert fedscan("predict", run, scan, "-o", f"{site}.nii", "--site", site).code == 0
    east, west = (nibabel.load(f"{site}.nii").get_fdata() for site in ("east", "west"))
    assert not np.array_equal(east, west)


def test_compare_goes_on_where_it_stood(fedscan: Command, tmp_path: Path) -> None:
    write_study(tmp_path, more="[methods.fedprox]\nmu = 0.5\n")
    words = ("compare", "study.toml", "--set", "train.rounds=1", "--set", "data.seed=0", "--out", "c")
    refused(fedscan(*words, "--methods", "fedavg,fedporx"), "(was 'fedprox' meant?)")
    refused(fedscan(*words, "--methods", "fedavg,fedavg"), "each once")
    assert not (tmp_path / "c").exists()
    said = fedscan(*words, "--methods", "fedavg,local-only")
    assert said.code == 0
    assert "compared with" in said.out
    fedavg, alone = said.out.splitlines()[2:4]
    assert ("kB" in fedavg, "kB" in alone) == (True, False), said.out
    assert said.out.count("hospitals that train alone send nothing") == 1
    model = tmp_path / "c" / "fedavg" / "1" / "model.safetensors"
    before = model.stat().st_mtime_ns
    said = fedscan(*words, "--methods", "fedprox,fedavg", "--json")
    assert said.code == 0
    assert before == model.stat().st_mtime_ns
    assert json.loads((tmp_path / "c" / "fedprox" / "1" / "study.json").read_text())["method"]["mu"] == 0.5
    prox, fedavg = json.loads(said.out)
    assert [(row["name"], row["seeds"]) for row in (prox, fedavg)] == [("fedprox", 1), ("fedavg", 1)]
    assert prox["difference"] is None
    assert fedavg["difference"]["difference"] == pytest.approx(fedavg["dice"]["mean"] - prox["dice"]["mean"])
    assert (tmp_path / "c" / "comparison.html").stat().st_size > 0
    assert (tmp_path / "c" / "fedavg" / "1" / "report.html").stat().st_size > 0
    said = fedscan(*words, "--methods", "fedavg", "--set", "train.lr=0.5")
    refused(said, "another study (train.lr was 0.01 and is 0.5)")


def test_tables_as_json(fedscan: Command, done: Path) -> None:
    methods = json.loads(fedscan("methods", "--json").out)
    assert {"fedavg", "fedsegnet", "centralised"} <= {m["name"] for m in methods}
    assert {"fedsegnet", "unet"} <= {m["name"] for m in json.loads(fedscan("models", "--json").out)}
    assert json.loads(fedscan("tasks", "--json").out)[0]["name"] == "segmentation"
    shown = json.loads(fedscan("show", "fedprox", "--json").out)
    assert shown["hyperparameters"]["mu"]["allowed"] == "a number of at least 0"
    words = ("run", done / "study.toml", "--out", done / "run", "--resume", "--cache", done / "cache", "--json")
    told = json.loads(fedscan(*words).out)
    assert [(site["name"], set(site["dice"])) for site in told["sites"]] == [
        ("east", {"fedavg", "local-only"}),
        ("west", {"fedavg", "local-only"}),
    ]
    record = read_record(done / "run")
    assert told["hash"] == record.study_hash
    for by in ("site", "round", "question"):
        rows = json.loads(fedscan("ledger", done / "run", "--by", by, "--json").out)
        assert {row[by] for row in rows} == {getattr(t, by) for t in record.turns}
        assert sum(row["bytes_up"] for row in rows) == sum(t.bytes_up for t in record.turns)
        assert sum(row["answered"] for row in rows) == len(record.turns) == 10
        assert all(("used" in row) == (by == "site") for row in rows)
    found = json.loads(fedscan("data", "check", done / "scans", "--json").out)
    assert [(row["site"], row["used"]) for row in found["sites"]] == [("east", 5), ("west", 5)]


def test_a_check_warns_of_what_is_in_no_case(fedscan: Command, done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "scans", "scans")
    rows = [line.split(",") for line in Path("scans/cases.csv").read_text().splitlines()]
    table = [",".join([*row[:4], "t2" if i == 0 else "", row[4]]) for i, row in enumerate(rows)]
    Path("scans/cases.csv").write_text("\n".join(table) + "\n")
    Path("scans/cases.json").write_text('{"labels": {"ball": 1, "rim": 2}}')
    said = fedscan("data", "check", "scans")
    assert said.code == 0
    assert "warning: Sequence 't2' is in none of the 10 cases" in said.out
    assert "warning: Label 'rim' (value 2) is in none of the 10 label maps" in said.out
    found = json.loads(fedscan("data", "check", "scans", "--json").out)
    assert [sentence.partition(" is in none ")[0] for sentence in found["warnings"]] == [
        "Sequence 't2'",
        "Label 'rim' (value 2)",
    ]
    study = done / "study.toml"  # reads all sequences, and knows the label "ball" only
    found = json.loads(fedscan("data", "check", "scans", "--study", study, "--json").out)
    assert [sentence.partition(" is in none ")[0] for sentence in found["warnings"]] == ["Sequence 't2'"]
    more = study.read_text().replace("[data]", '[data]\nsequences = ["t1"]').replace("ball = 1", "ball = 1, shell = 7")
    Path("other.toml").write_text(more)
    found = json.loads(fedscan("data", "check", "scans", "--study", "other.toml", "--json").out)
    assert [sentence.partition(" is in none ")[0] for sentence in found["warnings"]] == ["Label 'shell' (value 7)"]
    assert "warning" not in fedscan("data", "check", done / "scans", "--study", study).out


def test_a_folder_is_written_as_a_table_to_put_hospitals_into(fedscan: Command, tmp_path: Path) -> None:
    for i, values in enumerate(((1,), (1, 2), (2, 2))):
        write(tmp_path / "lits" / f"volume-{i}.nii", image(i) * 100)
        write(tmp_path / "lits" / f"segmentation-{i}.nii", label(*values))
    said = fedscan("data", "check", "lits")
    assert "label values: 1 (liver) in 2 cases, 2 (tumour) in 2 cases\n" in said.out
    assert 'warning: The scans are CT, in Hounsfield units, and normalise = "zscore" scales each by its own' in said.out
    elsewhere = fedscan("data", "check", "lits", "--write", write(tmp_path / "x" / "y.nii", image()).with_name("t.csv"))
    refused(elsewhere, "does not lie below")
    assert "as files of a table must: write lits/t.csv" in elsewhere.err
    assert not (tmp_path / "x" / "t.csv").exists()
    said = fedscan("data", "check", "lits", "--write", "lits")
    assert said.code == 0
    assert "lits/cases.csv lists 3 cases, and cases.json their labels. Now put each case's hospital into" in said.out
    assert "the column site (it holds 'all')" in said.out
    table = Path("lits/cases.csv")
    table.write_text(table.read_text().replace("volume-2,all,", "volume-2,north,"))
    found = json.loads(fedscan("data", "check", "lits/cases.csv", "--json").out)
    assert [(row["site"], row["used"]) for row in found["sites"]] == [("all", 2), ("north", 1)]
    assert found["labels"] == {"liver": 1, "tumour": 2}
    assert [(v["value"], v["name"], v["cases"]) for v in found["label_values"]] == [(1, "liver", 2), (2, "tumour", 2)]
    refused(fedscan("data", "check", "lits", "--write", "lits/cases.csv"), "lits/cases.csv exists already, and is not")
    Path("lits/dataset.json").write_text("{}")
    refused(fedscan("data", "check", "lits", "--write", "lits/dataset.csv"), "lits/dataset.json exists already")
    assert Path("lits/dataset.json").read_text() == "{}"


def test_scans_in_a_unit_and_a_scheme_without_one_are_noted(fedscan: Command, tmp_path: Path) -> None:
    """In the check, in the run and at the head of the report; a scheme that suits them says nothing."""
    study = write_study(tmp_path)
    Path("scans/cases.json").write_text('{"labels": {"ball": 1}, "intensity": "ct"}')
    sentence = 'The scans are CT, in Hounsfield units, and normalise = "zscore" scales each by its own mean'
    assert sentence in fedscan("data", "check", "scans", "--study", study).out
    suited = tmp_path / "window.toml"
    window = 'normalise = "ct"\nct_window = [-1.0, 4.0]\n'
    suited.write_text(study.read_text().replace("[data]\n", f"[data]\n{window}"))
    assert "warning" not in fedscan("data", "check", "scans", "--study", suited).out
    said = fedscan("run", study, "--set", "train.rounds=1")
    assert said.code == 0
    assert f"note: {sentence}" in said.err
    assert any(note.startswith(sentence) for note in read_record(tmp_path / "runs" / "balls").notes)
    assert read_cases(load(suited), tmp_path / "cache").notes == ()
    Path("scans/cases.json").write_text('{"labels": {"ball": 1}, "intensity": "mri"}')
    assert read_cases(load(study), tmp_path / "cache").notes == ()
    (note,) = read_cases(load(suited), tmp_path / "cache").notes
    assert note.startswith('The scans are MRI, whose intensities have no unit, and normalise = "ct"')


def test_tables_as_text(fedscan: Command, done: Path) -> None:
    for words, line in (
        (("methods",), "fedprox"),
        (("models",), "swin-unetr"),
        (("tasks",), "segmentation"),
        (("show", "fedprox"), "mu = 0.01  (a number of at least 0)"),
        (("ledger", done / "run"), "east"),
        (("ledger", done / "run", "--by", "round"), "3 (test)"),
        (("data", "check", done / "scans"), "1 x 1 x 2"),
        (("report", done / "run"), "report"),
        (("--version",), "."),
    ):
        said = fedscan(*words)
        assert (said.code, said.err) == (0, "")
        assert line in said.out


@pytest.mark.slow
@pytest.mark.parametrize("method", ["centralised", "ensemble", "cwt", "local-only", "fedbn", "fedsegnet"])
def test_methods_of_every_kind_end_in_a_report(fedscan: Command, tmp_path: Path, method: str) -> None:
    write_study(tmp_path, method)
    assert fedscan("run", "study.toml", "--out", "run").code == 0
    record = read_record(tmp_path / "run")
    own = {"east", "west"} if method == "local-only" else {"pooled" if method == "centralised" else "federation"}
    assert {row.trained_at for row in record.scores} == own
    assert {row.tested_at for row in record.scores} == {"east", "west"}
    assert len(record.overlays) == 2
    site = ["--site", "west"] if method in ("local-only", "fedbn") else []
    assert fedscan("predict", "run", "scans/west0_t1.nii", "-o", "seg.nii", *site).code == 0


@pytest.mark.slow
def test_real_scans_end_to_end(fedscan: Command, tmp_path: Path) -> None:
    """Thirty hippocampus scans of 15 people at five sites, two rounds: it learns, and the report is written."""
    source = shared("hippocampus")
    head, *rows = (source / "cases.csv").read_text().splitlines()
    small = tmp_path / "small"
    people: dict[str, set[str]] = {"float": set(), "8bit": set(), "large": set()}
    kept = [head]
    for row in rows:
        _, person, _, _, _, group, *_ = row.split(",")
        if person in people[group] or len(people[group]) < (9 if group == "float" else 3):
            people[group].add(person)
            kept.append(row)
    small.mkdir()
    (small / "cases.csv").write_text("\n".join(kept) + "\n")
    for part in ("images", "labels"):
        (small / part).symlink_to(source / part)
    (tmp_path / "study.toml").write_text(
        '[data]\ncases = "small"\ngrid = [24, 24, 24]\n[model]\npreset = "tiny"\n[method]\nname = "fedsegnet"\n'
        '[train]\nrounds = 2\nepochs = 2\noptimiser = "adam"\nlr = 0.005\n'
    )
    said = fedscan("run", "study.toml", "--out", "run")
    assert said.code == 0, said.err
    record = read_record(tmp_path / "run")
    assert record.labels == {"anterior": 1, "posterior": 2}
    assert len(record.sites) == 5
    losses = [[t.numbers["loss"] for t in record.turns if t.round == r and "loss" in t.numbers] for r in (1, 2)]
    assert np.mean(losses[1]) < np.mean(losses[0])
    assert (tmp_path / "run" / "report.html").stat().st_size > 0


def test_the_ledger_counts_cases_and_says_why_some_are_left_out(fedscan: Command, tmp_path: Path) -> None:
    """A hospital without an answer stands there too; the pooled site, which is none, has no count."""
    write_study(tmp_path, "centralised")
    (tmp_path / "scans" / "east3_label.nii").write_bytes(b"no scan")
    rounds = ("--set", "train.rounds=1", "--set", "run.baselines=[]")
    assert fedscan("run", "study.toml", "--out", "here", *rounds, "--set", "data.left_out_limit=0.5").code == 0
    east, pooled, west = json.loads(fedscan("ledger", "here", "--json").out)
    assert [(r["site"], r["expected"], r["used"], r["left_out"], r["answered"] > 0) for r in (east, pooled, west)] == [
        ("east", 5, 4, 1, False),
        ("pooled", None, None, None, True),
        ("west", 5, 5, 0, False),
    ]
    (reason,) = east["reasons"]
    assert reason["case"] == "east3"
    assert "east3_label.nii" in reason["why"]
    table = fedscan("ledger", "here").out.splitlines()
    assert re.split(r"  +", table[0])[:4] == ["site", "expected", "used", "left out"]
    assert table[2].split()[:4] == ["east", "5", "4", "1"]


def test_every_score_stands_in_a_table(fedscan: Command, done: Path, tmp_path: Path) -> None:
    """One line for each case, structure and metric, of a run with its baselines and of a comparison."""
    assert fedscan("report", done / "run", "--out", "apart").out.count("apart/") == 2
    assert (tmp_path / "apart" / "report.html").stat().st_size > 0
    record = read_record(done / "run")
    lines = list(csv.DictReader((tmp_path / "apart" / "scores.csv").read_text(encoding="utf-8").splitlines()))
    assert len(lines) == len(record.scores) + sum(map(len, record.comparisons.values()))
    ours = [line for line in lines if line["method"] == "fedavg"]
    for line, row in zip(ours, record.scores, strict=True):
        assert (line["case"], line["subject"], line["tested_at"]) == (row.case, row.subject, row.tested_at)
        assert (line["label"], line["metric"], line["split"]) == (row.label, row.metric, row.split)
        assert (float(line["value"]) if line["value"] else None) == row.value
    assert {line["split"] for line in lines if line["method"] == "local-only"} == {"test"}
    two = {"fedavg": [record, replace(record, seed=2)], "fedprox": [record]}
    table = write_scores(of_runs(two), tmp_path).read_text().splitlines()
    assert len(table) == 1 + 3 * len(record.scores)
    assert [sum(line.startswith(start) for line in table) for start in ("fedavg,1,", "fedavg,2,", "fedprox,1,")] == [
        len(record.scores)
    ] * 3


def test_a_run_that_learned_nothing_says_so(fedscan: Command, tmp_path: Path) -> None:
    """Nobody answered, and the table alone would look like any other."""
    write_study(tmp_path, more="[run]\nsilent = {east = [1], west = [1]}\n")
    words = ("--set", "train.rounds=1", "--set", "scores.hd95=hd95_pooled", "--out", "here")
    said = fedscan("run", "study.toml", *words)
    assert said.code == 0, said.err
    nothing = "warning: Nothing was learned in 1 round of 1 (1): no hospital gave a usable answer."
    assert nothing in said.out
    said = fedscan("compare", "study.toml", *words[:-1], "c", "--methods", "fedavg")
    assert nothing in said.out
    assert "HD95 pooled (mm)" in said.out.splitlines()[0]
    assert (tmp_path / "c" / "scores.csv").stat().st_size > 0


def test_a_ledger_that_was_changed_is_found(fedscan: Command, done: Path, tmp_path: Path) -> None:
    run = shutil.copytree(done / "run", tmp_path / "run")
    sound = fedscan("ledger", "verify", run)
    assert sound.code == 0
    assert "are as they were sealed." in sound.out
    assert "no hospital has signed it" in sound.out
    seal = json.loads(fedscan("ledger", "verify", run, "--json").out)["seal"]
    assert seal == read_record(run).seal
    assert fedscan("ledger", "verify", run, "--seal", seal).code == 0
    assert "it was cut, or made anew" in fedscan("ledger", "verify", run, "--seal", "0" * 64).err
    assert "a seal is 64 hexadecimal digits; copy it" in fedscan("ledger", "verify", run, "--seal", "abc").err
    assert "no hospital has signed it" in fedscan("ledger", "verify", run, "--root", "0" * 64).err
    with closing(sqlite3.connect(run / "journal.sqlite")) as db:
        db.execute("UPDATE scores SET value = value + 0.01 WHERE round = 1 AND value IS NOT NULL")
        db.commit()
    changed = fedscan("ledger", "verify", run)
    assert changed.code == 2
    assert "is not as it was sealed: the score 1 validation" in changed.err
