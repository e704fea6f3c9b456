"""FedSegNet's weights and coded updates: every factor by hand, every bound kept, nothing lost over rounds."""

import math
import re
import sqlite3
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import toy
from canned import KINDS, Reply, leaves, rounds, update, w
from contract import Desk, check_site_feedback
from fedscan import wire
from fedscan.averaging import mean
from fedscan.compress import Codec
from fedscan.memory import SiteDisk
from fedscan.method import Method, State
from fedscan.methods.registry import get
from fedscan.parts import adaptive
from fedscan.parts.channel import Above, sparse, whole
from fedscan.parts.share import parameters
from fedscan.run import Problem, run
from fedscan.schema import Kind, Weights
from fedscan.site import Splits, copy_of
from fedscan.studyfile import load

torch.set_num_threads(1)

# -- FedSegNet's weights ---------------------------------------------------------------------------------------------

SITES: dict[str, Reply] = {
    "a": update([3.0, 4.0], 10, dice=0.9, hd95=5.0, diversity=0.8),  # length 5
    "b": update([0.0, 10.0], 30, dice=0.5, hd95=20.0, diversity=0.2),  # length 10
    "c": update([0.0, 5.0], 20, dice=0.7, hd95=10.0, diversity=1.0),  # length 5
}
FREE = {"w_min": 0.0, "w_max": 1.0, "ema": 0.0}


def shares_of(sites: Mapping[str, Reply], state: State | None = None, **options: Any) -> dict[str, float]:
    found = adaptive.adaptive(**{**FREE, **options})(sites, state or {})
    return {name: s / math.fsum(found.values()) for name, s in found.items()}


def test_adaptive_weights_by_numpy() -> None:
    n, dice, hd95 = np.array([10.0, 30, 20]), np.array([0.9, 0.5, 0.7]), np.array([5.0, 20, 10])
    d, even = np.array([5.0, 10, 5]) / 5.0, np.array([0.8, 0.2, 1.0])
    q = 0.3 * dice + 0.7 * np.exp(-hd95 / 8)
    s = n**0.5 * (q / q.mean()) ** 2 * np.exp(-1.5 * np.maximum(0, d - 1)) * (1 + 0.7 * even)
    found = shares_of(SITES, a=0.3, h=8.0, alpha=2.0, beta=1.5, gamma=0.7, c=0.5)
    assert list(found.values()) == pytest.approx((s / s.sum()).tolist())


def test_adaptive_weights_reach_the_model() -> None:
    """Only the quality counts, and only b's is not zero: the model moves by b's update."""
    poor = {"dice": 0.0, "hd95": None}
    said = {**SITES, "a": {**SITES["a"], **poor}, "c": {**SITES["c"], **poor}}
    options = {"alpha": 1.0, "beta": 0.0, "gamma": 0.0, "fraction": 1.0, "bits": 32, **FREE}
    assert w(rounds(get("fedsegnet").make(options), said)) == [1.0, 9.0]


def test_every_factor_can_be_switched_off() -> None:
    off = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0}
    exact = adaptive.adaptive(**{**FREE, **off})(SITES, {})
    assert exact == {"a": 10.0, "b": 30.0, "c": 20.0}  # cases, to the bit
    assert list(shares_of(SITES, **off, c=0.0).values()) == pytest.approx([1 / 3] * 3)
    assert shares_of(SITES, beta=0.0, gamma=0.0, c=0.0)["a"] > 1 / 3  # quality alone
    assert shares_of(SITES, alpha=0.0, gamma=0.0, c=0.0)["b"] < 1 / 3  # divergence alone
    assert shares_of(SITES, alpha=0.0, beta=0.0, c=0.0)["c"] > 1 / 3  # diversity alone


def test_divergence_only_is_equation_17() -> None:
    method = get("fedsegnet").make({"aggregation": "divergence-only", "beta": 1.0, **FREE, "fraction": 1.0, "bits": 32})
    plain = {name: {"update": r["update"], "cases": r["cases"]} for name, r in SITES.items()}
    state = rounds(method, plain)
    e = math.exp(-1)
    assert state["shares"] == pytest.approx({"a": 1 / (2 + e), "b": e / (2 + e), "c": 1 / (2 + e)})


