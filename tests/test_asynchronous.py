"""FedAsync by hand: how much a stale model counts, who contributes how often, and what it is with one site."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

import contract
import toy
from between import Between
from canned import Canned, leaves, w
from contract import BENCHES, Desk, study_of
from fedscan import trees
from fedscan.consortium.rehearsal import rehearse
from fedscan.engines import remote
from fedscan.engines.local import Replay
from fedscan.engines.workers import Workers
from fedscan.method import Absent, Message, Question, Tree
from fedscan.methods.asynchronous import Rule, discount
from fedscan.methods.registry import get
from fedscan.run import run
from fedscan.schema import Kind
from fedscan.step import Step
from fedscan.studyfile import build, load, read_cases
from test_remote import all_killed, order_in, record
from test_resume import Killed, rows, same_after_a_kill
from tinystudy import write_scans, write_study

torch.set_num_threads(1)
NAMES = toy.NAMES
FAST = {"amsterdam": 1.0, "bergen": 2.0, "cairo": 6.5}


class Arriving(Canned):
    """Sites whose models are written beforehand and arrive in a given order."""

    def __init__(self, order: Sequence[str], answers: Mapping[str, Sequence[Any]]) -> None:
        super().__init__(answers)
        self.order, self.open = list(order), set[str]()

    def start(self, question: Question, messages: Mapping[str, Message]) -> None:
        self.asked += messages.items()
        self.open |= set(messages)

    def next(self) -> tuple[str, Tree]:
        if not self.order:
            raise Absent(self.names, "next")
        name = self.order.pop(0)
        self.open.remove(name)
        return name, dict(self.answers[name].pop(0))

    @property
    def busy(self) -> tuple[str, ...]:
        return tuple(sorted(self.open))


def said(w: Sequence[float], var: float = 0.0, n: int = 0) -> dict[str, Any]:
    return {"weights": leaves(w, var, n)}


def start() -> dict[str, Any]:
    return {"weights": leaves([1.0, -1.0], 1.0, 10), "updates": 0, "sent": {}}


# -- the server ------------------------------------------------------------------------------------------------------


def test_how_much_a_stale_model_counts() -> None:
    constant, polynomial, hinge = (discount(rule, None, None) for rule in get_args(Rule))
    assert [polynomial(d) for d in (0, 3, 8)] == pytest.approx([1.0, 0.5, 1 / 3])
    assert [hinge(d) for d in (0, 4, 5, 6)] == pytest.approx([1.0, 1.0, 1 / 11, 1 / 21])
    assert [constant(d) for d in (0, 100)] == [1.0, 1.0]
    assert discount("polynomial", 2.0, None)(1) == 0.25
    assert discount("hinge", 0.5, 1.0)(3) == 0.5


@pytest.mark.parametrize(("rule", "options"), [("constant", {"a": 1.0}), ("polynomial", {"b": 2.0})])
def test_a_number_that_plays_no_part_is_refused(rule: str, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f'{next(iter(options))} plays no part in staleness = "{rule}"'):
        get("fedasync").make({"staleness": rule, **options})


def test_mixing_by_hand() -> None:
    """a, then b, which is one update old, then a again, fresh but for b's: x = 1, 2, 2 - 0.5 2^-0.5, ...

    alpha = 0.5. a's 3 is fresh: 1 + 0.5 (3 - 1) = 2. b's 1 was sent at 0 and is 1 old: 2 + 0.5 / sqrt 2 (1 - 2).
    a was sent x after its own first, so its 4 is 1 old, too.
    """
    sites = Arriving("aba", {"a": [said([3, 0], 2.0, 12), said([4, 0], 1.0, 20)], "b": [said([1, 0], 1.0, 11)]})
    state = get("fedasync").make({"alpha": 0.5, "arrivals": 3}).round(sites, start())
    part = 0.5 / np.sqrt(2)
    x = 2 + part * (1 - 2)
    x = x + part * (4 - x)
    assert w(state)[0] == pytest.approx(x, rel=1e-6)
    var = 1.5 + part * (1 - 1.5)
    assert float(state["weights"]["var"]) == pytest.approx(var + part * (1 - var), rel=1e-6)
    assert int(state["weights"]["n"]) == 20  # the larger count, never back
    assert state["updates"] == 3
    sent = [(name, float(message["weights"]["w"][0])) for name, message in sites.asked]
    assert sent == [("a", 1.0), ("b", 1.0), ("a", 2.0), ("b", pytest.approx(2 - part))]


def test_a_model_that_is_too_old_is_left_out_and_counts_as_an_arrival() -> None:
    answers = {"a": [said([3, 0]), said([5, 0]), said([7, 0])], "b": [said([100, 0])]}
    method = get("fedasync").make({"alpha": 1.0, "staleness": "constant", "arrivals": 4, "oldest": 1})
    state = method.round(Arriving("aaba", answers), start())
    assert w(state)[0] == 7.0
    assert state["updates"] == 3


def test_a_round_ends_with_as_many_arrivals_as_sites_and_those_at_work_work_on() -> None:
    sites = Arriving("aab" + "bca", {"a": [said([3, 0])] * 3, "b": [said([1, 0])] * 2, "c": [said([9, 0])]})
    method = get("fedasync").make({"staleness": "constant"})
    state = method.round(sites, start())
    assert sites.busy == ("a", "c")
    assert state["sent"] == {"a": 2, "b": 0, "c": 0}
    state = method.round(sites, state)
    assert state["updates"] == 6
    assert state["sent"]["c"] == 5, "c was asked again with what had come before"


def test_what_has_come_is_kept_where_nobody_answers_any_more() -> None:
    method = get("fedasync").make({"alpha": 0.5, "arrivals": 3})
    assert w(method.round(Arriving("a", {"a": [said([3, -1])], "b": []}), start())) == [2.0, -1.0]
    with pytest.raises(Absent):
        method.round(Arriving("", {"a": [], "b": []}), start())


# -- the sites -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bench", BENCHES)
def test_one_site_alpha_1_and_no_pull_is_training_one_model(bench: str) -> None:
    """Staleness is 0 throughout: the same bits as one model that is trained round after round."""
    contract.check_reduces(get("fedasync"), BENCHES[bench])


def test_staleness_counted_to_the_letter_would_not_be() -> None:
    """A positive control: with 1 for a fresh model, as the paper's index says, one site is not sequential training."""
    entry = get("fedasync")

    def literal(method: Any) -> Any:
        def round(sites: Any, state: Any) -> Any:
            after = method.round(sites, state)
            return {**after, "weights": trees.mean([after["weights"], state["weights"]], [2**-0.5, 1 - 2**-0.5])}

        return replace(method, round=round)

    with pytest.raises(AssertionError):
        contract.check_reduces(contract.faulty(entry, literal), BENCHES["2D"])


