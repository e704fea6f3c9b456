"""Partial work: who is late, how much each site does, what becomes of it; and that nothing changes without it."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import toy
from contract import Desk
from fedscan.method import Absent
from fedscan.methods.registry import get
from fedscan.parts.work import Work, allotted
from fedscan.run import run
from fedscan.step import Step
from fedscan.study import Study

torch.set_num_threads(1)
NAMES = tuple("abcde")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def study(options: dict[str, Any], epochs: int = 3, name: str = "fedprox", **changes: Any) -> Study:
    """64, 48 and 80 cases in batches of 16: 4, 3 and 5 batches an epoch."""
    return toy.study(get(name).make(options), step=Step(lr=0.1, batch=16, epochs=epochs), **changes)


@pytest.mark.parametrize(
    ("share", "of", "late"),
    [(0.0, 5, 0), (0.5, 4, 2), (0.5, 5, 2), (0.5, 3, 1), (0.9, 5, 4), (0.9, 10, 9), (1.0, 3, 3)],
)
def test_how_many_are_late(share: float, of: int, late: int) -> None:
    parts = Work(share).parts([f"site{i}" for i in range(of)], seeded())
    assert len(parts) == late
    assert all(0 < part <= 1 for part in parts.values())


def test_who_is_late_changes_from_round_to_round_and_not_with_the_order_of_names() -> None:
    plan = Work(0.4)
    assert plan.parts(NAMES, seeded(1)) == plan.parts(NAMES[::-1], seeded(1))
    seen = Counter(name for seed in range(500) for name in plan.parts(NAMES, seeded(seed)))
    assert all(abs(seen[name] - 200) < 5 * math.sqrt(500 * 0.4 * 0.6) for name in NAMES)


def test_epochs_are_drawn_evenly_from_one_to_all() -> None:
    """Li et al., section 5.2: from 1 to E, both included."""
    site = Desk(study({}, epochs=4)).site("amsterdam")
    draws = [part for seed in range(400) for part in Work(1.0).parts(NAMES, seeded(seed)).values()]
    drawn = Counter(Work(1.0).batches(site, part)[1] for part in draws)
    assert drawn.keys() == {0.25, 0.5, 0.75, 1.0}
    assert all(abs(n - 500) < 5 * math.sqrt(2000 * 0.25 * 0.75) for n in drawn.values())


@pytest.mark.parametrize(
    ("unit", "part", "batches"),
    [("epochs", 1.0, 12), ("epochs", 0.5, 8), ("epochs", 1 / 3, 4), ("epochs", 0.01, 4), ("epochs", 2 / 3, 8),
     ("batches", 1.0, 12), ("batches", 0.5, 6), ("batches", 0.51, 7), ("batches", 0.01, 1), ("batches", 0.25, 3)],
)  # fmt: skip
def test_a_part_of_three_epochs_of_four_batches(unit: Any, part: float, batches: int) -> None:
    site = Desk(study({}, epochs=3)).site("amsterdam")
    found, done = Work(unit=unit).batches(site, part)
    assert len(list(found)) == batches
    assert done == pytest.approx(batches / 12)


def test_a_part_is_what_a_shorter_training_gives() -> None:
    """Cairo, with a third of three epochs, sends what it sends in a study of one epoch, to the bit; others do all."""
    slow, short, full = (
        Desk(study(options, epochs)) for options, epochs in (({"work": {"cairo": 1 / 3}}, 3), ({}, 1), ({}, 3))
    )
    for desk in (slow, short, full):
        desk.play(1)
    sent = [{a.turn.site: a.reply for a in desk.asked} for desk in (slow, short, full)]
    assert toy.same(dict(sent[0]["cairo"]["update"]), dict(sent[1]["cairo"]["update"]))
    assert toy.same(dict(sent[0]["bergen"]["update"]), dict(sent[2]["bergen"]["update"]))
    assert {name: reply["steps"] for name, reply in sent[0].items()} == {"amsterdam": 12, "bergen": 9, "cairo": 5}
    assert {name: reply["work"] for name, reply in sent[0].items()} == {"amsterdam": 1, "bergen": 1, "cairo": 1 / 3}


def test_what_stragglers_did_is_kept_and_counts_by_cases() -> None:
    state = Desk(study({"stragglers": 1.0, "unit": "batches"})).play()
    assert state["shares"] == pytest.approx({"amsterdam": 64 / 192, "bergen": 48 / 192, "cairo": 80 / 192})


def test_the_paper_s_comparison() -> None:
    """The same sites are late in both; FedAvg (mu 0) drops them and FedProx keeps what they have."""
    keeps = Desk(study({"stragglers": 0.5, "mu": 0.1}, rounds=4))
    drops = Desk(study({"stragglers": 0.5, "mu": 0.0, "late": "dropped"}, rounds=4))
    keeps.play()
    drops.play()
    late = {(a.turn.round, a.turn.site) for a in keeps.asked if "work" in a.message}
    assert len(late) == 4
    assert {(a.turn.round, a.turn.site) for a in keeps.asked} == {(r, n) for r in (1, 2, 3, 4) for n in toy.NAMES}
    assert {(a.turn.round, a.turn.site) for a in drops.asked} == {
        (r, n) for r in (1, 2, 3, 4) for n in toy.NAMES
    } - late
    assert len({name for _, name in late}) > 1


def test_dropping_is_fedavg_over_the_others() -> None:
    """Who is dropped is as one who is silent."""
    dropped = Desk(study({"stragglers": 0.4, "mu": 0.0, "late": "dropped"}, rounds=1))
    state = dropped.play()
    (late,) = set(toy.NAMES) - {a.turn.site for a in dropped.asked}
    silent = Desk(study({}, name="fedavg", rounds=1, silent={late: (1,)})).play()
    assert toy.same(state, silent)


def test_a_given_part_is_not_dropped_and_not_drawn() -> None:
    plan = {"stragglers": 1.0, "work": {"cairo": 0.5}, "late": "dropped"}
    desk = Desk(study(plan))
    desk.play()
    assert {(a.turn.site, a.message["work"]) for a in desk.asked} == {("cairo", 0.5)}


def test_a_round_of_which_all_are_dropped_is_one_without_answers(tmp_path: Path) -> None:
    everyone = {"stragglers": 1.0, "late": "dropped"}
    with pytest.raises(Absent, match="no answer to 'learn' from amsterdam, bergen, cairo"):
        Desk(study(everyone)).play()
    skipped: list[str] = []
    made = study(everyone)
    state = run(made, tmp_path / "run", watch=lambda what, value: skipped.append(value) if what == "skipped" else None)
    assert len(skipped) == 2
    assert toy.same(state, made.start())


def test_without_partial_work_nothing_changes() -> None:
    method = get("fedavg").make()
    assert allotted(method, Work()) is method
    plain = Desk(study({"mu": 0.1}))
    state = plain.play()
    assert all("work" not in a.message and "work" not in a.reply for a in plain.asked)
    everything = Desk(study({"mu": 0.1, "work": {"cairo": 1.0}})).play()
    assert toy.same(state, everything)
    one_epoch = [Desk(study({"stragglers": s}, epochs=1)).play() for s in (0.0, 1.0)]
    assert toy.same(*one_epoch)  # of one epoch there is no smaller part, unless it is of batches
    of_batches = Desk(study({"stragglers": 1.0, "unit": "batches"}, epochs=1)).play()
    assert not toy.same(one_epoch[0], of_batches)


def test_a_site_that_does_not_exist_has_no_work() -> None:
    with pytest.raises(ValueError, match="work is given for 'calro', which is no site of the study: amsterdam, bergen"):
        study({"work": {"calro": 0.5}}).start()


@pytest.mark.parametrize(
    "wrong", [{"work": {"cairo": 0.0}}, {"work": {"cairo": 2.0}}, {"stragglers": 1.5}, {"unit": "x"}]
)
def test_parts_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} of method 'fedprox' cannot be"):
        get("fedprox").make(wrong)


def test_accumulated_gradients_of_a_part_are_stepped() -> None:
    """Five batches at two a step are three steps, the last on one."""
    made = study({"work": {"amsterdam": 5 / 12}, "unit": "batches"}, rounds=1)
    desk = Desk(replace(made, step=replace(made.step, accumulate=2)))
    desk.play()
    assert next(a.reply["steps"] for a in desk.asked if a.turn.site == "amsterdam") == 3
