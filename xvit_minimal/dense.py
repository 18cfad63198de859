"""Dense prediction: an X-ViT's tokens as a pyramid of feature maps, and on it a segmentation head and a detector.

Shapes: B the batch, C the width of the body, c that of the pyramid, (H, W) an image's size in pixels, J the classes. A map of
stride s holds one vector for each s x s pixels. Images may have any size. The pyramid and the detector are torchvision's.
"""

import copy
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork

VOID = 255  # the value of a mask's pixel that belongs to no class: no loss and no score counts it


class XViTBackbone(nn.Module):
    """A feature pyramid on an XViT: images (B, 3, H, W) -> {"0": (B, c, h, w), ...}, one map for each of `strides`.

    Takes a copy of the stem, positions and blocks of `body`, trained or not, and leaves its class attention and head. The
    tokens after equally spaced blocks, all on one grid, are enlarged by transposed convolutions or reduced by max-pooling
    to the strides, as XCiT does (arXiv:2106.09681), then torchvision's FeaturePyramidNetwork (arXiv:1612.03144) brings
    them to `channels`. Each map is padded at its right and lower edge up to a multiple of the largest stride, h = ⌈H / largest⌉ *
    largest / stride if the body's tokens are no larger than that. This padding is added after the attention, so no token
    of it is ever summed into KᵀV.
    Raises ValueError if the strides are not increasing powers of 2, or the channels no multiple of 8.
    """

    def __init__(self, body, channels=64, strides=(4, 8, 16, 32)):
        super().__init__()
        strides = tuple(strides)
        if (
            not strides
            or any(s < 2 or s & (s - 1) for s in strides)
            or list(strides) != sorted(set(strides))
        ):
            raise ValueError(
                f"got strides {strides}, expected increasing powers of 2, such as (4, 8, 16, 32)"
            )
        if channels < 8 or channels % 8:
            raise ValueError(
                f"got {channels} channels for the pyramid, expected a multiple of 8: its heads norm them in eights"
            )
        self.body = copy.deepcopy(body)
        for part in ("class_token", "class_blocks", "norm", "head"):
            setattr(self.body, part, None)
        dim, depth = body.positions.shape[1], len(body.blocks)
        self.strides, self.out_channels = strides, channels
        self.taps = [math.ceil(depth * n / len(strides)) for n in range(1, len(strides) + 1)]
        self.resize = nn.ModuleList(_resize(dim, body.stem_stride, stride) for stride in strides)
        self.fpn = FeaturePyramidNetwork([dim] * len(strides), channels, norm_layer=nn.BatchNorm2d)

    def forward(self, x):
        grids = self.body.forward_features(
            x, self.taps
        )  # for each stride (B, C, H / stem, W / stem), rounded up
        unit = max(
            self.strides[-1] // self.body.stem_stride, 1
        )  # tokens along a cell of the coarsest map
        pad = (0, -grids[0].shape[3] % unit, 0, -grids[0].shape[2] % unit)
        return self.fpn(
            {
                str(n): resize(F.pad(grid, pad))
                for n, (resize, grid) in enumerate(zip(self.resize, grids))
            }
        )


