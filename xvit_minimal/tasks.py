"""The three tasks that train.py knows: classification, segmentation, detection, each with its
model, loss and scores.

A task is made of a Config and the training set. `check` is asked before anything is loaded. At each
step the loop asks for a `batch`, a tuple whose fields have an entry for each picture; for the
`loss` of each part that the batch is cut into; and for the `weight` of that part, so that the
weighted mean of the parts' losses is the whole batch's loss. `evaluate` is a dictionary of numbers,
of which `score` names the one to look at. With several processes each does a part.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from . import data, dense_data
from .augment import Augment, AugmentDense
from .dense import VOID, SemanticFPN, XViTBackbone, detector, segmentation_loss
from .distributed import total
from .images import stack
from .matching import BestThreshold, every_box
from .model import cost
from .optimization import check_optimizer
from .outputs import outputs, own_sizes, picture_size
from .packages import require
from .recipe import build, image_size, stored_side


class Classification:
    """One class for an image: cross-entropy with mixed and smoothed labels; the score is top-1, the
    share of right answers."""

    score = "top1"
    cost = staticmethod(cost)
    model = staticmethod(build)

    def __init__(self, config, train_set):
        self.config, classes = config, len(train_set.classes)
        self.size, _ = image_size(config, train_set)
        self.augment = Augment(config.augment, size=self.size)
        self.mix = v2.RandomChoice(
            [v2.MixUp(alpha=0.8, num_classes=classes), v2.CutMix(alpha=1.0, num_classes=classes)]
        )

    @staticmethod
    def check(config):
        """Raises ValueError if a package is missing."""
        require("classification", "safetensors", "tqdm")
        check_optimizer(config.optimizer)

    @staticmethod
    def load(config, split, limit):
        """The part `split` of the Config's set."""
        side = stored_side(config) if split.startswith("train") else config.size
        return data.load(config.data, split, side, limit)

    def batch(self, images, index, epoch, device):
        """(x, labels): the images `index` of an ImageSet, augmented; all random draws of a step but
        the model's own."""
        x = self.augment(images.images[index].to(device))  # uint8 -> floats (B, 3, H, W)
        labels = images.labels[index].to(device)  # (B,)
        if epoch < self.config.small * self.config.epochs:
            small = 3 * self.size // 4
            x = F.interpolate(x, (small, small), mode="bilinear", antialias=True)
        if epoch < self.config.mix * self.config.epochs:
            x, labels = self.mix(x, labels)  # labels (B, classes): two classes share an image
        return x, labels

    def loss(self, net, batch):
        """The mean loss () of the images of a batch."""
        x, labels = batch
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.config.amp):
            logits = net(x)  # (B, classes)
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)

    @staticmethod
    def weight(batch):
        """How many images the loss is a mean of."""
        return len(batch[0])

    @staticmethod
    @torch.no_grad()
    def evaluate(model, images, amp=False, batch_size=500):
        """{"loss", "top1"} of a model on an ImageSet, in evaluation mode, not augmented."""
        sums = torch.zeros(2, device=next(model.parameters()).device)
        for index, logits in outputs(model, images, amp, batch_size):
            labels, logits = (
                images.labels[index].to(sums.device),
                logits.float(),
            )  # (B,), (B, classes)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            hits = (logits.argmax(1) == labels).sum()
            sums += torch.stack([loss, hits])
        loss, hits = total(sums).tolist()
        return {"loss": loss / len(images), "top1": hits / len(images)}


