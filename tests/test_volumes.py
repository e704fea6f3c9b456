"""Prepared cases as batches: order, patches, memory maps, augmentation, and the same bits however they are read."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Generator

from fedscan.data.augment import Augmentation, augment
from fedscan.data.manifest import Case
from fedscan.data.preprocess import Prepared, Recipe, prepare
from fedscan.data.volumes import TensorSplit, VolumeSplit
from fedscan.site import Batch
from shared import shared

torch.set_num_threads(1)
WILD = Augmentation(elastic=(6.0, 2.0), flip=(0, 1, 2), probability=0.7)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def epoch(split: VolumeSplit | TensorSplit, size: int, order: int = 0, augment: int = 1) -> list[Batch]:
    return list(split.batches(size, seeded(order), seeded(augment)))


def marked(*shapes: tuple[int, int, int], foreground: bool = True) -> list[Prepared]:
    """Cases of two channels whose voxels hold their own place: case * 1e5 + flat index; one voxel of foreground."""
    made = []
    for i, shape in enumerate(shapes):
        image = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape) + 1e5 * i
        label = np.zeros(shape, dtype=np.uint8)
        if foreground:
            label[tuple(n - 2 for n in shape)] = 1 + i % 2
        present = (True, i % 2 == 0)
        image = np.concatenate([image, image * present[1]])
        made.append(Prepared(f"c{i}", f"s{i}", "x", image, label, present, (1.0, 1.0, 1.0), np.eye(4)))
    return made


def on_disk(folder: Path, n: int = 5, dtype: str = "float32") -> list[Prepared]:
    g = np.random.default_rng(0)
    out = []
    for i in range(n):
        image, label = folder / f"{i}.nii.gz", folder / f"{i}-label.nii.gz"
        nib.save(nib.Nifti1Image(g.normal(size=(12, 13, 14)).astype(np.float32), np.eye(4)), image)
        nib.save(nib.Nifti1Image((g.random((12, 13, 14)) > 0.7).astype(np.uint8), np.eye(4)), label)
        recipe = Recipe(("t1", "t2"), dtype=dtype)  # type: ignore[arg-type]
        out.append(prepare(Case(f"c{i}", f"s{i}", "x", {"t1": image, "t2": None}, label), recipe, folder / "cache"))
    return out


def case_of(x: torch.Tensor) -> list[int]:
    """Which case each row of a batch of ``marked`` cases is."""
    return [int(row[0].max() // 1e5) for row in x]


def test_an_epoch_holds_every_case_once_in_the_generators_order_and_the_last_batch_is_smaller() -> None:
    split = VolumeSplit(marked(*[(3, 4, 5)] * 5))
    batches = epoch(split, 2, order=3)
    assert [len(b.x) for b in batches] == [2, 2, 1]
    assert [i for b in batches for i in case_of(b.x)] == torch.randperm(5, generator=seeded(3)).tolist()
    assert batches[0].x.dtype == torch.float32
    assert batches[0].y.dtype == torch.uint8
    for b in batches:
        assert b.present is not None
        assert b.present.tolist() == [[True, i % 2 == 0] for i in case_of(b.x)]
    g = seeded(3)
    first = [case_of(b.x) for b in split.batches(5, g, seeded(0))]
    assert [case_of(b.x) for b in split.batches(5, g, seeded(0))] != first  # the next epoch has an order of its own
    assert (len(split), split.names[4], split.subjects[4]) == (5, "c4", "s4")


def test_a_case_is_whole_and_not_augmented_and_comes_with_what_is_known() -> None:
    cases = marked((3, 4, 5), (6, 4, 5))
    split = VolumeSplit(cases, patch=(2, 2, 2), augmentation=WILD)
    batch, known = split.case(1)
    assert batch.x.shape == (1, 2, 6, 4, 5)
    assert np.array_equal(batch.x[0].numpy(), cases[1].image)
    assert np.array_equal(batch.y[0].numpy(), cases[1].label)  # type: ignore[arg-type]
    assert known is cases[1]


def test_patches_are_cut_from_where_they_say() -> None:
    cases = marked((6, 7, 8), (9, 7, 5))
    seen = set()
    for seed in range(40):
        for b in epoch(VolumeSplit(cases, patch=(4, 4, 4), foreground=0), 2, order=seed):
            for row, i in enumerate(case_of(b.x)):
                start = np.unravel_index(int(b.x[row, 0, 0, 0, 0]) - int(1e5) * i, cases[i].image.shape[1:])
                cut = (slice(None), *(slice(s, s + 4) for s in start))
                assert np.array_equal(b.x[row].numpy(), cases[i].image[cut])
                assert np.array_equal(b.y[row].numpy(), cases[i].label[cut[1:]])  # type: ignore[index]
                seen.add((i, int(start[0])))
    assert {s for i, s in seen if i == 0} == {0, 1, 2}  # every place a patch fits, both ends too
    assert {s for i, s in seen if i == 1} == {0, 1, 2, 3, 4, 5}


def test_a_share_of_patches_is_centred_on_foreground() -> None:
    cases = marked((40, 40, 40), (40, 40, 40), (40, 40, 40))  # the one foreground voxel is rarely in a random patch
    always = VolumeSplit(cases, patch=(5, 5, 5), foreground=1)
    for b in epoch(always, 3):
        assert [int(row.max()) for row in b.y] == [1 + i % 2 for i in case_of(b.x)]
        # the voxel is the last but one along each axis: the patch ends at the border and does not reach beyond it
        assert all(row.nonzero().tolist() == [[3, 3, 3]] for row in b.y)
    split = VolumeSplit(cases, patch=(5, 5, 5), foreground=1 / 3)
    hits = sum(int(row.max() > 0) for seed in range(100) for b in epoch(split, 3, order=seed) for row in b.y)
    assert 75 <= hits <= 125  # 300 patches; a third is 100, and three standard deviations are 24
    middle = marked((11, 11, 11))
    middle[0].label[...] = 0  # type: ignore[index]
    middle[0].label[5, 6, 4] = 1  # type: ignore[index]
    (b,) = epoch(VolumeSplit(middle, patch=(5, 5, 5), foreground=1), 1)
    assert b.y[0].nonzero().tolist() == [[2, 2, 2]]
    (b,) = epoch(
        VolumeSplit(marked((6, 6, 6), foreground=False), patch=(4, 4, 4), foreground=1), 1
    )  # none there: anywhere
    assert b.x.shape == (1, 2, 4, 4, 4)


def test_a_case_smaller_than_the_patch_is_surrounded_by_zeros() -> None:
    (case,) = marked((3, 8, 4))
    case.image[...] = 1
    places = set()
    for seed in range(30):
        (b,) = epoch(VolumeSplit([case], patch=(6, 6, 6), foreground=0), 1, order=seed)
        assert int(b.x[0, 0].sum()) == 3 * 6 * 4
        places.add(int(b.x[0, 0].nonzero()[:, 0].min()))
    assert places == {0, 1, 2, 3}


def test_cases_of_different_sizes_do_not_fit_one_batch() -> None:
    split = VolumeSplit(marked((3, 4, 5), (6, 4, 5)))
    with pytest.raises(ValueError, match="set a patch, a grid"):
        epoch(split, 2)
    assert sorted(b.x.shape[2] for b in epoch(split, 1)) == [3, 6]


def test_unlabelled_cases_and_other_channels_are_refused() -> None:
    (case,) = marked((3, 4, 5))
    bare = Prepared("bare", "s", "x", case.image, None, case.present, case.spacing, case.affine)
    with pytest.raises(ValueError, match="'bare' has no label"):
        VolumeSplit([case, bare])
    one = Prepared("one", "s", "x", case.image[:1], case.label, (True,), case.spacing, case.affine)
    with pytest.raises(ValueError, match="'one' has 1 channels and 'c0' has 2"):
        VolumeSplit([case, one])
    with pytest.raises(ValueError, match="patch must be three"):
        VolumeSplit([case], patch=(4, 4))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("patch", [None, (8, 8, 16)])
def test_kept_in_memory_or_read_from_disk_the_bits_are_the_same(
    tmp_path: Path, patch: tuple[int, int, int] | None, dtype: str
) -> None:
    cases = on_disk(tmp_path, dtype=dtype)
    assert all(isinstance(c.image, np.memmap) for c in cases)
    size = sum(c.image.nbytes + c.label.nbytes for c in cases)  # type: ignore[union-attr]
    disk, memory = (VolumeSplit(cases, patch, WILD, keep=k) for k in (size - 1, size))
    assert disk._kept is None
    assert memory._kept is not None
    for a, b in zip(epoch(disk, 2), epoch(memory, 2), strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y)
    assert torch.equal(disk.case(3)[0].x, memory.case(3)[0].x)


def test_generators_alone_decide_and_augmentation_does_not_move_the_order(tmp_path: Path) -> None:
    split = VolumeSplit(on_disk(tmp_path), (8, 8, 8), WILD)
    one, two = (epoch(split, 2, 5, 6) for _ in range(2))
    assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a.x, b.x) for a, b in zip(one, epoch(split, 2, 5, 7), strict=True))
    plain = epoch(VolumeSplit(split.prepared, (8, 8, 8)), 2, 5, 6)
    drawn = epoch(VolumeSplit(split.prepared, (8, 8, 8), Augmentation(probability=0)), 2, 5, 6)
    assert all(torch.equal(a.x, b.x) for a, b in zip(plain, drawn, strict=True))
    g, h = seeded(5), seeded(5)
    list(split.batches(2, g, seeded(6)))
    list(split.batches(3, h, seeded(9)))
    assert torch.equal(g.get_state(), h.get_state())  # neither batch size nor augmentation moves the order


def test_a_cases_patch_and_augmentation_do_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    split = VolumeSplit(on_disk(tmp_path), (8, 8, 8), WILD)
    alone = torch.cat([b.x for b in epoch(split, 1)])
    together = torch.cat([b.x for b in epoch(split, 5)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)
    assert not together[:, 1].any()  # the absent sequence stays 0 through warp, contrast, brightness and noise
    assert together[:, 0].std() > 0.5


def test_what_is_drawn_is_drawn_for_the_case_with_its_spacing() -> None:
    cases = marked((6, 6, 6), (6, 6, 6))
    (b,) = epoch(VolumeSplit(cases, augmentation=WILD), 2, order=0, augment=4)
    order = torch.randperm(2, generator=seeded(0)).tolist()
    seeds = torch.randint(2**62, (2,), generator=seeded(4)).tolist()
    by_hand = [WILD.draw((6, 6, 6), 2, seeded(seeds[i]), (1.0, 1.0, 1.0)) for i in order]
    x = torch.from_numpy(np.stack([cases[i].image for i in order]))
    y = torch.from_numpy(np.stack([cases[i].label for i in order]))  # type: ignore[arg-type]
    expected = augment(x, y, by_hand, torch.tensor([cases[i].present for i in order]))
    assert torch.equal(b.x, expected[0])
    assert torch.equal(b.y, expected[1])


def test_tensors_in_memory_have_the_same_interface() -> None:
    x, y = torch.randn(5, 1, 4, 6), torch.randint(0, 2, (5, 4, 6))
    split = TensorSplit(x, y, subjects=list("aabbc"))
    batches = epoch(split, 2, order=7)
    order = torch.randperm(5, generator=seeded(7))
    assert torch.equal(torch.cat([b.x for b in batches]), x[order])
    assert torch.equal(torch.cat([b.y for b in batches]), y[order])
    assert [len(b.x) for b in batches] == [2, 2, 1]
    assert (len(split), split.names[1], split.subjects[1]) == (5, "case-1", "a")
    batch, known = split.case(2)
    assert torch.equal(batch.x, x[2:3])
    assert (known.name, known.spacing, known.label.shape) == ("case-2", (1.0, 1.0), (4, 6))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="4 labels"):
        TensorSplit(x, y[:4])


def test_a_real_site_of_hippocampi_in_patches(tmp_path: Path) -> None:
    folder = shared("hippocampus")
    names = [f"hippocampus_{i:03d}.nii.gz" for i in (3, 4, 7)]
    cases = [Case(n, n, "s", {"t1": folder / "images" / n}, folder / "labels" / n) for n in names]
    prepared = [prepare(c, Recipe(("t1",)), tmp_path) for c in cases]
    split = VolumeSplit(prepared, patch=(32, 48, 32), augmentation=Augmentation(), foreground=1)
    (b,) = epoch(split, 3)
    assert b.x.shape == (3, 1, 32, 48, 32)
    assert b.x.isfinite().all()
    assert sorted(b.y.unique().tolist()) == [0, 1, 2]
    assert 0.02 < float((b.y > 0).float().mean()) < 0.15
