"""Nothing is lost: a run is killed at every event, and goes on from its folder alone to the same bits."""

import hashlib
import os
import shutil
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from afresh import Elsewhere, afresh
from fedscan import trees, wire
from fedscan.averaging import averaging
from fedscan.engines.local import Local
from fedscan.memory import Damaged
from fedscan.method import Message, Method, Sites, State, Tree, answer, just_weights, receive
from fedscan.methods.registry import get, methods
from fedscan.parts.share import NORMS, without
from fedscan.recorded import Diverged
from fedscan.run import Problem, run
from fedscan.schema import schema_of
from fedscan.site import Site, copy_of, fit
from fedscan.spec import Leaves, Number
from fedscan.step import Step
from fedscan.study import Study
from tinystudy import write_study
from toy import same
from toy import study as toy_study


def study(method: Method, **changes: Any) -> Study:
    """The toy study with one optimiser step per answer: what is tested here is what happens between them."""
    return toy_study(method, step=Step(lr=0.1, batch=80), **changes)


class Killed(BaseException):
    """Stands for ``kill -9``: nothing catches it."""


class Watch:
    """Counts events, and kills at the chosen one."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.seen, self.computed = at, 0, Counter[str]()

    def __call__(self, event: str) -> None:
        if event.startswith("computed"):
            self.computed[event] += 1
        if self.seen == self.at:
            raise Killed(event)
        self.seen += 1


def go(plan: Study, folder: Path, watch: Watch, resume: bool = False, commit_seconds: float = 0.0) -> State:
    return run(
        plan,
        folder,
        resume=resume,
        commit_seconds=commit_seconds,
        event=watch,
        engine=lambda s, f: Local(s, f, event=watch),
    )


def same_after_a_kill(plan: Study, folder: Path, share: float) -> None:
    """Killed at the event after this share of all, a run goes on to the same state, scores and turns."""
    whole = Watch()
    expected = go(plan, folder / "whole", whole)
    with pytest.raises(Killed):
        go(plan, folder / "cut", Watch(int(whole.seen * share)))
    assert same(go(plan, folder / "cut", Watch(), resume=True), expected)
    assert rows(folder / "cut") == rows(folder / "whole")


def rows(folder: Path) -> list[Any]:
    """The ledger without its clock."""
    db = sqlite3.connect(folder / "journal.sqlite")
    columns = "round, call, site, question, asked, bytes_down, status, answered, bytes_up, why, numbers"
    found = db.execute(f"SELECT {columns} FROM turns ORDER BY round, call, site").fetchall()
    found += db.execute("SELECT * FROM scores ORDER BY 1, 2, 3, 4, 5, 7, 8").fetchall()
    db.close()
    return found


def answered(folder: Path) -> set[str]:
    """The turns whose answers are committed in a folder, as the events of their computation are named."""
    if not (folder / "journal.sqlite").exists():
        return set()
    db = sqlite3.connect(folder / "journal.sqlite")
    found = db.execute("SELECT round, call, site FROM turns WHERE answered != ''").fetchall()
    db.close()
    return {f"computed {round}.{call}.{site}" for round, call, site in found}


def remembering() -> Method:
    """FedBN: its norm layers are the site's memory."""
    return averaging(share=without(*NORMS))


def gossiping() -> Method:
    """Answers as they come: a started question outlives its round. FedAsync's shape (Xie et al., 2019)."""

    @answer("weights", lambda terms: {"weights": Leaves(schema_of(terms.model)), "round": Number(whole=True)})
    def train_on(site: Site, message: Message) -> Tree:
        model = receive(site, message)
        fit(site, model)
        site.state["times"] = site.state.get("times", 0) + 1
        return {"weights": copy_of(model), "round": message["round"], "times": site.state["times"]}

    def round(sites: Sites, s: State) -> State:
        now = s.get("now", 0)
        idle = sorted(set(sites.names) - set(sites.busy))
        sites.start(train_on, {n: {"weights": s["weights"], "round": now} for n in idle})
        _, reply = sites.next()
        a = 0.6 * (1 + now - reply["round"]) ** -0.5
        moved = trees.add(s["weights"], trees.sub(reply["weights"], s["weights"]), a)
        return {**s, "weights": moved, "now": now + 1}

    return Method(just_weights, round, answers=(train_on,))


