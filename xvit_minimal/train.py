"""Train an X-ViT, or the same body with another attention.

    python -m xvit_minimal.train                           # drawn shapes, a minute on a laptop
    python -m xvit_minimal.train --data cifar10 --model xvit_nano --epochs 100 --out runs/cifar10
    python -m xvit_minimal.train --task segmentation       # or detection, of the same shapes
    torchrun --nproc-per-node 8 -m xvit_minimal.train ...  # the same command on eight GPUs

A run leaves in its folder:
    weights.safetensors   the averaged weights after the last whole epoch; load_model() reads them
    record.json           command, configuration, commit, versions, hardware, figures, results
    checkpoint.pt         everything needed to go on: start the same command again, and it does
"""

import contextlib
import io
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from .command_line import command, parse
from .distributed import rank, total, world
from .memory import keep_freed_memory
from .recipe import settle
from .record import lock, peak_memory, provenance
from .resume import agreed, fingerprints, last_checkpoint
from .run import Run
from .tasks import TASKS, describe
from .weights import load_model

__all__ = ["Run", "load_model", "main", "train"]


def train(config):
    """Train the model that a Config describes, or go on with its run in the folder `config.out`;
    returns the record.

    It trains on "train", scores epochs on "val", and looks at "test" once, when the run ends. A run
    that has ended goes on if `epochs` has grown: from the step that it reached, at the rate that
    the longer run has there. It seeds torch's global generators. Ctrl-C, or a signal to end, ends
    it with a checkpoint and KeyboardInterrupt, before the next micro-batch. Raises ValueError for
    input that does not fit, FloatingPointError if a number is no longer finite, OSError if a file
    cannot be written; the last good checkpoint stays in each case.
    """
    device = _start(config)
    TASKS[config.task].check(config)
    with _signals(signal.default_int_handler), _alone(config.out):
        state, path = last_checkpoint(config.out, Run.KEYS)
        if state is None and config.init:
            load_model(config.init)  # refused now, and not after the data are loaded
        sets = load_sets(config)
        if state is None:
            chosen, lines = settle(config, sets["train"])
            chosen = replace(chosen, amp=_amp(device) if chosen.amp is None else chosen.amp)
        else:
            chosen = agreed(state, config, fingerprints(config, sets))
            lines = [f"going on after step {state['step']}, from {path}"]
        compiled = device.type == "cuda" if chosen.compile is None else chosen.compile
        chosen = replace(chosen, device=device.type, compile=compiled)
        lines = notes(sets) + lines
        if rank() == 0:
            print(*lines, sep="\n", end="\n" if lines else "", flush=True)
        check_parts(chosen, sets)
        sets = {name: images.to(device) for name, images in sets.items()}
        run = Run(chosen, sets, device, config, about(config, chosen, sets, device), state)
        if state is None:
            run.save()  # a folder that cannot be written is found out now, and not after an epoch
        go_on(run)
        return run.record()


def go_on(run):
    """Train a run to its end. Raises KeyboardInterrupt, with a checkpoint, when it is asked to
    stop."""
    if len(run.history) == run.config.epochs:
        for name in run.write_results():
            print(f"{name} was not as this run had left it: made again from its checkpoint")
    watch = Watch(run)
    while len(run.history) < run.config.epochs:
        if run.step < run.steps * (len(run.history) + 1):
            train_epoch(run, watch)
        run.finish_epoch()


def train_epoch(run, watch):
    """The steps that are left in an epoch, with checkpoints on the way."""
    from tqdm import tqdm  # asked for in the task's check

    quiet = True if rank() or sys.stderr is None else None  # None: where no terminal shows it
    steps = tqdm(run.batches(), f"epoch {run.epoch + 1}", leave=False, disable=quiet)
    run.net.train()
    asked = []
    with _signals(lambda number, frame: asked.append(number), once=True):
        for index in steps:
            with watch:
                run.train_step(index, asked)
            if (words := watch.forecast()) and not rank():
                steps.write(words)
            if asked:
                break
            if run.step % 50 == 0:
                run.check()
            if run.step % run.config.save_steps == 0 and run.step % run.steps:
                run.save()  # the last step's follows in finish_epoch
        if asked:
            steps.close()
            run.save()
            raise KeyboardInterrupt


class Watch:
    """Adds up the seconds of a run's steps; `first` holds those of its first four here."""

    def __init__(self, run):
        self.run, self.first, self.told = run, [], False

    def __enter__(self):
        self.begun = time.perf_counter()

    def __exit__(self, *error):
        early = len(self.first) < 4
        if early and self.run.device.type == "cuda":
            torch.cuda.synchronize()  # a GPU works on after its orders are given
        taken = time.perf_counter() - self.begun
        self.run.seconds += taken
        if early:
            self.first.append(taken)

    def forecast(self):
        """What the run will take, in words; once, after the fourth step, otherwise None."""
        if self.told or len(self.first) < 4:
            return None
        self.told = True
        return estimate(self.run, min(self.first))


def estimate(run, seconds):
    """What a run will take, in words, from the seconds of a step. A score costs about a third of a
    step for each picture: a forward pass of three passes."""
    left = run.steps * run.config.epochs - run.step
    pictures = len(run.sets["test"])
    if "val" in run.sets:
        looks = (run.config.epochs - len(run.history)) / run.config.eval_epochs
        pictures += looks * len(run.sets["val"])
    per_picture = seconds / min(run.config.batch_size, len(run.train_set))
    total = left * seconds + pictures * per_picture / 3
    unit, size = next(u for u in UNITS if total >= u[1] or u is UNITS[-1])
    memory = peak_memory(run.device)
    words = f"the {left:,} steps that are left take about {total / size:.1f} {unit}"
    return words + (f" and {memory / 1e9:.1f} GB" if memory else "")


