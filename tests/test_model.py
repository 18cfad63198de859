"""The whole model: its exact size and cost, any input, and every claim of its docstrings."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from xvit_minimal import SoftmaxAttention, XNormAttention, XViT, model
from xvit_minimal.baselines import ATTENTIONS, VARIANTS, NoMixing
from xvit_minimal.model import (
    SIZES,
    ClassAttentionBlock,
    ConvStem,
    LocalPatchInteraction,
    XViTBlock,
    cost,
)
from xvit_minimal.train import load_model

ROOT = Path(__file__).parents[1]

PINNED = {  # parameters and multiply-adds of one image at the size's own resolution
    "xvit_pico": (280_466, 15_444_608),
    "xvit_nano": (3_648_266, 854_970_240),
    "xvit_tiny": (12_127_184, 2_323_158_528),
    "xvit_small": (26_287_608, 4_798_012_416),
    "xvit_medium": (47_691_960, 9_062_771_712),
    "xvit_base": (84_423_112, 16_089_747_456),
}
XCIT = {  # the model of XCiT that has a size's width, depth and heads
    "xvit_tiny": "xcit_tiny_24_p16_224",
    "xvit_small": "xcit_small_12_p16_224",
    "xvit_medium": "xcit_small_24_p16_224",
    "xvit_base": "xcit_medium_24_p16_224",
}


def tiny(**changes):
    """A model of 16 channels for images of 16 pixels, in eval."""
    torch.manual_seed(0)
    sizes = dict(
        img_size=16, num_classes=5, dim=16, depth=2, num_heads=2, stem_stride=4, class_depth=1
    )
    return XViT(**sizes | changes).eval()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small are quicker on one core, and leave the others to other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------ size and cost


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_multiply_adds_are_pinned(name):
    assert name in PINNED, f"{name} has no row in PINNED: count it with cost() and add one"
    with torch.device("meta"):
        built = getattr(model, name)()
    assert cost(built, SIZES[name].get("img_size", 224)) == PINNED[name]


def test_every_pinned_row_is_a_size():
    assert list(PINNED) == list(SIZES) and set(XCIT) < set(SIZES)


@pytest.mark.parametrize("name", XCIT)
def test_the_count_differs_from_timms_xcit_by_what_is_built_differently(name):
    timm = pytest.importorskip("timm", reason="timm holds XCiT: pip install timm")
    with torch.device("meta"):
        parameters, multiply_adds = cost(timm.create_model(XCIT[name]), 224)
    C, h, depth, N = SIZES[name]["dim"], SIZES[name]["num_heads"], SIZES[name]["depth"], 14 * 14
    # X-ViT: learned positions, two gammas a head and layer, and in each of two class-attention
    # blocks a product of d x d for every token and one for the query.  XCiT: Fourier positions
    # through a layer of 64 -> C, biases of q, k and v, one temperature a head and body layer, and
    # in its class attention two products of one query with every token.
    more_parameters = (N * C + 2 * h * (depth + 2)) - (65 * C + 3 * C * (depth + 2) + h * depth)
    more_multiply_adds = 2 * ((N + 2) * C * (C // h) - 2 * (N + 1) * C) - 64 * C * N
    assert PINNED[name] == (parameters + more_parameters, multiply_adds + more_multiply_adds)
    assert abs(more_parameters) < 0.01 * parameters
    assert abs(more_multiply_adds) < 0.001 * multiply_adds


@pytest.mark.parametrize(
    "attention, products",  # of M queries and N tokens
    [
        (XNormAttention, lambda M, N, C, d: N * C * d + M * C * d),
        (SoftmaxAttention, lambda M, N, C, d: 2 * M * N * C),
    ],
)
def test_cost_equals_a_count_by_hand(attention, products):
    C, h, N, classes = 16, 2, 4 * 4, 5
    built = tiny(depth=1, attention=attention)
    gammas = 2 * h if attention is XNormAttention else 0
    layer = 3 * C * C + C * C + C + gammas  # qkv without bias, proj with one
    mlp = 8 * C * C + 5 * C
    residual = 2 * C + C  # LayerNorm and LayerScale
    stem = (3 * 9 * 8 + 2 * 8) + (8 * 9 * 16 + 2 * 16)
    lpi = 2 * (9 * C + C) + 2 * C
    body = (residual + layer) + (residual + lpi) + (residual + mlp)
    reader = (residual + layer) + (residual + mlp)
    parameters = stem + N * C + body + C + reader + 2 * C + C * classes + classes
    in_stem = 8 * 8 * 8 * 27 + 4 * 4 * 16 * 72
    in_body = 4 * N * C * C + products(N, N, C, C // h) + 2 * 9 * N * C + 8 * N * C * C
    # the class token alone asks: one query, one row to project
    in_reader = 2 * (N + 1) * C * C + 2 * C * C + products(1, N + 1, C, C // h) + 8 * C * C
    assert cost(built, 16) == (parameters, in_stem + in_body + in_reader + C * classes)


def test_cost_leaves_the_model_as_it_was():
    built = tiny().train()
    before = {name: value.clone() for name, value in built.state_dict().items()}
    cost(built, 20)
    assert built.training and all(p.requires_grad and p.grad is None for p in built.parameters())
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())


def test_cost_counts_a_model_of_any_precision():
    assert cost(tiny().half(), 20) == cost(tiny().double(), 20) == cost(tiny(), 20)


# ----------------------------------------------------------------------------------- any input size


@pytest.mark.parametrize("class_depth", [0, 1, 2])
@pytest.mark.parametrize(
    "height, width", [(16, 16), (1, 1), (3, 16), (17, 30), (4, 400), (64, 64), (8, 8)]
)
def test_any_input_size_in_any_mode(height, width, class_depth):
    built, x = tiny(class_depth=class_depth), images(2, 3, height, width)
    for mode in (True, False):
        features = built.train(mode).forward_features(x)
        assert (
            features.shape == (2, 16, math.ceil(height / 4), math.ceil(width / 4))
            and features.isfinite().all()
        )
        assert built(x).shape == (2, 5) and built(x).isfinite().all()


@pytest.mark.parametrize("stride", [2, 4, 8, 16])
def test_every_stem_stride(stride):
    stem = ConvStem(16, stride)
    assert stem(images(2, 3, 32, 48)).shape == (2, 16, 32 // stride, 48 // stride)
    features = tiny(stem_stride=stride).forward_features(images(2, 3, 20, 33))
    assert features.shape == (2, 16, math.ceil(20 / stride), math.ceil(33 / stride))


def test_an_image_is_padded_with_zeros_at_its_end():
    built, x = tiny(), images(2, 3, 13, 18)
    padded = torch.zeros(2, 3, 16, 20)
    padded[:, :, :13, :18] = x
    assert torch.equal(built(x), built(padded))


def test_one_token_in_training_is_refused_by_batch_norm():
    """As the docstring says: a single token has no variance to divide by. In eval it works."""
    built, x = tiny(), images(1, 3, 1, 1)
    assert built(x).isfinite().all()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        built.train()(x)
    assert built(images(1, 3, 1, 5)).isfinite().all()  # two tokens will do


def test_an_image_of_zeros_has_finite_outputs_and_gradients():
    built = tiny().train()
    built(torch.zeros(2, 3, 16, 16)).logsumexp(1).sum().backward()
    assert all(p.grad.isfinite().all() for p in built.parameters())


# ---------------------------------------------------------------------- pictures of different sizes

OWN_SIZES = [(16, 16), (9, 30), (1, 1), (28, 3), (13, 32)]


def padded(sizes, fill, height=30, width=35):
    """Pictures of these sizes, one tensor, `fill` beside them."""
    x = torch.full((len(sizes), 3, height, width), fill, dtype=torch.float64)
    for n, (h, w) in enumerate(sizes):
        x[n, :, :h, :w] = images(3, h + n, w)[:, n:].double()
    return x, torch.tensor(sizes)


def unsettle(built):
    """BatchNorms and positions as training may leave them, so that nothing is 0 by chance."""
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2)
    nn.init.normal_(built.positions)
    return built.double()


@pytest.mark.parametrize("stem_stride", [2, 4, 8])
@pytest.mark.parametrize("class_depth", [0, 1])
@pytest.mark.parametrize("name", [*ATTENTIONS, *VARIANTS])
def test_a_picture_does_not_depend_on_what_it_is_batched_with(name, class_depth, stem_stride):
    attention = (ATTENTIONS | VARIANTS)[name]
    if attention is NoMixing and class_depth:
        pytest.skip("such a model is refused")
    built = unsettle(tiny(attention=attention, class_depth=class_depth, stem_stride=stem_stride))
    x, sizes = padded(OWN_SIZES, math.nan)
    together = built(x, sizes)
    for n, (h, w) in enumerate(OWN_SIZES):
        alone = built(x[n : n + 1, :, :h, :w])[0]
        torch.testing.assert_close(together[n], alone, rtol=1e-9, atol=1e-9)


def test_tokens_of_a_picture_are_those_it_has_alone_and_zeros_follow():
    built, (x, sizes) = unsettle(tiny(depth=3)), padded(OWN_SIZES, math.inf)
    grids = built.forward_features(x, taps=(1, 3), sizes=sizes)
    torch.testing.assert_close(grids[1], built.forward_features(x, sizes=sizes), rtol=0, atol=0)
    for n, (h, w) in enumerate(OWN_SIZES):
        for grid, own in zip(grids, built.forward_features(x[n : n + 1, :, :h, :w], taps=(1, 3))):
            rows, columns = own.shape[2:]
            torch.testing.assert_close(grid[n, :, :rows, :columns], own[0], rtol=1e-9, atol=1e-9)
            assert not grid[n, :, rows:].any() and not grid[n, :, :, columns:].any()


def test_a_picture_in_a_batch_has_the_positions_of_its_own_grid():
    built = tiny(depth=0, img_size=32).double()  # a grid of 8 x 8
    x, sizes = padded([(32, 32), (12, 20)], 0.0, 32, 32)
    added = built.forward_features(x, sizes=sizes) - built.stem(x)
    torch.testing.assert_close(added[:1], built.positions)
    own = F.interpolate(built.positions, size=(3, 5), mode="bicubic", align_corners=False)
    torch.testing.assert_close(added[1:, :, :3, :5], own)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("class_depth", [0, 1])
def test_pictures_that_fill_the_tensor_need_no_sizes(training, class_depth):
    built = unsettle(tiny(class_depth=class_depth)).train(training)
    x, sizes = padded([(30, 35)] * 3, 0.0)
    other = copy.deepcopy(built)
    torch.testing.assert_close(built(x, sizes), other(x), rtol=1e-9, atol=1e-9)
    for name, value in built.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name])


def test_in_training_nothing_depends_on_what_the_padding_holds():
    results = []
    for fill, room in ((0.0, (30, 35)), (math.nan, (30, 35)), (7.0, (40, 70))):
        built = unsettle(tiny(class_depth=1)).train()
        out = built(*padded(OWN_SIZES, fill, *room))
        out.logsumexp(1).sum().backward()
        found = {name: p.grad for name, p in built.named_parameters()}
        results.append({"out": out, **found, **dict(built.named_buffers())})
    for result in results[1:]:
        for name, value in result.items():
            torch.testing.assert_close(value, results[0][name], rtol=1e-7, atol=1e-9)


def test_batch_norm_counts_the_tokens_of_the_pictures_alone():
    """The first norm of the stem, whose 15 x 17 and 4 x 2 places it sees side by side."""
    built = tiny(stem_stride=2).double().train()
    x, sizes = padded([(30, 34), (8, 3)], 5.0)
    conv, norm = built.stem[0][0], copy.deepcopy(built.stem[0][1])
    built(x, sizes)
    seen = [
        conv(F.pad(x[n : n + 1, :, :h, :w], (0, w % 2, 0, 0))) for n, (h, w) in enumerate(sizes)
    ]
    places = torch.cat([each.flatten(2)[0].T for each in seen])  # (n, C)
    assert len(places) == 15 * 17 + 4 * 2
    mean, var = places.mean(0), places.var(0)
    torch.testing.assert_close(built.stem[0][1].running_mean, norm.running_mean + 0.1 * mean)
    torch.testing.assert_close(built.stem[0][1].running_var, 0.9 * norm.running_var + 0.1 * var)


@pytest.mark.parametrize(
    "sizes",
    [
        torch.tensor([[16, 16]]),
        torch.tensor([16, 16]),
        torch.tensor([[16, 16], [16, 17]]),
        torch.tensor([[17, 16], [16, 16]]),
        torch.tensor([[16, 16], [0, 16]]),
        torch.tensor([[16, 16], [16, -1]]),
        torch.tensor([[16.0, 16.0], [16.0, 16.0]]),
        torch.tensor([[True, True], [True, True]]),
        [[16, 16], [16, 16]],
        np.array([[16, 16], [16, 16]]),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match=r"got sizes .* each picture's own height and width"):
        tiny()(images(2, 3, 16, 16), sizes)


# ---------------------------------------------------------------------------------------- positions


def positions_seen(built, x):
    """What a model without blocks adds to the tokens of its stem."""
    return built.forward_features(x) - built.stem(x)


def test_positions_are_used_as_they_are_at_the_native_size():
    built = tiny(depth=0, img_size=(16, 24))
    assert built.positions.shape == (1, 16, 4, 6)
    torch.testing.assert_close(
        positions_seen(built, images(2, 3, 16, 24)), built.positions.expand(2, -1, -1, -1)
    )
    assert tiny(img_size=(13, 21)).positions.shape == (1, 16, 4, 6)  # a grid of padded images


def test_positions_are_interpolated_at_every_other_size():
    built = tiny(depth=0, img_size=32)  # a grid of 8 x 8
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    with torch.no_grad():
        built.positions[0, 0], built.positions[0, 1], built.positions[0, 2] = row, column, 7.0
        seen = positions_seen(built, images(1, 3, 64, 48))[0]  # a grid of 16 x 12
    inside = slice(
        5, -5
    )  # away from the border, PyTorch's cubic kernel keeps a straight line to within 0.05
    where_rows, where_columns = (
        (torch.arange(16) + 0.5) / 2 - 0.5,
        (torch.arange(12) + 0.5) * 8 / 12 - 0.5,
    )
    torch.testing.assert_close(
        seen[0][inside], where_rows[inside, None].expand(-1, 12), atol=0.06, rtol=0
    )
    torch.testing.assert_close(
        seen[1][:, inside], where_columns[inside].expand(16, -1), atol=0.06, rtol=0
    )
    torch.testing.assert_close(seen[2], torch.full((16, 12), 7.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("class_depth", [0, 1])
def test_only_positions_and_neighbours_tell_one_token_from_another(class_depth):
    x, order = images(2, 3, 16, 16), torch.randperm(16, generator=torch.Generator().manual_seed(2))
    patches = F.unfold(x, 4, stride=4)  # (B, 3 * 4 * 4, N)
    shuffled = F.fold(patches[:, :, order], 16, 4, stride=4)
    for lpi, positions, blind in [(False, 0.0, True), (False, 1.0, False), (True, 0.0, False)]:
        built = tiny(lpi=lpi, class_depth=class_depth)
        built.stem = nn.Conv2d(3, 16, 4, stride=4)  # patches that do not overlap
        with torch.no_grad():
            built.positions.copy_(images(*built.positions.shape) * positions)
        assert torch.allclose(built(x), built(shuffled), atol=1e-5) == blind, (lpi, positions)


# -------------------------------------------------------------------------------------------- parts


def test_a_block_is_attention_then_neighbours_then_mlp():
    block = XViTBlock(16, 2, layer_scale=0.5).eval()
    x, grid = images(2, 12, 16), (3, 4)
    a, b, c = block.attention, block.lpi, block.mlp
    expected = x + 0.5 * a.part(a.norm(x))
    expected = expected + 0.5 * b.part(b.norm(expected), grid)
    expected = expected + 0.5 * c.part(c.norm(expected))
    torch.testing.assert_close(block(x, grid), expected)
    assert [type(part) for part in (a.part, b.part)] == [XNormAttention, LocalPatchInteraction]
    assert XViTBlock(16, 2, lpi=False).lpi is None


def test_the_order_inside_the_stem_and_the_local_patch_interaction():
    stem, lpi, grid = ConvStem(16, 4).eval(), LocalPatchInteraction(16).eval(), (3, 4)
    for part in (stem, lpi):
        for norm in (m for m in part.modules() if isinstance(m, nn.BatchNorm2d)):
            (
                nn.init.normal_(norm.weight),
                nn.init.normal_(norm.bias),
                nn.init.normal_(norm.running_mean),
            )
    x = images(2, 3, 16, 16)
    (conv1, norm1, _), (conv2, norm2) = stem
    torch.testing.assert_close(stem(x), norm2(conv2(F.gelu(norm1(conv1(x))))))
    x = images(2, 16, *grid)  # (B, C, h, w)
    expected = lpi.conv2(lpi.norm(F.gelu(lpi.conv1(x)))).flatten(2).mT
    torch.testing.assert_close(lpi(x.flatten(2).mT, grid), expected)


def test_local_patch_interaction_reaches_two_tokens_far_on_the_grid():
    part = LocalPatchInteraction(4).eval()
    x = torch.zeros(1, 7 * 9, 4)
    one = x.clone()
    one[0, 3 * 9 + 4] = 1.0  # row 3, column 4
    changed = (part(one, (7, 9)) - part(x, (7, 9))).abs().sum(-1).reshape(7, 9) > 0
    expected = torch.zeros(7, 9, dtype=torch.bool)
    expected[1:6, 2:7] = True
    assert torch.equal(changed, expected)


def test_in_class_attention_only_the_class_token_asks():
    block, C, d = ClassAttentionBlock(12, 3).double(), 12, 4
    layer = block.attention.part
    nn.init.normal_(layer.gamma_q), nn.init.normal_(layer.gamma_kv)
    token, tokens = images(2, 1, C).double(), images(2, 9, C).double() + 1
    everything = block.attention.norm(torch.cat([token, tokens], dim=1))  # (B, 1 + N, C)
    ask, know, tell = layer.qkv.weight.split(C)  # each (C, C)
    rows = []
    for b in range(2):
        heads = []
        for i in range(3):
            part = slice(d * i, d * i + d)
            q, k, v = (
                everything[b, 0] @ ask[part].T,
                everything[b] @ know[part].T,
                everything[b] @ tell[part].T,
            )
            kv = k.T @ v  # (d, d)
            heads.append(
                layer.gamma_q[i] * layer.gamma_kv[i] * (q / q.norm()) @ (kv / kv.norm(dim=0))
            )
        rows.append(torch.cat([head.flatten() for head in heads]))
    expected = token + layer.proj(torch.stack(rows)).unsqueeze(1)
    expected = expected + block.mlp.part(block.mlp.norm(expected))
    torch.testing.assert_close(block(token, tokens), expected)


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name != "none"])
def test_one_query_reads_what_the_first_row_of_all_would(name):
    block = ClassAttentionBlock(12, 3, ATTENTIONS[name]).double()
    token, tokens = images(2, 1, 12).double(), images(2, 9, 12).double() + 1
    together = torch.cat([token, tokens], dim=1)
    expected = token + block.attention(together)[:, :1]
    torch.testing.assert_close(block(token, tokens), expected + block.mlp(expected))


@pytest.mark.parametrize("file", ["cifar10"])
def test_shipped_weights_read_as_before(file):
    """Class attention once computed every row and kept the first."""
    built, _ = load_model(ROOT / "book/weights" / f"{file}.safetensors")
    x = images(4, 3, 32, 32)
    with torch.no_grad():
        tokens = built.forward_features(x).flatten(2).mT
        token = built.class_token.expand(4, -1, -1)
        for block in built.class_blocks:
            token = token + block.attention(torch.cat([token, tokens], dim=1))[:, :1]
            token = token + block.mlp(token)
        torch.testing.assert_close(built(x), built.head(built.norm(token[:, 0])))
    assert len(built.class_blocks) == 1


def test_class_attention_of_a_softmax_costs_n_and_not_n_squared():
    C, counts = 16, []
    for tokens in (64, 128):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            block = ClassAttentionBlock(C, 2, SoftmaxAttention)
            block(torch.zeros(1, 1, C), torch.zeros(1, tokens, C))
        counts.append(counter.get_total_flops() // 2)
    assert counts[1] - counts[0] == 64 * (2 * C * C + 2 * C)  # keys, values and two products


def test_class_depth_0_is_the_mean_over_the_tokens():
    built, x = tiny(class_depth=0), images(2, 3, 16, 20)
    assert built.class_token is None and len(built.class_blocks) == 0
    tokens = built.forward_features(x).flatten(2).mT
    torch.testing.assert_close(built(x), built.head(built.norm(tokens).mean(dim=1)))


def test_another_attention_takes_the_place_of_every_xnorm():
    kinds = {type(m) for m in tiny(attention=SoftmaxAttention).modules()}
    assert SoftmaxAttention in kinds and XNormAttention not in kinds
    ours, theirs = tiny().state_dict(), tiny(attention=SoftmaxAttention).state_dict()
    assert {name for name in ours if name not in theirs} == {
        name for name in ours if "gamma" in name
    }
    assert tiny(attention=SoftmaxAttention)(images(2, 3, 16, 16)).isfinite().all()


@pytest.mark.parametrize("depth, start", [(12, 1.0), (13, 1e-5)])
def test_layer_scale_starts_as_in_xcit(depth, start):
    scales = [p for name, p in tiny(depth=depth).named_parameters() if name.endswith("scale.scale")]
    assert len(scales) == 3 * depth + 2 and all(p.eq(start).all() for p in scales)
    assert all(
        p.eq(0.1).all()
        for name, p in tiny(layer_scale=0.1).named_parameters()
        if name.endswith("scale.scale")
    )


# ----------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("class_depth", [0, 1, 2])
@pytest.mark.parametrize("lpi", [True, False])
@pytest.mark.parametrize("layer_scale", [1.0, 1e-5])
@pytest.mark.parametrize("side", [16, 24])
def test_every_parameter_gets_a_finite_gradient(class_depth, lpi, layer_scale, side):
    built = tiny(class_depth=class_depth, lpi=lpi, layer_scale=layer_scale).train()
    F.cross_entropy(built(images(4, 3, side, side)), torch.tensor([0, 1, 2, 3])).backward()
    for name, parameter in built.named_parameters():
        assert (
            parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()
        ), name


def test_stochastic_depth_drops_a_part_for_some_images_and_keeps_its_expectation():
    part = tiny(drop_path=0.25).blocks[0].mlp.train()
    x = images(1, 3, 16).expand(4000, -1, -1)  # one image, 4,000 draws
    whole = part.eval()(x)[0]  # (N, C)
    drawn = part.train()(x)
    dropped = drawn.eq(0).all(dim=(1, 2))
    assert abs(dropped.float().mean() - 0.25) < 0.03
    torch.testing.assert_close(drawn[~dropped], (whole / 0.75).expand_as(drawn[~dropped]))


def test_eval_draws_nothing_and_sees_one_image_at_a_time():
    built, x = tiny(drop_path=0.5), images(4, 3, 16, 16)
    torch.testing.assert_close(built(x), built(x), atol=0, rtol=0)
    torch.testing.assert_close(built(x)[:1], built(x[:1]))
    x[1:] = float("nan")  # a damaged neighbour
    torch.testing.assert_close(built(x)[:1], built(x[:1]))


def test_bfloat16_autocast_is_finite_and_close():
    built, x = tiny().train(), images(8, 3, 16, 16)
    expected = built(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = built(x)
        F.cross_entropy(out, torch.arange(8) % 5).backward()
    assert (out.float() - expected).norm() < 0.05 * expected.norm()
    assert all(p.grad.isfinite().all() for p in built.parameters())


@pytest.mark.parametrize("training, side", [(True, 16), (False, 16), (False, 24)])
def test_compile_without_graph_breaks(training, side):
    torch._dynamo.reset()
    built, x = tiny(depth=1, drop_path=0.1).train(training), images(2, 3, side, side)
    out = torch.compile(built, fullgraph=True, backend="aot_eager")(x)
    if not training:
        torch.testing.assert_close(out, built(x))
    out.logsumexp(1).sum().backward()
    assert all(p.grad.isfinite().all() for p in built.parameters())


@pytest.mark.parametrize("name", ATTENTIONS)
def test_one_compiled_model_takes_size_after_size(name):
    """The second size makes dynamo try symbolic shapes, the third runs them."""
    torch._dynamo.reset()
    built = tiny(depth=1, attention=ATTENTIONS[name], class_depth=int(name in ("xnorm", "xca")))
    compiled = torch.compile(built, fullgraph=True, backend="eager")
    for size in [(16, 16), (24, 16), (17, 30), (5, 33)]:
        x = images(2, 3, *size)
        torch.testing.assert_close(compiled(x), built(x))


def test_a_model_compiled_for_symbolic_shapes_from_the_start():
    torch._dynamo.reset()
    built = tiny(depth=1)
    compiled = torch.compile(built, fullgraph=True, backend="eager", dynamic=True)
    for size in [(16, 16), (48, 32), (17, 30), (5, 33)]:
        x = images(2, 3, *size)
        torch.testing.assert_close(compiled(x), built(x))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_xnorm_compiles_for_any_number_of_tokens(name):
    torch._dynamo.reset()
    built = VARIANTS[name](8, 2).eval()
    compiled = torch.compile(built, fullgraph=True, backend="eager")
    for tokens in (4, 9, 15, 2):
        x = images(2, tokens, 8)
        torch.testing.assert_close(compiled(x), built(x))


def test_export_with_a_batch_of_any_size():
    built = tiny()
    sizes = {"images": {0: torch.export.Dim("B", max=4096)}}  # torch 2.6 asks for an upper end
    exported = torch.export.export(built, (images(2, 3, 16, 16),), dynamic_shapes=sizes).module()
    for batch in (2, 3, 7):
        x = images(batch, 3, 16, 16)
        torch.testing.assert_close(exported(x), built(x))


EXPORTED = [(16, 16), (24, 16), (16, 40), (17, 30), (5, 33), (64, 64)]


@pytest.mark.parametrize("made_at", [(16, 16), (24, 20)])
@pytest.mark.parametrize("class_depth", [0, 1])
def test_one_exported_program_is_right_at_every_size(made_at, class_depth):
    """The model's own size, 16 x 16, included, wherever it was exported: from two tokens a side."""
    built = tiny(class_depth=class_depth)
    anything = torch.export.Dim.DYNAMIC
    sizes = {"images": {0: anything, 2: anything, 3: anything}}
    exported = torch.export.export(built, (images(2, 3, *made_at),), dynamic_shapes=sizes).module()
    for size in EXPORTED:
        x = images(3, 3, *size)
        torch.testing.assert_close(exported(x), built(x))


