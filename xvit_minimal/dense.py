"""Dense prediction: an X-ViT's tokens as a pyramid of maps, a segmentation head and a detector.

Shapes: B the batch, C the width of the body, c that of the pyramid, (H, W) an image's size in
pixels, J the classes. A map of stride s holds one vector for each s x s pixels. Images may have any
size, and one batch may hold several. The pyramid and the detector are torchvision's.
This file works when it is copied out together with attention.py and model.py.
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

if __package__:
    from .model import _beside_padding, _padding
else:  # copied out, and imported as a file by itself
    from model import _beside_padding, _padding

VOID = 255  # the value of a mask's pixel that belongs to no class: no loss and no score counts it


class XViTBackbone(nn.Module):
    """A feature pyramid on an XViT: images (B, 3, H, W) -> {"0": (B, c, h, w), ...}.

    Takes a copy of the stem, positions and blocks of `body`, trained or not, and leaves its class
    attention and head. The tokens after equally spaced blocks, all on one grid, are enlarged by
    transposed convolutions or reduced by max-pooling to the strides, as XCiT does
    (arXiv:2106.09681), then torchvision's FeaturePyramidNetwork (arXiv:1612.03144) brings them to
    `channels`. Each map is padded at its right and lower edge to whole cells of the coarsest,
    h = ⌈H / side⌉ * side / stride, where `side` is the largest stride, or the stem's if that is
    larger. This padding is added after the attention, so no token of it is ever summed into KᵀV.
    With `sizes`, integers (B, 2), the maps that a picture has alone stand at the upper left; what
    stands beyond them means nothing, and no BatchNorm counts it.
    Raises ValueError for strides that are not increasing powers of 2, or channels not in eights.
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
                f"got {channels} channels for the pyramid, expected a multiple of 8: heads norm "
                "eight at a time"
            )
        self.body = copy.deepcopy(body)
        for part in ("class_token", "class_blocks", "norm", "head"):
            setattr(self.body, part, None)
        dim, depth = body.positions.shape[1], len(body.blocks)
        self.strides, self.out_channels = strides, channels
        self.taps = [math.ceil(depth * n / len(strides)) for n in range(1, len(strides) + 1)]
        self.resize = nn.ModuleList(_resize(dim, body.stem_stride, stride) for stride in strides)
        self.fpn = _Pyramid([dim] * len(strides), channels, norm_layer=nn.BatchNorm2d)

    def forward(self, images, sizes=None):
        grids = self.body.forward_features(images, self.taps, sizes)  # for each stride (B, C, h, w)
        h, w = grids[0].shape[2:]
        side = self.side // self.body.stem_stride  # tokens along a cell of the coarsest map
        rows, columns = (h + side - 1) // side, (w + side - 1) // side
        padding = None
        if sizes is not None:
            padding = _padding(sizes, self.side, (rows, columns))  # (B, 1, rows, columns)
        maps = []
        for resize, grid in zip(self.resize, grids):
            grid = F.pad(grid, (0, columns * side - w, 0, rows * side - h))
            maps.append(_beside_padding(resize, grid, padding))
        return self.fpn(maps, padding)

    @property
    def side(self):
        """Pixels along a cell of the coarsest map."""
        return max(self.strides[-1], self.body.stem_stride)

    def own_maps(self, maps, index, size):
        """Of all maps, each (B, c, h, w), those of the pictures `index`, all of one size."""
        h, w = (-(-length // self.side) * self.side for length in size)  # whole cells, in pixels
        return [
            level[index, :, : h // stride, : w // stride]
            for level, stride in zip(maps, self.strides)
        ]


class SemanticFPN(nn.Module):
    """A class for every pixel: images (B, 3, H, W) -> logits (B, num_classes, H, W).

    Every map of the pyramid goes through convolutions with GroupNorm and ReLU, its size doubled
    after each, until all have the first one's stride; their sum becomes the logits, which are
    enlarged to the image's size. With `sizes`, integers (B, 2), the logits that a picture has alone
    stand at the upper left, and zeros beyond.
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

    def forward(self, images, sizes=None):
        maps = list(self.backbone(images, sizes).values())
        H, W = images.shape[2:]
        if sizes is None:
            return self._logits(maps, (H, W))
        logits = maps[0].new_zeros(len(images), self.head.out_channels, H, W)
        for (h, w), index in _by_size(sizes.tolist()):
            own = self.backbone.own_maps(maps, index, (h, w))
            logits[index, :, :h, :w] = self._logits(own, (h, w)).to(logits.dtype)
        return logits

    def _logits(self, maps, size):
        """The logits (B, J, h, w) of pictures of one size."""
        total = sum(branch(level) for branch, level in zip(self.branches, maps))  # (B, c, ·, ·)
        first = self.backbone.strides[0]
        logits = F.interpolate(self.head(total), scale_factor=first, mode="bilinear")
        return logits[:, :, : size[0], : size[1]]  # what was padded is cut off


def segmentation_loss(logits, masks):
    """Cross-entropy, the mean over the pixels that have a class, in float32: a scalar.

    Shapes: logits (B, J, H, W), masks (B, H, W) of integers. A pixel of value VOID counts nowhere;
    without any other, the loss is 0. Raises ValueError for masks of another size than the logits',
    or with a class that the logits do not have.
    """
    B, J, H, W = logits.shape
    if masks.shape != (B, H, W):
        raise ValueError(
            f"got masks {tuple(masks.shape)} for logits {tuple(logits.shape)}, expected "
            f"{(B, H, W)}: resize masks with their images, by the nearest pixel"
        )
    if masks.is_floating_point():
        raise ValueError(
            f"got masks of {masks.dtype}, expected integers, each pixel's class: read them without "
            "scaling to 0..1"
        )
    masks = masks.long()
    valid = masks != VOID  # (B, H, W)
    if (wrong := masks[valid & ((masks < 0) | (masks >= J))]).numel():
        raise ValueError(
            f"got a class {wrong[0].item()} in a mask, expected 0 to {J - 1}, or {VOID} for void: "
            "correct the mask"
        )
    total = F.cross_entropy(logits.float(), masks, ignore_index=VOID, reduction="sum")
    return total / valid.sum().clamp(min=1)


class _Detector(RetinaNet):
    """RetinaNet in which each picture of a batch is seen as if it were alone."""

    def forward(self, images, targets=None):
        _check_pictures(images)
        if self.training:
            _check_targets(targets, len(images), self.head.classification_head.num_classes)
        batch, _ = self.transform(images)
        groups = _by_size(batch.image_sizes)
        x, sizes = batch.tensors, None
        if len(groups) > 1:
            sizes = torch.tensor(batch.image_sizes, device=x.device)
        maps = list(self.backbone(x, sizes).values())
        found, losses = {}, {}
        for size, index in groups:
            own = self.backbone.own_maps(maps, index, size)
            output, anchors = self.head(own), self._anchors(own)
            if self.training:
                truth = [targets[n] for n in index]
                means = self.compute_loss(truth, output, [torch.cat(anchors)] * len(index))
                for name, mean in means.items():
                    losses[name] = losses.get(name, 0) + mean * (len(index) / len(x))
            else:
                found.update(zip(index, self._boxes(output, anchors, size)))
        return losses if self.training else [found[n] for n in range(len(x))]

    def _anchors(self, maps):
        """The anchors of each map, in float32 whatever the maps are: (cells * 9, 4)."""
        self.anchor_generator.set_cell_anchors(torch.float32, maps[0].device)
        strides = [(stride, stride) for stride in self.backbone.strides]
        return self.anchor_generator.grid_anchors([level.shape[2:] for level in maps], strides)

    def _boxes(self, output, anchors, size):
        """What is found in each picture of one size."""
        images, counts = len(output["cls_logits"]), [len(each) for each in anchors]
        output = {name: list(value.split(counts, dim=1)) for name, value in output.items()}
        return self.postprocess_detections(output, [anchors] * images, [size] * images)


class _Head(RetinaNetHead):
    """RetinaNet's head in the precision of its weights, also under autocast.

    bfloat16 has 8 bits, too few for a corner among 1,000 pixels. Its output is float32 at least.
    """

    def forward(self, maps):
        device, dtype = maps[0].device.type, self.regression_head.bbox_reg.weight.dtype
        with torch.autocast("cpu" if device == "meta" else device, enabled=False):
            output = super().forward([level.to(dtype) for level in maps])
        wide = torch.promote_types(dtype, torch.float32)
        return {name: value.to(wide) for name, value in output.items()}


class _AsTheyAre(GeneralizedRCNNTransform):
    """What RetinaNet does to images first, without its resizing to 800 pixels: only padding."""

    def resize(self, image, target=None):
        return image, target


class _Pyramid(FeaturePyramidNetwork):
    """torchvision's FeaturePyramidNetwork, whose convolutions and norms see no padding."""

    def forward(self, maps, padding=None):
        """Maps, the finest first, each (B, C, h, w) -> {"0": (B, c, h, w), ...}."""
        coarser, levels = None, []
        for inner, outer, level in reversed([*zip(self.inner_blocks, self.layer_blocks, maps)]):
            level = _beside_padding(inner, level, padding)  # (B, c, h, w)
            if coarser is not None:
                level = level + F.interpolate(coarser, size=level.shape[2:], mode="nearest")
            levels.append(_beside_padding(outer, level, padding))
            coarser = level
        return {str(n): level for n, level in enumerate(reversed(levels))}


def detector(backbone, num_classes):
    """torchvision's RetinaNet on an XViTBackbone, for images that data.normalize made.

    In evaluation mode images, (B, 3, H, W) or a list of (3, h, w) of any sizes, -> a list of
    {"boxes" (n, 4) as x0 y0 x1 y1 in pixels, "scores" (n,), "labels" (n,)}, no score below
    `score_thresh`; classes count from 0. In training mode `model(images, targets)` ->
    {"classification", "bbox_regression"}, the losses; a target holds "boxes" and "labels".
    At each cell of a map stand nine anchors: sides of 2, 2.5 and 3.2 strides, as squares and at 1:2
    and 2:1. Half of what RetinaNet uses, for images are small here. Those in a picture's padding to
    whole cells count, in training as in evaluation: a box at the edge may be nearest to one.
    Raises ValueError for targets that do not fit. Source: Lin et al., Focal Loss for Dense Object
    Detection, arXiv:1708.02002.
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
    model = _Detector(
        backbone, num_classes, anchor_generator=anchors, head=head, detections_per_img=100
    )
    model.transform = _AsTheyAre(1, 1, [0.0] * 3, [1.0] * 3, size_divisible=1)
    return model


def transfer(body, trained):
    """Copy the stem, positions and blocks of a trained XViT into `body`.

    The positions of the two may have different grids. Raises ValueError if the two have other
    widths, depths, heads, stems or attentions.
    """
    ours, theirs = body.state_dict(), trained.state_dict()
    names = [name for name in ours if name.split(".")[0] in ("stem", "positions", "blocks")]
    extra = [name for name in theirs if name.split(".")[0] == "blocks" and name not in ours]
    for name in names + extra:
        a, b = (
            tuple(weights[name].shape) if name in weights else None for weights in (ours, theirs)
        )
        if a != b and not (name == "positions" and a[1] == b[1]):
            raise ValueError(
                f"{name} is {b} in the checkpoint and {a} in this model: give the checkpoint's own "
                "--model, --dim, --depth, --num-heads, --stem-stride, --attention and --lpi or "
                "--no-lpi"
            )
    for block, other in zip(body.blocks, trained.blocks):
        a, b = (
            f"{type(m).__name__} with {m.num_heads} heads"
            for m in (block.attention.part, other.attention.part)
        )
        if a != b:  # no shape tells them apart
            raise ValueError(
                f"the attention is {b} in the checkpoint and {a} in this model: give the "
                "checkpoint's own --attention and --num-heads"
            )
    weights = {name: theirs[name] for name in names}
    if weights["positions"].shape != ours["positions"].shape:
        weights["positions"] = F.interpolate(
            weights["positions"], ours["positions"].shape[2:], mode="bicubic", align_corners=False
        )
    body.load_state_dict({**ours, **weights})


def _resize(dim, have, want):
    """From a grid of stride `have` to one of stride `want`: (B, dim, h, w) -> (B, dim, ·, ·)."""
    if have <= want:
        return nn.MaxPool2d(want // have) if have < want else nn.Identity()
    layers = []
    for _ in range((have // want).bit_length() - 1):
        layers += [nn.ConvTranspose2d(dim, dim, 2, stride=2), nn.BatchNorm2d(dim), nn.GELU()]
    return nn.Sequential(*layers[:-2])


def _branch(channels, doublings):
    """Convolutions of the segmentation head; each of the doublings enlarges to twice the size."""
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


def _by_size(sizes):
    """[((height, width), [the numbers of the pictures of this size]), ...]."""
    groups = {}
    for n, size in enumerate(sizes):
        groups.setdefault(tuple(size), []).append(n)
    return list(groups.items())


def _check_pictures(images):
    if not len(images):
        raise ValueError("got no images, expected one at least")
    for n, image in enumerate(images):
        tensor = isinstance(image, torch.Tensor)
        right = tensor and image.is_floating_point() and image.numel()
        if not right or image.ndim != 3 or image.shape[0] != 3:
            got = f"{image.dtype} of shape {tuple(image.shape)}" if tensor else type(image).__name__
            raise ValueError(
                f"got {got} for image {n}, expected a tensor of floats (3, height, width): scale "
                "bytes to floats with data.normalize, repeat grey three times"
            )


def _check_targets(targets, images, classes):
    if targets is None or len(targets) != images:
        raise ValueError(
            f"got {'no' if targets is None else len(targets)} targets for {images} images, "
            "expected one for each in training: call model.eval() to detect"
        )
    for n, target in enumerate(targets):
        if not isinstance(target, dict) or not {"boxes", "labels"} <= target.keys():
            raise ValueError(
                f"got {target!r} as the target of image {n}, expected a dictionary with boxes and "
                "labels: one for each image"
            )
        boxes, labels = target["boxes"], target["labels"]
        if boxes.shape != (len(labels), 4):
            raise ValueError(
                f"got boxes {tuple(boxes.shape)} for {len(labels)} labels of image {n}, expected "
                f"{(len(labels), 4)}"
            )
        whole = labels.dtype in (torch.int64, torch.int32)  # uint8 would select, as a mask does
        if len(labels) and not (whole and labels.min() >= 0 and labels.max() < classes):
            raise ValueError(
                f"got labels {labels.tolist()} ({labels.dtype}) of image {n}, expected int64 from "
                f"0 to {classes - 1}: classes count from 0, and none stands for the background"
            )
        right = (boxes[:, 2:] > boxes[:, :2]).all(1) & boxes.isfinite().all(1)  # (n,)
        if not right.all():
            raise ValueError(
                f"got the box {boxes[~right][0].tolist()} for image {n}, expected x0 < x1 and "
                "y0 < y1, all of them finite: drop empty ones"
            )
