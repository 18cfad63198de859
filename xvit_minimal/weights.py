"""Trained weights: what a file of them says, the model in it, and what that model says about a
picture."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from .images import normalize, read_image, size_of
from .packages import require
from .recipe import Config
from .tasks import TASKS


def pack(model, config, classes, size, threshold=None):
    """The bytes of a weights.safetensors file: a model's weights, and what `load_model` needs to
    make the model again.

    `config`: the settings as a dictionary; `size`: the training images', a side or (height, width);
    `threshold`: a detector's score from which on a box is worth showing, chosen on the validation
    part.
    """
    from safetensors.torch import save

    about = {"config": config, "classes": classes, "size": size}
    if threshold is not None:
        about["threshold"] = threshold
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return save(tensors, {"about": json.dumps(about)})


def unpack(path):
    """(tensors, about): what `pack` put into a file, the weights by name and the rest.

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
    Raises FileNotFoundError if there is no file, ValueError if it is damaged, or not one that a run
    of this package wrote.
    """
    tensors, about = unpack(path)
    try:
        config, classes, size = Config(**about["config"]), about["classes"], about["size"]
        model = TASKS[config.task].model(config, len(classes), size)
        model.load_state_dict(tensors)
        if "threshold" in about:
            model.score_thresh = float(about["threshold"])
    except Exception as error:
        raise _foreign(path, error) from error
    model.task, model.size = config.task, size
    return model.eval(), classes


@torch.no_grad()
def predict(model, path):
    """What a model from `load_model` says about the picture in a file, whatever its size.

    Classification: the probabilities (J,) of the classes. Segmentation: the class of each pixel,
    int64 (H, W), of the picture's own size. Detection: {"boxes" (n, 4), "scores" (n,), "labels"
    (n,)}, x0 y0 x1 y1 in the picture's own pixels. The model sees the picture at the size of its
    training images. Raises ValueError if the file is not a picture.
    """
    side = model.size if isinstance(model.size, int) else max(model.size)
    image = read_image(path, side, square=model.task == "classification")  # (3, h, w)
    (output,) = model(normalize(image[None]).to(next(model.parameters()).device))
    if model.task == "classification":
        return output.float().softmax(0)
    width, height = size_of(path)
    if model.task == "segmentation":
        classes = output.argmax(0)[None, None]  # (1, 1, h, w)
        return F.interpolate(classes.float(), (height, width), mode="nearest-exact")[0, 0].long()
    scale = torch.tensor([width / image.shape[2], height / image.shape[1]] * 2)  # (4,)
    return {**output, "boxes": output["boxes"] * scale.to(output["boxes"].device)}


def _foreign(path, error):
    return ValueError(
        f"{path} is not a weights.safetensors of a run of this package, or it is damaged "
        f"({type(error).__name__}: {error}): give the file that a run left in its folder"
    )
