"""Prepared cases to batches: shuffled, cut into patches, augmented, on the device they are trained on."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from fedscan.data.augment import Augmentation, augment
from fedscan.data.preprocess import Prepared
from fedscan.data.records import IGNORED
from fedscan.site import Batch

Place = tuple[slice, ...]
LANDMARKS = 1024  # foreground voxels remembered per case and class, evenly spaced over it


class VolumeSplit:
    """Prepared cases as batches (B, C, D, H, W), read from disk as they are needed.

    patch         (D, H, W) voxels of which one is cut from each case, 0 where the case is smaller; None: whole cases
    augmentation  drawn for each case, done on ``device``; None: cases as they are
    foreground    the share of patches that are centred on a voxel of a class other than 0, classes equally often
    keep          bytes of images and labels that may stay in the device's memory; a set that is larger is read from
                  disk each time, through the system's own cache. The batches are the same bits.

    Raises ValueError where a case has no label, or another number of channels than the first.
    """

    def __init__(
        self,
        prepared: Sequence[Prepared],
        patch: tuple[int, ...] | None = None,
        augmentation: Augmentation | None = None,
        device: torch.device | str = "cpu",
        foreground: float = 1 / 3,
        keep: int = 0,
    ) -> None:
        if patch is not None and not (len(patch) == 3 and all(n >= 1 for n in patch)):
            raise ValueError(f"patch must be three whole numbers of voxels above 0, along (D, H, W), not {patch}.")
        self.prepared, self.patch, self.augmentation = tuple(prepared), patch, augmentation
        self.device, self.foreground = torch.device(device), foreground
        self.names: Sequence[str] = tuple(p.name for p in prepared)
        self.subjects: Sequence[str] = tuple(p.subject for p in prepared)
        for p in prepared:
            if p.label is None:
                raise ValueError(f"Case {p.name!r} has no label, so it cannot be trained or scored on.")
            if len(p.image) != len(prepared[0].image):
                raise ValueError(
                    f"Case {p.name!r} has {len(p.image)} channels and {self.names[0]!r} has {len(prepared[0].image)}: "
                    "prepare all cases by one recipe."
                )
        size = sum(p.image.nbytes + _label(p).nbytes for p in prepared)
        self._kept = [self._load(p.image, _label(p)) for p in prepared] if size <= keep else None
        self._landmarks = lru_cache(maxsize=None)(self._find_landmarks)

    def __len__(self) -> int:
        return len(self.prepared)

    def batches(self, size: int, order: Generator, augment: Generator) -> Iterator[Batch]:
        """One epoch of batches of ``size`` cases (the last may be smaller), order and patches drawn from ``order``.

        Patches and augmentation are drawn for every case of the split before the first batch, so they depend on the
        generators alone, and neither on the batch's size nor on a case's neighbours. Raises ValueError where whole
        cases of different sizes would have to lie side by side.
        """
        sequence: list[int] = torch.randperm(len(self), generator=order).tolist()
        draws = seeds = None
        if self.patch is not None:
            draws = torch.rand(len(self), 3 + len(self.patch), generator=order, dtype=torch.float64).tolist()
        elif size > 1 and len({p.image.shape for p in self.prepared}) > 1:
            raise ValueError(
                f"Cases have different sizes ({self.names[0]!r} {self.prepared[0].image.shape[1:]}, others differ), so "
                "they do not fit one batch: set a patch, a grid to resample to, or a batch of 1."
            )
        if self.augmentation is not None:
            seeds = torch.randint(2**62, (len(self),), generator=augment).tolist()
        for start in range(0, len(self), size):
            chosen = sequence[start : start + size]
            yield self._augmented(self._batch(chosen, draws), chosen, seeds)

    def case(self, i: int) -> tuple[Batch, Prepared]:
        """Case ``i`` whole and not augmented, as a batch of one on the device; and the case itself."""
        return self._batch([i], None), self.prepared[i]

    def _load(self, image: NDArray[Any], label: NDArray[Any]) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(np.array(image)).to(self.device), torch.from_numpy(np.array(label)).to(self.device)

    def _batch(self, chosen: list[int], draws: list[list[float]] | None) -> Batch:
        """The cases side by side on the device: whole (no draws), or their patches."""
        first = self.prepared[chosen[0]].image
        shape = first.shape[1:] if draws is None or self.patch is None else self.patch
        kind = torch.float16 if first.dtype == np.float16 else torch.float32
        kept, pin = self._kept, self.device.type == "cuda"  # from pinned memory a copy does not wait for the GPU
        where: Any = {"device": self.device} if kept is not None else {"pin_memory": pin}
        new: Any = torch.empty if draws is None else torch.zeros  # a patch may reach beyond its case
        x: Tensor = new((len(chosen), len(first), *shape), dtype=kind, **where)
        y: Tensor = new((len(chosen), *shape), dtype=torch.uint8, **where)
        for row, i in enumerate(chosen):
            corner = (0,) * len(shape) if draws is None else self._corner(i, draws[i])
            here, there = _overlap(shape, self.prepared[i].image.shape[1:], corner)
            if kept is not None:
                _paste(x[row], here, kept[i][0], there)
                _paste(y[row], here, kept[i][1], there)
            else:  # through NumPy, straight from the file's pages into the batch
                _paste(x[row].numpy(), here, self.prepared[i].image, there)
                _paste(y[row].numpy(), here, _label(self.prepared[i]), there)
        present = torch.tensor([self.prepared[i].present for i in chosen], pin_memory=pin)
        x, y, present = (t.to(self.device, non_blocking=True) for t in (x, y, present))
        return Batch(x.float(), y, present)

    def _augmented(self, batch: Batch, chosen: list[int], seeds: list[int] | None) -> Batch:
        if self.augmentation is None or seeds is None:
            return batch
        shape, channels = tuple(batch.x.shape[2:]), batch.x.shape[1]
        drawn = [
            self.augmentation.draw(shape, channels, Generator().manual_seed(seeds[i]), self.prepared[i].spacing)
            for i in chosen
        ]
        x, y = augment(batch.x, batch.y, drawn, batch.present)
        return Batch(x, y, batch.present)

    def _corner(self, i: int, draw: list[float]) -> tuple[int, ...]:
        """Where case ``i``'s patch begins, in its voxels; below 0 where the case is smaller than the patch."""
        assert self.patch is not None
        sizes = self.prepared[i].image.shape[1:]
        ranges = [(min(0, n - p), max(0, n - p)) for n, p in zip(sizes, self.patch, strict=True)]
        marks = self._landmarks(i) if draw[0] < self.foreground else []
        if not marks:
            return tuple(low + int(u * (high - low + 1)) for u, (low, high) in zip(draw[3:], ranges, strict=True))
        of_class = marks[int(draw[1] * len(marks))]
        centre = np.unravel_index(of_class[int(draw[2] * len(of_class))], sizes)
        wanted = [int(c) - p // 2 for c, p in zip(centre, self.patch, strict=True)]
        return tuple(min(max(w, low), high) for w, (low, high) in zip(wanted, ranges, strict=True))

    def _find_landmarks(self, i: int) -> list[NDArray[np.int64]]:
        """For each class of case ``i`` other than 0, the flat indices of some of its voxels."""
        flat = np.asarray(_label(self.prepared[i])).ravel()
        marks = []
        for label in np.flatnonzero(np.bincount(flat)).tolist():
            if label in (0, IGNORED):
                continue
            where = np.flatnonzero(flat == label)
            marks.append(where[:: max(1, len(where) // LANDMARKS)])
        return marks


class TensorSplit:
    """Cases that lie in memory as tensors: x (N, C, *spatial) and y (N, *spatial) or (N,), not augmented.

    For toys, benchmarks and images in two dimensions. A case's description has a spacing of 1 along each axis.
    """

    def __init__(
        self, x: Tensor, y: Tensor, names: Sequence[str] | None = None, subjects: Sequence[str] | None = None
    ) -> None:
        self.x, self.y = x, y
        self.names: Sequence[str] = tuple(names if names is not None else (f"case-{i}" for i in range(len(x))))
        self.subjects: Sequence[str] = tuple(subjects if subjects is not None else self.names)
        if not len(x) == len(y) == len(self.names) == len(self.subjects):
            raise ValueError(
                f"{len(x)} images, {len(y)} labels, {len(self.names)} names and {len(self.subjects)} subjects: one of "
                "each per case was expected."
            )

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, size: int, order: Generator, augment: Generator) -> Iterator[Batch]:
        """One epoch of batches of ``size`` cases (the last may be smaller), in an order drawn from ``order``."""
        shuffled = torch.randperm(len(self), generator=order)
        for start in range(0, len(self), size):
            rows = shuffled[start : start + size].to(self.x.device)
            yield Batch(self.x[rows], self.y[rows], None)

    def case(self, i: int) -> tuple[Batch, Prepared]:
        """Case ``i`` as a batch of one, and its description."""
        x, y = self.x[i : i + 1], self.y[i : i + 1]
        axes = x.dim() - 2
        known = Prepared(
            self.names[i],
            self.subjects[i],
            "",
            x[0].cpu().numpy(),
            y[0].cpu().numpy(),
            (True,) * x.shape[1],
            (1.0,) * axes,
            np.eye(axes + 1),
        )
        return Batch(x, y, None), known


def _label(prepared: Prepared) -> NDArray[Any]:
    assert prepared.label is not None
    return prepared.label


def _paste(target: Any, here: Place, source: Any, there: Place) -> None:
    """Copies a part of one array or tensor into a part of another, all channels at once."""
    target[(..., *here)] = source[(..., *there)]


def _overlap(patch: Sequence[int], size: Sequence[int], corner: Sequence[int]) -> tuple[Place, Place]:
    """Where patch and case meet, as slices of the patch and of the case."""
    here, there = [], []
    for p, n, start in zip(patch, size, corner, strict=True):
        low, high = max(0, start), min(n, start + p)
        here.append(slice(low - start, high - start))
        there.append(slice(low, high))
    return tuple(here), tuple(there)
