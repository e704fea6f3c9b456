"""Replies are folded one by one from disk: the same bits as in memory, in the memory of a few."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import toy
from fedscan import recorded
from fedscan.averaging import averaging
from fedscan.method import Method, Replies, Sites, State
from fedscan.parts.channel import sparse
from fedscan.run import run
from fedscan.step import Step

torch.set_num_threads(1)


def noting(method: Method, seen: list[Replies]) -> Method:
    """The method, with its replies noted as it gets them."""

    def round(sites: Sites, state: State) -> State:
        class Spy:
            def __getattr__(self, name: str) -> Any:
                return getattr(sites, name)

            def ask_each(self, question: Any, messages: Any, **how: Any) -> Replies:
                seen.append(sites.ask_each(question, messages, **how))
                return seen[-1]

        return method.round(Spy(), state)

    return Method(method.init, round, method.answers, method.use)


METHODS: dict[str, Callable[[], Method]] = {
    "fedavg": averaging,
    "coded": lambda: averaging(channel=sparse(0.25, 8)),
    "moments": averaging,
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("commit_bytes", [1, 4_000])
def test_streamed_answers_give_the_same_bits(
    name: str, commit_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One commit for each answer, and one for every few; a coded answer has some 1,000 bytes."""
    names = tuple(f"site{i}" for i in range(7))
    step = Step(lr=0.1, batch=80, momentum=0.9, moments="averaged") if name == "moments" else Step(lr=0.1, batch=80)
    how: dict[str, Any] = {"names": names, "step": step}
    seen: list[Replies] = []
    resident = toy.play(noting(METHODS[name](), seen), tmp_path / "resident", **how)
    assert [r.resident for r in seen] == [True, True]
    monkeypatch.setattr(recorded, "COMMIT_BYTES", commit_bytes)
    streamed: list[Replies] = []
    assert toy.same(toy.play(noting(METHODS[name](), streamed), tmp_path / "streamed", **how), resident)
    assert [r.resident for r in streamed] == [False, False]


def test_every_answer_over_the_limit_goes_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only those before the first commit: nothing that is past the limit is held in memory."""
    monkeypatch.setattr(recorded, "COMMIT_BYTES", 1)
    held: list[int] = []
    accept = recorded.Recorded._accept

    def noted(self: Any, *args: Any) -> bool:
        done = accept(self, *args)
        held.append(len(self._pending))
        return done

    monkeypatch.setattr(recorded.Recorded, "_accept", noted)
    toy.play(averaging(), tmp_path, names=tuple(f"site{i}" for i in range(6)), rounds=1)
    assert held[:6] == [1] * 6


def test_a_reply_on_disk_is_mapped_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "COMMIT_BYTES", 1)
    seen: list[Replies] = []

    def round(sites: Sites, state: State) -> State:
        replies = sites.ask(base.answers[0], {"weights": state["weights"]})
        seen.append(replies)
        first, second = replies["bergen"], replies["bergen"]
        assert toy.same(first, second)
        assert first["update"]["head.bias"].data_ptr() != second["update"]["head.bias"].data_ptr()
        return state

    base = averaging()
    run(toy.study(Method(base.init, round, base.answers, base.use), rounds=1), tmp_path)
    assert not seen[0].resident


SCRIPT = """
import gc, sys
from dataclasses import replace
from pathlib import Path
import torch
from torch import nn
import toy
from fedscan import recorded
from fedscan.averaging import averaging
from fedscan.run import run

torch.set_num_threads(1)

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(512, 512, bias=False) for _ in range(4)])  # 4 MiB

class WideToy(toy.Toy):
    def __init__(self):
        self.networks = {"model": Wide}

def train(site, model, message):
    for p in model.parameters():
        p.data += 0.001 * site.cases
    return {"loss": 0.0}

def peak():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])  # KiB

if len(sys.argv) > 3:
    recorded.COMMIT_BYTES = int(sys.argv[3])
names = tuple(f"site{i:02}" for i in range(int(sys.argv[1])))
plan = replace(toy.study(averaging(train), names, rounds=2), task=WideToy())
for name in names:
    plan.splits(name)
before = peak()
gc.collect()
gc.disable()  # nothing large may wait for the collector of cycles
plan.__dict__["evaluate"] = replace(plan.evaluate, reply=lambda site, message: {"rows": []})
state = run(plan, Path(sys.argv[2]))
print(before, peak(), sum(float(v.double().sum()) for v in state["weights"].values()))
"""


def peaks(sites: int, folder: Path, *more: str) -> tuple[int, int]:
    """Peak memory of a process in KiB, before and after two rounds with a model of 4 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(sites), str(folder), *more],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after, _ = done.stdout.split()
    return int(before), int(after)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_is_flat_from_4_to_64_sites(tmp_path: Path) -> None:
    _, few = peaks(4, tmp_path / "few")
    _, many = peaks(64, tmp_path / "many")
    assert many < 1.2 * few, f"{few} KiB with 4 sites, {many} KiB with 64"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_what_a_run_adds_is_bounded_by_the_commit_not_by_the_sites(tmp_path: Path) -> None:
    """With 8 MiB between commits, 64 answers of 4 MiB (256 MiB in all) add what a few add."""
    before, after = peaks(64, tmp_path, str(8 << 20))
    assert after - before < 100 << 10, f"{before} KiB before the run, {after} KiB after"
