"""BrainTorrent by hand: who is asked for what, what is merged by which weights, and who goes on without whom."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toy
from between import Between
from contract import BENCHES, Desk, outcome, study_of
from fedscan.engines import remote
from fedscan.method import published
from fedscan.methods import peers
from fedscan.methods.registry import get
from fedscan.run import run
from fedscan.schema import Kind, Weights
from fedscan.site import Site
from fedscan.step import Step
from test_remote import all_killed, record
from test_resume import Killed, same_after_a_kill

torch.set_num_threads(1)
NAMES = toy.NAMES
CASES = {"amsterdam": 64, "bergen": 48, "cairo": 80}


def desk(wakes: int | None = None, **changes: Any) -> Desk:
    return Desk(toy.study(get("braintorrent").make({"wakes": wakes}), **changes))


def told(table: Desk) -> list[tuple[int, str, str]]:
    """What was asked of whom, in which round."""
    return [(asked.turn.round, asked.question, asked.turn.site) for asked in table.asked]


def order_of(table: Desk, round: int) -> list[str]:
    return [site for r, question, site in told(table) if (r, question) == (round, "wake")]


# -- merging ---------------------------------------------------------------------------------------------------------


def model_of(table: Desk, value: float, variance: float, count: int) -> Weights:
    """A model of the toy whose parameters, statistics and counters are each one number."""
    of = {Kind.PARAMETER: value, Kind.STATISTIC: variance, Kind.COUNTER: count}
    first = table.slots.first()
    return Weights({k: torch.full_like(v, of[first.kinds[k]]) for k, v in first.items()}, first.kinds)


def merged(table: Desk, monkeypatch: pytest.MonkeyPatch, message: Any, **memory: Any) -> Weights:
    """What amsterdam (64 cases) begins to train from."""
    seen: list[Weights] = []

    def fit(site: Site, model: Any) -> dict[str, Any]:
        leaves = dict(model.state_dict())
        seen.append(Weights({k: v.clone() for k, v in leaves.items()}, table.slots.first().kinds))
        return {"loss": 0.0, "steps": 1}

    monkeypatch.setattr(peers, "fit", fit)
    table.memory["amsterdam"] = memory
    table.ask(peers.wake, message, to=["amsterdam"])
    return seen[0]


def test_models_count_by_their_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Own 2 of 64 cases, gifts 5 of 48 and -1 of 80: (128 + 240 - 80) / 192 = 1.5; counters take the largest."""
    table = desk()
    gifts = {
        "bergen": {"version": 3, "cases": 48, "weights": model_of(table, 5.0, 4.0, 7)},
        "cairo": {"version": 2, "cases": 80, "weights": model_of(table, -1.0, 1.0, 9)},
    }
    x = merged(table, monkeypatch, {"gifts": gifts}, model=model_of(table, 2.0, 1.0, 8), version=4, seen={"cairo": 1})
    for name, leaf in x.items():
        wanted = {Kind.PARAMETER: 1.5, Kind.STATISTIC: (64 + 4 * 48 + 80) / 192, Kind.COUNTER: 9}[x.kinds[name]]
        np.testing.assert_allclose(leaf.numpy(), wanted, rtol=1e-6)
    memory = table.memory["amsterdam"]
    assert (memory["version"], memory["seen"]) == (5, {"bergen": 3, "cairo": 2})


def test_a_model_that_was_never_trained_is_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    table = desk()
    gift = {"version": 1, "cases": 48, "weights": model_of(table, 5.0, 4.0, 7)}
    x = merged(table, monkeypatch, {"gifts": {"bergen": gift}})
    assert toy.same(dict(x), dict(gift["weights"]))
    x = merged(table, monkeypatch, {"gifts": {}})
    assert toy.same(dict(x), dict(table.slots.first()))
    [reply] = table.ask(peers.give, {"seen": 0}, to=["bergen"]).values()
    assert reply == {"version": 0, "cases": 48}


