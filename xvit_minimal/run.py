"""A training run: what changes while a model trains, the step that changes it, and the files it
leaves."""

import contextlib
import json
import math
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from .distributed import rank, synchronize_batch_norms, total, world
from .each_picture import DETAILS
from .memory import memory_per_picture, micro_batch, room_for_a_step
from .optimization import Optimizer, averaging, learning_rate
from .record import checkpoint_bytes, peak_memory, write
from .resume import fingerprints
from .tasks import TASKS
from .weights import start_from, weights_file


class Run:
    """A training run in the folder `config.out`: its ImageSets and everything that changes while a
    model trains.

    `sets`: {"train": ..., "val": ..., "test": ...}; without "val" no epoch is scored. `wanted`: the
    Config as it was given, before anything was chosen for it. `about`: what the record says of the
    run from its start. `state`: that of a checkpoint, to go on from it.
    """

    # A checkpoint holds what these names name, and nothing else.
    PARTS = ("model", "ema", "optimizer")  # each with a state_dict of its own
    PROGRESS = (
        "step",
        "seconds",
        "peak",
        "started",
        "history",
        "loss",
        "results",
        "segments",
        "micro_batch",
    )
    IDENTITY = ("wanted", "options", "data", "processes", "about")
    KEYS = PARTS + PROGRESS + IDENTITY

    def __init__(self, config, sets, device, wanted=None, about=None, state=None):
        self.config, self.sets, self.device = config, sets, device
        self.about = {**(about or {}), "config": asdict(config)}
        self.wanted, self.options = asdict(wanted or config), asdict(config)
        self.data, self.processes = fingerprints(config, sets), world()
        self.train_set = sets["train"]
        self.steps = len(self.order(0))  # of an epoch
        self.task = TASKS[config.task](config, self.train_set)
        self.size = self.task.size
        torch.manual_seed(config.seed)  # the same first weights in every process
        self.model = self.task.model(config, len(self.train_set.classes), self.size).to(device)
        if config.init and state is None:
            start_from(self.model, config.init)
        parameters, multiply_adds = self.task.cost(self.model, self.size)
        self.about |= {"parameters": parameters, "multiply_adds": multiply_adds}
        if dist.is_initialized():
            synchronize_batch_norms(self.model)
        average = averaging(config.ema)
        self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.optimizer = Optimizer(config.optimizer, self.model, config.weight_decay)
        self.step, self.seconds, self.peak, self.history = 0, 0.0, 0, []
        self.started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.loss = 0.0  # the sum over this epoch's pictures, of all processes
        self.results = {}  # what the test set says, once the run has ended
        self.segments = [{"step": 0, "epochs": config.epochs}]
        self.micro_batch = config.micro_batch
        if state is not None:
            self.load_state_dict(state)
        self.parallel = DistributedDataParallel(self.model) if dist.is_initialized() else None
        self.net = self.parallel or self.model
        if config.compile:
            self.net = torch.compile(self.net)
        self.sums = torch.zeros((), device=device)  # of the losses since `loss` was last known
        self._choose_micro_batch()

    @property
    def epoch(self):
        """How many epochs' steps are done."""
        return self.step // self.steps

    def order(self, epoch):
        """The index tensors of an epoch's steps, each that of all processes together. The last one
        is smaller than the others if it has to be; one that would leave a process less than two
        pictures, which BatchNorm needs, joins the one before."""
        # drawn from the seed and the epoch, so that no order has to be saved
        shuffle = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train_set), generator=shuffle)
        batches = list(order.split(self.config.batch_size))
        if len(batches) > 1 and len(batches[-1]) < 2 * world():
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches

    def batches(self):
        """The index tensors of the steps that are left in this epoch."""
        return self.order(self.epoch)[self.step % self.steps :]

    def train_step(self, index, asked=()):
        """One step of the optimizer on the training pictures `index`, of which this process takes
        its part.

        Returns False, and leaves everything as it was, if `asked` has something in it before the
        last micro-batch begins. The gradient is that of the whole step; BatchNorm's statistics are
        a micro-batch's, and stochastic depth draws for each micro-batch.
        """
        torch.manual_seed(step_seed(self.config.seed, self.step, rank()))
        loss = self._gradient(index, asked)
        if loss is None:
            return False
        self.optimizer.step(learning_rate(self.step, self.config, self.steps))
        self.ema.update_parameters(self.model)
        self.sums += loss * len(index) / world()  # a process's part of the step's sum
        self.step += 1
        self._look_at_memory()
        return True

    def _gradient(self, index, asked):
        """Leave a step's gradient in the parameters, micro-batch by micro-batch; returns this
        process's part of the loss (). Or, if `asked`, leave nothing and return None."""
        mine = index[rank() :: world()]
        batch = self.task.batch(self.train_set, mine, self.epoch, self.device)
        largest = math.ceil(len(index) / world())  # so that all processes cut into as many parts
        parts = cut(batch, math.ceil(largest / self.micro_batch))
        weights = [torch.as_tensor(self.task.weight(part)) for part in parts]
        weights = torch.stack(weights).float().to(self.device)  # (parts,)
        shares = weights / (total(weights.sum()) / world()).clamp(min=1)  # (parts,)
        buffers = [buffer.clone() for buffer in self.model.buffers()] if len(parts) > 1 else []
        loss = torch.zeros((), device=self.device)
        self.optimizer.zero_grad()
        for n, (part, share) in enumerate(zip(parts, shares)):
            if n and asked:
                self._undo(buffers)
                return None
            with self._waiting(n + 1 < len(parts)):
                part_loss = share * self.task.loss(self.net, part)
                part_loss.backward()
            loss += part_loss.detach()
        return loss

    def _waiting(self, more):
        """Where more of the step is to come, processes need not exchange gradients yet."""
        return self.parallel.no_sync() if more and self.parallel else contextlib.nullcontext()

    def _choose_micro_batch(self):
        """How many pictures a process computes at once, if neither the Config nor a checkpoint says
        it."""
        if self.micro_batch is not None:
            return
        steps = self.order(0)
        few = self.task.batch(self.train_set, steps[0][:2], 0, self.device)
        kept = memory_per_picture(self.task, self.model, few)
        most = math.ceil(max(len(step) for step in steps) / world())
        found = micro_batch(most, kept, room_for_a_step(self.device))
        found = torch.tensor(found, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(found, dist.ReduceOp.MIN)
        self.micro_batch = found.item()
        if self.micro_batch < most and rank() == 0:
            print(
                f"a step keeps about {most * kept / 1e9:,.1f} GB for its backward pass: its "
                f"{most} pictures are computed {self.micro_batch} at a time"
            )

    def _look_at_memory(self):
        self.peak = max(self.peak, peak_memory(self.device) or 0)

    def _undo(self, buffers):
        """Put BatchNorm's statistics back to where they were before a step that is not to be."""
        self.optimizer.zero_grad()
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), buffers):
                buffer.copy_(before)

    def state_dict(self):
        """All that a checkpoint holds, as tensors, numbers and text, which can be read without
        running code. No generator's state is among it: every step seeds its own draws."""
        self._sum_up()
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return parts | {name: getattr(self, name) for name in self.PROGRESS + self.IDENTITY}

    def load_state_dict(self, state):
        """Go on from a checkpoint's state, which `agreed` has compared with this run."""
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        for name in self.PROGRESS:
            if name != "micro_batch" or self.micro_batch is None:
                setattr(self, name, state[name])
        before = self.segments[-1]["epochs"]
        if self.config.epochs > before:
            self._lengthen(before)
        elif len(self.history) == self.config.epochs:
            self.about = state["about"]  # the record stays that of the process that ended the run

    def _lengthen(self, before):
        """More epochs than there were to be: from here on the rate and the mixing are those of the
        longer run at this step."""
        if self.results:
            self.segments[-1]["results"] = self.results
        self.segments.append({"step": self.step, "epochs": self.config.epochs})
        self.results = {}
        old = learning_rate(self.step, replace(self.config, epochs=before), self.steps)
        new = learning_rate(self.step, self.config, self.steps)
        if rank() == 0:
            print(
                f"{self.config.epochs} epochs instead of {before}: from step {self.step} on the "
                f"learning rate is that of the longer run, {new:.3g} instead of {old:.3g}"
            )

    def _sum_up(self):
        """Bring the losses of all processes together in `loss`."""
        self.loss += total(self.sums).item()
        self.sums.zero_()

    def check(self):
        """Raises FloatingPointError if the loss, a weight or a running statistic is not finite."""
        bad = None if self.sums.isfinite() else "the loss"
        for name, tensor in self.model.state_dict().items():
            if bad is None and not tensor.isfinite().all():
                bad = name
        if bad:
            raise FloatingPointError(
                f"{bad} is not finite after step {self.step}: lower --lr or lengthen --warmup, and "
                f"choose another --out; the last good state stays in {self.config.out}"
            )

    def save(self):
        """Write checkpoint.pt, whole or not at all, and keep the one before it; nothing if a number
        is not finite."""
        self.check()
        state = self.state_dict()
        if rank() == 0:
            folder = Path(self.config.out)
            previous = folder / "checkpoint.previous.pt"
            write(folder / "checkpoint.pt", checkpoint_bytes(state), keep=previous)

    def finish_epoch(self):
        """Score the averaged weights, then write weights.safetensors, record.json and a checkpoint,
        in this order: a kill before the last repeats the work since the one before, and writes the
        same."""
        self.save()  # nothing that goes wrong in scoring loses the epoch
        config, epoch = self.config, len(self.history) + 1
        row = {
            "epoch": epoch,
            "lr": learning_rate(self.step, config, self.steps),
            "train_loss": self.loss / len(self.train_set),
            "seconds": self.seconds,
        }
        if "val" in self.sets and (epoch % config.eval_epochs == 0 or epoch == config.epochs):
            row |= self.scores("val")
        if epoch == config.epochs:
            self.results = {"epoch": epoch, **self.scores("test"), **self.details()}
        self.history.append(row)
        self.loss = 0.0
        self._look_at_memory()
        self.write_results()
        self.save()
        if rank() == 0:
            print(self._line(row), flush=True)

    def scores(self, split):
        """{"val_top1": ...}: what the task finds on a split with the averaged weights; None for
        what is not a number, as where nothing was detected. Raises FloatingPointError if that is
        the loss."""
        found = self.task.evaluate(self.ema.module, self.sets[split], self.config.amp)
        if not math.isfinite(found.get("loss", 0.0)):
            raise FloatingPointError(
                f"the loss on the {split} pictures is not finite after step {self.step}: lower "
                f"--lr, and choose another --out; the last good weights stay in {self.config.out}"
            )
        finite = {key: value if math.isfinite(value) else None for key, value in found.items()}
        return {f"{split}_{key}": value for key, value in finite.items()}

    def details(self):
        """What a record holds of each test picture."""
        of_each = DETAILS[self.config.task]
        found = of_each(self.ema.module, self.sets["test"], self.config.amp)
        return {f"test_{key}": value for key, value in found.items()}

    def _line(self, row):
        name = f"val_{self.task.score}"
        line = f"epoch {row['epoch']}/{self.config.epochs}  {self.seconds:.0f} s  "
        line += f"train loss {row['train_loss']:.3f}"
        if name in row:
            value = "not a number" if row[name] is None else f"{row[name]:.3f}"
            line += f"  {name.replace('_', ' ')} {value}"
        return line

    def record(self):
        """What record.json holds."""
        scored = [row for row in self.history if f"val_{self.task.score}" in row]
        last = {"epoch": len(self.history)}
        if scored:
            last = {k: v for k, v in scored[-1].items() if k == "epoch" or k.startswith("val_")}
        record = {
            **self.about,
            "started": self.started,
            "wall_seconds": self.seconds,
            "peak_memory_bytes": self.peak,
            "epochs": self.history,
            "results": [self.results or last],
        }
        if len(self.segments) > 1:
            record["segments"] = self.segments
        return record

    def write_results(self):
        """Write weights.safetensors and record.json, where they are not there already just so;
        returns the names of those that were not."""
        chosen = [row["val_best_threshold"] for row in self.history if "val_best_threshold" in row]
        packed = weights_file(
            self.ema.module,
            self.options,
            self.train_set.classes,
            self.size,
            chosen[-1] if chosen else None,
        )
        record = json.dumps(self.record(), indent=1, allow_nan=False).encode() + b"\n"
        contents = {"weights.safetensors": packed, "record.json": record}
        written = []
        for name, content in contents.items():
            path = Path(self.config.out) / name
            if rank() == 0 and not (path.is_file() and path.read_bytes() == content):
                write(path, content)
                written.append(name)
        return written


def step_seed(seed, step, process):
    """The seed of all draws of a step in a process: so a run that was interrupted, or whose steps
    are cut into micro-batches, draws the same as one that was not."""
    return int(np.random.SeedSequence((seed, step, process)).generate_state(1, np.uint64)[0])


def cut(batch, count):
    """A batch, a tuple of fields with an entry for each picture, in `count` parts that differ by
    one picture at most."""
    index = torch.arange(len(batch[0])).tensor_split(count)
    ends = [(part[0].item(), part[-1].item() + 1) for part in index]
    return [
        tuple(None if field is None else field[start:end] for field in batch) for start, end in ends
    ]