def test_weight_falls_with_divergence() -> None:
    found = []
    for factor in (1.0, 1.5, 2.0, 5.0, 50.0):
        b = update([0.0, 5.0 * factor], 30, dice=0.5, hd95=20.0, diversity=0.2)
        found.append(shares_of({**SITES, "b": b})["b"])
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == len(found)


def test_direction_counts_where_asked() -> None:
    """b goes against the others: 1 - cos = 2 for it, and its weight falls further."""
    said = {n: update([1.0 if n != "b" else -1.0, 0.0], 1) for n in "abc"}
    options = {"alpha": 0.0, "gamma": 0.0}
    assert shares_of(said, **options)["b"] == pytest.approx(1 / 3)
    d = adaptive.divergences(said, cosine=True)
    assert d["b"] == pytest.approx(3.0)  # the others' sum is (2, 0)
    assert shares_of(said, **options, cosine=True)["b"] < 1 / 3


def test_a_site_without_dice_takes_the_mean_of_the_others() -> None:
    """b could not be scored, so has no HD95 either: its q is the mean of a's and c's, worked out from Dice and HD95."""
    said = {**SITES, "b": {**SITES["b"], "dice": None, "hd95": None}}
    q = {"a": 0.3 * 0.9 + 0.7 * math.exp(-5 / 8), "c": 0.3 * 0.7 + 0.7 * math.exp(-10 / 8)}
    q["b"] = (q["a"] + q["c"]) / 2
    assert adaptive.qualities(said, a=0.3, h=8.0) == pytest.approx(q)
    total = sum(q.values())
    found = shares_of(said, a=0.3, h=8.0, beta=0.0, gamma=0.0, c=0.0)
    assert found == pytest.approx({name: q[name] / total for name in "abc"})
    blind = {name: {**r, "dice": None, "hd95": None} for name, r in SITES.items()}
    assert shares_of(blind) == pytest.approx(shares_of(SITES, alpha=0.0))


def test_no_quality_anywhere_is_no_quality_factor() -> None:
    lost = {name: {**r, "dice": 0.0, "hd95": None} for name, r in SITES.items()}
    assert shares_of(lost) == pytest.approx(shares_of(SITES, alpha=0.0))


def test_nobody_moved() -> None:
    still = {name: {**r, "update": leaves([0.0, 0.0])} for name, r in SITES.items()}
    assert shares_of(still) == pytest.approx(shares_of(SITES, beta=0.0))


def test_shares_are_smoothed_over_rounds() -> None:
    now = shares_of(SITES)
    last = {"a": 0.2, "b": 0.5, "c": 0.3}
    found = shares_of(SITES, {"shares": last}, ema=0.25)
    assert found == pytest.approx({n: 0.25 * last[n] + 0.75 * now[n] for n in now})


CASES = {"a": 10, "b": 10, "c": 10, "d": 100, "e": 100}


def counts(*drawn: str, **options: Any) -> State:
    """The state after a round for each of ``drawn``, the letters of the sites that answered; all count by cases."""
    off = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "w_min": 0.0, "w_max": 1.0, "fraction": 1.0, "bits": 32}
    said = [{n: update([1.0, 0.0], CASES[n], **NEUTRAL) if n in r else None for n in CASES} for r in drawn]
    return rounds(get("fedsegnet").make({**off, **options}), *said)


NEUTRAL = {"dice": 0.5, "hd95": 1.0, "diversity": 0.5}


@pytest.mark.parametrize("drawn", [("abc", "ade"), ("abcde", "ade"), ("abcd", "ae"), ("abc", "ade", "bd", "bcde")])
def test_smoothing_alike_rounds_changes_nothing_whoever_is_drawn(drawn: tuple[str, ...]) -> None:
    """Nothing has changed but who answers, so each counts by its cases among those who do: a is 10 of 210, not 1/6."""
    total = sum(CASES[name] for name in drawn[-1])
    assert counts(*drawn)["shares"] == pytest.approx({name: CASES[name] / total for name in drawn[-1]})


