"""What becomes of normalisation layers that stay at their site, where a site has none of its own yet."""

from collections.abc import Callable

import torch
from torch import nn

from fedscan.method import Message, receive
from fedscan.schema import Kind
from fedscan.site import Site, copy_of

Norm = nn.modules.batchnorm._NormBase


def own_or_measured(layers: tuple[type[nn.Module], ...]) -> Callable[[Site, Message], nn.Module]:
    """What a site predicts with: its own layers of these types or, before it has trained, statistics measured anew.

    They are measured on the site's training images with what was published, and kept, so that the site can predict
    where those images are out of reach. Scales and shifts are then the study's first, 1 and 0.
    """

    def use(site: Site, message: Message) -> nn.Module:
        model = receive(site, message)
        norms = [m for m in model.modules() if isinstance(m, layers) and isinstance(m, Norm) and m.track_running_stats]
        if "own" in site.state or not norms:
            return model
        if site.cases:
            measure(site, model, norms)
            found = copy_of(model).of(Kind.STATISTIC, Kind.COUNTER)
            site.state["measured"] = found.only(found.keys() - message["weights"].keys())
            return model
        if "measured" not in site.state:
            raise ValueError(
                f"{site.name} has not trained, so it has no normalisation layers of its own, and there are no training "
                "images here to measure their statistics on: choose a site that has trained"
            )
        return receive(site, {"weights": {**message["weights"], **site.state["measured"]}})

    return use


@torch.no_grad()
def measure(site: Site, model: nn.Module, norms: list[Norm]) -> None:
    """Sets the running statistics of ``norms`` to their mean over one pass through the site's training images.

    The images come in the study's batches, and labels are not read. Only ``norms`` see the pass as training, so that
    nothing is dropped out; every batch counts the same.
    """
    model.eval()
    usual = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean, instead of one that forgets
            norm.train()
        for batch in site.batches(1):
            with site.step.autocast(site.slots.device):
                site.task.outputs(model, batch)
    finally:
        for norm, momentum in zip(norms, usual, strict=True):
            norm.momentum = momentum
    model.eval()
