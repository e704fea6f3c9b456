"""What one party may do to another, and is not let: sites, methods and files that are not as they should be."""

import hashlib
import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

import toy
from fedscan import wire
from fedscan.averaging import Train, averaging, plain_train
from fedscan.data import cache as store
from fedscan.journal import Journal
from fedscan.launch import How, describe
from fedscan.ledger import ScoreRow
from fedscan.method import Message, Method, Question, Replies, Sites, State, Tree, answer, receive
from fedscan.methods.registry import get
from fedscan.parts.around import Around
from fedscan.parts.channel import sparse
from fedscan.parts.weigh import equally
from fedscan.recorded import Answer, Letter
from fedscan.respond import respond
from fedscan.run import Problem, run
from fedscan.schema import Weights, weights_of
from fedscan.secret import BLOCK, Secret
from fedscan.site import Site, load, seed_of
from fedscan.spec import Leaves, Maybe, Refused, room
from fedscan.step import Step
from fedscan.study import Scores, Study, Turn
from fedscan.studyfile import build, read_cases
from fedscan.studyfile import load as load_study
from fedscan.tasks.segmentation import Segmentation
from fedscan.trust import Held, unsound, variances
from fedscan.wire import pack
from tinystudy import write_study

torch.set_num_threads(1)


# -- test cases --------------------------------------------------------------------------------------------------------

PEEKS: tuple[Callable[[Site], Any], ...] = (
    lambda site: site.splits.test.case(0),
    lambda site: len(site.splits.test),
    lambda site: list(site.splits.test.names),
    lambda site: site.splits.test.subjects,
    lambda site: next(site.splits.test.batches(4, site.order, site.augmentation)),
)


@pytest.mark.parametrize("peek", PEEKS)
def test_a_method_that_trains_on_test_cases_is_stopped(peek: Callable[[Site], Any], tmp_path: Path) -> None:
    def train(site: Site, model: nn.Module, message: Message) -> Tree:
        peek(site)
        return plain_train(site, model, message)

    with pytest.raises(RuntimeError, match="asked a site for its test cases"):
        run(toy.study(averaging(train)), tmp_path / "run")


def test_a_method_that_adapts_to_test_cases_when_they_are_scored_is_stopped(tmp_path: Path) -> None:
    def use(site: Site, message: Message) -> nn.Module:
        site.splits.test.case(0)
        return receive(site, message)

    with pytest.raises(RuntimeError, match="asked a site for its test cases"):
        run(toy.study(averaging(use=use)), tmp_path / "run")


# -- questions ---------------------------------------------------------------------------------------------------------


def asking(*names: str) -> Method:
    """A method with questions of these names."""

    def question(name: str) -> Any:
        def reply(site: Site, message: Message) -> Tree:
            return {}

        reply.__name__ = name
        return answer("nothing")(reply)

    return replace(averaging(), answers=tuple(map(question, names)))


