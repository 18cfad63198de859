"""What the chapters share: package, set-up cell, contents, references, records of runs.

As in test_book.py, a check `problems_in_...` returns one sentence for each fault; here it is put to
a whole repository.
"""

import ast
import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

pytest.importorskip("nbformat", reason="the tests of the book read notebooks: pip install nbformat")
pytest.importorskip("yaml", reason="the book's contents are YAML: pip install pyyaml")
import sync
import yaml
from test_book import cells, labels, nodes, prose, read, where
from test_records import problems_in_records

DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
ARROWS = {  # which of its own files a file of the package may import
    "attention": "",
    "baselines": "attention",
    "model": "attention",
    "dense": "model",
    "images": "",
    "augment": "images",
    "shapes": "images",
    "listing": "",
    "splits": "images",
    "data": "images listing shapes splits",
    "masks": "dense images listing splits",
    "boxes": "images listing masks splits",
    "dense_data": "boxes data dense images masks shapes splits",
    "distributed": "",
    "matching": "distributed",
    "memory": "",
    "optimization": "",
    "packages": "",
    "record": "",
    "recipe": "augment baselines data model optimization",
    "command_line": "recipe",
    "outputs": "distributed images",
    "tasks": "augment data dense dense_data distributed images matching model optimization outputs "
    "packages recipe",
    "each_picture": "dense distributed matching outputs",
    "resume": "distributed recipe record",
    "weights": "dense images model packages recipe tasks",
    "run": "distributed each_picture memory optimization record resume tasks weights",
    "train": "command_line distributed memory recipe record resume run tasks weights",
}
ARROWS = {file: set(others.split()) for file, others in ARROWS.items()}
# what a file that people copy out may need
COPIED = {"attention": {"torch"}, "model": {"torch", "torchvision"}}


def notebooks(root):
    return sorted(
        p for p in (root / "book").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
    )


def modules(root):
    return [p for p in sorted((root / "xvit_minimal").glob("*.py")) if p.name != "__init__.py"]


def package_cells(root):
    return [
        (p, i, c, file)
        for p in notebooks(root)
        for i, c in cells(p, "code")
        if (file := sync.package_file(c)) and nodes(c)
    ]


# --------------------------------------------------------------------- the package and the chapters


def problems_in_shown_code(root):
    """Nothing that a chapter shows as the package's differs from the package."""
    problems = []
    for path, i, cell, file in package_cells(root):
        if not (root / file).exists():
            problems.append(
                f"{where(path, i)}: shows {file}, which does not exist: correct the first line"
            )
            continue
        known = {
            sync.defined_name(node): node
            for node in ast.parse((root / file).read_text(encoding="utf-8")).body
        }
        for node in ast.parse(cell.source).body:
            name = sync.defined_name(node)
            if name is None or name not in known:
                problems.append(
                    f"{where(path, i)}: {ast.unparse(node)[:40]!r} is no definition of {file}: "
                    "move it"
                )
            elif ast.dump(node) != ast.dump(known[name]):
                problems.append(f"{where(path, i)}: {name} differs from {file}: run make notebooks")
    for path in notebooks(root):
        for i, cell in cells(path, "code"):
            lines = cell.source.split("\n")
            marked = [
                n
                for n, line in enumerate(lines)
                if re.match(r"(?i)\s*#+\s*xvit_minimal/\S*\s*$", line)
            ]
            if marked and (marked != [0] or lines[0] != f"# {sync.package_file(cell)}"):
                problems.append(
                    f"{where(path, i)}: malformed path: make `# xvit_minimal/FILE.py` the first "
                    "line"
                )
    return problems


