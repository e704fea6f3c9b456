"""Terms that a method adds to a site's loss."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedscan.site import Batch, Extra, Outputs


def pull_to(x: Sequence[Tensor], mu: float) -> Extra:
    """mu/2 ||w - x||^2 over the model's parameters; ``x`` in the order of ``model.parameters()``."""

    def pull(model: nn.Module, batch: Batch, out: Outputs) -> Tensor:
        gaps = [(p - q).square().sum() for p, q in zip(model.parameters(), x, strict=True)]
        return mu / 2 * torch.stack(gaps).sum()

    return pull
