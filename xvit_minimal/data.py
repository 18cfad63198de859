"""Sets of images, each as one uint8 tensor: found on disk, downloaded or generated; and their augmentation in batches.

A set is decoded once and held in memory as a whole, one byte a value: 154 MB for CIFAR-10's 50,000 training images,
727 MB for Imagenette's 9,469 at 160 pixels. A batch is an index into it, on the CPU or on a GPU, without workers.
"""

import difflib
import hashlib
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torchvision import datasets
from torchvision.transforms import v2

KNOWN = {  # name: (side in pixels, number of classes, torchvision's class, the folder in which that keeps the set)
    "cifar10": (32, 10, datasets.CIFAR10, "cifar-10-batches-py"),
    "cifar100": (32, 100, datasets.CIFAR100, "cifar-100-python"),
    "imagenette": (160, 10, datasets.Imagenette, "imagenette2-160"),
    "shapes": (32, 4, None, None),
}
WNIDS = {  # the names of Imagenette's class folders
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player", "n03000684": "chain saw",
    "n03028079": "church", "n03394916": "French horn", "n03417042": "garbage truck", "n03425413": "gas pump",
    "n03445777": "golf ball", "n03888257": "parachute",
}
AUGMENTATIONS = ("none", "flip", "shift", "crop", "shift+randaugment", "crop+randaugment")
KINDS = ("circle", "cross", "equals", "pause")  # of `shapes`: ● × = ‖
ORANGE_BLUE = np.array([(235, 110, 40), (50, 100, 240)])


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

    def __len__(self):
        return len(self.images)

    def to(self, device):
        """The same set with all its tensors on `device`."""
        def move(value):
            value = [move(item) for item in value] if isinstance(value, list) else value
            return value.to(device) if isinstance(value, torch.Tensor) else value

        return replace(self, **{key: move(value) for key, value in vars(self).items()})


def load(name, split="train", size=None, limit=None, root="data"):
    """The set `name` ("cifar10", "cifar100", "imagenette", "shapes", or the path of a folder) as square images.

    A folder holds train/ and test/ (or val/), and each of them one folder of images for each class; hidden files, and
    those without the suffix of an image, are passed over. Where a named set is looked for: see `find`; one that is not
    found is downloaded to `root`. `split`: "train" or "test". `size`: the side in pixels (None: the set's own, 224 for
    a folder). `limit`: only the first limit / classes images of each class.
    Raises ValueError, naming the file or folder, for what is missing, damaged or larger than the machine's memory.
    """
    if split not in ("train", "test") or any(number is not None and number < 1 for number in (size, limit)):
        raise ValueError(f"got split={split!r}, size={size}, limit={limit}: give 'train' or 'test', positive numbers")
    size = size or (KNOWN[name][0] if name in KNOWN else 224)
    if name == "shapes":
        return shapes(limit or (10_000 if split == "train" else 2_000), size, seed=int(split == "test"))
    folder = find(name, root) or _download(name, Path(root))
    read = _read_cifar if name in KNOWN and folder.name in ("cifar-10-batches-py", "cifar-100-python") else _read_folder
    return read(name, folder, split, size, limit)


def find(name, root="data", known=KNOWN):
    """The folder of a set: in the folder that the environment variable XVIT_DATA names, else in `root`, else None.

    In either it may lie as torchvision keeps it (cifar-10-batches-py/) or in class folders (cifar10/train/CLASS/*). A
    path to a folder stands for itself. Raises ValueError if nothing is there and the name is not one that is `known`.
    """
    if name not in known and (Path(name).is_dir() or len(Path(name).parts) > 1):
        return Path(name)
    places = [Path(place) for place in (os.environ.get("XVIT_DATA"), root) if place]
    if not places[0].is_dir() and len(places) == 2:
        raise ValueError(f"XVIT_DATA is {str(places[0])!r}, which is no folder: correct it or unset it")
    names = [known[name][3], name] if name in known else [name]
    for place in places:
        for folder in [place / n for n in names] + sorted(place.glob("imagenette*") if name == "imagenette" else []):
            if folder.is_dir():
                return folder
    if name not in known:
        raise ValueError(f"got {name!r}, expected one of {', '.join(known)} or a folder: correct it (the nearest name is "
                         f"{difflib.get_close_matches(name, known, n=1, cutoff=0)[0]!r})")
    return None


