"""Measure X-ViT's attention against PyTorch's scaled_dot_product_attention and record the result.

    make bench                        the whole table, a few minutes on two cores, recorded in book/runs/bench/
    python book/bench.py --quick      the short sequences alone, printed but not recorded

Both methods get the same tensors in the same process, in turn, several rounds over; a ratio is taken within a round,
and the table shows its median and its range over the rounds. A block of short calls starts with one that is not timed.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says when it starts and stops

import numpy as np
import torch
import torch.nn.functional as F

from xvit_minimal import SoftmaxAttention, XNormAttention, xnorm_attention
from xvit_minimal.record import provenance, write

ROOT = Path(__file__).resolve().parent.parent
HEADS, D = 6, 64
LENGTHS = [64, 196, 576, 1024, 4096, 16384]  # tokens: images of 128, 224, 384, 512, 1,024 and 2,048 px in patches of 16
TOKENS = 8192  # in a batch: the batch shrinks as the sequence grows, so that every row does comparable work
# Slopes are fitted to rows whose tensors are all as large as those of the longest sequence: otherwise the cost of fresh
# memory, which jumps with a tensor's size, would be taken for a growth with N.
FITTED = [1024, 4096, 16384]


def inputs(what, N, B, device):
    """Tensors of one row of the table: (q, k, v) or (x,), and the functions that take them, by method."""
    if what == "module":
        torch.manual_seed(0)
        modules = {"softmax": SoftmaxAttention(HEADS * D, HEADS), "xnorm": XNormAttention(HEADS * D, HEADS)}
        return (torch.randn(B, N, HEADS * D, device=device),), {m: f.to(device) for m, f in modules.items()}
    qkv = torch.randn(B, N, 3, HEADS, D, device=device).permute(2, 0, 3, 1, 4)  # (3, B, h, N, d), a strided view
    if what == "contiguous":
        qkv = qkv.contiguous()
    return qkv.unbind(0), {"softmax": F.scaled_dot_product_attention, "xnorm": xnorm_attention}


def call(function, arguments, backward):
    if not backward:
        with torch.no_grad():
            return function(*arguments)
    arguments = [x.detach().requires_grad_() for x in arguments]
    weights = [p for p in function.parameters()] if isinstance(function, torch.nn.Module) else []
    out = function(*arguments)
    return torch.autograd.grad(out, [*arguments, *weights], torch.ones_like(out))


def seconds(function, arguments, backward, calls):
    """Median time of a call, after one that is not counted (a single long call needs no warm-up)."""
    times, warm_up = [], 1 if calls > 1 else 0
    for _ in range(warm_up + calls):
        if arguments[0].is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call(function, arguments, backward)
        if arguments[0].is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm_up:])


def peak_bytes(function, arguments, backward):
    """The most memory held at once for results and intermediates during one call, beyond its inputs."""
    if arguments[0].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(function, arguments, backward)
        return torch.cuda.max_memory_allocated() - before
    call(function, arguments, backward)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call(function, arguments, backward)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    held = np.cumsum([e.nbytes() for e in events])
    return int(max(held.max(), 0))


def measure(what, N, B, backward, rounds, device):
    arguments, functions = inputs(what, N, B, device)
    quick = {m: seconds(f, arguments, backward, 1) for m, f in functions.items()}
    calls = {m: max(1, min(30, round(0.15 / t))) for m, t in quick.items()}  # about 0.15 s a block
    times = {m: [] for m in functions}
    for _ in range(rounds):
        for m, f in functions.items():
            gc.collect()
            times[m].append(seconds(f, arguments, backward, calls[m]))
    ratios = [s / x for s, x in zip(times["softmax"], times["xnorm"])]
    return {
        "what": what, "pass": "forward+backward" if backward else "forward", "tokens": N, "batch": B,
        "softmax_seconds": statistics.median(times["softmax"]), "xnorm_seconds": statistics.median(times["xnorm"]),
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
        "softmax_peak_bytes": peak_bytes(functions["softmax"], arguments, backward),
        "xnorm_peak_bytes": peak_bytes(functions["xnorm"], arguments, backward),
    }


def slopes(rows):
    """log-log slopes against N of time and peak memory per sequence, 1 is linear, 2 quadratic; see FITTED."""
    fitted = []
    for what in dict.fromkeys(r["what"] for r in rows):
        for direction in dict.fromkeys(r["pass"] for r in rows):
            chosen = [r for r in rows if r["what"] == what and r["pass"] == direction
                      and r["tokens"] in FITTED and r["tokens"] * r["batch"] == max(FITTED)]
            log_n = np.log([r["tokens"] for r in chosen])
            entry = {"what": what, "pass": direction}
            for method in ("softmax", "xnorm"):
                for quantity in ("seconds", "peak_bytes"):
                    per_sequence = [r[f"{method}_{quantity}"] / r["batch"] for r in chosen]
                    entry[f"{method}_{quantity}_slope"] = float(np.polyfit(log_n, np.log(per_sequence), 1)[0])
            fitted.append(entry)
    return fitted


def table(rows):
    head = f"{'tensors':>11} {'pass':>16} {'N':>6} {'batch':>6} {'softmax ms':>11} {'X-ViT ms':>9} {'ratio':>7} {'range':>15} {'memory':>7}"
    lines = [head, "-" * len(head)]
    for r in rows:
        lines.append(f"{r['what']:>11} {r['pass']:>16} {r['tokens']:>6} {r['batch']:>6} {r['softmax_seconds'] * 1e3:>11.2f} "
                     f"{r['xnorm_seconds'] * 1e3:>9.2f} {r['ratio']:>6.2f}x {r['ratio_min']:>6.2f}–{r['ratio_max']:<6.2f} "
                     f"{r['softmax_peak_bytes'] / r['xnorm_peak_bytes']:>6.2f}x")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="N up to 1,024, two rounds, nothing recorded")
    parser.add_argument("--rounds", type=int, default=5, help="times that both methods take their turn (default 5)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started, clock = datetime.now(timezone.utc), time.perf_counter()
    torch.manual_seed(0)
    shapes = [(N, max(1, TOKENS // N)) for N in LENGTHS] + [(N, max(FITTED) // N) for N in FITTED[:-1]]
    shapes, rounds = (shapes[:4], 2) if args.quick else (shapes, args.rounds)
    rows = []
    for what in ("contiguous", "views", "module"):
        for backward in (False, True):
            for N, B in shapes:
                rows.append(measure(what, N, B, backward, rounds, device))
                print(f"\r{what}, {rows[-1]['pass']}, N = {N}".ljust(60), end="", file=sys.stderr, flush=True)
    print("\r".ljust(62), file=sys.stderr)
    print(table(rows))
    if args.quick:
        return
    for s in slopes(rows):
        print(f"slopes from N = {min(FITTED)}, {s['what']}, {s['pass']}: time {s['softmax_seconds_slope']:.2f} softmax, "
              f"{s['xnorm_seconds_slope']:.2f} X-ViT; memory {s['softmax_peak_bytes_slope']:.2f} and {s['xnorm_peak_bytes_slope']:.2f}")
    record = {
        "kind": "bench", "command": "python book/bench.py" + (f" --rounds {args.rounds}" if args.rounds != 5 else ""),
        "config": {"heads": HEADS, "channels_per_head": D, "tokens_in_a_batch": TOKENS,
                   "tokens_in_a_batch_for_slopes": max(FITTED), "dtype": "float32", "rounds": rounds},
        "seed": 0, **provenance(device), "started": started.isoformat(timespec="seconds"), "wall_seconds": round(time.perf_counter() - clock, 1),
        "results": rows,
    }
    path = ROOT / "book/runs/bench" / f"attention-{device.type}.json"
    write(path, json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")
    print(f"recorded in {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
