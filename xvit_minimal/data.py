"""Sets of images, each as one uint8 tensor: found on disk, downloaded or generated; and their augmentation in batches.

A set is decoded once and held in memory as a whole, one byte a value: 154 MB for CIFAR-10's 50,000 training images,
727 MB for Imagenette's 9,469 at 160 pixels. A batch is an index into it, on the CPU or on a GPU, without workers.
"""

import difflib
import hashlib
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets
from torchvision.transforms import v2

from .images import ImageSet, check_memory, fit, normalize, read_image
from .shapes import KINDS, shapes

__all__ = [  # with what lies in images.py and shapes.py, so that `data` is all a reader has to import
    "KINDS",
    "KNOWN",
    "WNIDS",
    "ImageSet",
    "find",
    "fit",
    "load",
    "normalize",
    "read_image",
    "shapes",
]

KNOWN = {  # name: (side in pixels, number of classes, torchvision's class, the folder in which that keeps the set)
    "cifar10": (32, 10, datasets.CIFAR10, "cifar-10-batches-py"),
    "cifar100": (32, 100, datasets.CIFAR100, "cifar-100-python"),
    "imagenette": (160, 10, datasets.Imagenette, "imagenette2-160"),
    "shapes": (32, 4, None, None),
}
WNIDS = {  # the names of Imagenette's class folders
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


def load(name, split="train", size=None, limit=None, root="data"):
    """The set `name` ("cifar10", "cifar100", "imagenette", "shapes", or the path of a folder) as square images.

    A folder holds train/ and test/ (or val/), and each of them one folder of images for each class; hidden files, and
    those without the suffix of an image, are passed over. Where a named set is looked for: see `find`; one that is not
    found is downloaded to `root`. `split`: "train" or "test". `size`: the side in pixels (None: the set's own, 224 for
    a folder). `limit`: only the first limit / classes images of each class.
    Raises ValueError, naming the file or folder, for what is missing, damaged or larger than the machine's memory.
    """
    if split not in ("train", "test") or any(
        number is not None and number < 1 for number in (size, limit)
    ):
        raise ValueError(
            f"got split={split!r}, size={size}, limit={limit}: give 'train' or 'test', positive numbers"
        )
    size = size or (KNOWN[name][0] if name in KNOWN else 224)
    if name == "shapes":
        return shapes(
            limit or (10_000 if split == "train" else 2_000), size, seed=int(split == "test")
        )
    folder = find(name, root) or _download(name, Path(root))
    read = (
        _read_cifar
        if name in KNOWN and folder.name in ("cifar-10-batches-py", "cifar-100-python")
        else _read_folder
    )
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
        raise ValueError(
            f"XVIT_DATA is {str(places[0])!r}, which is no folder: correct it or unset it"
        )
    names = [known[name][3], name] if name in known else [name]
    for place in places:
        for folder in [place / n for n in names] + sorted(
            place.glob("imagenette*") if name == "imagenette" else []
        ):
            if folder.is_dir():
                return folder
    if name not in known:
        raise ValueError(
            f"got {name!r}, expected one of {', '.join(known)} or a folder: correct it (the nearest name is "
            f"{difflib.get_close_matches(name, known, n=1, cutoff=0)[0]!r})"
        )
    return None


def _download(name, root, known=KNOWN):
    """Let torchvision download the set, compare its checksum and unpack it; only then move it into `root`."""
    torchvision_class, base = known[name][2:]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as unfinished:
            torchvision_class(
                unfinished, download=True, **({"size": "160px"} if name == "imagenette" else {})
            )
            return (Path(unfinished) / base).rename(root / base)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{name} is not on this machine, and its download failed ({error}): put {base}/, as "
            "torchvision unpacks it (or what data/README.md says is read as well), into a folder that XVIT_DATA "
            f"names, or into {root}/; or take the set that is generated, --data shapes"
        ) from error


