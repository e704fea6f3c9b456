"""Every network on the card table: shapes, stages, kinds of leaves, equal bits; and FedSegNet's own checks."""

import pytest
import torch
import torch.nn.functional as F

from fedscan.models import build, models
from fedscan.models.blocks import max_pool, pairwise_max, resize
from fedscan.models.fedsegnet import Transformer
from fedscan.schema import Kind, kinds_of
from fedscan.tasks.losses import dice_cross_entropy

torch.set_num_threads(1)

OURS = ("fedsegnet", "unet", "cnn")
NAMES = (*OURS, "unetr", "swin-unetr")
# What the learned numbers are, counted by hand from the sizes of the paper preset for 4 channels and 4 classes: a block
# i -> o has 27 o (i + o) weights and 4 o in its two norms, the head 4 w + 4.
WIDTHS = (16, 32, 64, 128, 256)
BLOCK = {(i, o): 27 * o * (i + o) + 4 * o for i in (4, *WIDTHS, 48, 96, 192, 384) for o in WIDTHS}
DOWN = sum(BLOCK[pair] for pair in [(4, 16), (16, 32), (32, 64), (64, 128), (128, 256)])
UP_SKIP = sum(BLOCK[pair] for pair in [(384, 128), (192, 64), (96, 32), (48, 16)])
UP = sum(BLOCK[pair] for pair in [(256, 128), (128, 64), (64, 32), (32, 16)])
HEAD = 4 * 16 + 4
LAYER = 2 * 2 * 256 + (256 + 1) * 3 * 256 + (256 + 1) * 256 + (256 + 1) * 1024 + (1024 + 1) * 256
POSITION = 8**3 * 256


def tiny(name, dims=3, seed=0, **options):
    torch.manual_seed(seed)
    return build(name, 2, 3, dims, preset="tiny", **options)


def images(*grid, batch=2, channels=2):
    return torch.randn(batch, channels, *grid, generator=torch.Generator().manual_seed(1))


def count(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_forward_backward_and_stages(name, dims):
    net, x = tiny(name, dims), images(*[32] * dims)
    logits = net(x)
    assert logits.shape == (2, 3, *[32] * dims)
    logits.square().mean().backward()
    without = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == [], "these never learn, and would only travel"

    net.eval()
    stages, y = net.stages(), x
    assert [k for k in stages if k != "bottleneck"] == ["encoder", "decoder", "head"]
    for stage in stages.values():
        y = stage(y)
    assert torch.equal(y, net(x))
    named = {f"{stage}.{k}" for stage, part in stages.items() for k in part.state_dict()}
    assert named == set(net.state_dict()), "every leaf belongs to one stage"


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
@pytest.mark.parametrize("name", NAMES)
def test_the_kinds_of_the_leaves_follow_from_the_norm(name, norm, dims):
    kinds = set(kinds_of(tiny(name, dims, norm=norm)).values())
    assert kinds == (set(Kind) if norm == "batch" else {Kind.PARAMETER})


@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
def test_every_norm_takes_other_grids_too(norm):
    for name in OURS:
        assert tiny(name, norm=norm)(images(8, 16, 12)).shape == (2, 3, 8, 16, 12)
    assert tiny("swin-unetr", norm=norm)(images(32, 32, 64)).shape == (2, 3, 32, 32, 64)


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_have_the_same_bits_and_another_seed_has_others(name):
    def run(seed):
        net = tiny(name, dims=2, seed=seed)
        loss = dice_cross_entropy(net(images(32, 32)), torch.ones(2, 32, 32, dtype=torch.uint8))
        loss.backward()
        return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in net.parameters())])

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))


def test_the_network_compiles_in_one_piece():
    net, x = tiny("fedsegnet", dims=2).eval(), images(16, 16)
    torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(x), net(x))


@pytest.mark.parametrize("name", OURS)
def test_half_precision_by_autocast_is_near(name):
    net, x = tiny(name).eval(), images(16, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), net(x), atol=0.1, rtol=0.1)


# -- the sizes of the paper's preset -----------------------------------------------------------------------------------


def test_the_parameters_of_the_paper_preset_are_those_counted_by_hand():
    assert count(build("unet", 4, 4)) == DOWN + UP_SKIP + HEAD == 5_886_852
    assert count(build("cnn", 4, 4)) == DOWN + UP + HEAD == 5_299_332
    assert count(build("fedsegnet", 4, 4, preset="paper")) == DOWN + UP_SKIP + HEAD + 2 * LAYER + POSITION == 7_597_444
    assert LAYER == 789_760
    assert count(build("fedsegnet", 4, 4, layers=3)) - count(build("fedsegnet", 4, 4)) == LAYER