def buffered() -> Method:
    """A buffer of three answers to a round: where one is missing, the round is skipped and the others are kept."""

    @answer("weights", lambda terms: {"weights": Leaves(schema_of(terms.model))})
    def train_on(site: Site, message: Message) -> Tree:
        model = receive(site, message)
        fit(site, model)
        site.state["times"] = site.state.get("times", 0) + 1
        return {"weights": copy_of(model), "times": site.state["times"]}

    def round(sites: Sites, s: State) -> State:
        sites.start(train_on, {n: {"weights": s["weights"]} for n in sorted(set(sites.names) - set(sites.busy))})
        got = [sites.next()[1] for _ in range(3)]
        weights = trees.mean([reply["weights"] for reply in got], [1.0] * 3)
        return {**s, "weights": weights, "times": [reply["times"] for reply in got]}

    return Method(just_weights, round, answers=(train_on,))


def looking() -> Method:
    """A round that needs all sites, between validations that change the sites' memories."""

    @answer("weights", lambda terms: {"weights": Leaves(schema_of(terms.model))})
    def learn(site: Site, message: Message) -> Tree:
        model = receive(site, message)
        fit(site, model)
        return {"weights": copy_of(model), "looked": site.state.get("looked", 0)}

    def round(sites: Sites, s: State) -> State:
        replies = sites.ask(learn, {"weights": s["weights"]}, need=3)
        return {"weights": replies["bergen"]["weights"], "looked": [reply["looked"] for reply in replies.values()]}

    def use(site: Site, message: Message) -> nn.Module:
        site.state["looked"] = site.state.get("looked", 0) + 1
        return receive(site, message)

    return Method(just_weights, round, answers=(learn,), use=use)


def drawing() -> Method:
    """The server draws, and does heavy work once."""
    base = averaging()

    def round(sites: Sites, s: State) -> State:
        drawn = sites.once("heavy", lambda: {"x": torch.randn(4, generator=sites.random("heavy"))})
        return {**base.round(sites, s), "drawn": drawn["x"]}

    return Method(base.init, round, base.answers)


PLANS: dict[str, Callable[[], Study]] = {
    "fedavg": lambda: study(averaging(), every=1),
    "memory": lambda: study(remembering(), every=2, silent={"bergen": (2,)}),
    "async": lambda: study(gossiping(), rounds=4, seconds={"amsterdam": 2.5, "bergen": 1.0, "cairo": 1.7}),
    "once": lambda: study(drawing(), rounds=1),
    "skipped": lambda: study(looking(), rounds=3, every=1, silent={"cairo": (2,)}),
    "buffered": lambda: study(buffered(), rounds=4, silent={"bergen": (2,)}),
    "fedasync": lambda: study(get("fedasync").make(), rounds=2, seconds={"cairo": 3.5}),
    "braintorrent": lambda: study(get("braintorrent").make(), names=("bergen", "cairo"), rounds=2),
}


