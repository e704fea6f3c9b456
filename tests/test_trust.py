"""What one party may do to another, and is not let: sites, methods and files that are not as they should be."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import toy
from fedscan.averaging import averaging, plain_train
from fedscan.method import Message, Method, Tree, answer, receive
from fedscan.run import run
from fedscan.site import Site

torch.set_num_threads(1)


# -- test cases --------------------------------------------------------------------------------------------------------

PEEKS: tuple[Callable[[Site], Any], ...] = (
    lambda site: site.splits.test.case(0),
    lambda site: len(site.splits.test),
    lambda site: list(site.splits.test.names),
    lambda site: site.splits.test.subjects,
    lambda site: next(site.splits.test.batches(4, site.order, site.augmentation)),
)


@pytest.mark.parametrize("peek", PEEKS)
def test_a_method_that_trains_on_test_cases_is_stopped(peek: Callable[[Site], Any], tmp_path: Path) -> None:
    def train(site: Site, model: nn.Module, message: Message) -> Tree:
        peek(site)
        return plain_train(site, model, message)

    with pytest.raises(RuntimeError, match="asked a site for its test cases"):
        run(toy.study(averaging(train)), tmp_path / "run")


def test_a_method_that_adapts_to_test_cases_when_they_are_scored_is_stopped(tmp_path: Path) -> None:
    def use(site: Site, message: Message) -> nn.Module:
        site.splits.test.case(0)
        return receive(site, message)

    with pytest.raises(RuntimeError, match="asked a site for its test cases"):
        run(toy.study(averaging(use=use)), tmp_path / "run")


# -- questions ---------------------------------------------------------------------------------------------------------


def asking(*names: str) -> Method:
    """A method with questions of these names."""

    def question(name: str) -> Any:
        def reply(site: Site, message: Message) -> Tree:
            return {}

        reply.__name__ = name
        return answer("nothing")(reply)

    return replace(averaging(), answers=tuple(map(question, names)))


@pytest.mark.parametrize(
    ("names", "said"), [(("evaluate",), "named 'evaluate', as that of the study"), (("a", "b", "a"), "named 'a'")]
)
def test_two_questions_of_one_name_are_refused(names: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        toy.study(asking(*names))
