"""What a run is made of: its configuration, the recipes, what follows from the training set, and
the model of all this."""

import difflib
import math
import os
import re
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import get_args

from . import data
from .augment import AUGMENTATIONS, DENSE_AUGMENTATIONS
from .baselines import ATTENTIONS, VARIANTS
from .model import SIZES, XViT
from .optimization import OPTIMIZERS, has_muon

_DENSE = dict(
    class_depth=0, label_smoothing=0.0, mix=0.0, drop_path=0.0, augment="crop"
)  # what both dense tasks change
TASK_DEFAULTS = {  # the tasks, and what each changes in Config's defaults
    "classification": {},
    "segmentation": _DENSE,
    "detection": _DENSE,
}
RECIPES = {  # what (a task, a set) wants on top of that
    ("classification", "shapes"): dict(
        model="xvit_pico",
        epochs=3,
        batch_size=128,
        lr=2e-3,
        warmup=1,
        label_smoothing=0.0,
        augment="flip",
        mix=0.0,
        drop_path=0.0,
        ema=0.98,
    ),
    ("classification", "imagenette"): dict(stem_stride=8, batch_size=128),
    ("segmentation", "shapes"): dict(
        model="xvit_pico", epochs=3, batch_size=16, lr=2e-3, warmup=1, augment="flip", ema=0.98
    ),
    ("detection", "shapes"): dict(
        model="xvit_pico", epochs=4, batch_size=16, lr=2e-3, warmup=1, augment="flip", ema=0.98
    ),
}
# where `settle` begins and ends: a token's width (None: the model's), tokens a picture, pictures a
# step, from how many of these on the peak rate is the full one, and what that is in a short run and
# in a long one
_DENSE_RATES = {"muon": (1e-3, 1e-3), "adamw": (1e-3, 1e-3)}
CHOICES = {
    "classification": dict(
        stride=None,
        most_tokens=400,
        most_pictures=512,
        full_rate=64,
        rates={"muon": (4e-3, 2e-3), "adamw": (4e-3, 1e-3)},
    ),
    "segmentation": dict(
        stride=4, most_tokens=16_384, most_pictures=8, full_rate=8, rates=_DENSE_RATES
    ),
    "detection": dict(
        stride=8, most_tokens=16_384, most_pictures=8, full_rate=8, rates=_DENSE_RATES
    ),
}
LONG = 50  # epochs from which on a run is long: it can bear more augmentation
STEPS = 20  # that an epoch should have at least
STRIDES = (2, 4, 8, 16)  # pixels a token may be wide


def is_dense(task):
    """Whether a task wants more than one answer for an image: a class for every pixel, or boxes."""
    return task != "classification"