def _download(name, root, known=KNOWN):
    """Let torchvision download the set, compare its checksum and unpack it; only then move it into `root`."""
    torchvision_class, base = known[name][2:]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as unfinished:
            torchvision_class(unfinished, download=True, **({"size": "160px"} if name == "imagenette" else {}))
            return (Path(unfinished) / base).rename(root / base)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{name} is not on this machine, and its download failed ({error}): put {base}/, as "
                         "torchvision unpacks it (or what data/README.md says is read as well), into a folder that XVIT_DATA "
                         f"names, or into {root}/; or take the set that is generated, --data shapes") from error


def _read_cifar(name, folder, split, size, limit):
    """torchvision's files. They are pickles, which can run code: torchvision checks their sums before it opens them."""
    try:
        data = KNOWN[name][2](folder.parent, train=split == "train")
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{folder}: a file is missing or damaged, its checksum is not the one torchvision knows: "
                         "delete the folder and load again, or unpack the original archive there") from error
    keep = _first(data.targets, limit, len(data.classes))
    images = torch.from_numpy(data.data[keep]).permute(0, 3, 1, 2).contiguous()
    copy = f"torchvision's {folder.name}, sha256 {hashlib.sha256(images.numpy()).hexdigest()[:12]}"
    if size != images.shape[-1]:
        _check_memory(len(images) * 3 * size**2, f"{len(images):,} images of {size} x {size} pixels")
        images = v2.functional.resize(images, [size, size], antialias=True)
    return ImageSet(images, torch.tensor(data.targets)[keep], tuple(data.classes), name, copy)


def _read_folder(name, folder, split, size, limit):
    """Class folders, decoded in threads."""
    classes, samples = _class_folders(folder, split, KNOWN[name][1] if name in KNOWN else None)
    samples = [samples[n] for n in _first([label for _, label in samples], limit, len(classes))]
    n = len(samples)
    _check_memory(3 * n * size**2, f"{n:,} images of {size} x {size} pixels")
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)

    def read(i):
        images[i] = read_image(samples[i][0], size)
        return hashlib.sha256(samples[i][0].read_bytes()).digest()

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        digest = hashlib.sha256(b"".join(threads.map(read, range(n)))).hexdigest()
    formats = "/".join(sorted({file.suffix[1:].upper().replace("JPG", "JPEG") for file, _ in samples}))
    return ImageSet(images, torch.tensor([label for _, label in samples]), tuple(WNIDS.get(c, c) for c in classes),
                    name if name in KNOWN else folder.resolve().name,
                    f"{n:,} {formats} files in class folders, sha256 {digest[:12]}")


def _class_folders(folder, split, expected):
    """The names of the classes, and every image file with its label, both sorted."""
    test = folder / "test" if (folder / "test").is_dir() else folder / "val"
    part = folder / "train" if split == "train" else test
    if not part.is_dir():
        raise ValueError(f"{part}: no such folder, expected train/CLASS/*.png and test/CLASS/*.png (or val/): add it")
    names = {p: sorted(c.name for c in p.iterdir() if c.is_dir() and not c.name.startswith("."))
             for p in (folder / "train", test) if p.is_dir()}
    if differ := set.symmetric_difference(*map(set, names.values())) if len(names) == 2 else None:
        raise ValueError(f"{folder}: got classes {sorted(differ)} in only one of train/ and {test.name}/, expected the "
                         "same in both: add or remove their folders")
    if not names[part] or expected and len(names[part]) != expected:
        raise ValueError(f"{part}: got {len(names[part])} class folders, expected {expected or 'some'}: complete them")
    samples = []
    for label, c in enumerate(names[part]):
        files = sorted(file for file in (part / c).iterdir() if not file.name.startswith(".")
                       and file.suffix.lower() in datasets.folder.IMG_EXTENSIONS)
        if not files:
            raise ValueError(f"{part / c}: got no image, expected files such as *.png: add some or remove the folder")
        samples += [(file, label) for file in files]
    return names[part], samples


