"""Change the book's code in one place at a time and see whether anything notices.

    python tests/mutants.py book/part2/05_xnorm.ipynb --count 40      a chapter's own cells
    python tests/mutants.py xvit_minimal/attention.py --count 40      a file of the package

A mutant differs from the code in one operator, comparison, constant, axis or truth value. In a
chapter it is noticed by an exception or by a cell that prints something else than before; in the
package by the tests of its file. What survives is printed with its line. Not part of `make test`:
a chapter takes minutes, a file of the package many.
"""

import argparse
import ast
import contextlib
import copy
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.MatMult: None,  # its second factor is transposed
    ast.Lt: ast.Gt,
    ast.Gt: ast.Lt,
    ast.LtE: ast.Gt,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
# what is drawn or only worded: a chapter's pictures are looked at, not compared
DRAWN = {"ax", "axes", "fig", "plt", "axis", "figure", "part", "image"}
SECONDS = 600  # a mutant that runs longer than this, or ten times as long as the code, is noticed


def mutants(source):
    """[(line, words, changed source)]: everything that can be changed in one place."""
    found = []
    for number, node in enumerate(_nodes(ast.parse(source))):
        for words, change in _changes(node):
            tree = ast.parse(source)
            change(_nodes(tree)[number])
            found.append((node.lineno, words, ast.unparse(ast.fix_missing_locations(tree))))
    return found


def _nodes(tree):
    """The nodes that are worth changing: not those of pictures, asserts' messages, f-strings."""
    kept = []

    def visit(node):
        if isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom)) or _is_drawn(node):
            return
        if isinstance(node, (ast.BinOp, ast.Compare, ast.Constant, ast.UnaryOp)):
            kept.append(node)
        for name, child in ast.iter_fields(node):
            if isinstance(node, ast.Assert) and name == "msg":
                continue
            for each in child if isinstance(child, list) else [child]:
                if isinstance(each, ast.AST):
                    visit(each)

    visit(tree)
    return kept


def _is_drawn(node):
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    root = node.value.func
    while isinstance(root, (ast.Attribute, ast.Subscript, ast.Call)):
        root = root.func if isinstance(root, ast.Call) else root.value
    return isinstance(root, ast.Name) and root.id in DRAWN


def _changes(node):
    """[(words, function that changes the node in place)]."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        other = OPERATORS[type(node.op)]
        if other is None:
            return [("@ with the second factor transposed", _transpose)]
        words = f"{type(node.op).__name__} becomes {other.__name__}"
        return [(words, lambda n: setattr(n, "op", other()))]
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        other = OPERATORS[type(node.ops[0])]
        words = f"{type(node.ops[0]).__name__} becomes {other.__name__}"
        return [(words, lambda n: n.ops.__setitem__(0, other()))]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
        return [(f"without its {type(node.op).__name__}", _without)]
    if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        value = not node.value if isinstance(node.value, bool) else _other_number(node.value)
        return [(f"{node.value} becomes {value}", lambda n: setattr(n, "value", value))]
    return []


def _other_number(value):
    if isinstance(value, int):
        return {0: 1, 1: 2, 2: 1}.get(value, value + 1)
    return 2 * value if value else 1.0


def _transpose(node):
    node.right = ast.Attribute(copy.deepcopy(node.right), "mT", ast.Load())


def _without(node):
    node.op = ast.UAdd() if isinstance(node.op, ast.USub) else node.op
    if not isinstance(node.op, ast.UAdd):
        node.op, node.operand = ast.Not(), ast.UnaryOp(node.op, node.operand)
        node.operand = ast.Call(ast.Name("bool", ast.Load()), [node.operand], [])


def of_chapter(path, count, seed):
    """Yields (where, words, what noticed it or None) for mutants of a chapter's own cells."""
    import nbformat

    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    sources = [c.source for c in cells]
    compared = ["nbval-ignore-output" not in c.metadata.get("tags", []) for c in cells]
    begun = time.monotonic()
    whole = _in_a_process(path, {"sources": sources}, SECONDS)
    if isinstance(whole, str):
        sys.exit(f"error: {path.name} itself ends with {whole}: run it first")
    seconds = min(SECONDS, 10 * (time.monotonic() - begun))
    expected = [text if same else None for text, same in zip(whole, compared)]
    every = [
        (n, *mutant)
        for n, source in enumerate(sources)
        if not source.startswith(("# xvit_minimal/", "# Set-up"))
        and "hide-input" not in cells[n].metadata.get("tags", [])  # a picture's
        for mutant in mutants(source)
    ]
    for n, line, words, source in sorted(random.Random(seed).sample(every, min(count, len(every)))):
        changed = [*sources[:n], source, *sources[n + 1 :]]
        found = _in_a_process(path, {"sources": changed, "expected": expected}, seconds)
        text = sources[n].splitlines()[line - 1].strip()
        yield f"{path.name}, cell {cells[n].id}: {text}", words, found or None


def _in_a_process(path, order, seconds):
    """What `run_cells` says in a process of its own; "no end" if it takes longer."""
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--cells"],
            input=json.dumps(order),
            cwd=path.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return "no end"
    return json.loads(done.stdout) if done.returncode == 0 else "a crash"


def run_cells(sources, expected=None):
    """What each cell prints; with what is `expected`, what notices that it is another: an
    exception's name, "another output", or "" if nothing does."""
    import matplotlib
    import torch

    matplotlib.use("Agg")
    torch.set_num_threads(1)
    space, said = {"__name__": "__main__"}, []
    try:
        for n, source in enumerate(sources):
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(source, "<cell>", "exec"), space)
            said.append(output.getvalue())
            if expected and expected[n] not in (None, said[n]):
                return "another output"
    except BaseException as error:  # whatever it is, it was noticed
        return type(error).__name__
    return "" if expected else said


def of_package(path, count, seed):
    """The same for a file of the package: the tests named after it are run on each mutant."""
    test = ROOT / f"tests/test_{path.stem}.py"
    if not test.exists():
        sys.exit(
            f"error: {test.name} is missing: name a file of the package that has its own tests"
        )
    every = mutants(path.read_text())
    chosen = random.Random(seed).sample(every, min(count, len(every)))
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder)
        for name in ("xvit_minimal", "tests"):
            shutil.copytree(ROOT / name, copied / name)
        shutil.copy(ROOT / "pyproject.toml", copied)
        for line, words, source in sorted(chosen):
            (copied / "xvit_minimal" / path.name).write_text(source)
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-x", "-q", f"tests/{test.name}"],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": folder, "OMP_WAIT_POLICY": "PASSIVE"},
                capture_output=True,
                timeout=SECONDS,
            )
            text = path.read_text().splitlines()[line - 1].strip()
            yield f"{path.name}:{line}: {text}", words, "a test" if done.returncode else None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="chapters, or files of the package")
    parser.add_argument("--count", type=int, default=40, help="mutants of each file [40]")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    options = parser.parse_args()
    tried = lived = 0
    for path in [path.resolve() for path in options.files]:
        of = of_chapter if path.suffix == ".ipynb" else of_package
        for where, words, noticed in of(path, options.count, options.seed):
            tried, lived = tried + 1, lived + (noticed is None)
            print(f"{noticed or 'SURVIVED':18} {words:34} {where}", flush=True)
    print(f"{tried} mutants, {lived} survived")


if __name__ == "__main__":
    if sys.argv[1:] == ["--cells"]:  # how it calls itself
        found = run_cells(**json.load(sys.stdin))
        print(json.dumps(found))
    else:
        main()
