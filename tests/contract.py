"""What every method promises, as functions, so that they can be held against faulty variants, too.

``Desk`` keeps the promise of ``Sites`` in memory, without engine or journal: every answer goes through ``respond`` and
its spec, every message and answer is recorded, and every site's memory lies open.
"""

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import segmentation_toy
import toy
from afresh import afresh
from fedscan import trees, wire
from fedscan.averaging import averaging, plain_train
from fedscan.engines.local import Local
from fedscan.method import Absent, Message, Method, Question, Replies, State, Tree, published
from fedscan.methods.registry import Entry, get, methods
from fedscan.parts.channel import Channel
from fedscan.respond import respond
from fedscan.run import Watch, run
from fedscan.schema import Kind, Weights
from fedscan.site import Site, Splits, copy_of
from fedscan.spec import Refused
from fedscan.step import Step
from fedscan.study import Study, Turn


class Asked(NamedTuple):
    """One question that was answered."""

    turn: Turn
    question: str
    message: Message
    reply: Tree


@dataclass
class Desk:
    """Sites around one table."""

    study: Study
    asked: list[Asked] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    round: int = 0
    call: int = 0
    clock: float = 0.0
    started: list[tuple[float, str, Turn, Question, Message]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names, self.slots = self.study.names, self.study.slots()
        self.memory: dict[str, dict[str, Any]] = {name: {} for name in self.names}

    def ask(self, question: Question, message: Message, *, to: Sequence[str] | None = None, need: int = 1) -> Replies:
        return self.ask_each(question, dict.fromkeys(self.names if to is None else to, message), need=need)

    def ask_each(self, question: Question, messages: Mapping[str, Message], *, need: int = 1) -> Replies:
        self.call += 1
        replies: dict[str, Callable[[], Tree]] = {}
        for name in sorted(messages):
            reply = self.answer(Turn(self.round, self.call - 1, name), question, messages[name])
            if reply is not None:
                replies[name] = partial(dict, reply)
        missing = sorted(set(messages) - set(replies))
        if len(replies) < need:
            raise Absent(missing, question.name)
        return Replies(replies, missing, resident=True)

    def answer(self, turn: Turn, question: Question, message: Message) -> Tree | None:
        """What a site says, if it does, and if that fits."""
        name = turn.site
        if turn.round in self.study.silent.get(name, ()):
            return None
        try:
            reply, memory, _ = respond(
                self.study, self.slots, turn, question.name, message, self.memory[name], lambda: b"key"
            )
            question.gives(self.study.terms).check(reply, f"the answer of {name}")
        except Refused as e:
            self.refused.append(str(e))
            return None
        self.memory[name] = memory
        self.asked.append(Asked(turn, question.name, message, reply))
        return reply

    def start(self, question: Question, messages: Mapping[str, Message]) -> None:
        self.call += 1
        for name in sorted(messages):
            due = self.clock + self.study.seconds.get(name, 1.0)
            self.started.append((due, name, Turn(self.round, self.call - 1, name), question, messages[name]))

    def next(self) -> tuple[str, Tree]:
        while self.started:
            first = min(self.started, key=lambda entry: entry[:2])
            self.started.remove(first)
            self.clock, name, turn, question, message = first
            if (reply := self.answer(turn, question, message)) is not None:
                return name, reply
        raise Absent(self.names, "next")

    @property
    def busy(self) -> tuple[str, ...]:
        return tuple(sorted(name for _, name, *_ in self.started))

    def random(self, label: str) -> torch.Generator:
        return torch.Generator().manual_seed(int(hashlib.sha256(f"{self.round}/{label}".encode()).hexdigest()[:8], 16))

    def once(self, label: str, make: Callable[[], Tree]) -> Tree:
        return make()

    def play(self, rounds: int | None = None) -> State:
        """The state after the study's rounds, from its start."""
        state = self.study.start()
        for number in range(1, (rounds or self.study.rounds) + 1):
            self.round, self.call = number, 0
            state = self.study.method.round(self, state)
        if self.study.method.closing:
            self.round, self.call = self.round + 1, 0
            state = self.study.method.closing(self, state)
        return state

    def site(self, name: str) -> Site:
        """A site as it stands, to look at what it would predict with."""
        s = self.study
        return Site(name, s.task, s.splits(name), s.step, self.slots, dict(self.memory[name]), s.seed, 99, 99)

    def predictor(self, state: State, name: str) -> nn.Module:
        """The model that site ``name`` predicts with."""
        return self.study.method.use(self.site(name), published(state, name)).eval()


Bench = Callable[..., Study]  # (method, names=..., **changes) -> study
BENCHES: dict[str, Bench] = {
    "2D": toy.study,
    "3D batch": partial(segmentation_toy.study, norm="batch"),
    "3D instance": partial(segmentation_toy.study, norm="instance"),
}


def study_of(entry: Entry[Any], bench: Bench, options: Mapping[str, Any] | None = None, **changes: Any) -> Study:
    """The bench's study of a method, with the moments its card asks for."""
    made = bench(entry.make(options), **changes)
    return replace(made, step=replace(made.step, moments=entry.card.moments)) if "step" not in changes else made


def digest(state: State) -> str:
    return wire.pack(state).digest


def tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [t for v in tree.values() for t in tensors(v)] if isinstance(tree, Mapping) else []


def finite(tree: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors(tree) if t.is_floating_point())


@torch.no_grad()
def mean_loss(desk: Desk, state: State) -> float:
    """The mean over sites of the validation loss of what each predicts with."""
    losses = []
    for name in desk.names:
        model, split = desk.predictor(state, name), desk.study.splits(name).validation
        batch = next(split.batches(len(split), torch.Generator(), torch.Generator()))
        losses.append(float(desk.study.task.loss(desk.study.task.outputs(model, batch), batch)))
    return math.fsum(losses) / len(losses)


# -- the promises ----------------------------------------------------------------------------------------------------


def check_learns(entry: Entry[Any], bench: Bench, rounds: int = 3) -> None:
    """After a few rounds the validation loss is lower than at the start, and nothing is infinite."""
    desk = Desk(study_of(entry, bench, rounds=rounds))
    before = mean_loss(desk, desk.study.start())
    state = desk.play()
    assert finite(state), "the state is not finite"
    assert not desk.refused, desk.refused
    after = mean_loss(desk, state)
    assert after < before, f"the loss went from {before:.4f} to {after:.4f}"


def check_repeats(entry: Entry[Any], bench: Bench) -> None:
    """The same study gives the same bits, and another seed gives others."""
    first, second = (digest(Desk(study_of(entry, bench)).play()) for _ in range(2))
    assert first == second
    assert first != digest(Desk(study_of(entry, bench, seed=1)).play())


def check_pure(entry: Entry[Any], bench: Bench) -> None:
    """A round changes neither the state nor the replies it is given, and draws from no generator of its own."""
    desk = Desk(study_of(entry, bench))
    state = desk.play(1)
    given, chance = digest(state), torch.get_rng_state()
    replies = [(asked.reply, digest(asked.reply)) for asked in desk.asked]
    desk.round, desk.call, desk.asked = 2, 0, []
    after = desk.study.method.round(desk, state)
    assert digest(state) == given, "the state was changed in place"
    assert digest(after) != given
    replies += [(asked.reply, digest(asked.reply)) for asked in desk.asked]
    desk.round, desk.call = 3, 0
    desk.study.method.round(desk, after)
    assert all(digest(reply) == was for reply, was in replies), "a reply was changed in place"
    assert torch.equal(torch.get_rng_state(), chance), "the default generator was drawn from"


def check_strict(entry: Entry[Any], bench: Bench, folder: Path) -> None:
    """Handing tensors over and sending every message through its bytes give the same bits."""
    plain = run(study_of(entry, bench), folder / "plain")
    strict = run(study_of(entry, bench), folder / "strict", engine=partial(Local, strict=True))
    assert digest(plain) == digest(strict)


class Killed(BaseException):
    """The process is gone."""


def entry_of(method: str) -> Entry[Any]:
    """The entry of a name in the registry, or of "module:name" as an entry point says it."""
    module, _, name = method.rpartition(":")
    found: Entry[Any] = getattr(importlib.import_module(module), name) if module else get(name)
    return found


def study_in(folder: Path) -> Study:
    """The study that the folder's study file asks for: a method on a bench; one site is silent in round 2."""
    said = json.loads((folder / "toy.json").read_text())
    silent = {name: tuple(rounds) for name, rounds in said["silent"].items()}
    return study_of(entry_of(said["method"]), BENCHES[said["bench"]], rounds=said["rounds"], silent=silent)


def outcome(study: Study, folder: Path, watch: Watch = lambda what, value: None, **how: Any) -> str:
    """The run's last state and its test scores, as a digest: the scores tell what sites remember, too."""
    scores: list[Any] = []

    def both(what: str, value: Any) -> None:
        scores.extend(value if what == "scores" else ())
        watch(what, value)

    state = run(study, folder, watch=both, **how)
    assert finite(state), "the state is not finite"
    return digest({"state": state, "scores": repr(scores)})


def gone_on(folder: Path) -> str:
    """The outcome of a run that somebody else began in the folder."""
    return outcome(study_in(folder), folder / "run", resume=True)


def check_goes_on(method: str, bench: str, folder: Path) -> None:
    """With a site silent in round 2 a run goes on to its end; killed amid that round, a new process ends it as well.

    The new process is given a folder with the study file and the run. ``method`` is a name as in ``entry_of``.
    """
    for name in ("whole", "killed"):
        (folder / name).mkdir()
        said = {"method": method, "bench": bench, "rounds": 3, "silent": {"bergen": [2]}}
        (folder / name / "toy.json").write_text(json.dumps(said))
    turns: list[Any] = []
    skipped: list[str] = []
    heard = {"turn": turns, "skipped": skipped}
    study = study_in(folder / "whole")
    whole = outcome(study, folder / "whole" / "run", lambda what, value: heard.get(what, []).append(value))
    check_silence(turns)
    assert not skipped, skipped

    def kill(what: str, value: Any) -> None:
        if what == "turn" and (value.turn.round, value.turn.site, value.status) == (2, "cairo", "answered"):
            raise Killed  # amsterdam's answer is on disk, this one is not

    try:
        outcome(study_in(folder / "killed"), folder / "killed" / "run", kill, commit_seconds=0.0)
    except Killed:
        pass
    else:
        raise AssertionError("the run was not killed")
    assert afresh("contract:gone_on", folder / "killed") == whole, "the new process came to other numbers"


def check_silence(turns: list[Any]) -> None:
    """The site answers in round 1 and after round 2; in round 2 the others do."""
    answered = {(row.turn.round, row.turn.site) for row in turns if row.status == "answered"}
    assert {1, 3} <= {r for r, site in answered if site == "bergen"}
    assert (2, "bergen") not in answered
    assert {(2, "amsterdam"), (2, "cairo")} <= answered


def check_refuses_nan(entry: Entry[Any], bench: Bench, folder: Path) -> None:
    """A site whose training gives NaN is refused by a sentence, and the others go on and learn."""
    whole = bench(entry.make())

    def spoiled(name: str) -> Splits:
        splits = whole.data(name)
        if name == "cairo":
            splits.train.x[:] = math.nan  # type: ignore[attr-defined]
        return splits

    rows: list[Any] = []
    study = replace(study_of(entry, bench), data=spoiled)
    state = run(study, folder / "nan", watch=lambda what, value: rows.append(value) if what == "turn" else None)
    training = [row for row in rows if row.question != "evaluate"]
    refusals = [row.why for row in training if row.status == "refused"]
    assert {row.turn.site for row in training if row.status == "refused"} == {"cairo"}
    assert all("finite" in why for why in refusals), refusals
    assert finite(state)
    assert digest(state) != digest(study.start())


def check_refuses_poison(entry: Entry[Any], bench: Bench) -> None:
    """From a site that sends NaN for weights, or noise for bytes, nothing is taken; the others go on."""
    method = entry.make()
    spoiled: list[str] = []

    def spoil(value: Any) -> Any:
        if isinstance(value, Weights):
            return Weights({k: v * math.nan if v.is_floating_point() else v for k, v in value.items()}, value.kinds)
        return torch.randint(0, 256, value.shape).to(value.dtype) if isinstance(value, Tensor) else value

    def poisoned(question: Question) -> Question:
        def reply(site: Site, message: Message) -> Tree:
            said = question.reply(site, message)
            if site.name != "cairo":
                return said
            spoiled.extend([question.name] if tensors(said) else [])
            return {k: spoil(v) for k, v in said.items()}

        return replace(question, reply=reply)

    study = study_of(entry, bench)
    desk = Desk(replace(study, method=replace(method, answers=tuple(map(poisoned, method.answers)))))
    state = desk.play()
    assert 0 < len(desk.refused) == len(spoiled)
    assert all("cairo" in why for why in desk.refused), desk.refused
    assert {asked.turn.site for asked in desk.asked if tensors(asked.reply)} == {"amsterdam", "bergen"}
    assert finite(state)
    assert digest(state) != digest(study.start())


def check_reduces(entry: Entry[Any], bench: Bench) -> None:
    """At the settings on its card, the method is the other one, bit for bit."""
    rule = entry.card.reduces
    assert rule is not None
    names = ("cairo",) if rule.alone else toy.NAMES
    step = Step(**{"lr": 0.1, "batch": 2 if bench is not toy.study else 16, "moments": "kept", **rule.step})
    states = [
        Desk(study_of(e, bench, options, names=names, step=step)).play()
        for e, options in ((entry, rule.own), (get(rule.to), rule.its))
    ]
    for name in names:
        ours, theirs = (published(state, name)["weights"] for state in states)
        assert toy.same(dict(ours), dict(theirs)), f"{entry.card.name} is not {rule.to}"


def check_transfers(entry: Entry[Any], bench: Bench) -> None:
    """What is published is the same at all sites; what stays at home differs between them."""
    desk = Desk(study_of(entry, bench, rounds=1))
    state = desk.play()
    models = [copy_of(desk.predictor(state, name)) for name in desk.names]
    if "for" in state:
        for name, model in zip(desk.names, models, strict=True):
            assert toy.same(dict(model), dict(state["for"][name]))
        shared: set[str] = set()
    else:
        shared = set(state["weights"]) if isinstance(state["weights"], Weights) else set(models[0])
    for leaf in models[0]:
        alike = all(torch.equal(models[0][leaf], m[leaf]) for m in models[1:])
        if leaf in shared:
            assert alike, f"{leaf} is published and differs between sites"
            assert not isinstance(state["weights"], Weights) or torch.equal(models[0][leaf], state["weights"][leaf])
        elif models[0].kinds[leaf] is not Kind.COUNTER:
            assert not alike, f"{leaf} stays at home and is the same at all sites"


def check_statistics_travel(entry: Entry[Any], bench: Bench) -> None:
    """Where the card says that they travel, all running statistics are published, and have moved."""
    if entry.card.normalisation.startswith("stays at each site"):
        return
    desk = Desk(study_of(entry, bench, rounds=1))
    state, start = desk.play(), desk.slots.first()
    some = published(state, "cairo")["weights"]
    for weights in [some] if isinstance(some, Weights) else some.values():
        for k in start.of(Kind.STATISTIC):
            assert k in weights, f"{k} does not travel"
            assert not torch.equal(weights[k], start[k]), f"{k} was left behind"


def check_home_stays(entry: Entry[Any], bench: Bench, private: set[str]) -> None:
    """No message and no answer carries a leaf that should stay at its site, nor its moments."""
    step = Step("adam", 0.01, batch=4, moments="averaged")
    desk = Desk(study_of(entry, bench, step=step))
    desk.play()
    assert not desk.refused, desk.refused
    for asked in desk.asked:
        for tree in (asked.message, asked.reply):
            for value in tree.values():
                told = {name.split("/")[-1] for name in value} if isinstance(value, Weights) else set()
                assert not private & told, private & told


def check_says_what_travels(entry: Entry[Any], bench: Bench) -> None:
    """The leaves that are said to travel at the start are those in every message and answer, and no others are."""
    desk = Desk(study_of(entry, bench))
    desk.play()
    said = desk.study.travelling
    for asked in desk.asked:
        for tree in (asked.message, asked.reply):
            sent = {k for key in ("weights", "update") if isinstance(v := tree.get(key), Weights) for k in v}
            assert not sent or sent == said, sent ^ said


def check_refuses_strangers(entry: Entry[Any], bench: Bench) -> None:
    """A site answers the questions on the list and no others."""
    study = study_of(entry, bench)
    strangers = {q.name for e in methods().values() for q in e.make().answers} | {"steal", "", "__init__"}
    for question in strangers - set(study.questions):
        try:
            respond(study, study.slots(), Turn(1, 0, "cairo"), question, {}, {}, bytes)
        except Refused as e:
            assert "does not answer" in str(e)  # noqa: PT017
        else:
            raise AssertionError(f"{question!r} was answered")


def check_moments(entry: Entry[Any], bench: Bench, step: Step) -> None:
    """A method works with moments that are kept, averaged or travel, or its card refuses them by a sentence."""
    try:
        entry.card.admits(step)
    except ValueError as e:
        assert len(str(e)) > 40  # noqa: PT017
        return
    desk = Desk(study_of(entry, bench, step=step))
    state = desk.play()
    assert not desk.refused, desk.refused
    assert finite(state)
    assert digest(state) != digest(desk.study.start())


def check_privacy(entry: Entry[Any]) -> None:
    """The card's class of data is that of the most telling question."""
    from fedscan.method import PRIVACY

    most = max(PRIVACY.index(q.privacy) for q in entry.make().answers)
    assert PRIVACY[most] == entry.card.privacy


def check_hands_on(entry: Entry[Any], bench: Bench) -> None:
    """What each site on the tour receives is what the one before gave back, over rounds."""
    desk = Desk(study_of(entry, bench))
    state = desk.play()
    tour = [asked for asked in desk.asked if "weights" in asked.reply]
    assert len(tour) == len(desk.names) * desk.study.rounds
    for before, after in pairwise(tour):
        assert toy.same(dict(before.reply["weights"]), dict(after.message["weights"]))
    assert toy.same(dict(tour[-1].reply["weights"]), dict(state["weights"]))


def check_alone(entry: Entry[Any], bench: Bench, desk: type[Desk] = Desk) -> None:
    """Every site's model is that of the site in a study by itself."""
    together = desk(study_of(entry, bench)).play()
    for name in toy.NAMES:
        alone = desk(study_of(entry, bench, names=(name,))).play()
        assert toy.same(dict(together["for"][name]), dict(alone["for"][name])), f"{name} is not alone"


def check_site_feedback(channel: Channel, desk: type[Desk] = Desk) -> None:
    """What a site's updates add up to is what the server decoded and what the site still holds."""
    made: list[Weights] = []

    def keeping(site: Site, model: nn.Module, message: Message) -> Tree:
        before = copy_of(model)
        report = plain_train(site, model, message)
        made.append(trees.sub(copy_of(model), before).of(Kind.PARAMETER))
        return report

    table = desk(toy.study(averaging(keeping, channel=channel), names=("cairo",), rounds=4))
    table.play()
    schema = table.study.start()["weights"].schema
    for leaf in made[0]:
        sent = sum(channel.decode(a.reply["update"], schema)[leaf] for a in table.asked)
        held = table.memory["cairo"]["rest"][leaf]
        torch.testing.assert_close(sent + held, sum(m[leaf] for m in made), rtol=1e-4, atol=1e-5)


def faulty(entry: Entry[Any], change: Callable[[Method], Method]) -> Entry[Any]:
    """The entry with a fault planted in the method it makes."""
    make: Any = entry.function

    @wraps(make)
    def planted(**options: Any) -> Method:
        return change(make(**options))

    return replace(entry, function=planted)