def test_a_round_is_algorithm_1_in_numpy() -> None:
    """The mean of the three models by cases, worked out in NumPy, is what the one who wakes is trained from."""
    table = desk(wakes=1, rounds=2, step=Step(lr=0.1, batch=1000))
    table.play(1)
    before = {name: dict(table.memory[name]) for name in NAMES}
    table.round, table.call, table.asked = 2, 0, []
    table.study.method.round(table, {"for": {}, "rounds": 1})
    [one] = order_of(table, 2)
    [wake] = [asked for asked in table.asked if asked.question == "wake"]
    assert set(wake.message["gifts"]) == set(NAMES) - {one}
    again = desk(wakes=1, rounds=2, step=Step(lr=0.1, batch=1000))
    again.memory[one] = {"model": mean_of(before, one), "version": 1, "steps": 1}
    again.round, again.call = 2, wake.turn.call
    again.ask(peers.wake, {"gifts": {}}, to=[one])
    for leaf, value in again.memory[one]["model"].items():
        torch.testing.assert_close(value, table.memory[one]["model"][leaf], rtol=1e-5, atol=1e-6)


def mean_of(models: Any, one: str) -> Weights:
    """The sites' models' mean by cases, in float64 NumPy; of counters the largest."""
    kinds = models[one]["model"].kinds
    out = {}
    for leaf, value in models[one]["model"].items():
        stack = np.stack([models[name]["model"][leaf].numpy() for name in NAMES])
        n = np.array([CASES[name] for name in NAMES], dtype=np.float64)
        mean = stack.max(0) if kinds[leaf] is Kind.COUNTER else np.tensordot(n / n.sum(), stack.astype(np.float64), 1)
        out[leaf] = torch.from_numpy(np.asarray(mean)).to(value.dtype)
    return Weights(out, kinds)


# -- who is asked for what -------------------------------------------------------------------------------------------


def test_a_model_that_is_known_does_not_travel_again() -> None:
    """Every model travels to a site at most once; and over the whole run, exactly when its version is newer."""
    table = desk(rounds=4)
    table.play()
    versions: Counter[str] = Counter()
    seen: dict[str, dict[str, int]] = {name: {} for name in NAMES}
    given: dict[str, Any] = {}
    one = ""
    for asked in table.asked:
        site = asked.turn.site
        if asked.question == "known":
            one, given = site, {}
            assert asked.reply["seen"] == seen[site]
        elif asked.question == "give" and asked.turn.round <= 4:
            newer = versions[site] > seen[one].get(site, 0)
            assert asked.message["seen"] == seen[one].get(site, 0)
            assert ("weights" in asked.reply) == newer
            assert asked.reply["version"] == versions[site]
            given |= {site: versions[site]} if newer else {}
        elif asked.question == "wake":
            assert {k: g["version"] for k, g in asked.message["gifts"].items()} == given
            seen[site] |= given
            versions[site] += 1
    assert versions == dict.fromkeys(NAMES, 4)
    assert any("weights" not in a.reply for a in table.asked if a.question == "give")


def test_who_wakes_twice_in_a_row_is_given_nothing_the_second_time() -> None:
    """With one wake a round, as the paper draws them."""
    table = desk(wakes=1, rounds=8)
    table.play()
    order = [site for r in range(2, 9) for site in order_of(table, r)]
    assert len(order) == 7
    assert set(order) == set(NAMES), "over some rounds all wake"
    twice = [r for r in range(3, 9) if order_of(table, r) == order_of(table, r - 1)]
    assert twice, "the same site woke twice in a row"
    for r in twice:
        gifts = [asked.message["gifts"] for asked in table.asked if asked.turn.round == r and asked.question == "wake"]
        assert gifts == [{}], "its peers have nothing new"


def test_the_server_draws_who_wakes_and_holds_no_model() -> None:
    """By default each wakes once a round; the order changes; between rounds the state holds numbers only."""
    table = desk()
    state = table.study.start()
    orders = set()
    for table.round in range(1, 7):
        table.call = 0
        state = table.study.method.round(table, state)
        assert state == {"for": {}, "rounds": table.round}
        orders.add(tuple(order_of(table, table.round)))
        assert sorted(order_of(table, table.round)) == list(NAMES)
    assert len(orders) > 2
    models = [table.memory[name]["model"] for name in NAMES]
    assert not toy.same(dict(models[0]), dict(models[1]))
    closed = peers.gathered(table, state)
    for name, model in zip(NAMES, models, strict=True):
        assert toy.same(dict(published(closed, name)["weights"]), dict(model))


