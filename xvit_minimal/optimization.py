"""How weights change: an optimizer's groups, the learning rate of a step, and the average of the
weights."""

import math

from torch.optim.swa_utils import get_ema_multi_avg_fn


def parameter_groups(model, weight_decay):
    """Weight decay for the weights of linear maps and convolutions; none for norms, biases, γ, τ,
    positions and the class token."""
    decays = {True: [], False: []}
    for name, parameter in model.named_parameters():
        decays[name.endswith("weight") and parameter.ndim >= 2].append(parameter)
    return [
        {"params": decays[True], "weight_decay": weight_decay},
        {"params": decays[False], "weight_decay": 0.0},
    ]


def learning_rate(step, config, steps):
    """The learning rate of a step: a linear warm-up, then a cosine to `final_lr`; `steps` is the
    length of an epoch.

    The Config is one whose `lr` and `warmup` are given, or filled in by `recipe.settle`.
    """
    warm, total = steps * min(config.warmup, config.epochs / 5), steps * config.epochs
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    done = (step - warm) / max(1, total - warm)
    return config.final_lr + (config.lr - config.final_lr) * (1 + math.cos(math.pi * done)) / 2


def averaging(decay):
    """AveragedModel's multi_avg_fn for an exponential moving average whose decay rises to `decay`
    in its first steps.

    After n steps it is (1 + n) / (10 + n) at most: the first weights, which know nothing, are
    forgotten in a short run, too.
    """

    def average(averaged, current, n):
        get_ema_multi_avg_fn(min(decay, (1 + n.item()) / (10 + n.item())))(averaged, current, n)

    return average
