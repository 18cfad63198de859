"""The parts of a set: the pictures that train a model, that validate it, that test it."""

import numpy as np

from .images import check_size

SPLITS = ("train", "val", "test", "train+val")


def check_request(split, size, limit):
    """Raise ValueError unless `split` is one of SPLITS, and size and limit None or 1 and more."""
    if split not in SPLITS:
        raise ValueError(f"got split={split!r}, expected one of {', '.join(SPLITS)}: choose one")
    if size is not None:
        check_size(size)
    whole = isinstance(limit, (int, np.integer)) and not isinstance(limit, bool)
    if limit is not None and (not whole or limit < 1):
        raise ValueError(f"got limit={limit!r}, expected a number of pictures: give 1 or more")


def parts_of(split, exists):
    """The parts of a set on disk that a split reads, and whether "train" is to be cut in two.

    `exists` says whether the set has a part "test", "val". With both, "val" validates. With only
    one of them, that one tests, and a tenth of "train" validates.
    """
    if split == "test":
        return ("test" if exists("test") else "val",), False
    if exists("test") and exists("val"):
        return tuple(split.split("+")), False
    return ("train",), True


def choose(split, labels):
    """Which pictures of a training part, whose labels int (n,) these are, a split takes: indices.

    "val" is a tenth of each class, of two pictures or more at least one; "train" is the rest, and
    "train+val" all of them. The draw depends on nothing but the labels.
    """
    labels = np.asarray(labels)
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        where = np.flatnonzero(labels == label)
        count = max(1, round(len(where) / 10)) if len(where) > 1 else 0
        held[np.random.RandomState(label).permutation(where)[:count]] = True
    wanted = {"train": ~held, "val": held, "train+val": np.ones_like(held)}[split]
    if split == "val" and not held.any():
        raise ValueError(
            f"got {len(labels)} training picture(s), none of which can be held out for validation, "
            "expected two or more of a class: add some, or train without validation"
        )
    return np.flatnonzero(wanted)