@pytest.mark.parametrize(
    ("names", "said"), [(("evaluate",), "named 'evaluate', as that of the study"), (("a", "b", "a"), "named 'a'")]
)
def test_two_questions_of_one_name_are_refused(names: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        toy.study(asking(*names))


# -- secrets -----------------------------------------------------------------------------------------------------------


def test_two_keys_that_one_seed_of_32_bits_stands_for_give_other_numbers() -> None:
    """A search for two keys whose seeds are alike in their low 32 bits takes seconds; so would one for a site's key."""
    seeds: dict[int, bytes] = {}
    for i in itertools.count():
        key = i.to_bytes(32, "little")
        low = seed_of(f"{key.hex()}/1/0/noise") & 0xFFFFFFFF
        if low in seeds:
            break
        seeds[low] = key
    one, two = (seed_of(f"{k.hex()}/1/0/noise") for k in (key, seeds[low]))
    assert one != two
    assert torch.equal(*(torch.rand(9, generator=torch.Generator().manual_seed(seed)) for seed in (one, two)))
    for draw in (Secret.uniform, Secret.normal, Secret.bits):
        assert not torch.equal(draw(Secret(key, 1, 0, "noise"), 9), draw(Secret(seeds[low], 1, 0, "noise"), 9))


def test_secret_numbers_are_shake_256_of_key_label_call_and_block() -> None:
    text = (32).to_bytes(8, "little") + b"k" * 32 + b'["cairo", 1, 0, "noise", %d, %d]'
    s = Secret(b"k" * 32, "cairo", 1, 0, "noise")
    assert bytes(s.bits(5).numpy()) == hashlib.shake_256(text % (0, 0)).digest(5)
    whole = hashlib.shake_256(text % (1, 0)).digest(BLOCK) + hashlib.shake_256(text % (1, 1)).digest(8)
    assert bytes(s.bits(BLOCK // 4 + 2, dtype=torch.int32).numpy()) == whole


def test_secret_numbers_are_spread_as_they_should_be() -> None:
    s = Secret(b"k" * 32, "spread")
    n, u, bits = s.normal(99_999).double(), s.uniform(100_000), s.bits(100_000, dtype=torch.int8).double()
    assert [n.mean(), n.var(), (n**3).mean(), (n**4).mean()] == pytest.approx([0, 1, 0, 3], abs=0.05)
    assert [u.mean(), u.var() * 12, bits.mean() / 256] == pytest.approx([0.5, 1, -0.5 / 256], abs=0.01)
    assert (u.min() >= 0, u.max() < 1, bits.min(), bits.max()) == (True, True, -128, 127)
    assert s.normal(3, 0, 2).shape == s.bits(3, 0, 2).shape == (3, 0, 2)
    with pytest.raises(ValueError, match="whole numbers"):
        s.bits(3, dtype=torch.float32)


# -- cases -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["t1", "label"])
def test_a_run_is_not_gone_on_with_once_a_voxel_has_changed(what: str, tmp_path: Path) -> None:
    file = load_study(write_study(tmp_path))
    how = How(cache=tmp_path / "cache", resume=True, report=False)
    cases = read_cases(file, how.cache)
    describe(file, cases, build(file, cases), tmp_path / "run", how)
    describe(file, read_cases(file, how.cache), build(file, cases), tmp_path / "run", how)
    path = tmp_path / "scans" / f"east0_{what}.nii"
    image: Any = nibabel.load(path)
    voxels = np.asarray(image.dataobj).copy()
    voxels[0, 0, 0] += 1
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), path)
    with pytest.raises(Problem, match="the cases have changed since the run in"):
        describe(file, read_cases(file, how.cache), build(file, cases), tmp_path / "run", how)


def test_no_scan_is_hashed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    digest = store._digest
    monkeypatch.setattr(store, "_digest", lambda path: hashed.append(path) or digest(path))
    file = load_study(write_study(tmp_path))
    for _ in range(2):
        cases = read_cases(file, tmp_path / "cache")
        scans = [path for path in hashed if path.suffix == ".nii"]
        assert len(scans) == len(set(scans)) == 20
    assert (
        cases.facts()["files"]["west3"][1]
        == hashlib.sha256((tmp_path / "scans" / "west3_label.nii").read_bytes()).hexdigest()
    )


# -- numbers that are finite and too large -----------------------------------------------------------------------------


def adding(change: Callable[[str, Weights], Mapping[str, torch.Tensor]]) -> Train:
    """Training that goes as it should, after which a site's model has other leaves."""

    def train(site: Site, model: nn.Module, message: Message) -> Tree:
        report = plain_train(site, model, message)
        weights = weights_of(model)
        load(model, {**weights, **change(site.name, weights)})
        return report

    return train


def test_a_mean_that_overflows_is_not_kept(tmp_path: Path) -> None:
    """Each site's change is finite; from -3e38 to 3e38 it is further than float32 goes."""
    far = {"amsterdam": -3e38, "bergen": 3e38, "cairo": 0.0}
    method = averaging(adding(lambda site, w: {"head.bias": torch.full_like(w["head.bias"], far[site])}))
    for resume in (False, True):
        with pytest.raises(Problem, match=r"after round 1, leaf 'head.bias' of weights is not finite.*learning rates"):
            run(toy.study(method), tmp_path / "run", resume=resume)
        journal = Journal(tmp_path / "run")
        assert (journal.head, toy.same(journal.state(), toy.study(method).start())) == (0, True)
        journal.close()


def test_a_variance_that_turns_negative_is_not_kept(tmp_path: Path) -> None:
    less = {"amsterdam": -9.0, "bergen": 1.0, "cairo": 1.0}
    method = averaging(adding(lambda site, w: {"down.1.running_var": torch.full((8,), less[site])}), weigh=equally)
    with pytest.raises(Problem, match=r"after round 1, leaf 'down.1.running_var' is a running variance of -2.33"):
        run(toy.study(method), tmp_path / "run")


def test_variances_are_found_by_the_type_of_their_layer() -> None:
    model = nn.ModuleDict({"bn": nn.Linear(1, 1), "x": nn.InstanceNorm3d(2, 1e-3, track_running_stats=True)})
    model["bn"].register_buffer("running_var", torch.ones(1))
    model["y"], model["z"] = nn.GroupNorm(1, 2), nn.BatchNorm1d(2, track_running_stats=False)
    assert variances(model) == {"x.running_var": 1e-3}
    assert variances(nn.BatchNorm2d(3)) == {"running_var": 1e-5}


def test_every_number_of_a_state_is_looked_at() -> None:
    inf = torch.tensor([1.0, torch.inf])
    model = nn.Linear(1, 1)
    assert unsound({"weights": Weights({"a": -inf}), "n": 1.0}, model) == "leaf 'a' of weights is not finite"
    assert unsound({"for": {"cairo": Weights({"a": inf * 0})}}, model) == "leaf 'a' of for/cairo is not finite"
    assert unsound({"m": {"x": inf}}, model) == "m/x is not finite"
    assert unsound({"shares": {"cairo": float("nan")}}, model) == "shares/cairo is not finite"
    assert unsound({"a": torch.full((9,), 3e38), "b": torch.empty(0), "c": torch.tensor(3), "t": "x"}, model) == ""


# -- cases that a site says it has -------------------------------------------------------------------------------------


def told(count: Callable[[Site], int]) -> Method:
    """FedAvg, to which sites answer with another count of cases."""
    method = averaging()
    learn = method.answers[0]

    def reply(site: Site, message: Message) -> Tree:
        return {**learn(site, message), "cases": count(site)}

    asked = replace(learn, reply=reply)

    def round(sites: Sites, state: State) -> State:
        return method.round(Replaced(sites, asked), state)

    return replace(method, round=round, answers=(asked,))


class Replaced(Around):
    """Sites that are put another question than the one that the round puts."""

    def __init__(self, sites: Sites, question: Question) -> None:
        super().__init__(sites)
        self.question = question

    def ask_each(self, question: Question, messages: Mapping[str, Message], *, need: int = 1) -> Replies:
        return super().ask_each(self.question, messages, need=need)


def refusals(folder: Path) -> dict[tuple[int, str], str]:
    """Why which site was refused in which round."""
    journal = Journal(folder)
    rows = {(row.turn.round, row.turn.site): row.why for row in journal.rows("status = 'refused'")}
    journal.close()
    return rows


TRUE = {"amsterdam": 64, "bergen": 48, "cairo": 80}


def test_a_count_that_changes_between_rounds_is_refused(tmp_path: Path) -> None:
    lying = told(lambda site: TRUE[site.name] + (site.name == "cairo") * (site.round == 2) * 1000)
    state = run(toy.study(lying, rounds=3), tmp_path / "run")
    assert refusals(tmp_path / "run") == {
        (2, "cairo"): "the answer of cairo to learn counts 1080 cases where it said before 80"
    }
    assert state["shares"]["cairo"] == 80 / 192


def test_what_a_site_said_before_is_known_after_a_resume(tmp_path: Path) -> None:
    run(toy.study(told(lambda site: TRUE[site.name])), tmp_path / "run")
    journal = Journal(tmp_path / "run")
    with pytest.raises(Refused, match="counts 81 cases where it said before 80"):
        held(toy.study(averaging()), journal, "learn", {"cases": 81})
    held(toy.study(averaging()), journal, "learn", {"cases": 80})
    journal.close()


def test_a_count_that_the_study_knows_better_is_refused(tmp_path: Path) -> None:
    counts = {name: {"train": n, "validation": 16, "test": 16} for name, n in TRUE.items()}
    study = toy.study(told(lambda site: 81 if site.name == "cairo" else site.cases), counts=counts)
    state = run(study, tmp_path / "run")
    assert set(refusals(tmp_path / "run").values()) == {
        "the answer of cairo to learn counts 81 cases where the study knows of 80"
    }
    assert state["shares"] == {"amsterdam": 64 / 112, "bergen": 48 / 112}


def test_no_count_is_large_enough_to_take_everything(tmp_path: Path) -> None:
    state = run(toy.study(told(lambda site: 2**63 if site.name == "cairo" else 64)), tmp_path / "run")
    assert "cases is 9223372036854775808, outside 1 to 1000000" in refusals(tmp_path / "run")[1, "cairo"]
    assert "cairo" not in state["shares"]


# -- moments -----------------------------------------------------------------------------------------------------------


def test_a_site_that_keeps_its_moments_does_not_freeze_those_of_all(tmp_path: Path) -> None:
    def train(site: Site, model: nn.Module, message: Message) -> Tree:
        report = plain_train(site, model, message)
        if site.name == "cairo":
            del report["optimizer"]
        return report

    step = Step("adam", lr=0.01, batch=16, moments="averaged")
    state = run(toy.study(averaging(train), step=step), tmp_path / "run")
    assert "lacks 'optimizer'" in refusals(tmp_path / "run")[1, "cairo"]
    assert float(state["optimizer"]["step/head.bias"]) == pytest.approx(
        (64 * 8 + 48 * 6) / 112
    )  # two rounds of 4 and of 3 steps


def test_training_without_an_optimiser_has_no_moments_to_report(tmp_path: Path) -> None:
    step = Step("adam", lr=0.01, batch=16, moments="averaged")
    state = run(toy.study(get("fedsgd").make(), step=step), tmp_path / "run")
    assert (refusals(tmp_path / "run"), "optimizer" in state) == ({}, False)


# -- scores ------------------------------------------------------------------------------------------------------------

SEGMENTED = Scores(labels=("ball",), ranges=Segmentation({}, {"ball": 1}, 2).ranges)
ROW = ["c0", "s0", "cairo", "ball", "dice", 0.5]
BAD: dict[str, tuple[list[list[Any]], str]] = {
    "a score above its range": ([[*ROW[:5], 1.5]], "row 0: dice is 1.5, outside 0.0 to 1.0"),
    "a score below its range": ([[*ROW[:4], "hd95", -1]], "row 0: hd95 is -1, outside 0.0 to inf"),
    "a volume error below all": ([[*ROW[:4], "volume_error", -1.5]], "outside -1.0 to inf"),
    "a score twice": ([ROW, ["c0", "s0", "cairo", "ball", "iou", 0.4], ROW], "row 2 gives dice of 'ball' in case 'c0'"),
    "a label of no study": ([[*ROW[:3], "lung", "dice", 1]], "row 0 scores 'lung', and the labels are ball"),
    "a metric of no study": ([[*ROW[:4], "praise", 1]], "row 0 holds 'praise', and the metrics are dice, iou"),
    "another definition": ([[*ROW[:4], "hd95_pooled", 1]], "row 0 holds 'hd95_pooled'"),
    "a case of two subjects": ([ROW, ["c0", "s1", "cairo", "ball", "iou", 1]], "row 1 gives case 'c0' to another"),
    "text that moves the cursor": ([["c\x1b[2J", *ROW[1:]]], "printable characters"),
    "text that turns its direction": ([["c", "s\u202e0", *ROW[2:]]], "printable characters"),
    "text of two lines": ([[*ROW[:3], "ball\nx", *ROW[4:]]], "printable characters"),
    "text without end": ([["c" * 201, *ROW[1:]]], "at most 200"),
}


@pytest.mark.parametrize(("rows", "said"), BAD.values(), ids=BAD)
def test_rows_that_no_task_would_give_are_refused(rows: list[list[Any]], said: str) -> None:
    SEGMENTED.check([ROW, ["c1", *ROW[1:5], None], [*ROW[:4], "hd95", 2e9]], "rows")
    with pytest.raises(Refused, match=re.escape(said)):
        SEGMENTED.check(rows, "rows")


class Boasting(toy.Toy):
    """One site scores more cases than it has, another calls its cases someone else's."""

    def scores(self, model: nn.Module, split: Any, site: str, final: bool) -> list[list[Any]]:
        rows = super().scores(model, split, site, final)
        if site == "cairo":
            rows += [["more", "more", site, "class", "accuracy", 1.0]]
        return [[case, subject, "amsterdam", *rest] for case, subject, _, *rest in rows]


def scored(study: Study, folder: Path) -> list[ScoreRow]:
    found: list[ScoreRow] = []
    run(study, folder, watch=lambda what, value: found.extend(value) if what == "scores" else None)
    return found


def test_scores_stand_under_the_site_that_gave_them_and_are_no_more_than_its_cases(tmp_path: Path) -> None:
    counts = {name: {"train": n, "validation": 16, "test": 16} for name, n in TRUE.items()}
    rows = scored(replace(toy.study(averaging(), counts=counts), task=Boasting()), tmp_path / "run")
    assert {(row.tested_at, row.case.split("-")[0]) for row in rows} == {("amsterdam",) * 2, ("bergen",) * 2}
    assert refusals(tmp_path / "run") == {
        (3, "cairo"): "the answer of cairo to evaluate scores 17 test cases; it has 16"
    }


def test_only_a_site_that_pools_cases_names_where_they_are_from(tmp_path: Path) -> None:
    pooled = replace(toy.study(averaging(), names=("pooled",)), task=Boasting())
    rows = scored(replace(pooled, origins={"pooled": ("amsterdam", "bergen")}), tmp_path / "known")
    assert {row.tested_at for row in rows} == {"amsterdam"}
    assert scored(replace(pooled, origins={"pooled": ("bergen",)}), tmp_path / "unknown") == []
    assert "scores cases of 'amsterdam', which is none of its sites" in refusals(tmp_path / "unknown")[3, "pooled"]


def held(study: Study, journal: Journal, question: str, reply: Tree) -> None:
    """Raises Refused where the run would not take this answer of Cairo's."""
    turn = Turn(9, 0, "cairo")
    letter = Letter(turn, question, {"split": "test"}, pack({}), None)
    Held(study, NoEngine(), journal)._check(letter, Answer(turn, reply))  # type: ignore[arg-type]


class NoEngine:
    """Names, and nothing else of an engine."""

    names = toy.NAMES


@pytest.mark.parametrize("rows", [None, 3, [1], [[1, 2]], [[[], {}, []]], {"a": 1}])
def test_rows_of_any_form_are_left_to_the_spec(rows: Any, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    held(toy.study(averaging()), journal, "evaluate", {"rows": rows})
    held(toy.study(averaging()), journal, "learn", {"cases": rows})
    journal.close()


def test_a_study_file_tells_how_many_cases_sites_have(tmp_path: Path) -> None:
    file = load_study(write_study(tmp_path))
    cases = read_cases(file, tmp_path / "cache")
    study = build(file, cases)
    assert study.counts == {name: {"train": 3, "validation": 1, "test": 1} for name in ("east", "west")}
    assert [len(split) for split in study.splits("west")] == [3, 1, 1]
    pooled = build(file.by("centralised"), cases)
    assert (pooled.counts["pooled"]["train"], pooled.origins) == (6, {"pooled": ("east", "west")})
    assert isinstance(study.evaluate.gives(study.terms).entries["rows"], Scores)
    assert study.evaluate.gives(study.terms).entries["rows"].labels.keys() == {"ball"}


# -- messages that are small and become large --------------------------------------------------------------------------

HOSTILE = r"""
import json, resource, sys
from fedscan import wire
from fedscan.spec import Leaves, Maybe, Refused, room
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
def send(text):
    before = peak()
    try:
        wire.unpack(len(text).to_bytes(8, "little") + text)
    except Refused as e:
        print(peak() - before, str(e))
send(b"{}")
for mib, piece in (20, "[],"), (11, "[],"), (11, "{},"), (7, '"ab",'), (11, "\\u005b\\u005d\\u002c"):
    text = ('{"x":[' + piece * ((mib << 20) // len(piece)) + "1]}").replace('"', '\\"')
    send(('{"__metadata__":{"message":"' + text + '"}}').encode())
"""


def test_a_hostile_message_takes_less_than_50_mib() -> None:
    done = subprocess.run([sys.executable, "-c", HOSTILE], capture_output=True, text=True, check=True, timeout=60)
    sent, *lines = done.stdout.splitlines()
    assert "lacks its announcement" in sent
    assert [re.sub(r"[0-9]+", "N", line.split(" ", 1)[1]) for line in lines] == [
        "the message's header has N bytes; at most N are allowed",
        *["the message's header holds N entries; at most N are allowed"] * 4,
    ]
    assert max(int(line.split()[0]) for line in lines) < 50, lines


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "cwt"])
def test_what_fits_has_room_and_little_more_has_not(name: str) -> None:
    study = toy.study(get(name).make(), step=Step(moments="travels", momentum=0.9 * (name == "cwt")))
    spec = study.method.answers[0].gives(study.terms)
    fitting = {entry: leaves(one) for entry, one in spec.entries.items() if isinstance(one, Leaves | Maybe)}
    parcel = pack({**fitting, "cases": 9, **{f"number {i} of the site's own \U0001f600": 0.1 + i for i in range(64)}})
    wire.unpack(bytes(parcel), spec)
    assert room(spec).nbytes < 100_000
    assert room(spec).nodes < 10_000
    many = {**fitting, "more": Weights({f"leaf{i}": torch.zeros(0) for i in range(2000)})}
    with pytest.raises(Refused, match=r"at most [0-9]+ are allowed"):
        wire.unpack(bytes(pack(many)), spec)


