"""Updates become few bytes and updates again: the largest entries, or all above a threshold, in 8 or 16 bits.

Only parameters are thinned and rounded, because what is held back of them is sent later (error feedback, Seide et al.,
Interspeech 2014; Stich et al., NeurIPS 2018). A statistic is measured anew each round, so a held-back rest would count
twice: statistics travel whole, and so do counters.

A message is 4 bytes that name the form, a 4-byte checksum of schema and settings, and one zstd frame of

    kept entries per thinned leaf (uint32), scales (float32), values (int8; int16 as two planes of bytes; float32),
    statistics and counters as they are, and the gaps between kept indices, of which a byte of 255 passes over 255
    entries and a byte b below over b entries to one that is kept (random gaps then cost what entropy asks for),

leaves in the order of their names. The receiver knows schema and settings, so no size is read that is not first
checked against them.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from fedscan.schema import Kind, Leaf, Schema, Weights

FORM = b"fsc1"
HEADER = 8  # bytes: the form, and the checksum of schema and settings
CHUNK = 1 << 17  # entries worked on at once, so that scratch is small and stays in a core's cache
SAMPLE = 1 << 14  # entries looked at to guess a threshold
TINY = np.float32(2.0**-126)  # the least scale: below it float32 loses digits

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Values = NDArray[Any]  # int8, int16 or float32
Rng = np.random.Generator | torch.Generator


@dataclass(frozen=True)
class Codec:
    """The settings that site and server share.

    ``fraction`` of each parameter leaf's entries is sent, at least one: max(1, round(fraction * n)); 1.0 sends all of
    them, without indices. With a ``threshold``, only entries of a larger magnitude are sent, at most that fraction of
    them and maybe none. ``bits`` of a value: 8 or 16 (symmetric, one float32 scale for a thinned leaf and for every
    ``block`` entries of a whole one; block 0: one a leaf) or 32 (float32 as it is). ``statistics``: 32 sends them in
    their own dtype, 16 as bfloat16. ValueError for other values.
    """

    fraction: float = 1.0
    bits: int = 8
    block: int = 4096
    statistics: int = 32
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, not {self.fraction}")
        if self.bits not in (8, 16, 32):
            raise ValueError(f"bits must be 8, 16 or 32, not {self.bits}")
        if self.block < 0:
            raise ValueError(f"block must be 0 (one scale a leaf) or more, not {self.block}")
        if self.statistics not in (16, 32):
            raise ValueError(f"statistics must be 16 or 32 bits, not {self.statistics}")
        if self.threshold is not None and not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold must be 0 or more, and finite, not {self.threshold}")

    @torch.no_grad()
    def encode(
        self, update: Weights, residual: Weights | None = None, *, rng: Rng | None = None, out: Weights | None = None
    ) -> tuple[Tensor, Weights]:
        """Code update + residual; return the message (uint8, shape (bytes,)) and what of the parameters it left out.

        The new residual (float32, on the CPU) is (update + residual) - decode(message), so that what was ever sent
        and what is held add up to all updates. A leaf without a residual starts at zero; a residual whose leaf is not
        in this update is kept. Values are rounded to the nearest step, or up or down at random with ``rng`` so that
        the expected value is exact. The inputs stay as they were, unless ``out``, into which the new residual is
        written, is one of them: ``out=residual`` saves memory and time. ValueError for values that are not finite and
        for leaves of ``residual`` or ``out`` that do not fit, before anything is written.
        """
        schema, dice = update.schema, _numpy(rng)
        held = Weights({}) if residual is None else residual
        _check(update, held, out)
        kept = {k: v for k, v in held.items() if k not in update}
        counts: list[int] = []
        scales, values, whole, gaps = [], [], [], []
        for name, leaf in sorted(schema.items()):
            if leaf.kind is not Kind.PARAMETER:
                whole.append(_bytes(update[name].to(self._travels(leaf))))
                continue
            rest = _rest(update[name], held.get(name), None if out is None else out[name])
            kept[name], flat = rest.view(leaf.shape), rest.numpy()
            if self._thin(leaf):
                at = self._chosen(flat, keep := self._keep(leaf))
                q, scale, sent = quantise(flat[at], self.bits, keep, leaf.dtype, dice)
                flat[at] -= sent
                at, q = at[q != 0], q[q != 0]
                counts.append(len(at))
                gaps.append(np.diff(at, prepend=-1) - 1)
                scales.append(scale)
                values.append(q)
                continue
            for part in self._parts(leaf):
                q, scale, sent = quantise(flat[part], self.bits, self._block(leaf), leaf.dtype, dice)
                flat[part] -= sent
                scales.append(scale)
                values.append(q)
        body = [np.array(counts, "<u4"), *scales, *_planes(values, self.bits), *whole, _gaps_to_bytes(gaps)]
        message = bytearray(FORM + self._stamp(schema))
        frame = zstandard.ZstdCompressor(level=1).compressobj(size=sum(piece.nbytes for piece in body))
        for piece in body:
            message += frame.compress(piece.data)
        message += frame.flush()
        return torch.frombuffer(message, dtype=torch.uint8), Weights(kept)

    @torch.no_grad()
    def decode(self, message: Tensor, schema: Schema, *, out: Weights | None = None) -> Weights:
        """The update that ``encode`` coded, whole, in the schema's shapes and dtypes, on the CPU.

        Written into ``out`` where given (contiguous leaves of the schema), else into new tensors. ValueError, before
        anything of a model's size is made, for a message of other leaves or settings, or with any count, index,
        length or value that does not fit them.
        """
        read = _Reader(_unpack(message, self._stamp(schema), self.bound(schema) - HEADER))
        leaves = sorted(schema.items())
        learned = {k: leaf for k, leaf in leaves if leaf.kind is Kind.PARAMETER}
        keep = {k: self._keep(leaf) for k, leaf in learned.items() if self._thin(leaf)}
        count = read.counts(keep)
        scales = read.scales({k: (self._scales(leaf), leaf.dtype) for k, leaf in learned.items()}, self.bits)
        values = read.values({k: (count.get(k, leaf.numel), leaf.dtype) for k, leaf in learned.items()}, self.bits)
        whole = {k: read.leaf(k, leaf, self._travels(leaf)) for k, leaf in leaves if leaf.kind is not Kind.PARAMETER}
        at = read.indices({k: (count[k], schema[k].numel) for k in keep})
        result = {name: _target(name, leaf, out) for name, leaf in schema.items()}
        for name, value in whole.items():
            result[name].copy_(value)
        for name, leaf in learned.items():
            flat, block = result[name].view(-1), self._block(leaf)
            if name in at:
                x = dequantise(values[name], scales[name], keep[name], leaf.dtype)
                flat.scatter_(0, torch.from_numpy(at[name]), x)
                continue
            for part in self._parts(leaf):
                some = scales[name][part.start // block : math.ceil(part.stop / block)]
                flat[part] = dequantise(values[name][part], some, block, leaf.dtype)
        return Weights(result, {k: leaf.kind for k, leaf in schema.items()})

    def bound(self, schema: Schema) -> int:
        """The most bytes of a message before entropy coding: header, counts, scales, values, indices, whole leaves."""
        size = HEADER
        for leaf in schema.values():
            if leaf.kind is not Kind.PARAMETER:
                size += leaf.numel * self._travels(leaf).itemsize
                continue
            keep, thin = self._keep(leaf), self._thin(leaf)
            size += keep * self.bits // 8 + 4 * self._scales(leaf)
            if thin:
                size += 4 + keep + leaf.numel // 255
        return size

    def _thin(self, leaf: Leaf) -> bool:
        """Whether a parameter leaf is sent as some of its entries, with their indices."""
        return self._keep(leaf) < (n := leaf.numel) or (n > 0 and self.threshold is not None)

    def _chosen(self, x: Floats, most: int) -> Ints:
        """The ascending indices of the entries of x (n,) that are sent: the largest, or those above the threshold."""
        if self.threshold is None:
            return largest(x, most)
        at = above(x, self.threshold)
        return at if len(at) <= most else largest(x, most)

    def _keep(self, leaf: Leaf) -> int:
        """How many entries of a parameter leaf are sent; with a threshold, the most that can be."""
        if not leaf.dtype.is_floating_point:
            raise ValueError(f"a parameter of {leaf.dtype} cannot be compressed")
        n = leaf.numel
        return min(n, max(1, round(self.fraction * n)))

    def _scales(self, leaf: Leaf) -> int:
        """How many scales a parameter leaf has."""
        if self.bits == 32:
            return 0
        return 1 if self._thin(leaf) else math.ceil(leaf.numel / self._block(leaf))

    def _block(self, leaf: Leaf) -> int:
        """How many entries of a leaf that is sent whole share a scale."""
        return self.block or max(1, leaf.numel)

    def _parts(self, leaf: Leaf) -> Iterator[slice]:
        """A leaf that is sent whole, cut into runs of whole blocks, of some CHUNK entries each."""
        step = max(1, CHUNK // self._block(leaf)) * self._block(leaf)
        return (slice(i, min(i + step, leaf.numel)) for i in range(0, leaf.numel, step))

    def _travels(self, leaf: Leaf) -> torch.dtype:
        """The dtype in which a leaf that is not a parameter is sent."""
        return torch.bfloat16 if leaf.kind is Kind.STATISTIC and self.statistics == 16 else leaf.dtype

    def _stamp(self, schema: Schema) -> bytes:
        leaves = [(k, leaf.shape, str(leaf.dtype), str(leaf.kind)) for k, leaf in sorted(schema.items())]
        settings = astuple(self) if self.threshold is not None else astuple(self)[:-1]  # else no part of the stamp
        return zlib.crc32(repr((settings, leaves)).encode()).to_bytes(4, "little")


def largest(x: Floats, k: int) -> Ints:
    """The ascending indices of the k largest magnitudes of x (n,), of equal ones the first; zeros never.

    A threshold guessed from every n-th entry gives a few more candidates than k, among which the k are found
    exactly. The same x gives the same indices, always.
    """
    stride = max(1, len(x) // SAMPLE)
    while math.gcd(stride, 210) > 1:  # a stride in step with a kernel's 3 x 3 x 3 would see one of its entries only
        stride -= 1
    sample = np.abs(x[::stride])
    expected = len(sample) * k / len(x)
    rank = k if stride == 1 else math.ceil(expected + 3 * math.sqrt(expected) + 3)
    while True:
        threshold = np.partition(sample, len(sample) - rank)[-rank] if rank < len(sample) else 0.0
        at = _at_least(x, max(np.float32(threshold), np.float32(1e-45)))
        if len(at) >= k or not threshold:
            break
        rank *= 4
    if len(at) <= k:
        return at
    size = np.abs(x[at])
    last = np.partition(size, len(at) - k)[len(at) - k]
    keep = size > last
    keep[np.flatnonzero(size == last)[: k - np.count_nonzero(keep)]] = True
    kept: Ints = at[keep]
    return kept


def above(x: Floats, threshold: float) -> Ints:
    """The ascending indices of all magnitudes of x (n,) above the threshold, taken as float32; zeros never."""
    with np.errstate(over="ignore"):  # above the largest float32 there is nothing
        least = np.nextafter(np.float32(min(threshold, float(np.finfo(np.float32).max))), np.float32(np.inf))
    return _at_least(x, least)


def _at_least(x: Floats, threshold: np.float32) -> Ints:
    """The ascending indices of magnitudes of at least ``threshold``."""
    size, is_large = np.empty(min(CHUNK, len(x)), np.float32), np.empty(min(CHUNK, len(x)), np.bool_)
    found = []
    for start in range(0, len(x), CHUNK):
        part = x[start : start + CHUNK]
        np.abs(part, out=size[: len(part)])
        np.greater_equal(size[: len(part)], threshold, out=is_large[: len(part)])
        found.append(np.flatnonzero(is_large[: len(part)]) + start)
    return np.concatenate(found)


def quantise(
    x: Floats, bits: int, block: int, dtype: torch.dtype = torch.float32, rng: np.random.Generator | None = None
) -> tuple[Values, Floats, Floats]:
    """Round x (n,) to whole steps; return steps (n,), the steps' sizes (one per block entries) and what they stand for.

    A block's step is its largest magnitude over 127 (8 bits) or 32,767 (16), so that no entry is off by more than half
    a step, or by a step if ``rng`` rounds at random. With 32 bits the steps are x itself and have no sizes. ``dtype``
    is that of the leaf: what the steps stand for is rounded to it. ValueError for values that are not finite.
    """
    rows = _rows(x, block)
    most = np.abs(rows).max(axis=1, initial=0.0)
    if not np.isfinite(most).all():
        raise ValueError("update and residual add up to values that are not finite")
    if bits == 32:
        steps: Values = np.clip(x, -_most(dtype), _most(dtype))
        return steps, np.empty(0, np.float32), dequantise(steps, np.empty(0, np.float32), block, dtype).float().numpy()
    top = 2 ** (bits - 1) - 1
    size = (most / np.float32(top)).clip(TINY, _most(dtype) / (top + 1)).astype(np.float32)
    y = rows / size[:, None]
    if rng is None:
        np.rint(y, out=y)
    else:
        y += rng.random(y.shape, np.float32)
        np.floor(y, out=y)
    np.clip(y, -top, top, out=y)
    steps = y.reshape(-1)[: len(x)].astype(f"<i{bits // 8}")
    return steps, size, dequantise(steps, size, block, dtype).float().numpy()


def dequantise(steps: Values, size: Floats, block: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values (n,) in ``dtype`` that steps (n,) of these sizes, one per ``block`` entries, stand for."""
    if steps.dtype == np.float32:
        return torch.from_numpy(steps.copy()).to(dtype)
    x = np.multiply(_rows(steps, block), size[:, None], dtype=np.float32)
    return torch.from_numpy(x.reshape(-1)[: len(steps)]).to(dtype)


