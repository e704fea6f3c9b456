"""Arithmetic on weights: every function works leaf by leaf, decides by kind, and leaves its inputs as they were.

Parameters and statistics are quantities: they are added, scaled and averaged. Counters are not: a change of a counter
is added whole, whatever the scale, and the mean or median of counters is their maximum.

A weighted mean is computed in one way only, as the running mean over the trees in the order given,

    m_0 = x_0,    m_k = m_{k-1} + (s_k / (s_0 + ... + s_k)) (x_k - m_{k-1}),

entry by entry in float32 (float64 leaves in float64), rounded to the leaf's own dtype at the end. It needs no total
in advance; equal trees give exactly themselves, whatever their shares; and since each entry is computed alone, a
stream of leaves (`Fold`) and trees that are all there (`mean`) give the same bits with any block size and any
number of threads.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fedscan.heap import give_back
from fedscan.schema import Kind, Leaf, Schema, Weights

SMALL = 1 << 15  # entries: smaller leaves are folded many in one call
BLOCK = 1 << 20  # entries: one block of a running mean, 4 MiB, stays in the caches while all trees pass
CHUNK = 1 << 14  # entries: below the size from which torch splits a sum over threads, which would change its bits


@torch.no_grad()
def copy(a: Weights) -> Weights:
    """A copy of every leaf, on the leaf's own device."""
    return Weights({k: v.clone() for k, v in a.items()}, a.kinds)


@torch.no_grad()
def zeros(a: Weights) -> Weights:
    """Zeros of the shape, dtype and kind of every leaf."""
    return Weights({k: torch.zeros_like(v) for k, v in a.items()}, a.kinds)


@torch.no_grad()
def sub(a: Weights, b: Weights) -> Weights:
    """The change a - b on the names that b holds, counters too, in a's dtypes and on a's devices.

    ValueError where a lacks a name.
    """
    _shapes(b, a)
    return Weights({k: (a[k] - v.to(a[k].device)).to(a[k].dtype) for k, v in b.items()}, a.kinds)


@torch.no_grad()
def add(a: Weights, b: Weights, scale: float = 1.0) -> Weights:
    """a + scale * b, in a's dtypes and on a's devices; a counter moves by the whole of b.

    A name that b lacks is copied from a. ValueError where b holds a name or a shape that a does not.
    """
    _shapes(b, a)

    def leaf(name: str, x: Tensor) -> Tensor:
        if name not in b:
            return x.clone()
        y = b[name].to(x.device)
        return (x + y if a.kinds[name] is Kind.COUNTER else torch.add(x, y, alpha=scale)).to(x.dtype)

    return Weights({k: leaf(k, v) for k, v in a.items()}, a.kinds)


@torch.no_grad()
def scale(a: Weights, factor: float) -> Weights:
    """factor * a; counters are copied as they are."""
    return Weights({k: v.clone() if a.kinds[k] is Kind.COUNTER else v * factor for k, v in a.items()}, a.kinds)


@torch.no_grad()
def dot(a: Weights, b: Weights) -> float:
    """The inner product over the parameters of a; the same bits for any number of threads.

    Sums of float32 products over 16,384 entries are added in float64: summed whole, 30 million entries of float32
    would be off by a thousandth. ValueError where b lacks a name or a shape differs.
    """
    a = a.of(Kind.PARAMETER)
    _shapes(a, b)
    parts = [(x * y.to(x)).sum() for k, v in a.items() for x, y in zip(_chunks(v), _chunks(b[k]), strict=True)]
    return math.fsum(torch.stack(parts).double().tolist()) if parts else 0.0


@torch.no_grad()
def norm(a: Weights) -> float:
    """The Euclidean norm over the parameters; the same bits for any number of threads."""
    parts = [x for k, v in a.items() if a.kinds[k] is Kind.PARAMETER for x in _chunks(v)]
    return math.hypot(*torch.stack(torch._foreach_norm(parts)).tolist()) if parts else 0.0


