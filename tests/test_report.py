"""The report: nothing from outside, nothing injected, the verdicts and counts by hand, and a look by a real browser."""

import base64
import json
import re
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedscan.ledger import Overlay, Record, ScoreRow, SiteRow, TurnRow
from fedscan.report import comparison, overlays, tables, turns, words, write_comparison, write_report
from fedscan.statistics import Summary, macro, paired
from records import make_record

HOSTILE = "<script>alert(1)</script>\"><img src=x onerror=alert(1)>'${{7*7}} $\\frac{1}$ --> 医院"


class Page(HTMLParser):
    """Every tag, attribute and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def record() -> Record:
    return make_record()


@pytest.fixture(scope="module")
def page(record: Record, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(record, tmp_path_factory.mktemp("report"))


def rows(site: str, values: list[float | None], trained_at: str = "federation", label: str = "a") -> list[ScoreRow]:
    return [
        ScoreRow(1, "test", trained_at, site, f"c{k}", f"s{k}", label, "dice", value) for k, value in enumerate(values)
    ]


def small(alone: list[float | None], ours: list[float | None]) -> Record:
    """One hospital whose cases scored ``alone`` and ``ours``."""
    return replace(
        make_record(rounds=1, cases=1),
        sites=(SiteRow("A", 9, 9, 2, 1, len(ours)),),
        scores=tuple(rows("A", ours)),
        comparisons={"local-only": tuple(rows("A", alone, "A"))},
        turns=(),
        overlays=(),
    )


def turn(site: str, r: int, privacy: str = "weights", up: int = 100, status: str = "answered") -> TurnRow:
    return TurnRow(r, r, site, "train", privacy, status, 1.0, 1000, up, 0.0, "", "", "" if up else "gone")


# What the file is


def test_one_small_file_that_asks_nothing_of_the_network(page: Path) -> None:
    text = page.read_text()
    assert [p.name for p in page.parent.iterdir()] == ["report.html"]
    assert len(text.encode()) < 5_000_000
    parsed = Page(text)
    outward = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "formaction", "background"}
    links = [value for name, value in parsed.attributes if name in outward]
    assert len(links) > 50
    assert all(link.startswith(("data:", "#")) for link in links)
    assert all(inner.startswith(("#", "data:")) for inner in re.findall(r"url\(['\"]?([^)]*)", text))
    assert "@import" not in text
    assert "://" not in text
    assert not {"script", "iframe", "object", "embed", "base"} & set(parsed.tags)


def test_sections_stand_in_order_and_every_picture_has_words(page: Path) -> None:
    text = page.read_text()
    places = [text.index(f'<section id="s{n}">') for n in range(1, 10)]
    assert places == sorted(places)
    pictures = re.findall(r"<svg ([^>]*)>", text)
    assert len(pictures) == 2 + 15
    assert all('aria-label="' in attributes and 'role="img"' in attributes for attributes in pictures)
    shown = Page(text).text
    for said in ("Elm Court is harmed", "simulated", "fedscan run brain.toml --seed 0", "2 min 23 s"):
        assert said in shown


def test_the_same_record_gives_the_same_bytes(record: Record, page: Path, tmp_path: Path) -> None:
    assert write_report(record, tmp_path / "new" / "folder").read_bytes() == page.read_bytes()


def test_hostile_names_are_text_and_nothing_else(record: Record, page: Path, tmp_path: Path) -> None:
    def hostile(name: str) -> str:
        return HOSTILE if name == "Elm Court" else name

    spoilt = replace(
        record,
        name=HOSTILE,
        command=HOSTILE,
        notes=(HOSTILE,),
        travels=HOSTILE,
        study={HOSTILE: {"x": HOSTILE}},
        versions={HOSTILE: HOSTILE},
        labels={HOSTILE if k == "lesion" else k: v for k, v in record.labels.items()},
        sites=tuple(
            replace(s, name=hostile(s.name), about=HOSTILE, left_out=((HOSTILE, HOSTILE),)) for s in record.sites
        ),
        turns=tuple(replace(t, site=hostile(t.site), why=HOSTILE, question=HOSTILE) for t in record.turns),
        scores=tuple(replace(s, tested_at=hostile(s.tested_at)) for s in record.scores),
        comparisons={
            k: tuple(replace(s, tested_at=hostile(s.tested_at), trained_at=hostile(s.trained_at)) for s in v)
            for k, v in record.comparisons.items()
        },
        overlays=tuple(replace(o, site=hostile(o.site), case=HOSTILE) for o in record.overlays),
    )
    parsed = Page(write_report(spoilt, tmp_path).read_text())
    benign = Page(page.read_text())
    assert set(parsed.tags) == set(benign.tags)
    assert parsed.tags.count("image") == benign.tags.count("image")
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert HOSTILE in "".join(parsed.words)
    assert "49" not in re.findall(r"\$\{?(\d+)", parsed.text)


# Who gained, and who was harmed


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ([-0.03, -0.05, -0.04, -0.03, -0.05, -0.04], tables.HARMED),  # -0.04, sd 0.009: [-0.049, -0.031]
        ([0.03, 0.05, 0.04, 0.03, 0.05, 0.04], tables.HELPED),
        ([-0.24, 0.16, -0.24, 0.16, -0.24, 0.16], tables.UNCLEAR),  # -0.04, sd 0.22: the interval includes 0
        ([-0.015, -0.014, -0.016, -0.015, -0.014, -0.016], tables.UNCLEAR),  # sure, but within 0.02
        ([-0.02] * 6, tables.UNCLEAR),  # exactly 0.02 is not more than 0.02
        ([-0.2, 0.1], tables.HARMED),  # fewer than five patients: the difference alone
        ([0.03], tables.HELPED),
        ([None, None, None, None, None, None], tables.UNKNOWN),
    ],
)
def test_verdicts_follow_the_printed_rule(changes: list[float | None], verdict: str) -> None:
    alone: list[float | None] = [0.8] * len(changes)
    ours = [None if change is None else 0.8 + change for change in changes]
    (gain,) = tables.gains(small(alone, ours))
    assert gain.verdict == verdict
    if verdict == tables.UNKNOWN:
        assert gain.text == "There is no test case that both models scored."


def test_a_gain_is_paired_and_says_what_it_left_out() -> None:
    (gain,) = tables.gains(small([0.5, 0.6, 0.7, 0.1, None], [0.6, 0.8, 0.7, None, 0.9]))
    assert gain.difference is not None
    assert gain.difference.mean == pytest.approx((0.1 + 0.2 + 0.0) / 3)
    assert (gain.difference.used, gain.difference.total, gain.difference.undefined) == (3, 5, 2)
    assert "2 scores of 5 undefined" in gain.text
    assert "judged by the difference alone" in gain.text


def test_a_chance_finding_is_called_one() -> None:
    (gain,) = tables.gains(small([0.8] * 6, [0.56, 0.96, 0.56, 0.96, 0.56, 0.96]))
    assert "−0.040" in gain.text
    assert "may be chance" in gain.text


def test_the_page_advises_the_harmed_hospital(page: Path, record: Record) -> None:
    text = Page(page.read_text()).text
    assert [g.site for g in tables.gains(record) if g.verdict == tables.HARMED] == ["Elm Court"]
    assert re.search(
        r"Elm Court is harmed by this federation\..*? It should keep its own model, or a personalised", text
    )
    assert "below −0.02 and its 95 % interval excludes 0" in text


def test_headline_sums_hospitals_patients_and_the_worst() -> None:
    record = small([0.5, 0.7], [0.6, 0.8])
    record = replace(
        record,
        sites=(*record.sites, SiteRow("B", 9, 9, 2, 1, 1)),
        scores=(*record.scores, *rows("B", [0.4])),
        comparisons={"local-only": (*record.comparisons["local-only"], *rows("B", [0.5], "B"))},
    )
    head = tables.headline(record, tables.gains(record))
    assert head.columns == ["Trained alone", "Federated (fedsegnet)"]
    texts = [[cell and cell.text for cell in row.cells] for row in head.sums]
    assert texts == [["0.55", "0.55", "0.000"], ["0.57", "0.60", "+0.033"], ["0.50", "0.40", "−0.100"]]
    assert [cell and cell.support for cell in head.sums[2].cells] == ["B", "B", "B"]


def test_the_model_of_a_site_is_its_own_where_it_has_one() -> None:
    everything = [*rows("A", [0.1], "A"), *rows("A", [0.2], "B"), *rows("B", [0.3], "B"), *rows("A", [0.9])]
    assert [row.value for row in tables.home(everything)] == [0.1, 0.3]
    shared = [*rows("A", [0.4]), *rows("B", [0.5], "pooled")]
    assert tables.home(shared) == shared
    late = [replace(row, round=3) for row in shared]
    assert tables.final([*shared, *late, replace(late[0], split="validation", round=9)]) == late


def test_cross_table_shows_every_model_everywhere(record: Record) -> None:
    table = tables.cross(record)
    names = [name for name, _ in table.rows]
    assert names[:2] == ["Ash Park alone", "Birch Lane alone"]
    assert names[-2:] == ["Federation (fedsegnet)", "All data pooled"]
    cells = dict(table.rows)["Ash Park alone"]
    assert [cell.css for cell in cells].count("hi home") == 1
    away = [
        r.value
        for r in record.comparisons["local-only"]
        if r.trained_at == "Ash Park" and r.tested_at == "Dunmore" and r.metric == "dice"
    ]
    assert cells[table.columns.index("Dunmore")].text == f"{np.mean([v for v in away if v is not None]):.2f}"


# Undefined scores


def test_undefined_scores_are_counted_and_never_averaged(record: Record) -> None:
    table = tables.scores(record)
    lesion = next(group for group in table.groups if group.label == "lesion")
    cell = {row.name: row.cells[0] for row in lesion.sites}["Birch Lane"]
    kept = [
        r.value
        for r in record.scores
        if (r.split, r.tested_at, r.label, r.metric) == ("test", "Birch Lane", "lesion", "dice")
    ]
    defined = [v for v in kept if v is not None]
    assert (len(kept), len(defined)) == (8, 7)
    assert cell is not None
    assert cell.text == f"{sum(defined) / 7:.2f}"
    assert cell.support == "7/8"
    assert cell.gap
    assert lesion.macro[0] is not None
    assert lesion.macro[0].support == "39/40"


def test_a_score_undefined_everywhere_is_shown_as_such(tmp_path: Path) -> None:
    record = small([0.8, 0.8], [None, None])
    text = Page(write_report(record, tmp_path).read_text()).text
    assert "undefined, 0/2" in text
    group = tables.scores(record).groups[0]
    assert [cell.support for cell in group.macro if cell] == ["undefined, 0/2"]
    assert "cannot be said" in text
    assert "1 of whom nothing can be said" in text
    assert "none harmed" not in text
    assert not re.search(r"\bnan\b", text, re.I)


@pytest.mark.parametrize("method", ["fedsegnet", "local-only", "centralised"])
def test_a_bare_record_still_makes_a_page(record: Record, method: str, tmp_path: Path) -> None:
    bare = replace(
        record,
        method=method,
        sites=(),
        turns=(),
        scores=(),
        comparisons={},
        overlays=(),
        versions={},
        notes=(),
        study={},
    )
    text = Page(write_report(bare, tmp_path).read_text()).text
    for said in ("No pictures were kept", "No test scores", "No validation scores", "Nothing left any hospital"):
        assert said in text


def test_a_run_of_a_baseline_is_called_by_its_name(record: Record, tmp_path: Path) -> None:
    own = replace(record, method="local-only", scores=record.comparisons["local-only"])
    head = tables.headline(own, tables.gains(own))
    assert head.columns == ["Trained alone", "All data pooled"]
    assert "trained a model each" in Page(write_report(own, tmp_path).read_text()).text


def test_what_spoils_every_number_is_said_first(record: Record, tmp_path: Path) -> None:
    silent = tuple(replace(t, status="refused", bytes_up=0) if t.round in (2, 9) else t for t in record.turns)
    sites = (*record.sites[:-1], replace(record.sites[-1], test=0))
    gone = tuple(
        ScoreRow(10, "test", "federation", s.name, "c", "c", "lesion", "reference_ml", 0.0) for s in record.sites
    )
    spoilt = replace(record, turns=silent, sites=sites, scores=(*record.scores, *gone))
    text = Page(write_report(spoilt, tmp_path).read_text()).text
    assert "Nothing was learned in 2 rounds of 10 (2 and 9)" in text
    assert f"{sites[-1].name} has no test case" in text
    assert "No test case holds lesion" in text
    whole = Page(write_report(record, tmp_path).read_text()).text
    for said in ("Nothing was learned", "has no test case", "No test case holds"):
        assert said not in whole


# What left, and who took part


@pytest.mark.parametrize(
    ("classes", "first", "calm"),
    [
        (["weights", "statistics"], "No images or labels left a hospital.", True),
        (["weights", "features"], "No image left a hospital, but inner features of scans did", False),
        (["predictions"], "No image left a hospital, but predictions for cases did", False),
        (["weights", "images", "images"], "Images left hospitals, in 2 messages.", False),
        (["weights", "telemetry"], "Something this page cannot judge left the hospitals: telemetry.", False),
    ],
)
def test_what_left_is_said_by_the_rows_alone(record: Record, classes: list[str], first: str, calm: bool) -> None:
    said = turns.privacy(replace(record, turns=tuple(turn("A", r, c) for r, c in enumerate(classes))))
    assert said.lines[0].startswith(first)
    assert said.calm == calm
    assert any("No images or labels" in line for line in said.lines) == calm


def test_weights_beside_numbers_are_not_passed_over(record: Record) -> None:
    """FedSegNet's answers are of the class "statistics", and hold weights."""
    said = turns.privacy(replace(record, turns=(turn("A", 1, "statistics"),))).lines
    assert "summary numbers and scores, with or without weights (1 message)" in said[1]
    assert any("Weights are learned from scans" in line for line in said)
    scores = replace(turn("A", 1, "statistics"), question="evaluate")
    said = turns.privacy(replace(record, turns=(scores,))).lines
    assert not any("Weights are learned from scans" in line for line in said)
    assert any("names of case and patient" in line for line in said)


