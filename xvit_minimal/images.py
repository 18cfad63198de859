"""Pictures as bytes: a set of them in memory, a file read into it, and bytes turned into a model's input."""

import os
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms import v2


@dataclass
class ImageSet:
    """Images in memory: images uint8 (n, 3, H, W), labels int64 (n,), the names of the classes, the name of the set.

    `copy` says for a run's record which copy of the set this is. For dense prediction: masks uint8 (n, H, W); or boxes, a
    list of float (k, 4), x0 y0 x1 y1 in pixels, and box_labels, a list of int64 (k,). `shapes` has masks 0 or 1 + kind.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    classes: tuple
    name: str
    copy: str
    masks: torch.Tensor | None = None
    boxes: list | None = None
    box_labels: list | None = None
    sizes: torch.Tensor | None = None

    def __len__(self):
        return len(self.images)

    def to(self, device):
        """The same set with all its tensors on `device`."""

        def move(value):
            value = [move(item) for item in value] if isinstance(value, list) else value
            return value.to(device) if isinstance(value, torch.Tensor) else value

        return replace(self, **{key: move(value) for key, value in vars(self).items()})


def read_image(path, size=None, square=True):
    """The picture in a file as uint8 (3, size, size), turned as its EXIF data say; otherwise as `fit` makes it.

    Raises ValueError, naming the file, if it cannot be read."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
        mode = "RGBA" if "A" in image.mode or "transparency" in image.info else "RGB"
        pixels = np.array(image.convert(mode))  # (H, W, 3 or 4)
    except (
        Exception
    ) as error:  # PIL's decoders raise many kinds: OSError, SyntaxError, struct.error, ...
        raise ValueError(
            f"{path}: cannot be read as an image ({error}): replace the file or take it away"
        ) from error
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    return fit(image, size or max(image.shape[1:]), square and size is not None)


def fit(image, size, square=True):
    """Any picture, uint8 (1, 3 or 4, H, W), as uint8 (3, size, size): its centre square, resized; alpha over white. With
    square=False the whole picture, its longer side `size` pixels."""
    if (
        image.ndim != 3
        or image.shape[0] not in (1, 3, 4)
        or image.dtype != torch.uint8
        or not image.numel()
    ):
        raise ValueError(
            f"got an image {image.dtype} {tuple(image.shape)}, expected torch.uint8 (1, 3 or 4, H, W): "
            "put the channels first and bring the values to 0..255"
        )
    if image.shape[0] == 4:
        image = 255 + (image[:3] - 255.0) * (image[3:] / 255)
    if square:
        image = v2.functional.center_crop(image, [min(image.shape[1:])])  # (1 or 3, side, side)
    shape = [max(1, round(side * size / max(image.shape[1:]))) for side in image.shape[1:]]
    image = F.interpolate(
        image.expand(3, -1, -1)[None].float(), shape, mode="bilinear", antialias=True
    )[0]  # (3, h, w)
    return image.round().to(torch.uint8)


def normalize(x):
    """Values from 0 to 255 of any dtype -> float32 (x / 255 - 0.5) / 0.25, from -2 to 2: the same for every set."""
    return x.to(torch.float32) / 63.75 - 2


def check_memory(needed, what):
    if hasattr(os, "sysconf") and needed > (
        there := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    ):
        raise ValueError(
            f"{what} need {needed / 1e9:,.1f} GB, and this machine has {there / 1e9:,.1f} GB of memory: "
            "lower size or limit"
        )


def stack(parts, fill):
    """Tensors (..., H, W) of different sizes as one, padded at the right and below, and their sizes int64 (n, 2)."""
    sizes = torch.tensor([part.shape[-2:] for part in parts])  # (n, 2)
    height, width = sizes.amax(0).tolist()
    whole = parts[0].new_full((len(parts), *parts[0].shape[:-2], height, width), fill)
    for to, part in zip(whole, parts):
        to[..., : part.shape[-2], : part.shape[-1]] = part
    return whole, sizes
