"""Pictures as bytes: sets of them in memory, files read, bytes made a model's input."""

import difflib
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms import v2

EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")


@dataclass
class ImageSet:
    """Images in memory: images uint8 (n, 3, H, W), labels int64 (n,), the names of its classes.

    For dense prediction: masks uint8 (n, H, W); or boxes, a list of float (k, 4), x0 y0 x1 y1 in
    pixels, and box_labels, a list of int64 (k,). `shapes` has masks 0 or 1 + kind. `sizes`: int64
    (n, 2), each picture's own (height, width); what lies to the right of it and below is padding.
    None: every picture fills the tensor. `copy` says for a run's record which copy of the set this
    is, and `fingerprint` tells any other set from it: a hex digest of the files' names and content,
    the classes and the images' shape (empty for a set made by hand). `notes`: lines about what was
    cut, left out or not found.
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
    fingerprint: str = ""
    notes: tuple = ()

    def __len__(self):
        return len(self.images)

    def to(self, device):
        """The same set with all its tensors on `device`."""

        def move(value):
            value = [move(item) for item in value] if isinstance(value, list) else value
            return value.to(device) if isinstance(value, torch.Tensor) else value

        return replace(self, **{key: move(value) for key, value in vars(self).items()})


def fingerprint(images, classes, names, content):
    """A set's fingerprint, of images (n, 3, H, W), names of files or labels, a digest of bytes."""
    told = tuple(images.shape), tuple(classes), list(names), content
    return hashlib.sha256(repr(told).encode()).hexdigest()


def stack(parts, fill):
    """Tensors (..., H, W) of different sizes as one, padded with `fill` at the right and below.

    Returns the tensor (n, ..., H, W) and its parts' own sizes, int64 (n, 2), (height, width).
    """
    H, W = (max(part.shape[axis] for part in parts) for axis in (-2, -1))
    whole = parts[0].new_full((len(parts), *parts[0].shape[:-2], H, W), fill)
    for to, part in zip(whole, parts):
        to[..., : part.shape[-2], : part.shape[-1]] = part
    return whole, torch.tensor([part.shape[-2:] for part in parts])


def padded(pictures):
    """Pictures uint8 (3, h, w) stacked on grey, and an ImageSet's `sizes` of them."""
    images, sizes = stack(pictures, 128)
    filled = (sizes == torch.tensor(images.shape[-2:])).all()
    return images, None if filled else sizes


def read_image(path, size=None, square=True):
    """The picture in a file as `fit` makes it, uint8 (3, size, size); without `size`, as it is.

    It is turned as its EXIF data say; alpha is laid over white; of an animation it is the first
    frame. 16 bits become 8, v / 257 rounded for grey, the upper byte for colours, as Pillow reads
    them. Colour profiles (ICC) are not applied. Raises ValueError, naming the file, if it is not
    there, damaged, or holds what has no known range from black to white (floats, 32-bit integers)
    or no known colours (LAB).
    """
    if size is not None:
        check_size(size)
    image = torch.from_numpy(_pixels(open_image(path), path)).permute(2, 0, 1)
    if size is not None:
        return fit(image, size, square)
    return _over_white(image).round().to(torch.uint8).expand(3, -1, -1)


def fit(image, size, square=True):
    """Any picture, uint8 (1, 3 or 4, H, W), as uint8 (3, size, size): its centre square, resized.

    Alpha is laid over white. With square=False the whole picture, its longer side `size` pixels.
    Raises ValueError for another image or size.
    """
    if (
        image.ndim != 3
        or image.shape[0] not in (1, 3, 4)
        or image.dtype != torch.uint8
        or not image.numel()
    ):
        raise ValueError(
            f"got an image {image.dtype} {tuple(image.shape)}, expected torch.uint8 (1, 3 or 4, "
            "H, W): put the channels first and bring the values to 0..255"
        )
    check_size(size)
    image = _over_white(image)
    if square:
        image = v2.functional.center_crop(image, [min(image.shape[1:])])  # (1 or 3, side, side)
    longer = max(image.shape[1:])
    height, width = (max(1, round(side * size / longer)) for side in image.shape[1:])
    check_memory(12 * height * width, f"{height} x {width} pixels")
    image = image.expand(3, -1, -1)[None].float()  # (1, 3, H, W)
    image = F.interpolate(image, (height, width), mode="bilinear", antialias=True)[0]
    return image.round().to(torch.uint8)


