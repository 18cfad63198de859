"""Fill the tables and the picture of the landing page and the README from the run records.

    python book/tools/results.py            rewrite book/index.md, README.md and book/figures/
                                            (part of `make notebooks`)
    python book/tools/results.py --check    change nothing, exit 1 if a page differs from its
                                            records

A page holds `<!-- from the records: NAME -->` ... `<!-- end -->`. What stands between is rendered
from book/templates/NAME.md.j2: the words are the template's, the figures are gathered here.
"""

import argparse
import ast
import difflib
import hashlib
import inspect
import itertools
import json
import re
import statistics
import sys

import jinja2
import matplotlib.pyplot as plt
from bench import FITTED, slopes
from matplotlib.image import imread
from sync import ROOT, chapters, write

from xvit_minimal import SoftmaxAttention, XNormAttention

RECORD = "book/runs/bench/attention-cpu.json"
GPU_RECORD = "book/runs/bench/attention-gpu.json"
NAMES = {  # of the attentions compared in chapter 13
    "xnorm": "X-ViT",
    "softmax": "softmax",
    "xca": "XCA",
    "linear": "linear attention",
    "efficient": "efficient attention",
    "sima": "SimA",
    "focused": "focused attention",
    "mala": "MALA",
    "none": "no mixing",
}
MODELS = {"xvit": "xvit_small", "xcit": "xcit_small_12_p16_224", "deit": "deit_small_patch16_224"}
RUNS = ROOT / "book/runs"
TEMPLATES = ROOT / "book/templates"
PATCH = 16  # px; a square image of side s has (s / 16)² tokens
LONG = 4096  # tokens at which the claims about speed and memory are read
ALIKE = 0.05  # a ratio of two speeds this close to 1 makes neither the faster
PAGES = ["book/index.md", "README.md"]
INK = {"light": "#222222", "dark": "#DDDDDD"}


def record(name=RECORD):
    path = RUNS / name.removeprefix("book/runs/")
    if not path.exists():
        raise FileNotFoundError(
            f"{name} is missing: `make bench` writes those of the bench, "
            "CONTRIBUTING.md says how the others are made"
        )
    return json.loads(path.read_text())


def row(run, what, direction, N):
    """The row of the table; the rows that serve only the slopes come after it."""
    return next(
        r for r in run["results"] if (r["what"], r["pass"], r["tokens"]) == (what, direction, N)
    )


def slope(run, what, direction):
    return next(s for s in slopes(run["results"]) if (s["what"], s["pass"]) == (what, direction))


def attention_figures(run):
    """X-ViT's attention beside PyTorch's: ratios by length, at LONG tokens with slopes and memory.

    A ratio of times is softmax over X-ViT, one of memory X-ViT over softmax.
    """
    measured = {
        "forward": ("contiguous", "forward"),
        "training": ("contiguous", "forward+backward"),
        "module": ("module", "forward"),
        "bfloat16": ("bfloat16", "forward"),
    }
    figures = {"tokens": LONG, "lengths": []}
    for name, (what, direction) in measured.items():
        long = row(run, what, direction, LONG)
        memory = long["xnorm_peak_bytes"] / long["softmax_peak_bytes"]
        figures[name] = {**long, "memory": memory, **slope(run, what, direction)}
    for N in sorted({r["tokens"] for r in run["results"]}):
        rows = {name: row(run, *which, N) for name, which in measured.items()}
        figures["lengths"].append({"tokens": N, "side": PATCH * round(N**0.5), **rows})
    return figures


def gpu_figures():
    """X-ViT's attention beside FlashAttention, forward; memory is X-ViT's over FlashAttention's."""
    run = record(GPU_RECORD)
    rows = [r for r in run["results"] if (r["what"], r["pass"]) == ("contiguous", "forward")]
    for r in rows:
        r["compiled"] = {key: r[f"compiled_{key}"] for key in ("ratio", "ratio_min", "ratio_max")}
        r["compiled_memory"] = r["xnorm_compiled_peak_bytes"] / r["softmax_peak_bytes"]
    return {
        "lengths": rows,
        "name": run["hardware"]["gpu"],
        "driver": run["hardware"]["driver"],
        "batch": run["config"]["tokens_in_a_batch"],
        **setting(run),
        "path": GPU_RECORD,
    }


