"""Options that change what is said, or to whom, keep all that their methods promise."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch

import contract
import toy
from contract import BENCHES
from fedscan.engines.workers import Workers
from fedscan.method import Method
from fedscan.methods.registry import Entry, get
from fedscan.run import run
from fedscan.step import Step
from fedscan.study import Study
from test_resume import Killed, Watch, go, rows

torch.set_num_threads(1)


def having(name: str, options: Mapping[str, Any]) -> Entry[Any]:
    """The entry with these hyperparameters in place of its defaults."""
    make: Any = get(name).function

    @wraps(make)
    def made(**others: Any) -> Method:
        method: Method = make(**{**others, **options})
        return method

    return replace(get(name), function=made)


CROSSED = {"aggregation": "cross-scored"}
VARIANTS = {
    "cross-scored": having("fedsegnet", CROSSED),
    "cross-scored, coded both ways": having("fedsegnet", {**CROSSED, "fraction": 0.3, "down_bits": 8}),
    "cross-scored, whole": having("fedsegnet", {**CROSSED, "bits": 32}),
    "threshold": having("fedsegnet", {"fraction": {"above": 0.002}}),
    "threshold, coded both ways": having(
        "fedavg-compressed", {"fraction": {"above": 0.002}, "down_fraction": {"above": 0.0005}}
    ),
    "stragglers": having("fedprox", {"stragglers": 0.5, "work": {"cairo": 0.5}, "unit": "batches"}),
    "stragglers dropped": having("fedprox", {"stragglers": 0.4, "late": "dropped"}),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@every_variant
@pytest.mark.parametrize("bench", ["2D", "3D batch"])
def test_learns(variant: str, bench: str) -> None:
    contract.check_learns(VARIANTS[variant], BENCHES[bench])


@every_variant
def test_repeats_and_is_pure(variant: str) -> None:
    contract.check_repeats(VARIANTS[variant], BENCHES["2D"])
    contract.check_pure(VARIANTS[variant], BENCHES["2D"])


@every_variant
def test_strict(variant: str, tmp_path: Path) -> None:
    contract.check_strict(VARIANTS[variant], BENCHES["2D"], tmp_path)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "stragglers dropped"])  # cairo may be one
def test_refuses_nan_and_poison(variant: str, tmp_path: Path) -> None:
    contract.check_refuses_nan(VARIANTS[variant], BENCHES["2D"], tmp_path)
    contract.check_refuses_poison(VARIANTS[variant], BENCHES["2D"])


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "both ways" not in v])  # there, changes are published
def test_travels(variant: str) -> None:
    entry = VARIANTS[variant]
    contract.check_transfers(entry, BENCHES["3D batch"])
    contract.check_statistics_travel(entry, BENCHES["3D batch"])
    contract.check_says_what_travels(entry, BENCHES["2D"])
    contract.check_privacy(entry)


@every_variant
def test_moments(variant: str) -> None:
    contract.check_moments(VARIANTS[variant], BENCHES["2D"], Step("adam", 0.01, batch=16, moments="averaged"))


@pytest.mark.slow
@every_variant
def test_killed_at_every_third_event(variant: str, tmp_path: Path) -> None:
    check_resumes(variant, tmp_path, 3)


@pytest.mark.parametrize("variant", ["cross-scored, coded both ways", "threshold, coded both ways", "stragglers"])
def test_killed_and_resumed_with_a_silent_site(variant: str, tmp_path: Path) -> None:
    check_resumes(variant, tmp_path, 20)


def check_resumes(variant: str, tmp_path: Path, every: int) -> None:
    """Killed at every so many events of the run: the same bits and the same ledger."""

    def plan() -> Study:
        changes: dict[str, Any] = {"step": Step(lr=0.1, batch=80, epochs=2), "silent": {"bergen": (2,)}}
        return toy.study(VARIANTS[variant].make({}), **changes)

    whole = Watch()
    expected = go(plan(), tmp_path / "whole", whole)
    ledger = rows(tmp_path / "whole")
    for k in range(every // 2, whole.seen, every):
        folder = tmp_path / str(k)
        with pytest.raises(Killed):
            go(plan(), folder, Watch(k))
        after = Watch()
        assert toy.same(go(plan(), folder, after, resume=True), expected), f"killed at event {k}: other numbers"
        assert rows(folder) == ledger, f"killed at event {k}: another ledger"
        assert max(after.computed.values(), default=0) <= 1
        shutil.rmtree(folder)


def test_two_workers_give_the_same_bits(tmp_path: Path) -> None:
    made = [
        run(toy.study(VARIANTS["cross-scored, coded both ways"].make({})), tmp_path / str(i), **how)
        for i, how in enumerate(({}, {"engine": partial(Workers, number=2)}))
    ]
    assert toy.same(*made)


def test_neutral_cross_scoring_is_fedavg() -> None:
    rule = get("fedsegnet").card.reduces
    assert rule is not None
    for aggregation in ("adaptive", "cross-scored"):
        options = {**rule.own, "aggregation": aggregation}
        ours, theirs = (
            contract.Desk(toy.study(e.make(o))).play() for e, o in ((get("fedsegnet"), options), (get("fedavg"), {}))
        )
        assert toy.same(dict(ours["weights"]), dict(theirs["weights"]))