@pytest.mark.parametrize("lost", NAMES)
def test_killing_one_keeps_the_others_going(lost: str) -> None:
    """From round 2 on a site is gone: the others merge each other's models, and the last that it has given."""
    table = desk(rounds=4, silent={lost: (2, 3, 4, 5)})
    state = table.play()
    rest = {name for name in NAMES if name != lost}
    assert set(state["for"]) == rest
    assert table.memory[lost]["version"] == 1
    for name in rest:
        assert table.memory[name]["version"] == 4
        assert set(table.memory[name]["seen"]) == rest - {name}


def test_who_was_silent_at_the_start_is_given_all_when_it_wakes() -> None:
    table = desk(rounds=2, silent={"cairo": (1,)})
    table.play()
    [wake] = [a for a in table.asked if (a.turn.round, a.question, a.turn.site) == (2, "wake", "cairo")]
    assert set(wake.message["gifts"]) == {"amsterdam", "bergen"}
    first = order_of(table, 2)[0]
    if first != "cairo":
        assert "cairo" not in table.memory[first]["seen"], "what was never trained is not given"


# -- runs ------------------------------------------------------------------------------------------------------------


def test_scores_are_of_each_sites_own_model_and_at_the_end_of_each_model_everywhere(tmp_path: Path) -> None:
    found: list[Any] = []
    study = study_of(get("braintorrent"), BENCHES["2D"], every=1, rounds=2)
    state = run(study, tmp_path / "run", watch=lambda what, value: found.extend(value if what == "scores" else ()))
    pairs = {(r.split, r.trained_at, r.tested_at) for r in found}
    assert pairs == {("validation", a, a) for a in NAMES} | {("test", a, b) for a in NAMES for b in NAMES}
    table = Desk(study)
    for name in NAMES:  # of the model that was gathered, at home and abroad
        for at in NAMES:
            split = study.splits(at).test
            rows = study.task.scores(table.predictor(state, name), split, at, True)
            said = [r.value for r in found if (r.split, r.trained_at, r.tested_at) == ("test", name, at)]
            assert said == [row[-1] for row in rows]


def test_a_site_that_is_away_at_the_end_has_no_model_in_the_table(tmp_path: Path) -> None:
    found: list[Any] = []
    study = study_of(get("braintorrent"), BENCHES["2D"], rounds=2, silent={"cairo": (3,)})
    state = run(study, tmp_path / "run", watch=lambda what, value: found.extend(value if what == "scores" else ()))
    assert set(state["for"]) == {"amsterdam", "bergen"}
    assert {(r.trained_at, r.tested_at) for r in found} == {
        (a, b) for a in ("amsterdam", "bergen") for b in ("amsterdam", "bergen")
    }


@pytest.mark.parametrize("share", [0.2, 0.45, 0.7, 0.97])
def test_versions_and_models_are_right_after_a_kill(share: float, tmp_path: Path) -> None:
    """Killed at an event, with the last one amid the gathering; to the same state, scores and turns."""
    plan = toy.study(get("braintorrent").make(), step=Step(lr=0.1, batch=80), rounds=3, every=1)
    plan = replace(plan, silent={"bergen": (2,)})
    same_after_a_kill(plan, tmp_path, share)


@pytest.mark.parametrize("stop", ["closed 2.2", "closed 3.4", "closed 4.1"])
def test_hospitals_started_anew_go_on_over_a_bad_carrier(
    stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator is killed amid a wake, or amid the gathering, and all hospitals with it: only disks are left."""
    monkeypatch.setattr(remote, "PAUSES", (0.001, 0.01))
    study = study_of(get("braintorrent"), BENCHES["2D"], every=2, rounds=3)
    between = Between(study, tmp_path)

    def kill(seen: str) -> None:
        if seen == stop:
            raise Killed(seen)

    there = all_killed(between, kill)
    assert toy.same(there, run(study, tmp_path / "local"))
    assert record(tmp_path / "run") == record(tmp_path / "local")


def test_another_wake_is_another_run(tmp_path: Path) -> None:
    outcomes = {
        outcome(toy.study(get("braintorrent").make({"wakes": wakes}), rounds=3), tmp_path / str(wakes))
        for wakes in (None, 1, 2)
    }
    assert len(outcomes) == 3
