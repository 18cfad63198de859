"""The weights that a run leaves: written, read again as a model, taken over by another run, and
what they say about a picture."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from .dense import transfer
from .images import fit, normalize, read_image
from .model import XViT
from .packages import require
from .recipe import Config
from .tasks import TASKS


def weights_file(model, config, classes, size, threshold=None):
    """The bytes of a weights.safetensors file: a model's tensors, and all that makes the model
    again.

    `config`: the options as a dictionary; `size`: the training images', a side or (height, width);
    `threshold`: a detector's score above which a box is worth showing, chosen on the validation
    part.
    """
    from safetensors.torch import save

    options = {key: value for key, value in config.items() if key not in ("out", "device")}
    about = {"config": options, "classes": classes, "size": size}  # the same on any machine
    if threshold is not None:
        about["threshold"] = threshold
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return save(tensors, {"about": json.dumps(about)})


def unpack(path):
    """(tensors, about): what `weights_file` put into a file, the weights by name and the rest.

    Raises FileNotFoundError if there is no file, ValueError if it is damaged, or not one that a run
    of this package wrote.
    """
    require("reading weights", "safetensors")
    from safetensors import safe_open

    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the path of the weights.safetensors in it")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file, expected the weights.safetensors of a run")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            return {name: file.get_tensor(name) for name in file.keys()}, about
    except OSError:
        raise
    except Exception as error:  # whatever a file of another kind provokes
        raise _foreign(path, error) from error


def load_model(path):
    """(model, classes): the model in a weights.safetensors file, in evaluation mode, in float32,
    and its classes' names.

    `model.task` and `model.size` say what it was trained for, and on images of which size, a side
    or (height, width). A detector keeps the boxes above the threshold in the file;
    `model.score_thresh` changes it.
    Raises FileNotFoundError if there is no file, ValueError if it is damaged, not one that a run of
    this package wrote, or holds numbers that are not finite.
    """
    tensors, about = unpack(path)
    try:
        config, classes, size = Config(**about["config"]), about["classes"], about["size"]
        model = TASKS[config.task].model(config, len(classes), size).float()
        model.load_state_dict(tensors)
        if "threshold" in about:
            model.score_thresh = float(about["threshold"])
    except Exception as error:
        raise _foreign(path, error) from error
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{path}: {name} is not finite, so every answer would be made up: give the weights "
                "of a run that did not diverge"
            )
    model.task, model.size = config.task, size
    return model.eval(), classes


def start_from(model, path):
    """Give a model the stem, positions and blocks of the one in a weights.safetensors file, of
    whatever task. Raises ValueError if they do not fit."""
    trained, _ = load_model(path)
    try:
        transfer(_body(model), _body(trained))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@torch.no_grad()
def predict(model, path):
    """What a model from `load_model` says about the picture in a file, whatever its size.

    Classification: the probabilities (J,) of the classes, for the picture's centre square.
    Segmentation: the class of each pixel, int64 (H, W), of the picture's own size. Detection:
    {"boxes" (n, 4), "scores" (n,), "labels" (n,)}, x0 y0 x1 y1 in the picture's own pixels.
    The model sees the picture at the size of its training images. Raises ValueError if the file is
    not there, or not a picture, or if the model is in training mode or not from `load_model`.
    """
    if model.training or not hasattr(model, "task"):
        raise ValueError(
            f"got {'a model in training mode' if model.training else type(model).__name__}, "
            "expected a model from load_model in evaluation mode: call model.eval()"
        )
    side = model.size if isinstance(model.size, int) else max(model.size)
    picture = read_image(path)  # (3, H, W)
    image = fit(picture, side, square=model.task == "classification")  # (3, h, w)
    weight = next(model.parameters())
    (output,) = model(normalize(image[None].to(weight.device)).to(weight.dtype))
    if model.task == "classification":
        return output.float().softmax(0)
    height, width = picture.shape[1:]
    if model.task == "segmentation":
        classes = output.argmax(0)[None, None].float()  # (1, 1, h, w)
        return F.interpolate(classes, (height, width), mode="nearest-exact")[0, 0].long()
    boxes = output["boxes"]
    scale = boxes.new_tensor([width / image.shape[2], height / image.shape[1]] * 2)  # (4,)
    return {**output, "boxes": boxes * scale}


def _body(model):
    for module in model.modules():
        if isinstance(module, XViT):
            return module


def _foreign(path, error):
    return ValueError(
        f"{path} is not a weights.safetensors of a run of this package, or it is damaged "
        f"({type(error).__name__}: {error}): give the file that a run left in its folder"
    )