def test_without_its_transformer_fedsegnet_is_the_unet():
    plain, unet = tiny("fedsegnet", transformer=False), tiny("unet")
    assert plain.state_dict().keys() == unet.state_dict().keys()
    assert torch.equal(plain(images(16, 16, 16)), unet(images(16, 16, 16)))


@pytest.mark.slow
def test_one_step_of_the_paper_preset_on_its_own_grid():
    torch.manual_seed(0)
    net = build("fedsegnet", 4, 4)
    labels = torch.randint(0, 4, (1, 128, 128, 128), dtype=torch.uint8)
    before = [p.detach().clone() for p in net.parameters()]
    loss = dice_cross_entropy(net(images(128, 128, 128, batch=1, channels=4)), labels)
    loss.backward()
    torch.optim.Adam(net.parameters(), lr=1e-4).step()
    assert loss.isfinite()
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


# -- MONAI's networks, cut into stages --------------------------------------------------------------------------------


def same_logits(ours, theirs, dims):
    """Whether both give one image of 32 voxels a side the same bits."""
    x = images(*[32] * dims, batch=1)
    with torch.no_grad():
        return torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("dims", [2, 3])
def test_unetr_computes_what_monai_does(dims):
    from monai.networks.nets import UNETR

    ours = tiny("unetr", dims)
    torch.manual_seed(0)
    norm = ("instance", {"affine": True})
    assert same_logits(ours, UNETR(2, 3, (32,) * dims, 4, 32, 64, 4, norm_name=norm, spatial_dims=dims), dims)


@pytest.mark.parametrize("dims", [2, 3])
def test_swin_unetr_computes_what_monai_does(dims):
    from monai.networks.nets import SwinUNETR

    ours = tiny("swin-unetr", dims)
    torch.manual_seed(0)
    sizes = {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 2}
    norm = ("group", {"num_groups": 4})
    assert same_logits(ours, SwinUNETR(2, 3, **sizes, norm_name=norm, spatial_dims=dims), dims)


# -- attention is global (F1.10) ---------------------------------------------------------------------------------------


def changed_tokens(bottleneck, dims=3):
    """Which voxels of the deepest grid change when one voxel is perturbed in all its channels."""
    x = torch.randn(1, 16, *[4] * dims, generator=torch.Generator().manual_seed(2))
    y = x.clone()
    y[(0, slice(None)) + (1,) * dims] += 0.1 * torch.randn(16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        difference = (bottleneck([x])[-1] - bottleneck([y])[-1]).abs().amax(1)[0]
    return difference > 1e-7


@pytest.mark.parametrize("dims", [2, 3])
def test_one_perturbed_token_changes_every_token_and_without_the_transformer_only_itself(dims):
    changed = changed_tokens(tiny("fedsegnet", dims).eval().bottleneck, dims)
    assert changed.all()
    changed = changed_tokens(tiny("fedsegnet", dims, transformer=False).eval().bottleneck, dims)
    assert changed.nonzero().tolist() == [[1] * dims]


def test_tokens_know_where_they_are():
    torch.manual_seed(0)
    transformer = Transformer(16, (4, 4), layers=1, heads=2, dropout=0.0)
    same_everywhere = transformer(torch.ones(1, 16, 4, 4))
    assert same_everywhere.std((2, 3)).min() > 1e-4


def test_attention_is_the_softmax_of_the_paper():
    torch.manual_seed(0)
    attention = build("fedsegnet", 1, 2, preset="tiny").bottleneck.inner.layers[0].attend[1]
    x = torch.randn(1, 5, 16)
    q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).split(16, -1)
    heads = []
    for h in (slice(0, 8), slice(8, 16)):
        scores = q[..., h] @ k[..., h].transpose(1, 2) / 8**0.5
        heads.append(scores.softmax(-1) @ v[..., h])
    torch.testing.assert_close(attention(x), attention.out(torch.cat(heads, -1)))


def test_on_another_grid_the_positions_are_interpolated():
    net = tiny("fedsegnet").eval()
    position = net.bottleneck.inner.position
    assert position.shape == (1, 16, 4, 4, 4)
    expected = F.interpolate(position, size=(3, 4, 6), mode="trilinear", align_corners=False)
    torch.testing.assert_close(resize(position, (3, 4, 6)), expected, atol=1e-6, rtol=0)
    assert net(images(12, 16, 24)).shape == (2, 3, 12, 16, 24)


