"""The three tasks (tasks.py, matching.py, packages.py): what they ask for before work starts, their
batches, losses and scores."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import RetinaNet

from xvit_minimal import data
from xvit_minimal.dense import VOID, SemanticFPN
from xvit_minimal.matching import BestThreshold, every_box, matches
from xvit_minimal.recipe import recipe
from xvit_minimal.tasks import TASKS, Detection, Segmentation, describe


@pytest.fixture(autouse=True)
def the_same_draws():
    torch.manual_seed(0)


def a_target(*boxes, labels=None):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float).reshape(-1, 4),
        "labels": torch.tensor([0] * len(boxes) if labels is None else labels, dtype=torch.int64),
    }


def found(*boxes, scores, labels=None):
    return {**a_target(*boxes, labels=labels), "scores": torch.tensor(scores)}


# ----------------------------------------------------------------------------- before work starts


@pytest.mark.parametrize(
    "task, package, extra",
    [
        ("classification", "safetensors", ""),
        ("classification", "tqdm", ""),
        ("classification", "torchmetrics", None),  # not needed
        ("segmentation", "torchmetrics", "[dense]"),
        ("segmentation", "pycocotools", None),
        ("detection", "pycocotools", "[dense]"),
    ],
)
def test_a_missing_package_is_said_before_anything_is_loaded(task, package, extra, tmp_path):
    """In a process of its own, in which the package cannot be imported; the run's folder is not
    made."""
    code = (
        "import sys; sys.modules[sys.argv.pop(1)] = None\n"
        "from xvit_minimal import train\n"
        "train.TASKS[sys.argv[2]].load = lambda *rest: sys.exit('loaded')\n"
        "train.main()"
    )
    command = [sys.executable, "-c", code, package, "--task", task, "--out", tmp_path / "run"]
    words = subprocess.run(command, capture_output=True, text=True)
    assert words.returncode == 1
    if extra is None:
        assert words.stderr.strip() == "loaded"
        return
    assert not (tmp_path / "run").exists()
    (line,) = words.stderr.strip().splitlines()
    assert line.startswith(f"error: {task} needs {package}, which cannot be imported")
    assert line.endswith(f'pip install "xvit_minimal{extra}"')


# ---------------------------------------------------------------------------------------- batches


def two_sizes(**more):
    """Two pictures in one tensor, of 8 x 12 and 6 x 10 pixels; the padding of the second is 77."""
    images = torch.full((2, 3, 8, 12), 200, dtype=torch.uint8)
    images[1, :, 6:], images[1, :, :, 10:] = 77, 77
    sizes = torch.tensor([[8, 12], [6, 10]])
    return data.ImageSet(images, None, ("a", "b"), "two", "two", sizes=sizes, **more)


class Noted(nn.Module):
    """Keeps what it is called with; answers with logits, boxes or losses."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.zeros(1)), []

    def forward(self, x, *rest):
        self.calls.append((x, *rest))
        if isinstance(x, list) and self.training:
            return {"some": self.weight.sum(), "other": self.weight.sum()}
        if isinstance(x, list):
            return [found((0, 0, 4, 4), scores=[0.9])] * len(x)
        logits = torch.zeros(len(x), 2, *x.shape[2:])
        logits[:, 1] = 1
        return logits + self.weight


def test_a_picture_is_cut_to_its_own_size_and_its_padding_is_void():
    masks = torch.ones(2, 8, 12, dtype=torch.uint8)
    images = two_sizes(masks=masks)
    task = Segmentation(recipe("some/folder", "segmentation", augment="none", amp=False), images)
    net, cpu = Noted(), torch.device("cpu")
    x, masks, sizes = task.batch(images, torch.tensor([0, 1]), 0, cpu)
    assert x.shape == (2, 3, 8, 12) and sizes.tolist() == [[8, 12], [6, 10]]
    assert (masks[1, 6:] == VOID).all() and (masks[1, :, 10:] == VOID).all()
    assert (masks == VOID).sum() == 8 * 12 - 6 * 10
    assert not (x == data.normalize(torch.tensor(77))).any()
    assert task.weight((x, masks, sizes)) == 8 * 12 + 6 * 10
    task.loss(net, (x, masks, sizes)).backward()
    assert torch.equal(net.calls[0][1], sizes)