def test_a_last_share_is_held_against_the_sites_of_both_rounds() -> None:
    """Last round a : b was 2 : 6 beside c. Now a, b, d are 1, 1, 2 of 4: a and b share 0.5, once 1 : 3, now 1 : 1."""
    said = {n: {**update([1.0, 0.0], k), **NEUTRAL} for n, k in (("a", 10), ("b", 10), ("d", 20))}
    state = {"shares": {"a": 0.2, "b": 0.6, "c": 0.2}}
    found = shares_of(said, state, alpha=0.0, beta=0.0, gamma=0.0, ema=0.5)
    assert found == pytest.approx({"a": 0.1875, "b": 0.3125, "d": 0.5})


def test_who_was_silent_is_remembered_by_its_last_share() -> None:
    """c is heard in rounds 1 and 3. Its share of round 1, against a and b, is what round 3 mixes with."""
    off = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "w_min": 0.0, "w_max": 1.0, "fraction": 1.0, "bits": 32}
    method = get("fedsegnet").make({**off, "ema": 0.5})
    first = {n: update([1.0, 0.0], k, **NEUTRAL) for n, k in (("a", 10), ("b", 10), ("c", 60))}
    later = {**first, "c": update([1.0, 0.0], 20, **NEUTRAL)}
    state = rounds(method, first, {**first, "c": None})
    assert state["shares"] == pytest.approx({"a": 0.5, "b": 0.5})  # of this round, as the report has them
    assert state["unheard"] == pytest.approx({"c": 3.0})  # 6 times a, who has 0.5 now
    state = rounds(method, first, {**first, "c": None}, later)
    assert state["shares"] == pytest.approx({"a": 0.1875, "b": 0.1875, "c": 0.625})  # (1, 1, 6)/8 and (1, 1, 2)/4
    assert "unheard" not in state


def test_without_a_site_in_common_last_shares_are_forgotten() -> None:
    state = counts("ab", "cd")
    assert state["shares"] == pytest.approx({"c": 10 / 110, "d": 100 / 110})
    assert "unheard" not in state


def test_rounds_that_all_answer_mix_to_the_bit() -> None:
    last, now = {"a": 0.1, "b": 0.7, "c": 0.2}, adaptive.bounded(adaptive.adaptive(**FREE)(SITES, {}), 0.0, 1.0)
    mixed = {n: 0.3 * last[n] + (1 - 0.3) * now[n] for n in now}
    assert adaptive.adaptive(**{**FREE, "ema": 0.3})(SITES, {"shares": last}) == adaptive.bounded(mixed, 0.0, 1.0)


def test_bounds_by_hand() -> None:
    """(0.90, 0.06, 0.04) within 0.1 and 0.6: a takes 0.6; 0.4 is left in the ratio 6 : 4."""
    found = adaptive.bounded({"a": 0.90, "b": 0.06, "c": 0.04}, 0.1, 0.6)
    assert found == pytest.approx({"a": 0.6, "b": 0.24, "c": 0.16})
    assert adaptive.bounded({"a": 5.0}, 0.02, 0.6) == {"a": 1.0}  # alone, 0.6 cannot be kept
    assert adaptive.bounded({"a": 1.0, "b": 0.0}, 0.1, 0.6) == pytest.approx({"a": 0.6, "b": 0.4})
    assert adaptive.bounded({"a": 0.0, "b": 0.0}, 0.1, 0.6) == {"a": 0.5, "b": 0.5}
    assert adaptive.bounded({"a": 0.0, "b": 5e-324}, 0.0, 1.0) == {"a": 0.5, "b": 0.5}  # too small to divide by


def test_bounds_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(ValueError, match=r"w_min = 0.9 lies above w_max = 0.1"):
        get("fedsegnet").make({"w_min": 0.9, "w_max": 0.1})


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=20),
    st.floats(0, 0.2),
    st.floats(0.2, 1),
)
def test_bounds_hold_after_renormalising(s: list[float], low: float, high: float) -> None:
    found = list(adaptive.bounded({str(i): x for i, x in enumerate(s)}, low, high).values())
    low, high = min(low, 1 / len(s)), max(high, 1 / len(s))
    assert math.fsum(found) == pytest.approx(1)
    assert all(low <= x <= high for x in found)
    order = np.argsort(s, kind="stable")
    assert (np.diff(np.array(found)[order]) >= 0).all()  # who had more has no less


