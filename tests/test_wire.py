"""A message as bytes and back: every tree comes back as it was, and no bytes do harm."""

import gc
import hashlib
import io
import json
import random
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan import wire
from fedscan.schema import Kind, Weights
from fedscan.spec import Refused
from tampering import MUTATIONS, assembled, edit_tree, flip, put_together, raw_json

torch.set_num_threads(1)


def bits(x: torch.Tensor) -> bytes:
    """The bytes of a tensor, so that NaN equals NaN and -0.0 is not 0.0."""
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def alike(x: Any, y: Any) -> bool:
    """Whether two trees are the same in types, order, kinds and bits. A tuple travels as a list."""
    if isinstance(x, Weights) and (not isinstance(y, Weights) or x.kinds != y.kinds):
        return False
    if isinstance(x, dict):
        return type(x) is type(y) and list(x) == list(y) and all(alike(x[k], y[k]) for k in x)
    if isinstance(x, torch.Tensor):
        return isinstance(y, torch.Tensor) and (x.shape, x.dtype, bits(x)) == (y.shape, y.dtype, bits(y))
    if isinstance(x, list | tuple):
        return isinstance(y, list) and len(x) == len(y) and all(map(alike, x, y))
    return type(x) is type(y) and repr(x) == repr(y)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(sorted(wire.NAMES, key=str)))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    raw = np.frombuffer(draw(st.binary(min_size=count, max_size=count)), np.uint8).copy()
    if dtype == torch.bool:
        raw &= 1
    if not raw.size:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


