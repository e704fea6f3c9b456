"""Augmentation: where a known image lands, what stays exact, and what a case's parameters depend on."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedscan.data.augment import Augmentation, Intensity, Parameters, affine, augment, lattice

torch.set_num_threads(1)


def random(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A batch of noise (B, C, *spatial) with labels 0 to 2."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g), torch.randint(0, 3, (shape[0], *shape[2:]), generator=g, dtype=torch.uint8)


def turned(shape: tuple[int, ...], *angles: float, **more: object) -> Parameters:
    return Parameters(warp=affine(lattice(shape), shape, angles, **more))  # type: ignore[arg-type]


def drawn(a: Augmentation, shape: tuple[int, ...], seed: int, channels: int = 1) -> Parameters:
    return a.draw(shape, channels, torch.Generator().manual_seed(seed))


# what rot90 must do: from axis a to axis b, as the docstring of `affine` says
@pytest.mark.parametrize(("angles", "axes"), [((90, 0, 0), (1, 2)), ((0, 90, 0), (2, 0)), ((0, 0, 90), (0, 1))])
def test_a_quarter_turn_lands_where_rot90_puts_it(angles: tuple[int, ...], axes: tuple[int, int]) -> None:
    x, y = random((2, 2, 9, 9, 9))
    a, b = augment(x, y, [turned((9, 9, 9), *angles)] * 2)
    torch.testing.assert_close(a, torch.rot90(x, 1, [d + 2 for d in axes]), atol=1e-4, rtol=0)
    assert torch.equal(b, torch.rot90(y, 1, [d + 1 for d in axes]))


def test_a_quarter_turn_of_one_voxel_by_hand_in_two_dimensions() -> None:
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 4, 2] = 1  # 2 from the centre along axis 0; turned from axis 0 to axis 1 it lies 2 along axis 1
    a, b = augment(x, x[:, 0].to(torch.uint8), [turned((5, 5), 90)])
    assert float(a[0, 0, 2, 4]) == pytest.approx(1, abs=1e-5)
    assert b[0].nonzero().tolist() == [[2, 4]]


def test_turns_follow_one_another_about_w_then_h_then_d() -> None:
    x, y = random((1, 1, 7, 7, 7))
    a, _ = augment(x, y, [turned((7, 7, 7), 90, 90, 90)])
    by_hand = torch.rot90(torch.rot90(torch.rot90(x, 1, [2, 3]), 1, [4, 2]), 1, [3, 4])
    torch.testing.assert_close(a, by_hand, atol=1e-4, rtol=0)


def test_shift_moves_content_forward_and_the_border_goes_on() -> None:
    x = torch.arange(6.0).reshape(1, 1, 6, 1).expand(1, 1, 6, 4).contiguous()
    a, _ = augment(x, x[:, 0].to(torch.uint8), [turned((6, 4), 0, shift=(2.0, 0.0))])
    assert torch.allclose(a[0, 0, :, 1], torch.tensor([0.0, 0, 0, 1, 2, 3]), atol=1e-5)


def test_scale_doubles_distances_from_the_centre() -> None:
    x = torch.arange(-4.0, 5.0).reshape(1, 1, 9, 1).expand(1, 1, 9, 3).contiguous()
    a, _ = augment(x, torch.zeros(1, 9, 3, dtype=torch.uint8), [turned((9, 3), 0, scale=2.0)])
    assert torch.allclose(a[0, 0, :, 1], torch.arange(-4.0, 5.0) / 2, atol=1e-5)


def test_a_turn_is_rigid_in_mm_where_voxels_are_not_cubes() -> None:
    # voxels of 2 x 1 mm: a point 4 mm along axis 0 (2 voxels) lies, after a quarter turn, 4 mm along axis 1 (4 voxels)
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 6, 4] = 1
    _, b = augment(x, x[:, 0].to(torch.uint8), [turned((9, 9), 90, spacing=(2.0, 1.0))])
    assert [4, 8] in b[0].nonzero().tolist()
    assert [4, 6] not in b[0].nonzero().tolist()


def test_the_spline_gives_back_linear_functions_so_no_turn_changes_nothing() -> None:
    x, y = random((1, 2, 10, 12, 7))
    still = Parameters(warp=lattice((10, 12, 7), 3.0))
    a, b = augment(x, y, [still])
    torch.testing.assert_close(a, x, atol=2e-5, rtol=0)
    assert torch.equal(b, y)


def test_elastic_displacement_is_the_cubic_b_spline_worked_out_in_numpy() -> None:
    """One control point of the lattice of a ramp is moved by 1 along axis 0; B3 is the cubic B-spline's bump."""
    n, step = 12, 3.0
    warp = lattice((n, n), step)
    warp[0, 3, 4] += 1.0  # its own place is (3 - 1) * 3 - 0.5 = 5.5 along axis 0 and 8.5 along axis 1
    ramp = torch.arange(float(n)).reshape(1, 1, n, 1).expand(1, 1, n, n).contiguous()
    a, _ = augment(ramp, torch.zeros(1, n, n, dtype=torch.uint8), [Parameters(warp=warp)])

    def b3(t: np.ndarray) -> np.ndarray:
        t = np.abs(t)
        return np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.where(t < 2, (2 - t) ** 3 / 6, 0))

    v = np.arange(n)
    bump = np.outer(b3((v - 5.5) / step), b3((v - 8.5) / step))
    expected = np.clip(v[:, None] + bump, 0, n - 1)
    np.testing.assert_allclose(a[0, 0].numpy(), expected, atol=1e-5)


