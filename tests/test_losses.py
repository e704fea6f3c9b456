"""The losses against numbers worked out by hand, against MONAI's, and on what they must refuse."""

import math

import pytest
import torch

from fedscan.tasks.losses import check_labels, dice_cross_entropy, soft_dice

torch.set_num_threads(1)


def a_batch(grid=(5, 4, 3), classes=3, dtype=torch.float32):
    """Two images of logits, and labels in which class 1 is missing from the second image."""
    rng = torch.Generator().manual_seed(7)
    logits = torch.randn(2, classes, *grid, generator=rng, dtype=dtype) * 2
    labels = torch.randint(0, classes, (2, *grid), generator=rng)
    labels[1][labels[1] == 1] = 0
    return logits, labels


def two_voxels():
    """One image of two voxels and two classes with p = (0.75, 0.25) at the first and (0.5, 0.5) at the second.

    The labels are 0 and 1. By hand, per class: overlap 0.75 and 0.5; sum of p 1.25 and 0.75; sum of p^2
    0.5625 + 0.25 = 0.8125 and 0.0625 + 0.25 = 0.3125; one voxel of each class.
    """
    return torch.tensor([[[math.log(3.0), 0.0], [0.0, 0.0]]]), torch.tensor([[0, 1]])


@pytest.mark.parametrize(
    ("denominator", "dice"),
    [("squared", (1.5 / 1.8125, 1.0 / 1.3125)), ("linear", (1.5 / 2.25, 1.0 / 1.75))],
)
def test_the_numbers_by_hand(denominator, dice):
    logits, labels = two_voxels()
    ce = -(math.log(0.75) + math.log(0.5)) / 2
    for lam in (0.0, 0.25, 1.0):
        expected = lam * (1 - sum(dice) / 2) + (1 - lam) * ce
        got = dice_cross_entropy(logits, labels, lam, denominator=denominator, smooth=0.0)
        assert got.item() == pytest.approx(expected, abs=1e-6)
    foreground = dice_cross_entropy(logits, labels, 1.0, denominator=denominator, smooth=0.0, include_background=False)
    assert foreground.item() == pytest.approx(1 - dice[1], abs=1e-6)


def test_a_class_that_is_nowhere_and_predicted_nowhere_has_a_dice_of_one():
    p = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    assert soft_dice(p, p).tolist() == [[1.0, 1.0]]
    assert soft_dice(p, p.flip(1))[0, 0] < 1e-4


@pytest.mark.parametrize("denominator", ["squared", "linear"])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_it_equals_monai(denominator, batch, background, lam):
    from monai.losses import DiceCELoss

    theirs = DiceCELoss(
        include_background=background,
        to_onehot_y=True,
        softmax=True,
        squared_pred=denominator == "squared",
        batch=batch,
        lambda_dice=lam,
        lambda_ce=1 - lam,
    )
    for grid in [(5, 4, 3), (6, 7)]:
        logits, labels = a_batch(grid)
        ours = dice_cross_entropy(
            logits, labels, lam, denominator=denominator, include_background=background, batch_dice=batch
        )
        assert ours.item() == pytest.approx(theirs(logits, labels[:, None]).item(), abs=1e-6)


def test_over_the_batch_and_over_each_image_differ_where_a_class_is_missing():
    logits, labels = a_batch()
    assert abs(dice_cross_entropy(logits, labels) - dice_cross_entropy(logits, labels, batch_dice=True)) > 1e-2


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("denominator", ["squared", "linear"])
def test_the_gradient_is_that_of_finite_differences(lam, denominator):
    logits, labels = a_batch((3, 2, 2), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: dice_cross_entropy(x, labels, lam, denominator=denominator), logits.requires_grad_()
    )


def test_each_term_alone_has_a_gradient():
    for lam in (0.0, 1.0):
        logits, labels = a_batch()
        dice_cross_entropy(logits.requires_grad_(), labels, lam).backward()
        assert logits.grad.abs().max() > 1e-5


def test_labels_of_any_integer_type_and_logits_of_half_precision():
    logits, labels = a_batch()
    loss = dice_cross_entropy(logits, labels)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(dice_cross_entropy(logits, labels.to(dtype)), loss)
    half = dice_cross_entropy(logits.bfloat16(), labels)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(loss.item(), abs=0.02)


