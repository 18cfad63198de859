"""Packages that only a part of this one needs: found missing before any work starts."""

import importlib

EXTRAS = {  # where a package comes from, if not from its own name
    "safetensors": "xvit_minimal",
    "tqdm": "xvit_minimal",
    "torchmetrics": "xvit_minimal[dense]",
    "pycocotools": "xvit_minimal[dense]",
}


def require(purpose, *names):
    """Import packages by name. Raises ValueError that says which is missing or broken, and what to
    install."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"{purpose} needs {name}, which cannot be imported ({error}): "
                f'pip install "{EXTRAS.get(name, name)}"'
            ) from error
