"""Terms that a method adds to a site's loss."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedscan.site import Batch, Extra, Outputs


def pull_to(x: Mapping[str, Tensor], mu: float) -> Extra:
    """mu/2 ||w - x||^2 over the model's parameters; ``x`` by their names. KeyError for a parameter that x lacks."""

    def pull(model: nn.Module, batch: Batch, out: Outputs) -> Tensor:
        gaps = [(p - x[name]).square().sum() for name, p in model.named_parameters()]
        return mu / 2 * torch.stack(gaps).sum()

    return pull