def _rows(x: Values, block: int) -> Values:
    """x (n,) as rows of ``block`` entries, the last filled up with zeros; one row if there are fewer."""
    if len(x) <= block:
        return x[None]
    if len(x) % block:
        x = np.concatenate([x, np.zeros(-len(x) % block, x.dtype)])
    return x.reshape(-1, block)


def _most(dtype: torch.dtype) -> float:
    """The largest value that float32 and a leaf of this dtype can both hold."""
    return min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)


def _check(update: Weights, held: Weights, out: Weights | None) -> None:
    """ValueError for values that are not finite, and for residuals or targets that do not fit the parameters."""
    for name, kept in update.schema.items():
        if kept.dtype.is_complex:
            raise ValueError(f"leaf {name!r} is complex, which cannot be compressed")
        _finite(update[name], f"leaf {name!r} of the update")
        if kept.kind is not Kind.PARAMETER:
            continue
        if out is not None:
            _own(name, out, Leaf(kept.shape, torch.float32, kept.kind))
        old = held.get(name)
        if old is None:
            continue
        if old.shape != kept.shape or old.dtype != torch.float32:
            raise ValueError(f"the residual of leaf {name!r} is {list(old.shape)} {old.dtype}, not {list(kept.shape)}")
        _finite(old, f"the residual of leaf {name!r}")