def test_the_pull_is_towards_the_model_that_was_sent() -> None:
    """Two plain steps on the whole set: w2 = w1 - lr (g(w1) + rho (w1 - x)), so against rho = 0 they part by that."""
    step = Step(lr=0.1, batch=1000, epochs=2)
    ended, first = {}, {}
    for rho in (0.0, 2.0):
        desk = Desk(toy.study(get("fedasync").make({"alpha": 1.0, "rho": rho}), names=("cairo",), rounds=1, step=step))
        ended[rho], first = desk.play()["weights"], desk.slots.first()
    one = Desk(toy.study(get("fedasync").make({"rho": 0.0, "alpha": 1.0}), names=("cairo",), rounds=1,
                         step=Step(lr=0.1, batch=1000)))  # fmt: skip
    w1 = one.play()["weights"]
    for name in first.of(Kind.PARAMETER):
        gap, pull = ended[0.0][name] - ended[2.0][name], 0.2 * (w1[name] - first[name])
        torch.testing.assert_close(gap, pull, rtol=2e-3, atol=2e-6)


# -- time ------------------------------------------------------------------------------------------------------------


def arrivals(folder: Path, study: Any, **how: Any) -> list[str]:
    """Whose models came, in order."""
    came: list[str] = []

    def watch(what: str, value: Any) -> None:
        if what == "turn" and value.question == "train_near" and value.status == "answered":
            came.append(value.turn.site)

    run(study, folder, watch=watch, **how)
    return came


def test_fast_sites_contribute_more_often(tmp_path: Path) -> None:
    """Seconds of 1, 2 and 6.5: of twelve arrivals eight are amsterdam's, three bergen's and one cairo's."""
    study = toy.study(get("fedasync").make(), rounds=4, seconds=FAST)
    came = arrivals(tmp_path / "run", study)
    clock = sorted([(k * FAST[name], name) for name in NAMES for k in range(1, 13)])
    assert came[:12] == [name for _, name in clock[:12]]
    assert Counter(came[:12]) == {"amsterdam": 8, "bergen": 3, "cairo": 1}