def _read_cifar(name, folder, split, size, limit):
    """torchvision's files. They are pickles, which can run code: torchvision checks their sums before it opens them."""
    try:
        data = KNOWN[name][2](folder.parent, train=split == "train")
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{folder}: a file is missing or damaged, its checksum is not the one torchvision knows: "
            "delete the folder and load again, or unpack the original archive there"
        ) from error
    keep = _first(data.targets, limit, len(data.classes))
    images = torch.from_numpy(data.data[keep]).permute(0, 3, 1, 2).contiguous()
    copy = f"torchvision's {folder.name}, sha256 {hashlib.sha256(images.numpy()).hexdigest()[:12]}"
    if size != images.shape[-1]:
        check_memory(len(images) * 3 * size**2, f"{len(images):,} images of {size} x {size} pixels")
        images = v2.functional.resize(images, [size, size], antialias=True)
    return ImageSet(images, torch.tensor(data.targets)[keep], tuple(data.classes), name, copy)


def _read_folder(name, folder, split, size, limit):
    """Class folders, decoded in threads."""
    classes, samples = _class_folders(folder, split, KNOWN[name][1] if name in KNOWN else None)
    samples = [samples[n] for n in _first([label for _, label in samples], limit, len(classes))]
    n = len(samples)
    check_memory(3 * n * size**2, f"{n:,} images of {size} x {size} pixels")
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)

    def read(i):
        images[i] = read_image(samples[i][0], size)
        return hashlib.sha256(samples[i][0].read_bytes()).digest()

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        digest = hashlib.sha256(b"".join(threads.map(read, range(n)))).hexdigest()
    formats = "/".join(
        sorted({file.suffix[1:].upper().replace("JPG", "JPEG") for file, _ in samples})
    )
    return ImageSet(
        images,
        torch.tensor([label for _, label in samples]),
        tuple(WNIDS.get(c, c) for c in classes),
        name if name in KNOWN else folder.resolve().name,
        f"{n:,} {formats} files in class folders, sha256 {digest[:12]}",
    )


def _class_folders(folder, split, expected):
    """The names of the classes, and every image file with its label, both sorted."""
    test = folder / "test" if (folder / "test").is_dir() else folder / "val"
    part = folder / "train" if split == "train" else test
    if not part.is_dir():
        raise ValueError(
            f"{part}: no such folder, expected train/CLASS/*.png and test/CLASS/*.png (or val/): add it"
        )
    names = {
        p: sorted(c.name for c in p.iterdir() if c.is_dir() and not c.name.startswith("."))
        for p in (folder / "train", test)
        if p.is_dir()
    }
    if differ := set.symmetric_difference(*map(set, names.values())) if len(names) == 2 else None:
        raise ValueError(
            f"{folder}: got classes {sorted(differ)} in only one of train/ and {test.name}/, expected the "
            "same in both: add or remove their folders"
        )
    if not names[part] or expected and len(names[part]) != expected:
        raise ValueError(
            f"{part}: got {len(names[part])} class folders, expected {expected or 'some'}: complete them"
        )
    samples = []
    for label, c in enumerate(names[part]):
        files = sorted(
            file
            for file in (part / c).iterdir()
            if not file.name.startswith(".")
            and file.suffix.lower() in datasets.folder.IMG_EXTENSIONS
        )
        if not files:
            raise ValueError(
                f"{part / c}: got no image, expected files such as *.png: add some or remove the folder"
            )
        samples += [(file, label) for file in files]
    return names[part], samples


def _first(labels, limit, classes):
    """Where the first limit / classes images of each class are, in order."""
    each = len(labels) if limit is None else limit // classes
    if each < 1:
        raise ValueError(
            f"got limit={limit}, expected at least one image for each of the {classes} classes: raise it"
        )
    return np.sort(
        np.concatenate([np.flatnonzero(np.array(labels) == c)[:each] for c in range(classes)])
    )
