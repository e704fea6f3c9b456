"""Every method of the registry keeps every promise; a new one is tested without a line written here."""

from pathlib import Path

import pytest
import torch

import contract
import contract_bytes
from contract import BENCHES
from fedscan.methods.registry import get, methods
from fedscan.step import Step

torch.set_num_threads(1)
NAMES = list(methods())
BENCH = list(BENCHES)
every_method = pytest.mark.parametrize("name", NAMES)
every_bench = pytest.mark.parametrize("bench", BENCH)


def first(bench: str) -> pytest.MarkDecorator:
    """Runs a test on this bench, and in CI on all."""
    others = [pytest.param(other, marks=pytest.mark.slow) for other in BENCH if other != bench]
    return pytest.mark.parametrize("bench", [bench, *others])


reducing = pytest.mark.parametrize("name", [n for n in NAMES if get(n).card.reduces])


@every_bench
@every_method
def test_learns(name: str, bench: str) -> None:
    contract.check_learns(get(name), BENCHES[bench])


@first("2D")
@every_method
def test_repeats(name: str, bench: str) -> None:
    contract.check_repeats(get(name), BENCHES[bench])


@first("3D batch")
@every_method
def test_pure(name: str, bench: str) -> None:
    contract.check_pure(get(name), BENCHES[bench])


@first("2D")
@every_method
def test_strict(name: str, bench: str, tmp_path: Path) -> None:
    contract.check_strict(get(name), BENCHES[bench], tmp_path)


@every_bench
@every_method
def test_goes_on_without_a_silent_site_and_in_a_new_process(name: str, bench: str, tmp_path: Path) -> None:
    contract.check_goes_on(name, bench, tmp_path)


@first("2D")
@every_method
def test_refuses_nan(name: str, bench: str, tmp_path: Path) -> None:
    contract.check_refuses_nan(get(name), BENCHES[bench], tmp_path)


@first("2D")
@every_method
def test_refuses_poison(name: str, bench: str) -> None:
    contract.check_refuses_poison(get(name), BENCHES[bench])


@every_bench
@reducing
def test_reduces(name: str, bench: str) -> None:
    contract.check_reduces(get(name), BENCHES[bench])


@every_bench
@every_method
def test_transfers(name: str, bench: str) -> None:
    contract.check_transfers(get(name), BENCHES[bench])


@first("3D batch")
@every_method
def test_statistics_travel(name: str, bench: str) -> None:
    contract.check_statistics_travel(get(name), BENCHES[bench])


@first("3D batch")
@every_method
def test_says_what_travels(name: str, bench: str) -> None:
    contract.check_says_what_travels(get(name), BENCHES[bench])


@every_method
def test_refuses_strangers(name: str) -> None:
    contract.check_refuses_strangers(get(name), BENCHES["2D"])


@every_bench
@every_method
def test_bytes(name: str, bench: str) -> None:
    contract_bytes.check_bytes(get(name), BENCHES[bench])


PLAIN = Step("sgd", 0.01, batch=4, moments="averaged")
HEAVY = Step("sgd", 0.01, 0.9, batch=4, moments="averaged")
ADAM = Step("adam", 0.01, batch=4, moments="travels")


@pytest.mark.parametrize("step", [PLAIN, HEAVY, ADAM], ids=["plain", "momentum", "adam"])
@every_method
def test_moments(name: str, step: Step) -> None:
    contract.check_moments(get(name), BENCHES["3D instance"], step)


@every_method
def test_card_says_what_leaves(name: str) -> None:
    contract.check_privacy(get(name))
    card = get(name).card
    assert card.differs.endswith(".")
    assert card.reduces is None or card.reduces.to in NAMES


def test_the_ring_hands_on() -> None:
    contract.check_hands_on(get("cwt"), BENCHES["2D"])


@pytest.mark.parametrize("bench", ["2D", "3D batch", "3D instance"])
def test_norms_stay_home(bench: str) -> None:
    study = contract.study_of(get("fedbn"), BENCHES[bench])
    model = study.terms.model
    norms = {
        f"{prefix}.{leaf}"
        for prefix, module in model.named_modules()
        if "Norm" in type(module).__name__
        for leaf in module.state_dict()
    }
    assert norms
    contract.check_home_stays(get("fedbn"), BENCHES[bench], norms)