def test_flips_are_exact_and_only_where_drawn() -> None:
    x, y = random((3, 2, 4, 5, 6))
    a, b = augment(x, y, [Parameters(flips=(0, 2)), Parameters(), Parameters(flips=(2,))])
    assert torch.equal(a[0], x[0].flip(1, 3))
    assert torch.equal(b[0], y[0].flip(0, 2))
    assert torch.equal(a[1], x[1])
    assert torch.equal(a[2], x[2].flip(3))
    assert torch.equal(b[2], y[2].flip(2))


def test_nothing_drawn_keeps_the_bits_and_the_input_is_never_changed() -> None:
    x, y = random((2, 1, 8, 8, 8))
    before = x.clone(), y.clone()
    a, b = augment(x, y, [Parameters(), Parameters()])
    assert torch.equal(a, x)
    assert torch.equal(b, y)
    c, _ = augment(x, y, [Parameters(), drawn(Augmentation(probability=1), (8, 8, 8), 1)])
    assert torch.equal(c[0], x[0])
    assert not torch.equal(c[1], x[1])
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert drawn(Augmentation(probability=0), (8, 8), 0).warp is None


@pytest.mark.parametrize("shape", [(48, 48), (32, 32, 32)])
def test_label_and_image_stay_aligned(shape: tuple[int, ...]) -> None:
    """A ball warped as an image and cut at a half is the ball warped as a label (Dice above 0.95)."""
    centre = torch.stack(torch.meshgrid(*(torch.arange(n) - 0.45 * n for n in shape), indexing="ij"))
    ball = (centre.pow(2).sum(0).sqrt() < shape[0] / 4).to(torch.uint8)[None]
    a = Augmentation(probability=1, intensity=None, elastic=(12.0, 4.0), flip=(0, -1))
    moved = 0
    for seed in range(5):
        x, y = augment(ball[:, None].float(), ball, [drawn(a, shape, seed)])
        cut = x[0, 0] >= 0.5
        dice = 2 * (cut & (y[0] == 1)).sum() / (cut.sum() + (y[0] == 1).sum())
        assert dice > 0.95
        overlap = 2 * (ball[0] & y[0]).sum() / (ball.sum() + y.sum())
        moved += bool(overlap < 0.95)
    assert moved >= 3  # or the test would pass without any warp


def test_intensity_by_hand() -> None:
    x = torch.tensor([0.0, 1, 2, 4]).reshape(1, 1, 2, 2).repeat(1, 2, 1, 1)
    bend = torch.tensor([[2.0, 1.0], [1.0, 2.0], [0.5, 0.0], [0.0, 0.0]], dtype=torch.float64)  # one column per channel
    a, _ = augment(x, torch.zeros(1, 2, 2), [Parameters(intensity=bend)])
    # channel 0: (x / 4)^2 * 4 + 0.5; channel 1: 2 (x - mean) + mean with mean 7 / 4
    assert torch.allclose(a[0, 0].ravel(), torch.tensor([0.5, 0.75, 1.5, 4.5]))
    assert torch.allclose(a[0, 1].ravel(), torch.tensor([-1.75, 0.25, 2.25, 6.25]))


