"""The generated set: coloured shapes with class, mask and boxes, the same on every machine."""

import hashlib

import numpy as np
import torch

from .images import ImageSet, check_memory, fingerprint

KINDS = ("circle", "cross", "equals", "pause")  # of `shapes`: ● × = ‖
ORANGE_BLUE = np.array([(235, 110, 40), (50, 100, 240)])


def shapes(n, size=32, seed=0):
    """n images: an orange and a blue shape and, far from both, a cue, a square of one colour.

    The class is the kind of the shape that has the cue's colour. No part of the image tells it,
    only two distant parts together do. Masks, boxes and box_labels are those of the two shapes.
    `size`: 16 to 512 pixels. The classes take turns, and the first images of a longer set are those
    of a shorter one. Raises ValueError for other sizes.
    """
    if n < 1 or not 16 <= size <= 512:
        raise ValueError(
            f"got n={n} and size={size}, expected one image or more and a size from 16 to 512"
        )
    check_memory(4 * n * size**2, f"{n:,} images of {size} x {size} pixels, with masks,")
    images, masks = (
        torch.empty(n, 3, size, size, dtype=torch.uint8),
        torch.empty(n, size, size, dtype=torch.uint8),
    )
    scene, noise = _scene(n, size, seed), np.random.RandomState([seed, 1])
    for start in range(0, n, step := max(1, 2**20 // size**2)):  # a few at a time, to save memory
        some = slice(start, start + step)
        part = {key: value[some].astype(np.int32) for key, value in scene.items()}
        images[some], masks[some] = map(torch.from_numpy, _draw(size, noise, **part))
    x, y, r, kind = (
        torch.from_numpy(scene[key][:, :2]) for key in ("x", "y", "r", "kind")
    )  # each (n, 2): no cue
    boxes = torch.stack([x - r, y - r, x + r + 1, y + r + 1], dim=-1).float()  # (n, 2, 4)
    labels, copy = torch.arange(n) % len(KINDS), f"generated, seed {seed}"
    told = fingerprint(images, KINDS, [copy], hashlib.sha256(images.numpy()).hexdigest())
    return ImageSet(
        images, labels, KINDS, "shapes", copy, masks, list(boxes), list(kind), fingerprint=told
    )


def generated(split, size, limit, many):
    """The part "train" of `many` images, or "val" or "test", a fifth of that; or `limit` of them.

    Each has a seed of its own. Nothing is held out of "train", so "train+val" is the same.
    """
    seed = {"train": 0, "train+val": 0, "test": 1, "val": 2}[split]
    return shapes(limit or (many if seed == 0 else many // 5), size, seed)


def _scene(n, size, seed):
    """The kind, colour, centre (x, y) and radius of three objects, the cue last: (n, 3)."""
    # RandomState: NumPy promises that its numbers will never change. A row for each image.
    numbers = iter(
        np.random.RandomState([seed, 0]).randint(2**31 - 1, size=(n, 28), dtype=np.int64).T
    )

    def draw(low, high):  # an integer for each image, low <= integer <= high
        return low + next(numbers) % (high - low + 1)

    target, place, colour = np.arange(n) % len(KINDS), draw(0, 1), draw(0, 1)
    other = (target + draw(1, len(KINDS) - 1)) % len(KINDS)
    kind = np.stack(
        [np.where(place, other, target), np.where(place, target, other), np.full(n, len(KINDS))], 1
    )
    colour = np.stack([colour ^ place, 1 ^ colour ^ place, colour], 1)
    r = np.stack(
        [draw(size // 6, size * 3 // 16), draw(size // 6, size * 3 // 16), np.full(n, size // 8)], 1
    )
    # u leads away from the cue's border, v along it: a shape in each half of v
    cue = draw(r[:, 2], size // 16 + r[:, 2])
    # from 24 pixels on, no token of stride 4, 7 pixels wide, sees the cue and a shape
    near = cue + r[:, 2] + size * 7 // 24
    u = np.stack(
        [draw(near + r[:, 0], size - 1 - r[:, 0]), draw(near + r[:, 1], size - 1 - r[:, 1]), cue], 1
    )
    v = np.stack(
        [
            draw(r[:, 0], size // 2 - 1 - r[:, 0]),
            draw(size // 2 + r[:, 1], size - 1 - r[:, 1]),
            draw(r[:, 2], size - 1 - r[:, 2]),
        ],
        1,
    )
    turn, u = draw(0, 1)[:, None], np.where(draw(0, 1)[:, None], size - 1 - u, u)
    tint = np.stack([draw(-20, 20) for _ in range(9)], 1).reshape(
        n, 3, 3
    )  # of each object, in red, green, blue
    ground = draw(80, 120)[:, None] + np.stack([draw(-6, 6) for _ in range(3)], 1)
    return dict(
        kind=kind,
        r=r,
        x=np.where(turn, v, u),
        y=np.where(turn, u, v),
        colour=ORANGE_BLUE[colour] + tint,
        ground=ground,
        slope=np.stack([draw(-20, 20), draw(-20, 20)], 1),
    )


def _draw(size, noise, kind, r, x, y, colour, ground, slope):
    """The images uint8 (n, 3, size, size) and masks uint8 (n, size, size) of a scene."""
    row, column = np.arange(size, dtype=np.int32)[:, None], np.arange(size, dtype=np.int32)
    grade = (
        slope[:, 0, None, None] * column + slope[:, 1, None, None] * row
    ) // size  # (n, size, size)
    image, mask = (
        ground[:, :, None, None] + grade[:, None],
        np.zeros_like(grade),
    )  # (n, 3, size, size) and grade's
    for i in range(3):
        x_i, y_i, r_i, kind_i = (
            value[:, i, None, None] for value in (x, y, r, kind)
        )  # each (n, 1, 1)
        inside = _inside(kind_i, abs(column - x_i), abs(row - y_i), r_i)  # (n, size, size)
        image = np.where(inside[:, None], colour[:, i, :, None, None], image)
        mask = np.where(inside & (kind_i < len(KINDS)), 1 + kind_i, mask)
    image = (
        image
        - 12
        + np.frombuffer(noise.bytes(image.size), dtype=np.uint8).reshape(image.shape) % 25
    )
    return image.clip(0, 255).astype(np.uint8), mask.astype(np.uint8)


def _inside(kind, dx, dy, r):
    """Whether a pixel, dx columns and dy rows from the centre, is in it: one of KINDS, the cue."""
    circle, square, bar = dx**2 + dy**2 <= r**2, np.maximum(dx, dy) <= r, r // 3
    return square & np.choose(kind, [circle, abs(dx - dy) <= r // 4, dy > bar, dx > bar, square])