def test_images_that_were_not_sent_did_not_leave(record: Record) -> None:
    silent = (turn("A", 1), turn("A", 2, "images", up=0, status="absent"))
    assert turns.privacy(replace(record, turns=silent)).calm


def test_bytes_add_up_by_message_and_site(record: Record) -> None:
    some = (turn("Ash Park", 1), turn("Ash Park", 2, up=300), turn("Birch Lane", 1, up=0, status="absent"))
    small_one = replace(record, turns=some)
    table = turns.traffic(small_one)
    (train,) = table.questions
    assert (train.asked, train.answered, train.down, train.up, train.each) == (3, 2, "3.00 kB", "400 B", "200 B")
    assert [(s.up, s.down) for s in table.sites][:2] == [("400 B", "2.00 kB"), ("0 B", "1.00 kB")]
    assert turns.per_round(small_one) == pytest.approx(400 / 3)
    tested = replace(small_one, turns=(*some, turn("Ash Park", record.rounds + 1, up=9999)))
    assert turns.per_round(tested) == pytest.approx(400 / 3), "the test is no round"


def test_presence_shows_the_worst_of_a_round(record: Record) -> None:
    table = turns.taking(record)
    by_name = {row.name: [cell.status for cell in row.cells] for row in table.rows}
    assert by_name["Dunmore"] == ["answered"] * 2 + ["absent"] * 2 + ["answered"] * 6
    assert by_name["Elm Court"][5] == "refused"
    assert [row.total for row in table.rows] == ["10 of 10", "9 of 10", "10 of 10", "8 of 10", "9 of 10"]
    assert table.rounds == [str(r) for r in range(1, 11)]
    last = tuple(replace(t, round=11) for t in record.turns if t.round == 10)
    assert turns.taking(replace(record, turns=(*record.turns, *last))).rounds[-1] == "test"
    shown = tables.curves(record)
    assert shown is not None
    assert {c.name: (c.absent, c.refused) for c in shown[1]}["Dunmore"] == ([3, 4], [])


