"""Each method's equations, against numbers worked out by hand or in NumPy, with answers that are written here."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import toy
from canned import Canned, leaves, rounds, update, w
from contract import Desk, check_alone
from fedscan.method import Method
from fedscan.methods.alone import Ensemble
from fedscan.methods.registry import get
from fedscan.parts.extra import pull_to
from fedscan.schema import Weights, weights_of
from fedscan.site import Extra
from fedscan.step import Step

torch.set_num_threads(1)

# -- averages --------------------------------------------------------------------------------------------------------


def check_fedavg(method: Method) -> None:
    """Sites of 3 and 1 cases moved by (1, 0) and (-1, 2): 3/4 (1, 0) + 1/4 (-1, 2) = (0.5, 0.5)."""
    state = rounds(method, {"a": update([1, 0], 3, var=2, n=5), "b": update([-1, 2], 1, var=-2, n=7)})
    assert w(state) == [1.5, -0.5]
    assert float(state["weights"]["var"]) == 2.0  # 1 + 3/4 2 - 1/4 2
    assert int(state["weights"]["n"]) == 17  # the largest count, not a mean of counts
    assert state["shares"] == {"a": 0.75, "b": 0.25}


def test_fedavg_weighs_by_cases() -> None:
    check_fedavg(get("fedavg").make())


def test_equal_weights() -> None:
    for method in (
        get("fedavg").make({"weights": "equal"}),
        get("traditional-fl").make(),
        get("transformer-fl").make(),
    ):
        assert w(rounds(method, {"a": update([1, 0], 3), "b": update([-1, 2], 1)})) == [1.0, 0.0]


def test_a_site_twice_has_twice_the_weight() -> None:
    method = get("fedavg").make()
    twice = rounds(method, {"a": update([1, 0]), "b": update([4, 0]), "c": update([4, 0])})
    heavy = rounds(method, {"a": update([1, 0]), "b": update([4, 0], 2)})
    assert w(twice) == w(heavy) == [4.0, -1.0]


def test_a_silent_site_does_not_count() -> None:
    state = rounds(get("fedavg").make(), {"a": update([1, 0], 3), "b": None})
    assert w(state) == [2.0, -1.0]


def check_fedavgm(method: Method) -> None:
    """Delta 1, then 0: v = 1, 0.9; x moves by eta v = 0.5, then 0.45. The variance takes no momentum."""
    state = rounds(method, {"a": update([1, 1], var=0.25)}, {"a": update([0, 0], var=-0.5)})
    assert w(state) == pytest.approx([1.95, -0.05])
    assert float(state["weights"]["var"]) == 0.75
    assert state["momentum"].keys() == {"w"}


def test_fedavgm_two_rounds() -> None:
    check_fedavgm(get("fedavgm").make({"eta": 0.5, "beta": 0.9}))


def test_fedavgm_converges_to_delta_over_one_minus_beta() -> None:
    state = rounds(get("fedavgm").make({"beta": 0.5}), *[{"a": update([1, 0])}] * 30)
    assert state["momentum"]["w"][0] == pytest.approx(2.0)


def test_dampened_momentum_is_a_mean() -> None:
    method = get("fedavgm").make({"beta": 0.9, "dampening": 0.9})
    state = rounds(method, {"a": update([1, 0])}, {"a": update([1, 0])})
    assert w(state)[0] == pytest.approx(1 + 0.1 + 0.19)


@pytest.mark.parametrize(("eta", "b1", "b2", "tau"), [(0.1, 0.9, 0.99, 1e-3), (0.3, 0.6, 0.8, 0.05)])
@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_adaptive_server_two_rounds(name: str, eta: float, b1: float, b2: float, tau: float) -> None:
    """Reddi et al., algorithm 2, in float64; the running variance is averaged and never goes below zero."""
    options = {"eta": eta, "beta1": b1, "tau": tau} | ({} if name == "fedadagrad" else {"beta2": b2})
    x, m, v = np.array([1.0, -1.0]), np.zeros(2), np.full(2, tau**2)
    for delta in (np.array([0.5, -0.25]), np.array([0.5, 0.01])):
        m = b1 * m + (1 - b1) * delta
        square = delta**2
        if name == "fedadam":
            v = b2 * v + (1 - b2) * square
        elif name == "fedyogi":
            v = v - (1 - b2) * square * np.sign(v - square)
        else:
            v = v + square
        x = x + eta * m / (np.sqrt(v) + tau)
    replies = [{"a": update([0.5, -0.25], var=-0.9)}, {"a": update([0.5, 0.01], var=-0.05)}]
    state = rounds(get(name).make(options), *replies)
    assert w(state) == pytest.approx(x.tolist(), rel=1e-5)
    assert float(state["weights"]["var"]) == pytest.approx(0.05)
    assert state["v"].keys() == {"w"}


def test_comed_of_an_even_number_is_the_mean_of_the_middle_two() -> None:
    said = {"a": update([1, 0], 100, n=3), "b": update([2, 0], n=4), "c": update([4, 0]), "d": update([9, 0])}
    state = rounds(get("comed").make(), said)
    assert w(state) == [4.0, -1.0]  # 1 + (2 + 4) / 2
    assert int(state["weights"]["n"]) == 14


def test_comed_bears_one_outlier() -> None:
    honest = {"a": update([0.9, 0]), "b": update([1.1, 0]), "c": update([1.0, 0])}
    state = rounds(get("comed").make(), {**honest, "d": update([1e6, -1e6])})
    assert 1.9 <= w(state)[0] <= 2.1
    assert w(state)[1] == -1.0


def test_fedsgd_is_one_step_on_all_cases() -> None:
    """With norm layers in the way, batches change the gradient, so the net is linear: batches of 5 equal one of all."""
    whole_batch, small = (Desk(linear_study("fedsgd", batch=b)).play() for b in (1000, 5))
    fedavg = Desk(linear_study("fedavg", batch=1000)).play()
    for k in fedavg["weights"]:
        assert torch.equal(whole_batch["weights"][k], fedavg["weights"][k])
        torch.testing.assert_close(small["weights"][k], fedavg["weights"][k], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fedsgd_differs_from_fedavg_by_momentum_alone(momentum: float) -> None:
    """One step of a whole batch each round: all that is left to differ is momentum, from the second round on."""
    step = {"batch": 1000, "momentum": momentum, "moments": "kept"}
    sgd, avg = (Desk(linear_study(name, **step)).play() for name in ("fedsgd", "fedavg"))
    assert toy.same(dict(sgd["weights"]), dict(avg["weights"])) == (momentum == 0)


class Linear(toy.Toy):
    """The toy's cases with a linear model, for which gradients are known by hand."""

    def __init__(self) -> None:
        self.networks = {"model": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 2))}


