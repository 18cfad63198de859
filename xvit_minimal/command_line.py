"""The command line of a run: what it says, and back."""

import argparse
import difflib
import shlex
from dataclasses import fields
from typing import get_args

from .recipe import RECIPES, Config, is_dense, recipe


def parse(arguments=None):
    """The Config that a command line asks for. Ends the program for --help, and for a mistake with
    a line that says it."""
    parser = argparse.ArgumentParser(
        prog="python -m xvit_minimal.train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [--data NAME] [--model NAME] [--epochs N] [--out FOLDER] [more options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    for option in fields(Config):
        kind = (get_args(option.type) or (option.type,))[0]  # int of int | None
        typed = {"type": kind, "metavar": kind.__name__}
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else typed
        parser.add_argument(_flag(option), default=argparse.SUPPRESS, help=_help(option), **how)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [_flag(option) for option in fields(Config)]
        near = difflib.get_close_matches(unknown[0], flags, n=1, cutoff=0)[0]
        parser.error(
            f"got {unknown[0]}, expected an option of this program (the nearest is {near}): --help "
            "explains every one"
        )
    try:
        return recipe(**vars(given))
    except ValueError as error:
        parser.error(f"{error}: --help explains every one")


def command(config):
    """The shortest command line that makes this Config again."""
    usual = recipe(config.data, config.task)
    words = ["python", "-m", "xvit_minimal.train"]
    words += (["--task", config.task] if is_dense(config.task) else []) + ["--data", config.data]
    for option in fields(Config):
        value = getattr(config, option.name)
        if option.name in ("data", "task") or value == getattr(usual, option.name):
            continue
        flag = _flag(option)
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, str(value)]
    return shlex.join(words)


def _flag(option):
    return "--" + option.name.replace("_", "-")


def _help(option):
    """An option's text with its default, and with that of drawn shapes."""
    shapes = RECIPES["classification", "shapes"]
    shown = [] if option.default is None else [str(option.default)]
    shown += [f"shapes: {shapes[option.name]}"] if option.name in shapes else []
    text = option.metadata["help"] + (f" [{'; '.join(shown)}]" if shown else "")
    return text.replace("%", "%%")


_DESCRIPTION = """Train an X-ViT, or the same body with another attention, and record how it went.

Without any option a small model learns drawn shapes: a laptop, about a minute, 1.3 GB, no download.
Start a command again after it was stopped, by Ctrl-C or by force, and the run goes on from its last
checkpoint. Numbers that no option gives are chosen for the training set, and printed."""

_EPILOG = """examples: what they took on one thread of a CPU (book/runs/train/):
  python -m xvit_minimal.train
      1 minute, 1.3 GB
  python -m xvit_minimal.train --data cifar10 --dim 96 --depth 4 --num-heads 4 --stem-stride 4
      --epochs 13 --batch-size 128 --lr 0.002 --warmup 2.6 --ema 0.995 --optimizer adamw --no-amp
      --no-holdout
      43 minutes, 1.6 GB
  python -m xvit_minimal.train --task segmentation --data camvid --dim 96 --depth 4 --num-heads 4
      --stem-stride 8 --epochs 40 --lr 0.002 --warmup 2 --no-amp
      25 minutes, 1.8 GB
  python -m xvit_minimal.train --task detection --data bccd --dim 96 --depth 4 --num-heads 4
      --lr 0.002 --warmup 4 --no-amp
      35 minutes, 1.6 GB
for a GPU; on one thread of a CPU xvit_nano takes 44 seconds a step of 512 pictures,
110 hours for 100 epochs of CIFAR-10, and 50 MB a picture that is computed at once (--micro-batch):
  python -m xvit_minimal.train --data cifar10
  torchrun --nproc-per-node 8 -m xvit_minimal.train --data cifar10
pictures of yours, in train/CLASS/* and test/CLASS/*:
  python -m xvit_minimal.train --data path/to/folder --model xvit_pico --size 64

data are looked for in the folder that XVIT_DATA names, then in data/, then downloaded to data/
in --out: weights.safetensors (read by load_model), record.json (how and how well), checkpoint.pt
(to go on)"""
