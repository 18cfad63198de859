"""How weights change: an optimizer's groups, the learning rate of a step, and the average of the
weights."""

import math

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

OPTIMIZERS = ("muon", "adamw")


class Optimizer:
    """The optimizer of a run, "muon" or "adamw", for all parameters of a model.

    AdamW alone; or Muon for the matrices of the blocks, whose update it turns into an orthogonal
    matrix, and AdamW for everything else. Muon's updates are scaled to the size of AdamW's, so that
    both take the same learning rate. Raises ValueError where torch has no Muon.
    Sources: Loshchilov and Hutter, arXiv:1711.05101; Jordan et al., Muon,
    kellerjordan.github.io/posts/muon; the scaling: Liu et al., arXiv:2502.16982.
    """

    def __init__(self, name, model, weight_decay):
        self.parts = []
        matrices = []
        if name == "muon":
            check_optimizer(name)
            matrices = [
                p for key, p in model.named_parameters() if "blocks." in key and p.ndim == 2
            ]
            how = dict(weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self.parts.append(torch.optim.Muon(matrices, **how))
        groups = parameter_groups(model, weight_decay, without=matrices)
        self.parts.append(torch.optim.AdamW(groups))

    def step(self, lr):
        """Change the parameters by their gradients, with the learning rate `lr`."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()

    def state_dict(self):
        return {type(part).__name__: part.state_dict() for part in self.parts}

    def load_state_dict(self, state):
        for part in self.parts:
            part.load_state_dict(state[type(part).__name__])


def has_muon():
    """Whether this torch has Muon: 2.9 and newer do."""
    return hasattr(torch.optim, "Muon")


def check_optimizer(name):
    """Raise ValueError if this torch has no such optimizer."""
    if name == "muon" and not has_muon():
        raise ValueError(
            f"torch {torch.__version__} has no Muon: update to torch 2.9 or newer, or give "
            "--optimizer adamw"
        )


def parameter_groups(model, weight_decay, without=()):
    """Weight decay for the weights of linear maps and convolutions; none for norms, biases, γ, τ,
    positions and the class token. Parameters in `without` are left out."""
    decays = {True: [], False: []}
    left_out = {id(parameter) for parameter in without}
    for name, parameter in model.named_parameters():
        if id(parameter) in left_out:
            continue
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