UNITS = (("days", 86_400), ("hours", 3600), ("minutes", 60), ("seconds", 1))


def load_sets(config):
    """{"train", "test", and with a holdout "val"}: the ImageSets of a run. The first process alone
    downloads."""
    load = TASKS[config.task].load
    if rank():
        dist.barrier()
    sets = {"train": load(config, "train" if config.holdout else "train+val", config.limit)}
    if config.holdout:
        sets["val"] = load(config, "val", None)
    sets["test"] = load(config, "test", None)
    if dist.is_initialized() and not rank():
        dist.barrier()
    return sets


def check_parts(config, sets):
    """Raises ValueError if the sets cannot be shared among the processes."""
    batch = min(config.batch_size, len(sets["train"]))
    if batch // world() < 2:
        raise ValueError(
            f"got steps of {batch} pictures for {world()} processes, expected at least 2 for each: "
            "give more pictures, a larger --batch-size or fewer processes"
        )
    for name, images in sets.items():
        if len(images) < world():
            raise ValueError(
                f"got {len(images)} pictures in the {name} split for {world()} processes, expected "
                "one for each at least: add pictures or start fewer processes"
            )


def about(wanted, config, sets, device):
    """What a record says of a run from its start."""
    return {
        "kind": "train",
        "command": command(wanted),
        "config": asdict(config),
        "seed": config.seed,
        **provenance(device),
        "data": {
            "name": config.data,
            "copy": "; ".join(f"{name}: {images.copy}" for name, images in sets.items()),
            "splits": {name: len(images) for name, images in sets.items()},
            "notes": notes(sets),
        },
    }


def notes(sets):
    """What was passed over, left out or never seen while the sets were read, a line each."""
    return [f"{name}: {line}" for name, images in sets.items() for line in images.notes]


def main():
    """The command line: python -m xvit_minimal.train --help."""
    config = None
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):  # letters that a terminal has no code for
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        config = parse()
        record = train(config)
        _say(record, config)
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; {_how_to_go_on(config)}")
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # no second complaint at the end
        sys.exit(f"stopped: nobody reads what this program prints; {_how_to_go_on(config)}")
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
    if dist.is_initialized():
        dist.destroy_process_group()


def _how_to_go_on(config):
    if config and (path := Path(config.out) / "checkpoint.pt").exists():
        return f"the same command goes on from {path}"
    return "no step was made yet, so the same command starts anew"


def _say(record, config):
    if rank():
        return
    scores = {key.removeprefix("test_"): v for key, v in record["results"][0].items()}
    pictures, name = record["data"]["splits"]["test"], TASKS[config.task].score
    words = f"{name} not a number" if scores[name] is None else describe(config.task, scores)
    print(f"{words}, on {pictures:,} test images, in {config.out}/record.json")
    if config.data == "shapes" and config.task == "classification":
        print(
            "next: --attention none --class-depth 0 --no-lpi --out runs/none, to see what is left "
            "when no token sees another;\n--data cifar10, for real images; --help, for every option"
        )


def _start(config):
    """The device to train on, tried out; under torchrun, which sets RANK, joins the other processes
    first. Raises ValueError if there is no such device."""
    gpu = torch.cuda.is_available()
    name = config.device or ("cuda" if gpu else "cpu")
    if name.startswith("cuda") and not gpu:
        raise ValueError(
            f"got --device {name}, but torch {torch.__version__} finds no GPU here: leave --device "
            "out"
        )
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"got --device {name}, which cannot be used here ({reason:.150}): leave --device out"
        ) from error
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda" and dist.is_initialized():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    elif device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def _amp(device):
    """Whether a device multiplies bfloat16 faster than float32.

    A CPU is timed, for its flags do not tell: on one with AVX512-BF16 a product took twice as long
    in bfloat16. With several processes it has to be faster in all of them.
    """
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # not every torch has both
    faster = any(getattr(torch.cpu, name, bool)() for name in asked) and (
        1.2 * _product_seconds(torch.bfloat16) < _product_seconds(torch.float32)
    )
    return total(torch.tensor(float(faster))).item() == world()


def _product_seconds(dtype):
    """The least time of ten products of the size that a small model has."""
    x, weight = torch.ones(2048, 128, dtype=dtype), torch.ones(128, 384, dtype=dtype)
    times = []
    for _ in range(10):
        begun = time.perf_counter()
        x @ weight
        times.append(time.perf_counter() - begun)
    return min(times)


@contextlib.contextmanager
def _alone(folder):
    """The lock of a run's folder; the first process takes it for all."""
    with lock(folder) if rank() == 0 else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _signals(handler, once=False):
    """Ctrl-C, a termination signal and a terminal that closes are for `handler` meanwhile, but for
    those that are ignored, as under nohup; with `once` a second one is for who had it before."""
    before = {}

    def handle(number, frame):
        if once:
            signal.signal(number, before[number])
        handler(number, frame)

    if threading.current_thread() is threading.main_thread() and not dist.is_initialized():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # no SIGHUP on Windows
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


if __name__ == "__main__":
    main()