@pytest.mark.parametrize(
    "commit_seconds",
    [pytest.param(0.0, id="each-answer"), pytest.param(5.0, id="each-round", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    "plan", [p if p in ("memory", "async", "once") else pytest.param(p, marks=pytest.mark.slow) for p in PLANS]
)
def test_killed_at_every_event(plan: str, commit_seconds: float, tmp_path: Path) -> None:
    whole = Watch()
    expected = go(PLANS[plan](), tmp_path / "whole", whole, commit_seconds=commit_seconds)
    ledger = rows(tmp_path / "whole")
    assert whole.seen > 8
    for k in range(whole.seen):
        folder = tmp_path / str(k)
        with pytest.raises(Killed):
            go(PLANS[plan](), folder, Watch(k), commit_seconds=commit_seconds)
        after, kept = Watch(), answered(folder)
        state = go(PLANS[plan](), folder, after, resume=True, commit_seconds=commit_seconds)
        assert same(state, expected), f"killed at event {k}: other numbers"
        assert rows(folder) == ledger, f"killed at event {k}: another ledger"
        assert max(after.computed.values(), default=0) <= 1
        assert not kept & after.computed.keys(), f"killed at event {k}: a committed turn was computed again"
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", methods())
def test_every_method_killed_at_every_event(name: str, tmp_path: Path) -> None:
    """All that is in the registry, killed at each event of two rounds with one step per answer."""

    def plan() -> Study:
        return study(get(name).make({}), names=("amsterdam", "bergen"), rounds=2)

    whole = Watch()
    expected = go(plan(), tmp_path / "whole", whole)
    ledger = rows(tmp_path / "whole")
    for k in range(whole.seen):
        folder = tmp_path / str(k)
        with pytest.raises(Killed):
            go(plan(), folder, Watch(k))
        after = Watch()
        assert same(go(plan(), folder, after, resume=True), expected), f"killed at event {k}: other numbers"
        assert rows(folder) == ledger, f"killed at event {k}: another ledger"
        assert max(after.computed.values(), default=0) <= 1
        shutil.rmtree(folder)


def launched(folder: Path, watch: Callable[[str, Any], None] = lambda what, value: None) -> str:
    """The SHA-256 of what is published and of the scores, once the study in ``folder`` has run to its end."""
    from fedscan.launch import How, launch, models_of
    from fedscan.ledger import read_record
    from fedscan.studyfile import load

    how = How(resume=True, report=False, cache=folder / "cache", watch=watch)
    launch(load(folder / "study.toml"), folder / "run", how)
    models = [hashlib.sha256(path.read_bytes()).hexdigest() for path in models_of(folder / "run")]
    return hashlib.sha256(repr((models, read_record(folder / "run").scores)).encode()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("name", methods())
def test_every_method_from_study_file_and_scans_in_a_new_process(name: str, tmp_path: Path) -> None:
    """As hospitals have it: a study file, scans on disk, and a process killed for good in round 2 of 2."""
    pooled = get(name).card.pooled
    silent = "" if pooled else "[run]\nsilent = {east = [2]}\n"
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        path = write_study(folder, name, silent)
        text = path.read_text().replace('preset = "tiny"', 'preset = "tiny"\nnorm = "batch"')
        path.write_text(text if name != "scaffold" else text.replace("adam", "sgd"))  # its card says why
    whole = launched(tmp_path / "whole")
    with pytest.raises(Elsewhere, match="ended with status 9"):
        afresh("test_resume:killed", tmp_path / "killed")
    assert 0 < len(rows(tmp_path / "killed" / "run")) < len(rows(tmp_path / "whole" / "run"))
    assert afresh("test_resume:launched", tmp_path / "killed") == whole
    assert rows(tmp_path / "killed" / "run") == rows(tmp_path / "whole" / "run")


def killed(folder: Path) -> str:
    """Ends its process as ``kill -9`` does at the first answer of round 2."""

    def kill(what: str, value: Any) -> None:
        if what == "turn" and value.turn.round == 2 and value.status == "answered":
            os.kill(os.getpid(), signal.SIGKILL)

    return launched(folder, kill)


def test_a_committed_turn_is_not_computed_again(tmp_path: Path) -> None:
    before, after = Watch(), Watch()
    go(PLANS["memory"](), tmp_path / "whole", before)
    first = Watch(before.seen // 2)
    with pytest.raises(Killed):
        go(PLANS["memory"](), tmp_path / "cut", first)
    kept = answered(tmp_path / "cut")
    go(PLANS["memory"](), tmp_path / "cut", after, resume=True)
    assert kept
    assert not kept & set(after.computed)
    assert kept | set(after.computed) == set(before.computed)


def test_memory_of_a_lost_answer_leaves_no_trace(tmp_path: Path) -> None:
    """A turn that the site kept and the server did not accept is started again from the accepted memory."""

    def kill_between(event: str) -> None:
        if event.startswith("site turn kept (2, 0)"):
            raise Killed(event)

    plan = study(remembering())
    with pytest.raises(Killed):
        run(plan, tmp_path / "a", commit_seconds=0.0, engine=lambda s, f: Local(s, f, event=kill_between))
    assert same(go(study(remembering()), tmp_path / "a", Watch(), resume=True), go(plan, tmp_path / "b", Watch()))


def test_real_kills(tmp_path: Path) -> None:
    """``kill -9`` of a forked process at 30 events spread over the run."""
    whole = Watch()
    expected = go(PLANS["memory"](), tmp_path / "whole", whole)
    for k in sorted({round(i * (whole.seen - 1) / 29) for i in range(30)}):
        folder = tmp_path / str(k)
        child = os.fork()
        if child == 0:
            seen = 0

            def die(event: str, k: int = k) -> None:
                nonlocal seen
                if seen == k:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

            run(PLANS["memory"](), folder, commit_seconds=0.0, event=die, engine=lambda s, f: Local(s, f, event=die))
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert same(go(PLANS["memory"](), folder, Watch(), resume=True), expected)
        shutil.rmtree(folder)


def test_a_run_is_not_overwritten_nor_mixed(tmp_path: Path) -> None:
    go(PLANS["fedavg"](), tmp_path / "a", Watch())
    with pytest.raises(Problem, match="--resume"):
        run(PLANS["fedavg"](), tmp_path / "a")
    with pytest.raises(Problem, match="unchanged study"):
        run(study(averaging(), hash="another"), tmp_path / "a", resume=True)
    with pytest.raises(Problem, match="unchanged study"):  # studies without a file, and so without a hash of it
        run(study(averaging(), seed=1), tmp_path / "a", resume=True)


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("hurt", "said"),
    [
        (None, r"is missing"),
        (lambda data: b"", r"cannot be used \(1.safetensors is empty\)"),
        (lambda data: data[:-1], r"cannot be used \(.*should take bytes"),
        (flipped, r"cannot be used \(1.safetensors has changed since it was written\)"),
    ],
    ids=["missing", "empty", "cut", "flipped"],
)
def test_a_state_that_is_damaged_is_named(hurt: Any, said: str, tmp_path: Path) -> None:
    """One sentence says which file and what to do; put back, it is gone on with to the same bits."""
    plan, folder = study(remembering()), tmp_path / "run"

    def stop(what: str, value: Any) -> None:
        if what == "round" and value == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan, folder, watch=stop)
    path = folder / "state" / "1.safetensors"
    whole = path.read_bytes()
    if hurt:
        path.write_bytes(hurt(whole))
    else:
        path.unlink()
    for _ in range(2):
        with pytest.raises(Damaged, match=rf"^the server's state after round 1, {path}, {said}.*: put that file back"):
            run(plan, folder, resume=True)
    path.write_bytes(whole)
    assert same(run(plan, folder, resume=True), run(plan, tmp_path / "whole"))


def test_a_round_that_says_something_else_stops(tmp_path: Path) -> None:
    def kill(event: str) -> None:
        if event == "closed 1.0":
            raise Killed(event)

    with pytest.raises(Killed):
        run(study(averaging()), tmp_path / "a", commit_seconds=0.0, event=kill)
    db = sqlite3.connect(tmp_path / "a" / "journal.sqlite")
    db.execute("UPDATE turns SET asked = 'something else'")
    db.commit()
    db.close()
    with pytest.raises(Diverged, match="round 1, call 0"):
        go(study(averaging()), tmp_path / "a", Watch(), resume=True)


def test_weights_that_a_site_has_go_by_their_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was published after round 1 and scored there is not sent again to be trained on in round 2."""
    monkeypatch.setattr(wire, "BLOB_BYTES", 1000)  # the toy's model is small
    go(toy_study(averaging(), every=1), tmp_path / "a", Watch())
    db = sqlite3.connect(tmp_path / "a" / "journal.sqlite")
    down = {(r, q): b for r, q, b in db.execute("SELECT round, question, bytes_down FROM turns WHERE site = 'cairo'")}
    db.close()
    model = sum(leaf.nbytes for leaf in schema_of(toy_study(averaging()).terms.model).values())
    assert down[1, "learn"] > model
    assert down[1, "evaluate"] > model
    assert down[2, "learn"] == down[1, "learn"] - model + 32
