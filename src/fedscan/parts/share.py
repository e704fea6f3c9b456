"""Which leaves of a model travel; the rest stay at their site. By kind and by type of layer, never by name."""

from collections.abc import Callable

from torch import nn

from fedscan.schema import Kind, kinds_of, schema_of

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


WORDS = {  # for one leaf, and for several
    Kind.PARAMETER: ("array of weights", "arrays of weights"),
    Kind.STATISTIC: ("running statistic", "running statistics"),
    Kind.COUNTER: ("counter", "counters"),
}


def what_travels(model: nn.Module, share: Share) -> str:
    """What travels and what stays, in one sentence that a hospital can read."""
    kinds, travels, norm, leaves = kinds_of(model), share(model), leaves_of(model, NORMS), schema_of(model)

    def count(names: frozenset[str]) -> str:
        by_kind = {kind: sum(kinds[name] == kind for name in names) for kind in Kind}
        return " and ".join(f"{n} {WORDS[kind][n > 1]}" for kind, n in by_kind.items() if n)

    stays, numbers = frozenset(kinds) - travels, sum(leaves[name].numel for name in travels)
    sent = f"{count(travels)} travel ({numbers:,} numbers)" if travels else "Nothing travels"
    if not stays:
        return f"{sent}, and nothing of the network stays at the sites."
    return f"{sent}; {count(stays)} stay at each site, {len(stays & norm)} of them of normalisation layers."