def test_what_is_under_way_at_the_end_is_recorded_and_not_mixed_in(tmp_path: Path) -> None:
    study = toy.study(get("fedasync").make(), rounds=2, seconds=FAST)
    state = run(study, tmp_path / "run")
    assert state["updates"] == 6
    turns = [row for row in rows(tmp_path / "run") if row[3] == "train_near"]
    assert {row[6] for row in turns} == {"answered"}
    assert len(turns) == 6 + 2  # of bergen and cairo; amsterdam's last ended the last round
    assert not list((tmp_path / "run/asks").glob("*")), "and what was asked is not kept any longer"


def test_workers_give_the_simulated_order_whoever_is_faster_here(tmp_path: Path) -> None:
    study = toy.study(get("fedasync").make(), rounds=3, seconds=FAST, every=1)
    state = run(study, tmp_path / "here")
    there = run(study, tmp_path / "there", engine=lambda s, f: Workers(s, f, 2))
    assert toy.same(state, there)


def test_where_nothing_is_said_a_training_case_takes_a_second(tmp_path: Path) -> None:
    write_scans(tmp_path / "scans", ("east", "west"), 5)
    path = write_study(tmp_path, "fedasync")
    table = (tmp_path / "scans/cases.csv").read_text().splitlines()
    (tmp_path / "scans/cases.csv").write_text("\n".join(line for line in table if "west4" not in line) + "\n")
    cases = read_cases(load(path), tmp_path / "cache")
    train = {name: len(of["train"]) for name, of in cases.of.items()}
    assert train["east"] != train["west"]
    assert build(load(path), cases).seconds == {name: float(n) for name, n in train.items()}
    file = load(path, ["run.seconds.west=0.5"])
    assert build(file, cases).seconds == {"east": float(train["east"]), "west": 0.5}


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_killed_with_answers_under_way(share: float, tmp_path: Path) -> None:
    plan = toy.study(get("fedasync").make(), step=Step(lr=0.1, batch=80, moments="kept", momentum=0.9), rounds=4,
                     seconds=FAST, every=2, silent={"bergen": (2,)})  # fmt: skip
    same_after_a_kill(plan, tmp_path, share)


@pytest.mark.parametrize("after", [2, 5, 8])
def test_hospitals_started_anew_go_on_with_what_was_under_way(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator is killed at an arrival, and all hospitals with it; a replay of the whole order is the same."""
    monkeypatch.setattr(remote, "PAUSES", (0.001, 0.01))
    study = study_of(get("fedasync"), BENCHES["2D"], every=2, rounds=3)
    between, seen = Between(study, tmp_path), Counter[str]()

    def kill(event: str) -> None:
        seen[event.split()[0]] += 1
        if seen["arrived"] == after:
            raise Killed(event)

    there = all_killed(between, kill)
    order = order_in(tmp_path / "run")
    assert toy.same(there, run(study, tmp_path / "local", engine=lambda s, f: Replay(s, f, order)))
    assert record(tmp_path / "run") == record(tmp_path / "local")


# -- what a yes allows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fastest", NAMES)
@pytest.mark.parametrize("arrivals", [None, 1, 5])
def test_no_order_of_arrival_asks_a_site_more_often_than_the_rehearsal(
    fastest: str, arrivals: int | None, tmp_path: Path
) -> None:
    """Also where one site answers a hundred times as fast as the others, and so nearly alone."""
    seconds = {name: 1.0 if name == fastest else 100.0 for name in NAMES}
    study = toy.study(get("fedasync").make({"arrivals": arrivals}), rounds=3, seconds=seconds)
    played = rehearse(study, fastest, 8)
    assert played.times == {"train_near": arrivals or 3}
    assert played.open == {"train_near"}
    turns: Counter[tuple[int, str]] = Counter()
    run(study, tmp_path / "run", watch=lambda what, value: turns.update(
        [(value.turn.round, value.turn.site)] if what == "turn" and value.question == "train_near" else []
    ))  # fmt: skip
    assert max(turns.values()) <= played.times["train_near"]
    assert turns[2, fastest] == played.times["train_near"], "and so often it really is asked"


def test_who_is_absent_again_and_again_is_not_asked_more_often_than_that(tmp_path: Path) -> None:
    turns: Counter[tuple[int, str]] = Counter()
    study = study_of(get("fedasync"), BENCHES["2D"], rounds=3, silent={"bergen": (1, 2, 3)}, seconds={"bergen": 0.01})
    run(study, tmp_path / "run", watch=lambda what, value: turns.update(
        [(value.turn.round, value.turn.site)] if what == "turn" and value.question == "train_near" else []
    ))  # fmt: skip
    assert max(turns.values()) <= rehearse(study, "bergen", 8).times["train_near"]
