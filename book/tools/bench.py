"""Measure X-ViT's attention against PyTorch's scaled_dot_product_attention and record the result.

    make bench                            the whole table, a few minutes on two cores, recorded
                                          in book/runs/bench/
    python book/tools/bench.py --quick    the short sequences alone, printed but not recorded

Both methods get the same tensors in the same process, in turn, several rounds over. A ratio is
taken within a round, and the table shows its median and its range over the rounds. A block of
short calls starts with one that is not timed.

On a GPU, one that has FlashAttention, the tensors are bfloat16 and PyTorch's function is held to
FlashAttention. X-ViT's attention is then also compiled, and compared with the least time in which
its tensors can be read and written.
"""

import argparse
import contextlib
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
from torch.nn.attention import SDPBackend, sdpa_kernel

from xvit_minimal import SoftmaxAttention, XNormAttention, xnorm_attention
from xvit_minimal.record import provenance, write

ROOT = Path(__file__).resolve().parents[2]
HEADS, D = 6, 64
# tokens of images of 128, 224, 384, 512, 1,024 and 2,048 px in patches of 16
LENGTHS = [64, 196, 576, 1024, 4096, 16384]
TOKENS = 8192  # in a batch, which shrinks as the sequence grows: every row does comparable work
# Slopes are fitted to rows whose tensors are all as large as those of the longest sequence:
# otherwise the cost of fresh memory, which jumps with a tensor's size, would be taken for a growth
# with N.
FITTED = [1024, 4096, 16384]
GPU_LENGTHS = [*LENGTHS, 65536]
GPU_TOKENS = 2**18  # 200 MB a tensor: more than a cache holds, long beside a kernel's start
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def shapes(device):
    """(tokens, batch) of the table's rows; on a CPU the last ones serve only the slopes."""
    if device.type == "cuda":
        return [(N, GPU_TOKENS // N) for N in GPU_LENGTHS]
    return [(N, max(1, TOKENS // N)) for N in LENGTHS] + [
        (N, max(FITTED) // N) for N in FITTED[:-1]
    ]


def inputs(what, N, B, device):
    """Tensors of one row, (q, k, v) or (x,), and {method: function that takes them}.

    `what`: "contiguous", "views" of one tensor, "bfloat16" (contiguous as well), or "module".
    """
    dtype = torch.bfloat16 if what == "bfloat16" else DTYPES[device.type]
    like = {"device": device, "dtype": dtype}
    if what == "module":
        torch.manual_seed(0)
        modules = {
            "softmax": SoftmaxAttention(HEADS * D, HEADS),
            "xnorm": XNormAttention(HEADS * D, HEADS),
        }
        x = torch.randn(B, N, HEADS * D, **like)
        return (x,), {method: module.to(**like) for method, module in modules.items()}
    qkv = torch.randn(B, N, 3, HEADS, D, **like)
    qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, h, N, d), a strided view
    if what != "views":
        qkv = qkv.contiguous()
    return qkv.unbind(0), {"softmax": F.scaled_dot_product_attention, "xnorm": xnorm_attention}


def compiled(functions):
    """Each function as torch.compile makes it for one shape; call again for the next shape."""
    torch.compiler.reset()  # or torch gives up after some shapes and runs the rest uncompiled
    return {m: torch.compile(f, dynamic=False) for m, f in functions.items()}


def call(function, arguments, backward):
    if not backward:
        with torch.no_grad():
            return function(*arguments)
    arguments = [x.detach().requires_grad_() for x in arguments]
    weights = [p for p in function.parameters()] if isinstance(function, torch.nn.Module) else []
    out = function(*arguments)
    return torch.autograd.grad(out, [*arguments, *weights], torch.ones_like(out))


def seconds(function, arguments, backward, calls):
    """Median time of a call, after one that is not counted (a single long call needs none)."""
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
    """The most memory held at once during one call, beyond its inputs."""
    call(function, arguments, backward)
    if arguments[0].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(function, arguments, backward)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        call(function, arguments, backward)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    held = np.cumsum([e.nbytes() for e in events])
    return int(max(held.max(), 0))


def copy_rate(device, size=2**30):
    """Bytes that a copy reads and writes in a second; a method's least time follows from it."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    return 2 * size / seconds(torch.empty_like(source).copy_, (source,), False, 30)


def in_turn(functions, arguments, backward, rounds):
    """{method: seconds of a call, by round}: within a round the methods take turns."""
    # on a GPU the very first call, which may compile, says little of the next
    tries = 2 if arguments[0].is_cuda else 1
    quick = {m: seconds(f, arguments, backward, tries) for m, f in functions.items()}
    calls = {m: max(1, min(30, round(0.15 / t))) for m, t in quick.items()}  # about 0.15 s a block
    times = {m: [] for m in functions}
    for _ in range(rounds):
        for m, f in functions.items():
            gc.collect()
            times[m].append(seconds(f, arguments, backward, calls[m]))
    return times


def spread(name, values):
    """Median and range of some values, as a row has them; None where there is no value."""
    of = (statistics.median, min, max) if values else (lambda _: None,) * 3
    return {name: of[0](values), f"{name}_min": of[1](values), f"{name}_max": of[2](values)}


def measure(what, N, B, backward, rounds, device, rate=None):
    """A row of the table; with a copy's `rate`, also for X-ViT compiled, and its share of that."""
    arguments, functions = inputs(what, N, B, device)
    if rate:
        # Softmax attention alone is one kernel, and compiling adds only a detour to it.
        chosen = functions if what == "module" else {"xnorm": functions["xnorm"]}
        extra = compiled(chosen)
        functions |= {f"{m}_compiled": f for m, f in extra.items()}
    times = in_turn(functions, arguments, backward, rounds)
    row = {
        "what": what,
        "pass": "forward+backward" if backward else "forward",
        "tokens": N,
        "batch": B,
        "softmax_seconds": statistics.median(times["softmax"]),
        "xnorm_seconds": statistics.median(times["xnorm"]),
        **spread("ratio", [s / x for s, x in zip(times["softmax"], times["xnorm"])]),
        "softmax_peak_bytes": peak_bytes(functions["softmax"], arguments, backward),
        "xnorm_peak_bytes": peak_bytes(functions["xnorm"], arguments, backward),
    }
    if rate:
        peers = times.get("softmax_compiled", times["softmax"])
        row |= {f"{m}_compiled_seconds": statistics.median(times[f"{m}_compiled"]) for m in extra}
        row |= spread("compiled_ratio", [s / x for s, x in zip(peers, times["xnorm_compiled"])])
        row |= {
            f"{m}_compiled_peak_bytes": peak_bytes(f, arguments, backward) for m, f in extra.items()
        }
        if what != "module" and not backward:
            # q, k and v are read once, an output of the same size is written
            least = 4 * arguments[0].nbytes / rate
            row |= {
                "copy_bytes_per_second": rate,
                "least_seconds": least,
                "bandwidth_share": least / row["xnorm_compiled_seconds"],
            }
    return row


def slopes(rows):
    """log-log slopes against N of time and peak memory per sequence: 1 is linear, 2 quadratic.

    Fitted to the longer sequences; see FITTED.
    """
    fitted, largest = [], max(r["tokens"] * r["batch"] for r in rows)
    for what in dict.fromkeys(r["what"] for r in rows):
        for direction in dict.fromkeys(r["pass"] for r in rows):
            chosen = [
                r
                for r in rows
                if r["what"] == what
                and r["pass"] == direction
                and r["tokens"] >= min(FITTED)
                and r["tokens"] * r["batch"] == largest
            ]
            log_n = np.log([r["tokens"] for r in chosen])
            entry = {"what": what, "pass": direction}
            for method in ("softmax", "xnorm"):
                for quantity in ("seconds", "peak_bytes"):
                    per_sequence = [r[f"{method}_{quantity}"] / r["batch"] for r in chosen]
                    entry[f"{method}_{quantity}_slope"] = float(
                        np.polyfit(log_n, np.log(per_sequence), 1)[0]
                    )
            fitted.append(entry)
    return fitted


def table(rows):
    head = (
        f"{'tensors':>11} {'pass':>16} {'N':>6} {'batch':>6} {'softmax ms':>11} {'X-ViT ms':>9} "
        f"{'ratio':>7} {'range':>15} {'memory':>7}"
    )
    if "compiled_ratio" in rows[0]:
        head += f" {'compiled ms':>12} {'ratio':>7} {'range':>15} {'of copy rate':>12}"
    lines = [head, "-" * len(head)]
    for r in rows:
        lines.append(
            f"{r['what']:>11} {r['pass']:>16} {r['tokens']:>6} {r['batch']:>6} "
            f"{r['softmax_seconds'] * 1e3:>11.2f} {r['xnorm_seconds'] * 1e3:>9.2f} "
            f"{r['ratio']:>6.2f}x {r['ratio_min']:>6.2f}–{r['ratio_max']:<6.2f} "
            f"{r['softmax_peak_bytes'] / r['xnorm_peak_bytes']:>6.2f}x"
        )
        if "compiled_ratio" in r:
            share = f"{r['bandwidth_share']:>12.0%}" if "bandwidth_share" in r else ""
            lines[-1] += (
                f" {r['xnorm_compiled_seconds'] * 1e3:>12.2f} {r['compiled_ratio']:>6.2f}x "
                f"{r['compiled_ratio_min']:>6.2f}–{r['compiled_ratio_max']:<6.2f}  {share}"
            ).rstrip()
    return "\n".join(lines)


def begin(command, config, device):
    """What a record says about its run before there are results."""
    return {
        "kind": "bench",
        "command": command,
        "config": config,
        "seed": 0,
        **provenance(device),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def save(name, run, clock, rows):
    """Write the record of a run that began at `clock` to book/runs/bench/, and say where."""
    record = {**run, "wall_seconds": round(time.perf_counter() - clock, 1), "results": rows}
    path = f"book/runs/bench/{name}-{'gpu' if run['hardware']['gpu'] else 'cpu'}.json"
    write(ROOT / path, json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")
    return path


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="N up to 1,024, two rounds, nothing recorded"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="times that both methods take their turn (default 5)"
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu, chosen, rounds = device.type == "cuda", shapes(device), args.rounds
    if args.quick:
        chosen, rounds = chosen[:4], 2
    config = {
        "heads": HEADS,
        "channels_per_head": D,
        "tokens_in_a_batch": GPU_TOKENS if gpu else TOKENS,
        "tokens_in_a_batch_for_slopes": GPU_TOKENS if gpu else max(FITTED),
        "dtype": str(DTYPES[device.type]).removeprefix("torch."),
        "rounds": rounds,
    }
    if gpu:
        config["softmax_kernel"] = "FlashAttention"
    command = "python book/tools/bench.py" + (
        f" --rounds {args.rounds}" if args.rounds != 5 else ""
    )
    run, clock = begin(command, config, device), time.perf_counter()
    torch.manual_seed(0)
    rate = copy_rate(device) if gpu else None
    rows = []
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if gpu else contextlib.nullcontext():
        kinds = ("contiguous", "module") if gpu else ("contiguous", "views", "module", "bfloat16")
        for what in kinds:
            for backward in (False, True):
                for N, B in chosen:
                    rows.append(measure(what, N, B, backward, rounds, device, rate))
                    print(
                        f"\r{what}, {rows[-1]['pass']}, N = {N}".ljust(60),
                        end="",
                        file=sys.stderr,
                        flush=True,
                    )
                if not args.quick:  # a run that is cut short counts for what it did
                    path = save("attention", run, clock, rows)
    print("\r".ljust(62), file=sys.stderr)
    print(table(rows))
    if args.quick:
        return
    for s in slopes(rows):
        print(
            f"slopes from N = {min(FITTED)}, {s['what']}, {s['pass']}: "
            f"time {s['softmax_seconds_slope']:.2f} softmax, {s['xnorm_seconds_slope']:.2f} X-ViT; "
            f"memory {s['softmax_peak_bytes_slope']:.2f} and {s['xnorm_peak_bytes_slope']:.2f}"
        )
    print(f"recorded in {path}")


if __name__ == "__main__":
    main()