# Pictures


def one_case(shape: tuple[int, ...] = (10, 12, 6), spacing: tuple[float, ...] = (1.0, 2.0, 4.0)) -> Overlay:
    """Made with axes (x, y, z) = (right, front, top); a record holds (z, y, x)."""
    reference, prediction = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    reference[2:6, 3:7, 2:4] = 1
    prediction[4:8, 3:7, 2:4] = 1
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return Overlay("A", "c", "worst", 0.5, image.T, reference.T, prediction.T, spacing[::-1])


def decoded(svg: str, kind: str) -> list[np.ndarray]:
    found = re.findall(rf'<image class="{kind}"[^>]*base64,([^"]*)"', svg)
    return [np.asarray(Image.open(BytesIO(base64.b64decode(data)))) for data in found]


def test_planes_are_to_scale_and_turned_as_on_a_workstation() -> None:
    svg = str(overlays.draw(one_case(), {"a": 1}).svg)
    sizes = re.findall(r'<image class="base" width="([\d.]+)" height="([\d.]+)"', svg)
    # axes of 10 x 1, 12 x 2 and 6 x 4 mm: axial right-front, coronal right-top, sagittal front-top
    assert [(float(w), float(h)) for w, h in sizes] == [(10, 24), (10, 24), (24, 24)]
    axial = decoded(svg, "base")[0]
    assert axial.shape == (12, 10)
    assert axial[0, 0] > axial[0, -1]  # values grow to the right and the front: the front right is at the top left
    assert axial[0, 0] > axial[-1, 0]


