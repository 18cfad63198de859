"""Measure and record a training step of segmentation at growing resolution, by attention.

    python book/tools/bench_dense.py            a quarter of an hour on two cores, recorded
                                                in book/runs/bench/
    python book/tools/bench_dense.py --quick    the smallest pictures alone, printed, not recorded

A step is forward and backward through the whole model for one picture, tokens of 4 pixels, with
three attentions in one body. The attentions take turns within a round; a ratio is taken within a
round. One whose first step takes longer than STOP seconds gets no rounds, and neither it nor one
that ran out of a GPU's memory is measured any further. `python book/tools/bench.py` measures the
attention alone.
"""

import argparse
import sys
import time

import torch
from bench import begin, in_turn, peak_bytes, save, seconds, spread

from xvit_minimal import XViT
from xvit_minimal.baselines import ATTENTIONS
from xvit_minimal.dense import SemanticFPN, XViTBackbone

METHODS = ("xnorm", "softmax", "xca")
BODY = dict(dim=96, depth=4, num_heads=4, stem_stride=4, class_depth=0, num_classes=1)
CLASSES = 11
SIZES = {  # (height, width); CamVid's pictures have 360 x 480 pixels in our copy
    "cpu": [(90, 120), (180, 240), (360, 480), (720, 960), (1440, 1920)],
    "cuda": [(180, 240), (360, 480), (720, 960), (1440, 1920), (2880, 3840)],
}
ROUNDS = 3
STOP = 30  # seconds a step


def build(attention, size):
    """The model of the bench, the same weights for every attention that has them."""
    torch.manual_seed(0)
    body = XViT(img_size=size, attention=ATTENTIONS[attention], **BODY)
    return SemanticFPN(XViTBackbone(body), CLASSES)


def measure(size, methods, rounds, device):
    """The rows of one size, one for each method that is still measured."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, *size, device=device)  # (B, 3, H, W)
    functions, first, peaks = {}, {}, {}
    for name in methods:
        model = build(name, size).to(device).train()
        try:
            first[name] = seconds(model, (x,), True, 1)
            if first[name] <= STOP:
                peaks[name] = peak_bytes(model, (x,), True)
                functions[name] = model
        except torch.cuda.OutOfMemoryError:
            pass
    times = in_turn(functions, (x,), True, rounds) if functions else {}
    tokens = -(-size[0] // BODY["stem_stride"]) * -(-size[1] // BODY["stem_stride"])
    rows = []
    for name in methods:
        own = times.get(name, [])
        row = {
            "model": name,
            "height": size[0],
            "width": size[1],
            "tokens": tokens,
            **spread("seconds", own),
            **spread("ratio", [a / b for a, b in zip(own, times.get("xnorm", []))]),
            "peak_bytes": peaks.get(name),
        }
        if first.get(name, 0) > STOP:
            row |= {
                "first_seconds": first[name],
                "reason": f"its first step took {first[name]:.0f} s, more than {STOP}",
            }
        elif not own:
            row["reason"] = "ran out of the GPU's memory"
        rows.append(row)
    return rows


def table(rows):
    """The rows as text, in columns; the ratio is to X-ViT's step within the same round."""
    head = (
        f"{'attention':>10} {'pixels':>11} {'tokens':>7} {'seconds':>9} "
        f"{'to X-ViT':>9} {'range':>15} {'peak MB':>8}"
    )
    lines = [head, "-" * len(head)]
    for r in rows:
        line = f"{r['model']:>10} {r['height']:>5}x{r['width']:<5} {r['tokens']:>7,}"
        if r["seconds"] is not None:
            line += f" {r['seconds']:>9.2f}"
            if r["ratio"] is None:
                line += " " * 26
            else:
                line += f" {r['ratio']:>8.2f}x {r['ratio_min']:>7.2f}–{r['ratio_max']:<7.2f}"
            line += f" {r['peak_bytes'] / 1e6:>8.0f}"
        lines.append(f"{line}  {r['reason']}" if "reason" in r else line)
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the smallest pictures alone, one round, nothing recorded",
    )
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, rounds = (SIZES[device.type][:1], 1) if args.quick else (SIZES[device.type], ROUNDS)
    config = {
        "methods": METHODS,
        "body": BODY,
        "sizes": sizes,
        "rounds": rounds,
        "stop_seconds": STOP,
        "batch": 1,
        "parameters": {
            name: sum(p.numel() for p in build(name, (32, 32)).parameters()) for name in METHODS
        },
    }
    run, clock = begin("python book/tools/bench_dense.py", config, device), time.perf_counter()
    rows, methods, path = [], list(METHODS), None
    for size in sizes:
        print(f"\r{size[0]} x {size[1]} px".ljust(60), end="", file=sys.stderr, flush=True)
        rows += measure(size, methods, rounds, device)
        stopped = {row["model"] for row in rows if "reason" in row}
        methods = [name for name in methods if name not in stopped]
        if not args.quick:
            path = save("dense", run, clock, rows)
        if not methods:
            break
    print("\r".ljust(62), file=sys.stderr)
    print(table(rows))
    if path:
        print(f"recorded in {path}")


if __name__ == "__main__":
    main()