def normalize(x):
    """Values 0 to 255 of any dtype -> float32 (x / 255 - 0.5) / 0.25, -2 to 2: for every set."""
    return x.to(torch.float32) / 63.75 - 2


def open_image(path):
    """A file's PIL image, decoded and turned as its EXIF data say: the one place that reads them.

    Raises ValueError, naming the file, if it is not there or cannot be decoded.
    """
    try:
        # not by its path: Pillow 13 maps such a file, and scrambles TIFFs that lie on their side
        with open(path, "rb") as stream, Image.open(stream) as file:
            image = ImageOps.exif_transpose(file)
            image.format = file.format
            return image
    except FileNotFoundError as error:
        raise ValueError(f"{path}: not there{_nearest(Path(path))}: correct the name") from error
    except IsADirectoryError as error:
        raise ValueError(
            f"{path}: a folder, expected a picture's file: correct the name"
        ) from error
    except PermissionError as error:
        raise ValueError(
            f"{path}: no permission to read it, expected a picture's file: allow it"
        ) from error
    except Exception as error:  # decoders raise many kinds: OSError, SyntaxError, ...
        raise ValueError(
            f"{path}: cannot be read as an image ({error}): replace the file or take it away"
        ) from error


def _nearest(path):
    """What a message says about the surroundings of a path where nothing is."""
    if not path.parent.is_dir():
        return f", nor is its folder {path.parent}"
    there = [other.name for other in path.parent.iterdir() if other.exists()]
    nearest = difflib.get_close_matches(path.name, there, n=1)
    return f" (the nearest name is {nearest[0]!r})" if nearest else ""


def _pixels(image, path):
    """A PIL image as uint8 (H, W, channels): 1 for 16-bit grey, 3, or 4 with alpha."""
    sixteen_bits = image.mode.startswith("I;16")
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        sixteen_bits = True  # their integers end at 65535, whatever Pillow keeps them in
    if sixteen_bits:
        values = np.array(image).astype(np.uint32)  # (H, W)
        grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
        grey[values == image.info.get("transparency")] = 255
        return grey[:, :, None]
    if image.mode not in EIGHT_BITS:
        raise ValueError(
            f"{path}: got a picture in mode {image.mode}, expected 8 bits a channel or grey of 16: "
            "nothing says which value is black and which white; save it as PNG"
        )
    alpha = "A" in image.mode or "transparency" in image.info
    mode = "RGBA" if alpha else "RGB"
    return np.array(image if image.mode == mode else image.convert(mode))  # convert copies


def _over_white(image):
    """(4, H, W) -> float (3, H, W), its alpha laid over white; what has no alpha stays as it is."""
    if image.shape[0] < 4:
        return image
    return 255 + (image[:3] - 255.0) * (image[3:] / 255)


def in_threads(read, items):
    """[read(item), ...], in a thread for each core: decoders let go of Python's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(read, items))


def check_size(size):
    """Raise ValueError unless `size` is a whole number of pixels, 1 or more."""
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
        raise ValueError(f"got size={size!r}, expected a whole number of pixels: give 1 or more")


def check_memory(needed, what):
    """Raise ValueError if `what` takes more bytes than the machine has."""
    if not hasattr(os, "sysconf"):
        return
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"{what} need {needed / 1e9:,.1f} GB, and this machine has {there / 1e9:,.1f} GB of "
            "memory: lower size or limit"
        )