def test_errors_are_missed_or_extra_where_the_masks_differ() -> None:
    svg = str(overlays.draw(one_case(), {"a": 1}).svg)
    axial = decoded(svg, "err v0")[0]  # rows run from the front, columns from the right
    expected = np.zeros((12, 10), np.uint8)
    expected[5:9, 6:8] = overlays.MISSED  # first axis 2 and 3
    expected[5:9, 2:4] = overlays.EXTRA  # first axis 6 and 7
    np.testing.assert_array_equal(axial, expected)


def test_confusion_of_two_structures_has_its_own_colour_and_views() -> None:
    case = one_case()
    other = np.where(case.reference == 1, 2, 0).astype(np.uint8)
    svg = str(overlays.draw(replace(case, prediction=other), {"a": 1, "b": 2}).svg)
    assert set(np.unique(decoded(svg, "err v0")[0])) == {0, overlays.CONFUSED}
    assert set(np.unique(decoded(svg, "err v1")[0])) == {0, overlays.MISSED}
    assert set(np.unique(decoded(svg, "err v2")[0])) == {0, overlays.EXTRA}


def test_an_outline_runs_around_its_mask_in_mm() -> None:
    svg = str(overlays.draw(one_case(), {"a": 1}).svg)
    (path, *_) = re.findall(r'<path class="ref v0 v1" d="([^"]*)"', svg)
    points = np.array([[float(v) for v in point.split()] for point in re.findall(r"[\d.]+ [\d.]+", path)])
    # columns 4 to 7 from the right, rows 5 to 8 from the front of 2 mm: outer edges at 4..8 and 10..18 mm
    np.testing.assert_allclose([points.min(0), points.max(0)], [[4, 10], [8, 18]], atol=0.01)


