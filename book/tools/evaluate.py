"""Put trained models to images that their runs did not train on, and record how they do.

    python book/tools/evaluate.py runs/cifar10/weights.safetensors --data cifar10 --out cifar10
    python book/tools/evaluate.py runs/a/weights.safetensors runs/b/weights.safetensors
        --data imagenette --sizes 96 128 --out sizes
    python book/tools/evaluate.py runs/cifar10/weights.safetensors
        --ship book/weights/cifar10.safetensors --data cifar10 --out cifar10

It writes book/runs/evaluate/OUT.json: one row for each file of weights, each set and each side in
pixels. With --ship, the weights are written in half precision to another file, and that file is
evaluated: the one that goes with the book. A detector that is shipped gets a score threshold, the
one with the best F1 on the set's validation part. With --jpeg, each set is also compressed by JPEG
at that quality, and a second row compares the two image by image. A model for segmentation or
detection gets one row with its scores; with --mistakes also, for detection, the precision at each
recall.
"""

import argparse
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from xvit_minimal import data
from xvit_minimal.recipe import is_dense, recipe
from xvit_minimal.record import provenance, write
from xvit_minimal.tasks import TASKS, describe
from xvit_minimal.weights import load_model, unpack

ROOT = Path(__file__).resolve().parents[2]


def shipped(source, threshold=None):
    """The bytes of a run's weights in half precision, with what the file says about them, and with
    a detector's threshold."""
    from safetensors.torch import save

    tensors, about = unpack(source)
    if threshold is not None:
        about["threshold"] = threshold
    halves = {name: w.half() if w.is_floating_point() else w for name, w in tensors.items()}
    return save(halves, {"about": json.dumps(about)})


def trained_for(files):
    """(task, longer side in pixels of the training images of the first) of files' models."""
    models = [load_model(path)[0] for path in files]
    for path, model in zip(files, models):
        if model.task != models[0].task:
            raise ValueError(
                f"{files[0]} is for {models[0].task} and {path} for {model.task}, expected one "
                "task: evaluate them one after the other"
            )
    size = models[0].size
    return models[0].task, size if isinstance(size, int) else max(size)


def origin(path, images):
    """What a row says about the model and the images that it is about."""
    return {
        "weights": Path(path).as_posix(),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "data": images.name,
        "copy": images.copy,
        "side": max(images.images.shape[-2:]),
        "images": len(images),
    }


def same_classes(path, classes, images):
    if tuple(classes) != tuple(images.classes):
        raise ValueError(
            f"{path} knows the classes {list(classes)}, and {images.name} has "
            f"{list(images.classes)}: choose a set with the same ones"
        )


def dense_row(path, task, images, mistakes, device):
    """How a model for a dense task does on an ImageSet; with `mistakes`, a detector's
    precision-recall curves as well."""
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
    """The probabilities (n, classes) that a model gives to an ImageSet's classes, on the CPU."""
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
    """An image uint8 (3, H, W) after JPEG, the colours at half resolution as is usual."""
    to_pil_image(image).save(buffer := io.BytesIO(), "JPEG", quality=quality, subsampling="4:2:0")
    return pil_to_tensor(Image.open(buffer))


def after_jpeg(path, images, right, quality, device):
    """The row of a model on an ImageSet after JPEG; `right` (n,) says where it was right before."""
    squeezed = torch.stack([jpeg(image, quality) for image in images.images])  # (n, 3, S, S)
    found, still = row(path, replace(images, images=squeezed), 0, device)
    return {
        **found,
        "jpeg": quality,
        "right_before_only": (right & ~still).sum().item(),
        "right_after_only": (still & ~right).sum().item(),
    }


def rows(path, task, images, options, device):
    """The rows of one file on one set: its own, and one more after JPEG if that is asked for."""
    if is_dense(task):
        return [dense_row(path, task, images, options.mistakes, device)]
    found, right = row(path, images, options.mistakes, device)
    if not options.jpeg:
        return [found]
    return [found, after_jpeg(path, images, right, options.jpeg, device)]


