"""Sets of images, each as one uint8 tensor: found on disk, downloaded or generated.

A set is decoded once and held in memory as a whole, one byte a value: 154 MB for CIFAR-10's 50,000
training images, 727 MB for Imagenette's 9,469 at 160 pixels. A batch is an index into it, on the
CPU or on a GPU, without workers.
"""

import difflib
import hashlib
import os
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets
from torchvision.transforms import v2

from .images import (
    ImageSet,
    check_memory,
    fingerprint,
    fit,
    in_threads,
    normalize,
    read_image,
    stack,
)
from .listing import PASSED_OVER, check_names, files_below, is_picture, passed_over
from .shapes import KINDS, generated, shapes
from .splits import SPLITS, check_request, choose, parts_of

__all__ = [  # with what lies elsewhere: `data` is all a reader has to import
    "KINDS",
    "SPLITS",
    "ImageSet",
    "find",
    "fit",
    "load",
    "normalize",
    "read_image",
    "shapes",
    "stack",
]

KNOWN = {  # name: (side in pixels, number of classes, torchvision's class, the folder it makes)
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
    """A set as square images: "cifar10", "cifar100", "imagenette", "shapes" or a folder.

    A folder holds train/ and test/ (or val/), and each of them one folder for each class, whose
    pictures count however deep they lie. Hidden files are passed over, and those without the suffix
    of an image; `notes` says of how many that look like pictures. Where a named set is looked for:
    see `find`; one that is not found is downloaded to `root`. `split`: "train", "val", "test" or
    "train+val". With train/, val/ and test/ these are the folders; else "val" is a tenth of each
    class of train/, always the same one, and "train" the rest. `shapes` is drawn anew for each
    split, and its "train+val" is its "train". `size`: the side in pixels (None: the set's own, 224
    for a folder). `limit`: of that split only the first limit / classes images of each class.
    Raises ValueError, naming the file or folder, for what is missing, damaged or larger than the
    machine's memory.
    """
    check_request(split, size, limit)
    size = size or side(name)
    if name == "shapes":
        return generated(split, size, limit, many=10_000)
    folder = find(name, root) or download(name, Path(root))
    read = (
        _read_cifar
        if name in KNOWN and folder.name in ("cifar-10-batches-py", "cifar-100-python")
        else _read_folder
    )
    return read(name, folder, split, size, limit)


def side(name):
    """The side in pixels that the images of a set have by default."""
    return KNOWN[name][0] if name in KNOWN else 224


def find(name, root="data", known=KNOWN):
    """The folder of a set: in the one that the variable XVIT_DATA names, else in `root`, or None.

    In either it may lie as torchvision keeps it (cifar-10-batches-py/) or in class folders
    (cifar10/train/CLASS/*). A path to a folder stands for itself. Raises ValueError if nothing is
    there and the name is not one that is `known`.
    """
    if name not in known and (Path(name).is_dir() or len(Path(name).parts) > 1):
        if not Path(name).is_dir():
            raise ValueError(f"{name}: no such folder, expected that of a set: correct the name")
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
            f"got {name!r}, expected one of {', '.join(known)} or a folder: correct it (the "
            f"nearest name is {difflib.get_close_matches(name, known, n=1, cutoff=0)[0]!r})"
        )
    return None


def download(name, root, known=KNOWN):
    """Let torchvision download and check and unpack the set; only then move it into `root`."""
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
            "torchvision unpacks it (or what data/README.md says is read as well), into a folder "
            f"that XVIT_DATA names, or into {root}/; or take the set that is generated, --data "
            "shapes"
        ) from error


def _read_cifar(name, folder, split, size, limit):
    """torchvision's files. They are pickles, which can run code: it checks their sums before."""
    try:
        data = KNOWN[name][2](folder.parent, train=split != "test")
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{folder}: a file is missing or damaged, its checksum is not the one torchvision "
            "knows: delete the folder and load again, or unpack the original archive there"
        ) from error
    classes, targets = tuple(data.classes), np.array(data.targets)
    keep = np.arange(len(targets)) if split == "test" else choose(split, targets)
    keep = keep[_first(targets[keep], limit, len(classes))]
    images = torch.from_numpy(data.data[keep]).permute(0, 3, 1, 2).contiguous()
    content = hashlib.sha256(images.numpy()).hexdigest()
    if size != images.shape[-1]:
        check_memory(len(images) * 3 * size**2, f"{len(images):,} images of {size} x {size} pixels")
        images = v2.functional.resize(images, [size, size], antialias=True)
    return ImageSet(
        images,
        torch.from_numpy(targets[keep]),
        classes,
        name,
        f"torchvision's {folder.name}, sha256 {content[:12]}",
        fingerprint=fingerprint(images, classes, targets[keep].tolist(), content),
    )


