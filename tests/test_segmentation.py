"""The segmentation task: whole cases, windows, mixed sizes, and scores that add up."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedscan.site import Batch
from fedscan.tasks.segmentation import Segmentation

torch.set_num_threads(1)


class Threshold(nn.Module):
    """A voxel is of class 1 above 0.5 and of class 2 above 1.5."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([0.25 - x, 0.25 - (x - 1).abs(), x - 1.75], 1)


class Cases:
    """A split of label maps that are their own images, some of which are of another size."""

    def __init__(self, *labels: np.ndarray, sites: tuple[str, ...] = ()) -> None:
        self.labels, self.sites = labels, sites or ("",) * len(labels)
        self.names = self.subjects = [f"case-{i}" for i in range(len(labels))]

    def __len__(self) -> int:
        return len(self.labels)

    def case(self, i: int) -> tuple[Batch, Any]:
        y = torch.from_numpy(self.labels[i])
        return Batch(y[None, None].float(), y[None]), SimpleNamespace(spacing=(1.0, 1.0, 2.0), site=self.sites[i])


def task(**changes: Any) -> Segmentation:
    return Segmentation({"model": Threshold}, {"one": 1, "two": 2, "both": (1, 2)}, 3, **changes)


def maps(*shapes: tuple[int, int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 3, shape).astype(np.uint8) for shape in shapes]


@pytest.mark.parametrize("window", [None, (4, 4, 4), (6, 5, 4), (16, 16, 16)])
def test_every_case_is_predicted_whole_whatever_its_size(window: tuple[int, ...] | None) -> None:
    labels = maps((6, 5, 4), (6, 5, 4), (6, 5, 4), (7, 7, 7), (6, 5, 4))
    rows = task(window=window).scores(Threshold(), Cases(*labels), "A", final=False)
    assert len(rows) == 5 * 3
    assert all(row[2] == "A" and row[4:] == ["dice", 1.0] for row in rows)
    assert [row[0] for row in rows[::3]] == [f"case-{i}" for i in range(5)]


def test_each_case_is_held_against_its_own_label() -> None:
    """Cases that are predicted together do not get each other's scores."""
    good, other = maps((4, 4, 4), (4, 4, 4))

    class Off(Cases):
        def case(self, i: int) -> tuple[Batch, Any]:
            batch, info = super().case(i)
            return (Batch(batch.x, torch.from_numpy(other)[None]) if i == 1 else batch), info

    split = Off(good, good, good, sites=("A", "B", ""))
    rows = task().scores(Threshold(), split, "pooled", final=True)
    dice = {(row[0], row[3]): row[5] for row in rows if row[4] == "dice"}
    expected = 2 * ((good == 1) & (other == 1)).sum() / ((good == 1).sum() + (other == 1).sum())
    assert dice["case-1", "one"] == pytest.approx(expected)
    assert dice["case-0", "one"] == dice["case-2", "one"] == 1.0
    assert {row[2] for row in rows} == {"A", "B", "pooled"}
    assert {row[4] for row in rows} >= {"dice", "iou", "hd95", "precision", "recall", "volume_error"}


def test_quality_counts_a_missed_structure_by_the_diagonal() -> None:
    label = np.zeros((4, 4, 4), np.uint8)
    label[1, 1, 1] = 1

    class Blind(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.ones_like(x), torch.zeros_like(x), torch.zeros_like(x)], 1)

    found = Segmentation({"model": Blind}, {"one": 1}, 3).quality(Blind(), Cases(label))
    assert found == {"dice": 0.0, "hd95": pytest.approx((16 + 16 + 64) ** 0.5)}
    assert task().quality(Threshold(), Cases()) == {"dice": None, "hd95": None}


def test_a_penalty_stands_in_the_scores_where_a_study_sets_it() -> None:
    label = np.zeros((4, 4, 4), np.uint8)
    label[1, 1, 1] = 1
    other = np.full((4, 4, 4), 2, np.uint8)

    class Off(Cases):
        def case(self, i: int) -> tuple[Batch, Any]:
            batch, info = super().case(i)
            return Batch(torch.from_numpy(other)[None, None].float(), batch.y), info

    def hd95(**changes: Any) -> dict[str, float | None]:
        rows = task(**changes).scores(Threshold(), Off(label), "A", final=True)
        return {row[3]: row[5] for row in rows if row[4] == "hd95"}

    found = hd95(penalty="image_diagonal")
    assert found["one"] == found["two"] == pytest.approx((16 + 16 + 64) ** 0.5)
    assert found["both"] is not None
    assert found["both"] < found["one"], "neither mask of the region is empty"
    assert (hd95()["one"], hd95()["two"]) == (None, None)


def test_what_is_ignored_counts_neither_in_loss_nor_in_scores() -> None:
    good, other = maps((4, 4, 4), (4, 4, 4))
    other[:, :2] = good[:, :2]
    hidden = other.copy()
    hidden[:, 2:] = 255

    class Hidden(Cases):
        def case(self, i: int) -> tuple[Batch, Any]:
            batch, info = super().case(i)
            return Batch(batch.x, torch.from_numpy(hidden)[None]), info

    asked, split = task(ignored=255), Hidden(good)
    dice = {row[3]: row[5] for row in asked.scores(Threshold(), split, "A", final=True) if row[4] == "dice"}
    assert dice == {"one": 1.0, "two": 1.0, "both": 1.0}, "the half that was judged is right"
    assert asked.quality(Threshold(), split) == {"dice": 1.0, "hd95": 0.0}
    batch, _ = split.case(0)
    loss = asked.loss(asked.outputs(Threshold(), batch), batch)
    half = Batch(batch.x[:, :, :, :2], batch.y[:, :, :2])
    torch.testing.assert_close(loss, task().loss(task().outputs(Threshold(), half), half))
    assert asked.diversity(split) == pytest.approx(task().diversity(Cases(good[:, :2])))


def test_diversity_is_the_entropy_of_the_foreground() -> None:
    label = np.zeros((4, 1, 1), np.uint8)
    label[:, 0, 0] = [0, 1, 1, 2]
    expected = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3)) / np.log(2)
    assert task().diversity(Cases(label)) == pytest.approx(expected)
    assert task().diversity(Cases(np.ones((2, 2, 2), np.uint8))) == 0.0
    assert Segmentation({"model": Threshold}, {"one": 1}, 2).diversity(Cases(label)) == 1.0