def test_a_plane_goes_where_every_structure_shows() -> None:
    mask = np.zeros((8, 8, 8), np.uint8)
    mask[:, :, 1:] = 1
    mask[3:5, 3:5, 6] = 2  # small, so the largest cross-section of all labels together would miss it
    assert overlays._slices(mask, {"a": 1, "b": 2})[2] == 6


def test_a_flat_image_is_drawn_as_it_lies() -> None:
    flat = one_case()
    flat = replace(flat, image=flat.image[0].T, reference=flat.reference[2].T, prediction=flat.prediction[2].T)
    svg = str(overlays.draw(replace(flat, spacing=(1.0, 2.0)), {"a": 1}).svg)
    (drawn,) = decoded(svg, "base")
    assert drawn.shape == (10, 12)
    assert drawn[0, 0] < drawn[-1, -1]
    with pytest.raises(ValueError, match="same axes"):
        overlays.draw(replace(flat, spacing=(1.0,)), {"a": 1})


def test_many_large_cases_still_fit_and_the_worst_stay() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(96, 96, 96)).astype(np.float32)
    big = [replace(one_case((96, 96, 96)), image=noise, rank=rank) for rank in ("best", "median", "worst")]
    kept, left_out = overlays.pictures(big, {"a": 1}, budget=50_000)
    assert [p.rank for p in kept] == ["worst"]
    assert [o.rank for o in left_out] == ["best", "median"]
    assert len(overlays.pictures(big, {"a": 1})[0]) == 3


# Words


def test_numbers_have_sensible_digits() -> None:
    assert [words.number(v) for v in (0.8449, None, -0.004, 0.0)] == ["0.84", "–", "0.00", "0.00"]
    assert [words.number(v, signed=True) for v in (0.0512, -0.0512, 0.001)] == ["+0.051", "−0.051", "+0.001"]
    assert words.number(3.14159, "hd95") == "3.1"
    two = Summary(0.7, -0.571, 1.971, 2, 2, 0, 2)
    assert words.interval(two) == "[0.00, 1.00]"
    assert words.interval(replace(two, mean=-0.1, low=-3.9, high=0.4), signed=True) == "[−1.000, +0.400]"
    assert words.interval(replace(two, mean=2.0), "hd95") == "[0.0, 2.0]"
    assert [words.number(v, "volume_error") for v in (0.123, -0.05, 0.001)] == ["+12 %", "−5 %", "0 %"]
    assert [words.size(n) for n in (12, 1234, 45_600_000, 123e6, 2.5e9)] == [
        "12 B",
        "1.23 kB",
        "45.6 MB",
        "123 MB",
        "2.50 GB",
    ]
    assert [words.duration(s) for s in (4.21, 42, 200, 7500)] == ["4.2 s", "42 s", "3 min 20 s", "2 h 5 min"]
    assert words.listed(["a", "b", "c"]) == "a, b and c"


