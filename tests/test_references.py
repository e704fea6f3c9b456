"""Methods against plain training written out here, where both must agree: the strongest checks that there are."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toy
from contract import Desk
from fedscan.method import published
from fedscan.methods.registry import get
from fedscan.parts.norms import own_or_measured
from fedscan.respond import respond
from fedscan.schema import Kind, weights_of
from fedscan.site import Splits, copy_of
from fedscan.step import Step
from fedscan.study import Turn
from test_equations import gradient, linear_study

torch.set_num_threads(1)
Model = Mapping[str, Tensor]


def near(ours: Model, theirs: Model) -> None:
    assert ours.keys() == theirs.keys()
    for name, leaf in theirs.items():
        torch.testing.assert_close(ours[name], leaf, rtol=1e-5, atol=1e-6)


def moved(x: Model, g: Model, lr: float = 0.1) -> dict[str, Tensor]:
    return {name: leaf - lr * g[name] for name, leaf in x.items()}


# -- one site, equal sites, all sites --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedavg", "fedbn", "comed", "scaffold", "traditional-fl", "cwt"])
def test_one_site_is_local_training(name: str) -> None:
    """Two rounds of a site by itself are two epochs of plain training, with batch norm and the site's own batches."""
    desk = Desk(toy.study(get(name).make(), names=("cairo",)))
    ours = copy_of(desk.predictor(desk.play(), "cairo"))
    model, site = toy.Net(), desk.site("cairo")
    model.load_state_dict(dict(desk.slots.first()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for site.round in (1, 2):
        order = replace(site, call=0).order
        for batch in site.train.batches(16, order, order):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch.x), batch.y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    near(ours, weights_of(model))


@pytest.mark.parametrize("name", ["fedavg", "fedsgd", "comed", "scaffold", "traditional-fl"])
def test_equal_sites_are_one(name: str) -> None:
    """Three sites with the same cases take one step of the whole batch: the step that the cases take when pooled."""
    desk = Desk(replace(linear_study(name, batch=1000), data=lambda _: toy.data("cairo")))
    start, state = desk.study.start()["weights"], desk.play(1)
    near(state["weights"], moved(start, gradient(start, toy.data("cairo").train)))


@pytest.mark.parametrize("batch", [16, 1000])
def test_fedsgd_descends_the_gradient_of_all_cases(batch: int) -> None:
    """Sites of 64, 48 and 80 cases: three rounds are three steps on the mean loss over the 192, pooled."""
    desk = Desk(linear_study("fedsgd", batch=batch))
    x: Model = desk.study.start()["weights"]
    splits = [desk.study.splits(name).train for name in desk.names]
    pooled = toy.Tensors(torch.cat([s.x for s in splits]), torch.cat([s.y for s in splits]), "pooled")
    for _ in range(3):
        x = moved(x, gradient(x, pooled))
    near(desk.play(3)["weights"], x)


def test_fedprox_holds_a_site_to_the_model_of_this_round() -> None:
    """Two steps a round on g + mu (w - x), for two rounds: x is what the site received, not the study's first."""
    mu = 2.0
    desk = Desk(replace(linear_study("fedprox", {"mu": mu}, batch=1000, epochs=2), names=("cairo",)))
    x: Model = desk.study.start()["weights"]
    for _ in range(2):
        w = x
        for _ in range(2):
            g = gradient(w, desk.study.splits("cairo").train)
            w = moved(w, {name: g[name] + mu * (w[name] - x[name]) for name in w})
        x = w
    near(desk.play(2)["weights"], x)


# -- a site without normalisation layers of its own ------------------------------------------------------------------


def newcomer(**step: Any) -> tuple[Desk, dict[str, Any], str]:
    """FedBN after a round in which one site trained, and the name of one that did not."""
    desk = Desk(toy.study(get("fedbn").make({"clients": 1}), step=Step(**{"lr": 0.1, "batch": 1000} | step)))
    state = desk.play(1)
    return desk, state, next(name for name in desk.names if not desk.memory[name])


def test_fedbn_measures_the_norms_of_a_site_that_has_not_trained() -> None:
    """Mean and variance of what reaches each norm, over all training images at once."""
    desk, state, name = newcomer()
    model: Any = desk.predictor(state, name)
    x, f = desk.study.splits(name).train.x, nn.functional
    with torch.no_grad():
        first = model.conv1(x)
        down = model.down[0](f.batch_norm(first, None, None, training=True).relu())
    for norm, seen in ((model.first, first), (model.down[1], down)):
        torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
        assert int(norm.num_batches_tracked) == 1
        assert norm.momentum == 0.1
        assert torch.equal(norm.weight, torch.ones(8))


def test_fedbn_counts_every_batch_the_same() -> None:
    """Of equal batches, the mean of means is the mean, whatever the study begins with; a mean that forgets is not."""
    desk, state, name = newcomer(batch=16)
    for leaf in desk.slots.first().of(Kind.STATISTIC, Kind.COUNTER).values():
        leaf.fill_(9)
    model: Any = desk.predictor(state, name)
    with torch.no_grad():
        seen = model.conv1(desk.study.splits(name).train.x)
    torch.testing.assert_close(model.first.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_fedbn_reads_no_label_to_measure() -> None:
    desk, state, name = newcomer()
    before = copy_of(desk.predictor(state, name))
    desk.study.splits(name).train.y[:] = -100  # type: ignore[attr-defined]
    assert toy.same(dict(copy_of(desk.predictor(state, name))), dict(before))


def test_fedbn_keeps_the_norms_of_a_site_that_has_trained() -> None:
    desk, state, _ = newcomer()
    name = next(name for name in desk.names if desk.memory[name])
    model, own = copy_of(desk.predictor(state, name)), desk.memory[name]["own"]
    assert own.keys() == model.keys() - state["weights"].keys()
    assert toy.same(dict(model.only(own)), dict(own))


def test_fedbn_predicts_elsewhere_with_what_was_measured() -> None:
    """A run that is opened to predict reads no cases: it finds what the site measured when it was last scored."""
    desk, state, name = newcomer()
    message = published(state, name)
    _, memory, _ = respond(
        desk.study, desk.slots, Turn(1, 1, name), "evaluate", {**message, "split": "test"}, {}, bytes
    )
    measured = copy_of(desk.predictor(state, name))
    empty: Any = ()
    bare = replace(desk.site(name), splits=Splits(empty, empty, empty))
    with pytest.raises(ValueError, match=f"{name} has not trained"):
        desk.study.method.use(bare, message)
    opened = desk.study.method.use(replace(bare, state=memory), message)
    assert toy.same(dict(copy_of(opened)), dict(measured))


def test_what_has_no_running_statistics_is_not_measured() -> None:
    """Nothing is measured for a network without batch norm, and no images are asked for."""
    desk = Desk(linear_study("fedbn"))
    site, message = desk.site("cairo"), published(desk.study.start(), "cairo")
    empty: Any = ()
    use: Callable[..., nn.Module] = own_or_measured((nn.BatchNorm2d,))
    model = use(replace(site, splits=Splits(empty, empty, empty)), message)
    assert toy.same(dict(weights_of(model)), dict(desk.slots.first()))
    assert "measured" not in site.state
