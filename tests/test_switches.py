"""FedSegNet's options: each acts, as worked out in NumPy, or is refused; and which cases a site's numbers are of."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toy
from canned import Canned, leaves, w
from contract import Desk
from fedscan import trees
from fedscan.averaging import caught_up
from fedscan.method import State
from fedscan.methods.registry import get
from fedscan.methods.segnet import BY_DIVERGENCE
from fedscan.parts.channel import sparse
from fedscan.parts.pick import some
from fedscan.run import Problem
from fedscan.site import load as set_weights
from fedscan.studyfile import load

torch.set_num_threads(1)

# -- every option ----------------------------------------------------------------------------------------------------

OTHER = {
    "a": 0.3, "h": 8.0, "alpha": 2.0, "beta": 1.5, "gamma": 0.7, "c": 0.5, "cosine": True,
    "w_min": 0.18, "w_max": 0.55, "ema": 0.25, "fraction": 0.5, "bits": 16, "feedback": False,
    "down_fraction": 0.4, "down_bits": 8, "server": "adam", "eta": 0.05, "clients": 3,
}  # fmt: skip
SAID = {  # by round: entries of the update in steps of 1/8192, the largest 32,767; cases, Dice, HD95, evenness
    "a": [([32767, -900, 8000, 50, 9000], 40, 0.8, 4.0, 0.9), ([-32767, 7000, 60, 5000, -8], 40, 0.9, 3.0, 0.9)],
    "b": [([20000, 32767, -15, 300, 25000], 90, 0.6, 9.0, 0.3), ([9, 32767, -21000, 6, 20000], 90, 0.5, 12.0, 0.3)],
    "c": [([-40, 30000, -32767, 16000, 9], 10, 0.7, 6.0, 0.6), ([-70, 26000, 32767, -16000, 9], 10, 0.7, 5.0, 0.6)],
}


def by_hand(o: Mapping[str, Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Shares, exact weights and published weights after each of SAID's two rounds, in NumPy alone."""

    def thinned(x: Any, fraction: float) -> Any:
        kept = np.argsort(-np.abs(x))[: round(fraction * len(x))]
        return np.where(np.isin(np.arange(len(x)), kept), x, 0)

    def within(s: Any) -> Any:
        low, high = 0.0, 1e9
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if np.clip(middle * s, o["w_min"], o["w_max"]).sum() < 1 else (low, middle)
        return np.clip(low * s, o["w_min"], o["w_max"])

    def angle(x: Any, y: Any) -> Any:
        return 1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y)

    x = seen = np.zeros(5)
    m, v, last = np.zeros(5), np.full(5, 1e-6), None
    shares, exact, published = [], [], []
    for rows in zip(*SAID.values(), strict=True):
        steps, cases, dice, hd95, even = (np.array(column, float) for column in zip(*rows, strict=True))
        sent = np.array([thinned(row, o["fraction"]) / 8192 for row in steps])
        size = np.linalg.norm(sent, axis=1)
        d = size / np.median(size) + [angle(row, sent.sum(0) - row) for row in sent]
        q = o["a"] * dice + (1 - o["a"]) * np.exp(-hd95 / o["h"])
        s = cases ** o["c"] * (q / q.mean()) ** o["alpha"] * (1 + o["gamma"] * even)
        now = within(s * np.exp(-o["beta"] * np.maximum(0, d - 1)))
        last = now if last is None else within(o["ema"] * last + (1 - o["ema"]) * now)
        merged = last @ sent
        m, v = 0.9 * m + 0.1 * merged, 0.99 * v + 0.01 * merged**2
        x = x + o["eta"] * m / (np.sqrt(v) + 1e-3)
        change = thinned(x - seen, o["down_fraction"])
        step = np.abs(change).max() / 127
        seen = seen + np.rint(change / step) * step
        shares, exact, published = [*shares, last], [*exact, x], [*published, seen]
    return shares, exact, published


