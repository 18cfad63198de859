"""The weights that a run leaves: written, read again as a model, and taken over by another run."""

import json

from safetensors import safe_open
from safetensors.torch import save as to_safetensors

from .dense import transfer
from .model import XViT
from .recipe import Config
from .tasks import TASKS


def weights_file(model, config, classes, size):
    """The bytes of a weights.safetensors file: a model's tensors, and all that makes the model again."""
    options = {key: value for key, value in config.items() if key not in ("out", "device")}
    about = {"config": options, "classes": classes, "size": size}  # the same on any machine
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return to_safetensors(tensors, {"about": json.dumps(about)})


def load_model(path):
    """(model, classes): the model in a weights.safetensors file, in evaluation mode, in float32, and its
    classes' names.

    Raises ValueError if the file is damaged, or is none that a run of this package wrote.
    """
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
            about = json.loads(file.metadata()["about"])
        config = Config(**about["config"])
        model = TASKS[config.task].model(config, len(about["classes"]), about["size"])
        model.load_state_dict(weights)
    except OSError:
        raise
    except Exception as error:  # whatever a file of another kind provokes
        raise ValueError(
            f"{path} is no weights.safetensors of a run of this package "
            f"({type(error).__name__}: {error})"
        ) from error
    return model.eval(), about["classes"]


def start_from(model, path):
    """Give a model the stem, positions and blocks of the one in a weights.safetensors file, of whatever task.
    Raises ValueError if they do not fit."""
    trained, _ = load_model(path)
    try:
        transfer(_body(model), _body(trained))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _body(model):
    for module in model.modules():
        if isinstance(module, XViT):
            return module
