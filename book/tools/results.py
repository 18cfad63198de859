"""Fill the tables and the picture of the landing page and the README from the run records.

    python book/tools/results.py            rewrite book/index.md, README.md and book/figures/ (part of `make notebooks`)
    python book/tools/results.py --check    change nothing, exit 1 if a page differs from its records

A page holds `<!-- from the records: NAME -->` ... `<!-- end -->`; what stands between is this file's, not a writer's.
"""

import argparse
import ast
import difflib
import hashlib
import inspect
import json
import re
import statistics
import sys

import matplotlib.pyplot as plt
from bench import FITTED, slopes
from matplotlib.image import imread
from sync import ROOT, write

from xvit_minimal import SoftmaxAttention, XNormAttention

RECORD = "book/runs/bench/attention-cpu.json"
NAMES = {
    "xnorm": "X-ViT",
    "softmax": "softmax",
    "xca": "XCA",
    "linear": "linear attention",
    "efficient": "efficient attention",
    "sima": "SimA",
    "none": "no mixing",
}  # of the attentions compared in chapter 13
RUNS = ROOT / "book/runs"
PATCH = 16  # px; a square image of side s has (s / 16)² tokens
PAGES = ["book/index.md", "README.md"]
INK = {"light": "#222222", "dark": "#DDDDDD"}


def record(name=RECORD):
    path = RUNS / name.removeprefix("book/runs/")
    if not path.exists():
        raise FileNotFoundError(
            f"{name} is missing: `make bench` writes those of the bench, CONTRIBUTING.md says how the others are made"
        )
    return json.loads(path.read_text())


def accuracy(pattern):
    """Mean and standard deviation, in percent, of the test accuracy of the runs of chapter 13 that match, one a seed."""
    found = [
        100 * record(path.relative_to(RUNS).as_posix())["results"][0]["test_top1"]
        for path in sorted((RUNS / "train").glob(f"{pattern}-[0-9].json"))
    ]
    return f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}"


def classification():
    """What was measured of the claim about classification."""
    small, photos = (
        record("train/cifar10-second.json"),
        {a: record(f"train/imagenette-{a}.json") for a in ("xnorm", "softmax")},
    )
    seven = sorted(((accuracy(f"study/{a}"), name) for a, name in NAMES.items()), reverse=True)
    return (
        f"with small models on a CPU, not in general. One body of {record('train/study/xnorm-0.json')['parameters'] / 1e6:.2f} M "
        "parameters, 10,000 images of CIFAR-10 (JPEG-75 copy), three seeds, in percent: "
        + ", ".join(f"{name} {found}" for found, name in seven)
        + "; with twice the learning rate "
        + ", ".join(f"{NAMES[a]} {accuracy(f'rates/{a}-0.002')}" for a in ("xnorm", "softmax"))
        + f". All of CIFAR-10, {small['parameters'] / 1e6:.2f} M parameters: {100 * small['results'][0]['test_top1']:.1f}. "
        + "Imagenette at 64 px, one seed: "
        + ", ".join(
            f"{NAMES[a]} {100 * run['results'][0]['test_top1']:.1f}" for a, run in photos.items()
        )
        + ". At full size not yet measured"
    )


def dense_prediction():
    """What was measured of the claim about dense prediction."""
    streets = {name: record(f"train/camvid-{name}.json") for name in ("xnorm", "softmax", "xca")}
    cells = record("train/bccd-xnorm.json")
    bench = record("bench/dense-cpu.json")["results"]
    last = max((r for r in bench if r["model"] == "softmax"), key=lambda r: r["tokens"])
    ours = next(r for r in bench if r["model"] == "xnorm" and r["tokens"] == last["tokens"])
    ratio = (last["seconds"] or last["first_seconds"]) / ours["seconds"]
    return (
        f"with small models on a CPU, one seed. CamVid at 180 × 240, one body of {streets['xnorm']['parameters'] / 1e6:.2f} M "
        "parameters, test mIoU in percent: "
        + ", ".join(
            f"{NAMES[name]} {100 * run['results'][0]['test_miou']:.1f}"
            for name, run in streets.items()
        )
        + f". BCCD at 192 × 256, X-ViT: mAP {100 * cells['results'][0]['test_map']:.1f}, at an overlap of 0.5 "
        f"{100 * cells['results'][0]['test_map50']:.1f}. A training step at {last['height']} × {last['width']}, tokens of 4 pixels, takes "
        f"softmax {ratio:.0f} times as long as X-ViT. At full size not yet measured"
    )


