"""The report: nothing from outside, nothing injected, the verdicts and counts by hand, and a look by a real browser."""

import json
import re
import shutil
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedscan.ledger import Record, ScoreRow, SiteRow
from fedscan.report import tables, turns, words, write_report
from fedscan.statistics import Summary
from pages import Page, rows, small, turn
from records import make_record

HOSTILE = "<script>alert(1)</script>\"><img src=x onerror=alert(1)>'${{7*7}} $\\frac{1}$ --> 医院"


@pytest.fixture(scope="module")
def record() -> Record:
    return make_record()


@pytest.fixture(scope="module")
def page(record: Record, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(record, tmp_path_factory.mktemp("report"))


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
        ([-0.2, 0.1], tables.UNCLEAR),  # two patients: an interval from -1 to 1
        ([-0.2, -0.19, -0.21], tables.HARMED),  # three can be enough, where all lose alike
        ([-0.3], tables.UNKNOWN),  # one patient has no interval
        ([None, None, None, None, None, None], tables.UNKNOWN),
    ],
)
def test_verdicts_follow_the_printed_rule(changes: list[float | None], verdict: str) -> None:
    alone: list[float | None] = [0.8] * len(changes)
    ours = [None if change is None else 0.8 + change for change in changes]
    (gain,) = tables.gains(small(alone, ours))
    assert gain.verdict == verdict
    if verdict == tables.UNKNOWN:
        one = any(change is not None for change in changes)
        said = "Of one patient nothing can be said." if one else "There is no test case that both models scored."
        assert gain.text.endswith(said)


def test_a_gain_is_paired_and_says_what_it_left_out() -> None:
    (gain,) = tables.gains(small([0.5, 0.6, 0.7, 0.1, None], [0.6, 0.8, 0.7, None, 0.9]))
    assert gain.difference is not None
    assert gain.difference.mean == pytest.approx((0.1 + 0.2 + 0.0) / 3)
    assert (gain.difference.used, gain.difference.total, gain.difference.undefined) == (3, 5, 2)
    assert "2 scores of 5 undefined" in gain.text
    assert "The interval includes 0, so this may be chance." in gain.text


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


def test_without_a_comparison_no_gain_is_spoken_of(tmp_path: Path) -> None:
    record = replace(small([0.5, 0.7], [0.6, 0.8]), comparisons={})
    head = tables.headline(record, tables.gains(record))
    assert {len(row.cells) for row in (*head.sites, *head.sums)} == {1} == {len(head.columns)}
    text = Page(write_report(record, tmp_path).read_text()).text
    assert "no comparison with training alone" in text
    assert "Gain over training alone" not in text
    assert "undefined, 0/0" not in text


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


def test_every_structure_has_its_four_counts(record: Record, tmp_path: Path) -> None:
    """Five test cases: two in both outlines, one missed, one made up, one in neither."""
    sizes = [(5.0, 4.0), (5.0, 6.0), (5.0, 0.0), (0.0, 1.0), (0.0, 0.0)]
    at = (1, "test", "federation", "A")
    measured = [
        ScoreRow(*at, f"c{k}", f"s{k}", "a", metric, value)
        for k, pair in enumerate(sizes)
        for metric, value in zip(("reference_ml", "volume_ml"), pair, strict=True)
    ]
    bare = small([0.8] * 5, [0.8] * 5)
    assert tables.scores(bare).found == {}
    assert "In both outlines" not in write_report(bare, tmp_path).read_text()
    scored = replace(bare, scores=(*bare.scores, *measured))
    text = Page(write_report(scored, tmp_path).read_text()).text
    assert re.search(
        r"In both outlines +Missed by the model +Outlined by the model only +In neither +a +2 +1 +1 +1\b", text
    )
    assert sum(vars(tables.scores(record).found["lesion"]).values()) == 40
    assert list(tables.scores(record).found) == list(record.labels)


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
    of_lesion = ("lesion", "reference_ml")
    scores = tuple(replace(s, value=0.0) if (s.label, s.metric) == of_lesion else s for s in record.scores)
    spoilt = replace(record, turns=silent, sites=sites, scores=scores)
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
        (["weights", "statistics"], "No message from a hospital held images or labels.", True),
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
    assert any("held images or labels" in line for line in said.lines) == calm


def test_weights_beside_numbers_are_not_passed_over(record: Record) -> None:
    """FedSegNet's answers are of the class "statistics", and hold weights; those to "evaluate" hold none."""
    learn = replace(turn("A", 1, "statistics"), question="learn")
    scores = replace(turn("A", 1, "statistics"), question="evaluate")
    both = replace(record, turns=(learn, scores, scores), weighty=("learn",))
    said = turns.privacy(both).lines
    assert "What left: model weights, and scores and summary numbers (1 message); scores and summary" in said[2]
    assert [q.privacy for q in turns.traffic(both).questions] == [
        "model weights, and scores and summary numbers", "scores and summary numbers"
    ]  # fmt: skip
    assert any("Weights are learned from scans" in line for line in said)
    said = turns.privacy(replace(both, turns=(scores,))).lines
    assert not any("Weights are learned from scans" in line for line in said)
    assert any("names of case and patient" in line for line in said)


