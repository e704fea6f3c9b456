"""Methods side by side: paired with the first, seeds averaged, and nothing said that no hospital would have sent."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fedscan.compare import figures
from fedscan.ledger import Record
from fedscan.report import comparison, turns, write_comparison, write_report
from fedscan.report.warnings import of_runs
from fedscan.statistics import macro, paired
from pages import Page, rows, small
from records import make_record


@pytest.fixture(scope="module")
def record() -> Record:
    return make_record()


def test_comparison_is_paired_with_the_first_method(tmp_path: Path) -> None:
    runs: dict[str, Record | Sequence[Record]] = {
        "fedsegnet": make_record("fedsegnet", 1),
        "fedavg": [make_record("fedavg", 1, seed=s, lift=-0.05) for s in (1, 2)],
        "fedprox": make_record("fedprox", 1, seed=3),
    }
    made, dots = comparison.lines(runs)
    first = comparison.pooled_seeds(comparison.seeds(runs["fedsegnet"]))
    other = comparison.pooled_seeds(comparison.seeds(runs["fedavg"]))
    expected = paired(other, first, "dice")
    assert expected.difference is not None
    assert expected.difference == pytest.approx(-0.05, abs=0.01)
    assert made[1].difference.startswith(f"−{-expected.difference:.3f} [")
    assert made[1].seeds == 2
    assert made[1].p == "< 0.001"
    assert made[0].p == ""
    assert dots[0].mean == pytest.approx(macro(first, "dice").mean)
    assert made[0].hd95 is not None
    assert made[0].hd95.support == "119/120 scores"
    text = Page(write_comparison(runs, tmp_path).read_text()).text
    assert "p (Holm)" in text
    assert "fedavg 2 seeds" in re.sub(r"\s+", " ", text)


def test_what_is_no_federation_sends_nothing(tmp_path: Path) -> None:
    """Table, numbers and pages agree: a simulation carries the models of local-only, no hospital would send them."""
    runs = {name: [make_record(name, 1), make_record(name, 1, seed=2)] for name in ("fedavg", "local-only")}
    assert all(sum(t.bytes_up for t in of[0].turns) > 0 for of in runs.values())
    fedavg, alone = comparison.lines(runs)[0]
    assert (fedavg.traffic.endswith("B"), alone.traffic) == (True, "–")
    numbers = figures(runs)
    assert numbers[0]["bytes_up_per_round"] == sum(filter(None, map(turns.per_round, runs["fedavg"]))) / 2 > 0
    assert numbers[1]["bytes_up_per_round"] is None
    said = "hospitals that train alone send nothing"
    assert said in write_comparison(runs, tmp_path).read_text()
    assert said not in write_comparison({"fedavg": runs["fedavg"]}, tmp_path).read_text()
    page = Page(write_report(runs["local-only"][0], tmp_path).read_text()).text
    assert said in page
    assert re.search(r"Sent per hospital and round\s*–\s*no federation", page)
    assert said not in write_report(runs["fedavg"][0], tmp_path).read_text()


def test_a_hospital_at_nought_is_drawn_too() -> None:
    from fedscan.report.comparison import lines

    _, (dot,) = lines({"fedavg": replace(small([0.1], [0.0, 0.0]), comparisons={})})
    assert (dot.mean, list(dot.points)) == (0.0, [0.0])


def test_seeds_are_averaged_case_by_case(record: Record) -> None:
    of_seeds: list[list[float | None]] = [[0.4, None, 0.2], [0.6, 0.5, 0.4]]
    one, two = (replace(record, scores=tuple(rows("A", values))) for values in of_seeds)
    values = [row.value for row in comparison.pooled_seeds([one, two])]
    assert values == [pytest.approx(0.5), None, pytest.approx(0.3)]


def test_nothing_to_compare_is_said(record: Record, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one method"):
        write_comparison({}, tmp_path)
    with pytest.raises(ValueError, match="no test Dice in the runs of b"):
        write_comparison({"a": record, "b": replace(record, scores=())}, tmp_path)
    with pytest.raises(ValueError, match="without a run"):
        write_comparison({"a": []}, tmp_path)


def test_what_spoils_a_method_stands_above_its_rank(tmp_path: Path) -> None:
    """A method that learned nothing must not be ranked as if it had."""
    well = make_record("fedavg", 2)
    spoilt = replace(well, method="fedprox", turns=tuple(replace(t, status="refused", bytes_up=0) for t in well.turns))
    nothing = "Nothing was learned in 2 rounds of 2 (1 and 2): no hospital gave a usable answer."
    text = Page(write_comparison({"fedavg": well, "fedprox": spoilt}, tmp_path).read_text()).text
    assert text.count(nothing) == 1
    assert f"fedprox: {nothing}" in text
    assert text.index(nothing) < text.index("p (Holm)")
    both = of_runs({"fedavg": [well, replace(spoilt, seed=1)], "fedprox": [replace(spoilt, seed=2), spoilt]})
    assert [said.partition(":")[0] for said in both] == ["fedavg (seed 1) and fedprox"]
    assert of_runs({"fedprox": [spoilt], "fedavg": [spoilt]})[0].startswith(nothing), "what is of all names none"
    assert of_runs({"fedavg": [well]}) == []
    numbers = figures({"fedavg": [well], "fedprox": [spoilt]})
    assert (numbers[0]["warnings"], len(numbers[1]["warnings"])) == ([], 1)


def test_the_definition_of_hd95_stands_over_its_column(tmp_path: Path) -> None:
    plain = make_record("fedavg", 1)
    other = {"hd95": "hd95_pooled"}
    pooled = replace(plain, scores=tuple(replace(s, metric=other.get(s.metric, s.metric)) for s in plain.scores))
    assert "HD95 (mm)" in write_comparison({"fedavg": plain}, tmp_path).read_text()
    text = write_comparison({"fedavg": pooled, "fedprox": pooled}, tmp_path).read_text()
    assert "HD95 pooled (mm)" in text
    assert "HD95 (mm)" not in text
    assert comparison.lines({"fedavg": pooled})[0][0].hd95 == comparison.lines({"fedavg": plain})[0][0].hd95
