"""The three tasks that train.py knows, each with its model, its loss and its scores: classification, segmentation, detection.

A task is made of a Config and the training set. The loop asks it for `loss` at each step, and for `evaluate` when an epoch
is over: a dictionary of numbers, of which `score` names the one to look at. With several processes each does a part.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from . import data, dense_data
from .augment import Augment, AugmentDense
from .dense import VOID, SemanticFPN, XViTBackbone, detector, segmentation_loss
from .distributed import rank, total, world
from .model import cost
from .recipe import build


class Classification:
    """One class for an image: cross-entropy with mixed and smoothed labels; the score is top-1, the share of right answers."""

    score = "top1"

    def __init__(self, config, train_set):
        self.config, classes = config, len(train_set.classes)
        self.augment = Augment(config.augment)
        self.mix = v2.RandomChoice(
            [v2.MixUp(alpha=0.8, num_classes=classes), v2.CutMix(alpha=1.0, num_classes=classes)]
        )

    load = staticmethod(
        lambda config, split, limit: data.load(config.data, split, config.size, limit)
    )
    model = staticmethod(build)
    cost = staticmethod(cost)

    def loss(self, net, images, index, epoch, device):
        """The mean loss () on the images `index` of an ImageSet, augmented."""
        x = self.augment(images.images[index].to(device))  # uint8 -> floats (B, 3, H, W)
        labels = images.labels[index].to(device)  # (B,)
        if epoch < self.config.mix * self.config.epochs:
            x, labels = self.mix(x, labels)  # labels (B, classes): two classes share an image
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.amp):
            logits = net(x)  # (B, classes)
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)

    @staticmethod
    @torch.no_grad()
    def evaluate(model, images, amp=False, batch_size=500):
        """{"loss", "top1"} of a model on an ImageSet, in evaluation mode and without augmentation."""
        sums = torch.zeros(2, device=next(model.parameters()).device)
        for index, logits in _outputs(model, images, amp, batch_size):
            labels, logits = (
                images.labels[index].to(sums.device),
                logits.float(),
            )  # (B,), (B, classes)
            sums += torch.stack(
                [
                    F.cross_entropy(logits, labels, reduction="sum"),
                    (logits.argmax(1) == labels).sum(),
                ]
            )
        loss, hits = total(sums).tolist()
        return {"loss": loss / len(images), "top1": hits / len(images)}


class Segmentation:
    """A class for every pixel: cross-entropy over the pixels that are not void; the score is mIoU, each class's
    intersection over union of prediction and truth, in pixels of the whole set, averaged over the classes."""

    score = "miou"

    def __init__(self, config, train_set):
        self.config = config
        self.augment = AugmentDense(config.augment, train_set.images.shape[-2:])

    load = staticmethod(
        lambda config, split, limit: dense_data.load(
            config.data, "segmentation", split, config.size, limit
        )
    )
    cost = staticmethod(cost)

    @staticmethod
    def model(config, num_classes, img_size):
        return SemanticFPN(XViTBackbone(build(config, 1, img_size), config.pyramid), num_classes)

    def loss(self, net, images, index, epoch, device):
        """The mean loss () on the images `index` of an ImageSet, augmented together with their masks."""
        pairs = [self.augment.with_mask(images.images[i], images.masks[i]) for i in index.tolist()]
        x, masks = (torch.stack(part).to(device) for part in zip(*pairs))  # (B, 3, H, W), (B, H, W)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.amp):
            logits = net(data.normalize(x))  # (B, J, H, W)
        return segmentation_loss(logits, masks)

    @staticmethod
    @torch.no_grad()
    def evaluate(model, images, amp=False, batch_size=16):
        """{"miou", "accuracy", "iou_CLASS", ...} of a model on an ImageSet. A class that neither the truth nor the
        prediction holds anywhere has no IoU, and is left out. Counted by torchmetrics."""
        from torchmetrics.classification import (
            MulticlassConfusionMatrix,
        )  # not needed for classification

        device, J = next(model.parameters()).device, len(images.classes)
        counts = MulticlassConfusionMatrix(J, ignore_index=VOID).to(device)
        for index, logits in _outputs(model, images, amp, batch_size):
            counts.update(logits.argmax(1), images.masks[index].to(device).long())
        table = counts.compute().cpu().double()  # (J, J) pixels: truth, prediction
        if not table.sum():
            raise ValueError(
                f"no pixel of the {len(images)} test pictures of {images.name} has a class: label some"
            )
        both, either = table.diag(), table.sum(0) + table.sum(1) - table.diag()  # (J,), (J,)
        iou = {
            f"iou_{name}": (a / b).item()
            for name, a, b in zip(images.classes, both, either)
            if b > 0
        }
        return {
            "miou": sum(iou.values()) / len(iou),
            "accuracy": (both.sum() / table.sum()).item(),
            **iou,
        }


class Detection:
    """Boxes: RetinaNet's focal loss and L1 loss; the score is mAP as COCO defines it, the mean of the average precision over
    the classes and over the overlaps 0.50, 0.55, ..., 0.95 from which on a box counts as found."""

    score = "map"

    def __init__(self, config, train_set):
        self.config = config
        self.augment = AugmentDense(config.augment, train_set.images.shape[-2:])

    load = staticmethod(
        lambda config, split, limit: dense_data.load(
            config.data, "detection", split, config.size, limit
        )
    )

    @staticmethod
    def model(config, num_classes, img_size):
        return detector(
            XViTBackbone(build(config, 1, img_size), config.pyramid, strides=(8, 16, 32)),
            num_classes,
        )

    @staticmethod
    def cost(model, img_size):
        """(parameters, multiply-adds) of the network; what is made of its output depends on the image."""
        return cost(_Maps(model), img_size)

    def loss(self, net, images, index, epoch, device):
        """The sum () of the two losses on the images `index` of an ImageSet, augmented together with their boxes."""
        changed = [
            self.augment.with_boxes(images.images[i], images.boxes[i], images.box_labels[i])
            for i in index.tolist()
        ]
        x = data.normalize(torch.stack([image for image, *_ in changed]).to(device))  # (B, 3, H, W)
        targets = [
            {"boxes": boxes.to(device), "labels": labels.to(device)} for _, boxes, labels in changed
        ]
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.amp):
            return sum(net(x, targets).values())

    @classmethod
    def evaluate(cls, model, images, amp=False):
        """{"map", "map50", "map75", "map_CLASS", ...} of a model on an ImageSet. Counted by torchmetrics with pycocotools."""
        scores = cls._counts(model, images, amp)
        each = dict(
            zip(
                scores["classes"].reshape(-1).tolist(), scores["map_per_class"].reshape(-1).tolist()
            )
        )
        return {
            "map": scores["map"].item(),
            "map50": scores["map_50"].item(),
            "map75": scores["map_75"].item(),
            **{
                f"map_{name}": each[k]
                for k, name in enumerate(images.classes)
                if each.get(k, -1) >= 0
            },
        }

    @classmethod
    def precision(cls, model, images):
        """{class: [101 numbers]}: the best precision at an overlap of 0.5 for a recall of at least 0, 0.01, ..., 1."""
        scores = cls._counts(model, images, False, extended_summary=True)
        curves = scores["precision"][
            0, :, :, 0, -1
        ]  # (101, J), at 0.5, all sizes of box, 100 boxes a picture
        kinds = scores["classes"].reshape(-1).tolist()
        return {
            images.classes[k]: curves[:, n].tolist()
            for n, k in enumerate(kinds)
            if curves[0, n] >= 0
        }

    @staticmethod
    @torch.no_grad()
    def _counts(model, images, amp, **more):
        from torchmetrics.detection import MeanAveragePrecision  # not needed for classification

        if not any(map(len, images.boxes)):
            raise ValueError(
                f"no box in any of the {len(images)} test pictures of {images.name}: draw some"
            )
        device = next(model.parameters()).device
        counts = MeanAveragePrecision(class_metrics=True, **more).to(device)
        for index, found in _outputs(model, images, amp, batch_size=16):
            truth = [
                {"boxes": images.boxes[i].to(device), "labels": images.box_labels[i].to(device)}
                for i in index.tolist()
            ]
            counts.update(
                [
                    {
                        key: value.float() if key != "labels" else value
                        for key, value in each.items()
                    }
                    for each in found
                ],
                truth,
            )
        return counts.compute()


TASKS = {"classification": Classification, "segmentation": Segmentation, "detection": Detection}


class _Maps(nn.Module):
    """A detector up to the maps of its head."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.head(list(self.model.backbone(x).values()))


def _outputs(model, images, amp, batch_size):
    """(index, output) of a model in evaluation mode for this process's part of an ImageSet, batch by batch."""
    model.eval()
    device = next(model.parameters()).device
    for index in torch.arange(rank(), len(images), world()).split(batch_size):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            output = model(data.normalize(images.images[index].to(device)))
        yield index, output
