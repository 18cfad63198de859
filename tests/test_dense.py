"""Dense prediction (dense.py, tasks.py): pyramid, heads, losses, scores, runs of both tasks."""

import copy
import json
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from test_records import problems_in_records
from test_resume import stop_at, weights
from torch import nn
from torchvision.ops import FeaturePyramidNetwork

from xvit_minimal import data, dense_data, train
from xvit_minimal.baselines import (
    ATTENTIONS,
    VARIANTS,
    XCA,
    EfficientAttention,
    SoftmaxAttention,
    XNormL1,
)
from xvit_minimal.dense import (
    VOID,
    SemanticFPN,
    XViTBackbone,
    detector,
    segmentation_loss,
    transfer,
)
from xvit_minimal.model import XViT
from xvit_minimal.recipe import recipe
from xvit_minimal.tasks import TASKS

SIZES = [(1, 1), (4, 4000), (33, 65), (32, 64)]


def body_of(img_size=32, stem_stride=4, **changes):
    small = dict(
        img_size=img_size, num_classes=3, dim=8, depth=2, num_heads=2, stem_stride=stem_stride
    )
    return XViT(**{**small, **changes})


def segmenter(stem_stride=4, strides=(4, 8, 16, 32), num_classes=3):
    return SemanticFPN(XViTBackbone(body_of(stem_stride=stem_stride), 8, strides), num_classes)


def tiny_detector(num_classes=2, strides=(8, 16, 32), channels=16, **changes):
    return detector(XViTBackbone(body_of(stem_stride=8, **changes), channels, strides), num_classes)


def a_target(*boxes, labels=None):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float).reshape(-1, 4),
        "labels": torch.tensor([0] * len(boxes) if labels is None else labels, dtype=torch.int64),
    }


@pytest.fixture(autouse=True)
def the_same_draws():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------ pyramid