class SemanticFPN(nn.Module):
    """A class for every pixel: images (B, 3, H, W) -> logits (B, num_classes, H, W).

    Every map of the pyramid goes through convolutions with GroupNorm and ReLU, its size doubled after each, until all have
    the first one's stride; their sum becomes the logits, which are enlarged to the image's size.
    Source: Kirillov et al., Panoptic Feature Pyramid Networks, arXiv:1901.02446.
    """

    def __init__(self, backbone, num_classes):
        super().__init__()
        self.backbone = backbone
        self.branches = nn.ModuleList(
            _branch(backbone.out_channels, (stride // backbone.strides[0]).bit_length() - 1)
            for stride in backbone.strides
        )
        self.head = nn.Conv2d(backbone.out_channels, num_classes, 1)

    def forward(self, x):
        levels = self.backbone(x).values()
        total = sum(
            branch(level) for branch, level in zip(self.branches, levels)
        )  # (B, c, h, w) of the first level
        logits = F.interpolate(
            self.head(total), scale_factor=self.backbone.strides[0], mode="bilinear"
        )
        return logits[:, :, : x.shape[2], : x.shape[3]]  # (B, J, H, W): what was padded is cut off


def segmentation_loss(logits, masks):
    """Cross-entropy, the mean over the pixels that have a class: logits (B, J, H, W), masks (B, H, W) of integers -> ().

    A pixel of value VOID counts nowhere; without any other, the loss is 0. In float32.
    Raises ValueError for masks of another size than the logits', or with a class that the logits do not have.
    """
    B, J, H, W = logits.shape
    if masks.shape != (B, H, W):
        raise ValueError(
            f"got masks {tuple(masks.shape)} for logits {tuple(logits.shape)}, expected {(B, H, W)}: resize "
            "masks with their images, by the nearest pixel"
        )
    masks = masks.long()
    valid = masks != VOID  # (B, H, W)
    if (wrong := masks[valid & ((masks < 0) | (masks >= J))]).numel():
        raise ValueError(
            f"got a class {wrong[0].item()} in a mask, expected 0 to {J - 1}, or {VOID} for void: correct the mask"
        )
    total = F.cross_entropy(logits.float(), masks, ignore_index=VOID, reduction="sum")
    return total / valid.sum().clamp(min=1)


class _Head(RetinaNetHead):
    """RetinaNet's head in float32 also under autocast: bfloat16 has 8 bits, too few for a corner among 1,000 pixels."""

    def forward(self, maps):
        device = maps[0].device.type
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            return super().forward([level.float() for level in maps])


class _AsTheyAre(GeneralizedRCNNTransform):
    """What RetinaNet does to images first, without its resizing to 800 pixels: it only pads them."""

    def resize(self, image, target=None):
        return image, target


def detector(backbone, num_classes):
    """torchvision's RetinaNet on an XViTBackbone, for images that data.normalize made; classes count from 0.

    In evaluation mode images (B, 3, H, W), or a list of images of different sizes, -> a list of {"boxes" (n, 4) as x0 y0 x1
    y1 in pixels, "scores" (n,), "labels" (n,)}. Images are padded with zeros to a common size and a multiple of the largest stride. In training mode `model(images, targets)` -> {"classification",
    "bbox_regression"}, the losses; a target holds "boxes" and "labels". At each cell of a map stand nine anchors: sides of
    2, 2.5 and 3.2 strides, as squares and at 1:2 and 2:1. Half of what RetinaNet uses, for images are small here.
    Source: Lin et al., Focal Loss for Dense Object Detection, arXiv:1708.02002.
    """
    sizes = tuple(
        tuple(2 * stride * 2 ** (third / 3) for third in range(3)) for stride in backbone.strides
    )
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    head = _Head(
        backbone.out_channels,
        anchors.num_anchors_per_location()[0],
        num_classes,
        partial(nn.GroupNorm, backbone.out_channels // 8),
    )
    model = RetinaNet(
        backbone, num_classes, anchor_generator=anchors, head=head, detections_per_img=100
    )
    model.transform = _AsTheyAre(1, 1, [0.0] * 3, [1.0] * 3, size_divisible=backbone.strides[-1])
    return model


def transfer(body, trained):
    """Copy the stem, positions and blocks of a trained XViT into `body`, whose positions may have another grid.

    Raises ValueError if the two have other widths, depths, heads, stems or attentions."""
    ours, theirs = body.state_dict(), trained.state_dict()
    names = [name for name in ours if name.split(".")[0] in ("stem", "positions", "blocks")]
    extra = [name for name in theirs if name.split(".")[0] == "blocks" and name not in ours]
    for name in names + extra:
        a, b = (
            tuple(weights[name].shape) if name in weights else None for weights in (ours, theirs)
        )
        if a != b and not (name == "positions" and a[1] == b[1]):
            raise ValueError(
                f"{name} is {b} in the checkpoint and {a} in this model: give the checkpoint's own --model, "
                "--dim, --depth, --num-heads, --stem-stride, --attention and --lpi or --no-lpi"
            )
    for block, other in zip(body.blocks, trained.blocks):
        a, b = (
            f"{type(m).__name__} with {m.num_heads} heads"
            for m in (block.attention.part, other.attention.part)
        )
        if a != b:  # no shape tells them apart
            raise ValueError(
                f"the attention is {b} in the checkpoint and {a} in this model: give the checkpoint's own "
                "--attention and --num-heads"
            )
    weights = {name: theirs[name] for name in names}
    if weights["positions"].shape != ours["positions"].shape:
        weights["positions"] = F.interpolate(
            weights["positions"], ours["positions"].shape[2:], mode="bicubic", align_corners=False
        )
    body.load_state_dict({**ours, **weights})


def _resize(dim, have, want):
    """A grid of stride `have` to stride `want`: (B, dim, h, w) -> (B, dim, h * have / want, w * have / want)."""
    if have <= want:
        return nn.MaxPool2d(want // have) if have < want else nn.Identity()
    layers = []
    for _ in range((have // want).bit_length() - 1):
        layers += [nn.ConvTranspose2d(dim, dim, 2, stride=2), nn.BatchNorm2d(dim), nn.GELU()]
    return nn.Sequential(*layers[:-2])


def _branch(channels, doublings):
    """Convolutions of the segmentation head, each but for doublings = 0 followed by an enlargement to twice the size."""
    layers = []
    for _ in range(max(doublings, 1)):
        layers.append(
            Conv2dNormActivation(
                channels, channels, 3, norm_layer=partial(nn.GroupNorm, channels // 8)
            )
        )
        if doublings:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear"))
    return nn.Sequential(*layers)
