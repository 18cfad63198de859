"""What a run is made of: its configuration, the recipes, and what they turn into: a model, an optimizer's groups, a schedule."""

import argparse
import difflib
import math
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_args

from .augment import AUGMENTATIONS, DENSE_AUGMENTATIONS
from .baselines import ATTENTIONS, VARIANTS
from .model import SIZES, XViT

DENSE = {  # the tasks, and what they change in Config's defaults
    "classification": {},
    "segmentation": dict(
        stem_stride=4,
        class_depth=0,
        label_smoothing=0.0,
        mix=0.0,
        drop_path=0.0,
        batch_size=8,
        augment="crop",
        ema=0.99,
    ),
    "detection": dict(
        stem_stride=8,
        class_depth=0,
        label_smoothing=0.0,
        mix=0.0,
        drop_path=0.0,
        batch_size=8,
        augment="crop",
        ema=0.99,
    ),
}


def _option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """A run. The defaults are a recipe for photographs; `recipe` knows what drawn shapes need instead.

    Raises ValueError for an unknown name (and says the nearest known) and for a number out of range.
    """

    task: str = _option("classification", f"one of {', '.join(DENSE)}")
    data: str = _option(
        "shapes",
        "a set by name (cifar10, cifar100, imagenette, shapes; camvid, voc, pets for segmentation; "
        "bccd, voc for detection) or a folder",
    )
    out: str = _option(
        "runs/shapes",
        "folder of the run, by default runs/DATA or, for a dense task, runs/DATA-TASK; an unfinished run in it goes on",
    )
    model: str = _option("xvit_nano", f"one of {', '.join(SIZES)}")
    attention: str = _option("xnorm", f"one of {', '.join(ATTENTIONS | VARIANTS)}")
    dim: int | None = _option(None, "width, instead of the model's")
    depth: int | None = _option(None, "number of blocks, instead of the model's")
    num_heads: int | None = _option(None, "heads, instead of the model's")
    stem_stride: int | None = _option(
        None, "pixels a token is wide (2, 4, 8, 16), instead of the model's"
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
    batch_size: int = _option(512, "images in a step, over all processes")
    lr: float = _option(1e-3, "peak learning rate of AdamW")
    final_lr: float = _option(1e-5, "learning rate at the end of the cosine")
    warmup: float = _option(10, "epochs of linear warm-up, at most a fifth of all")
    weight_decay: float = _option(0.05, "on the weights of linear maps and convolutions alone")
    label_smoothing: float = _option(0.1, "share of each label that is spread over all classes")
    augment: str = _option(
        "shift+randaugment", f"one of {', '.join(AUGMENTATIONS)}; for dense tasks none, flip, crop"
    )
    mix: float = _option(
        0.6, "share of the epochs, from the first on, with mixup and cutmix, 0 to 1"
    )
    drop_path: float = _option(0.1, "probability of stochastic depth")
    ema: float = _option(
        0.999, "decay of the averaged weights, which are the ones evaluated and kept"
    )
    seed: int = _option(0, "of the weights, the order and the augmentation")
    save_steps: int = _option(
        500, "steps between two checkpoints; every epoch ends with one as well"
    )
    eval_epochs: int = _option(
        1, "epochs between two looks at the test images; the last epoch always has one"
    )
    device: str | None = _option(None, "cpu, cuda, ...; by default a GPU if there is one")
    amp: bool | None = _option(None, "bfloat16 autocast; by default where a GPU has it")
    compile: bool | None = _option(None, "torch.compile; by default on a GPU")

    def __post_init__(self):
        known("model", self.model, SIZES)
        known("attention", self.attention, ATTENTIONS | VARIANTS)
        known("task", self.task, DENSE)
        known("augment", self.augment, DENSE_AUGMENTATIONS if DENSE[self.task] else AUGMENTATIONS)
        if DENSE[self.task] and (self.mix or self.label_smoothing or self.class_depth != 0):
            raise ValueError(
                f"got mix={self.mix}, label_smoothing={self.label_smoothing}, class_depth={self.class_depth} for "
                f"{self.task}, expected 0 for all three: they are for one label an image; leave them out"
            )
        if self.attention == "none" and self.class_depth != 0:
            raise ValueError(
                "got attention 'none' with a class token, which would see no image: set class_depth to 0, the "
                "mean over the tokens"
            )
        for names, fits, words in _RANGES:
            for name in names.split():
                if (value := getattr(self, name)) is not None and not fits(value):
                    raise ValueError(f"got {name}={value}, expected {words}")


_RANGES = (
    (
        "epochs eval_epochs save_steps size limit dim depth num_heads",
        lambda v: v >= 1,
        "at least 1",
    ),
    ("batch_size", lambda v: v >= 2, "at least 2: BatchNorm needs more than one image"),
    ("pyramid", lambda v: v >= 8 and v % 8 == 0, "a multiple of 8"),
    ("class_depth seed", lambda v: v >= 0, "at least 0"),
    ("lr", lambda v: 0 < v < math.inf, "a positive number"),
    ("final_lr warmup weight_decay", lambda v: 0 <= v < math.inf, "a number of at least 0"),
    ("label_smoothing drop_path ema", lambda v: 0 <= v < 1, "a number from 0 to below 1"),
    ("mix", lambda v: 0 <= v <= 1, "a number from 0 to 1"),
)


RECIPES = {  # what a set wants instead of Config's defaults; for dense tasks, on top of DENSE
    "shapes": dict(
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
    "imagenette": dict(stem_stride=8, augment="crop+randaugment", batch_size=128),
    "segmentation shapes": dict(
        model="xvit_pico", epochs=3, batch_size=16, lr=2e-3, warmup=1, augment="flip", ema=0.98
    ),
    "detection shapes": dict(
        model="xvit_pico", epochs=4, batch_size=16, lr=2e-3, warmup=1, augment="flip", ema=0.98
    ),
}


def recipe(data="shapes", task="classification", **changes):
    """The Config for a data set and a task: its recipe, a folder of their names under runs/, and `changes` on top."""
    words = [Path(data).name, task] if DENSE.get(task) else [Path(data).name]
    usual = {
        **DENSE.get(task, {}),
        **RECIPES.get(f"{task} {data}" if DENSE.get(task) else data, {}),
    }
    return Config(
        **{**usual, "data": data, "task": task, "out": f"runs/{'-'.join(words)}", **changes}
    )


def build(config, num_classes, img_size):
    """The XViT that a Config describes, for images of img_size pixels, a side or (height, width)."""
    sizes = {
        k: getattr(config, k) for k in ("dim", "depth", "num_heads", "stem_stride", "class_depth")
    }
    changes = {k: v for k, v in sizes.items() if v is not None}
    return XViT(
        **{
            **SIZES[config.model],
            **changes,
            "num_classes": num_classes,
            "img_size": img_size,
            "attention": (ATTENTIONS | VARIANTS)[config.attention],
            "lpi": config.lpi,
            "drop_path": config.drop_path,
        }
    )


def parameter_groups(model, weight_decay):
    """Weight decay for the weights of linear maps and convolutions; none for norms, biases, γ, τ, positions, class token."""
    decays = {True: [], False: []}
    for name, parameter in model.named_parameters():
        decays[name.endswith("weight") and parameter.ndim >= 2].append(parameter)
    return [
        {"params": decays[True], "weight_decay": weight_decay},
        {"params": decays[False], "weight_decay": 0.0},
    ]


def learning_rate(step, config, steps):
    """The learning rate of a step: a linear warm-up, then a cosine to `final_lr`; `steps` is the length of an epoch."""
    warm, total = steps * min(config.warmup, config.epochs / 5), steps * config.epochs
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    done = (step - warm) / max(1, total - warm)
    return config.final_lr + (config.lr - config.final_lr) * (1 + math.cos(math.pi * done)) / 2


def known(what, name, names):
    """The name, if it is one of `names`; else a ValueError that says the nearest of them."""
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1, cutoff=0)[0]
        raise ValueError(
            f"got {what} {name!r}, expected one of {', '.join(names)} (the nearest is {near!r})"
        )
    return name


def parse(arguments=None):
    """The Config that a command line asks for. Ends the program for --help, and for a mistake with a line that says it."""
    parser = argparse.ArgumentParser(
        prog="python -m xvit_minimal.train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [--data NAME] [--model NAME] [--epochs N] [--out FOLDER] [more options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    flags = {option.name: "--" + option.name.replace("_", "-") for option in fields(Config)}
    for option in fields(Config):
        kind = (get_args(option.type) or [option.type])[0]  # int of int | None
        how = (
            {"action": argparse.BooleanOptionalAction}
            if kind is bool
            else {"type": kind, "metavar": kind.__name__}
        )
        shown = "" if option.default is None else f" [{option.default}"
        if option.name in RECIPES["shapes"]:
            shown += f"; shapes: {RECIPES['shapes'][option.name]}"
        text = (option.metadata["help"] + (shown and shown + "]")).replace("%", "%%")
        parser.add_argument(flags[option.name], default=argparse.SUPPRESS, help=text, **how)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        near = difflib.get_close_matches(unknown[0], flags.values(), n=1, cutoff=0)[0]
        parser.error(
            f"got {unknown[0]}, expected an option of this program (the nearest is {near}): --help explains every one"
        )
    try:
        return recipe(**vars(given))
    except ValueError as error:
        parser.error(f"{error}: --help explains every one")


def command(config):
    """The shortest command line that makes this Config again."""
    usual = recipe(config.data, config.task)
    words = ["python", "-m", "xvit_minimal.train"]
    words += (["--task", config.task] if DENSE[config.task] else []) + ["--data", config.data]
    for option in fields(Config):
        value = getattr(config, option.name)
        if option.name not in ("data", "task") and value != getattr(usual, option.name):
            flag = option.name.replace("_", "-")
            words += (
                [f"--{flag}" if value else f"--no-{flag}"]
                if isinstance(value, bool)
                else [f"--{flag}", str(value)]
            )
    return shlex.join(words)


_DESCRIPTION = """Train an X-ViT, or the same body with another attention, and record how it went.

Without any option a small model learns drawn shapes, in about a minute on a laptop. Start a command again after it was
stopped, by Ctrl-C or by force, and the run goes on where its last checkpoint stands."""

_EPILOG = """examples:
  python -m xvit_minimal.train
  python -m xvit_minimal.train --data cifar10 --model xvit_nano --epochs 100 --out runs/cifar10
  python -m xvit_minimal.train --data cifar10 --limit 10000 --augment shift --stem-stride 4 --attention softmax --out runs/softmax
  python -m xvit_minimal.train --task segmentation --data camvid --size 480 --out runs/camvid
  python -m xvit_minimal.train --task detection --data bccd --epochs 200 --out runs/bccd
  python -m xvit_minimal.train --data path/to/folder --size 128 --stem-stride 8 --out runs/mine   # train/CLASS/*, test/CLASS/*
  torchrun --nproc-per-node 8 -m xvit_minimal.train --data cifar10 --out runs/cifar10

data are looked for in the folder that XVIT_DATA names, then in data/, then downloaded to data/
in --out: weights.safetensors (read by load_model), record.json (how and how well), checkpoint.pt (to go on)"""
