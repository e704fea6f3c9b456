"""Which leaves of a model travel; the rest stay at their site. By kind and by type of layer, never by name."""

from collections.abc import Callable

from torch import nn

from fedscan.schema import Kind, kinds_of

Share = Callable[[nn.Module], frozenset[str]]

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


def everything(model: nn.Module) -> frozenset[str]:
    """All leaves: parameters, running statistics and counters."""
    return frozenset(kinds_of(model))


def parameters(model: nn.Module) -> frozenset[str]:
    """What was learned; running statistics stay at their site (SiloBN)."""
    return frozenset(name for name, kind in kinds_of(model).items() if kind == Kind.PARAMETER)


def without(*layers: type[nn.Module]) -> Share:
    """All leaves but those of these types of layer."""

    def share(model: nn.Module) -> frozenset[str]:
        return everything(model) - leaves_of(model, layers)

    return share


def leaves_of(model: nn.Module, layers: tuple[type[nn.Module], ...]) -> frozenset[str]:
    """The leaves of all layers of the given types, whatever they are called."""
    found = set()
    for prefix, module in model.named_modules():
        if isinstance(module, layers):
            found |= {f"{prefix}.{name}" if prefix else name for name in module.state_dict()}
    return frozenset(found)


def said(model: nn.Module, share: Share) -> str:
    """What travels and what stays, in one sentence that a hospital can read."""
    kinds, travels, norm = kinds_of(model), share(model), leaves_of(model, NORMS)

    def count(names: frozenset[str]) -> str:
        by_kind = {kind: sum(kinds[n] == kind for n in names) for kind in Kind}
        words = [f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in by_kind.items() if n]
        return " and ".join(words) if words else "nothing"

    stays = frozenset(kinds) - travels
    home = f"{count(stays)} ({len(stays & norm)} of them of normalisation layers) stay" if stays else "nothing stays"
    return f"{count(travels)} travel ({len(travels & norm)} of normalisation layers); {home} at each site."
