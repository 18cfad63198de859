# Set-up, the same in every chapter (`make notebooks` writes it): the package, the seed, the style of the figures.
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

SOURCE = "https://github.com/OWNER/REPOSITORY@REF"
if importlib.util.find_spec("xvit_minimal") is None:
    if "google.colab" not in sys.modules:
        raise ModuleNotFoundError(
            "xvit_minimal is not installed: run `make book` in the repository's root and choose "
            "its .venv as the kernel, or run `pip install --no-deps -e .` there"
        )
    url, ref = SOURCE.rsplit("@", 1)
    clone = ["git", "clone", "--quiet", "--depth", "1", "--branch", ref, url, "xvit"]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",  # leaves Colab's torch alone
        "torchmetrics",
        "lightning-utilities",
        "pycocotools",
        "./xvit",
    ]
    if any(subprocess.run(command).returncode for command in (clone, pip)):
        raise ModuleNotFoundError(
            f"could not install {SOURCE}: check the runtime's network, or upload the folder "
            "xvit_minimal/ of the repository next to this notebook"
        )
    importlib.invalidate_caches()
for name, pip_name in [
    ("torchvision", "torchvision"),
    ("einops", "einops"),
    ("sklearn", "scikit-learn"),
]:
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(
            f"{name} is not installed: run `pip install {pip_name}` and restart the kernel"
        )

import matplotlib.pyplot as plt
import torch

import xvit_minimal

COLOR = {
    "softmax": "#D55E00",
    "X-ViT": "#0072B2",
    "XCA": "#009E73",
    "other": "#7F7F7F",
}  # one colour for each method
plt.rcParams.update(
    {
        "figure.figsize": (6.4, 3.6),
        "figure.dpi": 110,
        "savefig.bbox": "tight",
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "lines.linewidth": 2,
        "legend.frameon": False,
        "image.cmap": "viridis",
    }
)
# where the records and weights of the book are: above this notebook, or, on Colab, in the clone beside it
BOOK = next(
    (p / "book" for p in (Path("xvit"), Path(), *Path.cwd().parents) if (p / "_toc.yml").exists()),
    Path("book"),
)
torch.manual_seed(0)
torch.set_num_threads(2)  # the same sums in the same order on every machine
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
print(f"xvit_minimal {xvit_minimal.__version__} | torch {torch.__version__} | {device}")
assert tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 6), (
    "the book needs torch 2.6 or newer"
)