def test_pictures_that_fill_their_tensor_need_no_sizes():
    images = two_sizes(masks=torch.ones(2, 8, 12, dtype=torch.uint8))
    task = Segmentation(recipe("some/folder", "segmentation", augment="none", amp=False), images)
    batch = task.batch(images, torch.tensor([1, 1]), 0, torch.device("cpu"))
    assert [tuple(field.shape) for field in batch] == [(2, 3, 6, 10), (2, 6, 10)]
    net = Noted()
    task.loss(net, batch)
    assert len(net.calls[0]) == 1


def test_a_detector_gets_each_picture_in_its_own_size():
    boxes, labels = [torch.tensor([[0.0, 0, 4, 4]])] * 2, [torch.tensor([0])] * 2
    images = two_sizes(boxes=boxes, box_labels=labels)
    task = Detection(recipe("some/folder", "detection", augment="none", amp=False), images)
    pictures, targets = task.batch(images, torch.tensor([0, 1]), 0, torch.device("cpu"))
    assert [tuple(picture.shape) for picture in pictures] == [(3, 8, 12), (3, 6, 10)]
    assert task.weight((pictures, targets)) == 2 and targets[1]["boxes"].tolist() == [[0, 0, 4, 4]]
    net = Noted()
    assert task.loss(net, (pictures, targets)) == 0
    Detection.evaluate(net, images)
    assert [tuple(picture.shape) for picture in net.calls[-1][0]] == [(3, 8, 12), (3, 6, 10)]


def test_a_segmenter_is_told_the_sizes_when_it_is_evaluated():
    masks = torch.ones(2, 8, 12, dtype=torch.uint8)
    masks[1, 6:], masks[1, :, 10:] = VOID, VOID
    net = Noted()
    scores = Segmentation.evaluate(net, two_sizes(masks=masks))
    assert net.calls[0][1].tolist() == [[8, 12], [6, 10]] and scores["accuracy"] == 1


# ------------------------------------------------------------------------ the boxes that are right


def test_the_surest_box_takes_the_true_one():
    truth = a_target((0, 0, 10, 10), (20, 20, 30, 30), labels=[0, 1])
    said = found(
        (0, 0, 10, 9),  # right, but for one that is surer
        (0, 0, 10, 10),  # right
        (20, 20, 30, 30),  # another class
        (0, 0, 4, 4),  # overlaps too little
        scores=[0.5, 0.9, 0.8, 0.7],
        labels=[0, 0, 0, 0],
    )
    assert matches(said, truth).tolist() == [False, True, False, False]
    assert matches(said, a_target()).tolist() == [False] * 4
    assert matches(found(scores=[]), truth).tolist() == []


def test_of_two_true_boxes_a_found_one_takes_that_which_it_overlaps_more():
    truth = a_target((0, 0, 10, 10), (2, 0, 12, 10))
    said = found((1, 0, 12, 10), (0, 0, 11, 10), scores=[0.9, 0.8])
    assert matches(said, truth).tolist() == [True, True]


def test_the_best_threshold_is_that_of_trying_all():
    generator, best, counted = torch.Generator().manual_seed(3), BestThreshold(), []
    for _ in range(30):
        corners = 40 * torch.rand(9, 2, generator=generator)
        boxes = torch.cat([corners, corners + 12], 1)
        truth = {
            "boxes": boxes[:4] + torch.rand(4, 4, generator=generator),
            "labels": torch.zeros(4),
        }
        scores = torch.rand(9, generator=generator) * torch.linspace(1, 0.1, 9) ** 2
        said = {"boxes": boxes, "labels": torch.zeros(9), "scores": scores}
        best.update(said, truth)
        counted.append((said, truth))
    by_hand = {}
    for step in range(100):
        right = number = 0
        for said, truth in counted:
            kept = {key: value[said["scores"] > step / 100] for key, value in said.items()}
            right, number = right + matches(kept, truth).sum().item(), number + len(kept["scores"])
        by_hand[step / 100] = 2 * right / (number + 4 * 30)
    threshold, f1 = best.compute()
    assert f1 == pytest.approx(max(by_hand.values())) and by_hand[threshold] == pytest.approx(f1)
    assert 0 < threshold < 0.99 and by_hand[0.0] < f1
    assert best.compute() == (threshold, f1)