def _option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """A run. The defaults are a recipe for photographs; `recipe` knows what drawn shapes need
    instead.

    Where a default is None, the right value depends on the set, the model or the machine; `settle`
    fills in what the set decides. `~` in a path is the home folder.
    Raises ValueError for an unknown name (and says the nearest known), a value of another type, a
    number out of range.
    """

    task: str = _option("classification", f"one of {', '.join(TASK_DEFAULTS)}")
    data: str = _option(
        "shapes",
        "a set by name (cifar10, cifar100, imagenette, shapes; camvid, voc, pets for segmentation; "
        "bccd, voc for detection) or a folder",
    )
    out: str = _option(
        "runs/shapes",
        "folder of the run, by default runs/DATA or, for a dense task, runs/DATA-TASK; an "
        "unfinished run in it goes on",
    )
    model: str = _option("xvit_nano", f"one of {', '.join(SIZES)}")
    attention: str = _option("xnorm", f"one of {', '.join(ATTENTIONS | VARIANTS)}")
    dim: int | None = _option(None, "width, instead of the model's")
    depth: int | None = _option(None, "number of blocks, instead of the model's")
    num_heads: int | None = _option(None, "heads, instead of the model's")
    stem_stride: int | None = _option(
        None,
        "pixels a token is wide (2, 4, 8, 16), instead of the model's; by default more where a "
        "picture would become too many tokens",
    )
    class_depth: int | None = _option(
        None, "class-attention blocks, instead of the model's; 0: mean over the tokens"
    )
    lpi: bool = _option(True, "local patch interaction in every block")
    pyramid: int = _option(64, "channels of the feature pyramid, for segmentation and detection")
    init: str | None = _option(
        None, "start with the body in this weights.safetensors, trained for any task"
    )
    size: int | None = _option(
        None,
        "side of the images in pixels, the longer one for dense tasks, instead of the set's own",
    )
    limit: int | None = _option(None, "train on the first LIMIT images, equally many of each class")
    epochs: int = _option(100, "times that every training image is seen")
    batch_size: int | None = _option(
        None,
        "images in a step, over all processes; by default 512 (dense tasks: 8), and fewer where an "
        f"epoch would have less than {STEPS} steps",
    )
    micro_batch: int | None = _option(
        None,
        "images of a step that a process computes at once, by default as many as half of the free "
        "memory holds, on a CPU 2 GB; BatchNorm's statistics are theirs",
    )
    optimizer: str | None = _option(
        None, f"one of {', '.join(OPTIMIZERS)}; by default muon, where torch has it"
    )
    lr: float | None = _option(
        None, "peak learning rate; by default it follows optimizer, epochs and batch"
    )
    final_lr: float = _option(1e-5, "learning rate at the end of the cosine")
    warmup: float | None = _option(
        None, "epochs of linear warm-up, at most a fifth of all; by default a tenth"
    )
    weight_decay: float = _option(0.05, "on the weights of linear maps and convolutions alone")
    label_smoothing: float = _option(0.1, "share of each label that is spread over all classes")
    augment: str | None = _option(
        None,
        f"one of {', '.join(AUGMENTATIONS)}, by default shift for small images and crop for "
        "others, with randaugment in a long run; for dense tasks none, flip, crop",
    )
    mix: float | None = _option(
        None,
        "share of the epochs, from the first on, with mixup and cutmix, 0 to 1; by default 0.6 in "
        "a long run",
    )
    drop_path: float | None = _option(
        None, "probability of stochastic depth, by default 0.1 in a long run"
    )
    small: float = _option(
        0.0, "share of the epochs, from the first on, with images of three quarters of their size"
    )
    ema: float | None = _option(
        None,
        "decay of the averaged weights, which are the ones evaluated and kept; by default their "
        "mean age is a twentieth of the run",
    )
    holdout: bool = _option(
        True, "keep a part of the training images for the epochs' scores, see data.load"
    )
    seed: int = _option(0, "of the weights, the order and the augmentation")
    save_steps: int = _option(
        500, "steps between two checkpoints; every epoch ends with one as well"
    )
    eval_epochs: int = _option(
        1, "epochs between two looks at the validation images; the last epoch always has one"
    )
    device: str | None = _option(
        None, "cpu, cuda, cuda:1, mps, ...; by default a GPU if there is one"
    )
    amp: bool | None = _option(
        None, "bfloat16 autocast; by default on a GPU that has it, on a CPU that is faster with it"
    )
    compile: bool | None = _option(None, "torch.compile; by default on a GPU")

    def __post_init__(self):
        for option in fields(self):
            setattr(self, option.name, _typed(option, getattr(self, option.name)))
        self._check_names()
        self._check_combinations()
        for names, fits, words in _RANGES:
            for name in names.split():
                if (value := getattr(self, name)) is not None and not fits(value):
                    raise ValueError(f"got {name}={value}, expected {words}")

    def _check_names(self):
        known("model", self.model, SIZES)
        known("attention", self.attention, ATTENTIONS | VARIANTS)
        known("task", self.task, TASK_DEFAULTS)
        if self.optimizer is not None:
            known("optimizer", self.optimizer, OPTIMIZERS)
        if self.augment is not None:
            changes = DENSE_AUGMENTATIONS if is_dense(self.task) else AUGMENTATIONS
            known("augment", self.augment, changes)
        for name in ("data", "out", "init"):
            path = getattr(self, name)
            if path is not None and (not path.strip() or "\0" in path):
                raise ValueError(
                    f"got {name}={path!r}, expected the path of a file or folder: name one"
                )
        for name in ("data", "out", "init"):
            if getattr(self, name) is not None:
                setattr(self, name, os.path.expanduser(getattr(self, name)))
        if self.device is not None and not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", self.device):
            raise ValueError(
                f"got device {self.device!r}, expected cpu, cuda, cuda:1, mps or xpu: correct it, "
                "or leave it out to take a GPU where there is one"
            )

    def _check_combinations(self):
        whole_image = (self.mix, self.label_smoothing, self.class_depth, self.small)
        if is_dense(self.task) and whole_image != (0, 0, 0, 0):
            raise ValueError(
                f"got mix={self.mix}, label_smoothing={self.label_smoothing}, "
                f"class_depth={self.class_depth}, small={self.small} for {self.task}, expected 0 "
                "for all four: they are for one label an image; leave them out"
            )
        if self.attention == "none" and self.class_depth != 0:
            raise ValueError(
                "got attention 'none' with a class token, which would see no image: set "
                "class_depth to 0, the mean over the tokens"
            )


