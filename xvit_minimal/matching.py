"""The boxes of a detector: which are right, and from which score on they are worth showing."""

import contextlib

import torch
from torchvision.ops import box_iou

from .distributed import total

EVERY_BOX = 0.05  # the score from which on a box counts in average precision; RetinaNet's own


def matches(found, truth, overlap=0.5):
    """Which of the boxes that were found are right, booleans (n,): each in turn, the surest first,
    takes the free true box of its class that it overlaps most, if that is by `overlap` at least.

    `found` holds "boxes" (n, 4), "scores" (n,), "labels" (n,), `truth` "boxes" (m, 4) and "labels"
    (m,).
    """
    iou = box_iou(found["boxes"], truth["boxes"])  # (n, m)
    iou = iou * (found["labels"][:, None] == truth["labels"])  # 0 for another class
    right = torch.zeros(len(iou), dtype=torch.bool, device=iou.device)
    if iou.shape[1] == 0:
        return right
    for n in found["scores"].argsort(descending=True, stable=True).tolist():
        value, best = iou[n].max(0)
        if value >= overlap:
            right[n] = True
            iou[:, best] = 0  # taken
    return right


class BestThreshold:
    """The score above which boxes have the best F1, counted picture by picture.

    F1 = 2 right / (found + true), over all classes together, at an overlap of 0.5: a box that is
    wrong costs as much as a true one that is missed. Tried are 0.00, 0.01, ..., 0.99.
    """

    def __init__(self, device="cpu"):
        self.levels = torch.arange(100, device=device) / 100  # (T,)
        self.right, self.found = torch.zeros(2, 100, dtype=torch.float64, device=device)  # (T,)
        self.true = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, found, truth):
        """Count one picture; `found` and `truth` as in `matches`."""
        above = found["scores"][:, None] > self.levels  # (n, T)
        self.right += above[matches(found, truth)].sum(0)
        self.found += above.sum(0)
        self.true += len(truth["boxes"])

    def compute(self):
        """(threshold, F1) over the pictures of all processes; the lowest of equally good
        thresholds."""
        right, found, true = (total(count.clone()) for count in (self.right, self.found, self.true))
        f1 = 2 * right / (found + true)  # (T,)
        best = f1.argmax().item()
        return best / 100, f1[best].item()


@contextlib.contextmanager
def every_box(model):
    """A detector without its threshold, as average precision wants it."""
    before = getattr(model, "score_thresh", EVERY_BOX)
    model.score_thresh = EVERY_BOX
    try:
        yield
    finally:
        model.score_thresh = before