def test_average_precision_counts_every_box_and_leaves_the_threshold_as_it_was():
    model = Noted()
    model.score_thresh = 0.4
    with every_box(model):
        assert model.score_thresh == 0.05
    assert model.score_thresh == 0.4
    with pytest.raises(RuntimeError), every_box(model):
        raise RuntimeError
    assert model.score_thresh == 0.4


# ----------------------------------------------------------------------------------------- scores


def test_a_score_says_over_how_many_classes_it_is_a_mean():
    assert describe("classification", {"top1": 0.5, "loss": 1.0}) == "top1 50.0%"
    images = numbered(
        1, 4, 6, ("sky", "road", "boat", "car"), masks=torch.zeros(1, 4, 6, dtype=torch.uint8)
    )
    scores = Segmentation.evaluate(
        Told([F.one_hot(torch.zeros(4, 6).long(), 4).permute(2, 0, 1)]), images
    )
    assert scores["miou"] == 1 and scores["scored_classes"] == 1 and scores["all_classes"] == 4
    assert describe("segmentation", scores) == "miou 100.0%, a mean over 1 of 4 classes"
    boxes = dict(boxes=[torch.tensor([[0.0, 0, 4, 4]])], box_labels=[torch.tensor([1])])
    images = numbered(1, 8, 8, ("cell", "plate", "ghost"), **boxes)
    scores = Detection.evaluate(Told([found((0, 0, 4, 4), scores=[0.9], labels=[1])]), images)
    assert describe("detection", scores) == "map 100.0%, a mean over 1 of 3 classes"


class Told(nn.Module):
    """Answers with what it was told for an image, whose number stands in its pixels."""

    def __init__(self, answers):
        super().__init__()
        self.answers, self.none = answers, nn.Parameter(torch.zeros(1))

    def forward(self, x, sizes=None):
        assert not self.training
        picked = [self.answers[((image[0, 0, 0] + 2) * 63.75).round().int()] for image in x]
        return torch.stack(picked) if isinstance(picked[0], torch.Tensor) else picked


def numbered(n, height, width, classes, **more):
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, height, width)
    return data.ImageSet(images, None, classes, "numbers", "numbered", **more)


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_miou_is_that_of_counting_by_hand(batch_size):
    classes, n = (
        ("sky", "road", "boat", "unicorn", "car"),
        5,
    )  # nobody sees a unicorn, and the car is only in the truth
    truth, said = torch.randint(3, (n, 4, 6)), torch.randint(3, (n, 4, 6))
    truth[0, 0], truth[3], truth[1, 1, :2] = VOID, VOID, 4
    said[0, 0] = 3  # under void: counts nowhere
    model = Told(list(F.one_hot(said, 5).permute(0, 3, 1, 2).float()))
    images = numbered(n, 4, 6, classes, masks=truth.to(torch.uint8))
    found = Segmentation.evaluate(model.train(), images, batch_size=batch_size)
    pixels = [
        (i, y, x) for i in range(n) for y in range(4) for x in range(6) if truth[i, y, x] != VOID
    ]
    iou = {}
    for k, name in enumerate(classes):
        of_truth, of_said = ({p for p in pixels if mask[p] == k} for mask in (truth, said))
        if of_truth | of_said:
            iou[name] = len(of_truth & of_said) / len(of_truth | of_said)
    assert set(iou) == {"sky", "road", "boat", "car"} and iou["car"] == 0
    accuracy = sum((truth[p] == said[p]).item() for p in pixels) / len(pixels)
    expected = {
        "miou": sum(iou.values()) / 4,
        "scored_classes": 4,
        "all_classes": 5,
        "accuracy": accuracy,
        **{f"iou_{name}": v for name, v in iou.items()},
    }
    assert found == pytest.approx(expected, rel=1e-9) and list(found) == list(expected)


def test_images_of_nothing_but_void_cannot_be_evaluated():
    images = numbered(
        2, 4, 6, ("sky", "road"), masks=torch.full((2, 4, 6), VOID, dtype=torch.uint8)
    )
    with pytest.raises(ValueError, match="no pixel of the 2 pictures"):
        Segmentation.evaluate(Told([torch.zeros(2, 4, 6)] * 2), images)


def overlap(a, b):
    width, height = (max(0, min(a[2 + k], b[2 + k]) - max(a[k], b[k])) for k in (0, 1))
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (area - width * height)