letters = st.characters(exclude_categories=["Cs"])
words = st.text(letters, max_size=8)
names = words.filter(lambda s: not s.startswith("$") and "/" not in s)
whole = st.integers(-(2**63), 2**64 - 1)
plain = st.none() | st.booleans() | whole | st.floats(allow_nan=False, allow_infinity=False) | words
lists = st.recursive(st.lists(plain, max_size=4), lambda inner: st.lists(plain | inner, max_size=3), max_leaves=6)
weights = st.dictionaries(words, st.tuples(tensors(), st.sampled_from(Kind)), max_size=4).map(
    lambda d: Weights({k: t for k, (t, _) in d.items()}, {k: kind for k, (_, kind) in d.items()})
)
ends = plain | lists | tensors() | weights
trees = st.dictionaries(
    names,
    st.recursive(ends, lambda inner: st.dictionaries(names, inner, max_size=3), max_leaves=8),
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(trees)
def test_a_tree_comes_back_as_it_was(tree: dict[str, Any]) -> None:
    parcel = wire.pack(tree)
    data = bytes(parcel)
    assert alike(tree, wire.unpack(data))
    assert alike(tree, wire.unpack(bytearray(data)))
    assert parcel.nbytes == len(data)
    assert parcel.digest == hashlib.sha256(data).hexdigest()
    assert bytes(wire.pack(wire.unpack(data))) == data
    read = safetensors.torch.load(data)
    assert sorted(read) == sorted(path for path, _ in leaves_of(tree))
    assert all(alike(read[path], leaf) for path, leaf in leaves_of(tree))


def leaves_of(node: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a tree, under its path in the file."""
    if isinstance(node, torch.Tensor):
        yield path, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from leaves_of(value, f"{path}/{key}")


@settings(max_examples=60, deadline=None)
@given(trees)
def test_the_same_tree_gives_the_same_bytes(tree: dict[str, Any]) -> None:
    def anew(node: Any) -> Any:
        if isinstance(node, Weights):
            return Weights({k: v.clone() for k, v in node.items()}, node.kinds)
        if isinstance(node, dict):
            return {k: anew(v) for k, v in node.items()}
        return node.clone() if isinstance(node, torch.Tensor) else node

    assert wire.pack(anew(tree)).digest == wire.pack(tree).digest


def test_another_tree_gives_other_bytes() -> None:
    x = torch.arange(4.0)
    trees: list[dict[str, Any]] = [
        {"w": x},
        {"v": x},
        {"w": x.reshape(2, 2)},
        {"w": x.to(torch.float16)},
        {"w": x.int()},
        {"w": Weights({"": x})},
        {"w": Weights({"": x}, {"": Kind.STATISTIC})},
        {"w": x, "n": 1},
        {"w": x, "n": 1.0},
        {"w": x, "n": True},
        {"w": x, "n": None},
        {"w": {"": x}},
    ]
    digests = [wire.pack(tree).digest for tree in trees]
    assert len(set(digests)) == len(trees)


def test_views_travel_as_what_they_show() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    for view in (x.t(), x[:, 1:3], x[::2], x[1, 2], x.expand(2, 3, 4)):
        assert alike(wire.unpack(bytes(wire.pack({"x": view})))["x"], view.clone(memory_format=torch.contiguous_format))


def test_a_message_is_written_leaf_by_leaf_without_a_copy() -> None:
    leaves = {"a": torch.ones(1000), "b": torch.zeros(0), "c": torch.ones(3, 5, dtype=torch.bfloat16)}
    parcel = wire.pack({"w": Weights(leaves)})

    class Sink(io.RawIOBase):
        def __init__(self) -> None:
            self.got: list[Any] = []

        def write(self, chunk: Any) -> int:
            self.got.append(chunk)
            return len(chunk)

    sink = Sink()
    parcel.write(sink)  # type: ignore[arg-type]
    header, *chunks = sink.got
    assert header == parcel.header
    assert [len(c) for c in chunks] == [4000, 30]
    leaves["a"][0] = 7.0  # what was handed to the file is the leaf itself
    assert bytes(chunks[0][:4]) == bits(torch.tensor([7.0]))
    assert b"".join(map(bytes, sink.got)) == bytes(parcel)


def test_a_file_is_mapped_and_read_when_used(tmp_path: Path) -> None:
    path, x = tmp_path / "m.safetensors", torch.arange(100_000.0)
    wire.write_file(path, wire.pack({"x": x, "n": 3}), durable=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    message = wire.read_file(path)
    before = path.read_bytes()
    with path.open("r+b") as file:  # a page that nobody has looked at yet still shows what the file holds
        file.seek(-4, io.SEEK_END)
        file.write(bits(torch.tensor([-1.0])))
    assert message["x"][-1] == -1.0
    after = path.read_bytes()
    assert after != before
    message["x"][0] = 9.0  # copy on write: the file stays as it is
    assert path.read_bytes() == after
    assert wire.read_file(path)["x"][0] == 0.0
    assert torch.equal(message["x"][1:-1], x[1:-1])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    wire.write_file(path, wire.pack({"n": 1}))

    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        wire.replace_file(path, fail)
    assert wire.read_file(path) == {"n": 1}


def test_what_cannot_travel_is_named() -> None:
    deep: Any = 1
    for _ in range(40):
        deep = {"d": deep}
    lists: Any = 1
    for _ in range(40):
        lists = [lists]
    for message, words in (
        ({"a": {"b": object()}}, "/a/b: a object cannot travel"),
        ({"a": [1, {"b": 2}]}, "/a: a dict cannot travel"),
        ({"a": [torch.ones(1)]}, "/a: a Tensor cannot travel"),
        ({"a": float("nan")}, "/a: a number that is not finite"),
        ({"a": [[float("inf")]]}, "/a: a number that is not finite"),
        ({"a": 2**64}, "/a: a whole number of more than 64 bits"),
        ({"a": -(10**5000)}, "/a: a whole number of more than 64 bits"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "/a: a tensor of torch.complex64"),
        ({"$a": 1}, "'\\$a' cannot name"),
        ({"x": {"a/b": 1}}, "/x: 'a/b' cannot name"),
        ({"x": {1: 1}}, "/x: 1 cannot name"),
        ({"x": {1, 2}}, "/x: a set cannot travel"),
        ({"x": deep}, "nested deeper"),
        ({"x": lists}, "nested deeper"),
    ):
        with pytest.raises((TypeError, Refused), match=words):
            wire.pack(message)


def test_a_parcel_that_is_gone_frees_its_leaves() -> None:
    """Nothing waits for the collector of cycles: 64 answers would else lie in memory side by side."""

    class Watched(np.ndarray[Any, Any]):
        pass

    memory = np.zeros(100, np.float32).view(Watched)
    alive = weakref.ref(memory)
    leaf = torch.from_numpy(memory)
    del memory
    gc.disable()
    try:
        parcel = wire.pack({"a": {"b": leaf, "w": Weights({"c": leaf})}})
        assert alive() is not None
        del leaf, parcel
        assert alive() is None
    finally:
        gc.enable()


# -- messages that someone has tampered with -------------------------------------------------------------------------


def sample() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {
        "weights": Weights(
            {
                "conv.weight": torch.randn(4, 2, 3, generator=g),
                "norm.var": torch.rand(4, generator=g),
                "n": torch.tensor(7),
            },
            {"norm.var": Kind.STATISTIC},
        ),
        "mask": torch.tensor([True, False, True]),
        "nested": {
            "half": torch.randn(5, generator=g).bfloat16(),
            "empty": torch.empty(0, 3),
            "x": {"y": [1, 2.5, "é"]},
        },
        "rows": [["case", None, 0.5], ["ça", 1, True]],
        "loss": 0.25,
    }


def check_sentence(e: Refused) -> None:
    text = str(e)
    assert 10 < len(text) < 500
    assert text.isprintable()
    assert not text.endswith("\n")


@pytest.mark.parametrize("mutate", MUTATIONS, ids=[f"{m.__name__}{i}" for i, m in enumerate(MUTATIONS)])
def test_mutated_messages_are_refused_or_read(mutate: Callable[[bytes, random.Random], bytes]) -> None:
    """140 of each kind, 2,100 in all: a sentence or a proper message, and nothing else happens."""
    good, r = bytes(wire.pack(sample())), random.Random(mutate.__name__)
    refused = 0
    tracemalloc.start()
    for _ in range(140):
        data = mutate(good, r)
        modules = set(sys.modules)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            message = wire.unpack(data)
        except Refused as e:
            check_sentence(e)
            refused += 1
        else:
            assert isinstance(message, dict)
            assert bytes(wire.pack(message))  # what is read can travel again, so it is a proper message
        assert tracemalloc.get_traced_memory()[1] - before < 100_000 + 60 * len(data)
        assert set(sys.modules) == modules
    tracemalloc.stop()
    assert refused >= (20 if mutate is flip else 40 if mutate in (edit_tree, raw_json) else 70)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=64))
def test_any_bytes_are_refused_or_read(header: bytes, body: bytes) -> None:
    for data in (header + body, assembled(header, body)):
        try:
            wire.unpack(data)
        except Refused as e:
            check_sentence(e)


def leaf(dtype: Any, shape: Any, offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("entries", "tree", "body", "words"),
    [
        ({"/x": leaf("F32", [2], [0, 8])}, {"x": {"$t": 0}}, bytes(7), "should take bytes 0 to 8"),
        ({"/x": leaf("F32", [2], [0, 8])}, {"x": {"$t": 0}}, bytes(9), "carries 9 bytes of leaves and announces 8"),
        ({"/x": leaf("F32", [2], [False, 8])}, {"x": {"$t": 0}}, bytes(8), "no proper shape or offsets"),
        ({"/x": leaf("F32", [True, 2], [0, 8])}, {"x": {"$t": 0}}, bytes(8), "no proper shape or offsets"),
        ({"/x": leaf("F32", [-1, -2], [0, 8])}, {"x": {"$t": 0}}, bytes(8), "no proper shape or offsets"),
        ({"/x": leaf("F32", [2**62, 4], [0, 0])}, {"x": {"$t": 0}}, b"", "impossible shape"),
        ({"/x": leaf("F32", [0, 2**62], [0, 0])}, {"x": {"$t": 0}}, b"", "impossible shape"),
        ({"/x": leaf("F32", [0, *[2**30] * 4], [0, 0])}, {"x": {"$t": 0}}, b"", "impossible shape"),
        ({"/x": leaf("F32", [1] * 9, [0, 4])}, {"x": {"$t": 0}}, bytes(4), "no proper shape"),
        ({"/x": leaf("F32", [10**400], [0, 4])}, {"x": {"$t": 0}}, bytes(4), "more than 64 bits"),
        ({"/x": leaf("BOOL", [2], [0, 2])}, {"x": {"$t": 0}}, b"\x01\x02", "neither 0 nor 1"),
        ({"/x": leaf("F32", [2], [0, 8])}, {}, bytes(8), "leaves that it does not announce"),
        ({"/x": leaf("F32", [2], [0, 8])}, {"y": {"$t": 0}}, bytes(8), "'/y' where it carries '/x'"),
        ({"/x/a": leaf("U8", [1], [0, 1])}, {"x": {"$w": "pp"}}, bytes(1), "more leaves"),
        ({"/x/a": leaf("U8", [1], [0, 1])}, {"x": {"$w": "z"}}, bytes(1), "announces a leaf of '/x/'"),
        ({"/xa": leaf("U8", [1], [0, 1])}, {"x": {"$w": "p"}}, bytes(1), "announces a leaf of '/x/'"),
        ({}, {"x": [{"$t": 0}]}, b"", "a mapping in a list"),
        ({}, {"x": {"$t": 0}}, b"", "carries 'nothing'"),
        ({}, {"$x": 0}, b"", "improper name"),
        ({}, {"a/b": 0}, b"", "improper name"),
        ({}, [1, 2], b"", "not a mapping"),
    ],
)
def test_each_lie_has_its_sentence(entries: dict[str, Any], tree: Any, body: bytes, words: str) -> None:
    with pytest.raises(Refused, match=words):
        wire.unpack(put_together(entries, tree, body))


@pytest.mark.parametrize(
    "text", ["1e999", "-1e999", "NaN", "Infinity", "[1, [1e999]]", "9" * 400, "[18446744073709551616]"]
)
def test_numbers_that_no_message_holds(text: str) -> None:
    with pytest.raises(Refused, match=r"not finite|more than 64 bits"):
        wire.unpack(assembled({"__metadata__": {"message": f'{{"x": {text}}}'}}, b""))


def test_depth_is_the_same_on_both_sides() -> None:
    def nested(n: int, end: Any, wrap: Callable[[Any], Any]) -> Any:
        for _ in range(n):
            end = wrap(end)
        return end

    for wrap in (lambda x: {"a": x}, lambda x: [x]):
        for n in range(28, 36):
            tree = {"x": nested(n, 1, wrap)}
            raw = assembled({"__metadata__": {"message": json.dumps(tree)}}, b"")
            try:
                wire.pack(tree)
            except (TypeError, Refused):
                with pytest.raises(Refused, match="nested deeper"):
                    wire.unpack(raw)
            else:
                assert wire.unpack(raw) == tree


def test_files_that_are_no_messages(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for data, words in (
        (b"", "empty"),
        (b"1234567", "too few"),
        (bytes(8), "not proper JSON"),
        (b"\xff" * 64, "announces"),
    ):
        path.write_bytes(data)
        with pytest.raises(Refused, match=words):
            wire.read_file(path)


def test_a_hostile_header_costs_no_more_than_its_size_allows() -> None:
    """A header of 4 MB full of empty mappings, and leaves that claim exabytes: peak memory stays within bounds."""
    script = """
import json, resource, sys
from fedscan import wire
from fedscan.spec import Refused
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def send(header, body=b""):
    text = json.dumps(header).encode()
    try:
        wire.unpack(len(text).to_bytes(8, "little") + text + body)
    except Refused as e:
        return str(e)
    raise AssertionError("not refused")
send({})
start = peak()
for shape in ([2**40], [2**20] * 2, [0, 2**62], [2**62, 0, 2**62]):
    for end in (0, 2**43):
        claim = {"dtype": "F64", "shape": shape, "data_offsets": [0, end]}
        send({"/x": claim, "__metadata__": {"message": '{"x":{"$t":0}}'}})
print(peak() - start)
send({"__metadata__": {"message": '{"$x":[' + "{}," * 1_300_000 + "{}]}"}})
print(peak() - start)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    lies, full = map(int, done.stdout.split())
    assert lies < 4 << 10  # KiB
    assert full < 400 << 10