def _finite(leaf: Tensor, what: str) -> None:
    if not (math.isfinite(leaf.sum()) or leaf.isfinite().all()):  # the sum of finite values may overflow
        raise ValueError(f"{what} has values that are not finite")


def _rest(leaf: Tensor, held: Tensor | None, out: Tensor | None) -> Tensor:
    """leaf + held as flat float32 on the CPU, in new memory or in that of ``out``."""
    rest = torch.empty(leaf.shape) if out is None else out
    new = leaf.detach().to("cpu", torch.float32)
    if held is None:
        rest.copy_(new)
    else:
        torch.add(new, held.to("cpu"), out=rest)
    return rest.view(-1)


def _own(name: str, out: Weights, leaf: Leaf) -> Tensor:
    """The caller's tensor for a leaf. ValueError where it cannot hold the leaf."""
    own = out.get(name)
    if own is None or own.shape != leaf.shape or own.dtype != leaf.dtype or not own.is_contiguous() or not own.is_cpu:
        raise ValueError(f"out has no contiguous leaf {name!r} of {list(leaf.shape)} {leaf.dtype} on the CPU")
    return own


def _target(name: str, leaf: Leaf, out: Weights | None) -> Tensor:
    """Zeros for a decoded leaf, in new memory or in the caller's."""
    return torch.zeros(leaf.shape, dtype=leaf.dtype) if out is None else _own(name, out, leaf).zero_()


