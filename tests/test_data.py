"""Where sets are found, what is refused, how they are split, what the generated set promises."""

import hashlib
import pickle
import re
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets

from xvit_minimal import data
from xvit_minimal.attention import XNormAttention
from xvit_minimal.augment import Augment, flip, resized_crop, shift
from xvit_minimal.baselines import NoMixing
from xvit_minimal.data import KINDS, fit, load, normalize, shapes
from xvit_minimal.model import XViT
from xvit_minimal.shapes import _draw, _scene
from xvit_minimal.splits import choose

COLOURS = torch.tensor([(235, 110, 40), (50, 100, 240)])  # orange, blue


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """An empty folder, without XVIT_DATA; any download fails as it does with the network off."""

    def refuse(*_, **__):
        raise urllib.error.URLError("the network is off")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.delenv("XVIT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def picture(path, colour=(200, 30, 30), size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def folders(root, classes=("cat", "dog"), each=3, colour=100, parts=("train", "test")):
    """A set in class folders; an image's red is `colour`, green its class, blue its number."""
    for part in parts:
        for label, name in enumerate(classes):
            for n in range(each):
                picture(root / part / name / f"{n}.png", (colour, label, n))
    return root


TEN = [f"class {n}" for n in range(10)]


def fake_cifar(root, monkeypatch, train=20, test=10):
    """torchvision's layout of CIFAR-10 with few images, whose checksums its class is given."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(n):
        return {
            "data": np.arange(n * 3072, dtype=np.int64).reshape(n, 3072).astype(np.uint8),
            "labels": [i % 10 for i in range(n)],
        }

    sums = {
        "train_list": [["data_batch_1", write("data_batch_1", batch(train))]],
        "test_list": [["test_batch", write("test_batch", batch(test))]],
        "meta": {
            "filename": "batches.meta",
            "key": "label_names",
            "md5": write("batches.meta", {"label_names": TEN}),
        },
    }
    for key, value in sums.items():
        monkeypatch.setattr(datasets.CIFAR10, key, value)
    return folder


# ----------------------------------------------------------------------------------- where sets are


def test_a_folder_by_its_path(tmp_path):
    images = load(str(folders(tmp_path / "pets")), "train+val", size=4)
    assert images.images.shape == (6, 3, 4, 4) and images.images.dtype == torch.uint8
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1] and images.labels.dtype == torch.int64
    assert images.classes == ("cat", "dog") and images.name == "pets" and len(images) == 6
    assert images.images[:, 1, 0, 0].tolist() == images.labels.tolist()
    assert images.images[:, 2, 0, 0].tolist() == [0, 1, 2, 0, 1, 2]
    assert images.masks is None and images.boxes is None


def test_order_is_xvit_data_then_root_then_download(tmp_path, monkeypatch):
    given, root = tmp_path / "given", tmp_path / "data"
    monkeypatch.setenv("XVIT_DATA", str(given))
    given.mkdir()
    with pytest.raises(
        ValueError,
        match="cifar10 is not on this machine.*network is off.*cifar-10-batches-py.*"
        "XVIT_DATA.*data/.*--data shapes",
    ):
        load("cifar10")
    assert not any((tmp_path / "data").iterdir())  # nothing half-downloaded stays
    folders(root / "cifar10", TEN, colour=1)
    assert load("cifar10").images[0, 0, 0, 0] == 1
    folders(given / "cifar10", TEN, colour=2)
    assert load("cifar10").images[0, 0, 0, 0] == 2
    monkeypatch.delenv("XVIT_DATA")
    assert load("cifar10").images[0, 0, 0, 0] == 1
    assert load("cifar10", "train+val").images.shape == (30, 3, 32, 32)
    assert load("cifar10", root=given).images[0, 0, 0, 0] == 2


def test_any_name_in_xvit_data(tmp_path, monkeypatch):
    folders(tmp_path / "pets", each=1)
    monkeypatch.setenv("XVIT_DATA", str(tmp_path))
    assert load("pets", "test").images.shape == (2, 3, 224, 224)


def test_xvit_data_that_is_no_folder(monkeypatch):
    monkeypatch.setenv("XVIT_DATA", "nowhere")
    with pytest.raises(
        ValueError, match="XVIT_DATA is 'nowhere', which is no folder: correct it or unset it"
    ):
        load("cifar10")
    assert len(load("shapes", limit=4)) == 4  # generated: needs no folder


@pytest.mark.parametrize("place", ["imagenette160", "imagenette2-160", "imagenette"])
def test_imagenette_in_class_folders_gets_readable_names(tmp_path, place):
    folders(tmp_path / "data" / place, sorted(data.WNIDS), each=1, parts=("train", "val"))
    images = load("imagenette", "test", size=8)
    assert (
        images.classes[0] == "tench"
        and images.classes[-1] == "parachute"
        and images.name == "imagenette"
    )


def test_wnids_are_torchvisions():
    assert data.WNIDS == {
        wnid: names[0] for wnid, names in datasets.Imagenette._WNID_TO_CLASS.items()
    }


def test_torchvisions_layout(tmp_path, monkeypatch):
    fake_cifar(tmp_path / "data", monkeypatch)
    train, test = load("cifar10", "train+val"), load("cifar10", "test")
    assert (
        (len(train), len(test)) == (20, 10)
        and train.classes == tuple(TEN)
        and train.name == "cifar10"
    )
    assert train.images.flatten()[:300].tolist() == [
        n % 256 for n in range(300)
    ]  # channels first, row by row
    assert train.copy.startswith("torchvision's cifar-10-batches-py, sha256 ")
    assert load("cifar10", "train+val", size=16).images.shape == (20, 3, 16, 16)
    assert load("cifar10", "train+val", limit=10).labels.tolist() == list(range(10))


@pytest.mark.parametrize("file", ["data_batch_1", "test_batch", "batches.meta"])
def test_torchvisions_layout_damaged(tmp_path, monkeypatch, file):
    folder = fake_cifar(tmp_path / "data", monkeypatch)
    (folder / file).write_bytes((folder / file).read_bytes()[:-5])
    with pytest.raises(
        ValueError, match="cifar-10-batches-py: a file is missing or damaged.*delete the folder"
    ):
        load("cifar10")


class Hostile:
    def __reduce__(self):
        return open, ("hostile-pickle-ran", "w")


def test_no_pickle_is_opened_before_its_checksum(tmp_path, monkeypatch):
    folder = fake_cifar(tmp_path / "data", monkeypatch)
    (folder / "data_batch_1").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match="damaged"):
        load("cifar10")
    assert not (tmp_path / "hostile-pickle-ran").exists()


def test_download_is_moved_into_place_when_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(
        datasets.CIFAR10, "download", lambda self: fake_cifar(Path(self.root), monkeypatch)
    )
    assert len(load("cifar10", "train+val")) == 20
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["cifar-10-batches-py"]


# ---------------------------------------------------------------------------------- what is refused


def empty_class(root):
    (root / "train/eel").mkdir()
    (root / "test/eel").mkdir()
    (root / "train/eel/notes.txt").write_text("none")


def more_in_train(root):
    picture(root / "train/eel/0.png")


def no_test(root):
    (root / "test").rename(root / "rest")


def truncated(root):
    file = root / "train/dog/1.png"
    file.write_bytes(file.read_bytes()[:40])


def text_as_image(root):
    (root / "train/dog/1.png").write_text("not an image")


def broken_link(root):
    (root / "train/dog/3.png").symlink_to(root / "nowhere.png")


@pytest.mark.parametrize(
    "spoil, split, complaint",
    [
        (empty_class, "train", "train.eel: got no image, expected files such as"),
        (more_in_train, "train", r"got classes \['eel'\] in only one of train/ and test/"),
        (more_in_train, "test", r"got classes \['eel'\] in only one of test/ and train/"),
        (no_test, "test", "val: no such folder, expected train/CLASS/.* and test/CLASS"),
        (truncated, "train+val", "dog.1.png: cannot be read as an image .*: replace the file"),
        (text_as_image, "train+val", "dog.1.png: cannot be read as an image .*: replace the file"),
        (broken_link, "train+val", r"dog.3.png: not there \(the nearest name is '[012].png'\)"),
    ],
)
def test_a_faulty_folder_is_refused(tmp_path, spoil, split, complaint):
    root = folders(tmp_path / "pets")
    spoil(root)
    with pytest.raises(ValueError, match=complaint):
        load(str(root), split, size=8)


def test_a_path_that_is_no_set(tmp_path):
    with pytest.raises(ValueError, match="train: no such folder"):
        load(str(tmp_path))
    with pytest.raises(ValueError, match="no/such/folder: no such folder, expected that of a set"):
        load("no/such/folder")
    (tmp_path / "bare/train").mkdir(parents=True)
    with pytest.raises(ValueError, match="train: got 0 class folders, expected two or more"):
        load(str(tmp_path / "bare"))
    (tmp_path / "bare/train/nested").mkdir()
    with pytest.raises(ValueError, match="train: got 1 class folders, expected two or more"):
        load(str(tmp_path / "bare"))


def test_a_class_that_two_systems_write_differently(tmp_path):
    for name in ("train/caf\u00e9", "train/tea", "test/cafe\u0301", "test/tea"):
        (tmp_path / name).mkdir(parents=True)
    words = r"'cafe\\u0301', 'caf\\xe9'] (two ways of writing a letter) in only one of train/"
    with pytest.raises(ValueError, match=re.escape(words.replace("\\\\", "\\"))):
        load(str(tmp_path))


def test_a_known_set_with_the_wrong_number_of_classes(tmp_path):
    folders(tmp_path / "data/cifar10", ("cat", "dog"))
    with pytest.raises(ValueError, match="got 2 class folders, expected 10"):
        load("cifar10")


@pytest.mark.parametrize(
    "name, near",
    [
        ("cifar", "cifar10"),
        ("CIFAR-10", "cifar10"),
        ("shape", "shapes"),
        ("imagenet", "imagenette"),
        ("cifar-100", "cifar100"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(name, near):
    with pytest.raises(
        ValueError, match=f"got '{name}', expected one of cifar10, .* nearest name is '{near}'"
    ):
        load(name)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (dict(split="valid"), "got split='valid', expected one of train, val, test, train.val"),
        (dict(split="val+train"), "got split='val.train', expected one of"),
        *((dict(size=size), f"got size={size}, expected a whole number") for size in (0, -3, 32.0)),
        (dict(size=True), "got size=True, expected a whole number of pixels"),
        (dict(size="32"), "got size='32', expected a whole number of pixels"),
        *((dict(limit=limit), f"got limit={limit}, expected a") for limit in (0, -3, 1.5, True)),
    ],
)
def test_senseless_arguments(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        load("shapes", **arguments)


def test_more_than_the_memory(tmp_path, monkeypatch):
    folders(tmp_path / "pets")
    monkeypatch.setattr(
        data.os,
        "sysconf",
        lambda key: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10}[key],
        raising=False,
    )
    with pytest.raises(
        ValueError, match=r"4 images of 224 x 224 pixels need 0.0 GB.*lower size or limit"
    ):
        load(str(tmp_path / "pets"))
    with pytest.raises(ValueError, match="lower size or limit"):
        load("shapes")


# ------------------------------------------------------------------------------------- what is read


def test_limit_takes_the_first_of_every_class(tmp_path):
    root = str(folders(tmp_path / "pets", each=5))
    some = load(root, limit=5, size=4)  # two of each class: 5 // 2
    whole = load(root, size=4)  # four of each class, without the one that is held out
    assert some.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(some.images, whole.images[[0, 1, 4, 5]])
    assert len(load(root, "train+val", limit=100, size=4)) == 10
    with pytest.raises(
        ValueError, match="got limit=1, expected at least one image for each of the 2 classes"
    ):
        load(root, limit=1)


def test_hidden_files_and_files_that_are_no_images_are_passed_over(tmp_path):
    root = folders(tmp_path / "pets")
    (root / "train/.cache").mkdir()
    (root / "train/cat/.DS_Store").write_bytes(b"x")
    (root / "train/cat/._0.png").write_bytes(b"x")
    (root / "train/cat/Thumbs.db").write_bytes(b"x")
    (root / "train/labels.csv").write_bytes(b"x")
    assert len(load(str(root), "train+val", size=4)) == 6


def test_copy_names_the_files_and_follows_their_content(tmp_path):
    root = folders(tmp_path / "pets")
    before = load(str(root), "train+val", size=4).copy
    assert (
        before.startswith("6 PNG files in class folders, sha256 ") and str(tmp_path) not in before
    )
    assert load(str(root), "train+val", size=8).copy == before
    picture(root / "train/cat/0.png", (9, 9, 9))
    assert load(str(root), "train+val", size=4).copy != before
    (root / "train/cat/0.png").unlink()
    picture(root / "train/cat/0.jpg")
    copy = load(str(root), "train+val", size=4).copy
    assert copy.startswith("6 JPEG/PNG files")


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("L", 77, (77, 77, 77)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("LA", (40, 0), (255, 255, 255)),
        ("P", 0, (0, 0, 0)),
        ("1", 1, (255, 255, 255)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
    ],
)
def test_every_mode_of_a_file(tmp_path, mode, colour, expected):
    root = folders(tmp_path / "pets", each=1)
    Image.new(mode, (7, 5), colour).save(root / "train/cat/0.png")
    assert load(str(root), size=4).images[0, :, 1, 1].tolist() == list(expected)


def test_a_photograph_on_its_side_is_turned(tmp_path):
    root = folders(tmp_path / "pets", each=1)
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    Image.fromarray(pixels).save(root / "train/cat/0.png", exif=exif)
    assert load(str(root), size=8).images[0, 0, :, 0].tolist() == [0] * 4 + [255] * 4


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (33, 7), (5, 5), (64, 48)])
def test_fit_takes_any_picture(channels, height, width):
    image = torch.randint(256, (channels, height, width), dtype=torch.uint8)
    for size in (1, 5, 32):
        out = fit(image, size)
        assert out.shape == (3, size, size) and out.dtype == torch.uint8


def test_fit_keeps_the_centre_and_what_has_its_size():
    image = torch.arange(3 * 4 * 6, dtype=torch.uint8).reshape(3, 4, 6)
    assert torch.equal(fit(image, 4), image[:, :, 1:5])
    assert torch.equal(fit(image.mT, 4), image.mT[:, 1:5])
    grey = fit(image[:1], 4)
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    half = torch.tensor([100, 100, 100, 51], dtype=torch.uint8)[
        :, None, None
    ]  # a fifth of 100 over white
    assert fit(half, 1).flatten().tolist() == [224, 224, 224]


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(2, 4, 4, dtype=torch.uint8),
        torch.zeros(4, 4, dtype=torch.uint8),
        torch.zeros(3, 4, 4),
        torch.zeros(3, 0, 4, dtype=torch.uint8),
        torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
    ],
)
def test_fit_refuses_what_is_no_picture(image):
    with pytest.raises(
        ValueError, match=r"got an image torch.* expected torch.uint8 \(1, 3 or 4, H, W\)"
    ):
        fit(image, 4)


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    pixels = torch.randint(256, (7, 5, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "fine.png")
    assert torch.equal(
        data.read_image(tmp_path / "fine.png", 9), data.fit(pixels.permute(2, 0, 1), 9)
    )
    (tmp_path / "damaged.png").write_bytes((tmp_path / "fine.png").read_bytes()[:40])
    with pytest.raises(ValueError, match="damaged.png: cannot be read as an image .*: replace"):
        data.read_image(tmp_path / "damaged.png", 9)


def test_normalize():
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, -1, -1)
    out = normalize(x)
    assert out.dtype == torch.float32 and out.min() == -2 and out.max() == 2
    torch.testing.assert_close(out.double(), (x.double() / 255 - 0.5) / 0.25, rtol=0, atol=1e-6)
    assert torch.equal(normalize(x.float()), out) and torch.equal(normalize(x.double()), out)


# ------------------------------------------------------------------------------------------- splits


def test_a_tenth_of_each_class_is_held_out_and_always_the_same(tmp_path):
    root = str(folders(tmp_path / "pets", each=20))
    train, val, both = (load(root, split, size=4) for split in ("train", "val", "train+val"))
    assert val.labels.tolist() == [0, 0, 1, 1] and train.labels.bincount().tolist() == [18, 18]
    a, b, all_of_them = ({*map(tuple, s.images[:, 1:, 0, 0].tolist())} for s in (train, val, both))
    assert not a & b and a | b == all_of_them and len(all_of_them) == 40
    assert torch.equal(load(root, "val", size=4).images, val.images)
    assert len({part.fingerprint for part in (train, val, both)}) == 3


def test_a_holdout_is_drawn_from_every_class():
    labels = np.arange(5_000) % 10
    held = choose("val", labels)
    assert np.bincount(labels[held]).tolist() == [50] * 10
    assert sorted([*held, *choose("train", labels)]) == list(range(5_000))
    assert len({tuple((held[labels[held] == c] // 10).tolist()) for c in range(10)}) == 10
    assert choose("train+val", labels).tolist() == list(range(5_000))
    assert choose("train", [0, 1]).tolist() == [0, 1]  # nothing is held out of a class of one
    with pytest.raises(ValueError, match="got 2 training picture.s., none of which can be held"):
        choose("val", [0, 1])


def test_the_own_validation_part(tmp_path):
    root = folders(tmp_path / "pets", each=3, colour=1)
    folders(root, each=2, colour=2, parts=("val",))
    parts = {split: load(str(root), split, size=4) for split in data.SPLITS}
    reds = {split: part.images[:, 0, 0, 0].tolist() for split, part in parts.items()}
    assert reds == {
        "train": [1] * 6,
        "val": [2] * 4,
        "test": [1] * 6,
        "train+val": [1] * 6 + [2] * 4,
    }
    assert load(str(root), "train+val", limit=2, size=4).images[:, 0, 0, 0].tolist() == [1, 1]
    (root / "val/cat").rename(root / "val/Cat")
    with pytest.raises(ValueError, match=r"classes \['Cat', 'cat'\] in only one of test/ and val/"):
        load(str(root), "test")


def test_the_validation_part_of_cifar(tmp_path, monkeypatch):
    fake_cifar(tmp_path / "data", monkeypatch, train=200)
    train, val, both = (load("cifar10", split) for split in ("train", "val", "train+val"))
    assert (len(train), len(val), len(both)) == (180, 20, 200)
    assert val.labels.bincount().tolist() == [2] * 10
    assert both.copy.startswith("torchvision's cifar-10-batches-py, sha256 ")
    assert len({part.copy for part in (train, val, both)}) == 3
    assert len({part.fingerprint for part in (train, val, both)}) == 3


def test_a_fingerprint_follows_names_classes_sizes_and_content(tmp_path):
    root = folders(tmp_path / "pets")

    def told(size=4):
        return load(str(root), "train+val", size=size).fingerprint

    seen = [told(), told(size=8)]
    assert told() == seen[0] and len(seen[0]) == 64 and int(seen[0], 16)
    (root / "train/cat/0.png").rename(root / "train/cat/00.png")
    seen.append(told())
    for part in ("train", "test"):
        (root / part / "dog").rename(root / part / "doggy")
    seen.append(told())
    picture(root / "train/cat/1.png", (9, 9, 9))
    seen.append(told())
    (root / "train/cat/2.png").unlink()
    seen.append(told())
    assert len({*seen}) == 6


# ---------------------------------------------------------------------------------- nothing is lost


def test_pictures_in_sub_folders_count(tmp_path):
    root = folders(tmp_path / "pets")
    picture(root / "train/cat/indoors/deep/7.PNG", (100, 0, 77))
    picture(root / "train/cat/.hidden/8.png", (100, 0, 88))
    images = load(str(root), "train+val", size=4)
    assert images.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert images.images[:, 2, 0, 0].tolist() == [0, 1, 2, 77, 0, 1, 2] and images.notes == ()


def test_pictures_that_are_passed_over_are_said(tmp_path):
    root = folders(tmp_path / "pets")
    for name in ("a.HEIC", "b.gif", "c.gif", "notes.txt"):
        (root / "train/cat" / name).write_bytes(b"x")
    picture(root / "train/stray.png")
    assert load(str(root), size=4).notes == (
        "train/, beside the class folders, passed over: 1 (.png)",
        "train/cat/, in a format that is not read, passed over: 3 (.gif, .heic)",
    )
    assert load(str(root), "test", size=4).notes == ()


def test_a_link_back_is_refused_and_any_other_followed(tmp_path):
    root = folders(tmp_path / "pets")
    picture(tmp_path / "elsewhere/9.png", (100, 0, 99))
    (root / "train/cat/more").symlink_to(tmp_path / "elsewhere")
    (root / "train/cat/again").symlink_to(tmp_path / "elsewhere")  # the same pictures, read once
    assert load(str(root), "train+val", size=4).images[:4, 2, 0, 0].tolist() == [0, 1, 2, 99]
    for target in (root / "train/dog", root / "train", root):
        link = root / "train/dog/loop"
        link.symlink_to(target)
        with pytest.raises(ValueError, match="dog.loop: a link back to .*: remove the link"):
            load(str(root), size=4)
        link.unlink()


def test_class_folders_whose_names_look_alike(tmp_path):
    root = folders(tmp_path / "letters", classes=("A", "a", "b"))
    assert load(str(root), size=4).notes == (f"{root}: classes ['A', 'a'] differ by case alone",)
    root = folders(tmp_path / "pets", classes=("cat", "cat ", "dog"))
    with pytest.raises(ValueError, match="pets: got class 'cat' twice, expected it once"):
        load(str(root), size=4)


# -------------------------------------------------------------------------------- the generated set


def test_shapes_are_the_same_everywhere():
    images = shapes(64)
    assert (images.images.shape, images.masks.shape) == ((64, 3, 32, 32), (64, 32, 32))
    for tensor, digest in [(images.images, "d83f323fca5c8e2a"), (images.masks, "c214eab33888ff66")]:
        assert hashlib.sha256(tensor.numpy()).hexdigest()[:16] == digest
    assert not torch.equal(images.images, shapes(64, seed=1).images)
    longer = shapes(100)
    assert torch.equal(longer.images[:64], images.images) and torch.equal(
        longer.masks[:64], images.masks
    )
    assert all(torch.equal(a, b) for a, b in zip(images.boxes, longer.boxes))


def test_shapes_through_load():
    train, test = load("shapes"), load("shapes", "test", size=16)
    assert (len(train), len(test), test.images.shape[-1]) == (10_000, 2_000, 16)
    assert torch.equal(train.images[:8], shapes(8).images) and train.copy == "generated, seed 0"
    assert torch.equal(test.images[:8], shapes(8, 16, seed=1).images)
    assert train.labels.bincount().tolist() == [2500] * 4
    assert torch.equal(load("shapes", limit=40).images, train.images[:40])


@pytest.mark.parametrize("n, size", [(0, 32), (4, 15), (4, 513)])
def test_shapes_refuses_other_sizes(n, size):
    with pytest.raises(ValueError, match="expected one image or more and a size from 16 to 512"):
        shapes(n, size)


def nearest_colour(image, where):
    """0 for orange, 1 for blue: what the pixels where a mask is true look like."""
    mean = image[:, where].double().mean(1)
    return int((COLOURS - mean).norm(dim=1).argmin())


def find_cue(image, mask):
    """The square of the cue: the pixels outside the mask that are far from grey."""
    red, blue = image[0].int(), image[2].int()
    coloured = ((red - blue).abs() > 60) & (mask == 0)
    rows, columns = coloured.any(1).nonzero().flatten(), coloured.any(0).nonzero().flatten()
    return coloured, (
        columns[0].item(),
        rows[0].item(),
        columns[-1].item() + 1,
        rows[-1].item() + 1,
    )


def distance(a, b):
    """Between the centres of two boxes."""
    return (((a[0] + a[2] - b[0] - b[2]) / 2) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2) ** 2) ** 0.5


@pytest.mark.parametrize(
    "size, n", [(16, 200), (17, 100), (24, 200), (32, 400), (63, 40), (160, 12), (512, 4)]
)
def test_class_rule_boxes_and_masks_of_shapes(size, n):
    images = shapes(n, size, seed=5)
    for image, label, mask, boxes, kinds in zip(
        images.images, images.labels, images.masks, images.boxes, images.box_labels
    ):
        assert boxes.shape == (2, 4) and boxes.dtype == torch.float32 and kinds.dtype == torch.int64
        assert kinds[0] != kinds[1] and {*mask.unique().tolist()} == {0, *(1 + kinds).tolist()}
        cue, cue_box = find_cue(image, mask)
        cue_colour = nearest_colour(image, cue)
        colours = []
        for box, kind in zip(boxes.tolist(), kinds):
            rows, columns = (mask == kind + 1).nonzero().unbind(1)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]  # tight
            assert 0 <= box[0] < box[2] <= size and 0 <= box[1] < box[3] <= size
            assert distance(box, cue_box) >= size // 2
            colours.append(nearest_colour(image, mask == kind + 1))
        assert sorted(colours) == [0, 1]
        assert label == kinds[colours.index(cue_colour)]


def test_kinds_look_like_their_names():
    images = shapes(200, 64)
    for mask, boxes, kinds in zip(images.masks, images.boxes, images.box_labels):
        for (x0, y0, x1, y1), kind in zip(boxes.int().tolist(), kinds):
            shape = mask[y0:y1, x0:x1] == kind + 1
            middle = (y1 - y0) // 2
            corner, centre, left, top = (
                shape[0, 0],
                shape[middle, middle],
                shape[middle, 0],
                shape[0, middle],
            )
            assert torch.equal(shape, shape.flip(1))  # a flip keeps the kind
            expected = {
                "circle": (False, True, True, True),
                "cross": (True, True, False, False),
                "equals": (True, False, False, True),
                "pause": (True, False, True, False),
            }[KINDS[kind]]
            assert (corner.item(), centre.item(), left.item(), top.item()) == expected


def test_colour_kind_and_place_of_the_named_shape_are_balanced():
    images = shapes(2000, seed=3)
    first = torch.tensor(
        [kinds[0] == label for kinds, label in zip(images.box_labels, images.labels)]
    )
    colour = torch.tensor(
        [
            nearest_colour(image, mask == label + 1)
            for image, mask, label in zip(images.images, images.masks, images.labels)
        ]
    )
    for fact in (first, colour):
        for label in range(4):
            assert (
                0.43 < fact[images.labels == label].double().mean() < 0.57
            )  # 500 draws: three standard deviations
    other = torch.stack(images.box_labels).sum(1) - images.labels
    assert torch.bincount(4 * images.labels + other, minlength=16)[[0, 5, 10, 15]].sum() == 0
    assert torch.bincount(4 * images.labels + other).topk(12).values.min() > 120  # 2000 / 12 = 167


def test_no_model_without_mixing_is_right_on_all_four():
    """Chapter 9: exchange the shapes' colours, or the cue's; of four images three can be right."""
    torch.manual_seed(0)
    model = (
        XViT(
            img_size=32,
            num_classes=4,
            dim=32,
            depth=2,
            num_heads=4,
            stem_stride=4,
            attention=NoMixing,
            class_depth=0,
            lpi=False,
        )
        .double()
        .eval()
    )
    scene = _scene(8, 32, seed=0)
    logits = []
    for swap_shapes in (False, True):
        for swap_cue in (False, True):
            colour = scene["colour"].copy()
            if swap_shapes:
                colour[:, :2] = colour[:, 1::-1]
            if swap_cue:
                colour[:, 2] = scene["colour"][:, :2].sum(1) - colour[:, 2]
            changed = {**scene, "colour": colour}
            image, _ = _draw(
                32, np.random.RandomState(0), **{k: v.astype(np.int32) for k, v in changed.items()}
            )
            logits.append(model((torch.from_numpy(image).double() / 255 - 0.5) / 0.25).detach())
    difference = logits[0] - logits[1] - logits[2] + logits[3]
    assert difference.abs().max() < 1e-12 < (logits[0] - logits[1]).abs().max()


def accuracy(attention, steps=90):
    torch.manual_seed(0)
    train, test = shapes(4000, 24), shapes(500, 24, seed=1)
    model = XViT(
        img_size=24,
        num_classes=4,
        dim=64,
        depth=2,
        num_heads=4,
        stem_stride=4,
        attention=attention,
        class_depth=0,
        lpi=False,
    )
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    augment = Augment("flip")
    for _ in range(steps):
        batch = torch.randint(len(train), (128,))
        loss = F.cross_entropy(model(augment(train.images[batch])), train.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return (
            (model.eval()(normalize(test.images)).argmax(1) == test.labels).double().mean().item()
        )


def test_attention_learns_shapes_and_a_model_without_mixing_does_not():
    learned, guessed = accuracy(XNormAttention), accuracy(NoMixing)
    assert learned > 0.7 > 0.56 > guessed > 0.3, (
        learned,
        guessed,
    )  # guessing between the two shapes: 0.5


# ------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize(
    "size, how, group",
    [
        (32, "flip", 16),
        (32, "shift", 16),
        (48, "crop", 16),
        (16, "shift+randaugment", 3),
        (32, "crop+randaugment", 16),
    ],
)
def test_augment_is_decided_by_the_state_of_the_generator(size, how, group):
    x = shapes(40, size).images
    augment = Augment(how, group)
    state = torch.get_rng_state()
    first, second = augment(x), augment(x)
    assert (
        first.shape == (40, 3, size, size)
        and first.dtype == torch.float32
        and first.isfinite().all()
    )
    assert -2 <= first.min() and first.max() <= 2 and not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(augment(x), first) and torch.equal(augment(x), second)
    assert torch.equal(x, shapes(40, size).images)  # the stored images are not touched


def test_each_image_is_shifted_by_its_own_draw():
    one = torch.randint(256, (1, 3, 12, 12), dtype=torch.uint8)
    x = one.expand(200, -1, -1, -1)
    out = shift(x, 2)
    padded = F.pad(one.float(), (2, 2, 2, 2), mode="reflect")[0].to(torch.uint8)  # (3, 16, 16)
    crops = {
        padded[:, i : i + 12, j : j + 12].numpy().tobytes(): (i, j)
        for i in range(5)
        for j in range(5)
    }
    seen = {crops[image.contiguous().numpy().tobytes()] for image in out}
    assert seen == {(i, j) for i in range(5) for j in range(5)}


def test_each_image_is_flipped_by_its_own_draw():
    x = torch.randint(256, (400, 3, 5, 5), dtype=torch.uint8)
    out = flip(x)
    flipped = (out == x.flip(-1)).flatten(1).all(1)
    assert ((out == x).flatten(1).all(1) | flipped).all() and 150 < flipped.sum() < 250


def test_each_image_is_cropped_by_its_own_draw():
    row = torch.arange(64, dtype=torch.uint8)
    x = torch.stack(
        [
            row.expand(64, 64),
            row[:, None].expand(64, 64),
            torch.full((64, 64), 9, dtype=torch.uint8),
        ]
    )
    out = resized_crop(x.expand(300, -1, -1, -1), 32).double()
    width = (
        (out[:, 0, 5, 31] - out[:, 0, 5, 0]) * 32 / 31 / 64
    )  # from the ramps: which part of the image is seen
    height = (out[:, 1, 31, 5] - out[:, 1, 0, 5]) * 32 / 31 / 64
    assert ((0.32 < width * height) & (width * height < 1.03)).all() and (
        width * height
    ).std() > 0.1
    assert ((0.7 < width / height) & (width / height < 1.42)).all()
    assert out[:, 0, 0, 0].unique().numel() > 10 and (out[:, 2] == 9).all()


def test_a_group_shares_one_draw_and_the_next_has_another():
    one = shapes(1).images.expand(64, -1, -1, -1)
    augment = Augment("shift+randaugment", group=8)
    out = torch.cat([augment.randaugment(part) for part in one.split(8)])
    groups = [group.flatten(1) for group in out.split(8)]
    assert all((group == group[0]).all() for group in groups)
    assert len({group[0].numpy().tobytes() for group in groups}) > 4


def test_flips_keep_the_class_of_shapes():
    images = shapes(64)
    out = Augment("flip")(images.images)
    plain = normalize(images.images)
    for image, a, b in zip(out, plain, plain.flip(-1)):
        assert torch.equal(image, a) or torch.equal(
            image, b
        )  # and a mirrored shape is of its kind, see above


@pytest.mark.parametrize(
    "shape, dtype",
    [((2, 3, 32, 32), torch.float32), ((3, 32, 32), torch.uint8), ((2, 1, 32, 32), torch.uint8)],
)
def test_augment_refuses_what_does_not_fit(shape, dtype):
    x = torch.zeros(shape, dtype=dtype)
    with pytest.raises(ValueError, match=r"got a batch torch.*as load returns them"):
        Augment()(x)


def test_augment_does_what_its_name_says():
    x = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(Augment("none")(x), normalize(x))
    for how, function, number in (("shift", shift, 2), ("crop", resized_crop, 16)):
        torch.manual_seed(0)
        out = Augment(how)(x)
        torch.manual_seed(0)
        assert torch.equal(out, normalize(function(flip(x), number)))
    with pytest.raises(ValueError, match="got augmentation 'full', expected one of none, flip"):
        Augment("full")


def test_a_set_moves_as_a_whole():
    moved = shapes(4).to("meta")
    tensors = moved.images, moved.labels, moved.masks, *moved.boxes, *moved.box_labels
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.classes == KINDS and moved.name == "shapes" and len(moved) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("how", ["shift", "crop+randaugment"])
def test_a_gpu_makes_the_same_draws(how):
    x = shapes(64).images
    augment = Augment(how)
    state = torch.get_rng_state()
    here = augment(x)
    torch.set_rng_state(state)
    there = augment(x.cuda())
    assert (
        there.is_cuda and ((there.cpu() - here).abs() > 0.05).double().mean() < 0.02
    )  # rounding may tip a grey level


@pytest.mark.parametrize("limit", [float("inf"), float("nan"), 2.5, "3", True, 0])
def test_a_limit_that_is_no_number_of_pictures_is_refused(limit):
    with pytest.raises(ValueError, match="expected a number of pictures"):
        data.load("shapes", limit=limit)


@pytest.mark.parametrize("how", ["shift", "crop", "shift+randaugment", "crop+randaugment"])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_pictures_that_are_not_square_are_not_shifted_or_cropped(how, shape):
    # a shift kept 8 x 8 pixels of 8 x 12, and a crop made 12 x 12 of them
    x = torch.zeros(2, 3, *shape, dtype=torch.uint8)
    with pytest.raises(ValueError, match="expected squares"):
        Augment(how)(x)
    assert Augment("flip")(x).shape == x.shape