def linear_study(name: str, options: Mapping[str, Any] | None = None, **step: Any) -> Any:
    return replace(toy.study(get(name).make(options), step=Step(**{"lr": 0.1, "batch": 16, **step})), task=Linear())


def gradient(weights: Mapping[str, torch.Tensor], split: Any) -> dict[str, torch.Tensor]:
    """The gradient of the linear model's mean loss over all cases of a split."""
    model = Linear().networks["model"]()
    model.load_state_dict(dict(weights))
    nn.functional.cross_entropy(model(split.x), split.y).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def moved_by(mu: float) -> float:
    desk = Desk(linear_study("fedprox", {"mu": mu}, lr=0.01))
    start, state = desk.study.start(), desk.play(1)
    return math.dist(start["weights"]["1.weight"].flatten().tolist(), state["weights"]["1.weight"].flatten().tolist())


def test_fedprox_holds_the_sites_back() -> None:
    moved = [moved_by(mu) for mu in (0.0, 1.0, 10.0, 50.0)]
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 0.7 * moved[0]


def check_fedprox_gradient(pull: Callable[..., Extra]) -> None:
    """d/dw mu/2 ||w - x||^2 = mu (w - x): with mu 0.5 and w - x = (2, -4), that is (1, -2); of the norm it is not."""
    model = nn.Linear(2, 1, bias=False)
    x = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.weight += torch.tensor([[2.0, -4.0]])
    term = pull(x, 0.5)(model, None, {})  # type: ignore[arg-type]
    assert float(term.detach()) == pytest.approx(0.25 * 20)
    term.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(model.weight.grad, torch.tensor([[1.0, -2.0]]))


def test_fedprox_gradient_is_of_the_squared_norm() -> None:
    check_fedprox_gradient(pull_to)


def test_fedprox_pulls_each_parameter_to_its_own_by_name() -> None:
    """Two leaves of one shape, named in another order than the model has them: (1 - 3)^2 + (2 - 5)^2 = 13, halved."""
    model = nn.ParameterDict({"first": torch.tensor([1.0]), "second": torch.tensor([2.0])})
    x = {"second": torch.tensor([5.0]), "first": torch.tensor([3.0])}
    assert float(pull_to(x, 1.0)(model, None, {}).detach()) == 6.5  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="second"):
        pull_to({"first": x["first"]}, 1.0)(model, None, {})  # type: ignore[arg-type]