def test_server_adam_is_fedadam() -> None:
    options = {"aggregation": "fedavg", "fraction": 1.0, "bits": 32, "server": "adam", "eta": 0.1}
    said = {"a": update([0.5, -0.25], 3), "b": update([0.1, 0.2], 1)}
    assert w(rounds(get("fedsegnet").make(options), said, said)) == w(
        rounds(get("fedadam").make({"eta": 0.1}), said, said)
    )


def test_the_ablation_differs_in_its_weights_alone() -> None:
    """Without adaptive aggregation, FedSegNet keeps its coding both ways and its server: what fedavg weights give."""
    options = {"fraction": 0.2, "bits": 16, "down_fraction": 0.5, "down_bits": 8, "server": "adam", "eta": 0.05}
    ablation = Desk(toy.study(get("fedsegnet-no-adaptive").make(options))).play()
    assert toy.same(ablation, Desk(toy.study(get("fedsegnet").make({**options, "aggregation": "fedavg"}))).play())
    adaptive_options = {"aggregation", "a", "h", "alpha", "beta", "gamma", "c", "cosine", "w_min", "w_max", "ema"}
    assert get("fedsegnet").options.keys() - get("fedsegnet-no-adaptive").options.keys() == adaptive_options


def test_three_clients_per_round() -> None:
    names = ("a", "b", "c", "d", "e")
    desk = Desk(toy.study(get("fedsegnet").make({"clients": 3}), names=names))
    desk.play()
    per_round = [{a.turn.site for a in desk.asked if a.turn.round == r} for r in (1, 2)]
    assert [len(s) for s in per_round] == [3, 3]


def corrupted(name: str) -> Splits:
    """The toy's cases; at cairo, the training labels are turned round."""
    splits = toy.data(name)
    if name == "cairo":
        splits.train.y = 1 - splits.train.y  # type: ignore[attr-defined]
    return splits


def check_corrupt_site_loses_weight(method: Method) -> None:
    """A site with spoiled training labels falls below its share of cases within three rounds, and below its old one."""
    study = toy.study(method, rounds=3)
    before = Desk(study).play()["shares"]["cairo"]
    after = Desk(replace(study, data=corrupted)).play()["shares"]["cairo"]
    assert after < 80 / 192
    assert after < before


def test_a_corrupt_site_loses_weight() -> None:
    check_corrupt_site_loses_weight(get("fedsegnet").make())


def test_fedavg_does_not_see_a_corrupt_site() -> None:
    with pytest.raises(AssertionError):
        check_corrupt_site_loses_weight(get("fedavg").make())


# -- what travels ----------------------------------------------------------------------------------------------------


def check_feedback(fraction: float | Above, bits: int, feedback: bool = True) -> None:
    """Over rounds, what was sent and what is held back add up to all updates; statistics are sent whole."""
    channel = sparse(fraction, bits, feedback)
    draw = torch.Generator().manual_seed(0)
    total, sent, rest = torch.zeros(40), torch.zeros(40), None
    for _ in range(6):
        new = Weights({"w": torch.randn(40, generator=draw), "var": torch.randn(3, generator=draw)}, KINDS)
        blob, rest = channel.encode(new, rest, draw)
        got = channel.decode(blob, new.schema)
        assert torch.equal(got["var"], new["var"])
        total, sent = total + new["w"], sent + got["w"]
    assert rest is not None, "nothing is held back"
    torch.testing.assert_close(sent + rest["w"], total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0, {"above": 0.7}], ids=str)
def test_nothing_is_lost_over_rounds(fraction: float | Above, bits: int) -> None:
    if (fraction, bits) == (1.0, 32):
        assert sparse(fraction, bits) is whole
    else:
        check_feedback(fraction, bits)


def test_eight_bits_are_off_by_half_a_step() -> None:
    x = Weights({"w": torch.linspace(-3, 3, 101)})
    blob, _ = sparse(1.0, 8).encode(x, None, torch.Generator())
    assert float((sparse(1.0, 8).decode(blob, x.schema)["w"] - x["w"]).abs().max()) <= 3 / 127 / 2 + 1e-6