def problems_in_coverage(root):
    """Every public definition of the package is shown in some chapter."""

    def exported(body):
        lists = [
            n.value for n in body if isinstance(n, ast.Assign) and sync.defined_name(n) == "__all__"
        ]
        return {name for value in lists for name in ast.literal_eval(value)}

    shown = {
        (file, sync.defined_name(n))
        for *_, c, file in package_cells(root)
        for n in ast.parse(c.source).body
    }
    everywhere = exported(
        ast.parse((root / "xvit_minimal/__init__.py").read_text(encoding="utf-8")).body
    )
    problems = []
    for module in modules(root):
        body = ast.parse(module.read_text(encoding="utf-8")).body
        public = {n.name for n in body if isinstance(n, DEFINITION) and not n.name.startswith("_")}
        public |= {sync.defined_name(n) for n in body} & (exported(body) | everywhere)
        problems += [
            f"xvit_minimal/{module.name}: {name} is derived in no chapter: show it in a cell that "
            f"starts with `# xvit_minimal/{module.name}`"
            for name in sorted(public)
            if (f"xvit_minimal/{module.name}", name) not in shown
        ]
    return problems


def problems_in_setup(root):
    problems = []
    for path in notebooks(root):
        notebook = read(path)
        tagged = [i for i, c in enumerate(notebook.cells) if "setup" in c.metadata.get("tags", [])]
        if tagged != [1] or notebook.cells[1].source != sync.setup_source(root):
            problems.append(
                f"{path.name}: set-up cells {tagged}: tag the second cell setup, and no other, and "
                "run make notebooks, which fills it"
            )
        try:
            if changed := sync.rewrite(copy.deepcopy(notebook), root):
                problems.append(
                    f"{path.name}: cells {changed} differ from their source: run make notebooks"
                )
        except (ValueError, SyntaxError) as error:
            problems.append(f"{path.name}: {error}")
    return problems


@pytest.mark.parametrize(
    "check, index, source, complaint",
    [
        (
            "shown_code",
            6,
            "# xvit_minimal/attention.py\ndef double(x):\n    '2x.'\n    return _times(x, 2)",
            "double dif",
        ),
        (
            "shown_code",
            6,
            "# xvit_minimal/attention.py\ndef _times(x, n):\n    return n * x",
            "_times differs",
        ),
        ("shown_code", 6, "# xvit_minimal/attention.py\ndef triple(x): ...", "is no definition"),
        ("shown_code", 6, "# xvit_minimal/attention.py\nprint(4)", "is no definition"),
        ("shown_code", 6, "# xvit_minimal/gone.py\ndef double(x): ...", "does not exist"),
        (
            "shown_code",
            6,
            "import torch\n# xvit_minimal/attention.py\ndef double(x): ...",
            "malformed path",
        ),
        ("shown_code", 6, "#xvit_minimal/attention.py\ndef double(x): ...", "malformed path"),
        (
            "coverage",
            6,
            "# xvit_minimal/attention.py\ndef _times(x, n): ...",
            "double is derived in no chapter",
        ),
        ("setup", 1, "PACKAGE = 1", "tag the second cell"),
        ("setup", 6, "# xvit_minimal/attention.py\ndef double(x): ...", "cells [6] differ"),
    ],
)
def test_fault_in_a_cell_is_reported(tree, chapter, check, index, source, complaint):
    chapter(index, source=source)
    assert complaint in "\n".join(globals()[f"problems_in_{check}"](tree))


def test_second_setup_cell_is_reported(tree, chapter):
    chapter(3, metadata={"tags": ["setup"]})
    assert "set-up cells [1, 3]" in "\n".join(problems_in_setup(tree))


def run_setup(monkeypatch, folder, source, modules=()):
    """The commands that the set-up cell runs in a folder where the package is not installed."""
    commands = []

    def run(command, real=subprocess.run):
        commands.append(command)
        return (
            real(command, cwd=folder, stderr=subprocess.DEVNULL)
            if command[0] == "git"
            else subprocess.CompletedProcess(command, 0)
        )

    cell = sync.setup_source(ROOT).split("NEEDED = ")[0]
    cell = re.sub(r'SOURCE = ".*"', f'SOURCE = "{source}"', cell)
    with monkeypatch.context() as patch:
        for module in modules:
            patch.setitem(sys.modules, module, sys)
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        patch.setattr(subprocess, "run", run)
        exec(cell, {})
    return commands