def read_image(path, size, square=True):
    """The picture in a file as uint8 (3, size, size), turned as its EXIF data say; otherwise as `fit` makes it.

    Raises ValueError, naming the file, if it cannot be read."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
        mode = "RGBA" if "A" in image.mode or "transparency" in image.info else "RGB"
        pixels = np.array(image.convert(mode))  # (H, W, 3 or 4)
    except Exception as error:  # PIL's decoders raise many kinds: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"{path}: cannot be read as an image ({error}): replace the file or take it away") from error
    return fit(torch.from_numpy(pixels).permute(2, 0, 1), size, square)


def _first(labels, limit, classes):
    """Where the first limit / classes images of each class are, in order."""
    each = len(labels) if limit is None else limit // classes
    if each < 1:
        raise ValueError(f"got limit={limit}, expected at least one image for each of the {classes} classes: raise it")
    return np.sort(np.concatenate([np.flatnonzero(np.array(labels) == c)[:each] for c in range(classes)]))


def _check_memory(needed, what):
    if hasattr(os, "sysconf") and needed > (there := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise ValueError(f"{what} need {needed / 1e9:,.1f} GB, and this machine has {there / 1e9:,.1f} GB of memory: "
                         "lower size or limit")


def fit(image, size, square=True):
    """Any picture, uint8 (1, 3 or 4, H, W), as uint8 (3, size, size): its centre square, resized; alpha over white. With
    square=False the whole picture, its longer side `size` pixels."""
    if image.ndim != 3 or image.shape[0] not in (1, 3, 4) or image.dtype != torch.uint8 or not image.numel():
        raise ValueError(f"got an image {image.dtype} {tuple(image.shape)}, expected torch.uint8 (1, 3 or 4, H, W): "
                         "put the channels first and bring the values to 0..255")
    if image.shape[0] == 4:
        image = 255 + (image[:3] - 255.0) * (image[3:] / 255)
    if square:
        image = v2.functional.center_crop(image, [min(image.shape[1:])])  # (1 or 3, side, side)
    shape = [max(1, round(side * size / max(image.shape[1:]))) for side in image.shape[1:]]
    image = F.interpolate(image.expand(3, -1, -1)[None].float(), shape, mode="bilinear", antialias=True)[0]  # (3, h, w)
    return image.round().to(torch.uint8)


def normalize(x):
    """Values from 0 to 255 of any dtype -> float32 (x / 255 - 0.5) / 0.25, from -2 to 2: the same for every set."""
    return x.to(torch.float32) / 63.75 - 2


def shapes(n, size=32, seed=0):
    """n generated images: an orange and a blue shape and, far from both, a cue, a square of one of the two colours.

    The class is the kind of the shape that has the cue's colour. No part of the image tells it, only two distant parts
    together do. Masks, boxes and box_labels are those of the two shapes. `size`: 16 to 512 pixels. The classes take
    turns, and the first images of a longer set are those of a shorter one. Raises ValueError for other sizes.
    """
    if n < 1 or not 16 <= size <= 512:
        raise ValueError(f"got n={n} and size={size}, expected one image or more and a size from 16 to 512")
    _check_memory(4 * n * size**2, f"{n:,} images of {size} x {size} pixels, with masks,")
    images, masks = torch.empty(n, 3, size, size, dtype=torch.uint8), torch.empty(n, size, size, dtype=torch.uint8)
    scene, noise = _scene(n, size, seed), np.random.RandomState([seed, 1])
    for start in range(0, n, step := max(1, 2**20 // size**2)):  # a few at a time, to save memory
        some = slice(start, start + step)
        part = {key: value[some].astype(np.int32) for key, value in scene.items()}
        images[some], masks[some] = map(torch.from_numpy, _draw(size, noise, **part))
    x, y, r, kind = (torch.from_numpy(scene[key][:, :2]) for key in ("x", "y", "r", "kind"))  # each (n, 2): no cue
    boxes = torch.stack([x - r, y - r, x + r + 1, y + r + 1], dim=-1).float()  # (n, 2, 4)
    labels, copy = torch.arange(n) % len(KINDS), f"generated, seed {seed}"
    return ImageSet(images, labels, KINDS, "shapes", copy, masks, list(boxes), list(kind))


def _scene(n, size, seed):
    """What the n images hold, in integers: kind, colour, centre (x, y) and radius of three objects, the cue last."""
    # RandomState, because NumPy promises that its numbers will never change; one row of them for each image
    numbers = iter(np.random.RandomState([seed, 0]).randint(2**31 - 1, size=(n, 28), dtype=np.int64).T)

    def draw(low, high):  # an integer for each image, low <= integer <= high
        return low + next(numbers) % (high - low + 1)

    target, place, colour = np.arange(n) % len(KINDS), draw(0, 1), draw(0, 1)
    other = (target + draw(1, len(KINDS) - 1)) % len(KINDS)
    kind = np.stack([np.where(place, other, target), np.where(place, target, other), np.full(n, len(KINDS))], 1)
    colour = np.stack([colour ^ place, 1 ^ colour ^ place, colour], 1)
    r = np.stack([draw(size // 6, size * 3 // 16), draw(size // 6, size * 3 // 16), np.full(n, size // 8)], 1)
    # u leads away from the border at which the cue lies, v along it: one shape stands in each half of v
    cue = draw(r[:, 2], size // 16 + r[:, 2])
    near = cue + r[:, 2] + size * 7 // 24  # from 24 pixels on, no token of stride 4 (7 wide) sees the cue and a shape
    u = np.stack([draw(near + r[:, 0], size - 1 - r[:, 0]), draw(near + r[:, 1], size - 1 - r[:, 1]), cue], 1)
    v = np.stack([draw(r[:, 0], size // 2 - 1 - r[:, 0]), draw(size // 2 + r[:, 1], size - 1 - r[:, 1]),
                  draw(r[:, 2], size - 1 - r[:, 2])], 1)
    turn, u = draw(0, 1)[:, None], np.where(draw(0, 1)[:, None], size - 1 - u, u)
    tint = np.stack([draw(-20, 20) for _ in range(9)], 1).reshape(n, 3, 3)  # of each object, in red, green, blue
    ground = draw(80, 120)[:, None] + np.stack([draw(-6, 6) for _ in range(3)], 1)
    return dict(kind=kind, r=r, x=np.where(turn, v, u), y=np.where(turn, u, v), colour=ORANGE_BLUE[colour] + tint,
                ground=ground, slope=np.stack([draw(-20, 20), draw(-20, 20)], 1))


def _draw(size, noise, kind, r, x, y, colour, ground, slope):
    """The images uint8 (n, 3, size, size) and masks uint8 (n, size, size) of a scene."""
    row, column = np.arange(size, dtype=np.int32)[:, None], np.arange(size, dtype=np.int32)
    grade = (slope[:, 0, None, None] * column + slope[:, 1, None, None] * row) // size  # (n, size, size)
    image, mask = ground[:, :, None, None] + grade[:, None], np.zeros_like(grade)  # (n, 3, size, size) and grade's
    for i in range(3):
        x_i, y_i, r_i, kind_i = (value[:, i, None, None] for value in (x, y, r, kind))  # each (n, 1, 1)
        inside = _inside(kind_i, abs(column - x_i), abs(row - y_i), r_i)  # (n, size, size)
        image = np.where(inside[:, None], colour[:, i, :, None, None], image)
        mask = np.where(inside & (kind_i < len(KINDS)), 1 + kind_i, mask)
    image = image - 12 + np.frombuffer(noise.bytes(image.size), dtype=np.uint8).reshape(image.shape) % 25
    return image.clip(0, 255).astype(np.uint8), mask.astype(np.uint8)


def _inside(kind, dx, dy, r):
    """Whether a pixel, dx columns and dy rows from the centre, belongs to the object: one of KINDS, or the cue."""
    circle, square, bar = dx**2 + dy**2 <= r**2, np.maximum(dx, dy) <= r, r // 3
    return square & np.choose(kind, [circle, abs(dx - dy) <= r // 4, dy > bar, dx > bar, square])


class Augment(nn.Module):
    """Batches uint8 (B, 3, H, W) on any device -> float32 (B, 3, H, W) on it, changed at random and normalized.

    `how` is one of AUGMENTATIONS. All but "none" mirror each image with probability 1/2; "shift" then moves it by up to
    an eighth of its side, "crop" enlarges a part of it, each by a draw of its own. "+randaugment" adds RandAugment (two
    operations, magnitude 9) with one draw for every `group` images. All draws come from torch's global CPU generator.
    Raises ValueError for another `how`, or a batch that is no uint8. Source: Cubuk et al., arXiv:1909.13719.
    """

    def __init__(self, how="shift+randaugment", group=16):
        super().__init__()
        if how not in AUGMENTATIONS:
            raise ValueError(f"got augmentation {how!r}, expected one of {', '.join(AUGMENTATIONS)}")
        self.how, self.group = how, group
        self.randaugment = v2.RandAugment(num_ops=2, magnitude=9, fill=128)

    def forward(self, x):
        if x.ndim != 4 or x.shape[1] != 3 or x.dtype != torch.uint8:
            raise ValueError(f"got a batch {x.dtype} {tuple(x.shape)}, expected torch.uint8 (B, 3, H, W), as load returns them")
        move, _, more = self.how.partition("+")
        if move != "none":
            x = flip(x)
        if move in ("shift", "crop"):
            x = shift(x, x.shape[-1] // 8) if move == "shift" else resized_crop(x, x.shape[-1])
        if more:
            x = torch.cat([self.randaugment(part) for part in x.split(self.group)])
        return normalize(x)


def flip(x):
    """Each image of the batch (B, C, H, W) mirrored, left to right, with probability 1/2."""
    mirrored = torch.rand(len(x), 1, 1, 1) < 0.5
    return torch.where(mirrored.to(x.device), x.flip(-1), x)


def shift(x, most):
    """Each image of the batch (B, C, S, S) shifted by up to `most` pixels along both axes, its edge mirrored."""
    B, _, S, _ = x.shape
    index = torch.arange(S) + torch.randint(-most, most + 1, (2, B, 1))  # (2, B, S), from -most to S - 1 + most
    rows, columns = (S - 1 - (S - 1 - index.abs()).abs()).to(x.device)  # -1 is 1, and S is S - 2
    image = torch.arange(B, device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def resized_crop(x, size):
    """A part of each image (35% to 100% of its area, sides 3:4 to 4:3), resized: (B, C, H, W) -> (B, C, size, size)."""
    B, C = x.shape[:2]
    area, ratio = 0.35 + 0.65 * torch.rand(B), (4 / 3) ** (2 * torch.rand(B) - 1)
    part = torch.stack([area * ratio, area / ratio], dim=1).sqrt().clamp(max=1)  # (B, 2): of the width, of the height
    centre = (2 * torch.rand(B, 2) - 1) * (1 - part)  # the image reaches from -1 to 1
    theta = torch.cat([torch.diag_embed(part), centre[:, :, None]], dim=2).to(x.device)  # (B, 2, 3)
    grid = F.affine_grid(theta, [B, C, size, size], align_corners=False)
    return F.grid_sample(x.float(), grid, padding_mode="border", align_corners=False).round().to(torch.uint8)