_RANGES = (
    (
        "epochs eval_epochs save_steps size limit dim depth num_heads",
        lambda v: v >= 1,
        "at least 1",
    ),
    ("stem_stride", lambda v: v in STRIDES, f"one of {STRIDES}"),
    ("batch_size micro_batch", lambda v: v >= 2, "at least 2: BatchNorm needs more than one image"),
    ("pyramid", lambda v: v >= 8 and v % 8 == 0, "a multiple of 8, at least 8"),
    ("class_depth", lambda v: v >= 0, "at least 0"),
    ("seed", lambda v: 0 <= v < 2**31, "a number from 0 to 2,147,483,647"),
    ("lr", lambda v: 0 < v < math.inf, "a positive number"),
    ("final_lr warmup weight_decay", lambda v: 0 <= v < math.inf, "a number of at least 0"),
    ("label_smoothing drop_path ema", lambda v: 0 <= v < 1, "a number from 0 to below 1"),
    ("mix small", lambda v: 0 <= v <= 1, "a number from 0 to 1"),
)
_TYPES = {  # what is taken for each type of an option, and how it is called
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: ((str, os.PathLike), "text"),
}


def _typed(option, value):
    """The value of an option as its own type: NumPy's numbers and paths become what a record can
    hold."""
    kinds = get_args(option.type) or (option.type,)  # (int, NoneType) of int | None
    if value is None and type(None) in kinds:
        return None
    taken, words = _TYPES[kinds[0]]
    if not isinstance(value, taken) or isinstance(value, bool) and kinds[0] is not bool:
        raise ValueError(f"got {option.name}={value!r}, expected {words}")
    return kinds[0](value)


def recipe(data="shapes", task="classification", **changes):
    """The Config for a data set and a task: its recipe, a folder of their names under runs/, and
    `changes` on top."""
    name = Path(data).expanduser().resolve().name or "data"  # of "." as well
    usual = {**TASK_DEFAULTS.get(task, {}), **RECIPES.get((task, data), {})}
    out = f"runs/{name}-{task}" if is_dense(task) else f"runs/{name}"
    return Config(**{**usual, "data": data, "task": task, "out": out, **changes})


