"""What a study asks is what it sends: held against the questions and the bytes that runs have recorded."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import toy
from fedscan import wire
from fedscan.consortium import leaving
from fedscan.consortium.asks import Asks, Hospital, asks_of, hash_of, mark, read
from fedscan.consortium.rehearsal import rehearse
from fedscan.consortium.words import difference, how_often, words
from fedscan.launch import How, launch
from fedscan.ledger import read_record
from fedscan.methods.registry import methods
from fedscan.run import Problem, run
from fedscan.schema import Kind, Leaf
from fedscan.spec import Array, Blob, Cases, Choice, Group, Leaves, Maybe, Number, Table, Text, carries_weights
from fedscan.step import Step
from fedscan.studyfile import StudyFile, load
from tinystudy import write_scans, write_study

torch.set_num_threads(1)
SITES = ("east", "north", "west")


def study(folder: Path, method: str = "fedavg", *overrides: str) -> StudyFile:
    if not (folder / "scans").exists():
        write_scans(folder / "scans", SITES, 5)
    return load(write_study(folder, method), overrides)


def asked(file: StudyFile, cases: int = 5, sites: tuple[str, ...] = SITES) -> Asks:
    return asks_of(file, Hospital("east", cases, ("t1",), {"ball": 1}, 24), sites, "charite")


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three hospitals' scans and a cache."""
    return tmp_path_factory.mktemp("asks")


SHAPES = {
    "fedavg": ("train.moments=averaged", "train.optimiser=adam"),
    "scaffold": ("train.optimiser=sgd", "run.every=0"),
    "fedsegnet": ("method.aggregation=cross-scored", "method.fraction=0.2", "method.down_bits=8"),
    "local-only": ("run.every=2", "train.rounds=3", "model.norm=batch"),
}


@pytest.mark.parametrize("method", SHAPES)
def test_no_more_is_sent_or_asked_than_is_said(method: str, scans: Path) -> None:
    file = study(scans, method, "model.name=unet", "data.grid=[8, 8, 8]", *SHAPES[method])
    asks = asked(file)
    said = {q.name: q for q in asks.questions}
    launch(file, scans / method, How(report=False, cache=scans / "cache"))
    turns = [turn for turn in read_record(scans / method).turns if turn.site == "east"]
    finals = [t for t in turns if t.round == file.rounds + 1]
    counts = Counter((turn.round, turn.question) for turn in turns if turn not in finals)
    assert {turn.question for turn in turns} <= set(said)
    assert {turn.status for turn in turns} == {"answered"}
    for question in asks.questions:
        asked_in = {round for round, name in counts if name == question.name}
        assert max((counts[round, question.name] for round in asked_in), default=0) == question.times, question
        assert not question.times or len(asked_in) == question.rounds, question
        assert sum(t.question == question.name for t in finals) == question.last, question
    for turn in turns:
        question = said[turn.question]
        assert turn.privacy == question.privacy
        assert 0 < turn.bytes_up <= question.up
        if question.declared:
            assert 0 < turn.bytes_down <= question.down
        if question.steps is not None:
            assert turn.numbers["steps"] >= question.steps
    for number in range(1, file.rounds + 1):
        assert sum(turn.bytes_up for turn in turns if turn.round == number) <= asks.round_up


@pytest.mark.parametrize("name", [n for n, entry in methods().items() if not entry.card.pooled])
def test_the_rehearsal_counts_what_a_run_asks(name: str, tmp_path: Path) -> None:
    entry = methods()[name]
    file = toy.study(entry.make(), step=Step(lr=0.05, batch=16, moments=entry.card.moments))
    rows: list[Any] = []
    run(file, tmp_path, watch=lambda what, value: rows.append(value) if what == "turn" else None)
    rows = [row for row in rows if row.question != "evaluate"]
    counts = Counter((row.turn.round, row.turn.site, row.question) for row in rows)
    played = rehearse(file, "amsterdam", 64)  # as many as there are in the toy
    most = {q: max(n for (_, _, of), n in counts.items() if of == q) for _, _, q in counts}
    assert played.times.keys() == most.keys()
    for question, n in most.items():  # where who answers first is asked more, one that always does is asked most
        assert n <= played.times[question] if question in played.open else n == played.times[question]
    steps = {row.question: row.numbers["steps"] for row in rows if "steps" in row.numbers and row.turn.site[0] == "a"}
    assert played.steps == steps


