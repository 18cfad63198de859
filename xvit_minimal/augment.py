"""Training pictures changed at random: in batches, or one by one with their masks or boxes."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from .images import normalize

AUGMENTATIONS = ("none", "flip", "shift", "crop", "shift+randaugment", "crop+randaugment")
DENSE_AUGMENTATIONS = ("none", "flip", "crop")


class Augment(nn.Module):
    """Batches uint8 (B, 3, H, W) on any device -> float32 (B, 3, H, W) on it, changed, normalized.

    `how` is one of AUGMENTATIONS. All but "none" mirror each image with probability 1/2; "shift"
    then moves it by up to an eighth of its side, "crop" enlarges a part of it to `size` (by default
    the images' own), each by a draw of its own. "+randaugment" adds RandAugment (two operations,
    magnitude 9) with one draw for every `group` images. All draws come from torch's global CPU
    generator. Raises ValueError for another `how`, a batch that is not uint8, or one of pictures
    that are not square to shift or crop.
    Source: Cubuk et al., arXiv:1909.13719.
    """

    def __init__(self, how="shift+randaugment", group=16, size=None):
        super().__init__()
        if how not in AUGMENTATIONS:
            raise ValueError(
                f"got augmentation {how!r}, expected one of {', '.join(AUGMENTATIONS)}"
            )
        self.how, self.group, self.size = how, group, size
        self.randaugment = v2.RandAugment(num_ops=2, magnitude=9, fill=128)

    def forward(self, x):
        if x.ndim != 4 or x.shape[1] != 3 or x.dtype != torch.uint8:
            raise ValueError(
                f"got a batch {x.dtype} {tuple(x.shape)}, expected torch.uint8 (B, 3, H, W), as "
                "load returns them: leave the images as bytes"
            )
        move, _, more = self.how.partition("+")
        if move in ("shift", "crop") and x.shape[2] != x.shape[3]:
            raise ValueError(
                f"got a batch of {x.shape[2]} x {x.shape[3]} pixels, expected squares for "
                f"{move!r}: cut them with fit, or take 'flip'"
            )
        if move != "none":
            x = flip(x)
        if move in ("shift", "crop"):
            side = self.size or x.shape[-1]
            x = shift(x, x.shape[-1] // 8) if move == "shift" else resized_crop(x, side)
        if more:
            x = torch.cat([self.randaugment(part) for part in x.split(self.group)])
        return normalize(x)


def flip(x):
    """Each image of the batch (B, C, H, W) mirrored, left to right, with probability 1/2."""
    mirrored = torch.rand(len(x), 1, 1, 1) < 0.5
    return torch.where(mirrored.to(x.device), x.flip(-1), x)


def shift(x, most):
    """Each image of the batch (B, C, S, S) shifted by up to `most` pixels, its edge mirrored."""
    B, _, S, _ = x.shape
    by = torch.randint(-most, most + 1, (2, B, 1))
    index = torch.arange(S) + by  # (2, B, S), from -most to S - 1 + most
    rows, columns = (S - 1 - (S - 1 - index.abs()).abs()).to(x.device)  # -1 is 1, and S is S - 2
    image = torch.arange(B, device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def resized_crop(x, size):
    """A part of each image (35% to 100% of its area, sides 3:4 to 4:3) as (B, C, size, size)."""
    B, C = x.shape[:2]
    area, ratio = 0.35 + 0.65 * torch.rand(B), (4 / 3) ** (2 * torch.rand(B) - 1)
    part = torch.stack([area * ratio, area / ratio], dim=1).sqrt()  # (B, 2): of width, of height
    part = part.clamp(max=1)
    centre = (2 * torch.rand(B, 2) - 1) * (1 - part)  # the image reaches from -1 to 1
    theta = torch.cat([torch.diag_embed(part), centre[:, :, None]], dim=2).to(x.device)  # (B, 2, 3)
    grid = F.affine_grid(theta, [B, C, size, size], align_corners=False)
    return (
        F.grid_sample(x.float(), grid, padding_mode="border", align_corners=False)
        .round()
        .to(torch.uint8)
    )


class AugmentDense:
    """A picture of its own size, with its mask or its boxes, changed at random.

    `how` is one of DENSE_AUGMENTATIONS: "flip" mirrors with probability 1/2; "crop" then cuts out a
    part (25% to 100% of the area; width to height as in `size`, (height, width), times 0.8 to
    1.25), makes it `size` and changes brightness, contrast and saturation. Boxes are cut with their
    picture; one of which a cut leaves less than 4 pixels, in width or height, is left out, and one
    that nothing cuts stays, however small. Each picture has draws of its own, from torch's global
    CPU generator. The changes are torchvision's. Raises ValueError for another `how`.
    """

    def __init__(self, how, size):
        if how not in DENSE_AUGMENTATIONS:
            raise ValueError(
                f"got augmentation {how!r}, expected one of {', '.join(DENSE_AUGMENTATIONS)} for "
                "dense prediction"
            )
        self.how, self.size = how, size
        ratio = size[1] / size[0]
        self.ratio = [0.8 * ratio, 1.25 * ratio]
        self.colours = v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3)

    def with_mask(self, image, mask):
        """uint8 (3, h, w) and (h, w) -> the same, of `size` after a crop."""
        if self._mirrors():
            image, mask = image.flip(-1), mask.flip(-1)
        if self.how != "crop":
            return image, mask
        top, left, height, width = self._part(image)
        mask = mask[None, None, top : top + height, left : left + width]
        mask = F.interpolate(mask, self.size, mode="nearest-exact")[0, 0]
        return self._cropped(image, top, left, height, width), mask

    def with_boxes(self, image, boxes, labels):
        """uint8 (3, h, w), float (k, 4), int64 (k,) -> the same with at most k boxes."""
        if self._mirrors():
            image, w = image.flip(-1), image.shape[-1]
            boxes = torch.stack([w - boxes[:, 2], boxes[:, 1], w - boxes[:, 0], boxes[:, 3]], dim=1)
        if self.how != "crop":
            return image, boxes, labels
        top, left, height, width = self._part(image)
        scale = torch.tensor([self.size[1] / width, self.size[0] / height] * 2)
        whole = (boxes - torch.tensor([left, top] * 2)) * scale  # in pixels of the result
        edge = torch.tensor([self.size[1], self.size[0]] * 2, dtype=boxes.dtype)
        boxes = torch.minimum(whole.clamp(min=0), edge)
        sides, before = boxes[:, 2:] - boxes[:, :2], whole[:, 2:] - whole[:, :2]  # each (k, 2)
        keep = ((sides >= 4) | (sides == before) & (sides > 0)).all(1)
        return self._cropped(image, top, left, height, width), boxes[keep], labels[keep]

    def _mirrors(self):
        return self.how != "none" and torch.rand(1) < 0.5

    def _part(self, image):
        """Top, left, height and width of a random part of the image."""
        return v2.RandomResizedCrop.get_params(image, [0.25, 1.0], self.ratio)

    def _cropped(self, image, *part):
        return self.colours(v2.functional.resized_crop(image, *part, self.size, antialias=True))