# -- scaffold --------------------------------------------------------------------------------------------------------


def check_scaffold_controls(method: Method, desk: type[Desk] = Desk) -> None:
    """After each of three rounds, the sites' variates average to the server's, and the server's is not zero."""
    for last in (1, 2, 3):
        table = desk(toy.study(method, rounds=last))
        state = table.play()
        controls = [table.memory[name]["control"] for name in table.names]
        for k, c in state["control"].items():
            assert c.abs().max() > 0
            torch.testing.assert_close(sum(x[k] for x in controls) / 3, c, rtol=1e-4, atol=1e-6)


def test_scaffold_controls_average_to_the_servers() -> None:
    check_scaffold_controls(get("scaffold").make())


def test_scaffold_of_some_sites_a_round() -> None:
    """Two of three sites are asked each round; the variates of all three still average to the server's."""
    table = Desk(toy.study(get("scaffold").make({"clients": 2}), rounds=3))
    state = table.play()
    assert [len({a.turn.site for a in table.asked if a.turn.round == r}) for r in (1, 2, 3)] == [2, 2, 2]
    for k, c in state["control"].items():
        held = [table.memory[name]["control"][k] if table.memory[name] else 0 * c for name in table.names]
        torch.testing.assert_close(sum(held) / 3, c, rtol=1e-4, atol=1e-6)


