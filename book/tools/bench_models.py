"""Measure whole models in inference, X-ViT beside XCiT and DeiT: images a second, and peak memory.

    python book/tools/bench_models.py             the whole table, about three minutes on two
                                                  cores, recorded in book/runs/bench/
    python book/tools/bench_models.py --quick     224 px alone, one round, printed, not recorded

The models have no trained weights: the time of a call does not depend on them. On a GPU they
compute in bfloat16, each as it is and compiled; on a CPU in float32, as it is. As in bench.py, the
models take turns within a round and a ratio is taken within it. The record is written again after
each size of image, so that a run that is cut short counts for what it did.
"""

import argparse
import sys
import time

import torch
from bench import DTYPES, begin, compiled, in_turn, peak_bytes, save, spread

from xvit_minimal import xvit_small

try:
    import timm
except ModuleNotFoundError:
    sys.exit("error: the bench needs XCiT and DeiT from timm, which is missing: pip install timm")

PEER = "deit_small_patch16_224"  # to whose images a second the others' are compared
MODELS = {
    "xvit_small": lambda side: xvit_small(img_size=side),
    "xcit_small_12_p16_224": lambda side: timm.create_model("xcit_small_12_p16_224", img_size=side),
    PEER: lambda side: timm.create_model(PEER, img_size=side),
}
PATCH = 16  # px, in all three
# {side in pixels: images in a batch}: enough to fill a GPU, few on a CPU, so that a round is short
BATCHES = {
    "cpu": {224: 8, 384: 4, 512: 2, 1024: 1},
    "cuda": {224: 256, 384: 96, 512: 64, 1024: 16},
}
ROUNDS = 5


def measure(side, batch, compile_them, rounds, device):
    """The rows of one size of image, one for each model.

    A model that does not fit into the GPU's memory gets no figures.
    """
    dtype = DTYPES[device.type]
    torch.manual_seed(0)
    images = torch.randn(batch, 3, side, side, device=device, dtype=dtype)  # (B, 3, H, W)
    models = {name: build(side).to(device, dtype).eval() for name, build in MODELS.items()}
    functions = compiled(models) if compile_them else dict(models)
    peaks = {}
    for name in models:  # all are on the device: one that fits here fits in its turns as well
        try:
            peaks[name] = peak_bytes(functions[name], (images,), False)
        except torch.cuda.OutOfMemoryError:
            del functions[name]
    times = in_turn(functions, (images,), False, rounds)
    speeds = {name: [batch / t for t in times.get(name, [])] for name in models}
    rows = []
    for name, model in models.items():
        row = {
            "model": name,
            "side": side,
            "tokens": (side // PATCH) ** 2,
            "batch": batch,
            "compiled": compile_them,
            "dtype": str(dtype).removeprefix("torch."),
            **spread("images_per_second", speeds[name]),
            **spread("ratio", [own / peer for own, peer in zip(speeds[name], speeds[PEER])]),
            "peak_bytes": peaks.get(name),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        if row["ratio"] is None:
            row["reason"] = f"{PEER if name in functions else name} ran out of the GPU's memory"
        rows.append(row)
    return rows


def table(rows):
    """The rows as text, in columns; peak memory is a call's, beyond the weights and the images."""
    head = (
        f"{'model':>24} {'px':>5} {'batch':>6} {'compiled':>9} {'images/s':>9} {'range':>17} "
        f"{'to DeiT':>8} {'range':>13} {'peak MB':>8}"
    )
    lines = [head, "-" * len(head)]
    for r in rows:
        how = "yes" if r["compiled"] else "no"
        line = f"{r['model']:>24} {r['side']:>5} {r['batch']:>6} {how:>9}"
        if r["images_per_second"] is not None:
            line += f" {r['images_per_second']:>9.1f}"
            line += f" {r['images_per_second_min']:>8.1f}–{r['images_per_second_max']:<8.1f}"
            if r["ratio"] is not None:
                line += f" {r['ratio']:>7.2f}x {r['ratio_min']:>6.2f}–{r['ratio_max']:<6.2f}"
            line += f" {r['peak_bytes'] / 1e6:>8.1f}"
        lines.append(f"{line}  {r['reason']}" if "reason" in r else line)
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="224 px alone, one round, nothing recorded"
    )
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches, rounds = BATCHES[device.type], 1 if args.quick else ROUNDS
    sides = list(batches)[:1] if args.quick else list(batches)
    config = {"models": list(MODELS), "batches": batches, "rounds": rounds, "ratio_to": PEER}
    run, clock = begin("python book/tools/bench_models.py", config, device), time.perf_counter()
    run["versions"]["timm"] = timm.__version__
    rows = []
    for compile_them in (False, True) if device.type == "cuda" else (False,):
        for side in sides:
            print(
                f"\r{side} px{', compiled' if compile_them else ''}".ljust(60),
                end="",
                file=sys.stderr,
                flush=True,
            )
            rows += measure(side, batches[side], compile_them, rounds, device)
            if not args.quick:
                path = save("models", run, clock, rows)
    print("\r".ljust(62), file=sys.stderr)
    print(table(rows))
    if not args.quick:
        print(f"recorded in {path}")


if __name__ == "__main__":
    main()
