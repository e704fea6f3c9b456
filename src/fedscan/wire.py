"""A message as bytes, and back. The bytes are a safetensors file: a JSON header, then the leaves, one after another.

A message is a tree of mappings whose ends are weights, tensors, numbers, text, truth values, None, or lists of those.
No class and no code is on the wire: what arrives is parsed as JSON and as arrays whose every size is checked against
the bytes that are really there, before anything is allocated.
"""

import hashlib
import json
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fedscan.heap import note_mapped
from fedscan.schema import Kind, Weights
from fedscan.spec import Refused, Room, Spec, room

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LETTERS = {"p": Kind.PARAMETER, "s": Kind.STATISTIC, "c": Kind.COUNTER}
LETTER_OF = {kind: letter for letter, kind in LETTERS.items()}
Buffer = np.ndarray[Any, np.dtype[np.uint8]]
# Of a header: entries, and bytes. An entry of two or three bytes takes up to 80 once it is built.
UNTOLD = Room(1 << 19, 12 << 20)  # where no spec tells: 75,000 rows of scores, or 45,000 leaves
MOST = Room(1 << 21, 48 << 20)  # whatever a spec tells
DEPTH_LIMIT = 32
PIECE = 1 << 20  # bytes of a header that are looked through at a time
BLOB_BYTES = 4096  # weights and tensors of at least this size go by their hash to a site that has them
WHOLE = range(-(2**63), 2**64)  # the whole numbers that travel: those of 64 bits


@dataclass(frozen=True)
class Parcel:
    """A message made ready: its header, and its leaves, which are not copied until they are written."""

    header: bytes
    leaves: tuple[Tensor, ...]
    runs: tuple[tuple[int, int], ...] = ()  # which leaves are one Weights, or a tensor by itself

    @cached_property
    def blobs(self) -> dict[str, int]:
        """SHA-256 and bytes of each Weights or tensor that is large enough to go by its hash to who has it."""
        found = {}
        for begin, end in self.runs:
            part = Parcel(b"", self.leaves[begin:end])
            if part.nbytes >= BLOB_BYTES:
                found[part.digest] = part.nbytes
        return found

    @cached_property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return len(self.header) + sum(t.numel() * t.element_size() for t in self.leaves)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes on the wire, in hexadecimal."""
        sha = hashlib.sha256()
        for chunk in self.chunks():
            sha.update(chunk)
        return sha.hexdigest()

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The bytes on the wire, piece by piece; a leaf in the memory of the processor is not copied."""
        yield self.header
        for leaf in self.leaves:
            if leaf.numel():
                yield leaf.contiguous().cpu().view(-1).view(torch.uint8).numpy().data

    def write(self, file: BinaryIO) -> None:
        """Writes the bytes on the wire, leaf by leaf."""
        for chunk in self.chunks():
            file.write(chunk)

    def __bytes__(self) -> bytes:
        return b"".join(bytes(c) for c in self.chunks())


def pack(message: Mapping[str, Any]) -> Parcel:
    """Makes a message ready to travel.

    Raises TypeError naming the entry that cannot travel: only weights, tensors, finite numbers, whole numbers of up
    to 64 bits, text, truth values, None, and mappings and lists of those do, nested at most 32 deep.
    """
    packer = _Packer()
    tree = packer.walk(message, "", 0)
    metadata = f'"__metadata__":{dumps({"message": dumps(tree)})}'
    header = f"{{{','.join([*packer.entries, metadata])}}}".encode()
    header += b" " * (-len(header) % 8)
    return Parcel(len(header).to_bytes(8, "little") + header, tuple(packer.leaves), tuple(packer.runs))


