"""Every recorded training run, declared once: `make runs` makes them, pages take names from here.

An experiment is one configuration with its seeds; its records are book/runs/train/NAME-SEED.json.
What is compared, by which test and how often was written down here before the runs were made.
"""

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Experiment:
    """One configuration, run once with each of its seeds.

    `options`: what `recipe` is given, beside the seed. `rate_from`: the best validation score
    of the experiments named RATE_FROM-RATE settles the learning rate. `minutes`: what a seed takes
    times its threads, as measured, or as expected before the first run. `threads`: of a CPU, for
    each run. `needs`: "cpu" or "gpu". `priority`: lower ones run first.
    """

    name: str
    question: str
    options: dict
    minutes: float
    priority: int
    seeds: tuple = (0, 1, 2)
    needs: str = "cpu"
    threads: int = 1
    rate_from: str | None = None

    def settled(self, records):
        """The options, the learning rate filled in; None while a run that tunes it is missing."""
        if self.rate_from is None:
            return self.options
        mean = {}  # validation score by learning rate
        for tuning in EXPERIMENTS:
            if tuning.name == f"{self.rate_from}-{tuning.options.get('lr', 0):g}":
                paths = [records / f"{tuning.name}-{seed}.json" for seed in tuning.seeds]
                if not all(path.exists() for path in paths):
                    return None
                mean[tuning.options["lr"]] = sum(map(validation_score, paths)) / len(paths)
        best = max(mean, key=mean.get)
        return {**self.options, "lr": best}


def validation_score(path):
    """The score on validation pictures after the last epoch of a recorded run."""
    last = json.loads(path.read_text())["epochs"][-1]
    return next(last[f"val_{score}"] for score in ("top1", "miou", "map") if f"val_{score}" in last)


# Records made by version 1 of the training code: chosen on the test set, one rate for all. They
# stay until the runs below have taken their place on the pages. Pattern: what it was for.
ARCHIVE = {
    "study/*": "chapter 13: eight attentions and X-ViT's parts at 10,000 pictures of CIFAR-10",
    "rates/*": "chapter 13: the same at two and four times the rate",
    "cifar10-*": "chapter 11: all of CIFAR-10, 0.62M parameters",
    "imagenette-*": "chapter 12: Imagenette at 64 px",
    "camvid-*": "chapter 14: CamVid at 180 x 240",
    "bccd-*": "chapter 15: BCCD at 192 x 256",
}

CIFAR = dict(data="cifar10", model="xvit_pico", eval_epochs=100)  # 64 tokens, class attention
SMALL = dict(dim=48, depth=3, num_heads=3)  # 0.13 M parameters
MIDDLE = dict(dim=72, depth=4, num_heads=4)  # 0.36 M
LARGE = dict(dim=128, depth=5, num_heads=4)  # 1.29 M


# Chapter 11: what each part of the short recipe is worth. Fixed: the middle body, 10,000 pictures
# of CIFAR-10, 6 epochs, steps of 64. One thing is changed against `recipe/base` at a time, the
# score is that of the held-out 5,000, three seeds each; each row is compared with the base by a
# paired difference, seed by seed: 15 comparisons.
BASE = dict(
    **CIFAR,
    **MIDDLE,
    limit=10_000,
    epochs=6,
    batch_size=64,
    optimizer="adamw",
    lr=1e-3,
    ema=0.99,
    warmup=1,
    augment="shift",
    mix=0.0,
    drop_path=0.0,
    amp=True,
)
CHANGES = {
    "base": {},
    "adamw-0.002": dict(lr=2e-3),
    "adamw-0.004": dict(lr=4e-3),
    "adamw-0.008": dict(lr=8e-3),
    "muon-0.001": dict(optimizer="muon"),
    "muon-0.002": dict(optimizer="muon", lr=2e-3),
    "muon-0.004": dict(optimizer="muon", lr=4e-3),
    "muon-0.008": dict(optimizer="muon", lr=8e-3),
    "float32": dict(amp=False),
    "randaugment": dict(augment="shift+randaugment"),
    "mix": dict(mix=0.6),
    "drop-path": dict(drop_path=0.1),
    "no-smoothing": dict(label_smoothing=0.0),
    "ema-by-length": dict(ema=None),
    "small-first": dict(small=0.5),
    "small-first-8-epochs": dict(small=0.5, epochs=8),  # about the base's time
}
RECIPE = tuple(
    Experiment(f"recipe/{name}", "what is it worth?", {**BASE, **change}, 3, priority=10)
    for name, change in CHANGES.items()
)

# Chapter 13: one body, one recipe, ten attentions. The question: at a given capacity, does X-ViT's
# attention reach what the others reach? Fixed: all of CIFAR-10 but the 5,000 held out, 64 tokens,
# X-ViT's full body, 8 epochs, Muon, steps of 64. The learning rate of each attention is the one of
# the grid that does best on the held-out pictures in a short run (10,000 pictures, 6 epochs, one
# seed). Then three seeds each. Compared on the test pictures, seed by seed, by a paired test over
# the pictures' hits: X-ViT with each of the seven others that mix. "none" has to do without the
# class token, which would see no image there, so it is compared with "xnorm-mean", X-ViT's
# attention without that token. These are 8 comparisons a capacity.
MATCHED = {**CIFAR, "optimizer": "muon", "batch_size": 64, "warmup": 1, "amp": True}
GRID = (2e-3, 4e-3, 8e-3, 16e-3)
COMPARED = (
    "xnorm",
    "softmax",
    "xca",
    "linear",
    "focused",
    "mala",
    "efficient",
    "sima",
    "none",
    "xnorm-mean",
)


