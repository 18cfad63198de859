"""How much memory a step takes and how much there is: from these follows the size of a
micro-batch."""

import contextlib
import copy
import ctypes
import os
import sys
from pathlib import Path

import torch


def keep_freed_memory():
    """Let this process keep the memory that it frees.

    Linux's malloc otherwise gives a large block back to the system, which clears its pages anew
    when the next layer asks for as much. Elsewhere this does nothing.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # a malloc that is not glibc's
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: no block has pages of its own
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: up to 2 GB stay when they are free


def free_memory(device):
    """Bytes that can still be taken on a device: of a GPU's memory, or of the machine's, as far as
    control groups (containers, batch systems) leave it to this process. None where nothing
    tells."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    if device.type != "cpu":
        return None
    rooms = [*_machine_room(), *_control_group_rooms()]
    return min(rooms, default=None)


def memory_per_picture(task, model, batch):
    """Bytes that a loss keeps for its backward pass, for each picture of a small batch (see
    `task.batch`).

    A copy of the model computes the loss, so that nothing changes, BatchNorm's statistics included.
    """
    model = copy.deepcopy(model).train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = task.loss(model, batch)  # holds what is kept until the sum is taken
    total, _ = sum(kept.values()), loss
    return total / len(batch[0])


def room_for_a_step(device):
    """Bytes that the pictures computed at once may take: half of the free memory, and on a CPU at
    most 2 GB, where more is no faster, and Ctrl-C waits until they are done. None where nothing
    tells."""
    free = free_memory(device)
    if free is None:
        return None
    return min(free / 2, 2e9) if torch.device(device).type == "cpu" else free / 2


def micro_batch(pictures, per_picture, room):
    """How many of a step's pictures a process takes at once: as many as fit into `room` bytes, and
    2 at least. A picture's part of the peak is taken for 1.5 times what it keeps: it was 1.3 to
    1.45 times in all three tasks, with softmax, X-ViT and XCA. Without a room, all."""
    if room is None:
        return pictures
    return min(pictures, max(2, int(room / (1.5 * max(per_picture, 1)))))


def _machine_room():
    with contextlib.suppress(OSError, IndexError, ValueError):
        text = Path("/proc/meminfo").read_text()
        return [1024 * int(text.split("MemAvailable:")[1].split()[0])]
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not on Windows
        return [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2]
    return []


def _control_group_rooms():
    """What is left of each limit above this process, of control groups of version 2 or 1."""
    rooms = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers == "":
                root, limit, used = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
            elif "memory" in controllers.split(","):
                root = Path("/sys/fs/cgroup/memory")
                limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
            else:
                continue
            folder = root / group.lstrip("/")
            for place in (folder, *folder.parents):
                with contextlib.suppress(
                    OSError, ValueError
                ):  # the root has no files, "max" no end
                    left = int((place / limit).read_text()) - int((place / used).read_text())
                    rooms.append(max(0, left + _reclaimable(place)))
                if place == root:
                    break
    return rooms


def _reclaimable(group):
    """Bytes of cached files that a control group counts as used, and gives up when asked."""
    for line in (group / "memory.stat").read_text().splitlines():
        name, number = line.split()
        if name in ("inactive_file", "total_inactive_file"):
            return int(number)
    return 0