def best_threshold(path, name, side):
    """What a detector's row says of its threshold, which has the best F1 on the validation part."""
    images = TASKS["detection"].load(recipe(name, "detection", size=side), "val", None)
    model, classes = load_model(path)
    same_classes(path, classes, images)
    scores = TASKS["detection"].evaluate(model, images)
    return {
        "threshold": scores["best_threshold"],
        "val_f1": scores["best_f1"],
        "val_copy": images.copy,
    }


def arguments(argv):
    """The options of a command line. Ends the program for --help, and for a mistake with a line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", nargs="+", type=Path, help="weights.safetensors of runs")
    parser.add_argument("--data", nargs="+", required=True, help="sets, as for xvit_minimal.train")
    parser.add_argument(
        "--split", choices=("val", "test"), default="test", help="the part of the sets"
    )
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
    if options.ship and options.ship.resolve() == options.weights[0].resolve():
        parser.error(f"got --ship {options.ship}, the file that is read: name another one")
    if options.ship and (options.ship.is_dir() or options.ship.suffix != ".safetensors"):
        parser.error(f"got --ship {options.ship}, expected the path of a file NAME.safetensors")
    if options.jpeg is not None and not 1 <= options.jpeg <= 100:
        parser.error(f"got --jpeg {options.jpeg}, expected a quality from 1 to 100")
    if options.mistakes < 0 or min(options.sizes or [1]) < 1:
        parser.error(
            "got a negative --mistakes or --sizes below 1, expected numbers of images, pixels"
        )
    if not re.fullmatch(r"\w[\w.-]*", options.out):
        parser.error(
            f"got --out {options.out!r}, expected a name of letters, digits, '-', '_' and '.': it "
            "becomes book/runs/evaluate/NAME.json"
        )
    return options


def evaluate(options, device):
    """The rows of all files, sets and sides; with --ship, the new file is written when they are
    known."""
    task, side = trained_for(options.weights)
    TASKS[task].check(recipe(options.data[0], task))
    if options.jpeg and is_dense(task):
        raise ValueError(f"got --jpeg for {task}, expected classification: leave it out")
    files, about, content = options.weights, {}, None
    with tempfile.TemporaryDirectory() as folder:
        if options.ship:
            if task == "detection":
                about = best_threshold(files[0], options.data[0], side)
            content = shipped(files[0], about.get("threshold"))
            files = [Path(folder) / options.ship.name]
            files[0].write_bytes(content)
        results = []
        for name in options.data:
            for size in options.sizes or [side]:
                images = TASKS[task].load(recipe(name, task, size=size), options.split, None)
                print(*(f"{images.name}: {note}\n" for note in images.notes), sep="", end="")
                for path in files:
                    for found in rows(path, task, images, options, device):
                        found["weights"] = (options.ship or path).as_posix()
                        results.append({**found, **about})
                        words = describe(task, found)
                        where = f"{found['data']} {options.split}, {found['side']} px"
                        print(
                            f"{found['weights']}  {where}: {words}, {len(images):,} images",
                            flush=True,
                        )
    return results, content


def main(argv=None):
    options = arguments(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # letters that a terminal has no code for
        sys.stdout.reconfigure(errors="backslashreplace")
    started, clock = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    words = " ".join(sys.argv[1:] if argv is None else argv)
    config = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
        if key != "weights"
    }
    try:
        results, content = evaluate(options, device)
        record = {
            "kind": "evaluate",
            "command": f"python book/tools/evaluate.py {words}",
            "seed": 0,
            "started": started,
            "config": config,
            **provenance(device),
            "wall_seconds": time.perf_counter() - clock,
            "results": results,
        }
        text = json.dumps(record, indent=1, allow_nan=False)
        if options.ship:
            write(options.ship, content)
        write(ROOT / f"book/runs/evaluate/{options.out}.json", text.encode() + b"\n")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    os.chdir(ROOT)  # paths are those of the command, from the repository's root
    main()
