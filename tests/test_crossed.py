"""FedSegNet whose models are scored at the other sites: by hand, in bytes, and against a site that flatters itself."""

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import toy
from canned import Canned, leaves, update
from contract import Desk
from fedscan import trees, wire
from fedscan.method import Message, Question, Tree
from fedscan.methods.crossed import middle, verdicts
from fedscan.methods.registry import get
from fedscan.parts.channel import sparse, whole
from fedscan.run import run
from fedscan.site import Site, Splits, load
from fedscan.study import Study

torch.set_num_threads(1)
# Quality is Dice alone, and counts alone; updates travel as they are.
ALONE = {"aggregation": "cross-scored", "a": 1.0, "beta": 0.0, "gamma": 0.0, "c": 0.0}
ALONE |= {"w_min": 0.0, "w_max": 1.0, "ema": 0.0, "fraction": 1.0, "bits": 32}


def learned(x: float, cases: int, **more: Any) -> dict[str, Any]:
    return dict(update([x, 0.0], cases, diversity=0.5, **more))


def found(dice: float | None, hd95: float | None = None) -> dict[str, Any]:
    return {"dice": dice, "hd95": hd95}


def canned(**more: Any) -> Canned:
    """Sites that learn, and then judge the models of a, b and c in turn, but their own."""
    return Canned({
        "a": [learned(1.0, 10), found(0.4), found(0.5)],
        "b": [learned(2.0, 99, **more), found(0.8), found(0.5)],
        "c": [learned(4.0, 1), found(0.6), found(0.2)],
    })  # fmt: skip


def shares(sites: Canned, **options: Any) -> dict[str, float]:
    state = {"weights": leaves([1.0, -1.0], 1.0, 10)}
    after = get("fedsegnet").make({**ALONE, **options}).round(sites, state)
    return dict(after["shares"])


def test_shares_are_those_that_others_find() -> None:
    """a is 0.8 and 0.6 to the others, b 0.4 and 0.2, c 0.5 and 0.5: means 0.7, 0.3 and 0.5, of 1.5."""
    assert shares(canned()) == pytest.approx({"a": 0.7 / 1.5, "b": 0.3 / 1.5, "c": 0.5 / 1.5})


def test_a_site_cannot_flatter_itself() -> None:
    """What b says of its own model is not heard."""
    assert shares(canned(dice=1.0, hd95=0.0)) == shares(canned())


def test_each_model_goes_to_the_others_and_names_nobody() -> None:
    sites = canned()
    shares(sites)
    judged = [(name, message["update"]["w"][0].item()) for name, message in sites.asked if "update" in message]
    assert judged == [("b", 1.0), ("c", 1.0), ("a", 2.0), ("c", 2.0), ("a", 4.0), ("b", 4.0)]
    assert all(message.keys() == {"weights", "update"} for _, message in sites.asked if "update" in message)


def test_who_does_not_judge_is_left_out() -> None:
    """Without c's voice: a 0.8, b 0.4, and c 0.5 as before. Where nobody judges c, it takes the middle of a and b."""
    sites = canned()
    sites.answers["c"][1:] = [None, None]
    assert shares(sites) == pytest.approx({"a": 0.8 / 1.7, "b": 0.4 / 1.7, "c": 0.5 / 1.7})
    sites = canned()
    sites.answers["a"][2] = sites.answers["b"][2] = None
    assert shares(sites) == pytest.approx({"a": 0.7 / 1.5, "b": 0.3 / 1.5, "c": 0.5 / 1.5})


def test_a_silent_site_neither_counts_nor_judges() -> None:
    sites = canned()
    sites.answers = {"a": [learned(1.0, 10), found(0.4)], "b": [learned(2.0, 99), found(0.8)], "c": [None]}
    assert shares(sites) == pytest.approx({"a": 0.8 / 1.2, "b": 0.4 / 1.2})
    alone = canned()
    alone.answers = {"a": [learned(1.0, 10)], "b": [None], "c": [None]}
    assert shares(alone) == {"a": 1.0}


def test_nobody_could_judge() -> None:
    sites = canned()
    for name in "abc":
        sites.answers[name][1:] = [found(None), None]
    assert shares(sites) == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})


def test_the_middle_of_what_is_said() -> None:
    assert middle([found(0.2, 9.0), found(0.9, 1.0), found(0.8, 3.0)]) == found(0.8, 3.0)
    assert middle([found(0.2, 9.0), found(0.8, 3.0), found(None, 1.0)]) == found(0.5, 6.0)  # no Dice, not heard
    assert middle([found(0.2, 9.0), found(0.8, None)]) == found(0.5, None)  # no distance is infinite
    assert middle([found(0.2, 9.0), found(0.8, 3.0), found(0.5, None)]) == found(0.5, 9.0)
    assert middle([]) == found(None)
    assert verdicts({"a": [found(0.2, 2.0)], "b": [], "c": [found(0.4, 4.0)]})["b"] == pytest.approx(found(0.3, 3.0))


def test_one_liar_among_four_judges_changes_little() -> None:
    honest = [found(0.80), found(0.82), found(0.84)]
    assert middle([*honest, found(0.0)])["dice"] == pytest.approx(0.81)