def row(run, what, direction, N):
    """The row of the table; the rows that serve only the slopes come after it."""
    return next(
        r for r in run["results"] if (r["what"], r["pass"], r["tokens"]) == (what, direction, N)
    )


def slope(run, what, direction):
    return next(s for s in slopes(run["results"]) if (s["what"], s["pass"]) == (what, direction))


def code_lines(module):
    """A module's code below its docstring, a line a statement however the source is wrapped."""
    (tree,) = ast.parse(inspect.getsource(module)).body
    return ast.unparse(tree.body[1:]).splitlines()


def changed_lines():
    """How many lines of SoftmaxAttention go, and how many of XNormAttention come in their place."""
    diff = list(difflib.ndiff(code_lines(SoftmaxAttention), code_lines(XNormAttention)))
    return sum(line.startswith("- ") for line in diff), sum(line.startswith("+ ") for line in diff)


def claims(run):
    forward, backward = (
        slope(run, "contiguous", "forward"),
        slope(run, "contiguous", "forward+backward"),
    )
    far, far_back = (
        row(run, "contiguous", "forward", 4096),
        row(run, "contiguous", "forward+backward", 4096),
    )
    module = row(run, "module", "forward", 4096)
    gone, come = changed_lines()
    later = "not yet measured"
    return [
        (
            "softmax attention costs O(N²)",
            "[2](part1/02_quadratic_bill)",
            f"time of `scaled_dot_product_attention` grows as $N^{{{forward['softmax_seconds_slope']:.2f}}}$",
        ),
        (
            "its own attention is linear",
            "[4](part2/04_factorize), [6](part2/06_a_few_lines)",
            f"time grows as $N^{{{forward['xnorm_seconds_slope']:.2f}}}$ ($N^{{{backward['xnorm_seconds_slope']:.2f}}}$ with the "
            f"backward pass), memory as $N^{{{forward['xnorm_peak_bytes_slope']:.2f}}}$",
        ),
        (
            "the softmax is eliminated",
            "[3](part2/03_kernel_smoother), [4](part2/04_factorize)",
            "shown: with a softmax in between, the output is no function of Q and KᵀV",
        ),
        (
            "factorized without a complicated approximation",
            "[3](part2/03_kernel_smoother), [4](part2/04_factorize)",
            "shown: (QKᵀ)V = Q(KᵀV) to the rounding of float64",
        ),
        (
            "a few changed lines",
            "[6](part2/06_a_few_lines)",
            f"lines of the module that go: {gone}, that come: {come}",
        ),
        (
            "faster inference",
            "[6](part2/06_a_few_lines)",
            f"at 4,096 tokens {far['ratio']:.0f}× (forward), {far_back['ratio']:.0f}× (forward and backward); "
            f"the whole module {module['ratio']:.1f}×",
        ),
        (
            "less GPU memory",
            "[2](part1/02_quadratic_bill), [6](part2/06_a_few_lines)",
            f"on a CPU {far['xnorm_peak_bytes'] / far['softmax_peak_bytes']:.1f} times that of PyTorch's fused softmax (forward), "
            f"{far_back['xnorm_peak_bytes'] / far_back['softmax_peak_bytes']:.1f} times (forward and backward): both are linear; "
            "on a GPU " + later,
        ),
        (
            "better classification than most transformers",
            "[11](part4/11_cifar), [12](part4/12_imagenet_subset), [13](part4/13_what_matters)",
            classification(),
        ),
        (
            "better dense prediction than most transformers",
            "[14](part5/14_segmentation), [15](part5/15_detection)",
            dense_prediction(),
        ),
    ]


def claims_table(run, links):
    lines = ["| The paper claims | Chapter | What we measured |", "|---|---|---|"]
    for claim, where, measured in claims(run):
        lines.append(
            f"| {claim} | {where if links else re.sub(r'[(].*?[)]|[][]', '', where)} | {measured} |"
        )
    return "\n".join(lines)