def played(options: Mapping[str, Any]) -> tuple[list[State], Canned]:
    """The states after SAID's two rounds, and the sites; those of four that are drawn say a's, b's and c's words."""
    names = ("k", "l", "m", "n")
    drawn = some(3)(names, torch.Generator().manual_seed(0))
    assert len(drawn) == 3
    channel = sparse(options["fraction"], options["bits"])
    told: dict[str, list[Any]] = {name: [] for name in names}
    for number in (0, 1):
        for name, said in zip(drawn, SAID.values(), strict=True):
            steps, cases, dice, hd95, even = said[number]
            blob, _ = channel.encode(leaves([x / 8192 for x in steps]), None, torch.Generator())
            own = {} if options.get("aggregation") == "cross-scored" else {"dice": dice, "hd95": hd95}
            told[name].append({"update": blob, "cases": cases, "diversity": even, **own})
        if options.get("aggregation") == "cross-scored":
            for judged, said in zip(drawn, SAID.values(), strict=True):
                for judge in set(drawn) - {judged}:
                    told[judge].append({"dice": said[number][2], "hd95": said[number][3]})
    sites, method = Canned(told), get("fedsegnet").make(options)
    states: list[State] = [{"weights": leaves([0.0] * 5), "version": 0}]
    for _ in (1, 2):
        states.append(method.round(sites, states[-1]))
    return states[1:], sites


def check_by_hand(states: list[State], options: Mapping[str, Any]) -> None:
    for state, shares, exact, published in zip(states, *by_hand(options), strict=True):
        assert list(state["shares"].values()) == pytest.approx(shares.tolist(), rel=1e-5)
        assert w(caught_up(state)) == pytest.approx(exact.tolist(), rel=1e-5)
        assert w(state) == pytest.approx(published.tolist(), rel=1e-5)


@pytest.mark.parametrize("aggregation", ["adaptive", "cross-scored"])
def test_two_rounds_with_no_option_at_its_default(aggregation: str) -> None:
    entry, options = get("fedsegnet"), {**OTHER, "aggregation": aggregation}
    assert {name for name, (_, default) in entry.options.items() if options[name] == default} <= {"aggregation"}
    states, sites = played(options)
    check_by_hand(states, OTHER)
    trained = [message for _, message in sites.asked if "update" not in message]
    assert ["change" in message for message in trained] == [False] * 3 + [True] * 3
    assert len({name for name, _ in sites.asked}) == 3


def test_two_rounds_by_divergence_only() -> None:
    options = {key: value for key, value in OTHER.items() if key not in BY_DIVERGENCE}
    states, _ = played({**options, "aggregation": "divergence-only"})
    check_by_hand(states, {**OTHER, "alpha": 0.0, "gamma": 0.0, "c": 0.0})


@pytest.mark.parametrize(
    "option", sorted(OTHER.keys() - {"fraction", "bits", "feedback", "clients", "server", "down_bits"})
)
def test_each_option_alone_is_seen_in_these_rounds(option: str) -> None:
    """So that the test above cannot pass where one of them has no effect."""
    default = get("fedsegnet").options[option][1]
    assert w(played({**OTHER, option: default})[0][1]) != pytest.approx(w(played(OTHER)[0][1]), rel=1e-4)


@pytest.mark.parametrize("name", ["fedsegnet", "fedsegnet-no-adaptive", "fedavg-compressed"])
@pytest.mark.parametrize("feedback", [True, False])
def test_what_is_held_back_is_kept_where_feedback_is_on(name: str, feedback: bool) -> None:
    desk = Desk(toy.study(get(name).make({"fraction": 0.1, "feedback": feedback})))
    desk.play(1)
    assert ["rest" in desk.memory[site] for site in desk.names] == [feedback] * 3


