"""A method of several networks: each role has its first weights, its slot and its schema; nothing special is needed."""

from functools import partial
from pathlib import Path

import pytest
import torch

import toy
from fedscan.averaging import mean
from fedscan.engines.local import Local
from fedscan.method import Message, Method, Sites, State, Terms, Tree, answer, just_weights, receive
from fedscan.run import run
from fedscan.schema import schema_of, weights_of
from fedscan.site import Site, fit, load
from fedscan.spec import Leaves, Number, Spec
from fedscan.study import Study

torch.set_num_threads(1)


class Pair(toy.Toy):
    """The toy with a second, smaller network beside the one that predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = {"model": toy.Net, "critic": partial(torch.nn.Linear, 8, 1)}


def two_networks() -> Method:
    """Averages a model that is trained, and a critic that each site moves towards its mean image row."""

    def gives(terms: Terms) -> dict[str, Spec]:
        found = {role: Leaves(schema_of(network)) for role, network in terms.networks.items()}
        return {**found, "steps": Number(low=1, whole=True)}

    @answer("weights", gives)
    def learn(site: Site, message: Message) -> Tree:
        model, critic = receive(site, message), site.model("critic", "critic")
        load(critic, message.get("critic", {}), otherwise=lambda: site.slots.first("critic"))
        report = fit(site, model)
        with torch.no_grad():
            critic.weight += site.train.case(0)[0].x.mean((0, 1, 2))
        return {"steps": report["steps"], "model": weights_of(model), "critic": weights_of(critic)}

    def round(sites: Sites, state: State) -> State:
        sent = {"weights": state["weights"]} | ({"critic": state["critic"]} if "critic" in state else {})
        replies = sites.ask(learn, sent)
        even = [1.0] * len(replies)
        model, critic = (mean((replies[n][role] for n in replies), even) for role in ("model", "critic"))
        return {**state, "weights": model, "critic": critic}

    return Method(just_weights, round, answers=(learn,))


def study() -> Study:
    return Study(Pair(), two_networks(), toy.NAMES, toy.data, rounds=2, every=0)


def test_both_networks_travel_and_a_run_of_them_is_resumed(tmp_path: Path) -> None:
    first = study().slots().first("critic")["weight"]
    rows = [study().splits(name).train.case(0)[0].x.mean((0, 1, 2)) for name in toy.NAMES]
    state = run(study(), tmp_path / "whole")
    torch.testing.assert_close(state["critic"]["weight"], first + 2 * sum(rows) / 3, rtol=1e-5, atol=1e-6)
    strict = run(study(), tmp_path / "strict", engine=partial(Local, strict=True))
    assert toy.same(state, strict)

    def stop(what: str, value: object) -> None:
        if (what, value) == ("round", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(study(), tmp_path / "stopped", watch=stop)
    assert toy.same(run(study(), tmp_path / "stopped", resume=True), state)


def test_a_network_of_another_shape_is_refused() -> None:
    spec = two_networks().answers[0].gives(study().terms)
    assert spec.entries.keys() == {"model", "critic", "steps"}
    reply = {"model": weights_of(toy.Net()), "critic": weights_of(torch.nn.Linear(8, 2)), "steps": 1}
    with pytest.raises(ValueError, match=r"critic: leaf 'weight' is \(2, 8\)"):
        spec.check(reply, "the answer")