class Segmentation:
    """A class for every pixel: cross-entropy over the pixels that are not void; the score is mIoU,
    each class's intersection over union of prediction and truth, in pixels of the whole set,
    averaged over the classes."""

    score = "miou"
    cost = staticmethod(cost)

    def __init__(self, config, train_set):
        self.config = config
        height, width = image_size(config, train_set)
        self.size = width if width == height else (height, width)
        self.augment = AugmentDense(config.augment, (height, width))

    @staticmethod
    def check(config):
        """Raises ValueError if a package is missing."""
        require("segmentation", "safetensors", "tqdm", "torchmetrics")
        check_optimizer(config.optimizer)

    @staticmethod
    def load(config, split, limit):
        """The part `split` of the Config's set."""
        return dense_data.load(config.data, "segmentation", split, config.size, limit)

    @staticmethod
    def model(config, num_classes, img_size):
        """The SemanticFPN that a Config describes."""
        return SemanticFPN(XViTBackbone(build(config, 1, img_size), config.pyramid), num_classes)

    def batch(self, images, index, epoch, device):
        """(x, masks): the images `index` of an ImageSet, augmented together with their masks; and
        their sizes as a third, where they differ."""
        pairs = []
        for i in index.tolist():
            height, width = picture_size(images, i)
            picture, mask = images.images[i, :, :height, :width], images.masks[i, :height, :width]
            pairs.append(self.augment.with_mask(picture, mask))
        x, sizes = stack([picture for picture, _ in pairs], 128)  # (B, 3, H, W), (B, 2)
        masks, _ = stack([mask for _, mask in pairs], VOID)  # (B, H, W)
        x = data.normalize(x.to(device))
        return x, masks.to(device), *own_sizes(sizes, x)

    def loss(self, net, batch):
        """The mean loss () of the pixels of a batch that are not void."""
        x, masks, *sizes = batch
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.config.amp):
            logits = net(x, *sizes)  # (B, J, H, W)
        return segmentation_loss(logits, masks)

    @staticmethod
    def weight(batch):
        """How many pixels the loss is a mean of."""
        return (batch[1] != VOID).sum()

    @staticmethod
    @torch.no_grad()
    def evaluate(model, images, amp=False, batch_size=16):
        """{"miou", "scored_classes", "all_classes", "accuracy", "iou_CLASS", ...} of a model on an
        ImageSet.

        A class that neither the truth nor the prediction holds anywhere has no IoU, and is left
        out: mIoU is a mean over `scored_classes` of `all_classes`. Counted by torchmetrics.
        """
        from torchmetrics.classification import MulticlassConfusionMatrix  # not for classification

        device, J = next(model.parameters()).device, len(images.classes)
        counts = MulticlassConfusionMatrix(J, ignore_index=VOID).to(device)
        for index, logits in outputs(model, images, amp, batch_size):
            counts.update(logits.argmax(1), images.masks[index].to(device).long())
        table = counts.compute().cpu().double()  # (J, J) pixels: truth, prediction
        if not table.sum():
            raise ValueError(
                f"no pixel of the {len(images)} pictures of {images.name} has a class: label some"
            )
        both, either = table.diag(), table.sum(0) + table.sum(1) - table.diag()  # (J,), (J,)
        iou = {
            f"iou_{name}": (a / b).item()
            for name, a, b in zip(images.classes, both, either)
            if b > 0
        }
        return {
            "miou": sum(iou.values()) / len(iou),
            "scored_classes": len(iou),
            "all_classes": J,
            "accuracy": (both.sum() / table.sum()).item(),
            **iou,
        }