def leaves(one: Any) -> Weights:
    return Weights(
        {k: torch.zeros(leaf.shape, dtype=leaf.dtype) for k, leaf in getattr(one, "spec", one).schema.items()}
    )


def test_scores_of_all_cases_have_room_and_those_of_more_have_not() -> None:
    counts = {name: {"train": 3, "validation": 20, "test": 9} for name in toy.NAMES}
    study = toy.study(averaging(), counts=counts)
    study.task.labels, study.task.ranges = ["ball"], dict.fromkeys(("dice", "iou"), (0, 1))
    spec = study.evaluate.gives(study.terms)
    rows = [[f"{i} é" + "x" * 190] * 2 + ["cairo", "ball", m, 1 / 3] for i in range(20) for m in ("dice", "iou")]
    parcel = pack({"rows": rows})
    spec.check(wire.unpack(bytes(parcel), spec), "scores")
    with pytest.raises(Refused, match="allowed"):
        wire.unpack(bytes(pack({"rows": rows * 100})), spec)
    with pytest.raises(Refused, match="at most 40 rows"):
        spec.check({"rows": [*rows, rows[0]]}, "scores")


# -- messages that a site does not believe -----------------------------------------------------------------------------


def asked(study: Study, question: str, message: Message, state: Tree | None = None) -> Tree:
    """What Cairo answers in round 1."""
    return respond(study, study.slots(), Turn(1, 0, "cairo"), question, message, state or {}, bytes)[0]


