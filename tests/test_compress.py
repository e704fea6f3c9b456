"""The codec: exact selection, bounded rounding, nothing lost over rounds, and no size in a message believed."""

import math
import random
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan import compress
from fedscan.compress import HEADER, Codec, dequantise, largest, quantise
from fedscan.schema import Kind, Schema, Weights

torch.set_num_threads(1)

KINDS = {"var": Kind.STATISTIC, "seen": Kind.COUNTER}


def update(seed: int, dtype: torch.dtype = torch.float32, n: int = 30_000) -> Weights:
    """Heavy-tailed leaves of several scales, a statistic and two counters; names not in order."""
    g = np.random.default_rng(seed)
    tails = {"z": (n // 100, 100), "a": (64, 3, 3, 3), "bias": (7,), "one": (1,), "none": (0, 5), "var": (64,)}
    leaves = {k: torch.from_numpy(g.standard_t(3, s).astype(np.float32) * 10.0 ** -len(k)) for k, s in tails.items()}
    leaves = {k: v if k == "var" else v.to(dtype) for k, v in leaves.items()}
    leaves["seen"] = torch.tensor(int(g.integers(0, 99)))
    return Weights(leaves, KINDS)


def learned(tree: Weights) -> Weights:
    return tree.of(Kind.PARAMETER)


def same(a: Weights, b: Weights) -> bool:
    return (
        list(a) == list(b)
        and a.kinds == b.kinds
        and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    )


CODECS = [Codec(0.01), Codec(0.1, 16), Codec(0.3, 32), Codec(), Codec(1.0, 16, block=0), Codec(1.0, 32), Codec(1e-9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_nothing_is_lost(codec: Codec, dtype: torch.dtype) -> None:
    """Each round: decoded + new residual = update + old residual, to the last bit of float32 but for a few ulps."""
    residual = None
    for turn in range(4):
        new = update(turn, dtype)
        due = {k: v.float() + (residual[k] if residual else 0.0) for k, v in learned(new).items()}
        message, residual = codec.encode(new, residual)
        decoded = codec.decode(message, new.schema)
        assert decoded.schema == new.schema
        assert list(decoded) == list(new)
        assert torch.equal(decoded["var"], new["var"])
        assert torch.equal(decoded["seen"], new["seen"])
        assert len(message) <= codec.bound(new.schema) + 64
        for name, leaf in due.items():
            sent = decoded[name].float()
            assert residual[name].dtype == torch.float32
            assert torch.equal(residual[name], leaf - sent)
            assert torch.equal(residual[name][sent == 0], leaf[sent == 0])
            near = (sent.abs() >= leaf.abs() / 2) & (sent.abs() <= leaf.abs() * 2)
            assert torch.equal((sent + residual[name])[near], leaf[near])  # exact by Sterbenz
            n, k = leaf.numel(), min(leaf.numel(), max(1, round(codec.fraction * leaf.numel())))
            assert torch.count_nonzero(sent) <= k
            if codec.bits == 32 and dtype is torch.float32 and n:
                assert torch.count_nonzero(sent) == k
                assert sent[sent != 0].abs().min() >= leaf[sent == 0].abs().max() if k < n else True


def test_sum_of_all_that_was_sent_and_what_is_held_is_the_sum_of_updates() -> None:
    """Equality, where float32 need not round: the largest entry is 127 / 16, so all is in steps of 1 / 1024."""
    codec, g = Codec(0.05, 8), np.random.default_rng(0)
    total = torch.zeros(2000)
    sent, residual = torch.zeros(2000), None
    for _ in range(30):
        steps = g.integers(-100, 101, 2000).astype(np.float32)
        steps[:3] = (127 * 64, -127 * 64, 0)
        new = Weights({"w": torch.from_numpy(steps / 1024)})
        total += new["w"]
        message, residual = codec.encode(new, residual)
        sent += codec.decode(message, new.schema)["w"]
    assert residual is not None
    assert torch.equal(sent + residual["w"], total)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("block", [100, 4096, 5000])
def test_rounding_is_off_by_half_a_step_at_most(bits: int, block: int) -> None:
    x = np.random.default_rng(0).standard_t(3, 5000).astype(np.float32)
    steps, size, stand = quantise(x, bits, block)
    assert steps.dtype.itemsize * 8 == bits
    assert len(size) == math.ceil(5000 / block)
    each = np.repeat(size, block)[:5000].astype(np.float64)
    for i, s in enumerate(size):
        top = np.abs(x[i * block : (i + 1) * block]).max()
        assert s == np.float32(top / np.float32(2 ** (bits - 1) - 1))
    slack = 1e-6 * np.abs(x)
    assert np.all(np.abs(x.astype(np.float64) - stand) <= each / 2 + slack)
    assert np.array_equal(dequantise(steps, size, block).numpy(), stand)
    _, _, rough = quantise(x, bits, block, rng=np.random.default_rng(1))
    assert np.all(np.abs(x.astype(np.float64) - rough) <= each + slack)


def test_rounding_at_random_has_the_right_mean_and_is_repeatable() -> None:
    x = np.concatenate([np.full(200_000, 0.3, np.float32), np.array([127.0], np.float32)])
    steps, size, stand = quantise(x, 8, len(x), rng=np.random.default_rng(0))
    assert size == [1.0]
    assert set(steps[:-1].tolist()) == {0, 1}
    assert stand[:-1].mean() == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 200_000))
    new = update(0)
    messages = [Codec(1.0).encode(new, rng=torch.Generator().manual_seed(seed))[0] for seed in (3, 3, 4)]
    assert torch.equal(messages[0], messages[1])
    assert not torch.equal(messages[0], messages[2])
    a = Codec(0.1).encode(new, rng=np.random.default_rng(5))
    b = Codec(0.1).encode(new, rng=np.random.default_rng(5))
    assert torch.equal(a[0], b[0])
    assert same(a[1], b[1])


def by_sorting(x: np.ndarray, k: int) -> np.ndarray:
    order = np.lexsort((np.arange(len(x)), -np.abs(x)))[:k]
    return np.sort(order[x[order] != 0])


@given(
    values=st.lists(st.floats(-10, 10, width=32) | st.sampled_from([0.0, 1.0, -1.0, 2.0]), min_size=1, max_size=300),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_largest_is_exact_and_takes_the_first_of_equals(values: list[float], data: Any) -> None:
    x = np.array(values, np.float32)
    k = data.draw(st.integers(1, len(x)))
    assert np.array_equal(largest(x, k), by_sorting(x, k))


@pytest.mark.parametrize("shape", ["tails", "flat", "zeros", "few", "steps", "periodic", "spike", "sampled"])
def test_largest_is_exact_on_long_leaves_of_any_shape(shape: str) -> None:
    n, g = 400_003, np.random.default_rng(0)
    shapes: dict[str, Callable[[], np.ndarray]] = {
        "tails": lambda: g.standard_t(3, n),
        "flat": lambda: np.ones(n),
        "zeros": lambda: np.zeros(n),
        "few": lambda: np.where(np.arange(n) % 1000 == 7, g.normal(size=n), 0.0),
        "steps": lambda: g.integers(-5, 6, n),
        "periodic": lambda: np.where(np.arange(n) % 27 == 13, 1.0, 1e-3) * g.normal(size=n),
        "sampled": lambda: np.where(np.arange(n) % 23 == 0, 100.0, 0.01) * g.normal(size=n),  # the guess is far off
        "spike": lambda: np.where(np.arange(n) < 5000, 100.0, 0.01) * g.normal(size=n),
    }
    x = shapes[shape]().astype(np.float32)
    for k in (1, 40, 4000, 150_000):
        assert np.array_equal(largest(x, k), by_sorting(x, k))


# -- a threshold -----------------------------------------------------------------------------------------------------


def test_what_is_above_the_threshold_is_sent() -> None:
    """By hand: |0.5|, |-0.2| and |-0.1001| are above 0.1; 0.1 itself waits, and goes when as much again is added."""
    codec = Codec(bits=32, threshold=0.1)
    new = Weights({"w": torch.tensor([0.5, -0.2, 0.1, 0.0, -0.1001]), "none": torch.zeros(0, 3)})
    message, rest = codec.encode(new)
    assert torch.equal(codec.decode(message, new.schema)["w"], torch.tensor([0.5, -0.2, 0.0, 0.0, -0.1001]))
    assert torch.equal(rest["w"], torch.tensor([0.0, 0.0, 0.1, 0.0, 0.0]))
    small = Weights({"w": torch.tensor([0.05, 0.0, 0.05, 0.0, 0.0]), "none": torch.zeros(0, 3)})
    message, rest = codec.encode(small, rest)
    assert torch.equal(codec.decode(message, new.schema)["w"], torch.tensor([0.0, 0.0, 0.15, 0.0, 0.0]))
    assert torch.equal(rest["w"], torch.tensor([0.05, 0.0, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("threshold", [0.0, 1e-50, 0.003, 0.1, 1e6, 1e39])
@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_threshold_by_numpy(threshold: float, bits: int, dtype: torch.dtype) -> None:
    """Sent is a part of what is above the threshold (with 32 bits, all of it); what is not stays, to the bit."""
    codec, residual = Codec(bits=bits, threshold=threshold), None
    for turn in range(3):
        new = update(turn, dtype)
        due = {k: v.float() + (residual[k] if residual else 0.0) for k, v in learned(new).items()}
        message, residual = codec.encode(new, residual)
        assert len(message) <= codec.bound(new.schema) + codec.bound(new.schema) // 256 + 64
        decoded = codec.decode(message, new.schema)
        assert torch.equal(decoded["var"], new["var"])
        for name, leaf in due.items():
            sent, large = (
                decoded[name].float(),
                np.abs(leaf.numpy().astype(np.float64)) > np.float32(min(threshold, 3e38)),
            )
            assert torch.equal(residual[name], leaf - sent)
            assert not (sent.numpy() != 0)[~large].any()
            if bits == 32:
                assert np.array_equal(sent.numpy() != 0, large)


def test_a_fraction_caps_what_is_above_the_threshold() -> None:
    new = Weights({"w": torch.arange(100.0)})
    for threshold, expected in ((49.0, 10), (94.0, 5), (100.0, 0)):
        codec = Codec(0.1, 32, threshold=threshold)
        sent = codec.decode(codec.encode(new)[0], new.schema)["w"]
        assert torch.equal(sent.nonzero().flatten(), torch.arange(100 - expected, 100))


def test_no_count_above_a_threshold_is_believed() -> None:
    """The sender decides how many entries it sends; the receiver, how many there can be, and so how many bytes."""
    codec = Codec(threshold=50.0)
    message = codec.encode(Weights({"w": torch.arange(100.0)}))[0]
    assert codec.bound(W) == HEADER + 4 + 4 + 100 + 100 + 0  # count, scale, values, gaps, no long gaps
    assert torch.count_nonzero(codec.decode(message, W)["w"]) == 49
    lies = [
        (body_of(("<u4", 101), ("<f4", 1), ("i1", [1] * 101), ("u1", [0] * 101)), "claims|has 101 entries"),
        (body_of(("<u4", 2**32 - 1), ("<f4", 1)), "has 4294967295 entries where at most 100"),
        (body_of(("<u4", 2), ("<f4", 1), ("i1", [1, 1]), ("u1", [0])), "does not hold 2 indices"),
        (body_of(("<u4", 1), ("<f4", 1), ("i1", [1]), ("u1", [100])), "beyond its 100 entries"),
        (bomb(10**9), "claims 1000000000 bytes where at most"),
    ]
    for spoil, says in lies:
        with pytest.raises(ValueError, match=says):
            codec.decode(spoil(message), W)
    for other in (Codec(), Codec(threshold=51.0)):
        with pytest.raises(ValueError, match="other settings"):
            other.decode(message, W)


def test_messages_without_a_threshold_are_as_they_were() -> None:
    """Their checksum is of the settings that there were before: a run that was begun then can go on."""
    leaves = [("w", (100,), "torch.float32", "parameter")]
    for codec, said in ((Codec(0.05), (0.05, 8, 4096, 32)), (Codec(1.0, 16, 0, 16), (1.0, 16, 0, 16))):
        head = codec.encode(Weights({"w": torch.arange(100.0)}))[0][:HEADER].numpy().tobytes()
        assert head == b"fsc1" + zlib.crc32(repr((said, leaves)).encode()).to_bytes(4, "little")


# -- statistics, bounds, memory --------------------------------------------------------------------------------------


def test_a_statistic_has_no_feedback_and_may_travel_in_16_bits() -> None:
    new = update(0)
    codec = Codec(0.1, statistics=16)
    message, residual = codec.encode(new)
    assert set(residual) == set(learned(new))
    assert torch.equal(codec.decode(message, new.schema)["var"], new["var"].bfloat16().float())
    assert codec.bound(new.schema) == Codec(0.1).bound(new.schema) - 2 * 64


def test_bound_by_hand() -> None:
    schema = Weights({"w": torch.zeros(10_000), "v": torch.zeros(5), "seen": torch.tensor(0)}).schema
    assert Codec(0.01, 8).bound(schema) == 8 + (4 + 100 + 39 + 100 + 4) + (4 + 1 + 0 + 1 + 4) + 8
    assert Codec(1.0, 8).bound(schema) == 8 + (10_000 + 3 * 4) + (5 + 4) + 8  # one byte a value, 4 a scale
    assert Codec(1.0, 16, block=0).bound(schema) == 8 + (20_000 + 4) + (10 + 4) + 8
    assert Codec(1.0, 32).bound(schema) == 8 + 40_000 + 20 + 8


def test_one_percent_in_eight_bits_is_far_smaller() -> None:
    new = update(0, n=1_000_000)
    message, _ = Codec(0.01).encode(new)
    assert 4 * 1_000_000 / len(message) > 150


def test_inputs_stay_and_out_is_used() -> None:
    new, codec = update(0), Codec(0.1)
    first, residual = codec.encode(new)
    before, held = {k: v.clone() for k, v in new.items()}, {k: v.clone() for k, v in residual.items()}
    message, fresh = codec.encode(update(1), residual)
    assert all(torch.equal(residual[k], held[k]) for k in held)
    again, inplace = codec.encode(update(1), residual, out=residual)
    assert torch.equal(message, again)
    assert same(fresh, inplace)
    assert all(inplace[k].data_ptr() == residual[k].data_ptr() for k in held)
    decoded = codec.decode(first, new.schema)
    kept = {k: v.clone() for k, v in decoded.items()}
    out = Weights({k: torch.full_like(v, 7) for k, v in new.items()}, new.kinds)
    other = codec.decode(message, new.schema, out=out)
    assert all(torch.equal(decoded[k], kept[k]) for k in kept)  # a later call left it alone
    assert all(other[k].data_ptr() == out[k].data_ptr() for k in out)
    assert same(other, codec.decode(message, new.schema))
    assert all(torch.equal(new[k], before[k]) for k in before)
    strided = Weights({"w": torch.randn(50, 40).t()})
    back = codec.decode(Codec(0.1).encode(strided)[0], strided.schema)
    assert torch.count_nonzero(back["w"]) == 200


def test_a_residual_waits_for_its_leaf() -> None:
    new, codec = update(0), Codec(0.1)
    _, residual = codec.encode(new)
    _, later = codec.encode(new.only(["a"]), residual)
    assert torch.equal(later["z"], residual["z"])
    assert not torch.equal(later["a"], residual["a"])


def test_order_of_names_does_not_matter() -> None:
    new, codec = update(0), Codec(0.1)
    turned = Weights({k: new[k] for k in reversed(new)}, new.kinds)
    message = codec.encode(new)[0]
    assert torch.equal(codec.encode(turned)[0], message)
    assert list(codec.decode(message, turned.schema)) == list(turned)


@given(
    seed=st.integers(0, 99),
    exponent=st.integers(-44, 38),
    fraction=st.sampled_from([0.001, 0.05, 0.5, 1.0]),
    bits=st.sampled_from([8, 16, 32]),
    block=st.sampled_from([0, 1, 7, 4096]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(max_examples=150, deadline=None)
def test_any_finite_update_comes_back_finite(
    seed: int, exponent: int, fraction: float, bits: int, block: int, dtype: torch.dtype
) -> None:
    most = torch.finfo(dtype).max
    values = np.random.default_rng(seed).normal(size=513) * 10.0**exponent
    new = Weights({"w": torch.from_numpy(values.clip(-most, most)).to(dtype)})
    codec = Codec(fraction, bits, block)
    message, residual = codec.encode(new)
    decoded = codec.decode(message, new.schema)["w"]
    assert decoded.isfinite().all()
    assert residual["w"].isfinite().all()
    assert torch.equal(residual["w"], new["w"].float() - decoded.float())
    assert decoded.float().abs().max() <= new["w"].float().abs().max() * (1 + 2**-7) + 2.0**-126  # the least step


def test_the_largest_values_a_leaf_can_hold_do_not_overflow() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        most = torch.finfo(dtype).max
        new = Weights({"w": torch.tensor([most, -most, 1.0, 0.0], dtype=dtype)})
        for codec in (Codec(1.0), Codec(1.0, 16), Codec(0.5), Codec(1.0, 32)):
            decoded = codec.decode(codec.encode(new)[0], new.schema)["w"]
            assert decoded.isfinite().all()
            assert decoded[0] > 0.9 * most


def deep(message: torch.Tensor, change: Any) -> torch.Tensor:
    """The message with its body changed under a valid header and frame, so that the change gets through."""
    raw = message.numpy().tobytes()
    body = bytearray(zstandard.ZstdDecompressor().decompress(raw[HEADER:]))
    body = change(body)
    return torch.frombuffer(
        bytearray(raw[:HEADER] + zstandard.ZstdCompressor().compress(bytes(body))), dtype=torch.uint8
    )


def mutate(body: bytearray, dice: random.Random) -> bytearray:
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(body)) if body else 0
        match dice.randrange(5):
            case 0:
                body[at : at + 1] = bytes([dice.randrange(256)])
            case 1:
                del body[at : at + dice.randint(1, 9)]
            case 2:
                body[at:at] = bytes(dice.choice([0, 255, 127, 128]) for _ in range(dice.randint(1, 9)))
            case 3:
                body[at : at + 4] = bytes(
                    dice.choice([b"\xff\xff\xff\xff", b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\0\0\0\0"])
                )
            case _:
                del body[at:]
    return body


def test_two_thousand_mutated_messages() -> None:
    """Each gives finite leaves of the schema or one ValueError with a sentence, in little memory."""
    new = update(0, n=3000)
    codecs = (Codec(0.05), Codec(0.2, 16), Codec(0.3, 32), Codec(), Codec(1.0, 32), Codec(threshold=0.01))
    cases = [(c, c.encode(new)[0]) for c in codecs]
    dense = sum(leaf.nbytes for leaf in new.schema.values())
    dice, refused = random.Random(0), list[str]()
    tracemalloc.start()
    for turn in range(2000):
        codec, message = cases[turn % len(cases)]
        if turn % 4:
            bad = deep(message, lambda body: mutate(body, dice))
        else:
            raw = bytearray(message.numpy().tobytes())
            start = dice.choice([0, HEADER])
            bad = torch.frombuffer(raw[:start] + mutate(raw[start:], dice) or bytearray(1), dtype=torch.uint8)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            decoded = codec.decode(bad, new.schema)
        except ValueError as error:
            refused.append(str(error))
        else:
            assert decoded.schema == new.schema
            assert all(v.isfinite().all() for v in decoded.values())
        assert tracemalloc.get_traced_memory()[1] - before < 4 * dense + 500_000
    tracemalloc.stop()
    assert 1000 < len(refused) < 2000
    assert all(text and "\n" not in text for text in refused)


def bomb(size: int) -> Any:
    return lambda message: torch.frombuffer(
        bytearray(message.numpy().tobytes()[:HEADER] + zstandard.ZstdCompressor().compress(bytes(size))),
        dtype=torch.uint8,
    )


def body_of(*parts: tuple[str, Any]) -> Any:
    return lambda message: deep(message, lambda _: bytearray(b"".join(np.array(v, t).tobytes() for t, v in parts)))


W: Schema = Weights({"w": torch.zeros(100)}).schema


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (bomb(10**9), "claims 1000000000 bytes where at most"),
        (lambda m: m[:3], "not in this codec's form"),
        (lambda m: m[:HEADER], "cannot be decompressed|claims"),
        (lambda m: torch.cat([m, m]), "cannot be decompressed"),
        (lambda m: m.float(), "a row of bytes"),
        (body_of(("<u4", 6), ("<f4", 1), ("i1", [1] * 6)), "has 6 entries where at most 5"),
        (body_of(("<u4", 2**32 - 1), ("<f4", 1)), "has 4294967295 entries"),
        (body_of(("<u4", 2), ("<f4", 1), ("i1", [1])), "ends 1 bytes too early"),
        (body_of(("<u4", 2), ("<f4", 1), ("i1", [1, 1]), ("u1", [0])), "does not hold 2 indices"),
        (body_of(("<u4", 1), ("<f4", 1), ("i1", [1]), ("u1", [3, 255])), "does not hold 1 indices"),
        (body_of(("<u4", 1), ("<f4", 1), ("i1", [1]), ("u1", [100])), "beyond its 100 entries"),
        (body_of(("<u4", 2), ("<f4", 1), ("i1", [1, 1]), ("u1", [98, 1])), "beyond its 100 entries"),
        (body_of(("<u4", 1), ("<f4", math.nan), ("i1", [1]), ("u1", [1])), "not a size"),
        (body_of(("<u4", 1), ("<f4", -1), ("i1", [1]), ("u1", [1])), "not a size"),
        (body_of(("<u4", 1), ("<f4", 3e38), ("i1", [1]), ("u1", [1])), "not a size"),
    ],
)
def test_a_message_that_does_not_fit_is_refused_in_a_sentence(spoil: Any, says: str) -> None:
    codec = Codec(0.05)
    message = codec.encode(Weights({"w": torch.arange(100.0)}))[0]
    with pytest.raises(ValueError, match=says):
        codec.decode(spoil(message), W)


@pytest.mark.parametrize(("scales", "fits"), [([1e3, 1.0], True), ([1.0, 1e3], False)], ids=str)
def test_a_scale_is_held_against_its_own_leaf(scales: list[float], fits: bool) -> None:
    """A scale of 1,000 makes 127,000 at most: a float32 leaf holds that, one of float16 (65,504) does not."""
    leaves = Weights({"full": torch.ones(3), "half": torch.ones(2, dtype=torch.float16)})
    codec = Codec(1.0, 8)
    message = body_of(("<f4", scales), ("i1", [1] * 5))(codec.encode(leaves)[0])
    if fits:
        assert codec.decode(message, leaves.schema)["full"].tolist() == [1e3] * 3
    else:
        with pytest.raises(ValueError, match="not a size"):
            codec.decode(message, leaves.schema)


def test_without_parameters_there_are_no_scales() -> None:
    leaves = Weights({"var": torch.tensor([2.0]), "seen": torch.tensor(3)}, KINDS)
    assert same(Codec(0.5).decode(Codec(0.5).encode(leaves)[0], leaves.schema), leaves)


def test_a_message_for_other_leaves_or_settings_is_refused() -> None:
    new = Weights({"w": torch.arange(100.0)})
    message = Codec(0.05).encode(new)[0]
    others: list[tuple[Codec, Schema]] = [
        (Codec(0.06), W),
        (Codec(0.05, 16), W),
        (Codec(0.05), Weights({"v": torch.zeros(100)}).schema),
        (Codec(0.05), Weights({"w": torch.zeros(10, 10)}).schema),
        (Codec(0.05), Weights({"w": torch.zeros(100)}, {"w": Kind.STATISTIC}).schema),
    ]
    for codec, schema in others:
        with pytest.raises(ValueError, match="other leaves or with other settings"):
            codec.decode(message, schema)
    assert Codec(0.05).decode(message, W)["w"][95:].min() > 90


def test_values_that_are_not_finite_are_refused_before_anything_is_written() -> None:
    codec = Codec(0.1)
    for bad in (math.nan, math.inf):
        for name in ("z", "var"):
            _, residual = codec.encode(update(0))
            held = {k: v.clone() for k, v in residual.items()}
            new = update(1)
            new[name].view(-1)[3] = bad
            with pytest.raises(ValueError, match=f"leaf '{name}' of the update has values that are not finite"):
                codec.encode(new, residual, out=residual)
            assert all(torch.equal(residual[k], held[k]) for k in held)
    residual["z"].view(-1)[3] = math.nan
    with pytest.raises(ValueError, match="residual of leaf 'z' has values that are not finite"):
        codec.encode(update(1), residual)
    huge = Weights({"w": torch.full((9,), 3e38)})
    with pytest.raises(ValueError, match="add up to values that are not finite"):
        codec.encode(huge, huge)
    for codec in (Codec(1.0, 32), Codec(0.05, 32)):
        message = codec.encode(Weights({"w": torch.arange(1.0, 101.0)}))[0]
        bad_value = deep(message, lambda body: body.replace(np.float32(100).tobytes(), np.float32("nan").tobytes()))
        with pytest.raises(ValueError, match="leaf 'w' of the message has values that are not finite"):
            codec.decode(bad_value, W)


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda: Codec(0.0), "fraction must be above 0"),
        (lambda: Codec(math.nan), "fraction must be above 0"),
        (lambda: Codec(1.0, 7), "bits must be 8, 16 or 32, not 7"),
        (lambda: Codec(block=-1), "block must be"),
        (lambda: Codec(statistics=8), "statistics must be"),
        (lambda: Codec(threshold=-0.1), "threshold must be 0 or more"),
        (lambda: Codec(threshold=math.nan), "threshold must be 0 or more"),
        (
            lambda: Codec().encode(Weights({"w": torch.zeros(3)}), Weights({"w": torch.zeros(4)})),
            "residual of leaf 'w'",
        ),
        (lambda: Codec().encode(Weights({"w": torch.zeros(3)}), out=Weights({})), "out has no contiguous leaf 'w'"),
        (
            lambda: Codec().encode(Weights({"w": torch.full((3,), 1j)})),
            "is complex",
        ),
    ],
)
def test_wrong_use_is_told(run: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run()


def test_scratch_does_not_limit_the_chunk() -> None:
    """The same message whatever the size of the pieces in which a leaf is worked on."""
    new = update(0)
    wanted = [c.encode(new)[0] for c in (Codec(0.01), Codec(), Codec(1.0, 16, block=100))]
    whole, compress.CHUNK = compress.CHUNK, 1000
    try:
        found = [c.encode(new)[0] for c in (Codec(0.01), Codec(), Codec(1.0, 16, block=100))]
        back = [c.decode(m, new.schema) for c, m in zip((Codec(0.01), Codec()), found, strict=False)]
    finally:
        compress.CHUNK = whole
    assert same(back[1], Codec().decode(wanted[1], new.schema))
    bodies = [
        [zstandard.ZstdDecompressor().decompress(m.numpy().tobytes()[HEADER:]) for m in ms] for ms in (wanted, found)
    ]
    assert bodies[0] == bodies[1]
