"""Keep what the book shows equal to what it comes from.

    python book/tools/sync.py [CHAPTER.ipynb ...]   rewrite, then execute these chapters (all of
                                                    them without arguments)
    python book/tools/sync.py --check               rewrite nothing, say what differs, exit 1 if
                                                    anything does
    python book/tools/sync.py --no-execute          rewrite only

Rewritten are the set-up cell of every chapter (from setup_cell.py and _config.yml) and the cells
that begin with the path of a package file (from that file). Everything is written through a
temporary file, so an interruption loses nothing.
"""

import argparse
import ast
import os
import sys
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[2]


def chapters(root=ROOT):
    """Paths of the notebooks in the table of contents, in reading order."""
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    files = [c["file"] for part in toc["parts"] for c in part["chapters"]]
    return [
        root / f"{f}.ipynb"
        for f in files
        if (root / f"{f}.ipynb").exists() or not (root / f"{f}.md").exists()
    ]


def setup_source(root=ROOT):
    """The set-up cell, with the repository and the ref that _config.yml names."""
    repository = yaml.safe_load((root / "_config.yml").read_text())["repository"]
    placeholder = "https://github.com/OWNER/REPOSITORY@REF"
    source = (root / "book/tools/setup_cell.py").read_text().strip()
    if placeholder not in source:
        raise ValueError(
            f"book/tools/setup_cell.py does not contain {placeholder}: put it back, "
            "it is replaced in the chapters"
        )
    return source.replace(placeholder, f"{repository['url']}@{repository['branch']}")


def defined_name(node):
    """The name that a top-level definition or constant binds, or None."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name
    if (
        isinstance(node, ast.Assign)
        and len(node.targets) == 1
        and isinstance(node.targets[0], ast.Name)
    ):
        return node.targets[0].id
    return None


def definitions(source):
    """{name: source text} of the top-level definitions and constants of a module."""
    nodes = ast.parse(source).body
    lines = source.splitlines()
    found = {}
    for node in nodes:
        if name := defined_name(node):
            start = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])
            found[name] = "\n".join(lines[start - 1 : node.end_lineno])
    return found


def package_file(cell):
    """The path in the first line of a cell that shows package code, else None."""
    first = cell.source.split("\n", 1)[0]
    path = first[2:].strip()
    return path if first.startswith("# xvit_minimal/") and path.endswith(".py") else None


def package_source(cell, root=ROOT):
    """What a package cell has to hold: its names, in its order, as the package has them now."""
    path = package_file(cell)
    if not (root / path).exists():
        raise ValueError(f"a cell shows {path}, which does not exist: correct its first line")
    known = definitions((root / path).read_text())
    parts = [f"# {path}"]
    for node in ast.parse(cell.source).body:
        name = defined_name(node)
        if name not in known:
            raise ValueError(
                f"a cell shows {name or ast.unparse(node)[:60]!r} as part of {path}, which has no "
                "such definition: add it there, or take the first line off the cell"
            )
        parts.append(known[name])
    text = parts[0] + "\n" + parts[1] if len(parts) > 1 else parts[0]
    for before, part in zip(parts[1:], parts[2:]):
        both_short = "\n" not in before and "\n" not in part
        text += ("\n" if both_short else "\n\n\n") + part
    return text


def rewrite(notebook, root=ROOT):
    """Bring a notebook's set-up and package cells up to date in place; return which changed."""
    changed = []
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        if "setup" in cell.metadata.get("tags", []):
            wanted = setup_source(root)
        elif package_file(cell):
            wanted = package_source(cell, root)
        else:
            continue
        if cell.source != wanted:
            cell.source = wanted
            changed.append(index)
    return changed


def execute(notebook, path):
    """Run a notebook from its own folder; keep what does not change from run to run."""
    from nbclient import NotebookClient

    here = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=300, resources=here, coalesce_streams=True).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def write(text, path):
    """Write a text file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "chapters", nargs="*", type=Path, help="notebooks; all of the table of contents by default"
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing, exit 1 if something is out of date"
    )
    parser.add_argument(
        "--no-execute", action="store_true", help="rewrite the cells but keep the old outputs"
    )
    args = parser.parse_args(argv)
    stale = False
    for path in args.chapters or chapters():
        notebook = nbformat.read(path, as_version=4)
        if changed := rewrite(notebook):
            stale = True
            print(f"{path}: cells {changed} differ from their source")
        if args.check:
            continue
        if not args.no_execute:
            print(f"{path}: running", flush=True)
            execute(notebook, path)
        write(nbformat.writes(notebook) + "\n", path)
    sys.exit(1 if args.check and stale else 0)


if __name__ == "__main__":
    main()
