"""FedSegNet's adaptive weights: how much a site counts, from how well it segments, how far it moved and what it has.

The paper names the inputs (validation Dice and HD95, divergence, volume and diversity of the data) and gives no
formula. This one has a switch for every input; with all of them off it is the number of cases, to the bit.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from fedscan import trees
from fedscan.parts.weigh import Updates, Weigh, last_shares
from fedscan.schema import Weights

Shares = dict[str, float]
NOTHING = 1e-300  # below it 1 / x may overflow


def adaptive(
    *,
    a: float = 0.5,
    h: float = 10.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 0.5,
    c: float = 1.0,
    cosine: bool = False,
    w_min: float = 0.02,
    w_max: float = 0.6,
    ema: float = 0.5,
) -> Weigh:
    """s_k = n_k^c (q_k / mean q)^alpha exp(-beta max(0, d_k - 1)) (1 + gamma h_k), then w_k within bounds.

    FedSegNet, Fareed et al., 2025, eqs 4 and 17 in words; the formula is ours.

    q_k  a DSC_k + (1-a) exp(-HD95_k / h), of the local model on local validation cases; h in mm
    d_k  ||Delta_k|| / median_j ||Delta_j|| over parameters; ``cosine`` adds 1 - cos(Delta_k, sum of the others')
    h_k  evenness of the foreground classes at the site, 0 to 1
    ema  how much of a site's last share is kept, as it was against the sites of this round; bounds hold after it, too

    Raises ValueError where the least share lies above the largest.
    """
    if w_min > w_max:
        raise ValueError(f"w_min = {w_min:g} lies above w_max = {w_max:g}: no share can be within them")

    def weigh(updates: Updates, state: Mapping[str, Any]) -> Shares:
        numbers = {name: dict(updates[name]) for name in updates}  # as they came: nothing is decoded by this
        shares = {name: float(n["cases"]) ** c for name, n in numbers.items()}
        if alpha:
            q = relative(qualities(numbers, a, h))
            shares = {name: s * q[name] ** alpha for name, s in shares.items()}
        if beta:
            d = divergences(updates, cosine)
            shares = {name: s * math.exp(-beta * max(0.0, d[name] - 1)) for name, s in shares.items()}
        if gamma:
            shares = {name: s * (1 + gamma * numbers[name]["diversity"]) for name, s in shares.items()}
        return smoothed(shares, state, ema, w_min, w_max)

    return weigh


def qualities(numbers: Mapping[str, Mapping[str, Any]], a: float, h: float) -> Shares:
    """q_k of every site. One without a valid Dice takes the mean of the others; no distance counts as infinite."""

    def quality(n: Mapping[str, Any]) -> float:
        near = 0.0 if n["hd95"] is None else math.exp(-n["hd95"] / h)
        return float(a * n["dice"] + (1 - a) * near)

    known = {name: quality(n) for name, n in numbers.items() if n["dice"] is not None}
    usual = fmean(known.values()) if known else 1.0
    return {name: known.get(name, usual) for name in numbers}


def relative(q: Shares) -> Shares:
    """Each value over their mean; 1 for all where all are 0."""
    mean = fmean(q.values())
    return {name: value / mean if mean else 1.0 for name, value in q.items()}


def divergences(updates: Updates, cosine: bool = False) -> Shares:
    """d_k of every site, from the updates as the server decoded them, one at a time; 1 for all where none moved."""
    lengths = {name: trees.norm(updates[name]["update"]) for name in updates}
    middle = median(lengths.values())
    d = {name: length / middle if middle else 1.0 for name, length in lengths.items()}
    if not cosine or len(d) < 2:
        return d
    total: Weights | None = None
    for name in updates:
        total = updates[name]["update"] if total is None else trees.add(total, updates[name]["update"])
    assert total is not None
    for name in updates:
        own = updates[name]["update"]
        others = trees.sub(total, own)
        lengths_product = trees.norm(own) * trees.norm(others)
        d[name] += 1 - trees.dot(own, others) / lengths_product if lengths_product else 0.0
    return d


def smoothed(shares: Shares, state: Mapping[str, Any], ema: float, low: float, high: float) -> Shares:
    """Shares within bounds, mixed with the sites' last ones; as they are where neither is asked for."""
    if not ema and low <= 0 and high >= 1:
        return shares
    shares = bounded(shares, low, high)
    last = last_shares(state, shares)
    mixed = {name: ema * last.get(name, s) + (1 - ema) * s for name, s in shares.items()}
    return bounded(mixed, low, high)


def bounded(shares: Shares, low: float, high: float) -> Shares:
    """Shares that sum to 1 and lie within ``low`` and ``high``: clip(x s_k, low, high) with the one x that does it.

    Clipping and then dividing by the sum would break the bounds again. The sum rises with x in straight pieces, so x
    is found between two corners. Bounds that no shares can meet are widened to 1/m, for m sites.
    """
    low, high = min(low, 1 / len(shares)), max(high, 1 / len(shares))
    top = max(shares.values())
    least = 1e-9 * top
    s = [max(value, least) if least > NOTHING else 1.0 for value in shares.values()]
    corners = sorted({bound / value for value in s for bound in (low, high)})
    right = next((x for x in corners if sum(clipped(s, x, low, high)) >= 1), corners[-1])
    left = max((x for x in corners if x < right), default=0.0)
    below, above = sum(clipped(s, left, low, high)), sum(clipped(s, right, low, high))
    x = right if above <= below else left + (right - left) * min(1.0, (1 - below) / (above - below))
    return dict(zip(shares, clipped(s, x, low, high), strict=True))


def clipped(s: Sequence[float], x: float, low: float, high: float) -> list[float]:
    """Each share times ``x``, held between the bounds."""
    return [min(max(x * value, low), high) for value in s]


__all__ = ["adaptive", "bounded", "divergences", "qualities"]