def test_setup_on_colab_clones_the_pinned_ref_and_leaves_torch_alone(tmp_path, monkeypatch):
    origin, here = tmp_path / "origin", tmp_path / "here"
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    (origin / "book/runs").mkdir(parents=True)
    here.mkdir()
    (origin / "_toc.yml").write_text("root: book/index")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True)
    clone, pip = run_setup(monkeypatch, here, f"file://{origin}@v1", ["google.colab"])
    assert (
        clone[:2] == ["git", "clone"] and (here / "xvit/_toc.yml").exists()
    )  # where the cell looks for BOOK
    assert pip[1:4] == ["-m", "pip", "install"] and "--no-deps" in pip and pip[-1] == "./xvit"
    with pytest.raises(
        ModuleNotFoundError, match="could not install .*check the runtime's network"
    ):
        run_setup(monkeypatch, here, f"file://{origin}@gone", ["google.colab"])
    with pytest.raises(ModuleNotFoundError, match="run `make book`"):
        run_setup(monkeypatch, here, f"file://{origin}@v1")


# --------------------------------------------------------------------- labels, contents, references


def problems_in_labels(root):
    seen = [(label, where(p, i)) for p in notebooks(root) for i, label in labels(p)]
    known = [label for label, _ in seen]
    problems = [
        f"{place}: the label {label} is taken: choose another name"
        for n, (label, place) in enumerate(seen)
        if label in known[:n]
    ]
    return problems + [
        f"{where(p, i)}: ({label}) is no equation of the book: correct the name"
        for p in notebooks(root)
        for i, c in cells(p, "markdown")
        for label in re.findall(r"\((eq-[^)\s]*)\)", prose(c.source))
        if label not in known
    ]


