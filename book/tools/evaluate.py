"""Put trained models to images that their runs did not look at, and record how they do.

    python book/tools/evaluate.py runs/cifar10/weights.safetensors --data cifar10 --mistakes 10 --out cifar10
    python book/tools/evaluate.py runs/a/weights.safetensors runs/b/weights.safetensors --data imagenette --sizes 96 128 --out sizes
    python book/tools/evaluate.py runs/cifar10/weights.safetensors --ship book/weights/cifar10.safetensors --data cifar10 --out cifar10

It writes book/runs/evaluate/OUT.json: one row for each file of weights, each set and each side in pixels. With --ship, the
weights are first written in half precision to another file, and that file is evaluated: the one that goes with the book.
With --jpeg, each set is also compressed by JPEG at that quality, and a second row compares the two image by image.
A model for segmentation or detection gets one row with its scores; with --mistakes also, for detection, the precision at
each recall.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from xvit_minimal import data
from xvit_minimal.recipe import recipe
from xvit_minimal.record import provenance, write
from xvit_minimal.tasks import TASKS
from xvit_minimal.train import load_model

ROOT = Path(__file__).resolve().parents[2]


def ship(source, target):
    """Write the weights of a run again, in half precision, with what the file says about them."""
    with safe_open(source, "pt") as file:
        about = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}
    halves = {name: w.half() if w.is_floating_point() else w for name, w in weights.items()}
    write(target, save(halves, about))


def about(path):
    """(task, longer side in pixels of the training images) of a file's model."""
    with safe_open(path, "pt") as file:
        found = json.loads(file.metadata()["about"])
    size = found["size"]
    return found["config"].get("task", "classification"), size if isinstance(size, int) else max(
        size
    )


def origin(path, images):
    """What a row says about the model and the images that it is about."""
    return {
        "weights": path.as_posix(),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "data": images.name,
        "copy": images.copy,
        "side": max(images.images.shape[-2:]),
        "images": len(images),
    }


def same_classes(path, classes, images):
    if tuple(classes) != tuple(images.classes):
        raise ValueError(
            f"{path} knows the classes {list(classes)}, and {images.name} has {list(images.classes)}: "
            "choose a set with the same ones"
        )


def dense_row(path, task, images, mistakes, device):
    """How a model for a dense task does on an ImageSet; with `mistakes`, a detector's precision-recall curves as well."""
    model, classes = load_model(path)
    same_classes(path, classes, images)
    found = {
        **origin(path, images),
        "score": TASKS[task].score,
        **TASKS[task].evaluate(model.to(device), images),
    }
    if mistakes and task == "detection":
        found["precision"] = TASKS[task].precision(model, images)
    return found


@torch.no_grad()
def predict(model, images, device):
    """The probabilities (n, classes) that a model gives to the classes of an ImageSet, on the CPU."""
    parts = [
        model(data.normalize(part.to(device))).float().softmax(1).cpu()
        for part in images.images.split(250)
    ]
    return torch.cat(parts)


def row(path, images, mistakes, device):
    """How the model in a file does on an ImageSet, and on which images it is right, a tensor (n,).

    With `mistakes`, also whom it takes for whom, and that many of its surest errors."""
    model, classes = load_model(path)
    same_classes(path, classes, images)
    p, labels = predict(model.to(device), images, device), images.labels  # (n, classes), (n,)
    guess = p.argmax(1)  # (n,)
    right = guess == labels  # (n,)
    found = {
        **origin(path, images),
        "loss": F.nll_loss(p.clamp(min=1e-12).log(), labels).item(),
        "top1": right.double().mean().item(),
    }
    if mistakes:
        J, wrong = len(classes), (~right).nonzero()[:, 0]
        surest = wrong[
            p[wrong, guess[wrong]].argsort(descending=True, stable=True)[:mistakes]
        ].tolist()
        found["classes"] = list(classes)
        found["confusion"] = (
            torch.bincount(J * labels + guess, minlength=J * J).reshape(J, J).tolist()
        )  # [label][guess]
        found["mistakes"] = [
            {
                "index": i,
                "label": labels[i].item(),
                "guess": guess[i].item(),
                "probability": p[i].max().item(),
            }
            for i in surest
        ]
    return found, right


def jpeg(image, quality):
    """An image uint8 (3, H, W) after JPEG compression, the colours at half resolution as is usual."""
    to_pil_image(image).save(buffer := io.BytesIO(), "JPEG", quality=quality, subsampling="4:2:0")
    return pil_to_tensor(Image.open(buffer))


def rows(files, images, options, device):
    """The rows of one set: one for each file, and one more for each after JPEG if that is asked for."""
    for path in files:
        found, right = row(path, images, options.mistakes, device)
        yield found
        if options.jpeg:
            squeezed = torch.stack(
                [jpeg(image, options.jpeg) for image in images.images]
            )  # (n, 3, S, S)
            again, still = row(path, replace(images, images=squeezed), 0, device)
            yield {
                **again,
                "jpeg": options.jpeg,
                "right_before_only": (right & ~still).sum().item(),
                "right_after_only": (still & ~right).sum().item(),
            }


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", nargs="+", type=Path, help="weights.safetensors of runs")
    parser.add_argument("--data", nargs="+", required=True, help="sets, as for xvit_minimal.train")
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=int,
        help="sides in pixels; by default the one that the (first) model was trained at",
    )
    parser.add_argument(
        "--mistakes",
        type=int,
        default=0,
        help="record the confusion matrix and so many of the surest errors",
    )
    parser.add_argument(
        "--jpeg", type=int, help="evaluate again after JPEG compression of this quality, 1 to 100"
    )
    parser.add_argument(
        "--ship",
        type=Path,
        help="write the (one) model here in half precision, and evaluate this file",
    )
    parser.add_argument("--out", required=True, help="the name of the record")
    options = parser.parse_args(argv)
    if options.ship and len(options.weights) != 1:
        parser.error(f"got {len(options.weights)} files to --ship, expected one")
    started, clock = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        files = options.weights
        if options.ship:
            ship(files[0], options.ship)
            files = [options.ship]
        task, side = about(files[0])
        results = []
        for name in options.data:
            for size in options.sizes or [side]:
                images = TASKS[task].load(recipe(name, task, size=size), "test", None)
                found_rows = (
                    rows(files, images, options, device)
                    if task == "classification"
                    else (dense_row(path, task, images, options.mistakes, device) for path in files)
                )
                for found in found_rows:
                    results.append(found)
                    score = found[found.get("score", "top1")]
                    print(
                        "{weights}  {data}, {side} px: ".format(**found)
                        + f"{score:.2%} of {len(images):,}",
                        flush=True,
                    )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    words = " ".join(sys.argv[1:] if argv is None else argv)
    record = {
        "kind": "evaluate",
        "command": f"python book/tools/evaluate.py {words}",
        "seed": 0,
        "started": started,
        "config": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(options).items()
            if key != "weights"
        },
        **provenance(device),
        "wall_seconds": time.perf_counter() - clock,
        "results": results,
    }
    write(
        ROOT / f"book/runs/evaluate/{options.out}.json",
        json.dumps(record, indent=1, allow_nan=False).encode() + b"\n",
    )


if __name__ == "__main__":
    os.chdir(ROOT)  # paths are those of the command, from the repository's root
    main()
