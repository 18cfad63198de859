"""Files of pictures become bytes: every mode with its exact values, EXIF, what is refused."""

import builtins
import struct
import zlib

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from xvit_minimal import images
from xvit_minimal.images import fit, read_image, stack


def read(tmp_path, image, suffix="png", **options):
    """What read_image makes of an image saved in a format, (H, W, 3) as a list."""
    image.save(tmp_path / f"a.{suffix}", **options)
    return read_image(tmp_path / f"a.{suffix}").permute(1, 2, 0).tolist()


# ------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_grey_of_sixteen_bits_is_scaled(tmp_path, suffix):
    values = [0, 1, 128, 129, 257, 32767, 32896, 65407, 65406, 65535]
    ramp = Image.fromarray(np.array([values], dtype=np.uint16))
    expected = [round(v / 257) for v in values]
    assert [pixel for (pixel, *_) in read(tmp_path, ramp, suffix)[0]] == expected
    assert expected[-1] == 255 and expected[3] == 1


def test_a_ramp_of_sixteen_bits_is_a_ramp(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16)[None]).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, 0].tolist() == list(range(256))


def test_sixteen_bits_in_the_other_byte_order_and_with_a_transparent_value(tmp_path):
    big = Image.frombytes("I;16B", (2, 1), bytes([0xFF, 0xFF, 0x01, 0x01]))
    assert read(tmp_path, big, "tif") == [[[255] * 3, [1] * 3]]
    ramp = Image.fromarray(np.array([[257, 514]], dtype=np.uint16))
    assert read(tmp_path, ramp, transparency=514) == [[[1] * 3, [255] * 3]]  # over white


def png_of_sixteen_bits(path, colour_type, samples):
    """A PNG file of one pixel, written by hand: Pillow writes no colours of 16 bits."""

    def chunk(kind, content):
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 1, 1, 16, colour_type, 0, 0, 0)
    pixel = zlib.compress(b"\0" + struct.pack(f">{len(samples)}H", *samples))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixel) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize(
    "colour_type, samples, expected",
    [
        (2, (65535, 32768, 255), (255, 128, 0)),  # the upper byte of each
        (6, (65535, 32768, 0, 65535), (255, 128, 0)),
        (6, (65535, 32768, 0, 0), (255, 255, 255)),
        (4, (32768, 65535), (128, 128, 128)),
    ],
)
def test_colours_of_sixteen_bits(tmp_path, colour_type, samples, expected):
    png_of_sixteen_bits(tmp_path / "a.png", colour_type, samples)
    assert read_image(tmp_path / "a.png").flatten().tolist() == list(expected)


@pytest.mark.parametrize(
    "mode, value", [("F", 0.5), ("I", 70_000), ("I", 200), ("LAB", (50, 128, 128))]
)
def test_what_has_no_known_range_or_colours_is_refused(tmp_path, mode, value):
    Image.new(mode, (2, 2), value).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=f"a.tif: got a picture in mode {mode}, .*save it as PNG"):
        read_image(tmp_path / "a.tif", 4)


@pytest.mark.parametrize(
    "mode, suffix, value, expected",
    [
        ("1", "png", 1, (255, 255, 255)),
        ("1", "tif", 0, (0, 0, 0)),
        ("L", "bmp", 77, (77, 77, 77)),
        ("LA", "png", (100, 51), (224, 224, 224)),  # a fifth of 100 over white
        ("RGBA", "png", (100, 0, 255, 51), (224, 204, 255)),
        ("RGBA", "webp", (100, 0, 255, 0), (255, 255, 255)),
        ("CMYK", "tif", (255, 0, 0, 0), (0, 255, 255)),
        ("CMYK", "tif", (0, 255, 0, 128), (127, 0, 127)),
        ("CMYK", "jpg", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", "jpg", (0, 0, 0, 255), (0, 0, 0)),
        ("YCbCr", "tif", (255, 128, 128), (255, 255, 255)),
        ("YCbCr", "tif", (128, 128, 128), (128, 128, 128)),
    ],
)
def test_modes_with_exact_values(tmp_path, mode, suffix, value, expected):
    if (mode, suffix) == ("YCbCr", "tif") and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("this Pillow cannot read the YCbCr TIFF that it writes")
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    pixels = read(tmp_path, Image.new(mode, (2, 3), value), suffix, **options)
    assert np.abs(np.array(pixels) - expected).max() <= (suffix == "jpg")


def test_palettes_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 0)
    assert read(tmp_path, image) == [[[10, 20, 30], [200, 100, 50]]]
    assert read(tmp_path, image, transparency=0) == [[[255] * 3, [200, 100, 50]]]
    assert read(tmp_path, image, transparency=bytes([51, 255])) == [
        [[206, 208, 210], [200, 100, 50]]
    ]
    grey, colour = Image.new("L", (1, 1), 9), Image.new("RGB", (1, 1), (1, 2, 3))
    assert read(tmp_path, grey, transparency=9) == [[[255] * 3]]
    assert read(tmp_path, colour, transparency=(1, 2, 3)) == [[[255] * 3]]


def test_alpha_that_is_multiplied_in(tmp_path):
    """TIFF's associated alpha: (100, 0, 50) stored at half cover is the colour (199, 0, 99)."""
    image = Image.new("RGBA", (1, 1), (100, 0, 50, 128))
    image.save(tmp_path / "a.tif")
    content = (tmp_path / "a.tif").read_bytes()
    unassociated, associated = (struct.pack("<HHIHH", 338, 3, 1, n, 0) for n in (2, 1))
    assert content.count(unassociated) == 1
    (tmp_path / "a.tif").write_bytes(content.replace(unassociated, associated))
    stored = [100 * 255 / 128, 0, 50 * 255 / 128]
    expected = [255 + (value - 255) * 128 / 255 for value in stored]
    assert np.abs(read_image(tmp_path / "a.tif").flatten().numpy() - expected).max() <= 1


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    options = {"lossless": True} if suffix == "webp" else {}
    pixels = read(tmp_path, frames[0], suffix, save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / f"a.{suffix}") as file:
        assert file.n_frames == 2
    assert pixels == [[[250, 0, 0]] * 4] * 4


