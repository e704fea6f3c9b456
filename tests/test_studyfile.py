"""A study file: every mistake is named by file and line; equal studies have equal hashes; a study builds and runs."""

import json
import re
import sqlite3
import tomllib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from fedscan.data.records import IGNORED
from fedscan.run import Problem, run
from fedscan.studyfile import again, build, load, read_cases
from fedscan.studyfile.places import lines_of
from fedscan.tasks.registry import TaskCard
from tinystudy import write_scans, write_study

torch.set_num_threads(1)

BASE = """\
name = "balls"
seed = 3

[data]
cases = "scans"
grid = [16, 16, 16]

[data.partition]
how = "true"

[task]
labels = {ball = 1, rim = [2, 3]}

[method]
name = "fedprox"
mu = 0.1

[model]
name = "unet"
preset = "tiny"

[train]
rounds = 2
lr = 0.1

[run]
silent = {east = [2]}
"""


def study(tmp_path: Path, text: str = BASE, *overrides: str, **more: Any) -> Any:
    path = tmp_path / "study.toml"
    path.write_text(text)
    return load(path, overrides, **more)


def refused(tmp_path: Path, old: str, new: str) -> str:
    """What is said where ``old`` of the good study is ``new``; the sentence begins with file and line."""
    assert old in BASE
    text = BASE.replace(old, new)
    with pytest.raises(Problem) as e:
        study(tmp_path, text)
    said = str(e.value)
    assert said.startswith(f"{tmp_path / 'study.toml'}, line ")
    assert "\n" not in said
    line = int(re.search(r", line (\d+)", said)[1])
    changed = new.strip().split("\n")[0]
    assert changed in text.split("\n")[line - 1], f"line {line} is not where {changed!r} stands"
    return said.split(": ", 1)[1]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("rounds = 2", "ronds = 2", "[train] has no key 'ronds' (was 'rounds' meant?); known keys: optimiser, lr, "),
        ("seed = 3", "sede = 3", "a study has, outside its tables, no key 'sede' (was 'seed' meant?)"),
        ("seed = 3", "epochs = 3", "no key 'epochs' (it belongs in [train])"),
        ("how = ", "howw = ", "[data.partition] has no key 'howw' (was 'how' meant?)"),
        ("mu = 0.1", "nu = 0.1", "[method] has no key 'nu'"),
        ('preset = "tiny"', 'widht = "tiny"', "[model] has no key 'widht' (was 'widths' meant?)"),
        ("[train]", "[trian]", "no key 'trian' (was 'train' meant?)"),
        ("lr = 0.1", 'lr = "fast"', 'train.lr = "fast", but a number above 0 and of at most 1000000 belongs there.'),
        ("lr = 0.1", "lr = true", "train.lr = true, but a number above 0 and of at most 1000000 belongs there."),
        ("lr = 0.1", "lr = nan", "train.lr = NaN, but a number above 0 and of at most 1000000 belongs there."),
        ("lr = 0.1", "lr = 1e300", "train.lr = 1e+300, but a number above 0 and of at most 1000000 belongs there."),
        ("lr = 0.1", "weight_decay = 1e300", "but a number of at least 0 and of at most 1000000 belongs there."),
        ("rounds = 2", "rounds = 2.5", "train.rounds = 2.5, but a whole number of at least 1 belongs there."),
        ("rounds = 2", "rounds = 0", "train.rounds = 0, but a whole number of at least 1 belongs there."),
        ("lr = 0.1", "momentum = 1", "train.momentum = 1, but a number of at least 0 and below 1 belongs there."),
        ("lr = 0.1", 'optimiser = "adma"', 'but one of "sgd", "adam", "adamw" belongs there (was \'adam\' meant?)'),
        ("lr = 0.1", "optimiser = 3", 'but one of "sgd", "adam", "adamw" belongs there.'),
        ('how = "true"', 'how = "dirichelt"', "(was 'dirichlet' meant?)"),
        ('name = "fedprox"', 'name = "fedporx"', "(was 'fedprox' meant?)"),
        ("mu = 0.1", "mu = -1", "method.mu = -1, but a number of at least 0 belongs there."),
        ("mu = 0.1", 'mu = "much"', 'method.mu = "much", but a number of at least 0 belongs there.'),
        ("mu = 0.1", "clients = 0", "method.clients = 0, but a whole number of at least 1 belongs there."),
        ('name = "unet"', 'name = "umet"', "(was 'unet' meant?)"),
        ('preset = "tiny"', 'preset = "tinny"', "but one of paper, small, tiny belongs there (was 'tiny' meant?)"),
        ('preset = "tiny"', "widths = [4, 2.5]", "must be a list whose entries are each a whole number"),
        ("grid = [16, 16, 16]", "grid = [16, 16]", "but a list of 3, each a whole number of at least 1, belongs"),
        ("grid = [16, 16, 16]", "grid = 16", "but a list of 3, each a whole number of at least 1, belongs"),
        ("[method]", "lam = 1.5\n[method]", "task.lam = 1.5, but a number of at least 0 and of at most 1"),
        ("silent = {east = [2]}", 'baselines = ["local"]', 'run.baselines = "local", but a method ('),
        ("rim = [2, 3]", "rim = 0", "task.labels.rim = 0, but for each name a whole number above 0"),
        ("silent = {east = [2]}", "silent = {east = 2}", "run.silent.east = 2, but for each name a list"),
        ("silent = {east = [2]}", 'device = "gpu"', 'but "cpu", "cuda", "cuda:N" or "auto" belongs there'),
        ("grid = [16, 16, 16]", "fractions = [0.5, 0.1, 0.1]", "three parts (train, validation, test) that sum to 1"),
        ("lr = 0.1", "lr = ", "this is not TOML"),
        ("lr = 0.1", "rounds = 3", "this is not TOML"),
        ("[run]", "[data.augmentation]", "[data.augmentation] has no key 'silent' (it belongs in [run])"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    if new == "[data.augmentation]":  # the fault is in the line below
        with pytest.raises(Problem, match="line 27") as e:
            study(tmp_path, BASE.replace(old, new))
        assert said in str(e.value)
    elif said == "this is not TOML":
        with pytest.raises(Problem, match=r"line 2\d, column \d+: this is not TOML"):
            study(tmp_path, BASE.replace(old, new))
    else:
        assert said in refused(tmp_path, old, new)


def test_settings_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"line 29: \[data.augmentation\]: scale must be \(low, high\)"):
        study(tmp_path, BASE + "\n[data.augmentation]\nscale = [2.0, 1.0]\n")
    with pytest.raises(Problem, match=r"line 8: \[data.partition\] lacks 'sites', how many there are."):
        study(tmp_path, BASE.replace('how = "true"', 'how = "quantity"'))
    with pytest.raises(Problem, match=r"\[train\] does not suit local-only"):
        study(
            tmp_path, BASE.replace('"fedprox"\nmu = 0.1', '"local-only"').replace("lr =", 'moments = "averaged"\nlr =')
        )