def problems_in_contents(root):
    def entries(node):
        if isinstance(node, dict):
            return [v for k, v in node.items() if k in ("root", "file")] + entries(
                list(node.values())
            )
        return [e for child in node for e in entries(child)] if isinstance(node, list) else []

    listed = entries(yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8")))
    pages = [p.relative_to(root) for p in notebooks(root) + sorted((root / "book").rglob("*.md"))]
    stems = [p.with_suffix("").as_posix() for p in pages]
    problems = [
        f"_toc.yml: {e} is no .ipynb or .md file: write it or take the entry out"
        for e in listed
        if e not in stems
    ]
    problems += [
        f"{page}: not in _toc.yml: add it there"
        for page, stem in zip(pages, stems)
        if stem not in listed
    ]
    problems += [
        f"{e}: twice in _toc.yml or under book/: keep one"
        for e in sorted({*listed})
        if max(listed.count(e), stems.count(e)) > 1
    ]
    return problems + ([] if notebooks(root) else ["book/: no chapters at all"])


def problems_in_references(root):
    sources = {
        p.name: "\n".join(c.source for _, c in cells(p, "markdown")) for p in notebooks(root)
    }
    pages = {p.name: p.read_text(encoding="utf-8") for p in sorted((root / "book").rglob("*.md"))}
    sources.update(pages)
    bib = root / "book/references.bib"
    keys = {}  # eprint -> citation key
    for entry in re.split(r"(?m)^@", bib.read_text(encoding="utf-8") if bib.exists() else ""):
        if eprint := re.search(r"\beprint\s*=\s*[{\"]([^}\"]+)[}\"]", entry):
            keys[eprint[1]] = re.search(r"\{\s*([^,\s]+)", entry)[1]
    text = "\n".join(sources.values())
    arxiv = r"arxiv\.org/abs/([a-z-]+/\d{7}|\d{4}\.\d{4,5})"
    linked = {name: re.findall(arxiv, source) for name, source in sources.items()}
    cited = {
        k.strip()
        for group in re.findall(r"\{cite[\w:]*\}`([^`]+)`", text)
        for k in group.split(",")
    }
    problems = [
        f"{name}: arXiv {i} is not in book/references.bib: add an entry with eprint = {{{i}}}"
        for name, found in linked.items()
        for i in sorted({*found} - {*keys})
    ]
    problems += [
        f"book/references.bib: {key} is cited nowhere: link https://arxiv.org/abs/{i} or take it "
        "out"
        for i, key in keys.items()
        if key not in cited and not any(i in found for found in linked.values())
    ]
    for name, source in pages.items():
        figures = len(re.findall(r"(?m)^\s*(?:```+|:::+)\s*\{(?:figure|image)\}", source))
        if re.search(r"!\[\s*\]", prose(source)) or figures > len(
            re.findall(r"(?m)^\s*:alt: *\S", source)
        ):
            problems.append(
                f"{name}: an image without alt text: write ![what is seen](...) "
                "or :alt: what is seen"
            )
    return problems


@pytest.mark.parametrize(
    "check, file, text, complaint",
    [
        (problems_in_labels, "book/part1/02_again.ipynb", None, "eq-double is taken"),
        (problems_in_contents, "book/part1/02_again.ipynb", None, "not in _toc.yml"),
        (problems_in_contents, "book/page.md", "# Page", "not in _toc.yml"),
        (problems_in_contents, "book/part1/01_double.md", "# Double", "keep one"),
        (
            problems_in_contents,
            "_toc.yml",
            "root: book/index\nchapters:\n- file: book/gone",
            "book/gone is no",
        ),
        (
            problems_in_references,
            "book/index.md",
            "https://arxiv.org/abs/2205.13805",
            "2205.13805 is not in",
        ),
        (problems_in_references, "book/references.bib", "", "1706.03762 is not in"),
        (
            problems_in_references,
            "book/references.bib",
            "@misc{b,\n eprint = {0000.00000}}",
            "b is cited nowhere",
        ),
        (problems_in_references, "book/index.md", "![](cat.png)", "without alt text"),
        (problems_in_references, "book/index.md", "```{figure} cat.png\n```", "without alt text"),
    ],
)
def test_fault_in_a_file_is_reported(tree, check, file, text, complaint):
    old = (tree / "book/part1/01_double.ipynb").read_text(encoding="utf-8")
    (tree / file).write_text(old if text is None else text, encoding="utf-8")
    assert complaint in "\n".join(check(tree))


def test_unknown_label_in_prose_is_reported(tree, chapter):
    chapter(0, source="# 1. Double\n\nSee (eq-triple).")
    assert "(eq-triple) is no equation" in "\n".join(problems_in_labels(tree))


# ----------------------------------------------------------------------------------- the repository


def files(root):
    """What git tracks or would add; without git, all but what is made or fetched."""
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", root, *"ls-files -z --cached --others --exclude-standard".split()]
        if not (listing := subprocess.run(command, capture_output=True)).returncode:
            names = os.fsdecode(listing.stdout).split("\0")
            return [root / name for name in names if name and (root / name).is_file()]
    made = {".git", ".venv", "_build", "data", "__pycache__"}
    return [
        p
        for p in sorted(root.rglob("*"))
        if p.is_file() and not made & {*p.relative_to(root).parts}
    ]


def imports(module):
    """(top-level name, imported module of the package or None) of every import in a file."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ("xvit_minimal." if node.level else "") + (node.module or "")
            own = base.rstrip(".") == "xvit_minimal"
            found = [f"xvit_minimal.{alias.name}" for alias in node.names] if own else [base]
        else:
            continue
        for name in found:
            top, _, rest = name.partition(".")
            yield (
                top,
                rest.split(".")[0] if top == "xvit_minimal" else top if top in ARROWS else None,
            )


def test_the_package_is_imported_in_one_direction():
    TopologicalSorter(ARROWS).prepare()  # raises CycleError


def problems_in_repository(root):
    most = {".safetensors": 5_000_000}  # weights that ship with the book
    problems = [
        f"{p.relative_to(root)}: {p.stat().st_size:,} bytes, "
        f"more than {most.get(p.suffix, 1_000_000):,}: make it smaller or fetch it"
        for p in files(root)
        if p.stat().st_size > most.get(p.suffix, 1_000_000)
    ]
    problems += [
        f"{p.relative_to(root)}: say in the name what it holds"
        for p in files(root)
        if p.suffix == ".py" and {p.stem, p.parent.name} & {"utils", "common", "misc"}
    ]
    for module in modules(root):
        if (lines := len(module.read_text(encoding="utf-8").splitlines())) > 400:
            problems.append(
                f"xvit_minimal/{module.name}: {lines} lines, more than 400: split or shorten it"
            )
        for top, own in imports(module):
            if own is not None and own not in ARROWS.get(module.stem, set()):
                problems.append(
                    f"xvit_minimal/{module.name}: imports {own} of the package, "
                    "against its one direction"
                )
            elif (
                own is None and top not in COPIED.get(module.stem, {top}) | sys.stdlib_module_names
            ):
                problems.append(
                    f"xvit_minimal/{module.name}: imports {top}: it has to work with "
                    f"{' and '.join(sorted(COPIED[module.stem]))} alone"
                )
    return problems


@pytest.mark.parametrize(
    "file, text, complaint",
    [
        ("big.bin", "0" * 1_000_001, "more than 1,000,000"),
        ("big.safetensors", "0" * 5_000_001, "more than 5,000,000"),
        ("xvit_minimal/utils.py", "", "say in the name"),
        ("xvit_minimal/model.py", "\n" * 401, "more than 400"),
        ("xvit_minimal/attention.py", "def f():\n    from .model import XViT", "imports model"),
        ("xvit_minimal/attention.py", "import data", "imports data"),
        ("xvit_minimal/attention.py", "from xvit_minimal import xnorm", "imports xnorm"),
        ("xvit_minimal/attention.py", "import einops", "torch alone"),
        ("xvit_minimal/model.py", "from . import train", "imports train"),
    ],
)
def test_fault_in_the_repository_is_reported(tree, file, text, complaint):
    (tree / file).write_text(text, encoding="utf-8")
    assert complaint in "\n".join(problems_in_repository(tree))


NUMBERS = """
import torch
torch.manual_seed(0)
q, k, v = torch.randn(3, 2, 5, 4, dtype=torch.float64)
results = [attention.xnorm_attention(q, k, v), attention.softmax_attention(q, k, v)]
for module in (attention.XNormAttention, attention.SoftmaxAttention):
    results.append(module(8, num_heads=2).double()(torch.randn(2, 5, 8, dtype=torch.float64)))
numbers = [number for result in results for number in result.flatten().tolist()]
"""


def numbers_of_copy(file, folder):
    """Copy one file into an empty folder and use it from a process that has no package."""
    shutil.copy(file, folder / "attention.py")
    script = (
        "import sys\nsys.modules['xvit_minimal'] = None\nimport attention\n"
        f"{NUMBERS}\nprint(numbers)"
    )
    run = subprocess.run(
        [sys.executable, "-E", "-c", script], cwd=folder, capture_output=True, text=True
    )
    assert run.returncode == 0, f"a copy of {file.name} does not work by itself:\n{run.stderr}"
    return json.loads(run.stdout)


def test_attention_works_copied_out_by_itself(tmp_path):
    from xvit_minimal import attention

    here = {"attention": attention}
    exec(NUMBERS, here)
    assert numbers_of_copy(ROOT / "xvit_minimal/attention.py", tmp_path) == pytest.approx(
        here["numbers"], rel=1e-12
    )


@pytest.mark.parametrize("line", ["from xvit_minimal import data", "from .data import shapes"])
def test_copy_that_needs_the_package_is_reported(tmp_path, line):
    source = tmp_path / "changed.py"
    source.write_text(
        line + "\n" + (ROOT / "xvit_minimal/attention.py").read_text(encoding="utf-8"),
        encoding="utf-8",
    )
    with pytest.raises(AssertionError, match="does not work by itself"):
        numbers_of_copy(source, tmp_path)


# ------------------------------------------------------- a repository without a fault, the real one

CHECKS = [
    problems_in_shown_code,
    problems_in_coverage,
    problems_in_setup,
    problems_in_labels,
    problems_in_contents,
    problems_in_references,
    problems_in_records,
    problems_in_repository,
]


@pytest.mark.parametrize("check", CHECKS)
def test_clean_tree_has_no_problems(tree, check):
    assert check(tree) == []


@pytest.mark.parametrize("check", CHECKS)
def test_repository(check):
    if problems := check(ROOT):
        pytest.fail("\n".join(problems), pytrace=False)