def test_a_site_keeps_what_it_held_back() -> None:
    check_site_feedback(sparse(0.1, 8))
    check_site_feedback(sparse({"above": 0.003}, 8))


DOWN = {"down_fraction": 1.0, "down_bits": 8, "fraction": 1.0, "bits": 32}


def test_the_way_down_is_coded_too() -> None:
    """After the first round a change is sent to who answered the last; all hold what is published, bit for bit."""
    desk = Desk(toy.study(get("fedsegnet").make(DOWN), rounds=3, silent={"bergen": (2,)}))
    state = desk.play()
    kinds = {(a.turn.round, a.turn.site): "change" in a.message for a in desk.asked}
    assert kinds == {
        (1, "amsterdam"): False, (1, "bergen"): False, (1, "cairo"): False,
        (2, "amsterdam"): True, (2, "cairo"): True,
        (3, "amsterdam"): True, (3, "bergen"): False, (3, "cairo"): True,
    }  # fmt: skip
    for name in desk.names:
        assert toy.same(dict(copy_of(desk.predictor(state, name))), dict(state["weights"]))


def test_nothing_is_lost_on_the_way_down() -> None:
    """What is published and what is held back are the exact weights: with no coding, or with all of them sent later."""
    start = {"weights": leaves([1.0, -1.0], 1.0, 10), "version": 0}
    method = get("fedavg-compressed").make({"fraction": 1.0, "bits": 32, "down_fraction": 0.5, "down_bits": 32})
    first = {"a": update([0.5, 0.25], var=0.5, n=1)}
    state = rounds(method, first, start=start)
    assert w(state) == [1.5, -1.0]  # the larger half of the change; statistics and counters whole
    assert state["behind"]["w"].tolist() == [0.0, 0.25]
    assert (float(state["weights"]["var"]), int(state["weights"]["n"])) == (1.5, 11)
    state = rounds(method, first, {"a": update([0.0, 0.0])}, start=start)
    assert w(state) == [1.5, -0.75]