@pytest.mark.parametrize(("name", "folder"), [
    ("lower-grade glioma", "lower-grade glioma"), ("Köln", "Köln"), ("../../x", "-.-..-x"), ("/etc", "-etc"),
    ("a/b", "a-b"), ("a\\b", "a-b"), (".hidden", "-hidden"), ("..", "-."), ("  ", "study"),
])  # fmt: skip
def test_a_name_is_one_folder(tmp_path: Path, name: str, folder: str) -> None:
    found = study(tmp_path, BASE, f"name='{name}'")
    assert found.folder == folder
    assert Path("runs", found.folder).resolve().parent == Path("runs").resolve()


def test_a_site_may_not_be_called_what_the_record_means_otherwise(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    table = tmp_path / "scans" / "cases.csv"
    table.write_text(table.read_text().replace(",west,", ",federation,"))
    with pytest.raises(Problem, match="a site is called 'federation', which means something else in the record"):
        read_cases(load(path), tmp_path / "cache")


def test_files_that_are_no_study(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="no such file"):
        load(tmp_path / "none.toml")
    with pytest.raises(Problem, match="is a directory"):
        load(tmp_path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Problem, match="not UTF-8"):
        load(tmp_path / "bytes.toml")
    for text, said in (("train = 3", "a table, [train],"), ("[[train]]\nlr = 1", "a table, [train],")):
        with pytest.raises(Problem, match=re.escape(said)):
            study(tmp_path, text)


def test_overrides(tmp_path: Path) -> None:
    made = study(tmp_path, BASE, "train.rounds=5", "train.optimiser=adam", 'data.require=["t1"]')
    assert (made.rounds, made.step.optimiser, made.data.require) == (5, "adam", ("t1",))
    for override, said in (
        ("train.rouns=3", "--set train.rouns: [train] has no key 'rouns' (was 'rounds' meant?)"),
        ("train.rounds=x", '--set train.rounds: train.rounds = "x", but a whole number'),
        ("train.rounds", "--set train.rounds: table.key=value was meant"),
        ("seed.x=1", "--set seed.x=1: seed is a value"),
        ("data.require=[flair, t1]", 'in quotes: --set \'data.require=["flair", "t1"]\''),
        ("data.grid=[16, 16, 18", "in quotes: --set 'data.grid=[16, 16, 18]'"),
    ):
        with pytest.raises(Problem) as e:
            study(tmp_path, BASE, override)
        assert said in str(e.value)


def test_another_method_by_override_has_its_own_hyperparameters(tmp_path: Path) -> None:
    text = BASE + "\n[methods.fedavgm]\nbeta = 0.5\n"
    assert study(tmp_path, text).method_options["mu"] == 0.1
    assert study(tmp_path, text, "method.name=fedavg").method_options.keys() == {"clients", "weights"}
    assert study(tmp_path, text, "method.name=fedavgm").method_options["beta"] == 0.5
    assert study(tmp_path, text).by("fedavgm").method_options["beta"] == 0.5
    with pytest.raises(Problem, match=r"line 30: \[methods.fedavgm\] has no key 'bta' \(was 'beta' meant\?\)"):
        study(tmp_path, text.replace("beta", "bta"))


def test_the_card_names_the_model_and_the_moments(tmp_path: Path) -> None:
    text = BASE.replace('name = "unet"\n', "").replace('"fedprox"\nmu = 0.1', '"fedsegnet"')
    made = study(tmp_path, text)
    assert made.model == "fedsegnet"
    assert made.model_options["grid"] == [16, 16, 16]  # of the study, not of the preset
    assert study(tmp_path, BASE).model == "unet"
    assert study(tmp_path, BASE, "method.name=local-only").step.moments == "kept"
    assert study(tmp_path, BASE, "method.name=local-only", "train.moments=reset").step.moments == "reset"


def test_equal_studies_have_equal_hashes(tmp_path: Path) -> None:
    first = study(tmp_path)
    reordered = """# the same, written otherwise
    seed = 0x3
    name = 'balls'
    train = {lr = 1e-1, rounds = 2, batch = 4}
    method.mu = 0.10
    method.name = "fedprox"
    [model]
    preset = "tiny"
    [run]
    silent.east = [
       2,
    ]
    [task]
    labels.ball = 1
    labels.rim = [2, 3]
    kind = "segmentation"
    [data]
    cases = "elsewhere"
    grid = [
      16, 16, 16]
    """
    assert study(tmp_path, reordered).hash == first.hash
    assert again(json.loads(json.dumps(first.resolved())), tmp_path / "x.json").hash == first.hash
    changes = ("seed=4", "train.lr=0.2", "method.mu=0.2", "run.threads=2", "run.mode=fast", "data.augment=false")
    assert len({first.hash, *(study(tmp_path, BASE, change).hash for change in changes)}) == 7
    for change in ("data.cases=other", 'run.baselines=["local-only"]'):
        assert study(tmp_path, BASE, change).hash == first.hash


def test_a_key_that_came_later_leaves_the_hash_of_a_study_without_it(tmp_path: Path) -> None:
    """Otherwise no run that was stopped could be gone on with after the package was brought up to date."""
    first = study(tmp_path)
    assert "penalty" not in first.canonical()["study"]["scores"]
    ranked = study(tmp_path, BASE, "scores.penalty=image_diagonal")
    assert ranked.canonical()["study"]["scores"]["penalty"] == "image_diagonal"
    assert ranked.hash != first.hash
    assert again(json.loads(json.dumps(ranked.resolved())), tmp_path / "x.json").hash == ranked.hash
    older = json.loads(json.dumps(first.resolved()))
    del older["scores"]["penalty"]
    assert again(older, tmp_path / "x.json").hash == first.hash
    with pytest.raises(Problem, match=r'scores\.penalty = "none", but "image_diagonal" belongs there'):
        study(tmp_path, BASE, "scores.penalty=none")


def test_the_hash_knows_the_torch_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = study(tmp_path).hash
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert study(tmp_path).hash != first


def test_lines_of_awkward_toml() -> None:
    text = 'a = """\n[no]\nb = 1\n"""\n"q.r" = 2 # c\n[x . y]\nz.w = [ # [no]\n  1,\n]\n'
    text += "t = {u = 1, v = {s = 2}}\n[[l]]\nm = 1"
    assert tomllib.loads(text)
    assert lines_of(text) == {
        ("a",): 1, ("q.r",): 5, ("x", "y"): 6, ("x", "y", "z"): 7, ("x", "y", "z", "w"): 7, ("x", "y", "t"): 10,
        ("x", "y", "t", "u"): 10, ("x", "y", "t", "v"): 10, ("x", "y", "t", "v", "s"): 10, ("l",): 11, ("l", "m"): 12,
    }  # fmt: skip


def test_a_study_is_built_from_its_data(tmp_path: Path) -> None:
    file = load(write_study(tmp_path))
    cases = read_cases(file, tmp_path / "cache")
    assert [(r.name, r.expected, r.used, r.train, r.validation, r.test) for r in cases.rows] == [
        ("east", 5, 5, 3, 1, 1),
        ("west", 5, 5, 3, 1, 1),
    ]
    made = build(file, cases)
    assert (made.names, made.rounds, made.seed, made.hash) == (("east", "west"), 2, 1, file.hash)
    batch, info = made.splits("west").test.case(0)
    assert (batch.x.shape, batch.y.shape, info.site) == ((1, 1, 16, 16, 16), (1, 16, 16, 16), "west")
    pooled = build(file.by("centralised"), cases)
    assert pooled.names == ("pooled",)
    assert sorted(pooled.splits("pooled").train.names) == sorted(
        [*made.splits("east").train.names, *made.splits("west").train.names]
    )
    assert {p.site for p in pooled.splits("pooled").test.prepared} == {"east", "west"}


def test_what_cannot_be_trained_on_is_found_before_any_round(tmp_path: Path) -> None:
    write_scans(tmp_path / "scans", ("east",), 5)
    path = write_study(tmp_path)
    path.write_text(path.read_text().replace("grid = [16, 16, 16]\n", ""))
    cases = read_cases(load(path), tmp_path / "cache")
    assert build(load(path), cases).rounds == 2
    with pytest.raises(Problem, match=r"built for the grid \(32, 32, 32\) and takes no other, not \(16, 16, 16\)"):
        build(load(path, ["model.name=unetr"]), cases)
    table = (tmp_path / "scans" / "cases.csv").read_text()
    write_scans(tmp_path / "scans", ("west",), 5, side=24)
    (tmp_path / "scans" / "cases.csv").write_text(
        table + (tmp_path / "scans" / "cases.csv").read_text().split("\n", 1)[1]
    )
    cases = read_cases(load(path), tmp_path / "cache")
    with pytest.raises(Problem, match=r"the cases have 2 sizes, such as \(16, 16, 16\) and \(24, 24, 24\)"):
        build(load(path), cases)
    assert build(load(path, ["train.batch=1"]), cases).rounds == 2
    for change, said in (("flip=[5]", "flip names an axis of (5,)"), ("rotate=[5.0]", "rotate gives 1 angles")):
        with pytest.raises(Problem) as e:
            load(path, ["data.augment=true", f"data.augmentation.{change}"])
        assert said in str(e.value)


@pytest.mark.parametrize(("epochs", "accumulate"), [(1, 1), (3, 1), (3, 2)])
def test_pooled_cases_are_trained_on_for_as_many_steps(tmp_path: Path, epochs: int, accumulate: int) -> None:
    """3 and 5 cases by 2 are 2 + 3 batches an epoch, where 8 pooled cases are 4; accumulated steps end at each site."""
    write_scans(tmp_path / "scans", ("east",), 5)
    table = (tmp_path / "scans" / "cases.csv").read_text()
    write_scans(tmp_path / "scans", ("west",), 9)
    (tmp_path / "scans" / "cases.csv").write_text(
        table + (tmp_path / "scans" / "cases.csv").read_text().partition("\n")[2]
    )
    settings = [f"train.epochs={epochs}", f"train.accumulate={accumulate}", "train.rounds=1"]
    file = load(write_study(tmp_path), settings)
    cases = read_cases(file, tmp_path / "cache")
    assert [row.train for row in cases.rows] == [3, 5]
    steps = {}
    for name in ("fedavg", "centralised"):
        run(build(file.by(name), cases), tmp_path / name)
        db = sqlite3.connect(tmp_path / name / "journal.sqlite")
        found = db.execute("SELECT numbers FROM turns WHERE question = 'learn'").fetchall()
        steps[name] = sum(json.loads(numbers)["steps"] for (numbers,) in found)
        db.close()
    by_hand = {(1, 1): 2 + 3, (3, 1): 6 + 9, (3, 2): 3 + 5}
    assert steps == dict.fromkeys(steps, by_hand[epochs, accumulate])


def test_unusable_cases_are_left_out_with_their_reason_up_to_a_limit(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    (tmp_path / "scans" / "east3_t1.nii").write_bytes(b"not an image")
    cases = read_cases(load(path), tmp_path / "cache")
    east = cases.rows[0]
    assert (east.expected, east.used, [case for case, _ in east.left_out]) == (5, 4, ["east3"])
    with pytest.raises(ValueError, match="1 of 10 cases cannot be used, where the study allows 0"):
        read_cases(load(path, ["data.left_out_limit=0"]), tmp_path / "cache")


def test_data_that_do_not_suit_the_study_are_named(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    for change, said in (
        ('data.sequences=["t2"]', 'data.sequences = "t2", but a sequence that the cases have (t1)'),
        ('data.require=["t2"]', 'data.require = "t2"'),
        ('data.sites=["north"]', 'data.sites = "north", but a site of the data (east, west)'),
        ('data.sequences=["t1", "t1"]', "each sequence once belongs there"),
        ("data.spacing=[1, 1, 1]", "grid and spacing exclude each other"),
    ):
        with pytest.raises((Problem, ValueError)) as e:
            read_cases(load(path, [change]), tmp_path / "cache")
        assert said in str(e.value)
    cases = read_cases(load(path), tmp_path / "cache")
    for change, said in (
        ("run.silent.north=[1]", 'run.silent.north = "north", but a site (east, west)'),
        ("scores.tolerance.bal=1.0", "a label (ball) belongs there (was 'ball' meant?)"),
        ("model.widths=[4]", "model: widths must be two or more"),
        ("data.grid=[16, 16, 18]", "--set data.grid: data.grid: "),
        ("data.patch=[8, 8, 6]", "--set data.patch: data.patch: "),
    ):
        with pytest.raises(Problem) as e:
            build(load(path, [change]), cases)
        assert said in str(e.value)


def test_regions_are_scored_and_their_values_learned_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_study(tmp_path)
    path.write_text(path.read_text().replace("{ball = 1}", "{ball = [1, 4], rim = 4}"))
    file = load(path)
    cases = read_cases(file, tmp_path / "cache")
    task: Any = build(file, cases).task
    assert (task.classes, dict(task.labels)) == (3, {"ball": (1, 2), "rim": 2})
    assert task.penalty is None
    asking = load(path, ["scores.penalty=image_diagonal"])
    ranked: Any = build(asking, cases).task
    assert ranked.penalty == "image_diagonal"

    def make(networks: Any, labels: Any, classes: int, window: Any, tolerance: Any, hd95: str, **options: Any) -> None:
        """A task that knows no penalty, as another package may bring one."""

    monkeypatch.setattr("fedscan.studyfile.building.tasks", lambda: {"segmentation": TaskCard("segmentation", make)})
    with pytest.raises(Problem, match="the task 'segmentation' knows no penalty, belongs there"):
        build(asking, cases)
    assert cases.recipe.labels == {1: 1, 4: 2}


def with_ignored(folder: Path) -> None:
    """Gives every label map of the tiny study a slab of the value 2, which ``cases.json`` says is to be ignored."""
    for path in (folder / "scans").glob("*_label.nii"):
        seen = nibabel.load(path)
        values = np.asarray(seen.dataobj).copy()
        values[:, :, 12:] = 2
        nibabel.save(nibabel.Nifti1Image(values, seen.affine), path)
    (folder / "scans" / "cases.json").write_text('{"labels": {"ball": 1, "ignore": 2}}')


@pytest.mark.parametrize("named", ["", "[task]\nlabels = {ball = 1}\n", "[task]\nlabels = {ball = 1, ignore = 2}\n"])
def test_what_data_say_is_ignored_is_left_out_of_training_and_scores(tmp_path: Path, named: str) -> None:
    path = write_study(tmp_path)
    with_ignored(tmp_path)
    path.write_text(path.read_text().replace("[task]\nlabels = {ball = 1}\n", named))
    file = load(path)
    cases = read_cases(file, tmp_path / "cache")
    assert dict(cases.labels) == {"ball": 1, "ignore": 2}
    assert cases.notes == (
        "Voxels with the label 'ignore' (2) are left out: they are neither trained on nor scored, and are shown as "
        "background.",
    )
    study = build(file, cases)
    task: Any = study.task
    assert (task.classes, dict(task.labels), task.ignored) == (2, {"ball": 1}, IGNORED)
    (train, *_) = study.data("east")
    found = train.prepared[0].label
    assert found is not None
    assert set(np.unique(found).tolist()) == {0, 1, IGNORED}
    assert (found[12:] == IGNORED).all()
    assert len(train._landmarks(0)) == 1, "patches are centred on structures, not on what nobody has judged"
    state = run(study, tmp_path / "run")
    assert all(bool(leaf.isfinite().all()) for leaf in state["weights"].values())
    assert study.names == ("east", "west")


def test_what_is_ignored_is_one_value_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_study(tmp_path)
    with_ignored(tmp_path)
    good = path.read_text()
    for labels in ("{ball = 1, ignore = 1}", "{ball = [1, 2], ignore = 2}", "{ball = 1, ignore = [2, 3]}"):
        path.write_text(good.replace("{ball = 1}", labels))
        with pytest.raises(Problem, match="'ignore' means voxels that are left out, and is one value that no"):
            read_cases(load(path), tmp_path / "cache")
    path.write_text(good.replace("{ball = 1}", "{ball = 1, rest = 2}"))
    assert dict(read_cases(load(path), tmp_path / "cache").labels) == {"ball": 1, "rest": 2}, "the study's word holds"
    path.write_text(good)
    cases = read_cases(load(path), tmp_path / "cache")

    def make(networks: Any, labels: Any, classes: int, window: Any, tolerance: Any, hd95: str, **options: Any) -> None:
        """A task that knows nothing of voxels to leave out."""

    monkeypatch.setattr("fedscan.studyfile.building.tasks", lambda: {"segmentation": TaskCard("segmentation", make)})
    with pytest.raises(Problem, match="the task 'segmentation' cannot leave voxels out"):
        build(load(path), cases)


def test_sites_are_not_dealt_by_what_is_ignored(tmp_path: Path) -> None:
    write_scans(tmp_path / "scans", ("all",), 10)
    path = write_study(tmp_path)
    how = ["data.partition.how=lesion-size", "data.partition.sites=2"]
    before = read_cases(load(path, how), tmp_path / "cache")
    for i, label in enumerate(sorted((tmp_path / "scans").glob("*_label.nii"))):
        seen = nibabel.load(label)
        values = np.asarray(seen.dataobj).copy()
        values[0, :, : i * 7 % 10] = 2  # far from the ball, and larger where the ball need not be
        nibabel.save(nibabel.Nifti1Image(values, seen.affine), label)
    (tmp_path / "scans" / "cases.json").write_text('{"labels": {"ball": 1, "ignore": 2}}')
    after = read_cases(load(path, how), tmp_path / "cache")
    assert after.facts()["splits"] == before.facts()["splits"]


@pytest.mark.parametrize("how", ["quantity", "dirichlet", "intensity", "lesion-size"])
def test_simulated_sites(tmp_path: Path, how: str) -> None:
    write_scans(tmp_path / "scans", ("all",), 10)
    path = write_study(tmp_path)
    made = load(path, [f"data.partition.how={how}", "data.partition.sites=2"])
    cases = read_cases(made, tmp_path / "cache")
    assert cases.sites == ("site-1", "site-2")
    assert sum(row.used for row in cases.rows) == 10
    assert any("simulated" in note for note in cases.notes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("sites=3",), 'data.partition] sites plays no part in how = "true": leave it out'),
        (("how=intensity", "sites=2", "alpha=0.1"), 'alpha plays no part in how = "intensity"'),
        (("how=quantity", "sites=2", "labels=[1]"), 'labels plays no part in how = "quantity"'),
        (("how=lesion-size", "sites=2", "labels=[7]"), "no case has any of the labels 7"),
        (("how=intensity", "sites=2", 'sequence="t2"'), "10 subjects lack sequence 't2', such as 'all0'"),
    ],
)
def test_settings_of_a_partition_that_play_no_part_are_refused(
    tmp_path: Path, changes: tuple[str, ...], said: str
) -> None:
    write_scans(tmp_path / "scans", ("all",), 10)
    path = write_study(tmp_path)
    with pytest.raises(Problem) as e:
        read_cases(load(path, [f"data.partition.{change}" for change in changes]), tmp_path / "cache")
    assert said in str(e.value)