class Fold:
    """Takes trees of one schema one at a time, or leaf by leaf, and holds only their running mean.

    The mean is that of the module's docstring, so it depends on the order of the trees, not of their leaves. After a
    failed ``add`` the running mean is neither with nor without that tree, so ``result`` refuses. ValueError where the
    schema calls whole numbers anything but counters.
    """

    def __init__(self, schema: Schema) -> None:
        for name, leaf in schema.items():
            if leaf.kind is not Kind.COUNTER and not (leaf.dtype.is_floating_point or leaf.dtype.is_complex):
                raise ValueError(f"leaf {name!r} is a {leaf.kind} of {leaf.dtype}: only counters are whole numbers")
        self._schema = schema
        self._large = {k for k, leaf in schema.items() if leaf.numel >= SMALL}
        self._total = 0.0
        self._mean: dict[str, Tensor] = {}
        self._broken = False

    @torch.no_grad()
    def add(self, leaves: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], share: float) -> None:
        """Fold in one tree, whole or as a stream of (name, leaf) in any order, with its share (such as its cases).

        What lies in a file is held in memory a leaf at a time.

        ValueError for a share that is negative or not finite, and for leaves that do not fit the schema.
        """
        weight = _weights([share], self._total)[0]
        self._broken = True
        left = dict(self._schema)
        means: list[Tensor] = []
        news: list[Tensor] = []
        for name, leaf in leaves.items() if isinstance(leaves, Mapping) else leaves:
            kept = left.pop(name, None)
            if kept is None:
                raise ValueError(f"leaf {name!r} " + ("came twice" if name in self._schema else "is not in the schema"))
            if leaf.shape != kept.shape or leaf.dtype != kept.dtype:
                raise ValueError(_misfit(name, leaf, kept))
            mean = self._mean.get(name)
            if mean is None:
                self._mean[name] = _start(leaf)
                give_back([leaf])
            elif kept.kind is Kind.COUNTER:
                torch.maximum(mean, leaf.to(mean.device), out=mean)
            elif name in self._large:
                _pull(mean.view(-1), leaf.reshape(-1), weight)
                give_back([leaf])
            else:  # small leaves wait for each other and go in one call
                means.append(mean)
                ready = leaf.dtype == mean.dtype and leaf.device == mean.device  # asking is faster than converting
                news.append(leaf.contiguous() if ready else leaf.contiguous().to(mean))
        if left:
            raise ValueError(f"{len(left)} leaves are missing, the first is {min(left)!r}")
        if means:
            torch._foreach_lerp_(means, news, weight)
        self._total += share
        self._broken = False

    def result(self) -> Weights:
        """The mean, in the schema's dtypes; hands its memory over and leaves the fold empty.

        ValueError where nothing was folded, where all shares were zero, and after an ``add`` that failed.
        """
        if self._broken:
            raise ValueError("a tree was folded in half: this mean cannot be used")
        if not 0 < self._total < math.inf:
            raise ValueError(f"a mean needs shares of a total above zero and finite, not {self._total}")
        mean, self._mean, self._total = self._mean, {}, 0.0
        return Weights(
            {k: mean[k].to(leaf.dtype) for k, leaf in self._schema.items()},
            {k: leaf.kind for k, leaf in self._schema.items()},
        )


@torch.no_grad()
def mean(trees: Sequence[Weights], shares: Sequence[float]) -> Weights:
    """The weighted mean of trees that are all there, by shares of any total: the bits of `Fold`, memory read once.

    ValueError for no tree, for shares that are negative, not finite, all zero or of another number than the trees,
    and for trees of different leaves.
    """
    schema = _same_names(trees)
    if len(shares) != len(trees):
        raise ValueError(f"{len(trees)} trees came with {len(shares)} shares")
    weights = _weights(shares)
    large = [k for k, leaf in schema.items() if leaf.numel >= SMALL and leaf.kind is not Kind.COUNTER]
    small = {k: leaf for k, leaf in schema.items() if k not in large} if large else schema
    fold = Fold(small)
    for tree, share in zip(trees, shares, strict=True):
        fold.add([(k, tree[k]) for k in small] if large else tree, share)
    means = fold.result()
    for name in large:
        means[name] = _mean_in_blocks(_same_leaf(trees, name, schema[name]), weights, schema[name])
    return Weights({k: means[k] for k in schema}, trees[0].kinds) if large else means


@torch.no_grad()
def median(trees: Sequence[Weights]) -> Weights:
    """The median of every entry, in the leaf's dtype; of an even number of trees, the mean of the middle two.

    Statistics are treated as parameters: a median of variances is never negative and no single site can move it far.
    Counters take the maximum. A NaN in any tree gives NaN. ValueError for no tree and for different leaves.
    """
    schema = _same_names(trees)

    def leaf(name: str, kept: Leaf) -> Tensor:
        leaves = _same_leaf(trees, name, kept)
        if kept.kind is Kind.COUNTER:
            return torch.stack([v.to(leaves[0].device) for v in leaves]).amax(0)
        out = torch.empty(kept.shape, dtype=kept.dtype, device=leaves[0].device)
        for to, *rows in _rows([out, *leaves], CHUNK):
            to.copy_(_middle([r.to(to.device, _wide(kept.dtype)) for r in rows]))
        return out

    return Weights({k: leaf(k, kept) for k, kept in schema.items()}, trees[0].kinds)


