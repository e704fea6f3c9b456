"""The one local loop: the bits of a bare loop in torch, and what the study's policy for steps adds to it."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toy
from fedscan.averaging import averaging
from fedscan.method import Message, Method, Sites, State, Tree, answer, receive
from fedscan.respond import respond, seeded
from fedscan.run import run
from fedscan.schema import Kind, Weights, schema_of
from fedscan.site import Batch, Site, Splits, copy_of, fit, load
from fedscan.spec import Leaves, Number, Refused
from fedscan.step import Step, load_moments
from fedscan.study import Turn
from toy import NAMES, Toy, same

torch.set_num_threads(1)


class Plain(nn.Module):
    """No batch norm: a group of batches is one large batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class PlainToy(Toy):
    def __init__(self) -> None:
        self.networks = {"model": Plain}  # type: ignore[dict-item]


def site(step: Step, task: Any = None, splits: Splits | None = None, **changes: Any) -> Site:
    """The toy's hospital in Amsterdam: 64 training cases."""
    study = replace(toy.study(averaging(), step=step), task=task or Toy())
    return Site("amsterdam", study.task, splits or toy.data("amsterdam"), step, study.slots(),
                **{"seed": 3, "round": 1, "rounds": 4, **changes})  # fmt: skip


def begun(s: Site) -> nn.Module:
    return load(s.model(), s.slots.first())


def batches_of(s: Site, size: int, epochs: int) -> Iterator[Batch]:
    """The site's batches, drawn by hand from a generator of the same seed."""
    order = s.stream("order")
    for _ in range(epochs):
        for i in torch.randperm(64, generator=order).split(size):
            yield Batch(s.train.x[i], s.train.y[i])  # type: ignore[attr-defined]