def _numpy(rng: Rng | None) -> np.random.Generator | None:
    """The generator itself, or for one of torch a NumPy generator seeded by its next draw."""
    if isinstance(rng, torch.Generator):
        return np.random.default_rng(int(torch.randint(2**62, (), generator=rng, device=rng.device)))
    return rng


def _bytes(leaf: Tensor) -> Bytes:
    """A leaf's memory as bytes."""
    bytes_: Bytes = leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return bytes_


def _planes(values: list[Values], bits: int) -> list[Values]:
    """Values ready to be coded: those of 16 bits as all low bytes and then all high bytes, which zstd packs better."""
    if bits != 16:
        return values
    return [np.ascontiguousarray(v.view(np.uint8)[i::2]) for i in (0, 1) for v in values]


def _gaps_to_bytes(gaps: list[Ints]) -> Bytes:
    """One byte below 255 a gap, after a byte of 255 for every 255 entries."""
    gap = np.concatenate([np.empty(0, np.int64), *gaps])
    long, short = np.divmod(gap, 255)
    ends = np.cumsum(long + 1)
    out = np.full(ends[-1] if len(ends) else 0, 255, np.uint8)
    out[ends - 1] = short
    return out


def _unpack(message: Tensor, stamp: bytes, most: int) -> bytes:
    """The body of a message, of at most ``most`` bytes, with its header checked and taken off."""
    if message.dtype != torch.uint8 or message.dim() != 1:
        raise ValueError(f"a message is a row of bytes, not {list(message.shape)} {message.dtype}")
    raw = message.detach().cpu().contiguous().numpy().data
    form, made_for, frame = bytes(raw[:4]), bytes(raw[4:HEADER]), raw[HEADER:]
    if form != FORM:
        raise ValueError("the message is not in this codec's form")
    if made_for != stamp:
        raise ValueError("the message was made for other leaves or with other settings")
    try:
        size = zstandard.get_frame_parameters(frame).content_size
        if size > most:
            raise ValueError(f"the message claims {size} bytes where at most {most} are possible")
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"the message cannot be decompressed: {error}") from error