def average_precision(truth, said, threshold):
    """COCO's, of one class: truth {image: boxes}, said [(score, image, box), ...]."""
    found, hits, points = set(), 0, []
    for n, (_, image, box) in enumerate(sorted(said, key=lambda each: -each[0]), start=1):
        overlaps = [
            (overlap(box, other), (image, k)) for k, other in enumerate(truth.get(image, []))
        ]
        best, which = max((pair for pair in overlaps if pair[1] not in found), default=(0, None))
        if best >= threshold:
            found.add(which)
            hits += 1
        points.append((hits / sum(map(len, truth.values())), hits / n))  # recall, precision
    return sum(max((p for r, p in points if r >= k / 100), default=0) for k in range(101)) / 101


def test_map_is_that_of_counting_by_hand():
    """Class 0 has two truths and three predictions, one of them in an image without truth; class 1
    has a truth that nobody finds, class 2 none; of the 20 images, in two batches, most have
    neither."""
    truth = {0: {0: [(0, 0, 20, 20)], 18: [(10, 10, 30, 40)]}, 1: {18: [(0, 0, 8, 8)]}}
    said = [
        (0.9, 0, (0, 0, 20, 17.5)),
        (0.8, 5, (5, 5, 15, 15)),
        (0.7, 18, (10, 10, 30, 29)),
    ]  # overlap 0.875, 0, 0.63
    answers, targets = [], []
    for image in range(20):
        mine = [(score, box) for score, where, box in said if where == image]
        answers.append(
            {
                **a_target(*[box for _, box in mine]),
                "scores": torch.tensor([score for score, _ in mine]),
            }
        )
        there = [(box, k) for k in truth for box in truth[k].get(image, [])]
        targets.append(a_target(*[box for box, _ in there], labels=[k for _, k in there]))
    boxes, labels = ([target[key] for target in targets] for key in ("boxes", "labels"))
    images = numbered(20, 40, 40, ("cell", "plate", "ghost"), boxes=boxes, box_labels=labels)
    found = Detection.evaluate(Told(answers).train(), images)
    each = {n: average_precision(truth[0], said, n / 100) for n in range(50, 100, 5)}
    assert (
        each[50] == pytest.approx((51 + 50 * 2 / 3) / 101)
        and each[75] == pytest.approx(51 / 101)
        and each[90] == 0
    )
    cell = sum(each.values()) / 10
    expected = {
        "map": cell / 2,
        "map50": each[50] / 2,
        "map75": each[75] / 2,
        "scored_classes": 2,
        "all_classes": 3,
        "best_f1": 2 * 2 / (3 + 3),
        "best_threshold": 0.0,
        "map_cell": cell,
        "map_plate": 0,
    }
    assert found == pytest.approx(expected, abs=1e-6)
    curves = Detection.precision(Told(answers), images)
    assert curves == {"cell": pytest.approx([1] * 51 + [2 / 3] * 50), "plate": [0] * 101}


def test_a_detector_that_says_the_truth_scores_one_and_one_that_is_silent_zero():
    images = data.shapes(6, 32)
    images.images[:] = torch.arange(6, dtype=torch.uint8)[:, None, None, None]
    right = [
        {"boxes": boxes, "labels": labels, "scores": torch.ones(2)}
        for boxes, labels in zip(images.boxes, images.box_labels)
    ]
    silent = [{**a_target(), "scores": torch.zeros(0)}] * 6
    perfect, nothing = (Detection.evaluate(Told(answers), images) for answers in (right, silent))
    for key in ("map", "map50", "map75", "best_f1", *(key for key in perfect if "map_" in key)):
        assert perfect[key] == 1 and nothing[key] == 0
    assert perfect["best_threshold"] == nothing["best_threshold"] == 0


def test_each_task_has_a_score_and_a_cost():
    assert [TASKS[task].score for task in ("classification", "segmentation", "detection")] == [
        "top1",
        "miou",
        "map",
    ]
    for task in ("segmentation", "detection"):
        config = recipe("shapes", task, dim=8, depth=1, num_heads=2, pyramid=16)
        model = TASKS[task].model(config, 5, (24, 40))
        parameters, multiply_adds = TASKS[task].cost(model, (24, 40))
        assert parameters == sum(p.numel() for p in model.parameters()) and multiply_adds > 0
        assert next(model.parameters()).device.type == "cpu" and isinstance(
            model, (SemanticFPN, RetinaNet)
        )