@pytest.mark.parametrize("denominator", ["squared", "linear"])
def test_ignored_voxels_are_in_no_sum_and_have_no_gradient(denominator):
    """The two voxels of above, and a third that nobody has judged: the numbers by hand stay as they are."""
    logits, labels = two_voxels()
    more = torch.cat([logits, torch.tensor([[[5.0], [-2.0]]])], 2).requires_grad_()
    judged = torch.cat([labels, torch.tensor([[255]])], 1)
    for lam in (0.0, 0.5, 1.0):
        options = {"lam": lam, "denominator": denominator, "smooth": 0.0}
        got = dice_cross_entropy(more, judged, ignored=255, **options)
        assert got.item() == pytest.approx(dice_cross_entropy(logits, labels, **options).item(), abs=1e-7)
        (slope,) = torch.autograd.grad(got, more)
        assert (slope[..., 2] == 0).all()
        assert (slope[..., :2] != 0).all()
    ce = -(math.log(0.75) + math.log(0.5)) / 2  # over two voxels, not three
    assert dice_cross_entropy(more, judged, 0.0, ignored=255).item() == pytest.approx(ce, abs=1e-6)


@pytest.mark.parametrize("batch", [False, True])
def test_what_is_ignored_may_hold_anything(batch):
    logits, labels = a_batch()
    labels[0, :2] = 255
    other = logits.clone()
    other[0, :, :2] = 40.0 * torch.randn(3, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    one, two = (dice_cross_entropy(x, labels, batch_dice=batch, ignored=255) for x in (logits, other))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert dice_cross_entropy(logits, labels, batch_dice=batch).isnan(), "255 is a class of nobody otherwise"
    assert dice_cross_entropy(logits, labels - (labels == 1) * 5, ignored=255).isnan(), "a fault is still a fault"
    nobody = dice_cross_entropy(logits.requires_grad_(), torch.full_like(labels, 255), ignored=255)
    assert nobody.item() == pytest.approx(0, abs=1e-6)
    nobody.backward()
    assert (logits.grad == 0).all()


def test_where_nothing_is_ignored_it_is_the_same_loss():
    logits, labels = a_batch()
    for options in ({}, {"batch_dice": True, "denominator": "linear"}, {"lam": 0.0}, {"lam": 1.0}):
        plain, asked = (dice_cross_entropy(logits, labels, ignored=none, **options) for none in (None, 255))
        torch.testing.assert_close(plain, asked)


def test_it_can_be_taken_per_image_by_vmap():
    logits, labels = a_batch()
    each = torch.func.vmap(lambda x, y: dice_cross_entropy(x[None], y[None]))(logits, labels)
    torch.testing.assert_close(each.mean(), dice_cross_entropy(logits, labels))


@pytest.mark.parametrize("wrong", [-1, 3, 255])
def test_a_label_that_is_no_class_makes_loss_and_gradient_nan_and_is_named_when_read(wrong):
    logits, labels = a_batch()
    labels[0, 0, 0, 0] = wrong
    loss = dice_cross_entropy(logits.requires_grad_(), labels)
    loss.backward()
    assert loss.isnan()
    assert logits.grad.isnan().all()
    with pytest.raises(ValueError, match="Labels must lie between 0 and 2 for 3 classes"):
        check_labels(labels, 3)


def test_right_labels_pass():
    check_labels(torch.tensor([0, 2], dtype=torch.uint8), 3)
    check_labels(torch.empty(0, dtype=torch.long), 3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lam": 1.5}, "lam must be between 0"),
        ({"denominator": "cubed", "lam": 0.0}, "'squared' or 'linear', not 'cubed'"),
        ({"labels": torch.zeros(2, 5, 4, 4, dtype=torch.long)}, "the grids of image and label must be the same"),
        ({"labels": torch.zeros(2, 1, 5, 4, 3, dtype=torch.long)}, "Labels must be \\(batch, \\*grid\\)"),
        ({"labels": torch.zeros(2, 5, 4, 3)}, "Labels must be whole numbers"),
        ({"logits": torch.zeros(2, 1, 5, 4, 3)}, "2 or more classes"),
    ],
)
def test_what_does_not_fit_is_refused_by_a_sentence(change, sentence):
    logits, labels = a_batch()
    with pytest.raises(ValueError, match=sentence):
        dice_cross_entropy(**({"logits": logits, "labels": labels} | change))


def test_labels_that_are_not_whole_numbers_are_refused_when_read():
    with pytest.raises(ValueError, match="whole numbers"):
        check_labels(torch.zeros(3), 2)
