"""Segmentation: every voxel gets a class. Loss, prediction of whole cases, and scores against the reader's labels."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedscan.site import Batch, Outputs, Rows, Split
from fedscan.tasks.losses import dice_cross_entropy
from fedscan.tasks.metrics import HD95, RANGES, case_scores, mean_over_labels

TOGETHER = 2  # cases predicted at a time: enough for speed, and a third of what training takes


@dataclass
class Segmentation:
    """Segments volumes or images into classes 0 (background) to ``classes`` - 1.

    networks   by role; "model" takes (B, C, *grid) and gives logits (B, classes, *grid)
    labels     the foreground labels that are scored, each a class or several that together make a region
    loss_of    options of ``dice_cross_entropy``
    window     side lengths of the sliding window with which cases larger than it are predicted; None: whole cases
    tolerance  mm per label for surface Dice; hd95 is the name of the definition to use
    penalty    "image_diagonal": what HD95 is in the scores where one mask is empty; None: undefined
    ignored    the label of voxels that are left out of loss and scores; None: there are none
    """

    networks: Mapping[str, Callable[[], nn.Module]]
    labels: Mapping[str, int | Sequence[int]]
    classes: int
    loss_of: Mapping[str, Any] = field(default_factory=dict)
    window: tuple[int, ...] | None = None
    tolerance: Mapping[str, float] = field(default_factory=dict)
    hd95: str = "hd95"
    penalty: str | None = None
    ignored: int | None = None

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """The least and the largest value of every metric that cases are scored by."""
        return {metric: found for metric, found in RANGES.items() if metric not in HD95 or metric == self.hd95}

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """One forward pass: logits (B, classes, *grid)."""
        return {"logits": model(batch.x)}

    def loss(self, out: Outputs, batch: Batch) -> Tensor:
        """Dice and cross-entropy, as the study weighs them."""
        return dice_cross_entropy(out["logits"], batch.y, ignored=self.ignored, **self.loss_of)

    @torch.no_grad()
    def predict(self, model: nn.Module, x: Tensor) -> NDArray[np.uint8]:
        """The label maps (B, *grid) of cases (B, C, *grid) of one size."""
        model.eval()
        if len(x) == 1 and x.device.type == "cpu":  # torch's fast 3D convolution on one thread needs two
            return self.predict(model, x.expand(2, *x.shape[1:]))[:1]
        if self.window is None or tuple(x.shape[2:]) == tuple(self.window):
            logits = model(x)
        else:
            from monai.inferers import sliding_window_inference  # slow to import, and many studies need none

            logits = sliding_window_inference(x, self.window, 4, model, overlap=0.5, mode="gaussian")
        found: NDArray[np.uint8] = logits.float().argmax(1).to(torch.uint8).cpu().numpy()
        return found

    def scores(self, model: nn.Module, split: Split, site: str, final: bool) -> Rows:
        """Dice of every label of every case; at the end, all metrics."""
        rows: Rows = []
        for i, (found, info) in enumerate(self._scored(model, split, None if final else ("dice",), self.penalty)):
            where = getattr(info, "site", "") or site
            for label, values in found.items():
                rows += [[split.names[i], split.subjects[i], where, label, m, v] for m, v in values.items()]
        return rows

    def quality(self, model: nn.Module, split: Split) -> dict[str, float | None]:
        """Mean Dice and mean HD95 in mm over labels; an HD95 with one mask empty counts as the volume's diagonal."""
        if not len(split):
            return {"dice": None, "hd95": None}
        cases = [found for found, _ in self._scored(model, split, ("dice", self.hd95), "image_diagonal")]
        return {"dice": mean_over_labels(cases, "dice").value, "hd95": mean_over_labels(cases, self.hd95).value}

    def _scored(
        self, model: nn.Module, split: Split, metrics: Sequence[str] | None, penalty: str | None
    ) -> Iterator[tuple[dict[str, dict[str, float | None]], Any]]:
        """Each case's scores, and what is known of it. Cases of one size are predicted a few at a time."""
        waiting: list[tuple[Batch, Any]] = []
        for i in range(len(split)):
            batch, info = split.case(i)
            if waiting and (len(waiting) == TOGETHER or batch.x.shape != waiting[0][0].x.shape):
                yield from self._of(model, waiting, metrics, penalty)
                waiting = []
            waiting.append((batch, info))
        if waiting:
            yield from self._of(model, waiting, metrics, penalty)

    def _of(
        self, model: nn.Module, cases: Sequence[tuple[Batch, Any]], metrics: Sequence[str] | None, penalty: str | None
    ) -> Iterator[tuple[dict[str, dict[str, float | None]], Any]]:
        found = self.predict(model, torch.cat([batch.x for batch, _ in cases]))
        for segmented, (batch, info) in zip(found, cases, strict=True):
            truth = batch.y[0].cpu().numpy()
            spacing = getattr(info, "spacing", None) or (1.0,) * truth.ndim
            scores = case_scores(
                segmented, truth, self.labels, spacing, self.tolerance, self.hd95, penalty, metrics, self.ignored
            )
            yield scores, info

    def diversity(self, split: Split) -> float:
        """The entropy of the foreground classes over a split's voxels, from 0 (one class) to 1 (all alike)."""
        if self.classes <= 2:
            return 1.0  # one foreground class: there is nothing to be diverse in
        counts = np.zeros(self.classes)  # what is ignored is no class
        for i in range(len(split)):
            counts += np.bincount(split.case(i)[0].y.reshape(-1).cpu().numpy(), minlength=self.classes)[: self.classes]
        p = counts[1:] / max(1.0, counts[1:].sum())
        p = p[p > 0]
        return float(-(p * np.log(p)).sum() / np.log(self.classes - 1)) + 0.0