class Reading(toy.Toy):
    """The toy task, which notes the split that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[tuple[str, str]] = set()

    def quality(self, model: Any, split: toy.Tensors) -> dict[str, float | None]:
        self.read.add(("quality", split.names[0].split("-")[1]))
        return super().quality(model, split)

    def diversity(self, split: toy.Tensors) -> float:
        self.read.add(("diversity", split.names[0].split("-")[1]))
        return super().diversity(split)


@pytest.mark.parametrize("aggregation", ["adaptive", "cross-scored"])
def test_quality_is_of_validation_cases_and_diversity_of_training_cases(aggregation: str) -> None:
    task = Reading()
    Desk(replace(toy.study(get("fedsegnet").make({"aggregation": aggregation})), task=task)).play()
    assert task.read == {("quality", "validation"), ("diversity", "train")}


def test_the_model_that_a_site_scores_is_the_one_it_has_trained() -> None:
    desk = Desk(toy.study(get("fedsegnet").make({"bits": 32})))
    desk.play(1)
    start, model = desk.study.start()["weights"], toy.Net().eval()
    for asked in desk.asked:
        set_weights(model, trees.add(start, asked.reply["update"]))
        right = desk.study.task.quality(model, desk.study.splits(asked.turn.site).validation)
        assert asked.reply["dice"] == right["dice"]


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"aggregation": "fedavg", "alpha": 2.0}, "alpha does nothing where aggregation is 'fedavg': leave it out"),
        ({"aggregation": "fedavg", "ema": 0.0, "beta": 0.0}, "beta, ema do nothing where aggregation is 'fedavg'"),
        ({"aggregation": "fedavg", "cosine": True}, "cosine does nothing"),
        (
            {"aggregation": "divergence-only", "a": 0.1, "h": 1.0, "alpha": 0.0, "gamma": 0.0, "c": 0.0},
            "a, h, alpha, gamma, c do nothing where aggregation is 'divergence-only': leave them out",
        ),
        ({"eta": 0.1}, "eta does nothing where server is 'average': leave it out"),
        ({"aggregation": "cross-scored", "eta": 0.1}, "eta does nothing"),
    ],
    ids=str,
)
def test_what_is_set_and_cannot_act_is_refused(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    """Also when a study is loaded, with the file and the line."""
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        get("fedsegnet").make(options)
    lines = [f"{key} = {json.dumps(value)}" for key, value in options.items()]
    path = tmp_path / "study.toml"
    path.write_text("\n".join(["[method]", 'name = "fedsegnet"', *lines]))
    with pytest.raises(Problem, match=f"study.toml, line [0-9]+: {re.escape(sentence)}"):
        load(path)


def test_what_can_act_is_not_refused() -> None:
    by_divergence = {"beta": 2.0, "cosine": True, "w_min": 0.0, "w_max": 1.0, "ema": 0.0}
    get("fedsegnet").make({"aggregation": "divergence-only", **by_divergence, "server": "adam", "eta": 0.1})
    get("fedsegnet").make({"aggregation": "fedavg", "alpha": 1.0, "eta": 0.01})  # as they are by default
    with pytest.raises(ValueError, match="eta does nothing where server is 'average'"):
        get("fedsegnet-no-adaptive").make({"eta": 0.1})


@pytest.mark.parametrize(
    ("method", "refused"),
    [
        ('name = "fedsegnet"', True),
        ('name = "fedsegnet-no-transformer"', True),
        ('name = "fedsegnet"\naggregation = "cross-scored"', True),
        ('name = "fedsegnet"\naggregation = "divergence-only"', False),
        ('name = "fedsegnet"\nalpha = 0.0', False),
        ('name = "fedsegnet-no-adaptive"', False),
        ('name = "fedavg"', False),
    ],
)
def test_a_study_without_validation_cases_cannot_weigh_by_quality(method: str, refused: bool, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(f"[data]\nfractions = [0.8, 0, 0.2]\n[method]\n{method}\n")
    if not refused:
        assert load(path).data.fractions[1] == 0
        return
    with pytest.raises(Problem, match=r"study.toml, line 2: fedsegnet.* weighs hospitals by their validation cases"):
        load(path)
    assert load(path, ["data.fractions=[0.7, 0.1, 0.2]"]).data.fractions[1] == 0.1


def test_a_baseline_by_quality_wants_validation_cases_too(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text("[data]\nfractions = [0.8, 0, 0.2]\n")
    with pytest.raises(Problem, match="fedsegnet weighs hospitals by their validation cases"):
        load(path).by("fedsegnet")