def speed_table(run):
    lines = [
        "| tokens N | image at patch 16 | forward | forward + backward | whole module, forward |",
        "|---|---|---|---|---|",
    ]
    for N in sorted({r["tokens"] for r in run["results"]}):
        cells = [
            row(run, what, direction, N)
            for what, direction in [
                ("contiguous", "forward"),
                ("contiguous", "forward+backward"),
                ("module", "forward"),
            ]
        ]
        ratios = " | ".join(
            f"{c['ratio']:.2f}× ({c['ratio_min']:.2f}–{c['ratio_max']:.2f})" for c in cells
        )
        lines.append(f"| {N:,} | {PATCH * round(N**0.5):,} px | {ratios} |")
    return "\n".join(lines)


def models_table():
    """Whole models beside DeiT, one row for each size of image; a GPU's column waits for its record."""
    peer, names = (
        "deit_small_patch16_224",
        {"xvit_small": "X-ViT", "xcit_small_12_p16_224": "XCiT", "deit_small_patch16_224": "DeiT"},
    )
    cpu = record("bench/models-cpu.json")
    gpu = (
        record("bench/models-gpu.json")["results"]
        if (RUNS / "bench/models-gpu.json").exists()
        else []
    )
    sides = {
        side: {r["model"]: r for r in cpu["results"] if r["side"] == side}
        for side in {r["side"]: 0 for r in cpu["results"]}
    }
    lines = [
        "| side, px | tokens | images/s on a CPU: "
        + ", ".join(names.values())
        + " | X-ViT over DeiT | XCiT over DeiT "
        "| peak memory of an image, MB | X-ViT over DeiT on a GPU, bfloat16, compiled |",
        "|---|---|---|---|---|---|---|",
    ]
    for side, models in sides.items():
        ratios = [
            f"{r['ratio']:.2f}× ({r['ratio_min']:.2f}–{r['ratio_max']:.2f})"
            for name, r in models.items()
            if name != peer
        ]
        fast = next(
            (
                f"{r['ratio']:.2f}×" if r["ratio"] else r["reason"]
                for r in gpu
                if (r["model"], r["side"], r["compiled"]) == ("xvit_small", side, True)
            ),
            "not yet measured",
        )
        speeds = ", ".join(f"{models[n]['images_per_second']:.1f}" for n in names)
        peaks = ", ".join(
            f"{models[n]['peak_bytes'] / models[n]['batch'] / 1e6:.0f}" for n in names
        )
        lines.append(
            f"| {side:,} | {models[peer]['tokens']:,} | {speeds} | "
            f"{' | '.join(ratios)} | {peaks} | {fast} |"
        )
    ours = {side: (models["xvit_small"], models[peer]) for side, models in sides.items()}
    slower, faster = (
        " and ".join(f"{side:,}" for side, (x, _) in ours.items() if test(x["ratio"]))
        for test in (lambda ratio: ratio < 0.95, lambda ratio: ratio > 1.05)
    )
    heavier = all(x["peak_bytes"] > d["peak_bytes"] for x, d in ours.values())
    lines += [
        "",
        f"On this CPU X-ViT is slower than DeiT at {slower} px and faster at {faster} px: its stem and its convolutions cost "
        "more than its attention saves while tokens are few."
        + (
            " It holds more memory at every size, for PyTorch's fused softmax needs no N × N matrix either."
            if heavier
            else ""
        )
        + f" Sizes are those of xvit_small, XCiT-S12/16 and DeiT-S/16; recorded by `{cpu['command']}`, float32, "
        f"{cpu['hardware']['cores']} threads, median and range of {cpu['config']['rounds']} rounds.",
    ]
    return "\n".join(lines)


def caption(run, folder):
    """Says how the record was made, with a link to it; `folder` is the page's."""
    link = f"[{RECORD}]({RECORD.removeprefix(folder)})"
    return (
        f"{run['hardware']['cpu']}, {run['hardware']['cores']} threads, float32, "
        f"{run['config']['heads']} heads of {run['config']['channels_per_head']} channels, torch "
        f"{run['versions']['torch']}, median of {run['config']['rounds']} rounds; recorded by `{run['command']}` "
        f"in {link}. Exponents are fitted to {min(FITTED):,} tokens and more, in batches of "
        f"{run['config']['tokens_in_a_batch_for_slopes']:,} tokens, so that all tensors are of one size."
    )


