"""How one optimiser step is taken, everywhere in a study: optimiser, rate, precision, accumulation, clipping."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedscan.schema import Kind, Leaf, Schema, Weights

Moments = Literal["reset", "kept", "averaged", "travels"]


@dataclass(frozen=True)
class Step:
    """The study's one policy for local training. Every method trains by it.

    optimiser   "sgd", "adam" or "adamw"
    lr          learning rate of round 1
    schedule    "constant", "cosine" or "poly" (power 0.9), over the rounds of the study
    epochs      local epochs per round;  batch: cases per batch
    precision   "float32" or "bfloat16" (autocast: weights stay float32)
    compile     whether the network is compiled (torch.compile, in place, so that names of leaves stay)
    accumulate  batches whose gradients are averaged before a step
    clip        largest global norm of the gradients, None for no limit
    moments     what becomes of the optimiser's moments after a round: "reset", "kept" at the site, "averaged" at the
                server, or "travels" with the model (ring methods)
    """

    optimiser: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "poly"] = "constant"
    epochs: int = 1
    batch: int = 4
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    accumulate: int = 1
    clip: float | None = None
    moments: Moments = "reset"

    def rate(self, round: int, rounds: int) -> float:
        """The learning rate of ``round`` (counted from 1) out of ``rounds``."""
        done = max(0, round - 1) / max(1, rounds)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * done))))
        if self.schedule == "poly":
            return self.lr * float((1 - done) ** 0.9)
        return self.lr

    def prepared(self, model: nn.Module) -> nn.Module:
        """The model, compiled in place where the study asks for it."""
        if self.compile:
            model.compile()
        return model

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The precision in which a forward pass is computed."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def optimizer(self, model: nn.Module, lr: float, moments: Weights | None = None) -> torch.optim.Optimizer:
        """A new optimiser over the model's parameters, started from ``moments`` where there are any."""
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer
        if self.optimiser == "sgd":
            optimizer = torch.optim.SGD(params, lr, momentum=self.momentum, weight_decay=self.weight_decay)
        else:
            kind = torch.optim.Adam if self.optimiser == "adam" else torch.optim.AdamW
            optimizer = kind(params, lr, weight_decay=self.weight_decay)
        if moments:
            load_moments(optimizer, model, moments)
        return optimizer

    def take(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        waiting: int,
        correct: Callable[[nn.Module], None] | None,
    ) -> None:
        """One step on the mean of the gradients of ``waiting`` batches, corrected and clipped; then none are left."""
        if waiting > 1:
            torch._foreach_div_([p.grad for p in model.parameters() if p.grad is not None], waiting)
        if correct:
            correct(model)
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def moments_of(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> Weights:
        """The optimiser's memory as leaves named ``<moment>/<parameter>``, copied.

        A parameter that has had no gradient has no moments in torch; it is given those that it would begin with, zeros.
        """
        leaves: dict[str, Tensor] = {}
        for name, p in model.named_parameters():
            for key in self.moment_names if p.requires_grad else ():
                value = optimizer.state.get(p, {}).get(key)
                if value is None:  # steps are counted on the CPU, wherever the parameters are
                    value = torch.zeros(()) if key == "step" else torch.zeros_like(p)
                leaves[f"{key}/{name}"] = value.detach().clone()
        return Weights(leaves, dict.fromkeys(leaves, Kind.STATISTIC))

    @property
    def moment_names(self) -> tuple[str, ...]:
        """What the optimiser remembers of every parameter, as torch names it; nothing for plain SGD."""
        if self.optimiser != "sgd":
            return ("step", "exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if self.momentum else ()

    def moments_schema(self, model: nn.Module) -> Schema:
        """The schema of ``moments_of``, where the study lets the moments travel; else nothing."""
        if self.moments not in ("averaged", "travels"):
            return {}
        return {
            f"{key}/{name}": Leaf(() if key == "step" else tuple(p.shape), torch.float32, Kind.STATISTIC)
            for name, p in model.named_parameters()
            if p.requires_grad
            for key in self.moment_names
        }


def load_moments(optimizer: torch.optim.Optimizer, model: nn.Module, moments: Weights) -> None:
    """Puts leaves made by ``Step.moments_of`` back into an optimiser over the same model."""
    params = dict(model.named_parameters())
    for leaf, value in moments.items():
        key, name = leaf.split("/", 1)
        p = params[name]
        optimizer.state[p][key] = value.clone() if key == "step" else value.to(p.device, copy=True)  # steps stay on CPU