def _middle(rows: list[Tensor]) -> Tensor:
    """The median over rows (n,) by odd-even transposition sort: the fastest for a few dozen rows, and NaN spreads."""
    rows = list(rows)
    for turn in range(len(rows)):
        for i in range(turn % 2, len(rows) - 1, 2):
            rows[i], rows[i + 1] = torch.minimum(rows[i], rows[i + 1]), torch.maximum(rows[i], rows[i + 1])
    low, high = rows[(len(rows) - 1) // 2], rows[len(rows) // 2]
    return low if low is high else (low + high) / 2


def _weights(shares: Sequence[float], total: float = 0.0) -> list[float]:
    """How far each tree pulls the running mean: its share of the shares so far."""
    for share in shares:
        if not (math.isfinite(share) and share >= 0):
            raise ValueError(f"a share must be finite and not negative, not {share}")
    totals = list(accumulate(shares, initial=total))[1:]
    return [share / total if total else 0.0 for share, total in zip(shares, totals, strict=True)]


def _start(leaf: Tensor) -> Tensor:
    """The running mean after the first tree: a contiguous copy in the dtype of the sum."""
    return leaf.to(_wide(leaf.dtype)).clone(memory_format=torch.contiguous_format)


def _pull(mean: Tensor, leaf: Tensor, weight: float) -> None:
    """mean + weight * (leaf - mean), in place; both flat. A leaf of another dtype is widened block by block."""
    if leaf.dtype == mean.dtype and leaf.device == mean.device:
        mean.lerp_(leaf, weight)
        return
    for to, new in _rows([mean, leaf], BLOCK):
        to.lerp_(new.to(to), weight)


def _mean_in_blocks(leaves: list[Tensor], weights: Sequence[float], kept: Leaf) -> Tensor:
    """The running mean of large leaves, a block at a time, so that the mean never leaves the cache."""
    out = torch.empty(kept.shape, dtype=kept.dtype, device=leaves[0].device)
    wide = _wide(kept.dtype)
    for to, first, *others in _rows([out, *leaves], BLOCK):
        mean = to if wide == kept.dtype else to.to(wide)
        mean.copy_(first)
        for new, weight in zip(others, weights[1:], strict=True):
            mean.lerp_(new.to(mean), weight)
        if mean is not to:
            to.copy_(mean)
    return out


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype a leaf is summed in: at least float32."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def _chunks(leaf: Tensor) -> tuple[Tensor, ...]:
    """The leaf, at least float32, as flat pieces that one thread sums."""
    return torch.split(leaf.reshape(-1).to(_wide(leaf.dtype)), CHUNK)


def _rows(leaves: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, ...]]:
    """The same ``size`` entries of every leaf, piece after piece; views where the leaves are contiguous."""
    return zip(*(torch.split(v.reshape(-1), size) for v in leaves), strict=True)


def _misfit(name: str, leaf: Tensor, kept: Leaf) -> str:
    has, wants = f"{list(leaf.shape)} {leaf.dtype}", f"{list(kept.shape)} {kept.dtype}"
    return f"leaf {name!r} is {has} where {wants} is expected"


def _same_names(trees: Sequence[Weights]) -> Schema:
    """The schema of the first tree. ValueError where there is none, or another tree has other names."""
    if not trees:
        raise ValueError("there is no tree to average")
    for i, tree in enumerate(trees):
        if tree.keys() != trees[0].keys():
            raise ValueError(f"tree {i} has other leaves than tree 0, such as {min(tree.keys() ^ trees[0].keys())!r}")
    return trees[0].schema


def _same_leaf(trees: Sequence[Weights], name: str, kept: Leaf) -> list[Tensor]:
    """One leaf of every tree. ValueError where a shape or dtype differs."""
    for i, tree in enumerate(trees):
        if tree[name].shape != kept.shape or tree[name].dtype != kept.dtype:
            raise ValueError(f"tree {i}: " + _misfit(name, tree[name], kept))
    return [tree[name] for tree in trees]


def _shapes(small: Weights, large: Weights) -> None:
    """ValueError unless ``large`` has every name and shape of ``small``."""
    for name, leaf in small.items():
        if name not in large:
            raise ValueError(f"leaf {name!r} is missing in the other tree")
        if large[name].shape != leaf.shape:
            raise ValueError(f"leaf {name!r} is {list(leaf.shape)} in one tree, {list(large[name].shape)} in the other")