def test_a_judge_scores_the_model_that_was_sent() -> None:
    """Against weights and change added here, on the judge's own validation cases; with coding both ways, too."""
    for channel, options in ((whole, {"bits": 32}), (sparse(0.5, 8), {"fraction": 0.5, "down_bits": 8})):
        method = get("fedsegnet").make({"aggregation": "cross-scored", **options})
        desk = Desk(toy.study(method, rounds=2, silent={"bergen": (1,)}))
        state = desk.study.start()
        for number in (1, 2):
            desk.round, desk.call, desk.asked = number, 0, []
            after = method.round(desk, state)
            weights, model = state["weights"], toy.Net().eval()
            sent = [a for a in desk.asked if a.question == "learn"]
            judged = [a for a in desk.asked if a.question == "judge"]
            pairs = [(x, y) for x in sent for y in sent if x is not y]
            assert [a.turn.site for a in judged] == [y.turn.site for _, y in pairs]
            for (trained, _), asked in zip(pairs, judged, strict=True):
                load(model, trees.add(weights, channel.decode(trained.reply["update"], weights.schema)))
                right = desk.study.task.quality(model, desk.study.splits(asked.turn.site).validation)
                assert asked.reply == right
            state = after
        assert not desk.refused, desk.refused


def spoiled(name: str) -> Splits:
    """The toy's cases; at cairo all labels are turned round, those it judges by, too."""
    splits = toy.data(name)
    if name == "cairo":
        for split in (splits.train, splits.validation):
            split.y = 1 - split.y  # type: ignore[attr-defined]
    return splits


def test_who_is_wrong_alike_in_training_and_validation_is_found_out() -> None:
    """Its own validation flatters it: by that it counts as any other. By what others find it does not."""
    made = {
        mode: Desk(replace(toy.study(get("fedsegnet").make({**ALONE, "aggregation": mode})), data=spoiled)).play(1)
        for mode in ("adaptive", "cross-scored")
    }
    assert made["adaptive"]["shares"]["cairo"] > 0.3
    assert made["cross-scored"]["shares"]["cairo"] < 0.8 * made["adaptive"]["shares"]["cairo"]


def test_bytes_of_the_judges_stand_in_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of three sites is sent two changes more, by the hash of the weights it holds, and says two numbers."""
    monkeypatch.setattr(wire, "BLOB_BYTES", 1000)  # the toy's model is small
    study = toy.study(get("fedsegnet").make({"aggregation": "cross-scored"}))
    run(study, tmp_path)
    db = sqlite3.connect(tmp_path / "journal.sqlite")
    rows = db.execute("SELECT round, site, question, privacy, bytes_down, bytes_up FROM turns").fetchall()
    db.close()
    size = sum(leaf.nbytes for leaf in study.start()["weights"].schema.values())
    up = {(r, site): b for r, site, question, _, _, b in rows if question == "learn"}
    judged = [row for row in rows if row[2] == "judge"]
    assert sorted((r, site) for r, site, *_ in judged) == sorted(2 * [(r, s) for r in (1, 2) for s in toy.NAMES])
    for r, site, _, privacy, down, back in judged:
        assert privacy == "statistics"
        assert back < 250  # two numbers
        change = min(b for (n, other), b in up.items() if (n, other) != (r, site))
        assert 32 + 0.5 * change < down < 32 + max(up.values()) + 3000  # a header that names each leaf
        assert down < size + change  # the weights are not sent again


def test_cross_scoring_without_quality_asks_nobody() -> None:
    method = get("fedsegnet").make({"aggregation": "cross-scored", "alpha": 0.0})
    assert [q.name for q in method.answers] == ["learn"]
    assert [q.name for q in get("fedsegnet").make().answers] == ["learn"]
    assert [q.name for q in get("fedsegnet").make({"aggregation": "cross-scored"}).answers] == ["learn", "judge"]


def judge_of(study: Study) -> Question:
    return study.questions["judge"]


@pytest.mark.parametrize("reply", [found(1.5), found(0.5, -1.0), {"dice": 0.5}, found(float("nan"))], ids=str)
def test_a_verdict_that_cannot_be_is_refused_and_left_out(reply: Tree) -> None:
    study = toy.study(get("fedsegnet").make({"aggregation": "cross-scored"}))
    question = judge_of(study)

    def lying(site: Site, message: Message) -> Tree:
        return reply if site.name == "cairo" else question.reply(site, message)

    answers = tuple(replace(q, reply=lying) if q.name == "judge" else q for q in study.method.answers)
    desk = Desk(replace(study, method=replace(study.method, answers=answers)))
    desk.play()
    assert len(desk.refused) == 4  # two models in each of two rounds
    assert all("cairo" in why for why in desk.refused)


def test_a_judge_that_holds_another_model_says_so() -> None:
    study = toy.study(get("fedsegnet").make({"aggregation": "cross-scored", "down_bits": 8}))
    desk = Desk(study)
    site = desk.site("cairo")
    with pytest.raises(ValueError, match="cairo does not hold the model"):
        judge_of(study)(site, {"version": 3, "update": torch.zeros(9, dtype=torch.uint8)})
    site.state |= {"version": 3, "base": study.start()["weights"]}
    with pytest.raises(ValueError, match="the change that cairo was to judge does not fit"):
        judge_of(study)(site, {"version": 3, "update": torch.zeros(9, dtype=torch.uint8)})
