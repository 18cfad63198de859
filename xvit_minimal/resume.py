"""What a run goes on from: the last good checkpoint, if it is of the same command and the same
data."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist

from .distributed import rank, world
from .recipe import Config
from .record import read_checkpoint

MACHINE = ("device", "compile", "micro_batch")  # options that say how a run computes, and not what
PLACES = ("out", "data", "init")  # and where files are, which may be moved: their content counts


def fingerprints(config, sets):
    """What tells these sets, and the file that --init names, from others; numbers and text."""
    found = {}
    for name, images in sets.items():
        found[name] = {
            "pictures": len(images),
            "classes": list(images.classes),
            "digest": images.fingerprint,
        }
    if config.init and Path(config.init).is_file():
        found["init"] = {"digest": hashlib.sha256(Path(config.init).read_bytes()).hexdigest()}
    return found


def last_checkpoint(folder, keys):
    """(state, path) of the last checkpoint in a folder that can be read, (None, None) without any.
    One that cannot be read is put aside if the one before it can. Raises ValueError if none of them
    can."""
    folder, refused = Path(folder), None
    for path in (folder / "checkpoint.pt", folder / "checkpoint.previous.pt"):
        if not path.exists():
            continue
        try:
            state = read_checkpoint(path, keys)
        except ValueError as error:
            refused = refused or error
            continue
        if dist.is_initialized():
            dist.barrier()  # the others have read, too
        if rank() == 0 and refused:
            (folder / "checkpoint.pt").replace(folder / "checkpoint.refused.pt")
            print(f"{refused}; put aside as checkpoint.refused.pt")
        return state, path
    if refused:
        raise ValueError(f"{refused}: move it away to start anew, or choose another --out")
    return None, None


def agreed(state, wanted, data):
    """The Config with which the run in a checkpoint's state goes on: what was chosen for it at its
    start stays.

    Raises ValueError for another configuration than the run's (but more epochs, another device,
    another size of micro-batches and another place of the same data are allowed), other data, or
    another number of processes.
    """
    given, then = asdict(wanted), state["wanted"]
    if set(given) != set(then):
        raise ValueError(
            f"{wanted.out} holds a run of another version of this package: go on with that "
            "version, or choose another --out"
        )
    changed = []
    for key, value in given.items():
        moved = key in PLACES and None not in (value, then[key])
        if key not in (*MACHINE, "epochs") and not moved and then[key] != value:
            changed.append(f"--{key.replace('_', '-')} is {then[key]!r} there and {value!r} here")
    free = {key: given[key] for key in ("out", *MACHINE)}
    epochs = state["options"]["epochs"]
    if wanted.epochs is not None:
        free["epochs"] = wanted.epochs
        if wanted.epochs < epochs:
            changed.append(f"--epochs is {epochs} there and {wanted.epochs} here, which is less")
    changed += other_data(state["data"], data)
    if state["processes"] != world():
        changed.append(f"{state['processes']} processes there and {world()} here")
    if changed:
        raise ValueError(
            f"{wanted.out} holds another run ({'; '.join(changed)}): give that run's own command "
            "to go on with it, or choose another --out"
        )
    return replace(Config(**state["options"]), **free)


def other_data(there, here):
    """What differs between the `fingerprints` of two runs, in words."""
    found = []
    for name in there:
        if name not in here:  # a file for --init is not needed any more
            continue
        a, b = there[name], here[name]
        if a["digest"] == b["digest"]:
            continue
        words = [
            f"{key} {a[key]} there and {b[key]} here"
            for key in ("pictures", "classes")
            if a.get(key) != b.get(key)
        ]
        found.append(f"other data: {name}: {', '.join(words) or 'other content'}")
    return found
