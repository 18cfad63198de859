"""What a record keeps of each test picture (each_picture.py)."""

import base64
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from xvit_minimal import XViT, data, each_picture
from xvit_minimal.dense import VOID
from xvit_minimal.tasks import TASKS, Detection, Segmentation


def test_hits_and_mirror_images_are_those_of_the_pictures_one_by_one():
    torch.manual_seed(0)
    model, images = XViT(32, 4, dim=8, depth=1, num_heads=2, stem_stride=4), data.shapes(21)
    found = each_picture.hits(model, images)
    hits, flips = [], []
    with torch.no_grad():
        for image, label in zip(images.images, images.labels):
            x = data.normalize(image[None])
            p, mirrored = model.eval()(x).softmax(1), model(x.flip(-1)).softmax(1)
            hits.append(bool(p.argmax() == label))
            flips.append(bool((p + mirrored).argmax() == label))
    bits = np.unpackbits(np.frombuffer(base64.b64decode(found["hits"]), np.uint8))[: len(images)]
    assert bits.tolist() == hits and 0 < sum(hits) < 21
    assert found["top1_flip"] == pytest.approx(sum(flips) / 21)


class Says(nn.Module):
    """A model that gives each picture of a list of answers its own, in turn."""

    def __init__(self, answers):
        super().__init__()
        self.answers = iter(answers)
        self.weight = nn.Parameter(torch.zeros(1))
        self.score_thresh = 0.5

    def forward(self, x, *sizes):
        each = [next(self.answers) for _ in range(len(x))]
        return each if isinstance(x, list) else torch.stack(each)


def two_pictures(**labels):
    pixels = torch.zeros(2, 3, 4, 6, dtype=torch.uint8)
    return data.ImageSet(pixels, torch.zeros(2), ("road", "sky", "tree"), "two", "", **labels)


def test_pixel_counts_add_up_to_the_score_of_any_choice_of_pictures():
    torch.manual_seed(0)
    masks = torch.randint(0, 3, (2, 4, 6), dtype=torch.uint8)
    masks[0, 0], masks[1, :, :2] = VOID, VOID
    images, answers = two_pictures(masks=masks), torch.randn(2, 3, 4, 6)
    found = each_picture.pixel_counts(Says(answers), images)
    counts = np.frombuffer(base64.b64decode(found["pixel_counts"]), "<u4").reshape(2, 3, 3)
    for chosen in ([0, 1], [0], [1]):
        both, truth, guess = counts[chosen].sum(0).T.astype(float)  # each (J,)
        some = replace(images, images=images.images[chosen], masks=masks[chosen])
        scores = Segmentation.evaluate(Says(answers[chosen]), some)
        assert (both / (truth + guess - both)).mean() == pytest.approx(scores["miou"])
    assert counts[:, :, 1].sum() == (masks != VOID).sum()


def test_average_precisions_are_those_of_each_picture_as_a_set_of_its_own():
    def answer(*boxes, scores):
        boxes = torch.tensor(boxes).float().reshape(-1, 4)
        labels = torch.zeros(len(boxes), dtype=torch.long)
        return {"boxes": boxes, "scores": torch.tensor(scores), "labels": labels}

    answers = [answer((0, 0, 4, 4), (1, 1, 3, 3), scores=[0.6, 0.9]), answer(scores=[])]
    images = two_pictures(
        boxes=[torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[0.0, 0, 2, 2]])],
        box_labels=[torch.tensor([0]), torch.tensor([0])],
    )
    found = each_picture.average_precisions(Says(answers), images)["map_by_image"]
    for i in range(2):
        one = replace(
            images,
            images=images.images[[i]],
            boxes=[images.boxes[i]],
            box_labels=[images.box_labels[i]],
        )
        alone = Detection.evaluate(Says([answers[i]]), one)["map"]
        assert found[i] == pytest.approx(alone, abs=1e-4)
    assert found[0] == pytest.approx(0.5, abs=0.01) and found[1] == 0


def test_a_picture_without_a_box_has_no_average_precision():
    nothing = {
        "boxes": torch.zeros(0, 4),
        "scores": torch.zeros(0),
        "labels": torch.zeros(0, dtype=torch.long),
    }
    images = two_pictures(
        boxes=[torch.zeros(0, 4)] * 2, box_labels=[torch.zeros(0, dtype=torch.long)] * 2
    )
    found = each_picture.average_precisions(Says([nothing, nothing]), images)
    assert found == {"map_by_image": [None, None]}


def test_every_task_has_its_own():
    assert set(each_picture.DETAILS) == set(TASKS)
