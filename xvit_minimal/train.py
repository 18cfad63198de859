"""Train an X-ViT, or the same body with another attention.

    python -m xvit_minimal.train                                      # drawn shapes, about a minute on a laptop
    python -m xvit_minimal.train --data cifar10 --model xvit_nano --epochs 100 --out runs/cifar10
    python -m xvit_minimal.train --task segmentation                  # or detection, of the same shapes
    torchrun --nproc-per-node 8 -m xvit_minimal.train ...             # the same command on eight GPUs

A run leaves in its folder:
    weights.safetensors   the averaged weights after the last whole epoch; load_model() reads them
    record.json           command, configuration, commit, versions, hardware, every epoch's figures, results
    checkpoint.pt         everything needed to go on: start the same command again, and it does
"""

import contextlib
import io
import json
import os
import random
import signal
import sys
import threading
import time
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from .command_line import command, parse
from .distributed import rank, synchronize_batch_norms, total, world
from .optimization import averaging, learning_rate, parameter_groups
from .recipe import settle
from .record import peak_memory, provenance, random_state, read_checkpoint, set_random_state, write
from .tasks import TASKS, describe
from .weights import load_model, start_from, weights_file


class Run:
    """A training run in the folder `config.out`: the two ImageSets and everything that changes while a model trains."""

    KEYS = (
        "model",
        "ema",
        "optimizer",
        "schedule",
        "config",
        "step",
        "seconds",
        "peak",
        "started",
        "history",
        "processes",
    )

    def __init__(self, config, train_set, test_set, device):
        self.config, self.device, self.train_set, self.test_set = (
            config,
            device,
            train_set,
            test_set,
        )
        self.steps = max(
            1, len(train_set) // config.batch_size
        )  # of an epoch; a last, smaller batch is left out
        height, width = train_set.images.shape[-2:]
        self.size = width if width == height else (height, width)
        self.task = TASKS[config.task](config, train_set)
        torch.manual_seed(config.seed)  # the same first weights in every process
        self.model = self.task.model(config, len(train_set.classes), self.size).to(device)
        if config.init and not self._path("checkpoint.pt").exists():
            start_from(self.model, config.init)
        if dist.is_initialized():
            synchronize_batch_norms(self.model)
        self.ema = AveragedModel(self.model, multi_avg_fn=averaging(config.ema), use_buffers=True)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay), lr=1.0
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda n: learning_rate(n, config, self.steps)
        )
        self.net = DistributedDataParallel(self.model) if dist.is_initialized() else self.model
        if config.compile:
            self.net = torch.compile(self.net)
        self.step, self.seconds, self.peak, self.history = 0, 0.0, 0, []
        self.started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.loss = torch.zeros((), device=device)  # the sum over the steps of this epoch
        for seed in (
            random.seed,
            np.random.seed,
            torch.manual_seed,
        ):  # from here on each process draws its own numbers
            seed(config.seed + rank())

    @property
    def epoch(self):
        """How many epochs are done."""
        return self.step // self.steps

    def batches(self):
        """The index tensors of the steps that are left in this epoch, the part of each that belongs to this process."""
        shuffle = torch.Generator().manual_seed(
            self.config.seed * 1_000_003 + self.epoch
        )  # so no order has to be saved
        order = torch.randperm(len(self.train_set), generator=shuffle).split(
            self.config.batch_size
        )[: self.steps]
        return [index[rank() :: world()] for index in order[self.step % self.steps :]]

    def train_step(self, index):
        """One step of the optimizer on the training images `index`."""
        batch = self.task.batch(self.train_set, index, self.epoch, self.device)
        loss = self.task.loss(self.net, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.ema.update_parameters(self.model)
        self.loss += loss.detach()
        self.step += 1

    def state_dict(self):
        """All that a checkpoint holds, as tensors, numbers and text, which can be read without running code."""
        mine = {"random": random_state(), "loss": self.loss.item()}
        processes = [mine] * world()
        if dist.is_initialized():
            dist.all_gather_object(processes, mine)
        parts = {
            name: getattr(self, name).state_dict()
            for name in ("model", "ema", "optimizer", "schedule")
        }
        numbers = {
            name: getattr(self, name) for name in ("step", "seconds", "peak", "started", "history")
        }
        return {**parts, **numbers, "config": asdict(self.config), "processes": processes}

    def load_state_dict(self, state):
        """Raises ValueError if the state is that of another configuration, or of another number of processes."""
        mine = asdict(self.config)
        changed = [
            f"--{key} is {state['config'].get(key)!r} there and {value!r} here"
            for key, value in mine.items()
            if key not in ("out", "device") and state["config"].get(key) != value
        ]
        if len(state["processes"]) != world():
            changed.append(f"{len(state['processes'])} processes there and {world()} here")
        if changed:
            raise ValueError(
                f"{self.config.out} holds another run ({'; '.join(changed)}): give that run's own command to go "
                "on with it, or choose another --out"
            )
        for name in ("model", "ema", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("step", "seconds", "peak", "started", "history"):
            setattr(self, name, state[name])
        self.loss.fill_(state["processes"][rank()]["loss"])
        set_random_state(state["processes"][rank()]["random"])

    def check(self):
        """Raises FloatingPointError if the loss or a weight is not finite."""
        bad = (
            "the loss"
            if not self.loss.isfinite()
            else next(
                (name for name, p in self.model.named_parameters() if not p.isfinite().all()), None
            )
        )
        if bad:
            raise FloatingPointError(
                f"{bad} is not finite after step {self.step}: lower --lr or lengthen --warmup, and choose "
                f"another --out; the last good state stays in {self.config.out}"
            )

    def save(self):
        """Write checkpoint.pt, whole or not at all, and keep the one before it; nothing if a number is not finite."""
        self.check()
        self.peak = max(self.peak, peak_memory(self.device) or 0)
        state = self.state_dict()
        if rank() == 0:
            torch.save(state, buffer := io.BytesIO())
            write(
                self._path("checkpoint.pt"),
                buffer.getbuffer(),
                keep=self._path("checkpoint.previous.pt"),
            )

    def resume(self):
        """Go on from the last checkpoint that can be read; one that cannot is refused, and put aside."""
        refused = None
        for path in (self._path("checkpoint.pt"), self._path("checkpoint.previous.pt")):
            if not path.exists():
                continue
            try:
                state = read_checkpoint(path, self.KEYS)
            except ValueError as error:
                refused = refused or error
                continue
            self.load_state_dict(state)
            if dist.is_initialized():
                dist.barrier()  # the others have read, too
            if refused and rank() == 0:
                self._path("checkpoint.pt").replace(self._path("checkpoint.refused.pt"))
                print(f"{refused}; put aside as checkpoint.refused.pt")
            return print(f"going on after step {self.step}, from {path}") if rank() == 0 else None
        if refused:
            raise ValueError(f"{refused}: move it away to start anew, or choose another --out")

    def finish_epoch(self, record):
        """Evaluate the averaged weights, then write weights.safetensors, record.json and a checkpoint, in this order."""
        self.check()
        config, train_loss = self.config, total(self.loss).item() / world() / self.steps
        row = {
            "epoch": self.epoch,
            "lr": self.schedule.get_last_lr()[0],
            "train_loss": train_loss,
            "seconds": self.seconds,
        }
        if self.epoch % config.eval_epochs == 0 or self.epoch == config.epochs:
            row |= {
                f"test_{key}": value
                for key, value in self.task.evaluate(
                    self.ema.module, self.test_set, config.amp
                ).items()
            }
        self.history.append(row)
        if rank() == 0:
            score = f"test_{self.task.score}"
            tested = f"  {score.replace('_', ' ')} {row[score]:.3f}" if score in row else ""
            print(
                f"epoch {self.epoch}/{config.epochs}  {self.seconds:.0f} s  train loss {train_loss:.3f}{tested}",
                flush=True,
            )
            packed = weights_file(
                self.ema.module,
                asdict(config),
                self.train_set.classes,
                self.size,
                row.get("val_best_threshold"),
            )
            write(self._path("weights.safetensors"), packed)
            last = next(
                (
                    {k: v for k, v in r.items() if k.startswith(("epoch", "test"))}
                    for r in reversed(self.history)
                    if score in r
                ),
                {"epoch": 0},
            )
            record = {
                **record,
                "wall_seconds": self.seconds,
                "peak_memory_bytes": self.peak,
                "epochs": self.history,
                "results": [last],
            }
            write(
                self._path("record.json"),
                json.dumps(record, indent=1, allow_nan=False).encode() + b"\n",
            )
        self.loss.zero_()
        self.save()

    def _path(self, name):
        return Path(self.config.out) / name


def train(config):
    """Train the model that a Config describes, or go on with its run in the folder `config.out`; returns the record.

    It seeds every global random number generator. Ctrl-C ends it after the step with a checkpoint and KeyboardInterrupt.
    Raises ValueError for input that does not fit, FloatingPointError if a number is no longer finite, OSError if a file
    cannot be written; the last good checkpoint stays in each case.
    """
    TASKS[config.task].check(config)
    if config.init:
        load_model(config.init)  # refused now, and not after the data are loaded
    from tqdm import tqdm

    device = _start(config)
    gpu = device.type == "cuda"
    wanted, config = (
        config,
        replace(
            config,
            device=device.type,
            compile=gpu if config.compile is None else config.compile,
            amp=gpu and torch.cuda.is_bf16_supported() if config.amp is None else config.amp,
        ),
    )
    if rank():
        dist.barrier()  # the first process alone downloads
    train_set = TASKS[config.task].load(config, "train", config.limit)
    test_set = TASKS[config.task].load(config, "test", None)
    config, chosen = settle(config, train_set)
    for line in chosen:
        print(line)
    if dist.is_initialized() and not rank():
        dist.barrier()
    batch = min(config.batch_size, len(train_set))
    if batch % world() or batch // world() < 2:
        raise ValueError(
            f"got steps of {batch} images for {world()} processes, expected at least 2 for each, and as many for "
            "every one: change --batch-size"
        )
    about = {
        "kind": "train",
        "command": command(wanted),
        "config": asdict(config),
        "seed": config.seed,
        **provenance(device),
        "data": {
            "name": config.data,
            "copy": f"train: {train_set.copy}; test: {test_set.copy}",
            "splits": {"train": len(train_set), "test": len(test_set)},
        },
    }
    run = Run(config, train_set.to(device), test_set.to(device), device)
    run.resume()
    if run.step == 0:
        run.save()  # a folder that cannot be written is found out now, and not after an epoch
    about["parameters"], about["multiply_adds"] = run.task.cost(run.model, run.size)
    with _interruptible() as asked:
        while run.epoch < config.epochs:
            clock, run.net = time.perf_counter(), run.net.train()
            for index in tqdm(
                run.batches(),
                f"epoch {run.epoch + 1}",
                leave=False,
                disable=True if rank() else None,
            ):
                run.train_step(index)
                if run.step % 50 == 0:
                    run.check()
                if run.step % run.steps and (
                    asked or run.step % config.save_steps == 0
                ):  # the last step's follows below
                    run.seconds, clock = (
                        run.seconds + time.perf_counter() - clock,
                        time.perf_counter(),
                    )
                    run.save()
                if asked:
                    break
            run.seconds += time.perf_counter() - clock
            if run.step % run.steps == 0:
                run.finish_epoch({**about, "started": run.started})
            if asked:
                raise KeyboardInterrupt
    return json.loads((Path(config.out) / "record.json").read_text())


def main():
    """The command line: python -m xvit_minimal.train --help."""
    config = parse()
    try:
        record = train(config)
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; the same command goes on from {config.out}/checkpoint.pt")
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
    if rank() == 0:
        scores = {key.removeprefix("test_"): v for key, v in record["results"][0].items()}
        print(
            f"{describe(config.task, scores)}, on {record['data']['splits']['test']:,} test images, "
            f"in {config.out}/record.json"
        )
        if config.data == "shapes" and config.task == "classification":
            print(
                "next: --attention none --class-depth 0 --no-lpi --out runs/none, to see what is left when no token sees "
                "another;\n--data cifar10, for real images; --help, for every option"
            )
    if dist.is_initialized():
        dist.destroy_process_group()


def _start(config):
    """The device to train on; under torchrun, which sets RANK, joins the other processes first."""
    gpu = torch.cuda.is_available() if config.device is None else config.device.startswith("cuda")
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo")
    if gpu and dist.is_initialized():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda" if config.device is None and gpu else config.device or "cpu")


@contextlib.contextmanager
def _interruptible():
    """A list that Ctrl-C or a termination signal fills, so that a step ends before the run does; a second one ends at once."""
    asked, before = [], {}

    def ask(number, frame):
        asked.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread() and not dist.is_initialized():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
