"""What a run leaves behind: files written whole, checkpoints that are read without running code,
and where a number came from."""

import contextlib
import hashlib
import io
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision


def write(path, content, keep=None):
    """Write bytes to a file, whole or not at all; what stood there before becomes the file `keep`.

    Raises OSError if the disk is full or the folder cannot be written; the old file is then as it
    was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:  # Ctrl-C as well
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say where
            error.filename = str(path)
        raise
    if keep and path.exists():
        path.replace(keep)
    part.replace(path)


def checkpoint_bytes(state):
    """What torch.save writes of a dictionary, and 32 bytes more: its SHA-256, as torch.load would
    not notice a byte that has changed."""
    torch.save(state, buffer := io.BytesIO())
    content = buffer.getvalue()
    return content + hashlib.sha256(content).digest()


def read_checkpoint(path, keys):
    """The dictionary in a file of `checkpoint_bytes`. Raises ValueError if the file is damaged, has
    other keys than `keys`, or holds anything but tensors, numbers, text and containers of them: a
    pickle that would run code is never run."""
    content = Path(path).read_bytes()
    whole = hashlib.sha256(content[:-32]).digest() == content[-32:]
    try:
        buffer = io.BytesIO(content[:-32] if whole else content)
        state = torch.load(buffer, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a broken file provokes
        raise ValueError(
            f"refused {path}: damaged, or no checkpoint ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or not {"model", "optimizer"} <= set(state):
        raise ValueError(f"refused {path}: no checkpoint of this program")
    if set(state) != set(keys):
        raise ValueError(
            f"refused {path}: written by another version of this package, which alone can go on "
            "with it"
        )
    if not whole:
        raise ValueError(f"refused {path}: damaged (its checksum is another)")
    return state


@contextlib.contextmanager
def lock(folder):
    """Makes a folder, and keeps every other process that asks for its lock out until the end.

    The system gives the lock back when the process ends, however it does; so none is ever stale.
    Raises ValueError if another process has it, or a file has its name; OSError if the folder
    cannot be written. (Windows has no such locks: start a command only once there.)
    """
    path = Path(folder) / "run.lock"
    if os.path.lexists(folder) and not os.path.isdir(folder):  # a link that leads nowhere as well
        raise ValueError(f"{folder} is no folder, expected one for the run: choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    file = _locked(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is still locked: nobody else's is taken away
        file.close()


def _locked(path):
    import fcntl  # not there on Windows

    while True:
        file = open(path, "ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        except BlockingIOError:
            file.close()
            raise ValueError(
                f"another run is using {path.parent}: wait until it has ended, or choose another "
                "--out"
            ) from None
        except OSError as error:
            print(f"{path}: no lock here ({error.strerror}): start this command only once")
            return file
        file.close()  # of a run that has just ended and taken its file away: once more


# Raised whenever a change makes the same command train another model: records of a lower one are
# stale. 1 chose on the test set; 2 holds validation pictures out, and trains with Muon.
CODE = 2


def provenance(device):
    """{"code", "commit", "versions", "hardware"}: which code ran, on what. The commit is None
    outside a git checkout, and ends in -dirty if the package has changes that are not committed."""
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # TorchVersion is not text to a checkpoint
        "torchvision": str(torchvision.__version__),
        "numpy": np.__version__,
    }
    gpu = driver = None
    if torch.device(device).type == "cuda":
        gpu = torch.cuda.get_device_name()
        asked = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # a GPU of another maker
            driver = _output(*asked).split()[0]
    return {
        "code": CODE,
        "commit": _commit(),
        "versions": versions,
        "hardware": {"cpu": _cpu(), "cores": torch.get_num_threads(), "gpu": gpu, "driver": driver},
    }


def peak_memory(device):
    """Bytes at the peak: of the GPU's memory that PyTorch held, or of the whole process on a CPU
    (None on Windows)."""
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