def test_noise_has_the_drawn_standard_deviation_and_absent_channels_stay_zero() -> None:
    x = torch.zeros(1, 2, 40, 40)
    x[0, 0] = torch.linspace(-1, 1, 1600).reshape(40, 40)
    bend = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.3, 0.3], [0.2, 0.2]])
    p = Parameters(intensity=bend, seed=5)
    a, _ = augment(x, torch.zeros(1, 40, 40), [p], torch.tensor([[True, False]]))
    noise = a[0, 0] - x[0, 0] - 0.3
    assert float(noise.std()) == pytest.approx(0.2, rel=0.06)
    assert abs(float(noise.mean())) < 0.02
    assert torch.equal(a[0, 1], x[0, 1])
    assert torch.equal(a, augment(x, torch.zeros(1, 40, 40), [p], torch.tensor([[True, False]]))[0])
    other, _ = augment(x, torch.zeros(1, 40, 40), [Parameters(intensity=bend, seed=6)])
    assert abs(float(torch.corrcoef(torch.stack([noise.ravel(), (other[0, 0] - x[0, 0]).ravel()]))[0, 1])) < 0.1


def test_parameters_are_drawn_within_their_ranges() -> None:
    a = Augmentation(rotate=30, elastic=None, shift=0.1, scale=(0.8, 1.25), probability=1, flip=(-1,))
    g = torch.Generator().manual_seed(0)
    scales, angles = [], []
    for _ in range(200):
        p = a.draw((20, 10), 3, g)
        assert p.warp is not None
        # the map is linear: its matrix stands in the differences between neighbouring control points
        still = lattice((20, 10))
        inverse = torch.stack(
            [
                (p.warp[:, 1, 0] - p.warp[:, 0, 0]) / (still[0, 1, 0] - still[0, 0, 0]),
                (p.warp[:, 0, 1] - p.warp[:, 0, 0]) / (still[1, 0, 1] - still[1, 0, 0]),
            ],
            1,
        )
        scales.append(1 / math.sqrt(float(torch.linalg.det(inverse))))
        angles.append(math.degrees(math.atan2(float(inverse[0, 1]), float(inverse[0, 0]))))
        assert p.flips == (1,)
        assert p.intensity is not None
        gamma, contrast, brightness, noise = p.intensity
        assert ((gamma >= 0.7) & (gamma <= 1.5)).all()
        assert ((contrast >= 0.75) & (contrast <= 1.25)).all()
        assert (brightness.abs() <= 0.1).all()
        assert ((noise >= 0) & (noise <= 0.1)).all()
    assert min(scales) >= 0.8 - 1e-9
    assert max(scales) <= 1.25 + 1e-9
    assert max(scales) - min(scales) > 0.4
    assert -30 - 1e-9 <= min(angles) < -25
    assert 25 < max(angles) <= 30 + 1e-9


def test_the_same_generator_gives_the_same_case_and_another_does_not() -> None:
    x, y = random((1, 2, 12, 12, 12))
    a = Augmentation(probability=1)
    one, two, other = (augment(x, y, [drawn(a, (12, 12, 12), s, 2)]) for s in (3, 3, 4))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])


def test_a_case_alone_is_the_same_case_among_others() -> None:
    x, y = random((4, 2, 12, 10, 8))
    a = Augmentation(probability=0.6)
    each = [drawn(a, (12, 10, 8), s, 2) for s in range(4)]
    together = augment(x, y, each)
    for i in range(4):
        alone = augment(x[i : i + 1], y[i : i + 1], each[i : i + 1])
        torch.testing.assert_close(together[0][i], alone[0][0], atol=1e-5, rtol=1e-5)
        assert torch.equal(together[1][i], alone[1][0])


def test_as_many_numbers_are_drawn_whatever_comes_out() -> None:
    ends = []
    for probability in (0.0, 1.0):
        g = torch.Generator().manual_seed(1)
        Augmentation(probability=probability).draw((16, 16, 16), 1, g)
        ends.append(float(torch.rand(1, generator=g)))
    assert ends[0] == ends[1]


def test_bad_ranges_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="fold the image"):
        Augmentation(elastic=(8.0, 4.0))
    with pytest.raises(ValueError, match="scale must be"):
        Augmentation(scale=(0.0, 1.0))
    with pytest.raises(ValueError, match="gamma must be"):
        Intensity(gamma=(2.0, 1.0))
    with pytest.raises(ValueError, match="3 angles"):
        Augmentation(rotate=(30.0, 0.0, 0.0)).draw((8, 8), 1, torch.Generator())
    with pytest.raises(ValueError, match="flip names an axis"):
        Augmentation(flip=(2,)).draw((8, 8), 1, torch.Generator())
    with pytest.raises(ValueError, match="do not fit"):
        augment(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4), [Parameters()])