@pytest.mark.parametrize(
    ("name", "options", "passed"),
    [
        ("fedavg", {}, set()), ("scaffold", {}, set()), ("comed", {}, set()), ("fedsegnet", {}, set()),
        ("fedsegnet", {"aggregation": "cross-scored"}, {"learn"}), ("cwt", {}, {"train_on"}),
        ("local-only", {}, {"train_on"}), ("ensemble", {}, {"train_on"}),
    ],
)  # fmt: skip
def test_who_sees_an_answer_is_found(name: str, options: dict[str, Any], passed: set[str]) -> None:
    """Cross-scored changes, a model on its tour, and models that are scored or vote elsewhere: to other hospitals."""
    step = Step(lr=0.05, batch=16, moments=methods()[name].card.moments)
    assert rehearse(toy.study(methods()[name].make(options), step=step), "cairo", 8).passed == passed


def test_a_method_that_asks_more_often_is_caught(tmp_path: Path) -> None:
    """A positive control: a fault planted in the method shows in the rehearsal."""
    entry = methods()["fedavg"].make()

    def twice(sites: Any, state: Any) -> Any:
        return entry.round(sites, entry.round(sites, state))

    greedy = replace(entry, round=twice)
    assert rehearse(toy.study(entry), "cairo", 4).times == {"learn": 1}
    assert rehearse(toy.study(greedy), "cairo", 4).times == {"learn": 2}


def test_the_largest_that_fits_is_no_larger_than_is_said() -> None:
    schema = {"a": Leaf((3, 5), torch.float32, Kind.PARAMETER), "b.é/n": Leaf((), torch.int64, Kind.COUNTER)}
    rows = Table({"who": Text(7), "value": Number(optional=True)}, limit=9)
    group = Group(
        {"w": Leaves(schema), "blob": Blob(100), "x": Array((2, -1), limit=6), "n": Cases(),
         "kind": Choice(("a", "bb")), "rows": rows, "name": Text(5), "perhaps": Maybe(Number()),
         "deep": Group({"y": Number()})},
        others=Number(optional=True),
    )  # fmt: skip
    astral, low = "\U0001d7d8", -1.7976931348623157e308
    weights = leaving.filled(group.entries["w"], [], 0)
    full = {
        "w": type(weights)({k: torch.zeros(v.shape, dtype=v.dtype) for k, v in weights.items()}, weights.kinds),
        "blob": torch.zeros(100, dtype=torch.uint8), "x": torch.zeros(2, 6), "n": 1_000_000, "kind": "bb",
        "rows": [[astral * 7, low]] * 9, "name": astral * 5, "perhaps": low, "deep": {"y": low},
        **{astral * 62 + f"{i:02}": low for i in range(64)},
    }  # fmt: skip
    group.check(full, "it")
    said, real = leaving.most(group), wire.pack(full).nbytes
    assert real <= said <= 1.05 * real
    assert carries_weights(group.entries)
    assert not carries_weights({"rows": rows, "n": Cases(), "some": Maybe(Text())})


def test_the_page_says_it_in_words(scans: Path) -> None:
    page = words(asked(study(scans)))
    for sentence in (
        "charite asks east to take part, together with north, west.",
        "Task: segmentation of ball, by the network 'unet'.",
        "Rounds: 2. Your cases that can be used: 5; the scans and label maps stay with you.",
        "The most telling class of data that would leave: statistics.",
        "fedavg:learn (class: weights)",
        "- update: 32 parameters (22,310 numbers); at most 9",  # 10 convolutions and norms, twice; the head
        "fedavg:evaluate (class: statistics)",
        "rows of case, subject, site, label, metric, value",
        "Asked once a round, in 2 rounds, and once at the end.",
        "About 2 optimiser steps on your cases stand behind an answer.",  # 3 of 5 cases train, in batches of 2
        "and at most",
    ):
        assert sentence in page, sentence
    assert "nan" not in page
    judged = words(asked(study(scans, "fedsegnet", "method.aggregation=cross-scored")))
    assert "Asked twice a round, in 2 rounds." in judged
    assert "and about" not in judged  # what judges are sent is declared
    # What SCAFFOLD's sites are sent is not.
    assert "and about" in words(asked(study(scans, "scaffold", "train.optimiser=sgd")))
    assert judged.count("YOUR ANSWER IS PASSED ON TO OTHER HOSPITALS AS IT CAME.") == 1
    assert "PASSED ON" not in page