class _Reader:
    """Reads the parts of a body one after the other, and none beyond its end."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def array(self, dtype: str, n: int) -> Values:
        """The next n numbers of this dtype (a view)."""
        size = n * np.dtype(dtype).itemsize
        if size > len(self._body) - self._at:
            raise ValueError(f"the message ends {size - len(self._body) + self._at} bytes too early")
        found = np.frombuffer(self._body, dtype, n, self._at)
        self._at += size
        return found

    def counts(self, most: dict[str, int]) -> dict[str, int]:
        """How many entries each thinned leaf has."""
        found = {k: int(n) for k, n in zip(most, self.array("<u4", len(most)), strict=True)}
        for name, n in found.items():
            if n > most[name]:
                raise ValueError(f"leaf {name!r} of the message has {n} entries where at most {most[name]} are sent")
        return found

    def scales(self, leaves: dict[str, tuple[int, torch.dtype]], bits: int) -> dict[str, Floats]:
        """The scales of each leaf of (count, dtype), none so large that a value could overflow."""
        counts = [count for count, _ in leaves.values()]
        every, ends = self.array("<f4", sum(counts)), accumulate(counts)
        limits = [_most(dtype) / 2 ** (bits - 1) for _, dtype in leaves.values()]
        most = np.repeat(np.array(limits, np.float32), np.array(counts, np.int64))
        if not np.all((every >= 0) & (every <= most)):
            raise ValueError("the message has a scale that is not a size")
        return {name: every[end - count : end] for name, count, end in zip(leaves, counts, ends, strict=True)}

    def values(self, leaves: dict[str, tuple[int, torch.dtype]], bits: int) -> dict[str, Values]:
        """The values of each leaf of (count, dtype)."""
        total = sum(count for count, _ in leaves.values())
        if bits == 16:
            planes = self.array("u1", 2 * total).reshape(2, total)
            every: Values = np.ascontiguousarray(planes.T).view("<i2").reshape(-1)
        else:
            every = self.array("<i1" if bits == 8 else "<f4", total)
        found, start = {}, 0
        for name, (count, dtype) in leaves.items():
            found[name], start = every[start : start + count], start + count
            if bits == 32 and not np.abs(found[name]).max(initial=0.0) <= _most(dtype):
                raise ValueError(f"leaf {name!r} of the message has values that are not finite")
        return found

    def leaf(self, name: str, leaf: Leaf, dtype: torch.dtype) -> Tensor:
        """A leaf that was sent whole."""
        raw = torch.from_numpy(self.array("u1", leaf.numel * dtype.itemsize).copy())
        found = (raw != 0 if dtype is torch.bool else raw.view(dtype)).to(leaf.dtype).view(leaf.shape)
        if not found.isfinite().all():
            raise ValueError(f"leaf {name!r} of the message has values that are not finite")
        return found

    def indices(self, thin: dict[str, tuple[int, int]]) -> dict[str, Ints]:
        """The indices of each leaf's (count, n) entries, from all that is left of the body."""
        left = self.array("u1", len(self._body) - self._at)
        ends = np.flatnonzero(left < 255)
        total = sum(count for count, _ in thin.values())
        if len(ends) != total or (ends[-1] + 1 if total else 0) != len(left):
            raise ValueError(f"the message does not hold {total} indices")
        passed = np.cumsum(left + (left < 255), dtype=np.int64)[ends]
        found, start, before = {}, 0, 0
        for name, (count, n) in thin.items():
            at = passed[start : start + count] - (before + 1)
            if count and at[-1] >= n:
                raise ValueError(f"an index of leaf {name!r} of the message lies beyond its {n} entries")
            if count:
                before = int(passed[start + count - 1])
            found[name], start = at, start + count
        return found