def matched(name, row):
    """What is the same in every run of the comparison, and the attention of one row."""
    body = {"small": SMALL, "middle": MIDDLE, "large": LARGE}[name]
    mean = {"class_depth": 0} if row in ("none", "xnorm-mean") else {}
    return {**MATCHED, **body, "attention": row.removesuffix("-mean"), **mean}


TUNING = tuple(
    Experiment(
        f"tuning/small-{attention}-{rate:g}",
        "which learning rate?",
        {**matched("small", attention), "limit": 10_000, "epochs": 6, "lr": rate},
        minutes=1.3,
        priority=20,
        seeds=(0,),
    )
    for attention in COMPARED
    for rate in GRID
)
SMALL_MATCHED = tuple(
    Experiment(
        f"matched/small-{attention}",
        "does X-ViT reach what the others reach?",
        {**matched("small", attention), "epochs": 8},
        minutes=13 if attention == "softmax" else 7,
        priority=30,
        rate_from=f"tuning/small-{attention}",
    )
    for attention in COMPARED
)

# The same question at 1.29 M parameters, on a GPU, with steps of 500 and twenty epochs. The rate is
# tuned by five epochs on all of the training pictures. X-ViT's attention is compared with softmax,
# XCA and linear attention: 3 comparisons, by the same test.
LARGE_COMPARED = ("xnorm", "softmax", "xca", "linear")
LARGE_GRID = (*GRID, 32e-3)  # all four were best at 16e-3, where the grid had ended
ON_A_GPU = dict(batch_size=500, compile=False)
LARGE_TUNING = tuple(
    Experiment(
        f"tuning/large-{attention}-{rate:g}",
        "which learning rate?",
        {**matched("large", attention), **ON_A_GPU, "epochs": 5, "lr": rate},
        minutes=0.1,
        priority=20,
        seeds=(0,),
        needs="gpu",
    )
    for attention in LARGE_COMPARED
    for rate in LARGE_GRID
)
LARGE_MATCHED = tuple(
    Experiment(
        f"matched/large-{attention}",
        "does X-ViT reach what the others reach?",
        {**matched("large", attention), **ON_A_GPU, "epochs": 20},
        minutes=0.4,
        priority=30,
        rate_from=f"tuning/large-{attention}",
        needs="gpu",
    )
    for attention in LARGE_COMPARED
)

# Chapter 11: the best that two cores reach in at most 140 minutes with at most a million
# parameters. One run. What the short runs above found pays: Muon, small images first. RandAugment,
# which cost them points, is back: that 40 epochs want it is a guess, nobody has tried. Asked: is it
# right on 90% of the test images?
BEST = (
    Experiment(
        "best/1m",
        "what do two cores reach?",
        {
            **CIFAR,
            **dict(dim=112, depth=5, num_heads=4, optimizer="muon", lr=4e-3, batch_size=64),
            **dict(epochs=40, augment="shift+randaugment", mix=0.0, drop_path=0.0, small=0.5),
            "eval_epochs": 10,
        },
        minutes=200,
        priority=35,
        seeds=(0,),
        threads=2,
    ),
)

# Chapter 13: which parts of X-ViT's attention matter for what is learned, where nothing but the
# attention mixes tokens: a body without convolutions between them, the mean over the tokens at the
# end, 0.22 M parameters, 10,000 pictures, 6 epochs of AdamW at 1e-3, three seeds. All begin with
# the same first weights, seed by seed. Twelve are compared with X-ViT, and "xnorm-l1-loud" with
# "xnorm-l1" as well. The question behind four of them: is it the size of the first step that makes
# the difference? Then X-ViT's attention has to lose when it starts quiet, and L1 norms have to gain
# when they start loud. The rows "-lpi" have the block's convolutions: what does an attention add
# beside them? There "none" and softmax are compared with X-ViT. In all 15 comparisons, by the test
# of the comparison above, with the luck of the runs.
PARTS_COMPARED = (
    *("xnorm", "xnorm-quiet", "xnorm-l1", "xnorm-l1-loud", "xnorm-random-gamma", "none", "softmax"),
    *("xnorm-rows", "xnorm-kv-only", "xnorm-q-only", "xnorm-centred"),
    *("xnorm-fixed-gamma", "xnorm-shared-gamma", "xnorm-lpi", "none-lpi", "softmax-lpi"),
)
PARTS = tuple(
    Experiment(
        f"parts/{row}",
        "which parts of X-ViT's attention matter?",
        {
            **CIFAR,
            **dict(attention=row.removesuffix("-lpi"), class_depth=0, lpi=row.endswith("-lpi")),
            **dict(limit=10_000, epochs=6, batch_size=64, optimizer="adamw", lr=1e-3, ema=0.99),
            **dict(warmup=1, augment="shift", mix=0.0, drop_path=0.0, amp=True),
        },
        minutes=1.5,
        priority=40,
    )
    for row in PARTS_COMPARED
)

EXPERIMENTS = RECIPE + TUNING + SMALL_MATCHED + LARGE_TUNING + LARGE_MATCHED + BEST + PARTS