def test_it_survives_json(scans: Path) -> None:
    asks = asked(study(scans, "fedsegnet"))
    text = json.dumps(asks.plain(), sort_keys=True)
    again = read(json.loads(text))
    assert json.dumps(again.plain(), sort_keys=True) == text
    assert mark(again) == mark(asks)
    assert not difference(asks, again)
    for broken in ({}, {**asks.plain(), "more": 1}, {**asks.plain(), "questions": [{}]}, {**asks.plain(), "sites": 1}):
        with pytest.raises(ValueError, match="cannot be read"):
            read(broken)


def test_differences_are_told_in_words(scans: Path) -> None:
    old = asked(study(scans))
    longer = asked(study(scans, "fedavg", "train.rounds=14"))
    assert difference(old, longer)[0] == "12 more rounds"
    assert difference(longer, old)[0] == "12 fewer rounds"
    assert "train.rounds is 14, was 2" in difference(old, longer)
    score = next(q for q in old.questions if q.name == "evaluate")
    masks = replace(old, questions=(*old.questions, replace(score, name="segment", privacy="predictions")))
    assert difference(old, masks)[:2] == [
        "predictions would leave, which did not before",
        "'segment' would be asked, which was not before",
    ]
    assert difference(masks, old)[:2] == ["predictions would leave no more", "'segment' is asked no more"]
    coded = asked(study(scans, "fedsegnet"))
    said = difference(old, coded)
    assert "an answer to 'learn' would hold dice (a number)" in said
    assert "the method is fedsegnet, and was fedavg" in said
    assert not [s for s in said if "no more" in s], "weights still leave, in coded form"
    wider = asked(study(scans), sites=(*SITES, "south"))
    assert difference(old, wider) == ["south takes part, and did not before"]
    assert difference(old, asked(study(scans), cases=6))[-1] == "you have 6 cases, and had 5"
    rate = asked(study(scans, "fedavg", "train.lr=0.5"))
    assert difference(old, rate) == ["train.lr is 0.5, was 0.01"]
    assert difference(old, old) == []
    assert difference(old, replace(old, hash="b" * 64)) == [
        "what is asked is the same, and a package that the study uses is not"
    ]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("data.partition.how=quantity", "data.partition.sites=2"), "cases are dealt to simulated sites ('quantity')"),
        (("run.baselines=['local-only']",), "local-only would be further studies on your cases"),
        (("run.baselines=['centralised']",), "'centralised' pools all hospitals' scans at one place"),
        (("method.name=centralised",), "'centralised' pools all hospitals' scans at one place"),
        (("run.silent.east=[1]",), "run.silent simulates hospitals"),
        (("data.sequences=['flair']",), "your cases have no sequence 'flair'; they have t1."),
    ],
)
def test_what_hospitals_cannot_do_is_refused(overrides: tuple[str, ...], said: str, scans: Path) -> None:
    with pytest.raises(Problem, match=r"study.toml|--set") as raised:
        asked(study(scans, "fedavg", *overrides))
    assert said in str(raised.value)


def test_a_study_between_hospitals_has_a_name(scans: Path) -> None:
    """Else its hash, and with it the yes, would be another under another file's name."""
    with pytest.raises(Problem, match=r'study.toml: a study between hospitals has a name.*say name = "..."'):
        asked(study(scans, "fedavg", "name=''"))


def test_how_often(scans: Path) -> None:
    asks = replace(asked(study(scans)).questions[0], times=0, last=0)
    assert how_often(asks) == "never, as the method goes"
    assert how_often(replace(asks, times=3, rounds=1, last=2)) == "3 times a round, in 1 round, and twice at the end"


def test_the_hash_is_that_of_the_whole_study(scans: Path) -> None:
    base = hash_of(study(scans))
    assert hash_of(study(scans)) == base
    for key in (
        "run.device='auto'",
        "run.threads=2",
        "run.mode='fast'",
        "data.cases='other'",
        "run.baselines=['fedbn']",
    ):
        assert hash_of(study(scans, "fedavg", key)) != base, "where a study is run by another hash than what is agreed"
