# Set-up, the same in every chapter (`make notebooks` writes it): package, seed, style of figures.
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
    clone = f"git clone --quiet --depth 1 --branch {ref} {url} xvit".split()
    pip = [sys.executable, *"-m pip install --quiet --no-deps".split()]  # leaves torch alone
    pip += ["torchmetrics", "lightning-utilities", "pycocotools", "./xvit"]
    if any(subprocess.run(command).returncode for command in (clone, pip)):
        raise ModuleNotFoundError(
            f"could not install {SOURCE}: check the runtime's network, or upload the folder "
            "xvit_minimal/ of the repository next to this notebook"
        )
    importlib.invalidate_caches()
NEEDED = {"torchvision": "torchvision", "einops": "einops", "sklearn": "scikit-learn"}
for name, pip_name in NEEDED.items():
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(
            f"{name} is not installed: run `pip install {pip_name}` and restart the kernel"
        )

import matplotlib.pyplot as plt
import numpy as np
import torch

import xvit_minimal

# one colour for each method
COLOR = {"softmax": "#D55E00", "X-ViT": "#0072B2", "XCA": "#009E73", "other": "#7F7F7F"}
plt.rc("figure", figsize=(6.4, 3.6), dpi=110)
plt.rc("figure.constrained_layout", use=True)
plt.rc("savefig", bbox="tight")
plt.rc("font", size=11)
plt.rc("axes", titlesize=11, grid=True)
plt.rc("axes.spines", top=False, right=False)
plt.rc("grid", alpha=0.25)
plt.rc("lines", linewidth=2)
plt.rc("legend", frameon=False)
# the book's records and weights: above this notebook, or, on Colab, in the clone beside it
places = [Path("xvit"), Path(), *Path.cwd().parents]
BOOK = next((p / "book" for p in places if (p / "_toc.yml").exists()), Path("book"))
torch.manual_seed(0)
torch.set_num_threads(2)  # the same sums in the same order on every machine
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
print(f"xvit_minimal {xvit_minimal.__version__} | torch {torch.__version__} | {device}")
version = tuple(int(part) for part in torch.__version__.split(".")[:2])
assert version >= (2, 6), "the book needs torch 2.6 or newer"
