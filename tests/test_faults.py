"""The tests are tested: each fault known from other codebases is planted, and the check that should see it does."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import afresh
import contract
import contract_bytes
import forgetful
import test_adaptive
import test_asynchronous
import test_equations
import test_peers
import toy
from contract import Desk, faulty
from fedscan import trees
from fedscan.averaging import averaging, mean
from fedscan.method import Message, Method, Replies, Sites, State
from fedscan.methods import asynchronous, peers, scaffold
from fedscan.methods.card import dense
from fedscan.methods.registry import Entry, get
from fedscan.methods.segnet import coded
from fedscan.methods.travelling import train_on
from fedscan.parts.channel import sparse
from fedscan.parts.extra import pull_to
from fedscan.parts.share import everything, parameters
from fedscan.parts.step import momentum, take
from fedscan.parts.weigh import by_cases, equally
from fedscan.schema import Kind, Schema, Weights
from fedscan.site import Batch, Extra, Outputs, Site, load
from fedscan.site import fit as plain_fit

torch.set_num_threads(1)
caught = pytest.raises(AssertionError)
BENCH = contract.BENCHES["2D"]


def instead(name: str, method: Method) -> Entry[Any]:
    """The entry ``name``, whose function makes another method."""
    return faulty(get(name), lambda _: method)


# -- rings, layers, statistics ---------------------------------------------------------------------------------------


def stays_put() -> Method:
    """Each site trains a copy of its own, as FLamby's cyclic does since 2022; the last is called the result."""

    def round(sites: Sites, state: State) -> State:
        own = state.get("own") or dict.fromkeys(sites.names, state["weights"])
        own = {n: sites.ask(train_on, {"weights": own[n]}, to=[n])[n]["weights"] for n in sites.names}
        return {**state, "own": own, "weights": own[sites.names[-1]]}

    return replace(get("cwt").make(), round=round)


def test_a_ring_that_hands_nothing_on() -> None:
    contract.check_learns(instead("cwt", stays_put()), BENCH)  # which is why nobody saw it
    with caught:
        contract.check_hands_on(instead("cwt", stays_put()), BENCH)


def without_bn(model: nn.Module) -> frozenset[str]:
    """Norm layers found by what they are called, as in PFLlib."""
    return frozenset(name for name in everything(model) if "bn" not in name)


@pytest.mark.parametrize("bench", contract.BENCHES)
def test_fedbn_by_name(bench: str) -> None:
    entry = instead("fedbn", averaging(share=without_bn))
    norms = {"first.weight", "first.bias"}
    contract.check_home_stays(get("fedbn"), contract.BENCHES[bench], norms)
    with caught:
        contract.check_home_stays(entry, contract.BENCHES[bench], norms)


def parameters_only(state: State, merged: Weights) -> State:
    """The server adds what was learned and forgets what was measured, as an average over ``parameters()`` does."""
    return take(state, merged.of(Kind.PARAMETER))


@pytest.mark.parametrize("fault", [averaging(share=parameters), averaging(step=parameters_only)])
def test_statistics_left_behind(fault: Method) -> None:
    contract.check_learns(instead("fedavg", fault), BENCH)
    with caught:
        contract.check_statistics_travel(instead("fedavg", fault), BENCH)


def test_a_site_predicts_with_something_else() -> None:
    def forgets(site: Site, message: Message) -> nn.Module:
        weights = site.slots.first() if site.name == "cairo" else message["weights"]
        return load(site.model(), weights)

    with caught:
        contract.check_transfers(instead("fedavg", averaging(use=forgets)), BENCH)


# -- weights ---------------------------------------------------------------------------------------------------------


def swapped(updates: Any, state: Mapping[str, Any]) -> dict[str, float]:
    """Each site's cases, written against another's name."""
    shares = by_cases(updates, state)
    return dict(zip(shares, reversed(shares.values()), strict=True))


@pytest.mark.parametrize(
    "fault",
    [
        averaging(weigh=equally),
        averaging(weigh=swapped),
        averaging(merge=lambda updates, shares: mean(updates, [1.0] * len(shares))),
        averaging(step=parameters_only),
    ],
    ids=["equal", "swapped", "ignored", "statistics"],
)
def test_weights_that_do_not_weigh(fault: Method) -> None:
    contract.check_learns(instead("fedavg", fault), BENCH)
    with caught:
        test_equations.check_fedavg(fault)


def test_weights_ignored_by_fedsegnet() -> None:
    with caught:
        test_adaptive.check_corrupt_site_loses_weight(get("fedsegnet").make({"aggregation": "fedavg"}))