def setting(run):
    """What the records of the attention's speed say alike."""
    return {
        "heads": run["config"]["heads"],
        "channels": run["config"]["channels_per_head"],
        "torch": run["versions"]["torch"],
        "rounds": run["config"]["rounds"],
        "command": run["command"],
    }


def record_figures(run):
    """How the record of the attention's speed was made."""
    return {
        "cpu": run["hardware"]["cpu"],
        "threads": run["hardware"]["cores"],
        **setting(run),
        "path": RECORD,
        "fitted_from": min(FITTED),
        "fitted_batch": run["config"]["tokens_in_a_batch_for_slopes"],
    }


def code_lines(module):
    """A module's code below its docstring, a line a statement however the source is wrapped."""
    (tree,) = ast.parse(inspect.getsource(module)).body
    return ast.unparse(tree.body[1:]).splitlines()


def changed_lines():
    """How many lines of SoftmaxAttention go, and how many of XNormAttention come in their place."""
    diff = list(difflib.ndiff(code_lines(SoftmaxAttention), code_lines(XNormAttention)))
    return sum(line.startswith("- ") for line in diff), sum(line.startswith("+ ") for line in diff)


def percent(run, score):
    """A training run's score on the test pictures when it ended, in percent."""
    ended = run["results"][0]
    if f"test_{score}" not in ended:
        raise ValueError(
            f"the record of `{run['command']}` has {', '.join(ended)}, expected test_{score}: "
            "let the run end and copy its record again"
        )
    return 100 * ended[f"test_{score}"]


def seeds(attention, pattern):
    """Name, mean and standard deviation of the runs of chapter 13 that match, one a seed."""
    paths = sorted((RUNS / "train").glob(f"{pattern}-[0-9].json"))
    found = [percent(record(path.relative_to(RUNS).as_posix()), "top1") for path in paths]
    return {
        "name": NAMES[attention],
        "percent": statistics.mean(found),
        "deviation": statistics.stdev(found),
    }


def single_runs(data, attentions, score):
    """Name and score of one run an attention."""
    runs = {a: record(f"train/{data}-{a}.json") for a in attentions}
    return [{"name": NAMES[a], "percent": percent(run, score)} for a, run in runs.items()]


def classification_figures():
    """Of the claim about classification: chapters 11 to 13."""
    compared = [seeds(a, f"study/{a}") for a in NAMES if a not in ("focused", "mala")]
    matched = [seeds(a, f"matched/small-{a}") for a in NAMES]
    small = record("train/best/1m-0.json")
    return {
        "study": {
            "parameters": record("train/study/xnorm-0.json")["parameters"],
            "attentions": sorted(compared, key=lambda found: found["percent"], reverse=True),
            "twice_the_rate": [seeds(a, f"rates/{a}-0.002") for a in ("xnorm", "softmax")],
        },
        "matched": {
            "parameters": record("train/matched/small-xnorm-0.json")["parameters"],
            "attentions": sorted(matched, key=lambda found: found["percent"], reverse=True),
        },
        "cifar10": {"parameters": small["parameters"], "percent": percent(small, "top1")},
        "imagenette": single_runs("imagenette", ("xnorm", "softmax"), "top1"),
    }


def dense_figures():
    """Of the claim about dense prediction: chapters 14 and 15."""
    cells = record("train/bccd-xnorm.json")
    steps = record("bench/dense-cpu.json")["results"]
    softmax = max((r for r in steps if r["model"] == "softmax"), key=lambda r: r["tokens"])
    (ours,) = (r for r in steps if r["model"] == "xnorm" and r["tokens"] == softmax["tokens"])
    softmax_seconds = softmax["seconds"] or softmax["first_seconds"]
    return {
        "camvid": {
            "parameters": record("train/camvid-xnorm.json")["parameters"],
            "attentions": single_runs("camvid", ("xnorm", "softmax", "xca"), "miou"),
        },
        "bccd": {"map": percent(cells, "map"), "map50": percent(cells, "map50")},
        "dense_step": {
            "height": softmax["height"],
            "width": softmax["width"],
            "ratio": softmax_seconds / ours["seconds"],
        },
    }