class _Packer:
    """Walks a tree and lays its leaves one after another. (Nested functions would keep the leaves in a cycle.)"""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self.leaves: list[Tensor] = []
        self.runs: list[tuple[int, int]] = []
        self.offset = 0

    def walk(self, node: Any, path: str, depth: int) -> Any:
        if depth > DEPTH_LIMIT:
            raise TypeError(f"{path[:80]}: what is nested deeper than {DEPTH_LIMIT} cannot travel")
        if isinstance(node, Weights):
            begin = len(self.leaves)
            for name, leaf in node.items():
                self.place(f"{path}/{name}", leaf)
            self.runs.append((begin, len(self.leaves)))
            return {"$w": "".join(LETTER_OF[node.kinds[k]] for k in node)}
        if isinstance(node, Tensor):
            self.runs.append((len(self.leaves), len(self.leaves) + 1))
            self.place(path, node)
            return {"$t": 0}
        if isinstance(node, Mapping):
            for key in node:
                if not isinstance(key, str) or key.startswith("$") or "/" in key:
                    raise TypeError(f"{path}: {key!r} cannot name an entry of a message")
            return {key: self.walk(value, f"{path}/{key}", depth + 1) for key, value in node.items()}
        return plain(node, path, depth)

    def place(self, path: str, leaf: Tensor) -> None:
        if leaf.dtype not in NAMES:
            raise TypeError(f"{path}: a tensor of {leaf.dtype} cannot travel")
        begin, self.offset = self.offset, self.offset + leaf.numel() * leaf.element_size()
        self.entries.append(described(path, leaf.dtype, leaf.shape, begin, self.offset))
        self.leaves.append(leaf.detach())


@lru_cache(maxsize=1 << 14)
def described(path: str, dtype: torch.dtype, shape: torch.Size, begin: int, end: int) -> str:
    """A leaf's entry in the header; kept, since answer after answer has the same, and writing it costs most of all."""
    entry = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    return f"{dumps(path)}:{dumps(entry)}"


def plain(value: Any, path: str, depth: int = 0) -> Any:
    """A number, text, truth value, None, or a list of those, as JSON takes it."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        if value not in WHOLE:
            raise TypeError(f"{path}: a whole number of more than 64 bits cannot travel")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise Refused(f"{path}: a number that is not finite cannot travel; send None where it is undefined")
        return value
    if isinstance(value, list | tuple):
        if depth >= DEPTH_LIMIT:
            raise TypeError(f"{path[:80]}: what is nested deeper than {DEPTH_LIMIT} cannot travel")
        return [plain(v, path, depth + 1) for v in value]
    raise TypeError(f"{path}: a {type(value).__name__} cannot travel; send weights, tensors, numbers or text")


def dumps(tree: Any) -> str:
    """Canonical JSON: the same tree gives the same text everywhere."""
    return json.dumps(tree, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


class Pieces:
    """Bytes that lie here and there, as if in a row: what lies in one place is looked at there, not copied."""

    def __init__(self, pieces: Sequence[Buffer]) -> None:
        self.pieces, self.ends = pieces, list(accumulate(map(len, pieces)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, row: slice) -> Buffer:
        at, end, _ = row.indices(len(self))
        found: list[Buffer] = []
        i = bisect_right(self.ends, at)
        while at < end:
            start = self.ends[i] - len(self.pieces[i])
            found.append(self.pieces[i][at - start : end - start])
            at, i = self.ends[i], i + 1
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, np.uint8), *found])

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes, in hexadecimal."""
        sha = hashlib.sha256()
        for piece in self.pieces:
            sha.update(piece.data)
        return sha.hexdigest()


def unpack(
    data: bytes | bytearray | memoryview | Buffer | Pieces, spec: Spec | None = None, untold: Room = UNTOLD
) -> dict[str, Any]:
    """The message in these bytes. Leaves are views of ``data`` where it can be written to, else copies.

    ``spec`` is what the message should fit: a header that is larger than it, or ``untold``, allows is not even parsed.
    Raises Refused with one sentence for whatever is not a whole, well-formed message.
    """
    buffer = data if isinstance(data, np.ndarray | Pieces) else np.frombuffer(data, np.uint8)
    entries, tree, start = read_header(buffer, untold if spec is None else room(spec).at_most(MOST))
    for piece in buffer.pieces if isinstance(buffer, Pieces) else [buffer]:
        note_mapped(piece)
    reader = _Reader(buffer, start, entries)
    try:
        message = reader.walk(tree, "", 0)
    except (KeyError, TypeError, AttributeError) as e:
        raise Refused("the message's announcement is malformed") from e
    if reader.at != len(entries):
        raise Refused("the message carries leaves that it does not announce")
    if not isinstance(message, dict):
        raise Refused("the message is not a mapping of names to entries")
    return message