def settle(config, train_set):
    """(Config, lines): every number that the training set decides filled in, and what was chosen
    and why.

    What is given stays. Else, for n pictures of H x W pixels:
    - stem_stride: the model's own (segmentation: 4, detection: 8), doubled until a picture has at
      most 400 tokens (16,384 for dense tasks), or it is 16;
    - batch_size: 512 (8 for dense tasks), halved until an epoch has at least 20 steps or a step
      only 4 pictures;
    - optimizer: Muon for classification where torch has it, else AdamW;
    - augment, mix, drop_path: a long run, of 50 epochs and more, gets RandAugment, mixup and cutmix
      in 60% of its epochs, and stochastic depth of 0.1; a short one has seen too little for that;
    - lr: that of CHOICES, for a batch of B < 64 (8 for dense tasks) times sqrt(B / 64), as the
      noise of an adaptive gradient wants (Malladi et al., arXiv:2205.10287);
    - warmup: a tenth of the epochs;
    - ema: 1 - 20 / steps of the run, so that the averaged weights are a twentieth of the run old.
    """
    bounds, n = CHOICES[config.task], len(train_set)
    height, width = image_size(config, train_set)
    chosen, lines = {}, []

    def choose(name, value, reason):
        if (given := getattr(config, name)) is not None:
            return given
        chosen[name] = value
        shown = value if isinstance(value, str) else f"{value:g}"
        lines.append(f"chosen: --{name.replace('_', '-')} {shown}, because {reason}")
        return value

    usual = stride = bounds["stride"] or SIZES[config.model].get("stem_stride", 16)
    while stride < 16 and tokens(height, width, stride) > bounds["most_tokens"]:
        stride *= 2
    reason = f"{height} x {width} pixels are then {tokens(height, width, stride):,} tokens"
    if stride > usual:
        reason += f", and {tokens(height, width, usual):,} at the usual {usual}"
    choose("stem_stride", stride, reason)

    batch = bounds["most_pictures"]
    while batch > 4 and n < STEPS * batch:
        batch //= 2
    reason = f"an epoch of {n:,} pictures then has {-(-n // batch):,} steps"
    batch = choose("batch_size", batch, reason)

    long = config.epochs >= LONG
    length = f"a run of {config.epochs} epochs is {'long' if long else 'short'}"
    choose("augment", move(config) + ("+randaugment" if long else ""), length)
    choose("mix", 0.6 if long else 0.0, length)
    choose("drop_path", 0.1 if long else 0.0, length)

    muon = has_muon() and not is_dense(config.task)
    reason = "it learns faster" if muon else "Muon was not tried here, or torch has none"
    optimizer = choose("optimizer", "muon" if muon else "adamw", reason)
    rate, full = bounds["rates"][optimizer][long], bounds["full_rate"]
    reason = f"{length}, and a step of {optimizer} averages {batch} pictures"
    if batch < full:
        reason += f", and {rate:g} is for {full} and more"
        rate = round(rate * (batch / full) ** 0.5, 6)
    choose("lr", rate, reason)

    choose("warmup", config.epochs / 10, f"it is a tenth of {config.epochs} epochs")
    steps = config.epochs * -(-n // batch)
    decay = round(max(0.0, 1 - 20 / steps), 6)
    choose("ema", decay, f"the weights are then averaged over a twentieth of {steps:,} steps")
    return replace(config, **chosen), lines


def image_size(config, train_set):
    """(height, width) of the images that the model sees; a set's training images may be larger, to
    have crops cut out."""
    if is_dense(config.task):
        return tuple(train_set.images.shape[-2:])
    side = config.size or data.side(config.data)
    return side, side


def stored_side(config):
    """The side at which training images for classification are held: crops are cut from images half
    as large again, where the set has such, so that a small part of one is still sharp."""
    side = config.size or data.side(config.data)
    if not (config.augment or move(config)).startswith("crop"):
        return side
    return max(side, min(round(1.5 * side), data.side(config.data)))


def move(config):
    """How training images for classification are moved: small ones lose too much by a crop."""
    return "crop" if (config.size or data.side(config.data)) > 48 else "shift"


def tokens(height, width, stride):
    """How many tokens of stride x stride pixels cover an image."""
    return -(-height // stride) * -(-width // stride)


def build(config, num_classes, img_size):
    """The XViT that a Config describes, for images of img_size: a side, or (height, width)."""
    names = ("dim", "depth", "num_heads", "stem_stride", "class_depth")
    changes = {name: getattr(config, name) for name in names}
    given = {name: value for name, value in changes.items() if value is not None}
    whole = {**SIZES[config.model], **given, "num_classes": num_classes, "img_size": img_size}
    attention = (ATTENTIONS | VARIANTS)[config.attention]
    return XViT(**whole, attention=attention, lpi=config.lpi, drop_path=config.drop_path)


def known(what, name, names):
    """The name, if it is one of `names`; else a ValueError that says the nearest of them."""
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1, cutoff=0)[0]
        raise ValueError(
            f"got {what} {name!r}, expected one of {', '.join(names)} (the nearest is {near!r})"
        )
    return name
