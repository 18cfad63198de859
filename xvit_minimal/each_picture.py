"""What a record keeps of each test picture, so that two models can be compared picture by picture:
the difference of two means is known far better than either."""

import base64
from dataclasses import replace

import numpy as np
import torch

from .dense import VOID
from .distributed import total
from .matching import every_box
from .outputs import outputs


@torch.no_grad()
def hits(model, images, amp=False):
    """{"top1_flip", "hits"}: the share of right answers if each image and its mirror image are
    asked, their probabilities averaged; and which images were right without that, one bit each,
    `numpy.packbits` in base64."""
    device = next(model.parameters()).device
    right = torch.zeros(2, len(images), device=device)
    flipped = replace(images, images=images.images.flip(-1))
    both = zip(outputs(model, images, amp, 500), outputs(model, flipped, amp, 500))
    for (index, logits), (_, mirrored) in both:
        labels = images.labels[index].to(device)  # (B,)
        p = logits.float().softmax(1)  # (B, classes)
        averaged = p + mirrored.float().softmax(1)  # (B, classes)
        right[0, index.to(device)] = (p.argmax(1) == labels).float()
        right[1, index.to(device)] = (averaged.argmax(1) == labels).float()
    plain, flip = total(right).cpu()
    bits = np.packbits(plain.bool().numpy())
    return {"top1_flip": flip.mean().item(), "hits": base64.b64encode(bits).decode()}


@torch.no_grad()
def pixel_counts(model, images, amp=False):
    """{"pixel_counts"}: for each image and class the pixels that are of it in truth and prediction,
    in truth, in the prediction: (images, classes, 3), little-endian uint32 in base64.

    Sums over any choice of images give that choice's IoU: both / (truth + prediction - both).
    """
    device, J = next(model.parameters()).device, len(images.classes)
    counts = torch.zeros(len(images), J, 3, dtype=torch.int64, device=device)
    for index, logits in outputs(model, images, amp, 16):
        truth = images.masks[index].to(device).long()  # (B, H, W)
        found = logits.argmax(1)  # (B, H, W)
        for i, t, f in zip(index.tolist(), truth, found):
            t, f = t[t != VOID], f[t != VOID]  # (n,), (n,)
            of = [values.bincount(minlength=J) for values in (t[t == f], t, f)]
            counts[i] = torch.stack(of, 1)  # (J, 3)
    packed = total(counts).cpu().numpy().astype("<u4").tobytes()
    return {"pixel_counts": base64.b64encode(packed).decode()}


@torch.no_grad()
def average_precisions(model, images, amp=False):
    """{"map_by_image"}: the mAP of each image as if it were the whole set, over the classes that it
    holds; None for one without a box. Counted by torchmetrics with pycocotools."""
    from torchmetrics.detection import MeanAveragePrecision  # not for the other tasks

    device = next(model.parameters()).device
    scores = torch.zeros(len(images), device=device)
    with every_box(model):
        for index, found in outputs(model, images, amp, 16, as_list=True):
            for i, answer in zip(index.tolist(), found):
                truth = {"boxes": images.boxes[i], "labels": images.box_labels[i]}
                floats = {key: answer[key].float().cpu() for key in ("boxes", "scores")}
                alone = MeanAveragePrecision(sync_on_compute=False)
                alone.update([{**floats, "labels": answer["labels"].cpu()}], [truth])
                scores[i] = alone.compute()["map"]
    return {"map_by_image": [round(s, 4) if s >= 0 else None for s in total(scores).tolist()]}


DETAILS = {
    "classification": hits,
    "segmentation": pixel_counts,
    "detection": average_precisions,
}