# Methods side by side


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
    from fedscan.compare import figures

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


def test_a_single_round_has_whole_numbers_below_it() -> None:
    from fedscan.report.figures import Curve, curves

    one = Curve("A", [1], [0.5])
    assert set(re.findall(r">(\d+(?:\.\d+)?)</text>", str(curves(one, [one], "", "")))) & {"0.6", "0.8", "1.2"} == set()


def test_a_hospital_at_nought_is_drawn_too() -> None:
    from fedscan.report.comparison import lines

    _, (dot,) = lines({"fedavg": replace(small([0.1], [0.0, 0.0]), comparisons={})})
    assert (dot.mean, list(dot.points)) == (0.0, [0.0])


def test_a_very_long_name_leaves_room_for_the_chart(record: Record, tmp_path: Path) -> None:
    name = "x" * 200
    sites = (replace(record.sites[0], name=name), *record.sites[1:])
    moved = tuple(replace(s, tested_at=name) if s.tested_at == record.sites[0].name else s for s in record.scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = write_report(replace(record, sites=sites, scores=moved), tmp_path).read_text()
    assert name in text
    assert "x" * 39 + "…" in text


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


# A real browser


def browsed(path: Path, folder: Path) -> tuple[str, str, list[str]]:
    """The page as chromium built it, what its console said, and every address it asked for."""
    browser = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
    )
    if not browser:
        pytest.skip("NO BROWSER: chromium is not installed, so nobody has seen this report load")
    net = folder / "net.json"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-extensions"]
    flags += ["--enable-logging=stderr", "--v=0", "--dump-dom"]
    command = [browser, *flags, "--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={net}"]
    done = subprocess.run(
        [*command, f"--user-data-dir={folder / 'profile'}", path.as_uri()], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    events = [event.get("params", {}) for event in json.loads(net.read_text())["events"]]
    # The browser itself calls home; what a page asks for has an origin.
    asked = {e["url"] for e in events if "url" in e and e.get("initiator", "not an origin") != "not an origin"}
    return done.stdout, "\n".join(console), sorted(url for url in asked if not url.startswith(("file:", "data:")))


def test_a_browser_loads_it_in_silence(page: Path, tmp_path: Path) -> None:
    dom, console, asked = browsed(page, tmp_path)
    assert dom.count("<section") == 9
    assert "Elm Court is harmed" in dom
    assert console == ""
    assert asked == []


def test_the_browser_test_would_notice(page: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<h1>x</h1><img src="http://outside.invalid/x.png"><script>console.error("oh"); nothing()</script>')
    _, console, asked = browsed(bad, tmp_path)
    assert "oh" in console
    assert "nothing is not defined" in console
    assert "http://outside.invalid/x.png" in asked


def test_the_axial_plane_of_a_prepared_scan_is_axial(tmp_path: Path) -> None:
    """From a file with known directions through preprocessing to the picture: the first plane is cut across z."""
    import nibabel

    from fedscan.data.preprocess import Recipe, compute
    from fedscan.data.records import Case

    voxels = np.zeros((12, 10, 8), np.float32)  # x to the right, y to the front, z to the top
    voxels[6:, :, 5] = 100.0  # the right half of one axial slice
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "scan.nii.gz")
    case = Case("c", "s", "A", {"t1": tmp_path / "scan.nii.gz"}, None)
    image = compute(case, Recipe(("t1",), grid=(8, 10, 12), normalise="none"))[0][0]
    mask = (image > 50).astype(np.uint8)
    svg = str(overlays.draw(Overlay("A", "c", "best", 1.0, image, mask, mask, (1.0, 1.0, 1.0)), {"a": 1}).svg)
    axial = decoded(svg, "base")[0]
    assert axial.shape == (10, 12)
    assert axial[:, :6].min() > axial[:, 6:].max()  # the patient's right is at the picture's left