def with_leaf(weights: Weights, name: str, leaf: torch.Tensor) -> Weights:
    return Weights({**weights, name: leaf}, weights.kinds)


CODED = sparse(0.5, 8)
LEARN: dict[str, tuple[Callable[[Weights], Message], str]] = {
    "nothing": (lambda w: {}, "what cairo was sent with 'learn' lacks 'weights'"),
    "text for weights": (lambda w: {"weights": "w"}, "weights should be weights, not 'w'"),
    "a leaf too few": (lambda w: {"weights": w.only(list(w)[1:])}, "lacks the leaf 'conv1.weight'"),
    "a leaf too many": (lambda w: {"weights": with_leaf(w, "x", torch.ones(1))}, "holds an unknown leaf 'x'"),
    "another shape": (lambda w: {"weights": with_leaf(w, "head.bias", torch.ones(3))}, "leaf 'head.bias' is (3,)"),
    "another dtype": (lambda w: {"weights": with_leaf(w, "head.bias", w["head.bias"].double())}, "torch.float64"),
    "moments nobody asked for": (
        lambda w: {"weights": w, "optimizer": w},
        "optimizer should be a number, not a weights",
    ),
    "text for a number": (lambda w: {"weights": w, "work": "all"}, "work should be a number, not 'all'"),
}


