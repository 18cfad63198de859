"""Pictures with boxes in VOC's XML: how they lie on disk, what is refused, cut or left out."""

import math
import xml.etree.ElementTree as ET

import torch

from .images import ImageSet, check_memory, fingerprint, fit, in_threads, padded, read_image
from .listing import check_names, digest, listed_pictures
from .masks import voc_year
from .splits import choose, parts_of

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_boxes(layout, folder, split, size, limit):
    """A split of a set with boxes, an ImageSet. `layout`: "bccd", "voc" or None.

    The classes are the names in the training part, sorted. Raises ValueError: see dense_data.load.
    """
    folder = voc_year(folder) if layout == "voc" else folder
    lists = folder / "ImageSets/Main"

    def exists(part):
        return (lists / f"{part}.txt").exists() and (layout, part) != ("voc", "test")

    parts, cut = parts_of(split, exists)
    training = listed_pictures(lists / "train.txt")
    annotations = in_threads(read_annotation, [folder / f"Annotations/{n}.xml" for n in training])
    found = dict(zip(training, annotations))
    names = [name for part in parts for name in listed_pictures(lists / f"{part}.txt")]
    if cut:
        names = [names[n] for n in choose(split, [0] * len(names))]
    names = names[:limit]
    if not names:
        raise ValueError(
            f"{folder}: got no picture, expected some: add files, or names to the list"
        )
    classes = tuple(sorted({kind for _, objects in annotations for kind, _ in objects}))
    if not classes:
        raise ValueError(
            f"{folder / 'Annotations'}: no training picture has an object: draw boxes first"
        )

    def read(name):
        picture, file = folder / f"JPEGImages/{name}.jpg", folder / f"Annotations/{name}.xml"
        stated, objects = found.get(name) or read_annotation(file)
        if unknown := sorted({kind for kind, _ in objects} - {*classes}):
            raise ValueError(
                f"{file}: got {unknown[0]!r}, expected one of {', '.join(classes)}, as in the "
                "training part: correct it, or add such a box to a training picture"
            )
        whole = read_image(picture)  # (3, H, W)
        height, width = whole.shape[1:]
        _check_frame(file, stated, objects, width, height)
        image = fit(whole, size, square=False)
        boxes = torch.tensor([box for _, box in objects], dtype=torch.float)
        boxes = boxes.reshape(-1, 4)  # (k, 4), also where k is 0
        labels = torch.tensor([classes.index(kind) for kind, _ in objects], dtype=torch.int64)
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)  # (k,)
        boxes, labels = boxes[keep], labels[keep]
        before = torch.tensor([width, height] * 2).float()
        after = torch.tensor([image.shape[2], image.shape[1]] * 2).float()
        cut = ((boxes < 0) | (boxes > before)).any(1)
        boxes = torch.minimum((boxes * (after / before)).clamp(min=0), after)
        return image, boxes, labels, [int((~keep).sum()), int(cut.sum())]

    check_memory(8 * len(names) * size**2, f"{len(names):,} pictures of {size} x {size} pixels")
    images, boxes, labels, counts = zip(*in_threads(read, names))
    if not any(map(len, boxes)):
        raise ValueError(
            f"{folder}, {split}: no picture of {len(names)} has a box: draw some, or move pictures "
            "that have some there"
        )
    images, sizes = padded(images)
    empty, cut = (sum(count) for count in zip(*counts))
    places = ("JPEGImages/{}.jpg", "Annotations/{}.xml")
    files = [folder / place.format(name) for name in names for place in places]
    content = digest(files)
    said = f"{empty} without width or height left out" + (f", {cut} cut at the edge" if cut else "")
    return ImageSet(
        images,
        None,
        classes,
        layout or folder.resolve().name,
        f"{len(names):,} pictures with {sum(map(len, boxes)):,} boxes ({said}), sha256 "
        f"{content[:12]}",
        boxes=list(boxes),
        box_labels=list(labels),
        sizes=sizes,
        fingerprint=fingerprint(images, classes, names, content),
        notes=check_names(classes, folder / "Annotations")
        + _notes(torch.cat(boxes), torch.cat(labels), classes, empty, cut),
    )


def read_annotation(file):
    """((width, height) or None, [(name, [x0, y0, x1, y1]), ...]) of an XML file as VOC writes it.

    No object is an answer, too, and so is no <size>, or one of zeros. Raises ValueError, naming the
    file, for one that is missing or in another form, and for a box without a name or with corners
    that are no numbers or stand in the other order.
    """
    if not file.exists():
        raise ValueError(
            f"{file}: missing, expected the boxes of the picture of that name: add it, with no "
            "object if there is none, or take the name off the list"
        )
    try:
        root = ET.parse(file).getroot()
        stated = tuple(int(root.findtext(f"size/{side}", "0")) for side in ("width", "height"))
        objects = [
            (
                each.findtext("name").strip(),
                [float(each.findtext(f"bndbox/{corner}")) for corner in CORNERS],
            )
            for each in root.findall("object")
        ]
        if root.tag != "annotation" or not objects and root.find(".//{*}bndbox") is not None:
            raise ValueError("expected <annotation> and in it <object>, without a namespace")
    except (ET.ParseError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file}: no annotation in VOC's form ({error}): each <object> needs a <name> and a "
            "<bndbox> with <xmin>, <ymin>, <xmax>, <ymax>, and <size> whole numbers"
        ) from error
    for name, box in objects:
        x0, y0, x1, y1 = box
        if not name:
            raise ValueError(f"{file}: got the box {box} with an empty name: write its class")
        if not all(map(math.isfinite, box)) or x1 < x0 or y1 < y0:
            raise ValueError(
                f"{file}: got the box {box} of {name!r}, expected finite numbers, "
                f"{' '.join(CORNERS)}, with xmin <= xmax and ymin <= ymax: correct it (are they a "
                "corner, width and height?)"
            )
    return stated if all(stated) else None, objects


def _check_frame(file, stated, objects, width, height):
    """Raise ValueError if an annotation's size or boxes show that it is of another frame."""
    if stated is not None and stated != (width, height):
        raise ValueError(
            f"{file}: says {stated[0]} x {stated[1]} pixels, and its picture has {width} x "
            f"{height}, turned as its EXIF data say: draw the boxes on this picture, or save it "
            "the way they were drawn, without EXIF data"
        )
    for name, (x0, y0, x1, y1) in objects:
        if x1 <= x0 or y1 <= y0:
            continue  # left out
        box = f"{file}: got the box {[x0, y0, x1, y1]} of {name!r}"
        if max(x1, y1) <= 1 < min(width, height):
            raise ValueError(
                f"{box}, within 0..1, expected pixels of {width} x {height}: convert it"
            )
        if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
            raise ValueError(f"{box}, outside its picture of {width} x {height} pixels: correct it")


def _notes(boxes, labels, classes, empty, cut):
    """Lines on the boxes (k, 4), in pixels as the model sees them, of a split."""
    small = int(((boxes[:, 2:] - boxes[:, :2]) < 4).any(1).sum())
    missing = [name for label, name in enumerate(classes) if not (labels == label).any()]
    told = [
        (empty, f"boxes without width or height, left out: {empty}"),
        (cut, f"boxes that reach beyond their picture, cut at its edge: {cut}"),
        (small, f"boxes less than 4 pixels wide or high once their picture is resized: {small}"),
        (missing, f"{len(missing)} of {len(classes)} classes have no box: {', '.join(missing)}"),
    ]
    return tuple(line for count, line in told if count)