@pytest.mark.filterwarnings("ignore")  # it warns of every check of a shape, and of its own age
def test_one_traced_program_is_right_at_every_size():
    built = tiny()
    traced = torch.jit.trace(built, (images(2, 3, 16, 16),), check_trace=False)
    for size in EXPORTED:
        x = images(3, 3, *size)
        torch.testing.assert_close(traced(x), built(x))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_interpolating_positions_to_their_own_grid_changes_no_bit(kind):
    positions = images(1, 8, 5, 9).mul(torch.logspace(-8, 4, 9)).to(kind)
    same = F.interpolate(positions, size=(5, 9), mode="bicubic", align_corners=False)
    assert torch.equal(same, positions)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("class_depth", [0, 1])
def test_a_whole_model_in_another_precision(kind, class_depth):
    built, x = tiny(class_depth=class_depth), images(2, 3, 16, 20)
    found = copy.deepcopy(built).to(kind)(x.to(kind))
    assert found.dtype == kind
    torch.testing.assert_close(found.float(), built(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("class_depth", [0, 1])
def test_vmap_gives_the_gradient_of_each_picture(class_depth):
    built, x, y = tiny(class_depth=class_depth).eval(), images(3, 3, 16, 20), torch.arange(3)
    parameters = dict(built.named_parameters())

    def loss(parameters, image, label):
        logits = torch.func.functional_call(built, parameters, (image[None],))
        return F.cross_entropy(logits, label[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    for n in range(3):
        alone = torch.autograd.grad(loss(parameters, x[n], y[n]), parameters.values())
        for name, gradient in zip(parameters, alone):
            torch.testing.assert_close(each[name][n], gradient, rtol=1e-4, atol=1e-5)


def test_weights_survive_a_file(tmp_path):
    built, x = tiny().train(), images(4, 3, 16, 16)
    built(x)  # moves BatchNorm's running statistics
    torch.save(built.state_dict(), tmp_path / "weights.pt")
    other = tiny(drop_path=0.3)
    nn.init.normal_(other.head.weight)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    torch.testing.assert_close(other.eval()(x), built.eval()(x), atol=0, rtol=0)


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: tiny(stem_stride=3), ["stride of 3", "2, 4, 8 or 16"]),
        (lambda: tiny(stem_stride=1), ["stride of 1", "2, 4, 8 or 16"]),
        (lambda: tiny(stem_stride="4"), ["stride of '4'", "2, 4, 8 or 16"]),
        (lambda: tiny(stem_stride=16, dim=12), ["dim=12", "stride of 16", "multiple of 8"]),
        (lambda: tiny(num_heads=3), ["dim=16", "num_heads=3", "[1, 2, 4, 8, 16]"]),
        (
            lambda: tiny()(torch.zeros(3, 16, 16)),
            ["(3, 16, 16)", "(batch, 3, height, width)", "add the batch axis"],
        ),
        (
            lambda: tiny()(torch.zeros(2, 1, 16, 16)),
            ["(2, 1, 16, 16)", "(batch, 3, height, width)", "repeat grey"],
        ),
        (
            lambda: tiny()(torch.zeros(2, 16, 16, 3)),
            ["(2, 16, 16, 3)", "(batch, 3, height, width)"],
        ),
        (
            lambda: tiny()(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)),
            ["torch.uint8", "float images", "normalize"],
        ),
        (lambda: tiny(class_depth=-1), ["class_depth=-1", "whole number from 0 on"]),
        (lambda: tiny(depth=-1), ["depth=-1", "whole number from 0 on"]),
        (lambda: tiny(depth=2.0), ["depth=2.0", "whole number from 0 on"]),
        (lambda: tiny(num_classes=0), ["num_classes=0", "whole number from 1 on"]),
        (lambda: tiny(num_classes="5"), ["num_classes='5'", "whole number from 1 on"]),
        (lambda: tiny(dim=0), ["dim=0", "whole number from 1 on"]),
        (lambda: tiny(dim=16.0), ["dim=16.0", "whole number from 1 on"]),
        (lambda: tiny(img_size=0), ["img_size=0", "whole number of pixels from 1 on"]),
        (lambda: tiny(img_size=-32), ["img_size=-32", "from 1 on"]),
        (lambda: tiny(img_size=32.0), ["img_size=32.0", "whole number of pixels"]),
        (lambda: tiny(img_size="32"), ["img_size='32'", "whole number of pixels"]),
        (lambda: tiny(img_size=(3, 32, 32)), ["(3, 32, 32)", "(height, width)"]),
        (lambda: tiny(img_size=(32, 0)), ["(32, 0)", "(height, width)"]),
        (lambda: tiny(img_size=(32,)), ["(32,)", "(height, width)"]),
        (lambda: cost(tiny(), 0), ["img_size=0", "whole number of pixels"]),
        (
            lambda: tiny(attention=NoMixing),
            ["NoMixing", "class_depth=1", "class_depth=0", "same answer"],
        ),
    ],
)
def test_a_mistake_is_answered_with_what_to_do(build, words):
    with pytest.raises(ValueError) as error:
        build()
    assert all(word in str(error.value) for word in ["got", "expected", *words]), error.value