def test_momentum_on_everything() -> None:
    """A running variance with momentum: 1, then 1 + 0.25 - 0.5 + 0.9 0.25 instead of 0.75."""

    def all_leaves(state: State, merged: Weights) -> State:
        return momentum(0.5, 0.9)(state, Weights(merged))  # kinds guessed by dtype

    with caught:
        test_equations.check_fedavgm(averaging(step=all_leaves))


def test_proximal_term_without_its_square() -> None:
    def pull(x: Any, mu: float) -> Extra:
        def term(model: nn.Module, batch: Batch, out: Outputs) -> torch.Tensor:
            return mu / 2 * pull_to(x, 2.0)(model, batch, out).sqrt()

        return term

    with caught:
        test_equations.check_fedprox_gradient(pull)


# -- answers and memory ----------------------------------------------------------------------------------------------


class Swapping(Desk):
    """Two sites' answers change places."""

    def ask_each(self, *args: Any, **kwargs: Any) -> Replies:
        replies = super().ask_each(*args, **kwargs)
        names = list(replies)
        turned = dict(zip(names, [*names[1:], *names[:1]], strict=True))
        return Replies({n: lambda m=m: replies[m] for n, m in turned.items()}, replies.missing, True)  # type: ignore[misc]


class Forgetful(Desk):
    """Sites keep nothing from one answer to the next but what they had at first."""

    def ask_each(self, *args: Any, **kwargs: Any) -> Replies:
        replies = super().ask_each(*args, **kwargs)
        self.last, self.memory = self.memory, {name: {} for name in self.names}
        if self.round == self.study.rounds:
            self.memory = self.last
        return replies


def test_swapped_answers() -> None:
    contract.check_alone(get("local-only"), BENCH)
    with caught:
        contract.check_alone(get("local-only"), BENCH, desk=Swapping)


def test_dropped_feedback() -> None:
    channel = sparse(0.1, 8)
    dropped = replace(channel, encode=lambda update, rest, draw: channel.encode(update, None, draw))
    with caught:
        contract.check_site_feedback(dropped)
    with caught:
        contract.check_site_feedback(channel, desk=Forgetful)
    with caught:
        test_adaptive.check_feedback(0.1, 8, feedback=False)


def test_scaffold_whose_sites_forget() -> None:
    test_equations.check_scaffold_controls(get("scaffold").make())
    with caught:
        test_equations.check_scaffold_controls(get("scaffold").make(), desk=Forgetful)