def model_figures():
    """Whole models beside DeiT, by the side of the image."""
    cpu = record("bench/models-cpu.json")
    measured_on_gpu = (RUNS / "bench/models-gpu.json").exists()
    gpu = record("bench/models-gpu.json")["results"] if measured_on_gpu else []
    compiled = {r["side"]: r for r in gpu if r["compiled"] and r["model"] == MODELS["xvit"]}
    sides = []
    for side in dict.fromkeys(r["side"] for r in cpu["results"]):
        rows = {r["model"]: r for r in cpu["results"] if r["side"] == side}
        models = {name: rows[model] for name, model in MODELS.items()}
        for r in models.values():
            r["megabytes"] = r["peak_bytes"] / r["batch"] / 1e6  # of one image
        tokens = models["deit"]["tokens"]
        sides.append({"side": side, "tokens": tokens, **models, "gpu": compiled.get(side)})
    return {
        "sides": sides,
        "slower": [s["side"] for s in sides if s["xvit"]["ratio"] < 1 - ALIKE],
        "faster": [s["side"] for s in sides if s["xvit"]["ratio"] > 1 + ALIKE],
        "heavier": all(s["xvit"]["peak_bytes"] > s["deit"]["peak_bytes"] for s in sides),
        "command": cpu["command"],
        "threads": cpu["hardware"]["cores"],
        "rounds": cpu["config"]["rounds"],
    }


def figures(run):
    """Everything that the templates may name."""
    gone, come = changed_lines()
    pages = {int(path.stem[:2]): f"{path.parent.name}/{path.stem}" for path in chapters()}
    return {
        "attention": attention_figures(run),
        "gpu": gpu_figures(),
        "record": record_figures(run),
        "lines": {"gone": gone, "come": come},
        **classification_figures(),
        **dense_figures(),
        "models": model_figures(),
        "chapters": pages,
    }


def fixed(number, digits=0):
    """A number with so many decimals and a comma between thousands."""
    return f"{float(number):,.{digits}f}"  # float() of an undefined name says which


def flow(text):
    """A wrapped text on one line."""
    return " ".join(text.split())