@pytest.mark.parametrize(
    "img_size", [np.int64(13), [13, 13], (np.int32(13), 13), torch.Size((13, 13))]
)
def test_an_image_size_is_any_whole_number(img_size):
    assert tiny(img_size=img_size).positions.shape == (1, 16, 4, 4)
    assert cost(tiny(), img_size) == cost(tiny(), 13)


# ------------------------------------------------------------------------------------------- copied

WITHOUT_US = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
COPIED = """
import torch
from {where}model import XViT
from {where}baselines import XCA
from {where}dense import SemanticFPN, XViTBackbone

body = XViT(img_size=16, num_classes=3, dim=8, depth=1, num_heads=2, stem_stride=4, attention=XCA)
assert body(torch.zeros(2, 3, 20, 16)).shape == (2, 3)
assert SemanticFPN(XViTBackbone(body, 8), 2)(torch.zeros(2, 3, 40, 33)).shape == (2, 2, 40, 33)
import sys
assert not any(name.startswith("xvit_minimal") for name in sys.modules)
"""


@pytest.mark.parametrize(
    "files", [("attention", "model"), ("attention", "model", "dense", "baselines")]
)
@pytest.mark.parametrize("how", ["as a package", "without an __init__", "loose"])
def test_files_that_are_copied_side_by_side_work(tmp_path, how, files):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in files:
        (folder / f"{name}.py").write_bytes((ROOT / f"xvit_minimal/{name}.py").read_bytes())
    if how == "as a package":
        (folder / "__init__.py").touch()
    program = COPIED if len(files) == 4 else "from {where}model import xvit_pico\nxvit_pico()"
    program = program.format(where="" if how == "loose" else "mine.")
    place = folder if how == "loose" else tmp_path
    subprocess.run([sys.executable, "-c", program], cwd=place, env=WITHOUT_US, check=True)
