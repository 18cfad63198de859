"""Pictures with label images, a class for every pixel: how they lie on disk, what is refused."""

import numpy as np
import torch
import torch.nn.functional as F

from .dense import VOID
from .images import (
    ImageSet,
    check_memory,
    fingerprint,
    fit,
    in_threads,
    open_image,
    padded,
    read_image,
    stack,
)
from .listing import PASSED_OVER, digest, is_picture, listed_classes, listed_pictures
from .splits import choose, parts_of

CAMVID = (
    *("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian"),
    "cyclist",
)
VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
    *("cow", "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep"),
    *("sofa", "train", "tv monitor"),
)


def read_masks(layout, folder, split, size, limit):
    """A split of a set with label images, an ImageSet. `layout`: "camvid", "voc", "pets" or None.

    Raises ValueError: see dense_data.load.
    """
    values = np.arange(256)  # what a value in a label image becomes
    if layout == "voc":
        folder, classes = voc_year(folder), VOC
        lists = {part: f"ImageSets/Segmentation/{part}.txt" for part in ("train", "val")}
        pairs = _in_lists(folder, split, lists, "JPEGImages/{}.jpg", "SegmentationClass/{}.png")
    elif layout == "pets":
        classes, values[1:4] = ("pet", "background"), (0, 1, VOID)  # 3 is the border
        lists = {"train": "annotations/trainval.txt", "test": "annotations/test.txt"}
        pairs = _in_lists(folder, split, lists, "images/{}.jpg", "annotations/trimaps/{}.png")
    else:
        pairs = _in_folders(folder, split)
        if layout == "camvid":
            classes, values[len(CAMVID)] = CAMVID, VOID
        else:
            classes = listed_classes(folder / "classes.txt")
    pairs = pairs[:limit]
    if not pairs:
        raise ValueError(
            f"{folder}: got no picture, expected some: add files, or names to the list"
        )

    def read(pair):
        picture, annotation = pair
        whole = read_image(picture)  # (3, H, W)
        raw = _labels(annotation, picture, whole.shape[1:])
        mask = values[raw]
        if (wrong := mask[(mask >= len(classes)) & (mask != VOID)]).size:
            raise ValueError(
                f"{annotation}: got class {wrong[0]}, expected 0 to {len(classes) - 1}, or {VOID} "
                "for void: correct it"
            )
        image = fit(whole, size, square=False)
        mask = torch.from_numpy(mask.astype(np.uint8))[None, None]  # (1, 1, H, W)
        mask = F.interpolate(mask, image.shape[1:], mode="nearest-exact")[0, 0]
        return image, mask, np.bincount(raw.ravel(), minlength=256)

    check_memory(8 * len(pairs) * size**2, f"{len(pairs):,} pictures and masks of {size} x {size}")
    images, masks, counts = zip(*in_threads(read, pairs))
    notes = _check_values(sum(counts), values, classes, f"{folder}, {split}")
    images, sizes = padded(images)
    files = [file for pair in pairs for file in pair]
    names = [file.relative_to(folder).as_posix() for file in files]
    content = digest(files)
    return ImageSet(
        images,
        None,
        classes,
        layout or folder.resolve().name,
        f"{len(pairs):,} pictures with label images, sha256 {content[:12]}",
        masks=stack(masks, VOID)[0],
        sizes=sizes,
        fingerprint=fingerprint(images, classes, names, content),
        notes=notes,
    )


def voc_year(folder):
    """The folder in which torchvision keeps VOC's pictures."""
    return folder / "VOC2012" if (folder / "VOC2012").is_dir() else folder


def _in_lists(folder, split, lists, picture, annotation):
    """[(picture, label image), ...] of a split. `lists`: {part: file}; then patterns of paths."""
    parts, cut = parts_of(split, lists.__contains__)
    names = [name for part in parts for name in listed_pictures(folder / lists[part])]
    if cut:
        names = [names[n] for n in choose(split, [0] * len(names))]
    return [(folder / picture.format(name), folder / annotation.format(name)) for name in names]


def _in_folders(folder, split):
    """[(picture, label image), ...] of a split of a set that lies as CamVid does."""
    parts, cut = parts_of(split, lambda part: (folder / part).is_dir())
    pairs = []
    for part in parts:
        place, annotations = folder / part, folder / f"{part}annot"
        for needed in (place, annotations):
            if not needed.is_dir():
                raise ValueError(
                    f"{needed}: no such folder, expected train/, trainannot/, test/ and "
                    "testannot/: add it"
                )
        files = sorted(file for file in place.iterdir() if not file.name.startswith("."))
        for file in files:
            if file.is_dir() or file.suffix.lower() in PASSED_OVER:
                raise ValueError(
                    f"{file}: a sub-folder or a format that is not read, expected files such as "
                    f"*.png in {part}/: move or convert what it holds, or take it away"
                )
        pictures = [file for file in files if is_picture(file)]
        seen = {}
        for file in pictures:
            if (other := seen.setdefault(file.stem, file)) is not file:
                raise ValueError(
                    f"{file}: has one label image with {other.name}, expected one for each "
                    "picture: rename one, or take it away"
                )
        pairs += [(file, annotations / f"{file.stem}.png") for file in pictures]
    if cut:
        pairs = [pairs[n] for n in choose(split, [0] * len(pairs))]
    return pairs


def _labels(annotation, picture, shape):
    """The values of a label image, int (H, W), turned as its EXIF data say, as its picture is."""
    if not annotation.exists():
        raise ValueError(
            f"{annotation}: missing, expected the classes of the pixels of {picture.name}: add "
            "it, or take the picture away"
        )
    mask, (height, width) = open_image(annotation), shape
    one_number = mask.mode in ("1", "L", "P", "I") or mask.mode.startswith("I;16")
    if not one_number or mask.size != (width, height):
        raise ValueError(
            f"{annotation}: got {mask.width} x {mask.height} pixels in mode {mask.mode}, expected "
            f"one number for each of the {width} x {height} pixels of {picture.name} (turned as "
            "its EXIF data say): draw it again"
        )
    raw = np.array(mask).astype(np.int64)  # (H, W)
    if raw.min() < 0 or raw.max() > 255:
        wrong = raw.min() if raw.min() < 0 else raw.max()
        raise ValueError(f"{annotation}: got value {wrong}, expected 0 to 255: correct it")
    return raw


def _check_values(counts, values, classes, where):
    """Notes on classes that no pixel has. Raises ValueError if the values cannot be meant.

    `counts` (256,): how many pixels of the split have a value; `values` (256,): what it becomes.
    """
    found = {int(value) for value in np.flatnonzero(counts)}
    if found == {0, 255}:
        raise ValueError(
            f"{where}: got masks of 0 and 255 alone, and 255 is void, which nothing learns, "
            "expected the numbers of the classes: write 1 for 255"
        )
    seen = {int(values[value]) for value in found} - {VOID}
    if not seen:
        raise ValueError(
            f"{where}: no pixel has a class, expected 0 to {len(classes) - 1}: label some"
        )
    missing = [name for number, name in enumerate(classes) if number not in seen]
    if not missing:
        return ()
    return (f"{len(missing)} of {len(classes)} classes are on no pixel: {', '.join(missing)}",)