def test_colour_profiles_are_not_applied(tmp_path):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = Image.new("RGB", (1, 1), (10, 200, 30))
    assert read(tmp_path, image, icc_profile=profile) == [[[10, 200, 30]]]


# --------------------------------------------------------------------------------------------- EXIF


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(
    "orientation, expected",
    [
        (1, [[0, 1, 2], [3, 4, 5]]),
        (2, [[2, 1, 0], [5, 4, 3]]),
        (3, [[5, 4, 3], [2, 1, 0]]),
        (4, [[3, 4, 5], [0, 1, 2]]),
        (5, [[0, 3], [1, 4], [2, 5]]),
        (6, [[3, 0], [4, 1], [5, 2]]),
        (7, [[5, 2], [4, 1], [3, 0]]),
        (8, [[2, 5], [1, 4], [0, 3]]),
        (0, [[0, 1, 2], [3, 4, 5]]),
        (9, [[0, 1, 2], [3, 4, 5]]),
    ],
)
def test_every_orientation(tmp_path, suffix, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    image.save(tmp_path / f"a.{suffix}", exif=exif)
    assert read_image(tmp_path / f"a.{suffix}")[0].tolist() == expected


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0garbage that is no TIFF", b"Exif\0\0II*\0"]
)
def test_exif_data_that_cannot_be_read_turn_nothing(tmp_path, exif):
    image = Image.fromarray(np.full((2, 3), 90, dtype=np.uint8))
    assert read(tmp_path, image, "jpg", exif=exif) == [[[90] * 3] * 3] * 2


def test_sixteen_bits_on_their_side(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    ramp = Image.fromarray(np.array([[0, 65535]], dtype=np.uint16))
    assert read(tmp_path, ramp, exif=exif) == [[[0] * 3], [[255] * 3]]


# ---------------------------------------------------------------------------------- what is refused


def test_a_picture_that_is_not_there(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "blood_cell.png")
    with pytest.raises(
        ValueError,
        match=r"blood-cell.png: not there \(the nearest name is 'blood_cell.png'\): correct",
    ):
        read_image(tmp_path / "blood-cell.png", 9)
    with pytest.raises(ValueError, match="zzz: not there: correct the name"):
        read_image(tmp_path / "zzz", 9)
    with pytest.raises(ValueError, match="a.png: not there, nor is its folder .*nowhere: correct"):
        read_image(tmp_path / "nowhere/a.png", 9)
    with pytest.raises(ValueError, match="a folder, expected a picture's file: correct the name"):
        read_image(tmp_path, 9)


def test_a_picture_without_permission(tmp_path, monkeypatch):
    Image.new("L", (2, 2)).save(tmp_path / "a.png")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(ValueError, match="a.png: no permission to read it.*: allow it"):
        read_image(tmp_path / "a.png", 9)


@pytest.mark.parametrize("size", [0, -1, 3.0, "3", True, float("nan"), 10**6])
def test_sizes_that_are_none(tmp_path, size):
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    complaint = "lower size or limit" if size == 10**6 else f"got size={size!r}, expected a whole"
    for square in (True, False):
        with pytest.raises(ValueError, match=complaint):
            read_image(tmp_path / "a.png", size, square)
        with pytest.raises(ValueError, match=complaint):
            fit(torch.zeros(3, 2, 2, dtype=torch.uint8), size, square)


def test_a_size_from_numpy(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", np.int64(5)).shape == (3, 5, 5)


# -------------------------------------------------------------------------------------------- sizes


def test_a_picture_as_it_is_gives_the_scale_of_the_one_that_a_model_sees(tmp_path):
    Image.new("RGB", (30, 20), (1, 2, 3)).save(tmp_path / "a.png")
    whole = read_image(tmp_path / "a.png")
    seen = fit(whole, 15, square=False)
    assert whole.shape == (3, 20, 30) and seen.shape == (3, 10, 15)
    assert torch.equal(read_image(tmp_path / "a.png", 15, square=False), seen)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_stack(dtype):
    parts = [torch.full((3, 2, 5), 7, dtype=dtype), torch.full((3, 4, 1), 9, dtype=dtype)]
    whole, sizes = stack(parts, 128)
    assert whole.shape == (2, 3, 4, 5) and whole.dtype == dtype
    assert sizes.tolist() == [[2, 5], [4, 1]] and sizes.dtype == torch.int64
    for part, one, (height, width) in zip(parts, whole, sizes.tolist()):
        assert torch.equal(one[:, :height, :width], part)
        rest = torch.ones(4, 5, dtype=torch.bool)
        rest[:height, :width] = False
        assert (one[:, rest] == 128).all()
    masks, sizes = stack([torch.zeros(2, 3), torch.zeros(1, 4)], 255)
    assert masks.shape == (2, 2, 4) and sizes.tolist() == [[2, 3], [1, 4]]


def test_pictures_of_one_size_have_no_sizes():
    pictures = [torch.zeros(3, 4, 5, dtype=torch.uint8)] * 2
    assert images.padded(pictures)[1] is None
    assert images.padded([pictures[0], pictures[0][:, :3]])[1].tolist() == [[4, 5], [3, 5]]