@pytest.mark.parametrize("stem_stride", [2, 4, 8, 16])
@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (8, 16), (2,)])
@pytest.mark.parametrize("size", [(1, 1), (33, 65), (64, 32)])
def test_each_map_has_its_stride(stem_stride, strides, size):
    maps = XViTBackbone(body_of(stem_stride=stem_stride), 16, strides).eval()(
        torch.randn(2, 3, *size)
    )
    coarsest = max(strides[-1], stem_stride)
    assert list(maps) == [str(n) for n in range(len(strides))]
    for stride, found in zip(strides, maps.values()):
        assert found.shape == (2, 16, *(-(-side // coarsest) * coarsest // stride for side in size))
        assert found.isfinite().all()


@pytest.mark.parametrize("strides", [(), (1, 2), (3, 6), (8, 4), (4, 4), (4, 12), (0, 4)])
def test_strides_that_are_no_increasing_powers_of_two_are_refused(strides):
    with pytest.raises(ValueError, match="expected increasing powers of 2"):
        XViTBackbone(body_of(), 8, strides)


@pytest.mark.parametrize("channels", [0, 4, 12, -8])
def test_channels_that_are_no_multiple_of_eight_are_refused(channels):
    with pytest.raises(
        ValueError, match=f"got {channels} channels for the pyramid, expected a multiple of 8"
    ):
        XViTBackbone(body_of(), channels)


def test_a_trained_body_gives_the_same_tokens_and_is_left_as_it_is():
    body, x = body_of(class_depth=1), torch.randn(4, 3, 32, 32)
    optimizer = torch.optim.AdamW(body.parameters(), 1e-2)
    for _ in range(2):
        F.cross_entropy(body(x), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    before = {name: value.clone() for name, value in body.eval().state_dict().items()}
    backbone = XViTBackbone(body, 8).eval()
    assert torch.equal(backbone.body.forward_features(x), body.forward_features(x))
    backbone.train()(x)["0"].sum().backward()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
    assert body.head is not None and len(body.class_blocks) == 1
    assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items())


def test_taps_are_the_grids_after_those_blocks():
    body, x = body_of(depth=3).eval(), torch.randn(1, 3, 16, 24)
    first, same, last = body.forward_features(x, taps=[1, 1, 3])
    assert (
        torch.equal(first, same)
        and torch.equal(last, body.forward_features(x))
        and first.shape == (1, 8, 4, 6)
    )
    body.blocks = body.blocks[:1]
    assert torch.equal(body.forward_features(x), first)
    assert [XViTBackbone(body_of(depth=depth), 8).taps for depth in (1, 4, 7)] == [
        [1] * 4,
        [1, 2, 3, 4],
        [2, 4, 6, 7],
    ]


@pytest.mark.parametrize("size", [(1, 1), (33, 65), (5, 40)])
def test_no_token_of_the_padding_reaches_the_attention(size):
    body, x, seen = body_of().eval(), torch.randn(1, 3, *size), []
    h, w = (-(-side // 4) for side in size)
    for strides in ((4,), (4, 64)):
        backbone = XViTBackbone(body, 8, strides).eval()
        for block in backbone.body.blocks:
            block.attention.part.register_forward_hook(
                lambda _, inputs, output: seen.append((inputs[0], output))
            )
        backbone.resize[0].register_forward_pre_hook(
            lambda _, inputs: seen.append((inputs[0][:, :, :h, :w],) * 2)
        )
        backbone(x)
    half = len(seen) // 2
    assert half == 3 and seen[0][0].shape[1] == h * w
    shallow, deep = seen[:half], seen[half:]
    assert all(
        torch.equal(a, b) for one, other in zip(shallow[:2], deep) for a, b in zip(one, other)
    )
    assert torch.equal(shallow[2][0], body.forward_features(x))
    assert torch.equal(deep[2][0], body.forward_features(x, [1])[0])


def test_the_pyramid_is_torchvisions():
    backbone = XViTBackbone(body_of(), 8)
    theirs = FeaturePyramidNetwork([8] * 4, 8, norm_layer=nn.BatchNorm2d)
    theirs.load_state_dict(backbone.fpn.state_dict())
    maps = [torch.randn(2, 8, 32 // 2**n, 16 // 2**n) for n in range(4)]
    ours = backbone.fpn(maps)
    expected = theirs({str(n): level for n, level in enumerate(maps)})
    assert list(ours) == list(expected)
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


# ---------------------------------------------------------------------- pictures of different sizes

OWN_SIZES = [(33, 40), (1, 1), (20, 65), (64, 9), (20, 65)]


def padded(sizes, fill, height=64, width=70):
    """Pictures of these sizes, and in one tensor, with `fill` beside them."""
    x = torch.full((len(sizes), 3, height, width), fill, dtype=torch.float64)
    draws = torch.Generator().manual_seed(3)
    pictures = [torch.randn(3, h, w, dtype=torch.float64, generator=draws) for h, w in sizes]
    for n, (h, w) in enumerate(sizes):
        x[n, :, :h, :w] = pictures[n]
    return pictures, x, torch.tensor(sizes)


def unsettle(model):
    """Norms and positions as training may leave them, so that nothing is 0 by chance."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2)
    nn.init.normal_(model.backbone.body.positions)
    return model.double()


@pytest.mark.parametrize(
    "stem_stride, strides", [(4, (4, 8, 16, 32)), (2, (4, 8)), (16, (2, 4)), (8, (4, 16))]
)
def test_a_picture_has_the_logits_that_it_has_alone(stem_stride, strides):
    model = unsettle(segmenter(stem_stride, strides)).eval()
    pictures, x, sizes = padded(OWN_SIZES, math.nan)
    together = model(x, sizes)
    for n, (h, w) in enumerate(OWN_SIZES):
        alone = model(pictures[n][None])[0]
        torch.testing.assert_close(together[n, :, :h, :w], alone, rtol=1e-8, atol=1e-8)
        assert not together[n, :, h:].any() and not together[n, :, :, w:].any()


@pytest.mark.parametrize("name", [*ATTENTIONS, *VARIANTS])
def test_maps_of_every_attention_are_those_of_a_picture_alone(name):
    body = body_of(attention=(ATTENTIONS | VARIANTS)[name], class_depth=0)
    backbone = XViTBackbone(body, 8).double().eval()
    pictures, x, sizes = padded(OWN_SIZES, math.nan)
    maps = list(backbone(x, sizes).values())
    for n, size in enumerate(OWN_SIZES):
        alone = backbone(pictures[n][None]).values()
        for level, own in zip(backbone.own_maps(maps, [n], size), alone):
            torch.testing.assert_close(level, own, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("training", [True, False])
def test_pictures_that_fill_the_tensor_need_no_sizes(training):
    model = unsettle(segmenter()).train(training)
    _, x, sizes = padded([(40, 33)] * 3, 0.0, 40, 33)
    other = copy.deepcopy(model)
    torch.testing.assert_close(model(x, sizes), other(x), rtol=1e-8, atol=1e-8)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name])


def test_in_training_nothing_depends_on_what_the_padding_holds():
    trained = unsettle(segmenter()).train()
    results = []
    for fill, room in ((0.0, (64, 70)), (math.nan, (64, 70)), (7.0, (90, 140))):
        model = copy.deepcopy(trained)
        _, x, sizes = padded(OWN_SIZES, fill, *room)
        masks = torch.full((len(x), *room), VOID)
        for n, (h, w) in enumerate(OWN_SIZES):
            masks[n, :h, :w] = torch.arange(w) % 3
        loss = segmentation_loss(model(x, sizes), masks)
        loss.backward()
        gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
        results.append({"loss": loss, **gradients, **dict(model.named_buffers())})
    for result in results[1:]:
        for name, value in result.items():
            torch.testing.assert_close(value, results[0][name], rtol=1e-6, atol=1e-8)


def test_a_detector_finds_in_a_batch_what_it_finds_alone():
    model = unsettle(tiny_detector()).eval()
    nn.init.zeros_(model.head.classification_head.cls_logits.bias)  # it finds something everywhere
    pictures, *_ = padded(OWN_SIZES, 0.0)
    together = model(pictures)
    for picture, found in zip(pictures, together):
        (alone,) = model([picture])
        assert len(alone["boxes"]) and torch.equal(found["labels"], alone["labels"])
        for key in ("boxes", "scores"):
            torch.testing.assert_close(found[key], alone[key], rtol=1e-8, atol=1e-8)


def test_a_detectors_losses_are_the_mean_of_those_of_its_pictures_alone():
    model = unsettle(tiny_detector()).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # what it takes from a batch is tested above
    pictures, *_ = padded(OWN_SIZES, 0.0)
    targets = [
        a_target((0, 0, w, h), (w / 4, h / 4, w / 2, h / 2), labels=[0, 1]) for h, w in OWN_SIZES
    ]
    targets[2] = a_target()
    together = model(pictures, targets)
    alone = [model([picture], [target]) for picture, target in zip(pictures, targets)]
    for name, loss in together.items():
        mean = sum(each[name] for each in alone) / len(alone)
        torch.testing.assert_close(loss, mean, rtol=1e-8, atol=1e-8)


def test_a_detector_trains_on_pictures_of_different_sizes():
    model = tiny_detector()
    pictures = [torch.randn(3, 40, 33), torch.randn(3, 20, 65)]
    sum(model(pictures, [a_target((2, 2, 20, 19))] * 2).values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------------------------- segmentation


@pytest.mark.parametrize("stem_stride", [2, 4, 16])
@pytest.mark.parametrize("size", SIZES)
def test_every_pixel_of_any_image_gets_logits(size, stem_stride):
    model, seen = segmenter(stem_stride).eval(), []
    model.head.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        logits = model(torch.randn(1, 3, *size))
    assert logits.shape == (1, 3, *size) and logits.isfinite().all()
    whole = F.interpolate(seen[0], scale_factor=4, mode="bilinear")
    assert whole.shape[2:] == tuple(-(-side // 32) * 32 for side in size)
    assert torch.equal(logits, whole[:, :, : size[0], : size[1]])


@pytest.mark.parametrize(
    "stem_stride, strides", [(4, (4, 8, 16, 32)), (2, (4, 8)), (16, (2, 4)), (8, (8,))]
)
def test_a_gradient_reaches_every_parameter_of_a_segmentation_model(stem_stride, strides):
    model = segmenter(stem_stride, strides)
    segmentation_loss(model(torch.randn(2, 3, 40, 33)), torch.randint(3, (2, 40, 33))).backward()
    assert not [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all()
    ]
    assert not [name for name, p in model.named_parameters() if not p.grad.any()]


def by_hand(logits, masks):
    losses = [
        -logits[b, :, y, x].double().log_softmax(0)[masks[b, y, x]]
        for b in range(masks.shape[0])
        for y in range(masks.shape[1])
        for x in range(masks.shape[2])
        if masks[b, y, x] != VOID
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.int32])
def test_the_segmentation_loss_is_the_mean_over_pixels_with_a_class(kind):
    logits, masks = 5 * torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    masks[0, :2], masks[1, 3, 1] = VOID, VOID
    logits.requires_grad_()
    loss = segmentation_loss(logits, masks.to(kind))
    torch.testing.assert_close(loss.double(), by_hand(logits.detach(), masks), rtol=1e-6, atol=0)
    loss.backward()
    assert torch.equal((logits.grad != 0).any(1), masks != VOID)


def test_only_void_is_no_loss():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 2, 2), VOID, dtype=torch.uint8))
    loss.backward()
    assert loss == 0 and not logits.grad.any()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_reduced_in_float32(kind):
    logits, masks = (20 * torch.randn(2, 4, 64, 64)).to(kind), torch.randint(4, (2, 64, 64))
    loss = segmentation_loss(logits, masks)
    assert loss.dtype == torch.float32 and torch.equal(
        loss, segmentation_loss(logits.float(), masks)
    )


@pytest.mark.parametrize(
    "masks, message",
    [
        (
            torch.zeros(1, 4, 5).long(),
            r"got masks \(1, 4, 5\) for logits \(1, 3, 4, 4\), expected \(1, 4, 4\): resize",
        ),
        (torch.zeros(4, 4).long(), "got masks"),
        (torch.full((1, 4, 4), -1), "got a class -1 in a mask"),
        (torch.full((1, 4, 4), 3), "got a class 3 in a mask, expected 0 to 2, or 255 for void"),
        (torch.full((1, 4, 4), 254, dtype=torch.uint8), "got a class 254"),
        (torch.full((1, 4, 4), 1.0), "got masks of torch.float32, expected integers"),
        (torch.full((1, 4, 4), 1 / 255, dtype=torch.float64), "read them without scaling to 0..1"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks, message):
    with pytest.raises(ValueError, match=message):
        segmentation_loss(torch.zeros(1, 3, 4, 4), masks)


# ---------------------------------------------------------------------------------------- detection


@pytest.mark.parametrize("size", SIZES)
def test_a_detector_takes_any_image(size):
    (found,) = tiny_detector().eval()(torch.randn(1, 3, *size))
    n = len(found["scores"])
    assert found["boxes"].shape == (n, 4) and found["labels"].shape == (n,) and n <= 100
    assert all(value.isfinite().all() for value in found.values())


def test_a_detector_takes_images_of_different_sizes_and_keeps_boxes_inside_each():
    model = tiny_detector().eval()
    nn.init.zeros_(
        model.head.classification_head.cls_logits.bias
    )  # so that it finds something everywhere
    found = model([torch.randn(3, 20, 50), torch.randn(3, 40, 30)])
    for each, (height, width) in zip(found, ((20, 50), (40, 30)), strict=True):
        assert len(each["boxes"]) == 100 and set(each["labels"].tolist()) <= {0, 1}
        assert (each["boxes"] >= 0).all() and (
            each["boxes"] <= torch.tensor([width, height] * 2)
        ).all()


def test_the_narrowest_pyramid_detects_in_the_smallest_image():
    assert tiny_detector(channels=8).eval()(torch.randn(1, 3, 1, 1))


def test_nine_anchors_stand_at_each_cell():
    model = tiny_detector(strides=(8, 16))
    for found, stride in zip(model.anchor_generator.cell_anchors, (8, 16)):
        sides = found[:, 2:] - found[:, :2]  # (9, 2)
        areas = torch.tensor([(2 * stride * 2 ** (k // 3 / 3)) ** 2 for k in range(9)])
        assert len(found) == 9 and sorted(
            set((sides[:, 1] / sides[:, 0]).mul(2).round().tolist())
        ) == [1, 2, 4]
        torch.testing.assert_close(
            sides.prod(1).sort()[0], areas, rtol=0.06, atol=0
        )  # corners are whole pixels


@pytest.mark.parametrize(
    "targets",
    [
        [a_target(), a_target()],
        [a_target((2, 2, 20, 20)), a_target()],
        [a_target((2, 2, 20, 20), (0, 0, 33, 40), labels=[1, 0])] * 2,
    ],
)
def test_a_gradient_reaches_every_parameter_of_a_detector(targets):
    model = tiny_detector()
    losses = model(torch.randn(2, 3, 40, 33), targets)
    assert set(losses) == {"classification", "bbox_regression"} and all(
        loss.isfinite() for loss in losses.values()
    )
    sum(losses.values()).backward()
    assert not [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all()
    ]
    if len(targets[1]["boxes"]):
        assert not [name for name, p in model.named_parameters() if not p.grad.any()]


@pytest.mark.parametrize("label", [0, 1])
def test_a_detector_finds_the_box_it_was_shown(label):
    model, x = tiny_detector(dim=16), torch.full((2, 3, 32, 32), -1.0)
    x[:, :, 8:24, 4:20] = 1
    targets = [a_target((4, 8, 20, 24), labels=[label])] * 2
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = sum(model(x, targets).values())
        loss.backward()
        optimizer.step()
    found = model.eval()(x)[0]
    best = found["scores"].argmax()
    assert found["scores"][best] > 0.5 and found["labels"][best] == label, loss
    assert (found["boxes"][best] - targets[0]["boxes"][0]).abs().max() < 4


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["bccd", "camvid"])
def test_shipped_models_in_another_precision(name, kind):
    model, _ = train.load_model(ROOT / f"book/weights/{name}.safetensors")
    model.score_thresh = 0.0  # in noise no box reaches the one in the file
    x = torch.randn(2, 3, 97, 64)
    with torch.no_grad():
        expected, found = model(x), copy.deepcopy(model).to(kind)(x.to(kind))
    if name == "camvid":
        assert found.dtype == kind
        assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.9
    else:
        wide = torch.promote_types(kind, torch.float32)
        for mine, other in zip(found, expected):
            assert mine["boxes"].dtype == mine["scores"].dtype == wide
            assert abs(mine["scores"].max() - other["scores"].max()) < 0.05


def test_anchors_are_exact_whatever_the_maps_are():
    """bfloat16 has 8 bits: anchors beyond pixel 256 would stand up to 2 pixels off."""
    model, sides = tiny_detector(), [(80, 100), (40, 50), (20, 25)]
    exact = model._anchors([torch.zeros(1, 16, *side) for side in sides])
    rounded = model._anchors([torch.zeros(1, 16, *side, dtype=torch.bfloat16) for side in sides])
    for level, other, stride in zip(exact, rounded, (8, 16, 32)):
        assert other.dtype == torch.float32 and torch.equal(level, other)
        corners = torch.stack([level[9::9, 0] - level[0, 0], level[9::9, 1] - level[0, 1]], 1)
        assert (corners % stride == 0).all() and corners.max() == max(sides[0]) * 8 - stride


def test_the_score_from_which_on_a_box_counts_can_be_set():
    model = tiny_detector().eval()
    nn.init.zeros_(model.head.classification_head.cls_logits.bias)
    x = torch.randn(1, 3, 40, 33)
    scores = model(x)[0]["scores"]
    assert model.score_thresh == 0.05 and len(scores) == 100
    model.score_thresh = scores.median().item()
    kept = model(x)[0]["scores"]
    assert 0 < len(kept) < 100 and (kept > model.score_thresh).all()


@pytest.mark.parametrize(
    "targets, message",
    [
        (None, "got no targets for 1 images, expected one for each in training: call model.eval"),
        ([], "got 0 targets for 1 images"),
        (
            [a_target((2, 2, 2, 5))],
            r"got the box \[2.0, 2.0, 2.0, 5.0\] for image 0, expected x0 <",
        ),
        ([a_target((2, 9, 5, 5))], "expected x0 < x1 and y0 < y1"),
        ([a_target((2, 2, 5, math.nan))], "got the box"),
        ([a_target((2, 2, 5, math.inf))], r"got the box \[2.0, 2.0, 5.0, inf\] for image 0"),
        ({"boxes": torch.zeros(1, 4)}, "got 'boxes' as the target of image 0"),
        ([{"boxes": torch.zeros(1, 4)}], "expected a dictionary with boxes and labels"),
        ([a_target((2, 2, 5, 5), labels=[-1])], r"got labels \[-1\] .* of image 0"),
        ([a_target((2, 2, 5, 5), labels=[99])], "classes count from 0, and none stands for"),
        (
            [{**a_target((2, 2, 5, 5)), "labels": torch.ones(1)}],
            r"got labels \[1.0\] \(torch.float32\) of image 0, expected int64",
        ),
        (
            [{**a_target((2, 2, 5, 5)), "labels": torch.ones(1, dtype=torch.uint8)}],
            r"got labels \[1\] \(torch.uint8\)",
        ),
        ([a_target((2, 2, 5, 5), labels=[0, 1])], r"got boxes \(1, 4\) for 2 labels of image 0"),
    ],
)
def test_targets_that_do_not_fit_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        tiny_detector()(torch.randn(1, 3, 40, 33), targets)


@pytest.mark.parametrize(
    "pictures, message",
    [
        ([], "got no images, expected one at least"),
        (torch.zeros(0, 3, 8, 8), "got no images"),
        (torch.zeros(3, 8, 8), r"got torch.float32 of shape \(8, 8\) for image 0"),
        ([torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)], r"of shape \(1, 8, 8\) for image 1"),
        ([torch.zeros(3, 0, 8)], r"of shape \(3, 0, 8\) for image 0"),
        ([torch.zeros(3, 8, 8, dtype=torch.uint8)], "got torch.uint8 .* data.normalize"),
        ([np.zeros((3, 8, 8), np.float32)], r"got ndarray for image 0"),
        (["cat.jpg"], "got str for image 0"),
    ],
)
def test_a_detector_refuses_what_is_no_picture(pictures, message):
    with pytest.raises(ValueError, match=message):
        tiny_detector().eval()(pictures)


class Network(nn.Module):
    """A detector up to what its head says; what follows depends on the image."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.head(list(self.model.backbone(x).values()))


@pytest.mark.parametrize("build", [segmenter, lambda: Network(tiny_detector())])
def test_one_compiled_model_takes_size_after_size(build):
    torch._dynamo.reset()
    model = build().eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size in [(32, 32), (48, 32), (17, 30), (5, 33)]:
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(x), model(x))


def test_the_head_computes_in_float32_under_autocast():
    head, maps = (
        tiny_detector().head,
        [torch.randn(2, 16, 4, 4).bfloat16(), torch.randn(2, 16, 2, 2).bfloat16()],
    )
    plain = head([level.float() for level in maps])
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
        found = head(maps)
    assert all(
        value.dtype == torch.float32 and torch.equal(value, plain[name])
        for name, value in found.items()
    )


# --------------------------------------------------------------------------- weights from elsewhere


def test_stem_and_blocks_are_copied_and_positions_interpolated():
    theirs, ours = body_of(class_depth=1), body_of(img_size=(64, 40), class_depth=0)
    head = ours.head.weight.clone()
    transfer(ours, theirs)
    for name, value in ours.state_dict().items():
        if name.split(".")[0] in ("stem", "blocks"):
            assert torch.equal(value, theirs.state_dict()[name])
    resized = F.interpolate(theirs.positions, (16, 10), mode="bicubic", align_corners=False)
    assert torch.equal(ours.positions, resized) and torch.equal(ours.head.weight, head)
    same = body_of()
    transfer(same, theirs)
    assert torch.equal(same.positions, theirs.positions)


@pytest.mark.parametrize(
    "changes",
    [
        dict(dim=16),
        dict(depth=1),
        dict(depth=3),
        dict(stem_stride=8),
        dict(attention=XCA),
        dict(lpi=False),
        dict(attention=SoftmaxAttention),
        dict(num_heads=4),
    ],
)
def test_another_body_is_refused_with_the_options_that_make_it(changes):
    body, trained = body_of(), body_of(**changes)
    before = {name: value.clone() for name, value in body.state_dict().items()}
    with pytest.raises(
        ValueError,
        match="in the checkpoint and .* in this model: give .*--dim, --depth, --num-heads",
    ):
        transfer(body, trained)
    assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items())


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (dict(attention=SoftmaxAttention), dict(attention=SoftmaxAttention, num_heads=4)),
        (dict(attention=SoftmaxAttention), dict(attention=EfficientAttention)),
        ({}, dict(attention=XNormL1)),
    ],
)
def test_heads_and_attentions_that_no_shape_tells_apart_are_refused(ours, theirs):
    with pytest.raises(ValueError, match="give the checkpoint's own"):
        transfer(body_of(**ours), body_of(**theirs))


BODY = dict(dim=8, depth=1, num_heads=2, device="cpu")
TINY = dict(limit=32, batch_size=8, epochs=1, size=32, pyramid=16, augment="crop", **BODY)


@pytest.fixture
def few_to_test(monkeypatch):
    """Twelve test images of shapes in place of 400."""
    whole = dense_data.load
    monkeypatch.setattr(
        dense_data,
        "load",
        lambda name, task, split="train", size=None, limit=None: whole(
            name, task, split, size, limit or (12 if name == "shapes" else None)
        ),
    )


def tiny(task, folder, **changes):
    return recipe(changes.pop("data", "shapes"), task, **{**TINY, "out": str(folder), **changes})


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The weights of a classifier of shapes."""
    folder = tmp_path_factory.mktemp("classifier")
    train.train(recipe("shapes", limit=64, batch_size=16, epochs=1, out=str(folder), **BODY))
    return folder / "weights.safetensors"


@pytest.mark.parametrize(
    "task, changes", [("segmentation", {}), ("detection", dict(stem_stride=4))]
)
def test_a_run_starts_with_the_body_of_a_classifier(
    classifier, tmp_path, few_to_test, task, changes
):
    config = tiny(
        task, tmp_path, init=str(classifier), size=48, amp=False, compile=False, **changes
    )
    config = replace(config, ema=0.9, lr=1e-3, batch_size=8, warmup=1)
    sets = {"train": TASKS[task].load(config, "train", 8)}
    model = train.Run(config, sets, torch.device("cpu")).model
    body = next(module for module in model.modules() if isinstance(module, XViT)).state_dict()
    theirs = train.load_model(classifier)[0].state_dict()
    assert all(
        torch.equal(body[name], theirs[name])
        for name in theirs
        if name.split(".")[0] in ("stem", "blocks")
    )
    resized = F.interpolate(theirs["positions"], (12, 12), mode="bicubic", align_corners=False)
    assert torch.equal(body["positions"], resized)


@pytest.mark.parametrize(
    "changes", [dict(dim=16), dict(depth=2), dict(attention="softmax"), dict(stem_stride=8)]
)
def test_a_run_refuses_the_body_of_another_model(classifier, tmp_path, few_to_test, changes):
    with pytest.raises(
        ValueError, match="weights.safetensors: .* give the checkpoint's own --model, .*--attention"
    ):
        train.train(tiny("segmentation", tmp_path, init=str(classifier), **changes))


# --------------------------------------------------------------------------------------------- runs


def check_record(tree, found):
    found = {
        **found,
        "command": "python -m xvit_minimal.train",
        "data": {**found["data"], "name": "x"},
        "config": {
            **found["config"],
            "out": "runs/x",
            "init": None,
            "data": "x",
        },  # folders of this machine
        "commit": (found["commit"] or "0123abc").removesuffix("-dirty"),
    }
    (tree / "book/runs/two.json").write_text(json.dumps(found))
    assert not problems_in_records(tree)


@pytest.mark.parametrize("task, score", [("segmentation", "test_miou"), ("detection", "test_map")])
def test_a_run_leaves_a_record_and_weights_that_give_its_scores(
    tree, tmp_path, few_to_test, task, score
):
    config = tiny(task, tmp_path / "run")
    found = train.train(config)
    check_record(tree, found)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "weights.safetensors",
        "record.json",
        "checkpoint.pt",
        "checkpoint.previous.pt",
    }
    assert found["data"]["splits"] == {"train": 32, "val": 12, "test": 12}
    assert score in found["results"][0]
    model, classes = train.load_model(tmp_path / "run/weights.safetensors")
    test = TASKS[task].load(config, "test", None)
    assert tuple(classes) == test.classes and not model.training
    scores = TASKS[task].evaluate(model, test, found["config"]["amp"])
    again = {f"test_{key}": value for key, value in scores.items()}
    ended = found["results"][0]
    of_each = {"segmentation": "test_pixel_counts", "detection": "test_map_by_image"}[task]
    assert again == {key: ended[key] for key in again} and set(ended) == {"epoch", of_each, *again}
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        assert model(data.normalize(test.images[:1])) is not None


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path, monkeypatch, few_to_test, task):
    """After a step in the middle of an epoch, with every augmentation."""
    changes = dict(epochs=2, limit=16, eval_epochs=2, drop_path=0.1)
    whole = train.train(tiny(task, tmp_path / "whole", **changes))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(3, patch, signal.SIGINT)
        train.train(tiny(task, tmp_path / "stopped", **changes))
    assert torch.load(tmp_path / "stopped/checkpoint.pt", weights_only=True)["step"] == 3
    found = train.train(tiny(task, tmp_path / "stopped", **changes))
    assert (
        weights(tmp_path / "stopped") == weights(tmp_path / "whole")
        and found["results"] == whole["results"]
    )


def test_a_run_on_oblong_pictures(tree, tmp_path):
    for part in ("train", "test"):
        for kind in (part, f"{part}annot"):
            (tmp_path / "roofs" / kind).mkdir(parents=True)
        for n in range(4):
            grey = np.random.default_rng(n).integers(0, 3, (24, 40), np.uint8)
            mask = np.where(grey == 2, VOID, grey).astype(np.uint8)
            Image.fromarray(np.stack([grey * 100] * 3, 2)).save(tmp_path / f"roofs/{part}/{n}.png")
            Image.fromarray(mask).save(tmp_path / f"roofs/{part}annot/{n}.png")
    (tmp_path / "roofs/classes.txt").write_text("sky\nroof\n")
    roofs = dict(data=str(tmp_path / "roofs"), size=40, limit=None, batch_size=2)
    found = train.train(tiny("segmentation", tmp_path / "run", **roofs))
    check_record(tree, found)
    model, classes = train.load_model(tmp_path / "run/weights.safetensors")
    assert model.backbone.body.positions.shape == (1, 8, 6, 10) and classes == ["sky", "roof"]
    assert {"test_iou_sky", "test_iou_roof", "test_accuracy"} < set(found["results"][0])