@pytest.mark.parametrize("sign", [-1, 0])
def test_scaffold_with_another_correction(sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites that step by g + c_i - c, or by g alone, and tell the truth about their variates."""

    def fit(site: Site, model: nn.Module, correct: Any) -> Any:
        def otherwise(model: nn.Module) -> None:
            before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            correct(model)
            for p, g in zip(model.parameters(), before, strict=True):
                p.grad = g + sign * (p.grad - g)

        return plain_fit(site, model, correct=otherwise)

    monkeypatch.setattr(scaffold, "fit", fit)
    test_equations.check_scaffold_controls(get("scaffold").make())  # which is why nobody saw it
    with caught:
        test_equations.check_scaffold_correction()


# -- from peer to peer, and as models come ---------------------------------------------------------------------------


def test_peers_that_forget_what_they_have_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "known", replace(peers.known, reply=lambda site, message: {"seen": {}}))
    contract.check_learns(get("braintorrent"), BENCH)  # which is why nobody would see it
    with caught:
        test_peers.test_a_model_that_is_known_does_not_travel_again()


def test_peers_that_give_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    give = peers.give.reply
    monkeypatch.setattr(peers, "give", replace(peers.give, reply=lambda site, message: give(site, {"seen": 0})))
    contract.check_learns(get("braintorrent"), BENCH)
    with caught:
        test_peers.test_who_wakes_twice_in_a_row_is_given_nothing_the_second_time()


def test_peers_that_merge_by_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    equal = SimpleNamespace(mean=lambda models, cases: trees.mean(models, [1.0] * len(cases)))
    monkeypatch.setattr(peers, "trees", equal)
    contract.check_learns(get("braintorrent"), BENCH)
    with caught:
        test_peers.test_models_count_by_their_cases(monkeypatch)


def test_a_model_whose_age_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asynchronous, "discount", lambda rule, a, b: lambda age: 1.0)
    contract.check_learns(get("fedasync"), BENCH)
    with caught:
        test_asynchronous.test_mixing_by_hand()


# -- runs ------------------------------------------------------------------------------------------------------------


def with_round(change: Any) -> Entry[Any]:
    """FedAvg whose state is changed by ``change`` after every round."""

    def plant(method: Method) -> Method:
        return replace(method, round=lambda sites, state: change(method.round(sites, state)))

    return faulty(get("fedavg"), plant)


@pytest.mark.parametrize("name", ["closure", "module", "site", "hashes"])
def test_memory_outside_the_state(name: str, tmp_path: Path) -> None:
    """A method that remembers anywhere else: in a new process it has forgotten, and nowhere else is it seen."""
    entry = getattr(forgetful, name)
    contract.check_repeats(entry, BENCH)
    contract.check_pure(entry, BENCH)
    with pytest.raises(AssertionError, match="other numbers"):
        contract.check_goes_on(f"forgetful:{name}", "2D", tmp_path)


@pytest.mark.parametrize("name", ["module", "hashes"])
def test_a_process_that_is_not_new_sees_none_of_this(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is why the contract's is."""
    monkeypatch.setattr(contract, "afresh", lambda function, folder: contract.gone_on(folder))
    contract.check_goes_on(f"forgetful:{name}", "2D", tmp_path)


def test_what_fails_in_the_new_process_is_told(tmp_path: Path) -> None:
    with pytest.raises(afresh.Elsewhere, match=r"FileNotFoundError.*toy\.json"):
        afresh.afresh("contract:gone_on", tmp_path)
    with pytest.raises(afresh.Elsewhere, match="ended with status 9"):
        afresh.afresh("forgetful:dies", tmp_path)


def test_a_round_that_waits_for_all(tmp_path: Path) -> None:
    """A method that needs every site sits out the round in which one is silent."""
    with pytest.raises(AssertionError, match="bergen"):
        contract.check_goes_on("forgetful:impatient", "2D", tmp_path)


def test_chance_outside_the_seed() -> None:
    generator = torch.Generator()
    generator.seed()

    def jitter(state: State) -> State:
        noise = Weights({k: torch.randn(v.shape, generator=generator) for k, v in parameters_of(state).items()})
        return {**state, "weights": trees.add(state["weights"], noise, 1e-3)}

    with caught:
        contract.check_repeats(with_round(jitter), BENCH)


def parameters_of(state: State) -> Weights:
    weights: Weights = state["weights"]
    return weights.of(Kind.PARAMETER)


def test_a_state_changed_in_place() -> None:
    def plant(method: Method) -> Method:
        def round(sites: Sites, state: State) -> State:
            after = method.round(sites, state)
            for name, leaf in parameters_of(state).items():
                leaf.copy_(after["weights"][name])
            return {**after, "weights": state["weights"]}

        return replace(method, round=round)

    contract.check_repeats(faulty(get("fedavg"), plant), BENCH)
    with caught:
        contract.check_pure(faulty(get("fedavg"), plant), BENCH)


def test_a_reduction_that_is_only_nearly_so() -> None:
    def nearly(method: Method) -> Method:
        def round(sites: Sites, state: State) -> State:
            state = method.round(sites, state)
            return {**state, "weights": trees.add(state["weights"], trees.scale(parameters_of(state), 1e-6))}

        return replace(method, round=round)

    with caught:
        contract.check_reduces(faulty(get("fedprox"), nearly), BENCH)


def test_more_bytes_than_the_card_says() -> None:
    with caught:
        contract_bytes.check_bytes(instead("fedavg-compressed", averaging(channel=sparse(0.5, 8))), BENCH)


def fewer(schema: Schema, options: Mapping[str, Any]) -> int:
    return coded(schema, options) * 9 // 10


def more(schema: Schema, options: Mapping[str, Any]) -> int:
    return coded(schema, options) * 11 // 10


@pytest.mark.parametrize(
    "card",
    [
        get("scaffold").variant(down=dense),
        get("fedbn").variant(down=lambda schema, options: dense(schema, options) + 64),
        get("fedavg-compressed").variant(up=fewer),
        get("fedavg-compressed").variant(up=more),
        get("fedavg-compressed").variant(down=dense),
    ],
)
def test_a_card_that_says_other_bytes(card: Entry[Any]) -> None:
    with caught:
        contract_bytes.check_bytes(card, BENCH)


def test_steps_that_lead_nowhere() -> None:
    with caught:
        contract.check_learns(instead("fedavg", averaging(step=lambda state, merged: state)), BENCH)


def test_the_toy_is_not_what_makes_checks_fail() -> None:
    assert toy.same(Desk(toy.study(get("fedavg").make())).play(), Desk(toy.study(averaging())).play())