def _read_folder(name, folder, split, size, limit):
    """Class folders, decoded in threads."""
    classes, samples, notes = _class_folders(folder, split, name)
    samples = [samples[n] for n in _first([label for _, label in samples], limit, len(classes))]
    files, labels = zip(*samples)
    n = len(files)
    check_memory(3 * n * size**2, f"{n:,} images of {size} x {size} pixels")
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)

    def read(i):
        images[i] = read_image(files[i], size)
        return hashlib.sha256(files[i].read_bytes()).digest()

    content = hashlib.sha256(b"".join(in_threads(read, range(n)))).hexdigest()
    suffixes = {file.suffix[1:].upper().replace("JPG", "JPEG") for file in files}
    names = [file.relative_to(folder).as_posix() for file in files]
    return ImageSet(
        images,
        torch.tensor(labels),
        tuple(WNIDS.get(c, c) for c in classes),
        name if name in KNOWN else folder.resolve().name,
        f"{n:,} {'/'.join(sorted(suffixes))} files in class folders, sha256 {content[:12]}",
        fingerprint=fingerprint(images, classes, names, content),
        notes=notes,
    )


def _class_folders(folder, split, name):
    """The names of the classes; every image file of a split with its label, both sorted; notes."""
    parts, cut = parts_of(split, lambda part: (folder / part).is_dir())
    classes = _class_names(folder, parts, KNOWN[name][1] if name in KNOWN else None)
    notes = check_names(classes, folder)
    samples = []
    for part in parts:
        beside = [file for file in (folder / part).iterdir() if is_picture(file) and file.is_file()]
        notes += passed_over(beside, f"{part}/, beside the class folders")
        for label, c in enumerate(classes):
            files = files_below(folder / part / c)
            images = [file for file in files if is_picture(file)]
            if not images:
                raise ValueError(
                    f"{folder / part / c}: got no image, expected files such as *.png: add some or "
                    "remove the folder"
                )
            other = [file for file in files if file.suffix.lower() in PASSED_OVER]
            notes += passed_over(other, f"{part}/{c}/, in a format that is not read")
            samples += [(file, label) for file in images]
    if cut:
        samples = [samples[n] for n in choose(split, [label for _, label in samples])]
    return classes, samples, notes


def _class_names(folder, parts, expected):
    """The names of the class folders, sorted, the same in all parts of the set."""
    for part in parts:
        if not (folder / part).is_dir():
            raise ValueError(
                f"{folder / part}: no such folder, expected train/CLASS/*.png and "
                "test/CLASS/*.png (or val/): add it"
            )
    names = {
        part: sorted(
            c.name for c in (folder / part).iterdir() if c.is_dir() and not c.name.startswith(".")
        )
        for part in ("train", "val", "test")
        if (folder / part).is_dir()
    }
    classes = names[parts[0]]
    for part, others in names.items():
        if differ := sorted({*classes} ^ {*others}):
            alike = len({unicodedata.normalize("NFC", c) for c in differ}) < len(differ)
            shown = f"{differ!a} (two ways of writing a letter)" if alike else differ
            raise ValueError(
                f"{folder}: got classes {shown} in only one of {parts[0]}/ and {part}/, expected "
                "the same in all parts: add, rename or remove their folders"
            )
    if len(classes) < 2 or expected and len(classes) != expected:
        raise ValueError(
            f"{folder / parts[0]}: got {len(classes)} class folders, expected "
            f"{expected or 'two or more'}: complete them"
        )
    return classes


def _first(labels, limit, classes):
    """Where the first limit / classes images of each class are, in order."""
    each = len(labels) if limit is None else limit // classes
    if each < 1:
        raise ValueError(
            f"got limit={limit}, expected at least one image for each of the {classes} classes: "
            "raise it"
        )
    labels = np.asarray(labels)
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:each] for c in range(classes)]))