OPTIMISERS = {
    "sgd": (Step(lr=0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "momentum": (
        Step(lr=0.05, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    ),
    "adam": (Step("adam", lr=0.01, weight_decay=0.1), lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1)),
    "adamw": (Step("adamw", lr=0.01, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1)),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_fit_is_a_bare_loop_to_the_bit(name: str) -> None:
    step, make = OPTIMISERS[name]
    s = site(replace(step, batch=16, epochs=2))
    model = begun(s)
    report = fit(s, model)
    bare = toy.Net()
    bare.load_state_dict(s.slots.first())
    bare.train()
    optimizer, losses = make(bare.parameters()), []
    for x, y, _ in batches_of(s, 16, 2):
        loss = nn.functional.cross_entropy(bare(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert same(dict(model.state_dict()), dict(bare.state_dict()))
    assert report["steps"] == 8
    assert report["loss"] == pytest.approx(sum(losses) / 8, rel=1e-6)
    assert model.state_dict()["first.num_batches_tracked"] == 8


def test_schedules_by_hand() -> None:
    assert [Step(lr=0.2).rate(r, 10) for r in (1, 5, 10)] == [0.2, 0.2, 0.2]
    cosine = Step(lr=0.2, schedule="cosine")
    assert [cosine.rate(r, 4) for r in (1, 2, 3, 4)] == pytest.approx([0.2, 0.17071068, 0.1, 0.02928932], rel=1e-6)
    poly = Step(lr=0.2, schedule="poly")
    expected = [0.2, 0.2 * 0.75**0.9, 0.2 * 0.5**0.9, 0.2 * 0.25**0.9]
    assert [poly.rate(r, 4) for r in (1, 2, 3, 4)] == pytest.approx(expected, rel=1e-12)
    assert poly.rate(99, 100) == pytest.approx(0.2 * 0.02**0.9)
    assert cosine.rate(1, 1) == 0.2
    assert site(cosine, round=3).lr == pytest.approx(0.1)


def test_the_schedule_is_what_the_optimiser_steps_by() -> None:
    moved = []
    for schedule in ("constant", "cosine"):
        s = site(Step(lr=0.1, batch=64, schedule=schedule), PlainToy(), round=3)
        before = s.slots.first()
        model = begun(s)
        fit(s, model)
        moved.append(copy_of(model)["layers.1.weight"] - before["layers.1.weight"])
    assert torch.allclose(moved[1], moved[0] / 2, atol=1e-7)  # half way through a cosine


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_accumulated_batches_are_one_large_batch(optimiser: Any) -> None:
    """64 cases in batches of 8, three at a time: groups of 24, 24 and 16."""
    small = site(Step(optimiser, lr=0.05, batch=8, accumulate=3), PlainToy())
    model = begun(small)
    assert fit(small, model)["steps"] == 3
    s = site(Step(optimiser, lr=0.05, batch=24), PlainToy())
    large = Plain()
    large.load_state_dict(s.slots.first())
    optimizer = s.step.optimizer(large, 0.05)
    for x, y, _ in batches_of(s, 24, 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(large(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for name, leaf in large.state_dict().items():
        assert torch.allclose(model.state_dict()[name], leaf, atol=1e-6), name


def test_a_last_group_that_is_smaller_is_a_mean_as_well() -> None:
    """Two equal batches in a group of 4 give the step of one of them, not half of it."""
    s = site(Step(lr=0.1, accumulate=4), PlainToy())
    batch = next(batches_of(s, 16, 1))
    model = begun(s)
    assert fit(s, model, batches=[batch, batch])["steps"] == 1
    twice = copy_of(model)
    fit(s, begun(s), batches=[batch])
    assert all(torch.allclose(twice[k], v, atol=1e-7) for k, v in copy_of(s.model()).items())


def test_clipping_limits_the_length_of_a_step() -> None:
    lengths = {}
    for clip in (None, 1e9, 0.01):
        s = site(Step(lr=1.0, batch=64, clip=clip), PlainToy())
        before = s.slots.first()
        after = copy_of(begun(s)) and fit(s, s.model()) and copy_of(s.model())
        lengths[clip] = math.sqrt(sum(float((after[k] - before[k]).square().sum()) for k in before))
    assert lengths[None] == lengths[1e9] > 0.02
    assert lengths[0.01] == pytest.approx(0.01, rel=1e-3)


def test_clipping_comes_after_the_correction_and_the_mean() -> None:
    s = site(Step(lr=1.0, batch=16, accumulate=4, clip=0.5), PlainToy())
    seen: list[float] = []

    def correct(model: nn.Module) -> None:
        for p in model.parameters():
            assert p.grad is not None
            p.grad.fill_(1.0)
        seen.append(1.0)

    before = s.slots.first()
    fit(s, begun(s), correct=correct)
    after = copy_of(s.model())
    entries = sum(v.numel() for v in before.values())
    assert len(seen) == 1  # one step of four batches, corrected once
    for k, v in before.items():
        assert torch.allclose(v - after[k], torch.full_like(v, 0.5 / math.sqrt(entries)), atol=1e-6)


def test_bfloat16_computes_low_and_keeps_float32_weights() -> None:
    seen: list[torch.dtype] = []

    class Spy(Toy):
        def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            out = super().outputs(model, batch)
            seen.append(out["logits"].dtype)
            return out

    results = {}
    for precision in ("float32", "bfloat16"):
        s = site(Step(lr=0.1, batch=16, precision=precision, epochs=4), Spy())
        model = begun(s)
        report = fit(s, model)
        assert {v.dtype for v in model.state_dict().values()} == {torch.float32, torch.int64}
        results[precision] = (report["loss"], copy_of(model))
    assert set(seen) == {torch.float32, torch.bfloat16}
    assert results["bfloat16"][0] == pytest.approx(results["float32"][0], abs=0.05)
    assert not same(dict(results["bfloat16"][1]), dict(results["float32"][1]))


@pytest.mark.slow
def test_a_compiled_network_keeps_its_names_and_is_compiled_once() -> None:
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    dynamo.reset()
    counters.clear()
    s = site(Step(lr=0.05, batch=16, compile=True), PlainToy())
    plain = site(Step(lr=0.05, batch=16), PlainToy())
    assert list(s.model().state_dict()) == list(plain.model().state_dict())
    assert schema_of(s.model()) == schema_of(plain.model())
    fit(s, begun(s))
    fit(plain, begun(plain))
    expected = copy_of(plain.model())
    assert all(torch.allclose(v, expected[k], atol=1e-5) for k, v in copy_of(s.model()).items())
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 1
    pointers = [p.data_ptr() for p in s.model().parameters()]
    for seed in (1, 2):  # other weights in the same place: no new graph
        load(s.model(), {k: torch.randn(v.shape, generator=s.stream(str(seed))) for k, v in expected.items()})
        fit(s, s.model())
    assert [p.data_ptr() for p in s.model().parameters()] == pointers
    assert counters["stats"]["unique_graphs"] == graphs
    dynamo.reset()


# -- the optimiser's moments -----------------------------------------------------------------------------------------


def by_hand(g: list[float], rounds: list[int], start: float = 0.0) -> float:
    """Where SGD with momentum 0.5 and rate 1 leads: gradients g, with the buffer emptied where a round begins."""
    w, v = start, 0.0
    for i, x in enumerate(g):
        v = x if i in rounds else 0.5 * v + x
        w -= v
    return w


class Line(nn.Module):
    """One weight, whose gradient is the mean of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x.mean()


class LineToy(Toy):
    def __init__(self) -> None:
        self.networks = {"model": Line}  # type: ignore[dict-item]

    def loss(self, out: Any, batch: Batch) -> Tensor:
        return out["logits"].sum()  # type: ignore[no-any-return]

    def scores(self, *_: Any) -> list[list[Any]]:
        return []


def line_data(name: str) -> Splits:
    """Every image is 1 in Amsterdam and 3 in Bergen: so are the gradients."""
    x = torch.full((4, 1, 2, 2), {"amsterdam": 1.0, "bergen": 3.0}[name])
    split = toy.Tensors(x, torch.zeros(4, dtype=torch.int64), name)
    return Splits(split, split, split)  # type: ignore[arg-type]


def line_run(method: Method, folder: Path, names: tuple[str, ...], moments: Any, **step: Any) -> State:
    policy = Step(**{"lr": 1.0, "momentum": 0.5, "batch": 2, "moments": moments, **step})
    plan = replace(toy.study(method, names, rounds=2, step=policy), task=LineToy(), data=line_data)
    return run(plan, folder)


@pytest.mark.parametrize(("moments", "starts"), [("reset", [0, 2]), ("kept", [0]), ("averaged", [0]), ("travels", [0])])
def test_moments_over_two_rounds_at_one_site(moments: Any, starts: list[int], tmp_path: Path) -> None:
    """Two rounds of two steps of gradient 1: -(1 + 1.5 + 1 + 1.5) with a reset, else -(1 + 1.5 + 1.75 + 1.875)."""
    assert by_hand([1.0] * 4, [0, 2]) == -5.0
    assert by_hand([1.0] * 4, [0]) == -6.125
    state = line_run(averaging(), tmp_path, ("amsterdam",), moments)
    assert float(state["weights"]["w"]) == by_hand([1.0] * 4, starts)
    assert ("optimizer" in state) == (moments in ("averaged", "travels"))


@pytest.mark.parametrize("moments", ["reset", "kept", "averaged"])
def test_moments_over_two_rounds_at_two_sites(moments: Any, tmp_path: Path) -> None:
    """Gradients 1 and 3; after round 1 the buffers are 1.5 and 4.5, and their mean is 3."""
    first = {"amsterdam": -2.5, "bergen": -7.5}
    second = {
        "reset": {"amsterdam": -2.5, "bergen": -7.5},  # buffers begin with the gradient: 1, 1.5 and 3, 4.5
        "kept": {"amsterdam": -(1.75 + 1.875), "bergen": -(5.25 + 5.625)},
        "averaged": {"amsterdam": -(2.5 + 2.25), "bergen": -(4.5 + 5.25)},  # 0.5 * 3 + g, and on
    }[moments]
    state = line_run(averaging(), tmp_path, ("amsterdam", "bergen"), moments)
    expected = sum(first.values()) / 2 + sum(second.values()) / 2
    assert float(state["weights"]["w"]) == pytest.approx(expected, rel=1e-6)
    if moments == "averaged":
        assert float(state["optimizer"]["momentum_buffer/w"]) == pytest.approx((2.25 + 5.25) / 2)


def test_moments_travel_along_a_ring(tmp_path: Path) -> None:
    """Amsterdam twice with gradient 1, then Bergen with 3, two rounds: one buffer all the way."""

    def gives(terms: Any) -> dict[str, Any]:
        moments = Leaves(terms.step.moments_schema(terms.model))
        return {"weights": Leaves(schema_of(terms.model)), "optimizer": moments, "steps": Number(whole=True)}

    @answer("weights", gives)
    def visit(s: Site, message: Message) -> Tree:
        model = receive(s, message)
        return {**fit(s, model, memory=message.get("optimizer")), "weights": copy_of(model)}

    def round(sites: Sites, state: State) -> State:
        for name in sites.names:
            message = {k: state[k] for k in ("weights", "optimizer") if k in state}
            reply = sites.ask(visit, message, to=[name])[name]
            state = {**state, "weights": reply["weights"], "optimizer": reply["optimizer"]}
        return state

    method = Method(lambda model, names: {"weights": copy_of(model)}, round, (visit,))
    state = line_run(method, tmp_path, ("amsterdam", "bergen"), "travels")
    gradients = [1.0, 1.0, 3.0, 3.0, 1.0, 1.0, 3.0, 3.0]
    assert float(state["weights"]["w"]) == by_hand(gradients, [0])


def test_adam_with_moments_kept_is_one_long_run() -> None:
    """Two fits that hand the moments on are one fit of twice the epochs, bias correction and all."""
    for optimiser in ("adam", "adamw"):
        step = Step(optimiser, lr=0.01, batch=16, moments="kept")
        s = site(step, PlainToy())
        batches = list(batches_of(s, 16, 2))
        model = begun(s)
        fit(s, model, batches=batches[:4])
        assert sorted(s.state) == ["optimizer"]
        assert s.state["optimizer"]["step/layers.1.bias"] == 4
        fit(s, model, batches=batches[4:])
        whole = site(step, PlainToy())
        fit(whole, begun(whole), batches=batches)
        assert same(dict(copy_of(model)), dict(copy_of(whole.model())))
        assert same(dict(s.state["optimizer"]), dict(whole.state["optimizer"]))


def test_moments_are_what_the_schema_says() -> None:
    for step in (Step(momentum=0.9), Step("adam"), Step("adamw"), Step()):
        for moments in ("averaged", "travels"):
            s = site(replace(step, moments=moments, batch=32))
            report = fit(s, begun(s))
            Leaves(s.step.moments_schema(s.model())).check(report.get("optimizer", Weights({})), "the moments")
    assert Step("adam").moments_schema(toy.Net()) == {}


class Spare(Line):
    """A line with a weight that the output does not depend on, as of a head that another role trains."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.full((2, 3), 7.0))


class SpareToy(LineToy):
    def __init__(self) -> None:
        self.networks = {"model": Spare}  # type: ignore[dict-item]


@pytest.mark.parametrize("moments", ["averaged", "travels", "kept"])
@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_a_parameter_without_a_gradient_has_moments_of_zero(optimiser: Any, moments: Any, tmp_path: Path) -> None:
    """Two rounds at two sites end as those of the network without it, and it stays as it was."""
    policy = Step(optimiser, lr=0.25, momentum=0.5, batch=2, moments=moments)
    plan = replace(toy.study(averaging(), ("amsterdam", "bergen"), rounds=2, step=policy), data=line_data)
    found = run(replace(plan, task=SpareToy()), tmp_path / "spare")
    plain = run(replace(plan, task=LineToy()), tmp_path / "plain")
    assert torch.equal(found["weights"]["w"], plain["weights"]["w"])
    assert torch.equal(found["weights"]["spare"], torch.full((2, 3), 7.0))
    if moments != "kept":
        theirs = {k: v for k, v in found["optimizer"].items() if k.endswith("/spare")}
        shapes = {"step": (), "exp_avg": (2, 3), "exp_avg_sq": (2, 3), "momentum_buffer": (2, 3)}
        names = ["momentum_buffer"] if optimiser == "sgd" else ["exp_avg", "exp_avg_sq", "step"]
        assert sorted(theirs) == [f"{name}/spare" for name in names]
        assert all(v.shape == shapes[k.partition("/")[0]] and not v.any() for k, v in theirs.items())
        assert same(dict(plain["optimizer"]), {k: v for k, v in found["optimizer"].items() if k not in theirs})


@pytest.mark.parametrize("step", [Step(momentum=0.5, lr=0.1), Step("adam", lr=0.1), Step("adamw", lr=0.1)])
def test_to_begin_with_moments_of_zero_is_to_begin(step: Step) -> None:
    ends = []
    for given in (False, True):
        model = Line()
        zeros = step.moments_of(step.optimizer(model, step.lr), model)
        optimizer = step.optimizer(model, step.lr, zeros if given else None)
        for gradient in (2.0, -0.5):
            model.w.grad = torch.tensor([gradient])
            optimizer.step()
        ends.append(model.w.detach().clone())
    assert torch.equal(*ends)


def test_frozen_parameters_have_no_moments() -> None:
    s = site(Step("adam", moments="travels", batch=32), PlainToy())
    model = begun(s)
    model.get_parameter("layers.1.weight").requires_grad_(False)
    report = fit(s, model)
    Leaves(s.step.moments_schema(model)).check(report["optimizer"], "the moments")
    assert torch.equal(model.get_parameter("layers.1.weight"), s.slots.first()["layers.1.weight"])


def test_loaded_moments_are_copies() -> None:
    model = Plain()
    kept = Weights({f"momentum_buffer/{k}": torch.ones_like(p) for k, p in model.named_parameters()})
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    load_moments(optimizer, model, kept)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(bool((v == 1).all()) for v in kept.values())
    after = Step(momentum=0.9).moments_of(optimizer, model)
    assert float(after["momentum_buffer/layers.1.bias"][0]) == pytest.approx(0.9)


# -- what is refused, and what is left alone ---------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_refused_by_a_sentence() -> None:
    splits = toy.data("amsterdam")
    splits.train.x[3, 0, 0, 0] = math.nan  # type: ignore[attr-defined]
    s = site(Step(lr=0.1, batch=16), splits=splits, round=2)
    with pytest.raises(Refused, match="training loss at amsterdam was not finite in round 2: lower the learning rate"):
        fit(s, begun(s))


def test_a_site_without_batches_says_so() -> None:
    s = site(Step())
    with pytest.raises(ValueError, match="amsterdam has no training batch"):
        fit(s, begun(s), batches=[])


def test_order_and_augmentation_are_streams_of_their_own() -> None:
    """Whether augmentation draws nothing or much, the order stays; and the other way round."""
    drawn: dict[str, list[Any]] = {}

    class Greedy(toy.Tensors):
        def __init__(self, base: Any, of_order: int, of_augment: int) -> None:
            super().__init__(base.x, base.y, "amsterdam")
            self.of_order, self.of_augment = of_order, of_augment

        def batches(self, size: int, order: torch.Generator, augment: torch.Generator) -> Iterator[Batch]:
            for i in torch.randperm(64, generator=order).split(size):
                drawn["order"].append(i.tolist())
                drawn["augment"].append(float(torch.rand(1, generator=augment)))
                yield Batch(self.x[i], self.y[i])
            torch.rand(self.of_order, generator=order)
            torch.rand(self.of_augment, generator=augment)

    found = []
    for of_order, of_augment in ((0, 0), (0, 5), (5, 0)):
        drawn.update(order=[], augment=[])
        base = toy.data("amsterdam")
        s = site(Step(batch=16, epochs=2), splits=base._replace(train=Greedy(base.train, of_order, of_augment)))  # type: ignore[arg-type]
        fit(s, begun(s))
        found.append((drawn["order"], drawn["augment"]))
    plain, more_augment, more_order = found
    assert more_augment[0] == plain[0]
    assert more_augment[1][4:] != plain[1][4:]
    assert more_order[1] == plain[1]
    assert more_order[0][4:] != plain[0][4:]


def test_streams_differ_by_everything_that_names_them() -> None:
    def first(**changes: Any) -> float:
        name = changes.pop("name", "order")
        return float(torch.rand(1, generator=site(Step(), **changes).stream(name), dtype=torch.float64))

    draws = [first(), first(name="augmentation"), first(seed=4), first(round=2), first(call=1)]
    other = replace(site(Step()), name="bergen")
    draws.append(float(torch.rand(1, generator=other.stream("order"), dtype=torch.float64)))
    assert len(set(draws)) == 6
    assert first() == draws[0]


def test_answers_leave_the_default_generator_as_it_was() -> None:
    study = toy.study(averaging())
    torch.manual_seed(11)
    before = torch.get_rng_state()
    message = {"weights": study.start()["weights"]}
    slots = study.slots()
    respond(study, slots, Turn(1, 0, "bergen"), "learn", message, {}, bytes)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RuntimeError, match="size"), seeded(1, torch.device("cpu")):
        torch.rand(3) @ torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_drawn_inside_an_answer_is_decided_by_its_turn() -> None:
    """Dropout draws from the default generator: the same turn gives the same bits whatever was drawn outside."""

    class Dropping(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.layers.insert(3, nn.Dropout(0.5))

    class DroppingToy(Toy):
        def __init__(self) -> None:
            self.networks = {"model": Dropping}  # type: ignore[dict-item]

    study = replace(toy.study(averaging()), task=DroppingToy())
    slots, message = study.slots(), {"weights": study.start()["weights"]}
    updates = []
    for turn in (Turn(1, 0, "bergen"), Turn(1, 0, "bergen"), Turn(1, 1, "bergen")):
        torch.rand(7)
        updates.append(respond(study, slots, turn, "learn", message, {}, bytes)[0]["update"])
    assert same(dict(updates[0]), dict(updates[1]))
    assert not same(dict(updates[0]), dict(updates[2]))


def test_replies_are_not_the_networks_own_tensors() -> None:
    """The slots are overwritten by the next answer; what was answered stays."""
    study = toy.study(averaging(share=lambda model: frozenset({"head.weight"})))
    slots, message = study.slots(), {"weights": study.start()["weights"]}
    reply, memory, _ = respond(study, slots, Turn(1, 0, "bergen"), "learn", message, {}, bytes)
    kept = Weights({k: v.clone() for k, v in {**reply["update"], **memory["own"]}.items()})
    respond(study, slots, Turn(1, 0, "cairo"), "learn", message, {}, bytes)
    assert same(dict(kept), {**reply["update"], **memory["own"]})
    assert set(NAMES) >= {"bergen", "cairo"}
    assert memory["own"].kinds["first.running_var"] is Kind.STATISTIC