def test_the_page_says_that_it_shows_scans_itself(record: Record) -> None:
    itself = "This page itself shows slices of scans (section 4): share it accordingly."
    for some in (record.turns, ()):
        assert turns.privacy(replace(record, turns=some)).lines[1] == itself
        assert itself not in turns.privacy(replace(record, turns=some, overlays=())).lines


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


def test_each_hospital_has_its_own_account_of_what_left(record: Record, tmp_path: Path) -> None:
    """Two rounds answered, then one that is refused and two without an answer, in one hospital of two."""
    refused = replace(turn("Ash Park", 3, up=0, status="refused"), why="not finite")
    absent = [replace(turn("Ash Park", r, up=0, status="absent"), why="no progress for 9 s") for r in (4, 6)]
    some = (turn("Ash Park", 1, up=70), turn("Ash Park", 2, up=300), refused, *absent, turn("Birch Lane", 1))
    (ash, birch, *_) = turns.traffic(replace(record, turns=some)).sites
    assert ash.kinds == [turns.Kind("train", "model weights", 5, 2, 1, 2, "370 B", "300 B")]
    assert ash.missed == [
        "Refused at train in round 3: not finite", "Absent at train in rounds 4 and 6: no progress for 9 s"
    ]  # fmt: skip
    assert (ash.up, birch.up, birch.missed) == ("370 B", "100 B", [])
    text = Page(write_report(replace(record, turns=some), tmp_path).read_text()).text
    assert "Absent at train in rounds 4 and 6: no progress for 9 s" in text
    assert "by its yes" not in text


def test_what_left_is_held_against_what_was_agreed(record: Record, tmp_path: Path) -> None:
    some = (turn("Ash Park", 1, up=100), turn("Ash Park", 2, up=100), turn("Birch Lane", 1, up=100))
    two = replace(record, turns=some, between=True, sites=record.sites[:2], overlays=())

    def held(**agreed: tuple[int, int]) -> turns.Traffic:
        yes = {name.replace("_", " "): {"train": of} for name, of in agreed.items()}
        return turns.traffic(replace(two, agreed=yes))

    kept = held(Ash_Park=(100, 2), Birch_Lane=(100, 1))
    assert kept.agreed == "No hospital sent more, or more often, than its signed approval says."
    assert (kept.over, kept.sites[0].most, kept.sites[0].kinds[0].most) == (False, "200 B", "2 × 100 B")
    larger, oftener = held(Ash_Park=(99, 2), Birch_Lane=(100, 1)), held(Ash_Park=(100, 1), Birch_Lane=(100, 1))
    for found in (larger, oftener):
        assert found.agreed == "More left than the approval says, at Ash Park (train): ask the coordinator why."
        assert (found.over, found.sites[0].kinds[0].over, found.sites[1].kinds[0].over) == (True, True, False)
    assert held(Ash_Park=(100, 2)).agreed.endswith("Of Birch Lane no approval is in this record.")
    yes = {site.name: {"train": (100, 2)} for site in two.sites}
    text = Page(write_report(replace(two, agreed=yes), tmp_path).read_text()).text
    for said in ("At most, by its yes", "2 × 100 B", "than its signed approval says"):
        assert said in text


def test_between_hospitals_no_picture_is_missing(record: Record, tmp_path: Path) -> None:
    counted = tuple(replace(site, expected=site.used + 1, left_out=()) for site in record.sites)
    scores = replace(turn("Ash Park", 1, "statistics"), question="evaluate")
    apart = replace(record, between=True, overlays=(), sites=counted, turns=(scores,))
    text = Page(write_report(apart, tmp_path).read_text()).text
    for said in ("scans and outlines stayed at the hospitals", "is known at each hospital only", "left under codes"):
        assert said in text
    for said in ("No pictures were kept", "No case was left out", "names of case and patient"):
        assert said not in text


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


def test_a_single_round_has_whole_numbers_below_it() -> None:
    from fedscan.report.figures import Curve, curves

    one = Curve("A", [1], [0.5])
    assert set(re.findall(r">(\d+(?:\.\d+)?)</text>", str(curves(one, [one], "", "")))) & {"0.6", "0.8", "1.2"} == set()


def test_a_very_long_name_leaves_room_for_the_chart(record: Record, tmp_path: Path) -> None:
    name = "x" * 200
    sites = (replace(record.sites[0], name=name), *record.sites[1:])
    moved = tuple(replace(s, tested_at=name) if s.tested_at == record.sites[0].name else s for s in record.scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = write_report(replace(record, sites=sites, scores=moved), tmp_path).read_text()
    assert name in text
    assert "x" * 39 + "…" in text


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