def blocks(run):
    return {
        "claims": claims_table(run, links=True),
        "claims, plain": claims_table(run, links=False),
        "speed": speed_table(run),
        "models": models_table(),
        "record": caption(run, "book/"),
        "record, plain": caption(run, ""),
    }


def fill(text, run):
    """The page with every marked part renewed; an unknown name is an error."""
    known = blocks(run)

    def renew(match):
        if match["name"] not in known:
            raise ValueError(
                f"unknown part {match['name']!r}, expected one of {sorted(known)}: correct the marker"
            )
        return (
            f"<!-- from the records: {match['name']} -->\n\n{known[match['name']]}\n\n<!-- end -->"
        )

    return re.sub(
        r"<!-- from the records: (?P<name>.*?) -->.*?<!-- end -->", renew, text, flags=re.DOTALL
    )


def fingerprint(run):
    """Identifies the record and the drawing code that a picture was made from."""
    return hashlib.sha256(
        (json.dumps(run, sort_keys=True) + inspect.getsource(draw)).encode()
    ).hexdigest()


def draw(run, mode):
    """Time of one image's attention against the image's side, both methods, both measured."""
    colour = {"softmax": "#D55E00", "xnorm": "#0072B2" if mode == "light" else "#56B4E9"}
    names = {"softmax": "softmax\n(PyTorch's fused kernel)", "xnorm": "X-ViT"}
    with plt.rc_context(
        {
            "text.color": INK[mode],
            "axes.labelcolor": INK[mode],
            "axes.edgecolor": INK[mode],
            "font.size": 12,
            "xtick.color": INK[mode],
            "ytick.color": INK[mode],
            "figure.constrained_layout.use": True,
        }
    ):
        figure, axes = plt.subplots(figsize=(7, 4.2))
        rows = [
            row(run, "contiguous", "forward", N)
            for N in sorted({r["tokens"] for r in run["results"]})
        ]
        sides = [PATCH * r["tokens"] ** 0.5 for r in rows]
        for method in ("softmax", "xnorm"):
            times = [1e3 * r[f"{method}_seconds"] / r["batch"] for r in rows]
            axes.loglog(sides, times, "o-", color=colour[method], linewidth=2.5)
            grows = slope(run, "contiguous", "forward")[f"{method}_seconds_slope"]
            axes.annotate(
                f"{names[method]}\ntime ~ tokens$^{{{grows:.2f}}}$",
                (sides[-1], times[-1]),
                xytext=(10, 0),
                textcoords="offset points",
                color=colour[method],
                va="center",
                annotation_clip=False,
            )
        axes.set_xticks(sides, [f"{side:,.0f}" for side in sides])
        axes.minorticks_off()
        axes.set(
            xlabel="side of the image, pixels (patches of 16 x 16)",
            ylabel="attention, milliseconds per image",
        )
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        path = ROOT / f"book/figures/cost-{mode}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(
            path,
            dpi=160,
            transparent=True,
            metadata={"Description": fingerprint(run), "Software": None},
        )
        plt.close(figure)


def stale(run):
    """What differs from the records, as messages."""
    found = [
        f"{page}: its figures differ from {RECORD}: run `make notebooks`"
        for page in PAGES
        if (ROOT / page).read_text() != fill((ROOT / page).read_text(), run)
    ]
    for mode in INK:
        path = ROOT / f"book/figures/cost-{mode}.png"
        if (
            not path.exists()
            or fingerprint(run).encode() not in path.read_bytes()
            or imread(path).ndim != 3
        ):
            found.append(
                f"book/figures/cost-{mode}.png was not drawn from {RECORD} as it is: run `make notebooks`"
            )
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing, exit 1 if a page differs from its records",
    )
    run = record()
    if not parser.parse_args(argv).check:
        for page in PAGES:
            write(fill((ROOT / page).read_text(), run), ROOT / page)
        for mode in INK:
            draw(run, mode)
    for message in stale(run):
        print(message)
    sys.exit(1 if stale(run) else 0)


if __name__ == "__main__":
    main()