class Detection:
    """Boxes: RetinaNet's focal loss and L1 loss; the score is mAP as COCO defines it, the mean of
    the average precision over the classes and over the overlaps 0.50, 0.55, ..., 0.95 from which on
    a box counts as found."""

    score = "map"

    def __init__(self, config, train_set):
        self.config = config
        height, width = image_size(config, train_set)
        self.size = width if width == height else (height, width)
        self.augment = AugmentDense(config.augment, (height, width))

    @staticmethod
    def check(config):
        """Raises ValueError if a package is missing."""
        require("detection", "safetensors", "tqdm", "torchmetrics", "pycocotools")
        check_optimizer(config.optimizer)

    @staticmethod
    def load(config, split, limit):
        """The part `split` of the Config's set."""
        return dense_data.load(config.data, "detection", split, config.size, limit)

    @staticmethod
    def model(config, num_classes, img_size):
        """The detector that a Config describes."""
        body = build(config, 1, img_size)
        return detector(XViTBackbone(body, config.pyramid, strides=(8, 16, 32)), num_classes)

    @staticmethod
    def cost(model, img_size):
        """(parameters, multiply-adds) of the network; what is made of its output depends on the
        image."""
        return cost(_Maps(model), img_size)

    def batch(self, images, index, epoch, device):
        """(pictures, targets): the images `index` of an ImageSet, each of its own size, augmented
        together with their boxes."""
        pictures, targets = [], []
        for i in index.tolist():
            height, width = picture_size(images, i)
            picture, boxes, labels = self.augment.with_boxes(
                images.images[i, :, :height, :width], images.boxes[i], images.box_labels[i]
            )
            pictures.append(data.normalize(picture.to(device)))  # (3, h, w)
            targets.append({"boxes": boxes.to(device), "labels": labels.to(device)})
        return pictures, targets

    def loss(self, net, batch):
        """The sum () of the two losses, each a mean over the images of a batch."""
        pictures, targets = batch
        device = pictures[0].device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.config.amp):
            return sum(net(pictures, targets).values())

    @staticmethod
    def weight(batch):
        """How many images the loss is a mean of."""
        return len(batch[0])

    @classmethod
    def evaluate(cls, model, images, amp=False):
        """{"map", "map50", "map75", "scored_classes", "all_classes", "best_f1", "best_threshold",
        "map_CLASS", ...} of a model on an ImageSet.

        mAP is a mean over `scored_classes` of `all_classes`, those of which the set holds a box;
        every box of a score above 0.05 counts. `best_threshold` is the score above which boxes have
        the best F1 over all classes at an overlap of 0.5. On the validation part it is the one for
        a model's use. Counted by torchmetrics with pycocotools.
        """
        scores, threshold, f1 = cls._counts(model, images, amp)
        kinds, each = (scores[key].reshape(-1).tolist() for key in ("classes", "map_per_class"))
        known = {images.classes[k]: value for k, value in zip(kinds, each) if value >= 0}
        return {
            "map": scores["map"].item(),
            "map50": scores["map_50"].item(),
            "map75": scores["map_75"].item(),
            "scored_classes": len(known),
            "all_classes": len(images.classes),
            "best_f1": f1,
            "best_threshold": threshold,
            **{f"map_{name}": known[name] for name in images.classes if name in known},
        }

    @classmethod
    def precision(cls, model, images):
        """{class: [101 numbers]}: the best precision at an overlap of 0.5 for a recall of at least
        0, 0.01, ..., 1."""
        scores, *_ = cls._counts(model, images, False, extended_summary=True)
        # (101, J): at an overlap of 0.5, boxes of all sizes, 100 boxes a picture
        curves = scores["precision"][0, :, :, 0, -1]
        kinds = scores["classes"].reshape(-1).tolist()
        return {
            images.classes[k]: curves[:, n].tolist()
            for n, k in enumerate(kinds)
            if curves[0, n] >= 0
        }

    @staticmethod
    @torch.no_grad()
    def _counts(model, images, amp, **more):
        """(what torchmetrics counts, the best threshold, its F1)."""
        from torchmetrics.detection import MeanAveragePrecision  # not for classification

        if not any(map(len, images.boxes)):
            raise ValueError(
                f"no box in any of the {len(images)} pictures of {images.name}: draw some"
            )
        device = next(model.parameters()).device
        counts = MeanAveragePrecision(class_metrics=True, **more).to(device)
        best = BestThreshold(device)
        with every_box(model):
            for index, found in outputs(model, images, amp, batch_size=16, as_list=True):
                for i, answer in zip(index.tolist(), found):
                    truth = {"boxes": images.boxes[i], "labels": images.box_labels[i]}
                    truth = {key: value.to(device) for key, value in truth.items()}
                    floats = {key: answer[key].float() for key in ("boxes", "scores")}
                    answer = {**floats, "labels": answer["labels"]}
                    counts.update([answer], [truth])
                    best.update(answer, truth)
        return counts.compute(), *best.compute()


TASKS = {"classification": Classification, "segmentation": Segmentation, "detection": Detection}


def describe(task, scores):
    """A task's score in words: "miou 100.0%, a mean over 1 of 4 classes"."""
    name = TASKS[task].score
    text = f"{name} {scores[name]:.1%}"
    if "scored_classes" not in scores:
        return text
    return f"{text}, a mean over {scores['scored_classes']} of {scores['all_classes']} classes"


class _Maps(nn.Module):
    """A detector up to the maps of its head."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.head(list(self.model.backbone(x).values()))