def test_a_change_goes_down_once_to_be_scored_and_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With validation every round, 8 bits down are fewer bytes than 32, and the saved model is the one scored."""
    monkeypatch.setattr(wire, "BLOB_BYTES", 200)  # the toy's model is small
    sent, states = {}, {}
    for bits in (8, 32):
        study = toy.study(get("fedsegnet").make({**DOWN, "down_bits": bits}), rounds=3, every=1)
        states[bits] = run(study, tmp_path / str(bits))
        db = sqlite3.connect(tmp_path / str(bits) / "journal.sqlite")
        found = db.execute("SELECT round, question, bytes_down FROM turns WHERE site = 'cairo' ORDER BY round, call")
        sent[bits] = {(r, question): down for r, question, down in found}
        db.close()
    model = sum(leaf.nbytes for leaf in states[32]["weights"].schema.values())
    assert sent[32][2, "evaluate"] - sent[8][2, "evaluate"] > model / 2
    for r in (2, 3):
        assert sent[8][r, "learn"] < 500  # it came when round r - 1 was scored: 32 bytes of hash, and the names
        assert sent[8][r, "evaluate"] < sent[32][r, "evaluate"]
    memory = SiteDisk(tmp_path / "8" / "sites" / "cairo").recall((3, 1))
    assert toy.same(dict(memory["base"]), dict(states[8]["weights"]))


def test_a_change_for_another_model_is_refused() -> None:
    """A site that does not hold what the server thinks says so, and is sent the whole next time."""
    study = toy.study(get("fedsegnet").make({"down_bits": 8}), rounds=3)
    desk = Desk(study)
    state = study.start()
    for number in (1, 2, 3):
        desk.round, desk.call = number, 0
        state = study.method.round(desk, state)
        if desk.round == 1:
            desk.memory["bergen"]["version"] = -1
    assert desk.refused == ["bergen does not hold the model that a change was sent for; it needs the whole"]
    last = {a.turn.site: "change" in a.message for a in desk.asked if a.turn.round == 3}
    assert last == {"amsterdam": True, "bergen": False, "cairo": True}


def test_a_damaged_message_is_refused() -> None:
    channel, x = sparse(0.5, 8), leaves([1.0, 2.0])
    blob, _ = channel.encode(x, None, torch.Generator())
    spec = channel.gives(x.schema)
    spec.check(blob, "the update")
    blob[10] ^= 255
    with pytest.raises(ValueError, match="the update cannot be decoded"):
        spec.check(blob, "the update")


@pytest.mark.parametrize("name", ["fedsegnet", "fedsegnet-no-adaptive", "fedavg-compressed"])
def test_a_threshold_in_place_of_a_fraction(name: str) -> None:
    """Above 0 with 32 bits all travels, as whole leaves do; above more than any change, parameters stay."""
    desks = {}
    for above in (0.0, 0.01, 1e9):
        entry = get(name)
        options = {"fraction": {"above": above}, "bits": 32}
        desks[above] = Desk(toy.study(entry.make(options)))
        state = desks[above].play()
        assert not desks[above].refused
        start = desks[above].study.start()["weights"]
        moved = {kind: not toy.same(dict(state["weights"].of(kind)), dict(start.of(kind))) for kind in Kind}
        assert moved == {Kind.PARAMETER: above < 1, Kind.STATISTIC: True, Kind.COUNTER: True}
        assert all(a.reply["update"].numel() <= entry.card.up(start.schema, options) for a in desks[above].asked)
    sizes = [[a.reply["update"].numel() for a in desks[above].asked] for above in desks]
    assert all(x > y > z for x, y, z in zip(*sizes, strict=True))
    exact = Desk(toy.study(get(name).make({"fraction": 1.0, "bits": 32}))).play()
    assert toy.same(dict(exact["weights"]), dict(desks[0.0].play()["weights"]))


@pytest.mark.parametrize("wrong", [{}, {"below": 1.0}, {"above": -1.0}, {"above": "much"}], ids=str)
def test_a_wrong_threshold_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="fraction of method 'fedavg-compressed' cannot be"):
        get("fedavg-compressed").make({"fraction": wrong})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("{above = -1.0}", 'method.fraction = {"above": -1.0}'),
        ("{below = 1.0}", 'method.fraction = {"below": 1.0}'),
        ("0.0", "method.fraction = 0.0"),
    ],
)
def test_a_study_says_how_a_threshold_is_written(wrong: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(f'[method]\nname = "fedavg-compressed"\nfraction = {wrong}\n')
    meant = "but a number above 0 and of at most 1 or { above = a number of at least 0 } belongs there"
    with pytest.raises(Problem, match=f"study.toml, line 3: {re.escape(said)}, {re.escape(meant)}"):
        load(path)


def test_compressed_bytes() -> None:
    """1,000 entries, a tenth of them in 8 bits: 100 values, 100 gaps and some, one count, one scale."""
    assert 208 < Codec(0.1, 8).bound(Weights({"w": torch.zeros(1000)}).schema) < 240


def test_norms_by_type_for_fedbn() -> None:
    """On a net without batch norm, fedbn of batch norms only is FedAvg, bit for bit."""
    import segmentation_toy

    one, other = (
        Desk(segmentation_toy.study(get(n).make(o), norm="instance")).play()
        for n, o in (("fedbn", {"norms": "batch"}), ("fedavg", {}))
    )
    assert toy.same(dict(one["weights"]), dict(other["weights"]))


def test_methods_combine() -> None:
    """FedProx that sends its parameters only, in few bits, with equal weights: parts, not classes."""
    from fedscan.methods.averages import fedprox
    from fedscan.parts.weigh import equally

    method = fedprox(mu=0.1, share=parameters, channel=sparse(0.5, 8), weigh=equally)
    state = Desk(toy.study(method)).play()
    assert set(state["weights"].kinds.values()) == {Kind.PARAMETER}


def test_streamed_and_resident_means_agree() -> None:
    trees = [leaves([float(i), 1.0 / (i + 1)]) for i in range(5)]
    shares = [1.0, 2.0, 3.0, 0.5, 7.0]
    assert toy.same(dict(mean(trees, shares)), dict(mean(iter(trees), shares)))
