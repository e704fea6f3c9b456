"""Arithmetic on weights: by kind, exact where it can be, and the same bits however the trees arrive."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan import trees
from fedscan.schema import Kind, Weights
from fedscan.trees import BLOCK, SMALL, Fold

torch.set_num_threads(1)

KINDS = {"w": Kind.PARAMETER, "b": Kind.PARAMETER, "var": Kind.STATISTIC, "seen": Kind.COUNTER}


def tree(w: list[float], b: float, var: float, seen: int, **dtypes: torch.dtype) -> Weights:
    leaves = {"w": torch.tensor(w), "b": torch.tensor([[b]]), "var": torch.tensor(var), "seen": torch.tensor(seen)}
    return Weights({k: v.to(dtypes.get(k, v.dtype)) for k, v in leaves.items()}, KINDS)


def draw(seed: int, sizes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Weights:
    g = torch.Generator().manual_seed(seed)
    leaves = {k: torch.randn(s, generator=g).to(dtype) for k, s in sizes.items()}
    leaves["seen"] = torch.randint(0, 99, (), generator=g)
    return Weights(leaves, {"seen": Kind.COUNTER})


def same(a: Weights, b: Weights) -> bool:
    return list(a) == list(b) and a.kinds == b.kinds and all(torch.equal(a[k], b[k]) for k in a)


A = tree([1.0, 2.0], 3.0, 4.0, 10)
B = tree([0.5, -2.0], 1.0, 5.0, 7)


def test_each_operation_by_kind() -> None:
    assert same(trees.sub(A, B), tree([0.5, 4.0], 2.0, -1.0, 3))
    assert same(trees.add(A, B, 2.0), tree([2.0, -2.0], 5.0, 14.0, 17))  # the counter moves by 7, not by 14
    assert same(trees.scale(A, 0.5), tree([0.5, 1.0], 1.5, 2.0, 10))
    assert same(trees.zeros(A), tree([0.0, 0.0], 0.0, 0.0, 0))
    assert trees.norm(A) == pytest.approx(math.sqrt(1 + 4 + 9))  # parameters only: not the variance of 4
    assert trees.dot(A, B) == pytest.approx(0.5 - 4.0 + 3.0)
    assert same(trees.add(B, trees.sub(A, B)), A)


def test_a_partial_tree_moves_only_its_names() -> None:
    moved = trees.add(A, B.only(["w"]), 2.0)
    assert same(moved, tree([2.0, -2.0], 3.0, 4.0, 10))
    assert list(trees.sub(A, B.only(["b"]))) == ["b"]


def test_nothing_is_mutated_and_nothing_is_shared() -> None:
    a, b = trees.copy(A), trees.copy(B)
    results = [trees.copy(a), trees.sub(a, b), trees.add(a, b.only(["w"])), trees.scale(a, 1.0), trees.zeros(a)]
    results += [trees.mean([a, b], [1, 2]), trees.mean([a], [1]), trees.median([a, b]), trees.median([a])]
    fold = Fold(a.schema)
    fold.add(a, 1.0)
    results.append(fold.result())
    for result in results:
        for leaf in result.values():
            leaf.fill_(77)
    assert same(a, A)
    assert same(b, B)


def test_mean_and_median_by_hand() -> None:
    c = tree([3.0, 3.0], -1.0, 6.0, 9)
    merged = trees.mean([A, B, c], [1, 1, 2])
    assert merged["w"].tolist() == [(1 + 0.5 + 6) / 4, (2 - 2 + 6) / 4]
    assert merged["var"].item() == (4 + 5 + 12) / 4
    assert merged["seen"].item() == 10
    assert same(trees.median([A, B, c]), tree([1.0, 2.0], 1.0, 5.0, 10))
    assert same(trees.median([A, B]), tree([0.75, 0.0], 2.0, 4.5, 10))  # even: the mean of the middle two


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 13])
def test_median_is_numpys(count: int) -> None:
    many = [draw(seed, {"w": (3, 7), "b": (trees.CHUNK + 3,)}) for seed in range(count)]
    found = trees.median(many)
    for name in ("w", "b"):
        stack = np.stack([t[name].numpy() for t in many])
        assert np.array_equal(found[name].numpy(), np.median(stack, axis=0))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_a_value_that_is_not_a_number_stays_so(count: int) -> None:
    for bad in range(count):
        many = [draw(seed, {"w": (4,)}) for seed in range(count)]
        many[bad]["w"][1] = math.nan
        for merged in (trees.mean(many, [1.0] * count), trees.median(many)):
            assert torch.isnan(merged["w"]).tolist() == [False, True, False, False]


@given(
    shares=st.lists(st.floats(0.0, 1e6) | st.just(0.0), min_size=1, max_size=7).filter(lambda s: sum(s) > 0),
    value=st.floats(-(2.0**100), 2.0**100, width=32),
)
@settings(max_examples=200, deadline=None)
def test_equal_trees_give_exactly_themselves(shares: list[float], value: float) -> None:
    one = Weights({"w": torch.full((5,), value), "n": torch.tensor(3)})
    assert same(trees.mean([one] * len(shares), shares), one)


@given(
    shares=st.lists(st.floats(0.0, 1e4), min_size=2, max_size=8).filter(lambda s: sum(s) > 1e-3),
    seed=st.integers(0, 999),
)
@settings(max_examples=100, deadline=None)
def test_mean_is_numpys_to_rounding(shares: list[float], seed: int) -> None:
    many = [draw(seed + k, {"w": (50,)}) for k in range(len(shares))]
    merged = trees.mean(many, shares)["w"].numpy()
    wanted = np.average(np.stack([t["w"].double().numpy() for t in many]), axis=0, weights=shares)
    assert np.abs(merged - wanted).max() < 2e-6
    scaled = trees.mean(many, [4 * s for s in shares])["w"].numpy()  # raw shares: cases or fractions alike
    assert np.array_equal(scaled, merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_streaming_and_resident_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        "tiny": (3,),
        "scalar": (),
        "empty": (0, 4),
        "odd": (1001, 7),
        "middle": (SMALL + 1,),
        "large": (BLOCK + 12_345,),
    }
    many = [draw(seed, sizes, dtype) for seed in range(4)]
    shares = [3.0, 10.0, 0.0, 7.5]  # the second pulls by more than half, where lerp has another formula
    resident = trees.mean(many, shares)
    whole, leafwise = Fold(many[0].schema), Fold(many[0].schema)
    for t, share in zip(many, shares, strict=True):
        whole.add(t, share)
        leafwise.add(((k, t[k].clone()) for k in reversed(t)), share)
    assert same(whole.result(), resident)
    assert same(leafwise.result(), resident)
    monkeypatch.setattr(trees, "BLOCK", 1000)
    assert same(trees.mean(many, shares), resident)
    torch.set_num_threads(2)
    assert same(trees.mean(many, shares), resident)
    torch.set_num_threads(1)
    assert {v.dtype for k, v in resident.items() if k != "seen"} == {dtype}


def test_strided_leaves_give_the_same_bits() -> None:
    many = [draw(seed, {"w": (4, 5, 6, 7, 3)}) for seed in range(3)]
    strided = [
        Weights({k: v.to(memory_format=torch.channels_last_3d) if v.dim() == 5 else v for k, v in t.items()})
        for t in many
    ]
    assert not strided[0]["w"].is_contiguous()
    assert same(trees.mean(strided, [1, 3, 2]), trees.mean(many, [1, 3, 2]))
    assert same(trees.median(strided), trees.median(many))
    fold = Fold(many[0].schema)
    for t, share in zip(strided, [1, 3, 2], strict=True):
        fold.add(t, share)
    assert same(fold.result(), trees.mean(many, [1, 3, 2]))


def test_low_precision_is_summed_in_float32() -> None:
    many = [Weights({"w": torch.full((3,), 1.0 if k else 256.0, dtype=torch.bfloat16)}) for k in range(129)]
    merged = trees.mean(many, [1] * 129)["w"]
    assert merged.tolist() == [torch.tensor((256 + 128) / 129).bfloat16().item()] * 3


def test_statistics_stay_positive_and_change_no_kind() -> None:
    merged = trees.mean([tree([1.0], 0.0, 1e-8, 1), tree([1.0], 0.0, 1e4, 2)], [1e6, 1])
    assert merged["var"] > 0
    assert merged.kinds == KINDS


def test_norm_and_dot_hold_for_long_leaves_and_any_threads() -> None:
    long = Weights({"w": torch.randn(300_001, generator=torch.Generator().manual_seed(0)) * 3})
    wanted = float(np.linalg.norm(long["w"].double().numpy()))
    assert trees.norm(long) == pytest.approx(wanted, rel=1e-6)
    assert trees.dot(long, long) == pytest.approx(wanted**2, rel=1e-6)
    one = trees.norm(long), trees.dot(long, long)
    torch.set_num_threads(2)
    two = trees.norm(long), trees.dot(long, long)
    torch.set_num_threads(1)
    assert one == two
    assert trees.norm(Weights({})) == 0.0


def bad_fold(leaves: Any, share: float = 1.0) -> None:
    Fold(A.schema).add(leaves, share)


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda: trees.mean([], []), "no tree"),
        (lambda: trees.median([]), "no tree"),
        (lambda: trees.mean([A, B], [1]), "2 trees came with 1 shares"),
        (lambda: trees.mean([A, B], [1, -1]), "not negative, not -1"),
        (lambda: trees.mean([A, B], [1, math.nan]), "finite"),
        (lambda: trees.mean([A, B], [0, 0]), "above zero"),
        (lambda: trees.mean([A, B.only(["w"])], [1, 1]), "tree 1 has other leaves than tree 0, such as 'b'"),
        (lambda: trees.median([A, tree([1.0], 1.0, 1.0, 1)]), r"tree 1: leaf 'w' is \[1\]"),
        (lambda: trees.sub(A, tree([1.0], 1.0, 1.0, 1)), r"leaf 'w' is \[1\] in one tree, \[2\] in the other"),
        (lambda: trees.sub(A.only(["w"]), A), "'b' is missing"),
        (lambda: trees.dot(A, B.only(["w"])), "'b' is missing"),
        (lambda: bad_fold(A.only(["w", "var"])), "2 leaves are missing, the first is 'b'"),
        (lambda: bad_fold([*A.items(), ("w", A["w"])]), "'w' came twice"),
        (lambda: bad_fold([("x", A["w"])]), "'x' is not in the schema"),
        (lambda: bad_fold({**A, "w": A["w"].double()}), "torch.float64 where"),
        (lambda: bad_fold(A, math.inf), "finite"),
        (lambda: Fold(A.schema).result(), "above zero"),
        (lambda: Fold(tree([1.0], 1, 1.0, 1).schema), "'b' is a parameter of torch.int64"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(run: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run()


def test_a_fold_that_broke_off_gives_no_mean() -> None:
    fold = Fold(A.schema)
    fold.add(A, 1.0)
    with pytest.raises(ValueError, match="missing"):
        fold.add(B.only(["w"]), 1.0)
    with pytest.raises(ValueError, match="in half"):
        fold.result()
