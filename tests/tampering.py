"""Ways to tamper with a message. Each takes its bytes and a source of chance, and gives other bytes."""

import json
import random
import sys
from collections.abc import Callable
from typing import Any

from fedscan import wire


def assembled(header: Any, body: bytes) -> bytes:
    """A message with this header: a tree, or bytes as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def taken_apart(data: bytes) -> tuple[dict[str, Any], Any, bytes]:
    """Header, announcement and body of a message."""
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    tree = json.loads(header["__metadata__"]["message"])
    return header, tree, data[8 + n :]


def put_together(header: dict[str, Any], tree: Any, body: bytes) -> bytes:
    return assembled({**header, "__metadata__": {"message": json.dumps(tree)}}, body)


SIZES: tuple[Any, ...] = (
    -1, 0, 1, 3, 2**31, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**400, 10**5000, True, False, None, 1.5, "1", [], {}
)  # fmt: skip
ODD = ("", "/", "$", "$t", "$w", "a/b", "__metadata__", "__class__", "../../x", "\ud800", "\x00", "é" * 500, "x" * 9999)


def flip(data: bytes, r: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 8))):
        found[r.randrange(len(found) if r.random() < 0.3 else 700)] ^= 1 << r.randrange(8)
    return bytes(found)


def cut(data: bytes, r: random.Random) -> bytes:
    return data[: r.randrange(len(data))]


def splice(data: bytes, r: random.Random) -> bytes:
    a, b = sorted((r.randrange(len(data)), r.randrange(len(data))))
    return r.choice((data[:a] + data[b:], data[:b] + data[a:], data + data[a:b], data[a:b] + data))


def lengthen(data: bytes, r: random.Random) -> bytes:
    return r.choice((0, 1, 7, 2**20, 2**25, 2**32, 2**63, 2**64 - 1)).to_bytes(8, "little") + data[8:]


def edit_entry(data: bytes, r: random.Random) -> bytes:
    header, tree, body = taken_apart(data)
    path = r.choice([p for p in header if p != "__metadata__"])
    entry = header[path]
    part = r.choice(["dtype", "shape", "data_offsets", "gone", "more", "all", "swap", "zero"])
    if part == "dtype":
        entry["dtype"] = r.choice([*wire.DTYPES, "F8_E4M3", "C64", "O", "", None, 3, ["F32"], {}])
    elif part in ("shape", "data_offsets") and entry[part]:
        entry[part][r.randrange(len(entry[part]))] = r.choice(SIZES)
    elif part == "shape":
        entry[part] = [r.choice(SIZES) for _ in range(r.randrange(40))]
    elif part == "zero":
        entry["shape"] = [0, *(r.choice((2**30, 2**62, 2**63, 10**4000)) for _ in range(r.randrange(1, 8)))]
        entry["data_offsets"][1] = entry["data_offsets"][0]
    elif part == "gone":
        entry.pop(r.choice(list(entry)))
    elif part == "more":
        entry[r.choice(ODD)] = r.choice(SIZES)
    elif part == "all":
        header[path] = r.choice([None, 1, "x", [], {}, [entry]])
    else:
        other = r.choice([p for p in header if p != "__metadata__"])
        header[path], header[other] = header[other], header[path]
    return written(header, tree, body)


def edit_tree(data: bytes, r: random.Random) -> bytes:
    header, tree, body = taken_apart(data)
    node = r.choice([tree, tree["nested"], tree["nested"]["x"], tree["weights"], tree["mask"]])
    key = r.choice(list(node))
    value = r.choice(
        [*SIZES, {"$t": 0}, {"$t": 1}, {"$w": "ppp"}, {"$w": "pqc"}, {"$w": 3}, {"$w": "p" * 10**5}, [{"$t": 0}],
         {"$t": 0, "$w": "p"}, {"$import": "os"}, [[{}]], "s"]
    )  # fmt: skip
    kind = r.choice(("set", "add", "drop", "top", "order"))
    if kind == "set":
        node[key] = value
    elif kind == "add":
        node[r.choice(ODD)] = value
    elif kind == "drop":
        del node[key]
    elif kind == "top":
        tree = value
    else:
        tree = dict(sorted(tree.items(), key=lambda _: r.random()))
    return written(header, tree, body)


def rename(data: bytes, r: random.Random) -> bytes:
    header, tree, body = taken_apart(data)
    path = r.choice(list(header))
    header = {(r.choice(["", "/", path]) + r.choice(ODD) if k == path else k): v for k, v in header.items()}
    header.setdefault("__metadata__", {"message": "{}"})
    return written(header, tree, body)


def raw_json(data: bytes, r: random.Random) -> bytes:
    """The header with one number, word or bracket replaced by what no header should hold."""
    header, tree, body = taken_apart(data)
    inner = json.dumps(tree)
    bad = r.choice(
        ["NaN", "-Infinity", "1e999", "9" * 401, "9" * 9999, "[" * 5000 + "]" * 5000, '{"a":' * 3000 + "1" + "}" * 3000,
         '"\\ud800"', "[" * 40 + "]" * 40, '{"a":1,"a":2}', "0x10", "tru", "'a'", "1,", "\\u0000", "-0", "1E400"]
    )  # fmt: skip
    if r.random() < 0.5:
        inner = inner.replace("0.25", bad).replace("2.5", bad if r.random() < 0.5 else "2.5")
        return assembled({**header, "__metadata__": {"message": inner}}, body)
    text = json.dumps({**header, "__metadata__": {"message": inner}})
    at = r.choice([i for i, c in enumerate(text) if c in "0123456789[]{}:,"])
    return assembled((text[:at] + bad + text[at + 1 :]).encode(), body)


def encode_otherwise(data: bytes, r: random.Random) -> bytes:
    header, tree, body = taken_apart(data)
    text = json.dumps({**header, "__metadata__": {"message": json.dumps(tree)}})
    return assembled(text.encode(r.choice(["utf-16", "utf-32", "utf-8-sig", "utf-7"])), body)


def twice(data: bytes, r: random.Random) -> bytes:
    header, tree, body = taken_apart(data)
    path = r.choice(list(header))
    text = json.dumps({**header, "__metadata__": {"message": json.dumps(tree)}})
    return assembled((text[:-1] + f", {json.dumps(path)}: {json.dumps(header[path])}}}").encode(), body)


def overlap(data: bytes, r: random.Random) -> bytes:
    header, tree, body = taken_apart(data)
    paths = [p for p in header if p != "__metadata__"]
    a, b = r.sample(paths, 2)
    header[a]["data_offsets"] = header[b]["data_offsets"]
    return written(header, tree, body)


def about(data: bytes, r: random.Random) -> bytes:
    header, _, body = taken_apart(data)
    header["__metadata__"] = r.choice(
        [None, 1, [], {}, "x", {"message": None}, {"message": {}}, {"message": "x" * 10**6},
         {"message": "{}", "more": "1"}, {"message": "[]"}, {"message": "\ud800"}]
    )  # fmt: skip
    return assembled(header, body)


def trail(data: bytes, r: random.Random) -> bytes:
    return data + bytes(r.randrange(1, 64))


def written(header: dict[str, Any], tree: Any, body: bytes) -> bytes:
    """Like ``put_together``, with whole numbers of any length."""
    sys.set_int_max_str_digits(0)
    try:
        return put_together(header, tree, body)
    finally:
        sys.set_int_max_str_digits(4300)


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip, cut, splice, lengthen, edit_entry, edit_entry, edit_tree, edit_tree, rename, raw_json, encode_otherwise,
    twice, overlap, about, trail,
)  # fmt: skip