def test_scaffold_with_one_local_step_is_large_batch_sgd() -> None:
    """With all sites and one step each, corrections cancel: x <- x - lr mean_i g_i(x), round after round."""
    desk = Desk(linear_study("scaffold", batch=1000, lr=0.1))
    state = desk.play(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    model.load_state_dict(desk.study.start()["weights"])
    splits = [desk.study.splits(name).train for name in desk.names]
    for _ in range(3):
        losses = [nn.functional.cross_entropy(model(s.x), s.y) for s in splits]
        model.zero_grad()
        (sum(losses) / 3).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    for k, v in weights_of(model).items():
        torch.testing.assert_close(state["weights"][k], v, rtol=1e-5, atol=1e-6)


def check_scaffold_correction() -> None:
    """One whole-batch step, with c and each c_i planted: y - x = -lr (g - c_i + c), and c_i+ - c_i = g - c_i."""
    desk = Desk(linear_study("scaffold", batch=1000, lr=0.1))
    state, draw = desk.study.start(), torch.Generator().manual_seed(1)

    def planted() -> Weights:
        return Weights({k: torch.randn(v.shape, generator=draw) for k, v in state["control"].items()})

    state["control"] = c = planted()
    own = {name: planted() for name in desk.names}
    desk.memory = {name: {"control": own[name]} for name in desk.names}
    desk.study.method.round(desk, state)
    for asked in desk.asked:
        c_i = own[asked.turn.site]
        for k, g in gradient(state["weights"], desk.study.splits(asked.turn.site).train).items():
            torch.testing.assert_close(asked.reply["update"][k] + 0.1 * g, -0.1 * (c[k] - c_i[k]), rtol=0, atol=1e-6)
            torch.testing.assert_close(asked.reply["control"][k], g - c_i[k], rtol=0, atol=1e-5)


def test_scaffold_corrects_by_c_less_c_i() -> None:
    check_scaffold_correction()


def test_scaffold_server_by_hand() -> None:
    """Two of three sites answer: x moves by eta times the even mean, c by 2/3 of the mean change."""
    change = [Weights({"w": torch.tensor([c, 0.0])}) for c in (3.0, 6.0)]
    start = {"weights": leaves([1.0, -1.0], 1.0, 10), "control": Weights({"w": torch.zeros(2)})}
    said = {"a": update([2, 0], 99, var=1, n=2, control=change[0]), "b": update([4, 0], control=change[1]), "c": None}
    state = rounds(get("scaffold").make({"eta": 0.5}), said, start=start)
    assert w(state) == [2.5, -1.0]
    assert state["control"]["w"].tolist() == pytest.approx([3.0, 0.0])
    assert float(state["weights"]["var"]) == 1.5  # the mean, whatever eta
    assert int(state["weights"]["n"]) == 12


@pytest.mark.parametrize("step", [{"optimiser": "adam"}, {"momentum": 0.9}, {"clip": 1.0}])
def test_scaffold_wants_plain_sgd(step: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="plain SGD"):
        get("scaffold").card.admits(Step(**step))
    with pytest.raises(ValueError, match="plain SGD"):
        Desk(linear_study("scaffold", **step)).play(1)


# -- ring, alone, ensemble -------------------------------------------------------------------------------------------


def test_cwt_hands_on_and_passes_over_the_silent() -> None:
    told = {n: [{"weights": leaves([float(i), 0.0])}] for i, n in enumerate("abc")}
    sites = Canned({**told, "b": [None]})
    state = get("cwt").make().round(sites, {"weights": leaves([9.0, 9.0])})
    assert [(n, m["weights"]["w"].tolist()) for n, m in sites.asked] == [
        ("a", [9.0, 9.0]),
        ("b", [0.0, 0.0]),
        ("c", [0.0, 0.0]),
    ]
    assert w(state) == [2.0, 0.0]


def test_cwt_in_an_order_drawn_anew() -> None:
    names = tuple("abcdef")
    sites = Canned({n: [{"weights": leaves([0.0, 0.0])}] for n in names})
    get("cwt").make({"order": "random"}).round(sites, {"weights": leaves([9.0, 9.0])})
    tour = [n for n, _ in sites.asked]
    assert sorted(tour) == list(names)
    assert tour != list(names)


def test_cwt_never_begins_where_it_ended() -> None:
    """In each of 20 rounds three sites are visited, none of them twice running; drawn afresh, one often is."""
    names, again = tuple("abc"), dict[str, int]()
    for order in ("random", "random-no-repeat"):
        sites = Drawing({n: [{"weights": leaves([0.0, 0.0])}] * 20 for n in names})
        state: dict[str, Any] = {"weights": leaves([9.0, 9.0])}
        for sites.round in range(20):
            state = get("cwt").make({"order": order}).round(sites, state)
        tour = [n for n, _ in sites.asked]
        assert all(sorted(tour[i : i + 3]) == list(names) for i in range(0, 60, 3))
        assert len({tuple(tour[i : i + 3]) for i in range(0, 60, 3)}) > 3
        again[order] = sum(x == y for x, y in pairwise(tour))
    assert again["random"] > 0
    assert again["random-no-repeat"] == 0


def test_cwt_remembers_who_held_the_model_last() -> None:
    """A silent last stop did not hold it; a round without answers forgets nothing; a site alone is visited still."""
    cwt = get("cwt").make({"order": "random-no-repeat"})
    silent = Drawing({n: [None] for n in "abc"})
    state = cwt.round(silent, {"weights": leaves([9.0, 9.0]), "last": "b"})
    assert state["last"] == "b"
    tour = [n for n, _ in silent.asked]
    said = {n: [{"weights": leaves([0.0, 0.0])}] for n in tour}
    state = cwt.round(Drawing({**said, tour[-1]: [None]}), {"weights": leaves([9.0, 9.0]), "last": "b"})
    assert state["last"] == tour[-2]
    alone = Drawing({"a": [{"weights": leaves([0.0, 0.0])}] * 2})
    cwt.round(alone, cwt.round(alone, {"weights": leaves([9.0, 9.0])}))
    assert len(alone.asked) == 2


class Drawing(Canned):
    """Canned sites whose draws differ from round to round."""

    round = 0

    def random(self, label: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.round)


def test_cwt_takes_the_moments_along_only_where_the_study_says_so() -> None:
    for moments, taken in (("travels", True), ("reset", False), ("kept", False)):
        desk = Desk(toy.study(get("cwt").make(), step=Step(optimiser="adam", lr=0.01, batch=32, moments=moments)))
        desk.play(1)
        assert ["optimizer" in asked.message for asked in desk.asked] == [False, taken, taken]
        steps = [float(asked.reply["optimizer"]["step/conv1.weight"]) for asked in desk.asked if taken]
        assert steps == ([2.0, 4.0, 7.0] if taken else [])  # 64, 48 and 80 cases in batches of 32


def test_alone_stays_alone() -> None:
    check_alone(get("local-only"), toy.study)


def test_moments_stay_with_those_who_train_alone() -> None:
    with pytest.raises(ValueError, match="share no moments"):
        get("local-only").card.admits(Step(moments="averaged"))


def test_ensemble_is_the_mean_of_probabilities() -> None:
    desk = Desk(toy.study(get("ensemble").make()))
    state = desk.play()
    x = desk.study.splits("cairo").test.x
    members = []
    for name in desk.names:
        model = toy.Net().eval()
        model.load_state_dict(state["weights"][name])
        members.append(model(x).softmax(1))
    model = desk.predictor(state, "cairo")
    assert isinstance(model, Ensemble)
    torch.testing.assert_close(model(x).softmax(1), torch.stack(members).mean(0), rtol=1e-5, atol=1e-6)
    assert model.members[0] is desk.predictor(state, "bergen").members[0]  # nothing was built anew
