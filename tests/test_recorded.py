"""Between a round and the engine: recorded answers are believed only as they were, and a round only as it asked."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedscan import wire
from fedscan.averaging import averaging
from fedscan.engines.local import Local
from fedscan.engines.workers import Workers
from fedscan.memory import Damaged
from fedscan.method import Absent, Message, Method, Sites, State, Tree, answer, just_weights
from fedscan.recorded import Diverged, Letter
from fedscan.run import run
from fedscan.site import Site
from fedscan.spec import Number
from fedscan.study import Turn
from test_resume import PLANS, Killed, gossiping, rows, study
from toy import same


def killed_at(event: str, plan: Any, folder: Path, engine: Any = Local) -> None:
    """Runs until the event of this name, which kills."""

    def kill(seen: str) -> None:
        if seen == event:
            raise Killed(event)

    with pytest.raises(Killed):
        run(plan, folder, commit_seconds=0.0, event=kill, engine=lambda s, f: engine(s, f, event=kill))


def test_a_round_that_asks_fewer_sites_than_it_asked_stops(tmp_path: Path) -> None:
    killed_at("closed 1.0", study(averaging()), tmp_path)
    fewer = study(averaging(pick=lambda names, draw: list(names[:2])))
    with pytest.raises(Diverged, match=r"round 1, call 0 would now be asked of amsterdam, bergen: .* begin a new run"):
        run(fewer, tmp_path, resume=True)


def test_a_round_that_asks_less_often_than_it_asked_stops(tmp_path: Path) -> None:
    killed_at("closed 1.0", study(averaging()), tmp_path)
    mute = Method(just_weights, lambda sites, state: state, averaging().answers)
    with pytest.raises(Diverged, match="round 1, call 0 is not asked any more"):
        run(study(mute), tmp_path, resume=True)


def hurt(path: Path) -> bytes:
    """Flips the last bit of a file, and returns what it held."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    return whole


def test_a_recorded_answer_that_changed_on_disk_is_named(tmp_path: Path) -> None:
    """It was accepted and may have been merged: no other answer will do."""
    folder = tmp_path / "run"
    killed_at("closed 1.0", study(averaging()), folder)
    path = folder / "sites" / "cairo" / "turns" / "1.0" / "answer.safetensors"
    whole = hurt(path)
    said = rf"the answer of cairo in round 1, {path}, cannot be used \(answer.safetensors has changed"
    with pytest.raises(Damaged, match=said):
        run(study(averaging()), folder, resume=True)
    path.write_bytes(whole)
    assert same(run(study(averaging()), folder, resume=True), run(study(averaging()), tmp_path / "whole"))


def test_a_kept_answer_that_nobody_has_recorded_is_computed_again_where_it_is_damaged(tmp_path: Path) -> None:
    """A hospital is not left out because its own disk lost a bit: the turn gives the same bits again."""
    folder = tmp_path / "run"
    killed_at("site turn kept (1, 0)", study(averaging()), folder)
    hurt(folder / "sites" / "amsterdam" / "turns" / "1.0" / "answer.safetensors")
    assert same(run(study(averaging()), folder, resume=True), run(study(averaging()), tmp_path / "whole"))
    assert rows(folder) == rows(tmp_path / "whole")


def counting() -> Method:
    """Counts at each site, then asks something that nobody answers in round 1."""

    @answer("statistics", lambda terms: {"count": Number(whole=True)})
    def count(site: Site, message: Message) -> Tree:
        site.state["count"] = site.state.get("count", 0) + 1
        return {"count": site.state["count"]}

    def round(sites: Sites, state: State) -> State:
        counts = [reply["count"] for reply in sites.ask(count, {}).values()]
        if not state.get("tried"):
            raise Absent(sites.names, "more")
        return {**state, "counts": counts}

    def trying(sites: Sites, state: State) -> State:
        return round(sites, {**state, "tried": getattr(sites, "round", 0) > 1})

    return Method(just_weights, trying, answers=(count,))


def test_a_skipped_round_leaves_no_trace_at_the_sites(tmp_path: Path) -> None:
    state = run(study(counting(), rounds=3, every=0), tmp_path / "run")
    assert state["counts"] == [2, 2, 2]  # rounds 2 and 3; round 1 was skipped after all had counted
    for event in ("answered 1.0.cairo", "state written 1", "past dropped 1"):
        folder = tmp_path / event
        killed_at(event, study(counting(), rounds=3, every=0), folder)
        assert run(study(counting(), rounds=3, every=0), folder, resume=True)["counts"] == [2, 2, 2]


def test_messages_of_answers_that_arrived_are_dropped(tmp_path: Path) -> None:
    plan = study(gossiping(), rounds=6, seconds={"amsterdam": 2.5, "bergen": 1.0, "cairo": 1.7})
    run(plan, tmp_path)
    assert len(list((tmp_path / "asks").iterdir())) == 2  # who has not answered at the end


def test_a_site_that_a_worker_writes_to_is_settled_later(tmp_path: Path) -> None:
    """Settling removes what no settled turn needs, and so would take what a worker has just written."""
    engine = Workers(PLANS["async"](), tmp_path, 1)
    settled: list[str] = []
    for name, disk in engine.disks.items():
        disk.settle = lambda keep, name=name: settled.append(name)  # type: ignore[method-assign, misc]
    try:
        engine._written = {"amsterdam", "bergen"}
        engine._at = {0: Letter(Turn(1, 0, "bergen"), "train_on", {}, wire.pack({}), None)}
        engine.settle(lambda site: [])
        assert settled == ["amsterdam"]
        engine._at.clear()
        engine.settle(lambda site: [])
        assert settled == ["amsterdam", "bergen"]
    finally:
        engine.close()


def test_what_a_killed_run_left_for_its_workers_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "outbox" / "old.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"x")
    Workers(PLANS["fedavg"](), tmp_path, 1).close()
    assert not left.exists()


@pytest.mark.parametrize("plan", ["fedavg", "memory", "async"])
def test_a_run_with_workers_is_killed_for_good_and_goes_on(plan: str, tmp_path: Path) -> None:
    """``kill -9`` of the parent, at events spread over its run; the workers notice and end."""
    expected = run(PLANS[plan](), tmp_path / "whole")

    def go(folder: Path, event: Callable[[str], None], resume: bool = False) -> Any:
        return run(PLANS[plan](), folder, resume=resume, commit_seconds=0.0, event=event,
                   engine=lambda s, f: Workers(s, f, 2))  # fmt: skip

    seen: list[str] = []
    assert same(go(tmp_path / "counted", seen.append), expected)
    for k in sorted({round(i * (len(seen) - 1) / 5) for i in range(6)}):
        folder, child = tmp_path / str(k), os.fork()
        if child == 0:
            left = iter(range(k))
            go(folder, lambda event, left=left: None if next(left, None) is not None else os.kill(os.getpid(), 9))  # type: ignore[misc]
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert same(go(folder, lambda event: None, resume=True), expected), f"killed at {seen[k]}"
        assert rows(folder) == rows(tmp_path / "whole")
        shutil.rmtree(folder)
