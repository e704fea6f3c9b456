"""What happens at a site: its memory is its own, and a changed memory is told from an unchanged one."""

from pathlib import Path

import pytest
import torch

from fedscan.averaging import averaging
from fedscan.engines.local import Local
from fedscan.method import Message, Method, Tree, answer, just_weights
from fedscan.parts.share import NORMS, without
from fedscan.respond import respond, unchanged
from fedscan.run import run
from fedscan.site import Site
from fedscan.study import Turn
from test_resume import rows
from toy import same, study


def counting(change: str) -> Method:
    """A method whose sites count their answers, in one of several ways."""

    @answer("nothing")
    def count(site: Site, message: Message) -> Tree:
        if change == "list":
            site.state.setdefault("seen", []).append(site.round)
        if change == "tensor":
            site.state["seen"] = site.state.get("seen", torch.zeros(1)) + 1
        if change == "in place":
            site.state.setdefault("seen", torch.zeros(1)).add_(1)
        if change == "nested":
            site.state.setdefault("a", {}).setdefault("b", {})["n"] = site.round
        return {"n": len(site.state.get("seen", [])) if change == "list" else float(site.state.get("seen", 0))}

    def round(sites, state):  # type: ignore[no-untyped-def]
        replies = sites.ask(count, {})
        return {**state, "n": sum(replies[name]["n"] for name in replies)}

    return Method(just_weights, round, (count,))


@pytest.mark.parametrize("change", ["list", "tensor", "nested"])
def test_memory_changed_anyhow_is_kept(change: str, tmp_path: Path) -> None:
    live = run(study(counting(change), rounds=3), tmp_path / "live")
    strict = run(study(counting(change), rounds=3), tmp_path / "strict", engine=lambda s, f: Local(s, f, strict=True))
    assert same(live, strict)
    assert live["n"] == {"list": 9, "tensor": 9.0, "nested": 0}[change]


def test_a_tensor_of_the_memory_is_not_written_to(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"count changed a tensor of its memory in place"):
        run(study(counting("in place"), rounds=2), tmp_path / "run")


def test_a_question_that_only_reads_leaves_the_memory_as_it_was(tmp_path: Path) -> None:
    plan = study(averaging(share=without(*NORMS)), every=1)
    run(plan, tmp_path / "run")
    slots, state = plan.slots(), {}
    _, state, _ = respond(plan, slots, Turn(1, 0, "cairo"), "learn", plan.start(), state, bytes)
    message = {"weights": plan.start()["weights"], "split": "validation"}
    _, after, _ = respond(plan, slots, Turn(1, 1, "cairo"), "evaluate", message, state, bytes)
    assert unchanged(after, state)
    assert sorted(p.name for p in (tmp_path / "run" / "sites" / "cairo" / "turns").iterdir()) == ["2.0"]
    assert rows(tmp_path / "run")
