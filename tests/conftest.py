"""What the tests share: what they skip without, --site, and a tiny repository without faults.

The tests plant faults in it and see whether they are found.
"""

import copy
import importlib.util
import json
import re
import tempfile
from pathlib import Path

import pytest

try:
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
except ModuleNotFoundError:
    pass  # the tests of the book skip themselves; those of the package need torch and pytest alone

# what a test may need beside torch, torchvision and pytest; without it that test is skipped
OPTIONAL = {"nbformat", "pycocotools", "safetensors", "timm", "torchmetrics", "tqdm"}
ROOT = Path(__file__).resolve().parent.parent
PLACES = (ROOT, Path.home(), Path(tempfile.gettempdir()))
HERE = "|".join(re.escape(f"{place}/") for place in PLACES if len(place.parts) > 1)
MACHINE_PATH = re.compile(
    r"(?:(?<![\w.~/-])|(?<=file://))(?:/(?:home|root|tmp|work|Users|var/folders)/|"
    rf"[A-Za-z]:\\+Users\b|{HERE})"
)
CONFIG = "repository:\n  url: https://github.com/-nobody/tiny\n  branch: v1\n"
TOC = (
    "format: jb-book\nroot: book/index\nparts:\n  - caption: One\n    chapters:\n"
    "      - file: book/part1/01_double\n      - file: book/references\n"
)
SETUP = '# Set-up\nPACKAGE = "git+https://github.com/OWNER/REPOSITORY@REF"'
DOUBLE = 'def double(x):\n    """Twice x."""\n    return _times(x, 2)'
TIMES = "def _times(x, n):\n    return n * torch.as_tensor(x)"
PACKAGE = f'"""Tiny."""\n\nimport torch\n\n\n{DOUBLE}\n\n\n{TIMES}\n'
BIB = "@article{vaswani2017,\n  title = {Attention},\n  eprint = {1706.03762},\n}\n"
RECORD = {
    "kind": "train",
    "command": "python -m xvit_minimal.train",
    "config": {"depth": 1},
    "seed": 0,
    "commit": "0123abcd",
    "started": "2026-01-02T03:04:05+00:00",
    "wall_seconds": 1.5,
    "versions": {"python": "3.12.1", "torch": "2.11.0"},
    "hardware": {"cpu": "some", "cores": 2, "gpu": None, "driver": None},
    "results": [{"epoch": 1, "test_top1": 0.5}],
    "data": {"name": "shapes", "copy": "generated", "splits": {"train": 10, "test": 10}},
    "epochs": [{"epoch": 1, "train_loss": 1.0, "val_top1": 0.25}],
    "parameters": 10,
    "multiply_adds": 10,
    "peak_memory_bytes": 10,
}


def missing(error):
    """The package whose absence made an error, None if there is no such package."""
    while error is not None:
        name = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and name in OPTIONAL:
            return name if importlib.util.find_spec(name) is None else None
        error = error.__cause__ or error.__context__
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    try:
        return (yield)
    except Exception as error:
        _skip_without(missing(error))
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except Exception as error:
        _skip_without(missing(error))
        raise


def _skip_without(package):
    if package:
        pytest.skip(f"needs {package}: pip install {package}")


def pytest_addoption(parser):
    parser.addoption(
        "--site", type=Path, default=None, help="the built book (_build/html), to be tested as well"
    )


@pytest.fixture
def site(request):
    folder = request.config.getoption("--site")
    if folder is None:
        pytest.skip("give --site _build/html, as make book does")
    assert folder.is_dir(), (
        f"--site {folder} is not a folder: run make book, which builds the site and then tests it"
    )
    return folder.resolve()


def tiny_chapter(setup):
    md, code = new_markdown_cell, new_code_cell
    image = new_output(
        "display_data", data={"image/png": "iVBORw0KGgo=", "text/plain": "<Figure size 1x1>"}
    )
    cells = [
        md("# 1. Double\n\nAfter this chapter you can double a number."),
        code(setup, metadata={"tags": ["hide-cell", "nbval-ignore-output", "setup"]}),
        md(
            "## Multiply by two\n\n"
            "Below, $x$ is any number. See https://arxiv.org/abs/1706.03762.\n\n"
            "$$ 2x = x + x $$ (eq-double)\n\nThe code `f{x}` shows (eq-double)."
        ),
        code(
            "# check: eq-double\nimport torch\nx = torch.randn(5, dtype=torch.float64)\n"
            "assert ((2 * x) - (x + x)).abs().max() < 1e-14"
        ),
        code(
            "plt.plot([1, 2])\nplt.show()",
            outputs=[image],
            metadata={"mystnb": {"image": {"alt": "A blue line rises to 2."}}},
        ),
        md("## What the package gained"),
        code(f"# xvit_minimal/attention.py\n{DOUBLE}"),
        code("print(double(2))", outputs=[new_output("stream", name="stdout", text="4\n")]),
        md("## Summary\n\n- Doubling is adding.\n\n## Exercises"),
        *[
            cell
            for k in (1, 2, 3)
            for cell in (
                md(f"**Exercise {k}.** Double {k}."),
                code(
                    f"# Solution {k}\nassert double({k}) == {2 * k}",
                    metadata={"tags": ["hide-cell"]},
                ),
            )
        ],
        md("## Sources\n\n- [Vaswani et al.](https://arxiv.org/abs/1706.03762)"),
    ]
    for count, cell in enumerate((c for c in cells if c.cell_type == "code"), start=1):
        cell.execution_count = count
    return new_notebook(cells=cells)


@pytest.fixture
def tree(tmp_path):
    """A repository without a fault: a package of one definition and a book of one chapter."""
    import nbformat  # its absence skips the test that wants a tree

    root = tmp_path / "tree"
    files = {
        "_config.yml": CONFIG,
        "_toc.yml": TOC,
        "book/tools/setup_cell.py": SETUP + "\n",
        "book/references.bib": BIB,
        "book/index.md": "# Tiny\n\n![A cat](cat.png)\n",
        "book/references.md": "# References\n\n{cite}`vaswani2017`\n",
        "xvit_minimal/__init__.py": 'from .attention import double\n\n__all__ = ["double"]\n',
        "xvit_minimal/attention.py": PACKAGE,
        "book/runs/one.json": json.dumps(RECORD),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / "book/part1").mkdir()
    setup = SETUP.replace(
        "https://github.com/OWNER/REPOSITORY@REF", "https://github.com/-nobody/tiny@v1"
    )
    nbformat.write(tiny_chapter(setup), root / "book/part1/01_double.ipynb")
    return root


@pytest.fixture
def chapter(tree):
    """A function that changes fields of one cell of the tiny chapter and returns its path."""
    path = tree / "book/part1/01_double.ipynb"

    def change(index, **fields):
        notebook = nbformat.read(path, as_version=4)
        notebook.cells[index].update(nbformat.from_dict(copy.deepcopy(fields)))
        nbformat.write(notebook, path)
        return path

    return change
