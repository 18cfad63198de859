"""What a run leaves behind: files written whole, checkpoints that are read without running code, and where a number came from."""

import contextlib
import os
import platform
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision


def write(path, content, keep=None):
    """Write bytes to a file, whole or not at all; what stood there before becomes the file `keep`.

    Raises OSError if the disk is full or the folder cannot be written; the old file is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    if keep and path.exists():
        path.replace(keep)
    part.replace(path)


def read_checkpoint(path, keys):
    """The dictionary in a file of torch.save. Raises ValueError if the file is damaged, has other keys than `keys`, or
    holds anything but tensors, numbers, text and containers of them: a pickle that would run code is never run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a broken file provokes
        raise ValueError(
            f"refused {path}: damaged, or no checkpoint ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or set(state) != set(keys):
        raise ValueError(f"refused {path}: no checkpoint of this program")
    return state


def random_state():
    """The state of every random number generator (torch's, each GPU's, NumPy's, Python's), as tensors and numbers."""
    name, numbers, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, numbers.tolist(), *rest],
        "python": random.getstate(),
    }


def set_random_state(state):
    """Put every generator back to where `random_state` found it."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(tuple(state["numpy"]))
    random.setstate(state["python"])


def provenance(device):
    """{"commit", "versions", "hardware"}: which code ran, on what. The commit is None outside a git checkout, and ends in
    -dirty if the package has changes that are not committed."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
    }
    gpu = driver = None
    if torch.device(device).type == "cuda":
        gpu = torch.cuda.get_device_name()
        with contextlib.suppress(
            OSError, subprocess.CalledProcessError
        ):  # not every GPU is NVIDIA's
            driver = _output(
                "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
            ).split()[0]
    return {
        "commit": _commit(),
        "versions": versions,
        "hardware": {"cpu": _cpu(), "cores": torch.get_num_threads(), "gpu": gpu, "driver": driver},
    }


def peak_memory(device):
    """Bytes at the peak: of the GPU's memory that PyTorch held, or of the whole process on a CPU (None on Windows)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource  # not there on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpu():
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit():
    package = str(Path(__file__).parent)
    try:
        if _output("git", "-C", package, "ls-files", "--", __file__) == "":
            return None  # installed somewhere inside another repository
        changed = _output("git", "-C", package, "status", "--porcelain", "--", ".")
        return _output("git", "-C", package, "rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
