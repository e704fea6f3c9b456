"""Every method on a GPU: messages and memories lie on the processor, networks and cases on the device."""

from functools import partial

import pytest
import torch

import contract
import segmentation_toy
from fedscan.methods.registry import get, methods
from fedscan.site import Splits
from fedscan.step import Step
from toy import Tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: nothing of this was tested")
PLAIN = Step(lr=0.1, batch=2)
ADAM = Step("adam", 0.01, batch=2, moments="travels", precision="bfloat16")


def on_device(name: str) -> Splits:
    """The toy's cases, on the GPU."""
    found = segmentation_toy.data(name)
    return Splits(*(Tensors(s.x.cuda(), s.y.cuda(), s.names[0].rsplit("-", 1)[0]) for s in found))  # type: ignore[attr-defined]


@pytest.mark.parametrize("step", [PLAIN, ADAM], ids=["plain", "adam, bfloat16"])
@pytest.mark.parametrize("name", list(methods()))
def test_trains_on_a_gpu(name: str, step: Step) -> None:
    bench = partial(segmentation_toy.study, norm="batch", data=on_device, device="cuda")
    contract.check_moments(get(name), bench, step)


@pytest.mark.parametrize("name", list(methods()))
def test_learns_on_a_gpu(name: str) -> None:
    contract.check_learns(get(name), partial(segmentation_toy.study, norm="batch", data=on_device, device="cuda"))
