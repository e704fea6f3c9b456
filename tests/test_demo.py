"""The demo, as a newcomer sees it: it learns, it helps, and it warns the hospital that is harmed."""

import re
from pathlib import Path

import pytest

from fedscan import statistics
from fedscan.demo import demo
from fedscan.ledger import Record, read_record


def dice(record: Record) -> tuple[dict[str, float], dict[str, float]]:
    """Test Dice per hospital: of the shared model, and of each hospital's own."""
    ours = [s for s in record.scores if s.split == "test" and s.trained_at == "federation"]
    alone = [s for s in record.comparisons["local-only"] if s.trained_at == s.tested_at]
    found = [{k: v.mean or 0.0 for k, v in statistics.by_site(rows, "dice").items()} for rows in (ours, alone)]
    return found[0], found[1]


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


@pytest.mark.slow
def test_the_demo_learns_and_helps(tmp_path: Path) -> None:
    page = demo(tmp_path / "demo")
    record = read_record(tmp_path / "demo")
    federated, alone = dice(record)
    assert len(federated) == 5
    assert mean(federated) >= 0.70
    assert mean(federated) >= mean(alone) + 0.02
    for site, value in federated.items():
        assert value >= alone[site] - 0.02, site
    text = page.read_text()
    assert "Individuals, lesions, scanners and readers are simulated" in text
    assert "harmed</" not in text
    assert demo(tmp_path / "demo") == page, "a demo that has ended is shown again, not run again"


@pytest.mark.slow
def test_the_hard_site_is_told_that_it_is_harmed(tmp_path: Path) -> None:
    page = demo(tmp_path / "demo", hard_site=True)
    federated, alone = dice(read_record(tmp_path / "demo"))
    assert len(federated) == 6
    worst = min(federated, key=lambda site: federated[site] - alone[site])
    assert worst == "Hazel"
    assert federated["Hazel"] < alone["Hazel"] - 0.02
    plain = re.sub(r"<[^>]+>", "", page.read_text())
    assert re.search(r"Hazel:?\s*harmed", plain)
    assert "should keep its own or a personalised model" in plain or "keep its own model" in plain
