"""BrainTorrent and FedAsync between hospitals, with real keys, policies and signed yeses."""

import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from fedscan.consortium import serving
from fedscan.consortium.asks import Asks, Hospital, asks_of
from fedscan.consortium.words import words
from fedscan.launch import How
from fedscan.ledger import read_record
from fedscan.spec import Refused
from fedscan.studyfile import load
from joined import SITES, Hospitals
from tinystudy import write_scans, write_study

torch.set_num_threads(1)
LONG = "epochs = 5\n[run]\nevery = 2\n"
POLICY = "[answers]\nleast_cases = 5\n[leaves]\nto_other_hospitals = true\n"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "GREETING", 0.05)


def agreed(folder: Path, method: str, rounds: int) -> Hospitals:
    hospitals = Hospitals(folder, method, LONG)
    text = (folder / "study.toml").read_text()
    (folder / "study.toml").write_text(text.replace("rounds = 2", f"rounds = {rounds}"))
    for name in SITES:
        if method == "braintorrent":
            with pytest.raises(Refused, match="other hospitals"):
                hospitals.approve(name)
            (folder / name / "policy.toml").write_text(POLICY)
        hospitals.approve(name)
    return hospitals


def asked(folder: Path, method: str, *overrides: str) -> Asks:
    if not (folder / "scans").exists():
        write_scans(folder / "scans", ("east", "north", "west"), 5)
    file = load(write_study(folder, method), overrides)
    return asks_of(file, Hospital("east", 5, ("t1",), {"ball": 1}, 24), ("east", "north", "west"), "charite")


def limits(hospitals: Hospitals, name: str) -> dict[str, int]:
    with hospitals.there(name) as desks:
        return dict(desks[name].limits or {})


def test_what_peers_are_asked_and_that_it_is_passed_on(tmp_path: Path) -> None:
    asks = asked(tmp_path, "braintorrent")
    said = {q.name: q for q in asks.questions}
    assert {n: (q.times, q.rounds, q.last, q.passed, q.weights) for n, q in said.items()} == {
        "known": (1, 2, 0, False, False),
        "give": (2, 2, 1, True, True),
        "wake": (1, 2, 0, False, False),
        "evaluate": (1, 2, 3, False, False),
    }
    assert said["give"].steps == said["wake"].steps == 2
    assert said["wake"].down > 2 * said["give"].up > said["wake"].up
    page = words(asks)
    give, wake = (page[page.index(f"braintorrent:{name}") :].split("\n\n")[0] for name in ("give", "wake"))
    assert "YOUR ANSWER IS PASSED ON TO OTHER HOSPITALS AS IT CAME." in give
    assert "Asked twice a round, in 2 rounds, and once at the end." in give
    assert "perhaps " in give
    assert "PASSED ON" not in wake
    assert "class: nothing" in page[page.index("braintorrent:known") :].split("\n")[0]
    assert "to the coordinator and 4P down to the one that wakes" in page


def test_how_often_a_hospital_may_be_asked_where_nobody_waits(tmp_path: Path) -> None:
    page = words(asked(tmp_path, "fedasync"))
    assert "Asked up to 3 times a round, in 2 rounds." in page
    assert "PASSED ON" not in page
    page = words(asked(tmp_path, "fedasync", "method.arrivals=1"))
    assert "Asked once a round, in 2 rounds." in page


@pytest.mark.parametrize("slow", ["west", pytest.param("east", marks=pytest.mark.slow)])
def test_a_fast_hospital_answers_nearly_alone_and_within_its_yes(slow: str, tmp_path: Path) -> None:
    """What its yes allows is enough, though it answers more often than the other; nothing is refused."""
    hospitals = agreed(tmp_path, "fedasync", 4)
    with hospitals.there(*SITES) as desks:
        answer = desks[slow].handle

        def handle(body: bytes) -> bytes:
            time.sleep(0.2)
            return answer(body)

        desks[slow].handle = handle  # type: ignore
        serving.serve(hospitals.file, tmp_path / "run", hospitals.table(how=How(report=False)))
    record = read_record(tmp_path / "run")
    came = Counter(turn.site for turn in record.turns if (turn.question, turn.status) == ("train_near", "answered"))
    fast = next(name for name in SITES if name != slow)
    assert came[fast] > came[slow]
    assert {turn.status for turn in record.turns if turn.question == "evaluate"} == {"answered"}
    assert not [turn.why for turn in record.turns if turn.why]
    assert max(came.values()) <= limits(hospitals, fast)["train_near"] == 8


def test_peers_answer_each_other_within_their_yes_and_each_model_is_scored_everywhere(tmp_path: Path) -> None:
    hospitals = agreed(tmp_path, "braintorrent", 3)
    with hospitals.there(*SITES):
        serving.serve(hospitals.file, tmp_path / "run", hospitals.table(how=How(report=False)))
    record = read_record(tmp_path / "run")
    assert {turn.status for turn in record.turns} == {"answered"}
    asked = Counter((turn.site, turn.question) for turn in record.turns)
    for name in SITES:
        allowed = limits(hospitals, name)
        for question in ("known", "give", "wake", "evaluate"):
            assert 0 < asked[name, question] <= allowed[question]
    assert sorted(path.name for path in (tmp_path / "run/models").iterdir()) == ["east.safetensors", "west.safetensors"]
    found = {(row.trained_at, row.tested_at) for row in record.scores if row.split == "test"}
    assert found == {(a, b) for a in SITES for b in SITES}