# -- operators with the same bits every time ---------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(6,), (5, 3), (4, 7, 5), (1, 2, 3)])
def test_resize_and_its_gradient_are_those_of_interpolate(grid):
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(grid)]
    for size in ([2 * side for side in grid], [side + 3 for side in grid]):
        x = images(*grid).requires_grad_()
        ours, theirs = resize(x, size), F.interpolate(x, size=size, mode=mode, align_corners=False)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
        weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(5))
        gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, theirs)]
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)
    x = images(*grid)
    assert resize(x, grid) is x


@pytest.mark.parametrize("grid", [(8, 6), (4, 6, 8)])
def test_both_pools_have_the_same_bits_and_give_ties_to_the_same_voxel(grid):
    x = images(*grid).mul(2).round().requires_grad_()  # whole numbers: many ties
    ours, theirs = pairwise_max(x), max_pool(x)
    assert torch.equal(ours, theirs)
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(5))
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, theirs)]
    assert torch.equal(*gradients)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("fedsegnt", {}, "'fedsegnt' is no model: did you mean 'fedsegnet'\\? allowed: fedsegnet, unet, cnn"),
        ("unet", {"wdths": [4, 8]}, "'wdths' is no option of model 'unet': did you mean 'widths'\\?"),
        ("unet", {"preset": "smal"}, "did you mean 'small'\\? allowed: paper, small, tiny"),
        ("unet", {"norm": "layer"}, "must be one of 'instance', 'batch', 'group', not 'layer'"),
        ("unet", {"widths": 16}, "must be a list whose entries are each a whole number, not 16"),
        ("unet", {"widths": [16]}, "two or more positive channel counts"),
        ("fedsegnet", {"layers": 2.5}, "'layers' of model 'fedsegnet' must be a whole number, not 2.5"),
        ("fedsegnet", {"transformer": 1}, "must be true or false, not 1"),
        ("fedsegnet", {"grid": 100}, "each divisible by 16 for 5 widths"),
        ("fedsegnet", {"grid": [32, 32]}, "grid must be 3 sides"),
        ("fedsegnet", {"heads": 3}, "heads that divide the deepest width 256"),
        ("fedsegnet", {"dropout": 1}, "dropout must be at least 0 and below 1"),
        ("unetr", {"grid": 40}, "each divisible by 16"),
        ("unetr", {"heads": 5}, "heads must divide hidden_size 768"),
        ("swin-unetr", {"feature_size": 16}, "divisible by 12, not 16"),
        ("swin-unetr", {"depths": [2, 2]}, "four numbers each"),
        ("swin-unetr", {"heads": [5, 6, 12, 24]}, "heads must divide the widths"),
    ],
)
def test_a_wrong_name_option_or_value_is_refused_by_a_sentence(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(name, 1, 2, **options)


@pytest.mark.parametrize(("given", "sentence"), [((0, 2, 3), "1 of channels, not 0"), ((1, 2, 4), "2 or 3 axes")])
def test_wrong_channels_or_axes_are_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        build("unet", *given)


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("unet", (2, 2, 16, 18, 16), "Each side of the grid \\(16, 18, 16\\) must be divisible by 4"),
        ("unet", (2, 1, 16, 16, 16), "takes images of shape \\(batch, 2, D x H x W\\)"),
        ("unet", (2, 2, 16, 16), "dims must fit"),
        ("unet", (2, 2, 4, 4, 4), "a single voxel at the deepest level"),
        ("unetr", (2, 2, 32, 32, 48), "built for the grid \\(32, 32, 32\\) and takes no other"),
        ("swin-unetr", (2, 2, 32, 48, 32), "must be divisible by 32"),
    ],
)
def test_images_that_do_not_fit_are_refused_by_a_sentence(name, shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny(name)(torch.zeros(shape))


# -- the cards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_card_is_complete(name):
    card = models()[name]
    assert card.name == name
    assert all([card.summary, card.paper])
    assert {"paper", "small", "tiny"} <= set(card.presets)
    assert all(card.allowed(option) for option in card.options)
    for preset in card.presets:
        assert card.resolve({"preset": preset}).keys() == card.options.keys()


def test_an_option_given_beside_a_preset_wins():
    resolved = models()["fedsegnet"].resolve({"preset": "small", "heads": 2})
    assert resolved["widths"] == (8, 16, 32, 64)
    assert (resolved["heads"], resolved["layers"]) == (2, 2)


def test_the_table_handed_out_is_a_copy():
    models().clear()
    assert set(models()) == set(NAMES)
