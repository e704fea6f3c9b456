"""Worker processes give the same bits as one process, and one that dies loses nothing."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedscan.averaging import averaging
from fedscan.cli.common import said
from fedscan.engines import workers
from fedscan.engines.workers import WorkerDied, WorkerFailed, Workers
from fedscan.method import Message, Method, Tree, answer
from fedscan.run import run
from fedscan.site import Site
from fedscan.study import Study
from test_resume import PLANS, rows
from toy import same, study


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_bits(plan: str, number: int, tmp_path: Path) -> None:
    alone = run(PLANS[plan](), tmp_path / "alone")
    shared = run(PLANS[plan](), tmp_path / "shared", engine=lambda s, f: Workers(s, f, number))
    assert same(alone, shared)
    assert rows(tmp_path / "alone") == rows(tmp_path / "shared")


def test_an_answer_for_which_a_tray_is_too_small_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies on its site's disk before the server hears of it; one that has room does not."""

    def kept_early(folder: Path, tray: int) -> list[str]:
        monkeypatch.setattr(workers, "TRAY_BYTES", tray)
        seen: list[str] = []

        def watch(what: str, value: Any) -> None:
            if what == "turn" and value.question == "learn":
                seen.extend(p.name for p in (folder / "sites" / value.turn.site).glob("turns/*/answer.safetensors"))

        shared = run(study(averaging()), folder, engine=lambda s, f: Workers(s, f, 2), watch=watch)
        assert same(shared, run(study(averaging()), tmp_path / f"alone{tray}"))
        return seen

    assert kept_early(tmp_path / "room", 1 << 16) == []
    assert kept_early(tmp_path / "none", 1) != []


def dying(folder: Path) -> Study:
    """FedAvg whose first training in round 2 at cairo kills its process, once."""
    base = averaging()
    mark = folder / "died"

    @answer("weights", lambda terms: base.answers[0].gives(terms).entries)
    def learn(site: Site, message: Message) -> Tree:
        if (site.round, site.name) == (2, "cairo") and not mark.exists():
            mark.write_text("once")
            os.kill(os.getpid(), signal.SIGKILL)
        return base.answers[0](site, message)

    def round(sites, state):  # type: ignore[no-untyped-def]
        return base.round(Renamed(sites, learn), state)

    return study(Method(base.init, round, (learn,)))


class Renamed:
    """Asks another question in place of the method's own."""

    def __init__(self, sites, question) -> None:  # type: ignore[no-untyped-def]
        self._sites, self._question = sites, question

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        return getattr(self._sites, name)

    def ask_each(self, question, messages, **more):  # type: ignore[no-untyped-def]
        return self._sites.ask_each(self._question, messages, **more)


def test_a_worker_that_dies_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    plan = dying(tmp_path)
    with pytest.raises(WorkerDied, match="cairo in round 2"):
        run(plan, folder, engine=lambda s, f: Workers(s, f, 2))
    resumed = run(plan, folder, resume=True, engine=lambda s, f: Workers(s, f, 2))
    assert same(resumed, run(study(averaging()), tmp_path / "whole"))


def test_an_error_at_a_site_is_told_in_one_sentence(tmp_path: Path) -> None:
    plan = study(averaging(train=lambda site, model, message: 1 / 0))  # type: ignore[arg-type,return-value]
    with pytest.raises(RuntimeError, match=r"(amsterdam|bergen), round 1, learn: ZeroDivisionError"):
        run(plan, tmp_path / "run", engine=lambda s, f: Workers(s, f, 2))


def test_what_is_a_sentence_in_one_process_is_one_with_workers(tmp_path: Path) -> None:
    """What the user reads does not depend on the number of processes."""

    def bad(site: Site, model: nn.Module, message: Message) -> Tree:
        raise ValueError("the labels lie: mend them")

    plan = study(averaging(train=bad))
    with pytest.raises(WorkerFailed) as caught:
        run(plan, tmp_path / "run", engine=lambda s, f: Workers(s, f, 2))
    code, sentence = said(caught.value)
    assert code == 2
    assert sentence == "the labels lie: mend them"


def test_a_worker_whose_memory_is_full_says_what_to_lower(tmp_path: Path) -> None:
    def greedy(site: Site, model: nn.Module, message: Message) -> Tree:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(WorkerFailed) as caught:
        run(study(averaging(train=greedy)), tmp_path / "run", engine=lambda s, f: Workers(s, f, 2))
    assert "lower train.batch" in said(caught.value)[1]