@pytest.mark.parametrize(("message", "said"), LEARN.values(), ids=LEARN)
def test_a_site_refuses_a_message_that_is_not_what_the_question_takes(
    message: Callable[[Weights], Message], said: str
) -> None:
    study = toy.study(averaging())
    weights: Weights = study.start()["weights"]
    assert asked(study, "learn", {"weights": weights, "work": 0.5})["cases"] == 80
    with pytest.raises(Refused, match=re.escape(said)):
        asked(study, "learn", message(weights))


def test_a_site_refuses_what_it_is_asked_to_score() -> None:
    study = toy.study(averaging())
    good = {**study.start(), "split": "validation"}
    assert len(asked(study, "evaluate", good)["rows"]) == 16
    for wrong in ("train", 3, None):
        with pytest.raises(Refused, match="split should be one of validation, test"):
            asked(study, "evaluate", {**good, "split": wrong})
    with pytest.raises(Refused, match="lacks 'split'"):
        asked(study, "evaluate", study.start())
    with pytest.raises(Refused, match="lacks 'weights'"):
        asked(study, "evaluate", {"split": "test"})


def test_a_site_looks_at_no_values_of_what_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over the weights for each answer would cost as much as a step of training."""
    study = toy.study(averaging(down=CODED))
    state = study.start()
    kinds = state["weights"].kinds
    monkeypatch.setattr("fedscan.spec.finite", lambda x: pytest.fail("values were looked at"))
    monkeypatch.setattr("fedscan.parts.channel.Coded.check", lambda *a: pytest.fail("a change was decoded"))
    nowhere = Weights({k: v * torch.inf if v.is_floating_point() else v for k, v in state["weights"].items()}, kinds)
    study.check_asked("cairo", "learn", {"weights": nowhere, "version": 0})
    study.check_asked("cairo", "learn", {"change": torch.zeros(9, dtype=torch.uint8), "version": 1})


def test_a_coded_way_down_is_refused_where_it_brings_nothing() -> None:
    study = toy.study(averaging(down=CODED))
    state = study.start()
    assert asked(study, "learn", {"weights": state["weights"], "version": 0})["cases"] == 80
    with pytest.raises(Refused, match="lacks 'version'"):
        asked(study, "learn", {"weights": state["weights"]})
    with pytest.raises(Refused, match="cairo was sent version 0 of the model, and neither weights nor a change"):
        asked(study, "learn", {"version": 0})
    with pytest.raises(Refused, match="does not hold the model that a change was sent for"):
        asked(study, "learn", {"change": torch.zeros(9, dtype=torch.uint8), "version": 3}, {"version": 1})


def test_moments_are_looked_at_too() -> None:
    step = Step("adam", lr=0.01, batch=16, moments="averaged")
    study = toy.study(averaging(), step=step)
    weights = study.start()["weights"]
    moments = asked(study, "learn", {"weights": weights})["optimizer"]
    assert asked(study, "learn", {"weights": weights, "optimizer": moments})["cases"] == 80
    with pytest.raises(Refused, match="optimizer lacks the leaf"):
        asked(study, "learn", {"weights": weights, "optimizer": moments.only(list(moments)[1:])})


SCAFFOLD: dict[str, tuple[Callable[[Tree], Message], str]] = {
    "nothing": (lambda s: {}, "cairo was asked 'learn' by a message that lacks 'weights'"),
    "no variate": (lambda s: {"weights": s["weights"]}, "by a message that lacks 'control'"),
    "text for weights": (lambda s: {**s, "weights": "w"}, "holds 'weights' as the study does not know it, and failed"),
    "a number for a variate": (lambda s: {**s, "control": 3}, "holds 'control' as the study does not know it"),
    "another shape": (
        lambda s: {**s, "control": with_leaf(s["control"], "head.bias", torch.ones(3))},
        "holds 'control' as the study does not know it, and failed at it (",
    ),
}


@pytest.mark.parametrize(("message", "said"), SCAFFOLD.values(), ids=SCAFFOLD)
def test_a_question_that_declares_nothing_refuses_what_it_fails_at(
    message: Callable[[Tree], Message], said: str
) -> None:
    study = toy.study(replace(get("scaffold").make(), answers=(undeclared(get("scaffold").make().answers[0]),)))
    with pytest.raises(Refused, match=re.escape(said)):
        asked(study, "learn", message(study.start()))


def undeclared(question: Question) -> Question:
    return replace(question, takes=None)


def test_a_fault_of_the_method_is_not_laid_on_the_message() -> None:
    def train(site: Site, model: nn.Module, message: Message) -> Tree:
        return {"loss": {}["loss"]}

    study = toy.study(averaging(train))
    with pytest.raises(KeyError):
        asked(study, "learn", study.start())
    method = averaging(train)
    study = toy.study(replace(method, answers=(undeclared(method.answers[0]),)))
    with pytest.raises(KeyError):
        asked(study, "learn", study.start())
    with pytest.raises(Refused, match=r"holds 'x' as the study does not know it, and failed at it \(KeyError\)$"):
        asked(study, "learn", {**study.start(), "x": 1})
