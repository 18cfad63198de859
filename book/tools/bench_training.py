"""Measure training steps on one thread of a CPU: in float32 and in bfloat16, with the memory that
they free given back to the system and kept.

    python book/tools/bench_training.py            a few minutes, recorded in book/runs/bench/
    python book/tools/bench_training.py --quick    the smallest model, one round, not recorded

Giving back or keeping is a matter of a whole process, so that each has its own; the processes take
turns, and a ratio is taken within a round. Products are timed beside the steps: from their rates
and from the number of multiply-adds follows how much of a step they are.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import torch
from bench import begin, save, seconds, spread

from xvit_minimal.memory import keep_freed_memory
from xvit_minimal.recipe import is_dense, recipe
from xvit_minimal.tasks import TASKS

PLAIN = dict(augment="none", mix=0.0, drop_path=0.0)
CAMVID = dict(dim=96, depth=4, num_heads=4, stem_stride=8)  # chapter 14's
STEPS = {  # name: (Config, pictures in a step, (height, width))
    "xvit_pico": (recipe("cifar10", model="xvit_pico", **PLAIN), 64, (32, 32)),
    "xvit_nano": (recipe("cifar10", model="xvit_nano", stem_stride=4, **PLAIN), 64, (32, 32)),
    "CamVid": (recipe("camvid", "segmentation", **CAMVID, **PLAIN), 8, (180, 240)),
}
DTYPES = ("float32", "bfloat16")
WAYS = ("given back", "kept")
ROUNDS = 5
CALLS = 5  # steps a round, of which the median counts
CLASSES = 11
PRODUCT = (4096, 256, 256)  # (M, K, N) of the product that stands for the layers' own


def training_step(name, dtype):
    """(function of no arguments that computes a step's loss and gradients, its multiply-adds)."""
    config, pictures, size = STEPS[name]
    config = replace(config, amp=dtype == "bfloat16")
    task = TASKS[config.task]
    torch.manual_seed(0)
    model = task.model(config, CLASSES, size).train()
    _, forward = task.cost(model, size)
    images = torch.randn(pictures, 3, *size).contiguous(memory_format=torch.channels_last)
    shape = (pictures, *size) if is_dense(config.task) else (pictures,)
    labels, loss = torch.randint(CLASSES, shape), task(config, _Images(size)).loss

    def step():
        loss(model, (images, labels)).backward()
        model.zero_grad()

    return step, 3 * pictures * forward  # the backward pass multiplies twice for each product


class _Images:
    """What a task asks of a training set before it sees one."""

    classes = tuple(map(str, range(CLASSES)))

    def __init__(self, size):
        self.images = torch.empty(1, 3, *size)


def product_rate(dtype):
    """Multiply-adds a second of a product of matrices as large as a small model's."""
    M, K, N = PRODUCT
    x, weight = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    return M * K * N / seconds(torch.matmul, (x, weight), False, 20)


def measure(names):
    """{"steps": {model: {dtype: seconds}}, "rates": {dtype: multiply-adds a second}}, one round."""
    torch.set_num_threads(1)
    steps = {name: {} for name in names}
    for name in names:
        for dtype in DTYPES:
            step, _ = training_step(name, dtype)
            times = []
            for _ in range(2 + CALLS):
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
            steps[name][dtype] = statistics.median(times[2:])
    return {"steps": steps, "rates": {d: product_rate(getattr(torch, d)) for d in DTYPES}}


def in_a_process(way, names):
    """What `measure` finds in a process of its own that keeps freed memory, or gives it back."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", way, *names],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def rows(found, names):
    """The rows of a record from {way: [a round's `measure`, ...]}."""
    made = []
    for name in names:
        _, multiply_adds = training_step(name, "float32")
        base = [r["steps"][name]["float32"] for r in found["given back"]]
        for dtype in DTYPES:
            for way in WAYS:
                own = [r["steps"][name][dtype] for r in found[way]]
                rates = [r["rates"][dtype] for r in found[way]]
                shares = [multiply_adds / rate / t for rate, t in zip(rates, own)]
                made.append(
                    {
                        "model": name,
                        "dtype": dtype,
                        "freed_memory": way,
                        "batch": STEPS[name][1],
                        "multiply_adds": multiply_adds,
                        **spread("seconds", own),
                        **spread("ratio", [a / b for a, b in zip(base, own)]),
                        **spread("products_per_second", rates),
                        **spread("share_of_products", shares),
                    }
                )
    return made


def table(made):
    """The rows as text, in columns; a ratio is float32 with memory given back over this one."""
    lines = [
        f"{'step':>10} {'products in':>12} {'freed memory':>13} {'ms':>7} {'ratio':>7} "
        f"{'range':>12} {'10⁹ multiply-adds/s':>20} {'of the step':>12}"
    ]
    lines.append("-" * len(lines[0]))
    for r in made:
        lines.append(
            f"{r['model']:>10} {r['dtype']:>12} {r['freed_memory']:>13} {1e3 * r['seconds']:>7.0f} "
            f"{r['ratio']:>6.2f}x {r['ratio_min']:>5.2f}–{r['ratio_max']:<6.2f} "
            f"{r['products_per_second'] / 1e9:>20.0f} {r['share_of_products']:>12.0%}"
        )
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one model, one round, not recorded")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)  # how it calls itself
    options = parser.parse_args(argv)
    if options.measure:
        way, *names = options.measure
        if way == "kept":
            keep_freed_memory()
        return print(json.dumps(measure(names)))
    names, rounds = (list(STEPS)[:1], 1) if options.quick else (list(STEPS), ROUNDS)
    config = {
        "threads": 1,
        "rounds": rounds,
        "calls": CALLS,
        "product": PRODUCT,
        "ratio_to": "float32, freed memory given back",
    }
    command = "python book/tools/bench_training.py"
    run, clock = begin(command, config, torch.device("cpu")), time.perf_counter()
    found = {way: [] for way in WAYS}
    for n in range(rounds):
        for way in WAYS:
            print(f"\rround {n + 1} of {rounds}, {way}".ljust(60), end="", file=sys.stderr)
            found[way].append(in_a_process(way, names))
    print("\r".ljust(62), file=sys.stderr)
    made = rows(found, names)
    print(table(made))
    if not options.quick:
        print(f"recorded in {save('training', run, clock, made)}")


if __name__ == "__main__":
    main()