def read_file(path: Path, spec: Spec | None = None) -> dict[str, Any]:
    """The message in a file of this machine. Leaves are mapped, copy on write: pages are read when they are used."""
    if path.stat().st_size == 0:
        raise Refused(f"{path.name} is empty")
    return unpack(np.memmap(path, np.uint8, mode="c"), spec, MOST)


def write_file(path: Path, parcel: Parcel, *, durable: bool = False) -> None:
    """Writes the bytes on the wire to ``path``: whole or not at all, and past a power cut where ``durable``."""
    replace_file(path, parcel.write, durable=durable)


def replace_file(path: Path, write: Callable[[BinaryIO], object], *, durable: bool = False) -> None:
    """Makes ``path`` hold what ``write`` writes, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    put_file(partial, write, durable=durable)
    partial.rename(path)
    if durable:
        sync_folder(path.parent)


def put_file(path: Path, write: Callable[[BinaryIO], object], *, durable: bool = False) -> None:
    """Makes ``path`` hold what ``write`` writes; a kill in the middle leaves a part of it."""
    with path.open("wb") as file:
        write(file)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the names in ``folder`` are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_header(buffer: Buffer | Pieces, allowed: Room) -> tuple[dict[str, Any], Any, int]:
    """The entries of the leaves in the order of their bytes, the tree, and where the leaves start.

    Every offset is checked against the bytes that are there, and every size against its shape and dtype. What has
    more bytes or entries than is allowed is refused before anything is made of it.
    """
    if len(buffer) < 8:
        raise Refused(f"the message has {len(buffer)} bytes, too few for a header")
    length = int.from_bytes(buffer[:8].tobytes(), "little")
    if length > len(buffer) - 8:
        raise Refused(f"the message announces a header of {length} bytes and has {len(buffer) - 8}")
    if length > allowed.nbytes:
        raise Refused(f"the message's header has {length} bytes; at most {allowed.nbytes} are allowed")
    pieces = (buffer[at : min(at + PIECE, 8 + length)].tobytes() for at in range(8, 8 + length, PIECE))
    hold_nodes(sum(piece.count(sign) for piece in pieces for sign in (b"[", b"{", b",")), allowed)
    header = loads(buffer[8 : 8 + length].tobytes())
    match header:
        case {"__metadata__": {"message": str(text)} as about} if len(about) == 1:
            del header["__metadata__"]
        case _:
            raise Refused("the message's header lacks its announcement")
    hold_nodes(sum(text.count(sign) for sign in "[{,"), allowed)  # it may have hidden them from the first count
    offset, available = 0, len(buffer) - 8 - length
    for path, entry in header.items():
        offset = check_entry(path, entry, offset, available)
    if offset != available:
        raise Refused(f"the message carries {available} bytes of leaves and announces {offset}")
    return header, loads(text), 8 + length


def hold_nodes(count: int, allowed: Room) -> None:
    """Raises Refused for a header of more entries than are allowed."""
    if count > allowed.nodes:
        raise Refused(f"the message's header holds {count} entries; at most {allowed.nodes} are allowed")


def check_entry(path: str, entry: Any, offset: int, available: int) -> int:
    """Checks one leaf's entry, which should start at ``offset``; returns where it ends."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if len(entry) == 3:
            pass
        case _:
            raise Refused(f"leaf {path[:80]!r} is not described by dtype, shape and offsets")
    if dtype not in DTYPES:
        raise Refused(f"leaf {path[:80]!r} has the unknown dtype {dtype[:20]!r}")
    if len(shape) > 8 or any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
        raise Refused(f"leaf {path[:80]!r} has no proper shape or offsets")
    if math.prod(n or 1 for n in shape) > 2**56:  # such a leaf may be empty, yet has no strides
        raise Refused(f"leaf {path[:80]!r} has the impossible shape {shape}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if begin != offset or end - begin != size or end > available:
        raise Refused(f"leaf {path[:80]!r} should take bytes {offset} to {offset + size}, and claims {begin} to {end}")
    return int(end)


def loads(text: bytes | str) -> Any:
    """Parses JSON that someone else wrote, in UTF-8. Raises Refused for anything but plain, finite JSON."""
    try:
        text = text if isinstance(text, str) else text.decode()
        return json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_once)
    except Refused:
        raise
    except (ValueError, RecursionError) as e:
        raise Refused(f"the message's header is not proper JSON: {str(e)[:80]}") from e