def render(name, **values):
    """What book/templates/NAME.md.j2 makes of the values; a name that is not there is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fixed": fixed, "flow": flow}
    return environment.get_template(f"{name}.md.j2").render(values).strip()


def blocks(run):
    """{name of a page's part: its text}; the README, which has no pages to link, has plain ones."""
    known = figures(run)
    return {
        "claims": render("claims", **known, links=True),
        "claims, plain": render("claims", **known, links=False),
        "speed": render("speed", **known),
        "gpu": render("gpu", **known, link=GPU_RECORD.removeprefix("book/")),
        "gpu, plain": render("gpu", **known, link=GPU_RECORD),
        "models": render("models", **known),
        "record": render("record", **known, link=RECORD.removeprefix("book/")),
        "record, plain": render("record", **known, link=RECORD),
    }


def fill(text, run):
    """The page with every marked part renewed; an unknown name is an error."""
    known = blocks(run)

    def renew(match):
        if match["name"] not in known:
            raise ValueError(
                f"unknown part {match['name']!r}, expected one of {sorted(known)}: "
                "correct the marker"
            )
        return f"{match['begin']}\n\n{known[match['name']]}\n\n<!-- end -->"

    part = r"(?P<begin><!-- from the records: (?P<name>.*?) -->).*?<!-- end -->"
    return re.sub(part, renew, text, flags=re.DOTALL)


def fingerprint(run, name):
    """Identifies the record and the drawing code that a picture was made from."""
    code = inspect.getsource(PICTURES[name]) + inspect.getsource(draw)
    return hashlib.sha256((json.dumps(run, sort_keys=True) + code).encode()).hexdigest()


def draw(run, name, mode):
    """Write one of the PICTURES to book/figures/, for light or dark pages."""
    path = ROOT / f"book/figures/{name}-{mode}.png"
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style = {**dict.fromkeys(inked, INK[mode]), "font.size": 12}
    with plt.rc_context({**style, "figure.constrained_layout.use": True}):
        colour = {"softmax": "#D55E00", "xnorm": "#0072B2" if mode == "light" else "#56B4E9"}
        figure = PICTURES[name](run, colour)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(
            path,
            dpi=160,
            transparent=True,
            metadata={"Description": fingerprint(run, name), "Software": None},
        )
        plt.close(figure)


def draw_cost(run, colour):
    """Time of one image's attention against the image's side, both methods, both measured."""
    names = {"softmax": "softmax\n(PyTorch's fused kernel)", "xnorm": "X-ViT"}
    figure, axes = plt.subplots(figsize=(7, 4.2))
    rows = [
        row(run, "contiguous", "forward", N) for N in sorted({r["tokens"] for r in run["results"]})
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
    return figure


def draw_orders(_, colour):
    """The two orders of the product, every matrix drawn to scale for N = 6 d; nothing measured."""
    N, d = 6.0, 1.0
    square, tall = ("N × N", N, N), ("", N, d)
    orders = {  # (what is written in a matrix, its height, its width), or a sign between two
        "softmax": [("$Q$", N, d), ("$K^\\top$", d, N), "=", square, ("$V$", N, d), "=", tall],
        "xnorm": [
            *(("$K^\\top$", d, N), ("$V$", N, d), "=", ("", d, d)),
            *(",", ("$Q$", N, d), ("", d, d), "=", tall),
        ],
    }
    titles = {
        "softmax": "softmax stands between: an N × N matrix, $2N^2d$ multiply-adds",
        "xnorm": "without it $K^\\top V$ comes first: a d × d matrix, $2Nd^2$ multiply-adds",
    }
    figure, axes = plt.subplots(2, 1, figsize=(7, 5.4))
    for ax, (method, order) in zip(axes, orders.items()):
        x = 0.0
        for part in order:
            if isinstance(part, str):
                ax.text(x + 0.5, 0, part, ha="center", va="center", fontsize=15)
                x += 1.4
                continue
            name, height, width = part
            between = height == width
            corner, face = (x, -height / 2), colour[method] if between else "none"
            ax.add_patch(plt.Rectangle(corner, width, height, fc=face, ec=colour[method], lw=1.8))
            ink = "white" if between else plt.rcParams["text.color"]
            ax.text(x + width / 2, 0, name, ha="center", va="center", color=ink)
            x += width + 0.4
        ax.set(xlim=(-0.2, 20.2), ylim=(-N / 2 - 0.2, N / 2 + 0.2), aspect="equal")
        ax.set_title(titles[method], color=colour[method], fontsize=12)
        ax.axis("off")
    return figure


PICTURES = {"cost": draw_cost, "orders": draw_orders}


def stale(run):
    """What differs from the records, as messages."""
    found = [
        f"{page}: its figures differ from {RECORD}: run `make notebooks`"
        for page in PAGES
        if (ROOT / page).read_text() != fill((ROOT / page).read_text(), run)
    ]
    for name, mode in itertools.product(PICTURES, INK):
        path = ROOT / f"book/figures/{name}-{mode}.png"
        if (
            not path.exists()
            or fingerprint(run, name).encode() not in path.read_bytes()
            or imread(path).ndim != 3
        ):
            found.append(
                f"{path.relative_to(ROOT)} was not drawn by today's code from {RECORD} as it is: "
                "run `make notebooks`"
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
        for name, mode in itertools.product(PICTURES, INK):
            draw(run, name, mode)
    for message in stale(run):
        print(message)
    sys.exit(1 if stale(run) else 0)


if __name__ == "__main__":
    main()