def _whole(digits: str) -> int:
    if len(digits) > 20 or int(digits) not in WHOLE:
        raise Refused("the message's header holds a whole number of more than 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise Refused(f"the message's header holds {digits[:20]}, which is not finite")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Refused("the message's header names an entry twice")
    return found


class _Reader:
    """Walks the announced tree and takes the leaves in the order in which they lie."""

    def __init__(self, buffer: Buffer | Pieces, start: int, entries: dict[str, Any]) -> None:
        self.buffer, self.start = buffer, start
        self.entries, self.at = list(entries.items()), 0

    def walk(self, node: Any, path: str, depth: int) -> Any:
        if depth > DEPTH_LIMIT:
            raise Refused(f"the message is nested deeper than {DEPTH_LIMIT}")
        if isinstance(node, list):
            self.plain(node, path, depth)
        if not isinstance(node, dict):
            return node
        if node == {"$t": 0}:
            return self.leaf(path)
        if node.keys() == {"$w"}:
            return self.weights(node["$w"], path + "/")
        if any(key.startswith("$") or "/" in key for key in node):
            raise Refused(f"{path[:80]!r} holds an entry with an improper name")
        return {key: self.walk(value, f"{path}/{key}", depth + 1) for key, value in node.items()}

    def plain(self, values: list[Any], path: str, depth: int) -> None:
        """Checks that a list holds nothing but numbers, text, truth values, None and lists of those."""
        if depth >= DEPTH_LIMIT:
            raise Refused(f"the message is nested deeper than {DEPTH_LIMIT}")
        for value in values:
            if isinstance(value, dict):
                raise Refused(f"{path[:80]!r} holds a mapping in a list")
            if isinstance(value, list):
                self.plain(value, path, depth + 1)

    def weights(self, letters: Any, prefix: str) -> Weights:
        if not isinstance(letters, str) or len(letters) > len(self.entries) - self.at:
            raise Refused(f"the message announces more leaves at {prefix[:80]!r} than it carries")
        leaves, kinds = {}, {}
        for letter in letters:
            path = self.entries[self.at][0]
            if not path.startswith(prefix) or letter not in LETTERS:
                raise Refused(f"the message announces a leaf of {prefix[:80]!r} where it carries {path[:80]!r}")
            name = path[len(prefix) :]
            leaves[name], kinds[name] = self.leaf(path), LETTERS[letter]
        return Weights(leaves, kinds)

    def leaf(self, path: str) -> Tensor:
        name, entry = self.entries[self.at] if self.at < len(self.entries) else ("nothing", {})
        if name != path:
            raise Refused(f"the message announces {path[:80]!r} where it carries {name[:80]!r}")
        self.at += 1
        dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
        if begin == end:
            return torch.empty(entry["shape"], dtype=dtype)
        view = self.buffer[self.start + begin : self.start + end]
        if not view.flags.writeable or view.ctypes.data % dtype.itemsize:
            view = view.copy()
        if dtype == torch.bool and view.max() > 1:
            raise Refused(f"{path[:80]!r} holds a truth value that is neither 0 nor 1")
        return torch.from_numpy(view).view(dtype).reshape(entry["shape"])
